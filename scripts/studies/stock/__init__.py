"""Objectives of return distributions: pictures of exact optima, D-eta-N on the chain, CVaR through policy gradients."""
