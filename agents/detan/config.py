"""Settings of D-eta-N, and the objective that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from agents.on_policy import check_unused
from ccrl.distributional import (
    CVaR,
    Expected,
    Homeostasis,
    MeanCVaR,
    Objective,
    OptimisticTail,
    SoftConstraints,
    TargetReturn,
)
from ccrl.settings import (
    Above,
    Activation,
    Compile,
    Count,
    Finite,
    Natural,
    Nonnegative,
    Positive,
    Settings,
    TimeLimit,
    Unit,
)

__all__ = ["DetaNConfig"]


@dataclass(frozen=True)
class DetaNConfig(Settings):
    """Settings of D-eta-N."""

    search: ClassVar[dict[str, Any]] = {"n_steps": None}  # with one gradient step for all of them
    objective: Literal["expected", "cvar", "mean_cvar", "target", "optimistic", "homeostasis", "soft_constraints"] = (
        "cvar"
    )
    """This is the objective whose utility the network is trained for, and which evaluation reports by default."""
    level: Annotated[float, Above(0, 1)] | None = None
    """The level tau in (0, 1] of cvar and mean_cvar; unset, it is 0.1. With cvar it does not change the training."""
    mean_weight: Unit | None = None
    """The weight in [0, 1] of the mean in mean_cvar; unset, it is 0.5."""
    target: Finite = 0.0
    """The return that target aims at, or the threshold that optimistic counts gains from."""
    deviation: tuple[Finite, ...] = ()
    """Homeostasis begins with these deviations of its variables from their set-points."""
    bounds: tuple[Finite, ...] = ()
    """Returns of soft_constraints should be at least these."""
    trade_off: Positive | None = None
    """Every unit below a bound costs so many units of the first return, which has none then; unset, all have one."""
    stock_low: tuple[Finite, ...] = (-10.0,)
    """Training draws stocks uniformly from here (one number for all coordinates, or one for each)."""
    stock_high: tuple[Finite, ...] = (10.0,)
    """Training draws stocks up to here. The network sees stocks clipped to this range, the utility sees them whole."""
    relabel: Unit = 1.0
    """This share of replayed transitions gets a new stock; the others keep the one they happened with."""
    horizon: Count | None = None
    """The network sees the step divided by this number; unset, by the environment's time limit, or by 1 without one."""
    num_envs: Count = 8
    """The number of parallel environments."""
    n_steps: Count = 1
    """Steps of every environment between two trainings."""
    updates: Count = 1
    """Gradient steps of one training."""
    rounds: Count = 50
    """Trainings per iteration; logs and callbacks come once per iteration."""
    gamma: Annotated[float, Above(0, 1)] = 0.99
    """The discount of the return and of the stock."""
    time_limit: TimeLimit = "bootstrap"
    """At a time limit the target network's law goes on (bootstrap), or the task ends (terminal: biased)."""
    buffer_size: Count = 100_000
    """The ring keeps this many transitions."""
    batch_size: Count = 512
    """Transitions of one gradient step."""
    learning_starts: Natural = 1_000
    """Environment steps before the first gradient step, with uniform actions."""
    learning_rate: Positive = 1e-3
    """Step size of Adam."""
    anneal_lr: bool = True
    """The step size falls linearly to 0 over the training."""
    adam_eps: Positive = 1e-5
    """Adam adds this epsilon to the root of its second moment."""
    max_grad_norm: Positive | None = None
    """Gradients are scaled down to this norm; unset, they are not."""
    target_every: Count = 100
    """The target network is a copy of the network, taken every so many gradient steps."""
    n_quantiles: Count = 32
    """Quantiles, or particles of vectors, per action."""
    kappa: Nonnegative = 0.0
    """The quantile loss is quadratic below this error (Huber); at 0 it is the absolute one. Vectors take 0 only."""
    hidden: tuple[Count, ...] = (128, 128)
    """These are the widths of the hidden layers."""
    activation: Activation = "relu"
    """This function follows every hidden layer."""
    exploration_start: Unit = 1.0
    """The probability of a uniform action starts at this value."""
    exploration_end: Unit = 0.05
    """The probability of a uniform action falls to this value."""
    exploration_fraction: Unit = 0.5
    """The fall takes this share of the training."""
    compile: Compile = "auto"
    """Updates are fused into compiled graphs: always (on), never (off), or from 1,000 gradient steps on where there
    is a C++ compiler (auto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        own = {
            "cvar": ("level",), "mean_cvar": ("level", "mean_weight"), "target": ("target",),
            "optimistic": ("target",), "homeostasis": ("deviation",), "soft_constraints": ("bounds", "trade_off"),
        }.get(self.objective, ())  # fmt: skip
        others = {"level", "mean_weight", "target", "deviation", "bounds", "trade_off"} - set(own)
        check_unused(self, f"the objective {self.objective} has none", *sorted(others))
        objective = self.make_objective()
        objective.check_discount(self.gamma)
        for name in ("stock_low", "stock_high"):
            if len(getattr(self, name)) not in (1, objective.dims or 1):
                wanted = f"1 number or {objective.dims}" if objective.dims > 1 else "1 number"
                raise ValueError(f"{name}: expected {wanted}, got {getattr(self, name)}")
        low, high = self.stock_range()
        if bool((low >= high).any()):
            raise ValueError(f"stock_low: expected less than stock_high, got {self.stock_low} and {self.stock_high}")
        if objective.dims and self.kappa:
            raise ValueError(f"kappa: the energy distance of vectors has none; expected 0, got {self.kappa}")

    def make_objective(self) -> Objective:
        """The objective."""
        level = 0.1 if self.level is None else self.level
        if self.objective == "cvar":
            return CVaR(level)
        if self.objective == "mean_cvar":
            return MeanCVaR(0.5 if self.mean_weight is None else self.mean_weight, level)
        if self.objective == "target":
            return TargetReturn(self.target)
        if self.objective == "optimistic":
            return OptimisticTail(self.target)
        if self.objective == "homeostasis":
            return Homeostasis(self.deviation)
        if self.objective == "soft_constraints":
            return SoftConstraints(self.bounds, self.trade_off)
        return Expected()

    def stock_range(self) -> tuple[Tensor, Tensor]:
        """Ends of the training range, ``[]`` or ``[m]`` float64."""
        shape = (self.make_objective().dims,) if self.make_objective().dims else ()
        ends = (torch.tensor(x, dtype=torch.float64) for x in (self.stock_low, self.stock_high))
        low, high = (x.expand(shape) if shape else x[0] for x in ends)
        return low, high
