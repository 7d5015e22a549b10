"""The baselines by hand on a canonical batch C0 (docs/llm/baselines.md), through the suite's recipes and terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.agent import LLMMethod
from agents.llm.baselines import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO
from agents.llm.reinforce import PPO, REINFORCE, RLOO
from ccrl.bank import Bank
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context
from ccrl.estimators.outcomes import KLPenalty, OverlongPenalty
from ccrl.estimators.recipe import Parts
from ccrl.estimators.stages import Gae, GroupBaseline
from ccrl.estimators.terms import Aggregate, Loss, Ratio, Term, surrogate
from ccrl.updaters import ModuleUpdater

F64 = torch.float64


def rows(*values: list[float]) -> Tensor:
    """``[T, B]`` from sequences ``[B, T]``."""
    return torch.tensor(values, dtype=F64).t().contiguous()


LOGP = rows([-1.0, -0.5, -2.0], [-0.3, -1.2, 0], [-0.7, -0.7, -0.7], [-1.5, 0, 0])
OLD = rows([-1.2, -0.5, -1.9], [-0.3, -1.6, 0], [-0.7, -0.9, -0.3], [-1.1, 0, 0])
REF = rows([-1.1, -0.6, -2.0], [-0.5, -1.2, 0], [-0.7, -0.7, -0.9], [-1.4, 0, 0])
MASK = rows([1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0])
SCORE = torch.tensor([1, 0, 0, 1], dtype=F64)
SIGNS = torch.tensor([1, -1, -1, 1], dtype=F64)


class Stored(nn.Module):
    """A policy whose log-probabilities are its parameters."""

    def __init__(self, log_prob: Tensor = LOGP) -> None:
        super().__init__()
        self.log_prob = nn.Parameter(log_prob.clone())

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {"log_prob": self.log_prob[:, batch["column"]]}


def canonical(**changes: Tensor) -> Data:
    """C0 as a rollout."""
    last = torch.zeros_like(MASK)
    last[(MASK.sum(0) - 1).long(), torch.arange(4)] = 1.0
    columns = {
        "log_prob": OLD, "ref_log_prob": REF, "valid": MASK, "carry": MASK - last, "reward": last * SCORE,
    }  # fmt: skip
    sequence = {"episode_reward": SCORE, "group": torch.zeros(4, dtype=torch.int64), "column": torch.arange(4)}
    return Data(columns | sequence | changes, sequence=frozenset(sequence))


def term_value(
    loss: Loss, aggregate: Aggregate, ratio: Ratio = ratios.token, advantage: Tensor = SIGNS, **options: Any
) -> tuple[float, Tensor]:
    """Value and gradient ``[T, B]`` of one term on C0."""
    policy, data = Stored(), canonical().derive_sequence(a=advantage)
    return value_of(policy, data, (Term("x", loss, aggregate, ratio, advantage="a", **options),))


def value_of(policy: Stored, data: Data, terms: tuple[Term, ...]) -> tuple[float, Tensor]:
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    total, _ = surrogate(terms, policy(batch, frozenset({"log_prob"})), batch)
    (gradient,) = torch.autograd.grad(total, policy.log_prob)
    return float(total.detach()), gradient


def recipe_value(agent: LLMMethod, max_length: int = 3, *, signs: bool = True, **settings: Any) -> tuple[float, Tensor]:
    """Value and gradient of an agent's whole recipe on C0; ``signs``: with advantages +-1."""
    policy = Stored()
    updater = ModuleUpdater(policy, lambda params: torch.optim.SGD(params, lr=1.0))
    parts = Parts(policy, updater, Request(counts=torch.tensor([4])), max_length)
    recipe = agent.Recipe(agent.Config(**settings), parts)
    data = canonical()
    for stage in recipe.stages():
        data = stage(data)
    if signs:
        data = data.derive(advantage=SIGNS * MASK).derive_sequence(sequence_advantage=SIGNS)
    return value_of(policy, data, recipe.terms())


