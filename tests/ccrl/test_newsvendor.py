"""The forecaster of the generalised newsvendors: its windows of demand, its fit, lead times that differ by store."""

from __future__ import annotations

import pytest
import torch

from ccrl.inventory.functional_env import Network
from ccrl.inventory.newsvendor import NewsvendorPolicy, QuantileForecaster, Windows, demand_windows, fit_forecaster
from envs.inventory import InventoryEnv, make_task


def test_windows_by_hand() -> None:
    """Sixteen weeks before, and demand over L + 1 periods from the present one on; all that end within the horizon."""
    env = InventoryEnv(make_task("many_warehouses_real_data", count=2), periods=7)
    scenarios = env.sample(2, torch.Generator().manual_seed(0))
    found = demand_windows(env, scenarios, (1, 3))
    assert found.past.shape == (4 * 2 * 21, 16)
    demand, now = scenarios["demand"], env.noise(scenarios)
    history, state, row = demand.shape[1] - 7, env.initial(scenarios), 0
    for t in range(4):
        days = env.observe(state)["days_from_christmas"]
        for b in range(2):
            for k in range(21):
                assert torch.equal(found.past[row], demand[b, t : t + history, k])
                assert float(found.days[row]) == float(days[b])
                series = demand[b, history + t :, k]
                expected = torch.stack([series[:2].sum(), series[:4].sum()])
                torch.testing.assert_close(found.total[row], expected)
                row += 1
        state, _ = env.step(state, torch.zeros(2, len(env.network.edges)), now[t])
    with pytest.raises(ValueError, match="windows within 7 periods"):
        demand_windows(env, scenarios, (7,))


def test_a_fit_is_adam_on_random_rows_with_a_falling_step() -> None:
    torch.manual_seed(0)
    mine, twin = (QuantileForecaster(3, (1, 2)).requires_grad_(False) for _ in range(2))
    twin.load_state_dict(mine.state_dict())
    windows = Windows(torch.rand(50, 3), torch.rand(50, 1), torch.rand(50, 2))
    last = fit_forecaster(mine, windows, 4, torch.Generator().manual_seed(5), lr=0.1, batch=8)
    assert not any(p.requires_grad for p in mine.parameters()), "the policy's training would go on with it"
    twin.requires_grad_(True)
    adam, generator = torch.optim.Adam(twin.parameters()), torch.Generator().manual_seed(5)
    for rate in (0.1, 0.075, 0.05, 0.025):
        rows = torch.randint(50, (8,), generator=generator)
        loss = twin.pinball(windows.past[rows], windows.days[rows], windows.total[rows])
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = rate
        adam.step()
    torch.testing.assert_close(last, loss.detach())
    for a, b in zip(mine.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b.detach())


def test_negative_forecasts_are_clipped_but_learn_to_leave_zero() -> None:
    net = QuantileForecaster(2, (1,))
    torch.nn.init.constant_(net.net[-1].bias, -50.0)
    past, days = torch.rand(4, 2), torch.rand(4, 1)
    assert not bool(net(past, days).any())
    (grad,) = torch.autograd.grad(net.pinball(past, days, torch.ones(4, 1)), net.net[-1].bias)
    assert bool((grad < 0).all())


def test_every_store_has_the_quantile_of_its_own_lead_time() -> None:
    net = Network(0, 0, 2, ((-1, 0), (-1, 1)), (1, 3))
    obs = {
        "inventory": torch.tensor([[[5.0, 1.0, 0.0], [2.0, 3.0, 4.0]]]),
        "holding": torch.tensor([[1.0, 1.0]]),
        "underage": torch.tensor([[1.0, 3.0]]),
        "lead_time": torch.tensor([[1.0, 3.0]]),
        "edge_cost": torch.zeros(1, 2),
        "past_demand": torch.rand(1, 2, 16),
        "days_from_christmas": torch.zeros(1, 1),
    }
    policy = NewsvendorPolicy(net, obs, "quantile_nv")
    for p in policy.parameters():
        p.zero_()
    quantiles = torch.arange(1, 4)[:, None] * 100 + torch.arange(1, 20)
    policy.forecaster.net[-1].bias.view(3, 19).copy_(quantiles)
    torch.testing.assert_close(policy(obs), torch.tensor([[110.0 - 6.0, 315.0 - 9.0]]))
