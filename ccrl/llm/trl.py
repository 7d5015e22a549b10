"""Any recipe of the suite inside TRL: ``grpo_trainer(Recipe, config)`` is a subclass of its ``GRPOTrainer``.

    Trainer = grpo_trainer(BNPO.Recipe, BNPO.Config())
    Trainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=..., processing_class=...).train()

TRL generates, scores, accumulates, steps, logs and saves; advantages and loss are the recipe's. Checked with TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.data import Data
from ccrl.estimators.base import Estimator
from ccrl.estimators.terms import Outputs, surrogate
from ccrl.llm.hosted import Host, HostedRecipe, build_hosted, episode_masks
from ccrl.packages import require

__all__ = ["RecipeTrainer", "grpo_trainer"]

GIVEN = frozenset({
    "valid", "present", "action", "reward", "carry", "episode_reward", "reward_components", "group", "length",
    "prompt", "prompt_valid",
    "demonstration",
})  # fmt: skip
"""Columns of every rollout."""
IN_BATCH = frozenset({"valid", "present", "action", "prompt", "prompt_valid", "log_prob", "n_valid", "n_sequences"})
"""Columns of a minibatch that TRL's own tensors give; the others travel with them, by prefixed names."""
STEP, SEQUENCE = "recipe_step_", "recipe_sequence_"
TAKEN_OVER = (
    "loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "scale_rewards",
    "multi_objective_aggregation", "top_entropy_quantile", "off_policy_mask_threshold", "use_bias_correction_kl",
    "entropy_coef", "use_liger_kernel",
)  # fmt: skip
"""Options of TRL's own advantages and loss. They would be ignored, so other values than their defaults are refused."""
STATE = "recipe.pt"
"""File of the recipe's buffers in a checkpoint."""

_Trainer: Any = object


def grpo_trainer(recipe: Callable[[Any, Any], Estimator], config: Any) -> type[Any]:
    """A ``trl.GRPOTrainer`` with the stages and the loss of ``recipe(config, parts)``.

    Of ``config`` only what the recipe reads counts: number of prompts, step size, epochs, sampling and minibatches are
    those of TRL's ``args``. Whole-batch statistics are over one generation batch. Recipes that skip an update (no
    group with different rewards) take a step of gradient 0. In evaluation the loss is TRL's own.

    :raises ImportError: without TRL, naming what to install.
    """
    trl = require("trl", "llm")
    name = f"{getattr(recipe, '__name__', 'Recipe').removesuffix('Recipe')}GRPOTrainer"
    # staticmethod: a function in a class's namespace would become a method
    return type(name, (RecipeTrainer, trl.GRPOTrainer), {"recipe": staticmethod(recipe), "config": config})


