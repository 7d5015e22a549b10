"""Recurrent layers over time-major sequences whose episodes may end anywhere."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Memory"]


class Memory(nn.Module):
    """A GRU or LSTM layer ``[T, B, D] -> [T, B, width]`` that forgets at episode starts.

    The state is one tensor ``[B, state_size]`` (an LSTM's ``h`` and ``c`` side by side), 0 at an episode's start: so
    buffers, checkpoints and ``predict`` carry it without knowing the layer.

    :param orthogonal: orthogonal weights and zero biases; else PyTorch's own initialisation.
    """

    def __init__(self, kind: Literal["gru", "lstm"], inputs: int, width: int, orthogonal: bool = True) -> None:
        super().__init__()
        if kind not in ("gru", "lstm") or width < 1:
            raise ValueError(f"Memory: expected gru or lstm of at least one unit, got {kind!r} of {width}")
        self.kind, self.width = kind, width
        self.state_size = width if kind == "gru" else 2 * width
        cell = nn.GRUCell if kind == "gru" else nn.LSTMCell
        self.cell: nn.RNNCellBase = cell(inputs, width)
        if orthogonal:
            for name, p in self.cell.named_parameters():
                nn.init.zeros_(p) if "bias" in name else nn.init.orthogonal_(p)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """``(output [B, width], next state)`` from ``x [B, D]``."""
        own = self.cell
        weights = (own.weight_ih, own.weight_hh, own.bias_ih, own.bias_hh)
        if self.kind == "gru":
            out = torch.gru_cell(x, state, *weights)
            return out, out
        h, c = torch.lstm_cell(x, list(torch.split(state, self.width, -1)), *weights)
        return h, torch.cat([h, c], -1)

    def forward(self, x: Tensor, state: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``[T, B, width]`` and the states after every step ``[T, B, state_size]``.

        :param state: ``[B, state_size]`` before the first row.
        :param first: ``[T, B]`` bool, rows that begin an episode: the state before them is 0.
        """
        outputs, states = list[Tensor](), list[Tensor]()
        for row, starts in zip(x.unbind(0), first.unsqueeze(-1).unbind(0)):
            out, state = self.step(row, state.masked_fill(starts, 0.0))
            outputs.append(out)
            states.append(state)
        out = torch.stack(outputs)
        return out, out if self.kind == "gru" else torch.stack(states)
