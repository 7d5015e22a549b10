"""One agent for all language-model methods: generate, score, prepare, update, log. A method is a recipe.

GRPO("arithmetic", group_size=8, model="tiny")      # a method builds its agent from settings by keyword
LLM.of(GRPO)                                        # or names the agent's class, for what wants one
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from agents.llm.config import GenerationConfig, ModelConfig, OptimiserConfig, RolloutConfig, make_optimiser
from agents.methods import CallableMethod, GroupLearner, MethodAgent
from ccrl.batched_env import BatchedEnv, Tree
from ccrl.collect import Request
from ccrl.data import Batching, Data, Field
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Parts, Recipe
from ccrl.estimators.terms import Term
from ccrl.experiment.evaluation import EvalResult
from ccrl.learn import Learner
from ccrl.llm.generation import ServedCollector
from ccrl.llm.models import Snapshot, build_policy, fit_task
from ccrl.llm.rollouts import pass_at_k
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.served import CompletionsClient
from ccrl.llm.task import AdaptiveTask, FiniteTask, Prompts, TextTask, pad_left, resolve_task
from ccrl.llm.vocabulary import encode_prompt
from ccrl.seeding import named_generator, stream_seed
from ccrl.updaters import ModuleUpdater, Stats, linear_decay

__all__ = ["LLM", "LLMLearner", "LLMMethod"]


class LLMMethod(CallableMethod):
    """A method that can be called: ``GRPO(task, group_size=8)`` is the agent that trains a language model with it."""

    def agent(self, name: str | None = None) -> type[LLM]:
        return LLM.of(self, name)


class LLMLearner(GroupLearner):
    """Rollouts of completions; shapes change with every rollout, so updates are ordinary autograd."""

    source: TokenCollector

    def __init__(
        self, agent: LLM, policy: nn.Module, estimator: Recipe, updater: ModuleUpdater, reference: Snapshot | None
    ) -> None:
        super().__init__(agent, policy, estimator, updater)
        self._updater, self._components = updater, agent.task.components
        self.last: Data | None = None
        """The last rollout, until the next one is sampled."""
        self.reference = reference
        """Of a model with adapters the policy as it was when reinforcement began; else that is the bank's ``ref``."""
        if reference is not None:
            self.ctx.bank.adopt("ref", reference)
            self.state.register("reference", reference)

    @property
    def clock(self) -> int:
        # demonstrations are no samples of the policy: where there is nothing else, iterations count them
        return self.iteration * self._samples if self.clock_unit == "demonstrations" else super().clock

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        super()._log(data, stats, seconds)
        updater = self._updater
        if updater.skip_norm is not None or updater.skipped:  # of all updates so far those whose gradient was too large
            self.scalars["train/skipped_updates"] = updater.skipped
        if self.clock_unit == "demonstrations":
            self.scalars = {name: x for name, x in self.scalars.items() if not name.startswith("rollout/")}
            return
        on = self.last = data.get("sampled", data["on"])
        self.scalars |= {
            "rollout/success": (on["reward_components"][:, 0] >= 1.0).float().mean(),
            "rollout/capped": on["capped"].float().mean(),
            "rollout/zero_spread": zero_spread(on),
            "time/tokens": self.source.tokens,
            **{f"rollout/{name}": on["reward_components"][:, i].mean() for i, name in enumerate(self._components)},
        }


