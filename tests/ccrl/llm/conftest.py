"""A text task with left-padded prompts, small models of several architectures, and TRL trainers of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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
        "window": lambda: transformers.MistralConfig(**gated, sliding_window=4),
        "bloom": lambda: transformers.BloomConfig(**small, hidden_size=16, n_layer=2, n_head=2),
        "mpt": lambda: transformers.MptConfig(vocab_size=size, d_model=16, n_layers=2, n_heads=2, max_seq_len=64),
        "lfm2": lambda: transformers.Lfm2Config(
            **{k: v for k, v in gated.items() if k != "head_dim"}, layer_types=["conv", "full_attention"]
        ),
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


WORDS = [*"abcdefgh"]
"""Vocabulary of the trainers' model."""


@pytest.fixture(scope="session")
def trl() -> Any:
    """The library, or a skip that says what to install."""
    try:
        return require("trl", "llm")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tokenizer(trl: Any) -> Any:
    tokenizers, transformers = require("tokenizers", "llm"), require("transformers", "llm")
    names = {name: i for i, name in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        unk_token="<unk>",
    )  # fmt: skip


@pytest.fixture
def make_trainer(trl: Any, tokenizer: Any, transformers: Any, tmp_path: Path) -> Callable[..., Any]:
    """A trainer of a class on a tiny model; float64 but for the log-probabilities, which TRL computes in float32."""
    datasets = require("datasets", "llm")

    def make(cls: type[Any], rewards: Any, *, dtype: torch.dtype = torch.float64, prompts: int = 4, **args: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
                bos_token_id=1, eos_token_id=2,
            ), dtype=dtype,
        )  # fmt: skip
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
        if args.get("beta"):  # TRL loads the reference from where the model is said to come from
            model.save_pretrained(tmp_path / "model")
            model.config._name_or_path = str(tmp_path / "model")
        options = {
            "per_device_train_batch_size": 2 * args["num_generations"], "max_steps": 2, "learning_rate": 0.1,
            "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
            "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
            "output_dir": str(tmp_path / "out"), "bf16": False, "activation_checkpointing": False,
        }  # fmt: skip
        data = datasets.Dataset.from_dict({"prompt": [" ".join(WORDS[i : i + 1 + i % 3]) for i in range(prompts)]})
        return cls(
            model, list(rewards), args=trl.GRPOConfig(**options | args), train_dataset=data, processing_class=tokenizer
        )

    return make
