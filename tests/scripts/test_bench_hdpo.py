"""The two sides of ``bench hdpo`` train the same thing."""

from __future__ import annotations

import pytest
import torch

from scripts.bench import hdpo


@pytest.mark.parametrize("name", list(hdpo.INSTANCES))
def test_both_ways_of_unrolling_give_the_same_cost_and_gradient(name: str) -> None:
    sides = hdpo.Sides(hdpo.Config(n_train=6, batch_size=6), name)
    ours = sides.agent.unrolled(sides.agent.data, frozenset({"cost"}))["cost"].sum()
    batch = next(iter(sides.theirs.loader))  # shuffled: the sum is the same
    theirs = sides.theirs.cost(batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(total, list(net.parameters()))])
        for total, net in ((ours, sides.agent.policy.net), (theirs, sides.theirs.net))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
