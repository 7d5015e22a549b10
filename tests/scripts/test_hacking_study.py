"""The study of reward hacking: its exact table to the digit, and its files from tiny runs."""

from __future__ import annotations

import pytest

from scripts.studies.hacking.exact import measured, objective, optimise, tomato_reference
from scripts.studies.hacking.sampled import judged, parse
from scripts.studies.hacking.study import main


@pytest.mark.parametrize(
    ("method", "weight", "true", "proxy", "chi2"),
    [
        ("none", 0.0, 0.0026, 0.2096, 1.2e4),
        ("sqrt-chi2", 0.622909, 0.0945, 0.0971, 0.136),
        ("sqrt-chi2", 0.5, 0.0951, 0.0988, 0.250),
        ("sqrt-chi2", 0.3, 0.0926, 0.1030, 1.01),
        ("action KL", 0.3, 0.0934, 0.0944, 0.065),
        ("action KL", 0.1, 0.0190, 0.1997, 344.0),
    ],
)
def test_the_exact_table(method, weight, true, proxy, chi2):
    task, reference, _ = tomato_reference()
    found = measured(task, optimise(method, weight, 400), reference)
    # the last digit is rounded: 400 steps end near the optimum, where it moves with the order of additions
    assert found["J_true"] == pytest.approx(true, abs=6e-5)
    assert found["J_proxy"] == pytest.approx(proxy, abs=6e-5)
    assert found["chi2"] == pytest.approx(chi2, rel=0.03)


def test_the_study_resumes_and_writes_its_files(tmp_path):
    argv = ["exact", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures"), "--steps", "2"]
    argv += ["--converge", "3", "--weights", "0.5", "--action-weights", "0.3"]
    (first,) = main(argv)
    assert [row["method"] for row in first] == [
        "reference", "true optimum", "none", "sqrt-chi2", "sqrt-chi2", "action KL",
    ]  # fmt: skip
    assert first[0]["chi2"] == pytest.approx(0.0, abs=1e-12)
    before = (tmp_path / "out" / "exact.csv").read_text()
    assert repr(main(argv)) == repr([first])
    assert (tmp_path / "out" / "exact.csv").read_text() == before, "nothing ran again"
    for suffix in (".md", ".csv", ".png"):
        assert (tmp_path / "figures" / f"hacking_exact{suffix}").exists()


def test_at_c_1_the_reference_is_optimal():
    """The proxy gains at most sigma sqrt(chi^2). Steps of one size chatter around the kink, below the reference."""
    task, reference, _ = tomato_reference()
    best = float(objective("sqrt-chi2", 1.0, task.occupancy(reference)))
    assert best == pytest.approx(measured(task, reference, reference)["J_proxy"], abs=1e-6)
    for steps in (1, 20):
        assert float(objective("sqrt-chi2", 1.0, task.occupancy(optimise("sqrt-chi2", 1.0, steps)))) < best


@pytest.mark.parametrize("task", ["tomato", "point"])
def test_sampled_studies(task, tmp_path):
    argv = [task, "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "2", "--iterations", "1"]
    table, verdict, *proxies = main([*argv, "--tried", "none", "sqrt_chi2:0.5", "action_kl:0.1", "stop:1e-9"])
    assert [row["method"] for row in table] == ["none", "sqrt_chi2", "action_kl", "stop"]
    assert all(0.0 < row["true return"] < 50.0 for row in table)
    assert [row["method, weight from the other seeds"] for row in verdict] == [row["method"] for row in table]
    assert [0.5 < row["correlation"] < 1.0 for rows in proxies for row in rows] == [True] * 2 * (task == "point")
    assert (tmp_path / f"hacking_{task}.png").exists()


def test_weights_are_chosen_on_the_other_seeds():
    # weight 1: 0, 0, 9; weight 2: 4, 4, 4. Seed 2 alone likes weight 1: the others choose 2 for it; without seed 0 or 1
    # the means are 4.5 and 4, which choose 1 for those two
    true = {(1.0, 0): 0.0, (1.0, 1): 0.0, (1.0, 2): 9.0, (2.0, 0): 4.0, (2.0, 1): 4.0, (2.0, 2): 4.0}
    rows = [{"method": "a", "weight": w, "seed": s, "iteration": 3, "true": x} for (w, s), x in true.items()]
    rows += [{**row, "iteration": 1, "true": 100.0} for row in rows]  # only the last point counts
    assert judged(rows, "a", [1.0, 2.0]) == [0.0, 0.0, 4.0]


@pytest.mark.parametrize("text", ["sqrt_chi2", "sqrt_chi2:x", "sqrt_chi2:-1", "none:1", "stop:inf"])
def test_curves_have_a_method_and_a_weight(text):
    assert parse("none") == ("none", 0.0)
    assert parse("stop:2") == ("stop", 2.0)
    with pytest.raises(ValueError, match="METHOD:WEIGHT"):
        parse(text)


def test_unknown_studies_are_refused():
    with pytest.raises(ValueError, match="expected one of exact"):
        main(["traffic"])