class LLM(MethodAgent):
    """Trains a language model on a task with a method; the class for one is ``LLM.of(method)``.

    :param env: a task's name (``"arithmetic"``, options in ``env_kwargs``) or a ``TextTask``.
    :param config: a ``Config`` or one of the parts it is made of; None: the defaults.
    """

    beside = (RolloutConfig, GenerationConfig, OptimiserConfig, ModelConfig)
    text: ClassVar[bool] = True
    """Trained on text tasks."""
    steps_env: ClassVar[bool] = False
    learner: LLMLearner

    def connect(self, env: str | TextTask) -> None:
        named = resolve_task(env, **(self.env_kwargs if isinstance(env, str) else {}))
        self.task = fit_task(named, self.config.model)
        fields, more = (getattr(self.method.Recipe, name, ()) for name in ("fields", "optional_fields"))
        self.collector = self._served(fields) if self.config.generation else self._collector(self.seed, fields + more)

    def _collector(self, seed: int, fields: tuple[Any, ...] = ()) -> TokenCollector:
        return TokenCollector(self.task, **self._sampling(seed, fields))

    def _sampling(self, seed: int, fields: tuple[Any, ...]) -> dict[str, Any]:
        c = self.config
        return {
            "seed": seed, "device": self.device, "fields": fields, "pad_to_multiple_of": c.pad_to_multiple_of,
            "max_new_tokens": c.max_new_tokens or None, "top_p": c.top_p, "top_k": c.top_k,
        }  # fmt: skip

    def _served(self, fields: tuple[Any, ...]) -> ServedCollector:
        c = self.config
        if c.temperature != 1.0:
            raise ValueError(f"temperature: expected 1 with generation, whose log-probabilities are those of the "
                             f"distribution at temperature 1, got {c.temperature:g}")  # fmt: skip
        if c.model == "tabular":
            raise ValueError("model: expected a language model with generation, got tabular, which no server has")
        folder = None if c.generation_folder is None else Path(c.generation_folder)
        if folder is not None and Path(c.model).is_dir() and folder.resolve() == Path(c.model).resolve():
            raise ValueError(f"generation_folder: expected another folder than the model's own ({folder}), which it "
                             "would overwrite; start the server from a copy of it")  # fmt: skip
        return ServedCollector(
            self.task, CompletionsClient(c.generation, c.generation_model), weights=c.generation_weights, folder=folder,
            every=c.generation_every, tolerance=c.generation_tolerance, **self._sampling(self.seed, fields),
        )  # fmt: skip

    def build(self) -> Learner:
        """:raises ValueError: if the method imitates with these settings and the task has no demonstrations."""
        c = self.config
        shown = self.task.prompts(1, Generator().manual_seed(0)).demonstration
        if shown is None and (c.imitates or c.warm_start_steps):
            what = self.name if c.imitates else "warm_start_steps"
            raise ValueError(f"task {self.task.name!r} has no demonstrations, and {what} imitates them with these "
                             "settings; choose another task, or settings that sample alone")  # fmt: skip
        policy = self.make_model().to(self.device)
        updater = ModuleUpdater(
            policy, lambda params: make_optimiser(c, params), max_grad_norm=c.max_grad_norm or None,
            skip_norm=c.skip_grad_norm or None,
        )  # fmt: skip
        counts = torch.full((c.n_prompts,), c.group_size, dtype=torch.int64, device=self.device)
        if isinstance(self.collector, ServedCollector):
            self.collector.policy = policy
        reference = Snapshot(policy) if c.lora_rank else None
        parts = Parts(
            policy, updater, Request(counts=counts), self.collector.steps, components=self.task.components,
            questions=self.questions,
        )  # fmt: skip
        return LLMLearner(self, policy, self.method.Recipe(c, parts), updater, reference)

    def make_model(self) -> nn.Module:
        """The token policy; override it to train one of your own."""
        return build_policy(self.config, self.task)

    def questions(self, most: int) -> Prompts:
        """At most ``most`` training prompts, each question once, the same at every call: all of a task's list where it
        is no longer, else some of them."""
        if isinstance(self.task, AdaptiveTask):
            raise ValueError(f"task: expected questions that stay, of which {self.name} keeps a history each, got "
                             f"{self.task.name!r}, whose questions change as it learns")  # fmt: skip
        generator = named_generator(self.seed, "questions")
        if isinstance(self.task, FiniteTask):
            count = self.task.count("train")
            numbers = torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most]
            return self.task.ask(numbers, "train").to(self.device)
        drawn = self.task.prompts(most, generator)
        _, which = torch.unique(drawn.index, return_inverse=True)
        place = torch.arange(most)
        first = torch.full_like(place, most).scatter_reduce(0, which, place, "amin")
        return drawn.select(first[first < most].sort().values).to(self.device)

    @property
    def spaces(self) -> str:
        """The task, in words."""
        return f"task {self.task.name!r} with {self.task.vocab.size} tokens"

    # -- learning -----------------------------------------------------------------------------------------------------

    def before_learning(self) -> None:
        """The supervised phase, once, and the reference: the policy that it leaves."""
        warm, reference = self.learner.warm, self.learner.reference
        if bool(warm):
            return
        if self.config.warm_start_steps:
            self.warm_start(self.config.warm_start_steps)
        if reference is not None:
            reference.refresh()
        elif self.estimator.wants_reference:
            self.ctx.bank.refresh("ref")
        warm.fill_(True)

    @property
    def warm_started(self) -> bool:
        """Whether a supervised phase is all that it has behind it."""
        return bool(self.learner.warm) and self.config.warm_start_steps > 0 and self.iteration == 0

    def warm_start(self, steps: int) -> float:
        """Maximum likelihood on demonstrations, which are drawn from a stream of their own; returns the last loss."""
        c = self.config
        collector = self._collector(stream_seed(self.seed, "warm start"))
        request = Request(counts=torch.ones(c.warm_start_batch, dtype=torch.int64), demonstrations=True)
        updater = ModuleUpdater(
            self.policy, lambda params: torch.optim.AdamW(params, lr=c.warm_start_lr, weight_decay=0.0, fused=True),
            max_grad_norm=1.0,
        )  # fmt: skip
        terms = (Term("sft_loss", losses.neg_log_prob, aggregates.mean, ratios.plain, advantage=None),)
        loss = torch.zeros(())
        for i in range(steps):
            linear_decay([updater], c.warm_start_lr, i / steps)
            batch = collector.collect(request, self.policy).epoch(Batching("sequence", "full"), None)[0]
            if not bool(batch["n_valid"] > 0):
                continue  # no prompt has a demonstration: a zero gradient would still move Adam's moments
            loss = updater.step(terms, batch)["sft_loss"]
        return float(loss)

    def last_completions(self, most: int = 8) -> list[tuple[str, str, float]]:
        """Prompt, completion and reward of some completions of the last rollout, of different prompts first."""
        on = self.learner.last
        if on is None:
            return []
        order = sorted(range(on.shape[1]), key=_turns(on["group"].tolist()).__getitem__)[:most]
        vocab, found = self.task.vocab, list[tuple[str, str, float]]()
        for n in order:
            prompt = on["prompt"][n][on["prompt_valid"][n] > 0].tolist()
            written = on["action"][: int(on["length"][n]), n].tolist()
            found.append((vocab.decode(prompt), vocab.decode(written), float(on["episode_reward"][n])))
        return found

    # -- acting -------------------------------------------------------------------------------------------------------

    def act(self, obs: Tree, deterministic: bool = False) -> Tensor:
        raise TypeError("act: a language model completes text; use predict(prompt) or complete(prompts)")

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """One prompt or a list of prompts -> their completions as text, and ``state`` unchanged."""
        single = isinstance(observation, str)
        texts = self.complete([observation] if single else list(observation), deterministic)
        return (texts[0] if single else texts), state

    @torch.no_grad()
    def complete(self, prompts: Sequence[str], deterministic: bool = False, seed: int | None = None) -> list[str]:
        """One completion per prompt, as text; ``seed=None`` draws from torch's global generator."""
        tokens, valid = pad_left([encode_prompt(self.task.vocab, p) for p in prompts], self.task.vocab.pad)
        seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
        asked = Prompts(tokens, valid, torch.arange(len(prompts)), (None,) * len(prompts))
        found = self._collector(stream_seed(seed, "evaluation")).complete(self.policy, asked, deterministic)
        return [self.task.vocab.decode(row) for row in found]

    @torch.no_grad()
    def pass_at(self, ks: Sequence[int], questions: int = 64, samples: int = 16, seed: int = 0) -> dict[str, float]:
        """``pass@k`` (first component at least 1) of ``samples`` completions of each of ``questions`` test questions,
        their mean reward, entropy per token (nats) and length. Decided by ``seed``; training does not move it."""
        collector = self._collector(stream_seed(seed, "evaluation"), (Field("entropy"),))
        prompts = collector.test_prompts(questions, seed)
        question = torch.arange(len(prompts), device=self.device).repeat_interleave(samples)
        data = collector.sample(self.policy, prompts, question)
        right = (data["reward_components"][:, 0] >= 1.0).float().view(-1, samples).sum(1)
        found = {f"pass@{k}": float(pass_at_k(samples, right, k).mean()) for k in ks}
        entropy = (data["entropy"] * data["valid"]).sum() / data["valid"].sum().clamp_min(1.0)
        return found | {"episode_reward": float(data["episode_reward"].mean()), "entropy": float(entropy),
                        "length": float(data["length"].float().mean())}  # fmt: skip

    @torch.no_grad()
    def evaluate(self, env: BatchedEnv | None, episodes: int, seed: int, deterministic: bool = True) -> EvalResult:
        """Scores and lengths of one completion for each of ``episodes`` test questions; ``env`` is not needed."""
        collector = self._collector(stream_seed(seed, "evaluation"))
        prompts = collector.test_prompts(episodes, seed)
        question = torch.arange(len(prompts), device=self.device)
        data = collector.sample(self.policy, prompts, question, deterministic=deterministic)
        return EvalResult(data["episode_reward"].double().cpu().numpy(), data["length"].cpu().numpy())


def zero_spread(on: Data) -> Tensor:
    """Share of the groups (of two or more) whose completions have one reward: those that teach nothing."""
    groups = Groups(on["group"])
    several = groups.count > 1
    constant = groups.constant(on["episode_reward"]) & several
    return (constant.sum() / several.sum().clamp_min(1)).float()


def _turns(labels: list[int]) -> list[int]:
    """For each how many equal ones come before it."""
    seen: dict[int, int] = {}
    turns = []
    for label in labels:
        turns.append(seen.get(label, 0))
        seen[label] = turns[-1] + 1
    return turns
