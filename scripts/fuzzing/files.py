"""Files that are damaged, or are none: checkpoints and run folders, prompts, tables."""

from __future__ import annotations

import json
import math
import pickle
import random
import shutil
import tempfile
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from ccrl.batched_env import resolve_env
from ccrl.experiment import checkpoint
from ccrl.experiment.csv_table import CsvTable
from ccrl.experiment.curves import load_study
from scripts import evaluate, train
from scripts.fuzzing.case import SIZES, Case

__all__ = ["checkpoints", "csv", "dataset", "jsonl", "trained"]


# -- checkpoints and run folders --------------------------------------------------------------------------------------


KINDS_OF_RUN = {
    "ppo": ["ppo", "--env", "CartPole-v1", "--num-envs", "2", "--n-steps", "8", "--hidden", "4", "--n-epochs", "1",
            "--compile", "off"],
    "sac": ["sac", "--env", "Pendulum-v1", "--num-envs", "2", "--rounds", "4", "--hidden", "4", "--learning-starts",
            "8", "--buffer-size", "64", "--batch-size", "8", "--compile", "off"],
    "grpo": ["llm", "--method", "grpo", "--task", "modsum", "--model", "tabular", "--n-prompts", "2", "--group-size",
             "4"],
}  # fmt: skip


@cache
def trained(kind: str = "ppo") -> Path:
    """The folder of a finished run of 32 samples."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    argv = [*KINDS_OF_RUN[kind], "--total-timesteps", "32", "--eval-every", "16", "--eval-episodes", "2",
            "--checkpoint-every", "16", "--run-root", str(folder), "--no-tensorboard", "--no-progress"]  # fmt: skip
    return train.main(argv).path


@cache
def cloned() -> Path:
    """A checkpoint of an agent that was trained on ``dataset``."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    options = {"dataset": str(dataset(folder)), "batch_size": 8, "updates": 2, "hidden": (4,), "compile": "off"}
    agents.get_agent("bc")("InvertedPendulum-v5", **options).learn(2).save(folder / "bc.pt")
    return folder / "bc.pt"


def dataset(folder: Path) -> Path:
    """A small data set for InvertedPendulum-v5: 60 transitions of three episodes."""
    rng = np.random.default_rng(0)
    last = np.arange(60) % 20 == 19
    rows = {
        "obs": rng.normal(size=(60, 4)).astype(np.float32), "action": rng.uniform(-3, 3, (60, 1)).astype(np.float32),
        "reward": np.ones(60, np.float32), "next_obs": rng.normal(size=(60, 4)).astype(np.float32),
        "terminated": last, "truncated": np.zeros(60, bool), "episode": np.arange(60) // 20,
    }  # fmt: skip
    np.savez(folder / "rows.npz", **rows)
    return folder / "rows.npz"


def _change(rng: random.Random, tree: Any) -> str:
    """Change one place of nested mappings, in place; says which and how."""
    path = ""
    while True:
        key = rng.choice(list(tree))
        path += f"[{key!r}]"
        if isinstance(tree[key], dict) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        how = rng.choice(["removed", "renamed", "replaced"])
        old = tree.pop(key)
        if how == "renamed":
            tree[f"{key}_"] = old
        elif how == "replaced":
            tree[key] = rng.choice([None, -1, math.nan, "x", [], {}, torch.zeros(3), "evilmod:X", 2**40])
            how = f"is {tree[key]!r}"
        return f"{path} {how}"


