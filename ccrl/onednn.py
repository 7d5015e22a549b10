"""Matrix products of float32 by oneDNN, which on CPUs that are not Intel's takes half the time of the usual ones.

PyTorch multiplies float32 matrices on CPUs with MKL, which on other makers' processors leaves their wider registers
idle; oneDNN, which every build of PyTorch for x86 has beside it, does not ask whose processor it is. Sums are taken in
another order, so numbers differ from PyTorch's own in the last digits; they are the same at every call.

Compiled updates take it through :func:`graph_options`, whatever module a product comes from, those of gradients
included; eager code through ``ccrl.policies.dense``.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

__all__ = ["AVAILABLE", "graph_options", "onednn_linear"]

AVAILABLE = (
    platform.machine().lower() in ("x86_64", "amd64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether this build of PyTorch has the operator."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` of float32 on a CPU, without a derivative."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


# compiled graphs take oneDNN's operator for weights that never change, and refuse it for others: it needs another name
_LIBRARY = torch.library.Library("ccrl", "FRAGMENT")
_LIBRARY.define("dense(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("dense", onednn_linear, "CPU")


@torch.library.register_fake("ccrl::dense", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _like(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def graph_options(device: torch.device) -> dict[str, Any]:
    """Options of ``torch.compile`` for an update: only shapes and types are checked at a call, code is C++ on a CPU,
    and so are its large products oneDNN's, where that is available (with torch 2.13 or later)."""
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    options["cpp_wrapper"] = device.type == "cpu"  # in Python it takes a fifth of a small graph's time
    if device.type == "cpu" and AVAILABLE and TorchVersion(torch.__version__) >= "2.13":
        from ccrl.onednn_graph import OneDNNProducts  # imports half of the compiler

        options["post_grad_custom_pre_pass"] = OneDNNProducts()
    return options
