"""POLAR: policy discriminative learning. Dou et al. 2025, "Pre-Trained Policy Discriminators are General Reward
Models", arXiv 2507.05197.

The optimum of KL-regularised reinforcement has ``r = beta log(pi* / pi_init) + beta log Z``: a reward says how one
policy differs from another. ``r(p, reference, candidate)`` learns whether two answers are of one policy,

    pre-training    L = -E log sigmoid(r(p, A1, A2) - r(p, A1, B1))     A1, A2 of a policy A, B1 of another one, B
    fine-tuning     L = -E log sigmoid(r(p, A, B) - r(p, A, C))         A > B > C by rank: the best is the reference

with its optimum at ``log p(c | ref, one policy) - log p(c | another policy) + f(ref)``, and then pays

    R_i = r(p, reference, y_i) - tau log pi(y_i),       advantage = z-score of the group

on the last token. It reads ``prompt reference <split> prompt candidate <reward>`` and is a head on the last token.
Rewards can be compared for one prompt and one reference alone: what depends on these is in no loss. Both losses are
Bradley-Terry on pairs (``ccrl.llm.reward_head``); ``triples`` and ``ranked`` make the pairs, ``RewardTrainer`` trains.

Slots: plan = samples, then the prompts' demonstrations as references; reward = a model of (reference, candidate).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Data, masked
from ccrl.estimators.base import Context, Stage
from ccrl.estimators.recipe import MethodConfig, Parts, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.llm.judged import Judged
from ccrl.llm.models import load_model, tiny_model
from ccrl.llm.policy import TokenPolicy
from ccrl.llm.reward_head import CausalReward
from ccrl.llm.reward_model import ModelReward
from ccrl.llm.sampler import TokenCollector
from ccrl.packages import require
from ccrl.settings import Natural, Nonnegative
from ccrl.updaters import Stats

__all__ = ["POLAR", "Overlap", "PolarConfig", "PolarRecipe", "PolarReward", "judged_by", "ranked", "triples"]

OVERLAP = "overlap"


# -- the reward model -------------------------------------------------------------------------------------------------


class PolarReward(nn.Module):
    """``r(p, reference, candidate)``; reads the columns ``reference`` and ``reference_valid`` ``[B, R]`` as well.

    :param model: a causal language model with two more tokens than the task, which separate (``vocab_size``) and end
        (``vocab_size + 1``) the text.
    :param vocab_size: tokens of the task.
    :param max_prompt: prompts are cut from the left to so many tokens; 0: never.
    :param max_response: references and candidates are cut to so many tokens, each before they are put together; 0:
        never.
    :raises ValueError: a model without the two tokens; in a call, an empty reference.
    """

    def __init__(self, model: nn.Module, vocab_size: int, *, max_prompt: int = 0, max_response: int = 0) -> None:
        super().__init__()
        rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        if rows < vocab_size + 2:
            raise ValueError(f"model: expected at least {vocab_size + 2} tokens, the task's {vocab_size} and two "
                             f"separators, got {rows}; resize_token_embeddings makes room")  # fmt: skip
        self.judge = CausalReward(model)
        self.vocab_size, self.max_prompt, self.max_response = vocab_size, max_prompt, max_response

    @classmethod
    def tiny(cls, vocab_size: int, *, layers: int = 2, width: int = 64, heads: int = 4, max_length: int = 512,
             **options: Any) -> PolarReward:  # fmt: skip
        """On a Llama from scratch."""
        model = tiny_model(vocab_size + 2, layers=layers, width=width, heads=heads, max_length=max_length)
        return cls(model, vocab_size, **options)

    @property
    def device(self) -> torch.device:
        return self.judge.device

    def forward(self, batch: Data) -> Tensor:
        """``[B]``."""
        return self.judge(self.assembled(batch))  # type: ignore[no-any-return]

    def assembled(self, batch: Data) -> Data:
        """The text of every row: ``prompt`` holds all up to the candidate, which ends with the reward token."""
        prompt, prompt_valid = (batch[name][:, -self.max_prompt :] for name in ("prompt", "prompt_valid"))
        cut = self.max_response or None
        reference, shown = (batch[name][:, :cut] for name in ("reference", "reference_valid"))
        action, present = (batch[name][:cut] for name in ("action", "present"))
        if not bool((shown > 0).any(1).all()):
            raise ValueError("polar: expected a reference for every candidate, got an empty one")
        ones = torch.ones_like(prompt_valid[:, :1])
        split = torch.full_like(prompt[:, :1], self.vocab_size)
        end = torch.full_like(action[:1], self.vocab_size + 1)
        present = torch.cat([present, torch.ones_like(present[:1])])
        columns = {
            "prompt": torch.cat([prompt, reference, split, prompt], 1),
            "prompt_valid": torch.cat([prompt_valid, shown.to(ones.dtype), ones, prompt_valid], 1),
            "action": torch.cat([action, end]), "present": present, "valid": present,
        }  # fmt: skip
        return Data(columns, sequence=frozenset({"prompt", "prompt_valid"}))

    def save(self, folder: str | Path) -> None:
        """Write it to a folder that ``load``, and the setting ``judge``, read."""
        found = Path(folder)
        found.mkdir(parents=True, exist_ok=True)
        config: Any = self.judge.body.config
        config.save_pretrained(found)
        sizes = {name: getattr(self, name) for name in ("vocab_size", "max_prompt", "max_response")}
        (found / "polar.json").write_text(json.dumps(sizes), encoding="utf-8")
        require("safetensors.torch", "llm").save_file(self.state_dict(), found / "polar.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> PolarReward:
        """The reward model in a folder; nothing is downloaded and no code of the folder runs.

        :raises FileNotFoundError: there is none.
        """
        found = Path(folder)
        if not (found / "polar.json").is_file():
            raise FileNotFoundError(f"judge: expected 'overlap' or a folder written by PolarReward.save, got "
                                    f"{str(folder)!r}")  # fmt: skip
        transformers = require("transformers", "llm")
        config = transformers.AutoConfig.from_pretrained(str(found), local_files_only=True, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        judge = cls(model, **json.loads((found / "polar.json").read_text(encoding="utf-8")))
        judge.load_state_dict(require("safetensors.torch", "llm").load_file(found / "polar.safetensors"))
        return judge

    @classmethod
    def from_model(cls, directory: str | Path, vocab_size: int, **options: Any) -> PolarReward:
        """On the language model in a local directory, with two more tokens."""
        model: Any = load_model(directory)
        if int(model.get_input_embeddings().weight.shape[0]) < vocab_size + 2:
            model.resize_token_embeddings(vocab_size + 2)
        return cls(model, vocab_size, **options)


class Overlap(nn.Module):
    """The share of the reference's tokens that the candidate has at their places: a baseline that needs no training."""

    here: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("here", torch.zeros(()))

    @property
    def device(self) -> torch.device:
        return self.here.device

    def forward(self, batch: Data) -> Tensor:
        """``[B]``."""
        width = min(batch.shape[0], batch["reference"].shape[1])
        shown = batch["reference_valid"].t()
        equal = (batch["action"][:width] == batch["reference"].t()[:width]) & (batch["present"][:width] > 0)
        return (equal * shown[:width]).sum(0) / shown.sum(0).clamp_min(1.0)


