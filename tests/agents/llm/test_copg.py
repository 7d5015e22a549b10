"""CoPG: numbers by hand, three forms with one gradient, other methods as special cases, learning off policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import envs  # noqa: F401  (registers the tasks)
from agents.llm.copg import CoPG, CoPGConfig, CoPGRecipe, contrast
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.recipe import Parts
from ccrl.estimators.stages import GroupBaseline
from ccrl.estimators.terms import surrogate
from ccrl.testing.recipe_contract import RecipeContract

F64 = torch.float64
REWARD = torch.tensor([1.0, 0.3, -0.5], dtype=F64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=F64).log()
FIRST, SECOND = torch.tensor([0.7, 0.2, 0.1], dtype=F64), torch.tensor([0.1, 0.1, 0.8], dtype=F64)
LOGITS = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
OPTIMUM = torch.tensor([0.591306, 0.364535, 0.044159], dtype=F64)
FORMS = ("square", "bilinear", "policy_gradient")


def all_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nine ordered pairs of arms: arms ``[18]``, their pair, and the pair's probability."""
    left, right = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
    pair = torch.arange(9)
    return torch.cat([left, right]), torch.cat([pair, pair]), (first[left] * second[right]).repeat(2)


def expected_loss(
    logits: Tensor, first: Tensor, second: Tensor, form: Any = "square", beta: float = 0.5, reward: Tensor = REWARD
) -> Tensor:
    arm, pair, weight = all_pairs(first, second)
    log_prob = logits.log_softmax(0)[arm]
    return (weight * contrast(log_prob, REFERENCE[arm], reward[arm], pair, torch.ones(18), beta, form)).sum()


def slope(fn: Callable[[Tensor], Tensor], at: Tensor = LOGITS) -> Tensor:
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(fn(leaf), leaf)[0]


def minimiser(fn: Callable[[Tensor], Tensor], steps: int = 4000, rate: float = 0.3) -> Tensor:
    logits = torch.zeros(3, dtype=F64)
    for _ in range(steps):
        logits -= rate * slope(fn, logits)
    return logits.softmax(0)


def near(found: Tensor, expected: Any, atol: float = 6e-7) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=F64), atol=atol, rtol=0)


# -- three arms -----------------------------------------------------------------------------------------------------


def test_optimum() -> None:
    near((REFERENCE + REWARD / 0.5).softmax(0), OPTIMUM)


@pytest.mark.parametrize("mus", [(FIRST, SECOND), (SECOND, SECOND), (torch.full((3,), 1 / 3, dtype=F64), FIRST)])
def test_every_behaviour_has_the_same_minimiser(mus: tuple[Tensor, Tensor]) -> None:
    found = minimiser(lambda z: expected_loss(z, *mus), steps=400, rate=1.5)
    near(found, OPTIMUM, 1e-6)
    at_optimum = expected_loss((REFERENCE + REWARD / 0.5).log_softmax(0), *mus)
    assert float(at_optimum) == pytest.approx(0.0, abs=1e-12)


def test_values_and_gradients_of_two_behaviours() -> None:
    assert float(-expected_loss(LOGITS, FIRST, SECOND, "bilinear")) == pytest.approx(0.3713144986, abs=6e-11)
    assert float(expected_loss(LOGITS, FIRST, SECOND, "square")) == pytest.approx(1.0640855014, abs=6e-11)
    for form in FORMS:
        near(slope(lambda z, form=form: -expected_loss(z, FIRST, SECOND, form)), [0.681709, 0.205653, -0.887363])


def test_on_policy_it_is_twice_the_gradient_of_the_objective() -> None:
    pi = LOGITS.softmax(0)
    found = slope(lambda z: -expected_loss(z, pi, pi))
    near(found, [0.331628, 0.205216, -0.536844])

    def objective(z: Tensor) -> Tensor:
        log_pi = z.log_softmax(0)
        return (log_pi.exp() * (REWARD - 0.5 * (log_pi - REFERENCE))).sum()

    torch.testing.assert_close(found, 2.0 * slope(objective), atol=1e-12, rtol=0)


