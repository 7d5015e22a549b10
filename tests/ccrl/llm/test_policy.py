"""Language models as policies: what is scored is what was sampled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ccrl.data import Data
from ccrl.llm.policy import OUTPUTS, CausalLMPolicy, token_outputs
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import Prompts, TextTask

Build = Callable[..., CausalLMPolicy]


def rollout(policy: CausalLMPolicy, task: TextTask, prompts: Prompts, **options: int) -> Data:
    collector = TokenCollector(task, seed=1, **options)
    return collector.sample(policy, prompts, torch.arange(len(prompts)).repeat_interleave(3))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "gemma2", "window", "bloom", "mpt", "lfm2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_the_scored_ones(
    build: Build, task: TextTask, prompts: Prompts, name: str, temperature: float
) -> None:
    """Completions of different lengths after left-padded prompts, through the cache and in one pass."""
    policy = build(name, temperature=temperature)
    data = rollout(policy, task, prompts)
    assert len(data["length"].unique()) > 1, "all completions are of one length"
    with torch.no_grad():
        scored = policy(data, frozenset({"log_prob"}))["log_prob"]
    here = data["valid"] > 0
    torch.testing.assert_close(scored[here], data["log_prob"][here], rtol=1e-4, atol=2e-5)


def test_padding_changes_no_score(build: Build, task: TextTask, prompts: Prompts) -> None:
    """Neither columns of a longer prompt nor steps that are not present."""
    policy = build("llama")
    data = rollout(policy, task, prompts)
    wide = Data(
        {**data, "prompt": F.pad(data["prompt"], (5, 0)), "prompt_valid": F.pad(data["prompt_valid"], (5, 0))},
        sequence=data.sequence,
    )
    steps = {name: F.pad(data[name], (0, 0, 0, 4)) for name in ("action", "present", "valid")}
    long = Data({**steps, "prompt": data["prompt"], "prompt_valid": data["prompt_valid"]}, sequence=data.sequence)
    with torch.no_grad():
        plain, wider, longer = (policy(d, frozenset({"log_prob"}))["log_prob"] for d in (data, wide, long))
    here = data["valid"] > 0
    torch.testing.assert_close(wider[here], plain[here], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer[: data.shape[0]][here], plain[here], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("logits_chunk_size", [1, 7, 1000])
def test_pieces_of_the_vocabulary_projection(
    build: Build, task: TextTask, prompts: Prompts, name: str, logits_chunk_size: int
) -> None:
    """Values and gradients are those of one piece."""
    want = frozenset({"log_prob", "entropy", "topk_log_prob", "topk_index", "sum_pi2"})
    found = []
    for size in (None, logits_chunk_size):
        policy = build(name, logits_chunk_size=size, k=3)
        data = rollout(policy, task, prompts)
        out = policy(data, want)
        weight = torch.linspace(-1.0, 1.0, out["log_prob"].numel()).view(data.shape) * data["valid"]
        (weight * (out["log_prob"] + 0.3 * out["entropy"])).sum().backward()
        found.append((out, {k: p.grad for k, p in policy.named_parameters()}))
    (plain, slope), (pieces, piece_slope) = found
    assert pieces.keys() == plain.keys() == want
    for key in want:
        torch.testing.assert_close(pieces[key], plain[key], rtol=1e-4, atol=1e-5)
    for key, gradient in slope.items():
        torch.testing.assert_close(piece_slope[key], gradient, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_pieces_are_refused_where_logits_are_more_than_a_projection(build: Build, name: str) -> None:
    with pytest.raises(ValueError, match=r"logits_chunk_size: the logits of \w+ are not its output embedding"):
        build(name, logits_chunk_size=4)


def test_hidden_states(build: Build, task: TextTask, prompts: Prompts) -> None:
    policy = build("llama")
    data = rollout(policy, task, prompts)
    with torch.no_grad():
        out = policy(data, frozenset({"hidden", "log_prob"}))
        plain = policy(data, frozenset({"log_prob"}))["log_prob"]
        logits = policy.model.get_output_embeddings()(out["hidden"])
    assert out["hidden"].shape == (*data.shape, 16)
    torch.testing.assert_close(out["log_prob"], plain, rtol=1e-4, atol=1e-5)
    chosen = logits.log_softmax(-1).gather(-1, data["action"].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, plain, rtol=1e-4, atol=1e-5)


def test_no_dropout(build: Build) -> None:
    policy = build("gpt2")  # whose config has dropout
    assert not policy.train().training
    assert not any(m.training for m in policy.modules())


def test_outputs_and_size(build: Build, task: TextTask) -> None:
    policy = build("llama")
    assert policy.outputs() == OUTPUTS
    assert policy.vocab_size == task.vocab.size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected > 0, got 0.0"),
        ({"logits_chunk_size": -1}, "logits_chunk_size: expected None or >= 0, got -1"),
    ],
)
def test_bad_options(build: Build, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("llama", **options)


def test_token_outputs_by_hand() -> None:
    probability = torch.tensor([[0.5, 0.25, 0.25]])
    token = torch.tensor([1])
    out = token_outputs(probability.log(), token, OUTPUTS - {"hidden"}, 1.0, 2)
    assert out["log_prob"].tolist() == pytest.approx([-1.386294])
    assert out["entropy"].tolist() == pytest.approx([1.039721])
    assert out["sum_pi2"].tolist() == pytest.approx([0.375])
    assert out["topk_index"][0, 0] == 0
    assert out["topk_log_prob"].exp()[0].tolist() == pytest.approx([0.5, 0.25])
    torch.testing.assert_close(out["log_probs"], probability.log())
    sharp = token_outputs(probability.log(), token, frozenset({"log_prob"}), 0.5, 2)
    assert sharp.keys() == {"log_prob"}
    assert sharp["log_prob"].exp().tolist() == pytest.approx([1 / 6])  # squares 4, 1, 1


@pytest.mark.parametrize("logits_chunk_size", [None, 7])
def test_log_probabilities_at_another_temperature(
    build: Build, task: TextTask, prompts: Prompts, logits_chunk_size: int | None
) -> None:
    """Those of a policy that has that temperature, whatever its own; with a gradient."""
    policy, other = (build("llama", temperature=t, logits_chunk_size=logits_chunk_size) for t in (0.7, 1.3))
    data = rollout(policy, task, prompts)
    found = policy.log_prob(data, 1.3)
    assert torch.equal(found, other(data, frozenset({"log_prob"}))["log_prob"])
    assert not torch.allclose(found, policy(data, frozenset({"log_prob"}))["log_prob"])
    found.sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())


def test_forbidden_tokens_have_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    out = token_outputs(logits, torch.tensor([0]), frozenset({"entropy", "sum_pi2"}), 1.0, 2)
    assert out["entropy"].tolist() == pytest.approx([0.693147])
    assert out["sum_pi2"].tolist() == pytest.approx([0.5])


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits = torch.randn(4, 9).bfloat16()
    out = token_outputs(logits, torch.zeros(4, dtype=torch.int64), frozenset({"log_prob"}), 1.0, 2)
    torch.testing.assert_close(out["log_prob"], logits.float().log_softmax(-1)[:, 0])
