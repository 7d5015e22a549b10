"""Compiled CPU graphs multiply large float32 matrices by oneDNN: a pass over the graph, and what its operator becomes.

Both are of the compiler's internals. Whoever compiles an update checks its first step against the eager one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.ir import FixedLayout, TensorBox
from torch._inductor.lowering import register_lowering
from torch._inductor.mkldnn_ir import LinearUnary
from torch.fx import Graph, Node

import ccrl.onednn  # noqa: F401  (defines the operator)

__all__ = ["OneDNNProducts"]

SMALLEST, NARROW, NARROWEST, MEMBERS = 2**20, 32, 8, 8
"""A product of so many multiplications (256 rows, layers of 64) takes as long either way; a narrow factor takes MKL as
long as one of 32 columns, unless it is very narrow. Batches of more members stay batches."""

_aten = torch.ops.aten


@register_lowering(torch.ops.ccrl.dense.default, type_promotion_kind=None)  # type: ignore[untyped-decorator]
def _lower(x: Any, weight: Any, bias: Any) -> Any:
    # the compiler's own lowering copies a transposed weight, for which oneDNN takes no longer
    x, weight = LinearUnary.require_contiguous(LinearUnary.realize_input(x)), LinearUnary.realize_input(weight)
    size = [*x.get_size()[:-1], weight.get_size()[0]]
    inputs, constants = [x, weight], [None, "none", [-1], ""]  # the bias is an input or a constant
    if bias is not None:
        constants = constants[1:]
        inputs.append(LinearUnary.require_contiguous(LinearUnary.realize_input(bias)))
    layout = FixedLayout(device=x.get_device(), dtype=x.get_dtype(), size=size)
    return TensorBox.create(LinearUnary(layout=layout, inputs=inputs, constant_args=constants))


class OneDNNProducts(CustomGraphPass):  # type: ignore[misc]
    """Replaces products of matrices, with a bias or without, and batches of few (the critics of an ensemble)."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if (found := _factors(node)) is not None:
                with graph.inserting_before(node):
                    node.replace_all_uses_with(_rewritten(graph, *found))
                graph.erase_node(node)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _factors(node: Node) -> tuple[Node, Node, Node | None] | None:
    """The two factors and the bias of a product that oneDNN takes less time for."""
    if node.target in (_aten.mm.default, _aten.bmm.default):
        (a, b), bias = node.args, None
    elif node.target in (_aten.addmm.default, _aten.baddbmm.default) and not node.kwargs:
        bias, a, b = node.args  # type: ignore[assignment]
    else:
        return None
    x, y = _value(a), _value(b)
    if any(v.dtype != torch.float32 or v.device.type != "cpu" for v in (x, y)):
        return None
    sizes = (x.shape[-2], x.shape[-1], y.shape[-1])
    work = 1
    for size in sizes:
        work *= max(size, NARROW)
    if work <= SMALLEST or min(sizes) < NARROWEST or (x.dim() == 3 and x.shape[0] > MEMBERS):
        return None
    row = (sizes[2],) if x.dim() == 2 else (x.shape[0], 1, sizes[2])
    if bias is not None and tuple(_value(bias).shape) != row:
        return None
    return a, b, bias  # type: ignore[return-value]


def _rewritten(graph: Graph, a: Node, b: Node, bias: Node | None) -> Node:
    if _value(a).dim() == 2:
        return _product(graph, a, b, bias)

    def member(x: Node, i: int) -> Node:
        return _call(graph, _aten.select.int, x, 0, i)

    rows = []
    for i in range(_value(a).shape[0]):
        shift = None if bias is None else member(member(bias, i), 0)
        row = _product(graph, member(a, i), member(b, i), shift)
        rows.append(_call(graph, _aten.unsqueeze.default, row, 0))
    return _call(graph, _aten.cat.default, rows)


def _product(graph: Graph, a: Node, b: Node, bias: Node | None) -> Node:
    """``a @ b + bias``. The operator copies a first factor that is transposed, so that (as a weight's gradient is the
    product of two transposed ones) it takes whichever is cheaper, the product or its transpose."""

    def turned(x: Node) -> Node:
        return _call(graph, _aten.permute.default, x, [1, 0])

    x, y = _value(a), _value(b)
    smaller = y.t().is_contiguous() or x.shape[0] > y.shape[1]
    if bias is None and smaller and not x.is_contiguous():
        return turned(_call(graph, torch.ops.ccrl.dense.default, turned(b), a, None))
    return _call(graph, torch.ops.ccrl.dense.default, a, turned(b), bias)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node, values = graph.call_function(target, args), [_value(x) for x in args]
    mode = detect_fake_mode(values)
    assert mode is not None
    with mode:
        node.meta["val"] = target(*values)
    return node


def _value(x: Any) -> Any:
    """What a node computes, as a tensor without numbers."""
    if isinstance(x, list):
        return [_value(y) for y in x]
    value: Tensor | int | None = x.meta["val"] if isinstance(x, Node) else x
    return value
