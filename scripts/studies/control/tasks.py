"""The tasks: budgets, and the thresholds that were fixed before the runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TASKS", "TUNING_SEEDS", "Task"]

TUNING_SEEDS = 2
"""Runs of every value of a tuned setting."""


@dataclass(frozen=True)
class Task:
    """One task of the comparison."""

    id: str
    steps: int
    """Of a test run."""
    tuning_steps: int
    """Of a run that a step size is chosen by."""
    seeds: int
    """Test runs of every method."""
    threshold: float
    """A run has learnt when the mean return of an evaluation is at least this."""


TASKS = {
    task.id: task
    for task in (
        Task("CartPole-v1", 51_200, 51_200, 10, 475.0),
        Task("Acrobot-v1", 102_400, 102_400, 10, -100.0),
        Task("InvertedPendulum-v5", 102_400, 102_400, 10, 950.0),
        Task("Hopper-v5", 307_200, 102_400, 5, 1000.0),
        Task("HalfCheetah-v5", 307_200, 102_400, 5, 1000.0),
    )
}
"""By id, the quick ones first: what a killed study leaves is then whole tasks."""
