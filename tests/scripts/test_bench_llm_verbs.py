"""The clock of the benchmark of an iteration's parts."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import llm_verbs


def test_on_a_gpu_what_was_launched_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    llm_verbs._clock(llm_verbs.Config(device="cpu"))()
    assert not waited
    llm_verbs._clock(llm_verbs.Config(device="cuda"))()
    assert waited
