"""CDSA: conservative denoising score-based correction of a trained policy (Liu, Yang, Li 2024, arXiv 2406.07541).

The gradient field of the data's density is learnt by denoising score matching and adjusts, at decision time alone, the
actions of a policy that is already trained; a learned inverse dynamics model turns its state part into an action.

    z = (s, a) standardised;    score = grad log p(z blurred with sigma)         sigma^2 score = E[clean | z] - z
    a_0     = clip(pi_0(s));    (ds, da) = std sigma^2 score(s, a_j)             displacement towards the data
    aux     = I(s, nom + k_s ds) - I(s, nom)                                     nom: the displacement that a_j makes
    a_{j+1} = clip(a_j + k_a da + aux)

Abstract and summaries are public, the paper's coefficients and networks are not: the skeleton is theirs, every number
here is a choice of ours (docs/cdsa.md). With k_a = k_s = 0 the base policy acts, bit for bit. Both readings of the
density are there: of the data, or of the base policy's actions at the data's states.

Slots: policy = the base policy, corrected; phases = score, inverse and forward model. The clock counts updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.offline.base import OfflineAgent, OfflineConfig, Parts
from agents.offline.bc import term
from agents.offline.policy import OfflinePolicy, check_acts
from agents.on_policy import check_unused
from ccrl import registry
from ccrl.batched_env import Tree
from ccrl.data import Batching, Data, Field, Unit
from ccrl.diffusion import ScoreMLP, ScoreModel, geometric_levels
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import LogRatio, Loss, Outputs
from ccrl.experiment import checkpoint
from ccrl.learn import Cycle
from ccrl.offline import Dataset
from ccrl.policies import GAUSSIAN
from ccrl.policies.actions import box_bounds
from ccrl.policies.encoders import mlp
from ccrl.replay import ReplayBuffer
from ccrl.settings import Count, Natural, Nonnegative, Positive
from ccrl.updaters import Updater

__all__ = ["CDSA", "CDSAConfig", "CorrectedPolicy", "Displace", "choose_strength"]

Displace = Callable[[Tensor, Tensor], Tensor]
"""``(obs [B, S], action [B, A]) -> next_obs - obs [B, S]``: a simulator in place of the forward model."""


@dataclass(frozen=True)
class CDSAConfig(OfflineConfig):
    """Choices of ours, none of them the paper's."""

    base: str = ""
    """The checkpoint of the trained agent whose actions are corrected; in Python its policy may be given as policy."""
    density_of: Literal["data", "policy"] = "data"
    """The density is that of the data's states and actions (data), or of its states with the base policy's actions."""
    action_strength: Nonnegative = 0.0
    """k_a is the share of the action's displacement towards the data that is added to the action."""
    state_strength: Nonnegative = 0.1
    """k_s is the share of the state's displacement that the inverse model turns into an action."""
    sigma: Positive = 0.5
    """The score is read at this level of noise, in standardised units."""
    iterations: Count = 1
    """The correction is repeated this many times."""
    nominal: Literal["forward", "zero"] = "forward"
    """The displacement without a correction is the forward model's (forward), or none (zero)."""
    aux_form: Literal["difference", "absolute"] = "difference"
    """The auxiliary action is a difference of the inverse model's at two displacements, or that at one (absolute)."""
    score_scale: Literal["tweedie", "raw"] = "tweedie"
    """Displacements are sigma^2 times the score (tweedie); without the square (raw), strengths must absorb it."""
    ignored: tuple[Natural, ...] = ()
    """These coordinates of the observation, unbounded or like a clock, are left out of the density."""
    levels: Count = 10
    """The score is trained at this many levels of noise, with equal ratios."""
    sigma_min: Positive = 0.05
    """This is the lowest level."""
    sigma_max: Positive = 1.0
    """This is the highest level."""
    hidden: tuple[Count, ...] = (256, 256, 256)
    """These are the widths of the hidden layers of the score."""
    model_hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers of the inverse and the forward model."""
    batch_size: Count = 512
    """A gradient step reads this many transitions, drawn with replacement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unused(self, "what the density and the models see is standardised always", "normalise_obs")
        if self.aux_form == "absolute":
            check_unused(self, "aux_form=absolute is a difference from no nominal displacement", "nominal")
        low = self.sigma_max if self.levels == 1 else self.sigma_min
        if self.sigma_min < self.sigma_max and not low <= self.sigma <= self.sigma_max:
            raise ValueError(
                f"sigma: expected a level at which the score is trained, {low:g} to {self.sigma_max:g} (levels, "
                f"sigma_min, sigma_max), got {self.sigma:g}"
            )


