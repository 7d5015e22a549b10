"""Memory and time of an update with each setting that trades one for the other: ``python scripts/bench llm_memory``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.baselines import GRPO
from ccrl.data import Batching, Data
from scripts.bench.llm import Config as Shape
from scripts.bench.llm import FixedLength, peak

__all__ = ["SETTINGS", "Config", "main", "measure"]

SETTINGS: dict[str, dict[str, Any]] = {
    "logits in one piece": {"logits_chunk_size": 0},
    "the defaults (256 tokens a piece)": {},
    "microbatch 8": {"microbatch": 8},
    "bfloat16": {"dtype": "bfloat16"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "LoRA of rank 8": {"lora_rank": 8},
    "all of them": {"microbatch": 8, "dtype": "bfloat16", "gradient_checkpointing": True, "lora_rank": 8},
}
"""Each against the defaults; a vocabulary of 16,384 tokens and more is projected 256 tokens at a time."""


@dataclass
class Config:
    """One GRPO update of a Llama from scratch, all completions of the same length: seconds (median of the rounds) and
    the peak of live tensor bytes above the weights (forward and backward pass with gradients and the optimiser's
    moments; of the allocator on a GPU)."""

    layers: int = 4
    """Layers of the model."""
    width: int = 256
    """Its hidden size."""
    vocab: int = 32_000
    """Tokens."""
    n_prompts: int = 8
    """Prompts per batch."""
    group_size: int = 8
    """Completions per prompt."""
    prompt_length: int = 32
    """Tokens per prompt."""
    length: int = 96
    """Tokens per completion."""
    rounds: int = 3
    """Timed updates of each setting, in turn."""
    threads: int = 1
    """torch threads."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's CPU seconds, for one thread on a machine that others use."""
    device: str = "cpu"
    """cpu or cuda."""


class Update:
    """An agent with a rollout that is ready to be learned from."""

    def __init__(self, config: Config, settings: dict[str, Any]) -> None:
        shape = replace(
            Shape(), vocab=config.vocab, length=config.length, prompt_length=config.prompt_length,
            n_prompts=config.n_prompts, group_size=config.group_size,
        )  # fmt: skip
        self.agent = GRPO(
            FixedLength(shape), n_prompts=config.n_prompts, group_size=config.group_size, model_layers=config.layers,
            model_width=config.width, seed=0, device=config.device, **settings,
        )  # fmt: skip
        # the tokens need not be the policy's own for what an update costs
        task, agent = self.agent.task, self.agent
        prompts = task.prompts(config.n_prompts, torch.Generator().manual_seed(0)).to(config.device)
        n = config.n_prompts * config.group_size
        tokens = torch.randint(config.vocab, (config.length, n), generator=torch.Generator().manual_seed(1))
        tokens, question = tokens.to(config.device), torch.arange(config.n_prompts).repeat_interleave(config.group_size)
        ones = torch.ones_like(tokens, dtype=torch.float32)
        reward = torch.randn(n, generator=torch.Generator().manual_seed(2)).to(config.device)
        on = {
            "action": tokens, "log_prob": -10.4 * ones, "present": ones, "valid": ones, "carry": ones,
            "prompt": prompts.tokens[question], "prompt_valid": prompts.valid[question], "group": question.to(tokens),
            "episode_reward": reward, "reward_components": reward.unsqueeze(1),
            "length": torch.full_like(question, config.length).to(tokens), "demonstration": torch.zeros_like(reward),
        }  # fmt: skip
        sequence = frozenset(k for k, v in on.items() if v.shape[0] == n)
        data = agent.estimator.prepare({"on": Data(on, sequence=sequence)}, agent.ctx)["on"]
        phase = agent.estimator.phases()[0]
        batching = Batching(phase.batching.unit, "full", microbatch=phase.batching.microbatch)
        self.batch, self.terms = data.epoch(batching, None)[0], phase.terms

    def __call__(self) -> None:
        self.agent.updaters["policy"].step(self.terms, self.batch)

    def seconds(self, clock: Callable[[], float]) -> float:
        start = clock()
        self()
        if self.agent.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start


def measure(config: Config) -> dict[str, tuple[float, float, float]]:
    """Setting -> seconds, MiB of the update, MiB of the weights."""
    torch.set_num_threads(config.threads)
    updates, memory, weights = dict[str, Update](), dict[str, float](), dict[str, float]()
    for name, settings in SETTINGS.items():
        updates[name] = Update(config, settings)
        # the first update makes the moments, which stay
        memory[name] = peak(updates[name], config.device) / 2**20
        weights[name] = sum(p.nbytes for p in updates[name].agent.policy.parameters()) / 2**20
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    rows = [{name: update.seconds(clock) for name, update in updates.items()} for _ in range(config.rounds)]
    return {name: (statistics.median(row[name] for row in rows), memory[name], weights[name]) for name in updates}


def main(config: Config) -> None:
    """Print the table."""
    found = measure(config)
    base = found["the defaults (256 tokens a piece)"]
    size = config.n_prompts * config.group_size
    print(f"{size} completions of {config.length} tokens, {config.layers} layers of width {config.width}, vocabulary "
          f"{config.vocab}, {config.threads} thread(s), {config.device}, {config.clock} clock\n")  # fmt: skip
    print("| setting | seconds | of the defaults | update, MiB | weights, MiB |\n|---|---|---|---|---|")
    for name, (seconds, update, weights) in found.items():
        print(f"| {name} | {seconds:.2f} | {seconds / base[0]:.2f} | {update:.0f} | {weights:.0f} |")
