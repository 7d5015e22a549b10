"""Language models by name: a tiny one from scratch, a table, a local directory; adapters through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import TextTask
from ccrl.packages import require

__all__ = ["WithoutAdapters", "add_adapters", "build_policy", "load_model", "tiny_model"]


def tiny_model(
    vocab_size: int, *, layers: int = 4, width: int = 128, heads: int = 4, max_length: int = 256, pad: int | None = None
) -> nn.Module:
    """A Llama from scratch with weights from torch's global generator (about 0.8 M parameters by default).

    :raises ValueError: if ``heads`` does not divide ``width``.
    """
    if width % heads:
        raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
    transformers = require("transformers", "llm")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_length, pad_token_id=pad,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def load_model(directory: str | Path) -> nn.Module:
    """The causal language model in a local directory; nothing is downloaded and no code of the model's runs.

    :raises FileNotFoundError: if there is no such directory.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"model: expected tiny, tabular or a local model directory, got {str(directory)!r}; save one there with "
            "save_pretrained"
        )
    transformers = require("transformers", "llm")
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )
    return model


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters on all linear layers; everything else is frozen."""
    peft = require("peft", "llm")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def build_policy(config: Any, task: TextTask) -> nn.Module:
    """The policy that ``config.model`` names, for ``task``.

    :raises ValueError: if the model's vocabulary is smaller than the task's, or a table is asked for where prompts are
        not numbers of questions, or with adapters.
    """
    options = {"temperature": config.temperature}
    if config.model == "tabular":
        if not hasattr(task, "fixed_length"):
            raise ValueError(
                f"model: tabular needs a bandit task (fixed length, numbered questions), got {task.name!r}"
            )
        if config.lora_rank:
            raise ValueError(f"lora_rank: expected 0 with model='tabular' (a table has no layers), got "
                             f"{config.lora_rank}")  # fmt: skip
        bandit: Any = task
        init = bandit.initial_logits() if hasattr(bandit, "initial_logits") else None
        return TabularTokenPolicy(bandit.questions, bandit.fixed_length, task.vocab.size, init=init, **options)
    if config.model == "tiny":
        model = tiny_model(
            task.vocab.size, layers=config.model_layers, width=config.model_width, heads=config.model_heads,
            pad=task.vocab.pad if 0 <= task.vocab.pad < task.vocab.size else None,
        )  # fmt: skip
    else:
        model = load_model(config.model)
    if config.lora_rank:
        model = add_adapters(model, config.lora_rank)
    policy = CausalLMPolicy(model, logits_chunk_size=config.logits_chunk_size or None, **options)
    if policy.vocab_size < task.vocab.size:
        raise ValueError(f"model: expected at least the task's {task.vocab.size} tokens, got {policy.vocab_size}")
    return policy


class WithoutAdapters(nn.Module):
    """The frozen model under a policy's adapters: the reference policy, for no memory."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: its parameters are the policy's, not this module's

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """As the policy's, with the adapters off."""
        policy = self._policy[0]
        with policy.model.disable_adapter():  # type: ignore[operator]
            found: dict[str, Tensor] = policy(batch, want)
        return found
