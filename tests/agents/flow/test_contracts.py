"""Every method on flow policies keeps the contract."""

import math

from agents.flow.awm import AWM
from agents.flow.diffusion_nft import DiffusionNFT
from agents.flow.diffusion_opd import DiffusionOPD
from agents.flow.flow_grpo import FlowGRPO
from agents.flow.grpo_guard import GRPOGuard
from ccrl.testing.flow_contract import FlowContract

SHARED = {"group_size": 24, "advantage_std": "group", "max_advantage": 5.0}
WIDE = {"clip_low": 1.0, "clip_high": math.inf}


class TestFlowGRPO(FlowContract):
    method = FlowGRPO
    published = SHARED | {"clip_low": 1e-3, "clip_high": 1e-3, "kl_coef": 0.0, "kl_divisor": "sigma"}
    options = {"kl_coef": 0.1, **WIDE}
    matters = [
        ({}, {"kl_coef": 0.0}), ({}, {"kl_divisor": "sbar"}), ({}, {"advantage_std": "batch"}),
        ({}, {"sampler": "cps"}),        ({}, {"sampler": "ddim"}), ({}, {"sampler": "dance_sde"}), ({}, {"first_step":
        1}), ({}, {"time_shift": 3.0}), (WIDE, {"clip_low": 1e-5, "clip_high": 1e-5}), ({}, {"max_advantage": 0.5}),
        ({"drop_condition": 0.1}, {"drop_condition": 0.1, "guidance": 2.0}),
    ]  # fmt: skip


class TestGRPOGuard(FlowContract):
    method = GRPOGuard
    published = TestFlowGRPO.published | {
        "clip_low": 2e-3, "clip_high": 2e-3, "normalise": True, "step_weight": "dt",
    }  # fmt: skip
    options = {"kl_coef": 0.1, **WIDE}
    matters = [
        ({}, {"normalise": False}), ({}, {"step_weight": "none"}), ({}, {"step_weight": "beta_dt"}),
        ({}, {"step_weight": "dt_over_beta"}),
    ]  # fmt: skip


class TestAWM(FlowContract):
    method = AWM
    published = SHARED | {
        "advantage_std": "batch", "clip_low": 1.0, "clip_high": 1.0, "weighting": "ghuber", "power": 0.25, "n_times": 6,
        "times": "grid", "ratio": "exp_first", "kl_coef": 0.01, "ema_coef": 1.0, "kl_weight": "uniform",
        "scale_advantage": True,
    }  # fmt: skip
    options = {"n_times": 2, "kl_coef": 0.1, "n_epochs": 2}
    matters = [
        ({}, {"weighting": "uniform"}), ({}, {"weighting": "t"}), ({}, {"weighting": "t2"}),
        ({}, {"weighting": "huber"}), ({}, {"power": 0.5}), ({}, {"n_times": 3}), ({}, {"times": "uniform"}),
        ({}, {"times": "logit_normal"}), ({}, {"kl_coef": 0.0}), ({}, {"ema_coef": 0.0}),
        ({}, {"kl_weight": "elbo"}), ({}, {"scale_advantage": False}), ({}, {"advantage_std": "group"}),
        ({}, {"sampler": "ode", "noise_level": 0.0}),
    ]  # fmt: skip


class TestDiffusionNFT(FlowContract):
    method = DiffusionNFT
    published = SHARED | {
        "advantage_std": "batch", "beta": 1.0, "self_normalise": True, "n_times": 6, "times": "grid", "kl_coef": 1e-4,
    }  # fmt: skip
    options = {"n_times": 2, "self_normalise": False}
    matters = [({}, {"beta": 0.5}), ({}, {"self_normalise": True}), ({}, {"kl_coef": 0.5}), ({}, {"n_times": 3})]
    exceptions = {
        "test_equal_rewards_leave_the_first_policy_alone":
            "neutral samples pull to the averaged policy, which is the first one: tested by hand, zero in expectation"
    }  # fmt: skip


class TestDiffusionOPD(FlowContract):
    method = DiffusionOPD
    published = {
        "group_size": 24, "teachers": (), "teacher_steps": 600, "form": "closed", "kl_divisor": "sbar", "reduce": "sum",
    }  # fmt: skip
    options = {"teacher_steps": 3, "warm_start_batch": 8}
    texts = ("teachers",)
    matters = [
        ({}, {"form": "policy_gradient"}), ({}, {"kl_divisor": "sigma"}), ({}, {"reduce": "mean"}),
        ({}, {"sampler": "dpm2", "noise_level": 0.0}), ({}, {"teacher_steps": 2}),
    ]  # fmt: skip
    exceptions = {"test_equal_rewards_leave_the_first_policy_alone": "it reads no reward"}
