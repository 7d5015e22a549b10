"""Pictures: samples over training, trajectories of samplers, reward against distance to the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents import get_agent
from ccrl.diffusion import FlowSolver, flow_grid, make_schedule
from ccrl.flow import Sampling
from scripts.reproductions import awm as awm_test
from scripts.studies.look import COLOURS
from scripts.studies.tables import Rows

__all__ = ["Pictures"]


@dataclass(frozen=True)
class Pictures:
    """One seed of AWM on the ring and on the images of shapes."""

    figures: Path = Path("docs/figures")
    """Folder that flow_*.png are written to."""
    seed: int = 0
    """Of the runs."""
    iterations: int = 200
    """Of AWM on the ring."""
    image_iterations: int = 60
    """Of AWM on images, from the exact velocity of the data."""

    def run(self) -> list[Rows]:
        """Write flow_ring.png, flow_paths.png and flow_shapes.png."""
        self.figures.mkdir(parents=True, exist_ok=True)
        start = awm_test.base(self.seed)
        self.paths(start).savefig(self.figures / "flow_paths.png", dpi=100)
        self.ring(start).savefig(self.figures / "flow_ring.png", dpi=100)
        self.shapes().savefig(self.figures / "flow_shapes.png", dpi=100)
        return []

    def ring(self, start: Any) -> Figure:
        """Samples by iteration in the colour of their condition, and reward against distance to the data."""
        agent = get_agent("awm")("ring2d", seed=self.seed, **awm_test.SIZE, **awm_test.ODE)
        agent.policy.load_state_dict(start.policy.state_dict())
        page, points = Figure(figsize=(6.0, 4.4), layout="constrained"), list[tuple[float, float]]()
        axes = page.subplots(2, 3).flatten()
        axes[-1].remove()
        label = torch.arange(600) % 4
        for axis, k in zip(axes[:4], (0, 1, 2, 4)):
            k = k * self.iterations // 4
            if k:
                for j in range(max(0, k - self.iterations // 4) + 10, k + 1, 10):
                    agent.learn(until=j * agent.samples_per_iteration)
                    found = agent.measure(512)
                    points.append((found["distance"], found["reward"]))
                agent.learn(until=k * agent.samples_per_iteration)
            x = agent.samples(label, 1)
            axis.scatter(*x.T, c=[COLOURS[c] for c in label.tolist()], s=3)
            axis.scatter(*agent.task.means.T, marker="+", color="black", s=20)
            axis.set(title=f"AWM, iteration {k}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        axes[4].plot(*zip(*points), marker=".", color=COLOURS[0])
        axes[4].set(xlabel="distance to the nearest mode", ylabel="reward", title="every 10 iterations")
        return page

    def paths(self, start: Any) -> Figure:
        """Twenty trajectories from noise to data by each sampler, 14 steps."""
        page = Figure(figsize=(6.0, 4.4), layout="constrained")
        axes = page.subplots(2, 3).flatten()
        axes[-1].remove()
        solvers: tuple[tuple[FlowSolver, float], ...] = (
            ("ode", 0.0), ("flow_sde", 0.7), ("dance_sde", 0.7), ("cps", 0.7), ("ddim", 1.0),
        )  # fmt: skip
        for axis, (solver, noise) in zip(axes, solvers):
            sampling = Sampling(make_schedule(flow_grid(14), solver, noise))
            generator = torch.Generator().manual_seed(3)
            first = torch.randn(20, 2, generator=generator)
            drawn = torch.randn(14, 20, 2, generator=generator)
            condition = start.collector.features(torch.zeros(20, dtype=torch.int64))
            states, _ = start.policy.rollout(first, condition, sampling.schedule, drawn)
            for path in states.transpose(0, 1):
                axis.plot(*path.T, linewidth=0.7, color=COLOURS[0], alpha=0.7)
            axis.scatter(*states[-1].T, s=8, color=COLOURS[1], zorder=3)
            title = solver if not noise else f"{solver}, a = {noise}"
            axis.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        return page

    def shapes(self) -> Figure:
        """Images before and after AWM with the brightness proxy and with the matching reward."""
        page = Figure(figsize=(6.0, 2.6), layout="constrained")
        axes = page.subplots(3, 10)
        label = torch.arange(10) % 5
        rows: list[Any] = []
        for reward in ("match", "bright"):
            agent = get_agent("awm")(
                "shapes", seed=self.seed, env_kwargs={"reward": reward}, base="exact", hidden=(128, 128), n_prompts=10,
                learning_rate=1e-3, steps=14, compile="off", kl_coef=0.0, **awm_test.ODE,
            )  # fmt: skip
            if not rows:
                rows.append(("data", agent.samples(label, 1)))
            agent.learn(self.image_iterations * agent.samples_per_iteration)
            rows.append((f"AWM, {reward}", agent.samples(label, 1)))
        for line, (name, x) in zip(axes, rows):
            for axis, image in zip(line, x.view(-1, 8, 8)):
                axis.imshow(image, cmap="gray", vmin=-1.5, vmax=1.5)
                axis.axis("off")
            line[0].set_title(name, fontsize=8, loc="left")
        return page