class CorrectedPolicy(nn.Module):
    """``base`` with its actions moved towards the data.

    Any policy can be the base: it acts through ``act`` and ``to_env`` and is never trained. A stochastic one is
    corrected at its mode, and its noise is added after that.

    :param base: a policy, or a function from observations to executed actions ``[B, A]``.
    :param displace: an exact simulator in place of the forward model.
    :raises ValueError: observations that are no vector, or actions that are no Box with finite bounds.
    """

    unit: Unit = "transition"
    compiles = True
    heads: tuple[str, ...] = ()
    normalise_obs = False
    distribution = GAUSSIAN
    statistics: Tensor
    low: Tensor
    high: Tensor
    kept: Tensor

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        base: Any,
        config: CDSAConfig,
        displace: Displace | None = None,
    ) -> None:
        super().__init__()
        # checks the spaces
        shape = OfflinePolicy(observation_space, action_space, hidden=(1,))
        self.width, self.n_out, self.config, self.displace = shape.width, shape.n_out, config, displace
        self.action_shape = shape.action_shape
        self.keys = shape.keys
        if bad := [i for i in config.ignored if i >= self.width]:
            raise ValueError(f"ignored: expected numbers below {self.width}, the observation's size, got {bad}")
        for name, bound in zip(("low", "high"), box_bounds(action_space)):
            self.register_buffer(name, bound, persistent=False)
        self.base = base
        if isinstance(base, nn.Module):
            for p in base.parameters():
                p.requires_grad_(False)
        size = self.width + self.n_out
        self.register_buffer("kept", torch.tensor([float(i not in config.ignored) for i in range(size)]))
        # mean and standard deviation of observation, action (as data), displacement, action of the density
        self.register_buffer("statistics", torch.stack([torch.zeros(2 * size), torch.ones(2 * size)]))
        self.score = ScoreModel(ScoreMLP(size, config.hidden))
        self.inverse = mlp([2 * self.width, *config.model_hidden, self.n_out], "silu")
        self.forward_model = mlp([size, *config.model_hidden, self.width], "silu")

    # -- units ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def standardise(self, obs: Tensor, action: Tensor, displacement: Tensor, density_action: Tensor) -> None:
        """Take the statistics of the data, ``[M, ...]`` each; a constant column keeps the deviation 1."""
        rows = torch.cat([obs, action, displacement, density_action], -1).double()
        std = rows.std(0, correction=0)
        self.statistics.copy_(torch.stack([rows.mean(0), torch.where(std > 0, std, 1.0)]))

    def _split(self) -> tuple[Tensor, ...]:
        """``[2, ...]`` each: of observation, action, displacement, action of the density."""
        return torch.split(self.statistics, [self.width, self.n_out, self.width, self.n_out], -1)

    def displacement(self, obs: Tensor, action: Tensor) -> Tensor:
        """``next_obs - obs`` that the forward model (or the simulator) foresees, ``[B, S]``."""
        if self.displace is not None:
            return self.displace(obs, action)
        of_obs, of_action, of_step, _ = self._split()
        inputs = torch.cat([(obs - of_obs[0]) / of_obs[1], (action - of_action[0]) / of_action[1]], -1)
        found: Tensor = of_step[0] + of_step[1] * self.forward_model(inputs)
        return found

    def invert(self, obs: Tensor, displacement: Tensor) -> Tensor:
        """The action that makes this displacement, ``[B, A]``."""
        of_obs, of_action, of_step, _ = self._split()
        inputs = torch.cat([(obs - of_obs[0]) / of_obs[1], (displacement - of_step[0]) / of_step[1]], -1)
        found: Tensor = of_action[0] + of_action[1] * self.inverse(inputs)
        return found

    def towards_data(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Displacements ``[B, S]`` and ``[B, A]`` in raw units, and the whole one ``[B, S + A]`` in standardised ones.
        A score that is not finite is 0."""
        c = self.config
        of_obs, _, _, of_action = self._split()
        scales = torch.cat([of_obs, of_action], -1)
        z = (torch.cat([obs, action], -1) - scales[0]) / scales[1] * self.kept
        step = self.score(z, z.new_tensor(c.sigma)) * self.kept
        step = torch.where(step.isfinite().all(-1, keepdim=True), step, 0.0)
        step = step * c.sigma**2 if c.score_scale == "tweedie" else step
        state, moved = (scales[1] * step).split([self.width, self.n_out], -1)
        return state, moved, step

    # -- acting --------------------------------------------------------------------------------------------------------

    def base_action(self, obs: Tree, noise: Tensor | None = None) -> Tensor:
        """What the base policy would do, inside the Box, ``[B, A]``."""
        base = self.base
        action: Tensor = base.to_env(base.act(obs, noise)["action"]) if hasattr(base, "act") else base(obs)
        return action.to(self.low.dtype).clamp(self.low, self.high)

    def correct(self, obs: Tensor, action: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The corrected action ``[B, A]`` of ``action``, and per row ``[B]``: ``moved`` (its distance), ``away`` (the
        size of the displacement towards the data, standardised) and ``clipped`` (the share of its entries)."""
        c, start = self.config, action
        away = clipped = torch.zeros(len(action), device=action.device)
        # with both strengths 0 the base policy acts, to the last bit
        if c.action_strength or c.state_strength:
            for _ in range(c.iterations):
                state, moved, step = self.towards_data(obs, action)
                away = step.norm(dim=-1)
                wished = action + c.action_strength * moved
                if c.state_strength:
                    wished = wished + self._auxiliary(obs, action, c.state_strength * state)
                action = wished.clamp(self.low.to(wished), self.high.to(wished))
                clipped = (action != wished).float().mean(-1)
        return action, {"moved": (action - start).norm(dim=-1), "away": away, "clipped": clipped}

    def _auxiliary(self, obs: Tensor, action: Tensor, wished: Tensor) -> Tensor:
        if self.config.aux_form == "absolute":
            return self.invert(obs, wished)
        nominal = self.displacement(obs, action) if self.config.nominal == "forward" else torch.zeros_like(obs)
        return self.invert(obs, nominal + wished) - self.invert(obs, nominal)

    def draw_noise(self, n: int, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
        if not hasattr(self.base, "draw_noise"):
            return None
        noise: Tensor = self.base.draw_noise(n, generator, device)
        return noise

    def initial_state(self, n: int) -> None:
        return None

    def act(
        self, obs: Tree, noise: Tensor | None, state: Tensor | None = None, first: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Executed actions."""
        flat = torch.cat([obs[k].flatten(1) for k in self.keys], -1) if isinstance(obs, dict) else obs
        mode = self.base_action(obs)
        action, _ = self.correct(flat.float(), mode.float())
        if noise is not None:
            noisy, corrected = self.base_action(obs, noise), self.config.action_strength or self.config.state_strength
            action = action + (noisy - mode) if corrected else noisy  # without a correction to the last bit
        return {"action": action}

    def to_env(self, action: Tensor) -> Tensor:
        return action.to(self.low.dtype).clamp(self.low, self.high)

    def behaviour_fields(self) -> tuple[Field, ...]:
        return ()

    def behaviour(self, columns: Mapping[str, Tensor], action: Tensor) -> dict[str, Tensor]:
        return {}

    # -- training ------------------------------------------------------------------------------------------------------

    def evaluate(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        """Squared errors ``[1, B]``: ``score_error`` (denoising, weighted by sigma^2), ``inverse_error`` and
        ``forward_error`` (standardised)."""
        obs = batch["obs"][0]
        out: dict[str, Tensor] = {}  # Dynamo does not trace a call of dict[str, Tensor]
        of_obs, of_action, of_step, density = self._split()
        if "score_error" in want:
            scales = torch.cat([of_obs, density], -1)
            z = (torch.cat([obs, batch["density_action"][0]], -1) - scales[0]) / scales[1] * self.kept
            noise, level = batch["noise"][0], batch["level"][0]
            found = self.score((z + level.unsqueeze(-1) * noise) * self.kept, level)
            out["score_error"] = ((level.unsqueeze(-1) * found + noise) * self.kept).square().sum(-1)
        step, action = batch["next_obs"][0] - obs, batch["action"][0]
        if "inverse_error" in want:
            out["inverse_error"] = ((self.invert(obs, step) - action) / of_action[1]).square().mean(-1)
        if "forward_error" in want:
            inputs = torch.cat([(obs - of_obs[0]) / of_obs[1], (action - of_action[0]) / of_action[1]], -1)
            out["forward_error"] = (self.forward_model(inputs) - (step - of_step[0]) / of_step[1]).square().mean(-1)
        return {k: v.unsqueeze(0) for k, v in out.items()}

    def outputs(self) -> frozenset[str]:
        return frozenset({"score_error", "inverse_error", "forward_error"})

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return self.evaluate(batch, want)


class CDSA(OfflineAgent):
    """CDSA; see the module's docstring.

    ``policy`` is the base policy (``CDSA(env, policy=agent.policy, ...)``), or ``base`` a checkpoint of any agent.
    """

    name = "cdsa"
    paper = "Liu, Yang, Li 2024, arXiv 2406.07541"
    Config = CDSAConfig
    reads = ("obs", "action", "next_obs", "density_action")

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {
            "source": "data set",
            "policy": "any trained policy, its actions corrected towards the data",
            "phases": "score (denoising); inverse dynamics; forward dynamics",
        }

    def make_networks(self) -> Any:
        spaces = self.env.single_observation_space, self.env.single_action_space
        if not hasattr(self, "_base"):
            self._base = self._find_base()
            check_acts(self._base, *spaces)
        return CorrectedPolicy(*spaces, self._base, self.config)

    def _find_base(self) -> Any:
        path = self.config.base
        if self.own_policy is not None:
            if path:
                raise ValueError(f"base: expected no checkpoint next to policy=, got {path!r}; leave one of them out")
            return self.own_policy
        if not path:
            raise ValueError("cdsa: expected a trained policy, got none; set base to a checkpoint, or pass policy=")
        name = checkpoint.load(path)["agent"]
        with registry.stored(path, []):
            cls = registry.agents.get(name)
        return cls.load(path, env=self.env if self.env_id is None else self.env_id, device=self.device).policy

    def rows(self, data: Dataset, policy: Any) -> ReplayBuffer:
        obs, action, following = (
            torch.as_tensor(x, device=self.device) for x in (data.obs, data.action, data.next_obs)
        )  # fmt: skip
        density = action
        if self.config.density_of == "policy":
            with torch.no_grad():
                density = torch.cat([policy.base_action(rows) for rows in obs.split(4096)]).float()
        policy.standardise(obs, action, following - obs, density)
        # a file without successors of terminals repeats their own observation: that is no displacement
        chosen = ~(data.terminated & (data.obs == data.next_obs).all(-1))
        return data.select(chosen).ring(self.device, density_action=density.cpu().numpy()[chosen])

    def parts(self, policy: Any) -> Parts:
        updaters: dict[str, Updater] = {
            name: self.updater(policy, prefix)
            for name, prefix in (("score", "score"), ("inverse", "inverse"), ("forward", "forward_model"))
        }
        return CDSACycle(self.config, updaters), updaters


class CDSACycle(Cycle):
    """Three regressions that share a draw."""

    one_graph = True

    def __init__(self, config: CDSAConfig, updaters: dict[str, Updater]) -> None:
        super().__init__()
        levels = [config.sigma_max]
        if config.levels > 1:
            levels = geometric_levels(config.levels, config.sigma_min, config.sigma_max)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self._phases = tuple(
            Phase(name, (term(f"{name}_loss", _output(f"{name}_error"), f"{name}_error"),), Batching(), updater)
            for name, updater in updaters.items()
        )

    def noise(self, draw: Data, ctx: Context) -> Data:
        levels = cast(Tensor, self.levels)
        policy, count = cast(CorrectedPolicy, ctx.policy), draw.shape[1]
        options: dict[str, Any] = {"generator": ctx.generator, "device": levels.device}
        noise = torch.randn((1, count, policy.width + policy.n_out), **options)
        return draw.derive(noise=noise, level=levels[torch.randint(len(levels), (1, count), **options)])

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def _output(name: str) -> Loss:
    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        return outputs[name]

    return loss


@torch.no_grad()
def choose_strength(
    make: Callable[[float, float], CorrectedPolicy], obs: Tensor, grid: list[tuple[float, float]], budget: float
) -> tuple[float, float]:
    """The strengths ``(k_a, k_s)`` of ``grid`` that bring the base policy's actions nearest to the data (least mean
    squared displacement afterwards) while they move by ``budget`` on average at most: a choice without returns.

    :param make: the corrected policy of two strengths. :raises ValueError: none stays within the budget.
    """
    scores: dict[tuple[float, float], float] = {}
    for strengths in grid:
        policy = make(*strengths)
        action, report = policy.correct(obs, policy.base_action(obs).float())
        if float(report["moved"].mean()) <= budget:
            scores[strengths] = float(policy.towards_data(obs, action)[2].square().sum(-1).mean())
    if not scores:
        raise ValueError(f"choose_strength: expected a budget that some strengths keep, got {budget}")
    return min(scores, key=scores.__getitem__)
