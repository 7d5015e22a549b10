"""HalfCheetah's model without MuJoCo's message about a file of Gymnasium's."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

import envs
from envs.mujoco.model import load_model, make_quietly
from envs.mujoco.task import model_path


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def numbers(model):
    names = [name for name in dir(model) if not name.startswith("_")]
    arrays = {name: getattr(model, name) for name in names if isinstance(getattr(model, name), np.ndarray)}
    stat = {name: np.asarray(getattr(model.stat, name)) for name in dir(model.stat) if name.startswith(("mean", "ext"))}
    return {name: array.copy() for name, array in (arrays | stat).items()}


def test_the_model_is_the_one_that_the_compiler_makes():
    """All arrays, among them masses, inertias and what mj_setConst derives, and the means of the solver's tolerance."""
    ours, theirs = (
        numbers(model) for model in (load_model("half_cheetah.xml"), make_quietly("HalfCheetah-v5", {}).unwrapped.model)
    )
    assert ours.keys() == theirs.keys()
    assert {"body_mass", "body_inertia", "body_invweight0", "dof_M0", "meaninertia", "meanmass"} <= ours.keys()
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different
    assert ours["body_mass"].sum() == pytest.approx(14.0)


@pytest.mark.parametrize("backend", ["native", "sync", "async"])
def test_nothing_is_printed_and_no_file_is_left(backend, capfd, in_an_empty_folder):
    env = envs.make("HalfCheetah-v5", 2, backend=backend, seed=0)
    env.close()
    assert capfd.readouterr() == ("", "")
    assert not list(in_an_empty_folder.iterdir())
    assert mujoco.get_mju_user_warning() is None


def test_a_file_of_the_users_own_is_loaded_as_it_is(capfd, in_an_empty_folder):
    mine = in_an_empty_folder / "mine.xml"
    mine.write_text(model_path("half_cheetah.xml").read_text())
    assert load_model(mine).body_mass.sum() == pytest.approx(14.0)
    out = capfd.readouterr()
    assert "settotalmass" in out.out + out.err
