"""OBLR-PO (a reconstruction): the optimal baseline, its estimates and the step size by hand, limits, learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import agents
from agents.llm.oblr_po import (
    OBLRPO,
    GradientNoise,
    OBLRPOConfig,
    OBLRPORecipe,
    ScaledUpdater,
    ScoreBaseline,
    exact_score_norms,
    weighted_advantages,
)
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.groups import Groups
from ccrl.estimators.losses import weighted_ratio
from ccrl.estimators.ratios import token
from ccrl.estimators.terms import Term
from ccrl.llm.policy import token_outputs
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.testing.recipe_contract import RecipeContract
from ccrl.updaters import FlatUpdater, ModuleUpdater

NO_STEP: dict[str, Any] = {"snr_pieces": 0}


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_group(weight: Any, reward: Any, loo: bool) -> Tensor:
    """Advantages of one group of completions."""
    some = torch.ones(1, len(reward), dtype=torch.bool)
    return weighted_advantages(doubles(*reward)[None], doubles(*weight)[None], some, Groups(torch.zeros(len(reward))),
                               loo)[0]  # fmt: skip


def every_answer(theta: Tensor, reward: Tensor) -> tuple[Tensor, Tensor, Data]:
    """Probabilities and exact squared score norms of a table's single tokens, by the code under test."""
    count = len(theta)
    policy = TabularTokenPolicy(1, 1, count, init=theta.view(1, 1, -1))
    data = Data({"valid": torch.ones(1, count).double(), "action": torch.arange(count)[None],
                 "prompt": torch.zeros(count, 1).long(), "episode_reward": reward},
                sequence=frozenset({"prompt", "episode_reward"}))  # fmt: skip
    return theta.softmax(0), exact_score_norms(policy, data), data


# -- the optimal baseline ---------------------------------------------------------------------------------------------


def test_the_optimal_baseline_of_three_answers() -> None:
    theta, reward = doubles(0.5, 0.0, -0.7), doubles(1.0, 0.2, 0.6)
    p, w, _ = every_answer(theta, reward)
    torch.testing.assert_close(p, doubles(0.5242, 0.3179, 0.1579), atol=6e-5, rtol=0)
    torch.testing.assert_close(w, doubles(0.3524, 0.7649, 1.0850), atol=6e-5, rtol=0)
    best, mean = float((p * w) @ reward / (p @ w)), float(p @ reward)
    assert (best, mean) == pytest.approx((0.5610, 0.6825), abs=6e-5)
    gradient = p * (reward - mean)
    size = float(gradient @ gradient)

    def variance(b: float) -> float:
        return float((p * w) @ (reward - b).square()) - size

    assert size == pytest.approx(0.051401, abs=6e-7)
    assert [variance(b) for b in (best, mean, 0.0)] == pytest.approx([0.016154, 0.025003, 0.204724], abs=6e-7)
    # (b* - c)^2 E[w]
    assert variance(mean) - variance(best) == pytest.approx((best - mean) ** 2 * float(p @ w), abs=1e-12)
    rho = [size / (size + variance(best) / n) for n in (1, 4, 16, 64)]
    assert rho == pytest.approx([0.760879, 0.927156, 0.980737, 0.995114], abs=6e-7)


def test_of_two_answers_the_gradient_is_deterministic() -> None:
    theta, reward = doubles(4.0, 1.0).log(), doubles(1.0, -0.5)  # p = 0.8
    p, w, _ = every_answer(theta, reward)
    best = float((p * w) @ reward / (p @ w))
    assert best == pytest.approx(0.2 * 1.0 + 0.8 * -0.5)  # (1 - p) r_1 + p r_2
    samples = (torch.eye(2, dtype=torch.float64) - p) * (reward - best)[:, None]
    torch.testing.assert_close(samples, 0.24 * doubles(1, -1).expand(2, 2))


def test_the_optimal_baseline_is_a_stationary_point() -> None:
    theta, reward = torch.randn(6, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6).double()
    p, w, _ = every_answer(theta, reward)
    b = ((p * w) @ reward / (p @ w)).requires_grad_()
    (slope,) = torch.autograd.grad((p * w * (reward - b).square()).sum(), b)
    assert float(slope) == pytest.approx(0.0, abs=1e-12)


