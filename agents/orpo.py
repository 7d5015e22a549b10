"""Occupancy-regularised policy optimisation, arXiv 2403.03185; not odds-ratio preference optimisation.

Laidlaw, Singhal, Dragan, ICLR 2025: a proxy reward that correlates with the true one under a reference policy may be
optimised as long as the occupancy measure stays near the reference's,

    max_pi J(pi, proxy) - lambda sqrt(chi^2(mu_pi || mu_ref)),    lambda = sigma_proxy sqrt(1 - r^2).

A discriminator ``d`` between samples of the two policies (optimum ``log mu_pi / mu_ref``) turns this into a reward,
before advantages are estimated:

    R' = R + clip(-lambda (e^d - 1) / sqrt(chi2_hat), -C, C),   chi2_hat: trimmed mean of e^d - 1 over the batch

Rivals: chi^2 and KL of the same discriminator, KL and chi^2 of the action distributions alone (a term of the loss), and
stopping early. ``coef`` is c of ``lambda = c sigma_proxy``. The discriminator and the penalty are stages for any recipe
(``ccrl.occupancy.OccupancyRatio``, ``divergences.OccupancyPenalty``); sequences (language models) need no
discriminator: ``divergences.ChiSquarePenalty`` and ``sequence_chi_square`` are their stage and their term.

Slots: fit = discriminator; prepare = penalty, values, GAE; ratio = token; loss = PPO's (+ action divergence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.on_policy import Updaters, check_unused
from agents.ppo import PPO, PPOConfig, PPOEstimator
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context
from ccrl.estimators.divergences import Kind, OccupancyPenalty, action_divergence, chi_square
from ccrl.estimators.stages import Gae
from ccrl.estimators.terms import Term
from ccrl.experiment import checkpoint
from ccrl.learn import Learner
from ccrl.occupancy import OccupancyRatio
from ccrl.seeding import stream_seed
from ccrl.settings import Count, Natural, Nonnegative, Positive, Unit
from ccrl.updaters import FlatUpdater, Stats

__all__ = ["ORPO", "ORPOConfig"]

FUNCTION = ("activation", "squash", "std_parameter")
"""What a policy's parameters mean, and their shapes do not tell."""
KINDS: dict[str, Kind] = {"sqrt_chi2": "sqrt_chi2", "chi2": "chi2", "kl": "kl"}
ACTION_KINDS: dict[str, Kind] = {"action_kl": "kl", "action_chi2": "chi2", "action_sqrt_chi2": "sqrt_chi2"}


