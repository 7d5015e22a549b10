"""D3S: subsets of largest variance, ranked tokens, the schedule, and limits in which nothing is dropped."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.grouped import Grouped
from agents.llm.baselines import GRPO, GRPOConfig, GSPOConfig, GSPORecipe
from agents.llm.d3s import D3S, D3SConfig, D3SRecipe, half_up, keep_rollouts, keep_tokens, most_varied
from ccrl.data import Batching
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.testing.recipe_contract import RecipeContract

ALL = {"rollouts_init": 1.0, "rollouts_final": 1.0, "batch_share": 1.0, "tokens_init": 1.0, "tokens_final": 1.0}
OLD = [[-1.2, -0.5, -1.9], [-0.3, -1.6, 0.0], [-0.7, -0.9, -0.3], [-1.1, 0.0, 0.0]]
LOG_PROB = [[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0], [-0.7, -0.7, -0.7], [-1.5, 0.0, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
ENTROPY = [[0.1, 1.2, 0.4], [2.0, 0.3, 9.0], [1.1, 0.9, 0.2], [0.5, 9.0, 9.0]]


def at(progress: float) -> Any:
    return SimpleNamespace(progress=torch.tensor(progress, dtype=torch.float64))


def double(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def variance(x: Tensor) -> float:
    return float(x.var(correction=0))


def chosen(x: Any, n: int) -> list[int]:
    return most_varied(double(x).unsqueeze(0), n)[0].nonzero().squeeze(-1).tolist()


# -- rollouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "members", "expected"),
    [
        (2, [0, 5], 2.89),
        (3, [0, 3, 5], 2.246667),
        (4, [0, 3, 4, 5], 1.955),
        (5, [0, 2, 3, 4, 5], 1.604),
        (6, [0, 1, 2, 3, 4, 5], 1.358889),
    ],
)
def test_subsets_of_largest_variance(n: int, members: list[int], expected: float) -> None:
    x = double([2.0, 0.5, -0.3, -0.9, 1.1, -1.4, 0.0, 0.2])
    assert chosen(x, n) == members
    assert variance(x[members]) == pytest.approx(expected, abs=5e-7)


def test_no_subset_has_a_larger_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        size = 2 + case % 7
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        if case % 3 == 0:
            x = x.round()  # ties
        for n in range(1, size + 1):
            members = chosen(x, n)
            assert len(members) == n
            best = max(variance(x[list(s)]) for s in itertools.combinations(range(size), n))
            assert variance(x[members]) == pytest.approx(best, abs=1e-9)


def test_a_lone_success() -> None:
    advantage = GroupBaseline(scale="std", ddof=0, eps=1e-12).advantages(
        double([0, 0, 1, 0, 0, 0, 0, 0]), torch.zeros(8, dtype=torch.int64)
    )
    assert advantage[[2, 0]].tolist() == pytest.approx([2.645751, -0.377964], abs=1e-6)
    assert chosen(advantage, 2) == [0, 2]
    assert variance(advantage[chosen(advantage, 2)]) == pytest.approx(64 / 28, abs=1e-6)


def test_three_successes_in_eight() -> None:
    x = double([1.290994] * 3 + [-0.774597] * 5)
    found = [variance(x[chosen(x, n)]) for n in range(2, 9)]
    assert found == pytest.approx([1.0667, 0.9481, 1.0667, 1.024, 1.0667, 1.0449, 1.0], abs=5e-5)


def test_ties_take_the_split_with_more_large_values() -> None:
    assert chosen([1.0, -1.0, 1.0, -1.0], 3) == [0, 1, 2]
    assert chosen([0.0, 0.0, 0.0, 0.0], 2) == [0, 1]
    # differences in the last bits are none
    assert chosen([1.0, 1.0 + 1e-12, -1.0, -1.0 - 1e-12], 2) == [0, 3]


def test_groups_of_any_size() -> None:
    x = double([[3.0, -1.0, 0.0, 1.0], [5.0, 9.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    found = most_varied(x, 3, torch.tensor([4, 2, 1]))
    assert found.tolist() == [[True, True, True, False], [True, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("share", [0.125, 0.1875, 0.25])
@pytest.mark.parametrize("successes", [1, 3, 4, 7])
def test_constant_groups_are_dropped(successes: int, share: float) -> None:
    score = torch.zeros(32, dtype=torch.float64)
    score[8:16][:successes] = 1.0
    score[16:24] = 1.0
    group = torch.arange(4).repeat_interleave(8)
    advantage = GroupBaseline(scale="std").advantages(score, group)
    kept = keep_rollouts(advantage, group, 8, share)
    assert len(kept) == round(share * 32) <= 8
    assert set(group[kept].tolist()) == {1}


def test_selection_ignores_affine_changes_and_follows_permutations() -> None:
    generator = torch.Generator().manual_seed(1)
    score = torch.rand(40, generator=generator, dtype=torch.float64)
    group = torch.arange(5).repeat_interleave(8)
    stage = GroupBaseline(scale="std", eps=1e-6)
    kept = keep_rollouts(stage.advantages(score, group), group, 4, 0.5)
    assert len(kept) == 10
    changed = keep_rollouts(stage.advantages(3.0 * score - 7.0, group), group, 4, 0.5)
    assert torch.equal(changed, kept)
    order = torch.randperm(40, generator=generator)
    permuted = keep_rollouts(stage.advantages(score[order], group[order]), group[order], 4, 0.5)
    assert set(order[permuted].tolist()) == set(kept.tolist())


def test_across_prompts_magnitudes_of_the_whole_group_decide() -> None:
    advantage, group = double([2.0, -2.0, 0.1, -0.1, 1.0, -1.0, 0.1, 0.1]), torch.arange(2).repeat_interleave(4)
    # inside the second group the pair is standardised to the same spread; selection must not see that
    assert keep_rollouts(advantage, group, 2, 0.5).tolist() == [0, 1]


# -- tokens ---------------------------------------------------------------------------------------------------------


def kept(share: float, pool: str = "batch", valid: Any = None) -> list[list[int]]:
    entropy = double([[0.1, 1.2, 0.4, 0.0], [2.0, 0.3, 0.9, 1.1]]).t()
    advantage = double([1.5, -0.5]).expand(4, 2)
    mask = torch.ones_like(entropy) if valid is None else double(valid).t()
    return keep_tokens(advantage, entropy, mask, share, pool).t().tolist()


def test_which_tokens_are_kept() -> None:
    assert kept(0.5) == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert kept(1.0) == [[1] * 4] * 2
    assert kept(0.5, "response") == [[0, 1, 1, 0], [1, 0, 0, 1]]
    assert kept(0.25) == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert kept(0.26, "response") == [[0, 1, 1, 0], [1, 0, 0, 1]]


def test_invalid_tokens_are_neither_ranked_nor_counted() -> None:
    # five tokens are left, of which ceil(2.5) are kept; the largest key of all is invalid
    assert kept(0.5, valid=[[1, 0, 1, 1], [1, 0, 0, 1]]) == [[0, 0, 1, 0], [1, 0, 0, 1]]
    assert kept(1.0, "response", [[1, 0, 1, 1], [0, 0, 0, 0]]) == [[1, 0, 1, 1], [0, 0, 0, 0]]


def test_counts_are_exact() -> None:
    entropy = torch.rand(3, 5, dtype=torch.float64)
    one = torch.ones_like(entropy)
    assert float(keep_tokens(one, entropy, one, 0.2).sum()) == 3.0  # 0.2 * 15 exceeds 3 in floating point
    # equal keys: the first sequence's first tokens
    assert keep_tokens(one, one, one, 0.3).t().tolist() == [[1, 1, 1], [1, 1, 0], [0] * 3, [0] * 3, [0] * 3]


# -- schedule and recipe --------------------------------------------------------------------------------------------


def test_schedule() -> None:
    c = D3SConfig(group_size=16, rollouts_init=0.25, rollouts_final=0.5, tokens_init=0.2, tokens_final=0.9)
    assert (c.rollouts(0.0), c.tokens(0.0)) == (4, 0.2)
    assert (c.rollouts(1.0), c.tokens(1.0)) == (8, 0.9)
    assert c.rollouts(0.5) == 6
    assert c.tokens(0.5) == pytest.approx(0.55)
    assert D3SConfig(group_size=4, rollouts_init=0.1).rollouts(0.0) == 2
    assert D3SConfig(group_size=1).rollouts(0.0) == 1


def test_counts_are_rounded_half_up() -> None:
    """Not half to even, which would keep 2 of 2.5 and 4 of 3.5; 0.29 * 50 is 14.499999999999998 in float64."""
    assert [half_up(x) for x in (2.5, 3.5, 2.4, 0.29 * 50)] == [3, 4, 2, 15]
    assert D3SConfig(group_size=10, rollouts_init=0.25).rollouts(0.0) == 3
    # 5 columns of one group, half of them: 2.5
    kept = keep_rollouts(torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]), torch.zeros(5, dtype=torch.int64), 5, 0.5)
    assert len(kept) == 3


@pytest.fixture
def data(rollout: Any) -> Any:
    """Two groups of two members each: C0 with its entropies."""
    return rollout(
        OLD, MASK, episode_reward=double([1, 0, 0, 1]), group=torch.tensor([0, 0, 1, 1]), entropy=double(ENTROPY)
    )


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean_token_mean", "sequence_mean", "fixed"])
def test_without_dropping_it_is_grpo(aggregate: str, recipe: Any, data: Any, value_and_gradient: Any) -> None:
    ours = recipe(D3SRecipe, D3SConfig(group_size=2, aggregate=aggregate, **ALL))
    theirs = recipe(Recipe, GRPOConfig(group_size=2, aggregate=aggregate))
    found, expected = (
        value_and_gradient(
            r, LOG_PROB, r.prepare({"on": data}, at(0.3))["on"].epoch(Batching("sequence", "full"), None)[0]
        )
        for r in (ours, theirs)
    )
    assert found[0] == expected[0] != 0.0
    assert torch.equal(found[1], expected[1])


def test_without_dropping_it_is_gspo(recipe: Any, data: Any, value_and_gradient: Any) -> None:
    clip = {"group_size": 2, "clip_low": 0.05, "clip_high": 0.05}
    ours = recipe(D3SRecipe, D3SConfig(base="gspo", aggregate="sequence_mean_token_mean", **clip, **ALL))
    theirs = recipe(GSPORecipe, GSPOConfig(level="token", **clip))
    found, expected = (
        value_and_gradient(
            r, LOG_PROB, r.prepare({"on": data}, at(0.3))["on"].epoch(Batching("sequence", "full"), None)[0]
        )
        for r in (ours, theirs)
    )
    assert found[0] == expected[0] != 0.0
    assert torch.equal(found[1], expected[1])


def test_divides_by_the_tokens_that_are_kept(recipe: Any, data: Any, value_and_gradient: Any) -> None:
    options = ALL | {"tokens_init": 0.3, "tokens_final": 0.3}
    made = recipe(D3SRecipe, D3SConfig(group_size=2, **options))
    prepared = made.prepare({"on": data}, at(0.0))["on"]
    # ceil(0.3 * 9) = 3: the keys are |A| = 0.7071 times 2.0, 1.2, 1.1
    assert prepared["valid"].t().tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]
    _, gradient = value_and_gradient(made, OLD, prepared.epoch(Batching("sequence", "full"), None)[0])
    a = 0.5 / (0.5**0.5 + 1e-6)
    expected = double([[0, -a, 0], [a, 0, 0], [a, 0, 0], [0, 0, 0]]) / 3.0
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_ratio_of_gspo_is_that_of_the_whole_completion(recipe: Any, data: Any) -> None:
    options = ALL | {"tokens_init": 0.3, "tokens_final": 0.3}
    made = recipe(D3SRecipe, D3SConfig(group_size=2, base="gspo", **options))
    batch = made.prepare({"on": data}, at(0.0))["on"].epoch(Batching("sequence", "full"), None)[0]
    level = made.phases()[0].terms[0].ratio({"log_prob": double(LOG_PROB).t()}, batch)
    kept = level.ratio[level.valid > 0]
    torch.testing.assert_close(kept, double([1.221403, 0.935507, 1.033895]), atol=6e-7, rtol=0)


def test_dropped_rollouts_leave_the_batch(recipe: Any, rollout: Any) -> None:
    score = double([1, 0, 0, 0] + [1] * 4)
    entropy = double([[0.5, 0.7, 0.0]] * 8)
    data = rollout(
        [OLD[1]] * 8, [MASK[1]] * 8, episode_reward=score, group=torch.arange(2).repeat_interleave(4), entropy=entropy
    )
    made = recipe(D3SRecipe, D3SConfig(group_size=4, rollouts_init=0.5, batch_share=0.5, tokens_init=0.5))
    prepared = made.prepare({"on": data}, at(0.0))
    left, stats = prepared["on"], {}
    assert left["episode_reward"].tolist() == [1, 0]
    assert left["group"].tolist() == [0, 0]
    assert left["valid"].sum() == 2.0
    assert left["response"].sum() == 4.0
    assert prepared["sampled"].shape == (3, 8)
    batch = left.epoch(Batching("sequence", "full"), None)[0]
    assert float(batch["n_valid"]) == 2.0
    assert float(batch["n_sequences"]) == 2.0
    made.after_update(prepared, stats, None)
    assert {k: round(float(v), 4) for k, v in stats.items()} == {
        "rollout_share": 0.25, "token_share": 0.125, "prompt_share": 0.5, "largest_prompt_share": 1.0,
        "useful_sampled": 0.5, "useful_kept": 1.0, "advantage_variance_sampled": 0.375,
        "advantage_variance_kept": 1.0, "skipped": 0.0,
    }  # fmt: skip


def test_equal_rewards_skip_the_update(recipe: Any, rollout: Any) -> None:
    data = rollout(OLD, MASK, episode_reward=double([1] * 4), entropy=double(ENTROPY))
    made = recipe(D3SRecipe, D3SConfig(group_size=4))
    prepared = made.prepare({"on": data}, at(0.0))
    assert made.phases()[0].skip(prepared["on"], None)
    stats: dict[str, Tensor] = {}
    made.after_update(prepared, stats, None)
    assert float(stats["skipped"]) == 1.0
    agent = D3S("arms", D3S.Settings(model="tabular", n_prompts=2), env_kwargs={"rewards": (0.5, 0.5)})
    before = agent.policy.logits.clone()
    agent.learn(until=2 * agent.samples_per_iteration)
    assert torch.equal(agent.policy.logits, before)
    assert agent.n_updates == 0


def test_entropies_below_zero_are_refused(recipe: Any, rollout: Any) -> None:
    data = rollout(OLD, MASK, episode_reward=double([1, 0, 0, 1]), entropy=-double(ENTROPY))
    with pytest.raises(ValueError, match="expected none below 0"):
        recipe(D3SRecipe, D3SConfig(group_size=4)).prepare({"on": data}, at(0.0))


class Uniform(nn.Module):
    def forward(self, batch: Any, want: frozenset[str]) -> dict[str, Tensor]:
        self.columns = batch.shape[1]
        return {"entropy": torch.ones_like(batch["valid"])}


def test_control_episodes_need_no_tokens(recipe: Any, rollout: Any) -> None:
    reward = double([[9.0, 0, 0], [1, 1, 0], [1, 0, 0], [3, 5, 0]])
    data = rollout(OLD, MASK, reward=reward, carry=double([[1.0, 1, 0]] * 4))
    policy = Uniform()
    left = recipe(D3SRecipe, D3SConfig(group_size=4, rollouts_init=0.5, batch_share=1.0), policy).prepare(
        {"on": data}, at(0.0)
    )["on"]
    assert left["episode_reward"].tolist() == [9.0, 1.0]
    assert policy.columns == 2  # entropy of the survivors only
    agent = Grouped("CartPole-v1", method="d3s", n_groups=2, group_size=8, n_steps=20, tokens_final=0.5)
    agent.learn(until=agent.samples_per_iteration)
    assert agent.n_updates == agent.iteration >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts_init": 0.0}, r"rollouts_init: expected a number in \(0, 1\], got 0.0"),
        ({"tokens_final": 1.5}, r"tokens_final: expected a number in \(0, 1\], got 1.5"),
        ({"batch_share": -1.0}, r"batch_share: expected a number in \(0, 1\], got -1.0"),
        ({"token_pool": "group"}, "token_pool: expected one of 'batch', 'response', got 'group'"),
        ({"base": "ppo"}, "base: expected one of 'grpo', 'gspo', got 'ppo'"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        D3SConfig(**options)


SMALL = {"model": "tabular", "n_prompts": 8, "learning_rate": 0.1}


@pytest.mark.parametrize("base", ["grpo", "gspo"])
def test_learns_on_fewer_tokens(base: str) -> None:
    task = {"questions": 4, "fixed_length": 3, "symbols": 4}
    agent = D3S("sequence_match", D3S.Settings(**SMALL, base=base), seed=0, env_kwargs=task)
    before, shares = agent.pass_at([1], questions=4, samples=64)["episode_reward"], list[float]()
    agent.learn(
        until=40 * agent.samples_per_iteration, callback=lambda a: shares.append(float(a.scalars["train/token_share"]))
    )
    assert before < 0.35
    assert agent.pass_at([1], questions=4, samples=64)["episode_reward"] > 0.9
    assert shares[0] == pytest.approx(0.25 * 0.5 * 0.2, abs=0.01)
    assert shares[0] < shares[20] < shares[-1] < 0.26


def test_keeps_up_with_grpo_on_fewer_tokens() -> None:
    task = {"questions": 4, "fixed_length": 3, "symbols": 4}
    scores = []
    for method in (D3S, GRPO):
        agent = method("sequence_match", **SMALL | {"group_size": 16}, seed=0, env_kwargs=task)
        agent.learn(until=10 * agent.samples_per_iteration)
        scores.append(agent.pass_at([1], questions=4, samples=64)["episode_reward"])
    # an eighth to a quarter of the rollouts and a fifth of their tokens are enough to keep up
    assert scores[0] > scores[1] - 0.1


def test_resumes_exactly(tmp_path: Any) -> None:
    config = D3S.Settings(**SMALL, batch_size=5, microbatch=3, n_epochs=2, kl_coef=0.01)

    def trained(agent: Any, iterations: int) -> Any:
        # the total is the same: the schedules depend on it
        agent.learn(until=8 * agent.samples_per_iteration, callback=lambda a: a.iteration < iterations)
        return agent

    whole = trained(D3S("modsum", config, seed=3), 4)
    trained(D3S("modsum", config, seed=3), 2).save(tmp_path / "agent.pt")
    loaded = trained(D3S.load(tmp_path / "agent.pt"), 4)
    assert torch.equal(loaded.policy.logits, whole.policy.logits)
    assert float(whole.policy.logits.detach().abs().max()) > 0.1


# -- contract -----------------------------------------------------------------------------------------------------


class TestD3SContract(RecipeContract):
    method = D3S
    published = {
        "group_size": 16,
        "rollouts_init": 0.25,
        "rollouts_final": 0.5,
        "batch_share": 0.5,
        "tokens_init": 0.2,
        "tokens_final": 1.0,
        "token_pool": "batch",
        "base": "grpo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregate": "token_mean",
    }
    matters = (
        ({}, {"rollouts_init": 1.0}),
        ({}, {"batch_share": 1.0}),
        ({}, {"tokens_init": 0.9}),
        ({"tokens_init": 0.5}, {"tokens_init": 0.5, "token_pool": "response"}),
        ({}, {"base": "gspo"}),
    )
    refused = {"trl": "trains on a selection of the completions", "verl": "wants ['entropy'] of the policy"}
