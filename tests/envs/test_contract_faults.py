"""The contract itself: environments with a fault are found."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from ccrl.testing import EnvContract
from envs.classic import CartPole

STEPS, TERMINATED, TRUNCATED = 1, 2, 3  # of what a classic environment remembers


class Faulty(CartPole):
    """``put`` changes what it remembers: the mistakes of others, made here."""

    def put(self, which, value):
        memory = list(self._memory)
        memory[which] = value
        self._memory = tuple(memory)


class FinalObsAfterTheReset(Faulty):
    """The classic mistake."""

    def step(self, action):
        result = super().step(action)
        return result._replace(final_obs=result.obs)


class FinalObsOfOneCopy(Faulty):
    """Of several that end at once, the first alone has its last observation."""

    def step(self, action):
        result = super().step(action)
        rows = (result.terminated | result.truncated).nonzero().flatten()
        result.final_obs[rows[1:]] = result.obs[rows[1:]]
        return result


class CountsTheDummyRow(Faulty):
    """Later episodes are one step shorter."""

    def step(self, action):
        ended = self._memory[TERMINATED] | self._memory[TRUNCATED]
        result = super().step(action)
        self.put(STEPS, self._memory[STEPS] + ended)
        return result


class CallsTheLimitAnEnd(Faulty):
    def step(self, action):
        result = super().step(action)
        never = torch.zeros_like(result.truncated)
        return result._replace(terminated=result.terminated | result.truncated, truncated=never)


class OneEndRestartsAll(Faulty):
    """An episode's end in one copy restarts the others' clocks."""

    def step(self, action):
        result = super().step(action)
        if bool((result.terminated | result.truncated).any()):
            self.put(STEPS, 0 * self._memory[STEPS])
        return result


class ResetKeepsTheClock(Faulty):
    def reset(self, seed=None, mask=None):
        steps = self._memory[STEPS] if self._memory else None
        obs = super().reset(seed, mask)
        if steps is not None:
            self.put(STEPS, steps)
        return obs


class ResetKeepsTheFlags(Faulty):
    """In NEXT_STEP mode the first step after it is taken for a dummy row."""

    def reset(self, seed=None, mask=None):
        flags = self._memory[TRUNCATED] if self._memory else None
        obs = super().reset(seed, mask)
        if flags is not None:
            self.put(TRUNCATED, flags)
        return obs


class IgnoresTheSeed(Faulty):
    """All runs are alike, whatever their seed."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._generator.manual_seed(0)

    def reset(self, seed=None, mask=None):
        return super().reset(None, mask)


class NeighbouringSeeds(Faulty):
    """Copy i starts as a run with the seed s + i alone would: runs with the seeds 1 and 2 share copies."""

    def reset(self, seed=None, mask=None):
        obs = super().reset(seed, mask)
        if seed is not None:
            draws = [torch.rand(4, 1, generator=torch.Generator().manual_seed(seed + i)) for i in range(self.num_envs)]
            self.put(0, self.initial_state(torch.cat(draws, 1).numpy()))
            self.put(4, self._memory[0].copy())
            obs = self._obs_outward(self._memory[4])
        return obs


class ClaimsNothing(Faulty):
    """Says that its state cannot be had."""

    resume_note = "its state cannot be had"


class SeedsEverybody(Faulty):
    def reset(self, seed=None, mask=None):
        if seed is not None:
            torch.manual_seed(seed)
        return super().reset(seed, mask)


class SharesItsNumbers(Faulty):
    """One random stream for all environments of the process."""

    stream = torch.Generator()

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._generator = self.stream


class ActsForAll(Faulty):
    def step(self, action):
        return super().step(action[:1].expand(len(action)))


class Squeezes(Faulty):
    def step(self, action):
        result = super().step(action)
        return result._replace(reward=result.reward.squeeze())


class IgnoresTheMask(Faulty):
    def reset(self, seed=None, mask=None):
        return super().reset(seed)


class MaskRestartsAllClocks(Faulty):
    def reset(self, seed=None, mask=None):
        obs = super().reset(seed, mask)
        self.put(STEPS, 0 * self._memory[STEPS])
        return obs


