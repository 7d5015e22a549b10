"""A prompt evaluated once for all its completions: the numbers of one pass over everything, in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.llm import padding
from ccrl.llm import policy as module
from ccrl.llm.models import Snapshot, add_adapters
from ccrl.llm.policy import OUTPUTS, CausalLMPolicy
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import Prompts, TextTask

Build = Callable[..., CausalLMPolicy]
LOSSES = ("log_prob", "entropy", "sum_pi2", "topk_log_prob")
BATCHES = {
    "groups": list(range(24)),
    "split groups": [17, 3, 9, 4, 22, 10, 5, 16],
    "one prompt": [6, 7, 8],
    "some prompts alone": [0, 3, 6, 7, 21],
}


@pytest.fixture(autouse=True)
def small_batches_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARE", 1)


def in_double(policy: CausalLMPolicy) -> CausalLMPolicy:
    """The library's RMS norms compute in float32 whatever comes in, which would hide errors up to 1e-7."""
    for m in policy.double().modules():
        if type(m).__name__.endswith("RMSNorm"):
            m.forward = partial(F.rms_norm, normalized_shape=(m.weight.shape[0],), weight=m.weight, eps=1e-6)
    return policy


def sample(policy: CausalLMPolicy, task: TextTask, prompts: Prompts, columns: list[int]) -> Data:
    """Some of 3 completions of each of 8 left-padded prompts."""
    question = torch.arange(len(prompts)).repeat_interleave(3)
    return TokenCollector(task, seed=1).sample(policy, prompts, question).take(torch.tensor(columns))


def evaluate(policy: nn.Module, data: Data, names: frozenset[str]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    """Outputs on valid tokens, and the gradient of a sum in which every one of them has a weight of its own."""
    policy.zero_grad()
    here = data["valid"] > 0
    out = {name: value[here] for name, value in policy(data, names).items()}
    total = sum((out[k] * torch.linspace(-1, 1, out[k].numel()).view_as(out[k])).sum() for k in names & {*LOSSES})
    total.backward()  # type: ignore[union-attr]
    return {k: v.detach() for k, v in out.items()}, [p.grad for p in policy.parameters()]


def compare(policy: CausalLMPolicy, data: Data, names: frozenset[str], tolerance: float = 1e-10) -> None:
    assert policy._shares
    shared, slope = evaluate(policy, data, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARE", 10**9)  # one pass over everything
        plain, plain_slope = evaluate(policy, data, names)
    assert shared.keys() == plain.keys() == names
    for name in names:
        torch.testing.assert_close(shared[name], plain[name], rtol=tolerance, atol=tolerance)
    for one, other in zip(slope, plain_slope):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert any(g is not None and bool(g.abs().max() > 1e-3) for g in slope)


@pytest.mark.parametrize("columns", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "window"])
def test_values_and_gradients(build: Build, task: TextTask, prompts: Prompts, name: str, columns: list[int]) -> None:
    policy = in_double(build(name, k=3, temperature=0.7))
    data = sample(policy, task, prompts, columns)
    assert len(columns) < 24 or len(data["length"].unique()) > 1
    assert len(data["prompt_valid"].sum(1).unique()) > 1 or len(data["group"].unique()) == 1
    compare(policy, data, frozenset({*LOSSES, "topk_index"}))


@pytest.mark.parametrize("name", ["gemma2", "bloom", "mpt"])
def test_other_models(build: Build, task: TextTask, prompts: Prompts, name: str) -> None:
    """Logits that are more than a projection; distances in place of positions. In float32: the library's own attention
    makes NaN of padding in float64."""
    policy = build(name)
    compare(policy, sample(policy, task, prompts, BATCHES["split groups"]), frozenset({"log_prob", "entropy"}), 1e-4)


@pytest.mark.parametrize("logits_chunk_size", [None, 7])
def test_pieces_of_the_vocabulary_and_hidden_states(
    build: Build, task: TextTask, prompts: Prompts, logits_chunk_size: int | None
) -> None:
    policy = in_double(build("llama", logits_chunk_size=logits_chunk_size, k=3))
    compare(policy, sample(policy, task, prompts, BATCHES["split groups"]), OUTPUTS)


def test_adapters(build: Build, task: TextTask, prompts: Prompts) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    policy = CausalLMPolicy(add_adapters(build("llama").model, 2))
    for p in policy.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.4)  # the second factor begins at 0
    policy = in_double(policy)
    data = sample(policy, task, prompts, BATCHES["split groups"])
    compare(policy, data, frozenset({"log_prob", "entropy"}))
    reference, want = Snapshot(policy), frozenset({"log_prob"})
    with torch.no_grad():
        plain = reference(data, want)["log_prob"]
        policy._shares = True
        torch.testing.assert_close(reference(data, want)["log_prob"], plain, rtol=1e-10, atol=1e-10)


