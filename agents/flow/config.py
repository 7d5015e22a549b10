"""What a flow agent has beside its method: the network, the sampler; the optimiser is that of ``agents.llm.config``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ccrl.diffusion.flow import STOCHASTIC, FlowSolver
from ccrl.settings import Compile, ConfigError, Count, Natural, Positive, Range, Settings

__all__ = ["FlowModelConfig", "FlowRolloutConfig"]


@dataclass(frozen=True)
class FlowModelConfig(Settings):
    """The velocity network."""

    hidden: tuple[Count, ...] = (96, 96, 96)
    """These are the widths of the network's hidden layers."""
    base: Literal["none", "exact"] = "none"
    """The network is the velocity (none), or is added to the exact velocity of the task's data and starts at 0 (exact),
    which needs no supervised steps."""
    guidance: Annotated[float, Range(0.0)] = 1.0
    """Velocities are extrapolated from those without a condition by this factor, in sampling and in losses; 1 does not
    extrapolate and evaluates the network once."""
    drop_condition: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """In supervised steps a sample's condition is left out with this probability, as guidance needs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden:
            raise ConfigError("hidden: expected at least one layer, got ()")
        if self.guidance != 1.0 and self.drop_condition == 0.0:
            raise ConfigError(f"guidance: expected 1 with drop_condition=0 (the network never learns a velocity "
                              f"without a condition), got {self.guidance}")  # fmt: skip


@dataclass(frozen=True)
class FlowRolloutConfig(Settings):
    """What is sampled in an iteration, and how."""

    n_prompts: Count = 8
    """Conditions per iteration, each with a group of samples."""
    sampler: FlowSolver = "flow_sde"
    """Transitions of Flow-GRPO's SDE (flow_sde), of DanceGRPO's (dance_sde), coefficient-preserving (cps), stochastic
    DDIM (ddim), or without noise Euler (ode) or a second-order solver (dpm2), which have no density: methods that need
    log-probabilities refuse them."""
    noise_level: Annotated[float, Range(0.0)] = 0.7
    """The amount of noise in a transition: a of flow_sde, the standard deviation per square root of time of dance_sde,
    a share of at most 1 for cps and ddim; ode and dpm2 need 0."""
    steps: Count = 14
    """A sample in training takes this many denoising steps."""
    time_shift: Positive = 1.0
    """Times are shifted toward the noise by this factor; 1 leaves them equally far apart."""
    first_step: Natural = 0
    """The first denoising step that methods on transitions train."""
    trained_steps: Natural = 0
    """So many denoising steps are trained by methods on transitions; 0: all from the first one but the last, which has
    little noise left."""
    eval_steps: Count = 40
    """A sample in evaluation takes this many Euler steps."""
    eval_ema: Annotated[float, Range(0.0, 1.0, below=True)] = 0.0
    """Evaluation uses an exponential moving average of the parameters with this decay per iteration; 0: the parameters
    themselves."""
    compile: Compile = "auto"
    """The loss is a compiled graph: always (on), never (off), or from 1,000 gradient steps on where there is a C++
    compiler (auto)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.noise_level > 0.0) != (self.sampler in STOCHASTIC):
            raise ConfigError(f"noise_level: expected 0 with sampler='ode' and 'dpm2' and > 0 with the others, got "
                              f"{self.noise_level} with {self.sampler!r}")  # fmt: skip
        if self.sampler in ("cps", "ddim") and self.noise_level > 1.0:
            raise ConfigError(f"noise_level: expected at most 1 with {self.sampler!r}, got {self.noise_level}")
        if self.last_step > self.steps or self.last_step <= self.first_step:
            raise ConfigError(f"trained_steps: expected first_step + trained_steps to be at most steps = {self.steps} "
                              f"and at least one step, got {self.first_step} and {self.trained_steps}")  # fmt: skip

    @property
    def last_step(self) -> int:
        """The step behind the last one that is trained."""
        return self.first_step + self.trained_steps if self.trained_steps else max(self.steps - 1, 1)
