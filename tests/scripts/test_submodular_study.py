"""The study of coverage: tiny runs, resumed, with their files and known paths."""

from __future__ import annotations

import pytest

from scripts.studies.submodular.study import TASKS, Study, main


def test_the_study_resumes_and_writes_its_files(tmp_path):
    argv = ["grid", "--out", str(tmp_path), "--figures", str(tmp_path / "figures"), "--seeds", "1", "--iterations", "2"]
    argv += ["--every", "1", "--methods", "SubPO-NM", "SubPO-M", "ModPO"]
    rows = main(argv, {"num_envs": 8})
    assert [row["method"] for row in rows[:3]] == ["SubPO-NM", "SubPO-M", "ModPO"]
    # 19 moves from a corner: 4 cells at first, and 2 with every move
    assert rows[-1]["mean F"] == 42.0
    before = (tmp_path / "grid.csv").read_text()
    assert repr(main(argv, {"num_envs": 8})) == repr(rows)
    assert (tmp_path / "grid.csv").read_text() == before, "nothing ran again"
    for suffix in (".md", ".csv", ".png", "_paths.png"):
        assert (tmp_path / "figures" / f"submodular_grid{suffix}").exists()


def test_continuous_tasks_have_paths_too(tmp_path):
    argv = ["point", "--out", str(tmp_path), "--figures", str(tmp_path), "--seeds", "1", "--iterations", "1"]
    rows = main(argv, {"num_envs": 4, "n_epochs": 1})
    assert [row["method"] for row in rows] == ["SubPO-M", "ModPO"]
    assert 0.0 < rows[0]["mean F"] <= 1.0
    assert 0.0 < rows[0]["most probable path"] <= 1.0
    assert (tmp_path / "submodular_point_paths.png").exists()
    with pytest.raises(ValueError, match="SubPO-NM would be SubPO-M"):
        Study(tmp_path, task="point", methods=("SubPO-NM", "ModPO"))


def test_what_does_not_fit_is_refused(tmp_path):
    assert {"grid", "items", "large", "ant"} <= set(TASKS)
    with pytest.raises(ValueError, match="expected one of"):
        main(["car"])
    with pytest.raises(ValueError, match="methods"):
        Study(tmp_path, methods=("SubPO-X",))
