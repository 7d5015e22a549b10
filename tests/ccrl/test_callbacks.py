"""Callbacks: what a list may hold, what they refuse, and signals that end training with a state worth saving."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import PPO
from ccrl.experiment import callbacks
from ccrl.experiment.callbacks import (
    Callback,
    CheckpointCallback,
    EvalCallback,
    FunctionCallback,
    LogCallback,
    StopOnReward,
    StopOnSignal,
    as_callback,
)
from ccrl.experiment.checkpoint import latest, load
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.evaluation import EvalResult


def agent() -> PPO:
    return PPO("CartPole-v1", PPO.Config(num_envs=2, n_steps=8, batch_size=8, n_epochs=1, hidden=(4,), compile="off"))


def test_a_list_may_hold_functions() -> None:
    seen: list[int] = []
    one, two = as_callback([StopOnReward(1e9), lambda a: seen.append(a.iteration)])
    assert isinstance(one, StopOnReward)
    assert isinstance(two, FunctionCallback)
    assert isinstance(as_callback((one, two))[0], StopOnReward)
    agent().learn(until=32, callback=[lambda a: seen.append(a.iteration)])
    assert seen == [1, 2]
    assert agent().learn(until=160, callback=lambda a: a.iteration < 3).iteration == 3, "False ends training"
    assert agent().learn(until=32, callback=lambda a: 0.0).iteration == 2, "a number does not"
    for wrong in (3, [None], StopOnReward):
        with pytest.raises(TypeError, match="expected a Callback or a function of the agent"):
            as_callback(wrong)  # type: ignore[arg-type]


def test_counts_below_one_are_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every: expected >= 1, got 0"):
        LogCallback(None, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keep: expected >= 1, got 0"):
        CheckpointCallback(tmp_path, 10, keep=0)
    with pytest.raises(ValueError, match="threshold: expected a finite number, got nan"):
        callbacks.StopOnReward(float("nan"))  # no return is less: it would stop at once
    with pytest.raises(TypeError, match="expected a Callback or a function"):
        as_callback("")  # type: ignore[arg-type]


class Player:
    """An agent whose deterministic evaluations are ``reward_components`` in turn, the stochastic ones their
    negatives."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.asked, self.saved = list(scores), list[Any](), list[int]()
        self.num_timesteps = self.iteration = 0
        self.healthy, self.ep_rew_mean = True, 0.0

    def evaluate(self, env: Any, episodes: int, seed: int, deterministic: bool) -> EvalResult:
        self.asked.append((env, episodes, seed, deterministic))
        score = self.scores[0] if deterministic else -self.scores.pop(0)
        return EvalResult(np.full(episodes, score), np.full(episodes, 1))

    def save(self, path: Path) -> None:
        self.saved.append(self.num_timesteps)
        path.touch()

    def at(self, steps: int, callback: callbacks.Callback) -> bool | None:
        self.num_timesteps, self.iteration = steps, self.iteration + 1
        return callback.on_iteration(self)


def test_evaluations_are_of_both_kinds_on_the_same_episodes_and_the_best_is_kept(tmp_path: Path) -> None:
    player, env = Player(1.0, 3.0, 2.0, 3.0), object()
    rows: list[Any] = []
    logger: Any = type("Rows", (), {"log": lambda self, step, row: rows.append((step, row["eval/mean_reward"]))})()
    callback = EvalCallback(env, tmp_path, every=10, episodes=4, logger=logger)  # type: ignore[arg-type]
    for steps in (10, 20, 30, 40):
        player.at(steps, callback)
    assert rows == [(10, 1), (20, 3), (30, 2), (40, 3)]
    assert player.asked == [(env, 4, 10_000, True), (env, 4, 10_000, False)] * 4
    columns = read_columns(tmp_path / "eval.csv")
    assert columns["eval/mean_reward"].tolist() == [1, 3, 2, 3]
    assert columns["eval_stochastic/mean_reward"].tolist() == [-1, -3, -2, -3]
    assert player.saved == [10, 20]
    later, resumed = Player(2.5, 3.5), EvalCallback(env, tmp_path, every=10, resume_step=40)  # type: ignore[arg-type]
    resumed.load_state_dict(callback.state_dict())
    for steps in (50, 60):
        later.at(steps, resumed)
    assert later.saved == [60], "a resumed run must not overwrite the best with something worse"


def test_one_callback_evaluates_in_several_calls_of_learn(tmp_path: Path) -> None:
    player, callback = Player(1.0, 2.0), EvalCallback(object(), tmp_path, every=10)  # type: ignore[arg-type]
    for steps in (10, 20):
        callback.on_training_start(player)
        player.at(steps, callback)
        callback.on_training_end(player)
    assert read_columns(tmp_path / "eval.csv")["step"].tolist() == [10, 20]