@dataclass(frozen=True)
class ORPOConfig(PPOConfig):
    """Occupancy-regularised policy optimisation, arXiv 2403.03185; not odds-ratio preference optimisation."""

    regulariser: Literal["sqrt_chi2", "chi2", "kl", "action_kl", "action_chi2", "action_sqrt_chi2"] = "sqrt_chi2"
    """The policy is kept near the reference in this divergence: of occupancy measures by a discriminator (sqrt_chi2 is
    the paper's, chi2, kl), or of the action distributions alone (action_kl, action_chi2, action_sqrt_chi2)."""
    coef: Nonnegative = 0.5
    """The divergence is weighted by this number: of occupancy measures times the deviation of the reward under the
    reference, of actions over 1 - gamma; 0 is PPO on the proxy, bit for bit."""
    correlation: Unit | None = None
    """The correlation r of proxy and true reward under the reference, where it is known: coef is then sqrt(1 - r^2),
    the weight for which the paper's bound holds."""
    reference: str = ""
    """The reference policy is the one in this checkpoint, of an agent with the same networks; without one it is the
    policy at the start."""
    start_at_reference: bool = True
    """The policy starts as the reference; otherwise as any new one."""
    reference_steps: Count = 500
    """The reference takes this many steps in each environment, once, before training; they are not on the clock."""
    max_penalty: Positive = 1e3
    """The change of a reward is clipped to plus or minus this number."""
    discriminator_hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the discriminator's hidden layers."""
    discriminator_lr: Positive = 1e-3
    """This is Adam's step size for the discriminator."""
    discriminator_epochs: Count = 4
    """The discriminator passes this many times over both samples in every iteration, before it is used."""
    discriminator_batch: Count = 256
    """A minibatch of the discriminator has this many steps."""
    discriminator_action: bool = True
    """The discriminator sees the action; otherwise it compares occupancy measures of states."""
    warm_up: Natural = 0
    """For this many iterations the discriminator is trained, and nothing is penalised or stopped by it."""
    stop_at: Positive | None = None
    """Training ends once the estimated chi^2 of the occupancy measures exceeds this number, the baseline of stopping
    early; None never ends it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normalise_reward:
            raise ValueError("normalise_reward: expected False, got True; the weight is in units of the raw reward")
        if self.recurrent != "none":
            raise ValueError(f"recurrent: expected 'none', got {self.recurrent!r}; the discriminator sees single steps")
        if self.correlation is not None and self.coef != type(self).__dataclass_fields__["coef"].default:
            raise ValueError(f"coef: correlation={self.correlation} decides it; leave one of the two, got {self.coef}")
        if self.regulariser in ACTION_KINDS:
            check_unused(self, f"regulariser={self.regulariser} is a term of the loss", "warm_up", "max_penalty")
            if self.stop_at is None:
                own = [f.name for f in fields(self) if f.name.startswith("discriminator_")]
                check_unused(self, f"regulariser={self.regulariser} has no discriminator", *own)

    @property
    def weight(self) -> float:
        """c."""
        return self.coef if self.correlation is None else math.sqrt(1.0 - self.correlation**2)

    @property
    def discriminates(self) -> bool:
        """Whether there is a discriminator."""
        return self.stop_at is not None or (self.weight > 0.0 and self.regulariser in KINDS)


class ORPOEstimator(PPOEstimator):
    """PPO with a penalised reward or a divergence among its terms."""

    sigma: Tensor
    lam: Tensor
    stopped: Tensor

    def __init__(self, config: ORPOConfig, policy: Any, updaters: Updaters, spaces: tuple[Any, Any], ref: Data) -> None:
        super().__init__(config, policy, updaters)
        c = config
        rewards = ref["reward"][ref["valid"] > 0].double()
        sigma = rewards.std(correction=0)
        self.register_buffer("sigma", sigma)
        self.register_buffer("lam", (c.weight * sigma).float())
        self.register_buffer("stopped", torch.zeros((), dtype=torch.bool, device=sigma.device))
        self._updaters = updaters
        if c.discriminates:
            self._ratio = OccupancyRatio(
                spaces, ref, hidden=c.discriminator_hidden, lr=c.discriminator_lr, eps=c.adam_eps,
                epochs=c.discriminator_epochs, batch_size=c.discriminator_batch, action=c.discriminator_action,
            )  # fmt: skip
            updaters["discriminator"] = self._ratio.updater
        self.penalised = c.weight > 0.0 and c.regulariser in KINDS
        if self.penalised:
            self._gae = Gae(c.gamma, c.gae_lambda, c.time_limit, reward="shaped_reward")
        self.action_kind = ACTION_KINDS.get(c.regulariser) if c.weight > 0.0 else None
        self._names: tuple[str, ...] = policy.distribution.names
        if self.action_kind is not None:
            (phase,) = self._phases
            # gamma 1 has no normalised occupancy measure: there the weight is per step
            scale = 1.0 / (1.0 - c.gamma) if c.gamma < 1.0 else 1.0
            term = Term(
                "action_divergence", action_divergence(policy.distribution, self.action_kind), aggregates.mean,
                want=frozenset({"dist"}), advantage=None, coef=scale * c.weight,
            )  # fmt: skip
            self._phases = (replace(phase, terms=(*phase.terms, term)),)

    def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
        return self._ratio.fit(have["on"], ctx.generator) if self.config.discriminates else {}

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        c, data = self.config, have["on"]
        if c.discriminates:
            data = self._ratio(data)
            if c.stop_at is not None:
                self.stopped.logical_or_(
                    (chi_square(data["log_occupancy_ratio"], data["valid"]) > c.stop_at) & (ctx.k >= c.warm_up)
                )
            if self.penalised:
                now = self.lam * (ctx.k >= c.warm_up)
                data = OccupancyPenalty(now, KINDS[c.regulariser], c.max_penalty)(data)
        if self.action_kind is not None:
            ref = ctx.bank.policy("ref")
            params = ref.evaluate(data, frozenset({"dist"}))  # type: ignore[operator]
            data = data.derive(**{f"ref_{name}": params[name] for name in self._names})
        return super().prepare(have | {"on": data}, ctx)

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        super().after_update(data, stats, ctx)
        on = data["on"]
        if self.config.discriminates:
            d, valid = on["log_occupancy_ratio"], on["valid"]
            stats |= {"occupancy_chi2": chi_square(d, valid), "occupancy_kl": d[valid > 0].mean()}
        if self.penalised:
            stats["penalty"] = (on["reward"] - on["shaped_reward"])[on["valid"] > 0].mean()


class ORPO(PPO):
    """Occupancy-regularised policy optimisation, arXiv 2403.03185; not odds-ratio preference optimisation.

    :param reference: the reference's policy, a module with the networks of the agent's; None: what ``config.reference``
        says. It is part of the agent's checkpoints.
    :param restored: of ``load``: the state of the checkpoint, where the reference is; the file that it once came from
        may be gone.
    :raises ValueError: a reference with other parameters.
    """

    name = "orpo"
    paper = "Laidlaw, Singhal, Dragan 2025, arXiv 2403.03185"
    Config = ORPOConfig
    example_env = "ccrl/Tomato-v0"

    def __init__(
        self,
        env: Any,
        config: Any = None,
        *,
        reference: nn.Module | None = None,
        restored: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._reference = None if reference is None else reference.state_dict()
        self._restored = restored
        super().__init__(env, config, **options)
        self._restored = None  # a whole state is not kept for its reference

    @classmethod
    def restored_with(cls, state: dict[str, Any]) -> dict[str, Any]:
        return {"restored": state}

    def build(self) -> Learner:
        c: ORPOConfig = self.config
        policy = self.make_policy({"value": ()})
        updaters: Updaters = {
            "policy": FlatUpdater(policy, lr=c.learning_rate, max_grad_norm=c.max_grad_norm, eps=c.adam_eps)
        }
        start = {name: x.clone() for name, x in policy.state_dict().items()}
        self._load_reference(policy)
        spaces = self.env.single_observation_space, self.env.single_action_space
        # a collector of its own: these steps are a data set, and training begins with fresh episodes of its own seed
        source = Collector(self.env, seed=stream_seed(self.seed, "reference data"))
        rows = source.collect(Request(steps=c.reference_steps), policy)
        estimator = ORPOEstimator(c, policy, updaters, spaces, rows)
        learner = self.rollouts(policy, estimator, updaters)
        learner.ctx.bank.refresh("ref")
        if not c.start_at_reference:
            policy.load_state_dict(start)
        return learner

    def _load_reference(self, policy: nn.Module) -> None:
        found, path = self._reference, self.config.reference
        if self._restored is not None:
            found = _saved_reference(self._restored)
            if found is None or checkpoint.different_shapes(found, policy.state_dict()):
                return  # load() says what is wrong
        elif found is None and path:
            saved = checkpoint.load(path, map_location=self.device)
            found = saved["state"]["learner"]["policy"]
            for name in FUNCTION:
                own = getattr(self.config, name)
                if saved["config"].get(name, own) != own:
                    raise ValueError(
                        f"reference: expected {name}={own!r} as here, got {saved['config'][name]!r} in {path}: the "
                        "parameters would be another policy's"
                    )
        if found is None:
            return
        if different := checkpoint.different_shapes(found, policy.state_dict()):
            raise ValueError(
                f"reference: expected a policy with this agent's networks, got other shapes (here, there): "
                f"{different}; give both the same hidden layers"
            )
        policy.load_state_dict(found)

    def before_learning(self) -> None:
        """:raises ValueError: a reward that does not vary under the reference: no weight can be in its units."""
        c: ORPOConfig = self.config
        if self.estimator.penalised and not float(self.estimator.sigma) > 0.0:
            raise ValueError(
                f"coef: expected a reward that varies under the reference, got the same at each of its "
                f"{c.reference_steps * c.num_envs} steps; take more reference_steps, or coef=0"
            )

    @property
    def finished(self) -> bool:
        """Whether the estimated divergence has passed ``stop_at``."""
        return bool(self.estimator.stopped)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return super().slots() | {
            "fit": "discriminator of policy and reference",
            "prepare": "reward - lambda (w - 1) / sqrt(chi^2), values, GAE",
        }


def _saved_reference(state: dict[str, Any]) -> dict[str, Tensor] | None:
    """The reference's parameters in an agent's state; None: they are missing."""
    try:
        found: dict[str, Tensor] = state["learner"]["bank"]["ref"]
    except (KeyError, TypeError):
        return None
    return found
