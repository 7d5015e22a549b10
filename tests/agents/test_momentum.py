"""N-PG-IGT and HARPG: expectations over all trajectories, numbers by hand, limits, bounds and lemmas."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents.harpg import HARPGConfig, HARPGEstimator
from agents.npg_igt import NPGIGTConfig, NPGIGTEstimator, theory_constants
from ccrl.data import Data
from ccrl.estimators.rollouts import concatenate
from ccrl.estimators.scores import Scores
from ccrl.estimators.trajectory import TrajectoryEstimator
from ccrl.policies import GibbsPolicy, OneHot
from ccrl.updaters import GradientEstimate
from envs.classic import TabularMDP

F64 = torch.float64


def vector(*numbers):
    return torch.tensor(numbers, dtype=F64)


def close(got, expected, atol=5e-7):
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)


# -- a small MDP ------------------------------------------------------------------------------------------------------
# Vectors below list logits by state; the policy's parameters are [action, state]. ``swap`` goes both ways.

P = [[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]]
R = [[1.0, 0.0], [-0.5, 2.0]]
GAMMA, H = 0.9, 3


def swap(x):
    return x.reshape(2, 2).T.flatten()


THETA, V = swap(vector(0.3, -0.2, 0.1, 0.5)), swap(vector(1, -0.5, 0.25, 2))


def two_states(horizon=H):
    return TabularMDP(transition=P, reward=R, start=[1, 0], gamma=GAMMA, horizon=horizon)


@pytest.fixture
def env():
    return two_states()


def tabular(env, n=2):
    return GibbsPolicy(env.single_observation_space, env.single_action_space, features=OneHot(n)).double()


def rollouts(states, actions):
    """``[3, N]`` data from lists of trajectories."""
    s, a = torch.tensor(states).T, torch.tensor(actions).T
    reward = torch.tensor(R, dtype=F64)[s, a]
    t = torch.arange(H).unsqueeze(-1).expand_as(s)
    carry = (t < H - 1).double()
    columns = {"obs": s.double().unsqueeze(-1), "action": a, "reward": reward, "t": t, "carry": carry}
    return Data(columns | {"valid": torch.ones_like(reward)})


def all_trajectories(policy, theta):
    """All ``4^3`` trajectories from state 0 and their probabilities at ``theta``."""
    paths = [
        (s, a) for s in itertools.product((0, 1), repeat=H) for a in itertools.product((0, 1), repeat=H) if s[0] == 0
    ]
    data = rollouts([list(s) for s, _ in paths], [list(a) for _, a in paths])
    p = Scores(policy, theta, data, "trajectory").log_prob(theta).exp()
    moves = torch.tensor([math.prod(P[s[i]][a[i]][s[i + 1]] for i in range(H - 1)) for s, a in paths], dtype=F64)
    return data, p * moves


def estimator(**options):
    return TrajectoryEstimator(**({"episodes": 1, "horizon": H, "gamma": GAMMA} | options))


def per_path(data, fn):
    """``fn`` of every trajectory alone, ``[N, n]``."""
    weighed = estimator().weigh(data)
    return torch.stack([fn(weighed.take(torch.tensor([i]))) for i in range(data.shape[1])])


def context(policy):
    return SimpleNamespace(scores=lambda theta, data, level: Scores(policy, theta, data, level))


def test_expectations_over_all_trajectories(env):
    policy = tabular(env)
    data, p = all_trajectories(policy, THETA)
    assert p.sum().item() == pytest.approx(1.0)
    ctx = context(policy)
    g = per_path(data, lambda d: estimator().gradient(THETA, d, ctx).mean)
    hv = per_path(data, lambda d: Scores(policy, THETA, d, "trajectory").hvp(d["psi"], V))
    close(swap(p @ g), vector(0.4120, -0.4120, -0.4335, 0.4335), atol=5e-5)
    close(swap(p @ hv), vector(-0.1882, 0.1882, 0.3307, -0.3307), atol=5e-5)
    close(p @ g, env.exact_gradient(policy, THETA), atol=1e-12)
    close(p @ hv, env.exact_hvp(policy, THETA, V), atol=1e-12)
    returns = per_path(data, lambda d: d["psi"][0])
    close((p @ returns)[0], vector(1.965851)[0])


def test_one_trajectory(env):
    policy = tabular(env)
    data = estimator().weigh(rollouts([[0, 1, 0]], [[1, 0, 1]]))
    step, path = Scores(policy, THETA, data), Scores(policy, THETA, data, "trajectory")
    phi = lambda theta: (data["psi"] * step.log_prob(theta)).sum()  # noqa: E731
    close(phi(THETA), vector(0.849192)[0])
    close(swap(estimator().gradient(THETA, data, context(policy)).mean), vector(0.2801, -0.2801, -0.2694, 0.2694), 5e-5)
    curvature = torch.func.jvp(torch.func.grad(phi), (THETA,), (V,))[1]
    close(swap(curvature), vector(0.1586, -0.1586, -0.1892, 0.1892), 5e-5)
    close(path.jvp(V)[0], vector(-2.915081)[0])
    close(swap(path.hvp(data["psi"], V)), vector(-0.6579, 0.6579, 0.5961, -0.5961), 5e-5)


def test_the_sign_of_the_second_term(env):
    """With a minus the expectation is another vector; ours (the test of expectations) is the Hessian's."""
    policy = tabular(env)
    data, p = all_trajectories(policy, THETA)

    def wrong(d):
        step = Scores(policy, THETA, d)
        phi = lambda theta: (d["psi"] * step.log_prob(theta)).sum()  # noqa: E731
        curvature = torch.func.jvp(torch.func.grad(phi), (THETA,), (V,))[1]
        return curvature - torch.func.grad(phi)(THETA) * Scores(policy, THETA, d, "trajectory").jvp(V)

    expectation = p @ per_path(data, wrong)
    close(swap(expectation), vector(-1.8562, 1.8562, 0.5338, -0.5338), 5e-5)
    assert (expectation - env.exact_hvp(policy, THETA, V)).norm() > 1.0


