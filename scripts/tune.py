"""Tune an agent's settings with Optuna (extra tune); the same command again goes on with the trials that are left.

python scripts/tune.py ppo --env CartPole-v1 --total-timesteps 50000 --trials 40 --jobs 2 --out results/tune
python scripts/tune.py grpo --env arithmetic --total-timesteps 2000 --trials 20 --out results/tune_grpo
python scripts/train.py ppo --config results/tune/best.yaml

A trial trains on ``--seeds`` and is worth the mean of their last evaluations: raw returns, never normalised ones. The
first seed's evaluations decide whether a trial is broken off; one whose training fails or diverges is a failed trial,
with the reason in ``trials.csv``. Several processes may run the same command at once: the database ``OUT/study.db`` is
shared. In the end OUT has ``best.yaml``, ``trials.csv``, ``budget.csv`` (the expected score of the best of k trials)
and ``importance.png``.

The value of the best trial is too high by the luck it was chosen for: report it on seeds that tuning has not seen, with
the number of trials and steps that ``best.yaml`` names.
"""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import math
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    # a worker of the installed command does not begin in cli.py, which makes this folder known as scripts
    importlib.import_module(f"{Path(__file__).resolve().parent.name}.cli")

import torch
import tyro
import yaml

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import agents
from agents.search import space_of
from ccrl.batched_env import evaluation_env, resolve_env
from ccrl.experiment import config as configs
from ccrl.experiment.evaluation import evaluate_agent
from ccrl.experiment.files import FolderInUseError, Owner, write_atomic
from ccrl.experiment.logger import digits
from ccrl.seeding import stream_seed
from ccrl.settings import Count, Natural, Settings
from ccrl.stats import score_at_budget
from scripts import training
from scripts.whole_paths import whole_paths, with_prompts

__all__ = ["Options", "main", "suggest", "train_once", "write"]

COMPILE_FROM = 30_000
"""Gradient steps from which a trial's updates are compiled where the agent says auto: constants of its settings are in
the graph, so that no trial finds it in the cache, and twenty seconds must pay within the one training."""

PROMPTS = ("prompts", "test_prompts", "reward", "tools")
"""Keys of the file of fixed settings that say what a language model is asked."""

FAILURES = (ValueError, ArithmeticError, RuntimeError)
"""Settings that do not fit together or that diverge (a matrix without an inverse is torch's RuntimeError): failed
trials, and not the end of the study."""


@dataclass(frozen=True)
class Options(Settings):
    """A search."""

    agent: Annotated[str, tyro.conf.Positional]
    """Agent or method, as train.py takes it."""
    env: str
    """Environment id, or text task."""
    out: Path
    """Folder of the study."""
    total_timesteps: Count = 50_000
    """Every training takes this many steps (completions)."""
    trials: Count = 40
    """The study ends with this many trials, those that were broken off or failed included; with several
    processes the trials under way when it is reached come on top."""
    jobs: Count = 1
    """This many processes run trials at a time."""
    seeds: tuple[Natural, ...] = (1000,)
    """Every trial trains on these; keep them apart from the seeds that results are reported on."""
    evaluations: Count = 5
    """Evaluations per training; pruning looks at each."""
    eval_episodes: Count = 10
    """Episodes (test questions) per evaluation, deterministic."""
    sampler: Literal["tpe", "random", "cmaes"] = "tpe"
    """How settings are proposed; budget.csv is exact for random alone."""
    pruner: Literal["median", "none"] = "median"
    """Trials below the median of the others at an evaluation are broken off, or none is."""
    only: tuple[str, ...] = ()
    """Settings to search; none named: all of agents/search.py that the agent has."""
    config: Path | None = None
    """YAML of fixed settings, as train.py takes it; a trial's are laid over it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seeds:
            raise ValueError("seeds: expected at least one, got none")


def suggest(trial: Any, space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A trial's settings."""
    found: dict[str, Any] = {}
    for name, entry in space.items():
        ((kind, values),) = entry.items()
        if kind == "choice":
            found[name] = trial.suggest_categorical(name, values)
        elif kind in ("log", "uniform"):
            found[name] = trial.suggest_float(name, *values, log=kind == "log")
        else:
            raise ValueError(f"{name}: expected around, log, uniform or choice, got {kind}")
    return found


