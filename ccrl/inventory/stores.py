"""The cost of stores alone under the vanilla policy, and its gradient, in one pass of compiled C++ (``stores.cpp``).

Under autograd a period is some ninety small operations forward and backward. Scenarios do not meet, so here a block of
as many as a processor's vector holds goes through all periods at once, forward and then backward, and what it needs
stays in the cache. The adjoint of a period, with ``l'`` the derivative of the cost to come by the next stock, ``l`` by
this one, ``w`` that of the loss by the cost and ``y = x_0 - D``::

    of the order  = l'[k, L_k - 1], times softplus'(o_k + 1) that of the output; from there through the net
    l[k, 0]       = [y >= 0 or backlogged] l'[k, 0] + w (h_k [y >= 0] - p_k [y <= 0]) + what comes out of the net
    l[k, j]       = l'[k, j - 1] + what comes out of the net

Source: HDPO, arXiv 2306.11246, equation 1; the derivation is the chain rule on ``docs/hdpo.md``'s dynamics.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.inventory.functional_env import FunctionalEnv, State
from ccrl.inventory.policies import VanillaPolicy
from ccrl.native import library

__all__ = ["StoresAlone", "StoresKernel"]

_SOURCE = Path(__file__).with_name("stores.cpp")
_REAL = {torch.float32: "float", torch.float64: "double"}
_ALIGNED = 64
"""Bytes: the longest vectors are loaded from such addresses."""


@dataclass(frozen=True)
class StoresAlone:
    """Dynamics of which nothing but this is known: ``post = x_0 - D``, cost ``p max(-post, 0) + h max(post, 0)``, the
    shift of stock, and orders that enter at their lead times. What ``FunctionalEnv.stores_alone()`` returns, a method
    that environments may have, where this is all that they do; else None."""

    holding: tuple[float, ...]
    """``h``, per store."""
    underage: tuple[float, ...]
    """``p``, per store."""
    lost: bool
    """Demand that is not served is lost (``post`` then is at least 0), or waits."""


class _Problem(ctypes.Structure):
    """``problem`` of stores.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("scenarios", "periods", "stores", "slots", "layers", "lost")),
        *((name, ctypes.c_void_p) for name in ("sizes", "used", "lead", "weights", "holding", "underage")),
        *((name, ctypes.c_void_p) for name in ("stock", "demand")),
    ]  # fmt: skip


