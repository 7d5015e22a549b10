"""Gaussian processes for policy gradients: Bayesian quadrature, GPTD, sparsification, deep kernels.

Modules with kernels (``kernels``, ``deep_kernel``) are GPyTorch's and need the extra ``gp``; the algebra around them is
plain torch. All of it works in float64: kernels of scores are ill-conditioned.
"""
