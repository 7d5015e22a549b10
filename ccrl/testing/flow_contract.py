"""The contract of a method on flow policies as a test class: what must hold of every one, coupled or decoupled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ccrl.data import Batching, Data
from ccrl.diffusion.flow import STOCHASTIC
from ccrl.estimators.terms import surrogate
from ccrl.settings import ConfigError
from ccrl.testing.method_contract import MethodContract

__all__ = ["FlowContract", "LineTask"]

SMALL: dict[str, Any] = {
    "n_prompts": 3, "group_size": 4, "steps": 4, "hidden": (8, 8), "eval_steps": 4, "compile": "off",
    "learning_rate": 0.01,
}  # fmt: skip


class LineTask:
    """Samples of three numbers under two conditions; the reward is high near the condition's point."""

    name = "line"
    size = 3
    conditions = 2
    components = ("reward",)

    def data(self, label: Tensor, generator: Generator | None) -> Tensor:
        noise = torch.randn(len(label), 3, generator=generator, device=label.device)
        return 0.3 * noise + label.unsqueeze(1)

    def score(self, sample: Tensor, label: Tensor) -> Tensor:
        return (-(sample - label.unsqueeze(1)).square().mean(1, keepdim=True)).exp()

    def measure(self, sample: Tensor, label: Tensor) -> dict[str, Tensor]:
        return {"gold": self.score(sample, label).squeeze(1), "distance": sample.norm(dim=1)}


