"""Finite Markov decision processes with exact returns, gradients and Hessian products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ccrl.settings import Count, Natural, Positive, Range, Unit, checked
from envs.classic.base import Array, ClassicEnv
from envs.classic.exact import Exact, Params

__all__ = ["RandomMDP", "RandomWalk", "TabularMDP"]


class TabularMDP(Exact, ClassicEnv):
    """An MDP of ``S`` states and ``A`` actions. Observation: the number of the state, ``[1]``.

    Args:
        transition: ``[S, A, S]``, rows sum to 1.
        reward: ``[S, A]``, of an action in a state.
        start: ``[S]``, distribution of the first state.
        gamma: discount of the exact return.
        horizon: steps after which an episode terminates; ``None``: it goes on until a terminal state (the exact return
            then ignores the time limit ``max_episode_steps``, which truncates).
        terminal: ``[S]`` bool, the states that end an episode.

    Raises:
        ValueError: shapes that do not fit, rows that are no distribution, a start in a terminal state, or no horizon
            with gamma 1.
    """

    id = "ccrl/TabularMDP-v0"
    default_max_episode_steps = 1000
    uniforms = 1
    noises = 1

    @checked
    def __init__(
        self,
        num_envs: int = 1,
        *,
        transition: Any,
        reward: Any,
        start: Any,
        gamma: Unit,
        horizon: Count | None = None,
        terminal: Sequence[bool] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_envs, **options)
        self.transition_table, self.reward_table, self.start = (
            torch.as_tensor(np.asarray(x), dtype=torch.float64) for x in (transition, reward, start)
        )
        if self.reward_table.ndim != 2:
            raise ValueError(f"{self.id}: expected reward [S, A], got {tuple(self.reward_table.shape)}")
        states, actions = self.reward_table.shape
        self.terminal = torch.as_tensor([False] * states if terminal is None else list(terminal))
        for name, table, shape in (
            ("transition", self.transition_table, (states, actions, states)),
            ("start", self.start, (states,)),
        ):
            ones = torch.ones(shape[:-1], dtype=torch.float64)
            if table.shape != shape or bool((table < 0).any()) or not torch.allclose(table.sum(-1), ones):
                raise ValueError(f"{self.id}: expected {name} {shape} of distributions, got {tuple(table.shape)}")
        if self.terminal.shape != (states,):
            raise ValueError(f"{self.id}: expected terminal ({states},), got {tuple(self.terminal.shape)}")
        if bool((self.start[self.terminal] > 0).any()):
            raise ValueError(f"{self.id}: expected start without terminal states, where an episode has no step")
        if not 0.0 <= gamma <= 1.0 or (horizon is None and gamma == 1.0):
            raise ValueError(f"{self.id}: expected gamma in [0, 1], below 1 without a horizon; got {gamma}")
        self.gamma, self.horizon = gamma, horizon
        self.single_observation_space = spaces.Box(0.0, max(states - 1.0, 1.0), (1,), np.float32)
        self.single_action_space = spaces.Discrete(actions)
        # inverse distribution functions; without the last column, which is 1 up to rounding
        self._next = self._table(self.transition_table.cumsum(-1)[..., :-1])
        self._first = self._table(self.start.cumsum(-1)[:-1])
        self._rewards, self._ends = self._table(self.reward_table), self._inward(self.terminal.to(self.device))

    def initial_state(self, uniform: Array) -> Array:
        state = self.real((uniform[0][:, None] >= self._first).sum(-1))
        return self.xp.stack((state, self.xp.zeros_like(state)))

    def dynamics(self, state: Array, action: Array, noise: Array) -> Array:
        successor = (noise[0][:, None] >= self._next[self._index(state), action]).sum(-1)
        return self.xp.stack((self.real(successor), state[1] + 1.0))

    def terminated(self, state: Array) -> Array:
        ended = self._ends[self._index(state)]
        return ended if self.horizon is None else ended | (state[1] >= self.horizon)

    def reward(self, state: Array, action: Array, terminated: Array) -> Array:
        return self._rewards[self._index(state), action]

    def observe(self, state: Array) -> Array:
        return state[:1]

    def _table(self, x: Tensor) -> Array:
        return self._inward(x.to(self.device, self.dtype))

    def _index(self, state: Array) -> Array:
        return state[0].astype(np.int64) if self.xp is np else state[0].long()

    # Exact quantities.

    def objective(self, params: Params) -> Tensor:
        return self.start @ self.values(params)

    def values(self, params: Params) -> Tensor:
        """``V(s)`` with all steps left, ``[S]``."""
        policy = self.probabilities(params)
        reward = self._alive(torch.einsum("sa,sa->s", policy, self.reward_table))
        step = self.gamma * self._alive(torch.einsum("sa,sat->st", policy, self.transition_table).T).T
        if self.horizon is None:
            solved: Tensor = torch.linalg.solve(torch.eye(len(reward), dtype=torch.float64) - step, reward)
            return solved
        value = torch.zeros_like(reward)
        for _ in range(self.horizon):
            value = reward + step @ value
        return value

    def visits(self, params: Params) -> tuple[Tensor, Tensor]:
        """See :class:`Exact`.

        Raises:
            ValueError: episodes that go on for ever, whose visits are infinitely many.
        """
        if self.horizon is None and not self._ends_surely():
            raise ValueError(
                f"{self.id}: the visits of an episode are counted with a horizon, or where every state leads to a "
                "terminal one; got neither"
            )
        step = self._alive(torch.einsum("sa,sat->st", self.probabilities(params), self.transition_table).T)
        if self.horizon is None:
            count = torch.linalg.solve(torch.eye(len(step), dtype=torch.float64) - step, self.start)
        else:
            now = count = self.start
            for _ in range(self.horizon - 1):
                now = step @ now
                count = count + now
        return self.states, self._alive(count)

    def _ends_surely(self) -> bool:
        """Whether from every state that can be reached some actions lead to a terminal state."""
        leads = (self.transition_table > 0).any(1) | torch.eye(len(self.start), dtype=torch.bool)
        for _ in range(len(self.start).bit_length()):  # ways of 1, 2, 4 ... steps
            leads = leads.double() @ leads.double() > 0
        ends, reached = leads[:, self.terminal].any(1), leads[self.start > 0].any(0)
        return bool(ends[reached].all())

    def optimal_return(self) -> float:
        """Of the best policy that may also look at the clock: value iteration.

        Raises:
            ValueError: no horizon.
        """
        if self.horizon is None:
            raise ValueError(f"{self.id}: the optimal return is computed for a finite horizon only")
        value = torch.zeros(len(self.start), dtype=torch.float64)
        for _ in range(self.horizon):
            value = self._alive((self.reward_table + self.gamma * self.transition_table @ value).amax(-1))
        return float(self.start @ value)

    @property
    def states(self) -> Tensor:
        """Observations of all states, ``[S, 1]``."""
        return torch.arange(len(self.start), dtype=torch.float64).unsqueeze(-1)

    def probabilities(self, params: Params) -> Tensor:
        """``pi(a|s)``, ``[S, A]``."""
        return params(self.states)["logits"].softmax(-1)

    def _alive(self, x: Tensor) -> Tensor:
        """``x [..., S]`` with 0 at terminal states."""
        return torch.where(self.terminal, 0.0, x)


class RandomMDP(TabularMDP):
    """A random MDP; the defaults are the five states of docs/npg_igt.md.

    ``numpy.random.default_rng(mdp_seed)`` draws transitions from a Dirichlet distribution, then rewards from [0, 1).
    """

    id = "ccrl/RandomMDP-v0"

    @checked
    def __init__(
        self,
        num_envs: int = 1,
        *,
        states: Count = 5,
        actions: Count = 3,
        concentration: Positive = 0.3,
        gamma: Unit = 0.9,
        horizon: Count = 15,
        mdp_seed: Natural = 7,
        **options: Any,
    ) -> None:
        rng = np.random.default_rng(mdp_seed)
        transition = rng.dirichlet(concentration * np.ones(states), size=(states, actions))
        reward = rng.uniform(0.0, 1.0, (states, actions))
        super().__init__(
            num_envs, transition=transition, reward=reward, start=np.full(states, 1.0 / states), gamma=gamma,
            horizon=horizon, **options,
        )  # fmt: skip


class RandomWalk(TabularMDP):
    """States 0 to 9 in a row, start 0, actions right (0) and left (1), deterministic, the left end holds; -1 per step
    until 9 is reached. A walk as in Ghavamzadeh, Engel and Valko 2016, whose rewards are not known here."""

    id = "ccrl/RandomWalk-v0"
    default_max_episode_steps = 2000

    @checked
    def __init__(
        self, num_envs: int = 1, *, states: Annotated[int, Range(2)] = 10, gamma: Unit = 0.99, **options: Any
    ) -> None:
        transition = np.zeros((states, 2, states))
        for s in range(states):
            transition[s, 0, min(s + 1, states - 1)] = transition[s, 1, max(s - 1, 0)] = 1.0
        terminal = [s == states - 1 for s in range(states)]
        super().__init__(
            num_envs, transition=transition, reward=np.full((states, 2), -1.0), start=np.eye(states)[0], gamma=gamma,
            terminal=terminal, **options,
        )  # fmt: skip
