"""What every language-model agent does around its recipe: optimiser, schedule, warm start, reference, evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from agents.llm import agent as module
from agents.llm.agent import LLM
from agents.llm.baselines import GRPO
from ccrl.data import Data
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.seeding import stream_seed
from ccrl.testing.recipe_contract import RaggedTask
from ccrl.updaters import ModuleUpdater
from envs.text import make_task

SMALL: dict[str, Any] = {"model": "tabular", "n_prompts": 3, "group_size": 4}
BEST = 40.0
"""A logit beside which the others have no probability."""


def made(task: Any = None, seed: int = 0, **settings: Any) -> GRPO:
    return GRPO(RaggedTask() if task is None else task, GRPO.Settings(**SMALL | settings), seed=seed)


def table(logits: Tensor) -> TabularTokenPolicy:
    return TabularTokenPolicy(3, 8, 5, init=logits)


# -- what is built ----------------------------------------------------------------------------------------------------


def test_optimisers() -> None:
    adam = made(learning_rate=0.01, weight_decay=0.2).updaters["policy"].optimiser
    assert type(adam) is torch.optim.AdamW
    group = adam.param_groups[0]
    assert (float(group["lr"]), group["weight_decay"], group["betas"]) == (0.01, 0.2, (0.9, 0.999))
    sgd = made(optimiser="sgd", learning_rate=0.5).updaters["policy"].optimiser
    assert type(sgd) is torch.optim.SGD
    assert float(sgd.param_groups[0]["lr"]) == 0.5
    assert made().updaters["policy"].optimiser.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize(("largest", "moved"), [(1e-3, True), (0.0, False)])
def test_gradients_are_scaled_down_to_the_norm(largest: float, moved: bool) -> None:
    agent = made(optimiser="sgd", learning_rate=1.0, max_grad_norm=largest)
    before = agent.policy.logits.detach().clone()
    agent.learn(until=1)
    step = float((agent.policy.logits.detach() - before).norm())
    assert (step == pytest.approx(1e-3, rel=1e-4)) == moved
    assert step > 0.0


def test_the_rollout_that_is_asked_for() -> None:
    agent = made(n_prompts=2, group_size=5)
    assert agent.estimator.parts.request.counts.tolist() == [5, 5]
    assert agent.samples_per_iteration == 10
    assert agent.estimator.parts.components == ("accuracy", "grade")


def test_plan_sees_the_prompts() -> None:
    """A budget gives the questions different numbers of completions."""

    class Budget(GRPO.Recipe):
        def plan(self, points: Any, have: Any, ctx: Any) -> Any:
            seen.append(ctx.prompts.index.tolist())
            counts = torch.where(ctx.prompts.index == 1, 6, 3)
            return [] if have else [replace(self.parts.request, counts=counts)]

    seen = list[list[int]]()
    agent = replace(GRPO, Recipe=Budget)(RaggedTask(), **SMALL, seed=0)
    agent.learn(1)
    assert seen == [[0, 1, 2]] * 2
    assert agent.num_timesteps == 12


def test_lengths() -> None:
    task = make_task("arithmetic")
    tiny = {"model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2}
    agent = made(task, **tiny, max_new_tokens=2, pad_to_multiple_of=5)
    assert (agent.collector.steps, agent.collector.pad_to_multiple_of, agent.estimator.parts.max_length) == (2, 5, 2)
    assert made(task, **tiny).collector.steps == task.max_new_tokens


def test_the_step_size_falls_to_zero() -> None:
    agent, rates = made(lr_schedule="linear", learning_rate=0.4), list[float]()

    def look(agent: Any) -> bool:
        rates.append(float(agent.updaters["policy"].lr))
        return True

    agent.learn(until=4 * agent.samples_per_iteration, callback=look)
    assert sorted(set(rates), reverse=True) == pytest.approx([0.4, 0.3, 0.2, 0.1])


# -- warm start and reference -----------------------------------------------------------------------------------------


def test_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step size falls, its questions are drawn from a stream of their own, the reference is the policy after it."""
    rates, seeds, warmed = list[float](), list[int](), list[Tensor]()

    class Recording(ModuleUpdater):
        def step(self, *args: Any) -> Any:
            rates.append(float(self.lr))
            return super().step(*args)

    class Agent(LLM.of(GRPO)):  # type: ignore[misc]
        def _collector(self, seed: int, fields: Any = ()) -> Any:
            seeds.append(seed)
            return super()._collector(seed, fields)

        def warm_start(self, steps: int) -> float:
            monkeypatch.setattr(module, "ModuleUpdater", Recording)
            start = self.policy.logits.detach().clone()
            loss = super().warm_start(steps)
            warmed.append(self.policy.logits.detach().clone())
            assert not torch.equal(start, warmed[0])
            return loss

    config = GRPO.Settings(**SMALL, warm_start_steps=4, warm_start_lr=0.08, kl_coef=0.1, warm_start_batch=3)
    agent = Agent(RaggedTask(), config, seed=7)
    agent.learn(until=agent.samples_per_iteration)
    assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])
    assert seeds == [7, stream_seed(7, "warm start")]
    assert torch.equal(agent.ctx.bank.policy("ref").logits, warmed[0])
    assert not torch.equal(agent.policy.logits, warmed[0])
    agent.learn(until=2 * agent.samples_per_iteration)
    assert len(warmed) == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_the_reference_is_the_model_after_the_warm_start(rank: int) -> None:
    """With adapters as without: the first policy is the reference, whatever the supervised phase trained."""
    if rank:
        pytest.importorskip("peft")
    tiny = {"model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2, "lora_rank": rank}
    agent = made(make_task("arithmetic"), **tiny, kl_coef=0.1, warm_start_steps=5, warm_start_lr=0.05)
    agent.learn(agent.samples_per_iteration)
    assert float(agent.scalars["train/kl"]) == pytest.approx(0.0, abs=1e-7)


def test_warm_start_raises_the_probability_of_demonstrations() -> None:
    agent = made(warm_start_lr=0.1)
    first, last = agent.warm_start(1), agent.warm_start(30)
    assert last < 0.5 * first


# -- evaluation -------------------------------------------------------------------------------------------------------


def answers(first: float) -> Tensor:
    """Logits under which question 0 is answered with its number at odds of ``first``, then everything ends."""
    logits = torch.zeros(3, 8, 5)
    logits[:, 0, 4] = -BEST
    logits[0, 0, 0] = first
    logits[1:, 0, 3] = BEST  # 3 is nobody's number
    logits[:, 1:, 4] = BEST
    return logits


def test_pass_at_k_counts_by_question() -> None:
    agent = made()
    agent.learner.policy = table(answers(BEST))
    found = agent.pass_at([1, 16], questions=3, samples=16)
    assert found["pass@1"] == pytest.approx(1 / 3)
    assert found["pass@16"] == pytest.approx(1 / 3)
    assert found["length"] == 2.0
    uniform = torch.zeros(3, 8, 5)
    uniform[:, 0, 4] = -BEST
    uniform[:, 1:, 4] = BEST
    agent.learner.policy = table(uniform)
    assert agent.pass_at([1], questions=3)["entropy"] == pytest.approx(math.log(4.0) / 2, abs=1e-6)


def test_the_seed_decides_an_evaluation_and_training_does_not_notice() -> None:
    agent, other = made(seed=0), made(seed=1)
    before = agent.collector.generator.get_state()
    first, again, elsewhere = (a.pass_at([1, 4], seed=5) for a in (agent, agent, other))
    assert first == again == elsewhere
    assert first != agent.pass_at([1, 4], seed=6)
    assert torch.equal(agent.collector.generator.get_state(), before)
    assert agent.num_timesteps == 0


def test_evaluation_takes_the_most_probable_tokens() -> None:
    agent = made()
    agent.learner.policy = table(answers(0.1))
    found = agent.evaluate(None, 30, seed=0)
    assert (found.returns[::3] >= 1.0).all()
    assert (found.returns[1::3] < 1.0).all()
    assert (found.lengths == 2).all()
    sampled = agent.evaluate(None, 30, seed=0, deterministic=False)
    assert not (sampled.returns[::3] >= 1.0).all()


def test_completions_of_prompts() -> None:
    agent = made()
    agent.learner.policy = table(answers(BEST))
    assert agent.predict("0") == ("0", None)
    assert agent.predict(["1", "0"], state=1) == (["3", "0"], 1)
    agent.learner.policy = table(answers(0.0))
    assert agent.complete(["0"] * 32, seed=3) == agent.complete(["0"] * 32, seed=3)
    assert len(set(agent.complete(["0"] * 32, seed=3))) > 1
    assert set(agent.complete(["0"] * 8, deterministic=True)) == {"0"}


# -- the log ----------------------------------------------------------------------------------------------------------


def test_success_is_the_first_component() -> None:
    class Costly(RaggedTask):
        """Right answers cost half of what they pay."""

        def score(self, *args: Any) -> Any:
            found = super().score(*args)
            accuracy = found.components[:, 0]
            return found._replace(components=torch.stack([accuracy, -0.5 * accuracy], 1))

    agent = made(Costly(), group_size=16)
    agent.learn(until=1)
    scalars = {name: float(value) for name, value in agent.scalars.items()}
    assert 0.0 < scalars["rollout/success"] < 1.0
    assert scalars["rollout/success"] == pytest.approx(scalars["rollout/accuracy"])
    assert scalars["rollout/grade"] == pytest.approx(-0.5 * scalars["rollout/success"])


def test_capped_completions_and_tokens() -> None:
    task = make_task("arithmetic")
    agent = made(task, model="tiny", model_layers=1, model_width=16, model_heads=2, max_new_tokens=2, group_size=32)
    seen = list[Data]()
    collect = agent.collector.collect
    agent.collector.collect = lambda *args: seen.append(collect(*args)) or seen[-1]
    agent.learn(until=1)
    ended = (seen[0]["action"] == task.vocab.eos).any(0).float().mean()
    assert 0.0 < float(ended) < 1.0
    assert float(agent.scalars["rollout/capped"]) == pytest.approx(1.0 - float(ended))
    assert agent.scalars["time/tokens"] == int(seen[0]["present"].sum())
