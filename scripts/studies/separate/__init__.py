"""Settings in which methods for language models can differ: see ``study.py``."""
