"""The baselines keep the contract of recipes, or say why not."""

from __future__ import annotations

from agents.llm.baselines import CISPO, DAPO, GRPO, GSPO, SAPO, DrGRPO
from agents.llm.preferences import DPO, IPO, SFT
from agents.llm.reinforce import PPO, REINFORCE, RLOO
from ccrl.estimators import aggregates
from ccrl.testing.recipe_contract import RaggedTask, RecipeContract


class TestGRPOContract(RecipeContract):
    method = GRPO
    published = {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "sequence_mean_token_mean"}
    on_policy = aggregates.sequence_mean_token_mean
    matters = (
        ({}, {"clip_low": 0.01}),
        ({}, {"clip_high": 0.01}),
        ({}, {"entropy_coef": 0.1}),
        ({"kl_coef": 0.1}, {"kl_coef": 0.2}),
        ({}, {"aggregate": "token_mean"}),
        ({}, {"aggregate": "sequence_mean"}),
        ({}, {"aggregate": "fixed"}),
        ({}, {"temperature": 2.0}),
    )


class TestDrGRPOContract(RecipeContract):
    method = DrGRPO
    published = {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "fixed"}
    on_policy = aggregates.length_constant(RaggedTask.fixed_length)


class TestDAPOContract(RecipeContract):
    method = DAPO
    published = {
        "clip_low": 0.2,
        "clip_high": 0.28,
        "overlong_share": 0.2,
        "overlong_floor": True,
        "max_tries": 4,
        "aggregate": "token_mean",
    }
    on_policy = aggregates.mean
    matters = (({"max_tries": 1}, {"max_tries": 1, "overlong_share": 0.6}),)
    refused = {"trl": "second rollout ('on1': more completions)", "verl": "second rollout ('on1': more completions)"}
    hosted = {"trl": {"max_tries": 1}, "verl": {"max_tries": 1}}


class TestGSPOContract(RecipeContract):
    method = GSPO
    published = {"clip_low": 0.0003, "clip_high": 0.0004, "level": "sequence"}
    on_policy = aggregates.sequence_mean_token_mean
    matters = (({"clip_low": 0.2}, {"clip_low": 0.01}),)


class TestCISPOContract(RecipeContract):
    method = CISPO
    published = {"clip_low": 0.2, "clip_high": 0.28, "bound": "band", "cap": 5.0, "aggregate": "token_mean"}
    on_policy = aggregates.mean
    matters = (
        ({}, {"bound": "cap"}),
        ({"bound": "cap"}, {"bound": "cap", "cap": 1.1}),
    )
    exceptions = {"test_finite_differences": "a factor of its loss is detached: the value has another slope"}


class TestSAPOContract(RecipeContract):
    method = SAPO
    published = {"tau_positive": 1.0, "tau_negative": 1.05, "aggregate": "sequence_mean_token_mean"}
    on_policy = aggregates.sequence_mean_token_mean
    matters = (
        ({}, {"tau_positive": 2.0}),
        ({}, {"tau_negative": 2.0}),
    )


class TestREINFORCEContract(RecipeContract):
    method = REINFORCE
    published = {"baseline": "batch", "aggregate": "sequence_mean"}
    options = {"kl_coef": 0.1}
    on_policy = aggregates.sequence_mean
    matters = (({}, {"baseline": "none"}),)
    exceptions = {
        "test_finite_differences": "a factor of its loss is detached: the value has another slope",
        "test_equal_rewards_have_no_gradient": "k1 in the reward differs between sequences of one score",
    }


class TestRLOOContract(RecipeContract):
    method = RLOO
    published = {"form": "score", "normalise": False, "aggregate": "sequence_mean", "clip_low": 0.2, "clip_high": 0.2}
    options = {"kl_coef": 0.1}
    on_policy = aggregates.sequence_mean
    matters = (
        ({}, {"form": "sequence_clip"}),
        ({}, {"normalise": True}),
    )
    exceptions = {
        "test_finite_differences": "a factor of its loss is detached: the value has another slope",
        "test_equal_rewards_have_no_gradient": "k1 in the reward differs between sequences of one score",
    }


class TestPPOContract(RecipeContract):
    method = PPO
    published = {
        "baseline": "group",
        "whiten": True,
        "dual_clip": 0.0,
        "n_epochs": 2,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregate": "token_mean",
    }
    on_policy = aggregates.mean
    matters = (
        ({}, {"baseline": "none", "whiten": False}),
        ({}, {"whiten": False}),
        ({}, {"dual_clip": 1.01}),
    )


class TestDPOContract(RecipeContract):
    method = DPO
    published = {"beta": 0.1, "pairs": "samples"}
    matters = (
        ({}, {"beta": 0.5}),
        ({}, {"pairs": "demonstrations"}),
    )
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}


class TestIPOContract(RecipeContract):
    method = IPO
    published = {"tau": 0.1, "pairs": "samples", "length_normalised": False}
    matters = (
        ({}, {"tau": 0.5}),
        ({}, {"length_normalised": True}),
    )
    refused = {"trl": "compares completions of one group", "verl": "compares completions of one group"}


class TestSFTContract(RecipeContract):
    method = SFT
    published = {"group_size": 1, "n_prompts": 128, "aggregate": "token_mean"}
    options = {"group_size": 1, "n_prompts": 6}
    refused = {
        "trl": "trains on demonstrations, and the host samples completions",
        "verl": "trains on demonstrations, and the host samples completions",
    }
    exceptions = {
        "test_equal_rewards_have_no_gradient": "reads no rewards",
        "test_equal_rewards_leave_the_first_policy_alone": "reads no rewards",
    }
