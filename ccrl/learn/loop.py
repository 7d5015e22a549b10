"""The loop around iterations: callbacks, the progress bar, errors that say where training was."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ccrl.experiment.callbacks import Callback, running
from ccrl.experiment.progress import ProgressBar
from ccrl.signals import DeferredSignals
from ccrl.waiting import listening

__all__ = ["run"]


def run(agent: Any, end: int, callbacks: Sequence[Callback], progress_bar: bool) -> None:
    """Iterate until the agent's clock shows ``end``, a callback says stop, or the agent has finished.

    Every hook of every callback is called, also after one that fails or wants to stop: a checkpoint must not be skipped
    and a signal handler must not stay; the first failure is raised after the others had their turn. Ctrl-C is raised
    between two iterations, where the agent can be saved; the second one at once.
    """
    learner = agent.learner
    bar = ProgressBar(end, agent.num_timesteps, progress_bar, learner.times)
    step = end  # what an iteration adds to the clock: which one is the last is told from the one before it
    try:
        with (
            DeferredSignals(signal.SIGINT) as interrupt,
            listening(learner.times),
            listening(bar),
            running(callbacks, agent),
        ):
            while learner.clock < end and not agent.finished and not learner.agree(bool(interrupt.received)):
                before = learner.clock
                learner.watched = before + step >= end or any(c.reads(learner.iteration + 1) for c in callbacks)
                learner.iterate()
                step = learner.clock - before
                bar.update(learner.clock, agent.ep_rew_mean)
                if learner.agree(any(_all(callbacks, lambda c: _is_false(c.on_iteration(agent))))):
                    break
        if interrupt.received:
            raise KeyboardInterrupt
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}; iteration {learner.iteration}, {learner.clock} {learner.clock_unit}; last good checkpoint: "
            f"{agent.last_checkpoint or 'none was written'}"
        ) from error
    finally:
        bar.close()


def _is_false(answer: object) -> bool:
    """Whether it is Python's or NumPy's False: the 0.0 of a function that returns a number is no wish to stop."""
    return isinstance(answer, bool | np.bool_) and not answer


def _all(callbacks: Sequence[Callback], hook: Callable[[Callback], bool]) -> list[bool]:
    answers: list[bool] = []
    failure: BaseException | None = None
    for callback in callbacks:
        try:
            answers.append(hook(callback))
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return answers
