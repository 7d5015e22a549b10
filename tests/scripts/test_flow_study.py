"""The studies of flow policies: tiny runs resume and write their files."""

from __future__ import annotations

import math

import pytest

from scripts.reproductions import awm, diffusion_opd
from scripts.studies.flow import distil
from scripts.studies.flow.study import chosen, gold_at, main, steps_to


def test_a_study_resumes_and_writes_its_files(tmp_path, monkeypatch):
    argv = ["guard", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures"), "--seeds", "2"]
    argv += ["--iterations", "1", "--every", "1"]
    (table,) = main(argv)
    assert [row["method"] for row in table][:1] == ["flow_grpo"]
    assert all(row["seeds"] == 2 for row in table)
    assert all(math.isfinite(row["gold"]) for row in table)
    before = (tmp_path / "out" / "guard.csv").read_text()
    assert repr(main(argv)) == repr([table])
    assert (tmp_path / "out" / "guard.csv").read_text() == before, "nothing ran again"
    for suffix in (".md", ".csv", ".png"):
        assert (tmp_path / "figures" / f"flow_guard{suffix}").exists()


@pytest.fixture
def quick(monkeypatch):
    """Pre-training of two steps, small groups."""
    caches = (awm.base, diffusion_opd.start, distil._start, distil._alone)
    for cached in caches:
        cached.cache_clear()
    for settings in (awm.START, diffusion_opd.SIZE):
        monkeypatch.setitem(settings, "warm_start_steps", 2)
    monkeypatch.setitem(diffusion_opd.SIZE, "teacher_steps", 2)
    for settings in (diffusion_opd.SIZE, distil.RL, awm.SIZE):
        monkeypatch.setitem(settings, "group_size", 4)
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("name", ["awm", "opd", "opd_scales"])
def test_studies_from_a_shared_start(name, tmp_path, quick):
    argv = [name, "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "1", "--iterations", "4"]
    (table,) = main([*argv, "--every", "1"])
    assert len(table) >= 4


def test_variance_by_design(tmp_path, quick):
    (table,) = main(["variance", "--figures", str(tmp_path), "--seeds", "1", "--batches", "2"])
    assert [row["method"] for row in table] == ["uniform"] * 4 + ["ghuber"] * 4 + ["flow_grpo"] * 2
    assert (tmp_path / "flow_variance.md").exists()


def test_clip_ranges_are_chosen_on_seeds_of_their_own(tmp_path):
    def run(method, seed, *gold):
        return [{"method": method, "seed": seed, "gold": g} for g in gold]

    rows = [*run("a, eps 1", 1, 0.1, 0.9, 0.2), *run("a, eps 1", 2, 0.1, 0.5, 0.2)]  # (.9 + .5) / 2 = .7
    rows += [*run("a, eps 2", 1, 0.1, 0.8), *run("a, eps 2", 2, 0.1, 0.7), *run("b, eps 1", 1, 0.1)]  # .75; .1
    assert chosen(rows) == ("a, eps 2", "b, eps 1")
    for name, first, allowed in (("guard_grid", "100", "from 1000 to 1999"), ("guard_test", "10", "from 100 to 999")):
        with pytest.raises(ValueError, match=allowed):
            main([name, "--out", str(tmp_path), "--first", first])


def test_steps_to_a_reward():
    run = [{"iteration": 0, "reward": 0.1}, {"iteration": 10, "reward": 0.5}]
    assert steps_to(run, 0.4) == 10
    assert steps_to(run, 0.9) == math.inf
    hacked = [{"reward": 0.2, "gold": 0.4}, {"reward": 0.6, "gold": 0.8}, {"reward": 2.0, "gold": 0.1}]
    assert gold_at(hacked, 0.5) == pytest.approx(0.7)
    assert gold_at(hacked, 1.3) == pytest.approx(0.45)
    assert math.isnan(gold_at(hacked, 3.0))
    with pytest.raises(ValueError, match="guard"):
        main(["nothing"])
