"""Gradient steps per second of TD3+BC and IQL, beside plain PyTorch as single-file implementations write it, and beside
the matrix products alone.

The plain loop has fused Adam, keeps its data on the device, draws indices with ``torch.randint`` and reads nothing back
to the host: what is left is eager dispatch. Networks, batch and arithmetic are the same. The floor is the time of the
matrix products that a step cannot do without, each called by itself on tensors that are there. All three take turns;
ratios are medians over the rounds. ``--cpu-time`` counts this process's time, which other processes disturb less.

    python scripts/bench offline --hidden 256 256 --batch-size 256
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.offline.iql import IQL
from agents.offline.td3_bc import TD3BC
from ccrl.offline import Dataset, from_arrays
from ccrl.settings import Count, Settings
from ccrl.testing.agent_contract import SpacesEnv

__all__ = ["Config", "main"]


@dataclass(frozen=True)
class Config(Settings):
    """Sizes are those of Hopper."""

    agents: tuple[Literal["td3_bc", "iql"], ...] = ("td3_bc", "iql")
    """These are measured."""
    hidden: tuple[Count, ...] = (256, 256)
    """These are the widths of the hidden layers."""
    batch_size: Count = 256
    """A gradient step reads this many transitions."""
    updates: Count = 400
    """So many gradient steps are timed in a round, after as many as compiling takes."""
    rounds: Count = 7
    """Ours, plain PyTorch and the products take so many turns."""
    cpu_time: bool = False
    """The time of this process is counted in place of the clock's."""
    rows: Count = 100_000
    """The data set has so many transitions."""
    device: str = "cpu"
    """Networks and data are on this device."""


def main(config: Config) -> list[dict[str, Any]]:
    """Measure; print a line per agent."""
    torch.set_num_threads(1)
    data, found = _data(config.rows), []
    for name in config.agents:
        sides = {"ours": _ours(name, data, config), "plain": _PLAIN[name](data, config), "floor": _floor(name, config)}
        for run in sides.values():
            run(100)
        rounds = [{side: _seconds(run, config) for side, run in sides.items()} for _ in range(config.rounds)]
        row = {side: statistics.median(r[side] for r in rounds) * 1e3 / config.updates for side in sides}
        row |= {"ratio": statistics.median(r["plain"] / r["ours"] for r in rounds),
                "share": statistics.median(r["floor"] / r["ours"] for r in rounds)}  # fmt: skip
        print(f"[bench] {name}: {1e3 / row['ours']:.0f} updates/s, plain PyTorch {1e3 / row['plain']:.0f}: "
              f"{row['ratio']:.2f} x; ms {row['ours']:.2f}, {row['plain']:.2f}, products alone {row['floor']:.2f}: "
              f"{row['share']:.0%} of the floor", flush=True)  # fmt: skip
        found.append({"agent": name, **row})
    return found


class Hopper(SpacesEnv):
    """Spaces of Hopper."""

    num_envs = 1


def _data(rows: int) -> Dataset:
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(rows, 11)), rng.uniform(-1, 1, (rows, 3))
    end = np.arange(rows) % 500 == 499
    return from_arrays({"obs": obs, "next_obs": obs + 0.1, "action": action, "reward": obs[:, 0], "terminated": end})


def _ours(name: str, data: Dataset, config: Config, compile: Literal["on", "off"] = "on") -> Callable[[int], None]:
    env = Hopper(gymnasium.spaces.Box(-9, 9, (11,)), gymnasium.spaces.Box(-1, 1, (3,)))
    env.device = torch.device(config.device)
    cls = {"td3_bc": TD3BC, "iql": IQL}[name]
    agent = cls(
        env, data=data, device=config.device, hidden=config.hidden, batch_size=config.batch_size, compile=compile
    )

    def run(steps: int) -> None:
        agent.learn(steps)

    return run


def _seconds(run: Callable[[int], None], config: Config) -> float:
    now = time.process_time if config.cpu_time else time.perf_counter
    _wait(config.device)
    start = now()
    run(config.updates)
    _wait(config.device)
    return now() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -- plain PyTorch -----------------------------------------------------------------------------------------------------


def _net(inputs: int, outputs: int, config: Config, last: nn.Module | None = None) -> nn.Sequential:
    sizes, layers = [inputs, *config.hidden], list[nn.Module]()
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    layers += [nn.Linear(sizes[-1], outputs), *([last] if last else [])]
    return nn.Sequential(*layers).to(config.device)


def _adam(*modules: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam([p for m in modules for p in m.parameters()], 3e-4, fused=True)


@torch.no_grad()
def _polyak(target: nn.Module, live: nn.Module) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(live.parameters()), 0.005)


