import csv
import json
from pathlib import Path

import numpy as np
import pytest

from ccrl.experiment import plots
from ccrl.experiment.csv_table import CsvTable
from ccrl.experiment.curves import Curve, Study, load_study, short
from ccrl.stats import iqm, probability_of_improvement_interval


def make_run(root, env, agent, seed, points, name="", metric="rollout/ep_rew_mean", file="progress.csv", config=""):
    folder = root / f"{env.replace('/', '-')}__{agent}__{seed}{name}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"env": env, "agent": agent, "seed": seed}))
    (folder / "config.yaml").write_text(config)
    table = CsvTable(folder / file)
    for step, value in points:
        table.write(step, {metric: value, "time/fps": 1.0})
    table.close()
    return folder


def line(slope, end=100, start=0):
    return [(step, slope * step) for step in range(start, end + 1, 10)]


def test_alignment_interpolates_on_the_common_support(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, [(0, 0.0), (50, 5.0), (100, 10.0)])
    make_run(tmp_path, "A", "ppo", 1, [(10, 1.0), (80, 8.0)])
    study = load_study([tmp_path], points=8)
    group = study.groups["A", "ppo"]
    assert group.seeds == (0, 1)
    assert group.steps.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]
    np.testing.assert_allclose(group.values, [[1, 2, 3, 4, 5, 6, 7, 8]] * 2)
    assert study.notes_of(study.groups) == [
        "ppo on A: cut to 80 steps, the length of the shortest run (ppo, seed 1); the longest has 100"
    ]


def test_agents_are_compared_at_equal_steps(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0, end=100))
    make_run(tmp_path, "A", "mdpo", 0, line(2.0, end=50))
    study = load_study([tmp_path], points=101)
    assert study.groups["A", "ppo"].steps[-1] == 100
    assert study.groups["A", "ppo"].note == ""
    assert study.compared["A", "ppo"].steps[-1] == 50
    # The last tenth of 101 points: 10 points, from 45.5 to 50 in steps of 0.5, on average 47.75.
    assert study.final("A", "ppo") == pytest.approx([47.75])
    assert study.final("A", "mdpo") == pytest.approx([95.5])
    assert study.span("A") == pytest.approx((0.0, 95.5))
    assert study.normalised("ppo")[0] == pytest.approx([0.5])


def test_repeated_and_empty_rows(tmp_path):
    folder = make_run(tmp_path, "A", "ppo", 0, [(0, 1.0), (10, 2.0), (10, 3.0)])
    table = CsvTable(folder / "progress.csv", resume_step=10)
    table.write(10, {"time/fps": 5.0})  # a row without the metric
    (curve,) = load_study([tmp_path]).curves
    assert curve.steps.tolist() == [0, 10]
    assert curve.values.tolist() == [1.0, 3.0]


def test_the_run_of_an_infinite_return_is_named(tmp_path):
    run = make_run(tmp_path, "A", "ppo", 0, [(0, 1.0), (10, np.inf), (20, 1.0)])
    with pytest.raises(ValueError, match=r"A__ppo__0/progress.csv: .*rollout/ep_rew_mean, got inf at step 10; leave"):
        load_study([run])


def test_one_seed_counts_once(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0, end=50))
    make_run(tmp_path, "A", "ppo", 0, line(1.0, end=100), name="b")
    make_run(tmp_path, "A", "ppo", 1, [], name="c")
    study = load_study([tmp_path])
    assert [curve.steps[-1] for curve in study.curves] == [100]
    assert study.notes == (
        "left out A__ppo__0: same env, agent and seed as the longer A__ppo__0b",
        "left out A__ppo__1c: no values of rollout/ep_rew_mean",
    )


def test_metric_of_eval_csv_and_unknown_metric(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0), metric="eval/mean_reward", file="eval.csv")
    assert load_study([tmp_path], "eval/mean_reward").curves[0].values[-1] == 100
    with pytest.raises(ValueError, match=r"expected runs with eval/x; received 1 runs.* eval/mean_reward, time/fps"):
        load_study([tmp_path], "eval/x")
    with pytest.raises(ValueError, match="expected a run, a folder with runs below it"):
        load_study([tmp_path / "nothing"])


