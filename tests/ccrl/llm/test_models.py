"""Models by name, adapters, and what is said when something is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ccrl.collect import Request
from ccrl.llm.models import Snapshot, build_policy, load_model, tiny_model
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import TextTask
from ccrl.packages import require
from ccrl.policies.dense import Dense
from ccrl.testing.recipe_contract import RaggedTask

WANT = frozenset({"log_prob"})


def config(**changes: Any) -> Any:
    default = {
        "model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2, "lora_rank": 0, "logits_chunk_size": 0,
        "temperature": 1.0,
    }  # fmt: skip
    return SimpleNamespace(**default | changes)


@pytest.fixture
def peft() -> Any:
    try:
        return require("peft", "llm")
    except ImportError as error:
        pytest.skip(str(error))


def test_tiny_model(transformers: Any, task: TextTask) -> None:
    policy = build_policy(config(logits_chunk_size=5), task)
    assert isinstance(policy, CausalLMPolicy)
    assert policy.vocab_size == task.vocab.size
    assert policy.logits_chunk_size == 5
    with pytest.raises(ValueError, match="width: expected a multiple of heads = 3, got 16"):
        tiny_model(10, width=16, heads=3)


def test_a_saved_model_is_the_same(transformers: Any, task: TextTask, tmp_path: Path) -> None:
    policy = build_policy(config(), task)
    policy.model.save_pretrained(tmp_path)
    again = build_policy(config(model=str(tmp_path)), task)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True))


def test_whose_products(transformers: Any, task: TextTask, tmp_path: Path) -> None:
    def layer(**changes: Any) -> type:
        return type(build_policy(config(**changes), task).model.get_output_embeddings())  # type: ignore[union-attr, operator]

    assert (layer(), layer(products="torch")) == (Dense, torch.nn.Linear)
    tiny_model(task.vocab.size, layers=1, width=16, heads=2).save_pretrained(tmp_path)
    folder = str(tmp_path)
    assert (layer(model=folder), layer(model=folder, products="onednn")) == (torch.nn.Linear, Dense)
    with pytest.raises(ValueError, match="products: expected auto with model='tabular' or dtype='bfloat16'"):
        layer(products="onednn", dtype="bfloat16")


def test_a_vocabulary_too_small(transformers: Any, task: TextTask, tmp_path: Path) -> None:
    tiny_model(task.vocab.size - 1, layers=1, width=16, heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"at least the task's {task.vocab.size} tokens, got {task.vocab.size - 1}"):
        build_policy(config(model=str(tmp_path)), task)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected tiny, tabular or a local model directory, got .*nowhere"):
        load_model(tmp_path / "nowhere")


def test_tables_are_for_bandits(task: TextTask) -> None:
    with pytest.raises(ValueError, match="tabular needs a bandit task"):
        build_policy(config(model="tabular"), task)
    policy = build_policy(config(model="tabular"), RaggedTask())
    assert torch.equal(policy.logits, RaggedTask().initial_logits())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lora_rank: expected 0 with model='tabular' .*, got 2"):
        build_policy(config(model="tabular", lora_rank=2), RaggedTask())


@pytest.mark.parametrize("model", ["tiny", "tabular"])
def test_the_temperature_reaches_the_policy(transformers: Any, model: str) -> None:
    policy: Any = build_policy(config(model=model, temperature=0.7), RaggedTask())
    assert policy.temperature == 0.7


def test_a_table_does_not_train_its_start() -> None:
    start = torch.zeros(1, 1, 2)
    table = TabularTokenPolicy(1, 1, 2, init=start)
    with torch.no_grad():
        table.logits.add_(1.0)
    assert not start.any()


def test_missing_extras_say_what_to_install(monkeypatch: pytest.MonkeyPatch, task: TextTask) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'\'transformers\', which is not installed.*pip install -e "\.\[llm\]"'):
        build_policy(config(), task)


def test_missing_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch, transformers: Any, task: TextTask) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'\'peft\', which is not installed.*pip install -e "\.\[llm\]"'):
        build_policy(config(lora_rank=2), task)


def test_only_adapters_train(transformers: Any, peft: Any, task: TextTask) -> None:
    policy = build_policy(config(lora_rank=2), task)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    data = TokenCollector(task, seed=0).collect(Request(counts=torch.tensor([2, 2])), policy)
    optimiser = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the first step moves B alone: A has no gradient while B is 0
        optimiser.zero_grad()
        (policy(data, WANT)["log_prob"] * data["valid"]).sum().backward()
        optimiser.step()
    assert all(torch.equal(p, frozen[name]) for name, p in policy.named_parameters() if name in frozen)
    assert all(p.grad.any() for p in policy.parameters() if p.requires_grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("logits_chunk_size", [0, 3])
def test_a_snapshot_is_the_policy_as_it_was(
    transformers: Any, peft: Any, task: TextTask, logits_chunk_size: int
) -> None:
    """At first the model under the adapters, whose second factor is 0; then what it was at the last refresh."""
    torch.manual_seed(0)
    plain = build_policy(config(), task)
    torch.manual_seed(0)
    policy = build_policy(config(lora_rank=2, logits_chunk_size=logits_chunk_size), task)
    reference = Snapshot(policy)
    data = TokenCollector(task, seed=0).collect(Request(counts=torch.tensor([2, 2])), policy)

    def move() -> None:
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()

    with torch.no_grad():
        move()
        assert (policy(data, WANT)["log_prob"] - plain(data, WANT)["log_prob"]).abs().max() > 0.01
        torch.testing.assert_close(reference(data, WANT)["log_prob"], plain(data, WANT)["log_prob"])
        reference.refresh()
        then = policy(data, WANT)["log_prob"]
        move()
        assert torch.equal(reference(data, WANT)["log_prob"], then)
        assert not torch.allclose(policy(data, WANT)["log_prob"], then)
    assert not list(reference.parameters())
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(b.numel() for b in reference.buffers()) == adapters  # of the rest there is no second copy


def test_damaged_weights(transformers: Any, task: TextTask, tmp_path: Path) -> None:
    tiny_model(task.vocab.size, layers=1, width=16, heads=2).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"expected whole weights .* got a damaged file"):
        load_model(tmp_path)
