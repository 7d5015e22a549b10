"""One agent for all language-model methods: generate, score, prepare, update, log. A method is a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from agents.base import Agent
from ccrl.batched_env import BatchedEnv, Tree
from ccrl.collect import Request
from ccrl.data import Batching, Field
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.recipe import Parts, Recipe, RecipeConfig
from ccrl.estimators.terms import Term
from ccrl.experiment.evaluation import EvalResult
from ccrl.learn import Learner, RolloutLearner
from ccrl.llm.models import WithoutAdapters, build_policy, fit_task
from ccrl.llm.rollouts import pass_at_k
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import Prompts, TextTask, pad_left, resolve_task
from ccrl.llm.vocabulary import encode_prompt
from ccrl.updaters import ModuleUpdater, Stats, linear_decay

__all__ = ["LLM", "LLMConfig"]


@dataclass(frozen=True)
class LLMConfig(RecipeConfig):
    """What every language-model agent has. The defaults suit the tiny model; give a real one its own step size."""

    model: str = "tiny"
    """tiny (a Llama of the size below, from scratch), tabular (bandit tasks), or a local model directory."""
    model_layers: int = 4
    """Layers of the tiny model."""
    model_width: int = 128
    """Hidden size of the tiny model."""
    model_heads: int = 4
    """Attention heads of the tiny model."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the model (needs peft); 0: the model."""
    logits_chunk_size: int | None = None
    """Tokens per piece of the vocabulary projection, which is most of the memory of a large vocabulary; 0: in one
    piece; none: 256 tokens per piece from a vocabulary of 16,384 tokens up, else in one piece."""
    n_prompts: int = 16
    """Prompts per iteration."""
    max_new_tokens: int = 0
    """Length cap of completions; 0: the task's."""
    temperature: float = 1.0
    """Of sampling and scoring."""
    pad_to_multiple_of: int = 1
    """Completions are padded to a multiple of it."""
    learning_rate: float = 3e-4
    """Step size of the optimiser."""
    optimiser: str = "adamw"
    """adamw or sgd."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    anneal_lr: bool = False
    """Linear decay of the step size to 0 over the run."""
    warm_start_steps: int = 0
    """Supervised steps on the task's demonstrations before the first rollout."""
    warm_start_batch: int = 64
    """Demonstrations per supervised step."""
    warm_start_lr: float = 1e-3
    """Their step size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "n_prompts",
            "model_layers",
            "model_width",
            "model_heads",
            "pad_to_multiple_of",
            "warm_start_batch",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected >= 1, got {getattr(self, name)}")
        for name in (
            "lora_rank",
            "logits_chunk_size",
            "max_new_tokens",
            "warm_start_steps",
            "max_grad_norm",
            "weight_decay",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}: expected >= 0, got {getattr(self, name)}")
        for name in ("temperature", "learning_rate", "warm_start_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected > 0, got {getattr(self, name)}")
        if self.optimiser not in OPTIMISERS:
            raise ValueError(f"optimiser: expected one of {sorted(OPTIMISERS)}, got {self.optimiser!r}")


OPTIMISERS: dict[str, Callable[[list[nn.Parameter], LLMConfig], torch.optim.Optimizer]] = {
    "adamw": lambda params, c: torch.optim.AdamW(
        params, lr=c.learning_rate, betas=(0.9, 0.999), weight_decay=c.weight_decay, fused=True
    ),
    "sgd": lambda params, c: torch.optim.SGD(params, lr=c.learning_rate),
}


class LLMLearner(RolloutLearner):
    """Rollouts of completions; shapes change with every rollout, so updates are ordinary autograd."""

    def __init__(self, agent: LLM, policy: nn.Module, estimator: Recipe, updater: ModuleUpdater) -> None:
        c = agent.config
        samples = c.n_prompts * c.group_size
        super().__init__(
            agent.collector, policy, estimator, {"policy": updater}, samples=samples, columns=samples,
            clock_unit=estimator.clock_unit, anneal=c.anneal_lr, seed=agent.seed, device=agent.device,
        )  # fmt: skip
        self._components, self._n_prompts = agent.task.components, c.n_prompts
        self.warm = torch.zeros((), dtype=torch.bool, device=self.device)
        """Whether the supervised phase (if any) is over."""
        self.state.register("warm", self.warm)

    @property
    def clock(self) -> int:
        # demonstrations are no samples of the policy: where there is nothing else, iterations count them
        return self.iteration * self._samples if self.clock_unit == "demonstrations" else super().clock

    def points(self) -> dict[str, Tensor]:
        # before plan is asked, so that a budget sees the prompts
        self.ctx.prompts = self.source.draw(self._n_prompts)  # type: ignore[attr-defined]
        return {}

    def _log(self, data: Mapping[str, Any], stats: Stats, seconds: dict[str, float]) -> None:
        super()._log(data, stats, seconds)
        updater = self.updaters["policy"]
        if updater.skip_norm is not None or updater.skipped:  # of all updates so far those whose gradient was too large
            self.scalars["train/skipped_updates"] = updater.skipped
        if self.clock_unit == "demonstrations":
            self.scalars = {name: x for name, x in self.scalars.items() if not name.startswith("rollout/")}
            return
        on = data.get("sampled", data["on"])
        self.scalars |= {
            "rollout/success": (on["reward_components"][:, 0] >= 1.0).float().mean(),
            "rollout/capped": on["capped"].float().mean(),
            "time/tokens": self.source.tokens,
            **{f"rollout/{name}": on["reward_components"][:, i].mean() for i, name in enumerate(self._components)},
        }


class LLM(Agent):
    """Trains a language model on a task with the recipe that a subclass names.

    :param env: a task's name (``"arithmetic"``, options in ``env_kwargs``) or a ``TextTask``.
    """

    Recipe: ClassVar[type[Recipe]] = Recipe
    Config: ClassVar[type[Any]] = LLMConfig
    text: ClassVar[bool] = True
    """Trained on text tasks: there is no environment to build or to step."""

    def connect(self, env: str | TextTask) -> None:
        named = resolve_task(env, **(self.env_kwargs if isinstance(env, str) else {}))
        self.task = fit_task(named, self.config.model)
        self.collector = self._collector(self.seed, self.Recipe.fields)

    def _collector(self, seed: int, fields: tuple[Any, ...] = ()) -> Any:
        c = self.config
        return TokenCollector(self.task, seed=seed, device=self.device, fields=fields,
                              pad_to_multiple_of=c.pad_to_multiple_of,
                              max_new_tokens=c.max_new_tokens or None)  # fmt: skip

    def build(self) -> Learner:
        c = self.config
        policy = self.make_model().to(self.device)
        updater = ModuleUpdater(
            policy, lambda params: OPTIMISERS[c.optimiser](params, c), max_grad_norm=c.max_grad_norm or None
        )
        counts = torch.full((c.n_prompts,), c.group_size, dtype=torch.int64, device=self.device)
        parts = Parts(
            policy, updater, Request(counts=counts), self.collector.steps, components=self.task.components,
            reference=(lambda ctx: WithoutAdapters(policy)) if self.reference_is_base else None,
        )  # fmt: skip
        return LLMLearner(self, policy, self.Recipe(c, parts), updater)

    def make_model(self) -> nn.Module:
        """The token policy; override it to train one of your own."""
        return build_policy(self.config, self.task)

    @property
    def spaces(self) -> str:
        """The task, in words."""
        return f"task {self.task.name!r} with {self.task.vocab.size} tokens"

    # -- learning -----------------------------------------------------------------------------------------------------

    def before_learning(self) -> None:
        """The supervised phase, once, and the reference: the policy that it leaves."""
        warm = self.learner.warm
        if bool(warm):
            return
        if self.config.warm_start_steps:
            self.warm_start(self.config.warm_start_steps)
        if self.estimator.wants_reference and not self.reference_is_base:
            self.ctx.bank.refresh("ref")
        warm.fill_(True)

    @property
    def reference_is_base(self) -> bool:
        """Whether the model under the adapters is the reference. After a supervised phase, which trains the adapters,
        it no longer is: a copy is then kept."""
        return self.config.lora_rank > 0 and not self.config.warm_start_steps

    @property
    def warm_started(self) -> bool:
        """Whether a supervised phase is all that it has behind it."""
        return bool(self.learner.warm) and self.config.warm_start_steps > 0 and self.iteration == 0

    def warm_start(self, steps: int) -> float:
        """Maximum likelihood on demonstrations, which are drawn from a stream of their own; returns the last loss."""
        c = self.config
        collector = self._collector(self.seed + 2_000_003)
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
            loss = updater.step(terms, batch)["sft_loss"]
        return float(loss)

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
        found = self._collector(seed).complete(self.policy, asked, deterministic)
        return [self.task.vocab.decode(row) for row in found]

    @torch.no_grad()
    def pass_at(self, ks: Sequence[int], questions: int = 64, samples: int = 16, seed: int = 0) -> dict[str, float]:
        """``pass@k`` (first component at least 1) of ``samples`` completions of each of ``questions`` test questions,
        their mean score, entropy per token (nats) and length. Decided by ``seed``; training does not move it."""
        collector = self._collector(seed, (Field("entropy"),))
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
        collector = self._collector(seed)
        prompts = collector.test_prompts(episodes, seed)
        question = torch.arange(len(prompts), device=self.device)
        data = collector.sample(self.policy, prompts, question, deterministic=deterministic)
        return EvalResult(data["episode_reward"].double().cpu().numpy(), data["length"].cpu().numpy())