class RecipeTrainer(_Trainer):  # type: ignore[misc]
    """What is put in front of ``GRPOTrainer``.

    :raises ValueError: at construction, if the recipe needs what TRL does not have (``build_hosted``), or ``args`` ask
        for what the recipe decides, for several processes, or for steps that end inside a generation batch.
    """

    recipe: Callable[[Any, Any], Estimator]
    config: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _check(self)
        self.host_policy = _TrlPolicy(self)
        host = Host(
            "TRL's GRPOTrainer", self.max_completion_length, self.num_generations, tuple(self.reward_func_names),
            GIVEN, frozenset({"log_prob", "entropy"}), frozenset({"log_prob", "entropy"}), True, self.beta != 0.0,
        )  # fmt: skip
        self.hosted: HostedRecipe = build_hosted(self.recipe, self.config, host, self.host_policy)
        self.hosted.estimator.to(self.accelerator.device)
        self._have: dict[str, Data] | None = None
        self._sums: dict[str, Tensor] = {}
        self._window: dict[str, Tensor] = {}
        self._windows = 0

    # -- advantages ---------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **options: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **options)
        self._rewards = rewards  # TRL hands on their advantages alone
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return out
        self._after_update()
        self._have = self.hosted.prepare(self._rollout(out), self.state.global_step, self.state.max_steps)
        on = self._have["on"]
        out["valid"] = on["valid"].t()
        for name in self.hosted.columns - IN_BATCH:
            if name in on.sequence:
                out[SEQUENCE + name] = on[name]
            else:
                out[STEP + name] = on[name].transpose(0, 1)
        return out

    def _rollout(self, out: dict[str, Any]) -> Data:
        """TRL's tensors ``(B, ...)`` as a rollout ``[T, N]``, in the order of generation: groups are neighbours."""
        rewards = self._rewards * self.reward_weights.to(self._rewards)
        scored = ~rewards.isnan().all(1)
        # what no reward function could score is compared with nothing: its group's mean, and not trained on
        parts = rewards.nan_to_num(0.0).view(-1, self.num_generations, rewards.shape[1])
        some = scored.view(-1, self.num_generations, 1).to(parts.dtype)
        mean = (parts * some).sum(1, keepdim=True) / some.sum(1, keepdim=True).clamp_min(1.0)
        parts = torch.where(some > 0, parts, mean).flatten(0, 1)
        data = self._tokens(out)
        valid = data["valid"] * scored
        last, carry = episode_masks(valid)
        total, count = parts.sum(1), parts.shape[0]
        columns = dict(data) | {
            "valid": valid, "reward": last * total, "carry": carry, "episode_reward": total,
            "reward_components": parts,
            "group": torch.arange(count, device=valid.device) // self.num_generations,
            "length": data["present"].sum(0).long(), "demonstration": torch.zeros_like(total),
        }  # fmt: skip
        if self.beta != 0.0:
            columns["host_ref_log_prob"] = out["ref_per_token_logps"].t()
        if "old_per_token_logps" in out:
            columns["log_prob"] = out["old_per_token_logps"].t()
        sequence = data.sequence | {"episode_reward", "reward_components", "group", "length", "demonstration"}
        missing = self.hosted.computed - columns.keys()
        if missing:
            found = self.host_policy(Data(columns, sequence=sequence), missing)
            columns |= {name: value * columns["present"] for name, value in found.items()}
        return Data(columns, sequence=sequence)

    def _tokens(self, inputs: dict[str, Any]) -> Data:
        present = inputs["completion_mask"].t().float()
        mask = inputs["tool_mask"].t() if "tool_mask" in inputs else 1.0  # replies of tools are present, not chosen
        columns = {
            "action": inputs["completion_ids"].t(), "present": present, "valid": present * mask,
            "prompt": inputs["prompt_ids"], "prompt_valid": inputs["prompt_mask"].float(),
        }  # fmt: skip
        return Data(columns, sequence=frozenset({"prompt", "prompt_valid"}))

    # -- loss ---------------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training or "n_valid" in inputs:
            return inputs
        # the pieces of one optimiser step are known only now, after the shuffle
        size = self.args.gradient_accumulation_steps
        for first in range(0, len(self._buffered_inputs), size):
            window = self._buffered_inputs[first : first + size]
            n_valid = torch.stack([piece["valid"].sum() for piece in window]).sum()
            n_sequences = n_valid.new_tensor(float(sum(piece["valid"].shape[0] for piece in window)))
            for piece in window:
                piece |= {"n_valid": n_valid, "n_sequences": n_sequences}
        return inputs

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        batch = self._batch(inputs)
        outputs, extra = self.host_policy.evaluate(model, batch, self.hosted.want | {"log_prob"}, training=True)
        if "log_prob" not in batch:  # the rollout is the policy's own: ratio 1
            batch = batch.derive(log_prob=outputs["log_prob"].detach())
        # divided by counts of the whole optimiser step, so that the losses of its pieces add up; TRL divides each
        # piece's mean by their number
        loss, stats = surrogate(self.hosted.terms, outputs, batch)
        if extra is not None:
            loss = loss + self.router_aux_loss_coef * extra / self.current_gradient_accumulation_steps
        self._accumulate(stats)
        return loss

    def _batch(self, inputs: dict[str, Any]) -> Data:
        data = self._tokens(inputs)
        sequence, columns = set(data.sequence), dict(data) | {"valid": inputs["valid"].t()}
        for key, value in inputs.items():
            if key.startswith(STEP):
                columns[key.removeprefix(STEP)] = value.transpose(0, 1)
            elif key.startswith(SEQUENCE):
                columns[key.removeprefix(SEQUENCE)] = value
                sequence.add(key.removeprefix(SEQUENCE))
        if "old_per_token_logps" in inputs:
            columns["log_prob"] = inputs["old_per_token_logps"].t()
        scalars = {name: inputs[name] for name in ("n_valid", "n_sequences")}
        return Data(columns | scalars, sequence=frozenset(sequence), scalars=frozenset(scalars))

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def _accumulate(self, stats: dict[str, Tensor]) -> None:
        """Statistics of an optimiser step are the sums of its pieces'."""
        for name, value in stats.items():
            self._window[name] = self._window.get(name, 0.0) + value
        if (self._step + 1) % self.args.gradient_accumulation_steps:
            return
        self.hosted.estimator.after_minibatch(self._window, self.hosted.ctx)
        for name, value in self._window.items():
            self._metrics["train"][f"recipe/{name}"].append(value.item())
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._window, self._windows = {}, self._windows + 1

    def _after_update(self) -> None:
        """The generation batch is used up: what the recipe learns from an iteration."""
        if self._have is None or not self._windows:
            return
        stats = {name: value / self._windows for name, value in self._sums.items()}
        known = set(stats)
        with torch.no_grad():
            self.hosted.estimator.after_update(self._have, stats, self.hosted.ctx)
        for name in stats.keys() - known:
            self._metrics["train"][f"recipe/{name}"].append(float(stats[name]))
        self._have, self._sums, self._windows = None, {}, 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self.hosted.estimator.state_dict()
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            torch.save(state, folder / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / STATE).exists():
            state = torch.load(path, map_location=self.accelerator.device, weights_only=True)
            self.hosted.estimator.load_state_dict(state)


