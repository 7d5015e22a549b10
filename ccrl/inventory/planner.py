"""The planner's policy: order-up-to levels that a graph network moves, beginning as the best rule of each product.

    S_n = relu( level_n (l_n + 1) / (l_n^0 + 1) + lift_n promotions_n + c_n o_n )
    c_n = usual demand of node n over l_n + 1 periods;  promotions_n: those planned in these periods
    q_e = share_e relu(S_n - position_n),  0 where that is less than the gap;   stock is shared in proportion

``level``, ``gap``, ``lift`` and ``share`` are those of a rule tuned on the training periods
(:mod:`ccrl.inventory.rules`); ``o``, the outputs of an :class:`~ccrl.policies.gnn.EdgeNet`, are 0 at the start, so the
policy begins as that rule. All inputs and outputs are in units of the product's usual demand (scaling by series), and
the lead times ``l`` are inputs: one policy answers for others than ``l^0``, which it was tuned at.

Source: the topology-aligned network and the pathwise gradient are HDPO's (arXiv 2306.11246); levels as outputs and the
start at a rule are ours. The gap is hard in the forward pass; its derivative is that of a sigmoid (straight through).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.inventory.functional_env import FunctionalEnv, Network, State
from ccrl.inventory.policies import OrderPolicy
from ccrl.inventory.rules import Rule, RuleName, node_demand, positions, promotions, ration, tune
from ccrl.policies.gnn import EdgeNet

__all__ = ["PlannerPolicy", "ScaledBySeries"]

_DESIGNATED = 3.0
"""Logit of the rule's supplier against the others': 95 % of the orders of a node with two."""


class PlannerPolicy(OrderPolicy):
    """See the head of this file.

    Args:
        network, like: as for every policy; ``like`` shows ``scale`` and ``series`` (a task of recorded demand with
            constants by series).
        series: how many products there are.
        gated: orders have a fixed cost or a minimum, so nodes wait until an order pays.
        rounds: rounds of message passing; ``None``: two, or none of use for stores alone: one.
        hidden: width of the network.
    """

    reads = (
        "past_demand", "scale", "series", "season", "days_from_christmas", "holding", "underage", "lead_time",
        "edge_cost",
    )  # fmt: skip
    level: Tensor
    gap: Tensor
    lift: Tensor
    share: Tensor
    lead: Tensor
    usual: Tensor
    fitted: Tensor

    def __init__(
        self, network: Network, like: State, series: int, gated: bool, rounds: int | None = None, hidden: int = 32
    ) -> None:
        super().__init__(network, like)
        edges = len(network.edges)
        self.gated, self.planned = gated, "planned" in like
        for name, shape in (
            ("level", (series, network.nodes)), ("gap", (series, network.nodes)), ("lift", (series, network.nodes)),
            ("share", (series, edges)), ("lead", (series, edges)), ("usual", (series, network.nodes)), ("fitted", ()),
        ):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        customers = [(node, -1) for node in range(network.first_store, network.nodes)]
        rows = len(like["scale"])
        usual, share = like["scale"].new_ones(rows, network.nodes), like["scale"].new_ones(rows, edges)
        width = self._features(like, usual, share).shape[2]
        rounds = (2 if network.internal else 1) if rounds is None else rounds
        self.net = EdgeNet(
            [*network.edges, *customers], network.nodes, width, hidden=hidden, rounds=rounds, unread=len(customers)
        )
        # what an edge carries: the level of its target (averaged over a node's suppliers), its gap, its share
        self.out = nn.Linear(hidden, 3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.own = nn.Parameter(torch.zeros(edges, 3))
        del self.net.head  # never read; weights without a gradient would be refused
        several = torch.bincount(self.target, minlength=network.nodes) > 1
        self.several = bool(several.any())

    @classmethod
    def for_env(
        cls, env: FunctionalEnv, like: State, rounds: int | None = None, hidden: int | None = None
    ) -> PlannerPolicy:
        """For the products of ``env``.

        Raises:
            ValueError: an environment without recorded products.
        """
        if env.available is None or "series" not in like:
            raise ValueError(
                "planner: expected recorded demand with constants by series (ccrl/InventoryOwn-v0), got another task; "
                "choose another policy"
            )
        terms = getattr(getattr(env, "task", None), "by_series", {})
        gated = any(bool((terms[k] > 0).any()) for k in ("fixed_cost", "minimum") if k in terms)
        series = env.split("test").available
        assert series is not None
        return cls(env.network, like, series, gated, rounds, 32 if hidden is None else hidden)

    @torch.no_grad()
    def begin(self, env: FunctionalEnv, scenarios: State) -> Rule:
        """Start at the rule that costs least on these scenarios: base stock, or (s, S) where the policy is gated, with
        a lift by planned promotions where there are some.

        Args:
            scenarios: one per product, in the order of the products.
        """
        scenarios = {k: v.cpu() for k, v in scenarios.items()}
        names: tuple[RuleName, RuleName] = ("s_S", "promotion_s_S")
        if not self.gated:
            names = ("base_stock", "promotion_base_stock")
        rule = tune(names[self.planned], env, scenarios, fixed_cost=self.gated)
        seen = env.observe(env.initial(scenarios))
        usual, _, _ = node_demand(seen, self.network)
        lift = torch.zeros_like(rule.level) if rule.lift is None else rule.lift
        found = (rule.level, rule.gap, lift, rule.share, seen["lead_time"], usual)
        for name, value in zip(("level", "gap", "lift", "share", "lead", "usual"), found, strict=True):
            getattr(self, name).copy_(value)
        self.fitted.fill_(1.0)
        return rule

    def forward(self, obs: State) -> Tensor:
        network, inventory = self.network, obs["inventory"]
        rows = obs["series"].long()
        lead, nominal = obs["lead_time"].to(inventory.dtype), self.lead[rows]
        logits = _DESIGNATED * self.share[rows]
        share = self._shares(logits) if self.several else self.share[rows]
        usual = self.usual[rows].clamp_min(1e-6)
        weight = F.pad(0.25 * lead, (0, network.stores))  # the edges to customers, whose lead time is 0
        out = self.out(self.net.embed(self._features(obs, usual, share), weight)) + self.own
        if self.several:
            share = self._shares(logits + out[..., 2])
        span = 1.0 + self._at_nodes(lead, share)
        level = self.level[rows] * span / (1.0 + self._at_nodes(nominal, self.share[rows]))
        if self.planned:
            level = level + self.lift[rows] * promotions(obs, network)
        level = F.relu(level + usual * span * self._at_nodes(out[..., 0], share))
        wanted = F.relu(level - positions(inventory, share, network))
        if self.gated:
            gap = F.relu(self.gap[rows] + usual * self._at_nodes(out[..., 1], share))
            soft = torch.sigmoid((wanted - gap) / (0.25 * gap + 0.5 * usual + 0.05))
            wanted = wanted * ((wanted >= gap).to(soft.dtype) + (soft - soft.detach()))
        return ration(wanted[:, self.target] * share, inventory, network)

    def _shares(self, logits: Tensor) -> Tensor:
        """``[B, E]``: the softmax of the edges into each node."""
        weight = (logits - logits.detach().amax(1, keepdim=True)).exp()
        total = weight.new_zeros(len(weight), self.network.nodes).index_add(1, self.target, weight)
        return weight / total[:, self.target]

    def _at_nodes(self, per_edge: Tensor, share: Tensor) -> Tensor:
        """``[B, N]``: the mean over the edges into each node, weighted by ``share`` ``[B, E]``."""
        return per_edge.new_zeros(len(per_edge), self.network.nodes).index_add(1, self.target, per_edge * share)

    def _features(self, obs: State, usual: Tensor, share: Tensor) -> Tensor:
        """``[B, N, F]``: stocks, history and plans in units of the node's usual demand, costs, season."""
        network, inventory = self.network, obs["inventory"]
        first = network.first_store
        past = obs["past_demand"] / usual[:, first:, None]
        stores = [past, past.mean(2, keepdim=True), (past == 0).to(past.dtype).mean(2, keepdim=True)]
        if "planned" in obs:
            stores.append(obs["planned"])
        if "ages" in obs:
            stores.append(obs["ages"] / usual[:, first:, None])
        margin = obs["underage"] / (obs["underage"] + obs["holding"][:, first:] + 1e-6)
        stores.append(torch.stack((margin, (0.1 + obs["scale"]).log()), -1))
        per_store = torch.cat([part.to(inventory.dtype) for part in stores], -1)
        rows = [F.pad(per_store, (0, 0, first, 0))]
        if first:  # a warehouse sees the mean of its stores, weighted by their usual demand
            inner = network.internal
            target = self.target[:inner]
            flow = (share[:, :inner] * usual[:, target]).unsqueeze(-1).to(inventory.dtype)
            source = self.source[:inner]
            total = inventory.new_zeros(len(inventory), first, 1).index_add(1, source, flow)
            mean = inventory.new_zeros(len(inventory), first, per_store.shape[2])
            mean = mean.index_add(1, source, flow * per_store[:, target - first]) / total.clamp_min(1e-6)
            rows = [torch.cat((mean, per_store), 1)]
        rows.append(inventory / usual.unsqueeze(-1))
        position = positions(inventory, share, network) / usual
        kind = torch.zeros_like(position)
        kind[:, :first] = 1.0
        rows.append(torch.stack((position, kind), -1))
        season = torch.cat((obs["season"], obs["days_from_christmas"] / 60.0), 1).to(inventory.dtype)
        near = torch.exp(-0.5 * (season[:, -1:] * 2.0).square())  # the days around Christmas, which a line cannot show
        season = torch.cat((season[:, :-1], season[:, -1:].clamp(-1.5, 1.5), near), 1)
        rows.append(season.unsqueeze(1).expand(-1, network.nodes, -1))
        return torch.cat(rows, -1).clamp(-20.0, 20.0)


class ScaledBySeries(OrderPolicy):
    """``policy`` in units of each product's usual demand: stocks and past demand come in divided by it, orders go out
    times it. Where products differ a hundredfold, raw inputs leave a network to the fastest movers.

    Its observations hold ``scale`` ``[B, K]``, whose mean over the stores is the unit.
    """

    def __init__(self, policy: OrderPolicy, like: State) -> None:
        super().__init__(policy.network, like)
        self.need(like, "scale")
        self.policy = policy
        self.foresight = policy.foresight

    def forward(self, obs: State) -> Tensor:
        unit = obs["scale"].mean(1)
        scaled = {k: obs[k] / unit[:, None, None] for k in ("inventory", "past_demand", "future_demand") if k in obs}
        orders: Tensor = self.policy(obs | scaled)
        return orders * unit[:, None]