def test_weights_by_hand() -> None:
    """self: (1 + 4) / 10. Others: 4/9, 5/8, 5/7, 1/6."""
    weight, reward = (1, 2, 3, 4), (1, 0, 0, 1)
    torch.testing.assert_close(one_group(weight, reward, False), doubles(0.5, -0.5, -0.5, 0.5))
    expected = doubles(0.5556, -0.6250, -0.7143, 0.8333)
    torch.testing.assert_close(one_group(weight, reward, True), expected, atol=6e-5, rtol=0)


@pytest.mark.parametrize("loo", [False, True])
def test_equal_weights_scales_and_shifts(loo: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, reward = torch.rand(7, generator=generator).tolist(), torch.randn(7, generator=generator).double()
    flat = one_group([2.5] * 7, reward, loo)
    mean = (reward.sum() - reward) / 6 if loo else reward.mean().expand(7)
    torch.testing.assert_close(flat, reward - mean)
    found = one_group(weight, reward, loo)
    torch.testing.assert_close(one_group([3.0 * w for w in weight], reward, loo), found)
    torch.testing.assert_close(one_group(weight, reward + 1e6, loo), found, atol=1e-8, rtol=0)


@pytest.mark.parametrize("loo", [False, True])
def test_equal_rewards_lone_completions_and_weights_of_zero(loo: bool) -> None:
    assert not one_group((0.3, 0.7, 0.1), (0.1, 0.1, 0.1), loo).any()
    assert one_group((0.3,), (0.7,), loo).tolist() == [0.7]
    plain = one_group((1, 1, 1), (1, 0, 0), loo)
    torch.testing.assert_close(one_group((0, 0, 0), (1, 0, 0), loo), plain)
    # the others of the first have no weight: their plain mean
    found = one_group((1, 0, 0), (1, 0, 0.5), loo)
    torch.testing.assert_close(found, doubles(0.75, -1, -0.5) if loo else doubles(0, -1, -0.5))


# -- weights of completions -------------------------------------------------------------------------------------------


def test_the_norm_in_the_logits() -> None:
    pi = doubles(0.6, 0.3, 0.1)
    out = token_outputs(pi.log().expand(3, 3), torch.arange(3), frozenset({"log_prob", "sum_pi2"}), 1.0, 1)
    found = 1.0 - 2.0 * out["log_prob"].exp() + out["sum_pi2"]
    torch.testing.assert_close(found, doubles(0.26, 0.86, 1.26))
    torch.testing.assert_close(found, (torch.eye(3, dtype=torch.float64) - pi).square().sum(1))


def test_squared_probabilities_from_logits() -> None:
    z = doubles(0, 1, 2)
    out = token_outputs(z, torch.tensor(0), frozenset({"sum_pi2", "log_probs"}), 1.0, 1)
    torch.testing.assert_close(out["log_probs"].exp(), doubles(0.0900306, 0.2447285, 0.6652410), atol=6e-8, rtol=0)
    # (1 + e^2 + e^4) / (1 + e + e^2)^2 = 62.987206 / 123.372957
    assert float(out["sum_pi2"]) == pytest.approx(0.5105431, abs=6e-8)
    other = ((2 * z).logsumexp(0) - 2 * z.logsumexp(0)).exp()
    assert float(out["sum_pi2"]) == pytest.approx(float(other), abs=1e-12)


class Given(nn.Module):
    """A policy whose outputs are columns."""

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {name: batch[f"given_{name}"] for name in want}


def three(rollout: Any, **options: Any) -> Data:
    """Rewards 1, 0, 1; garbage where nothing is valid."""
    pi = torch.tensor([[0.5, 0.8, 0.9], [0.6, 0.7, 9.0], [0.4, 0.9, 9.0]], dtype=torch.float64)
    squares = torch.tensor([[0.38, 0.66, 0.82], [0.46, 0.58, 9.0], [0.36, 0.82, 9.0]], dtype=torch.float64)
    reward = torch.tensor([[0, 0, 1], [0, 0, 9], [0, 1, 9]], dtype=torch.float64)
    carry = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
    data = rollout(pi.log(), [[1, 1, 1], [1, 1, 0], [1, 1, 0]], given_sum_pi2=squares, reward=reward, carry=carry,
                   episode_reward=doubles(1, 0, 1))  # fmt: skip
    return ScoreBaseline(OBLRPOConfig(**options), Given())(data)


def test_three_completions_by_hand(rollout: Any) -> None:
    """Tokens weigh .38 .06 .02, .26 .18, .56 .02."""
    loo = three(rollout)
    torch.testing.assert_close(loo["score_norm"], doubles(0.46, 0.44, 0.58))
    torch.testing.assert_close(loo["advantage"][0], doubles(1 - 0.5686275, -1, 1 - 0.5111111), atol=6e-8, rtol=0)
    assert loo["advantage"][2].tolist()[1:] == [0.0, 0.0]
    found = three(rollout, baseline="self")["advantage"][0]
    torch.testing.assert_close(found, doubles(0.2972973, -0.7027027, 0.2972973), atol=6e-8, rtol=0)
    found = three(rollout, baseline="self", baseline_weight="length")["advantage"][0]
    torch.testing.assert_close(found, doubles(1, 0, 1) - 0.7142857, atol=6e-8, rtol=0)


def test_one_baseline_per_position(rollout: Any) -> None:
    """(.38 + .56) / 1.2 and (.44 + .58) / 1.46; the position that one completion reaches has none."""
    found = three(rollout, baseline="self", granularity="token")["advantage"]
    b = doubles(0.7833333, 0.6986301)
    expected = torch.stack([doubles(1, 0, 1) - b[0], doubles(1, 0, 1) - b[1], doubles(1, 0, 0)])
    torch.testing.assert_close(found, expected, atol=6e-8, rtol=0)
    found = three(rollout, granularity="token")["advantage"]
    first = doubles(1 - 0.56 / 0.82, -1, 1 - 0.38 / 0.64)
    second = doubles(1 - 0.58 / 1.02, -1, 1 - 0.44 / 0.88)
    torch.testing.assert_close(found, torch.stack([first, second, doubles(1, 0, 0)]))


def test_a_mean_over_tokens_has_another_score(rollout: Any) -> None:
    found = three(rollout, aggregate="sequence_mean_token_mean")["score_norm"]
    torch.testing.assert_close(found, doubles(0.46 / 9, 0.44 / 4, 0.58 / 4))


def test_the_logit_norm_is_exact_on_tables() -> None:
    """Up to the tokens that share logits: every position has its own."""
    agent = OBLRPO("modsum", model="tabular", n_prompts=4, group_size=4, env_kwargs={"questions": 3}, **NO_STEP)
    with torch.no_grad():
        agent.policy.logits.normal_(generator=torch.Generator().manual_seed(0))
    agent.learner.points()
    data = agent.collector.collect(agent.estimator.parts.request, agent.policy)
    assert "sum_pi2" in data, "the sampler writes it on its way"
    logit = ScoreBaseline(agent.config, agent.policy)(data)["score_norm"]
    torch.testing.assert_close(logit, exact_score_norms(agent.policy, data).float(), rtol=1e-4, atol=1e-6)


def test_exact_weights_need_a_gradient(rollout: Any) -> None:
    with pytest.raises(ValueError, match="expected log-probabilities with a gradient, got constants"):
        ScoreBaseline(OBLRPOConfig(baseline_weight="exact"), Given())(
            rollout(torch.zeros(2, 1), torch.ones(2, 1), episode_reward=doubles(1, 0), given_log_prob=torch.zeros(2, 1))
        )


# -- the step size ----------------------------------------------------------------------------------------------------


def test_noise_of_four_pieces() -> None:
    g = torch.tensor([[1.0, 0.0], [0.6, 0.2], [1.4, -0.2], [1.0, 0.4]], dtype=torch.float64)
    mean = g.mean(0)
    torch.testing.assert_close(mean, doubles(1.0, 0.1))
    summands = g / 4
    variance = GradientNoise.variance(mean @ mean, summands.square().sum(1), torch.full((4,), 0.25).double())
    assert float(variance) == pytest.approx(0.043333, abs=6e-7)
    assert float(GradientNoise().move(mean @ mean, variance)) == pytest.approx(0.957096, abs=6e-7)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1, 1, 1), (1, 2, 3, 1, 4, 2, 1, 2)])
