"""Generation tasks for flow policies, and the one door to them: :func:`make_flow_task`.

All are mixtures of Gaussians, so the density, the velocity and the optimum of a tilted reward are known.
"""

from __future__ import annotations

from typing import Any

from ccrl.flow.task import FlowTask
from envs.door import make_from

__all__ = ["TASKS", "make_flow_task"]

TASKS = {
    "ring2d": ("envs.flow.plane", "Ring2d"),
    "moons": ("envs.flow.plane", "Moons"),
    "mixture16": ("envs.flow.mixture16", "Mixture16"),
    "normal": ("envs.flow.mixture16", "Normal"),
    "shapes": ("envs.flow.shapes", "Shapes"),
    "gridworld": ("envs.flow.gridworld", "GridActions"),
}
"""Name -> module and class."""


def make_flow_task(name: str, **options: Any) -> FlowTask:
    """The generation task ``name``.

    Args:
        name: one of :data:`TASKS`.
        options: of the task, the arguments of its class.

    Raises:
        ValueError: there is no such task, or an option has a value the task cannot have.
        TypeError: the task has no such option.
    """
    made: FlowTask = make_from(TASKS, "flow task", name, options)
    return made
