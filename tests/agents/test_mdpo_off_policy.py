"""Off-policy MDPO: the exact step on a table, SAC as a special case, the reference, Tsallis, settings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from agents import SAC, OffPolicyMDPO
from ccrl.data import Data
from ccrl.estimators import q_losses
from ccrl.estimators.terms import no_ratio
from ccrl.policies import CATEGORICAL
from ccrl.testing.agent_contract import SpacesEnv
from ccrl.updaters import can_compile

F64 = torch.float64
BOX = spaces.Box(-1, 1, (2,), np.float32)
SMALL = {"num_envs": 2, "hidden": (4,), "learning_starts": 2, "batch_size": 4, "rounds": 3, "buffer_size": 50}


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    [(1.0, [0.763655, 0.186691, 0.049654]), (0.2, [0.99326236, 0.00669255, 0.00004509])],
)
def test_the_minimiser_is_the_exact_step(coefficient: float, expected: list[float]) -> None:
    """pi proportional to pi_k^(1 - lambda t) exp(t Q), t = 1 / c; with c = lambda the softmax of Q / lambda."""
    old, q = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    loss = q_losses.mirror_descent_actor(CATEGORICAL, coefficient, 0.2)  # type: ignore[arg-type]
    data = Data({"old_logits": old.log().expand(1, 3, 3), "valid": torch.ones(1, 3)})
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def step() -> Tensor:
        optimiser.zero_grad()
        log_p = logits.log_softmax(0)
        out = {"new_log_prob": log_p.unsqueeze(0), "new_action": torch.arange(3).unsqueeze(0), "new_q1": q.unsqueeze(0)}
        value = (log_p.exp() * loss(no_ratio(data["valid"]), torch.zeros(()), out, data)[0]).sum()
        value.backward()
        return value

    for _ in range(5):
        optimiser.step(step)
    assert logits.softmax(0).tolist() == pytest.approx(expected, abs=1e-5)


def actor_loss(agent: SAC | OffPolicyMDPO, batch: Data) -> Tensor:
    (term, *_) = next(p for p in agent.learner.phases() if p.name == "actor").terms
    out = agent.policy.evaluate(batch, term.want)
    return term.loss(no_ratio(batch["valid"]), torch.zeros(()), out, batch).mean()


def test_at_the_temperature_it_is_sacs_actor_loss() -> None:
    options = {"coefficient": 0.3, "entropy": 0.3, "critic": "min", "regulariser": 0.0, "state_value": False}
    mdpo = OffPolicyMDPO(SpacesEnv(BOX, BOX), **SMALL, **options)
    sac = SAC(SpacesEnv(BOX, BOX), alpha=0.3, alpha_learning_rate=None, **SMALL)
    for agent in (mdpo, sac):
        agent.policy.double()
    sac.policy.load_state_dict(mdpo.policy.state_dict() | {"log_alpha": sac.policy.log_alpha.detach()})
    columns = {k: torch.randn(1, 64, 2, dtype=F64) for k in ("obs", "action", "noise", "old_mean", "old_log_std")}
    batch = Data(columns | {"valid": torch.ones(1, 64, dtype=F64)}).with_scalars(alpha=torch.tensor(0.3, dtype=F64))
    losses = [actor_loss(agent, batch) for agent in (mdpo, sac)]
    assert abs(float((losses[0] - losses[1]).detach())) < 1e-12
    grads = [torch.autograd.grad(x, list(a.policy.actor.parameters())) for x, a in zip(losses, (mdpo, sac))]
    assert max(float((a - b).abs().max()) for a, b in zip(*grads)) < 1e-12


def test_the_reference_matters_elsewhere_and_q_is_that_of_tsallis() -> None:
    agents = [OffPolicyMDPO(SpacesEnv(BOX, BOX), tsallis=q, **SMALL) for q in (1.0, 2.0)]
    columns = {k: 0.1 * torch.randn(1, 8, 2) for k in ("obs", "action", "noise", "old_mean", "old_log_std")}
    batch = Data(columns | {"valid": torch.ones(1, 8)})
    moved = Data(columns | {"valid": torch.ones(1, 8), "old_mean": columns["old_mean"] + 1.0})
    for agent in agents:
        assert not torch.equal(actor_loss(agent, batch), actor_loss(agent, moved))
    # q = 2: c (p - 1) + 2 (lambda - c) (p_k - 1) - Q1 with p, p_k the densities
    out = agents[1].policy.evaluate(batch, frozenset({"new_log_prob", "new_action", "new_q1"}))
    old = agents[1].policy.distribution.log_prob({k: batch[f"old_{k}"] for k in ("mean", "log_std")}, out["new_action"])
    expected = (out["new_log_prob"].exp() - 1) + 2 * (0.2 - 1.0) * (old.exp() - 1) - out["new_q1"]
    torch.testing.assert_close(actor_loss(agents[1], batch), expected.mean())


def test_the_reference_is_a_copy_of_some_steps_ago() -> None:
    agent = OffPolicyMDPO(SpacesEnv(BOX, BOX), reference_every=2, **SMALL)
    start = agent.policy.actor.net[-1].bias.detach().clone()
    agent.learner.rounds = 1
    agent.learn(2)
    old = agent.ctx.bank.policy("old")
    assert torch.equal(old.actor.net[-1].bias, start)
    agent.learn(2)
    assert torch.equal(old.actor.net[-1].bias, agent.policy.actor.net[-1].bias)
    assert not torch.equal(old.actor.net[-1].bias, start)


def test_an_index_outside_one_to_two_is_refused() -> None:
    with pytest.raises(ValueError, match="tsallis"):
        OffPolicyMDPO(SpacesEnv(BOX, BOX), tsallis=2.5, **SMALL)


def test_compiled_steps_are_the_eager_ones() -> None:
    """Every compiled step lacked a column once: it is read from a batch to which others were added."""
    if not can_compile()[0]:
        pytest.skip("no C++ compiler")

    def train(compile: str) -> OffPolicyMDPO:
        small = {"hidden": (8,), "learning_starts": 5, "batch_size": 8, "rounds": 20, "buffer_size": 100}
        return OffPolicyMDPO("Pendulum-v1", compile=compile, **small).learn(20)

    eager, compiled = train("off"), train("on")
    assert compiled.learner.cycle.compiled
    for name, value in eager.policy.state_dict().items():
        torch.testing.assert_close(compiled.policy.state_dict()[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_critics_without_hidden_layers_have_such_a_state_value() -> None:
    agent = OffPolicyMDPO(SpacesEnv(BOX, BOX), **SMALL, critic_hidden=(), compile="off")
    assert sum(p.numel() for p in agent.policy.value.parameters()) == 3  # two weights and a bias
