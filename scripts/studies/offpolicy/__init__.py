"""Learning curves of the off-policy agents."""
