"""The tomato world by exact gradients: no sampling, no discriminator (docs/orpo.md)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ccrl.packages import check_siblings

check_siblings("envs")

from ccrl.experiment.cells import complete
from envs.hacking import Agreement, ExactTask, tomato_task
from scripts.studies.look import look
from scripts.studies.tables import Rows

__all__ = ["Exact", "chi_square", "measured", "objective", "optimise", "tomato_reference"]

NAN = float("nan")


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
    converge: int = 3000
    """Steps of a second run, whose size falls from 0.1 to 1e-5: the columns 'at the optimum'."""
    weights: tuple[float, ...] = (1.0, 0.5, 0.4, 0.3, 0.25)
    """c of lambda = c sigma_proxy, sqrt-chi^2; the one from the theory is added."""
    action_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 1.0)
    """Weights of the action KL."""

    def run(self) -> Rows:
        """Returns and chi^2 per method and weight, after ``steps`` and at the optimum."""
        tried = [("none", 0.0)]
        theory = [round(math.sqrt(1.0 - tomato_reference()[2].correlation ** 2), 6)]
        for method, weights in (("sqrt-chi2", [*self.weights, *theory]), ("action KL", self.action_weights)):
            tried += [(method, w) for w in sorted(weights, reverse=True)]
        cells = [
            {"method": m, "weight": w, "steps": n, "falling": falling}
            for n, falling in ((self.steps, False), (self.converge, True)) for m, w in tried
        ]  # fmt: skip
        rows = complete(self.out / "exact.csv", cells, play_exact, jobs=self.jobs, name="exact")
        first, second = rows[: len(tried)], rows[len(tried) :]
        task, reference, _ = tomato_reference()
        best = task.greedy(task.true)
        found = []
        for name, policy in (("reference", reference), ("true optimum", best)):
            found.append({"method": name, "weight": NAN, **measured(task, policy, reference)})
            found[-1] |= {f"{k}, optimum": NAN for k in ("J_true", "J_proxy", "chi2")}
        for (method, weight), early, late in zip(tried, first, second):
            row: dict[str, Any] = {"method": method, "weight": weight}
            row |= {k: float(early[k]) for k in ("J_true", "J_proxy", "chi2")}
            row |= {f"{k}, optimum": float(late[k]) for k in ("J_true", "J_proxy", "chi2")}
            found.append(row)
        return found

    def tables(self, rows: Rows) -> list[Rows]:
        """The rows are the table."""
        return [rows]

    def figure(self, rows: Rows) -> Figure:
        """True return over the weights, at the optimum."""
        page = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = page.subplots()
        for i, method in enumerate(("sqrt-chi2", "action KL")):
            mine = [row for row in rows if row["method"] == method]
            x, y = [r["weight"] for r in mine], [r["J_true, optimum"] for r in mine]
            axis.plot(x, y, marker="o", label=method, **look(i))
        for method, style in (("reference", "--"), ("true optimum", "-"), ("none", ":")):
            value = next(row["J_true"] for row in rows if row["method"] == method)
            axis.axhline(value, color="#8A8A8A", ls=style, lw=0.9, label=method)
        axis.set_xlabel("weight (c of sqrt-chi2; of the KL per step)")
        axis.set_ylabel("true return at the optimum, exact")
        axis.grid(color="#E6E6E6")
        axis.legend(frameon=False, fontsize=8)
        return page


@functools.cache
def tomato_reference() -> tuple[ExactTask, Tensor, Agreement]:
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


@functools.cache
def reference_occupancy() -> Tensor:
    """``mu_ref [S, A]``."""
    task, reference, _ = tomato_reference()
    return task.occupancy(reference)


def objective(method: str, weight: float, mu: Tensor) -> Tensor:
    """``J_proxy`` minus the penalty, 0-d, of an occupancy measure ``[S, A]``."""
    task, reference, agreement = tomato_reference()
    value = (mu * task.proxy).sum()
    if method == "sqrt-chi2":
        # at the reference the root has no derivative
        value = value - weight * agreement.sigma_proxy * (chi_square(mu, reference_occupancy()) + 1e-12).sqrt()
    elif method == "action KL":
        visits = mu.sum(1, keepdim=True)
        policy = torch.where(mu > 0, mu, 1.0) / torch.where(mu > 0, visits, 1.0)
        value = value - weight * (mu * (policy / reference).log()).sum()
    return value


def optimise(method: str, weight: float, steps: int, falling: bool = False) -> Tensor:
    """The policy ``[S, A]`` after ``steps`` of Adam of size 0.1, or falling from it to 1e-5, on the objective."""
    task, reference, _ = tomato_reference()
    logits = reference.log().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for k in range(steps):
        if falling:
            optimiser.param_groups[0]["lr"] = 0.1 * 1e-4 ** (k / steps)
        loss = -objective(method, weight, task.occupancy(logits.softmax(1)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return logits.detach().softmax(1)


def play_exact(cell: dict[str, Any]) -> Rows:
    """One optimisation."""
    task, reference, _ = tomato_reference()
    policy = optimise(cell["method"], cell["weight"], cell["steps"], cell["falling"])
    return [measured(task, policy, reference)]
