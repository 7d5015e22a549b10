"""Stable-Baselines3 in a study: its algorithms on OUR environments (``envs.make`` through ``as_vec_env``), so that both
sides meet the same task, and written as our run folders, so that both lie in one plot.

Evaluation is ours: same episodes, same seeds, at the same steps, after the update as in ``agents``.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

import envs
from ccrl.adapters import as_vec_env
from ccrl.batched_env import evaluation_env
from ccrl.experiment.callbacks import EvalCallback
from ccrl.experiment.config import ConfigError
from ccrl.experiment.logger import Logger
from ccrl.experiment.run import RunFolder
from ccrl.settings import Count, Natural, Settings

__all__ = ["SB3Config", "algorithm", "check", "is_sb3", "model_arguments", "normaliser_arguments", "run"]

MODULES = {"sb3": "stable_baselines3", "sb3-contrib": "sb3_contrib"}
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


@dataclass(frozen=True)
class SB3Config(Settings):
    """One run of an SB3 algorithm."""

    env: str
    """The environment has this id, as in train.py: where we have a native environment, SB3 trains on that one."""
    total_timesteps: Count
    """Training takes this many environment steps."""
    seed: Natural = 0
    """The run has this seed."""
    eval_every: Natural = 0
    """The model is evaluated every so many environment steps; 0 never evaluates."""
    eval_episodes: Count = 10
    """An evaluation plays this many episodes, deterministic and stochastic each."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """These constructor options go to the environment, under Gymnasium's names."""
    agent: dict[str, Any] = field(default_factory=dict)
    """These are SB3's argument names, or ours where they say the same: num_envs, hidden, activation, adam_eps,
    orthogonal, log_std_init, exploration_noise, normalise_obs, normalise_reward, clip_norm (VecNormalize)."""


def is_sb3(agent: str) -> bool:
    """Whether ``agent`` is ``sb3:...`` or ``sb3-contrib:...``."""
    return agent.partition(":")[0] in MODULES


def algorithm(agent: str) -> Any:
    """The class behind ``sb3:ppo``.

    Raises ``ImportError`` if the package is not installed, ``ValueError`` for a name it does not have.
    """
    package, _, name = agent.partition(":")
    module = require(MODULES[package], "sb3")
    known = {k.lower(): k for k, v in vars(module).items() if inspect.isclass(v) and hasattr(v, "learn")}
    if name not in known:
        raise ValueError(f"agent: expected {package}: and one of {', '.join(sorted(known))}, got {agent!r}")
    return getattr(module, known[name])


def check(agent: str, config: SB3Config) -> None:
    """Raises ``ConfigError`` for an argument that the algorithm does not have."""
    cls, (arguments, _) = algorithm(agent), model_arguments(config.agent)
    known = inspect.signature(cls).parameters.keys() - {"policy", "env", "seed", "device", "_init_setup_model"}
    normaliser_arguments(config.agent)
    for key in arguments:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"{agent}: unknown setting {key!r}.{hint} Known: {', '.join(sorted(known))}.")