def train_once(options: Options, settings: dict[str, Any], seed: int, report: Any = None) -> float:
    """Train, evaluate ``options.evaluations`` times, and return the last raw return; ``report(return, number)`` is
    called with each."""
    fixed = _fixed(options)
    cls = agents.get_agent(options.agent, configs.to_dict(fixed.agent))
    config = configs.from_dict(type(fixed.agent), settings, fixed.agent)
    agent = cls(fixed.env, config, seed=seed, device=fixed.device, env_kwargs=fixed.env_kwargs)
    if agent.samples_per_iteration > options.total_timesteps:
        agent.close()  # it would train on more than the others, and win
        raise ValueError(f"expected at most {options.total_timesteps} samples per iteration, the whole training, got "
                         f"{agent.samples_per_iteration}; lower n_steps or num_envs")  # fmt: skip
    agent.learner.compile_from = max(agent.learner.compile_from, COMPILE_FROM)
    eval_env, value, done = None, float("nan"), 0

    def watch(trained: Any) -> None:
        nonlocal value, done
        due = trained.num_timesteps * options.evaluations // options.total_timesteps
        if due > done:
            done = due
            found = evaluate_agent(trained, eval_env, options.eval_episodes, seed=stream_seed(seed, "tuning"))
            value = float(found.returns.mean())
            if report is not None:
                report(value, done)

    try:
        if getattr(cls, "steps_env", True):  # language models draw their test questions themselves
            options_of = {"device": fixed.device, **fixed.env_kwargs}
            eval_env = evaluation_env(fixed.env, options.eval_episodes, "dev", **options_of)
        agent.learn(until=options.total_timesteps, callback=watch)
    finally:
        agent.close()
        if eval_env is not None:
            eval_env.close()
    return value


def _study(options: Options, worker: int = 0, process: int = 0) -> Any:
    optuna = require("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # a killed process leaves a trial that runs for ever; its heart stops, and the next process calls it failed
    with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
        storage = optuna.storages.RDBStorage(
            f"sqlite:///{options.out.resolve() / 'study.db'}", heartbeat_interval=30, grace_period=120,
            engine_kwargs={"connect_args": {"timeout": 60}},
        )  # fmt: skip
    study = optuna.create_study(
        study_name=f"{options.agent}__{options.env}__{options.total_timesteps}", direction="maximize", storage=storage,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5) if options.pruner == "median"
        else optuna.pruners.NopPruner(),
    )  # fmt: skip
    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler,
                "cmaes": optuna.samplers.CmaEsSampler}  # fmt: skip
    _check_measure(options, study)
    # not the seed alone: a study that goes on would propose its first trials again, and two processes each other's
    name = f"worker {worker}, trial {len(study.trials)}"
    name = f"process {process}, {name}" if process else name
    study.sampler = samplers[options.sampler](seed=stream_seed(options.seeds[0], name))
    return study


def _check_measure(options: Options, study: Any) -> None:
    """:raises ValueError: the study's trials are worth something else: their values do not compare with new ones."""
    config = _overlay(options)
    here = {"seeds": options.seeds, "evaluations": options.evaluations, "eval_episodes": options.eval_episodes,
            "config": {name: config.get(name) or {} for name in ("agent", "env_kwargs", *PROMPTS)}}  # fmt: skip
    here = json.loads(json.dumps(here, default=str))  # as the database gives them back
    there = study.user_attrs.get("measure")
    if there is None:
        study.set_user_attr("measure", here)
    elif different := [name for name in here if here[name] != there.get(name)]:
        pairs = "; ".join(f"{name}: {there.get(name)} there, {here[name]} here" for name in different)
        raise ValueError(f"{options.out}: expected the command that its trials were run with, got another ({pairs}); "
                         "choose another --out")  # fmt: skip


def _claim(options: Options) -> tuple[int, Owner]:
    """The lowest number that no other process of the study has, and what holds it for this one."""
    for number in itertools.count():
        try:
            return number, Owner(options.out / ".processes" / str(number))
        except FolderInUseError:
            continue
    raise AssertionError


def _overlay(options: Options) -> dict[str, Any]:
    return configs.load_yaml(options.config) if options.config else {}


def _fixed(options: Options) -> Any:
    """The run's configuration that every trial's settings are laid over, as ``train.py`` reads the file."""
    overlay = _overlay(options)
    values = {**overlay, "env": options.env, "total_timesteps": options.total_timesteps}
    run = training.run_config(options.agent, overlay.get("agent"))
    return whole_paths(with_prompts(configs.from_dict(run, {k: v for k, v in values.items() if v is not None})))


def _space(options: Options) -> dict[str, dict[str, Any]]:
    fixed = _fixed(options).agent
    return space_of(type(fixed), options.only, fixed)


def _finished(study: Any) -> list[Any]:
    return [t for t in study.trials if t.state.is_finished()]


