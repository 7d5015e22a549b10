"""What is saved is a state that a run can go on from, and what is loaded is what was saved, or refused."""

from __future__ import annotations

import random
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import envs
from agents import PPO
from agents.ppo import PPOConfig
from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import Callback, CheckpointCallback, EvalCallback, LogCallback, StopOnSignal
from ccrl.experiment.logger import Logger
from ccrl.registry import UntrustedError

SMALL: dict[str, Any] = {"num_envs": 2, "n_steps": 16, "n_epochs": 1, "batch_size": 16, "compile": "off"}


def agent(env: Any = "CartPole-v1", seed: int = 0, env_kwargs: Any = None, **options: Any) -> PPO:
    return PPO(env, PPOConfig(**SMALL | options), seed=seed, env_kwargs=env_kwargs)


def rewritten(path: Path, **changes: Any) -> Path:
    """A whole checkpoint with another header."""
    saved = checkpoint.load(path)
    checkpoint.save(path, saved | changes)
    return path


# -- the middle of an iteration ---------------------------------------------------------------------------------------


def test_half_an_iteration_is_neither_saved_nor_learnt_on_from(tmp_path: Path) -> None:
    a = agent()
    step, calls = a.env.step, [0]

    def interrupted(action: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return step(action)

    a.env.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        a.learn(320)
    for go_on in (lambda: a.save(tmp_path / "x.pt"), lambda: a.learn(320)):
        with pytest.raises(RuntimeError, match=r"got one in the middle of iteration 2.*load the last checkpoint"):
            go_on()
    assert not (tmp_path / "x.pt").exists()


def test_ctrl_c_is_raised_between_iterations_where_saving_works(tmp_path: Path) -> None:
    a, before = agent(), signal.getsignal(signal.SIGINT)
    prepare = a.estimator.prepare

    def interrupted(*arguments: Any) -> Any:
        if a.iteration == 1:
            signal.raise_signal(signal.SIGINT)
        return prepare(*arguments)

    a.estimator.prepare = interrupted  # type: ignore[method-assign]
    try:
        a.learn(320)
    except KeyboardInterrupt:
        a.save(tmp_path / "x.pt")
    assert PPO.load(tmp_path / "x.pt").num_timesteps == 64
    assert signal.getsignal(signal.SIGINT) == before


def test_parameters_that_are_not_finite_are_not_called_good(tmp_path: Path) -> None:
    def spoil(trained: Any) -> None:
        if trained.iteration == 2:
            next(trained.policy.parameters()).data.view(-1)[0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"actor.* last good checkpoint: .*step_000000000032\.pt"):
        agent().learn(320, [spoil, CheckpointCallback(tmp_path, 32)])
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000032.pt"]


# -- callbacks --------------------------------------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self, where: str) -> None:
        self.where = where

    def on_training_start(self, agent: Any) -> None:
        if self.where == "start":
            raise ZeroDivisionError("start")

    def on_training_end(self, agent: Any) -> None:
        if self.where == "end":
            raise ZeroDivisionError("end")


@pytest.mark.parametrize("where", ["start", "end"])
def test_a_callback_that_fails_does_not_take_the_others_turn(tmp_path: Path, where: str) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError, match=where):
        agent().learn(64, [StopOnSignal(), Fails(where), CheckpointCallback(tmp_path, 1_000), StopOnSignal()])
    assert signal.getsignal(signal.SIGINT) == before
    assert [p.name for p in tmp_path.iterdir()] == ([] if where == "start" else ["step_000000000064.pt"])


def test_the_training_environment_is_not_evaluated(tmp_path: Path) -> None:
    a = agent(envs.make("CartPole-v1", 2))
    with pytest.raises(ValueError, match="expected an environment of its own"):
        a.learn(64, EvalCallback(a.env, tmp_path, every=16))
    assert a.num_timesteps == 0