def test_the_time_of_evaluations_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        def process_time(self) -> float:
            return 2.0 * self.now

    class Slow(Player):
        def evaluate(self, *arguments: Any) -> EvalResult:
            clock.now += 1.5
            return super().evaluate(*arguments)

    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    player, callback = Slow(1.0, 2.0), EvalCallback(object(), tmp_path, every=1)  # type: ignore[arg-type]
    for steps in (1, 2):
        player.at(steps, callback)
    assert (callback.seconds, callback.cpu_seconds) == (6.0, 12.0)


def test_due_at_multiples_of_every_also_after_a_resume(tmp_path: Path) -> None:
    player, callback = Player(), CheckpointCallback(tmp_path, every=10, keep=2)
    for steps in (9, 10, 11, 35, 39, 40):
        player.at(steps, callback)
    assert player.saved == [10, 35, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000000035.pt", "step_000000000040.pt"]
    resumed = CheckpointCallback(tmp_path, every=10)
    resumed.load_state_dict(callback.state_dict())
    player.at(49, resumed)
    player.at(50, resumed)
    assert player.saved == [10, 35, 40, 50]
    resumed.on_training_end(player)
    assert player.saved == [10, 35, 40, 50], "what is saved already"


def test_damaged_checkpoints_alone_do_not_displace_new_ones(tmp_path: Path) -> None:
    (tmp_path / "step_000000001000.pt").write_bytes(b"half of one")
    callback = CheckpointCallback(tmp_path, every=10, keep=1)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(FileExistsError, match="got damaged ones; choose"):
        callback.on_training_start(Player())


def test_stop_on_reward_when_the_mean_reaches_it() -> None:
    player = Player()
    for mean, expected in ((None, None), (4.9, None), (5.0, False), (5.1, False)):
        player.ep_rew_mean = mean  # type: ignore[assignment]
        assert player.at(1, StopOnReward(5.0)) is expected


def test_log_every_so_many_iterations() -> None:
    rows: list[Any] = []
    logger = type("Rows", (), {"log": lambda self, *row: rows.append(row)})()
    player = Player()
    player.scalars = {"a": 1.0}  # type: ignore[attr-defined]
    for steps in (8, 16, 24, 32):
        player.at(steps, LogCallback(logger, every=2))
    assert rows == [(16, {"a": 1.0}), (32, {"a": 1.0})]


def test_two_states_under_one_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['CheckpointCallback'\] occur twice.*override their key"):
        as_callback([CheckpointCallback(tmp_path / "a", 1), CheckpointCallback(tmp_path / "b", 1)])
    assert len(as_callback([StopOnReward(1.0), StopOnReward(2.0)])) == 2, "without state there is nothing to lose"


def test_a_callback_that_raises_leaves_the_state_before_it(tmp_path: Path) -> None:
    def fail(trained: Any) -> None:
        if trained.iteration == 2:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        agent().learn(until=160, callback=[fail, CheckpointCallback(tmp_path, 1_000)])
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
    trained.learn(until=160, callback=[CheckpointCallback(tmp_path, 1_000), stop])
    assert healthy == [False], "the signal came between iterations"
    assert stop.received == signal.Signals(number).name
    assert trained.num_timesteps == 32
    assert load(latest(tmp_path))["state"]["learner"]["counters"]["iteration"] == 2
    assert f"{stop.received}: ends after this iteration" in capfd.readouterr().err
    assert signal.getsignal(number) == before


def test_the_second_signal_acts_at_once(tmp_path: Path) -> None:
    trained = agent()

    def twice(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trained.estimator.prepare = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trained.learn(until=160, callback=[CheckpointCallback(tmp_path, 1_000), StopOnSignal()])
    assert latest(tmp_path) is None, "half an iteration was saved"


def test_without_a_signal_the_handlers_are_put_back() -> None:
    before, during = signal.getsignal(signal.SIGTERM), list[Any]()
    agent().learn(until=16, callback=[lambda _: during.append(signal.getsignal(signal.SIGTERM)), StopOnSignal()])
    assert during != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trained = agent()
    trained.learn(until=32, callback=[lambda _: signal.raise_signal(signal.SIGINT), StopOnSignal()])
    assert trained.num_timesteps == 32
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_train_without_handlers() -> None:
    before, trained = signal.getsignal(signal.SIGINT), agent()
    thread = threading.Thread(target=trained.learn, args=(16, StopOnSignal()))
    thread.start()
    thread.join()
    assert trained.num_timesteps == 16
    assert signal.getsignal(signal.SIGINT) == before


def test_hooks_of_other_libraries_are_refused() -> None:
    """A callback ported from Stable-Baselines3 would never be called."""
    with pytest.raises(TypeError, match=r"Ported: expected on_training_start, on_iteration .* got \['_on_step'\]"):

        class Ported(Callback):
            def _on_step(self) -> bool:
                return True