def _work(options: Options, worker: int, process: int = 0) -> None:
    """Run trials until the study has enough."""
    optuna = require("optuna", "tune")
    torch.set_num_threads(1)
    study, space = _study(options, worker, process), _space(options)

    def objective(trial: Any) -> float:
        try:
            return worth(trial)
        except FAILURES as error:
            trial.set_user_attr("reason", " ".join(f"{type(error).__name__}: {error}".split())[:300])
            raise

    def worth(trial: Any) -> float:
        settings, values = suggest(trial, space), []
        for number, seed in enumerate(options.seeds):

            def report(value: float, step: int, first: bool = number == 0) -> None:
                if first:
                    trial.report(value, step)
                    if trial.should_prune():
                        raise optuna.TrialPruned

            values.append(train_once(options, settings, seed, report))
        if not math.isfinite(mean := sum(values) / len(values)):
            raise FloatingPointError(f"expected finite returns, got {values}")
        return mean

    def stop(study: Any, trial: Any) -> None:
        value = "" if trial.value is None else digits(trial.value)
        value = trial.user_attrs.get("reason", value)
        print(f"[tune] trial {trial.number}: {trial.state.name.lower()} {value} {trial.params}", flush=True)
        if len(_finished(study)) >= options.trials:
            study.stop()

    if len(_finished(study)) < options.trials:
        study.optimize(objective, callbacks=[stop], catch=FAILURES)


def write(options: Options) -> Path:
    """Write the files of the trials that have ended, however many; the path of best.yaml.

    :raises ValueError: none ended whole.
    """
    optuna = require("optuna", "tune")
    study = _study(options)
    state, trials = optuna.trial.TrialState, _finished(study)
    whole = [t for t in trials if t.state == state.COMPLETE]
    if not whole:
        reasons = [t.user_attrs["reason"] for t in trials if "reason" in t.user_attrs][-1:]
        raise ValueError(f"{options.out}: expected a trial that ended, got {len(trials)} that failed or were broken "
                         f"off{''.join(f' (the last: {text})' for text in reasons)}; look at the messages above, or "
                         "narrow the space with --only")  # fmt: skip
    names = sorted({name for t in trials for name in t.params})
    rows = [[t.number, t.state.name, t.value, *(t.params.get(name) for name in names), t.user_attrs.get("reason", "")]
            for t in trials]  # fmt: skip
    _write_csv(options.out / "trials.csv", [["trial", "state", "value", *names, "reason"], *rows])
    curve = score_at_budget([t.value for t in whole])
    _write_csv(options.out / "budget.csv", [["trials", "expected best"], *enumerate(curve, start=1)])
    overlay = _overlay(options)
    best = {**overlay, "env": options.env, "total_timesteps": options.total_timesteps}
    best["agent"] = {**(overlay.get("agent") or {}), **study.best_params}
    head = (
        f"# {options.agent} on {options.env}: trial {study.best_trial.number}, return {study.best_value:.6g} on seeds "
        f"{' '.join(map(str, options.seeds))} (chosen on these: report it on others).\n# Budget: {len(trials)} trials "
        f"({len(whole)} whole) of {options.total_timesteps:,} x {len(options.seeds)}, sampler {options.sampler}.\n"
        f"#   python scripts/train.py {options.agent} --config {options.out / 'best.yaml'}\n"
    )
    text = head + yaml.safe_dump(best, sort_keys=False)
    write_atomic(options.out / "best.yaml", lambda file: file.write(text.encode()))
    _plot_importance(study, options, len(whole))
    return options.out / "best.yaml"


def _write_csv(path: Path, rows: Sequence[Iterable[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, lambda file: file.write(text.getvalue().encode()))  # other processes may end at the same time


def _plot_importance(study: Any, options: Options, whole: int) -> None:
    """Which settings decide whether a trial is among the better ones (PED-ANOVA, Watanabe et al. 2023)."""
    from matplotlib.figure import Figure

    optuna = require("optuna", "tune")
    if whole < 4 or len({t.value for t in study.trials if t.value is not None}) < 2:
        return
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    figure = Figure(figsize=(5.6, 0.6 + 0.32 * len(found)), layout="constrained")
    axis = figure.subplots()
    axis.barh(list(found)[::-1], list(found.values())[::-1], color="#0072B2")
    axis.set_title(f"{options.agent} on {options.env}: importance of settings, {whole} trials", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.out / "importance.png", dpi=150)


def main(options: Options) -> Path:
    """Run the trials that are left, write the files, and return the path of ``best.yaml``.

    :raises ValueError: no trial ended, nothing to search, an environment that does not exist, or a study whose trials
        were run with other seeds, evaluations or fixed settings.
    """
    cls = agents.get_agent(options.agent)
    _space(options)
    if getattr(cls, "steps_env", True):  # otherwise every trial would fail for it, one by one
        resolve_env(options.env, 1, **_fixed(options).env_kwargs).close()
    options.out.mkdir(parents=True, exist_ok=True)
    _study(options)  # the database is there before workers open it
    process, owner = _claim(options)
    with owner:
        if options.jobs == 1:
            _work(options, 0, process)
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
                for future in [pool.submit(_work, options, worker, process) for worker in range(options.jobs)]:
                    future.result()
    path = write(options)
    print(path.read_text(encoding="utf-8"))
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, ImportError, OSError) as error:
        sys.exit(f"error: {error}")
