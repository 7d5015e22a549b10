"""Gradient estimators: terms of surrogates, prepare stages, scores and the life cycle that calls them."""