class _TrlPolicy(nn.Module):
    """The trainer's model behind the suite's ``policy(batch, want)``."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        super().__init__()
        self._trainer = (trainer,)  # in a tuple: the model's parameters are not this module's

    @property
    def temperature(self) -> float:
        return float(self._trainer[0].temperature)

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """Without auxiliary losses."""
        return self.evaluate(self._trainer[0].model, batch, want, training=False)[0]

    def evaluate(self, model: Any, batch: Data, want: frozenset[str], training: bool) -> tuple[Outputs, Tensor | None]:
        """``want`` ``[T, B]``, and the load-balancing loss of mixtures of experts in training."""
        trainer = self._trainer[0]
        ids, mask = self._inputs(batch)
        experts = training and trainer.aux_loss_enabled
        log_prob, entropy, extra = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, batch.shape[0], batch_size=None if training else trainer.args.per_device_train_batch_size,
            compute_entropy="entropy" in want, compute_aux_loss=experts,
        )  # fmt: skip
        found: dict[str, Tensor | None] = {"log_prob": log_prob, "entropy": entropy}
        return {name: value.t() for name in want if (value := found.get(name)) is not None}, extra

    @staticmethod
    def _inputs(batch: Data) -> tuple[Tensor, Tensor]:
        """Tokens and attention mask of prompts and completions ``(B, P + T)``."""
        ids = torch.cat([batch["prompt"], batch["action"].t()], 1)
        return ids, torch.cat([batch["prompt_valid"], batch["present"].t()], 1).long()

    def log_prob(self, batch: Data, temperature: float) -> Tensor:
        """``[T, B]``: TRL's fused head has the sampling temperature built in, so this one needs whole logits."""
        trainer, found, steps = self._trainer[0], [], batch.shape[0]
        size = trainer.args.per_device_train_batch_size
        ids, mask = self._inputs(batch)
        for piece, present in zip(torch.split(ids, size), torch.split(mask, size)):
            with trainer.accelerator.autocast():
                logits = trainer.model(input_ids=piece, attention_mask=present).logits[:, -steps - 1 : -1]
            log_probs = (logits.float() / temperature).log_softmax(-1)
            found.append(log_probs.gather(-1, piece[:, -steps:].unsqueeze(-1)).squeeze(-1))
        return torch.cat(found).t()


def _check(trainer: Any) -> None:
    args = trainer.args
    defaults = {field.name: field.default for field in fields(args)}
    changed = {
        name: getattr(args, name) for name in TAKEN_OVER if name in defaults and getattr(args, name) != defaults[name]
    }
    if changed:
        raise ValueError(f"args: {changed} have no effect here: advantages and loss are the recipe's; leave them at "
                         f"TRL's defaults and set the recipe's config")  # fmt: skip
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise ValueError(
            f"args: expected steps_per_generation to be a multiple of gradient_accumulation_steps, got "
            f"{args.steps_per_generation} and {args.gradient_accumulation_steps}: an optimiser step would need the "
            "token counts of completions that are not generated yet"
        )
    if trainer.accelerator.num_processes > 1:
        raise ValueError(f"expected one process, got {trainer.accelerator.num_processes}: the recipe's statistics are "
                         "over all completions of a generation batch")  # fmt: skip
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        raise ValueError("args: set vllm_importance_sampling_correction=False: its weights are no part of the recipe's "
                         "loss")  # fmt: skip
    if trainer._is_vlm:
        raise ValueError("expected a language model, got one with images")
