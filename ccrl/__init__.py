"""ccrl: what every agent of the suite shares. Imports neither ``agents`` nor ``envs``."""

from __future__ import annotations

__version__: str


def __getattr__(name: str) -> str:
    if name == "__version__":  # only when somebody asks: in a clone it is git that knows
        from ccrl.version import version

        return version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