def normaliser_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of SB3's VecNormalize from ``SB3Config.agent``; none: it is not used.

    Raises ``ConfigError`` for a clip_norm that would do nothing.
    """
    obs, reward = settings.get("normalise_obs", False), settings.get("normalise_reward", False)
    clip = {name: settings["clip_norm"] for name in ("clip_obs", "clip_reward") if "clip_norm" in settings}
    if obs or reward:
        return {"norm_obs": obs, "norm_reward": reward, "gamma": settings.get("gamma", 0.99), **clip}
    if clip:
        raise ConfigError("clip_norm: it clips what is normalised; expected normalise_obs or normalise_reward as well")
    return {}


def model_arguments(settings: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """SB3's constructor arguments from ``SB3Config.agent``, and the number of environments (1, SB3's default)."""
    arguments = {k: v for k, v in settings.items() if k not in ("normalise_obs", "normalise_reward", "clip_norm")}
    num_envs = arguments.pop("num_envs", 1)
    policy = dict(arguments.pop("policy_kwargs", {}))
    if "hidden" in arguments:
        policy["net_arch"] = list(arguments.pop("hidden"))
    if "activation" in arguments:
        policy["activation_fn"] = ACTIVATIONS[arguments.pop("activation")]
    if "adam_eps" in arguments:
        policy["optimizer_kwargs"] = {**policy.get("optimizer_kwargs", {}), "eps": arguments.pop("adam_eps")}
    for ours, theirs in (("orthogonal", "ortho_init"), ("log_std_init", "log_std_init")):
        if ours in arguments:
            policy[theirs] = arguments.pop(ours)
    if "exploration_noise" in arguments:  # in both, of actions scaled to [-1, 1]
        arguments["action_noise"] = arguments.pop("exploration_noise")
    return arguments | ({"policy_kwargs": policy} if policy else {}), num_envs


class _Learner:
    """An SB3 model with the names that our callbacks use."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def num_timesteps(self) -> int:
        return int(self.model.num_timesteps)

    @property
    def ep_rew_mean(self) -> float | None:
        episodes = self.model.ep_info_buffer
        return float(np.mean([episode["r"] for episode in episodes])) if episodes else None

    def act(self, obs: Any, deterministic: bool) -> Tensor:
        array = {k: v.numpy() for k, v in obs.items()} if isinstance(obs, dict) else obs.numpy()
        if (normaliser := self.model.get_vec_normalize_env()) is not None:
            array = normaliser.normalize_obs(array)  # a copy, with the statistics as training has them now
        return torch.as_tensor(self.model.predict(array, deterministic=deterministic)[0])

    def save(self, path: Path) -> None:
        self.model.save(path.with_suffix(".zip"))
        if (normaliser := self.model.get_vec_normalize_env()) is not None:  # the policy is nothing without them
            normaliser.save(path.with_suffix(".normalise.pkl"))


def run(agent: str, config: SB3Config, root: Path, timed: Any) -> RunFolder:
    """Train in a new folder under ``root``; ``timed`` is ``training.timed``."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import KVWriter
    from stable_baselines3.common.logger import Logger as SB3Logger
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import VecNormalize

    class Writer(KVWriter):  # type: ignore[misc]
        def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
            numbers = {k: v for k, v in key_values.items() if isinstance(v, int | float | np.number)}
            logger.log(step, {k: float(v) for k, v in numbers.items()})

        def close(self) -> None: ...

    class Evaluate(BaseCallback):  # type: ignore[misc]
        # A rollout starts after the update on the one before: as our agents, evaluated with the new parameters.
        def _on_rollout_start(self) -> None:
            evaluation.on_iteration(learner)

        def _on_training_end(self) -> None:
            evaluation.on_iteration(learner)

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(1)
    arguments, num_envs = model_arguments(config.agent)
    folder = RunFolder.create(root, config.env, agent, config.seed, config)
    folder.record(environment=f"ccrl's {config.env} (envs.make) through ccrl.adapters.as_vec_env")
    logger = Logger(folder.path)
    env = envs.make(config.env, num_envs, **config.env_kwargs)
    if isinstance(scale := arguments.get("action_noise"), int | float):
        size = int(np.prod(env.single_action_space.shape))
        arguments["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, scale))
    vec_env = as_vec_env(env)
    if normalise := normaliser_arguments(config.agent):
        vec_env = VecNormalize(vec_env, **normalise)
    model = algorithm(agent)("MlpPolicy", vec_env, seed=config.seed, device="cpu", **arguments)
    model.set_logger(SB3Logger(str(folder.path), [Writer()]))
    learner, eval_env, callback = _Learner(model), None, None
    evaluation: Any = None
    if config.eval_every:
        eval_env = evaluation_env(config.env, config.eval_episodes, "dev", **config.env_kwargs)
        evaluation = EvalCallback(eval_env, folder.path, config.eval_every, config.eval_episodes, logger=logger)
        callback = Evaluate()
    interval = 1 if hasattr(model, "rollout_buffer") else 4  # off-policy algorithms count episodes, not rollouts
    try:
        with timed(folder, learner, evaluation):
            model.learn(config.total_timesteps, callback, log_interval=interval)
    finally:
        logger.close()
        if evaluation is not None:
            evaluation.on_training_end(learner)
        for each in (env, eval_env):
            if each is not None:
                each.close()
    learner.save(folder.path / "final.zip")
    return folder