# -- pairs ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def triples(collector: TokenCollector, pool: Sequence[TokenPolicy], n: int, generator: Generator) -> Judged:
    """``n`` pairs for pre-training: for each prompt a policy of the pool, whose first completion is the reference and
    whose second one is preferred to that of another policy. Every policy is as often the one as the other.

    :raises ValueError: fewer than two policies.
    """
    if len(pool) < 2:
        raise ValueError(f"pool: expected at least two policies to tell apart, got {len(pool)}")
    collector.draw(n)
    prompts, _ = collector.plan(Request(tag="polar", counts=torch.ones(n, dtype=torch.int64)))  # takes what was drawn
    one = torch.randint(len(pool), (n,), generator=generator)
    other = (one + torch.randint(1, len(pool), (n,), generator=generator)) % len(pool)
    tokens = torch.zeros(3, collector.steps, n, dtype=torch.int64, device=collector.device)
    present = torch.zeros(3, collector.steps, n, device=collector.device)
    for k, policy in enumerate(pool):
        first, second = (one == k).nonzero().squeeze(-1), (other == k).nonzero().squeeze(-1)
        asked = torch.cat([first, first, second]).to(collector.device)
        if not len(asked):
            continue
        written = collector.generate(policy, prompts, asked, tag="polar")
        place = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([len(first), len(first), len(second)]))
        place = place.to(collector.device)
        tokens[place, :, asked] = written.buffer.action.t()
        present[place, :, asked] = written.present.t()
    return _judged(prompts.tokens, prompts.valid, tokens, present)


