"""The check inside verl, as far as it goes without verl."""

from __future__ import annotations

import importlib.util

import pytest

from agents.llm import METHODS
from scripts import verl_check
from scripts.verl_check import FITTED, THEIRS, CheckConfig

TINY = CheckConfig(n_prompts=2, group_size=4, warm_start_steps=0, updates=1)


def test_the_batch_is_a_rollout_in_verls_layout() -> None:
    batch = verl_check.sampled(TINY)
    mask = batch["response_mask"]
    assert mask.shape == batch["log_probs"].shape == batch["old_log_probs"].shape == (8, mask.shape[1])
    assert bool((mask.diff(dim=1) <= 0).all())
    assert not batch["log_probs"][mask == 0].any()
    assert batch["uid"].tolist() == [f"prompt {i}" for i in (0, 0, 0, 0, 1, 1, 1, 1)]
    # rewards stand on the last token of a completion
    last = mask.sum(1).long() - 1
    assert not batch["token_level_rewards"].scatter(1, last.unsqueeze(1), 0.0).any()


def test_bounds_are_those_of_the_method() -> None:
    assert FITTED.keys() <= METHODS.keys()
    assert THEIRS.keys() <= METHODS.keys()
    assert verl_check.clips("dapo")["clip_ratio_high"] == 0.28
    assert verl_check.clips("sapo")["tau_neg"] == 1.05


@pytest.mark.skipif(importlib.util.find_spec("verl") is not None, reason="verl is here")
def test_what_is_missing_is_named() -> None:
    with pytest.raises(ImportError, match=r"\[verl\]"):
        verl_check.main(TINY)