def test_the_line_integral_of_the_hessian(env):
    """Averaged over the line, the Hessian times the move is the difference of gradients; the quadrature is
    Gauss-Legendre with 8 points."""
    policy, delta = tabular(env), 0.3 * V
    expected = env.exact_gradient(policy, THETA + delta) - env.exact_gradient(policy, THETA)
    close(swap(expected), vector(-0.0690, 0.0690, 0.1089, -0.1089), 5e-5)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    total = torch.zeros(4, dtype=F64)
    for node, weight in zip(nodes, weights):
        point = THETA + (node + 1) / 2 * delta
        data, p = all_trajectories(policy, point)
        product = lambda d, at=point: Scores(policy, at, d, "trajectory").hvp(d["psi"], delta)  # noqa: E731
        total += weight / 2 * (p @ per_path(data, product))
    close(total, expected, 1e-9)


# -- a quadratic with exact gradients ---------------------------------------------------------------------------------

A, B = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64), vector(1, -1)


class Quadratic:
    """Exact Hessian products in place of those of trajectories."""

    def hvp(self, weight, v):
        return -A @ v


def run_quadratic(direction, steps):
    """Iterates ``x``, directions ``d`` and sample points of ``J = -x^T A x / 2 + b^T x`` from (3, -2)."""
    x, xs, ds, points = vector(3, -2), [], [], []
    ctx = SimpleNamespace(
        k=torch.zeros((), dtype=F64), generator=torch.Generator().manual_seed(0), scores=lambda *_: Quadratic()
    )
    line = Data({"psi": torch.zeros(1, 1), "valid": torch.ones(1, 1)})
    for _ in range(steps):
        at = direction.points(x, ctx)
        xs.append(x.clone())
        x = direction.step(x, lambda tag: GradientEstimate(B - A @ at[tag]), {"line": line}, ctx)  # noqa: B023
        ds.append(direction.d.clone())
        points.append(at["on"])
        ctx.k += 1
    return xs, ds, points


def direction_on_quadratic(cls, config, **options):
    return cls(config(learning_rate=0.5, **options), vector(3, -2))