class ForgetsTheClock(Faulty):
    """Loses the clock when it is saved."""

    def load_state_dict(self, values):
        super().load_state_dict(values | {"steps": torch.zeros_like(values["steps"])})


class ForgetsTheGenerator(Faulty):
    def load_state_dict(self, values):
        state = self._generator.get_state()
        super().load_state_dict(values | {"generator": state})


class ForgetsTheFlags(Faulty):
    """Saved after an episode's end, it goes on in the finished episode."""

    def load_state_dict(self, values):
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        super().load_state_dict(values | {"terminated": never, "truncated": never})


class SavesObjects(Faulty):
    """A checkpoint with it cannot be read."""

    def state_dict(self):
        return super().state_dict() | {"rng": np.random.default_rng(0)}


class FlagsAreLeft(Faulty):
    """Flags are written where an episode ends, and not cleared elsewhere."""

    def step(self, action):
        return super().step(action)

    def step_into(self, action, rows):
        result = self.step(action)
        flags = {name: getattr(result, name) | getattr(rows, name) for name in ("terminated", "truncated")}
        rows.write(result._replace(**flags))
        return {}


class FinalObsIsLeft(Faulty):
    def step(self, action):
        return super().step(action)

    def step_into(self, action, rows):
        rows.write(self.step(action)._replace(final_obs=None))
        return {}


class LogsInAnotherWay(Faulty):
    def step(self, action):
        return super().step(action)._replace(log={"angle": 0.0})

    def step_into(self, action, rows):
        rows.write(self.step(action))
        return {}


LAST = "test_same_step_returns_the_first_observation_and_keeps_the_last"
LIMIT, PAST, RESUME = (
    "test_time_limit_truncates",
    "test_reset_with_a_seed_forgets_the_past",
    "test_state_dict_continues_exactly",
)
INTO = "test_step_into_is_step"
OTHERS, MASK = (
    "test_environments_leave_each_other_and_the_callers_random_numbers_alone",
    "test_disabled_reset_with_mask_leaves_the_other_copies_alone",
)


@pytest.mark.parametrize(
    ("faulty", "test"),
    [
        (FinalObsAfterTheReset, LAST),
        (FinalObsOfOneCopy, LAST),
        (CountsTheDummyRow, LIMIT),
        (CallsTheLimitAnEnd, LIMIT),
        (OneEndRestartsAll, LIMIT),
        (ResetKeepsTheClock, PAST),
        (ResetKeepsTheFlags, PAST),
        (IgnoresTheSeed, PAST),
        (NeighbouringSeeds, "test_seeds_and_copies_start_differently"),
        (ClaimsNothing, "test_it_says_whether_it_resumes_exactly"),
        (SeedsEverybody, OTHERS),
        (SharesItsNumbers, OTHERS),
        (ActsForAll, "test_copies_do_not_depend_on_each_other"),
        (Squeezes, "test_a_single_copy_keeps_its_axis"),
        (IgnoresTheMask, MASK),
        (MaskRestartsAllClocks, MASK),
        (ForgetsTheClock, RESUME),
        (ForgetsTheGenerator, RESUME),
        (ForgetsTheFlags, RESUME),
        (SavesObjects, RESUME),
        (FlagsAreLeft, INTO),
        (FinalObsIsLeft, INTO),
        (LogsInAnotherWay, INTO),
    ],
)
def test_the_contract_finds_faulty_environments(faulty, test):
    for kind in (faulty, CartPole):

        class Contract(EnvContract):
            time_limit = 15 if faulty is OneEndRestartsAll else 6  # some fall before 15 steps, none before 6

            def make_env(self, num_envs, autoreset_mode, kind=kind):
                return kind(num_envs, autoreset_mode=autoreset_mode, max_episode_steps=self.time_limit)

        if kind is CartPole:
            getattr(Contract(), test)()
            return
        with pytest.raises((AssertionError, pickle.UnpicklingError)):
            getattr(Contract(), test)()
