"""Policies of inventory networks on made-up observations: published sizes, equivariance, links, bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccrl.inventory.base_stock import BaseStockPolicy, CappedBaseStockPolicy, EchelonStockPolicy, JustInTimePolicy
from ccrl.inventory.functional_env import Network, State
from ccrl.inventory.newsvendor import NewsvendorPolicy, QuantileForecaster, interpolate
from ccrl.inventory.policies import DataDrivenPolicy, GNNPolicy, OrderPolicy, SymmetryAwarePolicy, VanillaPolicy
from ccrl.policies.gnn import EdgeNet

STORE = Network(0, 0, 1, ((-1, 0),), (4,))
SERIAL = Network(2, 1, 1, ((0, 1), (1, 2), (2, 3), (-1, 0)), (4, 3, 4, 2))
FAN = Network(0, 1, 4, ((0, 1), (0, 2), (0, 3), (0, 4), (-1, 0)), (3, 3, 3, 3, 3))
PASSING = Network(0, 1, 3, ((0, 1), (0, 2), (0, 3), (-1, 0)), (2, 2, 2, 3), keeps_stock=False)
# stores 2, 3, 4: warehouse 0 serves 3 alone, warehouse 1 serves 2, 3 and 4
PARTIAL = Network(0, 2, 3, ((0, 3), (1, 2), (1, 3), (1, 4), (-1, 0), (-1, 1)), (6, 1, 2, 2, 3, 3))
NETWORKS = {"store": STORE, "serial": SERIAL, "fan": FAN, "passing": PASSING, "partial": PARTIAL}


def observation(net: Network, batch: int = 6, recorded: bool = False) -> State:
    """Random, with every slot beyond a node's lead time empty."""
    used = torch.arange(net.slots) < torch.tensor(net.node_slots)[:, None]
    obs = {
        "inventory": torch.rand(batch, net.nodes, net.slots) * 8 * used,
        "holding": torch.rand(batch, net.nodes),
        "underage": torch.rand(batch, net.stores) * 9,
        "lead_time": torch.tensor(net.lead_times).float().expand(batch, -1),
        "edge_cost": torch.rand(batch, len(net.edges)),
    }
    if recorded:
        past = torch.rand(batch, net.stores, 16) * 9
        return obs | {"past_demand": past, "days_from_christmas": torch.rand(batch, 1) * 100}
    return obs | {"mean": torch.rand(batch, net.stores) * 5 + 2, "std": torch.rand(batch, net.stores) + 1}


def size(policy: torch.nn.Module) -> int:
    return sum(p.numel() for p in policy.parameters())


def test_published_sizes() -> None:
    assert size(VanillaPolicy(STORE, observation(STORE))) == 2305
    assert size(GNNPolicy(FAN, observation(FAN))) == 19169  # seven node features
    assert VanillaPolicy(SERIAL, observation(SERIAL)).net[0].out_features == 32
    recorded = observation(FAN, recorded=True)
    assert [len(DataDrivenPolicy(FAN, recorded, hidden).net) for hidden in (None, (), (8,))] == [5, 1, 3]
    assert VanillaPolicy(PASSING, observation(PASSING)).net[0].out_features == 256
    assert VanillaPolicy(FAN, observation(FAN)).net[0].out_features == 512
    assert GNNPolicy(FAN, observation(FAN)).net.rounds == 1
    assert GNNPolicy(SERIAL, observation(SERIAL)).net.rounds == 3


@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("cls", [VanillaPolicy, GNNPolicy, SymmetryAwarePolicy, DataDrivenPolicy])
def test_orders_are_feasible(cls: type[OrderPolicy], net: Network) -> None:
    torch.manual_seed(0)
    obs = observation(net, 200, recorded=cls is DataDrivenPolicy)
    if cls is SymmetryAwarePolicy and net.echelons:
        with pytest.raises(ValueError, match="take the GNN"):
            cls(net, obs)
        return
    policy = cls(net, obs)
    orders = policy(obs)
    assert orders.shape == (200, len(net.edges))
    assert bool((orders >= 0).all())
    for node in set(net.source().tolist()) - {-1}:
        out = [i for i, (source, _) in enumerate(net.edges) if source == node]
        stock, total = obs["inventory"][:, node, 0], orders[:, out].sum(1)
        assert bool((total <= stock * (1 + 1e-5)).all())
        if not net.keeps_stock and cls is not DataDrivenPolicy:  # whose ReLU may ask for nothing at all
            torch.testing.assert_close(total, stock, rtol=1e-4, atol=1e-5)