def advantages(agent: LLMMethod, **settings: Any) -> Tensor:
    """``[T, N]`` that an agent's stages make of C0."""
    parts = Parts(nn.Identity(), None, Request(counts=torch.tensor([4])), 3)  # type: ignore[arg-type]
    data = canonical()
    for stage in agent.Recipe(agent.Config(**settings), parts).stages():
        data = stage(data)
    return data["advantage"]


def close(found: Any, expected: Any, atol: float = 6e-7) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=F64), torch.as_tensor(expected, dtype=F64), rtol=0.0, atol=atol
    )


# -- aggregation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (aggregates.sequence_mean_token_mean, 0.136945),
        (aggregates.mean, 0.193119),
        (aggregates.sequence_mean, 0.434517),
        (aggregates.length_constant(3), 0.144839),
        (aggregates.length_constant(8), 0.054315),
        (aggregates.fixed(3.0), 0.579357),
    ],
)
def test_aggregations(aggregate: Aggregate, expected: float) -> None:
    close(term_value(losses.clip(0.2, 0.2), aggregate)[0], expected)


def test_length_constant_wants_a_length() -> None:
    with pytest.raises(ValueError, match="expected >= 1, got 0"):
        aggregates.length_constant(0)


# -- advantages -----------------------------------------------------------------------------------------------------


def test_group_advantages() -> None:
    def of(**options: Any) -> Tensor:
        return GroupBaseline(**options).advantages(SCORE, torch.zeros(4, dtype=torch.int64))

    close(of(scale="std", eps=1e-6), 0.866024 * SIGNS)
    close(of(scale="std", eps=1e-4), 0.865875 * SIGNS)
    close(of(scale="std", eps=0.0, ddof=0), SIGNS)
    close(of(), 0.5 * SIGNS)
    close(of(baseline="leave_one_out"), 0.666667 * SIGNS)


def test_advantages_of_the_recipes() -> None:
    close(advantages(GRPO), 0.866024 * SIGNS * MASK)
    close(advantages(DrGRPO), 0.5 * SIGNS * MASK)
    close(advantages(RLOO), 0.666667 * SIGNS * MASK)
    close(advantages(REINFORCE), 0.5 * SIGNS * MASK)
    close(advantages(REINFORCE, baseline="none"), SCORE * MASK)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 1.0 / 3.0, 1.0])
def test_equal_scores_are_exactly_zero(value: float) -> None:
    for size in range(2, 12):
        score, group = torch.full((size,), value), torch.zeros(size, dtype=torch.int64)
        for options in ({"scale": "std"}, {"baseline": "leave_one_out"}, {}):
            assert not GroupBaseline(**options).advantages(score, group).any()  # type: ignore[arg-type]


def test_a_group_of_one_is_compared_with_nothing() -> None:
    score, group = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([7, 3, 3])
    assert GroupBaseline(scale="std", single="zero").advantages(score, group)[0] == 0.0
    assert GroupBaseline(scale="std", eps=0.0, single="keep").advantages(score, group)[0] == 1.0


def test_rloo_with_k1_in_the_reward() -> None:
    close((OLD - REF).mul(MASK).sum(0), [0.1, -0.2, 0.4, 0.3])
    close(KLPenalty(0.1)(canonical())["shaped_episode_reward"], [0.99, 0.02, -0.04, 0.97])
    close(advantages(RLOO, kl_coef=0.1)[0], [0.673333, -0.62, -0.7, 0.646667])


def test_rloo_whitened() -> None:
    found = advantages(RLOO, normalise=True)[0]
    raw = 2.0 / 3.0 * SIGNS
    close(found, raw / (raw.std() + 1e-4), atol=1e-12)


