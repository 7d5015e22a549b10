"""The contract of :class:`ccrl.batched_env.BatchedEnv` as a test class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, Tree

__all__ = ["EnvContract", "sample_actions"]


def sample_actions(space: Space[Any], num_envs: int, generator: torch.Generator) -> Tensor:
    """``[N, *shape]`` random actions on the CPU: uniform in a ``Discrete`` or bounded ``Box``, else standard normal."""
    if isinstance(space, spaces.Discrete):
        return torch.randint(int(space.n), (num_envs,), generator=generator)
    shape = (num_envs, *(space.shape or ()))
    assert isinstance(space, spaces.Box), f"expected a Box or a Discrete action space, got {space}"
    if not space.is_bounded():
        return torch.randn(shape, generator=generator)
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    return low + (high - low) * torch.rand(shape, generator=generator)


class EnvContract:
    """What every ``BatchedEnv`` promises, as tests. Subclass it, name the class ``Test...``, define ``make_env``."""

    autoreset_modes: Sequence[AutoresetMode] = tuple(AutoresetMode)
    """The modes that ``make_env`` can build."""
    num_envs = 3
    random_starts = True
    """Whether the seed decides where episodes start."""
    max_steps = 600
    """Within this many random steps some episode must end."""
    time_limit: int | None = None
    """Step at which every episode is truncated that did not terminate before; ``None`` does not test it."""
    resumable = True
    """Whether there is a ``state_dict``."""

    def make_env(self, num_envs: int, autoreset_mode: AutoresetMode) -> BatchedEnv:
        """A new environment."""
        raise NotImplementedError

    def test_attributes(self) -> None:
        for env in self._envs():
            assert isinstance(env, BatchedEnv)
            assert env.num_envs == self.num_envs
            assert isinstance(env.device, torch.device)
            if env.autoreset_mode != AutoresetMode.SAME_STEP:
                assert not env.provides_final_obs

    def test_shapes_types_and_devices(self) -> None:
        for env in self._envs():
            _check_obs(env.reset(seed=0), env)
            for result in self._steps(env, 5):
                _check_obs(result.obs, env)
                assert isinstance(result, StepResult)
                assert result.reward.shape == (self.num_envs,)
                assert result.reward.dtype == torch.float32
                for flag in (result.terminated, result.truncated):
                    assert flag.shape == (self.num_envs,)
                    assert flag.dtype == torch.bool
                for tensor in (result.reward, result.terminated, result.truncated):
                    assert tensor.device == env.device
                assert (result.final_obs is not None) == env.provides_final_obs

    def test_observations_are_in_the_space(self) -> None:
        for env in self._envs():
            trees = [_copy(env.reset(seed=0)), *(_copy(result.obs) for result in self._steps(env, 20))]
            for tree in trees:
                for row in range(self.num_envs):
                    single = _row(tree, row)
                    assert env.single_observation_space.contains(single), f"{single} not in the observation space"

    def test_seed_decides_everything(self) -> None:
        for mode in self.autoreset_modes:
            first, second = self._rollout(mode, seed=3), self._rollout(mode, seed=3)
            assert all(_equal(a, b) for a, b in zip(first, second)), "two runs with one seed differ"

    def test_seeds_and_copies_start_differently(self) -> None:
        if not self.random_starts:
            return
        env = self._env(self.autoreset_modes[0])
        first, second = _copy(env.reset(seed=1)), _copy(env.reset(seed=2))
        third = _copy(env.reset())
        env.close()
        assert not _equal(first, second), "seeds 1 and 2 start alike"
        assert not _equal(second, third), "reset() without a seed repeated the episode starts"
        assert not _equal(_row(first, 0), _row(first, 1)), "copies 0 and 1 start alike"

    def test_same_step_returns_the_first_observation_and_keeps_the_last(self) -> None:
        if AutoresetMode.SAME_STEP not in self.autoreset_modes:
            return
        env, result, row, before = self._until_end(AutoresetMode.SAME_STEP)
        if env.provides_final_obs:
            assert result.final_obs is not None
            final = _row(result.final_obs, row)
            assert env.single_observation_space.contains(final), f"{final} not in the observation space"
            assert not _equal(final, _row(result.obs, row)), "final_obs is the observation after the reset"
            assert not _equal(final, before), "final_obs is the observation before the last step"
        following = next(self._steps(env, 1, seed=5))
        if self.time_limit != 1:
            assert not bool(following.truncated[row]), "the clock did not restart"
        env.close()

    def test_next_step_inserts_a_dummy_row(self) -> None:
        if AutoresetMode.NEXT_STEP not in self.autoreset_modes:
            return
        env, result, row, _ = self._until_end(AutoresetMode.NEXT_STEP)
        last = _row(_copy(result.obs), row)
        dummy = next(self._steps(env, 1, seed=5))
        assert float(dummy.reward[row]) == 0.0
        assert not bool(dummy.terminated[row] | dummy.truncated[row])
        assert not _equal(_row(dummy.obs, row), last), "the dummy row does not show a new episode"
        env.close()

    def test_disabled_waits_for_reset_with_mask(self) -> None:
        if AutoresetMode.DISABLED not in self.autoreset_modes:
            return
        env, result, row, _ = self._until_end(AutoresetMode.DISABLED)
        done = (result.terminated | result.truncated).clone()
        last = _copy(result.obs)
        obs = _copy(env.reset(mask=done))
        for other in range(self.num_envs):
            changed = not _equal(_row(obs, other), _row(last, other))
            assert changed == bool(done[other]), (
                f"copy {other}: done={bool(done[other])}, observation changed={changed}"
            )
        following = next(self._steps(env, 1, seed=5))
        if self.time_limit != 1:
            assert not bool(following.truncated[row]), "the clock did not restart"
        env.close()

    def test_disabled_finished_copies_stay_finished(self) -> None:
        """Either the environment refuses the step, or the copy stays finished and is rewarded nothing."""
        if AutoresetMode.DISABLED not in self.autoreset_modes:
            return
        env, _, row, _ = self._until_end(AutoresetMode.DISABLED)
        try:
            after = next(self._steps(env, 1, seed=5))
        except (RuntimeError, AssertionError):  # Gymnasium asserts
            pass
        else:
            assert bool(after.terminated[row] | after.truncated[row])
            assert float(after.reward[row]) == 0.0
        finally:
            env.close()

    def test_time_limit_truncates(self) -> None:
        if self.time_limit is None:
            return
        for env in self._envs():
            env.reset(seed=0)
            running = torch.ones(self.num_envs, dtype=torch.bool, device=env.device)
            for count, result in enumerate(self._steps(env, self.time_limit), start=1):
                at_limit = torch.full_like(running, count == self.time_limit)
                assert torch.equal(result.truncated[running], at_limit[running]), f"wrong at step {count}"
                running = running & ~result.terminated & ~result.truncated

    def test_state_dict_continues_exactly(self) -> None:
        if not self.resumable:
            return
        for mode in self.autoreset_modes:
            env, other = self._env(mode), self._env(mode)
            saver, loader = _resumable(env), _resumable(other)
            env.reset(seed=0)
            other.reset(seed=99)
            for _ in self._steps(env, 7):
                pass
            loader.load_state_dict(saver.state_dict())
            mask = torch.ones(self.num_envs, dtype=torch.bool, device=env.device)
            if mode == AutoresetMode.DISABLED:
                assert _equal(_copy(env.reset(mask=mask)), _copy(other.reset(mask=mask)))
            ours = [_snapshot(result) for result in self._steps(env, 60, seed=8)]
            theirs = [_snapshot(result) for result in self._steps(other, 60, seed=8)]
            assert len(ours) == len(theirs)
            assert all(_equal(a, b) for a, b in zip(ours, theirs)), f"{mode}: the resumed copy went another way"
            env.close()
            other.close()

    def test_wrong_actions_are_refused(self) -> None:
        env = self._env(self.autoreset_modes[0])
        env.reset(seed=0)
        action = sample_actions(env.single_action_space, self.num_envs, torch.Generator()).to(env.device)
        message = _error(lambda: env.step(action[:-1]))
        env.close()
        assert "action" in message, message
        assert str(self.num_envs) in message, f"the message does not name the expected shape: {message}"

    def _env(self, mode: AutoresetMode) -> BatchedEnv:
        return self.make_env(self.num_envs, mode)

    def _envs(self) -> Any:
        for mode in self.autoreset_modes:
            env = self._env(mode)
            assert env.autoreset_mode == mode
            yield env
            env.close()

    def _steps(self, env: BatchedEnv, count: int, seed: int = 0) -> Any:
        """Results of up to ``count`` random steps; without autoreset only up to the first end of an episode."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            result = env.step(sample_actions(env.single_action_space, self.num_envs, generator).to(env.device))
            yield result
            disabled = env.autoreset_mode == AutoresetMode.DISABLED
            if disabled and bool((result.terminated | result.truncated).any()):
                return

    def _rollout(self, mode: AutoresetMode, seed: int) -> list[Any]:
        env = self._env(mode)
        start = _copy(env.reset(seed=seed))
        steps = self._steps(env, 40)
        rows = [start, *(_snapshot(result) for result in steps)]
        env.close()
        return rows

    def _until_end(self, mode: AutoresetMode) -> tuple[BatchedEnv, StepResult, int, Any]:
        """The environment right after the first end of an episode, that step, its copy, its observation before."""
        env = self._env(mode)
        before = _copy(env.reset(seed=0))
        for result in self._steps(env, self.max_steps):
            done = result.terminated | result.truncated
            if bool(done.any()):
                row = int(done.nonzero()[0])
                return env, result, row, _row(before, row)
            before = _copy(result.obs)
        raise AssertionError(f"no episode ended within {self.max_steps} steps; raise max_steps or lower the time limit")


