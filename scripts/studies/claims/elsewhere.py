"""Papers whose claim has no tuned test: what a small experiment says, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ccrl.experiment.csv_table import read_rows
from ccrl.stats import t_interval
from scripts import reproduce

__all__ = ["OTHERS", "Other", "lines"]

VERDICTS = {"yes": "supported", "open": "not supported", "no": "contradicted"}
"""Of a claim's interval beside its range."""


@dataclass(frozen=True)
class Other:
    """A paper's central claim and where it was looked at."""

    paper: str
    """Slug of its method."""
    claim: str
    page: str
    """Of the method, from ``docs``."""
    quantity: str = ""
    """The number of ``docs/figures/reproductions`` that is the claim's; empty: another study's, or none."""
    curves: tuple[str, str, str, dict[str, str], dict[str, str]] | None = None
    """Or a study's file, the columns of the score and of the clock, and which rows are claimed to be better and which
    worse: the paired difference at the end of the clock."""
    why: str = ""
    """Why it is not testable here, or what qualifies the number."""


OTHERS = (
    Other("adora", "weights by length and success lengthen where length helps, more than a larger step does",
          "llm/adora.md",
          "tokens on hard questions after 75 updates, amplification minus GRPO with twice the step"),
    Other("awm", "matching clean samples has a less noisy gradient than matching noisy steps", "awm.md",
          "relative gradient variance, flow_grpo over AWM ghuber", why="ring of 8 Gaussians"),
    Other("capo", "leaving out what shifts the policy most bounds the shift of an update", "llm/capo.md",
          "largest mean KL of an update, no threshold minus tau_F = 100",
          why="no collapse of the rivals was seen, so what the bound buys is not shown"),
    Other("cdsa", "correcting actions toward the data keeps any offline policy safe", "cdsa.md",
          why="D4RL's data sets are not here; the corridor, the maze and Hopper's set are our own, on three seeds"),
    Other("copo", "a global loss teaches from unanimous groups", "llm/copo.md",
          "the same after 200 updates, soft blend minus GRPO"),
    Other("crossq", "no target network and batch normalisation: more per sample than SAC", "crossq.md",
          why="`scripts/studies/offpolicy` has three seeds of 100,000 steps, with critics narrower than published"),
    Other("detan", "acting for a stock-augmented return optimises any level of it", "distributional.md",
          why="exactly computed on a chain: an identity, not a comparison"),
    Other("diffusion_nft", "one forward process improves a flow from positive and negative samples", "flow.md",
          why="image models; here a baseline of the other flow methods"),
    Other("diffusion_opd", "closed-form distillation on the student's states is better than its policy gradient",
          "diffusion_opd.md", "closed form less policy gradient, rounds 50 and 75"),
    Other("div_prec", "a shaped pre-training loss is a better start for reinforcement", "llm/div_prec.md",
          "pass@8 after GRPO, beta -0.25 minus cross entropy",
          why="the same to 2e-6: cannot tell; on a small language model better ([entropy](llm/separate.md#entropy))"),
    Other("epo", "a corridor around past entropies steadies them more than a bonus", "llm/epo.md",
          "the same, bonus and corridor minus bonus"),
    Other("etr", "elastic clip ranges learn faster than constant ones of the same mean", "llm/etr.md",
          "the same, implicit_sq minus a constant range of the same mean", why="a reconstruction: no code is public"),
    Other("flow_ppo", "policy gradients through denoising steps fine-tune a cloned policy", "flow_ppo.md",
          why="three seeds of a point maze and of Hopper; no rival was run"),
    Other("grpo_guard", "normalised ratios of denoising steps are centred", "grpo_guard.md",
          "largest |mean ratio less 1| over t <= 0.875: Flow-GRPO over Guard"),
    Other("knapsack_rl", "rollouts given to where they teach succeed more at equal numbers", "llm/knapsack_rl.md",
          "final success on all questions, knapsack minus uniform"),
    Other("mdpo_off_policy", "Tsallis entropies and mirror descent, from replay, are no worse than SAC",
          "mdpo_off_policy.md", why="`scripts/studies/offpolicy` has three seeds of Hopper and no tuning"),
    Other("mmr1_vas", "drawing prompts by their reward variance succeeds more", "llm/mmr1_vas.md",
          "success after all updates, lambda 0.5 minus 0", why="not at equal completions with the probes counted"),
    Other("oblr_po", "a schedule that follows the noise ends lower than a constant step", "llm/oblr_po.md",
          "bowl: loss over the last 100 of 400 steps, schedule over constant step", why="a bowl; a reconstruction"),
    Other("orpo", "a chi-squared penalty of occupancies keeps more true return than one of actions", "orpo.md",
          curves=("hacking_tomato.csv", "true", "iteration", {"method": "sqrt_chi2", "weight": "0.623"},
                  {"method": "action_kl", "weight": "0.03"}),
          why="weights chosen on the reported seeds; on a small language model a KL per token keeps more "
              "([ORPO](orpo.md#verdict))"),
    Other("p3o", "pairwise ratios do not feel a shift of the rewards per prompt", "llm/p3o.md",
          "share of the best reward at shift 10, P3O-V2 minus PPO without a baseline"),
    Other("pf_ppo", "training on the best and the worst sample alone ends with more true success", "llm/pf_ppo.md",
          "errors of completions: true success after training, BW minus no filter",
          why="with errors drawn anew for every sample it is open"),
    Other("pgd", "guidance by the policy generates data that a better policy can be trained on", "pgd.md",
          why="three seeds of a point maze, where guided rows are worse than real ones; the claim is about contacts"),
    Other("polar", "a reward model that compares policies gives a usable reward", "llm/polar.md",
          "reward alone: KL(target || policy), nats, 300 iterations minus 0",
          why="three seeds; after 60 iterations, and with the entropy part, it falls in all of them"),
    Other("qr_dqn", "quantiles of the return learn more than its mean", "qr_dqn.md", why="Atari was not run"),
    Other("rpo", "an imitation term against over-optimisation ends with more true reward than DPO", "llm/rpo.md",
          "preferences by Bradley-Terry: true reward at the end, RPO (eta 0.005) minus DPO"),
    Other("subpo", "marginal gains maximise a submodular return where additive rewards stay in one place", "subpo.md",
          curves=("submodular_grid.csv", "value", "iteration", {"method": "SubPO-NM"}, {"method": "ModPO"})),
    Other("v0", "success of unseen policies is predicted from outcomes in context", "llm/v0.md",
          "V0 minus nearest 16, context of 256", why="simulated policies; language models were not run"),
)  # fmt: skip


