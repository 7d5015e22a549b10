"""What offline agents share: the data set as a full ring, networks in its units, a learner whose clock is updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch

from agents.base import Agent
from agents.offline.policy import OfflinePolicy
from ccrl.data import Batching, Data
from ccrl.learn import Cycle, DatasetLearner, Learner
from ccrl.offline import DataError, Dataset, load_dataset
from ccrl.offline.dataset import Array
from ccrl.offline.packed import PackedRows
from ccrl.replay import ReplayBuffer
from ccrl.settings import Above, Compile, Count, Positive, Settings, Unit
from ccrl.updaters import FlatUpdater, Updater

__all__ = ["OfflineAgent", "OfflineConfig", "Parts"]

Parts = tuple[Cycle, dict[str, Updater]]

_data: ContextVar[Dataset | None] = ContextVar("data", default=None)
_loading: ContextVar[bool] = ContextVar("loading", default=False)


@dataclass(frozen=True)
class OfflineConfig(Settings):
    """What every offline agent has."""

    dataset: str = ""
    """The agent learns from this data set: minari:ID, ogbench:FILE, d4rl:FILE, or a file of your own (.npz, .parquet)
    or of D4RL (.hdf5)."""
    num_envs: Count = 1
    """The environment, which only evaluation steps, has this many copies."""
    batch_size: Count = 256
    """A gradient step reads this many transitions, drawn with replacement."""
    updates: Count = 100
    """An iteration, after which training is logged, has this many gradient steps."""
    hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers of every network."""
    learning_rate: Positive = 3e-4
    """This is Adam's step size."""
    adam_eps: Positive = 1e-8
    """Adam adds this epsilon to the root of its second moment."""
    normalise_obs: bool = True
    """Observations are standardised with the data set's mean and standard deviation, in evaluation too."""
    compile: Compile = "auto"
    """Gradient steps are compiled graphs: always (on), never (off), or from 20,000 of them on where there is a C++
    compiler (auto)."""


@dataclass(frozen=True)
class RewardConfig(OfflineConfig):
    """What offline agents that read rewards have."""

    gamma: Unit = 0.99
    """Rewards are discounted by this factor per step."""
    polyak: Annotated[float, Above(0.0, 1.0)] = 0.005
    """The target networks move by this share towards the trained ones."""
    reward: Literal["raw", "range", "minus_one"] = "raw"
    """Rewards are used as they are (raw), times 1000 over the range of the episodes' returns (range), or less 1
    (minus_one, for sparse rewards of 0 and 1). Evaluation always shows raw returns."""


