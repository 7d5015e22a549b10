"""Training reward models, and every method on what one says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.llm import METHODS, get_method
from agents.llm.agent import LLMMethod
from agents.llm.baselines import DAPO, GRPO
from agents.llm.d3s import D3S
from agents.llm.reward_model import RewardTrainer, judged
from ccrl.data import Data
from ccrl.llm.judged import Judged
from ccrl.llm.reward_head import CausalReward
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract


class FirstToken(nn.Module):
    """A completion is worth what its first token says, whatever the question."""

    def __init__(self, symbols: int = 5) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.arange(float(symbols)))

    @property
    def device(self) -> torch.device:
        return self.value.device

    def forward(self, batch: Data) -> Tensor:
        return self.value[batch["action"][0]]


def pairs(n: int = 40) -> Judged:
    """The larger first digit is preferred."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for a, b, q in torch.randint(10, (n, 3), generator=generator).tolist():
        rows.append({"prompt": f"{q}%10=", "chosen": str(max(a, b)), "rejected": str(min(a, b))})
    return Judged.pairs(rows, TASK.vocab)


def arithmetic() -> Any:
    from envs.text import make_task

    return make_task("arithmetic", operands=1, digits=1, modulus=10, max_new_tokens=3)


TASK = arithmetic()
SMALL: dict[str, Any] = {"model_layers": 1, "model_width": 16, "model_heads": 2, "batch_size": 16, "updates": 10}


@pytest.fixture
def transformers() -> None:
    pytest.importorskip("transformers")


# -- training ---------------------------------------------------------------------------------------------------------


def test_it_learns_what_is_preferred(transformers: None) -> None:
    train, test = pairs(80).split(0.7)
    trainer = RewardTrainer(TASK, data=train, **SMALL | {"learning_rate": 1e-2}, seed=0)
    before = trainer.report(test)
    assert before["loss"] > 0.5
    trainer.learn(until=60)
    assert trainer.num_timesteps == 60
    assert trainer.report(test)["accuracy"] > 0.85
    assert trainer.scalars["train/pair_accuracy"] > 0.85
    assert float(trainer.updaters["policy"].lr) < 2e-3, "the step size falls over the training"


def test_it_learns_verdicts(transformers: None) -> None:
    rows = [{"prompt": f"{q}%10=", "completion": str(a), "verdict": float(a >= 5)} for q in range(4) for a in range(10)]
    trainer = RewardTrainer(TASK, data=Judged.verdicts(rows, TASK.vocab), **SMALL | {"learning_rate": 1e-2})
    trainer.learn(until=60)
    found = trainer.report(trainer.judgements)
    assert found["auc"] > 0.95
    assert found["r2"] > 0.6
    scored = RewardTrainer(TASK, data=Judged.verdicts(rows, TASK.vocab), verdicts="score", **SMALL)
    scored.learn(until=10)
    assert "brier" not in scored.report(scored.judgements)


def test_a_checkpoint_goes_on_bit_for_bit_and_judges_without_data(transformers: None, tmp_path: Path) -> None:
    data = pairs()
    whole, half = (RewardTrainer(TASK, data=data, **SMALL, seed=2) for _ in range(2))
    whole.learn(until=40)
    half.learn(until=40, callback=lambda agent: agent.num_timesteps < 20)
    half.save(tmp_path / "a.pt")
    again = RewardTrainer.load(tmp_path / "a.pt", env=TASK, data=data)
    again.learn(until=40)
    for a, b in zip(whole.reward.parameters(), again.reward.parameters()):
        assert torch.equal(a, b)
    alone = RewardTrainer.load(tmp_path / "a.pt", env=TASK)
    assert torch.equal(alone.reward(data.data), half.reward(data.data))
    with pytest.raises(ValueError, match="expected judgements to learn from, got none"):
        alone.learn(until=40)


