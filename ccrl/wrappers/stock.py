"""Stock augmentation of a batched environment: what objectives of the return's distribution need of the state.

    c_{t+1} = (c_t + R_{t+1}) / gamma,     so that     c_0 + G_0 = gamma^t (c_t + G_t)   for every t

(Avila Pires et al. 2025, arXiv 2501.13028; docs/distributional.md). The discount must be the one that the agent uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.batched_env import AutoresetMode, BatchedEnv, StepResult, Tree, resume_note
from ccrl.distributional.objectives import Objective
from ccrl.seeding import restore_generator, stream_seed

__all__ = ["STOCK", "TIME", "Starts", "StockEnv", "relabel_stock"]

STOCK, TIME = "stock", "time"
"""Keys of the observation."""

Starts = float | Sequence[float] | Callable[[torch.Generator, int], Tensor]
"""Where episodes begin: one ``c_0``, a vector of them, or ``(generator, n) -> [n]`` or ``[n, m]``."""


class StockEnv:
    """``env`` whose observation also has the stock, and whose reward may be that of an objective.

    Observations are a dict: what ``env`` shows (under ``obs`` unless it is a dict already), ``stock`` ``[N]``
    (``[N, m]`` of vectors) and ``time`` ``[N, 1]``, the step over ``horizon``. The stock is summed in float64; what is
    shown is rounded to float32. Below gamma 1 it grows like ``gamma^-t``: at .9 it leaves float32 after some 800 steps,
    and a policy-gradient agent then stops with an error (D-eta-N clips what its network sees).

    With ``objective`` the reward is ``gamma f(c_{t+1}) - f(c_t)``. For a utility of degree 1 its discounted sum over an
    episode is ``f(c_0 + G_0) - f(c_0)``: any agent that maximises discounted rewards, with the SAME discount, maximises
    the expected utility, and a reward comes at every step. What has no degree 1 is refused, unless gamma is 1.

    Episode ends: the observation that ends an episode (``final_obs``, or ``obs`` where the mode shows it) has the stock
    after the last reward; the next episode begins with a new ``c_0`` and step 0. In ``NEXT_STEP`` mode the dummy row
    moves no stock, in ``DISABLED`` mode a finished copy keeps its stock until it is reset.

    :param gamma: the discount of the return.
    :param start: ``c_0``. Functions draw for all copies at every step, so a copy's numbers do not depend on when the
        others end.
    :param rewards: for vectors, the key of ``env``'s observation that holds the last step's reward vector ``[N, m]``.
    :param objective: replaces the reward; None leaves it.
    :param horizon: what the step is divided by in ``time``; None: ``env.max_episode_steps`` where it has one, else 1.
    :raises ValueError: keys that are taken or missing, a discount outside (0, 1], starts or an objective of other
        lengths than the reward's.
    """

    def __init__(
        self,
        env: BatchedEnv,
        gamma: float,
        start: Starts = 0.0,
        *,
        rewards: str | None = None,
        objective: Objective | None = None,
        horizon: int | None = None,
    ) -> None:
        if not 0.0 < gamma <= 1.0:
            raise ValueError(f"gamma: expected a number in (0, 1], got {gamma}")
        inner = env.single_observation_space
        leaves: dict[str, Any] = dict(inner.spaces) if isinstance(inner, spaces.Dict) else {"obs": inner}
        if taken := {STOCK, TIME} & leaves.keys():
            raise ValueError(f"expected an observation without {sorted(taken)}: is the environment wrapped already?")
        if rewards is not None and rewards not in leaves:
            raise ValueError(f"rewards: expected a key of the observation, {sorted(leaves)}, got {rewards!r}")
        self.dims = () if rewards is None else tuple(leaves[rewards].shape)
        if objective is not None:
            _check_objective(objective, gamma, self.dims)
        self.env, self.gamma, self.rewards, self.objective = env, float(gamma), rewards, objective
        self.num_envs, self.device = env.num_envs, torch.device(env.device)
        self.autoreset_mode, self.provides_final_obs = env.autoreset_mode, env.provides_final_obs
        self.single_action_space = env.single_action_space
        self.max_episode_steps: int | None = getattr(env, "max_episode_steps", None)
        self.horizon = float(horizon or self.max_episode_steps or 1)
        self._plain = not isinstance(inner, spaces.Dict)
        own = {
            STOCK: spaces.Box(-np.inf, np.inf, self.dims, np.float32),
            TIME: spaces.Box(0.0, np.inf, (1,), np.float32),
        }
        self.single_observation_space: Any = spaces.Dict(leaves | own)
        self._generator = torch.Generator(self.device)
        self._generator.seed()
        shape = (self.num_envs, *self.dims)
        self.stock = torch.zeros(shape, dtype=torch.float64, device=self.device)
        """``[N]`` or ``[N, m]`` float64, of the observation that was returned last."""
        self.start = torch.zeros_like(self.stock)
        """``c_0`` of the running episodes."""
        self.t = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        """Steps of the running episodes."""
        self._ended = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self.set_start(start)

    def set_start(self, start: Starts) -> None:
        """Let later episodes begin elsewhere. :raises ValueError: numbers of another length than the reward's, or not
        finite."""
        if not callable(start):
            fixed = torch.as_tensor(start, dtype=torch.float64, device=self.device)
            if fixed.shape not in ((), self.dims):
                raise ValueError(f"start: expected a number or {self.dims} of them, got shape {tuple(fixed.shape)}")
            if not bool(fixed.isfinite().all()):
                raise ValueError(f"start: expected finite numbers, got {start}")
        self.starts = start

    # The protocol.

    def reset(self, seed: int | None = None, mask: Tensor | None = None) -> Tree:
        """As the environment's; new stocks in the copies that start."""
        obs = self.env.reset(seed=seed, mask=mask)
        if seed is not None:
            self._generator.manual_seed(stream_seed(seed, "stocks"))
        fresh = self._draw(resets=True)
        chosen = torch.ones_like(self._ended) if mask is None else mask
        self._begin(chosen, fresh)
        self._ended = self._ended & ~chosen
        return self._shown(obs, self.stock, self.t)

    def step(self, action: Tensor) -> StepResult:
        """As the environment's."""
        result = self.env.step(action)
        done = result.terminated | result.truncated
        same = self.autoreset_mode == AutoresetMode.SAME_STEP
        # a dummy row, or a finished copy that waits: nothing is earned, and nothing is divided by gamma
        idle = torch.zeros_like(done) if same else self._ended
        earned = self.earned(result, done)
        total = self.stock + earned
        after = torch.where(self._wide(idle), self.stock, total / self.gamma)
        t = torch.where(idle, self.t, self.t + 1)
        reward = result.reward
        if self.objective is not None:
            f = self.objective.utility
            # gamma f(c / gamma) = f(c) here, and a stock that has grown by gamma^{-t} would round by more than R
            reward = torch.where(idle, 0.0, f(total) - f(self.stock)).float()
        final = None if result.final_obs is None else self._shown(result.final_obs, after, t)
        self.stock, self.t = after, t
        if same:
            self._begin(done, self._draw(resets=False))
        elif self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._begin(idle, self._draw(resets=False))
            done = done & ~idle
        self._ended = done
        obs = self._shown(result.obs, self.stock, self.t)
        return result._replace(obs=obs, reward=reward, final_obs=final)

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    @property
    def resume_note(self) -> str | None:
        """Why the state cannot be had: the environment's note."""
        return resume_note(self.env)

    def state_dict(self) -> dict[str, Any]:
        """The environment's state, stocks, steps and the generator; starts that were set are the caller's."""
        inner: Any = self.env
        return {
            "env": inner.state_dict(), "stock": self.stock.clone(), "start": self.start.clone(), "t": self.t.clone(),
            "ended": self._ended.clone(), "generator": self._generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Continue from ``state_dict()``. :raises ValueError: other numbers of copies or lengths of stocks."""
        if values["stock"].shape != self.stock.shape:
            raise ValueError(f"stock: expected {tuple(self.stock.shape)}, got {tuple(values['stock'].shape)}")
        inner: Any = self.env
        inner.load_state_dict(values["env"])
        self.stock, self.start, self.t, self._ended = (
            values[name].to(self.device, copy=True) for name in ("stock", "start", "t", "ended")
        )
        restore_generator(self._generator, values["generator"])

    # Inside.

    def earned(self, result: StepResult, done: Tensor) -> Tensor:
        """What a step paid, ``[N]`` or ``[N, m]`` float64: of vectors from the true successor."""
        if self.rewards is None:
            return result.reward.double()
        assert isinstance(result.obs, dict)
        shown = result.obs[self.rewards].double()
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            return shown
        if result.final_obs is None:
            raise ValueError("rewards: this environment hides its last observation; expected autoreset_mode='NextStep'")
        assert isinstance(result.final_obs, dict)
        return torch.where(self._wide(done), result.final_obs[self.rewards].double(), shown)

    def _begin(self, where: Tensor, fresh: Tensor) -> None:
        wide = self._wide(where)
        self.stock = torch.where(wide, fresh, self.stock)
        self.start = torch.where(wide, fresh, self.start)
        self.t = torch.where(where, 0, self.t)

    def _draw(self, resets: bool) -> Tensor:
        if callable(self.starts):
            drawn = self.starts(self._generator, self.num_envs)
            if not isinstance(drawn, Tensor):
                raise TypeError(f"start: expected a tensor from the function, got {drawn!r}")
            if drawn.shape != self.stock.shape:
                raise ValueError(
                    f"start: expected {tuple(self.stock.shape)}, got {tuple(drawn.shape)} from the function"
                )
            # of an accelerator only at a reset: at every step it would have to be waited for
            if (drawn.device.type == "cpu" or resets) and not drawn.isfinite().all():
                raise ValueError(f"start: expected finite numbers from the function, got {drawn.tolist()}")
            return drawn.double()
        fixed = torch.as_tensor(self.starts, dtype=torch.float64, device=self.device)
        return fixed.expand(self.stock.shape)

    def _wide(self, mask: Tensor) -> Tensor:
        return mask if not self.dims else mask[:, None]

    def _shown(self, obs: Tree, stock: Tensor, t: Tensor) -> Tree:
        seen = {"obs": obs} if not isinstance(obs, dict) else obs
        return {**seen, STOCK: stock.float(), TIME: (t / self.horizon).float()[:, None]}


def relabel_stock(reward: Tensor, stock: Tensor, gamma: float) -> Tensor:
    """The next stocks ``(c + R) / gamma`` in float64 of transitions that are told again with other stocks: rewards and
    successors do not depend on the stock, so every transition happened with every stock."""
    return (stock.double() + reward.double()) / gamma


def _check_objective(objective: Objective, gamma: float, dims: tuple[int, ...]) -> None:
    objective.check_discount(gamma)
    if gamma < 1.0 and objective.degree != 1.0:
        raise ValueError(
            f"objective: expected a utility of degree 1 (f(a x) = a f(x)) below gamma = 1, got one of degree "
            f"{objective.degree}; its shaped rewards would not add up to it"
        )
    if ((objective.dims,) if objective.dims else ()) != dims:
        raise ValueError(f"objective: expected rewards of {objective.dims or 'no'} dimensions, got {dims or 'numbers'}")
