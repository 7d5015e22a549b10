"""Inventory networks as differentiable simulators: environments of pure functions, order policies, pathwise losses."""