# -- what is computed -----------------------------------------------------------------------------------------------


def tokens_seen(policy: CausalLMPolicy, data: Data) -> int:
    seen = []
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda m, ids, out: seen.append(ids[0].numel()))  # type: ignore[operator]
    policy(data, frozenset({"log_prob"}))
    hook.remove()
    return sum(seen)


def test_tokens_evaluated(build: Build, task: TextTask, prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts once; the last token of a completion predicts nothing that is asked for."""
    policy = build("llama")
    data = sample(policy, task, prompts, BATCHES["groups"])
    (steps, rows), width = data.shape, data["prompt"].shape[1]
    bucketed = tokens_seen(policy, data)
    monkeypatch.setattr(padding, "MOST", 1)
    assert 8 * width + int(data["length"].sum()) - rows <= bucketed < tokens_seen(policy, data)
    assert tokens_seen(policy, data) == 8 * width + rows * (steps - 1)
    alone = data.take(torch.arange(0, 24, 3))
    assert tokens_seen(policy, alone) == 8 * (width + steps - 1)
    monkeypatch.setattr(module, "SHARE", 16 * width)
    assert tokens_seen(policy, data) == 8 * width + rows * (steps - 1)
    monkeypatch.setattr(module, "SHARE", 16 * width + 1)
    assert tokens_seen(policy, data) == rows * (width + steps - 1)


def test_completions_of_one_token(build: Build, task: TextTask, prompts: Prompts) -> None:
    policy = build("llama")
    data = sample(policy, task, prompts, BATCHES["groups"])
    first = Data({k: v if k in data.sequence else v[:1] for k, v in data.items()}, sequence=data.sequence)
    want = frozenset({"log_prob"})
    torch.testing.assert_close(policy(first, want)["log_prob"], policy(data, want)["log_prob"][:1])


def test_recurrent_states_are_not_shared(build: Build, task: TextTask, prompts: Prompts) -> None:
    """They are written over by the first completion token."""
    policy = build("lfm2")
    data = sample(policy, task, prompts, BATCHES["groups"])
    # all prompts whole, whatever the buckets of completions
    assert tokens_seen(policy, data) >= 24 * (data["prompt"].shape[1] - 1) + int(data["length"].sum())


# -- caches ---------------------------------------------------------------------------------------------------------


def test_blocks(transformers: Any) -> None:
    """The library's layer with zeros up to a whole block."""
    from ccrl.llm.cache import BLOCK, BlockLayer, is_shareable, make_blocks

    pairs = torch.randn(2, 20, 3, 2, 1, 4)
    library = transformers.cache_utils.DynamicLayer()
    library.update(*pairs[:, 0].expand(2, 3, 2, 5, 4))
    cache = SimpleNamespace(layers=[library])
    assert is_shareable(cache)
    assert not is_shareable(SimpleNamespace(layers=[library, transformers.cache_utils.LinearAttentionLayer()]))
    assert not is_shareable(None)
    before = library.keys.clone()
    assert make_blocks(cache) == BLOCK
    (layer,) = cache.layers
    assert isinstance(layer, BlockLayer)
    places = set()
    for t in range(1, 20):
        if t == 9:
            for kept in (layer, library):
                kept.reorder_cache(torch.tensor([2, 0]))
        new = pairs[:, t, : layer.keys.shape[0]]
        said = layer.get_mask_sizes(1)
        found, plain = layer.update(*new), library.update(*new)
        seen = 5 + t
        assert layer.get_seq_length() == seen
        assert said == (found[0].shape[2], 0) == (-(-seen // BLOCK) * BLOCK, 0)
        for mine, theirs in zip(found, plain):
            assert torch.equal(mine[:, :, :seen], theirs)
            assert not mine[:, :, seen:].any()
        places.add(found[0].data_ptr())
    assert len(places) <= 5, "blocks are not written in place"
    assert torch.equal(before[[2, 0]], library.keys[:, :, :5])