def test_a_used_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    first = agent()
    first.learn(64, CheckpointCallback(tmp_path / "ck", 32))
    names = sorted(p.name for p in (tmp_path / "ck").iterdir())
    with pytest.raises(FileExistsError, match="those of another run"):
        agent(seed=1).learn(64, CheckpointCallback(tmp_path / "ck", 32))
    first.learn(callback=CheckpointCallback(tmp_path / "ck", 32), until=96)  # its own
    older = PPO.load(tmp_path / "ck" / names[0])
    with pytest.raises(FileExistsError, match="some past step 32, where this agent is"):
        older.learn(64, CheckpointCallback(tmp_path / "ck", 32))
    newest = tmp_path / "ck" / "step_000000000096.pt"
    newest.write_bytes(newest.read_bytes()[:-20])  # a crash
    with pytest.warns(UserWarning, match="is damaged"):
        PPO.load(tmp_path / "ck" / names[1]).learn(callback=CheckpointCallback(tmp_path / "ck", 32, keep=1), until=96)
    assert [p.name for p in (tmp_path / "ck").iterdir()] == ["step_000000000096.pt"]
    logger = Logger(tmp_path, tensorboard=False)
    first.learn(callback=LogCallback(logger), until=128)
    logger.close()
    with pytest.raises(FileExistsError, match="expected no rows for a new run, got 1, of another one up to step 128"):
        Logger(tmp_path, tensorboard=False)
    assert not (tmp_path / ".owner").exists()


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    a = agent(gamma=0.5, normalise_reward=True)
    a.learn(64)
    a.save(tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_the_callers_random_numbers_are_left_alone(saved: Path) -> None:
    drawn = []
    for restore in (False, False, True, True):
        random.seed(len(drawn))
        np.random.seed(len(drawn))  # noqa: NPY002
        torch.manual_seed(len(drawn))
        PPO.load(saved, restore_rng=restore)
        drawn.append((random.random(), np.random.rand(), float(torch.rand(()))))  # noqa: NPY002
    assert drawn[0] != drawn[1]
    assert drawn[2] == drawn[3]


@pytest.mark.parametrize("copies", [1, 4])
def test_another_number_of_environments_begins_fresh_episodes(saved: Path, copies: int) -> None:
    a = PPO.load(saved, env=envs.make("CartPole-v1", copies))
    assert (a.config.num_envs, a.num_timesteps, a.config.gamma) == (copies, 64, 0.5)
    assert a.estimator.reward_norm.running.shape == (copies,)
    a.learn(16 * copies)


def test_a_checkpoint_is_not_completed_with_defaults(saved: Path) -> None:
    whole = checkpoint.load(saved)
    config = dict(whole["config"])
    del config["gamma"]
    with pytest.raises(checkpoint.CheckpointError, match=r"config: .* got a state with no gamma"):
        PPO.load(rewritten(saved, config=config))
    with pytest.raises(checkpoint.CheckpointError, match=r"config: .* got a state with an unknown gamna"):
        PPO.load(rewritten(saved, config=whole["config"] | {"gamna": 1.0}))
    learner = whole["state"]["learner"]
    updater = {k: v for k, v in learner["updaters/policy"].items() if k != "exp_avg_sq"}
    for changed, message in (
        (learner | {"updaters/policy": updater}, r"updaters/policy: .* got a state with no exp_avg_sq"),
        ({k: v for k, v in learner.items() if k != "counters"}, "learner: .* got a state with no counters"),
        (learner | {"more": 1}, "learner: .* got a state with an unknown more"),
    ):
        state = whole["state"] | {"learner": changed}
        with pytest.raises(checkpoint.CheckpointError, match=message):
            PPO.load(rewritten(saved, config=whole["config"], state=state))
    with pytest.raises(checkpoint.CheckpointError, match=r"state: .* got a state with no learner"):
        PPO.load(rewritten(saved, state={k: v for k, v in whole["state"].items() if k != "learner"}))


def test_options_that_no_checkpoint_can_hold_are_refused_at_once() -> None:
    class Choice(Enum):
        A = 1

    with pytest.raises(TypeError, match=r"env_kwargs\['max_episode_steps'\]: expected a tensor, .* received .*Choice"):
        agent(env_kwargs={"max_episode_steps": Choice.A})


def test_a_header_imports_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evilmod.py").write_text(
        "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n"
        "import envs\nX = lambda n, *, device: envs.make('CartPole-v1', n, device=device)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewritten(saved, env="evilmod:X")
    with pytest.raises(UntrustedError, match=r"a\.pt names 'evilmod:X', .*trust=\('evilmod:X',\)"):
        PPO.load(saved)
    with pytest.raises(UntrustedError):
        PPO.load(saved, trust=["evilmod"])  # that very string, or nothing
    assert "evilmod" not in sys.modules
    PPO.load(saved, env="CartPole-v1")  # the name in the file is not used
    assert not (tmp_path / "ran").exists()
    assert PPO.load(saved, trust=["evilmod:X"]).num_timesteps == 64
    assert PPO.load(saved, env="evilmod:X").num_timesteps == 64  # the caller wrote it
    sys.modules.pop("evilmod", None)


def test_a_state_that_is_loaded_in_place_is_whole() -> None:
    a = agent()
    state = a.state_dict()
    a.learner.healthy = False  # as an interrupted iteration leaves it
    a.load_state_dict(state)
    a.learn(np.int64(32))  # type: ignore[arg-type]  # as an array of budgets gives it
    assert a.num_timesteps == 32


def test_an_agent_that_has_learnt_nothing_is_loaded_as_it_is(tmp_path: Path) -> None:
    a = agent()
    a.save(tmp_path / "new.pt")
    b = PPO.load(tmp_path / "new.pt")
    flats = [x.learn(32).updaters["policy"].flat for x in (a, b)]
    assert torch.equal(*flats)


def test_generators_of_another_kind_of_device_begin_streams_of_their_own(saved: Path) -> None:
    """A GPU's generator has a state of 16 bytes, a CPU's one of 5,056: what a GPU trained acts here too."""
    count = [0]

    def on_a_gpu(state: Any) -> Any:
        if isinstance(state, dict):
            return {name: on_a_gpu(value) for name, value in state.items()}
        if not (isinstance(state, torch.Tensor) and state.numel() == 5056):
            return state
        count[0] += 1
        return torch.tensor([count[0], *[0] * 15], dtype=torch.uint8)

    state = checkpoint.load(saved)["state"]
    rewritten(saved, state=state | {"learner": on_a_gpu(state["learner"])})
    assert count[0] >= 3  # of the learner, of exploration, of fresh episodes
    one, same = PPO.load(saved), PPO.load(saved)
    numbers = [torch.rand(1, generator=g) for a in (one, same) for g in (a.ctx.generator, a.collector.generator)]
    assert numbers[:2] == numbers[2:]
    assert numbers[0] != numbers[1]
