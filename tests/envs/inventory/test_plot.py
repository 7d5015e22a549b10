"""The planner's picture: it draws every node, and its numbers are those of the simulation."""

from __future__ import annotations

import pytest
import torch

from ccrl.experiment.plots import save
from envs.inventory import TASKS, InventoryEnv, Recorded, make_task, retail_sales, simulate
from envs.inventory.plot import _summarise, plot_network


def run(name, **options):
    given = {"count": 3} if "real" in name else {}
    if name == "own_demand":
        given = {"sales": retail_sales(3, stores=2), "holding": 1.0, "underage": 9.0, "lead_time": 2, "fixed_cost": 3.0}
    task = make_task(name, **given)
    env = InventoryEnv(task, **({"periods": 20, "ignore": 8} | options))
    generator = torch.Generator().manual_seed(0)
    scenarios = env.sample(3, generator)
    wanted = 8 * torch.rand(3, len(env.network.edges), generator=generator)
    return env, simulate(env, lambda _: wanted, scenarios)


def texts(figure):
    return " ".join(text.get_text() for axis in figure.axes for text in axis.texts)


@pytest.mark.parametrize("name", TASKS)
def test_costs_of_the_nodes_add_up(name):
    env, trace = run(name)
    summary = _summarise(env, trace)
    assert abs(summary.cost.sum() - trace.cost[8:].double().mean().item()) < 1e-5 * max(1, abs(summary.cost.sum()))
    assert ((summary.served >= 0) & (summary.served <= 1)).all()
    demand = trace.demand[8:].double().mean((0, 1)).numpy()
    if env.task.lost:
        assert (summary.served * demand > 0).all()


def test_numbers_by_hand():
    """Serial system without demand and orders: the store's initial stock stays and costs 1 per unit."""
    env = InventoryEnv(make_task("serial_system"), periods=6, ignore=4)
    scenarios = env.sample(1, torch.Generator().manual_seed(0))
    scenarios["demand"] = torch.zeros_like(scenarios["demand"])
    trace = simulate(env, lambda _: torch.zeros(1, 4), scenarios)
    stock = scenarios["inventory"][0, 3].sum().item()
    summary = _summarise(env, trace)
    assert summary.stock[:3].tolist() == [0, 0, 0]
    assert abs(summary.stock[3] - stock) < 1e-5
    assert abs(summary.cost[3] - stock) < 1e-5
    assert summary.flow.tolist() == [0, 0, 0, 0]
    assert f"end stock {stock:.1f}" in texts(plot_network(env, trace))


@pytest.mark.parametrize("name", ["serial_system", "many_warehouses_lost_demand", "one_store_real_data"])
def test_every_node_has_a_row(name, tmp_path):
    env, trace = run(name)
    figure = plot_network(env, trace, scenario=2, title="A plan")
    assert len(figure.axes) == env.network.nodes + 1
    seen = texts(figure)
    for kind in ("echelon", "warehouse", "store"):
        for i in range(getattr(env.network, f"{kind}s")):
            assert seen.count(f"{kind} {i + 1}\n") == 2  # in the network and at its row
    assert any("A plan" in text.get_text() for text in figure.texts)
    assert save(figure, tmp_path / "plan")[0].stat().st_size > 10_000


def test_warehouses_have_their_colours():
    """Those of the lines that leave them, and of the one from the supplier; a single one needs none."""
    for name, colours in (("many_warehouses_real_data", 3), ("one_warehouse_lost_demand", 1)):
        env, trace = run(name)
        network = plot_network(env, trace).axes[0]
        lines = {}
        for (source, target), patch in zip(env.network.edges, network.patches, strict=True):
            lines.setdefault(target if source < 0 else source, set()).add(patch.get_edgecolor()[:3])
        assert all(len(found) == 1 for found in lines.values())
        assert len(set.union(*lines.values())) == len(lines) == colours


def test_the_legend_names_what_is_shown():
    env, trace = run("one_store_lost")
    for periods, warm in ((20, True), (12, False)):
        (legend,) = plot_network(env, trace, periods=periods).legends
        names = ["on hand", "on the way here", "lost sales", "demand"] + ["warm-up"] * warm
        assert [text.get_text() for text in legend.get_texts()] == names


def test_the_stand_in_is_named():
    figure = plot_network(*run("many_warehouses_real_data"))
    assert "synthetic stand-in" in figure.texts[0].get_text()


def test_bad_input():
    env, trace = run("one_store_lost")
    with pytest.raises(ValueError, match="scenario below 3, got"):
        plot_network(env, trace, scenario=3)
    with pytest.raises(ValueError, match="periods: expected at least 1"):
        plot_network(env, trace, periods=0)
    with pytest.raises(ValueError, match="expected a trace of 4 nodes with 4 slots"):
        plot_network(InventoryEnv(make_task("serial_system")), trace)


def test_waste_is_a_cost_of_the_store():
    sales = retail_sales(2, stores=2)
    task = make_task("own_demand", sales=sales, holding=1.0, underage=9.0, lead_time=2, shelf_life=2, waste_cost=7.0)
    env = InventoryEnv(task, periods=20, ignore=8)
    trace = simulate(env, lambda _: torch.full((2, 2), 30.0), env.sample(2, torch.Generator()))
    assert _summarise(env, trace).cost.sum() == pytest.approx(trace.cost[8:].double().mean().item(), rel=1e-6)


def test_periods_have_their_name():
    sales = Recorded(torch.full((1, 80, 1), 4.0), "x", step_days=1)
    env = InventoryEnv(make_task("own_demand", sales=sales, holding=1.0, underage=9.0, lead_time=2))
    trace = simulate(env, lambda _: torch.full((1, 1), 4.0), env.sample(1, torch.Generator()))
    assert plot_network(env, trace).axes[-1].get_xlabel() == "day"