def test_curves_of_others_stand_beside_ours(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0))
    table = tmp_path / "others.csv"
    table.write_text(
        "algorithm,env,seed,step,return,extra\nsac,A,3,100,7.5,x\nsac,A,3,0,-1,x\nsac,A,4,0,1,x\nsac,A,4,100,2,x\n"
    )
    study = load_study([tmp_path / "A__ppo__0", table], points=3)
    assert study.agents == ["ppo", "sac"]
    assert study.groups["A", "sac"].seeds == (3, 4)
    np.testing.assert_allclose(study.groups["A", "sac"].values, [[-1, 3.25, 7.5], [1, 1.5, 2]])
    assert study.notes == ("others.csv: results from that file, column return",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env,agent,seed,step\nA,x,0,1\n", "expected a column return or score or reward, got the columns env, agent"),
        ("env,agent,seed,step,return\nA,x,0,1,2\nA,x,0,2,high\n", r"bad.csv:3: expected a whole number in 'seed'"),
        ("env,agent,seed,step,return\nA,x,0,1,2\nA,x,0,2,nan\n", r"bad.csv:3: expected .* and finite numbers in"),
        ("env,agent,seed,step,return\nA,x,0,1,2\nA,x,0,1,3\n", "bad.csv:3: step 1 of this run is in the file twice"),
        ("env,agent,seed,step,return\nA,ppo,0,1,2\n", "ppo with seed 0 on A is in .*A__ppo__0 too; rename one"),
    ],
)
def test_bad_tables_of_others_are_refused(tmp_path, text, message):
    make_run(tmp_path, "A", "ppo", 0, line(1.0))
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_study([tmp_path / "A__ppo__0", tmp_path / "bad.csv"])


def test_runs_without_steps_in_common(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0, end=20))
    make_run(tmp_path, "A", "ppo", 1, line(1.0, start=50))
    with pytest.raises(ValueError, match=r"expected runs with steps in common.*Leave out the short run"):
        load_study([tmp_path]).groups  # noqa: B018


def test_sweep_by_a_config_key(tmp_path):
    for m in (1, 10):
        make_run(tmp_path, "A", "mdpo", 0, line(m), name=m, config=f"inner:\n  steps: {m}\n")
    study = load_study([tmp_path], by="inner.steps")
    assert study.agents == ["mdpo steps=1", "mdpo steps=10"]
    assert study.notes == ()
    with pytest.raises(ValueError, match=r"expected the key m; received inner.steps"):
        load_study([tmp_path], by="m")


def test_numbers_in_names_are_in_order_of_value():
    names = ["mdpo m=10", "mdpo m=2", "ppo", "mdpo", "mdpo m=0.5"]
    curves = tuple(Curve(Path("run"), "E", name, 0, np.array([0.0, 1.0]), np.array([0.0, 1.0])) for name in names)
    assert Study("m", curves).agents == ["mdpo", "mdpo m=0.5", "mdpo m=2", "mdpo m=10", "ppo"]


def test_table_by_hand(tmp_path):
    for seed, slope in enumerate((1.0, 1.0, 2.0)):
        make_run(tmp_path, "A", "ppo", seed, line(slope))
    markdown, text = load_study([tmp_path], points=101).table(thresholds={"A": 110.0})
    (row,) = csv.DictReader(text.splitlines())
    assert (row["env"], row["agent"], row["runs"], row["final_step"]) == ("A", "ppo", "3", "100.0")
    # Finals 95.5, 95.5 and 191 (the last ten of 101 points); three runs are too few to cut any.
    assert float(row["final_iqm"]) == pytest.approx(382 / 3)
    # Student: deviation 55.14, standard error 31.83, t 4.3027 of two degrees of freedom: 127.33 -+ 136.97.
    assert float(row["final_low"]) == pytest.approx(-9.634, abs=1e-3)
    assert float(row["final_high"]) == pytest.approx(264.301, abs=1e-3)
    assert "95 % interval (Student's, of the trimmed mean)" in markdown
    assert (row["reached"], row["median_steps"]) == ("1", "inf")  # only the steep run gets to 110
    assert "| ppo | 3 | 127.3 [-9.634, 264.3] | not reached (1/3) |" in markdown
    markdown, text = load_study([tmp_path], points=101).table(fractions=(0.5,))
    # Half of 127.33 is 63.7: runs 0 and 1 get there at step 64, run 2 at 32.
    assert next(csv.DictReader(text.splitlines()))["median_steps"] == "64.0"
    assert "| 64 (3/3) |" in markdown