def lines(folder: Path) -> list[str]:
    """A Markdown table from the files of ``folder`` (``docs/figures``)."""
    found = ["| paper | claim | n | effect | verdict | |", "|---|---|--:|---|---|---|"]
    for other in OTHERS:
        n, effect, verdict = _measured(other, folder)
        where = f"`{other.quantity}`" if other.quantity else ""
        note = "; ".join(text for text in (where, other.why) if text).replace("|", chr(92) + "|")
        found.append(f"| [{other.paper}]({other.page}) | {other.claim} | {n} | {effect} | {verdict} | {note} |")
    return found


def _measured(other: Other, folder: Path) -> tuple[str, str, str]:
    if other.quantity:
        numbers, *_ = reproduce.load(folder / "reproductions" / f"{other.paper}.csv")
        row = next(row for row in numbers if row.quantity == other.quantity)
        low, high = row.interval
        return str(len(row.values)), f"{row.mean:.3g} [{low:.3g}, {high:.3g}]", VERDICTS[row.verdict]
    if other.curves is None:
        return "", "", "not testable here"
    name, score, clock, better, worse = other.curves
    rows = read_rows(folder / name)
    a, b = (_ends(rows, which, score, clock) for which in (better, worse))
    seeds = sorted(a.keys() & b.keys())
    mean, low, high = (float(x) for x in t_interval([a[s] - b[s] for s in seeds]))
    verdict = "yes" if low > 0 else "no" if high < 0 else "open"
    return str(len(seeds)), f"{mean:.3g} [{low:.3g}, {high:.3g}]", VERDICTS[verdict]


def _ends(rows: list[dict[str, str]], which: dict[str, str], score: str, clock: str) -> dict[str, float]:
    """By seed: the score where the clock is highest."""
    last: dict[str, tuple[float, float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in which.items()):
            last[row["seed"]] = max(last.get(row["seed"], (-1.0, 0.0)), (float(row[clock]), float(row[score])))
    return {seed: value for seed, (_, value) in last.items()}
