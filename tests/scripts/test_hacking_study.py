"""The study of reward hacking: its exact table to the digit, and its files from tiny runs."""

from __future__ import annotations

import pytest

from scripts.studies.hacking.study import main, measured, optimise, tomato_reference


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
    argv += ["--weights", "0.5", "--action-weights", "0.3"]
    first = main(argv)
    assert [row["method"] for row in first] == [
        "reference", "true optimum", "none", "sqrt-chi2", "sqrt-chi2", "action KL",
    ]  # fmt: skip
    assert first[0]["chi2"] == pytest.approx(0.0, abs=1e-12)
    before = (tmp_path / "out" / "exact.csv").read_text()
    assert repr(main(argv)) == repr(first)
    assert (tmp_path / "out" / "exact.csv").read_text() == before, "nothing ran again"
    for suffix in (".md", ".csv", ".png"):
        assert (tmp_path / "figures" / f"hacking_exact{suffix}").exists()


@pytest.mark.parametrize("task", ["tomato", "point"])
def test_sampled_studies(task, tmp_path):
    argv = [task, "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "1", "--iterations", "1"]
    rows = main([*argv, "--weights", "0.5", "--action-weights", "0.1"])
    assert [row["method"] for row in rows] == ["first rollout", "none", "sqrt_chi2", "action_kl"]
    assert 0.0 < rows[0]["true return"] < 50.0
    assert (tmp_path / f"hacking_{task}.png").exists()


def test_unknown_studies_are_refused():
    with pytest.raises(ValueError, match="expected exact"):
        main(["traffic"])
