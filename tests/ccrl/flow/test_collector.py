"""Rollouts of denoising steps: rows, columns, requests, guidance, state."""

import pytest
import torch

import envs  # noqa: F401  (registers its tasks)
from ccrl.collect import Request
from ccrl.diffusion import STOCHASTIC, VelocityMLP, flow_grid, make_schedule
from ccrl.flow import Conditions, FlowCollector, Sampling, resolve_flow_task
from ccrl.policies.flow import FlowPolicy


def made(solver="flow_sde", noise=0.7, steps=5, **rows):
    torch.manual_seed(0)
    task = resolve_flow_task("ring2d")
    policy = FlowPolicy(VelocityMLP(2, 4, (8, 8)))
    return FlowCollector(task, Sampling(make_schedule(flow_grid(steps), solver, noise), **rows), seed=1), policy


REQUEST = Request(counts=torch.tensor([3, 2]))


@pytest.mark.parametrize(("solver", "noise"), [(s, 0.5) for s in STOCHASTIC] + [("ode", 0.0), ("dpm2", 0.0)])
def test_the_policy_scores_what_the_sampler_did(solver, noise):
    """Sampler and policy share one mean: at unchanged parameters means and log-probabilities come back exactly."""
    collector, policy = made(solver, noise)
    data = collector.collect(REQUEST, policy)
    assert data.shape == (5, 5)
    with torch.no_grad():
        found = policy(data, frozenset({"mean", "log_prob", "velocity"}))
    torch.testing.assert_close(found["mean"], data["old_mean"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["log_prob"], data["log_prob"], rtol=0, atol=1e-4)
    torch.testing.assert_close(data["obs"][1:], data["action"][:-1], rtol=0, atol=0)
    assert torch.equal(data["clean"], data["action"][-1])
    if noise == 0.0:
        torch.testing.assert_close(data["action"], data["old_mean"], rtol=0, atol=0)
        assert not data["log_prob"].any()


def test_noise_has_the_deviation_of_the_transition():
    collector, policy = made(steps=4)
    data = collector.collect(Request(counts=torch.tensor([4000])), policy)
    spread = (data["action"] - data["old_mean"]).std((1, 2))
    torch.testing.assert_close(spread, data["std"][:, 0], rtol=0.05, atol=0.0)


def test_columns_and_rewards():
    collector, policy = made()
    data = collector.collect(REQUEST, policy)
    assert data["group"].tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(data["condition"].argmax(1), data["label"])
    torch.testing.assert_close(data["episode_reward"], collector.task.reward(data["clean"], data["label"]))
    assert torch.equal(data["reward"][-1], data["episode_reward"])
    assert not data["reward"][:-1].any()
    torch.testing.assert_close(data["time"][:, 0], 1.0 - 0.2 * torch.arange(5.0))
    torch.testing.assert_close(data["dt"], torch.full((5, 5), -0.2))
    assert collector.clock == 5


def test_some_steps_are_trained():
    collector, policy = made(first=1, last=3)
    data = collector.collect(REQUEST, policy)
    assert data.shape == (2, 5)
    torch.testing.assert_close(data["time"][:, 0], torch.tensor([0.8, 0.6]))
    assert not torch.equal(data["clean"], data["action"][-1])
    for first, last in ((3, 3), (0, 6), (-1, 2)):
        with pytest.raises(ValueError, match="Sampling"):
            Sampling(make_schedule(flow_grid(5), "ode"), first, last)


def test_every_condition_comes_before_one_comes_again():
    collector, _ = made()
    labels = torch.cat([collector.draw(3).label for _ in range(4)])
    for part in labels.split(4):
        assert sorted(part.tolist()) == [0, 1, 2, 3]


def test_state_and_seeds():
    collector, policy = made()
    collector.collect(REQUEST, policy)
    state = collector.state_dict()
    first = {k: v.clone() for k, v in collector.collect(REQUEST, policy).items()}
    other, _ = made()
    other.load_state_dict(state)
    second = other.collect(REQUEST, policy)
    assert all(torch.equal(first[k], second[k]) for k in first)
    label = torch.tensor([0, 1])
    assert torch.equal(collector.samples(policy, label, 3), other.samples(policy, label, 3))


def test_guidance_extrapolates():
    torch.manual_seed(0)
    policy = FlowPolicy(VelocityMLP(2, 3, (8,)), guidance=2.5)
    x, time, condition = torch.randn(4, 2), torch.rand(4), torch.eye(3)[[0, 1, 2, 0]]
    free, held = policy.net(x, time, torch.zeros(4, 3)), policy.net(x, time, condition)
    torch.testing.assert_close(policy.velocity(x, time, condition), free + 2.5 * (held - free))
    torch.testing.assert_close(policy.velocity(x, time, condition, guidance=1.0), held)


def test_bad_requests_are_refused():
    collector, policy = made()
    for request in (Request(steps=4), Request(counts=torch.tensor([1]), demonstrations=True)):
        with pytest.raises(ValueError, match="counts"):
            collector.collect(request, policy)
    with pytest.raises(ValueError, match="at least one sample"):
        collector.collect(Request(counts=torch.tensor([0, 0])), policy)
    with pytest.raises(ValueError, match="one per condition"):
        collector.collect(Request(counts=torch.tensor([1]), prompts=Conditions(torch.tensor([0, 1]))), policy)
    with torch.no_grad():
        policy.net.rest[-1].bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        collector.collect(REQUEST, policy)
