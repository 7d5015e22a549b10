"""The C++ pass of stores alone: what it costs and its gradient are the unrolled simulator's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ccrl import native
from ccrl.data import Data
from ccrl.inventory.functional_env import Network
from ccrl.inventory.pathwise import Unrolled, scenario_data
from ccrl.inventory.policies import VanillaPolicy
from ccrl.inventory.stores import StoresAlone, StoresKernel
from envs.inventory import InventoryEnv, make_task
from envs.inventory.demand import Normal, Poisson
from envs.inventory.task import Task

pytestmark = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler on PATH")
COST = frozenset({"cost"})


def three_stores(lost: bool) -> Task:
    network = Network(0, 0, 3, ((-1, 0), (-1, 1), (-1, 2)), (2, 1, 4))
    demand = Normal((5.0, 3.0, 7.0), (2.0, 1.0, 3.0))
    return Task("three", network, demand, (1.0, 0.5, 2.0), (9.0, 4.0, 19.0), lost=lost, random_stock=True)


def pair(
    task: Task, count: int, dtype: torch.dtype = torch.float64, hidden: tuple[int, ...] = (9, 5)
) -> tuple[Unrolled, Unrolled, Data]:
    """The simulator, and itself with the kernel; scenarios."""
    torch.manual_seed(0)
    env = InventoryEnv(task, periods=7, ignore=0)
    scenarios = env.sample(count, torch.Generator().manual_seed(1), dtype=dtype)
    state = env.initial(scenarios)
    policy = VanillaPolicy(task.network, env.observe(state), hidden).to(dtype)
    return Unrolled(env, policy), Unrolled(env, policy, kernel=StoresKernel(env, policy)), scenario_data(env, scenarios)


def cost_and_gradient(unrolled: Unrolled, data: Data) -> tuple[Tensor, list[Tensor]]:
    cost = unrolled(data, COST)["cost"]
    weights = torch.rand(cost.shape, generator=torch.Generator().manual_seed(2), dtype=cost.dtype)
    return cost, list(torch.autograd.grad((cost * weights).sum(), list(unrolled.parameters())))


@pytest.mark.parametrize("count", [1, 8, 21])
@pytest.mark.parametrize("lost", [True, False])
def test_costs_and_gradients_are_those_of_autograd(lost: bool, count: int) -> None:
    # three stores of three lead times, 1, 8 and 21 scenarios: blocks of 4 or 8, whole and not
    eager, fast, data = pair(three_stores(lost), count)
    for got, expected in zip(cost_and_gradient(fast, data), cost_and_gradient(eager, data)):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hidden", [(), (32, 32, 32)])
def test_in_single_precision_too(hidden: tuple[int, ...]) -> None:
    # without a hidden layer, and with tiles of every form
    eager, fast, data = pair(make_task("one_store_lost"), 37, torch.float32, hidden)
    for got, expected in zip(cost_and_gradient(fast, data), cost_and_gradient(eager, data)):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_one_period_by_hand() -> None:
    # stock 2 and 3, demand 4 then 1, lost sales, lead time 2, h = 1, p = 9; no hidden layer, weights 0, bias b = 1:
    # every order is softplus(2) = 2.126928. Period 0: 2 units are missed, 18. Period 1: 0 + 3 - 1 = 2 are left, 2.
    # Period 2, demand 1: 2 + 0 (nothing came) + the first order 2.126928 - 1 = 3.126928. d / db: sigmoid(2) = 0.880797.
    task = make_task("one_store_lost", lead_time=2, underage=9.0)
    env = InventoryEnv(task, periods=3, ignore=0)
    demand = torch.tensor([[[4.0], [1.0], [1.0]]])
    scenarios = {"demand": demand, "inventory": torch.tensor([[[2.0, 3.0]]])}
    policy = VanillaPolicy(task.network, env.observe(env.initial(scenarios)), ())
    for parameter, value in zip(policy.parameters(), (0.0, 1.0)):
        nn.init.constant_(parameter, value)
    cost = StoresKernel(env, policy)(scenarios)
    torch.testing.assert_close(cost.flatten(), torch.tensor([18.0, 2.0, 3.126928]))
    (_, bias) = torch.autograd.grad(cost.sum(), list(policy.parameters()))
    torch.testing.assert_close(bias, torch.tensor([0.880797]))


def test_threads_change_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast, data = pair(three_stores(True), 21)
    cost, gradient = cost_and_gradient(fast, data)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again, gradients = cost_and_gradient(fast, data)
    assert torch.equal(cost, again)
    torch.testing.assert_close(gradients, gradient)


def test_what_is_not_a_number_stays_so() -> None:
    eager, fast, data = pair(make_task("one_store_lost"), 3, torch.float32)
    _ = fast(data, COST)  # compared with the eager one before
    with torch.no_grad():
        next(fast.parameters())[0, 0] = float("nan")
    cost, gradient = cost_and_gradient(fast, data)
    assert cost[-1].isnan().all()
    assert gradient[0].isnan().any()
    assert eager(data, COST)["cost"][-1].isnan().all()


def test_an_environment_that_does_more_than_it_says_is_found_out() -> None:
    class Dearer(InventoryEnv):
        def stores_alone(self) -> StoresAlone:
            return StoresAlone((1.0,), (10.0,), lost=True)

    task = make_task("one_store_lost", underage=9.0)
    env = Dearer(task, periods=7, ignore=0)
    scenarios = env.sample(5, torch.Generator().manual_seed(1))
    policy = VanillaPolicy(task.network, env.observe(env.initial(scenarios)), (4,))
    fast = Unrolled(env, policy, kernel=StoresKernel(env, policy))
    with pytest.raises(RuntimeError, match=r"gradient of policy\.net\.0\.weight.* is not the eager one"):
        fast(scenario_data(env, scenarios), COST)


@pytest.mark.parametrize(
    ("task", "make", "message"),
    [
        ("serial_system", {}, "expected stores alone"),
        ("one_store_lost", {"policy": nn.Identity()}, "expected the vanilla policy, got Identity"),
        ("one_store_lost", {"device": "meta"}, "expected the device cpu, got meta"),
    ],
)
def test_where_it_does_not_apply(task: str, make: dict[str, Any], message: str) -> None:
    made = make_task(task)
    env = InventoryEnv(made)
    state = env.initial(env.sample(1, torch.Generator()))
    policy = make.get("policy") or VanillaPolicy(made.network, env.observe(state), (4,)).to(make.get("device", "cpu"))
    with pytest.raises(ValueError, match=message):
        StoresKernel(env, policy)


def test_a_warehouse_that_serves_nobody_is_no_store() -> None:
    network = Network(0, 1, 1, ((-1, 0), (-1, 1)), (2, 2))
    task = Task("idle", network, Poisson((5.0,)), (0.5, 1.0), (9.0,), lost=True)
    assert InventoryEnv(task).stores_alone() is None


def test_a_compiler_that_fails_says_why(tmp_path: Any) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no program\n")
    with pytest.raises(RuntimeError, match="could not compile broken"):
        native.library(broken, "float")