def test_the_gnn_holds_back_what_its_self_loops_ask_for() -> None:
    torch.manual_seed(0)
    obs = observation(FAN, 50)
    obs["inventory"][:, 0, 0] = 1.0  # far less than the initial requests of about 5 each
    shipped = GNNPolicy(FAN, obs)(obs)[:, :4].sum(1).detach()
    assert float(shipped.max()) < 0.95
    assert float(shipped.min()) > 0.5


@pytest.mark.parametrize("net", [SERIAL, FAN, PASSING], ids=["serial", "fan", "passing"])
def test_outputs_of_the_vanilla_network_by_hand(net: Network) -> None:
    obs = observation(net, 3)
    policy = VanillaPolicy(net, obs)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
    orders, mean = policy(obs).detach(), obs["mean"].sum(1)
    torch.testing.assert_close(orders[:, -1], 0.5 * 4.0 * mean)  # half the bound
    if net.echelons:
        torch.testing.assert_close(orders[:, :3], 0.5 * obs["inventory"][:, :3, 0])
    else:
        stores, keep = net.internal, math.e if net.keeps_stock else 0.0
        share = obs["inventory"][:, :1, 0] / (stores + keep)
        torch.testing.assert_close(orders[:, :stores], share.expand(-1, stores))
    alone = VanillaPolicy(STORE, observation(STORE))
    torch.nn.init.zeros_(alone.net[-1].weight)
    torch.nn.init.zeros_(alone.net[-1].bias)
    torch.testing.assert_close(alone(observation(STORE)), torch.full((6, 1), math.log1p(math.e)))


