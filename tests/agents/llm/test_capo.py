"""CAPO: the second-order model by hand and against the true step, masks, moments, limits in which it is GRPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from agents.grouped import Grouped
from agents.llm.baselines import GRPO, GRPOConfig
from agents.llm.capo import CAPO, CAPOConfig, Moments, Prediction, Tokens, acceptable, predict
from ccrl.estimators.evaluate import loss_of
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

WEIGHT, HIDDEN = [[0.5, -0.2], [0.1, 0.3], [-0.4, 0.6]], [1.0, 2.0]
INF = math.inf
NEVER = {"fisher_threshold": INF, "objective_threshold": INF}
SIZE = {"model_layers": 1, "model_width": 16, "model_heads": 2}


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def tokens(weight: Tensor, hidden: Tensor, action: Tensor, advantage: Tensor) -> Tokens:
    """With every row of the last layer kept."""
    log_prob = (hidden @ weight.t()).log_softmax(1)
    index = torch.arange(len(weight)).expand(len(hidden), -1)
    chosen = log_prob.gather(1, action.unsqueeze(1)).squeeze(1)
    return Tokens.of(hidden, index, log_prob, action, chosen, advantage)


@pytest.fixture
def one() -> Tokens:
    return tokens(double(WEIGHT), double([HIDDEN]), torch.tensor([1]), double([1.5]))


# -- the model --------------------------------------------------------------------------------------------------------


def test_a_token_by_hand(one: Tokens) -> None:
    near = {"atol": 6e-7, "rtol": 0.0}
    torch.testing.assert_close(one.pi[0], double([0.206788, 0.376792, 0.416420]), **near)
    torch.testing.assert_close(one.error[0], double([-0.206788, 0.623208, -0.416420]), **near)
    # |h|^2 = 5, so that u = 1.5 * 5 v, |g|^2 = 2.25 * 5 |v|^2
    u = 7.5 * one.error[0]
    torch.testing.assert_close(u, double([-1.550910, 4.674058, -3.123149]), atol=4e-6, rtol=0)
    assert float(one.gradient.square().sum()) == pytest.approx(6.801240, abs=6e-7)
    assert float(one.error[0] @ u) == pytest.approx(4.534160, abs=6e-7)
    spread = float(one.pi[0] @ u.square() - (one.pi[0] @ u) ** 2)
    assert spread == pytest.approx(12.771315, abs=6e-7)
    curvature = 1.5 * (float(one.error[0] @ u) ** 2 - spread)
    assert curvature == pytest.approx(11.680936, abs=6e-7)
    found = predict(one, 0.1)
    assert float(found.objective) == pytest.approx(0.738529, abs=6e-7)  # 0.6801240 + 0.005 * 11.680936
    assert float(found.fisher) == pytest.approx(0.102793, abs=6e-7)  # 0.005 * 4.534160^2


def moved(one: Tokens, lr: float) -> Tensor:
    """Log-probabilities ``[3]`` after the step."""
    return (double(HIDDEN) @ (double(WEIGHT) + lr * one.gradient[0]).t()).log_softmax(0)


@pytest.mark.parametrize(
    ("lr", "error"), [(0.1, -2.841e-2), (0.05, -3.383e-3), (0.025, -4.083e-4), (0.0125, -5.000e-5)]
)
def test_the_error_is_of_third_order(one: Tokens, lr: float, error: float) -> None:
    true = 1.5 * float(moved(one, lr)[1].exp() / one.pi[0, 1]) - 1.5
    if lr == 0.1:
        assert true == pytest.approx(0.710114, abs=6e-7)
    assert true - float(predict(one, lr).objective) == pytest.approx(error, rel=2e-4)


def test_the_samples_of_the_kl_average_to_its_quadratic(one: Tokens) -> None:
    u = 7.5 * one.error[0]
    errors = torch.eye(3, dtype=torch.float64) - one.pi[0]
    expected = float(one.pi[0] @ (errors @ u).square())
    assert expected == pytest.approx(12.771315, abs=6e-7)
    assert 0.005 * expected == pytest.approx(0.063857, abs=6e-7)
    new = moved(one, 0.1)
    assert float(one.pi[0] @ (one.pi[0].log() - new)) == pytest.approx(0.065837, abs=6e-7)


def test_adams_step(one: Tokens) -> None:
    moments = Moments()
    moments.first, moments.second = torch.full((3, 2), 0.01).double(), torch.full((3, 2), 0.04).double()
    moments.steps = 3
    expected = double([[-0.020217, -0.048523], [0.093198, 0.172752], [-0.048911, -0.104549]])
    torch.testing.assert_close(moments.step(one)[0], expected, atol=6e-7, rtol=0)
    step = moments.step(one)[0]
    assert float((one.gradient[0] * step).sum()) == pytest.approx(0.607636, abs=6e-7)
    assert float(one.error[0] @ step @ double(HIDDEN)) == pytest.approx(0.405091, abs=6e-7)
    found = predict(one, 1e-3, moments)
    assert float(found.objective) == pytest.approx(6.076829e-4, abs=6e-11)
    assert float(found.fisher) == pytest.approx(8.204930e-8, abs=6e-14)


def some(count: int = 400, seed: int = 0) -> tuple[Tensor, Tokens]:
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, hidden = draw(10, 16) / 2, draw(count, 16) / 4
    action = torch.distributions.Categorical(logits=hidden @ weight.t()).logits.argmax(1)
    action = torch.where(draw(count) > 0, action, torch.randint(10, (count,), generator=generator))
    return weight, tokens(weight, hidden, action, draw(count))


def test_plain_ascent_in_closed_form() -> None:
    """v.u = A |v|^2 |h|^2; m_F = lr^2 A^2 |v|^4 |h|^4 / 2, whatever the sign of A; so without moments yet."""
    _, found = some(20)
    size, v2 = found.hidden.square().sum(1), found.error.square().sum(1)
    expected = 0.5 * 0.25 * (found.advantage * v2 * size).square()
    torch.testing.assert_close(predict(found, 0.5).fisher, expected)
    torch.testing.assert_close(predict(found._replace(advantage=-found.advantage), 0.5).fisher, expected)
    empty = Moments()
    torch.testing.assert_close(empty.step(found), found.gradient)
    assert all(torch.equal(a, b) for a, b in zip(predict(found, 0.5), predict(found, 0.5, empty)))


def test_the_order_of_tokens_is_that_of_the_true_kl() -> None:
    """Steps of single tokens: rank correlation of the prediction and the exact KL above 0.9."""
    weight, found = some()
    new = torch.einsum("mh,mvh->mv", found.hidden, weight + 0.5 * found.gradient).log_softmax(1)
    kl = (found.pi * (found.pi.log() - new)).sum(1)
    ranks = torch.stack([x.argsort().argsort().double() for x in (predict(found, 0.5).fisher, kl)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_a_token_that_is_not_among_the_most_probable() -> None:
    """It takes the place of the last: three of logits (0, 1, 2, 3) and token 0 in place of token 1."""
    log_prob = double([[3.0, 2.0, 1.0]]) - double([3.0, 2.0, 1.0, 0.0]).logsumexp(0)
    chosen = 0.0 - double([3.0, 2.0, 1.0, 0.0]).logsumexp(0)
    made = Tokens.of(
        double([[1.0]]), torch.tensor([[3, 2, 1]]), log_prob, torch.tensor([0]), chosen.view(1), double([1])
    )
    assert made.rows.tolist() == [[3, 2, 0]]
    torch.testing.assert_close(made.pi[0], double([3.0, 2.0, 0.0]).softmax(0))
    torch.testing.assert_close(made.error[0], double([0, 0, 1]) - made.pi[0])


# -- thresholds -------------------------------------------------------------------------------------------------------


def test_thresholds_are_strict() -> None:
    prediction = Prediction(
        double([0.002, -0.02, 0.009, 0.011, -0.0005, 0.004]), double([5e-5, 1e-5, 2e-4, 1e-5, 9e-5, 1e-4])
    )
    kept = torch.stack(acceptable(prediction, 1e-4, 0.01)).all(0)
    assert kept.tolist() == [True, False, False, False, True, False]
    one_sided = torch.stack(acceptable(prediction, 1e-4, 0.01, symmetric=False)).all(0)
    assert one_sided.tolist() == [True, False, False, False, False, False]


def rows(seed: int = 0) -> dict[str, Any]:
    """Two prompts of four completions of up to three tokens, seen through hidden states of four numbers."""
    generator = Generator().manual_seed(seed)
    hidden = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    log_probs = (hidden @ weight.t()).log_softmax(-1)
    top = log_probs.topk(4, dim=-1)
    action = torch.randint(6, (3, 8), generator=generator)
    old = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    return {
        "log_prob": old, "old_log_prob": old, "mask": torch.arange(3)[:, None] < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3]),
        "reward": torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 1]), "group": torch.arange(8) // 4, "hidden": hidden,
        "action": action, "topk_index": top.indices, "topk_log_prob": top.values,
    }  # fmt: skip


def config(**options: Any) -> CAPOConfig:
    return CAPOConfig(**{"modelled_step": 0.1, "warm_up_iterations": 0, "curvature": "sgd"} | options)


def test_without_thresholds_or_steps_it_is_grpo() -> None:
    plain = {k: v for k, v in rows().items() if k not in ("hidden", "action", "topk_index", "topk_log_prob")}
    expected = loss_of(GRPO, GRPOConfig(), **plain)
    small = {"fisher_threshold": 1e-6, "objective_threshold": 1e-6}
    for options in (NEVER, small | {"modelled_step": 1e-12}, small | {"warm_up_iterations": 1}):
        for curvature in ("sgd", "adam"):
            found = loss_of(CAPO, config(**options, curvature=curvature), **rows())
            assert found.loss == expected.loss
            assert torch.equal(found.gradient, expected.gradient)


def test_a_token_that_is_left_out_does_not_count() -> None:
    """Sequence means over what is kept: the others weigh more."""
    given = rows()
    whole = loss_of(CAPO, config(**NEVER), **given)
    assert whole.advantage is not None
    full = {k: v[given["mask"]] if v.shape[:2] == (3, 8) else v for k, v in given.items() if isinstance(v, Tensor)}
    made = Tokens.of(full["hidden"], full["topk_index"], full["topk_log_prob"], full["action"], full["log_prob"],
                     whole.advantage[given["mask"]])  # fmt: skip
    fisher = predict(made, 0.1).fisher
    threshold = float(fisher.sort().values[-2:].mean())  # between the largest two
    cut = loss_of(CAPO, config(fisher_threshold=threshold, objective_threshold=INF), **given)
    gone = torch.zeros(3, 8, dtype=torch.bool)
    gone[given["mask"]] = fisher >= threshold
    assert int(gone.sum()) == 1
    assert not cut.gradient[gone].any()
    t, n = (int(x) for x in gone.nonzero()[0])
    length = int(given["mask"][:, n].sum())
    others = given["mask"][:, n].clone()
    others[t] = False
    if length > 1:
        torch.testing.assert_close(cut.gradient[others, n], whole.gradient[others, n] * length / (length - 1))
    rest = torch.arange(8) != n
    assert torch.equal(cut.gradient[:, rest], whole.gradient[:, rest])


def test_everything_left_out_is_no_update() -> None:
    agent = CAPO(RaggedTask(), n_prompts=3, group_size=4, fisher_threshold=1e-30, warm_up_iterations=0, seed=0, **SIZE)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(until=12)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    assert float(agent.scalars["train/rejected_share"]) > 0.99
    assert agent.estimator.moments.steps == 0  # and there never will be any: hence the warm-up


# -- moments ----------------------------------------------------------------------------------------------------------


def test_moments_move_by_the_mean_of_what_touched_a_row() -> None:
    """Row 0 twice, row 2 once, row 1 never."""
    moments = Moments()
    total, count = double([[2.0, 4.0], [0.0, 0.0], [5.0, 0.0]]), double([2.0, 0.0, 1.0])
    moments.move(total, count)
    torch.testing.assert_close(moments.first, double([[0.1, 0.2], [0.0, 0.0], [0.5, 0.0]]))
    torch.testing.assert_close(moments.second, double([[0.001, 0.004], [0.0, 0.0], [0.025, 0.0]]))
    moments.move(double([[1.0, 1.0]]), double([1.0]))
    assert moments.steps == 2
    torch.testing.assert_close(moments.first, double([[0.19, 0.28], [0.0, 0.0], [0.5, 0.0]]))


def test_moments_are_of_the_kept_tokens_and_of_any_piece() -> None:
    """Of one rollout, in pieces of four sequences or whole; the state is in checkpoints."""
    found = []
    for microbatch in (0, 4):
        agent = CAPO(RaggedTask(), n_prompts=3, group_size=4, microbatch=microbatch, seed=0, **SIZE)
        agent.learn(until=3 * 12)
        found.append(agent.estimator.moments)
    assert found[0].steps == found[1].steps == 3
    torch.testing.assert_close(found[0].first, found[1].first, atol=1e-6, rtol=1e-4)
    assert float(found[0].first.abs().max()) > 1e-3
    other = Moments()
    other.load_state_dict(found[0].state_dict())
    assert torch.equal(other.first, found[0].first)
    assert other.steps == 3


def test_every_optimiser_step_moves_the_moments() -> None:
    """Two epochs over 12 sequences in batches of 4, each in pieces of 2: six steps, and twice 12 sequences' tokens."""
    agent = CAPO(RaggedTask(), n_prompts=3, group_size=4, batch_size=4, n_epochs=2, microbatch=2, seed=0, **SIZE)
    agent.learn(until=12)
    assert agent.estimator.moments.steps == 6
    counts = torch.stack(agent.estimator._stats)
    assert int(counts[:, 0].sum()) == 2 * agent.collector.tokens
    assert len(counts) == 12