def test_signal_and_noise_are_unbiased(sizes: Any) -> None:
    """Mean (0.3, -0.4), variance 2 / 16 per coordinate of the mean gradient; pieces of unequal size differ in noise."""
    generator = torch.Generator().manual_seed(1)
    share = doubles(*sizes) / sum(sizes)
    noise = torch.randn(100_000, 8, 2, generator=generator, dtype=torch.float64) * (0.125 / share).sqrt()[:, None]
    summands = share[:, None] * (doubles(0.3, -0.4) + noise)
    square, squares = summands.sum(1).square().sum(1), summands.square().sum(2)
    variance = ((squares / share).sum(1) - square) / 7
    for i in range(3):
        assert float(GradientNoise.variance(square[i], squares[i], share)) == pytest.approx(float(variance[i]))
    assert float(variance.mean()) == pytest.approx(0.25, abs=2e-3)
    assert float((square - variance).mean()) == pytest.approx(0.25, abs=5e-3)


def test_averages_floor_and_warmup() -> None:
    noise = GradientNoise(decay=0.5, floor=0.2, warmup=1)
    assert float(noise.move(doubles(5.0).squeeze(), doubles(1.0).squeeze())) == 1.0
    assert (float(noise.signal), float(noise.noise)) == (4.0, 1.0)
    # signal (4 - 2) / 2, noise (1 + 3) / 2
    assert float(noise.move(doubles(1.0).squeeze(), doubles(3.0).squeeze())) == pytest.approx(1 / 3)
    assert float(noise.move(doubles(0.0).squeeze(), doubles(9.0).squeeze())) == pytest.approx(0.2)  # signal below 0
    before = noise.state_dict()
    noise.move(doubles(torch.inf).squeeze(), doubles(1.0).squeeze())
    assert all(torch.equal(noise.state_dict()[k], v) for k, v in before.items())
    sure, nothing = GradientNoise(), GradientNoise(floor=0.05)
    assert float(sure.move(doubles(2.0).squeeze(), doubles(0.0).squeeze())) == 1.0
    assert float(nothing.move(doubles(0.0).squeeze(), doubles(0.0).squeeze())) == 0.05


