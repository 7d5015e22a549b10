"""Samples and updates per second of flow methods, beside plain PyTorch as the published repositories write it.

The plain loops are those of the released trainers: sampling step by step under ``no_grad``; per iteration one pass over
the trained times in a Python loop, each with its own forward and backward pass, gradients accumulated into one AdamW
step; AWM evaluates the fixed and the averaged network at every time as well. Networks, batches, times per sample and
arithmetic are the same; nothing is read back to the host inside the loops.

    python scripts/bench flow --methods flow_grpo awm --iterations 50
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents import get_agent
from ccrl.settings import Count, Settings
from envs.flow import make_flow_task

__all__ = ["Config", "main"]


@dataclass(frozen=True)
class Config(Settings):
    """Sizes are those of the ring."""

    methods: tuple[Literal["flow_grpo", "awm"], ...] = ("flow_grpo", "awm")
    """These are measured."""
    task: Literal["ring2d", "shapes"] = "ring2d"
    """Samples are of this task."""
    n_prompts: Count = 8
    """Conditions per iteration."""
    group_size: Count = 24
    """Samples per condition."""
    steps: Count = 14
    """Denoising steps per sample."""
    n_times: Count = 6
    """Times per sample, of awm."""
    hidden: tuple[Count, ...] = (96, 96, 96)
    """Widths of the network."""
    iterations: Count = 50
    """So many iterations are timed, after as many as compiling takes."""
    repeats: Count = 7
    """Both are measured so often, in turns; medians count, of the ratio that of its values in each turn."""


def main(config: Config) -> list[dict[str, Any]]:
    """Measure; print a line per method."""
    torch.set_num_threads(1)
    found = []
    for name in config.methods:
        made = {"plain": _PLAIN[name](config), "ours": _ours(name, config)}
        for run in made.values():
            run(3)
        rates: dict[str, list[float]] = {kind: [] for kind in made}
        for _ in range(config.repeats):
            for kind, run in made.items():
                begun = time.perf_counter()
                run(config.iterations)
                rates[kind].append(config.iterations / (time.perf_counter() - begun))
        count = config.n_prompts * config.group_size
        ratios = [a / b for a, b in zip(rates["ours"], rates["plain"])]
        middle = {kind: statistics.median(values) for kind, values in rates.items()}
        found.append({"method": name, **middle, "ratio": statistics.median(ratios)})
        shown = [f"{middle[kind]:.1f} updates/s and {count * middle[kind]:.0f} samples/s" for kind in ("ours", "plain")]
        print(f"[bench] {name}: {shown[0]}, plain PyTorch {shown[1]}: {found[-1]['ratio']:.2f} x (turns from "
              f"{min(ratios):.2f} to {max(ratios):.2f})", flush=True)  # fmt: skip
    return found


def _ours(name: str, config: Config) -> Callable[[int], None]:
    options: dict[str, Any] = {
        "n_prompts": config.n_prompts, "group_size": config.group_size, "steps": config.steps, "hidden": config.hidden,
        "compile": "on", "learning_rate": 1e-4,
    }  # fmt: skip
    if name == "awm":
        options |= {"n_times": config.n_times, "sampler": "ode", "noise_level": 0.0}
    agent = get_agent(name)(config.task, **options)

    def run(iterations: int) -> None:
        agent.learn(iterations * agent.samples_per_iteration)

    return run


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self, size: int, conditions: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = [size + conditions + 9, *hidden]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], size))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        angle = math.pi * t.unsqueeze(-1) * torch.arange(1, 5, device=x.device)
        out: Tensor = self.net(torch.cat([x, c, t.unsqueeze(-1), angle.sin(), angle.cos()], -1))
        return out


def _advantages(reward: Tensor, groups: int, whole: bool) -> Tensor:
    reward = reward.view(groups, -1)
    std = reward.std(correction=0) if whole else reward.std(1, correction=0, keepdim=True)
    return ((reward - reward.mean(1, keepdim=True)) / (std + 1e-4)).clamp(-5, 5).flatten()


def _sde_step(v: Tensor, x: Tensor, i: int, sigmas: list[float], a: float, following: Tensor | None) -> Any:
    t, after = sigmas[i], sigmas[i + 1]
    dt = after - t
    sigma = a * math.sqrt(t / (1 - (after if t == 1.0 else t)))
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    std = sigma * math.sqrt(-dt)
    following = mean + std * torch.randn_like(x) if following is None else following
    log_prob = (-((following.detach() - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)).mean(
        1
    )
    return following, log_prob


def _plain_flow_grpo(config: Config) -> Callable[[int], None]:
    task = make_flow_task(config.task)
    net = _Net(task.size, task.conditions, config.hidden)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    sigmas = [1 - i / config.steps for i in range(config.steps + 1)]
    n = config.n_prompts * config.group_size

    def run(iterations: int) -> None:
        for _ in range(iterations):
            label = torch.randint(task.conditions, (config.n_prompts,)).repeat_interleave(config.group_size)
            c = F.one_hot(label, task.conditions).float()
            x = torch.randn(n, task.size)
            latents, log_probs = [x], []
            with torch.no_grad():
                for i in range(config.steps):
                    v = net(x, torch.full((n,), sigmas[i]), c)
                    x, log_prob = _sde_step(v, x, i, sigmas, 0.7, None)
                    latents.append(x)
                    log_probs.append(log_prob)
            advantage = _advantages(task.score(x, label).sum(1), config.n_prompts, False)
            trained = config.steps - 1
            for i in range(trained):
                v = net(latents[i], torch.full((n,), sigmas[i]), c)
                _, log_prob = _sde_step(v, latents[i], i, sigmas, 0.7, latents[i + 1])
                ratio = (log_prob - log_probs[i]).exp()
                loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-3, 1 + 1e-3)).mean()
                (loss / trained).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return run


def _plain_awm(config: Config) -> Callable[[int], None]:
    task = make_flow_task(config.task)
    net = _Net(task.size, task.conditions, config.hidden)
    fixed, average = copy.deepcopy(net), copy.deepcopy(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    sigmas = [1 - i / config.steps for i in range(config.steps + 1)]
    n = config.n_prompts * config.group_size

    def surrogate(v: Tensor, target: Tensor, t: float) -> Tensor:
        error = ((v - target).double() ** 2).mean(1)
        rooted: Tensor = (error + 1e-10) ** 0.25 - 1e-10**0.25
        return -rooted * t / 0.25

    def run(iterations: int) -> None:
        for k in range(iterations):
            label = torch.randint(task.conditions, (config.n_prompts,)).repeat_interleave(config.group_size)
            c = F.one_hot(label, task.conditions).float()
            x = torch.randn(n, task.size)
            with torch.no_grad():
                for i in range(config.steps):
                    v = net(x, torch.full((n,), sigmas[i]), c)
                    x = x + v * (sigmas[i + 1] - sigmas[i])
            advantage = _advantages(task.score(x, label).sum(1), config.n_prompts, True) / 5
            index = (torch.arange(config.n_times) + torch.rand(config.n_times)) / config.n_times * (config.steps - 2)
            times = [sigmas[1 + int(j)] for j in index]
            noises = [torch.randn_like(x) for _ in times]
            with torch.no_grad():
                old = []
                for t, noise in zip(times, noises):
                    v = net((1 - t) * x + t * noise, torch.full((n,), t), c)
                    old.append(surrogate(v, noise - x, t))
            for t, noise, before in zip(times, noises, old):
                xt, target, time_ = (1 - t) * x + t * noise, noise - x, torch.full((n,), t)
                v = net(xt, time_, c)
                with torch.no_grad():
                    v_fixed, v_average = fixed(xt, time_, c), average(xt, time_, c)
                ratio = (surrogate(v, target, t) - before).exp()
                loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.0, 2.0)).mean()
                loss = loss + 0.01 * ((v - v_fixed) ** 2).mean() + ((v - v_average) ** 2).mean()
                (loss / len(times)).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            decay = min(0.3, 0.001 * k)
            with torch.no_grad():
                for p, q in zip(average.parameters(), net.parameters()):
                    p.copy_(decay * p + (1 - decay) * q)

    return run


_PLAIN = {"flow_grpo": _plain_flow_grpo, "awm": _plain_awm}