def _step(optimiser: torch.optim.Adam, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def _batches(data: Dataset, config: Config) -> Callable[[], tuple[Tensor, ...]]:
    columns = [torch.as_tensor(x, device=config.device)
               for x in (data.obs, data.action, data.reward[:, None], data.next_obs)]  # fmt: skip
    mean, std = columns[0].mean(0), columns[0].std(0) + 1e-3
    columns[0], columns[3] = (columns[0] - mean) / std, (columns[3] - mean) / std
    columns.append(1.0 - torch.as_tensor(data.terminated, device=config.device).float()[:, None])

    def draw() -> tuple[Tensor, ...]:
        index = torch.randint(len(data), (config.batch_size,), device=config.device)
        return tuple(c[index] for c in columns)

    return draw


def _td3_bc(data: Dataset, config: Config) -> Callable[[int], None]:
    actor, one, two = _net(11, 3, config, nn.Tanh()), _net(14, 1, config), _net(14, 1, config)
    old = [copy.deepcopy(m) for m in (actor, one, two)]
    of_actor, of_critic, draw = _adam(actor), _adam(one, two), _batches(data, config)

    def run(steps: int) -> None:
        for i in range(steps):
            s, a, r, following, alive = draw()
            with torch.no_grad():
                noise = (torch.randn_like(a) * 0.2).clamp(-0.5, 0.5)
                x = torch.cat([following, (old[0](following) + noise).clamp(-1, 1)], 1)
                y = r + 0.99 * alive * torch.minimum(old[1](x), old[2](x))
            x = torch.cat([s, a], 1)
            _step(of_critic, nn.functional.mse_loss(one(x), y) + nn.functional.mse_loss(two(x), y))
            if i % 2:
                pi = actor(s)
                q = one(torch.cat([s, pi], 1))
                loss = -2.5 / q.abs().mean().detach() * q.mean() + nn.functional.mse_loss(pi, a)
                _step(of_actor, loss)
                for target, live in zip(old, (actor, one, two), strict=True):
                    _polyak(target, live)

    return run


def _iql(data: Dataset, config: Config) -> Callable[[int], None]:
    actor, one, two, value = _net(11, 3, config, nn.Tanh()), *(_net(14, 1, config) for _ in "12"), _net(11, 1, config)
    log_std = nn.Parameter(torch.zeros(3, device=config.device))
    old = [copy.deepcopy(m) for m in (one, two)]
    of_critic, of_value, draw = _adam(one, two), _adam(value), _batches(data, config)
    of_actor = torch.optim.Adam([*actor.parameters(), log_std], 3e-4, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            s, a, r, following, alive = draw()
            x = torch.cat([s, a], 1)
            with torch.no_grad():
                after, best = value(following), torch.minimum(old[0](x), old[1](x))
            away = best - value(s)
            _step(of_value, (torch.where(away < 0, 0.3, 0.7) * away.square()).mean())
            y = r + 0.99 * alive * after
            _step(of_critic, (nn.functional.mse_loss(one(x), y) + nn.functional.mse_loss(two(x), y)) / 2)
            weight = (3.0 * away.detach()).exp().clamp_max(100.0)
            std = log_std.clamp(-20, 2).exp()
            log = torch.distributions.Normal(actor(s), std, validate_args=False).log_prob(a).sum(1, keepdim=True)
            _step(of_actor, -(weight * log).mean())
            for target, live in zip(old, (one, two), strict=True):
                _polyak(target, live)

    return run


# -- matrix products ---------------------------------------------------------------------------------------------------


def _floor(name: str, config: Config) -> Callable[[int], None]:
    """The products of a step: of a forward pass, of the weights' gradients, of the inputs' (not of the data's)."""
    made: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def layer(a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        if (a, b) not in made:
            sizes = (config.batch_size, a), (a, b), (config.batch_size, b)
            x, w, y = (torch.randn(s, device=config.device) for s in sizes)
            made[a, b] = x, w, y
        return made[a, b]

    def net(inputs: int, outputs: int, weights: bool = False, back: bool = False, to_inputs: bool = False) -> None:
        sizes = [inputs, *config.hidden, outputs]
        for i, pair in enumerate(itertools.pairwise(sizes)):
            x, w, y = layer(*pair)
            torch.mm(x, w)
            if weights:
                torch.mm(x.t(), y)
            if back and (i or to_inputs):
                torch.mm(y, w.t())

    def td3_bc(step: int) -> None:
        net(11, 3)
        for _ in range(2):
            net(14, 1)
            net(14, 1, weights=True, back=True)
        if step % 2:
            net(11, 3, weights=True, back=True)
            net(14, 1, back=True, to_inputs=True)

    def iql(step: int) -> None:
        net(11, 1)
        net(11, 1, weights=True, back=True)
        net(11, 3, weights=True, back=True)
        for _ in range(2):
            net(14, 1)
            net(14, 1, weights=True, back=True)

    one = {"td3_bc": td3_bc, "iql": iql}[name]

    @torch.no_grad()
    def run(steps: int) -> None:
        for step in range(steps):
            one(step)

    return run


_PLAIN: dict[str, Callable[[Dataset, Config], Callable[[int], None]]] = {"td3_bc": _td3_bc, "iql": _iql}
