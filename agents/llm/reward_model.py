"""Reward models: trained from preferences or verdicts, and put in the place of any method's verifier.

    trainer = RewardTrainer("arithmetic", data=Judged.pairs(rows, vocab))     # Bradley-Terry head on a causal model
    trainer.learn(1_000)                                                      # gradient steps
    trainer.report(held_out)                                                  # accuracy, calibration, R^2
    agent = judged(GRPO, trainer.reward)("arithmetic", group_size=8)          # any method, on what the model says

Slots: source = judged completions; phases = one loss. The clock counts updates (``DatasetLearner``). Losses and their
sources are in ``ccrl.llm.reward_head``, how far a proxy can be trusted in docs/llm/reward_models.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.llm.agent import LLMMethod
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.recipe import Method, Parts
from ccrl.experiment.evaluation import EvalResult
from ccrl.learn import Cycle, DatasetLearner, Learner
from ccrl.llm.judged import Judged, read_jsonl
from ccrl.llm.models import fit_task, load_model, longest_prompt, tiny_model
from ccrl.llm.reward_head import CausalReward, Scored, pair_terms, verdict_terms
from ccrl.llm.reward_metrics import evaluate_reward
from ccrl.llm.reward_model import ModelReward
from ccrl.llm.task import resolve_task
from ccrl.seeding import named_generator
from ccrl.settings import Count, Natural, Nonnegative, Positive, Settings
from ccrl.updaters import ModuleUpdater, Stats

__all__ = ["RewardConfig", "RewardTrainer", "judged"]

OTHER = "other_"
"""Begins the names of columns that wait beside those that they can take the place of."""

_data: ContextVar[Judged | None] = ContextVar("judged", default=None)
_loading: ContextVar[bool] = ContextVar("loading", default=False)


@dataclass(frozen=True)
class RewardConfig(Settings):
    """Bradley-Terry on pairs, or a regression on verdicts."""

    data_file: str = ""
    """The judgements are in this file with one JSON object per line: prompt, chosen and rejected, or prompt, completion
    and verdict. Empty takes those that are handed over in Python."""
    verdicts: Literal["probability", "score"] = "probability"
    """Verdicts are probabilities of being right, fitted by cross entropy of a logit, or scores, fitted by squared
    error. Pairs do not read it."""
    center_coef: Nonnegative = 0.0
    """The square of a pair's summed rewards is added to the loss with this weight, so that rewards lie around 0."""
    model: str = "tiny"
    """The head stands on this causal model: tiny (a Llama from scratch) or a local model directory."""
    model_layers: Count = 2
    """The tiny model has this many layers."""
    model_width: Count = 64
    """The tiny model has this hidden size."""
    model_heads: Count = 4
    """The tiny model has this many attention heads."""
    batch_size: Count = 64
    """A gradient step reads this many pairs or completions, drawn with replacement."""
    microbatch: Natural = 0
    """A forward pass takes this many completions, and gradients add up exactly; 0 takes the whole batch."""
    updates: Count = 50
    """An iteration, after which training is logged, has this many gradient steps."""
    learning_rate: Positive = 1e-3
    """This is AdamW's step size; a pretrained model wants one of about 1e-5."""
    weight_decay: Nonnegative = 0.0
    """This is AdamW's decoupled weight decay."""
    max_grad_norm: Nonnegative = 1.0
    """Gradients are scaled down to this norm; 0 never scales them."""
    anneal_lr: bool = True
    """The step size falls linearly to 0 over the training."""


class Judging(Cycle):
    """One regression on judgements."""

    def __init__(self, updater: ModuleUpdater, terms: Any, microbatch: int | None) -> None:
        super().__init__()
        self._phases = (Phase("reward", terms, Batching(microbatch=microbatch), updater),)
        self._microbatch = microbatch

    def targets(self, draw: Data, ctx: Context) -> Data:
        draw.microbatch = self._microbatch
        return draw

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