def _check_obs(obs: Tree, env: BatchedEnv) -> None:
    space = env.single_observation_space
    leaves = obs if isinstance(obs, dict) else {"": obs}
    expected = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    assert set(leaves) == set(expected)
    for key, leaf in leaves.items():
        assert leaf.shape == (env.num_envs, *(expected[key].shape or ())), f"observation {key}: {tuple(leaf.shape)}"
        assert leaf.device == env.device
        if leaf.is_floating_point():
            assert leaf.dtype == torch.float32


def _snapshot(result: StepResult) -> dict[str, Tensor]:
    obs = result.obs if isinstance(result.obs, dict) else {"obs": result.obs}
    flags = {"reward": result.reward, "terminated": result.terminated, "truncated": result.truncated}
    return {key: value.clone() for key, value in (obs | flags).items()}


def _copy(tree: Tree) -> Any:
    return {key: leaf.clone() for key, leaf in tree.items()} if isinstance(tree, dict) else tree.clone()


def _row(tree: Any, row: int) -> Any:
    if isinstance(tree, dict):
        return {key: _row(leaf, row) for key, leaf in tree.items()}
    return np.array(tree[row].cpu().numpy())[()]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    return bool(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True))


def _resumable(env: Any) -> Any:
    assert hasattr(env, "state_dict"), "no state_dict; set resumable = False if that is meant"
    return env


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    raise AssertionError("expected a ValueError or a TypeError")
