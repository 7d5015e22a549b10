"""Isaac Lab's own test of wrappers, which its wheel brings, with rows for ours beside rsl_rl's, on the CPU. In the
environment of that simulator (docs/robots.md):

FOLDER/venv/bin/python -m pytest tests/envs/test_isaac_wrappers.py
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ccrl.adapters.lab import LabEnv

if importlib.util.find_spec("isaaclab") is None:
    pytest.skip("needs Isaac Lab", allow_module_level=True)

ROWS = [
    # library, finite horizon, task, device of the wrapper, whether final observations are asked for
    ("ccrl", False, "Isaac-Cartpole", None, True),
    ("ccrl", True, "Isaac-Cartpole-Direct", None, True),
    ("ccrl", False, "Isaac-Cartpole-Direct", None, False),
]


class AsTheTestCalls:
    """``step`` gives observations, rewards, one flag and the rest, as the test reads them."""

    def __init__(self, env: LabEnv) -> None:
        self.env = env
        self.reset = env.reset

    def step(self, action: Any) -> tuple[Any, ...]:
        result = self.env.step(action)
        done = result.terminated | result.truncated
        # with a finite horizon a time limit ends the task
        assert not (self.env.unwrapped.cfg.is_finite_horizon and bool(result.truncated.any()))
        if self.env.provides_final_obs and bool(done.any()):
            assert result.final_obs is not None
            assert not bool((result.final_obs[done] == result.obs[done]).all())
        return result.obs, result.reward, done, result.log


def _theirs() -> dict[str, Any]:
    root = importlib.util.find_spec("isaaclab")
    assert root is not None
    assert root.origin is not None
    path = Path(root.origin).parent / "source" / "isaaclab_rl" / "test" / "test_wrappers.py"
    names: dict[str, Any] = {"__name__": __name__}
    source = path.read_text(encoding="utf-8").replace('"cuda:0"', '"cpu"').replace("pytest.mark.integration", "[]")
    exec(compile(source, path, "exec"), names)
    wrap = names["_wrap_env"]
    names["_wrap_env"] = lambda library, env, device=None: (
        AsTheTestCalls(LabEnv(env)) if library == "ccrl" else wrap(library, env, device)
    )
    return names


theirs = _theirs()
raw_env = theirs["raw_env"]
test_wrapper_reset_step_and_timeout = theirs["test_wrapper_reset_step_and_timeout"]
for _mark in test_wrapper_reset_step_and_timeout.pytestmark:
    if _mark.name == "parametrize":  # the other libraries are not installed with it
        _mark.args[1][:] = [row for row in _mark.args[1] if row[0] == "rsl_rl"] + ROWS
