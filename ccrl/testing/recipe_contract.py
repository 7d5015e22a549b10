"""The contract of language-model recipes as a test class: what must hold of every loss.

Recipes are driven through the whole life cycle (plan, collect, fit, prepare, terms) of the agent that has them, with a
table of logits in float64 as policy.
"""

from __future__ import annotations

import copy
import unittest
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ccrl.data import Batching, Data
from ccrl.estimators import losses, ratios
from ccrl.estimators.recipe import Recipe
from ccrl.estimators.rollouts import evaluate_columns
from ccrl.estimators.terms import Aggregate, Term, surrogate
from ccrl.llm import trl, verl
from ccrl.llm.hosted import INSTEAD, Host, build_hosted
from ccrl.packages import require
from ccrl.testing.method_contract import MethodContract
from ccrl.testing.ragged_task import RaggedTask

__all__ = ["RaggedTask", "RecipeContract"]

SMALL: dict[str, Any] = {"n_prompts": 3, "group_size": 4, "learning_rate": 0.05}
SIZE: dict[str, Any] = {"model_layers": 1, "model_width": 16, "model_heads": 2}
TINY: dict[str, Any] = {"model": "tiny", "warm_start_steps": 20, "warm_start_batch": 16, "warm_start_lr": 0.02} | SIZE


def _in_trl(recipe: Callable[[Any, Any], Recipe], config: Any) -> None:
    outputs, policy = frozenset({"log_prob", "entropy"}), nn.Identity()
    policy.register_buffer("temperature", torch.ones(()))
    host = Host("TRL", 8, 4, ("reward",), trl.GIVEN, outputs, outputs, True, config.kl_coef > 0.0)
    build_hosted(recipe, config, host, policy)


def _in_verl(recipe: Callable[[Any, Any], Recipe], config: Any) -> None:
    verl.bridge(recipe, config, max_length=8, group_size=4)


HOSTS = {"trl": _in_trl, "verl": _in_verl}


