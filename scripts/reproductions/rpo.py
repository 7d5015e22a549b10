"""RPO: three responses of which one is never seen, and the likelihood of what is preferred under DPO and RPO."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ccrl.collect import Request
from ccrl.data import Batching, Data
from ccrl.estimators.recipe import Parts
from ccrl.estimators.terms import Term, surrogate
from ccrl.packages import check_siblings
from scripts.reproductions import Measurement

check_siblings("agents", "envs")

from agents.llm.rpo import RPOConfig, RPORecipe

BETA = 0.1
PROMPTS, ARMS, FEATURES, STEPS = 20, 40, 6, 400


def terms(eta: float) -> tuple[Term, ...]:
    """RPO's, outside an agent."""
    parts = Parts(nn.Identity(), None, Request(counts=torch.ones(1, dtype=torch.int64)), 1)  # type: ignore[arg-type]
    return RPORecipe(RPOConfig(beta=BETA, eta=eta), parts).terms()


def pairs(reference: Tensor) -> Data:
    """``reference`` ``[1, 2P]``: log-probabilities, preferred and rejected side by side."""
    count = reference.shape[1] // 2
    columns = {"valid": torch.ones_like(reference), "ref_log_prob": reference}
    sequence = {"group": torch.arange(count).repeat_interleave(2), "preferred": torch.tensor([1.0, -1.0]).repeat(count)}
    return Data(columns | sequence, sequence=frozenset(sequence)).epoch(Batching("group", "full"), None)[0]


def toy(eta: float, steps: int) -> tuple[float, list[float]]:
    """A softmax on the features 1.0 (chosen), 0.8 (rejected) and 3.0 (unseen), by gradient descent of rate 0.5."""
    phi = torch.tensor([1.0, 0.8, 3.0], dtype=torch.float64)
    w = torch.zeros((), dtype=torch.float64, requires_grad=True)
    data, loss = pairs(torch.full((1, 2), -math.log(3.0), dtype=torch.float64)), terms(eta)
    for _ in range(steps):
        log_prob = (w * phi).log_softmax(0)[:2].unsqueeze(0)
        (slope,) = torch.autograd.grad(surrogate(loss, {"log_prob": log_prob}, data)[0], w)
        with torch.no_grad():
            w -= 0.5 * slope
    return float(w.detach()), (w.detach() * phi).softmax(0).tolist()


def bandit(eta: float, seed: int, noisy: bool = False) -> dict[str, float]:
    """A perceptron scores 40 arms of each of 20 prompts; one preference per prompt, 400 steps of Adam on all of them.

    ``noisy``: preferences are drawn from Bradley-Terry of a linear reward, in place of random ones.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        features = torch.randn(PROMPTS, ARMS, 2 * FEATURES)
        features[..., :FEATURES] = features[:, :1, :FEATURES]  # the prompt's, beside the arm's
        worth = features @ torch.randn(2 * FEATURES) / math.sqrt(2 * FEATURES)
        one, other = torch.rand(PROMPTS, ARMS).topk(2, 1).indices.unbind(1)
        rows = torch.arange(PROMPTS)
        if noisy:
            first = torch.rand(PROMPTS) < (worth[rows, one] - worth[rows, other]).sigmoid()
            one, other = torch.where(first, one, other), torch.where(first, other, one)
        policy = nn.Sequential(nn.Linear(2 * FEATURES, 64), nn.Tanh(), nn.Linear(64, 1))
    arms = torch.stack([one, other], 1)

    def log_probs() -> Tensor:
        scores: Tensor = policy(features).squeeze(-1)
        return scores.log_softmax(1)

    start = log_probs().detach()
    data, loss = pairs(start.gather(1, arms).view(1, -1)), terms(eta)
    optimiser = torch.optim.Adam(policy.parameters(), lr=3e-3)
    best = -math.inf
    for _ in range(STEPS):
        current = log_probs()
        best = max(best, float((current.detach().exp() * worth).sum(1).mean()))
        total, stats = surrogate(loss, {"log_prob": current.gather(1, arms).view(1, -1)}, data)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    end = log_probs().detach()
    value: Any = (end.exp() * worth).sum(1).mean()
    return {
        "start": float(start[rows, one].mean()), "chosen": float(end[rows, one].mean()),
        "accuracy": float(stats["pair_accuracy"]), "value": float(value), "best": best,
        "value_start": float((start.exp() * worth).sum(1).mean()),
    }  # fmt: skip


def run(seeds: list[int]) -> list[Measurement]:
    """The toy exactly, then the bandit over seeds."""
    found = list[Measurement]()
    early, late = toy(0.0, 100), toy(0.0, 1000)
    found += [
        Measurement("DPO, three responses: mass of the unseen one after 100 steps", "0.587 (reference run)",
                    (0.586, 0.588), (early[1][2],)),
        Measurement("the same after 1000 steps", "0.9999 (reference run)", (0.9998, 1.0), (late[1][2],)),
    ]  # fmt: skip
    for eta, weight, mass in ((0.1, 0.3708, 0.5212), (0.5, -0.5126, 0.1454)):
        w, pi = toy(eta, 4000)
        found += [
            Measurement(f"RPO, eta {eta}: weight at the end", f"{weight} (stationary point)",
                        (weight - 1e-3, weight + 1e-3), (w,)),
            Measurement(f"RPO, eta {eta}: mass of the unseen response", f"{mass} (stationary point)",
                        (mass - 1e-3, mass + 1e-3), (pi[2],)),
        ]  # fmt: skip
    found.append(Measurement("RPO, eta 0.005: mass of the unseen response after 4000 steps", "near 1: too weak",
                             (0.95, 1.0), (toy(0.005, 4000)[1][2],)))  # fmt: skip
    runs = {eta: [bandit(eta, seed) for seed in seeds] for eta in (0.0, 0.05, 0.2)}
    every = {eta: tuple(run["chosen"] for run in rows) for eta, rows in runs.items()}
    start = tuple(run["start"] for run in runs[0.0])
    fall = tuple(end - begin for end, begin in zip(every[0.0], start))
    found += [
        Measurement("bandit: log pi(chosen) of the reference", "-3.7 to -3.8 (reference run)", (-3.85, -3.6), start),
        Measurement("DPO: change of log pi(chosen)", "negative (paper); -2.5 to -17 (reference run, 3 seeds)",
                    (-math.inf, 0.0), fall),
        Measurement("DPO: accuracy on its preferences", "1 (reference run)", (0.999, 1.0),
                    tuple(run["accuracy"] for run in runs[0.0])),
        Measurement("RPO, eta 0.05: log pi(chosen) at the end",
                    "above the reference's (paper); -0.17 to -1.06 (reference run, 3 seeds)", (-3.6, math.inf),
                    every[0.05]),
        Measurement("RPO, eta 0.2: log pi(chosen) at the end",
                    "above the reference's (paper); about -0.04 (reference run)", (-0.3, math.inf), every[0.2]),
    ]  # fmt: skip
    noisy = {eta: [bandit(eta, seed, noisy=True) for seed in seeds] for eta in (0.0, 0.005, 0.05)}
    for eta in (0.005, 0.05):
        for what, best in (("at the end", "value"), ("at its best step", "best")):
            gap = tuple(mine[best] - dpo[best] for mine, dpo in zip(noisy[eta], noisy[0.0]))
            found.append(Measurement(f"preferences by Bradley-Terry: true reward {what}, RPO (eta {eta}) minus DPO",
                                     "positive (paper, large models)", (0.0, math.inf), gap))  # fmt: skip
    return found