def errors(xs, ds):
    return [(d - (B - A @ x)).norm().item() for x, d in zip(xs, ds)]


def test_transport_is_exact_on_a_quadratic():
    xs, ds, points = run_quadratic(direction_on_quadratic(NPGIGTEstimator, NPGIGTConfig), 7)
    assert max(errors(xs, ds)) < 1e-14
    for t, expected in enumerate([(2.31376, -2.08578), (1.92467, -2.09897), (1.65086, -2.08377)], start=1):
        close(points[t], vector(*expected), 5e-6)
    close(xs[6], vector(1.418046, -2.011447))


@pytest.mark.parametrize("variant", ["harpg", "nharpg"])
def test_harpg_with_exact_hessians(variant):
    xs, ds, _ = run_quadratic(direction_on_quadratic(HARPGEstimator, HARPGConfig, variant=variant), 6)
    assert max(errors(xs, ds)) < 1e-14


def test_what_others_leave():
    """Plain momentum, and the look-ahead with the previous eta of the released code, do not keep the gradient."""
    xs, ds, _ = run_quadratic(direction_on_quadratic(NPGIGTEstimator, NPGIGTConfig, variant="nmpg"), 6)
    assert errors(xs, ds)[1:] == pytest.approx([0.253, 0.355, 0.401, 0.421, 0.427], abs=5e-4)
    xs, ds, _ = run_quadratic(direction_on_quadratic(NPGIGTEstimator, NPGIGTConfig, lookahead_eta="previous"), 7)
    assert errors(xs, ds)[1:6] == pytest.approx([0.296, 0.271, 0.226, 0.187, 0.157], abs=5e-4)
    close(xs[6], vector(1.416473, -2.041851))


def test_schedules():
    """Section 3: t = 1, 2, 3."""
    direction = NPGIGTEstimator(NPGIGTConfig(learning_rate=1.0), torch.zeros(1))
    k = [torch.tensor(float(t), dtype=F64) for t in (1, 2, 3)]
    assert [direction.step_size(t).item() for t in k] == pytest.approx([0.666667, 0.5, 0.4], abs=5e-7)
    assert [direction.eta(t).item() for t in k] == pytest.approx([0.722981, 0.574349, 0.480450], abs=5e-7)
    assert NPGIGTEstimator(NPGIGTConfig(momentum=0.3), torch.zeros(1)).eta(torch.zeros(())).item() == 1.0


def test_a_fixed_trajectory_hides_the_second_term(env):
    policy = tabular(env)
    data = estimator().weigh(rollouts([[0, 1, 0]], [[1, 0, 1]]))
    g = lambda theta: estimator().gradient(theta, data, context(policy)).mean  # noqa: E731
    difference = (g(THETA + 1e-5 * V) - g(THETA - 1e-5 * V)) / 2e-5
    close(swap(difference), vector(0.1586, -0.1586, -0.1892, 0.1892), 5e-5)
    product = Scores(policy, THETA, data, "trajectory").hvp(data["psi"], V)
    assert (difference - product).norm() > 1.0


def test_theory_constants():
    c = theory_constants(M_g=1, M_h=0.5, r_max=1, gamma=0.9, H=46)
    got = [c.L_g, c.sigma_g2, c.sigma_h2, c.D_g, c.D_h, c.truncation, c.npg_igt_step(0.1), c.harpg_step(0.1)]
    assert got == pytest.approx([150, 1000, 21162500, 74.833147, 840, 0.00785517, 30, 2.711228e-4], rel=5e-7)
    assert pytest.approx(0.2581989, abs=5e-8) == 2**0.5 / (3**0.5 * 1000**0.5 * 0.1)
    with pytest.raises(ValueError, match="gamma: "):
        theory_constants(M_g=1, M_h=0.5, r_max=1, gamma=1.0, H=46)
    loose = theory_constants(M_g=1e-3, M_h=1e-6, r_max=1, gamma=0.9, H=400)
    assert loose.harpg_step(1e3) == pytest.approx(2**0.5 * 1e-3 / (3**0.5 * loose.sigma_g2**0.5 * 1e3))