class RecipeContract(MethodContract):
    """Subclass it, name the class ``Test...``, set ``method``: a method has its contract tests without an edit here.

        class TestMine(RecipeContract):
            method = METHOD
            published = {"clip_high": 0.28, "n_prompts": 64}
            exceptions = {"test_equal_rewards_have_no_gradient": "an entropy bonus is part of the loss"}

    Every test of a recipe that promises something else is left out by name in ``exceptions``, with the reason.
    """

    model: ClassVar[str] = "tabular"
    """What the invariants are tested on: a table of logits, or tiny (a Llama, needs transformers) for a recipe that
    reads ``hidden``."""
    graded: ClassVar[bool] = True
    """Whether it takes rewards other than 0 and 1."""
    refused: ClassVar[Mapping[str, str]] = {}
    """Host (trl, verl) that has not what the recipe needs by default -> a part of the message."""
    hosted: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Host -> settings with which it does take the recipe."""
    on_policy: ClassVar[Aggregate | None] = None
    """On the policy that sampled, the gradient is REINFORCE's with the same advantages and this aggregation."""

    # -- invariants ---------------------------------------------------------------------------------------------------

    def test_padded_steps_change_nothing(self) -> None:
        agent = self.made()
        have = self.collected(agent)
        self.same(agent, have, {tag: _longer(data) for tag, data in have.items()})

    def test_padded_columns_change_nothing(self) -> None:
        agent = self.made()
        prepared = self.prepared(agent, self.collected(agent))
        for phase, batch in _batches(agent, prepared):
            wider = batch.take(torch.tensor([*range(batch.shape[1]), batch.shape[1] - 1]))
            valid = wider["valid"].clone()
            valid[:, -1] = 0.0
            wider = _with(wider, valid=valid)
            _close(_gradient(phase, wider), _gradient(phase, batch))

    def test_order_of_the_sequences_does_not_matter(self) -> None:
        agent = self.made()
        have = self.collected(agent)
        order = {tag: torch.randperm(data.shape[1], generator=Generator().manual_seed(1)) for tag, data in have.items()}
        self.same(agent, have, {tag: data.take(order[tag]) for tag, data in have.items()})

    def test_equal_rewards_have_no_gradient(self) -> None:
        for value in (0.0, 1.0):
            agent = self.made()
            have = {tag: _rewarded(data, value) for tag, data in self.collected(agent).items()}
            for gradient in self.gradients(agent, have):
                assert gradient.abs().max() <= 1e-12, f"all rewards {value}"

    def test_equal_rewards_leave_the_first_policy_alone(self) -> None:
        """Where the policy is the one that sampled and the reference, equal rewards say nothing at all: a gradient of
        1e-8 from the rounding of their mean would be a whole step of Adam's."""
        for value in (0.1, 0.3, 0.7):
            for group_size in (6, 7):
                agent = self.made(torch.float32, moved=False, **self.grouped(group_size))
                have = self.collected(agent, moved=False)
                for gradient in self.gradients(agent, {tag: _rewarded(data, value) for tag, data in have.items()}):
                    assert not gradient.any(), f"groups of {group_size} with rewards {value}: {gradient.abs().max()}"

    def test_on_policy_gradient_is_reinforce(self) -> None:
        aggregate = type(self).on_policy
        if aggregate is None:
            raise unittest.SkipTest("promises no such thing: set on_policy to the aggregation if it does")
        agent = self.made()
        prepared = self.prepared(agent, self.collected(agent, moved=False))
        phase, batch = _batches(agent, prepared)[0]
        reinforce = Term("reinforce", losses.weighted_ratio, aggregate, ratios.plain)
        expected = phase.updater.gradient((reinforce,), batch).mean.clone()
        assert expected.abs().max() > 1e-3
        _close(_gradient(phase, batch, phase.terms[:1]), expected)

    def test_finite_differences(self) -> None:
        agent = self.made()
        prepared = self.prepared(agent, self.collected(agent))
        for phase, batch in _batches(agent, prepared):
            params = list(agent.policy.parameters())
            slope = _gradient(phase, batch)
            generator = Generator().manual_seed(2)
            direction = torch.randn(slope.shape, generator=generator, dtype=slope.dtype)
            eps, values = 1e-6, list[Tensor]()
            for sign in (1.0, -1.0):
                _shift(params, sign * eps * direction)
                with torch.no_grad():
                    evaluation = agent.policy(batch, frozenset().union(*(t.want for t in phase.terms)))
                    values.append(surrogate(phase.terms, evaluation, batch)[0])
                _shift(params, -sign * eps * direction)
            measured = float((values[0] - values[1]) / (2.0 * eps))
            expected = float(slope @ direction)
            assert abs(measured - expected) <= 1e-6 * max(abs(expected), 1e-2), f"{measured} and {expected}"

    def test_micro_batches_add_up(self) -> None:
        agent = self.made()
        prepared = self.prepared(agent, self.collected(agent))
        for phase, batch in _batches(agent, prepared):
            whole = _gradient(phase, batch)
            batch.microbatch = 4
            _close(_gradient(phase, batch), whole)

    def test_only_the_live_policy_gets_gradients(self) -> None:
        agent = self.made()
        prepared = self.prepared(agent, self.collected(agent))
        for phase, batch in _batches(agent, prepared):
            _gradient(phase, batch)
        assert not any(prepared[name].requires_grad for name in prepared if isinstance(prepared[name], Tensor))
        bank = agent.ctx.bank
        assert all(p.grad is None for version in bank.names() for p in bank.policy(version).parameters())

    # -- settings and hosts -------------------------------------------------------------------------------------------

    def test_other_settings_are_other_gradients(self) -> None:
        for usual, other in self.matters:
            found = []
            for settings in (usual, other):
                agent = self.made(**settings)
                found.append(torch.cat(self.gradients(agent, self.collected(agent))))
            assert found[1].isfinite().all(), f"{other}"
            assert (found[0] - found[1]).abs().max() > 1e-6, f"{other} does what {usual} does"

    def test_inside_other_trainers(self) -> None:
        """A host takes it, or refuses it when it is built and says what is missing and what to use instead."""
        for host, build in HOSTS.items():
            if host not in self.refused or host in self.hosted:
                build(self.method.Recipe, self.method.Config(**self.hosted.get(host, {})))
            if host in self.refused:
                try:
                    build(self.method.Recipe, self.method.Config())
                except ValueError as error:
                    message = str(error)
                else:
                    raise AssertionError(f"{host} takes it: leave it out of refused")
                assert self.refused[host] in message, message
                assert INSTEAD in message

    # -- training -----------------------------------------------------------------------------------------------------

    def test_trains_and_resumes_on_a_bandit(self, tmp_path: Path) -> None:
        options = {"questions": 3} if self.graded else {"questions": 3, "fixed_length": 1, "symbols": 2}
        self.resumes("sequence_match", options, {"model": "tabular"}, tmp_path / "a.pt")

    def test_trains_and_resumes_on_arithmetic(self, tmp_path: Path) -> None:
        try:
            require("transformers", "llm")
        except ImportError as error:
            raise unittest.SkipTest(str(error)) from error
        self.resumes("arithmetic", {"operands": 1, "digits": 1, "modulus": 10}, TINY, tmp_path / "a.pt")

    def resumes(self, task: str, env_kwargs: dict[str, Any], options: dict[str, Any], path: Path) -> None:
        """Two iterations, a checkpoint, two more: as without it. Then one that nobody watches, in which statistics are
        missing that a recipe may not have asked for (``reads_stats``)."""
        settings = SMALL | dict(self.options) | options

        def make() -> Any:
            return self.method(task, seed=1, env_kwargs=env_kwargs, **settings)

        def stop(at: int) -> Callable[[Any], bool]:
            return lambda agent: agent.iteration < at

        total = 100 * make().samples_per_iteration
        whole, half = make(), make()
        start = [p.detach().clone() for p in whole.policy.parameters()]
        whole.learn(until=total, callback=stop(4))
        half.learn(until=total, callback=stop(2))
        half.save(path)
        loaded = self.method.load(path)
        loaded.learn(until=total, callback=stop(4))
        assert loaded.iteration == whole.iteration == 4
        assert any(not torch.equal(a, b) for a, b in zip(start, whole.policy.parameters())), "nothing was learned"
        _equal(loaded.state_dict(), whole.state_dict())
        loaded.learner.watched = False
        try:
            loaded.learner.iterate()
        except KeyError as error:
            raise AssertionError(f"after_update reads {error} of an update that nobody watches; set reads_stats = True "
                                 "if it is a statistic of a term") from error  # fmt: skip

    # -- the life cycle -----------------------------------------------------------------------------------------------

    def grouped(self, group_size: int) -> dict[str, Any]:
        """Settings for groups of another size; override it where one depends on it."""
        return {"group_size": group_size} if self.method.Config().group_size > 1 else {}

    def made(self, dtype: torch.dtype = torch.float64, moved: bool = True, **settings: Any) -> Any:
        """The agent on the ragged bandit, in ``dtype`` (float64 or float32); the reference, if there is one, is another
        policy, or (``moved=False``) the same."""
        own = {"model": self.model} | ({} if self.model == "tabular" else SIZE)
        agent = self.method(RaggedTask(self.graded), seed=3, **SMALL | own | dict(self.options) | settings)
        if dtype is torch.float64:  # else as it is: statistics in float64 are part of a recipe
            agent.policy.double()
            agent.estimator.double()
        if agent.estimator.wants_reference:
            noise = 0.1 * _noise(agent, 4) if moved else torch.zeros_like(_noise(agent, 4))
            _shift(list(agent.policy.parameters()), noise)
            agent.ctx.bank.refresh("ref")
            _shift(list(agent.policy.parameters()), -noise)
        return agent

    def collected(self, agent: Any, moved: bool = True) -> dict[str, Data]:
        """What the recipe asks for, in the policy's type; then (``moved``) the policy leaves the one that sampled."""
        have: dict[str, Data] = {}
        agent.ctx.prompts = agent.collector.draw(agent.config.n_prompts)
        while requests := agent.estimator.plan({}, have, agent.ctx):
            for request in requests:
                data = agent.collector.collect(request, agent.ctx.bank.policy(request.params))
                dtype = next(agent.policy.parameters()).dtype
                columns: dict[str, Any] = dict(data)
                wide = {k: v.to(dtype) if v.is_floating_point() else v.clone() for k, v in columns.items()}
                data = Data(wide, sequence=data.sequence)
                exact = evaluate_columns(agent.policy, data, frozenset({"log_prob"}))["log_prob"]
                sampled = (data["valid"] > 0) & (data["demonstration"] == 0)
                have[request.tag] = _with(data, log_prob=torch.where(sampled, exact, 0.0))
        if moved:
            _shift(list(agent.policy.parameters()), 0.2 * _noise(agent, 5))
        return have

    def prepared(self, agent: Any, have: dict[str, Data]) -> Data:
        """The recipe's columns. Its state and its random numbers are as before: preparations can be compared."""
        state, generator = copy.deepcopy(agent.estimator.state_dict()), agent.ctx.generator.get_state()
        agent.estimator.fit(have, agent.ctx)
        data: Data = agent.estimator.prepare(dict(have), agent.ctx)["on"]  # which needs no no_grad around it
        agent.estimator.load_state_dict(state)
        agent.ctx.generator.set_state(generator)
        return data

    def gradients(self, agent: Any, have: dict[str, Data]) -> list[Tensor]:
        """Of every phase on the whole rollout; zeros for a phase that is left out."""
        prepared = self.prepared(agent, have)
        return [_gradient(phase, batch) for phase, batch in _batches(agent, prepared)]

    def same(self, agent: Any, have: dict[str, Data], other: dict[str, Data]) -> None:
        """The gradients of two sets of rollouts are equal, and not zero."""
        first, second = self.gradients(agent, have), self.gradients(agent, other)
        assert any(g.abs().max() > 1e-6 for g in first), "there is nothing to compare"
        for a, b in zip(first, second):
            _close(b, a)


