"""A recipe inside somebody else's trainer: the host samples and steps, the recipe prepares and gives the loss.

A host has less than the suite's agents: one rollout per iteration, no sampler to ask for more, minibatches that it cuts
itself. Whether a recipe can live with that is found out when it is built, by two rollouts of made-up numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.columns import columns_read
from ccrl.data import Batching, Data
from ccrl.estimators.base import Context, Estimator
from ccrl.estimators.terms import Outputs, Term, surrogate
from ccrl.estimators.updates import Stats

__all__ = ["INSTEAD", "Host", "HostParts", "HostedRecipe", "build_hosted", "episode_masks"]

INSTEAD = "otherwise train it with the suite's own agent (python scripts/train.py llm), which hosts every recipe"
"""End of every refusal."""


@dataclass(frozen=True)
class Host:
    """What a trainer offers."""

    name: str
    """For messages."""
    max_length: int
    """Longest completion."""
    group_size: int
    """Completions per prompt."""
    components: tuple[str, ...]
    """Names of the reward's components."""
    given: frozenset[str]
    """Columns that every rollout has; ``valid``, ``episode_reward``, ``group`` at least."""
    computed: frozenset[str]
    """Columns that cost a forward pass: computed where a stage reads them."""
    outputs: frozenset[str]
    """Forward outputs of its policy."""
    temperatures: bool
    """Whether that policy gives log-probabilities at any temperature (``policy.log_prob``)."""
    reference: bool
    """Whether it keeps a reference policy (column ``host_ref_log_prob``)."""


@dataclass(frozen=True)
class HostParts:
    """What a recipe is built from; the names are those of the agents' ``Parts``."""

    policy: nn.Module
    request: Request
    max_length: int
    components: tuple[str, ...]
    reference: Callable[[Context], nn.Module] | None
    updater: Any = None
    questions: None = None


class _Reference(nn.Module):
    """The host has evaluated its reference already."""

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        return {"log_prob": batch["host_ref_log_prob"]}


class _Zeros(nn.Module):
    """Stands in for the policy while a recipe is tried."""

    def __init__(self, outputs: frozenset[str], temperatures: bool) -> None:
        super().__init__()
        self._outputs = outputs
        if temperatures:
            self.temperature = 1.0
            self.log_prob = lambda batch, temperature: torch.zeros(batch.shape)

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        if want - self._outputs:
            raise ValueError(f"it wants {sorted(want - self._outputs)} of the policy, which computes "
                             f"{sorted(self._outputs)}")  # fmt: skip
        return {name: torch.zeros(batch.shape) for name in want}


class _Absent:
    """A part of the context that no host has: named when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise ValueError(f"it uses the agent's {self._name}.{attribute}")

    def __call__(self, *args: Any) -> Any:
        raise ValueError(f"it uses the agent's {self._name}")


@dataclass(eq=False)
class HostedRecipe:
    """A recipe that fits its host. Made by ``build_hosted``."""

    estimator: Estimator
    terms: tuple[Term, ...]
    generator: torch.Generator
    columns: frozenset[str] = frozenset()
    """Data columns that the terms read."""
    computed: frozenset[str] = frozenset()
    """Of the host's ``computed`` columns those that a stage reads."""
    ctx: Context = field(init=False)
    """Of the last ``prepare``."""

    @property
    def want(self) -> frozenset[str]:
        """Forward outputs that the terms read."""
        return frozenset().union(*(term.want for term in self.terms))

    @torch.no_grad()
    def prepare(self, data: Data, k: float, K: float) -> dict[str, Data]:
        """The recipe's stages on a whole rollout ``[T, N]``; ``k`` of ``K`` iterations are done.

        :raises ValueError: if the recipe leaves out or repeats completions, or wants another rollout.
        """
        self.ctx = context = _context(k, K, self.generator)
        more = self.estimator.plan({}, {"on": data}, context)
        if more:
            what = "demonstrations" if more[0].demonstrations else "more completions"
            raise ValueError(f"it asks for a second rollout ({more[0].tag!r}: {what}); expected options of it with one "
                             "rollout per iteration")  # fmt: skip
        count = data.shape[1]
        row = torch.arange(count, device=data["valid"].device)
        have = self.estimator.prepare({"on": data.derive_sequence(host_row=row)}, context)
        on = have["on"]
        if "host_row" not in on or on.shape[1] != count or not torch.equal(on["host_row"], row):
            raise ValueError("it trains on a selection of the completions or repeats some; the host trains on all")
        return have


def build_hosted(recipe: Callable[[Any, Any], Estimator], config: Any, host: Host, policy: nn.Module) -> HostedRecipe:
    """``recipe(config, parts)`` for ``host``, whose forward passes ``policy`` makes.

    :raises ValueError: if the recipe needs what the host does not have: minibatches of whole groups, several phases,
        other columns, forward outputs or rollouts, a reference. The message names it.
    """
    try:
        # a second one takes the made-up rollouts: what they leave in its state must not be learned from
        trial = _assemble(recipe, config, host, _Zeros(host.outputs, host.temperatures))
        _try(trial, host)
        made = _assemble(recipe, config, host, policy)
    except ValueError as error:
        name = getattr(recipe, "__name__", repr(recipe))
        raise ValueError(f"{name} does not fit into {host.name}: {error}; {INSTEAD}") from error
    made.columns, made.computed = trial.columns, trial.computed
    made.estimator.read[made.terms] = {*trial.columns, "valid", "group"}
    return made


