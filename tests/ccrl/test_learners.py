"""Learners: state that registers itself, the clock and its window, rollouts that lag, cycles and what they move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.ppo import PPO
from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.base import Context, Phase
from ccrl.estimators.terms import Term
from ccrl.experiment.callbacks import Callback
from ccrl.learn import Cycle, DatasetLearner, Polyak, RolloutLearner, StateRegistry
from ccrl.learn.cycle import Means, run_cycles
from ccrl.replay import ReplayBuffer
from ccrl.updaters import FlatUpdater, ModuleUpdater

SMALL: dict[str, Any] = {"num_envs": 2, "n_steps": 8, "batch_size": 8, "n_epochs": 1, "hidden": (4,), "compile": "off"}


# -- state ------------------------------------------------------------------------------------------------------------


def test_the_registry_saves_modules_generators_and_tensors_in_place() -> None:
    registry, module, generator, number = StateRegistry(), nn.Linear(1, 1), torch.Generator(), torch.zeros(())
    for name, item in (("module", module), ("generator", generator), ("number", number)):
        registry.register(name, item)
    state, expected = registry.state_dict(), torch.rand(2, generator=generator)
    with torch.no_grad():
        module.weight.add_(1.0)
    number.fill_(3.0)
    registry.load_state_dict(state)
    assert float(number) == 0.0
    assert torch.equal(module.weight, state["module"]["weight"])
    assert torch.equal(torch.rand(2, generator=generator), expected)


def test_names_twice_and_things_without_state_are_refused() -> None:
    registry = StateRegistry()
    registry.register("ring", torch.zeros(1))
    with pytest.raises(ValueError, match="'ring' twice"):
        registry.register("ring", torch.zeros(1))
    with pytest.raises(TypeError, match="expected a generator, a tensor or an object with state_dict"):
        registry.register("list", [1])  # type: ignore[arg-type]


def test_missing_and_unknown_names_are_refused() -> None:
    """A checkpoint without them would leave the agent half restored."""
    registry = StateRegistry()
    registry.register("ring", torch.zeros(1))
    with pytest.raises(ValueError, match=r"missing: \['ring'\], unknown: \['rings'\]"):
        registry.load_state_dict({"rings": torch.zeros(1)})


# -- the clock --------------------------------------------------------------------------------------------------------


def rates(agent: PPO, **how: int) -> list[float]:
    seen: list[float] = []
    agent.learn(callback=lambda a: seen.append(float(a.scalars["train/learning_rate"])), **how)
    return seen


def test_schedules_run_over_the_training_that_learn_asked_for() -> None:
    """100 steps of 16 are 7 iterations, and the rate stays above 0 in the last: 1 - 96 / 100."""
    agent = PPO("CartPole-v1", learning_rate=1.0, anneal_lr=True, **SMALL)
    assert rates(agent, until=100) == pytest.approx([1 - 16 * k / 100 for k in range(7)])
    # so many more: from the clock's 112 to 144, and the schedule runs anew
    assert rates(agent, total_timesteps=32) == pytest.approx([1.0, 0.5])
    # up to an absolute clock: the schedule runs from 0, of which 144 of 160 are done
    assert rates(agent, until=160) == pytest.approx([0.1])
    assert rates(agent, until=160) == []


def test_a_loaded_agent_goes_on_with_its_schedule(tmp_path: Path) -> None:
    agent = PPO("CartPole-v1", learning_rate=1.0, anneal_lr=True, **SMALL)
    agent.learn(48)
    agent.learn(64, callback=lambda a: a.save(tmp_path / "a.pt") if a.num_timesteps == 80 else None)
    loaded = PPO.load(tmp_path / "a.pt")
    assert rates(loaded, until=112) == pytest.approx([0.5, 0.25])


# -- rollouts ---------------------------------------------------------------------------------------------------------


def test_rollouts_lag_so_many_iterations() -> None:
    """With lag 2 the rollout of iteration k is by the policy after k - 2 updates (at the start: by the first)."""
    agent = PPO("CartPole-v1", collection_lag=2, **SMALL)
    before: list[Tensor] = []
    acted: list[Tensor] = []
    collect = agent.collector.collect

    def watched(request: Any, policy: nn.Module) -> Data:
        before.append(agent.updaters["policy"].flat.clone())
        acted.append(torch.cat([p.detach().reshape(-1).clone() for p in policy.parameters()]))
        return collect(request, policy)

    agent.collector.collect = watched
    agent.learn(6 * 16)
    assert not torch.equal(before[0], before[-1])
    for k, found in enumerate(acted):
        assert torch.equal(found, before[max(0, k - 2)]), k


def test_a_lagging_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    agent = PPO("CartPole-v1", collection_lag=2, **SMALL)
    agent.learn(until=96, callback=lambda a: a.save(tmp_path / "a.pt") if a.iteration == 3 else None)
    loaded = PPO.load(tmp_path / "a.pt").learn(until=96)
    assert torch.equal(loaded.updaters["policy"].flat, agent.updaters["policy"].flat)


def test_a_module_updater_serves_an_agent_under_any_name() -> None:
    class Mine(PPO):
        def build(self) -> Any:
            learner = super().build()
            updater = ModuleUpdater(learner.policy, lambda params: torch.optim.SGD(params, lr=0.1))
            (phase,) = learner.estimator.phases()
            learner.estimator._phases = (Phase(phase.name, phase.terms, phase.batching, updater),)
            return self.rollouts(learner.policy, learner.estimator, {"everything": updater})

    agent = Mine("CartPole-v1", **SMALL)
    before = [p.detach().clone() for p in agent.policy.parameters()]
    agent.learn(32)
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters()))
    assert float(agent.scalars["train/learning_rate"]) == 0.1


def test_a_policy_of_ones_own_acts_and_is_asked_for_when_loading(tmp_path: Path) -> None:
    from ccrl.policies import MLPPolicy

    class Wide(MLPPolicy):
        """The suite's, under another name."""

    agent = PPO("CartPole-v1", policy=Wide, **SMALL)
    assert type(agent.policy) is Wide
    agent.learn(16)
    agent.save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a policy of its own, .*Wide; pass policy="):
        PPO.load(tmp_path / "a.pt")
    assert type(PPO.load(tmp_path / "a.pt", policy=Wide).policy) is Wide


