"""Recipes inside TRL: the same loss and gradient as TRL's own where both know the method, and what TRL cannot host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.llm import get_method
from agents.llm.baselines import CISPO, GRPO, GSPO, SAPO, DrGRPO
from agents.llm.bnpo import BNPO
from ccrl.estimators.base import Context
from ccrl.llm.trl import grpo_trainer

GROUP = 4
LENGTH = 6


def share_of_a(completions: list[str], **_: Any) -> list[float]:
    """How much of a completion is the letter a."""
    return [text.split().count("a") / LENGTH for text in completions]


def short(completions: list[str], **_: Any) -> list[float]:
    return [1.0 - 0.1 * len(text.split()) for text in completions]


Build = Callable[..., Any]


@pytest.fixture
def build(make_trainer: Build) -> Build:
    """A trainer of a class, rewarded for the letter a where nothing else is said."""
    return lambda cls, *, rewards=(share_of_a,), **args: make_trainer(
        cls, rewards, **{"num_generations": GROUP, "max_completion_length": LENGTH} | args
    )


def generated(trainer: Any) -> dict[str, Any]:
    """One generation batch, its first micro-batch, as in training."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def value_and_gradient(trainer: Any, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trainer.model.parameters()])


TOKEN_MEAN = GRPO.Config(aggregate="token_mean", clip_high=0.28)
SAME = {
    "grpo": (GRPO, GRPO.Config(), {"loss_type": "grpo"}),
    "dr_grpo": (DrGRPO, DrGRPO.Config(), {"loss_type": "dr_grpo"}),
    "bnpo": (GRPO, TOKEN_MEAN, {"loss_type": "bnpo", "epsilon_high": 0.28}),
    "dapo": (GRPO, TOKEN_MEAN, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "cispo": (CISPO, CISPO.Config(bound="cap", cap=1.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "sapo": (SAPO, SAPO.Config(), {"loss_type": "sapo"}),
    "gspo": (
        GSPO,
        GSPO.Config(clip_low=0.02, clip_high=0.03),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "grpo_kl": (GRPO, GRPO.Config(kl_coef=0.1), {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False}),
    "dapo_kl": (
        GRPO,
        GRPO.Config(aggregate="token_mean", kl_coef=0.1),
        {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_those_of_trl(trl: Any, build: Build, name: str) -> None:
    method, config, args = SAME[name]
    kept = {"beta": args["beta"]} if "beta" in args else {}
    ours, theirs = build(grpo_trainer(method.Recipe, config), **kept), build(trl.GRPOTrainer, **args)
    inputs = generated(ours)
    assert (inputs["completion_mask"] == 0).any(), "all completions are equally long"
    with torch.no_grad():
        now = ours.host_policy(ours._batch(inputs), frozenset({"log_prob"}))["log_prob"].t()
    # ratios on both sides of the bounds
    inputs["old_per_token_logps"] = now + 0.3 * torch.randn_like(now) * inputs["completion_mask"]
    if "beta" in args:
        inputs["ref_per_token_logps"] = now + 0.3 * torch.randn_like(now)
        inputs["recipe_step_ref_log_prob"] = inputs["ref_per_token_logps"]
    columns = ours._batch(inputs)
    if "sequence_advantage" in columns:
        inputs["advantages"] = columns["sequence_advantage"]
    else:
        inputs["advantages"] = columns["advantage"].t()
    assert (inputs["advantages"] != 0).any()
    theirs.model.load_state_dict(ours.model.state_dict())
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    ours_loss, ours_gradient = value_and_gradient(ours, inputs)
    theirs_loss, theirs_gradient = value_and_gradient(theirs, inputs)
    assert ours_loss == pytest.approx(theirs_loss, abs=1e-6)
    assert theirs_gradient.norm() > 1e-3
    torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=0.0, atol=1e-6)


def test_advantages_are_the_group_z_score_of_trl(build: Build) -> None:
    trainer = build(grpo_trainer(GRPO.Recipe, GRPO.Config()), rewards=(share_of_a, short), reward_weights=[1.0, 0.5])
    inputs = generated(trainer)
    # TRL adds 1e-4 to the deviation, the recipe 1e-6
    ours = trainer._batch(inputs)["advantage"][0]
    assert (ours != 0).any()
    torch.testing.assert_close(ours.double(), inputs["advantages"].double(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean_token_mean", "sequence_mean", "fixed"])
def test_pieces_of_an_optimiser_step_add_up(build: Build, aggregate: str) -> None:
    cls = grpo_trainer(GRPO.Recipe, GRPO.Config(aggregate=aggregate))
    trainer = build(cls, per_device_train_batch_size=GROUP, gradient_accumulation_steps=2)
    first = generated(trainer)
    second = trainer._buffered_inputs[1]
    whole = {
        name: torch.cat([first[name], second[name]]) if first[name].dim() else first[name]
        for name in first if isinstance(first[name], torch.Tensor)
    }  # fmt: skip
    assert int(first["n_sequences"]) == 2 * GROUP
    assert int(first["n_valid"]) == int(whole["completion_mask"].sum())
    assert first["completion_mask"].sum() != second["completion_mask"].sum()
    parts = [value_and_gradient(trainer, piece) for piece in (first, second)]
    loss, gradient = value_and_gradient(trainer, whole)
    assert loss == pytest.approx(parts[0][0] + parts[1][0], abs=1e-6)
    torch.testing.assert_close(gradient, parts[0][1] + parts[1][1], rtol=0.0, atol=1e-6)


def test_accumulation_changes_no_update(build: Build) -> None:
    """TRL's loop neither divides the pieces again nor forgets one: two halves step like the whole."""
    cls = grpo_trainer(GRPO.Recipe, GRPO.Config(aggregate="token_mean"))
    found = []
    for size, pieces in ((2 * GROUP, 1), (GROUP, 2)):
        trainer = build(cls, per_device_train_batch_size=size, gradient_accumulation_steps=pieces, max_steps=1, seed=3)
        torch.manual_seed(1)
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert len([row for row in trainer.state.log_history if "recipe/loss" in row]) == 1
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=1e-6)


def test_later_iterations_compare_with_the_policy_that_sampled(build: Build) -> None:
    trainer = build(grpo_trainer(GRPO.Recipe, GRPO.Config(clip_low=1.0, clip_high=10.0)), num_iterations=2, max_steps=2)
    trainer.train()
    rows = [row["recipe/approx_kl"] for row in trainer.state.log_history if "recipe/approx_kl" in row]
    assert rows[0] == pytest.approx(0.0, abs=1e-9)
    assert rows[1] > 1e-9


def test_an_unscored_completion_is_not_trained_on(build: Build) -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 1 else float(i) for i, _ in enumerate(completions)]

    trainer = build(grpo_trainer(DrGRPO.Recipe, DrGRPO.Config()), rewards=(some,))
    inputs = generated(trainer)
    data = trainer._have["on"]
    torch.testing.assert_close(
        data["episode_reward"][:GROUP], torch.tensor([0.0, 5 / 3, 2.0, 3.0], dtype=data["episode_reward"].dtype)
    )
    assert data["valid"][:, 1].sum() == 0
    assert int(inputs["n_valid"]) == int(data["valid"].sum()) < int(inputs["completion_mask"].sum())


def test_state_of_a_recipe_is_saved_and_restored(build: Build, tmp_path: Path) -> None:
    class Counting(GRPO.Recipe):
        def __init__(self, config: Any, parts: Any) -> None:
            super().__init__(config, parts)
            self.register_buffer("updates", torch.zeros(()))

        def after_update(self, data: Any, stats: Any, ctx: Context) -> None:
            self.updates += 1

    cls = grpo_trainer(Counting, GRPO.Config())
    first = build(cls, max_steps=3, save_strategy="steps", save_steps=3)
    first.train()
    assert float(first.hosted.estimator.updates) == 2.0  # the third is over when a fourth begins
    second = build(cls, max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert float(second.hosted.estimator.updates) == 2.0


def test_bnpo_learns_inside_trl(build: Build) -> None:
    trainer = build(
        grpo_trainer(BNPO.Recipe, BNPO.Config()), dtype=torch.float32, max_steps=25, optim="adamw_torch",
        learning_rate=1e-2, per_device_train_batch_size=8 * GROUP, prompts=8,
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    assert last > first + 0.2, rewards
    assert {"recipe/alpha_reward", "recipe/clip_fraction"} <= set().union(*trainer.state.log_history)


# -- what does not fit ------------------------------------------------------------------------------------------------


def refused(build: Build, name: str, match: str, options: dict[str, Any] | None = None, **args: Any) -> None:
    method = get_method(name)
    with pytest.raises(ValueError, match=match):
        build(grpo_trainer(method.Recipe, method.Config(**options or {})), **args)


@pytest.mark.parametrize(
    ("name", "match"),
    [("real", "minibatches split groups"), ("sft", "trains on demonstrations"), ("dapo", "second rollout")],
)
def test_recipes_that_need_more_are_refused(build: Build, name: str, match: str) -> None:
    refused(build, name, match)


def test_dapo_without_its_second_rollout_fits(build: Build) -> None:
    from agents.llm.baselines import DAPO

    assert build(grpo_trainer(DAPO.Recipe, DAPO.Config(max_tries=1))).hosted.columns >= {"advantage", "n_valid"}


def test_options_without_effect_are_refused(build: Build) -> None:
    refused(build, "grpo", "no effect here", loss_type="grpo")
    refused(build, "grpo", "reference policy", beta=0.1)
    refused(build, "grpo", "reference policy", options={"kl_coef": 0.1})
    refused(build, "grpo", "multiple of", gradient_accumulation_steps=2, steps_per_generation=1)


def test_missing_column_is_named(build: Build) -> None:
    class Wants(GRPO.Recipe):
        def stages(self) -> Any:
            return (lambda data: data.derive(x=data["answer"]), *super().stages())

    with pytest.raises(ValueError, match="no column 'answer'"):
        build(grpo_trainer(Wants, GRPO.Config()))


def test_trial_leaves_no_trace_in_the_recipe(build: Build) -> None:
    seen: list[Any] = []

    class Remembers(GRPO.Recipe):
        def __init__(self, config: Any, parts: Any) -> None:
            super().__init__(config, parts)
            self.register_buffer("calls", torch.zeros(()))
            seen.append(self)

        def prepare(self, have: Any, ctx: Any) -> Any:
            self.calls += 1
            return super().prepare(have, ctx)

    trainer = build(grpo_trainer(Remembers, GRPO.Config()))
    assert [float(each.calls) for each in seen] == [2.0, 0.0]
    assert trainer.hosted.estimator is seen[1]
    assert copy.deepcopy(trainer.config) == GRPO.Config()