def test_gae() -> None:
    carry = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64)
    value = torch.tensor([[0.5], [0.6], [0.7]], dtype=F64)
    data = Data({
        "reward": torch.tensor([[0.0], [0.0], [1.0]], dtype=F64), "value": value, "valid": torch.ones(3, 1, dtype=F64),
        "next_value": torch.tensor([[0.6], [0.7], [0.0]], dtype=F64), "alive": carry, "carry": carry,
    })  # fmt: skip
    data = Gae(1.0, 0.95)(data)
    close(data["advantage"].flatten(), [0.465750, 0.385, 0.3])
    close(data["return"].flatten(), [0.965750, 0.985, 1.0])


def test_ppo_sums_token_rewards_to_the_end() -> None:
    """k1 per token, the score at the last one, minus the mean return of the group."""
    gap = 0.1 * (OLD - REF) * MASK
    to_go = SCORE - gap.flip(0).cumsum(0).flip(0)
    expected = (to_go - (SCORE - gap.sum(0)).mean()) * MASK
    close(advantages(PPO, kl_coef=0.1, whiten=False), expected, atol=1e-12)
    close(advantages(PPO, kl_coef=0.1, whiten=False, baseline="none"), to_go * MASK, atol=1e-12)
    white = advantages(PPO)[MASK > 0]
    close(white.mean(), 0.0)
    close(white.std(), 1.0)


# -- losses ---------------------------------------------------------------------------------------------------------


def test_reinforce() -> None:
    value, gradient = term_value(
        losses.neg_log_prob, aggregates.sequence_mean, ratios.plain, weight="episode_reward", advantage=SIGNS
    )
    close(value, 1.25)
    close(gradient, -SCORE * MASK / 4.0)
    close(recipe_value(REINFORCE, signs=False, baseline="none")[1], -SCORE * MASK / 4.0)


def test_rloo_score_form() -> None:
    value, gradient = term_value(
        losses.neg_log_prob, aggregates.sequence_mean, ratios.plain, weight="a", advantage=2.0 / 3.0 * SIGNS
    )
    close(value, 0.233333)
    expected = torch.tensor([-1, 1, 1, -1], dtype=F64) / 6.0 * MASK
    close(gradient, expected)
    close(recipe_value(RLOO, signs=False)[1], expected)


def test_rloo_clipped_sequence_form() -> None:
    batch = canonical().epoch(Batching("sequence", "full"), None)[0]
    close(ratios.sequence_product({"log_prob": LOGP}, batch).ratio[0], [1.105171, 1.491825, 0.818731, 0.670320])
    close(recipe_value(RLOO, signs=False, form="sequence_clip")[0], 0.089177)


def test_ppo_clip() -> None:
    batch = canonical().derive_sequence(a=SIGNS).epoch(Batching("sequence", "full"), None)[0]
    level = ratios.token({"log_prob": LOGP}, batch)
    token = losses.clip(0.2, 0.2)(level, SIGNS, {}, batch)
    close(token * MASK, rows([-1.2, -1, -0.904837], [1, 1.491825, 0], [1, 1.221403, 0.8], [-0.670320, 0, 0]))
    value, gradient = recipe_value(PPO)
    close(value, 0.193119)
    expected = rows([0, -0.111111, -0.100537], [0.111111, 0.165758, 0], [0.111111, 0.135711, 0], [-0.074480, 0, 0])
    close(gradient, expected)


def test_dual_clip() -> None:
    log_prob = torch.full((1, 1), 5.0, dtype=F64).log()
    batch = Data({"log_prob": torch.zeros_like(log_prob), "valid": torch.ones_like(log_prob)})
    level = ratios.token({"log_prob": log_prob}, batch)
    bad, good = -torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)
    close(losses.clip(0.2, 0.2)(level, bad, {}, batch), [[5.0]])
    close(losses.clip(0.2, 0.2, 3.0)(level, bad, {}, batch), [[3.0]])
    close(losses.clip(0.2, 0.2, 3.0)(level, good, {}, batch), [[-1.2]])


def test_grpo() -> None:
    close(recipe_value(GRPO)[0], 0.136945)
    close(recipe_value(GRPO, kl_coef=0.04)[0], 0.136945 + 0.04 * 0.006001)


