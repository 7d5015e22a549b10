"""The suite's losses and advantages inside verl 0.9, on completions that the suite sampled.

scripts/setup/verl.sh FOLDER          # makes an environment with verl and runs this in it
python scripts/verl_check.py          # in such an environment

Every method that fits is registered with verl (``ccrl.llm.verl.register``), then called by verl's own code:
advantages by the trainer's ``compute_advantage`` on a ``DataProto``, losses by the workers' ``ppo_loss`` on nested
tensors. Where verl has the method itself, both are compared on the same batch: a small model after supervised steps on
``arithmetic``, its samples and rewards, and log-probabilities after some updates, so that ratios lie on both sides of
the bounds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import tyro
from torch import Tensor

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

from agents.llm import METHODS, get_method
from agents.llm.baselines import GRPO
from ccrl.data import Batching
from ccrl.llm.verl import register
from ccrl.settings import Count, Natural, Settings

__all__ = ["CheckConfig", "Row", "main"]

PREFIX = "ccrl_"
FITTED: dict[str, dict[str, Any]] = {
    "dapo": {"max_tries": 1, "overlong_share": 0.0},
    "adora": {"kl_coef": 0.0}, "oblr_po": {"snr_pieces": 0, "baseline_weight": "length"},
}  # fmt: skip
"""Settings with which a method fits whose defaults do not."""
THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "vanilla", {"loss_agg_mode": "seq-mean-token-mean"}),
    "dr_grpo": ("grpo_without_std", "vanilla", {"loss_agg_mode": "seq-mean-token-sum-norm"}),
    "dapo": ("grpo", "vanilla", {"loss_agg_mode": "token-mean", "clip_ratio_high": 0.28}),
    "rloo": ("rloo", "", {}),
    "gspo": ("grpo", "gspo", {"loss_agg_mode": "seq-mean-token-mean"}),
    "sapo": ("grpo", "sapo", {}),
    "cispo": ("grpo", "cispo", {"loss_agg_mode": "token-mean"}),
}
"""Method -> verl's advantage estimator, its loss ("": another objective), settings of verl's that are the method's."""


@dataclass(frozen=True)
class CheckConfig(Settings):
    """The batch."""

    n_prompts: Count = 16
    """Prompts of the batch."""
    group_size: Count = 8
    """Completions per prompt."""
    warm_start_steps: Natural = 150
    """Supervised steps before the batch is sampled, so that some completions are right."""
    updates: Count = 6
    """Updates between the behaviour policy and the one that is scored."""
    learning_rate: float = 1e-3
    """Step size of these updates."""
    seed: Natural = 0
    """One number seeds all of it."""


@dataclass(frozen=True)
class Row:
    """One method; largest absolute differences, None where verl has no such method."""

    name: str
    loss: float
    advantage: float | None
    loss_gap: float | None
    gradient_gap: float | None


def sampled(config: CheckConfig) -> dict[str, Any]:
    """``(bs, T)`` tensors under verl's names, and ``uid``."""
    agent = GRPO(
        "arithmetic", seed=config.seed, env_kwargs={"digits": 1, "modulus": 20, "max_new_tokens": 6},
        n_prompts=config.n_prompts, group_size=config.group_size, model_layers=1, model_width=64,
        learning_rate=config.learning_rate, warm_start_steps=config.warm_start_steps,
    )  # fmt: skip
    if config.warm_start_steps:
        agent.warm_start(config.warm_start_steps)
    with torch.no_grad():
        prompts = agent.collector.draw(config.n_prompts)
        question = torch.arange(config.n_prompts).repeat_interleave(config.group_size)
        data = agent.collector.sample(agent.policy, prompts, question)
        prepared = agent.estimator.prepare({"on": data}, agent.ctx)["on"]
    batch = prepared.epoch(Batching("sequence", "full"), None)[0]
    for _ in range(config.updates):
        agent.updaters["policy"].step(agent.estimator.phases()[0].terms, batch)
    with torch.no_grad():
        new = agent.policy(batch, frozenset({"log_prob"}))["log_prob"]
    mask = data["valid"].t()
    columns = {"old_log_probs": data["log_prob"].t(), "log_probs": new.t(), "token_level_rewards": data["reward"].t()}
    found = {name: (value * mask).double().contiguous() for name, value in columns.items()}
    uid = np.array([f"prompt {i}" for i in data["group"].tolist()], dtype=object)
    return found | {"response_mask": mask.contiguous(), "uid": uid}


def fitting(config: CheckConfig, length: int) -> list[str]:
    """Registers every method that fits into verl; their names."""
    found = []
    for name in METHODS:
        method = get_method(name)
        settings = method.Config(**FITTED.get(name, {}))
        try:
            register(PREFIX + name, method.Recipe, settings, max_length=length, group_size=config.group_size)
        except (ValueError, TypeError):
            continue
        found.append(name)
    return found


