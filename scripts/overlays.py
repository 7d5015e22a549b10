"""The tuned settings that ``train.py --tuned`` lays under the flags."""

from __future__ import annotations

import itertools
import sys

from ccrl.packages import check_siblings

check_siblings("agents")

from agents import tuned

__all__ = ["tuned_settings"]


def tuned_settings(agent: str, words: list[str], default_env: str, config: str | None) -> tuple[str, list[str]]:
    """The file of settings, and the words of the command line without ``--tuned``.

    :param default_env: the environment where no ``--env`` is among the words.
    :param config: the file of ``--config``.
    :raises SystemExit: that is asked for too.
    :raises ConfigError: nothing tuned for the agent and the environment.
    """
    if config is not None:
        sys.exit("--tuned: expected no --config beside it, got both; the flags you add win over either")
    words = [word for word in words if word != "--tuned"]
    named = [part for word in words for part in (word.split("=", 1) if word.startswith("--env=") else [word])]
    given = [value for word, value in itertools.pairwise(named) if word == "--env"]
    file = tuned.find(agent, given[-1] if given else default_env)  # of a flag that is given twice the last one counts
    reached = tuned.head(file)["Reached here"]
    print(f"[ccrl] tuned settings: {file}\n[ccrl] reached with them here: {reached}", flush=True)
    return str(file), words
