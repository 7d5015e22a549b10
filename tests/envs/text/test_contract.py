"""Every text task keeps the contract."""

from __future__ import annotations

from ccrl.llm.task import TextTask
from ccrl.testing.text_contract import TextTaskContract
from envs.text import make_task


class TestArithmetic(TextTaskContract):
    def make_task(self) -> TextTask:
        return make_task("arithmetic", operands=3, operators="+-*")
