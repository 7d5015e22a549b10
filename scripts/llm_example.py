"""Files to try docs/own_language_model.md with: a model, prompts, rewards and a reward model, made on the spot.

python scripts/llm_example.py --out example
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import require
from ccrl.settings import Count, Natural, Settings

__all__ = ["ExampleConfig", "main"]

CHARACTERS = "0123456789+-*/=abcdefghijklmnopqrstuvwxyz :\n"
CALLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Marks that are a token each, as in Qwen's tokenizers."""
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
REWARDS = '''"""Two rewards: of one completion, and of all completions of a rollout as TRL calls it."""


def digits(completions, answer, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(bool(text) and text.strip().isdigit()) for text in texts]


def short(prompt, completion, record):
    return 1.0 if len(completion) <= len(record["answer"]) else 0.0
'''


@dataclass(frozen=True)
class ExampleConfig(Settings):
    """Where the files go and how large the model is."""

    out: Path
    """The files are written into this folder: base, judge, data.jsonl, my_rewards.py."""
    layers: Count = 2
    """The model has so many layers."""
    width: Count = 16
    """Its hidden size, a multiple of 2."""
    prompts: Count = 60
    """So many prompts are written, every second one as chat messages."""
    seed: Natural = 0
    """This number seeds the weights."""


def main(config: ExampleConfig) -> list[Path]:
    """Write the files; returns their paths.

    Raises:
        ImportError: transformers is not installed.
        FileExistsError: one of them is there.
    """
    transformers, tokenizers = require("transformers", "llm"), require("tokenizers", "llm")
    paths = [config.out / name for name in ("base", "judge", "data.jsonl", "my_rewards.py")]
    if there := [str(path) for path in paths if path.exists()]:
        raise FileExistsError(f"out: expected a folder without {', '.join(there)}; choose another one")
    base, judge, data, rewards = paths
    config.out.mkdir(parents=True, exist_ok=True)
    known = {token: i for i, token in enumerate([*CHARACTERS, "<pad>", "<bos>", "<eos>", "<unk>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.add_tokens(list(CALLS))
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": config.width, "intermediate_size": 2 * config.width,
        "num_hidden_layers": config.layers, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(config.seed)
    causal = transformers.LlamaConfig(**shape, bos_token_id=None, eos_token_id=None)
    scored = transformers.LlamaConfig(**shape, num_labels=1, pad_token_id=known["<pad>"])
    for folder, model in (
        (base, transformers.AutoModelForCausalLM.from_config(causal)),
        (judge, transformers.AutoModelForSequenceClassification.from_config(scored)),
    ):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    lines = []
    for i in range(config.prompts):
        asked: Any = f"{i}+1="
        if i % 2 == 0:
            asked = [{"role": "system", "content": "add"}, {"role": "user", "content": f"{i}+1"}]
        lines.append(json.dumps({"prompt": asked, "answer": str(i + 1)}))
    data.write_text("\n".join(lines) + "\n")
    rewards.write_text(REWARDS)
    return paths


if __name__ == "__main__":
    try:
        for path in main(tyro.cli(ExampleConfig, description=__doc__)):
            print(path)
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