REINFORCE = (Term("policy", weighted_ratio, aggregates.sequence_mean, token),)


def batch_of(groups: list[int], padded: int = 0) -> Data:
    """One token each; the last ``padded`` columns are not valid."""
    n = len(groups)
    generator = torch.Generator().manual_seed(0)
    valid = (torch.arange(n) < n - padded).double()[None]
    label = torch.tensor(groups)
    data = Data({"valid": valid, "action": torch.randint(5, (1, n), generator=generator), "prompt": label[:, None],
                 "log_prob": torch.full((1, n), 5.0).double().log().neg(), "group": label,
                 "advantage": torch.randn(1, n, generator=generator, dtype=torch.float64)},
                sequence=frozenset({"prompt", "group"}))  # fmt: skip
    return data.epoch(Batching("sequence", "full"), None)[0]


def updater(lr: float = 0.5) -> ModuleUpdater:
    policy = TabularTokenPolicy(8, 1, 5).double()
    return ModuleUpdater(policy, lambda params: torch.optim.SGD(params, lr=lr))


def test_a_step_is_scaled_by_what_the_pieces_say() -> None:
    """Pieces of 2, 2, 1 and 3 completions, by hand from the gradients of each piece."""
    batch = batch_of([0, 0, 1, 1, 2, 3, 3, 3])
    inner, noise = updater(), GradientNoise()
    scaled = ScaledUpdater(inner, noise, 4)
    whole = inner.gradient(REINFORCE, batch).mean
    sizes, pieces = [2, 2, 1, 3], [[0, 1], [2, 3], [4], [5, 6, 7]]
    means = [inner.gradient(REINFORCE, batch.take(torch.tensor(m))).mean * 8 / n for m, n in zip(pieces, sizes)]
    variance = sum(n / 8 * float((g - whole).square().sum()) for g, n in zip(means, sizes)) / 3
    rho = max(0.05, 1.0 - variance / float(whole.square().sum()))
    before = inner.module.logits.detach().clone().flatten()
    stats = scaled.step(REINFORCE, batch)
    assert float(stats["step_factor"]) == pytest.approx(rho)
    assert float(stats["gradient_noise"]) == pytest.approx(variance)
    assert float(stats["loss"]) == pytest.approx(-float(batch["advantage"].mean()))
    assert float(stats["grad_norm"]) == pytest.approx(float(whole.norm()))
    torch.testing.assert_close(inner.module.logits.detach().flatten(), before - 0.5 * rho * whole)
    assert float(scaled.lr) == 0.5


def test_updaters_that_write_over_their_gradients() -> None:
    """One flat vector holds every gradient: each piece's is added before the next."""
    batch = batch_of([0, 0, 1, 1, 2, 3, 3, 3])
    inner = FlatUpdater(TabularTokenPolicy(8, 1, 5).double(), lr=0.5)
    size = inner.gradient(REINFORCE, batch).mean.square().sum()
    stats = ScaledUpdater(inner, GradientNoise(), 4).step(REINFORCE, batch)
    assert float(stats["gradient_signal"] + stats["gradient_noise"]) == pytest.approx(float(size))
    assert float(stats["grad_norm"]) == pytest.approx(float(size.sqrt()))


