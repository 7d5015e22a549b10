"""Agents x environments x seeds, ours and Stable-Baselines3's, into run folders that plot.py reads.

    python scripts/benchmark.py --agents ppo mdpo sb3:ppo --envs CartPole-v1 Hopper-v5 --seeds 0 1 2 \\
        --total-timesteps 1000000 --out results/x --jobs 2
    python scripts/benchmark.py --study scripts/studies/foundation/study.yaml --out results/foundation --jobs 2

The same command again goes on where it stopped: finished runs are left alone, runs of our agents continue from their
checkpoints, runs of SB3 start anew. Each run writes to ``log.txt`` in its folder; one that could not begin leaves its
log beside the folders.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs
from ccrl import registry
from ccrl.experiment import checkpoint
from ccrl.experiment import config as configs
from ccrl.experiment.csv_table import read_columns
from ccrl.experiment.files import FolderInUseError
from ccrl.experiment.logger import digits
from ccrl.experiment.run import RunFolder
from ccrl.settings import Count, Natural, Settings
from scripts import benchmark_sb3 as sb3
from scripts import training
from scripts.benchmark_study import Spec, Study
from scripts.whole_paths import whole_paths

__all__ = ["Options", "main"]


@dataclass(frozen=True)
class Options(Settings):
    """A study from a file, or from flags."""

    out: Path
    """The run folders are made in this folder."""
    study: Path | None = None
    """The study is in this YAML file; then no agents, envs, seeds and total_timesteps here."""
    agents: tuple[str, ...] = ()
    """These agents train: names of ours (train.py lists them), module:Class, sb3:ppo, sb3:sac, sb3-contrib:trpo,
    ..."""
    envs: tuple[str, ...] = ()
    """They train on these environments, of language models text tasks."""
    seeds: tuple[Natural, ...] = ()
    """The runs have these seeds."""
    total_timesteps: Count | None = None
    """Each run takes so many units of its agent's clock (environment steps, completions)."""
    evals: Natural | None = None
    """Each run is evaluated so many times; None is 20 (a study file names its own)."""
    jobs: Count = 1
    """So many runs go at a time, each a process with one torch thread and its share of the cores for the
    simulator."""
    ray: bool = False
    """Runs go to a Ray cluster (or one started here); out must be a folder that its machines share."""


def load(options: Options) -> Any:
    """The study of ``options``; raises ``ConfigError`` for one that does not make sense."""
    flags = {name: getattr(options, name) for name in ("agents", "envs", "total_timesteps")}
    given = [name for name, value in flags.items() if value]
    if options.study is not None:
        given += ["seeds"] * bool(options.seeds) + ["evals"] * (options.evals is not None)
        if given:
            raise configs.ConfigError(f"--study names the runs; received --{' --'.join(given)} too")
        return configs.from_dict(Study, configs.load_yaml(options.study))
    if len(given) < len(flags):
        raise configs.ConfigError(f"expected --study, or --agents, --envs and --total-timesteps; received {given}")
    seeds = {"seeds": options.seeds} if options.seeds else {}
    evals = {} if options.evals is None else {"evals": options.evals}
    return configs.from_dict(Study, {"entries": [flags]} | seeds | evals)


def main(options: Options) -> int:
    """Run what is left of the study; returns the number of runs that failed."""
    specs = load(options).specs()
    out = options.out.resolve()
    found = [spec.find(out) for spec in specs]
    left = [spec for spec, run in zip(specs, found) if run is None or "finished" not in run.info]
    out.mkdir(parents=True, exist_ok=True)  # what cannot be made is said once, and not by every run
    print(f"[benchmark] {len(specs)} runs, {len(specs) - len(left)} of them finished before; {out}", flush=True)
    failed = 0
    for count, (spec, code) in enumerate(_on_ray(left, out) if options.ray else _here(left, out, options.jobs), 1):
        failed += code != 0
        print(f"[{count}/{len(left)}] {spec.key}: {_summary(spec, out, code)}", flush=True)
    if failed:
        print(f"[benchmark] {failed} of {len(left)} runs failed; the same command tries them again")
    return failed


# -- processes ------------------------------------------------------------------------------------------------------