def main(config: CheckConfig) -> list[Row]:
    """Print the table; returns its rows.

    Raises:
        RuntimeError: a loss or a gradient is not finite.
    """
    torch.set_num_threads(1)
    verl = require("verl", "verl")
    batch = sampled(config)
    mask = batch["response_mask"]
    ratio = (batch["log_probs"] - batch["old_log_probs"])[mask > 0].exp()
    print(f"verl {verl.__version__}, torch {torch.__version__}; {mask.shape[0]} completions, {int(mask.sum())} tokens, "
          f"mean reward {float(batch['token_level_rewards'].sum(1).mean()):.3f}, ratios {float(ratio.min()):.2f} to "
          f"{float(ratio.max()):.2f}\n")  # fmt: skip
    rows = []
    for name in fitting(config, mask.shape[1]):
        advantage = advantages(PREFIX + name, batch)
        loss, gradient = loss_of(PREFIX + name, batch, advantage, {})
        gaps: list[float | None] = [None, None, None]
        if name in THEIRS:
            estimator, theirs, settings = THEIRS[name]
            gaps[0] = float((advantage - advantages(estimator, batch)).abs().max())
            if theirs:
                settings = settings | clips(name)
                other, other_gradient = loss_of(theirs, batch, advantage, settings)
                gaps[1:] = [abs(loss - other), float((gradient - other_gradient).abs().max())]
        rows.append(Row(name, loss, *gaps))
    print("| method | loss | advantage - verl's | loss - verl's | gradient - verl's |\n|---|---|---|---|---|")
    for row in rows:
        said = ["" if gap is None else f"{gap:.1e}" for gap in (row.advantage, row.loss_gap, row.gradient_gap)]
        print(f"| {row.name} | {row.loss:.6f} | {' | '.join(said)} |")
    return rows


def clips(name: str) -> dict[str, Any]:
    """verl's names of the method's bounds; verl's third bound, of negative advantages, is out of the way."""
    config = get_method(name).Config(**FITTED.get(name, {}))
    found: dict[str, Any] = {"clip_ratio_c": 1e9}
    for mine, its in (("clip_low", "clip_ratio_low"), ("clip_high", "clip_ratio_high"), ("tau_positive", "tau_pos"),
                      ("tau_negative", "tau_neg")):  # fmt: skip
        if hasattr(config, mine):
            found[its] = getattr(config, mine)
    return found


def advantages(estimator: str, batch: dict[str, Any]) -> Tensor:
    """``(bs, T)``, by verl's trainer."""
    trainer, proto = require("verl.trainer.ppo.ray_trainer", "verl"), require("verl", "verl").DataProto
    tensors = {name: batch[name].clone() for name in ("token_level_rewards", "response_mask")}
    data = proto.from_dict(tensors=tensors, non_tensors={"uid": batch["uid"]})
    by_std = estimator != "grpo_without_std"
    name = estimator.removesuffix("_without_std")
    if not estimator.startswith(PREFIX):
        name = require("verl.trainer.ppo.core_algos", "verl").AdvantageEstimator(name)
    found: Tensor = trainer.compute_advantage(data, name, norm_adv_by_std_in_grpo=by_std).batch["advantages"]
    return found


def loss_of(mode: str, batch: dict[str, Any], advantage: Tensor, settings: dict[str, Any]) -> tuple[float, Tensor]:
    """The loss, and its gradient with respect to the log-probabilities ``(bs, T)``, by verl's worker.

    Raises:
        RuntimeError: one of them is not finite.
    """
    configs, losses = require("verl.workers.config", "verl"), require("verl.workers.utils.losses", "verl")
    tensordict = require("tensordict", "verl")
    mask = batch["response_mask"]
    actor = configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=mask.shape[0],
        policy_loss=configs.PolicyLossConfig(loss_mode=mode), **settings,
    )  # fmt: skip
    length = [int(n) for n in mask.sum(1)]

    def nested(values: Tensor) -> Tensor:
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(values, length)], layout=torch.jagged)

    leaf = batch["log_probs"].clone().requires_grad_()
    rows = [row[:n] for row, n in zip(leaf, length)]
    # what a worker's model gives: one number per token of prompt and completion, each of the token that follows
    packed = torch.cat([torch.cat((row, row.new_zeros(1))) for row in rows])
    one = torch.zeros(mask.shape[0], 1, dtype=torch.int64)
    data = tensordict.TensorDict(
        {
            "prompts": torch.nested.as_nested_tensor(list(one), layout=torch.jagged),
            "responses": nested(torch.zeros_like(mask, dtype=torch.int64)), "response_mask": nested(mask),
            "old_log_probs": nested(batch["old_log_probs"]), "advantages": nested(advantage),
            "dp_size": tensordict.NonTensorData(1), "batch_num_tokens": tensordict.NonTensorData(int(mask.sum())),
            "global_batch_size": tensordict.NonTensorData(mask.shape[0]),
        },
        batch_size=[mask.shape[0]],
    )  # fmt: skip
    loss, _ = losses.ppo_loss(actor, {"log_probs": packed}, data)
    loss.backward()
    assert leaf.grad is not None
    if not bool(loss.isfinite()) or not bool(leaf.grad.isfinite().all()):
        raise RuntimeError(f"{mode}: expected a finite loss and gradient, got {float(loss)}")
    return float(loss.detach()), leaf.grad


if __name__ == "__main__":
    try:
        main(tyro.cli(CheckConfig, description=__doc__))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
