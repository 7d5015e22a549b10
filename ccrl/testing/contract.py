"""The contract of :class:`ccrl.batched_env.BatchedEnv` as a test class."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, resolve_env, resume_note, stepper
from ccrl.testing.env_checks import (
    check_obs,
    check_result,
    copy_of,
    dirty_rows,
    equal,
    error_of,
    row_of,
    rows_of,
    sample_actions,
    snapshot,
)

__all__ = ["EnvContract"]


class EnvContract:
    """What every ``BatchedEnv`` promises, as tests. Subclass it, name the class ``Test...``, and set ``env`` and
    ``options``, or define ``make_env`` where that is not enough."""

    env: Any = None
    """An id, or what is called with ``(num_envs, autoreset_mode=..., **options)``: most often a class."""
    options: Mapping[str, Any] = {}
    """Further keyword arguments of ``env``."""
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
    """Whether a resumed run continues exactly; where not, ``ccrl.batched_env.resume_note`` has to say so."""
    independent_copies = False
    """Whether a copy is independent of the others beyond the first end of an episode: none of them draws from a random
    stream that another one's resets move on."""

    def make_env(self, num_envs: int, autoreset_mode: AutoresetMode) -> BatchedEnv:
        """A new environment."""
        env = type(self).env  # of the class: a function stays one, and does not become a method
        if env is None:
            raise NotImplementedError(f"{type(self).__name__}: set env and options, or define make_env")
        if isinstance(env, str):
            return resolve_env(env, num_envs, autoreset_mode=autoreset_mode, **self.options)
        made: BatchedEnv = env(num_envs, autoreset_mode=autoreset_mode, **self.options)
        return made

    def test_attributes(self) -> None:
        for env in self._envs():
            assert isinstance(env, BatchedEnv)
            assert env.num_envs == self.num_envs
            assert isinstance(env.device, torch.device)
            if env.autoreset_mode != AutoresetMode.SAME_STEP:
                assert not env.provides_final_obs

    def test_shapes_types_and_devices(self) -> None:
        for env in self._envs():
            check_obs(env.reset(seed=0), env)
            for result in self._steps(env, 5):
                check_result(result, env)

    def test_a_single_copy_keeps_its_axis(self) -> None:
        """``squeeze()`` and broadcasting go wrong with one copy first."""
        for mode in self.autoreset_modes:
            env = self.make_env(1, mode)
            assert env.num_envs == 1
            check_obs(env.reset(seed=0), env)
            for result in self._steps(env, 5):
                check_result(result, env)
            env.close()

    def test_observations_are_in_the_space(self) -> None:
        for env in self._envs():
            trees = [copy_of(env.reset(seed=0)), *(copy_of(result.obs) for result in self._steps(env, 20))]
            for tree in trees:
                for row in range(self.num_envs):
                    single = row_of(tree, row)
                    assert env.single_observation_space.contains(single), f"{single} not in the observation space"

    def test_seed_decides_everything(self) -> None:
        for mode in self.autoreset_modes:
            first, second = self._rollout(mode, seed=3), self._rollout(mode, seed=3)
            assert all(equal(a, b) for a, b in zip(first, second)), "two runs with one seed differ"

    def test_seeds_and_copies_start_differently(self) -> None:
        if not self.random_starts:
            return
        env = self._env(self.autoreset_modes[0])
        first, second = copy_of(env.reset(seed=1)), copy_of(env.reset(seed=2))
        third = copy_of(env.reset())
        env.close()
        alike = [
            (i, j)
            for i in range(self.num_envs)
            for j in range(self.num_envs)
            if equal(row_of(first, i), row_of(second, j))
        ]
        assert not alike, f"seeds 1 and 2 start alike in the copies {alike}: their runs share random streams"
        assert not equal(second, third), "reset() without a seed repeated the episode starts"
        assert not equal(row_of(first, 0), row_of(first, 1)), "copies 0 and 1 start alike"

    def test_reset_with_a_seed_forgets_the_past(self) -> None:
        """Clocks, flags and random streams, also of an episode that has just ended."""
        steps = max(40, (self.time_limit or 0) + 1)
        for mode in self.autoreset_modes:
            env, *_ = self._until_end(mode)
            used = self._play(env, seed=3, steps=steps)
            new = self._rollout(mode, seed=3, steps=steps)
            assert len(used) == len(new), f"{mode}: an episode ended at another step than in a new environment"
            assert all(equal(a, b) for a, b in zip(used, new)), f"{mode}: reset(seed=3) is not that of a new one"

    def test_environments_leave_each_other_and_the_callers_random_numbers_alone(self) -> None:
        mode = self.autoreset_modes[0]
        alone = self._rollout(mode, seed=3)
        env, other = self._env(mode), self._env(mode)
        state, numbers = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
        rows = [copy_of(env.reset(seed=3))]
        other.reset(seed=4)
        for result, _ in zip(self._steps(env, 40), self._steps(other, 40, seed=1)):
            rows.append(snapshot(result))
        env.close()
        other.close()
        assert torch.get_rng_state().equal(state), "it drew from torch's global random numbers, or seeded them"
        assert np.random.get_state()[1].tolist() == numbers, "it drew from NumPy's global random numbers"  # type: ignore[index]  # noqa: NPY002
        assert all(equal(a, b) for a, b in zip(rows, alone)), "a second environment changed the first"

    def test_copies_do_not_depend_on_each_other(self) -> None:
        """Other actions of the others change nothing for a copy in the middle, up to the first end of an episode (from
        there on the copies may share a random stream) or, with ``independent_copies``, beyond it."""
        kept = self.num_envs // 2  # neither the first nor the last, whose action a mistake may hand to all
        for mode in self.autoreset_modes:
            runs: list[tuple[list[Any], list[Any]]] = []
            for seed in (1, 2):
                env = self._env(mode)
                seen, told = [row_of(env.reset(seed=0), kept)], []
                generators = [torch.Generator().manual_seed(s) for s in (0, seed)]
                for _ in range(60 if self.independent_copies else 20):
                    same, action = (sample_actions(env.single_action_space, self.num_envs, g) for g in generators)
                    action[kept] = same[kept]
                    result = env.step(action.to(env.device))
                    told.append([row_of(x, kept) for x in (result.reward, result.terminated, result.truncated)])
                    ended = bool((result.terminated | result.truncated).any())
                    if ended and (not self.independent_copies or mode == AutoresetMode.DISABLED):
                        break
                    seen.append(row_of(result.obs, kept))
                runs.append((seen, told))
                env.close()
            for first, second in zip(*runs):
                alike = [equal(a, b) for a, b in zip(first, second)]
                assert all(alike), f"{mode}: copy {kept} depends on the actions of the others"

    def test_same_step_returns_the_first_observation_and_keeps_the_last(self) -> None:
        if AutoresetMode.SAME_STEP not in self.autoreset_modes:
            return
        env, result, rows, before = self._until_end(AutoresetMode.SAME_STEP)
        for row in rows if env.provides_final_obs else ():
            assert result.final_obs is not None
            final = row_of(result.final_obs, row)
            assert env.single_observation_space.contains(final), f"{final} not in the observation space"
            assert not equal(final, row_of(result.obs, row)), "final_obs is the observation after the reset"
            assert not equal(final, row_of(before, row)), "final_obs is the observation before the last step"
        following = next(self._steps(env, 1, seed=5))
        if self.time_limit != 1:
            assert not bool(following.truncated[rows].any()), "the clock did not restart"
        env.close()

    def test_next_step_inserts_a_dummy_row(self) -> None:
        if AutoresetMode.NEXT_STEP not in self.autoreset_modes:
            return
        env, result, rows, _ = self._until_end(AutoresetMode.NEXT_STEP)
        last = copy_of(result.obs)
        dummy = next(self._steps(env, 1, seed=5))
        for row in rows:
            assert float(dummy.reward[row]) == 0.0
            assert not bool(dummy.terminated[row] | dummy.truncated[row])
            assert not equal(row_of(dummy.obs, row), row_of(last, row)), "the dummy row does not show a new episode"
        env.close()

    def test_disabled_waits_for_reset_with_mask(self) -> None:
        if AutoresetMode.DISABLED not in self.autoreset_modes:
            return
        env, result, rows, _ = self._until_end(AutoresetMode.DISABLED)
        done = (result.terminated | result.truncated).clone()
        last = copy_of(result.obs)
        obs = copy_of(env.reset(mask=done))
        for other in range(self.num_envs):
            changed = not equal(row_of(obs, other), row_of(last, other))
            assert changed == bool(done[other]), (
                f"copy {other}: done={bool(done[other])}, observation changed={changed}"
            )
        following = next(self._steps(env, 1, seed=5))
        if self.time_limit != 1:
            assert not bool(following.truncated[rows].any()), "the clock did not restart"
        env.close()

    def test_disabled_reset_with_mask_leaves_the_other_copies_alone(self) -> None:
        """In the middle of an episode: where all copies end together, a mask that is ignored would not show."""
        if AutoresetMode.DISABLED not in self.autoreset_modes:
            return
        env = self._env(AutoresetMode.DISABLED)
        env.reset(seed=0)
        result = next(self._steps(env, 1))
        mask = result.terminated | result.truncated
        mask[0] = True
        before, others = copy_of(result.obs), (~mask).nonzero().flatten().tolist()
        after = copy_of(env.reset(mask=mask))
        for row in others:
            assert equal(row_of(after, row), row_of(before, row)), f"copy {row} is not in the mask and was reset"
        for age, result in enumerate(self._steps(env, self.time_limit or 0), start=1):
            at_limit = age + 1 == self.time_limit
            ended = result.terminated
            assert all(bool(result.truncated[row]) == at_limit for row in others if not ended[row]), f"step {age}"
            assert age == self.time_limit or not bool(result.truncated[mask].any()), "the clock did not restart"
        env.close()

    def test_disabled_finished_copies_stay_finished(self) -> None:
        """Either the environment refuses the step, or the copy stays finished and is rewarded nothing."""
        if AutoresetMode.DISABLED not in self.autoreset_modes:
            return
        env, _, rows, _ = self._until_end(AutoresetMode.DISABLED)
        try:
            after = next(self._steps(env, 1, seed=5))
        except (RuntimeError, AssertionError):  # Gymnasium asserts
            pass
        else:
            for row in rows:
                assert bool(after.terminated[row] | after.truncated[row])
                assert float(after.reward[row]) == 0.0
        finally:
            env.close()

    def test_step_into_is_step(self) -> None:
        """Where there is a ``step_into``: rows hold what ``step`` returns, over several episodes. They are full of what
        no step returns, so that an entry that is not written shows."""
        for mode in self.autoreset_modes:
            env, other = self._env(mode), self._env(mode)
            if not hasattr(type(env), "step_into"):
                return
            env.reset(seed=3)
            other.reset(seed=3)
            ends = 0
            for expected, action in self._played(other, self.max_steps):
                rows = dirty_rows(env)
                log = stepper(env)(action, rows)
                assert log.keys() == expected.log.keys(), f"{mode}: step_into logs {sorted(log)}"
                done = expected.terminated | expected.truncated
                found = rows_of(rows, done)
                for name, value in rows_of(expected, done).items():
                    assert equal(found[name], value), f"{mode}: step_into writes another {name} than step returns"
                ends += int(done.any())
                if bool(done.any()) and mode == AutoresetMode.DISABLED:
                    assert equal(copy_of(env.reset(mask=done)), copy_of(other.reset(mask=done))), "another reset"
                if ends == 3:
                    break
            env.close()
            other.close()

    def test_time_limit_truncates(self) -> None:
        """The first episode and those that the environment starts by itself."""
        if self.time_limit is None:
            return
        for env in self._envs():
            env.reset(seed=0)
            age = torch.zeros(self.num_envs, dtype=torch.int64, device=env.device)
            dummy = torch.zeros(self.num_envs, dtype=torch.bool, device=env.device)
            for count, result in enumerate(self._steps(env, 3 * self.time_limit + 2), start=1):
                age = torch.where(dummy, 0, age + 1)
                at_limit = age == self.time_limit
                assert torch.equal(result.truncated, at_limit), f"wrong at step {count}: {result.truncated}"
                done = result.terminated | result.truncated
                if env.autoreset_mode == AutoresetMode.NEXT_STEP:
                    dummy = done.clone()
                else:
                    age = torch.where(done, 0, age)

    def test_state_dict_continues_exactly(self) -> None:
        """Saved in the middle of an episode and right after an end, when a reset may be pending."""
        if not self.resumable:
            return
        for mode in self.autoreset_modes:
            self._check_resume(mode, self._after(mode, 7), steps=60)
            self._check_resume(mode, self._until_end(mode)[0], steps=20)

    def test_it_says_whether_it_resumes_exactly(self) -> None:
        for mode in self.autoreset_modes:
            env = self._after(mode, 3)
            note = resume_note(env)
            env.close()
            assert (note is None) == self.resumable, f"{mode}: resumable = {self.resumable}, resume_note says {note!r}"

    def test_wrong_actions_are_refused(self) -> None:
        env = self._env(self.autoreset_modes[0])
        env.reset(seed=0)
        action = sample_actions(env.single_action_space, self.num_envs, torch.Generator()).to(env.device)
        message = error_of(lambda: env.step(action[:-1]))
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
            result = env.step(sample_actions(env.single_action_space, env.num_envs, generator).to(env.device))
            yield result
            disabled = env.autoreset_mode == AutoresetMode.DISABLED
            if disabled and bool((result.terminated | result.truncated).any()):
                return

    def _played(self, env: BatchedEnv, count: int) -> Any:
        """Results of ``count`` random steps and their actions, whatever ends."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            action = sample_actions(env.single_action_space, env.num_envs, generator).to(env.device)
            yield env.step(action), action

    def _rollout(self, mode: AutoresetMode, seed: int, steps: int = 40) -> list[Any]:
        return self._play(self._env(mode), seed, steps)

    def _play(self, env: BatchedEnv, seed: int, steps: int) -> list[Any]:
        """All that an environment shows from ``reset(seed)`` on; closes it."""
        start = copy_of(env.reset(seed=seed))
        rows = [start, *(snapshot(result) for result in self._steps(env, steps))]
        env.close()
        return rows

    def _after(self, mode: AutoresetMode, steps: int) -> BatchedEnv:
        env = self._env(mode)
        env.reset(seed=0)
        for _ in self._steps(env, steps):
            pass
        return env

    def _check_resume(self, mode: AutoresetMode, env: BatchedEnv, steps: int) -> None:
        """A new environment goes on as ``env`` does, from its state as a checkpoint holds it."""
        other = self._env(mode)
        saver: Any = env
        loader: Any = other
        other.reset(seed=99)
        file = io.BytesIO()
        torch.save(saver.state_dict(), file)
        file.seek(0)
        # checkpoints are read so: tensors, numbers, strings and containers of them, and no pickled objects
        loader.load_state_dict(torch.load(file, weights_only=True))
        if mode == AutoresetMode.DISABLED:
            mask = torch.ones(self.num_envs, dtype=torch.bool, device=env.device)
            mask[1:] = False
            assert equal(copy_of(env.reset(mask=mask)), copy_of(other.reset(mask=mask))), "another reset"
            mask[:] = True
            assert equal(copy_of(env.reset(mask=mask)), copy_of(other.reset(mask=mask))), "another reset"
        ours = [snapshot(result) for result in self._steps(env, steps, seed=8)]
        theirs = [snapshot(result) for result in self._steps(other, steps, seed=8)]
        assert len(ours) == len(theirs)
        assert all(equal(a, b) for a, b in zip(ours, theirs)), f"{mode}: the resumed copy went another way"
        env.close()
        other.close()

    def _until_end(self, mode: AutoresetMode) -> tuple[BatchedEnv, StepResult, list[int], Any]:
        """The environment right after the first end of an episode, that step, the copies that ended, the observations
        before."""
        env = self._env(mode)
        before = copy_of(env.reset(seed=0))
        for result in self._steps(env, self.max_steps):
            done = result.terminated | result.truncated
            if bool(done.any()):
                return env, result, done.nonzero().flatten().tolist(), before
            before = copy_of(result.obs)
        raise AssertionError(f"no episode ended within {self.max_steps} steps; raise max_steps or lower the time limit")
