"""Tested claims: equal budgets, disjoint seeds, paired differences by hand, resuming, the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ccrl.experiment.csv_table import read_rows
from ccrl.packages import ROOT
from scripts.methods import methods
from scripts.studies.claims import study
from scripts.studies.claims.claim import Arm, Claim, judge, run
from scripts.studies.claims.control import mean_over_steps
from scripts.studies.claims.elsewhere import OTHERS, lines


def score(shift: float) -> Callable[..., float]:
    """Best at rate 2; ``shift`` above the seed's own number."""
    return lambda seed, rate: float(seed % 7) + shift - (rate - 2.0) ** 2


GRID = tuple({"rate": rate} for rate in (1.0, 2.0, 3.0))
CLAIM = Claim(
    "paper.what", "a is better", "numbers", "points",
    (Arm("a", score(0.5), GRID), Arm("b", score(0.0), GRID), Arm("c", score(0.0), GRID)),
    (("a", "b"), ("b", "c")),
    tuning_seeds=2, test_seeds=4,
)  # fmt: skip


def play(cell: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"score": CLAIM.arm(cell["arm"]).play(cell["seed"], **json.loads(cell["settings"]))}]


def test_settings_are_chosen_on_other_seeds_than_those_reported(tmp_path: Path) -> None:
    rows = run(CLAIM, tmp_path / "x.csv", play)
    assert {int(r["seed"]) for r in rows if r["purpose"] == "tune"} == {1000, 1001}
    tests = [r for r in rows if r["purpose"] == "test"]
    assert {int(r["seed"]) for r in tests} == {100, 101, 102, 103}
    assert {r["settings"] for r in tests} == {'{"rate": 2.0}'}
    assert len(rows) == 3 * 3 * 2 + 3 * 4
    assert rows[0]["threads"] == "1"
    assert rows[0]["torch"]

    def never(cell: dict[str, Any]) -> list[dict[str, Any]]:
        raise AssertionError("every cell is in the file")

    assert run(CLAIM, tmp_path / "x.csv", never) == rows


def test_whether_a_run_was_compiled_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(seed: int) -> float:
        return float(torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(())))

    arms = (Arm("eager", lambda seed: 1.0, ({},)), Arm("compiled", compiled, ({},)))
    monkeypatch.setitem(study.CLAIMS, CLAIM.name, replace(CLAIM, arms=arms, pairs=(("eager", "compiled"),)))
    cell = {"claim": CLAIM.name, "seed": 0, "settings": "{}"}
    assert study.play(cell | {"arm": "compiled"}) == [{"score": 1.0, "compile": "on"}]
    assert study.play(cell | {"arm": "eager"}) == [{"score": 1.0, "compile": "off"}]


def test_paired_differences_by_hand() -> None:
    noise = {"a": [1.0, 2.0, 3.0, 4.0], "b": [0.5, 1.0, 2.5, 3.0], "c": [0.5, 1.0, 2.5, 3.0]}
    rows = [
        {"purpose": "test", "arm": arm, "settings": '{"rate": 3.0}', "seed": str(100 + i), "score": str(value)}
        for arm, values in noise.items() for i, value in enumerate(values)
    ]  # fmt: skip
    tries = [
        {"purpose": "tune", "arm": arm, "settings": json.dumps(grid), "seed": "1000", "score": str(grid["rate"])}
        for arm in "abc" for grid in GRID
    ]  # fmt: skip
    # of the settings before the grid was wider: no part of the comparison
    old = [row | {"settings": '{"rate": 1.0}', "score": "99"} for row in rows if row["arm"] == "b"]
    rows += tries + old
    first, second = judge(CLAIM, rows)
    # differences .5, 1, .5, 1: mean .75, deviation .2887, standard error .1443, t = 5.196 with 3 degrees: p = .0138
    assert first.difference.difference == 0.75
    assert first.difference.p == pytest.approx(0.01385, abs=1e-4)
    assert first.adjusted == pytest.approx(2 * first.difference.p)  # the smaller of two
    assert (first.verdict, second.verdict) == ("supported", "not supported")
    assert second.adjusted == 1.0
    turned = replace(CLAIM, pairs=(("b", "a"),))
    assert judge(turned, rows)[0].verdict == "contradicted"
    assert judge(turned, rows)[0].adjusted == pytest.approx(first.difference.p)  # one comparison


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": (("a", "z"),)}, r"expected pairs of \['a', 'b', 'c'\], got \['z'\]"),
        ({"arms": (Arm("a", score(0), GRID), Arm("b", score(0), GRID[:1])), "pairs": (("a", "b"),)},
         r"as many settings for every arm, got \{'a': 3, 'b': 1\}"),
        ({"test_seeds": 2000}, "seeds: expected from 100 to 999"),
    ],
)  # fmt: skip
def test_unfair_claims_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CLAIM, **change)


