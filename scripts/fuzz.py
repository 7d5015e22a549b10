"""Bad input of nine kinds, from a seed, and how it is answered: by hand, not in CI.

    python scripts/fuzz.py --seed 7                       # 300 inputs of each kind
    python scripts/fuzz.py --kinds checkpoints csv --count 50 --out fuzz.md

clear: refused before anything runs, in words. late: in words, but after it began. raw: an error without words for
whoever gave the input. hung: nothing for --limit seconds. accepted: it worked, listed with the
reason why that is right (scripts/fuzzing/reasons.py).
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from ccrl.settings import Count, Natural, Settings
from scripts.fuzzing.reasons import reason

__all__ = ["Kind", "Options", "Verdict", "main", "play"]

Kind = Literal["settings", "options", "checkpoints", "jsonl", "csv", "gymnasium", "commands", "scripts", "uses"]
WORDS = re.compile(
    "expect|did you mean|refused|must|need|no such|has no|is not finite|cannot be written|make them|ask for|pass |"
    "take a |leave |enlarge",
    re.IGNORECASE,
)
VERDICTS = ("clear", "late", "raw", "accepted", "hung")


@dataclass(frozen=True)
class Options(Settings):
    """Which inputs, and where the report goes."""

    seed: Natural = 0
    """The inputs follow from this number."""
    count: Count = 300
    """There are so many inputs of each kind."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    """These kinds of input are tried."""
    jobs: Count = 2
    """So many processes try them."""
    limit: Count = 60
    """An input that takes more seconds than this has hung."""
    out: Path | None = None
    """The report is written to this file; unset, it is printed alone."""


class Verdict(NamedTuple):
    """How one input was answered."""

    kind: str
    number: int
    what: str
    verdict: str
    answer: str


class Hung(BaseException):
    """Time is over."""


def play(kind: Kind, seed: int, number: int, limit: int) -> Verdict:
    """Input ``number`` of ``kind``, tried in this process."""
    from scripts.fuzzing.case import IN_WORDS
    from scripts.fuzzing.cases import case as make

    rng = random.Random(f"{seed} {kind} {number}")
    folder = tempfile.TemporaryDirectory(prefix="fuzz")
    case = make(kind, rng, Path(folder.name))
    signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, limit)
    verdict, answer, said = "accepted", "", io.StringIO()
    try:
        quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said)
        with quiet[0], quiet[1], warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.begin()
            verdict = "late"
            case.go_on()
        verdict = "accepted"
    except Hung:
        verdict = "hung"
    except SystemExit as error:
        text = " ".join((said.getvalue() if error.code == 2 else str(error.code)).split())
        verdict, answer = (verdict if verdict == "late" else "clear", text) if error.code else ("accepted", "")
    except case.theirs as error:
        verdict, answer = "accepted", f"the environment's own {type(error).__name__} is passed on"
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
        in_words = isinstance(error, IN_WORDS) and WORDS.search(str(error))
        if not in_words:
            verdict, answer = "raw", f"{answer}\n{_where(error)}"
        elif verdict == "accepted":
            verdict = "clear"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        with contextlib.suppress(OSError):
            folder.cleanup()
    return Verdict(kind, number, case.what, verdict, " ".join(answer.split())[:400])


def _over(number: int, frame: Any) -> None:
    raise Hung


def _where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/fuzz" not in f.filename]
    return f"at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _begin() -> None:
    import torch

    # environments in processes: a spawned one would import everything again, for every input
    multiprocessing.set_start_method("fork" if hasattr(os, "fork") else None, force=True)
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"


def _all(options: Options) -> Iterator[Verdict]:
    todo = [(kind, number) for number in range(options.count) for kind in options.kinds]
    context = multiprocessing.get_context("spawn")
    while todo:  # a process that dies takes its pool with it
        with ProcessPoolExecutor(options.jobs, context, _begin) as pool:
            futures = {pool.submit(play, kind, options.seed, n, options.limit): (kind, n) for kind, n in todo}
            dead = []
            for future, (kind, n) in futures.items():
                try:
                    yield future.result()
                    todo.remove((kind, n))
                except BrokenProcessPool:
                    dead.append((kind, n))
            if dead:
                kind, n = dead[0]
                todo.remove((kind, n))
                yield Verdict(kind, n, "", "raw", "the process died, or one beside it")


def main(options: Options) -> list[Verdict]:
    """Try all inputs, and print how they were answered."""
    found = []
    for verdict in _all(options):
        found.append(verdict)
        if verdict.verdict in ("raw", "hung"):
            print(f"{verdict.verdict}: {verdict.kind} {verdict.number}: {verdict.what}: {verdict.answer}", flush=True)
    text = report(options, found)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    return found


def report(options: Options, found: list[Verdict]) -> str:
    """Markdown: counts, then every input that was not refused clearly."""
    lines = [f"`python scripts/fuzz.py --seed {options.seed} --count {options.count}`", "",
             f"| kind | {' | '.join(VERDICTS)} |", f"|---|{'---:|' * len(VERDICTS)}"]  # fmt: skip
    for kind in options.kinds:
        counts = Counter(v.verdict for v in found if v.kind == kind)
        lines.append(f"| {kind} | {' | '.join(str(counts[name]) for name in VERDICTS)} |")
    for name in VERDICTS[1:]:
        chosen = sorted((v for v in found if v.verdict == name), key=lambda v: (v.kind, v.what))
        if chosen and name != "accepted":
            lines += ["", f"## {name}", ""]
            lines += [f"- {v.kind} {v.number}: {v.what}" + (f": {v.answer}" if v.answer else "") for v in chosen]
    accepted: dict[tuple[str, str], list[Verdict]] = {}
    for v in found:
        if v.verdict == "accepted":
            accepted.setdefault((v.kind, reason(v.kind, v.what) or "to be judged"), []).append(v)
    for (where, why), mine in sorted(accepted.items()):
        lines += ["", f"## accepted, {where}: {why}", ""]
        lines += [f"- {v.number}: {' '.join(v.what.split())}" for v in mine]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    answers = main(tyro.cli(Options, description=__doc__))
    sys.exit(1 if any(v.verdict in ("raw", "hung") for v in answers) else 0)