def bent(start, end, dip=None):
    """From ``start``, by ``dip`` at step 10, to ``end`` at step 50, where it stays."""
    return [(0, start), *([] if dip is None else [(10, dip)]), (50, end), (100, end)]


@pytest.fixture
def two_agents(tmp_path):
    """Env A: IQM at the start 15 and 30, in the end 55 and 75. Env B: from 0 to 1 and to 2. C: ppo alone."""
    for seed, (start, end) in enumerate([(0, 40), (10, 50), (20, 60), (100, 200)]):
        make_run(tmp_path, "A", "ppo", seed, bent(start, end, dip=-500))
        make_run(tmp_path, "B", "ppo", seed, bent(0, 1))
        make_run(tmp_path, "C", "ppo", seed, bent(0, 1))
    for seed, end in enumerate([70, 80, 90, -1000]):
        make_run(tmp_path, "A", "mdpo", seed + 5, bent(30, end))
        make_run(tmp_path, "B", "mdpo", seed + 5, bent(0, 2))
    return load_study([tmp_path])


def test_normalised_scores_by_hand(two_agents):
    assert two_agents.span("A") == pytest.approx((15, 75))  # the dip is no start, one high run is no IQM
    assert two_agents.compared["A", "mdpo"].seeds == (5, 6, 7, 8)
    ppo, mdpo = (two_agents.normalised(agent) for agent in ("ppo", "mdpo"))
    np.testing.assert_allclose(ppo, [[25 / 60, 35 / 60, 45 / 60, 185 / 60], [0.5] * 4])
    np.testing.assert_allclose(mdpo, [[55 / 60, 65 / 60, 75 / 60, -1015 / 60], [1.0] * 4])
    markdown, text = two_agents.table(fractions=(0.5,))
    assert {(row["env"], row["threshold"]) for row in csv.DictReader(text.splitlines())} == {
        ("A", "45.0"), ("B", "1.0"), ("C", "0.5")
    }  # fmt: skip
    # ppo: 5/12 and 1/2 cut below, 3/4 and 37/12 above, (3/2 + 7/12) / 4 left; gap (7/12 + 5/12 + 1/4 + 0 + 2) / 8
    # mdpo: -203/12 and 11/12 cut below, 13/12 and 5/4 above; gap (1/12 + 0 + 0 + 215/12 + 0) / 8
    body = markdown.partition("**All of A, B**")[2]
    assert "| ppo | 0.521 [" in body
    assert "] | 0.406 [" in body
    assert "| mdpo | 1.000 [" in body
    assert "] | 2.250 [" in body


def test_comparisons_by_hand(two_agents):
    axis = plots.improvement(two_agents).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mdpo > ppo"]
    (point,) = (drawn.get_xdata()[0] for drawn in axis.lines if drawn.get_marker() == "o")
    assert point == (9 / 16 + 1) / 2  # on A three runs win three of four each, the fourth none; on B all win all
    final = [[two_agents.final(env, agent) for env in "AB"] for agent in ("mdpo", "ppo")]
    interval = probability_of_improvement_interval(*final)
    (bar,) = (list(drawn.get_xdata()) for drawn in axis.lines if drawn.get_linewidth() == 5)
    assert bar == [interval.low, interval.high]
    for drawn, above in zip(plots.profile(two_agents).axes[0].lines, (7 / 8, 7 / 8), strict=True):
        x, y = drawn.get_data()
        assert y[np.searchsorted(x, 0.45)] == above  # ppo: all but 5/12; mdpo: all but the one that fell
        assert x[0] < -1015 / 60
        assert x[-1] > 185 / 60


def test_scores_that_do_not_differ_are_no_division_by_zero(tmp_path):
    for agent in ("ppo", "mdpo"):
        make_run(tmp_path, "A", agent, 0, bent(3, 3))
    assert [load_study([tmp_path]).normalised(agent)[0].tolist() for agent in ("ppo", "mdpo")] == [[0.0], [0.0]]