class StoresKernel:
    """``kernel(scenarios)``: the cost ``[T, B]`` of :class:`~ccrl.inventory.pathwise.Unrolled`, differentiable with
    respect to the policy's parameters (once: its gradient has none).

    Work is cut by blocks of scenarios over ``torch.get_num_threads()`` threads; costs do not depend on their number,
    gradients only by the order of a sum.

    :raises ValueError: for an environment that is more than stores alone, another policy, or another device.
    """

    def __init__(self, env: FunctionalEnv, policy: nn.Module) -> None:
        dynamics: Callable[[], StoresAlone | None] = getattr(env, "stores_alone", lambda: None)
        found = dynamics()
        if found is None:
            raise ValueError(
                "compile='kernel': expected stores alone with a known law of demand, no warehouse, no terms of "
                f"ordering, got {env.network}; take compile='period'"
            )
        layers = list(policy.net) if type(policy) is VanillaPolicy else []
        if not layers or [type(x) for x in layers] != [nn.Linear, nn.ELU] * (len(layers) // 2) + [nn.Linear]:
            raise ValueError(
                f"compile='kernel': expected the vanilla policy, got {type(policy).__name__}; take compile='period'"
            )
        self.env, self.policy, self.dynamics = env, policy, found
        self.sizes = [layers[0].in_features, *(x.out_features for x in layers if isinstance(x, nn.Linear))]
        self.parameters = [p for x in layers for p in x.parameters()]
        device = self.parameters[0].device
        if device.type != "cpu":
            raise ValueError(f"compile='kernel': expected the device cpu, got {device}; take compile='period'")

    def __call__(self, scenarios: State) -> Tensor:
        cost: Tensor = _Cost.apply(self, scenarios, *self.parameters)  # type: ignore[no-untyped-call]
        return cost


class _Horizon:
    """One batch of scenarios: the tensors that stores.cpp reads, alive as long as it may."""

    def __init__(self, kernel: StoresKernel, scenarios: State) -> None:
        net, parameters = kernel.env.network, kernel.parameters
        self.real = parameters[0].dtype
        self.library = _functions(self.real)
        found = kernel.dynamics
        demand = kernel.env.noise(scenarios).to(self.real)
        self.shape = (len(demand), demand.shape[1])
        used = kernel.policy.used
        assert isinstance(used, Tensor)
        self.tensors = [
            torch.tensor(kernel.sizes), used, torch.tensor(net.lead_times),
            torch.cat([p.detach().reshape(-1) for p in parameters]),
            torch.tensor(found.holding, dtype=self.real), torch.tensor(found.underage, dtype=self.real),
            scenarios["inventory"].to(self.real).contiguous(), demand,
        ]  # fmt: skip
        numbers = (demand.shape[1], len(demand), net.stores, net.slots, len(kernel.sizes) - 1, int(found.lost))
        self.problem = _Problem(*numbers, *(x.data_ptr() for x in self.tensors))
        self.lanes = self.library.lanes()
        self.blocks = -(-demand.shape[1] // self.lanes)
        self.keep = _aligned(self.blocks * self.size("kept"), self.real)

    def size(self, name: str) -> int:
        found: int = getattr(self.library, name)(ctypes.byref(self.problem))
        return found

    def run(self, name: str, arguments: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """``name`` on all blocks, cut over the threads, each with its own ``arguments``."""
        threads = min(torch.get_num_threads(), self.blocks)
        cuts = [self.blocks * i // threads for i in range(threads + 1)]
        given = [arguments() for _ in range(threads)]

        def part(i: int) -> None:
            tensors = [ctypes.c_void_p(x.data_ptr()) for x in given[i]]
            blocks = ctypes.c_int64(cuts[i]), ctypes.c_int64(cuts[i + 1])
            getattr(self.library, name)(ctypes.byref(self.problem), *blocks, *tensors)

        if threads == 1:
            part(0)
        else:
            list(_pool(threads).map(part, range(threads)))
        return given


class _Cost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: StoresKernel, scenarios: State, *parameters: Tensor) -> Tensor:
        horizon = _Horizon(kernel, scenarios)
        cost = torch.empty(horizon.shape, dtype=horizon.real)
        horizon.run("forward", lambda: (horizon.keep, cost))
        ctx.horizon, ctx.shapes = horizon, [p.shape for p in parameters]
        return cost

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, towards: Tensor) -> tuple[Tensor | None, ...]:
        horizon: _Horizon = ctx.horizon
        towards = towards.contiguous()
        count = sum(shape.numel() for shape in ctx.shapes)
        room = horizon.size("room")

        def own() -> tuple[Tensor, ...]:
            gradient = _aligned(count * horizon.lanes, horizon.real).zero_()
            return horizon.keep, towards, gradient, _aligned(room, horizon.real)

        found = [gradient for _, _, gradient, _ in horizon.run("backward", own)]
        flat = torch.stack(found).view(len(found), count, horizon.lanes).sum((0, 2))
        pieces = flat.split([shape.numel() for shape in ctx.shapes])
        return (None, None, *(x.view(shape) for x, shape in zip(pieces, ctx.shapes)))


def _functions(real: torch.dtype) -> ctypes.CDLL:
    if real not in _REAL:
        raise ValueError(f"compile='kernel': expected parameters in {sorted(map(str, _REAL))}, got {real}")
    found = library(_SOURCE, _REAL[real])
    for name in ("lanes", "kept", "room"):
        getattr(found, name).restype = ctypes.c_int64
    return found


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "stores")


def _aligned(count: int, real: torch.dtype) -> Tensor:
    size = real.itemsize
    whole = torch.empty(count + _ALIGNED // size, dtype=real)
    start = -whole.data_ptr() % _ALIGNED // size
    return whole[start : start + count]