class FlowContract(MethodContract):
    """Subclass it, name the class ``Test...``, set ``method``.

    Every test that a method promises something else about is left out by name in ``exceptions``, with the reason.
    """

    def made(self, double: bool = True, **settings: Any) -> Any:
        """The agent, its policy moved a little from the copies that it keeps, in float64."""
        agent = self.method(LineTask(), seed=3, **(SMALL | dict(self.options) | settings))
        agent.before_learning()
        if double:
            agent.policy.double()
            for version in agent.ctx.bank.names():
                agent.ctx.bank.policy(version).double()
        noise = Generator().manual_seed(5)
        with torch.no_grad():
            for p in agent.policy.parameters():
                p += 0.05 * torch.randn(p.shape, generator=noise, dtype=p.dtype)
        return agent

    def collected(self, agent: Any) -> dict[str, Data]:
        have: dict[str, Data] = {}
        while requests := agent.estimator.plan({}, have, agent.ctx):
            for request in requests:
                data = agent.collector.collect(request, agent.ctx.bank.policy(request.params))
                dtype = next(agent.policy.parameters()).dtype
                wide = {k: v.to(dtype) if v.is_floating_point() else v.clone() for k, v in dict(data).items()}
                have[request.tag] = Data(wide, sequence=data.sequence)
        with torch.no_grad():  # the policy leaves the one that sampled, as in a second pass
            for p in agent.policy.parameters():
                p.mul_(1.02)
        return have

    def batch(self, agent: Any, have: Mapping[str, Data]) -> tuple[Any, Data]:
        state = agent.ctx.generator.get_state()
        on = agent.estimator.prepare(dict(have), agent.ctx)["on"]
        agent.ctx.generator.set_state(state)  # the same times and noise for whoever asks next
        phase = agent.estimator.phases()[0]
        return phase, on.epoch(Batching(phase.batching.unit, "full"), None)[0]

    def gradient(self, agent: Any, have: Mapping[str, Data]) -> Tensor:
        phase, batch = self.batch(agent, have)
        found: Tensor = phase.updater.gradient(phase.terms, batch).mean.clone()
        return found

    # -- invariants ---------------------------------------------------------------------------------------------------

    def test_padded_columns_change_nothing(self) -> None:
        agent = self.made()
        phase, batch = self.batch(agent, self.collected(agent))
        whole = phase.updater.gradient(phase.terms, batch).mean.clone()
        wider = batch.take(torch.tensor([*range(batch.shape[1]), 0]))
        valid = wider["valid"].clone()
        valid[:, -1] = 0.0
        wider = Data({**wider, "valid": valid}, sequence=wider.sequence, scalars=wider.scalars)
        _close(phase.updater.gradient(phase.terms, wider).mean, whole)

    def test_micro_batches_add_up(self) -> None:
        agent = self.made()
        phase, batch = self.batch(agent, self.collected(agent))
        whole = phase.updater.gradient(phase.terms, batch).mean.clone()
        assert whole.abs().max() > 1e-6, "there is nothing to compare"
        batch.microbatch = 5
        _close(phase.updater.gradient(phase.terms, batch).mean, whole)

    def test_finite_differences(self) -> None:
        agent = self.made()
        phase, batch = self.batch(agent, self.collected(agent))
        params = list(agent.policy.parameters())
        slope = phase.updater.gradient(phase.terms, batch).mean.clone()
        direction = torch.randn(slope.shape, generator=Generator().manual_seed(2), dtype=slope.dtype)
        want, values = frozenset[str]().union(*(t.want for t in phase.terms)), list[Tensor]()
        for sign in (1.0, -2.0):
            for p, piece in zip(params, torch.split(sign * 1e-6 * direction, [p.numel() for p in params])):
                p.data += piece.view_as(p)
            with torch.no_grad():
                values.append(surrogate(phase.terms, agent.policy(batch, want), batch)[0])
        measured, expected = float((values[0] - values[1]) / 2e-6), float(slope @ direction)
        assert abs(measured - expected) <= 1e-5 * max(abs(expected), 1e-2), f"{measured} and {expected}"

    def test_equal_rewards_leave_the_first_policy_alone(self) -> None:
        agent = self.method(LineTask(), seed=3, **(SMALL | dict(self.options)))
        agent.before_learning()
        request = agent.estimator.plan({}, {}, agent.ctx)[0]
        data = agent.collector.collect(request, agent.ctx.bank.policy(request.params))
        equal = torch.full_like(data["episode_reward"], 0.3)
        have = {"on": Data({**data, "episode_reward": equal}, sequence=data.sequence)}
        assert float(self.gradient(agent, have).abs().max()) <= 1e-6

    def test_it_reads_what_it_says(self) -> None:
        """A decoupled method does without log-probabilities, means and deviations of transitions; one on states without
        rewards; a coupled one refuses a sampler without a density."""
        needs = self.method.Recipe.needs
        if needs == "log_prob":
            message = ""
            try:
                self.method(LineTask(), **(SMALL | dict(self.options) | {"sampler": "ode", "noise_level": 0.0}))
            except ConfigError as error:
                message = str(error)
            assert all(name in message for name in STOCHASTIC), "expected a sampler without a density to be refused"
            return
        agent = self.made()
        have = self.collected(agent)
        absent = {"log_prob", "old_mean", "std", "sigma", "mean_x", "mean_v", "action"} if needs == "clean" else {
            "episode_reward", "reward_components"}  # fmt: skip
        less = {k: v for k, v in have["on"].items() if k not in absent}
        _close(
            self.gradient(agent, {"on": Data(less, sequence=have["on"].sequence - absent)}), self.gradient(agent, have)
        )

    # -- settings -----------------------------------------------------------------------------------------------------

    def test_other_settings_are_other_gradients(self) -> None:
        for usual, other in self.matters:
            found = []
            for settings in (usual, other):
                agent = self.made(**settings)
                found.append(self.gradient(agent, self.collected(agent)))
            assert found[1].isfinite().all(), f"{other}"
            assert float((found[0] - found[1]).abs().max()) > 1e-9, f"{other} does what {usual} does"

    # -- training -----------------------------------------------------------------------------------------------------

    def test_trains_and_resumes(self, tmp_path: Path) -> None:
        """Two iterations, a checkpoint, two more: as without it, bit for bit, on an evaluation average too."""
        options = SMALL | dict(self.options) | {"eval_ema": 0.5, "warm_start_steps": 2, "warm_start_batch": 8}

        def make() -> Any:
            return self.method("ring2d", seed=1, **options)

        total = 100 * make().samples_per_iteration
        whole, half = make(), make()
        start = [p.detach().clone() for p in whole.policy.parameters()]
        whole.learn(until=total, callback=lambda agent: agent.iteration < 4)
        half.learn(until=total, callback=lambda agent: agent.iteration < 2)
        half.save(tmp_path / "a.pt")
        loaded = self.method.load(tmp_path / "a.pt")
        loaded.learn(until=total, callback=lambda agent: agent.iteration < 4)
        assert loaded.iteration == whole.iteration == 4
        assert any(not torch.equal(a, b) for a, b in zip(start, whole.policy.parameters())), "nothing was learned"
        for name in ("policy", "bank"):
            _equal(loaded.state_dict()["learner"][name], whole.state_dict()["learner"][name])
        assert loaded.measure(8) == whole.measure(8)
        assert loaded.evaluate(None, 4, seed=0).returns.shape == (4,)


def _equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
        return
    assert found.keys() == expected.keys()
    for key in expected:
        _equal(found[key], expected[key])


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
