"""Flow policies: see ``study.py``."""
