"""The agent: SB3's face (learn, predict, save, load) on a learner, which says what an iteration is."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from agents.actions import Actions, check_actions
from ccrl.batched_env import BatchedEnv, Tree, check_device, resolve_env
from ccrl.collect import Collector
from ccrl.estimators.base import Context, Direction, Estimator
from ccrl.experiment import checkpoint
from ccrl.experiment.callbacks import Callback, as_callback
from ccrl.experiment.saved import check_options, load_agent, save_agent
from ccrl.learn import Learner, RolloutLearner
from ccrl.learn.loop import run
from ccrl.policies import build_actor_critic
from ccrl.policies.acting import Acting, has_memory, predict
from ccrl.policies.build import PolicyLike
from ccrl.seeding import stream_seed
from ccrl.settings import Natural, checked
from ccrl.updaters import Updater

__all__ = ["Agent", "Callbacks"]

Callbacks = Callback | Callable[[Any], bool | None] | Sequence[Callback | Callable[..., Any]] | None


class Agent:
    """Trains a policy on ``env`` with the learner that a subclass builds.

    :param env: an id (``"HalfCheetah-v5"``) or a ``BatchedEnv``.
    :param config: the subclass's ``Config``; None: its defaults.
    :param seed: one integer seeds networks, environments, action noise and shuffling.
    :param device: of networks and buffers; must be the environment's.
    :param policy: a policy of your own in place of the agent's: a module, or a class or function that is called with
        ``(observation_space, action_space, heads=...)``; a loaded agent needs it again.
    :param settings: fields of ``Config``, as in ``PPO(env, learning_rate=1e-3)``.
    :raises ValueError, TypeError: for spaces, configs and terms that do not fit together.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    Config: ClassVar[type[Any]]
    episodic: ClassVar[bool] = False
    """Every rollout is of fresh episodes: ``num_envs`` of them, of at most ``n_steps`` steps, on the agent's own
    environments."""
    actions: ClassVar[Actions] = "any"
    """It takes these actions; an environment with others is refused, unless it comes with a policy."""
    steps_env: ClassVar[bool] = True
    """It learns from an environment that it steps; if false it is handed a task (of texts, of generated samples) and
    evaluates itself."""

    env: BatchedEnv
    collector: Any
    learner: Learner

    @checked
    def __init__(
        self,
        env: Any,
        config: Any = None,
        *,
        seed: Natural = 0,
        device: torch.device | str = "cpu",
        env_kwargs: dict[str, Any] | None = None,
        policy: PolicyLike | str | None = None,
        **settings: Any,
    ) -> None:
        if env_kwargs is not None and not isinstance(env_kwargs, Mapping):
            raise TypeError(f"env_kwargs: expected options by name, as {{'option': 1}}, got {env_kwargs!r}")
        if isinstance(policy, str):  # a setting of the agent's that has the name of this argument (HDPO's)
            settings, policy = settings | {"policy": policy}, None
        self.config, self.seed, self.env_kwargs = self.configure(config, settings), seed, dict(env_kwargs or {})
        self.env_id = env if isinstance(env, str) else None
        self.own_policy = policy
        if self.env_id is not None:
            check_options(self.env_kwargs)
        self.device = check_device(device)
        self.connect(env)
        with torch.random.fork_rng(devices=[]):  # building an agent must not move the caller's random numbers
            torch.manual_seed(stream_seed(seed, "networks"))
            self.learner = self.build()
        if self.learner is None or not hasattr(self, "name"):  # without a name the first checkpoint would fail
            raise TypeError(f"{type(self).__name__}: expected a class attribute `name`, and build to return a learner")
        self.learner.check()
        self.last_checkpoint: Path | None = None
        self._pending_callback_state: dict[str, Any] = {}
        self.callbacks: list[Callback] = []

    @classmethod
    def configure(cls, config: Any, settings: dict[str, Any]) -> Any:
        """The agent's config from a config, settings by name, or both (the settings win).

        :raises TypeError: another config, or settings that the agent does not have.
        """
        if config is not None and not isinstance(config, cls.Config):
            hint = "; the environment comes first, a policy is the keyword policy" if isinstance(config, str) else ""
            raise TypeError(f"config: expected {cls.Config.__name__}, got {type(config).__name__}{hint}")
        known = [f.name for f in dataclasses.fields(cls.Config)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                hint = f"did you mean {near}?" if near else f"it has {known}"
                raise TypeError(f"{cls.name} has no setting {name!r}; {hint}")
        return cls.Config(**settings) if config is None else dataclasses.replace(config, **settings)

    # -- what a subclass fills in --------------------------------------------------------------------------------------

    def build(self) -> Learner:
        """The learner, with its policy, updaters and estimator or cycle. Called once, under the agent's seed."""
        raise NotImplementedError

    @classmethod
    def slots(cls) -> dict[str, str]:
        """Estimator slots that the method fills, for the table of methods: slot -> what."""
        raise NotImplementedError

    def connect(self, env: Any) -> None:
        """Set what the agent learns from (``env`` and ``collector``)."""
        self.env = self.resolved(env)
        if self.own_policy is None:
            check_actions(self, self.env.single_action_space)
        self.device = torch.device(self.env.device)
        self.collector = Collector(self.env, seed=self.seed, make_env=self._fresh_envs)

    def resolved(self, env: Any) -> BatchedEnv:
        """``env``, or the one of that id. :raises ValueError: of another number of copies, or on another device."""
        found = resolve_env(env, self.config.num_envs, device=self.device, **self.env_kwargs)
        if found.num_envs != self.config.num_envs:
            raise ValueError(
                f"env has {found.num_envs} copies, config.num_envs is {self.config.num_envs}; make them equal"
            )
        if torch.device(found.device).type != self.device.type:
            raise ValueError(
                f"device: the environment is on {found.device}, the agent on {self.device}; make them equal"
            )
        return found

    # -- what builds are made of ---------------------------------------------------------------------------------------

    def make_policy(self, heads: dict[str, Sequence[int]], **options: Any) -> Any:
        """The policy that the config describes, or the caller's own; ``options`` are ``build_actor_critic``'s."""
        spaces = self.env.single_observation_space, self.env.single_action_space
        return build_actor_critic(self.config, *spaces, heads, policy=self.own_policy, **options).to(self.device)

    def rollouts(
        self,
        policy: nn.Module,
        estimator: Estimator,
        updaters: dict[str, Updater],
        direction: Direction | None = None,
        **options: Any,
    ) -> RolloutLearner:
        """A learner on rollouts of ``num_envs * n_steps`` steps."""
        c = self.config
        options = {"compile": getattr(c, "compile", "off"), "anneal": getattr(c, "anneal_lr", False)} | options
        return RolloutLearner(
            self.collector, policy, estimator, updaters, direction=direction, samples=int(c.num_envs * c.n_steps),
            columns=c.num_envs, lag=getattr(c, "collection_lag", 0), seed=self.seed, device=self.device, **options,
        )  # fmt: skip

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

    # -- the learner's parts, by their short names ---------------------------------------------------------------------

    @property
    def policy(self) -> Any:
        """What acts and is evaluated."""
        return self.learner.policy

    @property
    def updaters(self) -> dict[str, Any]:
        """By name."""
        return self.learner.updaters

    @property
    def estimator(self) -> Any:
        """The estimator of a ``RolloutLearner``."""
        return self.learner.estimator  # type: ignore[attr-defined]

    @property
    def ctx(self) -> Context:
        """What estimators read besides the data."""
        return self.learner.ctx

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self.learner.iteration

    @property
    def n_updates(self) -> int:
        """Gradient steps done."""
        return self.learner.n_updates

    @property
    def scalars(self) -> dict[str, Any]:
        """What the last iteration logs."""
        return self.learner.scalars

    @property
    def healthy(self) -> bool:
        """Whether this state is one for a checkpoint: False inside an iteration and after one that failed."""
        return self.learner.healthy

    @property
    def episodes(self) -> Any:
        """The last 100 training episodes."""
        return self.learner.episodes

    @property
    def num_timesteps(self) -> int:
        """The learner's clock: valid environment steps, completions, scenario periods or updates so far."""
        return self.learner.clock

    @property
    def samples_per_iteration(self) -> int:
        """What an iteration adds to the clock (at most)."""
        return self.learner.samples_per_iteration

    @property
    def ep_rew_mean(self) -> float | None:
        """Mean raw return of the last 100 training episodes; None before the first ends."""
        return self.learner.episodes.mean_return

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int | None = None,
        callback: Callbacks = None,
        progress_bar: bool = False,
        *,
        until: int | None = None,
    ) -> Self:
        """Train ``total_timesteps`` more units of the clock (as SB3 does), or ``until`` the clock shows so many.

        Schedules run from the clock's value now, or with ``until`` from 0 (where ``until`` is the end of the training
        that a checkpoint was taken in: from that training's start). Whole iterations are done, as many as it needs.

        :raises ValueError: neither or both, or less than 1.
        """
        if (total_timesteps is None) == (until is None):
            raise ValueError(f"learn: expected total_timesteps or until, got {total_timesteps} and {until}")
        clock = self.num_timesteps
        if until is None:
            start, end = clock, clock + check_count("total_timesteps", total_timesteps)
        else:
            end = check_count("until", until)
            start = int(self.ctx.start) if int(self.ctx.end) == end and int(self.ctx.start) < end else 0
        if not self.healthy:
            raise RuntimeError(self._torn("learn"))
        if clock >= end:
            return self
        self.before_learning()
        self.learner.begin(start, end)
        self.callbacks = as_callback(callback)
        for c in self.callbacks:
            if c.key in self._pending_callback_state:
                state = self._pending_callback_state.pop(c.key)
                try:
                    c.load_state_dict(state)
                except (KeyError, TypeError) as error:
                    raise checkpoint.CheckpointError(
                        f"the checkpoint's state of the callback {c.key} is not one of {type(c).__name__}: expected "
                        f"what its state_dict gives, got the keys {sorted(map(str, state))}; leave the callback out, "
                        "or continue from another checkpoint"
                    ) from error
        run(self, end, self.callbacks, progress_bar)
        return self

    def before_learning(self) -> None:
        """What comes before the first iteration of a ``learn`` (a supervised phase)."""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to learn, whatever the clock says."""
        return False

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
        policies with a memory). ``ValueError`` for observations of another shape or with NaN."""
        space = self.env.single_observation_space
        return predict(self.policy, space, observation, state, episode_start, deterministic, self.device)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that training reads: a loaded agent continues bit for bit (CPU, environments with state).

        The tensors of modules are the live ones, as PyTorch's are: ``copy.deepcopy`` keeps a state to go back to.
        """
        # with what no callback has claimed yet: saving a loaded agent before it learns must not lose it
        callbacks = self._pending_callback_state | {c.key: c.state_dict() for c in self.callbacks}
        return {"learner": self.learner.state.state_dict(), "callbacks": callbacks, "rng": checkpoint.rng_state()}

    def load_state_dict(self, state: dict[str, Any], restore_rng: bool = False) -> None:
        """Restore ``state_dict`` in place; ``restore_rng``: also the global random streams of torch, NumPy and Python,
        which a resumed run needs and a caller who only loads an agent does not want moved."""
        self.learner.state.load_state_dict(state["learner"])
        self.learner.healthy = True
        self._pending_callback_state = dict(state["callbacks"])
        if restore_rng:
            checkpoint.set_rng_state(state["rng"])

    def save(self, path: str | Path) -> None:
        """Write one atomic checkpoint: configuration, environment id and the whole state.

        :raises RuntimeError: in the middle of an iteration, as after Ctrl-C: half of the state is the next one's.
        """
        if not self.healthy:
            raise RuntimeError(self._torn("save"))
        save_agent(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        env: Any = None,
        device: torch.device | str = "cpu",
        policy: PolicyLike | None = None,
        restore_rng: bool = False,
        trust: Collection[str] = (),
    ) -> Self:
        """The agent in a checkpoint; ``env=None`` rebuilds the environment it was trained on. Another id, or another
        number of copies, begins with fresh episodes. On another kind of device than it was saved on (a GPU's, on a CPU)
        the random streams begin anew.

        :param restore_rng: put the global random generators where they were; otherwise the caller's are left alone.
        :param trust: names ``module:name`` in the file that may import; all others are refused.
        :raises ValueError: if the checkpoint is another agent's, is of other spaces than the environment's, has no
            environment id and none is given, or has a policy of the caller's own and none is given.
        :raises CheckpointError: a damaged file, one of another version, or one that lacks a part.
        """
        return load_agent(cls, path, env, check_device(device), policy=policy, trust=trust, restore_rng=restore_rng)

    @classmethod
    def restored_with(cls, state: dict[str, Any]) -> dict[str, Any]:
        """Further arguments of the class for the agent in a checkpoint with this state."""
        return {}

    def _torn(self, what: str) -> str:
        return (
            f"{what}: expected an agent between two iterations, got one in the middle of iteration {self.iteration + 1}"
            f" (it was interrupted or failed); load the last checkpoint ({self.last_checkpoint or 'none was written'})"
            ", or let StopOnSignal() among the callbacks end training after the iteration"
        )

    def close(self) -> None:
        """Close the environments."""
        if hasattr(self, "env"):
            self.env.close()


def check_count(name: str, value: Any) -> int:
    """``value`` as a whole number of at least 1. :raises ValueError: anything else, NaN and inf too."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 1):
        raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    if value != int(value):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    return int(value)
