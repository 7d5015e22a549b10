"""Why an input that looks wrong is rightly accepted; what no line here explains is listed for a reader to judge."""

from __future__ import annotations

import re

__all__ = ["reason"]

REASONS: tuple[tuple[str, str, str], ...] = (
    ("settings", "", "in the range of its field, which excludes what would do nothing or train backwards"),
    ("options", "=None$", "None is the task's own default"),
    ("options", "autoreset_mode=", "the mode's name in another spelling of Gymnasium's"),
    ("options", "", "in the range of the option"),
    ("checkpoints", r"^\w+ load, line", "load() reads the checkpoint alone, no file of the run folder"),
    ("checkpoints", r"line \d+ of \S+ is '\s*#", "a line of the comments in config.yaml"),
    ("checkpoints", r"evaluate, line \d+ of config", "evaluate.py takes the settings from the checkpoint"),
    ("checkpoints", r"line \d+ of run.json", "a line that names nothing this command reads"),
    ("checkpoints", r"line \d+ of config", "a setting that the command may change, or the half of a comment"),
    ("checkpoints", "(evaluate|resume), (a bit|cut|foreign|segment|other)",
     "the newest checkpoint is damaged: the one before it goes on, and a warning says so"),
    ("checkpoints", r"\['ccrl'\]", "the version that wrote it is for messages; the format's number decides"),
    ("checkpoints", r"\['rng'\]|\['seed'\]", "another number of the same kind"),
    ("checkpoints", r"\['callbacks'\]", "the state of a callback that is not in use here"),
    ("checkpoints", "a bit of byte", "a bit in the padding of the archive, in none of its files"),
    ("checkpoints", "segment", "a segment that the command does not read"),
    ("checkpoints", "(resume|evaluate), .*(removed|renamed|is )",
     "a value that may be another one, or of a part that this command does not read"),
    ("jsonl", "^(bytes|removed|value|long|few|text|option|path)",
     "an answer that no completion can give, other letters, a row without a demonstration, or fewer: all can be asked"),
    ("csv", r"^rows.npz .* gone", "a column that follows from the others (next_obs, truncated, episode)"),
    ("csv", r"^rows.npz .* bytes", "a bit of the archive's headers: the checksums of all columns are right"),
    ("csv", r"^rows.npz", "numbers of another type that are the same numbers"),
    ("csv", "^demand", "a number of another row of the table that is a demand too"),
    ("csv", r"^(progress|eval).csv",
     "resuming drops the changed row, or the changed cell is of another column than the one that is drawn"),
    ("gymnasium", "raise=", "the environment's own error is passed on as it is"),
    ("gymnasium", r"(reward|terminated|truncated)=", "one number or one flag, in another type or in a list of one"),
    ("gymnasium", r"obs=|_space=", "a space that the suite takes, or the same numbers in another type"),
    ("commands", "", "valid: the words that changed are options with defaults, or valid values of them"),
    ("scripts", "", "valid: the words that changed are names of files to write, or valid values"),
    ("uses", "^learn", "a number of steps, or one of them in another type"),
    ("uses", "^saved", "a file name; folders above it are made"),
    ("uses", "^shown", "numbers of the right shape, none at all among them"),
    ("uses", "^loaded", "the same spaces, or an option that adds nothing here"),
    ("uses", "^remembered", "a column of so many rows"),
    ("uses", "", "a number of the right kind"),
)  # fmt: skip


def reason(kind: str, what: str) -> str | None:
    """The first that fits ``what``, an input of ``kind``."""
    return next((why for k, pattern, why in REASONS if k == kind and re.search(pattern, what, re.DOTALL)), None)