def test_dr_grpo() -> None:
    close(recipe_value(DrGRPO)[0], 0.144839)
    close(recipe_value(DrGRPO, max_length=8)[0], 0.054315)


def test_dapo() -> None:
    value, gradient = recipe_value(DAPO)
    close(value, 0.190741)
    close(gradient[0, 0], -0.135711)


def test_gspo() -> None:
    batch = canonical().epoch(Batching("sequence", "full"), None)[0]
    level = ratios.sequence({"log_prob": LOGP}, batch)
    close(level.ratio[0], [1.033895, 1.221403, 0.935507, 0.670320])
    close(losses.clip(3e-4, 4e-4)(level, SIGNS, {}, batch)[0], [-1.0004, 1.221403, 0.9997, -0.670320])
    close(recipe_value(GSPO)[0], 0.137596)
    value, gradient = recipe_value(GSPO, clip_low=0.2, clip_high=0.2)
    close(value, 0.113174)
    rate = torch.tensor([-0.086158, 0.152675, 0.077959, -0.167580], dtype=F64)
    close(gradient, rate * MASK)
    token_value, token_gradient = recipe_value(GSPO, level="token", clip_low=0.2, clip_high=0.2)
    close(token_value, value, atol=1e-12)
    close(token_gradient, gradient, atol=1e-12)


def test_cispo_in_both_readings() -> None:
    close(recipe_value(CISPO)[0], 0.086677)
    close(recipe_value(CISPO, bound="cap")[0], 0.046907)
    ratio = (LOGP - OLD).exp()
    close(recipe_value(CISPO)[1], -ratio.clamp(0.8, 1.28) * SIGNS * MASK / 9.0)
    close(recipe_value(CISPO, bound="cap")[1], -ratio * SIGNS * MASK / 9.0)
    low = term_value(losses.capped_weight(1.1), aggregates.mean)[1]
    close(low, -ratio.clamp(max=1.1) * SIGNS * MASK / 9.0)


def test_sapo() -> None:
    batch = canonical().epoch(Batching("sequence", "full"), None)[0]
    level = ratios.token({"log_prob": LOGP}, batch)
    gate = -SAPO.Recipe(SAPO.Config(), _parts()).loss()(level, SIGNS, {}, batch) * SIGNS
    expected = rows([2.220503, 2, 1.904909], [1.904762, 2.385940, 0], [1.904762, 2.125173, 1.578335], [1.673274, 0, 0])
    close(gate * MASK, expected)
    close(recipe_value(SAPO)[0], 0.074924)


def _parts() -> Parts:
    policy = Stored()
    updater = ModuleUpdater(policy, lambda params: torch.optim.SGD(params, lr=1.0))
    return Parts(policy, updater, Request(counts=torch.tensor([4])), 3)


# -- KL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "expected"), [(losses.k1, 0.055556), (losses.k2, 0.006111), (losses.k3, 0.005812)])
def test_kl_estimators(k: Loss, expected: float) -> None:
    close(term_value(k, aggregates.mean, ratios.reference)[0], expected)


def test_kl_by_sequences() -> None:
    close(term_value(losses.k3, aggregates.sequence_mean_token_mean, ratios.reference)[0], 0.006001)


