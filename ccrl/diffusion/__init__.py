"""Diffusion: noise levels, denoisers and score models with their losses, samplers with guidance, closed forms."""

from ccrl.diffusion.closed_form import dsm_optimum, gaussian_denoiser, gaussian_score, mixture_score
from ccrl.diffusion.denoisers import Denoiser, ScoreModel, denoising_loss, score_matching_loss
from ccrl.diffusion.levels import Churn, geometric_levels, karras_levels, lognormal_levels
from ccrl.diffusion.networks import FourierFeatures, ResidualMLP, ScoreMLP, Sinusoid, UNet1d
from ccrl.diffusion.samplers import Denoise, Guide, Solver, sample

__all__ = [
    "Churn",
    "Denoise",
    "Denoiser",
    "FourierFeatures",
    "Guide",
    "ResidualMLP",
    "ScoreMLP",
    "ScoreModel",
    "Sinusoid",
    "Solver",
    "UNet1d",
    "denoising_loss",
    "dsm_optimum",
    "gaussian_denoiser",
    "gaussian_score",
    "geometric_levels",
    "karras_levels",
    "lognormal_levels",
    "mixture_score",
    "sample",
    "score_matching_loss",
]
