"""Two reward components: the right number, and the form it is asked in."""

from __future__ import annotations

from envs.text.arithmetic import Arithmetic
from envs.text.generated import Verdict, natural

__all__ = ["FormatAccuracy"]


class FormatAccuracy(Arithmetic):
    """Modular arithmetic whose answers belong between marks: ``12+7%100=`` wants ``#19#``.

    ``accuracy`` is 1 for the right number with any number of marks in any place, ``format`` is 1 for digits between
    two marks, right or wrong: each can be had without the other. Options as for arithmetic.
    """

    name = "format_accuracy"
    components = ("accuracy", "format")
    mark = "#"

    def judge(self, truth: int, text: str) -> Verdict:
        answer = natural(text.replace(self.mark, ""))
        formatted = text[:1] == text[-1:] == self.mark and natural(text[1:-1]) >= 0
        return Verdict((float(answer == truth), float(formatted)), answer)
