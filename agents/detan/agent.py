"""The agent: environments with stocks, one network, any level or target of its utility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.base import Agent
from agents.detan.config import DetaNConfig
from agents.detan.learning import DetaNCycle, StockReplay
from agents.detan.policy import StockPolicy
from ccrl.batched_env import BatchedEnv
from ccrl.collect import Collector
from ccrl.data import tree_map
from ccrl.distributional import Objective, outer_search
from ccrl.experiment.evaluation import EvalResult, evaluate
from ccrl.learn import Learner, ReplayLearner
from ccrl.seeding import stream_seed
from ccrl.updaters import FlatUpdater
from ccrl.wrappers.stock import STOCK, StockEnv

__all__ = ["DetaN"]


class DetaN(Agent):
    """Distributional stock-augmented network."""

    name = "detan"
    example_env = "CartPole-v1"
    """What the command line offers: an id that this agent accepts."""
    actions = "discrete"
    paper = "Avila Pires et al. 2025, arXiv 2501.13028"
    Config = DetaNConfig
    rewards_key: ClassVar[str] = "rewards"
    """Of Dict observations: the last step's reward vector, for objectives of vectors."""
    objective: Objective
    _low: Tensor
    _high: Tensor

    def connect(self, env: Any) -> None:
        super().connect(env)
        self.objective = self.config.make_objective()
        self._low, self._high = (x.to(self.device) for x in self.config.stock_range())
        self.env = self.with_stock(self.env)
        self.collector = Collector(self.env, seed=self.seed)
        first = tree_map(torch.clone, self.env.reset(seed=self.seed))
        assert isinstance(first, dict)
        self._first = first

    def with_stock(self, env: BatchedEnv, start: Any = None) -> StockEnv:
        """``env`` with stocks that begin at ``start``; None: uniform over the training range."""
        rewards = self.rewards_key if self.objective.dims else None
        begin = self._draw if start is None else start
        return StockEnv(env, self.config.gamma, begin, rewards=rewards, horizon=self.config.horizon)

    def _draw(self, generator: torch.Generator, n: int) -> Tensor:
        shape = (n, *self._low.shape)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=self.device)
        return self._low + (self._high - self._low) * uniform

    def build(self) -> Learner:
        c: DetaNConfig = self.config
        if self.own_policy is not None:
            raise ValueError("policy: detan makes its network itself and takes none; drop it")
        spaces = self.env.single_observation_space, self.env.single_action_space
        rewards = self.rewards_key if self.objective.dims else None
        policy = StockPolicy(
            *spaces, objective=self.objective, low=self._low, high=self._high, n_quantiles=c.n_quantiles, skip=rewards,
            hidden=c.hidden, activation=c.activation,
        ).to(self.device)  # fmt: skip
        policy.epsilon.fill_(c.exploration_start)
        updater = FlatUpdater(policy, lr=c.learning_rate, eps=c.adam_eps, max_grad_norm=c.max_grad_norm)
        ring = StockReplay(
            c.buffer_size, *spaces, device=self.device, low=self._low, high=self._high, gamma=c.gamma, share=c.relabel,
            rewards=rewards,
        )  # fmt: skip
        return ReplayLearner(
            self.collector, policy, DetaNCycle(c, policy, updater), {"critic": updater}, ring,
            batch_size=c.batch_size, n_steps=c.n_steps, updates=c.updates, learning_starts=c.learning_starts,
            rounds=c.rounds, seed=self.seed, device=self.device, compile=c.compile, anneal=c.anneal_lr,
        )  # fmt: skip

    # -- any level, any target ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_for(self, objective: Objective | None = None, points: int = 257) -> float | tuple[float, ...]:
        """``c_0`` for an objective of the trained utility (any level of CVaR, any target): the objective's own, or the
        best of ``points`` over the training range by the network's estimate at the environment's first observations.

        The estimate is optimistic; ``validate`` plays episodes instead.
        """
        objective = self.check_served(objective)
        if not objective.searched:
            return objective.start
        starts = torch.linspace(float(self._low), float(self._high), points, dtype=torch.float64, device=self.device)
        rows = len(next(iter(self._first.values())))
        obs = {k: v.repeat(points, *[1] * (v.dim() - 1)) for k, v in self._first.items()}
        obs[STOCK] = starts.repeat_interleave(rows)
        theta = self.policy.quantiles(obs)
        best = self.policy.utilities(obs, theta).argmax(-1)
        chosen = theta[torch.arange(len(theta), device=theta.device), best].double()
        inner = objective.utility(obs[STOCK][:, None] + chosen).mean(-1).view(points, rows).mean(1)
        return float(outer_search(objective, starts, inner)[0])

    def check_served(self, objective: Objective | None) -> Objective:
        """``objective`` (None: the config's) if its greedy actions are those the network was trained for.

        :raises ValueError: another utility.
        """
        if objective is None:
            return self.objective
        x = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64)
        x = torch.stack([x.roll(i) for i in range(objective.dims)], -1) if objective.dims else x
        if objective.dims == self.objective.dims:
            own, other = self.objective.utility(x), objective.utility(x)
            scale = other.abs().sum() / own.abs().sum()
            if torch.allclose(other, scale * own, atol=1e-9):
                return objective
        raise ValueError(
            f"objective: expected a utility proportional to that of {self.objective}, which the network was trained "
            f"for, got {objective}"
        )

    @torch.no_grad()
    def returns(self, start: Any, episodes: int, seed: int = 0, env: BatchedEnv | None = None) -> Tensor:
        """Discounted returns ``[episodes]`` (``[episodes, m]``) of whole greedy episodes from ``c_0 = start``.

        :param env: of ``episodes`` copies; None: made from the agent's environment id.
        """
        made = self.with_stock(self._fresh_envs(episodes) if env is None else env, start)
        obs = made.reset(seed=seed)
        running = torch.ones(made.num_envs, dtype=torch.bool, device=self.device)
        found, t = torch.zeros_like(made.stock), 0
        while bool(running.any()):
            result = made.step(self.act(obs, deterministic=True))
            done = result.terminated | result.truncated
            # not gamma^T c_T - c_0: a stock grows like gamma^-t, and what is shown of it leaves float32
            paid = self.config.gamma**t * made.earned(result, done)
            found = found + torch.where(running.view(-1, *[1] * (found.dim() - 1)), paid, 0.0)
            running &= ~done
            obs, t = result.obs, t + 1
        return found

    def validate(
        self,
        objective: Objective | None = None,
        starts: Sequence[float] | None = None,
        episodes: int = 1000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """``(c_0, value)`` of the best of ``starts`` (None: 17 over the training range), each judged by whole episodes,
        and the objective of ``episodes`` others from the one that was chosen."""
        objective = self.check_served(objective)
        if not objective.searched:
            raise ValueError(f"validate: {type(objective).__name__} has its c_0; there is nothing to search")
        grid = torch.linspace(float(self._low), float(self._high), 17).tolist() if starts is None else list(starts)
        inner = [objective.utility(c + self.returns(c, episodes, seed)).mean() for c in grid]
        best = float(outer_search(objective, torch.tensor(grid, dtype=torch.float64), torch.stack(inner).cpu())[0])
        fresh = self.returns(best, episodes, stream_seed(seed, "chosen start"))
        return best, float(objective.value(fresh, torch.full_like(fresh, 1.0 / len(fresh))))

    def evaluate(self, env: BatchedEnv, episodes: int = 10, seed: int = 0, deterministic: bool = True) -> EvalResult:
        """Undiscounted raw returns of episodes that begin with the objective's ``c_0``."""
        stocked = env if isinstance(env, StockEnv) else self.with_stock(env, self.start_for())
        return evaluate(self.act, stocked, episodes, seed, deterministic)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "data": "ring; every draw with a new stock, c' = (c + r) / gamma",
            "prepare": "r + gamma theta'(s', c', argmax_a mean f(c' + theta'))",
            "loss": "quantile regression of the return's law",
            "aggregate": "batch mean",
        }
