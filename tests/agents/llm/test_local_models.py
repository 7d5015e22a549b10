"""A model and its tokenizer in a folder: trained, asked and evaluated in one encoding of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.llm.baselines import GRPO
from ccrl.packages import require

CHARACTERS = "0123456789+%="


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama that is far from uniform, with a tokenizer of characters in an order of its own."""
    try:
        transformers, tokenizers = require("transformers", "llm"), require("tokenizers", "llm")
    except ImportError as error:
        pytest.skip(str(error))
    known = {token: i for i, token in enumerate([*reversed(CHARACTERS), "<pad>", "<bos>", "<eos>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.4)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(60)))
    return path


def made(task: str, folder: Path, env_kwargs: dict[str, Any] | None = None, **settings: Any) -> GRPO:
    return GRPO(task, model=str(folder), n_prompts=4, group_size=4, **settings, env_kwargs=env_kwargs)


def test_a_file_of_prompts_trains_the_model_in_a_folder(folder: Path, questions: Path, tmp_path: Path) -> None:
    """Resumed exactly, also in the middle of an epoch."""
    options = {"path": str(questions), "test_path": str(questions), "max_new_tokens": 4}
    whole = made("jsonl", folder, options)
    whole.learn(16)
    whole.save(tmp_path / "a.pt")
    half = GRPO.load(tmp_path / "a.pt")
    for agent in (whole, half):
        agent.learn(32)
    assert whole.task.vocab.size == 16
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), half.policy.parameters(), strict=True))


@pytest.mark.parametrize("task", ["arithmetic", "jsonl"])
def test_complete_asks_what_evaluate_asks(folder: Path, questions: Path, task: str) -> None:
    """With and without a begin token in the text: the most probable completion of every test question."""
    options = {"path": str(questions), "test_path": str(questions), "max_new_tokens": 4} if task == "jsonl" else {}
    agent = made(task, folder, options)
    vocab, collector = agent.task.vocab, agent._collector(5)
    prompts = collector.test_prompts(24, 5)
    data = collector.sample(agent.policy, prompts, torch.arange(24), deterministic=True)
    expected = [vocab.decode(row[:length]) for row, length in zip(data["action"].t().tolist(), data["length"].tolist())]
    assert len(set(expected)) > 3
    texts = [vocab.decode(row) for row in prompts.tokens.tolist()]
    assert agent.complete(texts, deterministic=True) == expected
    assert agent.complete([f"<bos>{text}" for text in texts], deterministic=True) == expected
    assert agent.predict(texts[0], deterministic=True)[0] == expected[0]
    found = agent.evaluate(None, 24, seed=5)
    assert found.lengths.tolist() == data["length"].tolist()


def test_all_test_questions_are_asked(folder: Path, questions: Path) -> None:
    agent = made("jsonl", folder, {"path": str(questions), "test_path": str(questions), "max_new_tokens": 4})
    assert len(set(agent.collector.test_prompts(60, 0).index.tolist())) == 60


def test_a_bandit_has_no_text_for_a_tokenizer(folder: Path) -> None:
    with pytest.raises(ValueError, match="has a tokenizer, and the task 'modsum' has tokens of its own"):
        made("modsum", folder)