def _here(specs: list[Any], out: Path, jobs: int) -> Iterator[tuple[Any, int]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(_launch, asdict(spec), str(out), max(1, cores // jobs)): spec for spec in specs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C the rest must not start


def _on_ray(specs: list[Any], out: Path) -> Iterator[tuple[Any, int]]:
    ray = require("ray", "ray")
    ray.init(ignore_reinit_error=True)
    task = ray.remote(num_cpus=1, max_retries=0)(_launch)
    waiting = {task.remote(asdict(spec), str(out), 1): spec for spec in specs}
    while waiting:
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        try:
            code = ray.get(ready)
        except ray.exceptions.RayError as error:  # a machine that went away takes its run with it, not the study
            print(f"[benchmark] {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        yield waiting.pop(ready), code


def _launch(spec: dict[str, Any], out: str, cores: int) -> int:
    """One run in a process of its own: its exit status."""
    command = [
        sys.executable,
        str(Path(__file__).resolve().with_name("cli.py")),
        "benchmark",
        "--run",
        json.dumps(spec),
        out,
        str(cores),
    ]
    # The open pipe tells the run that this process lives: a killed study must not leave runs behind, which would
    # write into the folders that the next call resumes.
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        return process.wait()


def _run(values: dict[str, Any], out: Path, cores: int) -> int:
    """Inside the run's process. A failure is written to the log and to ``run.json``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec = Spec(**values)
    root = spec.root(out)
    root.mkdir(parents=True, exist_ok=True)
    early = _early_log(spec, out)  # the run has no folder yet
    log = os.open(early, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code, old = 0, spec.find(out)
    resumed = old is not None and not spec.foreign and checkpoint.latest(old.checkpoints) is not None
    try:
        if old is not None and not resumed:
            old.own().release()  # of a run that is still at it
            # kept, but no longer a run: plots would count it
            old.info_file.rename(old.path / "abandoned.json")
        if resumed and old is not None:
            # what is built comes from the study; find() has seen that the folder says the same
            values = old.config() | {name: spec.values[name] for name in ("env", "agent")}
            config = whole_paths(configs.from_dict(training.run_config(spec.agent, spec.values["agent"]), values))
            with registry.stored(str(old.path), spec.trust):
                training.train(spec.agent, config, old.path, spec.trust)
        else:
            _train(spec, root, cores)
    except BaseException as error:
        traceback.print_exc()
        code = 1
        _note(spec.find(out), error)
    sys.stdout.flush()
    if (run := spec.find(out)) is not None:
        with open(run.path / "log.txt", "ab") as target:
            target.write(early.read_bytes())
        early.unlink()
    return code


def _note(run: RunFolder | None, error: BaseException) -> None:
    """What ended a run, in its ``run.json``; not where the folder is another process's, whose run goes on."""
    if run is not None and isinstance(error, Exception) and not isinstance(error, FolderInUseError):
        run.record(error="".join(traceback.format_exception_only(error)).strip())


def _train(spec: Any, root: Path, cores: int) -> None:
    kwargs = spec.values["env_kwargs"]
    if spec.values["env"].removeprefix("ccrl/") in envs.MUJOCO:
        kwargs = {"nthread": cores} | kwargs
    if spec.foreign:
        sb3.run(spec.agent, spec.config(env_kwargs=kwargs), root, training.timed)
    else:
        training.train(spec.agent, spec.config(env_kwargs=kwargs, run_root=str(root)))


def _early_log(spec: Any, out: Path) -> Path:
    name = spec.key.replace(" ", "__").replace(os.sep, "-")
    return Path(spec.root(out) / f"{name}.log")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(130)


def _summary(spec: Any, out: Path, code: int) -> str:
    run = spec.find(out)
    info = {} if run is None else run.info
    if code or "finished" not in info:
        where = _early_log(spec, out) if run is None else run.path
        last = where.read_text(errors="replace").split("\n")[-2:-1] if where.is_file() else []
        return f"FAILED ({info.get('error', last[0] if last else f'exit status {code}')}); log in {where}"
    done = info["finished"]
    mean = math.nan if done["ep_rew_mean"] is None else done["ep_rew_mean"]
    scores = [f"training return {digits(mean)}"]
    if (run.path / "eval.csv").exists():
        last = read_columns(run.path / "eval.csv")
        kinds = (digits(float(last[f"{kind}/mean_reward"][-1])) for kind in ("eval", "eval_stochastic"))
        scores.append("evaluation {} ({} stochastic)".format(*kinds))
    return f"{', '.join(scores)}, {done['steps_per_second']:,.0f} steps/s, {done['seconds']:.0f} s"


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # module:Class of the folder one works in; last, so that it shadows nothing
    if sys.argv[1:2] == ["--run"]:
        sys.exit(_run(json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])))
    try:
        status = main(tyro.cli(Options, description=__doc__))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if status else 0)
