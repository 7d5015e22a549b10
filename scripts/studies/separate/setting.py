"""What a setting is: one warm start, one budget, methods that share all but what is theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import envs  # noqa: F401  (registers the text tasks)
from agents.llm.agent import LLM, LLMMethod
from agents.llm.div_prec import DivPrec
from agents.llm.preferences import SFT
from agents.llm.reward_model import RewardTrainer, judged
from ccrl.collect import Request
from ccrl.data import Field
from ccrl.llm.judged import Judged
from ccrl.llm.rollouts import pass_at_k
from ccrl.llm.sampler import TokenCollector
from ccrl.seeding import stream_seed
from scripts.studies.claims.claim import Arm, Claim

__all__ = ["Entry", "Judge", "Setting", "Start", "look"]

QUESTIONS, SAMPLES, EVALUATIONS = 128, 8, 6
WARM_SEED = 1999
"""Of the warm starts and of the reward model: a tuning seed that no step size is chosen on."""


@dataclass(frozen=True)
class Start:
    """A model of 0.13 million parameters that supervised steps on demonstrations have brought to a part of the task."""

    task: str
    options: Mapping[str, Any]
    steps: int
    layers: int = 2
    width: int = 64
    beta: float | None = None
    """With it the objective is the shaped one of Wu et al. 2025 (arXiv 2512.22955), not cross entropy."""

    def folder(self, root: Path) -> Path:
        """The model's, which is trained if there is none."""
        words = [self.task, *(f"{name}{value}" for name, value in self.options.items()), self.layers, self.width,
                 self.steps, *([] if self.beta is None else [f"beta{self.beta}"])]  # fmt: skip
        folder = root / "_".join(map(str, words)).replace(":", "_")
        if not folder.exists():
            shape = {"model_layers": self.layers, "model_width": self.width, "seed": WARM_SEED}
            if self.beta is None:
                agent = SFT(self.task, env_kwargs=dict(self.options), **shape)
                agent.warm_start(self.steps)
            else:  # the optimiser of the supervised phase
                agent = DivPrec(self.task, env_kwargs=dict(self.options), beta=self.beta, n_prompts=64,
                                learning_rate=1e-3, lr_schedule="linear", **shape)  # fmt: skip
                agent.learn(self.steps * agent.samples_per_iteration)
            unfinished = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            agent.policy.model.save_pretrained(unfinished)
            unfinished.rename(folder)
        return folder

    def agent(self, root: Path) -> LLM:
        """One that holds the model, to sample from it."""
        found: LLM = SFT(self.task, model=str(self.folder(root)), seed=WARM_SEED, env_kwargs=dict(self.options))
        return found


@dataclass(frozen=True)
class Judge:
    """A reward model from few preferences between the warm start's own samples, in the verifier's place."""

    prompts: int
    """Eight completions each, whose neighbours are compared where one is right and one wrong."""
    steps: int
    layers: int = 1
    width: int = 64

    def reward(self, start: Start, root: Path) -> nn.Module:
        """The model, which is trained if there is none."""
        folder = start.folder(root)
        path = folder.with_name(f"{folder.name}_judge_{self.prompts}_{self.steps}_{self.layers}_{self.width}.pt")
        agent = start.agent(root)
        data = self.labels(agent, self.prompts, WARM_SEED)
        if not path.exists():
            trainer = RewardTrainer(agent.task, data=data, seed=WARM_SEED, model_layers=self.layers,
                                    model_width=self.width, learning_rate=1e-3)  # fmt: skip
            trainer.learn(until=self.steps)
            trainer.save(path)
        return RewardTrainer.load(path, agent.task, data=data).reward

    def report(self, start: Start, root: Path) -> dict[str, float]:
        """On pairs that it has not seen."""
        agent = start.agent(root)
        trainer = RewardTrainer(agent.task, data=self.labels(agent, 8, 0), policy=self.reward(start, root))
        return trainer.report(self.labels(agent, 512, WARM_SEED - 1))

    @staticmethod
    def labels(agent: LLM, prompts: int, seed: int) -> Judged:
        data = TokenCollector(agent.task, seed=seed).collect(Request(counts=torch.full((prompts,), 8)), agent.policy)
        return Judged.pairs_of(data, data["reward_components"][:, 0], Generator().manual_seed(seed))