def _batches(agent: Any, prepared: Data) -> list[tuple[Any, Data]]:
    return [
        (phase, prepared.epoch(Batching(phase.batching.unit, "full"), None)[0]) for phase in agent.estimator.phases()
    ]


def _gradient(phase: Any, batch: Data, terms: tuple[Term, ...] | None = None) -> Tensor:
    gradient: Tensor = phase.updater.gradient(phase.terms if terms is None else terms, batch).mean.clone()
    skipped = phase.skip is not None and phase.skip(batch, None)
    return torch.zeros_like(gradient) if skipped else gradient


def _with(data: Data, **columns: Tensor) -> Data:
    """With other facts, which ``derive`` refuses to change."""
    return Data({**data, **columns}, raw=data.raw, sequence=data.sequence, scalars=data.scalars)


def _longer(data: Data) -> Data:
    """Two more steps that are neither present nor valid, full of rubbish."""
    columns: dict[str, Tensor] = {}
    for name in data:
        value = data[name]
        if name not in data.sequence:
            value = F.pad(value, (0, 0) * (value.dim() - 1) + (0, 2))
        columns[name] = value
    columns["log_prob"][-2:], columns["action"][-2:] = 1e3, 1
    return _with(data, **columns)


def _rewarded(data: Data, value: float) -> Data:
    """All sequences are rewarded alike, in the first component."""
    components = torch.zeros_like(data["reward_components"])
    components[:, 0] = value
    reward = torch.zeros_like(data["reward"])
    reward[data["length"] - 1, torch.arange(data.shape[1])] = value
    return _with(data, reward_components=components, episode_reward=components.sum(1), reward=reward)


def _noise(agent: Any, seed: int) -> Tensor:
    size = sum(p.numel() for p in agent.policy.parameters())
    noise = torch.randn(size, generator=Generator().manual_seed(seed), dtype=torch.float64)
    return noise.to(next(agent.policy.parameters()).dtype)


@torch.no_grad()
def _shift(params: list[Any], by: Tensor) -> None:
    for p, piece in zip(params, torch.split(by, [p.numel() for p in params])):
        p.add_(piece.view_as(p))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def _equal(found: Any, expected: Any, where: str = "state") -> None:
    """Bit for bit, whatever is inside."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            if key != "rng":  # the global generators: what else runs in the process moves them
                _equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for i, (a, b) in enumerate(zip(found, expected)):
            _equal(a, b, f"{where}/{i}")
    else:
        assert found == expected, f"{where}: {found!r}, expected {expected!r}"
