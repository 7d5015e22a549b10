"""Environments of heavy simulators, each in a folder of its own: one script per simulator, and a check."""
