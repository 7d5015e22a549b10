"""CoPG's small experiments: three arms in exact expectation and sampled off policy; a sequence bandit offline."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccrl.data import Batching, Data
from ccrl.estimators import aggregates
from ccrl.estimators.terms import LogRatio, Loss, Outputs, Term
from ccrl.llm.policy import token_outputs
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts
from ccrl.packages import check_siblings

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.copg import CoPG, sequence_sum
from envs.text.bandits import Arms, SequenceMatch
from scripts.reproductions import Measurement

__all__ = ["OfflineCoPG", "exact_arms", "offline", "run", "sampled_arms"]

# -- three arms -----------------------------------------------------------------------------------------------------

REFERENCE, FIRST, SECOND = (0.2, 0.5, 0.3), (0.7, 0.2, 0.1), (0.1, 0.1, 0.8)
# ref exp(R / beta) / Z; and where mu (R_beta - sum mu R_beta pi / mu) vanishes: mu R_beta = pi sum(mu R_beta)
OPTIMUM = (0.591306, 0.364535, 0.044159)
BIASED = (0.658909, 0.277268, 0.063823)
"""Where a policy gradient without baseline ends on data of the first behaviour."""


def arms(**settings: Any) -> LLM:
    """An agent on the three arms, uniform at first."""
    config = CoPG.Settings(model="tabular", optimiser="sgd", max_grad_norm=0.0, **settings)
    agent: LLM = CoPG(Arms(), config, seed=0)
    return agent


def table(arm: Tensor, group: Tensor, weight: Tensor) -> Data:
    """Arms ``[B]`` as completions of one token, in float64."""
    reward, reference = (torch.tensor(x, dtype=torch.float64) for x in ((1.0, 0.3, -0.5), REFERENCE))
    ones = torch.ones_like(weight)
    columns = {
        "action": arm.unsqueeze(0), "valid": ones.unsqueeze(0), "ref_log_prob": reference.log()[arm].unsqueeze(0),
        "prompt": torch.zeros(len(arm), 1, dtype=torch.int64), "episode_reward": reward[arm], "group": group,
        "weight": weight,
    }  # fmt: skip
    data = Data(columns, sequence=frozenset({"prompt", "episode_reward", "group", "weight"}))
    return data.epoch(Batching("group", "full"), None)[0]


def policy_gradient(baseline: str) -> Loss:
    """``-(R_beta - b) log pi``; the baseline is nothing, or a mean of R_beta over the data (weights) or the policy."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        regularised = (advantage - 0.5 * ratio.log_ratio[0]).detach()
        over = {
            "none": torch.zeros_like(regularised),
            "data": batch["weight"],
            "policy": ratio.log_prob[0].detach().exp(),
        }
        return -(regularised - (over[baseline] * regularised).sum()) * ratio.log_prob

    return loss


def exact_arms(loss: str, steps: int = 2000) -> tuple[float, ...]:
    """Final policy of gradient descent on the expectation; ``loss`` is contrast, or the baseline of a policy gradient
    on data of the first behaviour."""
    agent = arms(learning_rate=0.3)
    agent.policy.double()
    first, second = (torch.tensor(mu, dtype=torch.float64) for mu in (FIRST, SECOND))
    if loss == "contrast":
        left, right = torch.arange(3).repeat_interleave(3), torch.arange(3).repeat(3)
        # a pair's probability, nine times: the recipe takes the mean over the nine pairs
        weight = (9.0 * first[left] * second[right]).repeat(2)
        batch = table(torch.cat([left, right]), torch.arange(9).repeat(2), weight)
        terms = (replace(agent.estimator.phases()[0].terms[0], weight="weight", stats=None),)
    else:
        batch = table(torch.arange(3), torch.zeros(3, dtype=torch.int64), first)
        term = Term(
            "pg",
            policy_gradient(loss),
            aggregates.fixed(1.0),
            sequence_sum,
            advantage="episode_reward",
            weight="weight",
        )
        terms = (term,)
    for _ in range(steps):
        agent.updaters["policy"].step(terms, batch)
    return tuple(agent.policy.logits[0, 0].detach().softmax(0).tolist())