class RewardTrainer(Agent):
    """Trains a reward model on judgements of completions of a text task; ``reward`` is the model.

    :param env: a task's name or a ``TextTask``: its vocabulary, and the length of its completions.
    :param data: judgements in place of the setting ``data_file``. A checkpoint has none: a loaded trainer judges, and
        needs them again to learn.
    :param policy: a reward model of your own, a module with ``device`` that gives ``[B]`` of a batch.
    :raises ValueError: no judgements, or a setting that they do not read.
    """

    name = "reward_model"
    paper = "Bradley and Terry 1952; Christiano et al. 2017, arXiv 1706.03741; Ouyang et al. 2022, arXiv 2203.02155"
    Config = RewardConfig
    text = True
    steps_env = False

    def __init__(self, env: Any, config: Any = None, *, data: Judged | None = None, **options: Any) -> None:
        with _handed(data):
            super().__init__(env, config, **options)

    @classmethod
    def load(cls, path: Any, env: Any = None, *args: Any, data: Judged | None = None, **options: Any) -> Self:
        """As ``Agent.load``; ``data`` as for a new trainer."""
        token = _loading.set(True)
        try:
            with _handed(data):
                return super().load(path, env, *args, **options)
        finally:
            _loading.reset(token)

    @classmethod
    def slots(cls) -> dict[str, str]:
        return {"source": "judged completions", "phases": "Bradley-Terry, or a regression on verdicts"}

    def connect(self, env: Any) -> None:
        named = resolve_task(env, **(self.env_kwargs if isinstance(env, str) else {}))
        self.task, self.collector = fit_task(named, self.config.model), None

    def build(self) -> Learner:
        c = self.config
        self.judgements = self._open()
        policy = Scored(self.make_model()).to(self.device)
        updater = ModuleUpdater(
            policy, lambda params: torch.optim.AdamW(params, lr=c.learning_rate, weight_decay=c.weight_decay),
            max_grad_norm=c.max_grad_norm or None,
        )  # fmt: skip
        kind = "pairs" if self.judgements is None else self.judgements.kind
        terms = pair_terms(c.center_coef) if kind == "pairs" else verdict_terms(c.verdicts)
        cycle = Judging(updater, terms, c.microbatch or None)
        source: Any = _Nothing(self._missing) if self.judgements is None else self.judgements.to(self.device)
        return DatasetLearner(
            source, policy, cycle, {"policy": updater}, batch_size=c.batch_size, updates=c.updates, seed=self.seed,
            device=self.device, anneal=c.anneal_lr,
        )  # fmt: skip

    def make_model(self) -> nn.Module:
        """The reward model; override it to train one of your own."""
        c = self.config
        if self.own_policy is not None:
            if not isinstance(self.own_policy, nn.Module):
                raise TypeError(f"policy: expected a torch.nn.Module, got {type(self.own_policy).__name__}")
            return self.own_policy
        if c.model != "tiny":
            return CausalReward(load_model(c.model))
        longest = longest_prompt(self.task)[0] + self.task.max_new_tokens
        return CausalReward(tiny_model(
            self.task.vocab.size, layers=c.model_layers, width=c.model_width, heads=c.model_heads,
            max_length=max(256, longest + 1),
        ))  # fmt: skip

    @property
    def reward(self) -> nn.Module:
        """The reward model (``ccrl.llm.reward_model.RewardModel``)."""
        found: nn.Module = self.policy.model
        return found

    def report(self, data: Judged) -> dict[str, float]:
        """Accuracy, calibration and R^2 on judgements that it was not trained on; see
        ``ccrl.llm.reward_metrics.evaluate_reward``."""
        c = self.config
        return evaluate_reward(self.reward, data.to(self.device), c.microbatch or None, c.verdicts == "probability")

    @torch.no_grad()
    def evaluate(self, env: Any, episodes: int, seed: int, deterministic: bool = True) -> EvalResult:
        """Per pair 1 where the preferred one has the larger reward, per completion the reward, of ``episodes`` drawn
        judgements: those of training, so take ``report`` for a test."""
        if self.judgements is None:
            raise ValueError(_Nothing(self._missing).told)
        drawn = self.judgements.to(self.device).sample(
            Batching(size=episodes), named_generator(seed, "evaluation", self.device)
        )
        reward = self.reward(drawn)
        score = (reward[0::2] > reward[1::2]).double() if self.judgements.kind == "pairs" else reward.double()
        return EvalResult(score.cpu().numpy(), torch.ones(len(score), dtype=torch.int64).numpy())

    @property
    def spaces(self) -> str:
        """The task, in words."""
        return f"task {self.task.name!r} with {self.task.vocab.size} tokens"

    def _open(self) -> Judged | None:
        c, found = self.config, _data.get()
        self._missing = ""
        if found is None and c.data_file:
            try:
                rows, vocab, cap = read_jsonl(c.data_file), self.task.vocab, self.task.max_new_tokens
            except OSError as error:
                if not _loading.get():
                    raise
                self._missing = f" ({error})"  # said where they are missed: when the trainer is to learn
                return None
            pairs = bool(rows) and "chosen" in rows[0]
            found = (Judged.pairs if pairs else Judged.verdicts)(rows, vocab, cap)
        if found is None:
            return None
        unread = {"center_coef": 0.0} if found.kind == "verdicts" else {"verdicts": "probability"}
        for name, value in unread.items():
            if getattr(c, name) != value:
                raise ValueError(f"{name}: expected {value!r} with {found.kind}, which do not read it, got "
                                 f"{getattr(c, name)!r}")  # fmt: skip
        said = found.data["verdict"] if found.kind == "verdicts" else torch.zeros(1)
        if c.verdicts == "probability" and not bool(((said >= 0) & (said <= 1)).all()):
            raise ValueError(f"verdicts: expected 'score' for verdicts outside [0, 1] ({float(said.min()):.3g} to "
                             f"{float(said.max()):.3g}), got 'probability'")  # fmt: skip
        return found