def test_the_page_shows_complete_claims_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(CLAIM, name="later")
    monkeypatch.setattr(study, "CLAIMS", {"paper.what": CLAIM, "later": other})
    found = study.main(study.Options(papers=("paper",), results=tmp_path))
    assert list(found) == ["paper.what"]
    text = (tmp_path / "claims.md").read_text()
    assert "| [paper.what](#paper-what) | a - b | 4 | +0.5 [0.5, 0.5] | 0 | supported |" in text
    assert "| b - c | 4 | +0 [0, 0] | 1 | not supported |" in text
    assert '| a | `{"rate": 2.0}` |' in text
    assert "run to the end yet: later (" in text
    assert "## later" not in text
    assert "of its grid" not in text
    assert len(read_rows(tmp_path / "paper.what.csv")) == 30
    with pytest.raises(ValueError, match=r"expected papers among \['later', 'paper'\], got \['nobody'\]"):
        study.main(study.Options(papers=("nobody",), results=tmp_path))


@pytest.mark.parametrize("name", ["bnpo", "gdpo", "g2rpo"])
def test_a_short_claim_plays(name: str) -> None:
    arm = study.CLAIMS[name].arms[0]
    value = arm.play(1000, **arm.grid[0])
    assert math.isfinite(value)
    assert value == arm.play(1000, **arm.grid[0])
    assert value != arm.play(1001, **arm.grid[0])


def test_a_curve_is_weighed_by_its_steps() -> None:
    curve = [{"steps": 10, "return": 1.0}, {"steps": 30, "return": 4.0}, {"steps": 70, "return": 9.0}]
    # of 50 steps the first 10 count 1, the next 20 count 4, the last 20 count 9: (10 + 80 + 180) / 50
    assert mean_over_steps(curve, 50) == pytest.approx(5.4)
    with pytest.raises(ValueError, match="a curve of at least 71 steps, got 70"):
        mean_over_steps(curve, 71)


def test_a_setting_at_the_end_of_its_grid_is_said() -> None:
    arm = Arm("a", score(0.0), tuple({"learning_rate": rate} for rate in (0.1, 0.2, 0.4)))
    assert study.edge(arm, '{"learning_rate": 0.2}') == ""
    assert study.edge(arm, '{"learning_rate": 0.1}') == " (learning_rate is the smallest of its grid)"
    assert study.edge(arm, '{"learning_rate": 0.4}') == " (learning_rate is the largest of its grid)"
    two = tuple({"rate": rate, "weight": weight} for rate in (1.0, 2.0) for weight in (0.1, 0.2, 0.3))
    # of two values one is always at an end, and the rival may have had larger ones
    both = '{"rate": 2.0, "weight": 0.3}'
    said = " (rate is the larger of two tried, weight is the largest of its grid)"
    assert study.edge(Arm("b", score(0.0), two), both) == said
    inside = '{"rate": 1.0, "weight": 0.2}'
    assert study.edge(Arm("b", score(0.0), two), inside) == " (rate is the smaller of two tried)"


def test_the_page_is_that_of_the_kept_results(tmp_path: Path) -> None:
    study.main(study.Options(page_only=True, page=tmp_path / "claims.md"))
    kept = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    assert (tmp_path / "claims.md").read_text(encoding="utf-8") == kept, "scripts/studies/claims --page-only"


BASELINES = {
    "a2c", "bc", "cispo", "dapo", "dpo", "dqn", "dr_grpo", "flow_grpo", "grouped", "grpo", "gspo", "iql", "ipo", "ppo",
    "ppo_llm", "rebrac", "reinforce", "rloo", "sac", "sapo", "sft", "td3", "td3_bc",
}  # fmt: skip


def test_every_papers_claim_is_on_the_page() -> None:
    tested, others = {claim.paper for claim in study.CLAIMS.values()}, {other.paper for other in OTHERS}
    assert not tested & others
    # what landed since has a claim, a line that says why not, or is a baseline
    assert {entry.slug for entry in methods()} - {"llm"} == tested | others | BASELINES


def test_verdicts_of_small_experiments_are_those_of_their_files() -> None:
    table = {line.split("|")[1].strip(): line for line in lines(ROOT / "docs" / "figures")[2:]}
    assert "not testable here" in table["[qr_dqn](qr_dqn.md)"]
    # ADORA's interval lies below 0 where the claim is above; OBLR-PO's is below 1, the end of its range
    assert "| contradicted |" in table["[adora](llm/adora.md)"]
    assert "| supported |" in table["[oblr_po](llm/oblr_po.md)"]