def test_micro_batches_are_updated_eagerly() -> None:
    """A compiled update takes whole batches: a long run would raise at its first compiled one."""
    from agents import Grouped

    options: dict[str, Any] = {"n_groups": 2, "group_size": 2, "n_steps": 8, "hidden": (4,), "microbatch": 2}
    agent = Grouped("CartPole-v1", Grouped.Config(**options))
    agent.learn(10**7, callback=lambda a: False)
    assert not agent.updaters["policy"].compile
    with pytest.raises(ValueError, match="compile='on': a compiled update takes whole batches"):
        Grouped("CartPole-v1", Grouped.Config(**options, compile="on"))


def test_unknown_settings_name_near_ones() -> None:
    with pytest.raises(TypeError, match=r"ppo has no setting 'learning_rat'; did you mean \['learning_rate'"):
        PPO("CartPole-v1", learning_rat=1e-3)


# -- cycles -----------------------------------------------------------------------------------------------------------


class Scalar(nn.Module):
    """One number, ``value``: whatever is asked for is that number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def outputs(self) -> frozenset[str]:
        return frozenset({"a", "b"})

    def forward(self, batch: Data, want: frozenset[str]) -> dict[str, Tensor]:
        return {name: getattr(self, name).expand(batch.shape) for name in want}


class Towards(Cycle):
    """``a`` moves by 1 towards a target at every gradient step, ``b`` at every second one."""

    def __init__(self, module: Scalar, updaters: dict[str, Any]) -> None:
        super().__init__()
        self.averages = (Polyak("target", tau=0.5, prefixes=("a",)), Polyak("copy", tau=1.0, every=3))
        self.seen: list[float] = []

        def term(name: str) -> Term:
            # gradient -1 on the parameter: SGD of step 1 adds 1
            return Term(name, lambda ratio, adv, out, batch: -out[name], aggregates.mean, want=frozenset({name}),
                        advantage=None)  # fmt: skip

        full = Batching(size="full")
        self._phases = (
            Phase("first", (term("a"),), full, updaters["a"]),
            Phase("second", (term("b"),), full, updaters["b"], every=2),
        )

    def targets(self, draw: Data, ctx: Context) -> Data:
        self.seen.append(float(ctx.bank.policy("target").a))  # type: ignore[arg-type]
        assert not torch.is_grad_enabled()
        return draw.derive(y=draw["reward"])

    def phases(self) -> tuple[Phase, ...]:
        return self._phases


def ring() -> ReplayBuffer:
    rows = {"obs": torch.zeros(3, 1), "action": torch.zeros(3, 1), "reward": torch.ones(3),
            "next_obs": torch.zeros(3, 1), "terminated": torch.zeros(3, dtype=torch.bool)}  # fmt: skip
    return ReplayBuffer.from_arrays(rows)


def dataset_learner() -> DatasetLearner:
    module = Scalar()
    updaters = {k: ModuleUpdater(module, lambda p: torch.optim.SGD(p, lr=1.0), prefixes=[k]) for k in ("a", "b")}
    return DatasetLearner(ring(), module, Towards(module, updaters), updaters, batch_size=2, updates=4)


def test_a_cycle_is_targets_then_phases_then_averages() -> None:
    learner = dataset_learner()
    learner.begin(0, 4)
    stats = learner.iterate()
    # a: 1, 2, 3, 4. The average before each step: 0, then halves of the way: .5, 1.25, 2.125
    assert float(learner.policy.a) == 4.0
    assert learner.cycle.seen == [0.0, 0.5, 1.25, 2.125]
    # b at steps 2 and 4; the copy after step 3 has a = 3 and b = 1
    assert float(learner.policy.b) == 2.0
    copy = learner.ctx.bank.policy("copy")
    assert (float(copy.a), float(copy.b)) == (3.0, 1.0)
    assert float(learner.ctx.bank.policy("target").b) == 0.0, "an average moves the parameters it names"
    assert learner.n_updates == 6
    assert float(stats["a"]) == pytest.approx(-1.5)  # the loss is minus a before the step: -(0 + 1 + 2 + 3) / 4
    assert float(stats["b"]) == pytest.approx(-0.5)  # of the two steps that it has: -(0 + 1) / 2


def test_the_pattern_of_a_cycle_survives_a_checkpoint() -> None:
    learner, other = dataset_learner(), dataset_learner()
    run_cycles(learner.cycle, learner.source, learner.batch, 3, learner.ctx, Means())
    other.state.load_state_dict(learner.state.state_dict())
    for each in (learner, other):
        run_cycles(each.cycle, each.source, each.batch, 1, each.ctx, Means())
    assert float(other.policy.b) == float(learner.policy.b) == 2.0


def test_the_clock_of_a_data_set_counts_updates_and_training_ends() -> None:
    class Offline(Agent):
        name, Config = "offline", PPO.Config

        def connect(self, env: Any) -> None:
            self.collector = None

        def build(self) -> Any:
            return dataset_learner()

    agent = Offline(None)
    agent.learn(10)
    assert agent.num_timesteps == 12, "whole iterations of 4 updates"
    assert agent.learner.clock_unit == "updates"
    agent.learn(until=12)
    assert agent.num_timesteps == 12


@pytest.mark.parametrize(("options", "message"), [({"tau": 0.0}, "tau in"), ({"every": 0}, "every >= 1")])
def test_wrong_averages_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Polyak(**options)


def test_a_negative_lag_is_refused_and_one_with_a_direction() -> None:
    with pytest.raises(ValueError, match="collection_lag"):
        PPO("CartPole-v1", collection_lag=-1, **SMALL)
    policy = nn.Linear(1, 1)
    updaters = {"policy": FlatUpdater(policy, lr=1.0)}
    with pytest.raises(ValueError, match="lag: expected >= 0, and 0 with a direction"):
        RolloutLearner(None, policy, None, updaters, samples=1, columns=1, direction=object(), lag=1)  # type: ignore[arg-type]


def test_losses_that_are_not_finite_stop_training_even_with_a_finite_gradient() -> None:
    """A NaN that reaches the statistic alone: the parameters would go on as if nothing had happened."""
    agent = PPO("CartPole-v1", **SMALL)
    (phase,) = agent.estimator.phases()

    def loss(ratio: Any, advantage: Tensor, out: Any, batch: Data) -> Tensor:
        return torch.full_like(batch["reward"], torch.nan)

    odd = Term("odd_loss", loss, aggregates.mean, advantage=None, coef=0.0)
    agent.estimator._phases = (Phase("policy", (*phase.terms, odd), phase.batching, phase.updater),)
    with pytest.raises(FloatingPointError, match="odd_loss is not finite"):
        agent.learn(16)
    with pytest.raises(RuntimeError, match="in the middle of iteration 1"):
        agent.learn(16)


def test_a_step_that_overflows_stops_training() -> None:
    """Only parameters show it: loss and gradient of the last step are finite."""
    agent = PPO("CartPole-v1", **SMALL)
    updater = agent.updaters["policy"]
    run = updater.run

    def overflowing(*arguments: Any) -> Any:
        stats = run(*arguments)
        updater.flat[0] = torch.inf
        return stats

    updater.run = overflowing
    with pytest.raises(FloatingPointError, match="a parameter of the policy is not finite"):
        agent.learn(16)
    assert not agent.healthy


def test_a_failing_callback_takes_nobodys_turn() -> None:
    calls: list[str] = []

    def fail(agent: Any) -> None:
        raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        PPO("CartPole-v1", **SMALL).learn(64, [fail, lambda a: calls.append("second")])
    assert calls == ["second"]


def test_statistics_of_an_update_are_taken_where_somebody_reads_them() -> None:
    """Of five iterations the first, every second (logged) and the last; the logged numbers
    and the parameters are those of a run that is read after every iteration, and no stale number stands in between."""

    class Every(Callback):
        def __init__(self, every: int) -> None:
            self.every, self.seen = every, list[dict[str, Any]]()

        def reads(self, iteration: int) -> bool:
            return iteration % self.every == 0

        def on_iteration(self, agent: Any) -> None:
            self.seen.append({k: float(v) for k, v in agent.scalars.items() if k.startswith("train/")})

    runs = []
    for every in (1, 2):
        agent, watch, taken = PPO("CartPole-v1", **SMALL), Every(every), list[int]()
        updater = agent.updaters["policy"]

        def measure(*of: Any, agent: PPO = agent, taken: list[int] = taken, of_updater: Any = updater.measure) -> Any:
            taken.append(agent.iteration + 1)
            return of_updater(*of)

        updater.measure = measure
        agent.learn(5 * agent.samples_per_iteration, [watch])
        runs.append((taken, watch.seen, [p.detach() for p in agent.policy.parameters()]))
    (taken, whole, parameters), (fewer, some, same) = runs
    assert (taken, fewer) == ([1, 2, 3, 4, 5], [1, 2, 4, 5])
    assert [row == full for row, full in zip(some, whole)] == [True, True, False, True, True]
    assert whole[2].keys() - some[2].keys() == {"train/approx_kl", "train/clip_fraction"}
    assert all(torch.equal(a, b) for a, b in zip(parameters, same))


def test_an_estimator_may_ask_for_random_actions() -> None:
    agent = PPO("CartPole-v1", **SMALL)
    agent.estimator.plan = lambda points, have, ctx: [] if have else [Request(steps=2, params="random")]
    found = agent.learner.collect({})["on"]  # type: ignore[attr-defined]
    assert "log_prob" not in found
    assert found.shape == (2, 2)


def test_steps_in_which_no_phase_is_due_count_for_nothing() -> None:
    means = Means()
    for row in ({}, {"loss": torch.tensor(2.0)}, {}, {"loss": torch.tensor(4.0)}):
        means.add(row)
    assert float(means.read()["loss"]) == 3.0