def ranked(data: Data, score: Tensor, generator: Generator) -> Judged:
    """Pairs for fine-tuning, one of every prompt of a rollout with three completions or more: of three at random the
    best by ``score`` ``[N]`` is the reference and the second is preferred to the third; equal ones make none."""
    order = torch.randperm(len(score), generator=generator, device=score.device)
    order = order[data["group"][order].argsort(stable=True)]
    _, counts = torch.unique(data["group"], return_counts=True)
    first = (counts.cumsum(0) - counts)[counts >= 3]
    three = torch.stack([order[first], order[first + 1], order[first + 2]])
    three = three.gather(0, score[three].argsort(dim=0, descending=True, stable=True))
    three = three[:, score[three[1]] > score[three[2]]]
    rows = three[0]
    tokens, present = (data[name][:, three].transpose(0, 1).contiguous() for name in ("action", "present"))
    return _judged(data["prompt"][rows], data["prompt_valid"][rows], tokens, present)


def _judged(prompt: Tensor, prompt_valid: Tensor, tokens: Tensor, present: Tensor) -> Judged:
    """Pairs from references, preferred and rejected completions, ``tokens`` and ``present`` ``[3, T, n]``."""
    n = prompt.shape[0]
    twice = torch.arange(n, device=prompt.device).repeat_interleave(2)

    def beside(x: Tensor) -> Tensor:
        return torch.stack([x[1], x[2]], -1).flatten(-2)

    columns = {"action": beside(tokens), "present": beside(present), "valid": beside(present)}
    sequence = {
        "prompt": prompt[twice], "prompt_valid": prompt_valid[twice], "reference": tokens[0].t()[twice],
        "reference_valid": present[0].t()[twice], "group": twice,
        "preferred": torch.tensor([1.0, -1.0], device=prompt.device).repeat(n),
    }  # fmt: skip
    return Judged(Data(columns | sequence, raw=frozenset(), sequence=frozenset(sequence)), "pairs")


# -- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolarConfig(MethodConfig):
    """The released runs: clip 0.2, one epoch, no KL. Watch the entropy: without tau the policy ends in few answers."""

    search: ClassVar[dict[str, Any]] = {"tau": None}
    judge: str = OVERLAP
    """The reward model is in this folder (written by PolarReward.save); overlap is no model, but the share of the
    reference's tokens that a completion has at their places."""
    judge_batch: Natural = 0
    """The reward model reads this many completions at a time; 0 reads all at once."""
    tau: Nonnegative = 0.0
    """The log-probability of a completion is subtracted from its reward with this weight; 0 is as published, and ends
    in a collapse on a mode of the reward."""

    @property
    def imitates(self) -> bool:
        """References are demonstrations."""
        return True