def episode_masks(valid: Tensor) -> tuple[Tensor, Tensor]:
    """``last`` and ``carry`` ``[T, N]``: 1 on every column's last valid step, and 1 where a later step follows."""
    later = valid.flip(0).cumsum(0).flip(0)
    last = ((later == 1) & (valid > 0)).to(valid.dtype)
    return last, (later > 0).to(valid.dtype) * (1.0 - last)


def _assemble(recipe: Callable[[Any, Any], Estimator], config: Any, host: Host, policy: nn.Module) -> HostedRecipe:
    counts = torch.full((2,), host.group_size, dtype=torch.int64)
    request = Request(counts=counts)
    reference = (lambda context: _Reference()) if host.reference else None
    estimator = recipe(config, HostParts(policy, request, host.max_length, host.components, reference))
    generator = torch.Generator().manual_seed(0)
    asked = estimator.plan({}, {}, _context(0.0, 1.0, generator))
    if any(each.demonstrations for each in asked):
        raise ValueError("it trains on demonstrations, and the host samples completions")
    phases = estimator.phases()
    if len(phases) != 1:
        raise ValueError(f"expected one phase of surrogates, got {[phase.name for phase in phases]}")
    phase = phases[0]
    # before what options can change: no option of such a recipe helps
    if phase.batching.unit == "group":
        raise ValueError("its loss compares completions of one group, and the host's minibatches split groups")
    if len(asked) != 1 or asked[0] is not request:
        raise ValueError("its first rollout is not the completions of the prompts")
    wants_reference = bool(getattr(estimator, "wants_reference", False))
    if wants_reference != host.reference:
        raise ValueError(
            f"{'it compares' if wants_reference else 'it does not compare'} with a reference policy, and the host "
            f"{'keeps one' if host.reference else 'keeps none'}; set the KL weight of both, or of neither"
        )
    if phase.updater is not None:
        raise ValueError("it steps by a rule of its own, and the host by its optimiser's")
    if phase.before_epoch is not None or phase.stop is not None:
        raise ValueError("it interferes between minibatches (before_epoch, stop), which the host cuts itself")
    wanted = frozenset().union(*(term.want for term in phase.terms))
    if wanted - host.outputs:
        raise ValueError(
            f"its loss wants {sorted(wanted - host.outputs)}, and the host computes {sorted(host.outputs)}"
        )
    estimator.read[phase.terms] = {"valid", "group"}
    return HostedRecipe(estimator, phase.terms, generator)


def _context(k: float, K: float, generator: torch.Generator) -> Context:
    done, planned = (torch.tensor(x, dtype=torch.float64) for x in (k, max(K, 1.0)))
    return Context(generator, _Absent("bank"), _Absent("scores"), k=done, clock=done, end=planned)  # type: ignore[arg-type]


def _try(trial: HostedRecipe, host: Host) -> None:
    """Fills in ``columns`` and ``computed``."""
    while True:
        try:
            # equal rewards last: methods that sample until rewards differ, or replay, show themselves
            for equal in (False, True):
                trial.columns = _iteration(trial, _made_up(host, trial.computed, equal))
            return
        except KeyError as error:
            rest = host.computed - trial.computed
            missing = next((name for name in rest if f"no column {name!r}" in str(error)), None)
            if missing is None:
                raise ValueError(f"it reads what the host does not have: {error.args[0]}") from error
            trial.computed |= {missing}


def _iteration(trial: HostedRecipe, data: Data) -> frozenset[str]:
    have = trial.prepare(data, 0.0, 1.0)
    if "log_prob" not in have["on"]:  # at the loss there always is one
        have["on"] = have["on"].derive(log_prob=torch.zeros(data.shape))
    batch = have["on"].epoch(Batching("sequence", "full"), None)[0]
    evaluation = {name: torch.zeros(data.shape) for name in trial.want}
    stats = Stats()

    def loss(piece: Data) -> None:
        stats.update(surrogate(trial.terms, evaluation, piece)[1])

    columns = frozenset(columns_read(loss, batch))
    with torch.no_grad():
        trial.estimator.after_minibatch(stats, trial.ctx)
        trial.estimator.after_update(have, stats, trial.ctx)
    return columns


def _made_up(host: Host, computed: frozenset[str], equal: bool) -> Data:
    """Two groups of completions, all but one ``T`` tokens long."""
    steps, count = min(3, host.max_length), 2 * host.group_size
    valid = torch.ones(steps, count)
    valid[1:, 0] = 0.0
    last, carry = episode_masks(valid)
    parts = torch.ones(count, len(host.components))
    if not equal:
        parts[::2] = 0.0
    total = parts.sum(1)
    ids = torch.zeros(steps, count, dtype=torch.int64)
    columns: dict[str, Tensor] = {
        "valid": valid, "present": valid, "action": ids, "reward": total * last, "carry": carry,
        "episode_reward": total,
        "reward_components": parts, "group": torch.arange(count) // host.group_size, "length": valid.sum(0).long(),
        "prompt": torch.zeros(count, 1, dtype=torch.int64), "prompt_valid": torch.ones(count, 1),
        "demonstration": torch.zeros(count),
    }  # fmt: skip
    columns = {name: value for name, value in columns.items() if name in host.given}
    columns |= {name: torch.full((steps, count), -1.0) for name in computed}
    if host.reference:
        columns["host_ref_log_prob"] = torch.zeros(steps, count)
    sequence = {
        "episode_reward",
        "reward_components",
        "group",
        "length",
        "prompt",
        "prompt_valid",
        "demonstration",
    } & columns.keys()
    return Data(columns, sequence=frozenset(sequence))
