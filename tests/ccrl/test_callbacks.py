"""Callbacks: what a list may hold, what they refuse, and signals that end training with a state worth saving."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agents import PPO
from ccrl.experiment.callbacks import (
    CheckpointCallback,
    FunctionCallback,
    LogCallback,
    StopOnReward,
    StopOnSignal,
    as_callback,
)
from ccrl.experiment.checkpoint import latest, load


@pytest.fixture(autouse=True)
def _python_s_own_handlers() -> Iterator[None]:
    """Tests may run as a job in the background, which ignores SIGINT."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def agent() -> PPO:
    return PPO("CartPole-v1", PPO.Config(num_envs=2, n_steps=8, batch_size=8, n_epochs=1, hidden=(4,), compile="off"))


def test_a_list_may_hold_functions() -> None:
    seen: list[int] = []
    one, two = as_callback([StopOnReward(1e9), lambda a: seen.append(a.iteration)])
    assert isinstance(one, StopOnReward)
    assert isinstance(two, FunctionCallback)
    agent().learn(32, [lambda a: seen.append(a.iteration)])
    assert seen == [1, 2]
    for wrong in (3, [None]):
        with pytest.raises(TypeError, match="expected a Callback or a function of the agent"):
            as_callback(wrong)  # type: ignore[arg-type]


def test_counts_below_one_are_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LogCallback: expected every >= 1 iterations, got 0"):
        LogCallback(None, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CheckpointCallback: expected keep >= 1 checkpoints, got 0"):
        CheckpointCallback(tmp_path, 10, keep=0)


def test_a_callback_that_raises_leaves_the_state_before_it(tmp_path: Path) -> None:
    def fail(trained: Any) -> None:
        if trained.iteration == 2:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        agent().learn(160, [fail, CheckpointCallback(tmp_path, 1_000)])
    assert PPO.load(latest(tmp_path)).num_timesteps == 32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_its_iteration(tmp_path: Path, number: int, capfd: Any) -> None:
    before, trained, stop = signal.getsignal(number), agent(), StopOnSignal()
    prepare, healthy = trained.estimator.prepare, list[bool]()

    def interrupted(*arguments: Any) -> Any:
        if trained.iteration == 1:
            healthy.append(trained.healthy)
            signal.raise_signal(number)
        return prepare(*arguments)

    trained.estimator.prepare = interrupted  # type: ignore[method-assign]
    trained.learn(160, [CheckpointCallback(tmp_path, 1_000), stop])
    assert healthy == [False], "the signal came between iterations"
    assert stop.received == signal.Signals(number).name
    assert trained.num_timesteps == 32
    assert load(latest(tmp_path))["state"]["iteration"] == 2
    assert f"{stop.received}: ends after this iteration" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_at_once(tmp_path: Path) -> None:
    trained = agent()

    def twice(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trained.estimator.prepare = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trained.learn(160, [CheckpointCallback(tmp_path, 1_000), StopOnSignal()])
    assert latest(tmp_path) is None, "half an iteration was saved"


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trained = agent()
    trained.learn(32, [lambda _: signal.raise_signal(signal.SIGINT), StopOnSignal()])
    assert trained.num_timesteps == 32
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_train_without_handlers() -> None:
    before, trained = signal.getsignal(signal.SIGINT), agent()
    thread = threading.Thread(target=trained.learn, args=(16, StopOnSignal()))
    thread.start()
    thread.join()
    assert trained.num_timesteps == 16
    assert signal.getsignal(signal.SIGINT) == before
