"""A trained policy as one file that runs without this package: ONNX or TorchScript.

The file holds what stands between a raw observation and the action that is executed: the normaliser with its statistics
frozen, the actor's encoders and network, the mode of the distribution, and the map onto the Box. Inputs are one tensor
``[N, ...]`` per observation key that the actor reads, with any ``N``; a policy with a memory also takes ``state``
``[N, S]`` (zeros where an episode begins) and returns ``next_state``.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from ccrl.batched_env import Tree
from ccrl.packages import require
from ccrl.policies.acting import has_memory
from ccrl.policies.observations import observation_spaces

__all__ = ["Deployed", "Format", "export", "largest_difference"]

Format = Literal["onnx", "torchscript"]

FACTS = "ccrl.json"
"""Name under which a file says what it is."""


class Deployed(nn.Module):
    """``(observation of each key ..., [state]) -> (action, [next_state])``, deterministic.

    :param policy: with the members of ``ccrl.policies.Policy``; what is kept is a copy on the CPU, without the critic
        where the policy can be had without (``without_critic``).
    :param observation_space: of the environment it was trained on.
    """

    def __init__(self, policy: Any, observation_space: gym.Space[Any]) -> None:
        super().__init__()
        own = policy.without_critic() if hasattr(policy, "without_critic") else copy.deepcopy(policy)
        self.policy = own.cpu().eval().requires_grad_(False)
        spaces = observation_spaces(observation_space)
        read = policy.observed("actor") if hasattr(policy, "observed") else list(spaces)
        self.spaces = {key: spaces[key] for key in read}
        self.single = not isinstance(observation_space, gym.spaces.Dict)
        self.state_size = int(self.policy.initial_state(1).shape[1]) if has_memory(self.policy) else 0

    @property
    def inputs(self) -> list[str]:
        """Names in order: observation keys, then ``state``."""
        return [*self.spaces, *(["state"] if self.state_size else [])]

    @property
    def outputs(self) -> list[str]:
        """Names in order."""
        return ["action", *(["next_state"] if self.state_size else [])]

    def examples(self, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of ``rows`` rows, drawn from the spaces."""
        found: list[Tensor] = []
        for space in map(copy.deepcopy, self.spaces.values()):
            space.seed(seed)
            drawn = torch.from_numpy(np.stack([np.asarray(space.sample()) for _ in range(rows)]))
            found.append(drawn.float() if drawn.is_floating_point() else drawn)
        if self.state_size:
            generator = torch.Generator().manual_seed(seed)
            found.append(torch.randn((rows, self.state_size), generator=generator).tanh())
        return tuple(found)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, inputs))
        state = named.pop("state") if self.state_size else None
        obs: Tree = next(iter(named.values())) if self.single else named
        out = self.policy.act(obs, None, state)
        action = self.policy.to_env(out["action"])
        return (action, out["state"]) if self.state_size else (action,)


def export(deployed: Deployed, path: Path, format: Format, facts: Mapping[str, Any]) -> None:
    """Write the file, with ``facts`` and the inputs' and outputs' shapes in it as JSON (ONNX: the metadata property
    ``ccrl``; TorchScript: the extra file ``ccrl.json``).

    :raises ImportError: ONNX without the extra ``export``.
    :raises ValueError: an observation key called ``state`` beside a memory's state.
    """
    if deployed.state_size and "state" in deployed.spaces:
        raise ValueError("export: expected an observation without a key 'state', which is the memory's; rename it")
    examples = deployed.examples(3)
    with torch.no_grad():
        results = deployed(*examples)
    text = json.dumps(dict(facts) | {
        "inputs": {name: _describe(x) for name, x in zip(deployed.inputs, examples)},
        "outputs": {name: _describe(x) for name, x in zip(deployed.outputs, results)},
    })  # fmt: skip
    # Both are traced: the newer exporter of torch takes no GRU or LSTM cell with a free batch size (torch 2.13)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format == "torchscript":
            traced = torch.jit.trace(deployed, examples, check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(traced, str(path), _extra_files={FACTS: text})
            return
        onnx = require("onnx", "export")
        names = [*deployed.inputs, *deployed.outputs]
        torch.onnx.export(
            deployed, examples, str(path), dynamo=False, input_names=deployed.inputs, output_names=deployed.outputs,
            dynamic_axes={name: {0: "N"} for name in names},
        )  # fmt: skip
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"ccrl": text})
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def largest_difference(deployed: Deployed, path: Path, format: Format, rows: int = 64, seed: int = 1) -> float:
    """The largest ``|file - policy| / max(1, |policy|)`` over all outputs, on inputs that were not traced with and of
    another batch size.

    :raises ValueError: the file does not run on them: the policy's own code holds the batch size as a number.
    """
    examples = deployed.examples(rows, seed)
    with torch.no_grad():
        expected = deployed(*examples)
        try:
            found = _run(deployed, path, format, examples)
        except Exception as error:  # each runtime has its own
            raise ValueError(
                f"export: expected a file that takes {rows} rows as well as the 3 it was traced with, got one that "
                "does not: the policy's code turns the batch size into a Python number; keep it in tensors"
            ) from error
    if any(a.shape != b.shape for a, b in zip(found, expected)):
        shapes = [tuple(a.shape) for a in found]
        raise ValueError(f"export: expected outputs of {rows} rows, got {shapes}; keep the batch size in tensors")
    gaps = [(a.double() - b.double()).abs() / b.double().abs().clamp_min(1.0) for a, b in zip(found, expected)]
    return max(float(gap.max()) for gap in gaps)


def _run(deployed: Deployed, path: Path, format: Format, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    if format == "torchscript":
        return list(torch.jit.load(str(path))(*inputs))  # type: ignore[no-untyped-call]
    session = require("onnxruntime", "export").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {name: x.numpy() for name, x in zip(deployed.inputs, inputs)}
    return [torch.from_numpy(x) for x in session.run(deployed.outputs, feed)]


def _describe(x: Tensor) -> dict[str, Any]:
    return {"shape": ["N", *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