def test_moments_of_a_bfloat16_model_are_float32() -> None:
    agent = CAPO(RaggedTask(), n_prompts=2, group_size=2, dtype="bfloat16", lora_rank=1, seed=0, **SIZE)
    agent.learn(8)
    assert agent.estimator.moments.steps == 2
    assert agent.estimator.moments.first.dtype == torch.float32


# -- what it needs ----------------------------------------------------------------------------------------------------


def test_policies_without_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"capo reads \['hidden'\] of the policy"):
        CAPO("modsum", model="tabular")
    with pytest.raises(ValueError, match="does not fit control tasks: capo reads"):
        Grouped("CartPole-v1", method="capo")
    with pytest.raises(ValueError, match="modelled_step: expected a number where there is no optimiser"):
        loss_of(CAPO, CAPOConfig(warm_up_iterations=0), **rows())
    assert isinstance(CAPO(RaggedTask(), **SIZE).policy, nn.Module)


@pytest.mark.parametrize("name", ["fisher_threshold", "objective_threshold", "modelled_step"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CAPOConfig(**{name: 0.0})


class TestCAPOContract(RecipeContract):
    method = CAPO
    model = "tiny"
    published = {
        "aggregate": "sequence_mean_token_mean",
        "curvature": "adam",
        "fisher_threshold": 1e-4,
        "objective_threshold": 0.01,
        "symmetric": True,
        "warm_up_iterations": 1,
        "modelled_step": None,
    }
    options = {"warm_up_iterations": 0, "fisher_threshold": 0.05, "objective_threshold": 1.0}
    matters = (
        ({}, {"warm_up_iterations": 1}),
        ({}, {"fisher_threshold": 0.5}),
        ({}, {"modelled_step": 0.001}),
    )
    refused = dict.fromkeys(("trl", "verl"), "wants ['hidden', 'topk_index', 'topk_log_prob']")
    exceptions = {
        "test_trains_and_resumes_on_a_bandit": "a table has no hidden states",
        "test_finite_differences": "the tiny model's norms are in float32: GRPO's differences fail on it as well",
    }