def test_padding_is_no_completion_and_one_prompt_says_nothing() -> None:
    batches = (batch_of([0, 0, 1, 1, 1, 1]), batch_of([0, 0, 1, 1, 1, 1], padded=2), batch_of([0, 1, 2, 3, 4]))
    shares = [ScaledUpdater(updater(), GradientNoise(), 2).split(batch)[1] for batch in batches]
    assert [share.tolist() for share in shares] == [[2 / 6, 4 / 6], [0.5, 0.5], [0.6, 0.4]]
    noise = GradientNoise()
    assert float(ScaledUpdater(updater(), noise, 4).step(REINFORCE, batch_of([2, 2, 2]))["step_factor"]) == 1.0
    assert float(noise.steps) == 0.0


def test_the_schedule_sees_every_step_of_an_agent() -> None:
    options = {"model": "tabular", "n_prompts": 8, "group_size": 4, "batch_size": 16, "optimiser": "sgd"}
    agent = OBLRPO("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, **options)
    agent.learn(until=3 * agent.samples_per_iteration)
    assert float(agent.estimator.noise.steps) == 6
    assert 0.05 <= float(agent.scalars["train/step_factor"]) <= 1.0
    assert float(agent.learner.updaters["policy"].lr) == pytest.approx(agent.config.learning_rate)


# -- settings and learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_pieces": 1}, "snr_pieces: expected at least 2 .*got 1"),
        ({"snr_decay": 1.0}, r"snr_decay: expected a number in \[0, 1\), got 1.0"),
        ({"snr_pieces": 0, "snr_floor": 0.1}, "snr_floor: expected 0.05 with snr_pieces=0"),
        ({"granularity": "token", "baseline_weight": "exact"}, "baseline_weight: expected 'logit' or 'length'"),
        ({"baseline": "mean"}, "baseline: expected one of 'leave_one_out', 'self', got 'mean'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBLRPOConfig(**options)


def test_learns() -> None:
    options = {"model": "tabular", "n_prompts": 8, "learning_rate": 0.1}
    agent = OBLRPO("easy_hard", seed=0, env_kwargs={"questions": 4, "symbols": 5, "easy": 2}, **options)
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=60 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.9


def test_control_episodes_weigh_by_length_or_exactly() -> None:
    cls = agents.get_agent("grouped")
    options = {"method": "oblr_po", "n_groups": 4, "group_size": 2, "n_steps": 200, "hidden": (8,), "seed": 0}
    with pytest.raises(ValueError, match="'oblr_po' does not fit control tasks: baseline_weight='logit' reads"):
        cls("CartPole-v1", **options)
    for weight in ("length", "exact"):
        agent = cls("CartPole-v1", baseline_weight=weight, **options)
        start = [p.detach().clone() for p in agent.policy.parameters()]
        agent.learn(until=agent.samples_per_iteration)
        assert any(not torch.equal(a, b) for a, b in zip(start, agent.policy.parameters()))
        assert 0.05 <= float(agent.scalars["train/step_factor"]) <= 1.0


# -- contract ---------------------------------------------------------------------------------------------------------


class TestOBLRPOContract(RecipeContract):
    method = OBLRPO
    published = {  # of the reconstruction
        "baseline_weight": "logit",
        "baseline": "leave_one_out",
        "granularity": "sequence",
        "snr_pieces": 4,
        "snr_decay": 0.9,
        "snr_floor": 0.05,
        "snr_warmup": 0,
        "aggregate": "sequence_mean",
    }
    on_policy = staticmethod(aggregates.sequence_mean)
    matters = (
        ({}, {"baseline_weight": "length"}),
        ({"aggregate": "sequence_mean_token_mean"}, {"aggregate": "sequence_mean"}),
        ({}, {"baseline": "self"}),
        ({}, {"granularity": "token"}),
    )
    refused = {"trl": "steps by a rule of its own", "verl": "steps by a rule of its own"}
    hosted = {host: {"snr_pieces": 0, "baseline_weight": "length"} for host in ("trl", "verl")}


def test_the_recipe_without_a_schedule_has_the_agents_updater() -> None:
    agent = OBLRPO("modsum", model="tabular", **NO_STEP)
    assert agent.estimator.phases()[0].updater is agent.learner.updaters["policy"]
    assert not agent.estimator.state_dict()
    assert isinstance(replace(OBLRPO)("modsum", model="tabular").estimator, OBLRPORecipe)
