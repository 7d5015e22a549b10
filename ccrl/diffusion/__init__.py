"""Diffusion: noise levels, denoisers and score models with their losses, samplers with guidance, flow matching, closed
forms."""

from ccrl.diffusion.closed_form import (
    dsm_optimum,
    gaussian_denoiser,
    gaussian_score,
    mixture_log_density,
    mixture_score,
    mixture_velocity,
)
from ccrl.diffusion.denoisers import Denoiser, ScoreModel, denoising_loss, score_matching_loss
from ccrl.diffusion.flow import (
    STOCHASTIC,
    FlowSolver,
    Schedule,
    flow_grid,
    flow_point,
    gaussian_log_prob,
    make_schedule,
    matching_error,
    mean_step,
    shift_time,
)
from ccrl.diffusion.levels import Churn, geometric_levels, karras_levels, lognormal_levels
from ccrl.diffusion.networks import FourierFeatures, ResidualMLP, ScoreMLP, Sinusoid, UNet1d, VelocityMLP
from ccrl.diffusion.samplers import Denoise, Guide, Solver, sample

__all__ = [
    "STOCHASTIC",
    "Churn",
    "Denoise",
    "Denoiser",
    "FlowSolver",
    "FourierFeatures",
    "Guide",
    "ResidualMLP",
    "Schedule",
    "ScoreMLP",
    "ScoreModel",
    "Sinusoid",
    "Solver",
    "UNet1d",
    "VelocityMLP",
    "denoising_loss",
    "dsm_optimum",
    "flow_grid",
    "flow_point",
    "gaussian_denoiser",
    "gaussian_log_prob",
    "gaussian_score",
    "geometric_levels",
    "karras_levels",
    "lognormal_levels",
    "make_schedule",
    "matching_error",
    "mean_step",
    "mixture_log_density",
    "mixture_score",
    "mixture_velocity",
    "sample",
    "score_matching_loss",
    "shift_time",
]
