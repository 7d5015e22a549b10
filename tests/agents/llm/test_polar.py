"""POLAR: the model's input, pairs of a pool and by rank, what the losses do not see, reinforcement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm.polar import POLAR, Overlap, PolarConfig, PolarReward, judged_by, ranked, triples, with_references
from agents.llm.reward_model import RewardTrainer
from ccrl.data import Data
from ccrl.estimators.terms import surrogate
from ccrl.llm.judged import Judged
from ccrl.llm.reward_head import Scored, pair_terms
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract
from ccrl.updaters import Stats

F64 = torch.float64


def pool(n: int) -> list[TabularTokenPolicy]:
    """Policy ``k`` writes the token ``k`` alone, up to the end token of the task."""
    found = []
    for k in range(n):
        logits = RaggedTask().initial_logits()
        logits[:, :5, k] += 60.0
        found.append(TabularTokenPolicy(3, 8, 5, init=logits))
    return found


@pytest.fixture
def collector() -> TokenCollector:
    return TokenCollector(RaggedTask(), seed=0)


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_triples_of_a_pool(collector: TokenCollector) -> None:
    found = triples(collector, pool(3), 60, torch.Generator().manual_seed(0))
    assert len(found) == 60
    data = found.data
    reference, first = data["reference"][:, 0], data["action"][0]
    assert torch.equal(reference[0::2], reference[1::2])
    assert torch.equal(first[0::2], reference[0::2]), "the preferred one is of the reference's policy"
    assert (first[1::2] != reference[0::2]).all()
    assert torch.equal(data["prompt"][0::2], data["prompt"][1::2])
    # every policy is the reference's and the other one: neither role is one policy's
    assert reference.bincount(minlength=3).min() > 20
    assert first[1::2].bincount(minlength=3).min() > 10
    with pytest.raises(ValueError, match="pool: expected at least two policies to tell apart, got 1"):
        triples(collector, pool(1), 4, torch.Generator())


def test_references_and_completions_are_other_samples(collector: TokenCollector) -> None:
    task = RaggedTask()
    policies = [TabularTokenPolicy(3, 8, 5, init=task.initial_logits()) for _ in range(2)]
    data = triples(collector, policies, 40, torch.Generator().manual_seed(0)).data
    same = (data["reference"][0::2, :2] == data["action"][:2, 0::2].t()).all(1).double().mean()
    assert float(same) < 0.4
    assert torch.equal(data["present"].sum(0) > 0, torch.ones(80, dtype=torch.bool))


def test_ranked_pairs() -> None:
    """Of three the best is the reference, the second is preferred; ties of the last two and pairs of two make none."""
    group = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    columns = {"action": torch.arange(8)[None], "present": torch.ones(1, 8), "valid": torch.ones(1, 8)}
    sequence = {"group": group, "prompt": group[:, None], "prompt_valid": torch.ones(8, 1)}
    data = Data(columns | sequence, sequence=frozenset(sequence))
    found = ranked(data, torch.tensor([3.0, 9.0, 5.0, 1.0, 1.0, 4.0, 2.0, 1.0]), torch.Generator().manual_seed(0))
    assert found.data["reference"].tolist() == [[1], [1]]
    assert found.data["action"].tolist() == [[2, 0]]
    assert found.data["prompt"].tolist() == [[0], [0]]


# -- the model --------------------------------------------------------------------------------------------------------


def rows() -> Data:
    """Two rows over five tokens: prompts (3), (1 2); references (0 1), (4); candidates (2), (0 3 1)."""
    columns = {
        "action": torch.tensor([[2, 0], [-1, 3], [-1, 1]]),
        "present": torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
        "prompt": torch.tensor([[-1, 3], [1, 2]]), "prompt_valid": torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
        "reference": torch.tensor([[0, 1], [4, -1]]), "reference_valid": torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
    }  # fmt: skip
    sequence = frozenset({"prompt", "prompt_valid", "reference", "reference_valid"})
    return Data(columns | {"valid": columns["present"]}, sequence=sequence)


def read(data: Data) -> list[list[int]]:
    tokens = torch.cat([data["prompt"], data["action"].t()], 1)
    here = torch.cat([data["prompt_valid"], data["present"].t()], 1) > 0
    return [row[mask].tolist() for row, mask in zip(tokens, here)]


@pytest.fixture
def tiny() -> Any:
    pytest.importorskip("transformers")

    def make(**options: Any) -> PolarReward:
        torch.manual_seed(0)
        return PolarReward.tiny(5, layers=1, width=16, heads=2, **options)

    return make


def test_the_text_that_it_reads(tiny: Any) -> None:
    """prompt reference <5> prompt candidate <6>."""
    assert read(tiny().assembled(rows())) == [[3, 0, 1, 5, 3, 2, 6], [1, 2, 4, 5, 1, 2, 0, 3, 1, 6]]
    cut = tiny(max_prompt=1, max_response=1)
    assert read(cut.assembled(rows())) == [[3, 0, 5, 3, 2, 6], [2, 4, 5, 2, 0, 6]]


def test_rows_are_judged_each_as_alone(tiny: Any) -> None:
    judge = tiny()
    with torch.no_grad():
        found = judge(rows())
        for i, ids in enumerate(read(judge.assembled(rows()))):
            hidden = judge.judge.body(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
            torch.testing.assert_close(found[i], judge.judge.head(hidden[0, -1])[0], rtol=1e-4, atol=1e-5)


def test_an_empty_reference_is_refused(tiny: Any) -> None:
    data = rows()
    empty = Data({**data, "reference_valid": torch.tensor([[1.0, 1.0], [0.0, 0.0]])}, sequence=data.sequence)
    with pytest.raises(ValueError, match="expected a reference for every candidate"):
        tiny()(empty)


def test_a_folder(tiny: Any, tmp_path: Path) -> None:
    judge = tiny(max_response=2)
    with torch.no_grad():
        judge.judge.head.weight.add_(1.0)
    judge.save(tmp_path / "judge")
    again = PolarReward.load(tmp_path / "judge")
    assert again.max_response == 2
    assert torch.equal(again(rows()), judge(rows()))
    with pytest.raises(FileNotFoundError, match=r"expected 'overlap' or a folder written by PolarReward\.save"):
        PolarReward.load(tmp_path)
    with pytest.raises(ValueError, match="expected at least 9 tokens"):
        PolarReward(judge.judge.body, 7)


def test_it_learns_to_tell_policies_apart(tiny: Any, collector: TokenCollector) -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = triples(collector, pool(4), 60, generator), triples(collector, pool(4), 40, generator)
    trainer = RewardTrainer(
        RaggedTask(), data=train, policy=tiny(), batch_size=32, updates=20, learning_rate=1e-2, seed=0
    )
    trainer.learn(until=120)
    assert trainer.report(test)["accuracy"] > 0.85


# -- the losses -------------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """Rewards by row, and something of prompt and reference on top."""

    def __init__(self, rewards: Tensor, more: float = 0.0) -> None:
        super().__init__()
        self.rewards, self.more = nn.Parameter(rewards), more

    @property
    def device(self) -> torch.device:
        return self.rewards.device

    def forward(self, batch: Data) -> Tensor:
        return self.rewards + self.more * (batch["prompt"][:, 0] + 10.0 * batch["reference"][:, 0])


def loss(model: nn.Module, judged: Judged) -> tuple[float, Tensor]:
    batch = judged.whole()
    total, _ = surrogate(pair_terms(), Scored(model)(batch, frozenset({"score"})), batch)
    return float(total.detach()), torch.autograd.grad(total, list(model.parameters()))[0]


def test_the_loss_of_the_exact_rewards_of_two_gaussians() -> None:
    """Policies are means of variance 4, trajectories have variance 1 around them: r*(1, 1.2) = 0.6103811793 and
    r*(1, -2) = -1.2669521540, hence softplus(-1.8773333333) = 0.1423651214."""
    three = (torch.zeros(3, 1, 1, dtype=torch.int64), torch.ones(3, 1, 1))
    judged = _pair(three)
    found, _ = loss(Given(torch.tensor([0.6103811793, -1.2669521540], dtype=F64)), judged)
    assert found == pytest.approx(0.1423651214, abs=1e-10)
    known_nothing, _ = loss(Given(torch.zeros(2, dtype=F64)), judged)
    assert known_nothing == pytest.approx(math.log(2.0), abs=1e-12)


def _pair(three: tuple[Tensor, Tensor]) -> Judged:
    tokens, present = three
    columns = {"action": tokens[1:, :, 0].t(), "present": present[1:, :, 0].t(), "valid": present[1:, :, 0].t()}
    sequence = {
        "prompt": torch.zeros(2, 1, dtype=torch.int64), "prompt_valid": torch.ones(2, 1),
        "reference": tokens[0].t().expand(2, -1), "reference_valid": present[0].t().expand(2, -1),
        "group": torch.zeros(2, dtype=torch.int64), "preferred": torch.tensor([1.0, -1.0]),
    }  # fmt: skip
    return Judged(Data(columns | sequence, sequence=frozenset(sequence)), "pairs")


def test_what_depends_on_prompt_and_reference_alone_is_in_no_loss(collector: TokenCollector) -> None:
    for judged in (
        triples(collector, pool(4), 20, torch.Generator().manual_seed(0)),
        ranked(_many(), torch.arange(30.0), torch.Generator().manual_seed(1)),
    ):
        rewards = torch.randn(2 * len(judged), dtype=F64, generator=torch.Generator().manual_seed(2))
        plain, other = loss(Given(rewards), judged), loss(Given(rewards, 3.0), judged)
        assert plain[0] == pytest.approx(other[0], abs=1e-12)
        torch.testing.assert_close(plain[1], other[1], rtol=0.0, atol=1e-12)


def _many() -> Data:
    group = torch.arange(30) // 3
    columns = {"action": torch.arange(30)[None] % 5, "present": torch.ones(1, 30), "valid": torch.ones(1, 30)}
    sequence = {"group": group, "prompt": group[:, None], "prompt_valid": torch.ones(30, 1)}
    return Data(columns | sequence, sequence=frozenset(sequence))


def test_of_one_policy_nothing_can_be_learned(collector: TokenCollector) -> None:
    """Preferred and rejected are then exchangeable: with every pair both ways round the loss is log 2 at least, for
    any model, and log 2 for one that tells nothing apart."""
    judged = triples(collector, pool(2), 10, torch.Generator().manual_seed(0))
    exchanged = Judged(
        Data({**judged.data, "preferred": -judged.data["preferred"]}, sequence=judged.data.sequence), "pairs"
    )
    for scale in (0.0, 0.1, 1.0):
        rewards = scale * torch.randn(20, dtype=F64, generator=torch.Generator().manual_seed(0))
        both = 0.5 * (loss(Given(rewards), judged)[0] + loss(Given(rewards), exchanged)[0])
        assert both >= math.log(2.0) - 1e-12
        assert (both == pytest.approx(math.log(2.0), abs=1e-12)) is (scale == 0.0)


# -- reinforcement ----------------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {"model": "tabular", "n_prompts": 3, "group_size": 8, "learning_rate": 0.1}


def have(agent: Any) -> dict[str, Data]:
    found: dict[str, Data] = {}
    while requests := agent.estimator.plan({}, found, agent.ctx):
        for request in requests:
            found[request.tag] = agent.collector.collect(request, agent.policy)
    return found


def test_rewards_are_the_models_beside_the_reference_less_log_pi() -> None:
    agent = POLAR(RaggedTask(), tau=0.5, seed=0, **TABLE)
    found = have(agent)
    on = agent.estimator.prepare(found, agent.ctx)["on"]
    shown = found["reference"]["action"].t()[on["group"]]  # number, its successor, end: never padded here
    width = min(3, on.shape[0])
    equal = (on["action"][:width] == shown.t()[:width]) & (on["present"][:width] > 0)
    said = equal.sum(0) / 3.0
    torch.testing.assert_close(on["polar_reward"], said)
    whole = said - 0.5 * (on["log_prob"] * on["valid"]).sum(0)
    torch.testing.assert_close(on["polar_return"], whole)
    for g in range(3):
        mine = on["group"] == g
        z = (whole[mine] - whole[mine].mean()) / (whole[mine].std() + 1e-6)
        torch.testing.assert_close(on["advantage"][0, mine], z, rtol=1e-4, atol=1e-5)
    assert torch.equal(on["episode_reward"], found["on"]["episode_reward"]), "facts stay facts"


def test_a_number_added_per_prompt_changes_no_advantage() -> None:
    """Groups are compared with themselves: rewards of other prompts and references mean nothing to them."""

    class More(Overlap):
        def forward(self, batch: Data) -> Tensor:
            return super().forward(batch) + 5.0 * batch["prompt"][:, 0] + 3.0 * batch["reference"][:, 1]

    advantages = []
    for judge in (Overlap(), More()):
        agent = judged_by(judge)(RaggedTask(), seed=0, **TABLE)
        advantages.append(agent.estimator.prepare(have(agent), agent.ctx)["on"]["advantage"])
    torch.testing.assert_close(*advantages, rtol=1e-3, atol=1e-3)


def test_prompts_without_a_reference_are_left_out() -> None:
    agent = POLAR(RaggedTask(), seed=0, **TABLE)
    found = have(agent)
    shown = found["reference"]
    some = torch.tensor([1.0, 0.0, 1.0])
    missing = Data({**shown, **{name: shown[name] * some for name in ("valid", "present")}}, sequence=shown.sequence)
    on = agent.estimator.prepare(found | {"reference": missing}, agent.ctx)["on"]
    assert on["group"].unique().tolist() == [0, 2]
    missing = Data({**shown, **{name: shown[name] * 0.0 for name in ("valid", "present")}}, sequence=shown.sequence)
    prepared = agent.estimator.prepare(found | {"reference": missing}, agent.ctx)
    assert agent.estimator.idle(prepared["on"], agent.ctx), "an iteration without any reference trains nothing"
    stats = Stats()
    agent.estimator.after_update(prepared, stats, agent.ctx)
    assert set(stats) == {"sequence_entropy"}
    assert prepared["sampled"] is found["on"]


def test_replies_of_a_demonstration_are_part_of_the_reference() -> None:
    """Candidates have theirs, and reward models learned from pairs that have them."""
    valid = torch.tensor([[1.0], [0.0], [1.0]])
    columns = {"valid": valid, "present": torch.ones(3, 1), "action": torch.tensor([[4], [7], [5]]),
               "group": torch.zeros(1, dtype=torch.int64)}  # fmt: skip
    data = Data(columns, raw=frozenset(), sequence=frozenset({"group"}))
    found = with_references(data, data)
    assert found is not None
    assert found["reference_valid"].tolist() == [[1.0, 1.0, 1.0]]


def test_it_moves_toward_the_references() -> None:
    agent = POLAR(RaggedTask(), seed=0, tau=0.02, **TABLE)
    seen = []
    agent.learn(30 * agent.samples_per_iteration, callback=lambda a: seen.append(dict(a.scalars)))
    assert seen[-1]["train/polar_reward"] > 0.8 > seen[0]["train/polar_reward"] + 0.4
    assert seen[-1]["rollout/accuracy"] > 0.8, "the references begin with what the verifier wants"


def test_entropy_is_kept_with_tau() -> None:
    found = []
    for tau in (0.0, 0.5):
        agent = POLAR(RaggedTask(), seed=0, tau=tau, **TABLE)
        agent.learn(25 * agent.samples_per_iteration)
        found.append(float(agent.scalars["train/sequence_entropy"]))
    assert found[1] > found[0] + 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"tau": -1.0}, "tau: expected"), ({"judge_batch": -1}, "judge_batch: expected")],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolarConfig(**settings)


def test_judges_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="judge: expected 'overlap' or a folder"):
        POLAR(RaggedTask(), judge=str(tmp_path), **TABLE)
    with pytest.raises(ValueError, match="the reward model was given"):
        judged_by(Overlap())(RaggedTask(), judge=str(tmp_path), **TABLE)
    with pytest.raises(ValueError, match="has no demonstrations"):
        POLAR("modsum", **TABLE)


class TestPolarContract(RecipeContract):
    method = POLAR
    published = {"judge": "overlap", "judge_batch": 0, "tau": 0.0, "aggregate": "token_mean"}
    matters = (
        ({}, {"tau": 0.5}),
        ({}, {"clip_high": 0.01}),
    )
    texts = ("judge",)
    refused = {
        "trl": "second rollout ('reference': demonstrations)",
        "verl": "second rollout ('reference': demonstrations)",
    }
    exceptions = {
        "test_equal_rewards_have_no_gradient": "reads no rewards of the verifier",
        "test_equal_rewards_leave_the_first_policy_alone": "reads no rewards of the verifier",
    }
