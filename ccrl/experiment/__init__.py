"""What surrounds an agent: configuration, run folder, checkpoints, logging, evaluation, statistics and plots."""