def sampled_arms(seed: int, iterations: int = 100) -> Tensor:
    """Final policy of the agent, trained on completions of the two behaviours and none of its own."""
    config = CoPG.Settings(
        model="tabular", optimiser="sgd", max_grad_norm=0.0, learning_rate=0.3, behaviours=("first", "second")
    )
    agent = CoPG(Arms(), config, seed=seed)
    for name, probabilities in (("first", FIRST), ("second", SECOND), ("live", REFERENCE)):
        with torch.no_grad():
            agent.policy.logits[0, 0] = torch.tensor(probabilities).log()
        if name != "live":
            agent.ctx.bank.refresh(name)
    agent.learn(iterations * 2 * agent.samples_per_iteration)
    table: Tensor = agent.policy.logits
    return table[0, 0].detach().softmax(0)


# -- a sequence bandit, offline -------------------------------------------------------------------------------------

BETA, EPOCHS, COMPLETIONS, GROUP = 0.05, 60, 512, 4


class Autoregressive(nn.Module):
    """Two layers from the tokens so far and the position to the logits of the next; uniform at first."""

    unit, temperature = "sequence", 1.0

    def __init__(self, length: int, symbols: int, hidden: int = 64) -> None:
        super().__init__()
        self.length, self.symbols = length, symbols
        last = nn.Linear(hidden, symbols)
        self.body = nn.Sequential(nn.Linear(length * symbols + length, hidden), nn.Tanh(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def outputs(self) -> frozenset[str]:
        return frozenset({"log_prob"})

    def features(self, tokens: Tensor) -> Tensor:
        """``[T, B, F]`` from tokens ``[T, B]``: what is known before each of them."""
        steps = tokens.shape[0]
        one_hot = F.one_hot(tokens, self.symbols).to(torch.float32)
        before = torch.ones(steps, steps).tril(-1)
        known = torch.einsum("ts,sbv->tbsv", before, one_hot).flatten(2)
        return torch.cat([known, torch.eye(steps).unsqueeze(1).expand(-1, tokens.shape[1], -1)], 2)

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        return token_outputs(self.body(self.features(batch["action"])), batch["action"], want, 1.0, 1)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[tuple[Tensor, int], Tensor]:
        tokens = torch.zeros(self.length, len(question), dtype=torch.int64)
        return (tokens, 0), self.body(self.features(tokens)[0])

    def step(self, state: tuple[Tensor, int], token: Tensor, present: Tensor) -> tuple[tuple[Tensor, int], Tensor]:
        tokens, t = state
        tokens[t] = token
        return (tokens, t + 1), self.body(self.features(tokens)[t + 1])

    def keep(self, state: tuple[Tensor, int], rows: Tensor) -> tuple[Tensor, int]:
        return state[0][:, rows], state[1]


class OfflineCoPG(LLM.of(CoPG)):  # type: ignore[misc]
    """On an autoregressive perceptron."""

    def make_model(self) -> nn.Module:
        return Autoregressive(self.task.fixed_length, self.task.vocab.size)


def preference(kind: str) -> Loss:
    """DPO or IPO on the pairs of neighbouring columns, the better one chosen; ties are left out."""

    def loss(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
        gain, score = (ratio.log_prob - ratio.log_ref)[0].view(-1, 2), advantage.view(-1, 2)
        sign = torch.sign(score[:, 0] - score[:, 1])
        margin = sign * (gain[:, 0] - gain[:, 1])
        value = -F.logsigmoid(BETA * margin) if kind == "DPO" else (margin - 1 / (2 * BETA)).square()
        return torch.where(sign != 0, value, 0.0).repeat_interleave(2).unsqueeze(0)

    return loss


def importance_weighted(ratio: LogRatio, advantage: Tensor, outputs: Outputs, batch: Data) -> Tensor:
    """Policy gradient on regularised rewards with sequence weights pi / mu and the weighted mean as baseline."""
    weight = (ratio.log_prob[0].detach() - batch["log_prob"].sum(0)).exp()
    regularised = (advantage - BETA * ratio.log_ratio[0]).detach()
    baseline = (weight * regularised).sum() / weight.sum().clamp_min(1e-8)
    return (-weight * (regularised - baseline) * ratio.log_prob[0]).unsqueeze(0)


def offline(method: str, seed: int, learning_rate: float = 3e-3) -> list[float]:
    """Regularised return ``E[R] - beta KL`` of the policy after every tenth epoch, of 4,096 samples each. The data are
    of a policy with half of chance's odds for each right token."""
    config = CoPG.Settings(
        beta=BETA,
        group_size=GROUP,
        n_prompts=COMPLETIONS // GROUP,
        learning_rate=learning_rate,
        optimiser="adamw",
        max_grad_norm=1.0,
    )
    task = SequenceMatch(questions=1, fixed_length=6, symbols=8, seed=seed)
    agent = OfflineCoPG(task, config, seed=seed)
    agent.ctx.bank.refresh("ref")
    assert task.demonstrations is not None
    bad = torch.zeros(1, 6, 8).scatter(2, task.demonstrations.unsqueeze(2), math.log(0.5))
    agent.ctx.bank._versions["bad"] = TabularTokenPolicy(1, 6, 8, init=bad)
    with torch.no_grad():
        request = replace(agent.estimator.parts.request, params="bad")
        data = agent.estimator.prepare(
            {"on": agent.collector.collect(request, agent.ctx.bank.policy("bad"))}, agent.ctx
        )["on"]  # fmt: skip
    losses: dict[str, Loss] = {"DPO": preference("DPO"), "IPO": preference("IPO"), "IW-PG": importance_weighted}
    terms = agent.estimator.phases()[0].terms
    if method != "CoPG":
        terms = (Term(method, losses[method], aggregates.sequence_mean, sequence_sum, advantage="episode_reward"),)
    prompts, curve = agent.collector.test_prompts(1, 0), list[float]()
    for epoch in range(1, EPOCHS + 1):
        for batch in data.epoch(Batching("group", 32), agent.ctx.generator):
            agent.updaters["policy"].step(terms, batch)
        if epoch % 10 == 0:
            drawn = agent.collector.sample(
                agent.policy, prompts, torch.zeros(4096, dtype=torch.int64), tag="episode_reward"
            )
            # the reference is uniform
            kl = drawn["log_prob"].sum(0).mean() + 6 * math.log(8)
            curve.append(float(drawn["episode_reward"].mean() - BETA * kl))
    return curve


def best_return() -> float:
    """``beta log E_ref[exp(R / beta)]``."""
    return BETA * 6 * math.log((7 + math.exp(1 / (6 * BETA))) / 8)


def run(seeds: list[int]) -> list[Measurement]:
    """Final policies of the arms, then regularised returns of the sequences."""
    rows = list[Measurement]()
    for loss, name, target in (
        ("contrast", "CoPG, two behaviours", OPTIMUM),
        ("none", "off-policy PG, no baseline", BIASED),
        ("data", "off-policy PG, baseline over the data", OPTIMUM),
        ("policy", "off-policy PG, baseline over the policy", OPTIMUM),
    ):
        found = exact_arms(loss)
        source = "closed form" if target is OPTIMUM else "fixed point"
        for arm, (value, expected) in enumerate(zip(found, target)):
            accept = (expected - 2e-6, expected + 2e-6)
            rows.append(Measurement(f"{name}: probability of arm {arm}", f"{expected} ({source})", accept, (value,)))
    error = tuple(float((sampled_arms(seed) - torch.tensor(OPTIMUM)).abs().max()) for seed in seeds)
    rows.append(Measurement("CoPG on samples of two behaviours: largest error", "0 (theory)", (0.0, 0.01), error))
    curves = {m: [offline(m, seed) for seed in seeds] for m in ("CoPG", "DPO", "IPO", "IW-PG")}
    last = {m: tuple(c[-1] for c in curve) for m, curve in curves.items()}
    best, inf = best_return(), float("inf")
    share = tuple(v / best for v in last["CoPG"])
    rows.append(
        Measurement(
            "offline sequences: CoPG's regularised return over the optimum's", "1 (theory)", (0.95, 1.001), share
        )
    )
    for other in ("DPO", "IPO", "IW-PG"):
        # each method's best epoch against CoPG's last one
        gap = tuple(c - max(o) for c, o in zip(last["CoPG"], curves[other]))
        rows.append(Measurement(f"offline sequences: CoPG minus best epoch of {other}", "> 0 (claim)", (0.0, inf), gap))
    return rows
