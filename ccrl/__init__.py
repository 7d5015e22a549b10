"""ccrl: what every agent of the suite shares. Imports neither ``agents`` nor ``envs``."""

__version__ = "0.2.0"