class _Nothing:
    """The source of a trainer without judgements."""

    def __init__(self, missing: str) -> None:
        self.told = (f"reward_model: expected judgements to learn from, got none{missing}; set data_file, or pass "
                     "data=Judged.pairs(...)")  # fmt: skip

    def sample(self, spec: Batching, generator: Any) -> Data:
        raise ValueError(self.told)


@contextlib.contextmanager
def _handed(data: Judged | None) -> Iterator[None]:
    token = _data.set(_data.get() if data is None else data)
    try:
        yield
    finally:
        _data.reset(token)


# -- in the verifier's place ------------------------------------------------------------------------------------------


def judged(
    method: Method, model: nn.Module, *, weight: float = 1.0, keep: float = 0.0, microbatch: int | None = None
) -> LLMMethod:
    """``method`` on what ``model`` says in place of the verifier: ``weight * said + keep * verified``.

    Every stage of the method, and what it plans next, sees rows whose ``episode_reward``, ``reward`` (all of it on the
    last token) and first component of ``reward_components`` (the others are 0) are that number; the rollout itself
    keeps its facts, so what is logged is the verifier's reward: the curve in which over-optimisation shows. A method
    that asks whether a completion is right asks here whether the number is at least 1.

    :param model: a reward model of whole completions; it is saved with the agent, in its state.
    :param keep: weight of the verifier's reward.
    :param microbatch: completions per call of the model; None: all at once.
    :raises ValueError: a weight of 0 or one that is not finite; TypeError: a model that is no module.
    """
    ModelReward(model, "judged_reward", weight=weight)  # type: ignore[arg-type]  # says at once what does not fit

    class JudgedRecipe(method.Recipe):  # type: ignore[name-defined, misc]
        def __init__(self, config: Any, parts: Parts) -> None:
            super().__init__(config, parts)
            self.stand_in = ModelReward(model, "judged_reward", weight=weight, microbatch=microbatch)  # type: ignore[arg-type]
            self._seen: list[tuple[Data, Data]] = []

        def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
            asked: list[Request] = super().plan(points, {tag: self._view(data) for tag, data in have.items()}, ctx)
            return asked

        def fit(self, have: dict[str, Data], ctx: Context) -> Stats:
            fitted: Stats = super().fit({tag: self._view(data) for tag, data in have.items()}, ctx)
            return fitted

        def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
            found = super().prepare({tag: self._view(data) for tag, data in have.items()}, ctx)
            self._seen = []
            return {tag: data if tag == "on" else _exchanged(data) for tag, data in found.items()}

        def after_update(self, data: dict[str, Data], stats: Stats, ctx: Context) -> None:
            seen = {tag: each if tag == "on" else _exchanged(each) for tag, each in data.items()}
            super().after_update(seen, stats, ctx)
            stats["judged_reward"] = seen.get("sampled", seen["on"])["episode_reward"].mean()

        def _view(self, data: Data) -> Data:
            """The rows as the method sees them, made once for every rollout."""
            for rollout, view in self._seen:
                if rollout is data:
                    return view
            view = _viewed(data, self.stand_in, keep)
            self._seen.append((data, view))
            return view

    JudgedRecipe.__name__ = JudgedRecipe.__qualname__ = f"Judged{getattr(method.Recipe, '__name__', 'Recipe')}"
    slots = {"reward": "a reward model", **method.slots}
    changed: LLMMethod = replace(method, name=f"judged_{method.name}", Recipe=JudgedRecipe, slots=slots)  # type: ignore[assignment]
    return changed


@torch.no_grad()
def _viewed(data: Data, judge: ModelReward, keep: float) -> Data:
    said = judge(data)["judged_reward"].to(data["valid"].dtype)
    if said.dim() != 1:
        raise ValueError(f"judged: expected a reward model of completions, got rewards {list(said.shape)} of tokens")
    total = said + keep * data["episode_reward"] if keep else said
    columns = {"episode_reward": total}
    if "reward" in data:
        last = (data["length"] - 1).clamp_min(0)
        columns["reward"] = torch.zeros_like(data["reward"])
        columns["reward"][last, torch.arange(len(total), device=total.device)] = total
    if "reward_components" in data:
        columns["reward_components"] = torch.zeros_like(data["reward_components"])
        columns["reward_components"][:, 0] = total
    others = {f"{OTHER}{name}": value for name, value in columns.items()}
    sequence = data.sequence | {name for name in others if name != f"{OTHER}reward"}
    return _exchanged(Data({**data, **others}, raw=data.raw, sequence=sequence, scalars=data.scalars))


def _exchanged(data: Data) -> Data:
    """The verifier's columns and the model's change places."""
    names = [name for name in data if name.startswith(OTHER)]
    swapped = {name: data[name.removeprefix(OTHER)] for name in names}
    swapped |= {name.removeprefix(OTHER): data[name] for name in names}
    return Data({**data, **swapped}, raw=data.raw, sequence=data.sequence, scalars=data.scalars)
