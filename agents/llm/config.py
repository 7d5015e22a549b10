"""What a language-model agent has beside its method: the model, the optimiser, the rollout. The defaults suit the tiny
model; methods bring published ones (``Method.defaults``), and a real model wants a step size of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from ccrl.settings import Above, Count, Natural, Nonnegative, Positive, Range, Settings
from ccrl.updaters.schedules import Shape

__all__ = ["GenerationConfig", "ModelConfig", "OptimiserConfig", "RolloutConfig", "make_optimiser"]


@dataclass(frozen=True)
class ModelConfig(Settings):
    """The language model."""

    model: str = "tiny"
    """Which model is trained: tiny (a Llama of the size below, from scratch), tabular (a table of logits, for bandit
    tasks), or a local model directory."""
    model_layers: Count = 4
    """Layers of the tiny model."""
    model_width: Count = 128
    """Hidden size of the tiny model."""
    model_heads: Count = 4
    """Attention heads of the tiny model."""
    lora_rank: Natural = 0
    """Low-rank adapters of this rank are trained instead of the model (needs peft); 0 trains the model itself."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Matrices are multiplied in this type; trained weights and log-probabilities stay float32, and weights that
    adapters leave alone are stored in it."""
    products: Literal["auto", "torch", "onednn"] = "auto"
    """Float32 matrices are multiplied on a CPU as PyTorch does it (torch), or by oneDNN where that is faster, which on
    processors that are not Intel's takes half the time and differs in the last digits (onednn); auto takes oneDNN for
    the tiny model and leaves a model directory as it is."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of kept, which trades speed of the update for memory;
    prompts are then not shared between the completions of a group."""
    logits_chunk_size: Natural | None = None
    """Tokens per piece of the vocabulary projection, which is most of the memory of a large vocabulary; 0 projects all
    tokens in one piece, none takes 256 per piece from a vocabulary of 16,384 tokens up and else one piece."""


@dataclass(frozen=True)
class OptimiserConfig(Settings):
    """The optimiser of reinforcement, and the supervised phase before it."""

    optimiser: Literal["adamw", "sgd"] = "adamw"
    """The optimiser is AdamW or plain stochastic gradient descent."""
    learning_rate: Positive = 3e-4
    """Step size of the optimiser."""
    weight_decay: Nonnegative = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Nonnegative = 1.0
    """Gradients are scaled down to this norm; 0 never scales them."""
    skip_grad_norm: Nonnegative = 0.0
    """Gradients with a larger norm (before they are scaled down) change nothing, the optimiser's moments included; 0
    skips none."""
    lr_schedule: Shape = "constant"
    """Over the run the step size stays (constant), or falls to 0 along a line (linear) or half a cosine (cosine)."""
    lr_warmup: Annotated[float, Range(0, 1, below=True)] = 0.0
    """The step size rises linearly over this share of the run before it follows its schedule."""
    warm_start_steps: Natural = 0
    """Supervised steps on the task's demonstrations before the first rollout."""
    warm_start_batch: Count = 64
    """Demonstrations per supervised step."""
    warm_start_lr: Positive = 1e-3
    """Step size of the supervised steps, which falls linearly to 0 over them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimiser == "sgd" and self.weight_decay:
            raise ValueError(f"weight_decay: expected 0 with optimiser='sgd', which has none, got {self.weight_decay}")


@dataclass(frozen=True)
class RolloutConfig(Settings):
    """What is sampled in an iteration."""

    n_prompts: Count = 16
    """Prompts per iteration."""
    max_new_tokens: Natural = 0
    """Completions are cut after this many tokens, at most the task's own cap, which 0 takes."""
    temperature: Positive = 1.0
    """Temperature of sampling and of scoring."""
    top_p: Annotated[float, Above(0, 1)] = 1.0
    """Tokens are sampled from the smallest set with this probability; 1 takes all. Scores remain those of the whole
    distribution, as in TRL: ratios start at 1, and what was cut off is a bias of the gradient."""
    top_k: Natural = 0
    """Tokens are sampled from the so many most probable ones; 0 takes all. Scores as for top_p."""
    pad_to_multiple_of: Count = 1
    """Completions are padded to a multiple of this many tokens."""


@dataclass(frozen=True)
class GenerationConfig(Settings):
    """Who writes the completions of training: the model in the process, or a server."""

    generation: str = ""
    """The server at this URL (http://host:port/v1) writes the completions of training, by OpenAI's completions protocol
    as vLLM speaks it; without one the model in the process does."""
    generation_model: str = ""
    """The server knows the model by this name."""
    generation_weights: str = ""
    """Trained weights reach the server so: reload writes the merged model into generation_folder, from which the server
    was started, and tells a vLLM in developer mode to read it again; module:function is called with the folder, the URL
    and the model's name after the folder was written; none sends nothing, and samples stay those of the server's
    weights."""
    generation_folder: Path | None = None
    """The model is written into this folder, over the one that is there, each time that its weights are sent."""
    generation_every: Count = 1
    """Weights are sent every so many iterations: with N, samples are of the policy of up to N - 1 iterations ago."""
    generation_tolerance: Positive = 0.1
    """Right after its weights were sent, the server's log-probabilities may differ from the policy's by this many nats
    per token on average; more ends the training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = {
            f.name: getattr(self, f.name) != f.default for f in fields(GenerationConfig) if f.name != "generation"
        }
        if not self.generation:
            if superfluous := [name for name, given in others.items() if given]:
                raise ValueError(f"{superfluous[0]}: expected generation, the URL of a server, beside it, got none")
            return
        if not self.generation_model:
            raise ValueError("generation_model: expected the model's name at the server, got none")
        if not self.generation_weights:
            raise ValueError(
                "generation_weights: expected how trained weights reach the server (reload, module:function, or none, "
                "whose samples are off policy from the first update on), got nothing"
            )
        if self.generation_weights == "none" and (others["generation_every"] or others["generation_tolerance"]):
            raise ValueError("generation_every, generation_tolerance: expected the defaults with generation_weights "
                             "'none', which sends nothing")  # fmt: skip


def make_optimiser(config: Any, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that an ``OptimiserConfig`` describes."""
    if config.optimiser == "sgd":
        return torch.optim.SGD(params, lr=config.learning_rate)
    return torch.optim.AdamW(
        params, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True
    )