def checkpoints(rng: random.Random, folder: Path) -> Case:
    run, kind = folder / "run", rng.choice(["ppo", "sac", "grpo"])
    shutil.copytree(trained(kind), run)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    how = rng.choice(["tree", "tree", "bytes", "cut", "foreign", "yaml", "json", "other", "segment"])
    if how == "segment" and kind != "sac":
        how = "tree"
    what = how
    if how == "tree":
        tree = torch.load(newest, weights_only=True)
        what = _change(rng, tree)
        torch.save(tree, newest)
    elif how == "bytes":
        data = bytearray(newest.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        newest.write_bytes(data)
        what = f"a bit of byte {at}"
    elif how == "cut":
        size = rng.randrange(newest.stat().st_size)
        newest.write_bytes(newest.read_bytes()[:size])
        what = f"cut at {size}"
    elif how == "foreign":
        newest.write_bytes(rng.choice([b"", b"hello", pickle.dumps({"x": print}), bytes(1000)]))
    elif how in ("yaml", "json"):
        file = run / ("config.yaml" if how == "yaml" else "run.json")
        lines = file.read_text().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(["", "{", "\x00", lines[at][: len(lines[at]) // 2], lines[at].replace(": ", ": -"),
                                "env: evilmod:X", "agent: 3"])  # fmt: skip
        file.write_text("\n".join(lines))
        what = f"line {at} of {file.name} is {lines[at]!r}"
    elif how == "segment":
        segment = rng.choice(sorted((run / "checkpoints" / "replay").iterdir()))
        size = rng.randrange(segment.stat().st_size)
        segment.write_bytes(segment.read_bytes()[:size]) if rng.random() < 0.5 else segment.unlink()
    else:
        torch.save({"x": 1}, newest)
    act = rng.choice(["resume", "evaluate", "load"])
    made: list[Any] = []

    def begin() -> None:
        if act == "load":
            made.append(agents.get_agent(kind).load(newest))
        elif act == "evaluate":
            evaluate.main(evaluate.EvaluateConfig(run, episodes=2))
        else:
            settings = run / "config.yaml"
            settings.write_text(settings.read_text().replace("total_timesteps: 32", "total_timesteps: 64"))
            made.append(train.prepare(["--resume", str(run)]))

    def go_on() -> None:
        if act == "load":
            made[0].learn(16)
        elif act == "resume":
            made[0]()

    return Case(f"{kind} {act}, {what}", begin, go_on)


# -- data files -------------------------------------------------------------------------------------------------------


def jsonl(rng: random.Random, folder: Path) -> Case:
    good = {"prompt": "ab=", "answer": "c", "demonstration": "c"}
    rows: list[Any] = [json.dumps(good | {"prompt": f"{'ab'[i % 2]}{i}="}) for i in range(6)]
    at = rng.randrange(len(rows))
    bad = dict(good)
    field = rng.choice(sorted(bad))
    how = rng.choice(["value", "removed", "text", "bytes", "few", "long", "path", "option"])
    if how == "value":
        bad[field] = rng.choice([None, 1, 1.5, [], {}, True, "", "\ud800"])  # type: ignore[assignment]
        rows[at] = json.dumps(bad)
    elif how == "removed":
        rows[at] = json.dumps({k: v for k, v in bad.items() if k != field})
    elif how == "text":
        rows[at] = rng.choice(["", "{", "[1]", "null", "1", '{"prompt": NaN}', "[" * 5000, '{"prompt": "x"} {}'])
    elif how == "few":
        rows = rows[: rng.randrange(3)]
    elif how == "long":
        rows[at] = json.dumps(bad | {field: "x" * rng.choice([100, 2_000])})
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogatepass")
    if how == "bytes":
        path.write_bytes(
            path.read_bytes().replace(rng.choice([b"a0", b"c"]), rng.choice([b"\xff\xfe", b"\x00", b"\xe9"]))
        )
    given: Any = rng.choice([folder, folder / "none", "", 3, None]) if how == "path" else str(path)
    options: dict[str, Any] = {"path": given, "test_path": given}
    if how == "option":
        option = rng.choice(["reward", "components", "max_new_tokens", "test_path", "vocab"])
        options[option] = rng.choice([None, 0, -1, "x", "json:no", "no_module:f", ["a", "a"], [], 3.5, "shutil"])
    made: list[Any] = []

    def begin() -> None:
        cls = agents.get_agent("grpo")
        sizes = {k: v for k, v in SIZES.items() if k in {f.name for f in fields(cls.Config) if f.init}}
        sizes |= {"model": "tiny", "model_layers": 1, "model_width": 16, "model_heads": 2, "max_new_tokens": 4}
        made.append(cls("jsonl", cls.Config(**sizes), env_kwargs=options))

    def go_on() -> None:
        made[0].learn(4)
        made[0].evaluate(None, 2, 0)

    return Case(f"{how} {options if how in ('path', 'option') else rows[min(at, len(rows) - 1)][:60] if rows else ''}",
                begin, go_on)  # fmt: skip


def _rows(rng: random.Random, folder: Path) -> Case:
    path = dataset(folder)
    columns: dict[str, Any] = dict(np.load(path))
    name = rng.choice(sorted(columns))
    how = rng.choice(["gone", "nan", "inf", "short", "text", "shape", "object", "bytes", "empty", "type"])
    x = columns[name]
    changed: dict[str, Any] = {
        "nan": np.where(np.arange(60).reshape(-1, *[1] * (x.ndim - 1)) == 7, math.nan, x), "short": x[:-1],
        "inf": x * math.inf, "text": np.full(60, "x"), "shape": x[:, None, None], "type": x.astype(np.complex64),
        "object": np.array([{}] * 60),
    }  # fmt: skip
    if how == "gone":
        del columns[name]
    elif how == "empty":
        columns = {k: v[:0] for k, v in columns.items()}
    elif how != "bytes":
        columns[name] = changed[how]
    np.savez(path, **columns)
    if how == "bytes":
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    agent, made = rng.choice(["bc", "td3_bc", "iql"]), list[Any]()

    def begin() -> None:
        cls = agents.get_agent(agent)
        made.append(cls("InvertedPendulum-v5", dataset=str(path), batch_size=8, updates=2, hidden=(4,), compile="off"))

    return Case(f"rows.npz {agent} {name} {how}", begin, lambda: made[0].learn(2))


def csv(rng: random.Random, folder: Path) -> Case:
    run = folder / "run"
    shutil.copytree(trained(), run)
    target = rng.choice(["progress.csv", "eval.csv", "demand.csv", "rows.npz"])
    if target == "rows.npz":
        return _rows(rng, folder)
    path = run / target if target != "demand.csv" else folder / target
    if target == "demand.csv":
        rows = [f"{i},{week},{(i * week) % 7}" for i in range(2) for week in range(150)]
        path.write_text("series,week,demand\n" + "\n".join(rows) + "\n")
    lines = path.read_text().splitlines()
    at, cell = rng.randrange(len(lines)), rng.choice(["", "x", "nan", "inf", "-1", "1e999", '"', "\x00", "1.5", "é"])
    how = rng.choice(["cell", "line", "header", "empty", "bytes", "twice"])
    if how == "cell":
        cells = lines[at].split(",")
        cells[rng.randrange(len(cells))] = cell
        lines[at] = ",".join(cells)
    elif how == "line":
        lines[at] = rng.choice(["", ",", lines[at] + ",1,2,3", lines[at].split(",")[0]])
    elif how == "header":
        lines = lines[1:]
    elif how == "empty":
        lines = []
    elif how == "twice":
        lines = lines + lines
    path.write_text("\n".join(lines) + "\n" if lines else "")
    if how == "bytes":
        path.write_bytes(path.read_bytes()[:20] + b"\xff\xfe" + path.read_bytes()[20:])

    def begin() -> None:
        if target == "demand.csv":
            made = resolve_env("ccrl/InventoryOneStoreRecorded-v0", 2, series=str(path))
            made.reset(seed=0)
        elif rng.random() < 0.5:
            load_study([run], "rollout/ep_rew_mean" if target == "progress.csv" else "eval/mean_reward").table()
        else:
            table = CsvTable(path, resume_step=16)
            table.write(32, {"x": 1.0})
            table.close()

    return Case(f"{target} {how} line {at} {cell!r}", begin)
