"""PGD: Policy-Guided Diffusion (Jackson, Matthews, Lu, Ellis, Whiteson, Foerster 2024, arXiv 2404.06356).

A denoiser of whole trajectories is trained on the data; its samples are moved, before every step of the sampler, up the
likelihood of their actions under the policy that is being trained (``guidance.py``). Sampled is

    p~(tau)  proportional to  p_data(tau) * prod_t pi(a_t | s_t)^lam             a behaviour-regularised target

and the policy is trained on such rows mixed with a few real ones. The first set is made without guidance; every
``regenerate_every`` updates it is made anew, guided by the current policy. Rivals take its place: no guidance, single
transitions (SynthER), an ensemble of one-step models, the real rows alone.

Slots: source = generated and real rows, mixed; the rest is the base algorithm's. The clock counts updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from agents.offline.base import OfflineAgent, Parts, RewardConfig
from agents.offline.iql import IQLConfig, IQLCycle
from agents.offline.pgd.guidance import PolicyGuide, strengths
from agents.offline.pgd.rivals import TransitionCodec, WorldModel
from agents.offline.pgd.trajectories import Codec, fit_denoiser
from agents.offline.policy import OfflinePolicy
from agents.offline.td3_bc import TD3BCConfig, TD3BCCycle
from agents.on_policy import check_unused
from ccrl.diffusion import Churn, Denoiser, ResidualMLP, UNet1d, karras_levels, sample
from ccrl.learn import DatasetLearner, Learner
from ccrl.offline import DataError, Dataset, Windows, select_windows
from ccrl.replay import Mixture, ReplayBuffer
from ccrl.settings import ConfigError, Count, Finite, Natural, Nonnegative, Positive, Range, Unit
from ccrl.updaters import Stats, Updater

__all__ = ["PGD", "PGDConfig"]

COLUMNS = ("obs", "action", "reward", "next_obs", "terminated", "truncated")


@dataclass(frozen=True)
class PGDConfig(RewardConfig):
    """Published settings; the denoiser has a quarter of the published width."""

    base: Literal["td3_bc", "iql"] = "td3_bc"
    """The policy is trained by this algorithm, with its published settings."""
    rows: Literal["guided", "unguided", "transitions", "model", "real"] = "guided"
    """Rows come from guided or unguided trajectories, from single diffused transitions (SynthER), from an ensemble of
    one-step models that the policy acts in (model), or are the data set's alone (real)."""
    strength: Finite | None = None
    """The guidance's coefficient lam, 1 unless set; its push grows with the number of sampling steps and falls with the
    root of window length times action size, so it is tuned again with them."""
    bump: Nonnegative = 0.3
    """The guidance falls linearly over the sampler's steps, plus this share of half a sine."""
    normalise_guidance: bool = True
    """The guidance has norm 1 over a trajectory before its coefficient."""
    denoised_guidance: bool = False
    """The guidance is computed at the denoised sample in place of the noisy one."""
    window: Count = 32
    """The denoiser is trained on windows of this many rows."""
    stride: Count = 8
    """Every this many-th valid window is taken, and those at the start of episodes and before terminals."""
    generated: Count = 128
    """A generated trajectory gives this many transitions."""
    trajectories: Count = 8192
    """A generated set has this many trajectories."""
    sampling_steps: Count = 256
    """The sampler takes this many steps (Heun's, with churn)."""
    regenerate_every: Count = 10_000
    """Rows are generated anew at every this many updates, a multiple of updates."""
    real_rows: Natural = 16
    """This many rows of a batch are real."""
    denoiser_steps: Count = 50_000
    """The denoiser, or the ensemble of models, is trained for this many gradient steps before the first update."""
    denoiser_batch: Count = 32
    """A gradient step of the denoiser reads this many windows (of transitions: 32 times as many)."""
    denoiser_features: Count = 256
    """The denoiser's first level has this many features, a multiple of 8; published are 1024."""
    denoiser_levels: Count = 3
    """The denoiser halves the time this many times."""
    denoiser_learning_rate: Positive = 2e-3
    """This is the denoiser's peak step size, after a warm-up and before a cosine."""
    denoiser_decay: Unit = 0.995
    """Samples are drawn from an exponential mean of the denoiser's parameters with this decay."""
    model_length: Count = 5
    """The policy takes this many steps in the ensemble of models from a state of the data."""
    model_penalty: Nonnegative = 0.0
    """The models' rewards fall by this times their largest standard deviation."""
    alpha: Nonnegative = 2.5
    """td3_bc: the value's weight."""
    expectile: Unit = 0.7
    """iql: the expectile of the value."""
    beta: Nonnegative = 3.0
    """iql: actions are weighted by the exponential of this times their advantage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength is not None and self.rows != "guided":
            raise ConfigError(
                f"strength: expected None with rows={self.rows!r}, got {self.strength}; it is for guided rows"
            )
        if self.rows != "guided":
            check_unused(self, f"rows={self.rows} are not guided", "bump", "normalise_guidance", "denoised_guidance")
        if self.rows != "model":
            check_unused(self, f"rows={self.rows} come from no model", "model_penalty")
        other = ("expectile", "beta") if self.base == "td3_bc" else ("alpha",)
        check_unused(self, f"base={self.base} has none", *other)
        if self.regenerate_every % self.updates:
            raise ConfigError(
                f"regenerate_every: expected a multiple of updates = {self.updates}, got {self.regenerate_every}"
            )
        if self.real_rows >= self.batch_size:
            raise ConfigError(f"real_rows: expected less than batch_size = {self.batch_size}, got {self.real_rows}")
        if self.sampling_steps < 2:
            raise ConfigError(f"sampling_steps: expected >= 2, got {self.sampling_steps}")
        Range(0.0, 1.0, above=True, below=True).check("expectile", self.expectile)


class PGD(OfflineAgent):
    """Policy-guided diffusion; see the module's docstring.

    :raises DataError: the data have no episode that a window fits into.
    """

    name = "pgd"
    paper = "Jackson, Matthews, Lu, Ellis, Whiteson, Foerster 2024, arXiv 2404.06356"
    Config = PGDConfig

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "source": "diffused trajectories guided by the policy, mixed with real rows",
            "targets": "those of td3_bc or iql",
            "phases": "those of td3_bc or iql",
        }

    def make_networks(self) -> OfflinePolicy:
        iql = self.config.base == "iql"
        return self.networks(stochastic=iql, critics=2, value=iql)

    def parts(self, policy: OfflinePolicy) -> Parts:
        c = self.config
        names = ("policy", "value", "critic") if c.base == "iql" else ("policy", "critic")
        updaters: dict[str, Updater] = {
            name: self.updater(policy, "actor" if name == "policy" else name) for name in names
        }
        if c.base == "iql":
            iql = IQLConfig(gamma=c.gamma, polyak=c.polyak, expectile=c.expectile, beta=c.beta)
            return IQLCycle(iql, updaters), updaters
        return TD3BCCycle(TD3BCConfig(gamma=c.gamma, polyak=c.polyak, alpha=c.alpha), updaters), updaters

    def build(self) -> Learner:
        c = self.config
        learner = super().build()
        assert isinstance(learner, DatasetLearner)
        if c.rows == "real":
            return learner
        if c.rows in ("guided", "unguided") and self.data is not None:
            self._windows(self.data)
        self.maker = self._make_generator(learner.policy)
        made = _Generating(
            learner.source, learner.policy, learner.cycle, learner.updaters, batch_size=c.batch_size, updates=c.updates,
            seed=self.seed, device=self.device, compile=c.compile, agent=self,
        )  # fmt: skip
        made.state.register("generated", self.maker)
        self.ring = self._empty_ring(learner.policy)
        made.state.register("rows", self.ring)
        if self.data is not None:
            real: dict[ReplayBuffer, int] = {self.source: c.real_rows} if c.real_rows else {}
            made.source = Mixture({self.ring: c.batch_size - c.real_rows} | real)
        return made

    def rows(self, data: Any, policy: OfflinePolicy) -> ReplayBuffer:
        full = super().rows(data, policy)
        held = full.rows()
        return ReplayBuffer.from_arrays({k: held[k] for k in COLUMNS}, self.device)

    def pack(self, ring: ReplayBuffer) -> Any:
        # next to generated rows a batch takes few of these, and the ring of generated ones changes
        return ring if self.config.rows != "real" else super().pack(ring)

    def _empty_ring(self, policy: Any) -> ReplayBuffer:
        """A ring with room for a generated set."""
        size = self.config.trajectories * self.config.generated
        obs, action = (torch.zeros((size, n), device=self.device) for n in (policy.width, policy.n_out))
        zero = torch.zeros(size, device=self.device)
        columns = {"obs": obs, "action": action, "reward": zero, "next_obs": obs, "terminated": zero.bool()}
        return ReplayBuffer.from_arrays(columns, self.device)

    # -- the generator -------------------------------------------------------------------------------------------------

    def _make_generator(self, policy: Any) -> _Generator:
        c, sizes = self.config, (policy.width, policy.n_out)
        if c.rows == "model":
            return _Generator(WorldModel(*sizes), sum(sizes) + 2)
        if c.rows == "transitions":
            channels = 2 * policy.width + policy.n_out + 2
            return _Generator(Denoiser(ResidualMLP(channels, c.denoiser_features)), channels)
        channels = sum(sizes) + 2
        return _Generator(Denoiser(UNet1d(channels, c.denoiser_features, c.denoiser_levels)), channels)

    def _real(self) -> dict[str, Tensor]:
        """Columns that the generator is trained on: as the policy's own rows, in the order of the data."""
        assert self.data is not None
        columns = {k: torch.as_tensor(v, device=self.device) for k, v in self.data.columns().items()}
        own = self.columns(self.data, self.policy)
        return columns | {k: torch.as_tensor(v, device=self.device) for k, v in own.items()}

    def before_learning(self) -> None:
        """Train the generator once, and make the first rows without guidance.

        :raises DataError: the agent was loaded without its data.
        """
        c = self.config
        if self.data is None:
            raise DataError(self.source._told)
        if c.rows == "real" or bool(self.maker.ready):
            return
        rows, generator = self._real(), self.ctx.generator
        print(f"[ccrl] pgd: the generator is trained for {c.denoiser_steps:,} steps", flush=True)
        if c.rows == "model":
            self.maker.model.fit(rows, c.denoiser_steps, generator)
        else:
            draw = self._draw_transitions(rows) if c.rows == "transitions" else self._draw_windows(rows)
            live = self._make_generator(self.policy).to(self.device).model
            live.load_state_dict(self.maker.model.state_dict())
            self.maker.loss.fill_(fit_denoiser(
                live, self.maker.model, draw, c.denoiser_steps, learning_rate=c.denoiser_learning_rate,
                decay=c.denoiser_decay, generator=generator,
            ))  # fmt: skip
        self.maker.ready.fill_(True)
        self.regenerate(guided=False)

    def _windows(self, data: Dataset) -> Windows:
        c = self.config
        starts = select_windows(data.terminated, data.truncated | _ends(data), c.window, c.stride)
        if not len(starts):
            longest = int(np.diff(np.r_[data.starts, len(data)]).max())
            raise DataError(
                f"{data.name}: expected windows of {c.window} rows that no time-out ends, found none in episodes of "
                f"{longest} rows at most; set window to less"
            )
        return Windows(data, c.window, starts, self.device)

    def _draw_windows(self, rows: Mapping[str, Tensor]) -> Any:
        c = self.config
        assert self.data is not None
        windows = self._windows(self.data)
        codec = self.maker.take(Codec.of(rows))
        encoded: Tensor = codec.encode(rows)

        def draw() -> Tensor:
            index = torch.randint(len(windows), (c.denoiser_batch,), generator=self.ctx.generator, device=self.device)
            steps = torch.arange(c.window, device=self.device)
            return encoded[windows.starts[index].unsqueeze(-1) + steps]

        return draw

    def _draw_transitions(self, rows: Mapping[str, Tensor]) -> Any:
        encoded: Tensor = self.maker.take(TransitionCodec.of(rows)).encode(rows)
        size = (32 * self.config.denoiser_batch,)

        def draw() -> Tensor:
            index = torch.randint(len(encoded), size, generator=self.ctx.generator, device=self.device)
            return encoded[index]

        return draw

    def actor(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the policy's actions in [-1, 1]; 1 for a deterministic one."""
        policy = self.policy
        mean = policy.mean(policy.features(obs))
        std = policy.log_std.exp().expand_as(mean) if policy.stochastic else torch.ones_like(mean)
        return mean, std

    @torch.no_grad()
    def generate(self, count: int, guided: bool) -> dict[str, Tensor]:
        """Columns of ``count`` trajectories (or as many transitions as they have)."""
        c, generator = self.config, self.ctx.generator
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        if c.rows == "model":
            real = self.data
            assert real is not None
            start = torch.randint(len(real), (count * c.generated // c.model_length,), **options)
            obs = torch.as_tensor(real.obs, device=self.device)[start]
            actor = self.actor if self.policy.stochastic else partial(_noiseless, self.actor)
            made: dict[str, Tensor] = self.maker.model.rollout(obs, actor, c.model_length, generator, c.model_penalty)
            return made
        kind = TransitionCodec if c.rows == "transitions" else Codec
        codec = self.maker.codec(kind, self.policy.width, self.policy.n_out)
        levels = karras_levels(c.sampling_steps)
        guide = None
        if guided and c.rows == "guided":
            lam = strengths(1.0 if c.strength is None else c.strength, c.sampling_steps, c.bump)
            guide = PolicyGuide(codec, self.actor, lam, c.normalise_guidance, c.denoised_guidance)
        channels = len(codec.mean)
        shape: tuple[int, ...] = (channels,) if c.rows == "transitions" else (c.generated + 1, channels)
        total = count * c.generated if c.rows == "transitions" else count
        chunk, parts = (8192 if c.rows == "transitions" else 256), []
        for done in range(0, total, chunk):
            noise = torch.randn((min(chunk, total - done), *shape), **options)
            x = sample(self.maker.model, levels[0] * noise, levels, churn=Churn(), guide=guide, generator=generator)
            parts.append(codec.decode(x))
        return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}

    def regenerate(self, guided: bool) -> None:
        """Replace the generated rows. :raises FloatingPointError: the sampler gave no finite row."""
        rows = self.generate(self.config.trajectories, guided)
        if not len(rows["reward"]):
            raise FloatingPointError("pgd: expected finite trajectories, got none; lower strength or train longer")
        false = torch.zeros_like(rows["terminated"])
        self.ring.replace(rows | {"truncated": false, "alive": (~rows["terminated"]).float()})


class _Generating(DatasetLearner):
    """A data-set learner whose rows are made anew now and then."""

    def __init__(self, *args: Any, agent: PGD, **options: Any) -> None:
        super().__init__(*args, **options)
        self._agent = agent

    def _iterate(self) -> tuple[dict[str, Any], Stats, dict[str, float]]:
        if self.clock and self.clock % self._agent.config.regenerate_every == 0:
            self._agent.regenerate(guided=True)
        return super()._iterate()


class _Generator(nn.Module):
    """What a checkpoint keeps: the averaged denoiser (or the models), statistics of channels, whether it is trained."""

    statistics: Tensor
    ready: Tensor
    loss: Tensor

    def __init__(self, model: Any, channels: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("statistics", torch.stack([torch.zeros(channels), torch.ones(channels)]))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.register_buffer("loss", torch.zeros(()))

    def take(self, codec: Any) -> Any:
        """Keep a codec's statistics."""
        self.statistics.copy_(torch.stack([codec.mean, codec.std]))
        return codec

    def codec(self, kind: Any, observations: int, actions: int) -> Any:
        """The codec of what is kept."""
        return kind(self.statistics[0], self.statistics[1], observations, actions)


def _ends(data: Any) -> Any:
    """Rows after which the recording of an episode stops without a flag."""
    last = torch.ones(len(data), dtype=torch.bool, device="cpu").numpy()
    last[:-1] = data.episode[1:] != data.episode[:-1]
    return last & ~data.terminated


def _noiseless(actor: Any, obs: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = actor(obs)
    return mean, torch.zeros_like(std)
