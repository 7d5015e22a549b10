import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from ccrl.experiment.csv_table import CsvTable, read_columns, read_rows
from ccrl.experiment.logger import Logger, read_scalars, table
from ccrl.experiment.progress import ProgressBar

ROOT = Path(__file__).parents[2]


def events(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_csv_and_tensorboard_have_what_was_logged(tmp_path):
    logger = Logger(tmp_path)
    returned = logger.log(100, {"rollout/ep_rew_mean": 1.5, "time/fps": 3})
    logger.log(200, {"rollout/ep_rew_mean": torch.tensor(2.5), "train/n_updates": torch.tensor(2**24 + 1)})
    logger.close()
    assert returned == {"rollout/ep_rew_mean": 1.5, "time/fps": 3.0}
    assert (tmp_path / "progress.csv").read_text() == (
        "step,rollout/ep_rew_mean,time/fps,train/n_updates\n100,1.5,3.0,\n200,2.5,,16777217.0\n"
    )
    assert events(tmp_path, "rollout/ep_rew_mean") == [(100, 1.5), (200, 2.5)]
    assert events(tmp_path, "time/fps") == [(100, 3.0)]


def test_tensors_are_read_together(monkeypatch):
    reads = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.shape) or original(self))
    for name in ("item", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda self: pytest.fail("one transfer per value"))
    values = read_scalars({"a": torch.tensor(1.0), "b": 2, "c": torch.tensor(3), "d": torch.tensor(True)})
    assert values == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 1.0}
    assert list(values) == ["a", "b", "c", "d"]
    assert reads == [(3,)]


def test_only_scalars(tmp_path):
    logger = Logger(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"train/loss: expected a 0-d tensor; received shape \(2,\)"):
        logger.log(0, {"train/loss": torch.zeros(2)})
    with pytest.raises(TypeError, match="train/loss: expected a number or a 0-d tensor; received 'x'"):
        logger.log(0, {"train/loss": "x"})


def test_resume_appends_and_drops_rows_past_the_checkpoint(tmp_path):
    first = Logger(tmp_path)
    for step in (10, 20, 30, 40):
        first.log(step, {"a": step})
    first.close()
    second = Logger(tmp_path, resume_step=20)
    second.log(30, {"a": -30, "b": 1})
    second.close()
    columns = read_columns(tmp_path / "progress.csv")
    assert columns["step"].tolist() == [10, 20, 30]
    assert columns["a"].tolist() == [10, 20, -30]
    assert np.isnan(columns["b"]).tolist() == [True, True, False]
    assert events(tmp_path, "a") == [(10, 10.0), (20, 20.0), (30, -30.0)]


def test_half_a_line_is_ignored_and_repaired(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("step,a\n1,2\n2,3\n3,4.56")
    assert read_columns(path)["step"].tolist() == [1, 2]
    CsvTable(path, resume_step=2).write(3, {"a": 9})
    assert path.read_text() == "step,a\n1,2\n2,3\n3,9\n"


def test_text_cells_and_exact_floats(tmp_path):
    value = 0.1 + 0.2
    csv = CsvTable(tmp_path / "a.csv")
    csv.write(1, {"list": '[1, "x"]', "x": value, "nan": float("nan"), "inf": float("inf")})
    csv.close()
    assert read_rows(tmp_path / "a.csv")[0]["list"] == '[1, "x"]'
    columns = read_columns(tmp_path / "a.csv")
    assert "list" not in columns
    assert columns["x"][0] == value
    assert np.isnan(columns["nan"][0])
    assert columns["inf"][0] == np.inf


WRITER = """
import sys
from ccrl.experiment.logger import Logger
logger = Logger(sys.argv[1])
for step in range(10**9):
    logger.log(step, {"a": step, **({"b": 1} if step > 20 else {})})
    print(step, flush=True)
"""


def test_kill_loses_at_most_the_last_row(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.send_signal(signal.SIGKILL)
    said = [int(line), *map(int, process.stdout.read().split())][-1]
    process.wait()
    steps = read_columns(tmp_path / "progress.csv")["step"].tolist()
    assert steps == list(range(len(steps)))
    assert steps[-1] in (said, said + 1)
    assert [step for step, _ in events(tmp_path, "a")][: said + 1] == list(range(said + 1))


def test_hparams(tmp_path):
    logger = Logger(tmp_path)
    logger.log_hparams({"agent": "ppo", "learning_rate": 3e-4, "hidden": (64, 64)})
    logger.log(1, {"rollout/ep_rew_mean": 5})
    logger.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    data = accumulator.PluginTagToContent("hparams")
    assert set(data) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    start = HParamsPluginData.FromString(data["_hparams_/session_start_info"]).session_start_info.hparams
    # TensorBoard sorts and filters by numbers; as text 1e-4 would come after 3
    assert start["learning_rate"].number_value == 3e-4
    assert start["agent"].string_value == "ppo"
    assert b"(64, 64)" in data["_hparams_/session_start_info"]


def test_screen(tmp_path, capsys):
    Logger(tmp_path, tensorboard=False, csv=False, stdout=True).log(1500, {"time/fps": 10, "x": 2, "time/total": 3.25})
    assert capsys.readouterr().out == table(1500, {"time/fps": 10.0, "x": 2.0, "time/total": 3.25}) + "\n"
    assert table(1, {"x": -0.0}).endswith(" 0")
    lines = table(1500, {"time/fps": 10.0, "x": 2.0, "time/total": 3.25}).splitlines()
    assert [line.split() for line in lines] == [
        ["step", "1,500"],
        ["time"],
        ["fps", "10"],
        ["total", "3.25"],
        ["x", "2"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_is_silent_without_a_terminal(capsys):
    bar = ProgressBar(100, initial=10)
    bar.update(50, 1.0)
    bar.close()
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_progress_bar_on_a_terminal(monkeypatch):
    """Told where the clock stands, not how far it moved; a resumed run begins where it was."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = ProgressBar(1000, initial=200)
    for step in (400, 500):
        bar.update(step, -1234.5)
    bar.close()
    last = terminal.getvalue().split("\r")[-1]
    assert "50%" in last
    assert "500/1.00k" in last
    assert "return -1,230" in last
    terminal.truncate(0)
    ProgressBar(1000, enabled=False).update(10)
    assert terminal.getvalue() == ""