def test_a_file_of_judgements(transformers: None, tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "1%10=", "chosen": str(i), "rejected": "0"}) for i in (1, 2, 3)))
    assert len(RewardTrainer(TASK, data_file=str(path), **SMALL).judgements) == 3
    path.write_text(json.dumps({"prompt": "1%10=", "completion": "1", "verdict": 3.0}))
    with pytest.raises(ValueError, match="verdicts: expected 'score' for verdicts outside"):
        RewardTrainer(TASK, data_file=str(path), **SMALL)
    trainer = RewardTrainer(TASK, data_file=str(path), verdicts="score", **SMALL)
    assert len(trainer.judgements) == 1
    trainer.save(tmp_path / "a.pt")
    path.unlink()
    alone = RewardTrainer.load(tmp_path / "a.pt", env=TASK)  # to judge
    assert torch.equal(alone.reward(pairs().data), trainer.reward(pairs().data))
    with pytest.raises(ValueError, match=r"judgements to learn from, got none \(.*No such file.*judged\.jsonl"):
        alone.learn(until=40)
    with pytest.raises(FileNotFoundError):
        RewardTrainer(TASK, data_file=str(path), verdicts="score", **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verdicts": "score"}, "verdicts: expected 'probability' with pairs"),
        ({"center_coef": -0.1}, "center_coef: expected"),
    ],
)
def test_bad_settings(transformers: None, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardTrainer(TASK, data=pairs(), **SMALL | settings)
    rows = [{"prompt": "1%10=", "completion": "1", "verdict": 1.0}]
    with pytest.raises(ValueError, match=r"center_coef: expected 0\.0 with verdicts"):
        RewardTrainer(TASK, data=Judged.verdicts(rows, TASK.vocab), center_coef=0.1, **SMALL)


def test_a_model_of_ones_own() -> None:
    trainer = RewardTrainer(TASK, data=pairs(), policy=FirstToken(TASK.vocab.size), **SMALL)
    assert isinstance(trainer.reward, FirstToken)
    trainer.learn(until=10)


# -- in the verifier's place ------------------------------------------------------------------------------------------

TABLE: dict[str, Any] = {"model": "tabular", "n_prompts": 3, "learning_rate": 0.1}


def test_a_method_learns_what_the_model_says_and_logs_what_the_verifier_says() -> None:
    agent = judged(GRPO, FirstToken())(RaggedTask(), group_size=8, seed=0, **TABLE)
    seen = []
    agent.learn(30 * agent.samples_per_iteration, callback=lambda a: seen.append(dict(a.scalars)))
    assert seen[-1]["train/judged_reward"] > 2.7 > seen[0]["train/judged_reward"]  # the first token 3
    assert seen[-1]["rollout/success"] < 0.1, "the question's number is 0, 1 or 2"
    assert agent.name == "judged_grpo"


def test_facts_stay_facts() -> None:
    agent = judged(GRPO, FirstToken(), weight=2.0, keep=1.0)(RaggedTask(), group_size=4, seed=0, **TABLE)
    data = agent.collector.collect(agent.estimator.parts.request, agent.policy)
    facts = {name: data[name].clone() for name in ("episode_reward", "reward", "reward_components")}
    prepared = agent.estimator.prepare({"on": data}, agent.ctx)
    for name, fact in facts.items():
        assert torch.equal(data[name], fact)
        assert torch.equal(prepared["sampled"][name], fact)
    total = 2.0 * data["action"][0] + facts["episode_reward"]
    on = prepared["on"]
    torch.testing.assert_close(on["episode_reward"], total)
    torch.testing.assert_close(on["reward"].sum(0), total)
    torch.testing.assert_close(on["reward_components"][:, 0], total)
    centred = total - total.view(3, 4).mean(1).repeat_interleave(4)
    advantage = on["advantage"].sum(0) / on["valid"].sum(0)
    assert torch.equal(advantage > 0, centred > 0)


def test_the_model_is_asked_once_per_rollout() -> None:
    class Counting(FirstToken):
        calls = 0

        def forward(self, batch: Data) -> Tensor:
            type(self).calls += 1
            return torch.zeros(batch.shape[1])  # nothing to choose between: DAPO asks for more

    agent = judged(DAPO, Counting())(RaggedTask(), group_size=4, max_tries=3, **TABLE)
    agent.learn(1)
    assert Counting.calls == 3


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"capo", "empg"}))  # which read hidden states
def test_every_method_takes_a_reward_model(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, LLMMethod)
    sizes = {"group_size": 4} if method.Config().group_size > 1 else {}
    agent = judged(method, FirstToken())(RaggedTask(), **TABLE | sizes)
    agent.learn(1)
    assert agent.iteration == 1


def test_its_state_is_saved_with_the_agent(tmp_path: Path) -> None:
    model = FirstToken()
    method = judged(GRPO, model)
    agent = method("sequence_match", group_size=4, env_kwargs={"questions": 3, "symbols": 5}, **TABLE)
    agent.learn(1)
    agent.save(tmp_path / "a.pt")
    with torch.no_grad():
        model.value.zero_()
    method.load(tmp_path / "a.pt")
    assert model.value.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_is_no_reward_model_of_completions() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        judged(GRPO, lambda batch: 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight: expected a finite number other than 0"):
        judged(GRPO, FirstToken(), weight=0.0)

    class PerToken(FirstToken):
        def forward(self, batch: Data) -> Tensor:
            return batch["present"]

    with pytest.raises(ValueError, match="expected a reward model of completions"):
        judged(GRPO, PerToken())(RaggedTask(), group_size=4, **TABLE).learn(1)


def test_selections_are_made_by_what_the_model_says() -> None:
    agent = judged(D3S, FirstToken())(RaggedTask(), group_size=8, **TABLE)
    agent.learn(1)
    assert agent.scalars["train/useful_sampled"] > 0.5


def test_a_head_takes_a_models_body(transformers: None) -> None:
    trainer = RewardTrainer(TASK, data=pairs(), **SMALL)
    assert isinstance(trainer.reward, CausalReward)
    assert not any("lm_head" in name for name, _ in trainer.reward.named_parameters())


class TestJudgedContract(RecipeContract):
    method = judged(GRPO, FirstToken(16).double(), keep=1.0)
    published = {"aggregate": "sequence_mean_token_mean"}
    refused = {"trl": "", "verl": ""}
    exceptions = {
        "test_equal_rewards_have_no_gradient": "rewards are the model's as well",
        "test_equal_rewards_leave_the_first_policy_alone": "rewards are the model's as well",
        "test_inside_other_trainers": "reward models of other trainers are theirs",
        "test_trains_and_resumes_on_arithmetic": "the model of the test knows five tokens",
    }
