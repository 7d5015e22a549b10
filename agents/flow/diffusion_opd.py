"""DiffusionOPD - on-policy distillation of diffusion models (Li et al. 2026, arXiv 2605.15055).

One teacher per task (here: per condition); the student generates, and at every state x_j that it visited its transition
is drawn to that of the task's teacher. Both have one covariance, so the KL is closed:

    mu(x; v) = the sampler's mean,   KL_j = ||mu_S - mu_T||^2 / (2 sbar_j^2),   loss = mean over samples sum_j KL_j
    without noise (ode, dpm2):       loss = mean over samples sum_j ||mu_S - mu_T||^2 / 2

No gradient flows through the rollout, and none into a teacher. ``form="policy_gradient"`` is the detour over PPO with
the advantage -KL_j, whose gradient grad KL_j + KL_j grad log pi has the same mean and KL_j^2 / sbar^2 J J' more
variance.

Released code divides by sigma_t^2 in place of sbar^2 for flow_sde and averages over dimensions (``kl_divisor="sigma"``,
``reduce="mean"``). One optimiser step per round, which has samples of every task.

Slots: source = states of the student; target = means of the task's teacher; loss = KL of transitions; no advantage, no
reward. Reads states, with or without noise.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.flow.agent import FlowMethod
from agents.flow.parts import Divisor, FlowRecipe, Needs, mean_distance
from ccrl.data import Data
from ccrl.diffusion.flow import STOCHASTIC
from ccrl.estimators import aggregates, ratios
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig
from ccrl.estimators.terms import LogRatio, Outputs, Term
from ccrl.experiment import checkpoint
from ccrl.settings import ConfigError, Count, Natural
from ccrl.updaters import Stats

__all__ = ["DiffusionOPD", "DiffusionOPDConfig", "DiffusionOPDRecipe"]


@dataclass(frozen=True)
class DiffusionOPDConfig(MethodConfig):
    """The paper's closed form; teachers are made on the spot unless checkpoints are named."""

    unread = ("entropy_coef", "aggregate", "kl_coef")

    group_size: Count = 24
    """A round has this many samples of every condition."""
    teachers: tuple[str, ...] = ()
    """Checkpoints of trained flow policies, the teachers of conditions 0, 1, ... in turn (condition i has number i
    modulo
    their count); none: every condition gets a teacher by teacher_steps."""
    teacher_steps: Natural = 600
    """Without checkpoints a teacher is the first policy after so many supervised steps on its condition's data, drawn
    in
    proportion to their reward, in place of reinforcement on one task."""
    form: Literal["closed", "policy_gradient"] = "closed"
    """The gradient is that of the KL in closed form, or of PPO with its negative as advantage."""
    kl_divisor: Divisor = "sbar"
    """Squared distances of means stand over the variance of the transition (sbar, the paper) or over the sampler's
    noise
    level (sigma, released code)."""
    reduce: Literal["sum", "mean"] = "sum"
    """Squared distances are summed over dimensions (the paper) or averaged (released code)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "policy_gradient" and getattr(self, "sampler", STOCHASTIC[0]) not in STOCHASTIC:
            raise ConfigError("form: expected 'closed' with sampler='ode' or 'dpm2', which have no density, got "
                              "'policy_gradient'")  # fmt: skip
        if self.teachers and self.teacher_steps != DiffusionOPDConfig.teacher_steps:
            raise ConfigError(f"teacher_steps: expected {DiffusionOPDConfig.teacher_steps} with teachers given (it is "
                              f"not read), got {self.teacher_steps}")  # fmt: skip


class DiffusionOPDRecipe(FlowRecipe):
    """Distances of the student's transitions to its teachers'."""

    needs: ClassVar[Needs] = "states"

    @property
    def wants_reference(self) -> bool:
        return False

    def stages(self) -> tuple[Stage, ...]:
        return ()

    def begin(self, agent: Any) -> None:
        """Make the teachers, once: versions ``teacher/0``, ``teacher/1``, ... of the bank."""
        c, bank = self.config, agent.ctx.bank
        for i in range(len(c.teachers) or agent.task.conditions):
            bank.refresh(f"teacher/{i}")
            teacher = bank.policy(f"teacher/{i}")
            if c.teachers:
                state = checkpoint.load(c.teachers[i], map_location=agent.device)["state"]["learner"]["policy"]
                if different := checkpoint.different_shapes(state, teacher.state_dict()):
                    raise ValueError(f"teachers: expected a policy like the student in {c.teachers[i]}, got other "
                                     f"shapes (student, teacher): {different}")  # fmt: skip
                teacher.load_state_dict(state)
            elif c.teacher_steps:
                learner = copy.deepcopy(agent.policy)
                agent.warm_start(c.teacher_steps, learner, torch.tensor([i]), tilt=True, seed=1 + i)
                teacher.load_state_dict(learner.state_dict())

    def start(self, data: Data, ctx: Context) -> Data:
        """With ``teacher_mean`` ``[T, N, D]``, each column's from the teacher of its condition."""
        found = torch.zeros_like(data["action"])
        names = [name for name in ctx.bank.names() if name.startswith("teacher/")]
        owner = data["label"] % len(names)
        for i in range(len(names)):
            (columns,) = torch.nonzero(owner == i, as_tuple=True)
            if len(columns):
                own = data.take(columns)
                # as the student's columns are stored: another shape of a product rounds otherwise, and a student that
                # equals its teacher would move
                time = data["time"][:, :1].expand(-1, len(columns))
                own = Data({**own, "time": time}, sequence=own.sequence)
                mean = self.evaluated(ctx, f"teacher/{i}", own, "mean")
                found.index_copy_(1, columns, mean.to(found.dtype))
        return data.derive(teacher_mean=found)

    def terms(self) -> tuple[Term, ...]:
        c, mean = self.config, frozenset({"mean"})
        distance = mean_distance("teacher_mean", c.kl_divisor, c.reduce)
        closed = Term("distillation_loss", distance, aggregates.sequence_mean, want=mean, advantage=None)
        if c.form == "closed":
            return (closed,)
        clip = self.loss()

        def detour(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
            # of the student as it is now: after a pass the stored one would be another's
            return clip(ratio, -distance(ratio, advantage, outputs, batch).detach(), outputs, batch)

        want = frozenset({"mean", "log_prob"})
        return (closed, Term("policy_gradient_loss", detour, aggregates.sequence_mean, ratios.token, want,
                             advantage=None))  # fmt: skip

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """Log every condition's mean distance of velocities-made means before the update."""
        on = data["on"]
        moved = (on["old_mean"] - on["teacher_mean"]).square().sum(-1).mean(0)
        for label in torch.unique(on["label"]).tolist():
            stats[f"distance_{label}"] = moved[on["label"] == label].mean()


DiffusionOPD = FlowMethod(
    "diffusion_opd",
    "Li et al. 2026, arXiv 2605.15055",
    DiffusionOPDConfig,
    DiffusionOPDRecipe,
    {
        "source": "states of the student",
        "target": "means of the condition's teacher",
        "loss": "KL of transitions, closed",
    },
)
"""On-policy distillation from teachers of single tasks (Li et al. 2026)."""