class OfflineAgent(Agent):
    """Trains on a data set; ``env`` gives the spaces and is where the agent is evaluated. Its clock counts updates.

    A checkpoint has no data: a loaded agent opens the data set of its settings again, or takes ``data``; where neither
    is there, it acts and does not learn. To go on in an environment is a new run of an agent that collects.

    :param data: a data set in place of the setting ``dataset``.
    :raises DataError: no data set, or one of other spaces than the environment's.
    """

    source: Any
    reads: tuple[str, ...] = ("obs", "action", "reward", "next_obs", "alive")
    """Columns of a batch."""
    _missing = ""

    def __init__(self, env: Any, config: Any = None, *, data: Dataset | None = None, **options: Any) -> None:
        with _set(_data, data) if data is not None else contextlib.nullcontext():
            super().__init__(env, config, **options)

    @classmethod
    def load(cls, path: Any, env: Any = None, *args: Any, data: Dataset | None = None, **options: Any) -> Self:
        """As ``Agent.load``; ``data`` as for a new agent."""
        with _set(_loading, True), _set(_data, data):
            return super().load(path, env, *args, **options)

    def connect(self, env: Any) -> None:
        self.env = self.resolved(env)
        self.device = torch.device(self.env.device)
        self.collector = None

    def build(self) -> Learner:
        policy = self.make_networks().to(self.device)
        self.data = self._open()
        self.source = _Nothing(self) if self.data is None else self.pack(self.rows(self.data, policy))
        cycle, updaters = self.parts(policy)
        c = self.config
        return DatasetLearner(
            self.source, policy, cycle, updaters, batch_size=c.batch_size, updates=c.updates, seed=self.seed,
            device=self.device, compile=c.compile,
        )  # fmt: skip

    # -- what a subclass fills in --------------------------------------------------------------------------------------

    def make_networks(self) -> OfflinePolicy:
        """The policy with its critics."""
        raise NotImplementedError

    def parts(self, policy: OfflinePolicy) -> Parts:
        """The cycle and its updaters."""
        raise NotImplementedError

    # -- the data ------------------------------------------------------------------------------------------------------

    def networks(self, **options: Any) -> OfflinePolicy:
        """Networks of the settings' widths. :raises ValueError: next to a policy of the caller's."""
        if self.own_policy is not None:
            raise ValueError(f"policy: {self.name} makes its networks itself and takes none; drop it")
        spaces = self.env.single_observation_space, self.env.single_action_space
        return OfflinePolicy(*spaces, hidden=self.config.hidden, **options)

    def updater(self, policy: OfflinePolicy, prefix: str, **options: Any) -> FlatUpdater:
        """Adam on the parameters of a part."""
        options = {"lr": self.config.learning_rate, "eps": self.config.adam_eps} | options
        return FlatUpdater(policy, prefixes=[prefix], **options)

    def rows(self, data: Dataset, policy: OfflinePolicy) -> ReplayBuffer:
        """The ring that is trained on: actions in [-1, 1], rewards as the settings say. Standardises the policy."""
        if self.config.normalise_obs:
            policy.standardise(torch.as_tensor(data.obs, device=self.device))
        return data.ring(self.device, **self.columns(data, policy))

    def pack(self, ring: ReplayBuffer) -> Any:
        """What batches are drawn from."""
        return PackedRows(ring, self.reads)

    def columns(self, data: Dataset, policy: OfflinePolicy) -> dict[str, Array]:
        """Columns of the ring in place of the data set's, and further ones."""
        action = policy.unit_action(torch.as_tensor(data.action, device=self.device)).cpu().numpy()
        reward = _rewards(data, getattr(self.config, "reward", "raw"))
        return {"action": action.astype(np.float32), "reward": reward.astype(np.float32)}

    def _open(self) -> Dataset | None:
        data, name = _data.get(), self.config.dataset
        if data is None:
            if not name and not _loading.get():
                raise DataError(f"{self.name}: expected a data set, got none; set dataset, or pass data")
            try:
                data = load_dataset(name) if name else None
            except (DataError, OSError, ImportError) as error:
                if not _loading.get():
                    raise
                self._missing = f" ({error})"  # said where it is missed: when the agent is to learn
                return None
        return data if data is None else self._checked(data)

    def _checked(self, data: Dataset) -> Dataset:
        policy = self.make_networks()
        shape = (policy.width, *policy.action_shape)
        found = (data.obs.shape[1], *data.action.shape[1:])
        if shape != found:
            raise DataError(
                f"{data.name}: expected observations and actions of {shape[0]} and {shape[1:]} numbers as the "
                f"environment has, got {found[0]} and {found[1:]}; give the environment that the data are from"
            )
        space: Any = self.env.single_action_space
        outside = ((data.action < space.low - 1e-4) | (data.action > space.high + 1e-4)).any(-1)
        if outside.mean() > 0.01:
            row = int(np.flatnonzero(outside)[0])
            raise DataError(
                f"{data.name}: row {row}, column 'action': expected numbers in {space}, got {data.action[row]}; store "
                "the action that was executed"
            )
        return data


class _Nothing:
    """The source of an agent that was loaded without its data."""

    def __init__(self, agent: OfflineAgent) -> None:
        self._told = (
            f"{agent.name}: expected the data set {agent.config.dataset!r} to learn on, found none{agent._missing}; "
            "load the agent with data=, or where the file is"
        )

    def sample(self, spec: Batching, generator: torch.Generator | None) -> Data:
        raise DataError(self._told)


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _rewards(data: Dataset, kind: str) -> Array:
    if kind == "minus_one":
        return np.asarray(data.reward - 1.0)
    if kind == "range":
        returns = data.returns()
        spread = returns.max() - returns.min()
        if spread <= 0.0:
            raise DataError(f"{data.name}: reward='range' expects different returns, got {returns[0]}")
        return np.asarray(data.reward * (1000.0 / spread))
    return data.reward
