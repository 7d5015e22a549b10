"""The agent: SB3's signatures outside, five timed verbs inside (collect, prepare, update, log, checkpoint)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ccrl.bank import Bank
from ccrl.batched_env import BatchedEnv, Tree, check_device, resolve_env
from ccrl.collect import Collector
from ccrl.data import Data
from ccrl.estimators.base import Context, Direction, Estimator, check_terms, run_phases
from ccrl.estimators.scores import Scores
from ccrl.experiment import checkpoint
from ccrl.experiment import config as configs
from ccrl.experiment.callbacks import Callback, as_callback
from ccrl.experiment.progress import ProgressBar
from ccrl.policies import MLPPolicy, build_actor_critic
from ccrl.policies.acting import Acting, has_memory, predict
from ccrl.returns import explained_variance
from ccrl.updaters import FlatUpdater, GradientEstimate, Stats, can_compile

__all__ = ["Agent"]

COMPILE_FROM = 1_000
"""Gradient steps from which compiling pays: it costs seconds, an eager step about a millisecond."""


class Agent:
    """Trains a policy on ``env`` with the estimator that a subclass builds.

    :param env: an id (``"HalfCheetah-v5"``) or a ``BatchedEnv``.
    :param config: the subclass's ``Config``; None: its defaults.
    :param seed: one integer seeds networks, environments, action noise and shuffling.
    :param device: of networks and buffers; must be the environment's.
    :raises ValueError, TypeError: for spaces, configs and terms that do not fit together.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[Any]]

    policy: MLPPolicy
    estimator: Estimator
    updaters: dict[str, FlatUpdater]
    collector: Collector | None
    direction: Direction | None = None
    episodic: ClassVar[bool] = False
    """Every rollout is of fresh episodes: ``num_envs`` of them, of at most ``n_steps`` steps, on the agent's own
    environments."""

    def __init__(
        self,
        env: str | BatchedEnv,
        config: Any = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        env_kwargs: dict[str, Any] | None = None,
    ) -> None:
        config = self.Config() if config is None else config
        if not isinstance(config, self.Config):
            raise TypeError(f"config: expected {self.Config.__name__}, got {type(config).__name__}")
        self.config, self.seed, self.env_kwargs = config, seed, dict(env_kwargs or {})
        self.env_id = env if isinstance(env, str) else None
        self.env = resolve_env(env, config.num_envs, device=device, **self.env_kwargs)
        if self.env.num_envs != config.num_envs:
            raise ValueError(
                f"env has {self.env.num_envs} copies, config.num_envs is {config.num_envs}; make them equal"
            )
        self.device = torch.device(self.env.device)
        if self.device.type != check_device(device).type:
            raise ValueError(f"device: the environment is on {self.device}, the agent on {device}; make them equal")
        self.collector = Collector(self.env, seed=seed, make_env=self._fresh_envs)
        self._begin()

    def _begin(self) -> None:
        """Build networks and estimator under the agent's seed, and set every clock to zero."""
        with torch.random.fork_rng(devices=[]):  # building an agent must not move the caller's random numbers
            torch.manual_seed(self.seed)
            self.build()
        self.policy.to(self.device)
        self.estimator.to(self.device)
        check_terms(self.estimator.phases(), self.outputs())
        self.ctx = Context(
            k=torch.zeros((), dtype=torch.float64, device=self.device),
            K=torch.ones((), dtype=torch.float64, device=self.device),
            generator=torch.Generator(self.device).manual_seed(self.seed + 7),
            bank=Bank(self.policy),
            scores=lambda theta, data, level: Scores(self.policy, theta, data, level),
        )
        self.iteration, self.n_updates = 0, 0
        self.healthy = True
        """False inside an iteration and after one that failed: such a state is not for a checkpoint."""
        self.last_checkpoint: Path | None = None
        self.episodes: deque[tuple[float, float]] = deque(maxlen=100)
        self.scalars: dict[str, float | Tensor] = {}
        self._pending_callback_state: dict[str, Any] = {}
        self.callbacks: list[Callback] = []

    def outputs(self) -> frozenset[str]:
        """Forward outputs that terms may want."""
        return self.policy.outputs()

    # -- what a subclass fills in --------------------------------------------------------------------------------------

    def build(self) -> None:
        """Set ``policy``, ``updaters`` and ``estimator`` (and ``direction``)."""
        raise NotImplementedError

    @classmethod
    def slots(cls) -> dict[str, str]:
        """Estimator slots that the method fills, for the table of methods: slot -> what."""
        raise NotImplementedError

    def make_policy(self, heads: dict[str, Sequence[int]]) -> MLPPolicy:
        """The policy that the config describes."""
        env = self.env
        policy = build_actor_critic(self.config, env.single_observation_space, env.single_action_space, heads)
        return policy.to(self.device)  # type: ignore[no-any-return]

    def _fresh_envs(self, n: int) -> BatchedEnv:
        if self.episodic and n == self.env.num_envs:
            return self.env
        if self.env_id is None:
            raise ValueError("fresh episodes need an environment id: an agent cannot copy the environment it was given")
        return resolve_env(self.env_id, n, device=self.device, **self.env_kwargs)

    @property
    def spaces(self) -> str:
        """The environment's spaces, in words."""
        return f"{self.env.single_observation_space} and {self.env.single_action_space}"

    # -- learning -----------------------------------------------------------------------------------------------------

    @property
    def num_timesteps(self) -> int:
        """The agent's clock: valid environment steps so far, of streams and of fresh episodes."""
        return self.collector.total_steps + self.collector.fresh_steps

    @property
    def samples_per_iteration(self) -> int:
        """Environment steps per iteration (at most, where episodes end earlier)."""
        return int(self.config.num_envs * self.config.n_steps)

    def learn(
        self,
        total_timesteps: int,
        callback: Callback | Callable[[Agent], bool | None] | Sequence[Callback | Callable[..., Any]] | None = None,
        progress_bar: bool = False,
    ) -> Agent:
        """Train until the clock shows ``total_timesteps`` (at least one iteration if it shows less).

        The total is absolute: a loaded agent goes on from its clock. Schedules run over ``floor(total / batch)``
        iterations.
        """
        if total_timesteps < 1:
            raise ValueError(f"total_timesteps: expected >= 1, got {total_timesteps}")
        self.total_timesteps = total_timesteps
        self.ctx.K.fill_(max(1, total_timesteps // self.samples_per_iteration))
        self._choose_compile(total_timesteps)
        self.callbacks = as_callback(callback)
        for c in self.callbacks:
            if c.key in self._pending_callback_state:
                c.load_state_dict(self._pending_callback_state.pop(c.key))
            c.on_training_start(self)
        bar = ProgressBar(total_timesteps, self.num_timesteps, progress_bar)
        self._started = (time.perf_counter(), self.num_timesteps)
        try:
            while self.num_timesteps < total_timesteps:
                self._iterate()
                bar.update(self.num_timesteps, self.ep_rew_mean)
                # every callback is called, also after one that wants to stop: a checkpoint must not be skipped
                if False in [c.on_iteration(self) for c in self.callbacks]:
                    break
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error}; iteration {self.iteration}, {self.num_timesteps} steps; last good checkpoint: "
                f"{self.last_checkpoint or 'none was written'}"
            ) from error
        finally:
            bar.close()
            for c in self.callbacks:
                c.on_training_end(self)
        return self

    def _iterate(self) -> None:
        self.healthy = False
        marks = [time.perf_counter()]
        self.collector.env_seconds = 0.0
        points = self._points()
        have: dict[str, Data] = {}
        while requests := self.estimator.plan(points, have, self.ctx):
            for request in requests:
                have[request.tag] = self.collector.collect(request, self.ctx.bank.policy(request.params))
        marks.append(time.perf_counter())
        stats = self.estimator.fit(have, self.ctx)
        with torch.no_grad():
            data = self.estimator.prepare(have, self.ctx)
        marks.append(time.perf_counter())
        if self.direction is None:
            update, steps = run_phases(self.estimator, data, self.ctx)
            stats |= update
            self.n_updates += steps
        else:
            stats |= self._directed_step(points, data)
            self.n_updates += 1
        self._check_finite()
        with torch.no_grad():
            self.estimator.after_update(data, stats)
            if getattr(self.config, "normalise_obs", False):
                # after the update: moved before it, the ratio at the old parameters would not be 1
                self.policy.update_normaliser(data["on"]["obs"], data["on"]["valid"])
        self.ctx.k += 1
        self.iteration += 1
        marks.append(time.perf_counter())
        self._record(data, stats, marks)
        self.healthy = True

    def _points(self) -> dict[str, Tensor]:
        theta = self.updaters["policy"].flat
        return {"on": theta} if self.direction is None else self.direction.points(theta, self.ctx)

    def _directed_step(self, points: dict[str, Tensor], data: dict[str, Data]) -> Stats:
        assert self.direction is not None
        updater, estimates = self.updaters["policy"], list[GradientEstimate]()

        def gradient(tag: str) -> GradientEstimate:
            estimates.append(self.estimator.gradient(points[tag], data[tag], self.ctx))
            return estimates[-1]

        theta = self.direction.step(updater.flat, gradient, data, self.ctx)
        ok = theta.isfinite().all()
        updater.finite.logical_and_(ok)
        updater.flat.copy_(torch.where(ok, theta, updater.flat))
        # read after the step: directions add what they did to the estimate's statistics
        return {k: v for estimate in estimates for k, v in estimate.stats.items()}

    def _check_finite(self) -> None:
        for name, updater in self.updaters.items():
            if not bool(updater.finite):
                raise FloatingPointError(
                    f"the {name} loss or its gradient is not finite; the parameters are those before that update"
                )

    def _choose_compile(self, total_timesteps: int) -> None:
        if self.direction is not None:
            return  # only surrogates are compiled
        steps = self.gradient_steps() * (total_timesteps // self.samples_per_iteration)
        wanted = self.config.compile == "on" or (self.config.compile == "auto" and steps >= COMPILE_FROM)
        wanted = wanted and getattr(self.policy, "compiles", True)
        possible, why = can_compile()
        if wanted:
            print(f"[ccrl] {why}", flush=True)
        for updater in self.updaters.values():
            updater.compile = wanted and possible

    def gradient_steps(self) -> int:
        """Optimiser steps per iteration; a direction takes one."""
        total = 0 if self.direction is None else 1
        for phase in self.estimator.phases():
            units = self.samples_per_iteration if phase.batching.unit == "transition" else self.config.num_envs
            size = units if phase.batching.size == "full" else min(int(phase.batching.size), units)
            total += phase.batching.epochs * -(-units // size)
        return total

    # -- logging ------------------------------------------------------------------------------------------------------

    @property
    def ep_rew_mean(self) -> float | None:
        """Mean raw return of the last 100 training episodes; None before the first ends."""
        return float(np.mean([r for r, _ in self.episodes])) if self.episodes else None

    def _record(self, data: dict[str, Data], stats: dict[str, Tensor], marks: list[float]) -> None:
        ended = self.collector.stats
        self.episodes.extend(zip(ended.returns.tolist(), ended.lengths.tolist()))
        start, first = self._started
        elapsed, total = marks[-1] - start, marks[-1] - marks[0]
        share = {"env": self.collector.env_seconds, "policy": marks[1] - marks[0] - self.collector.env_seconds,
                 "estimate": marks[2] - marks[1], "update": marks[3] - marks[2]}  # fmt: skip
        self.scalars = {}
        if self.episodes:
            length = float(np.mean([n for _, n in self.episodes]))
            self.scalars = {"rollout/ep_rew_mean": self.ep_rew_mean, "rollout/ep_len_mean": length}
        self.scalars |= {
            "time/fps": (self.num_timesteps - first) / max(elapsed, 1e-9),
            "time/iterations": self.iteration,
            "time/time_elapsed": elapsed,
            "time/total_timesteps": self.num_timesteps,
            **{f"time/{k}": v / total for k, v in share.items()},
            **{f"train/{k}": v for k, v in stats.items()},
            "train/learning_rate": self.updaters["policy"].lr.clone(),
            "train/n_updates": self.n_updates,
        }
        on = data["on"]
        if "value" in on and "return" in on:
            self.scalars["train/explained_variance"] = explained_variance(on["value"], on["return"], on["valid"])
        if hasattr(getattr(self.policy, "actor", None), "log_std"):
            self.scalars["train/std"] = self.policy.actor.log_std.detach().exp().mean()
        self.scalars |= {k: v for k, v in self.collector.log.items() if isinstance(v, int | float | Tensor)}
        self.collector.log = {}

    # -- acting -------------------------------------------------------------------------------------------------------

    def act(self, obs: Tree, deterministic: bool = False) -> Tensor:
        """Actions for the environment ``[N, ...]`` from observations ``[N, ...]`` on the agent's device; ``ValueError``
        for a policy with a memory, which would begin an episode at every call."""
        if has_memory(self.policy):
            raise ValueError("act: this policy has a memory; use acting(), which keeps it, or predict with its state")
        return Acting(self.policy, self.device)(obs, deterministic)

    def acting(self) -> Callable[[Tree, bool], Tensor]:
        """``act`` for whole episodes: with a policy that has a memory an ``Acting`` of its own, which keeps it."""
        return Acting(self.policy, self.device) if has_memory(self.policy) else self.act

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """SB3's signature: one observation or a batch in NumPy -> actions of the same kind and the next state (of
        policies with a memory). ``ValueError`` for observations of another shape."""
        space = self.env.single_observation_space
        return predict(self.policy, space, observation, state, episode_start, deterministic, self.device)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training reads: a loaded agent continues bit for bit (CPU, environments with state)."""
        return {
            "policy": self.policy.state_dict(),
            "estimator": self.estimator.state_dict(),
            "updaters": {k: u.state_dict() for k, u in self.updaters.items()},
            "bank": self.ctx.bank.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
            "generator": self.ctx.generator.get_state(),
            "k": self.ctx.k.clone(),
            "iteration": self.iteration,
            "n_updates": self.n_updates,
            "episodes": [list(e) for e in self.episodes],
            # with what no callback has claimed yet: saving a loaded agent before it learns must not lose it
            "callbacks": self._pending_callback_state | {c.key: c.state_dict() for c in self.callbacks},
            "rng": checkpoint.rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict`` in place."""
        self.policy.load_state_dict(state["policy"])
        self.estimator.load_state_dict(state["estimator"])
        for name, updater in self.updaters.items():
            updater.load_state_dict(state["updaters"][name])
        self.ctx.bank.load_state_dict(state["bank"])
        if self.collector is not None:
            self.collector.load_state_dict(state["collector"])
        self.ctx.generator.set_state(state["generator"].cpu())
        self.ctx.k.copy_(state["k"])
        self.iteration, self.n_updates = state["iteration"], state["n_updates"]
        self.episodes.clear()
        self.episodes.extend((r, n) for r, n in state["episodes"])
        self._pending_callback_state = dict(state["callbacks"])
        checkpoint.set_rng_state(state["rng"])

    def save(self, path: str | Path) -> None:
        """Write one atomic checkpoint: configuration, environment id and the whole state."""
        header = {"agent": self.name, "config": configs.to_dict(self.config), "env": self.env_id, "seed": self.seed,
                  "env_kwargs": self.env_kwargs}  # fmt: skip
        checkpoint.save(path, {**header, "state": self.state_dict()})

    @classmethod
    def load(cls, path: str | Path, env: str | BatchedEnv | None = None, device: torch.device | str = "cpu") -> Agent:
        """The agent in a checkpoint; ``env=None`` rebuilds the environment it was trained on, another id begins with
        fresh episodes. ``ValueError`` if the checkpoint is another agent's, is of other spaces than the environment's,
        or has no environment id and none is given."""
        saved = checkpoint.load(path, map_location=check_device(device))
        if saved.get("agent") != cls.name:
            raise ValueError(f"{path}: expected a checkpoint of {cls.name}, got one of {saved.get('agent')!r}")
        other = isinstance(env, str) and env.removeprefix("ccrl/") != (saved["env"] or "").removeprefix("ccrl/")
        env = saved["env"] if env is None else env
        if env is None:
            raise ValueError(f"{path} was trained on an environment object; pass env=")
        config = configs.from_dict(cls.Config, saved["config"])
        kwargs = saved["env_kwargs"] if isinstance(env, str) and not other else {}
        state, agent = saved["state"], cls(env, config, seed=saved["seed"], device=device, env_kwargs=kwargs)
        if different := checkpoint.different_shapes(state["policy"], agent.policy.state_dict()):
            raise ValueError(
                f"{path}: expected an environment with the spaces it was trained on, got {agent.spaces}; the policy's "
                f"shapes (here, in the checkpoint): {different}"
            )
        if other and state["collector"] is not None:
            state["collector"].pop("env", None)  # shapes do not tell tasks apart: HalfCheetah's state fits Walker2d
        agent.load_state_dict(state)
        return agent
