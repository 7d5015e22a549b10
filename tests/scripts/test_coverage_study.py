import csv

import numpy as np
import pytest

from ccrl.packages import ROOT
from ccrl.stats import iqm, stratified_bootstrap
from scripts.studies.coverage.__main__ import Options, bootstrap, main


def test_a_tiny_simulation(tmp_path):
    text = main(Options(out=tmp_path, runs=(3, 8), data_sets=300, repetitions=100))
    assert (tmp_path / "interval_coverage.md").read_text() == text
    found = list(csv.DictReader((tmp_path / "interval_coverage.csv").open()))
    assert len(found) == 3 * (4 + 5)  # a tolerance interval needs eight runs
    value = {(r["distribution"], r["interval"], r["runs"]): float(r["coverage"]) for r in found}
    assert value["normal", "mean, t", "3"] == pytest.approx(0.95, abs=0.05)  # exact; 4 standard errors of 300
    assert value["normal", "mean, percentile bootstrap", "3"] < 0.85  # at most ten different resamples


def test_the_rows_are_bootstrapped_as_the_package_does():
    x = np.random.default_rng(0).gamma(2.0, size=(1, 9))
    low, high = bootstrap(x, iqm, 20_000, np.random.default_rng(1))
    ours = stratified_bootstrap(x.T, repetitions=20_000)
    assert (low[0], high[0]) == pytest.approx((ours.low, ours.high), abs=0.05 * float(ours.high - ours.low))


def test_the_page_has_the_kept_table():
    kept = (ROOT / "docs" / "figures" / "interval_coverage.md").read_text()
    rows = [line for line in kept.split("\n") if line.startswith("| ")]
    assert "\n".join(rows[1:]) in (ROOT / "docs" / "statistics.md").read_text()
    assert len(rows) == 1 + 3 * 5


def test_bad_settings():
    with pytest.raises(ValueError, match="runs >= 2"):
        Options(runs=(1,))
