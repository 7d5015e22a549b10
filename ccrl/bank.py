"""Named parameter versions of one module: live, old, ref, target, ema, teacher/k."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Bank"]


class Bank:
    """Frozen copies of ``live`` (the module being trained), checkpointed with the agent.

    >>> bank = Bank(nn.Linear(1, 1))
    >>> bank.refresh("target")             # copy
    >>> bank.refresh("target", mix=0.005)  # Polyak step
    """

    def __init__(self, live: nn.Module) -> None:
        self.live = live
        self._versions: dict[str, nn.Module] = {}
        self._adopted: set[str] = set()

    def policy(self, version: str | Tensor = "live") -> nn.Module:
        """The module of a version. A flat vector ``[n]`` (order of ``live.parameters()``) gives a module at those
        parameters, valid until the next call with a vector."""
        if isinstance(version, Tensor):
            self.refresh("_vector")
            module = self._versions["_vector"]
            _load_flat(module, version)
            return module
        if version == "live":
            return self.live
        if version not in self._versions:
            raise KeyError(f"bank: no version {version!r}; there are {['live', *self.names()]}")
        return self._versions[version]

    def names(self) -> Sequence[str]:
        """Frozen versions, without ``live``."""
        return [n for n in self._versions if not n.startswith("_")]

    def adopt(self, version: str, module: nn.Module) -> None:
        """``version`` is ``module``, which its owner refreshes and saves (a copy here would cost the memory of all of
        ``live``)."""
        self._versions[version] = module
        self._adopted.add(version)

    @torch.no_grad()
    def refresh(
        self,
        version: str,
        source: str = "live",
        mix: float | Tensor = 1.0,
        prefixes: Sequence[str] | None = None,
    ) -> None:
        """``version <- (1 - mix) version + mix source`` in place; created on first use. Buffers are copied.

        :param prefixes: move only the parameters and buffers whose names start with one of them; None: all.
        """
        if version == "live":
            raise ValueError("bank: 'live' is the module being trained; refresh a frozen version")
        if version in self._adopted:
            raise ValueError(f"bank: {version!r} is somebody else's, who refreshes it")
        module = self.policy(source)
        if version not in self._versions:
            frozen = copy.deepcopy(module)
            # deepcopy keeps parameters that are views of one flat vector apart, and copies no gradients
            for p in frozen.parameters():
                p.requires_grad_(False)
            self._versions[version] = frozen.eval()
            return
        target = self._versions[version]
        old, new = (_chosen(m.named_parameters(), prefixes) for m in (target, module))
        if not old:
            pass  # a rule without parameters; foreach refuses empty lists
        elif isinstance(mix, Tensor):
            for x, y in zip(old, new):
                x.lerp_(y, mix.to(x))
        elif mix < 1.0:
            torch._foreach_lerp_(old, new, mix)
        else:
            torch._foreach_copy_(old, new)
        for buffer, source_buffer in zip(*(_chosen(m.named_buffers(), prefixes) for m in (target, module))):
            buffer.copy_(source_buffer)

    def state_dict(self) -> dict[str, Any]:
        return {n: self._versions[n].state_dict() for n in self.names() if n not in self._adopted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            self.refresh(name)
            self._versions[name].load_state_dict(values)


def _chosen(named: Iterable[tuple[str, Tensor]], prefixes: Sequence[str] | None) -> list[Tensor]:
    return [x for name, x in named if prefixes is None or name.startswith(tuple(prefixes))]


@torch.no_grad()
def _load_flat(module: nn.Module, flat: Tensor) -> None:
    """Copy, where ``vector_to_parameters`` would alias: the next refresh would write into the caller's vector."""
    params = list(module.parameters())
    sizes = [p.numel() for p in params]
    if flat.shape != (sum(sizes),):
        raise ValueError(f"bank: expected a flat vector of {sum(sizes)} parameters, got shape {tuple(flat.shape)}")
    for p, piece in zip(params, torch.split(flat, sizes)):
        p.copy_(piece.view_as(p))
