"""Methods for language models from one warm start, at equal rollouts."""
