"""The page of the tuned settings, from the rows."""

from __future__ import annotations

import math

from ccrl.packages import check_siblings

check_siblings("agents")

from agents import tuned
from ccrl.experiment.logger import digits
from ccrl.stats import welch_t
from scripts.studies.tuned.pairs import BESIDE, PAIRS, Pair, Result, reached

__all__ = ["page"]


def page(rows: list[dict[str, str]]) -> str:
    """Markdown: what was reached with each file of settings, and those that were not run."""
    found = {(pair.agent, pair.env): reached(pair, rows) for pair in PAIRS}
    lines = [HEAD, *_missing(found), "",
             "| agent | environment | steps | seeds | deterministic | stochastic | CPU minutes a run | source |",
             "|---|---|--:|---|--:|--:|--:|---|"]  # fmt: skip
    for agent, files in tuned.tuned().items():
        for env, path in files.items():
            result, cells = found.get((agent, env)), ["", "", "not yet run here", "", ""]
            if result is not None:
                minutes = "" if math.isnan(result.cpu_minutes) else f"{result.cpu_minutes:.1f}"
                cells = [f"{result.step:,}", _span(result.seeds), result.text(result.returns),
                         result.text(result.stochastic), minutes]  # fmt: skip
            lines.append(f"| {agent} | {env} | {' | '.join(cells)} | {tuned.head(path)['Source']} |")
    lines += _beside(rows)
    made = sorted({row["commit"] for row in rows if row["commit"]})
    how = sorted({f"PyTorch {row['torch']}, {row['threads']} thread" for row in rows})
    if made:
        lines += ["", f"Runs were made by {'; '.join(how)}, one process each; commits {', '.join(made)}."]
    return "\n".join(lines) + "\n"


def _beside(rows: list[dict[str, str]]) -> list[str]:
    """SB3 with the same settings, where it was run."""
    both = [(reached(pair, rows), reached(Pair(pair.ours, pair.env), rows)) for pair in BESIDE]
    lines = []
    for pair, (theirs, ours) in zip(BESIDE, both):
        if theirs is None or ours is None:
            continue
        cells = [pair.env, _span(theirs.seeds), theirs.text(theirs.returns), _span(ours.seeds), ours.text(ours.returns)]
        if min(len(theirs.seeds), len(ours.seeds)) > 1:
            mean, low, high, _ = welch_t(ours.returns, theirs.returns)
            cells.append(f"{digits(mean)} [{digits(low)}, {digits(high)}]")
        else:
            cells.append("")
        cells.append(f"{ours.cpu_minutes:.1f}, {theirs.cpu_minutes:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*BESIDE_HEAD.splitlines(), *lines] if lines else []


def _span(seeds: list[int]) -> str:
    whole = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
    return f"{len(seeds)}: {seeds[0]} to {seeds[-1]}" if whole else f"{len(seeds)}: {', '.join(map(str, seeds))}"


def _missing(found: dict[tuple[str, str], Result | None]) -> list[str]:
    """Which pairs of the study have no runs, or fewer than the others."""
    none = [f"{agent} on {env}" for (agent, env), result in found.items() if result is None]
    few = [f"{agent} on {env} ({len(result.seeds)})" for (agent, env), result in found.items()
           if result is not None and len(result.seeds) < 3]  # fmt: skip
    if not none:
        lines = [f"All {len(found)} pairs of the study are run."]
    else:
        lines = [f"**{len(found) - len(none)} of the study's {len(found)} pairs are run.** Not yet: {', '.join(none)}."]
    if few:
        lines.append(f"Of fewer than three seeds, so that their intervals say little: {', '.join(few)}.")
    return [" ".join([*lines, "The other files, of simulators and humanoids, are no part of it."])]


HEAD = """# Tuned settings

```bash
python scripts/train.py ppo --env Hopper-v5 --tuned                      # flags win over the file
python scripts/train.py ppo --env Hopper-v5 --tuned --learning-rate 3e-4 --seed 1
```

Settings per agent and environment are YAML files of the package, `agents/settings/AGENT/ENVIRONMENT.yaml`; a pair that
has none is refused, and the message names those that exist. A file says where its settings are from: published ones of
rl-baselines3-zoo where the algorithm is the same, the paper's, or a search here ([Tuning](tuning.md)).

## What was reached here

Returns are means over seeds of each run's last two evaluations of twenty, ten episodes each, with Student's 95 %
interval. Seeds are from 100 on ([protocol](protocol.md)), but for SAC on HalfCheetah, Hopper and Walker2d: those are
the runs of the [off-policy study](off_policy_curves.md), which trains with the same settings on seeds from 0, tuned
nothing, and kept no stochastic evaluations. Where fewer steps were trained than the file says, the column says so. CPU
minutes are without evaluation, the median of the runs that were not broken off.

```bash
python scripts/studies/tuned --out results/tuned        # goes on where it stopped
python scripts/studies/tuned --page-only                # this page from the rows
python scripts/plot.py docs/figures/tuned.csv --out figures/tuned
```

Every evaluation is a row of `docs/figures/tuned.csv`, or, for SAC's three, of `docs/figures/offpolicy_runs.csv`.
`plot.py` and `report.py` take both as they are: put your own rows beside them, or them beside your own runs. Settings
that were published for v2 and v3 tasks are used on v5 as they are: where an interval is wide, or PPO is below MDPO and
BPO on the same task, a search may be worth its cost.
"""

BESIDE_HEAD = """
## The same settings in Stable-Baselines3

Are these settings weak here because of our code? SB3's PPO was run with the values of the same files, with VecNormalize
and on the same environments: deterministic returns as above, the difference with Welch's 95 % interval. A single run
has no interval; the study asks for three, and those that are not listed were not run.

```bash
python scripts/studies/tuned --out results/tuned --only sb3:ppo
```

| environment | seeds | SB3 | seeds | ours | ours minus SB3's | CPU minutes a run: ours, SB3's |
|---|---|--:|---|--:|--:|--:|
"""
