"""The shaped next-token objective: loss and gradient by hand, stationary points, samples, the agent, other trainers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agents.llm.div_prec import DivPrec, DivPrecConfig, shaped_ce, trainer_loss
from agents.llm.preferences import SFT
from ccrl.data import Batching
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

F64 = torch.float64
LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -2.0], dtype=F64)
"""p = (.602732, .221733, .134488, .030008, .011039); the next token is 1, and of k = 2 the head without it is {0}."""

CASES: list[tuple[dict[str, float], float, list[float]]] = [
    ({"beta": 0.0}, 1.506283, [0.602732, -0.778267, 0.134488, 0.030008, 0.011039]),
    ({"beta": -0.25}, 1.603704, [0.641715, -0.828603, 0.143186, 0.031949, 0.011753]),
    ({"beta": 0.5}, 1.328834, [0.531727, -0.686583, 0.118644, 0.026473, 0.009739]),
    ({"beta": 0.0, "lam_head": 0.1}, 1.446010, [0.578787, -0.764903, 0.142594, 0.031817, 0.011705]),
    ({"beta": 0.0, "lam_tail": -0.1}, 1.523836, [0.592152, -0.782159, 0.145576, 0.032482, 0.011950]),
]


def value(logits: Tensor, label: int = 1, k: int = 2, **options: float) -> tuple[float, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss, _ = shaped_ce(leaf[None], torch.tensor([label]), k=k, **options)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize(("options", "loss", "gradient"), CASES)
def test_loss_and_gradient_by_hand(options: dict[str, float], loss: float, gradient: list[float]) -> None:
    found, slope = value(LOGITS, **options)
    assert found == pytest.approx(loss, abs=6e-7)
    assert slope.tolist() == pytest.approx(gradient, abs=6e-7)
    assert float(slope.sum()) == pytest.approx(0.0, abs=1e-12), "adding a number to all logits changes nothing"


@pytest.mark.parametrize(("beta", "reward"), [(0.0, 20.0), (-0.25, 20.258118), (0.5, 19.493589)])
def test_the_reward_of_the_next_token(beta: float, reward: float) -> None:
    """(1 - p)^beta / p at p = 0.05: the weight of the score is p times it."""
    logits = torch.tensor([0.05, 0.95], dtype=F64).log()
    _, stats = shaped_ce(logits[None], torch.tensor([0]), beta=beta)
    assert float(stats["weight"]) / 0.05 == pytest.approx(reward, abs=1e-6)


def test_the_expectation_is_that_of_samples() -> None:
    """Ascent direction of E r(a) grad log pi(a) with 400,000 samples."""
    _, slope = value(LOGITS, beta=-0.25, lam_head=0.1, lam_tail=-0.1)
    assert (-slope).tolist() == pytest.approx([-0.60719, 0.819131, -0.16238, -0.036232, -0.013329], abs=6e-6)
    p = LOGITS.softmax(0)
    drawn = torch.multinomial(p, 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    reward = torch.tensor([0.1, float((1 - p[1]) ** -0.25 / p[1]), -0.1, -0.1, -0.1], dtype=F64)
    # the mean of r(a) (e_a - p), from how often each token came
    often = reward * drawn.bincount(minlength=5) / len(drawn)
    torch.testing.assert_close(often - often.sum() * p, -slope, rtol=0.0, atol=6e-3)
    exact = reward * p
    torch.testing.assert_close(exact - exact.sum() * p, -slope, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("q", "beta", "p"),
    [
        ((0.7, 0.3), -0.25, (0.755789, 0.244211)),
        ((0.7, 0.3), 0.0, (0.7, 0.3)),
        ((0.7, 0.3), 0.5, (0.637578, 0.362422)),
        ((0.5, 0.3, 0.15, 0.05), -0.25, (0.531519, 0.287139, 0.136865, 0.044477)),
        ((0.5, 0.3, 0.15, 0.05), 0.5, (0.458662, 0.310567, 0.170345, 0.060426)),
    ],
)
def test_where_training_ends(q: tuple[float, ...], beta: float, p: tuple[float, ...]) -> None:
    logits, source = torch.tensor(p, dtype=F64).log(), torch.tensor(q, dtype=F64)
    slopes = torch.stack([value(logits, label, beta=beta)[1] for label in range(len(q))])
    assert (source @ slopes).abs().max() < 2e-6
    fixed = source * (1.0 - logits.exp()) ** beta
    torch.testing.assert_close(fixed / fixed.sum(), logits.exp(), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize(
    ("first", "entropy", "nll"),
    [(0.755789, 0.555885, 0.618912), (0.7, 0.610864, 0.610864), (0.637578, 0.654799, 0.619539)],
)
def test_entropies_there(first: float, entropy: float, nll: float) -> None:
    """Below 0 sharper, above 0 flatter than the source, for hardly more cross entropy."""
    logits = torch.tensor([[first, 1.0 - first]], dtype=F64).log().expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    _, stats = shaped_ce(logits, labels)
    assert float(stats["entropy"]) == pytest.approx(entropy, abs=2e-6)
    assert float(stats["nll"]) == pytest.approx(nll, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_shaping_it_is_cross_entropy_bit_for_bit(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 1, 7, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    label = torch.tensor([[3]])
    mine, _ = shaped_ce(logits, label, beta=0.0)
    theirs = F.cross_entropy(logits[0], label[0])
    assert torch.equal(mine.detach(), theirs.detach())
    found, expected = (torch.autograd.grad(x, logits)[0] for x in (mine, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_it_is_not_the_focal_loss() -> None:
    """There the weight has a gradient, too; here it is w times that of cross entropy."""
    _, plain = value(LOGITS, beta=0.0)
    _, slope = value(LOGITS, beta=0.5)
    p = LOGITS.softmax(0)[1]
    torch.testing.assert_close(slope, (1.0 - p) ** 0.5 * plain, rtol=1e-12, atol=1e-14)
    leaf = LOGITS.clone().requires_grad_()
    log_prob = leaf.log_softmax(0)[1]
    (focal,) = torch.autograd.grad(-((1.0 - log_prob.exp()) ** 0.5) * log_prob, leaf)
    assert (focal - slope).abs().max() > 0.1


def test_an_empty_tail_and_an_empty_head() -> None:
    two = torch.tensor([0.3, -0.2], dtype=F64)
    plain, tail = (value(two, 0, k=5, beta=0.0, lam_tail=lam) for lam in (0.0, -0.1))
    assert tail[0] == pytest.approx(plain[0], abs=1e-12)
    torch.testing.assert_close(tail[1], plain[1], rtol=0.0, atol=1e-12)
    plain, head = (value(LOGITS, k=0, beta=0.0, lam_head=lam) for lam in (0.0, 0.1))
    assert torch.equal(head[1], plain[1])


def test_a_sure_token_is_finite() -> None:
    loss, slope = value(torch.tensor([80.0, 0.0], dtype=torch.float32), 0, beta=-0.9)
    assert loss == pytest.approx(0.0)
    assert slope.abs().max() < 1e-20


def test_masked_tokens_do_not_count() -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, torch.inf)])
    loss, stats = shaped_ce(logits, torch.tensor([1, 0]), torch.tensor([1, 0]), beta=-0.25, k=2)
    assert float(loss) == pytest.approx(1.603704, abs=6e-7)
    assert float(stats["nll"]) == pytest.approx(1.506283, abs=6e-7)
    assert float(stats["head_mass"]) == pytest.approx(0.602732, abs=6e-7)
    assert float(stats["tail_mass"]) == pytest.approx(0.134488 + 0.030008 + 0.011039, abs=2e-6)


# -- in other trainers ------------------------------------------------------------------------------------------------


def test_the_loss_of_other_trainers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, dtype=F64, generator=generator)
    labels = torch.tensor([[1, 2, -100, 3], [4, -100, 5, 6]])  # the first one of a row predicts nothing
    outputs = {"logits": logits}
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(trainer_loss(beta=0.0)(outputs, labels), plain)
    whole = trainer_loss(lam_tail=-0.1, k=3)(outputs, labels, 4)
    pieces = [trainer_loss(lam_tail=-0.1, k=3)({"logits": logits[i : i + 1]}, labels[i : i + 1], 4) for i in (0, 1)]
    torch.testing.assert_close(sum(pieces), whole)
    # a piece of a batch may have no label at all
    assert float(trainer_loss(lam_tail=-0.1, k=3)(outputs, torch.full_like(labels, -100), 4)) == 0.0


def test_a_step_of_transformers_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    trainer = transformers.Trainer(model, args, train_dataset=rows, compute_loss_func=trainer_loss(beta=0.5))
    trainer.train()
    assert not torch.equal(before, model.lm_head.weight)


# -- the agent --------------------------------------------------------------------------------------------------------


def test_the_recipes_loss_is_that_of_the_logits() -> None:
    settings: dict[str, Any] = {"model": "tabular", "n_prompts": 6, "group_size": 1}
    agent = DivPrec(RaggedTask(), beta=0.5, lam_head=0.2, lam_tail=-0.3, k=2, **settings)
    data = agent.collector.collect(agent.estimator.plan({}, {}, agent.ctx)[0], agent.policy)
    on = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
    batch = on.epoch(Batching("sequence", "full"), None)[0]
    found = agent.updaters["policy"].gradient(agent.estimator.phases()[0].terms, batch)
    logits = agent.policy.logits[batch["prompt"][:, -1], : batch.shape[0]].transpose(0, 1)
    options: dict[str, float] = {"beta": 0.5, "lam_head": 0.2, "lam_tail": -0.3}
    loss, stats = shaped_ce(logits, batch["action"].clamp_min(0), batch["valid"], k=2, **options)
    (slope,) = torch.autograd.grad(loss, agent.policy.logits)
    torch.testing.assert_close(found.mean, slope.flatten())
    for name in ("nll", "weight", "head_mass", "tail_mass", "entropy"):
        torch.testing.assert_close(found.stats[name], stats[name].float(), rtol=1e-5, atol=1e-6)


def test_without_shaping_it_trains_as_sft() -> None:
    settings: dict[str, Any] = {"model": "tabular", "n_prompts": 6, "learning_rate": 0.1, "weight_decay": 0.0}
    policies = [
        method(RaggedTask(), **settings, **more).learn(18).policy
        for method, more in ((SFT, {}), (DivPrec, {"beta": 0.0}))
    ]
    assert torch.equal(policies[0].logits, policies[1].logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": -1.0}, "beta: expected > -1"),
        ({"k": 5}, "k: expected 100 with lam_head = lam_tail = 0"),
        ({"k": 0, "lam_head": 0.1}, "k: expected at least 1 with lam_head"),
        ({"lam_tail": float("nan")}, "lam_tail: expected"),
        ({"group_size": 2}, "group_size: expected 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivPrecConfig(**settings)


def test_ranks_need_a_token_policy() -> None:
    with pytest.raises(ValueError, match="expected a token policy"):
        DivPrec.Recipe(DivPrecConfig(lam_tail=-0.1), SimpleNamespace(policy=torch.nn.Identity()))


class TestDivPrecContract(RecipeContract):
    method = DivPrec
    published = {
        "beta": -0.25,
        "lam_head": 0.0,
        "lam_tail": 0.0,
        "k": 100,
        "group_size": 1,
        "n_prompts": 128,
        "learning_rate": 3e-4,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "aggregate": "token_mean",
    }
    options = {"group_size": 1, "n_prompts": 6}
    matters = (
        ({}, {"beta": 0.5}),
        ({}, {"lam_head": 0.1}),
        ({}, {"lam_tail": -0.1, "k": 2}),
        ({"lam_tail": -0.1, "k": 2}, {"lam_tail": -0.1, "k": 3}),
    )
    refused = {
        "trl": "trains on demonstrations, and the host samples completions",
        "verl": "trains on demonstrations, and the host samples completions",
    }
    exceptions = {
        "test_finite_differences": "a factor of its loss is detached: the value has another slope",
        "test_equal_rewards_have_no_gradient": "it imitates, whatever the rewards",
        "test_equal_rewards_leave_the_first_policy_alone": "it imitates, whatever the rewards",
    }