def test_regularised_rewards_and_one_pair() -> None:
    log_prob = LOGITS.log_softmax(0)
    regularised = REWARD - 0.5 * (log_prob - REFERENCE)
    near(regularised, [0.638251, 0.646396, -0.559017])
    assert float(regularised[0] - regularised[2]) == pytest.approx(1.197267, abs=6e-7)
    arm = torch.tensor([0, 2])
    element = contrast(log_prob[arm], REFERENCE[arm], REWARD[arm], torch.zeros(2), torch.ones(2), 0.5)
    assert float(element.sum()) == pytest.approx(1.4334493371, abs=6e-11)


def test_nine_pairs_add_up_to_the_expectation() -> None:
    arm, pair, weight = all_pairs(FIRST, SECOND)
    total = torch.zeros(3, dtype=F64)
    for p in range(9):
        of = (pair == p).nonzero().squeeze(1)

        def loss(z: Tensor, of: Tensor = of) -> Tensor:
            a = arm[of]
            return contrast(z.log_softmax(0)[a], REFERENCE[a], REWARD[a], pair[of], torch.ones(2), 0.5).sum()

        total -= weight[of[0]] * slope(loss)
    near(total, [0.681709, 0.205653, -0.887363])


def test_baselines_and_scales() -> None:
    base = slope(lambda z: expected_loss(z, FIRST, SECOND))
    shifted = slope(lambda z: expected_loss(z, FIRST, SECOND, reward=REWARD + 7.0))
    torch.testing.assert_close(shifted, base, atol=1e-12, rtol=0)
    for form in FORMS:
        one = slope(lambda z, form=form: expected_loss(z, FIRST, SECOND, form))
        three = slope(lambda z, form=form: expected_loss(z, FIRST, SECOND, form, 1.5, 3.0 * REWARD))
        torch.testing.assert_close(three, 3.0 * one, atol=1e-12, rtol=0)


def test_limits_of_beta() -> None:
    # large: the gradient vanishes at the reference (to order 1 / beta of the curvature); small: at the best arm
    flat = minimiser(lambda z: expected_loss(z, FIRST, SECOND, beta=200.0) / 200.0, 300, 1.0)
    near(flat, REFERENCE.exp(), 5e-3)
    near((REFERENCE + REWARD / 0.02).softmax(0), [1.0, 0.0, 0.0], 1e-12)
    sharp = (REFERENCE + REWARD / 0.02).log_softmax(0)
    near(slope(lambda z: expected_loss(z, FIRST, SECOND, beta=0.02), sharp), [0.0, 0.0, 0.0], 1e-9)


def test_full_regularised_reward_in_the_bilinear_form_doubles_beta() -> None:
    """The factor that the half of beta is there for: without it the minimiser is that of twice beta."""

    def doubled(z: Tensor) -> Tensor:
        arm, _, weight = all_pairs(FIRST, SECOND)
        log_ratio = z.log_softmax(0)[arm] - REFERENCE[arm]
        regularised = REWARD[arm] - 0.5 * log_ratio
        left, right = slice(0, 9), slice(9, 18)
        difference = (regularised[left] - regularised[right]) * (log_ratio[left] - log_ratio[right])
        return -(weight[:9] * difference).sum()

    near(minimiser(doubled, 400, 1.0), (REFERENCE + REWARD).softmax(0), 1e-6)


def test_stale_pairs_do_not_diverge() -> None:
    generator = torch.Generator().manual_seed(0)
    arm = torch.multinomial(torch.tensor([0.4, 0.3, 0.3]), 64, replacement=True, generator=generator)
    group = torch.arange(64) // 4
    logits, values = torch.zeros(3, dtype=F64), []
    for _ in range(50):
        leaf = logits.clone().requires_grad_()
        loss = contrast(leaf.log_softmax(0)[arm], REFERENCE[arm], REWARD[arm], group, torch.ones(64), 0.5).sum() / 16
        values.append(float(loss.detach()))
        logits -= 0.3 * torch.autograd.grad(loss, leaf)[0]
    assert all(b <= a for a, b in itertools.pairwise(values))
    near(logits.softmax(0), OPTIMUM, 0.02)


