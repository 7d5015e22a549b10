"""A trained model as a folder of Hugging Face's, which runs without this project."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.vocabulary import HFVocabulary, Vocabulary, end_tokens
from ccrl.packages import require

__all__ = ["export_model"]

TOLERANCE = 1e-3


@contextmanager
def _no_bars() -> Iterator[None]:
    """A training that exports in every iteration would be lost among the library's progress bars."""
    logging = require("transformers.utils.logging", "llm")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.no_grad()
def export_model(policy: nn.Module, vocab: Vocabulary, folder: Path, check: bool = True) -> float:
    """Write ``folder`` (``save_pretrained``): the model with its adapters merged into the weights, its end tokens, and
    the tokenizer where the vocabulary is one. Returns the largest difference of log-probabilities (nats) between the
    folder, opened again, and the policy.

    :param check: False leaves the folder closed, and returns 0.
    :raises ValueError: the policy is no language model, or the folder has files already.
    :raises RuntimeError: the folder computes something else than the policy.
    """
    if not isinstance(policy, CausalLMPolicy):
        raise ValueError(f"export: expected a language model, got {type(policy).__name__}, which is a table")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"out: expected a new or an empty folder, got {folder}, which has files; choose another name")
    model: Any = copy.deepcopy(policy.model)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if ends := list(end_tokens(vocab)):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config.pad_token_id = vocab.pad
    with _no_bars():
        model.save_pretrained(folder)
    if isinstance(vocab, HFVocabulary):
        vocab.tokenizer.save_pretrained(folder)
    if not check:
        return 0.0
    transformers = require("transformers", "llm")
    with _no_bars():
        again = transformers.AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    ids = torch.arange(min(16, policy.vocab_size), device=next(policy.parameters()).device).unsqueeze(0)
    mine, theirs = (
        m.eval()(input_ids=ids).logits.float().log_softmax(-1) for m in (policy.model, again.to(ids.device))
    )
    gap = float((mine - theirs).abs().max())
    # merging rounds in the type of the weights, which bfloat16 has eight bits for
    allowed = TOLERANCE if next(again.parameters()).dtype == torch.float32 else 100 * TOLERANCE
    if not gap <= allowed:
        raise RuntimeError(f"export: expected log-probabilities within {allowed:g} of the policy's, got {gap:g} from "
                           f"{folder}; do not use it")  # fmt: skip
    return gap