def test_bounds(env):
    policy, endless = tabular(env), two_states(None)
    M_g, M_h, r_max = 2**0.5, 0.5, 2.0
    data, p = all_trajectories(policy, THETA)
    g = per_path(data, lambda d: estimator().gradient(THETA, d, context(policy)).mean)
    variance = (p * (g - p @ g).square().sum(1)).sum().item()
    assert variance == pytest.approx(3.103986, abs=5e-7)
    identity = torch.eye(4, dtype=F64)
    for horizon, gradient_error, hessian_error in ((3, 2.652280, 1.296316), (20, 0.441980, None), (50, 0.018736, None)):
        short, c = two_states(horizon), theory_constants(M_g=M_g, M_h=M_h, r_max=r_max, gamma=GAMMA, H=horizon)
        error = (short.exact_gradient(policy, THETA) - endless.exact_gradient(policy, THETA)).norm().item()
        assert error == pytest.approx(gradient_error, abs=5e-7)
        assert error <= c.D_g * c.truncation
        h = torch.stack([short.exact_hvp(policy, THETA, e) - endless.exact_hvp(policy, THETA, e) for e in identity])
        norm = torch.linalg.matrix_norm(h, 2).item()
        assert norm <= c.D_h * c.truncation
        if hessian_error is not None:
            assert norm == pytest.approx(hessian_error, abs=5e-6)
            assert variance <= c.sigma_g2 == pytest.approx(8000)
            assert c.L_g == pytest.approx(500)
            assert (c.D_g * c.truncation, c.D_h * c.truncation) == pytest.approx((74.3437, 473.85), rel=1e-5)
    bounds = [theory_constants(M_g=M_g, M_h=M_h, r_max=r_max, gamma=GAMMA, H=h) for h in (20, 50)]
    assert [b.D_g * b.truncation for b in bounds] == pytest.approx([18.8346, 1.1291], abs=5e-5)


def test_fisher_matrices(env):
    """Of the discounted visitation: the full table is singular, one free logit per state is not."""
    policy, endless = tabular(env), two_states(None)
    pi = torch.func.functional_call(policy, {"theta": THETA.reshape(2, 2)}, (_states(), frozenset({"dist"})))
    pi = pi["logits"].squeeze(0).softmax(-1)
    step = torch.einsum("sa,sat->st", pi, endless.transition_table)
    visits = (1 - GAMMA) * torch.linalg.solve(torch.eye(2, dtype=F64) - GAMMA * step.T, endless.start)
    close(visits, vector(0.635071, 0.364929))
    full = sum(
        visits[s] * pi[s, a] * torch.outer(u, u)
        for s in range(2)
        for a in range(2)
        for u in [Scores(policy, THETA, _pair(s, a)).dense()[:, 0]]
    )
    close(torch.linalg.eigvalsh(full), vector(0, 0, 0.175356, 0.298488))
    pinned = GibbsPolicy(
        env.single_observation_space, env.single_action_space, features=OneHot(2), pinned=True
    ).double()
    logits = THETA.reshape(2, 2)[0] - THETA.reshape(2, 2)[1]
    free = sum(
        visits[s] * pi[s, a] * torch.outer(u, u)
        for s in range(2)
        for a in range(2)
        for u in [Scores(pinned, logits, _pair(s, a)).dense()[:, 0]]
    )
    close(torch.linalg.eigvalsh(free), vector(0.087678, 0.149244))


def _states():
    return Data({"obs": vector(0, 1).reshape(1, 2, 1), "action": torch.zeros(1, 2).long(), "valid": torch.ones(1, 2)})


def _pair(s, a):
    return Data({"obs": vector(s).reshape(1, 1, 1), "action": torch.tensor([[a]]), "valid": torch.ones(1, 1)})