def test_what_the_estimators_estimate() -> None:
    """Expectations over three actions, each weighted by its probability under the policy; that weight is constant, as
    sampling is."""
    z = torch.tensor([1.0, 0.0, -1.0], dtype=F64, requires_grad=True)
    ref = torch.tensor([0.5, 0.2, -0.7], dtype=F64).log_softmax(0)
    log_prob = z.log_softmax(0)
    weight = log_prob.exp().detach()
    batch = Data({"ref_log_prob": ref[None], "valid": torch.ones(1, 3, dtype=F64)})
    level = ratios.reference({"log_prob": log_prob[None]}, batch)
    expected = {
        losses.k1: (0.062995, [0.0, 0.0, 0.0]),
        losses.k2: (0.061147, [0.161876, -0.111759, -0.050117]),
        losses.k3: (0.062995, [0.175528, -0.118060, -0.057468]),
        losses.k3_plus: (0.062995, [0.161876, -0.111759, -0.050117]),
    }
    for k, (value, slope) in expected.items():
        mean = (weight * k(level, weight, {}, batch)[0]).sum()
        close(mean.detach(), value)
        close(torch.autograd.grad(mean, z, retain_graph=True)[0], slope)
    forward = (log_prob.exp() * (log_prob - ref)).sum()
    close(torch.autograd.grad(forward, z)[0], [0.161876, -0.111759, -0.050117])


def test_overlong_penalty_counts_valid_tokens() -> None:
    close(OverlongPenalty(3, 2)(canonical())["shaped_episode_reward"], [0.0, -0.5, -1.0, 1.0])


# -- settings and learning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("agent", "settings", "message"),
    [
        (REINFORCE, {"baseline": "critic"}, r"baseline: expected one of 'batch', 'none', got 'critic'"),
        (RLOO, {"form": "token"}, "form: expected one of"),
        (PPO, {"dual_clip": 0.5}, r"dual_clip: expected > 1 or 0, got 0.5"),
        (DAPO, {"max_tries": 0}, "max_tries: expected >= 1, got 0"),
        (DAPO, {"overlong_share": 1.5}, r"overlong_share: expected a number in \[0, 1\], got 1.5"),
        (GSPO, {"level": "group"}, "level: expected one of"),
        (CISPO, {"bound": "none"}, "bound: expected one of"),
        (CISPO, {"cap": 0.0}, "cap: expected > 0, got 0.0"),
        (SAPO, {"tau_negative": 0.0}, "tau_negative: expected > 0, got 0.0"),
    ],
)
def test_bad_settings(agent: LLMMethod, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent.Config(**settings)


@pytest.mark.parametrize("agent", [REINFORCE, RLOO, PPO, GRPO, DrGRPO, DAPO, GSPO, CISPO, SAPO])
def test_learns_a_bandit(agent: LLMMethod) -> None:
    config = agent.Settings(model="tabular", n_prompts=8, group_size=8, learning_rate=0.1)
    if agent is DAPO:
        config = replace(config, max_tries=2)
    learner = agent("sequence_match", config, seed=0, env_kwargs={"questions": 2, "fixed_length": 3, "symbols": 4})
    before = learner.pass_at([1], questions=2, samples=64)["episode_reward"]
    learner.learn(until=60 * learner.samples_per_iteration)
    after = learner.pass_at([1], questions=2, samples=64)["episode_reward"]
    assert before < 0.45
    assert after > 0.8


def context(policy: nn.Module) -> Context:
    """What a recipe may read."""
    return Context(torch.Generator(), Bank(policy), lambda *_: None)  # type: ignore[arg-type,return-value]


def test_recipes_take_control_episodes() -> None:
    """No tokens: the episode's return is the score, and a long episode is no fault."""
    reward = torch.zeros_like(MASK)
    reward[0] = SCORE
    columns = {"log_prob": OLD, "valid": MASK, "carry": canonical()["carry"], "reward": reward}
    sequence = {"group": torch.zeros(4, dtype=torch.int64), "column": torch.arange(4)}
    for agent in (REINFORCE, RLOO, GRPO, DrGRPO, DAPO, GSPO, CISPO, SAPO):
        parts = replace(_parts(), request=Request(episodes=4, horizon=3))
        recipe = agent.Recipe(agent.Config(), parts)
        data = Data(columns | sequence, sequence=frozenset(sequence))
        have = {"on": data}
        assert recipe.plan({}, have, context(parts.policy)) == []
        found = recipe.prepare(have, context(parts.policy))["on"]
        assert (found["advantage"][0] * SIGNS > 0).all(), agent