def reference(net: EdgeNet, edges: list[tuple[int, int]], x: Tensor, weight: Tensor) -> Tensor:
    """The published message passing, edge by edge in Python."""
    zero = x.new_zeros(x.shape[0], 32)
    n = {v: net.node_in(x[:, v]) for v in range(x.shape[1])} | {-1: zero}
    e = [net.edge_in(torch.cat([n[s], n[d], weight[:, i : i + 1]], 1)) for i, (s, d) in enumerate(edges)]
    for _ in range(net.rounds):
        new = {-1: zero}
        for v in range(x.shape[1]):
            into = [e[i] for i, (_, d) in enumerate(edges) if d == v]
            out = [e[i] for i, (s, _) in enumerate(edges) if s == v]
            sums = [sum(m, zero) / math.sqrt(max(len(m), 1)) for m in (into, out)]
            new[v] = n[v] + net.node(torch.cat([n[v], *sums], 1))
        n = new
        e = [old + net.edge(torch.cat([old, n[s], n[d]], 1)) for old, (s, d) in zip(e, edges)]
    return torch.cat([F.softplus(net.head(one)) for one in e], 1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_message_passing_against_a_loop_over_edges(rounds: int) -> None:
    torch.manual_seed(0)
    edges = [*PARTIAL.edges, (2, -1), (3, -1), (4, -1), (0, 0), (1, 1)]
    net, part = EdgeNet(edges, 5, 7, rounds=rounds), EdgeNet(edges, 5, 7, rounds=rounds, unread=5)
    part.load_state_dict(net.state_dict())
    x, weight = torch.randn(4, 5, 7), torch.randn(4, len(edges))
    expected = reference(net, edges, x, weight)
    torch.testing.assert_close(net(x, weight), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part(x, weight), expected[:, :-5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recorded", [False, True])
def test_node_features_by_hand(recorded: bool) -> None:
    """Slots, holding cost, then a warehouse's cost per unit ordered, or what is known of a store."""
    obs = observation(PARTIAL, 3, recorded)
    found = GNNPolicy(PARTIAL, obs).features(obs)
    known = 18 if recorded else 3
    assert found.shape == (3, 5, PARTIAL.slots + 1 + known)
    for b in range(3):
        for node in range(5):
            row = [*obs["inventory"][b, node].tolist(), float(obs["holding"][b, node])]
            if node < 2:
                row += [float(obs["edge_cost"][b, 4 + node]), *[0.0] * (known - 1)]
            elif recorded:
                row += [float(obs["underage"][b, node - 2]), *obs["past_demand"][b, node - 2].tolist()]
                row += [float(obs["days_from_christmas"][b, 0])]
            else:
                row += [float(obs[k][b, node - 2]) for k in ("underage", "mean", "std")]
            torch.testing.assert_close(found[b, node], torch.tensor(row))


def test_the_gnn_by_hand() -> None:
    """Edges without a lead time have weight 0; a warehouse's own request is that of its own self-loop."""
    torch.manual_seed(0)
    obs = observation(PARTIAL, 8)
    policy = GNNPolicy(PARTIAL, obs)
    assert policy.net.head[-1].bias.tolist() == [5.0]
    edges = [*PARTIAL.edges, (0, 0), (1, 1), (2, -1), (3, -1), (4, -1)]
    weight, seen = F.pad(obs["lead_time"], (0, 5)), list[Tensor]()
    policy.net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        policy.net.head[-1].bias.fill_(0.0)  # requests near the stock: some are cut, others not
        out = reference(policy.net, edges, policy.features(obs), weight)
        found = policy(obs)
    assert torch.equal(seen[-1], weight)
    for warehouse, links, own in ((0, [0], 6), (1, [1, 2, 3], 7)):
        stock = obs["inventory"][:, warehouse, 0]
        share = (stock / (out[:, links].sum(1) + out[:, own])).clamp_max(1.0)
        torch.testing.assert_close(found[:, links], out[:, links] * share[:, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 4:], out[:, 4:6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", [STORE, PARTIAL], ids=["store", "partial"])
def test_the_symmetry_aware_network_by_hand(net: Network) -> None:
    torch.manual_seed(0)
    obs = observation(net, 5)
    policy = SymmetryAwarePolicy(net, obs)
    context = policy.context[0](policy.inventories(obs)).sigmoid()
    assert context.shape == (5, 256)
    assert [m.out_features for m in policy.store if isinstance(m, torch.nn.Linear)] == [32, 32, 1]
    wanted = []
    for i, (_, target) in enumerate(net.edges[: net.internal or None]):
        store = target - net.first_store
        known = [obs[k][:, store : store + 1] for k in ("mean", "std", "underage")]
        row = torch.cat([obs["inventory"][:, target], *known, obs["lead_time"][:, i : i + 1], context], 1)
        wanted.append(F.softplus(policy.store(row)))
    expected = torch.cat(wanted, 1)
    if net.internal:
        assert [m.out_features for m in policy.warehouse if isinstance(m, torch.nn.Linear)] == [16, 16, 1]
        for warehouse, links in ((0, [0]), (1, [1, 2, 3])):
            share = (obs["inventory"][:, warehouse, 0] / expected[:, links].sum(1)).clamp_max(1.0)
            expected = expected.index_copy(1, torch.tensor(links), expected[:, links] * share[:, None])
        bound = 4.0 * obs["mean"].sum(1, keepdim=True)
        stock = [torch.cat([obs["inventory"][:, w], context], 1) for w in range(2)]
        expected = torch.cat([expected, *(bound * policy.warehouse(x).sigmoid() for x in stock)], 1)
    torch.testing.assert_close(policy(obs), expected, rtol=1e-4, atol=1e-5)


def test_the_data_driven_network_starts_with_requests_of_one() -> None:
    """It reads every slot in use, past demand, the calendar, prices, holding costs and lead times."""
    obs = observation(PARTIAL, 4, recorded=True)
    policy = DataDrivenPolicy(PARTIAL, obs)
    assert policy.net[0].in_features == sum(PARTIAL.node_slots) + 3 * 16 + 1 + 3 + 5 + 6
    assert [m.out_features for m in policy.net if isinstance(m, torch.nn.Linear)] == [64, 64, 6]
    torch.nn.init.zeros_(policy.net[-1].weight)
    obs["inventory"] = torch.full((4, 5, PARTIAL.slots), 1.5)
    torch.testing.assert_close(policy(obs), torch.tensor([[1.0, 0.5, 0.5, 0.5, 1.0, 1.0]]).expand(4, 6))


def permuted(net: Network, obs: State, order: list[int]) -> tuple[Network, State, list[int]]:
    """The same instance with store ``order[k]`` called ``k``, and where each edge went."""
    first = net.first_store
    name = {first + old: first + new for new, old in enumerate(order)} | {v: v for v in range(-1, first)}
    renamed = [(name[s], name[d]) for s, d in net.edges]
    place = sorted(range(len(renamed)), key=lambda i: (renamed[i][0] < 0, renamed[i]))
    changed = Network(
        net.echelons, net.warehouses, net.stores, tuple(renamed[i] for i in place),
        tuple(net.lead_times[i] for i in place), net.keeps_stock,
    )  # fmt: skip
    nodes = [*range(first), *(first + k for k in order)]
    axes = {"inventory": nodes, "holding": nodes, "lead_time": place, "edge_cost": place}
    return changed, {k: v[:, axes.get(k, order)] for k, v in obs.items()}, place


@pytest.mark.parametrize("net", [FAN, PASSING, PARTIAL], ids=["fan", "passing", "partial"])
def test_the_gnn_permutes_orders_with_the_stores(net: Network) -> None:
    torch.manual_seed(0)
    obs = observation(net)
    order = [2, 0, 1, 3][: net.stores]
    other, shuffled, place = permuted(net, obs, order)
    policy, twin = GNNPolicy(net, obs), GNNPolicy(other, shuffled)
    twin.load_state_dict(policy.state_dict())
    before, after = policy(obs), twin(shuffled)
    torch.testing.assert_close(after, before[:, place], rtol=1e-5, atol=1e-5)
    before, after = before.detach(), after.detach()
    warehouses = slice(-net.warehouses, None)
    torch.testing.assert_close(after[:, warehouses], before[:, warehouses], rtol=1e-5, atol=1e-5)
    assert float((before[:, : net.internal] - after[:, : net.internal]).abs().max()) > 1e-3, "nothing was permuted"


@pytest.mark.parametrize("cls", [VanillaPolicy, SymmetryAwarePolicy])
def test_networks_that_read_stores_in_order_do_not(cls: type[OrderPolicy]) -> None:
    torch.manual_seed(0)
    obs = observation(FAN)
    other, shuffled, place = permuted(FAN, obs, [2, 0, 1, 3])
    policy, twin = cls(FAN, obs), cls(other, shuffled)
    twin.load_state_dict(policy.state_dict())
    assert float((twin(shuffled) - policy(obs)[:, place]).detach().abs().max()) > 1e-3


def test_stores_ship_from_the_warehouses_they_are_linked_to() -> None:
    """Published code fills columns by the position among a store's links: a store of warehouse 1 alone drew on 0."""
    torch.manual_seed(0)
    obs = observation(PARTIAL)
    empty = torch.ones(5, PARTIAL.slots)
    empty[0, 0] = 0.0
    without_0 = GNNPolicy(PARTIAL, obs)(obs | {"inventory": obs["inventory"] * empty})
    assert bool((without_0[:, 0] == 0).all()), "warehouse 0 has nothing and ships"
    assert bool((without_0[:, [1, 2, 3]] > 0).all()), "warehouse 1 has stock and its stores get none"
    empty = torch.ones(5, PARTIAL.slots)
    empty[1, 0] = 0.0
    without_1 = GNNPolicy(PARTIAL, obs)(obs | {"inventory": obs["inventory"] * empty})
    assert bool((without_1[:, [1, 2, 3]] == 0).all())
    assert bool((without_1[:, 0] > 0).all())


def test_base_stock_levels_by_hand() -> None:
    obs = observation(STORE, 2)
    obs["inventory"] = torch.tensor([[[2.0, 1.0, 0.0, 1.0]], [[-30.0, 0.0, 0.0, 0.0]]])
    level = math.log1p(math.exp(10.0))
    policy = BaseStockPolicy(STORE, obs)
    torch.testing.assert_close(policy(obs), torch.tensor([[level - 4.0], [level + 30.0]]))
    capped = CappedBaseStockPolicy(STORE, obs)
    with torch.no_grad():
        capped.v.fill_(-5.0)
    cap = math.log1p(math.exp(5.0))
    torch.testing.assert_close(capped(obs), torch.tensor([[cap], [cap]]))
    obs["inventory"] = torch.full((2, 1, 4), 9.0)
    assert policy(obs).tolist() == [[0.0], [0.0]]


def test_echelon_stock_by_hand() -> None:
    obs = observation(SERIAL, 1)
    obs["inventory"] = torch.zeros(1, 4, 4)
    obs["inventory"][0, :, 0] = torch.tensor([3.0, 50.0, 0.0, -2.0])
    policy = EchelonStockPolicy(SERIAL, obs)
    s = math.log1p(math.exp(10.0))
    torch.testing.assert_close(policy.levels, torch.tensor([4 * s, 3 * s, 2 * s, s]))
    # positions from upstream: 51, 48, -2, -2; limited by the 3, 50 and 0 upstream; 4 s - 51 < 0
    expected = torch.tensor([[max(3 * s - 48.0, 0.0), 2 * s + 2.0, 0.0, 0.0]])
    torch.testing.assert_close(policy(obs), expected)
    with pytest.raises(ValueError, match="expected a chain"):
        EchelonStockPolicy(FAN, observation(FAN))


def test_just_in_time_orders_the_demand_it_will_meet() -> None:
    obs = observation(PARTIAL, 1)
    policy = JustInTimePolicy(PARTIAL, obs)
    assert policy.foresight == 6  # the longest way: warehouse 1 in 3 periods, then 2 to a store
    obs["inventory"] = torch.full((1, 5, PARTIAL.slots), 1e3)
    obs["future_demand"] = torch.arange(18.0).reshape(1, 3, 6)
    # stores 0, 1, 2 by warehouse 1 in 1, 2, 2 periods: D[1], D[2], D[2]; it orders D[4] + D[5] + D[5] of them
    assert policy(obs).tolist() == [[0.0, 1.0, 8.0, 14.0, 0.0, 4.0 + 11.0 + 17.0]]


def test_quantiles_are_interpolated_and_continued() -> None:
    quantiles = torch.arange(1, 20) / 20 * 10
    u = torch.tensor([0.0, 0.05, 0.33, 0.95, 0.99, 1.0])
    torch.testing.assert_close(interpolate(quantiles.expand(6, 19), u), u * 10)
    bent = torch.cat([quantiles[:18], torch.tensor([20.0])])
    assert float(interpolate(bent, torch.tensor(1.0))) == pytest.approx(31.0)  # 2 q19 - q18
    assert float(interpolate(bent, torch.tensor(0.925))) == pytest.approx(14.5)


def test_the_pinball_loss_is_least_at_the_quantiles() -> None:
    torch.manual_seed(0)
    net = QuantileForecaster(2, (1,))
    total = torch.rand(100_000, 1)

    def loss(shift: float) -> float:
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
            net.net[-1].bias.copy_(net.levels + shift)
            return float(net.pinball(torch.zeros(100_000, 2), torch.zeros(100_000, 1), total))

    # E = mean over u of u (1 - u) / 2 for a uniform variable at its own quantiles
    u = torch.arange(1, 20) / 20
    assert loss(0.0) == pytest.approx(float((u * (1 - u) / 2).mean()), rel=0.02)
    assert loss(0.0) < min(loss(0.05), loss(-0.05))


@pytest.mark.parametrize("rule", ["quantile_nv", "transformed_nv", "fixed_quantile", "returns_nv"])
def test_newsvendors_order_up_to_the_quantile_of_their_lead_time(rule: str) -> None:
    torch.manual_seed(0)
    obs = observation(STORE, 3, recorded=True)
    obs["lead_time"] = torch.tensor([[1.0], [2.0], [4.0]])
    obs["underage"], obs["holding"] = torch.full((3, 1), 3.0), torch.full((3, 1), 1.0)
    policy = NewsvendorPolicy(STORE, obs, rule)
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        bias = policy.forecaster.net[-1].bias.view(4, 19)
        bias.copy_(torch.arange(1, 5)[:, None] * 100 + torch.arange(1, 20))
    u = 0.75 if rule in ("quantile_nv", "returns_nv") else 0.5  # a network of zeros gives sigmoid(0)
    level = torch.tensor([[100.0], [200.0], [400.0]]) + 20 * u
    torch.testing.assert_close(policy(obs), level - obs["inventory"].sum(-1))
    obs["inventory"] = obs["inventory"] + 1000
    assert bool((policy(obs) < 0).all()) == (rule == "returns_nv")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert not any(name.startswith("forecaster") for name in trained)
    assert bool(trained) == (rule in ("transformed_nv", "fixed_quantile"))


def test_bad_input_is_refused_at_construction() -> None:
    for cls in (BaseStockPolicy, CappedBaseStockPolicy):
        with pytest.raises(ValueError, match=r"order from outside.*4 internal.*gnn for any network"):
            cls(FAN, observation(FAN))
    with pytest.raises(ValueError, match=r"DataDrivenPolicy.*without \['past_demand'"):
        DataDrivenPolicy(STORE, observation(STORE))
    with pytest.raises(ValueError, match=r"VanillaPolicy.*without \['mean'\]"):
        VanillaPolicy(FAN, observation(FAN, recorded=True))
    bare = {k: v for k, v in observation(FAN).items() if k not in ("mean", "std")}
    with pytest.raises(ValueError, match="mean and std, or past_demand"):
        GNNPolicy(FAN, bare)
    with pytest.raises(ValueError, match="rule: expected one of"):
        NewsvendorPolicy(STORE, observation(STORE, recorded=True), "nv")  # type: ignore[arg-type]
    for edges in ([(0, 5)], []):
        with pytest.raises(ValueError, match="expected edges between nodes"):
            EdgeNet(edges, 3, 2)
