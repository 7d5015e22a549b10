"""``python -m pytest tests/agents/test_golden_runs.py --update-golden`` writes the stored numbers anew."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="store the numbers of the golden runs anew")
