"""Generation tasks for flow policies, and the one door to them: :func:`make_flow_task`.

All are mixtures of Gaussians, so the density, the velocity and the optimum of a tilted reward are known.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from typing import Any

from ccrl.flow.task import FlowTask

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
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"no flow task {name!r}; {hint}expected one of {', '.join(TASKS)}")
    module, attribute = TASKS[name]
    task = getattr(importlib.import_module(module), attribute)
    accepted = list(inspect.signature(task).parameters)
    for option in options:
        if option not in accepted:
            near = difflib.get_close_matches(option, accepted, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise TypeError(f"{name} has no option {option!r}; {hint}expected some of {', '.join(accepted) or 'none'}")
    made: FlowTask = task(**options)
    return made
