"""A text task with left-padded prompts, and small models of three architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.task import Prompts, TextTask
from ccrl.packages import require
from envs.text import make_task


@pytest.fixture
def task() -> TextTask:
    """Sums of numbers of one or two digits: prompts differ in length."""
    return make_task("arithmetic", max_new_tokens=9)


@pytest.fixture
def prompts(task: TextTask) -> Prompts:
    found = task.prompts(8, torch.Generator().manual_seed(0))
    assert (found.valid == 0).any(), "no prompt is padded"
    return found


@pytest.fixture
def transformers() -> Any:
    """The library, or a skip that says what to install."""
    try:
        return require("transformers", "llm")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture
def build(transformers: Any, task: TextTask) -> Callable[..., CausalLMPolicy]:
    """A policy of an architecture by name, with weights large enough to be far from uniform."""
    size = task.vocab.size
    small = {"vocab_size": size, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    gated = small | {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    configs = {
        "llama": lambda: transformers.LlamaConfig(**gated),
        "gpt2": lambda: transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        "neox": lambda: transformers.GPTNeoXConfig(
            **small, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64,
        ),
        "gemma2": lambda: transformers.Gemma2Config(**gated, final_logit_softcapping=2.0),
        "cohere": lambda: transformers.CohereConfig(
            **{k: v for k, v in gated.items() if k != "head_dim"}, logit_scale=0.1
        ),
    }  # fmt: skip

    def make(name: str, **options: Any) -> CausalLMPolicy:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.4)
        return CausalLMPolicy(model, **options)

    return make
