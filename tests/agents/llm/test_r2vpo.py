"""R2VPO: Lagrangian, dual variable, the ring of old rollouts, learning, resume."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm.r2vpo import R2VPO, R2VPOConfig, R2VPORecipe, RolloutRing, dual_step, lagrangian
from ccrl.data import Batching, Data
from ccrl.estimators.terms import LogRatio, surrogate
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract

LOG_PROB = [[-1.0, -0.5, -2.0], [-0.3, -1.2, 0.0], [-0.7, -0.7, -0.7], [-1.5, 0.0, 0.0]]
OLD = [[-1.2, -0.5, -1.9], [-0.3, -1.6, 0.0], [-0.7, -0.9, -0.3], [-1.1, 0.0, 0.0]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]
ADVANTAGE = [1.0, -1.0, -1.0, 1.0]


@pytest.fixture
def at(recipe: Any, rollout: Any) -> Any:
    """The recipe with ``dual``, and a batch of given old log-probabilities, mask and advantages per sequence."""

    def build(dual: float, old: Any, mask: Any, advantage: Any, **options: Any) -> tuple[R2VPORecipe, Data]:
        made = recipe(R2VPORecipe, R2VPOConfig(dual_init=dual, **options)).double()
        data = rollout(old, mask)
        data = data.derive(advantage=torch.tensor(advantage).double().expand(data.shape) * data["valid"])
        return made, data.epoch(Batching("sequence", "full"), None)[0]

    return build


# -- the Lagrangian ---------------------------------------------------------------------------------------------------


def test_sample_loss_and_effective_weights(at: Any, value_and_gradient: Any) -> None:
    ratio = torch.tensor([1.3, 0.6, 1.0, 2.0]).double().unsqueeze(1)
    made, batch = at(0.5, [[0.0]] * 4, [[1]] * 4, [1, -1, 0.5, -0.5])
    value, gradient = value_and_gradient(made, ratio.log(), batch)
    assert value + 0.5 * 0.04 == pytest.approx(0.106250)  # the constant lambda delta has no gradient
    expected = torch.tensor([0.91, -0.36, 0.5, -3.0]).double()
    torch.testing.assert_close(-4 * gradient.squeeze(1), expected)


@pytest.mark.parametrize("dual", [0.0, 0.5, 7.0])
def test_on_policy_the_penalty_has_no_slope(at: Any, value_and_gradient: Any, dual: float) -> None:
    made, batch = at(dual, OLD, MASK, ADVANTAGE)
    _, gradient = value_and_gradient(made, OLD, batch)
    torch.testing.assert_close(gradient, -(batch["advantage"] / 9.0).t())


def test_without_a_dual_it_is_the_unclipped_ratio(at: Any, value_and_gradient: Any) -> None:
    made, batch = at(0.0, OLD, MASK, ADVANTAGE)
    value, gradient = value_and_gradient(made, LOG_PROB, batch)
    ratio = (torch.tensor(LOG_PROB) - torch.tensor(OLD)).double().exp() * torch.tensor(MASK)
    expected = -ratio * torch.tensor(ADVANTAGE).double().unsqueeze(1) / 9.0
    assert value == pytest.approx(float(expected.sum()), abs=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_weight_beyond_the_clip_range_and_where_it_changes_sign(at: Any, value_and_gradient: Any) -> None:
    made, batch = at(0.5, [[0.0]] * 3, [[1]] * 3, [1.0] * 3)
    _, gradient = value_and_gradient(made, torch.tensor([[1.3], [2.0], [2.1]], dtype=torch.float64).log(), batch)
    weights = (-3 * gradient).squeeze(1)
    assert weights[:2].tolist() == pytest.approx([0.91, 0.0], abs=1e-9)
    assert float(weights[2]) < 0


def test_finite_differences_padding_permutation_and_microbatches(at: Any, value_and_gradient: Any) -> None:
    made, batch = at(0.5, OLD, MASK, ADVANTAGE)
    log_prob = torch.tensor(LOG_PROB).double()
    value, gradient = value_and_gradient(made, log_prob, batch)
    for i in range(4):
        for t in range(3):
            bump = torch.zeros(4, 3).double()
            bump[i, t] = 1e-5
            up, down = (value_and_gradient(made, log_prob + s * bump, batch)[0] for s in (1, -1))
            assert (up - down) / 2e-5 == pytest.approx(float(gradient[i, t]), rel=1e-6, abs=1e-10)
    pieces = [value_and_gradient(made, log_prob[i : i + 2], p)[0] for i, p in zip((0, 2), batch.microbatches(2))]
    assert sum(pieces) == pytest.approx(value)
    index = torch.tensor([3, 1, 0, 2, 0])
    more = {k: batch[k] if batch[k].dim() == 0 else batch[k].index_select(-1, index) for k in batch}
    more["valid"] = more["valid"] * torch.tensor([1, 1, 1, 1, 0])
    garbage = log_prob[index]
    garbage[4] = torch.inf
    padded = Data(more, sequence=batch.sequence, scalars=batch.scalars)
    other, moved = value_and_gradient(made, garbage, padded)
    assert other == pytest.approx(value)
    torch.testing.assert_close(moved[:4], gradient[index[:4]])


def test_a_huge_ratio_is_finite(recipe: Any, rollout: Any) -> None:
    made = recipe(R2VPORecipe, R2VPOConfig())
    one = torch.ones(1, 1)
    data = Data({"valid": one, "log_prob": -300.0 * one, "advantage": one, "n_valid": one.sum()},
                scalars=frozenset({"n_valid"}))  # fmt: skip
    loss, stats = surrogate(made.phases()[0].terms, {"log_prob": 0.0 * one}, data)
    assert loss.isfinite()
    assert stats["ratio_variance"].isfinite()


# -- the dual variable ------------------------------------------------------------------------------------------------


def test_dual_trace() -> None:
    dual, trace = torch.zeros((), dtype=torch.float64), []
    for v in (0.10, 0.08, 0.05, 0.03, 0.02):
        dual = dual_step(dual, torch.tensor(v).double(), 0.04, 1.0, 100.0)
        trace.append(float(dual))
    assert trace == pytest.approx([0.06, 0.10, 0.11, 0.10, 0.08])
    assert float(dual_step(dual, torch.tensor(0.0), 0.04, 100.0, 100.0)) == 0.0
    assert float(dual_step(dual, torch.tensor(50.0), 0.04, 100.0, 100.0)) == 100.0
    assert float(dual_step(torch.tensor(3.0), torch.tensor(math.nan), 0.04, 1.0, 100.0)) == 6.0
    assert float(dual_step(torch.tensor(3.0), torch.tensor(math.inf), 0.04, 1.0, 100.0)) == 6.0


SMALL: dict[str, Any] = {"model": "tabular", "n_prompts": 8, "group_size": 8, "n_epochs": 4, "learning_rate": 0.1}
TASK = {"questions": 4, "symbols": 5, "easy": 2}


def test_one_dual_step_per_rollout_or_per_minibatch() -> None:
    for every, rate in (("rollout", 2.0), ("minibatch", 0.5)):
        config = R2VPO.Settings(**SMALL, dual_every=every, dual_rate=rate, batch_size=32, dual_init=1.0)
        agent = R2VPO("easy_hard", config, env_kwargs=TASK)
        agent.learn(until=agent.samples_per_iteration)
        s = {k: float(v) for k, v in agent.scalars.items() if k.startswith("train/")}
        # 8 gradient steps: their mean variance times 8 steps of the dual; or one step with the variance afterwards
        moved = (
            2.0 * (s["train/variance_after"] - 0.04) if every == "rollout" else 4.0 * (s["train/ratio_variance"] - 0.04)
        )
        assert s["train/dual"] == pytest.approx(1.0 + moved, abs=1e-5)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean"])
def test_the_variance_is_a_mean_over_tokens(aggregate: str) -> None:
    """Whatever the loss averages, and padding is no token."""
    config = R2VPO.Settings(
        model="tabular",
        n_prompts=3,
        group_size=8,
        learning_rate=0.3,
        n_epochs=2,
        aggregate=aggregate,
        dual_every="rollout",
    )
    agent, seen = R2VPO(RaggedTask(), config, seed=0), list[float]()
    collect, held = agent.collector.collect, list[Data]()
    agent.collector.collect = lambda *args: held.append(collect(*args)) or held[-1]

    def variance() -> float:
        data = held[0]
        with torch.no_grad():
            ratio = (agent.policy(data, frozenset({"log_prob"}))["log_prob"] - data["log_prob"]).exp()
        return float((ratio - 1.0).square()[data["valid"] > 0].mean())

    step = agent.updaters["policy"].step
    agent.updaters["policy"].step = lambda *args: seen.append(variance()) or step(*args)
    agent.learn(until=1)
    assert (held[0]["valid"] == 0).any()
    assert float(agent.scalars["train/ratio_variance"]) == pytest.approx(sum(seen) / 2, rel=1e-4)
    assert float(agent.scalars["train/variance_after"]) == pytest.approx(variance(), rel=1e-4)


# -- old rollouts -----------------------------------------------------------------------------------------------------


def columns(value: float, steps: int = 2) -> Data:
    x = torch.full((steps, 3), value)
    return Data({"log_prob": x, "valid": torch.ones_like(x), "group": torch.tensor([0, 0, 1]), "episode_reward": x[0]},
                raw=frozenset({"log_prob", "valid"}), sequence=frozenset({"group", "episode_reward"}))  # fmt: skip


def test_the_ring_is_bounded_and_owns_its_columns() -> None:
    ring = RolloutRing(2)
    for value in (1.0, 2.0, 3.0):
        data = columns(value, steps=int(value))
        ring.push(data, {"log_prob", "valid", "group", "no such column"})
        data["log_prob"].zero_()
    assert [float(r["log_prob"][0, 0]) for r in ring.rollouts] == [2.0, 3.0]
    assert set(ring.rollouts[0]) == {"log_prob", "valid", "group"}
    other = RolloutRing(2)
    other.load_state_dict(copy.deepcopy(ring.state_dict()))
    for a, b in zip(ring.rollouts, other.rollouts, strict=True):
        assert a.raw == b.raw
        assert a.sequence == b.sequence
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_old_rollouts_train_with_the_advantages_and_log_probabilities_they_came_with() -> None:
    seen: list[dict[str, Data]] = []

    class Spied(R2VPORecipe):
        def prepare(self, have: Any, ctx: Any) -> dict[str, Data]:
            found = super().prepare(have, ctx)
            seen.append({k: Data({n: v[n].clone() for n in v}, sequence=v.sequence) for k, v in found.items()})
            return found

    agent = replace(R2VPO, Recipe=Spied)("easy_hard", **SMALL, replay=2, env_kwargs=TASK)
    agent.learn(until=4 * agent.samples_per_iteration)
    assert [s["on"].shape[1] for s in seen] == [64, 128, 192, 192]
    fresh, last = [s["fresh"] for s in seen], seen[3]["on"]
    for i, old in enumerate((fresh[3], fresh[1], fresh[2])):  # the fresh one, then from the oldest on
        place = slice(64 * i, 64 * (i + 1))
        for name in ("action", "log_prob", "advantage", "valid"):
            assert torch.equal(last[name][:, place], old[name]), name
    assert last["group"].unique().shape[0] == 24
    # what is logged of rollouts is of the fresh one
    assert float(agent.scalars["rollout/success"]) == pytest.approx(
        float((fresh[3]["reward_components"][:, 0] >= 1).float().mean())
    )


def test_rollouts_of_different_lengths() -> None:
    config = R2VPO.Settings(
        model="tiny", model_layers=1, model_width=16, model_heads=2, n_prompts=2, group_size=2, replay=2
    )
    agent = R2VPO("sorting", config)
    agent.learn(until=3 * agent.samples_per_iteration)
    assert len(agent.estimator.ring.rollouts) == 2
    assert math.isfinite(float(agent.scalars["train/dual"]))


# -- config, learning, resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"variance_budget": 0.0}, {"dual_rate": 0.0}, {"dual_init": -1.0}, {"dual_init": 101.0}, {"replay": -1},
     {"dual_every": "epoch"}],
)  # fmt: skip
def test_bad_config(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        R2VPOConfig(**options)


@pytest.mark.parametrize("replay", [0, 2])
def test_it_learns(replay: int) -> None:
    agent = R2VPO("easy_hard", R2VPO.Settings(**SMALL, replay=replay), env_kwargs=TASK)
    before = agent.pass_at([1], questions=4, samples=64)["pass@1"]
    agent.learn(until=30 * agent.samples_per_iteration)
    assert before < 0.5
    assert agent.pass_at([1], questions=4, samples=64)["pass@1"] > 0.7


def state(agent: R2VPO) -> dict[str, Tensor]:
    ring = {f"{i} {k}": r[k] for i, r in enumerate(agent.estimator.ring.rollouts) for k in r}
    return agent.policy.state_dict() | ring | {"dual": agent.estimator.dual}


@pytest.mark.parametrize("every", ["rollout", "minibatch"])
def test_exact_resume_with_old_rollouts(tmp_path: Path, every: str) -> None:
    config = R2VPO.Settings(**SMALL, replay=2, batch_size=40, dual_every=every)
    whole, part = (R2VPO("easy_hard", config, seed=3, env_kwargs=TASK) for _ in range(2))
    size = whole.samples_per_iteration
    whole.learn(until=6 * size)
    part.learn(until=3 * size)
    part.save(tmp_path / "a.pt")
    part = R2VPO.load(tmp_path / "a.pt")
    part.learn(until=6 * size)
    expected, found = state(whole), state(part)
    assert expected.keys() == found.keys()
    assert len(part.estimator.ring.rollouts) == 2
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


# -- control ----------------------------------------------------------------------------------------------------------


def test_the_loss_reads_the_dual_when_it_is_called() -> None:
    """mean(-r A) = (-1.3 + .6 - .5 + 1) / 4 = -.05, lambda mean((r - 1)^2) = .5 (.09 + .16 + 1) / 4, less lambda times
    the budget."""
    ratio = torch.tensor([[1.3, 0.6, 1.0, 2.0]], dtype=torch.float64)
    level = LogRatio(ratio.log(), torch.zeros_like(ratio), torch.ones_like(ratio))
    advantage = torch.tensor([[1.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
    dual = torch.tensor(0.5, dtype=torch.float64)
    loss = lagrangian(lambda: dual, 0.04)
    assert float(loss(level, advantage, {}, Data({})).mean()) == pytest.approx(0.10625 - 0.5 * 0.04, abs=1e-12)
    dual.fill_(0.0)
    assert float(loss(level, advantage, {}, Data({})).mean()) == pytest.approx(-0.05, abs=1e-12)


# -- contract -----------------------------------------------------------------------------------------------------


class TestR2VPOContract(RecipeContract):
    method = R2VPO
    published = {
        "variance_budget": 0.04,
        "dual_init": 0.5,
        "dual_rate": 5.0,
        "dual_max": 100.0,
        "dual_every": "auto",
        "replay": 0,
        "aggregate": "token_mean",
    }
    matters = (({}, {"dual_init": 5.0}),)
    refused = {"verl": "learns between updates"}
    exceptions = {"test_equal_rewards_have_no_gradient": "the variance of the ratio is penalised whatever the rewards"}
