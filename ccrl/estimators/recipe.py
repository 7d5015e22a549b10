"""A method on groups of completions as a recipe: stages, terms, batching. The same recipe trains a cart-pole with
grouped episodes: it reads columns, not tokens.

    completions -> [reference] -> stages (reward, advantage, selection, weights) -> terms (ratio, loss, aggregate)

A ``Method`` is a recipe with its paper, its settings and the defaults that the paper gives to whatever hosts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Batching, Data, Field, Unit, masked
from ccrl.estimators import aggregates, losses, ratios
from ccrl.estimators.base import Context, Estimator, Phase, Stage
from ccrl.estimators.rollouts import evaluate_columns
from ccrl.estimators.stages import GroupBaseline, with_episode_reward
from ccrl.estimators.terms import Aggregate, Loss, Ratio, Term
from ccrl.estimators.updates import Updater
from ccrl.settings import ConfigError, Count, Finite, Natural, Nonnegative, Range, Settings

__all__ = ["Aggregation", "ClipHigh", "ClipLow", "Method", "MethodConfig", "Parts", "Recipe"]


ClipLow = Annotated[float, Range(0, 1)]
ClipHigh = Annotated[float, Range(0, also=(math.inf,))]
Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean", "fixed"]


@dataclass(frozen=True)
class MethodConfig(Settings):
    """What a recipe reads, whatever it trains; what a method adds stands in a subclass."""

    group_size: Count = 8
    """A group has this many completions, or episodes from one start."""
    batch_size: Natural = 0
    """An optimiser step takes this many sequences, or groups where a loss compares inside groups; 0 takes all of the
    rollout."""
    n_epochs: Count = 1
    """The update passes this many times over each rollout."""
    microbatch: Natural = 0
    """A forward pass takes this many sequences, and gradients add up exactly; 0 takes the whole batch."""
    clip_low: ClipLow = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: ClipHigh = 0.2
    """Ratios above 1 + clip_high are clipped; inf clips none."""
    kl_coef: Nonnegative = 0.0
    """KL(policy || reference) is added to the loss with this weight; 0 keeps no reference."""
    entropy_coef: Finite = 0.0
    """The entropy bonus is subtracted from the loss with this weight."""
    aggregate: Aggregation = "token_mean"
    """Token losses are averaged over all tokens (token_mean, DAPO), over each sequence's tokens and then sequences
    (sequence_mean_token_mean, GRPO), summed over tokens and averaged over sequences (sequence_mean), or that divided by
    the length cap (fixed, Dr. GRPO)."""

    unread: ClassVar[tuple[str, ...]] = ()
    """Settings of this class that the method does not read: another value than the default would do nothing."""
    search: ClassVar[dict[str, Any]] = {"batch_size": None}
    """Where tuning looks for settings that are not as agents/search.py has them; None: they stay (0 is the rollout)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            if f.name in self.unread and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"{f.name}: expected {f.default!r} ({type(self).__name__} does not read it), got "
                    f"{getattr(self, f.name)!r}"
                )

    @property
    def imitates(self) -> bool:
        """Whether demonstrations are asked for: only text tasks have them."""
        return False


AGGREGATES: dict[str, Aggregate | None] = {
    "token_mean": aggregates.mean,
    "sequence_mean_token_mean": aggregates.sequence_mean_token_mean,
    "sequence_mean": aggregates.sequence_mean,
    "fixed": None,
}


@dataclass(frozen=True)
class Parts:
    """What an agent hands its recipe."""

    policy: nn.Module
    updater: Updater
    request: Request
    """The rollout of an iteration."""
    max_length: int
    """Longest sequence: the length constant of ``aggregate="fixed"``."""
    components: tuple[str, ...] = ("reward",)
    """Names of the reward's components, the last axis of the column ``reward_components``."""
    reference: Callable[[Context], nn.Module] | None = None
    """The reference policy; None: the bank's version ``ref``."""
    questions: Callable[[int], Any] | None = None
    """Language models: at most so many training prompts, each once, the same at every call (samplers of prompts)."""


