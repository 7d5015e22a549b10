"""Off-policy losses against numbers computed by hand or by quadrature, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ccrl.data import Data
from ccrl.estimators import q_losses
from ccrl.estimators.terms import no_ratio
from ccrl.policies.distributions import SQUASHED, _log_slope

F64 = torch.float64


def t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def batch(**columns: Tensor) -> Data:
    rows = {k: v.unsqueeze(0) if v.dim() else v for k, v in columns.items()}
    n = next(v.shape[1] for v in rows.values() if v.dim() > 1)
    return Data(rows | {"valid": torch.ones(1, n, dtype=F64)})


def element(loss: object, evaluation: dict[str, Tensor], data: Data) -> Tensor:
    found = {k: v.unsqueeze(0) for k, v in evaluation.items()}
    return loss(no_ratio(data["valid"]), torch.zeros(()), found, data)[0]  # type: ignore[operator, no-any-return]


def test_squared_td_is_half_the_sum_over_critics() -> None:
    # y = (5.1976, -.5, .614); mean (Q1 - y)^2 = .146014, mean (Q2 - y)^2 = .371214; half of their sum: .258614
    q = torch.stack([t(5, 0, 1), t(4.5, -1, 0)], -1)
    loss = element(q_losses.squared_td, {"q": q}, batch(target=t(5.1976, -0.5, 0.614)))
    assert float(loss.mean()) == pytest.approx(0.258614, abs=1e-6)


def test_temperature_moves_by_what_the_entropy_lacks() -> None:
    log_alpha = t(math.log(0.2)).requires_grad_()
    # mean log pi = (-1.2 + .7 + 2) / 3 = .5, H = -1: d loss / d log_alpha = -(.5 - 1) = .5, one Adam step of 3e-4 makes
    # alpha .2 exp(-3e-4) = .19994
    mean = t(-1.2, 0.7, 2).mean()
    loss = element(q_losses.temperature(-1.0), {"log_alpha": log_alpha.expand(1)}, batch(mean_log_prob=mean, x=t(0)))
    loss.sum().backward()
    assert float(log_alpha.grad) == pytest.approx(0.5)
    torch.optim.Adam([log_alpha], lr=3e-4).step()
    assert float(log_alpha.detach().exp()) == pytest.approx(0.1999400, abs=1e-7)


def test_log_probability_of_squashed_actions() -> None:
    params = {"mean": t(0.3, -1.2), "log_std": t(-0.5, 0.4)}
    assert float(SQUASHED.log_prob(params, t(1, -2))) == pytest.approx(0.969926, abs=1e-6)
    # an action range of 4 instead of 2 in both dimensions: minus 2 log 2 = -1.386294
    assert float(SQUASHED.log_prob(params, t(1, -2))) - 2 * math.log(2) == pytest.approx(-0.416369, abs=1e-6)
    u = t(3, 8, 12, 20)
    assert _log_slope(u).tolist() == pytest.approx([-4.618657, -14.613706, -22.613706, -38.613706], abs=1e-6)
    x = torch.tensor(9.5, requires_grad=True)
    (grad,) = torch.autograd.grad(-_log_slope(x), x)
    assert float(grad) == pytest.approx(2.0, abs=1e-4), "float32 log(1 - a^2 + 1e-6) has no gradient here"


def test_entropy_and_its_gradient_are_those_of_the_squashed_action() -> None:
    mean, log_std = t(0.5).requires_grad_(), t(-0.2).requires_grad_()
    entropy = SQUASHED.entropy({"mean": mean, "log_std": log_std}, t(0))
    found = torch.autograd.grad(entropy, (mean, log_std))
    assert [float(x.detach()) for x in (entropy, *found)] == pytest.approx([0.513944, -0.656108, 0.174793], abs=1e-5)
    # three samples: reparameterised -log pi, and -log pi of the stored actions
    eps = t(-1, 0.5, 2).unsqueeze(-1)
    params = {"mean": mean.expand(3, 1), "log_std": log_std.expand(3, 1)}
    action, log_prob = SQUASHED.rsample(params, eps)
    new = torch.autograd.grad(-log_prob.mean(), (mean, log_std))
    stored = torch.autograd.grad(-SQUASHED.log_prob(params, action.detach()).mean(), (mean, log_std))
    assert [float(x) for x in new] == pytest.approx([-0.923350, -0.426711], abs=1e-6)
    assert [float(x) for x in stored] == pytest.approx([-0.610701, -0.75], abs=1e-6)
    at_best = SQUASHED.entropy({"mean": t(0), "log_std": t(math.log(0.8744))}, t(0))
    assert float(at_best) == pytest.approx(0.683636, abs=1e-6), "below log 2, the entropy of the uniform"


def actor(loss: object, index: float | None = None) -> list[float]:
    """Loss and gradient of an actor ``mu .2, log sigma -.3`` at eps (.5, -1), ``Q1 = 2a - a^2, Q2 = 1.5a - .1``."""
    mean, log_std = t(0.2).requires_grad_(), t(-0.3).requires_grad_()
    params = {"mean": mean.expand(2, 1), "log_std": log_std.expand(2, 1)}
    u, log_prob = SQUASHED.rsample(params, t(0.5, -1).unsqueeze(-1))
    a = u.tanh().squeeze(-1)
    q = torch.stack([2 * a - a * a, 1.5 * a - 0.1], -1)
    evaluation = {"new_q": q, "new_q1": q[:, 0], "new_log_prob": log_prob, "new_action": u}
    data = batch(alpha=torch.tensor(0.1, dtype=F64), old_mean=torch.zeros(2, 1), old_log_std=torch.zeros(2, 1))
    value = element(loss, evaluation, data).mean()
    return [float(x.detach()) for x in (value, *torch.autograd.grad(value, (mean, log_std)))]


def test_actor_loss_is_of_the_smaller_critic() -> None:
    assert actor(q_losses.soft_actor()) == pytest.approx([0.214961, -1.678059, 0.588628], abs=1e-6)
    assert actor(q_losses.soft_actor("mean"))[1:] == pytest.approx([-1.299335, 0.416418], abs=1e-6)


def test_mirror_descent_actor_at_the_temperature_is_the_soft_actor() -> None:
    q1_only = [0.168998, -1.483039, 0.660865]
    assert actor(q_losses.mirror_descent_actor(SQUASHED, 0.3, 0.1)) == pytest.approx(
        [0.197391, -1.480080, 0.522058], abs=1e-6
    )
    assert actor(q_losses.mirror_descent_actor(SQUASHED, 0.1, 0.1)) == pytest.approx(q1_only, abs=1e-6)
    exact = actor(q_losses.soft_actor("min"))
    assert actor(q_losses.mirror_descent_actor(SQUASHED, 0.1, 0.1, reduce="min")) == pytest.approx(exact, abs=1e-12)


def test_deformed_logarithm() -> None:
    # log_q(.5): q 0: -.5; .5: (sqrt .5 - 1) / .5 = -.585786; 1.5: -.828427; 2: (2 - 1) / (-1) = -1
    log_half = t(math.log(0.5))
    found = [float(q_losses.log_q(log_half, q)) for q in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert found == pytest.approx([-0.5, -0.585786, -0.693147, -0.828427, -1.0], abs=1e-6)
    assert float(q_losses.log_q(t(math.log(2.0)), 2.0)) == pytest.approx(0.5)


def test_quantile_huber() -> None:
    theta, y = t(-1, 0.5, 2), t(0, 1, 4)
    assert float(q_losses.quantile_huber(theta, y, 1.0)) == pytest.approx(1.430556, abs=1e-6)
    assert float(q_losses.quantile_huber(theta, y, 0.0)) == pytest.approx(1.916667, abs=1e-6)
    # levels .25, .75; u = (.5, 2) and (-.5, 1). kappa 0: (.25 * .5 + .25 * 2) / 2 + (.25 * .5 + .75 * 1) / 2 = .75;
    # kappa 1: (.25 * .125 + .25 * 1.5) / 2 + (.25 * .125 + .75 * .5) / 2 = .203125 + .203125
    theta, y = t(0, 1), t(0.5, 2)
    assert float(q_losses.quantile_huber(theta, y, 0.0)) == pytest.approx(0.75)
    assert float(q_losses.quantile_huber(theta, y, 1.0)) == pytest.approx(0.40625)


def test_one_quantile_is_the_huber_loss_of_the_chosen_action() -> None:
    quantiles = t(1, 5, -2, 0).reshape(2, 2, 1)
    data = batch(target=t(1.5, 3).unsqueeze(-1), action=torch.tensor([0, 1]))
    loss = element(q_losses.quantile_loss(1.0), {"quantiles": quantiles}, data)
    # |1.5 - 1| = .5 -> .125; |3 - 0| = 3 -> 3 - .5 = 2.5
    assert loss.tolist() == pytest.approx([0.125, 2.5])