class PolarRecipe(Recipe):
    """GRPO's surrogate on what the model says of a completion beside its prompt's reference."""

    config: PolarConfig

    def stages(self) -> tuple[Stage, ...]:
        self.judge = ModelReward(self.make_judge(), "polar_reward", microbatch=self.config.judge_batch or None)
        return (self.say, GroupBaseline("polar_return", scale="std", eps=1e-6, single="zero"))

    def make_judge(self) -> Any:
        """The reward model; override it for one of your own (``judged_by``)."""
        return Overlap() if self.config.judge == OVERLAP else PolarReward.load(self.config.judge)

    def say(self, data: Data) -> Data:
        """``polar_reward`` and ``polar_return`` (with its entropy part) ``[N]``. Where there are no references, rewards
        are what the model has said already."""
        if "reference_valid" in data:
            data = self.judge(data)
        else:
            data = data.derive_sequence(polar_reward=data["episode_reward"])
        said = data["polar_reward"]
        if self.config.tau:
            said = said - self.config.tau * masked(data["log_prob"], data["valid"]).sum(0)
        return data.derive_sequence(polar_return=said)

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        """Samples, then one demonstration of each of their prompts."""
        if not have:
            return [self.parts.request]
        if "reference" in have:
            return []
        assert self.parts.request.counts is not None, "references belong to prompts"
        counts = torch.ones_like(self.parts.request.counts)
        return [Request(tag="reference", source="on", counts=counts, demonstrations=True)]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """Completions of prompts without a demonstration are left out; where no prompt has one, no advantage."""
        on = have["on"]
        if "reference" in have:
            found = with_references(on, have["reference"])
            if found is None:
                return have | {"sampled": on, "on": on.derive(advantage=torch.zeros_like(on["valid"]))}
            on = found
        prepared = super().prepare(have | {"on": on}, ctx)
        return prepared | {"sampled": have["on"]}

    def idle(self, data: Data, ctx: Context) -> bool:
        return not bool(data["advantage"].any())

    def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
        """What is optimised, and the entropy of whole completions, by the log-probability of those sampled."""
        on = data["on"]
        if "polar_reward" in on:
            stats["polar_reward"] = on["polar_reward"].mean()
        stats["sequence_entropy"] = -masked(on["log_prob"], on["valid"]).sum(0).mean()


def with_references(data: Data, shown: Data) -> Data | None:
    """``data`` with each group's demonstration as ``reference`` and ``reference_valid`` ``[N, R]``, without groups that
    have none; None where none has one. Replies in a demonstration are part of the reference, as they are of the
    candidates."""
    valid = shown["present"].t()
    groups = shown["group"]
    place = torch.full((int(torch.cat([groups, data["group"]]).max()) + 1,), -1, device=groups.device)
    place[groups] = torch.where((valid > 0).any(1), torch.arange(len(groups), device=groups.device), -1)
    row = place[data["group"]]
    kept = (row >= 0).nonzero().squeeze(-1)
    if not len(kept):
        return None
    data, row = data.take(kept), row[kept]
    return data.derive_sequence(reference=shown["action"].t()[row], reference_valid=valid[row].to(data["valid"].dtype))


POLAR = LLMMethod(
    "polar",
    "Dou et al. 2025, arXiv 2507.05197",
    PolarConfig,
    PolarRecipe,
    {
        "plan": "samples, then references",
        "reward": "a model of reference and candidate, entropy",
        "advantage": "group z-score",
        "ratio": "token",
        "loss": "clip",
        "aggregate": "token mean",
    },
)
"""Policy Discriminative Learning (Dou et al. 2025): reinforcement toward the policy that the references are of."""


def judged_by(judge: nn.Module) -> LLMMethod:
    """POLAR with a reward model in hand: a module with ``device`` that gives ``[B]`` of a batch with ``reference`` and
    ``reference_valid`` ``[B, R]``."""

    class Given(PolarRecipe):
        def __init__(self, config: Any, parts: Parts) -> None:
            if config.judge != OVERLAP:
                raise ValueError(f"judge: expected 'overlap' (the reward model was given), got {config.judge!r}")
            super().__init__(config, parts)

        def make_judge(self) -> Any:
            return judge

    return replace(POLAR, Recipe=Given)