def test_options_of_envs_that_are_not_there_are_refused(two_agents, tmp_path):
    with pytest.raises(ValueError, match=r"thresholds: expected some of A, B, C; received AA\."):
        two_agents.table(thresholds={"A": 1.0, "AA": 2.0})
    with pytest.raises(ValueError, match=r"points: expected at least 2.* received 1\."):
        load_study([tmp_path], points=1)


def test_more_agents_than_colours_look_different():
    curves = tuple(Curve(Path("run"), "E", f"a{i}", 0, np.array([0.0, 1.0]), np.array([0.0, 1.0])) for i in range(16))
    lines = plots.learning_curves(Study("m", curves, points=2)).axes[0].lines
    assert len({(drawn.get_color(), str(drawn._dash_pattern)) for drawn in lines}) == 16


@pytest.fixture
def many(tmp_path):
    for env, scale in (("A", 1.0), ("ns/B-v0", -5.0)):
        for a, agent in enumerate(("ppo", "mdpo", "bpo")):
            for seed in range(4):
                points = [(step, scale * (1 + a + 0.1 * seed) * step) for step in range(0, 1001, 50)]
                make_run(tmp_path / "runs", env, agent, seed, points)
    make_run(tmp_path / "runs", "C", "ppo", 0, line(1.0))
    return tmp_path / "runs"


def test_learning_curves_draw_iqm_and_band(many):
    study = load_study([many])
    figure = plots.learning_curves(study, "Title", "python x")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["A", "C", "ns/B-v0"]
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert set(drawn) == {"bpo", "mdpo", "ppo"}
    group = study.groups["A", "ppo"]
    np.testing.assert_array_equal(drawn["ppo"].get_ydata(), iqm(group.values, axis=0))
    bands = [band.get_paths()[0].vertices[:, 1] for band in figure.axes[0].collections]
    expected = [study.groups["A", agent].band for agent in study.agents]
    assert [(min(y), max(y)) for y in bands] == [(band.low.min(), band.high.max()) for band in expected]
    words = " ".join(text.get_text() for text in figure.texts)
    assert "Title" in words
    assert "python x" in words
    assert "1 to 4 seeds per agent and env" in words
    assert len({line.get_color() for line in drawn.values()}) == 3


def test_comparisons_use_the_shared_envs(many):
    study = load_study([many])
    assert study.shared_envs == ["A", "ns/B-v0"]
    profile = plots.profile(study)
    for drawn in profile.axes[0].lines:
        y = drawn.get_ydata()
        assert y[0] == 1.0
        assert (np.diff(y) <= 0).all()
        assert y[-1] == 0.0
    improvement = plots.improvement(study)
    labels = [label.get_text() for label in improvement.axes[0].get_yticklabels()]
    assert labels == ["bpo > mdpo", "bpo > ppo", "mdpo > ppo"]
    # Steeper wins all of A and loses all of B, where steeper is down: one half for every pair.
    points = [drawn.get_xdata()[0] for drawn in improvement.axes[0].lines if drawn.get_marker() == "o"]
    assert points == [0.5, 0.5, 0.5]


def test_agents_without_a_shared_env(tmp_path):
    make_run(tmp_path, "A", "ppo", 0, line(1.0))
    study = load_study([tmp_path])
    with pytest.raises(ValueError, match=r"at least two agents to compare; received \['ppo'\]"):
        plots.improvement(study)
    make_run(tmp_path, "B", "mdpo", 0, line(1.0))
    with pytest.raises(ValueError, match="expected an env on which all agents have runs"):
        plots.profile(load_study([tmp_path]))


def test_figures_are_reproducible(many, tmp_path):
    files = [plots.save(plots.learning_curves(load_study([many], points=20)), tmp_path / name) for name in ("a", "b")]
    assert [path.name for path in files[0]] == ["a.png", "a.svg"]
    for first, second in zip(*files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_short_numbers():
    assert [short(x) for x in (0, 250, 1000, 1_500_000, 2e9)] == ["0", "250", "1k", "1.5M", "2G"]