def test_the_key_lemma():
    """-J(x') <= -J(x) - gamma/3 |grad J| + 8 gamma/3 |d - grad J_H| + L gamma^2/2 + 4 gamma/3 |grad J_H - grad J| for
    any direction and step; 2000 random draws, H = 20."""
    endless, short = two_states(None), two_states(20)
    c = theory_constants(M_g=2**0.5, M_h=0.5, r_max=2.0, gamma=GAMMA, H=20)

    def value(task):
        return lambda x: task.objective(lambda obs: {"logits": x.reshape(2, 2).T})

    n, generator = 2000, torch.Generator().manual_seed(0)
    theta = 2.0 * torch.randn(n, 4, dtype=F64, generator=generator)
    j, g, g_h = (
        torch.func.vmap(fn)(theta)
        for fn in (value(endless), torch.func.grad(value(endless)), torch.func.grad(value(short)))
    )
    noise = torch.randn(n, 4, dtype=F64, generator=generator) * torch.rand(n, 1, dtype=F64, generator=generator)
    d = g_h + noise * g_h.norm(dim=1, keepdim=True)
    step = 10 ** (4.0 * torch.rand(n, dtype=F64, generator=generator) - 4.0)
    after = torch.func.vmap(value(endless))(theta + step[:, None] * d / d.norm(dim=1, keepdim=True))
    bound = -j - step / 3 * g.norm(dim=1) + 8 * step / 3 * (d - g_h).norm(dim=1) + c.L_g * step**2 / 2
    slack = bound + 4 * step / 3 * (g_h - g).norm(dim=1) + after
    assert slack.min() >= 0
    assert slack.min() < 1e-2, "the draws come close to the bound"


def test_the_momentum_lemma():
    eta = lambda t, q: (2 / (t + 2)) ** q  # noqa: E731
    for q in (0.5, 0.8, 1.0):
        product = 1.0
        for t in range(200):
            product *= 1 - eta(t + 1, q)
            assert product <= eta(t + 1, q)
            assert eta(t, q) * (1 - eta(t + 1, q)) <= eta(t + 1, q)


# -- the estimator ----------------------------------------------------------------------------------------------------


def test_storm_weights_are_those_of_trajectories(env):
    """E[w g(tau, theta_prev)] under theta is grad J(theta_prev)."""
    policy = tabular(env)
    data, p = all_trajectories(policy, THETA)
    direction = HARPGEstimator(HARPGConfig(variant="storm", num_envs=1, n_steps=H, gamma=GAMMA), THETA - 0.3 * V)
    old = per_path(data, lambda d: direction._old_gradient(THETA, d, context(policy)))
    close(p @ old, env.exact_gradient(policy, THETA - 0.3 * V), 1e-12)


def test_joined_rollouts_are_one(env):
    whole = rollouts([[0, 1, 0], [0, 0, 1], [0, 1, 1]], [[1, 0, 1], [0, 1, 1], [0, 0, 0]])
    parts = [whole.take(torch.tensor([0, 1])), whole.take(torch.tensor([2]))]
    joined = concatenate(parts)
    assert all(torch.equal(joined[name], whole[name]) for name in whole)
    policy, ctx = tabular(env), None
    ctx = context(policy)
    grads = [estimator().gradient(THETA, estimator().weigh(d), ctx).mean for d in (joined, *parts)]
    close(grads[0], (2 * grads[1] + grads[2]) / 3, 1e-12)


def test_discount_from_start():
    """gamma^h r_h summed from t, or gamma^(h-t) r_h."""
    data = rollouts([[0, 1, 0]], [[0, 1, 0]])  # rewards 1, 2, 1
    psi = estimator().weigh(data)["psi"].flatten()
    close(psi, vector(1 + 0.9 * 2 + 0.81, 0.9 * 2 + 0.81, 0.81), 1e-12)
    psi = estimator(discount_from_start=False).weigh(data)["psi"].flatten()
    close(psi, vector(1 + 0.9 * 2 + 0.81, 2 + 0.9, 1), 1e-12)


def test_rows_after_the_end_count_for_nothing():
    data = rollouts([[0, 1, 0]], [[0, 1, 0]])
    columns = {k: data[k] for k in data}
    columns["valid"] = torch.tensor([[1.0], [1.0], [0.0]], dtype=F64)
    columns["carry"] = torch.tensor([[1.0], [0.0], [0.0]], dtype=F64)
    close(estimator().weigh(Data(columns))["psi"].flatten(), vector(1 + 0.9 * 2, 0.9 * 2, 0), 1e-12)
