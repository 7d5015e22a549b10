"""Gaussian processes on scores, shared by BPG, BAC and DBQPG: kernels, Fisher matrices, GPTD, sparsification, solvers.

The kernels (``kernels``) are GPyTorch's and need the extra ``gp``; the algebra around them is plain torch. All of it
works in float64: kernels of scores are ill-conditioned.
"""