# -- groups ---------------------------------------------------------------------------------------------------------


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, references, rewards and labels of groups of 1 to 6, shuffled."""
    torch.manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 2, 3, 4, 5, 6]))[torch.randperm(21)]
    return -3 * torch.rand(21, dtype=F64), -3 * torch.rand(21, dtype=F64), torch.randn(21, dtype=F64), group


def pair_by_pair(log_prob: Tensor, log_ref: Tensor, reward: Tensor, group: Tensor, beta: float, form: str) -> Tensor:
    """Mean over pairs, summed over groups, with loops."""
    total = log_prob.new_zeros(())
    for label in group.unique():
        members = (group == label).nonzero().squeeze(1).tolist()
        pairs = [(i, j) for i in members for j in members if i > j]
        for i, j in pairs:
            d = (log_prob[i] - log_ref[i]) - (log_prob[j] - log_ref[j])
            r = reward[i] - reward[j]
            value = {
                "square": (r - beta * d) ** 2 / (2 * beta),
                "bilinear": -(r - 0.5 * beta * d) * d,
                "policy_gradient": -(r - beta * d).detach() * (log_prob[i] - log_prob[j]),
            }[form]
            total = total + value / len(pairs)
    return total


@pytest.mark.parametrize("form", FORMS)
def test_ragged_groups_are_sums_over_pairs(form: Any) -> None:
    log_prob, log_ref, reward, group = ragged()
    found = slope(lambda z: contrast(z, log_ref, reward, group, torch.ones(21), 0.7, form).sum(), log_prob)
    expected = slope(lambda z: pair_by_pair(z, log_ref, reward, group, 0.7, form), log_prob)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    value = contrast(log_prob, log_ref, reward, group, torch.ones(21), 0.7, form).sum()
    torch.testing.assert_close(value, pair_by_pair(log_prob, log_ref, reward, group, 0.7, form), atol=1e-10, rtol=0)
    square = slope(lambda z: contrast(z, log_ref, reward, group, torch.ones(21), 0.7).sum(), log_prob)
    torch.testing.assert_close(found, square, atol=1e-10, rtol=0)
    # a group of one has neither loss nor gradient
    alone = group == 0
    assert found[alone].tolist() == [0.0]
    assert contrast(log_prob, log_ref, reward, group, torch.ones(21), 0.7, form)[alone].tolist() == [0.0]
    order = torch.randperm(21)
    moved = slope(
        lambda z: contrast(z, log_ref[order], reward[order], group[order], torch.ones(21), 0.7, form).sum(),
        log_prob[order],
    )
    torch.testing.assert_close(moved, found[order], atol=1e-12, rtol=0)


def test_it_is_leave_one_out_on_regularised_rewards() -> None:
    log_prob, log_ref, reward, group = ragged(1)
    regularised = reward - 0.7 * (log_prob - log_ref)
    baseline = GroupBaseline(baseline="leave_one_out", single="zero").advantages(regularised, group)
    size = torch.tensor([1, 2, 3, 4, 5, 6], dtype=F64)[group]
    found = slope(lambda z: -contrast(z, log_ref, reward, group, torch.ones(21), 0.7).sum(), log_prob)
    torch.testing.assert_close(found, 2.0 * baseline / size, atol=1e-12, rtol=0)


def test_ipo_is_the_case_of_rewards_half_apart() -> None:
    tau, delta = 0.1, 3.0
    log_prob = torch.tensor([delta, 0.0], dtype=F64)
    reward = torch.tensor([0.5, 0.0], dtype=F64)
    square = contrast(log_prob, torch.zeros(2), reward, torch.zeros(2), torch.ones(2), tau).sum()
    assert float((delta - 1 / (2 * tau)) ** 2) == pytest.approx(4.0)
    assert float(square * 2 * tau / tau**2) == pytest.approx(4.0)


# -- the recipe -----------------------------------------------------------------------------------------------------


def example(batch: Any, **more: Any) -> Data:
    """Two prompts with two completions, a third with one; lengths 2, 1, 2, 2, 1."""
    old = [[-1.0, -1.0], [-1.0, 0.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, 0.0]]
    columns = {
        "episode_reward": torch.tensor([1.0, 0.0, 0.5, 0.0, 9.0], dtype=F64),
        "group": torch.tensor([4, 4, 7, 7, 5]),
    }
    reference = [[-0.5, -0.5], [-0.5, 0.0], [-1.0, -2.0], [-0.5, -0.5], [-1.0, 0.0]]
    return batch(old, [[1, 1], [1, 0], [1, 1], [1, 1], [1, 0]], ref_log_prob=reference, **columns | more)


def test_value_by_hand(recipe: Any, rollout: Any, value_and_gradient: Any) -> None:
    """R_beta with beta 0.5: (1.5, 0.25) and (0, 0.5): squares 1.5625 and 0.25, mean, over 2 beta."""
    made = recipe(CoPGRecipe, CoPGConfig())
    data = example(rollout)
    for stage in made.stages():
        data = stage(data)
    assert data["group"].tolist() == [4, 4, 7, 7]
    data = data.epoch(Batching("group", "full"), None)[0]
    value, gradient = value_and_gradient(made, [[-1.0, -1.0], [-1.0, -9.0], [-1.0, -1.0], [-1.0, -1.0]], data)
    assert value == pytest.approx((1.25**2 + 0.5**2) / 2, abs=1e-12)
    # -2/k (R_i - mean of the others) over 2 prompts; tokens of one completion alike, padding none
    expected = [[-0.625, -0.625], [0.625, 0.0], [0.25, 0.25], [-0.25, -0.25]]
    near(gradient, expected, 1e-12)


def test_every_prompt_alone_is_left_as_it_is(recipe: Any, batch: Any, value_and_gradient: Any) -> None:
    made = recipe(CoPGRecipe, CoPGConfig())
    data = example(batch, group=torch.arange(5))
    for stage in made.stages():
        data = stage(data)
    value, gradient = value_and_gradient(made, torch.full((5, 2), -1.0), data.epoch(Batching("group", "full"), None)[0])
    assert value == 0.0
    assert not gradient.any()


def test_padding_and_micro_batches_change_nothing(recipe: Any, rollout: Any) -> None:
    made = recipe(CoPGRecipe, CoPGConfig())
    data = made.stages()[0](example(rollout))
    terms = made.phases()[0].terms
    seen = torch.tensor([[-1.0, -0.7], [-0.2, -9.0], [-2.0, -1.0], [-1.0, -1.5]], dtype=F64).t()

    def gradient(piece: Data, log_prob: Tensor) -> Tensor:
        leaf = log_prob.clone().requires_grad_()
        return torch.autograd.grad(surrogate(terms, {"log_prob": leaf}, piece)[0], leaf)[0]

    whole = data.epoch(Batching("group", "full"), None)[0]
    expected = gradient(whole, seen)
    pieces = [gradient(p, s) for p, s in zip(whole.microbatches(2), seen.split(2, 1))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-12, rtol=0)
    index = torch.tensor([0, 1, 2, 3, 3])
    wider = whole.take(index)
    valid = wider["valid"].clone()
    valid[:, -1] = 0.0
    columns = {k: wider[k] for k in wider} | {"valid": valid}
    wider = Data(columns, sequence=wider.sequence, scalars=wider.scalars)
    found = gradient(wider, torch.cat([seen, torch.full((2, 1), -math.inf, dtype=F64)], 1))
    torch.testing.assert_close(found[:, :4], expected, atol=1e-12, rtol=0)
    assert not found[:, 4].any()


def test_bad_settings_are_refused() -> None:
    for settings, message in (
        ({"beta": 0.0}, "beta: expected > 0"),
        ({"form": "cube"}, "form: expected one of"),
        ({"behaviours": ()}, "behaviours: expected at least one"),
        ({"group_size": 1}, "group_size: expected at least two"),
        ({"kl_coef": 0.1}, "kl_coef: expected 0"),
        ({"microbatch": 6}, "microbatch: expected a multiple of the 4"),
        ({"behaviours": ("live", "ref"), "microbatch": 4}, "microbatch: expected a multiple of the 8"),
    ):
        with pytest.raises(ValueError, match=message):
            CoPGConfig(**settings)
    assert CoPGConfig(group_size=1, behaviours=("live", "ref"), microbatch=4).group_size == 1


def test_the_reference_of_a_model_with_adapters_samples_too() -> None:
    """The base model with the adapters as they were: half of the completions are its own."""
    pytest.importorskip("peft")
    tiny = {"model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2, "lora_rank": 2}
    settings = {"behaviours": ("live", "ref"), "n_prompts": 2, "group_size": 2, "learning_rate": 0.05}
    agent = CoPG("arithmetic", **tiny, **settings, max_new_tokens=4)
    agent.learn(until=agent.samples_per_iteration)
    with torch.no_grad():  # rewards that are all equal move nothing
        for p in agent.policy.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    live = agent.policy.state_dict()
    before = {name: x.clone() for name, x in live.items()}
    request = Request(counts=torch.tensor([3, 3]))
    data = agent.collector.collect(request, agent.ctx.bank.policy("ref"))
    scored = agent.ctx.bank.policy("ref")(data, frozenset({"log_prob"}))["log_prob"]
    own = agent.policy(data, frozenset({"log_prob"}))["log_prob"]
    valid = data["valid"] > 0
    torch.testing.assert_close(scored[valid], data["log_prob"][valid], atol=1e-5, rtol=0.0)
    assert not torch.allclose(own[valid], data["log_prob"][valid], atol=1e-3), "the policy has moved"
    assert all(torch.equal(x, before[name]) for name, x in live.items()), "sampling from it changes nothing"
    assert agent.ctx.bank.state_dict() == {}, "the learner saves it"


def test_episodes_of_two_behaviours_would_have_other_starts() -> None:
    """Equal group labels would compare episodes that have nothing in common."""
    config = CoPGConfig(behaviours=("live", "ref"))
    parts = Parts(torch.nn.Identity(), None, Request(episodes=8, horizon=3, groups=2), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="behaviours: expected one on control tasks"):
        CoPGRecipe(config, parts)
    assert CoPGRecipe(replace(config, behaviours=("ref",)), parts).parts is parts


# -- the agent ------------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"model": "tabular", "n_prompts": 16, "optimiser": "sgd", "max_grad_norm": 0.0}


@pytest.mark.parametrize("behaviours", [("live",), ("ref",), ("live", "ref")])
def test_reaches_the_regularised_optimum(behaviours: tuple[str, ...]) -> None:
    config = CoPG.Settings(**SMALL, learning_rate=0.5, behaviours=behaviours, n_epochs=4)
    agent = CoPG("arms", config, seed=0)
    agent.learn(until=40 * agent.samples_per_iteration)
    optimum = (torch.tensor([1.0, 0.3, -0.5]) / 0.5).softmax(0)  # the reference is uniform
    torch.testing.assert_close(agent.policy.logits[0, 0].softmax(0), optimum, atol=0.01, rtol=0)
    assert float(agent.scalars["train/regularised_variance"]) < 1e-3
    best = 0.5 * float((torch.tensor([1.0, 0.3, -0.5]) / 0.5).exp().mean().log())
    assert float(agent.scalars["train/regularised_reward"]) == pytest.approx(best, abs=0.02)


def test_resumes_exactly(resumes: Any, tmp_path: Any) -> None:
    config = CoPG.Settings(model="tabular", n_prompts=8, behaviours=("live", "ref"), batch_size=4, n_epochs=2)
    resumes(CoPG, "modsum", config, tmp_path / "agent.pt")


# -- contract -----------------------------------------------------------------------------------------------------


class TestCoPGContract(RecipeContract):
    method = CoPG
    published = {"group_size": 4, "beta": 0.5, "form": "square", "behaviours": ("live",)}
    matters = (
        ({}, {"beta": 0.1}),
        ({}, {"behaviours": ("live", "ref")}),
    )
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}
    exceptions = {
        "test_equal_rewards_have_no_gradient": "the KL to the reference differs between sequences of one score"
    }
