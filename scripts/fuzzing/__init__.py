"""The inputs of ``scripts/fuzz.py``."""
