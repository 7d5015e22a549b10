"""What an input is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ccrl.experiment.files import FolderInUseError

__all__ = ["IN_WORDS", "SIZES", "Case"]

IN_WORDS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, RuntimeError, FolderInUseError)
"""Types of errors that speak to whoever gave the input, if their text does."""


@dataclass
class Case:
    """One input."""

    what: str
    begin: Callable[[], Any]
    go_on: Callable[[], Any] = lambda: None
    theirs: tuple[type[BaseException], ...] = ()
    """Errors that are the user's own and are passed on as they are."""


SIZES: dict[str, Any] = {
    "num_envs": 2, "n_steps": 8, "batch_size": 8, "n_epochs": 1, "hidden": (4,), "compile": "off", "n_prompts": 2,
    "group_size": 2, "model": "tabular", "n_train": 4, "n_dev": 2, "dev_every": 1, "critic_epochs": 1, "n_groups": 2,
    "inner_steps": 2, "median_hidden": (4,), "learning_starts": 8, "buffer_size": 64, "likelihood_points": 8,
    "kernel_hidden": (4,), "kernel_features": 2, "rank": 2, "cg_iterations": 2, "critic_batch_size": 8, "updates": 2,
    "rounds": 2, "steps": 3, "denoiser_steps": 2, "denoiser_features": 8, "reference_steps": 16, "eval_steps": 2,
    "warm_start_steps": 2, "teacher_steps": 2, "n_times": 2, "trajectories": 2, "model_hidden": (4,), "iterations": 2,
    "generations": 1,
}  # fmt: skip
"""Settings that make a training of any agent short."""