class Recipe(Estimator):
    """Override ``stages`` and ``terms`` (or ``ratio`` and ``loss``); the defaults are GRPO's without its KL.

    A stage maps ``Data`` to ``Data`` over the WHOLE rollout: batch statistics belong there. A loss sees a minibatch.
    State that a method keeps between iterations is a buffer (``register_buffer``), written in place.
    """

    unit: ClassVar[Unit] = "sequence"
    """What a minibatch may not split: ``group`` where a loss compares inside groups."""
    reads_stats = False
    """A recipe whose ``after_update`` reads the terms' ``stats`` says True; what an update itself says (its losses,
    every term by name) is always there."""
    ratio: Ratio = staticmethod(ratios.token)
    optional_fields: ClassVar[tuple[Field, ...]] = ()
    """As ``fields``, of samplers that have them at no cost; without them the recipe evaluates the policy."""
    clock_unit: ClassVar[str] = "completions"
    """What the agent's clock counts: completions, or demonstrations where nothing is sampled."""

    def __init__(self, config: Any, parts: Parts) -> None:
        super().__init__()
        self.config = config
        self._parts = (parts,)  # in a tuple: an nn.Module attribute would be saved a second time
        self._prepared = self.stages()
        size: int | Literal["full"] = config.batch_size or "full"
        batching = Batching(self.unit, size, config.n_epochs, config.microbatch or None)
        skip = None if type(self).idle is Recipe.idle else self.idle
        self._phases = (Phase("policy", self.terms(), batching, parts.updater, skip=skip),)

    @property
    def parts(self) -> Parts:
        return self._parts[0]

    # -- slots --------------------------------------------------------------------------------------------------------

    def stages(self) -> tuple[Stage, ...]:
        """From ``episode_reward`` ``[N]`` (and ``reward_components`` ``[N, C]``) to ``advantage`` ``[T, N]``."""
        return (GroupBaseline(scale="std", eps=1e-6, single="zero"),)

    def loss(self) -> Loss:
        """Per element of the ratio's level."""
        return losses.clip(self.config.clip_low, self.config.clip_high)

    def terms(self) -> tuple[Term, ...]:
        """The surrogate."""
        return (self.policy_term(self.loss()), *self.penalties())

    def idle(self, data: Data, ctx: Context) -> bool:
        """Override: whether prepared data have nothing to learn from. The update is then left out: a zero gradient
        would still move Adam's moments."""
        return False

    # -- what recipes compose -----------------------------------------------------------------------------------------

    def aggregate(self) -> Aggregate:
        """The configured aggregation of token losses."""
        found = AGGREGATES[self.config.aggregate]
        if found is None:
            return aggregates.length_constant(self.parts.max_length)
        return found

    def policy_term(
        self, loss: Loss, ratio: Ratio | None = None, aggregate: Aggregate | None = None, **options: Any
    ) -> Term:
        """The policy-gradient term with SB3's ratio statistics; ``ratio`` and ``aggregate`` default to the recipe's."""
        c = self.config
        return Term(
            "policy_gradient_loss", loss, aggregate or self.aggregate(), ratio or type(self).ratio,
            stats=losses.ratio_stats(c.clip_low, c.clip_high), **options,
        )  # fmt: skip

    def penalties(self) -> tuple[Term, ...]:
        """KL to the reference (k3) and entropy bonus, where their weights are not 0."""
        c, found = self.config, list[Term]()
        if c.kl_coef:
            found.append(Term("kl", losses.k3, self.aggregate(), ratios.reference, advantage=None, coef=c.kl_coef))
        if c.entropy_coef:
            found.append(Term(
                "entropy_loss", losses.neg_entropy, self.aggregate(), want=frozenset({"entropy"}),
                advantage=None, coef=c.entropy_coef,
            ))  # fmt: skip
        return tuple(found)

    @property
    def wants_reference(self) -> bool:
        """Whether ``ref_log_prob`` is computed."""
        return bool(self.config.kl_coef)

    # -- life cycle ---------------------------------------------------------------------------------------------------

    def plan(self, points: dict[str, Tensor], have: dict[str, Data], ctx: Context) -> list[Request]:
        return [] if have else [self.parts.request]

    def prepare(self, have: dict[str, Data], ctx: Context) -> dict[str, Data]:
        """``on`` is trained on; ``sampled`` is what the log describes, whatever the stages select."""
        data = self.start(have["on"], ctx)
        for stage in self._prepared:
            data = stage(data)
        return {"sampled": have["on"]} | have | {"on": data}

    def start(self, data: Data, ctx: Context) -> Data:
        """``episode_reward`` where the rollout has none (control tasks), ``ref_log_prob`` where the recipe wants it."""
        data = with_episode_reward(data)
        if self.wants_reference:
            reference = ctx.bank.policy("ref") if self.parts.reference is None else self.parts.reference(ctx)
            columns = self.config.microbatch or None
            found = evaluate_columns(reference, data, frozenset({"log_prob"}), columns)["log_prob"]
            data = data.derive(ref_log_prob=masked(found, data["valid"]))
        return data

    def with_entropy(self, data: Data) -> Data:
        """``entropy`` ``[T, N]`` of the policy that sampled: samplers of tokens store it (``fields``); where none did,
        the policy still is the one."""
        if "entropy" in data:
            return data
        found = evaluate_columns(self.parts.policy, data, frozenset({"entropy"}), self.config.microbatch or None)
        return data.derive(entropy=found["entropy"])

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


@dataclass(frozen=True, eq=False)
class Method:
    """A paper's method as data: what it is called, which settings its recipe reads, how the recipe is built.

    >>> METHOD = Method("mine", "Doe 2026", MyConfig, MyRecipe, {"advantage": "group median"}, {"n_prompts": 64})
    """

    name: str
    """As on the command line."""
    paper: str
    """Citation."""
    Config: type[MethodConfig]
    """Everything that the recipe reads."""
    Recipe: Callable[[Any, Any], Recipe]
    """``Recipe(config, parts)``, a class."""
    slots: Mapping[str, str]
    """What the paper puts into the slots of the estimator, in words."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Its published settings of model, optimiser and rollout, by the names they have where the recipe is trained. A
    host that has no such setting leaves them out."""