@dataclass(frozen=True)
class Entry:
    """A method in a setting."""

    method: LLMMethod
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Its own settings, where they are not its defaults."""
    grid: tuple[Mapping[str, Any], ...] | None = None
    """What is tried on the tuning seeds, where that is not the setting's step sizes; as many."""
    start: Start | None = None
    """Its own warm start, where that is what it is about."""


@dataclass(frozen=True)
class Setting:
    """Methods against the first of them: same warm start, completions, optimiser; each one's step size from as many."""

    name: str
    text: str
    """What can make methods differ here."""
    start: Start
    shape: Mapping[str, Any]
    """Settings that all share."""
    completions: int
    entries: Mapping[str, Entry]
    grid: tuple[Mapping[str, Any], ...] = tuple(
        {"learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    )
    """What is tried on the tuning seeds."""
    score: str = "pass1"
    """The number of an evaluation whose mean over the training is the score."""
    judge: Judge | None = None
    remark: str = ""
    """What a reader should know before the table."""
    tuning_seeds: int = 2
    test_seeds: int = 10

    @cached_property
    def claim(self) -> Claim:
        """Every method's difference to the first, to be judged as claims are."""
        first, *others = self.entries
        arms = tuple(Arm(name, None, tuple(map(dict, entry.grid or self.grid))) for name, entry in self.entries.items())
        where = f"{self.start.task} {json.dumps(dict(self.start.options))}, {self.completions:,} completions"
        return Claim(self.name, self.text, where, f"mean {self.score} of {EVALUATIONS} evaluations", arms,
                     tuple((other, first) for other in others), self.tuning_seeds, self.test_seeds)  # fmt: skip

    def agent(self, name: str, seed: int, settings: Mapping[str, Any], root: Path) -> LLM:
        """The method's, at its warm start."""
        entry = self.entries[name]
        start = entry.start or self.start
        method = entry.method if self.judge is None else judged(entry.method, self.judge.reward(self.start, root))
        found: LLM = method(start.task, seed=seed, env_kwargs=dict(start.options), model=str(start.folder(root)),
                            **{**self.shape, **entry.fixed, **settings})  # fmt: skip
        return found

    def play(self, name: str, seed: int, settings: Mapping[str, Any], root: Path) -> dict[str, float]:
        """One run: ``score``, and the numbers of the last evaluation."""
        agent = self.agent(name, seed, settings, root)
        found = list[dict[str, float]]()

        def watch(agent: LLM) -> bool:
            while len(found) < EVALUATIONS and agent.num_timesteps * EVALUATIONS >= self.completions * (len(found) + 1):
                found.append(look(agent))
            return len(found) < EVALUATIONS

        agent.learn(self.completions, watch)
        return {"score": sum(row[self.score] for row in found) / len(found), **found[-1]}


@torch.no_grad()
def look(agent: LLM) -> dict[str, float]:
    """Of held-out questions, the same for all: shares right in all components of single samples and of eight, entropy
    per token (nats)."""
    collector = TokenCollector(agent.task, seed=stream_seed(0, "evaluation"), fields=(Field("entropy"),))
    prompts = collector.test_prompts(QUESTIONS, 0)
    data = collector.sample(agent.policy, prompts, torch.arange(len(prompts)).repeat_interleave(SAMPLES))
    right = (data["reward_components"] >= 1.0).all(-1).float().view(-1, SAMPLES).sum(1)
    entropy = (data["entropy"] * data["valid"]).sum() / data["valid"].sum().clamp_min(1.0)
    return {"pass1": float(pass_at_k(SAMPLES, right, 1).mean()), "pass8": float(pass_at_k(SAMPLES, right, 8).mean()),
            "entropy": float(entropy)}  # fmt: skip
