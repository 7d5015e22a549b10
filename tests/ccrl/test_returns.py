"""Discounted sums by hand, and truncation through the collector in all autoreset modes."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from ccrl import returns
from ccrl.batched_env import AutoresetMode
from ccrl.collect import Collector, Request
from ccrl.data import Data
from ccrl.estimators.stages import Gae, Values
from ccrl.policies import MLPPolicy
from ccrl.testing import ClockEnv, Episode


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def reference_gae(reward: Tensor, value: Tensor, after: Tensor, discount: Tensor, carry: Tensor, lam: float) -> Tensor:
    """The recursion, one row at a time."""
    out, last = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(reward.shape[0])):
        last = reward[t] + discount[t] * after[t] - value[t] + discount[t] * lam * carry[t] * last
        out[t] = last
    return out


def test_gae_by_hand() -> None:
    # gamma = lam = .5; row 1 is cut by a time limit (its successor is worth 8), row 3 terminates
    #   A_3 = 1 - 4            = -3
    #   A_2 = 1 + .5*4 - 2     =  1;  + .25 * A_3  = .25
    #   A_1 = 1 + .5*8 - 2     =  3   (carry 0: nothing of A_2)
    #   A_0 = 1 + .5*2 - 1     =  1;  + .25 * A_1  = 1.75
    advantage = returns.gae(
        column(1, 1, 1, 1),
        v_t=column(1, 2, 2, 4),
        v_tp1=column(2, 8, 4, 99),
        discount_t=column(0.5, 0.5, 0.5, 0),
        carry_t=column(1, 0, 1, 0),
        lambda_=0.5,
    )
    assert advantage.flatten().tolist() == pytest.approx([1.75, 3.0, 0.25, -3.0])


def test_discount_alone_leaks_over_a_truncation() -> None:
    arguments = (column(1, 1, 1, 1), column(1, 2, 2, 4), column(2, 8, 4, 99), column(0.5, 0.5, 0.5, 0))
    right = returns.gae(*arguments, carry_t=column(1, 0, 1, 0), lambda_=0.5)
    leaky = returns.gae(*arguments, carry_t=torch.ones(4, 1, dtype=torch.float64), lambda_=0.5)
    # the wrong A_1 gains .25 * A_2 = .0625, and A_0 a quarter of that
    assert (leaky - right).flatten().tolist() == pytest.approx([0.015625, 0.0625, 0.0, 0.0])


@pytest.mark.parametrize(("steps", "width"), [(1, 1), (2, 3), (9, 1), (64, 5), (33, 128), (12, 129), (40, 300)])
def test_both_scan_routes_match_the_recursion(steps: int, width: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    reward, value, after = torch.randn(3, steps, width, generator=generator, dtype=torch.float64)
    carry = (torch.rand(steps, width, generator=generator) > 0.1).double()
    discount = 0.99 * (torch.rand(steps, width, generator=generator) > 0.1).double()
    got = returns.gae(reward, value, after, discount, carry, 0.95)
    torch.testing.assert_close(got, reference_gae(reward, value, after, discount, carry, 0.95), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        returns._doubling(reward, carry), _loop(reward, carry), rtol=1e-12, atol=1e-12
    )  # the log-depth route at every size


def _loop(x: Tensor, w: Tensor) -> Tensor:
    y = x.clone()
    for t in reversed(range(x.shape[0] - 1)):
        y[t] += w[t] * y[t + 1]
    return y


def test_scans_leave_their_inputs_alone() -> None:
    x, w = torch.ones(20, 1), torch.ones(20, 1)
    returns.backward_scan(x, w)
    returns.forward_scan(x, w, torch.ones(1))
    assert x.eq(1).all()
    assert w.eq(1).all()


def test_forward_scan_starts_from_the_first_value() -> None:
    # 1 + .5*4 = 3; 1 + 0*3 = 1; 1 + .5*1 = 1.5
    got = returns.forward_scan(column(1, 1, 1), column(0.5, 0, 0.5), torch.tensor([4.0], dtype=torch.float64))
    assert got.flatten().tolist() == [3.0, 1.0, 1.5]


def test_discounted_sum_by_hand() -> None:
    # two episodes: 1 + .5*2 = 2, 2 | 4
    assert returns.discounted_sum(column(1, 2, 4), 0.5, column(1, 0, 0)).flatten().tolist() == [2.0, 2.0, 4.0]


def test_the_limits_of_lambda() -> None:
    """gamma = .5, row 1 is cut (its successor is worth 8), row 2 is the rollout's end.

    lambda = 0: 1 + .5 * 4 - 3 = 0, 1 + .5 * 8 - 4 = 1, 1 + .5 * 2 - 6 = -4.
    lambda = 1: A_1 = 1 and A_2 = -4 stay, nothing flows over the cut; A_0 = 1 + .5 (1 + .5 * 8) - 3 = .5.
    """
    arguments = (column(1, 1, 1), column(3, 4, 6), column(4, 8, 2), column(0.5, 0.5, 0.5), column(1, 0, 1))
    assert returns.gae(*arguments, 0.0).flatten().tolist() == [0.0, 1.0, -4.0]
    assert returns.gae(*arguments, 1.0).flatten().tolist() == [0.5, 1.0, -4.0]


def test_n_step_returns_by_hand() -> None:
    # gamma = .5; row 1 truncated (V(x_1) = 6), rollout ends after row 3; n = 2
    #   R_3 = 1 + .5*8 = 5;  R_2 = 1 + .5*(1 + .5*8) = 3.5;  R_1 = 1 + .5*6 = 4;  R_0 = 1 + .5*(1 + .5*6) = 3
    arguments = (column(1, 1, 1, 1), column(2, 6, 4, 8), column(0.5, 0.5, 0.5, 0.5), column(1, 0, 1, 1))
    assert returns.n_step_returns(*arguments, 2).flatten().tolist() == [3.0, 4.0, 3.5, 5.0]
    one = returns.n_step_returns(*arguments, 1)
    assert one.flatten().tolist() == [2.0, 4.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="n >= 1"):
        returns.n_step_returns(*arguments, 0)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="one shape"):
        returns.backward_scan(torch.ones(3, 1), torch.ones(3))


# -- truncation: V(o) = .1 o, gamma .9, lam .8, reward 1 ---------------------------------------------------

A_ROWS, B_ROWS = [2.28232, 1.65600, 0.80000], [1.69560, 0.98000]
# A_2 = 1 - .2 = .8; A_1 = 1 + .9*.2 - .1 + .72*.8 = 1.656; A_0 = 1 + .9*.1 + .72*1.656 = 2.28232
# B_1 = 1 + .9*1.2 - 1.1 = .98 (bootstrap at the time limit); B_0 = 1 + .9*1.1 - 1 + .72*.98 = 1.6956


def cut_rollout(mode: AutoresetMode) -> Data:
    env = ClockEnv([[Episode(0, 3, "terminate")], [Episode(10, 2, "truncate")]], autoreset_mode=mode)
    policy = MLPPolicy(env.single_observation_space, gym.spaces.Discrete(2), hidden=(4,))
    steps = 8 if mode == AutoresetMode.NEXT_STEP else 6
    data = Collector(env).collect(Request(steps=steps), policy)
    return Values(lambda obs: 0.1 * obs.squeeze(-1))(data)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_autoreset_modes_give_identical_advantages(mode: AutoresetMode) -> None:
    data = Gae(0.9, 0.8)(cut_rollout(mode))
    valid = data["valid"] > 0
    a, b = (data["advantage"][valid[:, n], n].tolist() for n in range(2))
    assert a == pytest.approx(A_ROWS * 2, abs=2e-6)
    assert b == pytest.approx(B_ROWS * 3, abs=2e-6)
    assert data["advantage"][~valid].eq(0).all()
    dummies = {AutoresetMode.NEXT_STEP: 4}.get(mode, 0)
    assert int((~valid).sum()) == dummies
    value = torch.where(valid, data["value"], 0.0)
    torch.testing.assert_close(torch.where(valid, data["return"], 0.0), data["advantage"] + value)


def test_unmasked_dummy_rows_would_receive_the_wrong_numbers() -> None:
    data = cut_rollout(AutoresetMode.NEXT_STEP)
    done = (data["terminated"] | data["truncated"]).float()
    wrong = returns.gae(data["reward"], data["value"], data["next_value"], data.discount(0.9), 1 - done, 0.8)
    # env A: row 3 is the dummy obs 3 -> 0: 0 + .9*0 - .3 + .72*2.28232; row 7 has no episode after it: -.3
    assert [float(wrong[3, 0]), float(wrong[7, 0])] == pytest.approx([1.34327, -0.3], abs=2e-6)
    assert data["valid"][[3, 7], 0].tolist() == [0, 0]


def test_truncation_as_termination_is_the_wrong_number() -> None:
    data = Gae(0.9, 0.8, time_limit="terminal")(cut_rollout(AutoresetMode.SAME_STEP))
    assert float(data["advantage"][1, 1]) == pytest.approx(-0.1, abs=1e-6)


def test_gae_of_another_reward_column() -> None:
    data = cut_rollout(AutoresetMode.SAME_STEP)
    doubled = Gae(0.9, 0.8, reward="shaped_reward")(data.derive(shaped_reward=2.0 * data["reward"]))
    # A_2 = 2 - .2 = 1.8;  A_1 = 2 + .9*.2 - .1 + .72*1.8 = 3.376
    assert doubled["advantage"][1:3, 0].tolist() == pytest.approx([3.376, 1.8])


def test_explained_variance_by_hand() -> None:
    # valid targets 1, 3, 5 (variance 8/3); residuals 1, 0, -1 (variance 2/3): 1 - 1/4
    target, value = torch.tensor([[1.0, 3.0, 5.0, 100.0]]), torch.tensor([[0.0, 3.0, 6.0, 0.0]])
    valid = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert returns.explained_variance(value, target, valid).item() == pytest.approx(0.75)
    assert returns.explained_variance(value, torch.ones_like(value), torch.ones_like(value)).isnan()
