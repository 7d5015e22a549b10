"""ORPO beside its rivals where a proxy can be hacked (docs/orpo.md).

    python scripts/studies/hacking exact --out results/hacking     # tomato world, exact gradients, no sampling
    python scripts/studies/hacking tomato --out results/hacking    # the same world: PPO and a learnt discriminator
    python scripts/studies/hacking point --out results/hacking     # a reward model of 30 labels, continuous actions

Every finished run is added to ``OUT/NAME.csv``; the same command again, or one with more seeds, runs what is missing.
In the end ``FIGURES/hacking_NAME.md``, ``.csv`` and ``.png`` are written.
"""

from __future__ import annotations

import math
import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.orpo import ORPO
from ccrl.experiment.cells import complete
from ccrl.policies import MLPPolicy
from envs.hacking import ExactTask, tomato_task
from scripts.studies import tables
from scripts.studies.tables import Rows

__all__ = ["Exact", "Sampled", "main", "optimise"]

NAN = float("nan")


# -- exactly ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exact:
    """Softmax tables started at the reference, Adam on exact objectives; J are returns of occupancy measures."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that hacking_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    steps: int = 400
    """Adam steps of size 0.1."""
    weights: tuple[float, ...] = (1.0, 0.5, 0.4, 0.3, 0.25)
    """c of lambda = c sigma_proxy, sqrt-chi^2; the one from the theory is added."""
    action_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0)
    """Weights of the action KL."""

    def run(self) -> Rows:
        """Returns and chi^2 per method and weight."""
        cells = [{"method": "none", "weight": 0.0, "steps": self.steps}]
        theory = [round(math.sqrt(1.0 - tomato_reference()[2].correlation ** 2), 6)]
        for method, weights in (("sqrt-chi2", [*self.weights, *theory]), ("action KL", self.action_weights)):
            cells += [{"method": method, "weight": w, "steps": self.steps} for w in sorted(weights, reverse=True)]
        rows = complete(self.out / "exact.csv", cells, play_exact, jobs=self.jobs, name="exact")
        task, reference, _ = tomato_reference()
        found = [{"method": "reference", "weight": NAN, **measured(task, reference, reference)}]
        best = task.greedy(task.true)
        found.append({"method": "true optimum", "weight": NAN, **measured(task, best, reference)})
        numbers = ("weight", "J_true", "J_proxy", "chi2")
        return found + [{"method": row["method"]} | {n: float(row[n]) for n in numbers} for row in rows]

    def figure(self, rows: Rows, command: str) -> Figure:
        """True against proxy return over the weights."""
        page = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = page.subplots()
        for i, method in enumerate(("sqrt-chi2", "action KL")):
            mine = [row for row in rows if row["method"] == method]
            axis.plot([r["weight"] for r in mine], [r["J_true"] for r in mine], "-o", color=f"C{i}", label=method)
        for method, style in (("reference", "--"), ("true optimum", "-"), ("none", ":")):
            value = next(row["J_true"] for row in rows if row["method"] == method)
            axis.axhline(value, color="#8A8A8A", ls=style, lw=0.9, label=method)
        axis.set_xlabel("weight (c; of the KL per step)")
        axis.set_ylabel("true return")
        axis.grid(color="#E6E6E6")
        axis.legend(frameon=False, fontsize=8)
        page.supxlabel(command, x=0.01, ha="left", fontsize=6, color="#5A5A5A")
        return page


def tomato_reference() -> tuple[ExactTask, Tensor, Any]:
    """The tomato world, its reference and how well the proxy agrees with the true reward there."""
    task = tomato_task()
    reference = task.reference()
    return task, reference, task.agreement(task.occupancy(reference))


def measured(task: ExactTask, policy: Tensor, reference: Tensor) -> dict[str, float]:
    """Both returns, and chi^2 of the occupancy measures."""
    mu, ref = task.occupancy(policy), task.occupancy(reference)
    value = {"J_true": (mu * task.true).sum(), "J_proxy": (mu * task.proxy).sum(), "chi2": chi_square(mu, ref)}
    return {name: float(x) for name, x in value.items()}


def chi_square(mu: Tensor, ref: Tensor) -> Tensor:
    """``sum (mu - ref)^2 / ref`` over what the reference visits (nobody visits anything else)."""
    visited = ref > 0
    return ((mu - ref)[visited].square() / ref[visited]).sum()


def optimise(method: str, weight: float, steps: int) -> Tensor:
    """The policy ``[S, A]`` after ``steps`` of Adam on ``J_proxy`` minus a penalty."""
    task, reference, agreement = tomato_reference()
    ref = task.occupancy(reference)
    logits = reference.log().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        policy = logits.softmax(1)
        mu = task.occupancy(policy)
        loss = -(mu * task.proxy).sum()
        if method == "sqrt-chi2":
            # at the reference the root has no derivative
            loss = loss + weight * agreement.sigma_proxy * (chi_square(mu, ref) + 1e-12).sqrt()
        elif method == "action KL":
            loss = loss + weight * (mu * (policy / reference).log()).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach().softmax(1)


def play_exact(cell: dict[str, Any]) -> Rows:
    """One optimisation."""
    task, reference, _ = tomato_reference()
    return [measured(task, optimise(cell["method"], cell["weight"], cell["steps"]), reference)]


# -- by sampling ------------------------------------------------------------------------------------------------------

SAMPLED: dict[str, tuple[str, dict[str, Any]]] = {
    "tomato": (
        "ccrl/Tomato-v0",
        {"num_envs": 30, "n_steps": 100, "hidden": (), "critic_hidden": (64, 64), "learning_rate": 0.02, "n_epochs": 4,
         "batch_size": 500, "clip_range": 0.2, "gae_lambda": 0.98, "normalise_advantage": "batch",
         "start_at_reference": False, "ent_coef": 0.01,
         "discriminator_hidden": (64, 64), "discriminator_batch": 500, "discriminator_epochs": 4,
         "reference_steps": 200},
    ),
    "point": (
        "ccrl/PointGoal-v0",
        {"num_envs": 32, "n_steps": 50, "hidden": (), "critic_hidden": (64, 64), "learning_rate": 0.01, "n_epochs": 4,
         "batch_size": 400, "normalise_advantage": "batch", "discriminator_hidden": (64, 64),
         "discriminator_batch": 400, "discriminator_epochs": 4, "reference_steps": 200},
    ),
}  # fmt: skip
"""Task -> environment, settings of the agent."""


@dataclass(frozen=True)
class Sampled:
    """PPO on the proxy with penalties (tomato: from a new policy, point: from the reference); sums over an episode."""

    out: Path
    """Folder of the finished runs."""
    figures: Path = Path("docs/figures")
    """Folder that hacking_* is written to."""
    jobs: int = 1
    """Runs at a time, each a process with one thread."""
    seeds: int = 5
    """Runs of each method and weight."""
    iterations: int = 30
    """Rollouts per run."""
    weights: tuple[float, ...] = (1.0, 0.5)
    """c, sqrt-chi^2 of occupancy measures."""
    action_weights: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Weights of the action KL."""
    task: tyro.conf.Suppress[str] = "tomato"

    def run(self) -> Rows:
        """Every fifth point of every curve."""
        tried = [("none", 0.0)] + [("sqrt_chi2", w) for w in self.weights]
        tried += [("action_kl", w) for w in self.action_weights]
        cells = [
            {"method": m, "weight": w, "seed": seed, "task": self.task, "iterations": self.iterations}
            for seed in range(self.seeds) for m, w in tried
        ]  # fmt: skip
        rows = complete(self.out / f"{self.task}.csv", cells, play_sampled, jobs=self.jobs, name=self.task)
        types = {"method": str, "weight": float, "seed": int, "iteration": int, "true": float, "proxy": float,
                 "chi2": float, "seconds": float}  # fmt: skip
        return [{name: of(row[name] or "nan") for name, of in types.items()} for row in rows]

    def summary(self, rows: Rows) -> Rows:
        """Means over seeds of the last point, and of the best point that a peek at the true return would choose."""
        out = []
        for method, weight in dict.fromkeys((row["method"], row["weight"]) for row in rows):
            mine = [row for row in rows if (row["method"], row["weight"]) == (method, weight)]
            last = [row for row in mine if row["iteration"] == max(r["iteration"] for r in mine)]
            true = [row["true"] for row in last]
            peaks = [max(r["true"] for r in mine if r["seed"] == seed) for seed in sorted({r["seed"] for r in mine})]
            out.append({
                "method": method, "weight": weight, "seeds": len(last), "true return": statistics.fmean(true),
                "sd over seeds": statistics.stdev(true) if len(true) > 1 else NAN,
                "proxy return": statistics.fmean(row["proxy"] for row in last), "best true": statistics.fmean(peaks),
                "chi2_hat": statistics.fmean(row["chi2"] for row in last),
                "seconds": statistics.fmean(row["seconds"] for row in last),
            })  # fmt: skip
        first = [row["true"] for row in rows if row["iteration"] == 1]
        proxy = [row["proxy"] for row in rows if row["iteration"] == 1]
        start = {"method": "first rollout", "weight": NAN, "seeds": self.seeds}
        start |= {"true return": statistics.fmean(first), "sd over seeds": NAN, "proxy return": statistics.fmean(proxy)}
        return [start | {"best true": NAN, "chi2_hat": NAN, "seconds": NAN}, *out]

    def figure(self, rows: Rows, command: str) -> Figure:
        """True and proxy return over training, means over seeds."""
        page = Figure(figsize=(9.0, 3.6), layout="constrained")
        styles = {"none": ("C3", "-"), "sqrt_chi2": ("C0", "-"), "action_kl": ("C1", "-")}
        for axis, name in zip(page.subplots(1, 2), ("true", "proxy")):
            dashes = dict.fromkeys(styles, 0)
            for method, weight in dict.fromkeys((row["method"], row["weight"]) for row in rows):
                by: dict[int, list[float]] = {}
                for row in rows:
                    if (row["method"], row["weight"]) == (method, weight):
                        by.setdefault(row["iteration"], []).append(row[name])
                style = ("-", "--", ":", "-.")[dashes[method] % 4]
                dashes[method] += 1
                label = method if method == "none" else f"{method} {weight:g}"
                axis.plot(
                    list(by), [statistics.fmean(v) for v in by.values()], color=styles[method][0], ls=style, label=label
                )
            axis.set_xlabel("rollouts")
            axis.set_ylabel(f"{name} return")
            axis.grid(color="#E6E6E6")
        page.legend(*page.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
        page.suptitle(f"{self.task}: means of {self.seeds} seeds", x=0.01, ha="left")
        page.supxlabel(command, x=0.01, ha="left", fontsize=6, color="#5A5A5A")
        return page


def play_sampled(cell: dict[str, Any]) -> Rows:
    """One run."""
    id, settings = SAMPLED[cell["task"]]
    method, weight = cell["method"], cell["weight"]
    # without a penalty the discriminator still tells how far the policy went
    penalty = {"coef": weight, "stop_at": None, "regulariser": "sqrt_chi2" if method == "none" else method}
    if method != "sqrt_chi2":
        penalty["stop_at"] = 1e30
    teacher = reference_policy(cell["task"], settings)
    # every seed has a reward model of its own
    options = {"instance": cell["seed"]} if cell["task"] == "point" else {}
    agent = ORPO(id, seed=cell["seed"], reference=teacher, compile="off", env_kwargs=options, **settings | penalty)
    curve: Rows = []

    def watch(agent: Any) -> bool:
        if agent.iteration == 1 or agent.iteration % 5 == 0 or agent.iteration == cell["iterations"]:
            s = {k: float(agent.scalars[k]) for k in ("rollout/true_return", "rollout/proxy_return")}
            chi2 = float(agent.scalars["train/occupancy_chi2"])
            row = {"true": s["rollout/true_return"], "proxy": s["rollout/proxy_return"], "chi2": chi2}
            curve.append({"iteration": agent.iteration} | row)
        return bool(agent.iteration < cell["iterations"])

    agent.learn(10**9, watch)
    return curve


@torch.no_grad()
def reference_policy(task: str, settings: dict[str, Any]) -> MLPPolicy:
    """The reference as a network without hidden layers: a table of logits, or a linear Gaussian controller."""
    import envs

    env = envs.make(SAMPLED[task][0], 1)
    policy = MLPPolicy(
        env.single_observation_space, env.single_action_space, hidden=(), critic_hidden=settings["critic_hidden"],
        heads={"value": ()},
    )  # fmt: skip
    layer: Any = policy.actor.net[0]
    if task == "tomato":
        layer.weight.copy_(tomato_reference()[1].log().T)
        layer.bias.zero_()
    else:  # 2 (goal - x) + noise / 2
        layer.weight.copy_(-2.0 * torch.eye(2))
        layer.bias.fill_(1.0)
        policy.actor.log_std.fill_(math.log(0.5))
    return policy


def main(argv: list[str]) -> Rows:
    """Run one of the studies and write its files; its table."""
    torch.set_num_threads(1)
    if not argv or argv[0] not in ("exact", *SAMPLED):
        raise ValueError(f"expected exact, {' or '.join(SAMPLED)} and options, got {argv[:1] or 'nothing'}\n{__doc__}")
    study: Any
    if argv[0] == "exact":
        study = tyro.cli(Exact, args=argv[1:], description=__doc__)
    else:
        study = tyro.cli(Sampled, args=argv[1:], default=Sampled(tyro.MISSING, task=argv[0]), description=__doc__)
    rows = study.run()
    table: Rows = rows if argv[0] == "exact" else study.summary(rows)
    stem = study.figures / f"hacking_{argv[0]}"
    command = "python scripts/studies/hacking " + shlex.join(argv)
    tables.write(stem, command, table, rows)
    study.figure(rows, command).savefig(stem.with_suffix(".png"), dpi=120)
    return table
