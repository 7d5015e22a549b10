"""Environments, and the one door to all of them: :func:`make`.

Importing this package registers every environment, text task and flow task in ``ccrl.registry``, and every native
environment with Gymnasium as ``ccrl/<id>``, so that ``gymnasium.make_vec("ccrl/CartPole-v1", num_envs=8)`` builds what
``envs.make("CartPole-v1", 8)`` builds, with NumPy arrays outside.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gymnasium
import torch
from gymnasium.envs.registration import load_env_creator

from ccrl import registry
from ccrl.adapters import GymnasiumEnv, SingleEnv, TorchVectorEnv, as_vector_env, from_gymnasium
from ccrl.batched_env import AutoresetMode, BatchedEnv, as_autoreset_mode, check_device
from ccrl.packages import require
from ccrl.settings import Count, Natural, checked
from ccrl.signals import shielded

if TYPE_CHECKING:
    from ccrl.flow.task import FlowTask
    from ccrl.inventory.functional_env import FunctionalEnv
    from ccrl.llm.task import TextTask

__all__ = ["BACKENDS", "NATIVE", "OWN", "make", "make_functional", "make_single_env", "make_vector_env"]

CLASSIC = {
    "Acrobot-v1": "Acrobot",
    "CartPole-v1": "CartPole",
    "MountainCar-v0": "MountainCar",
    "MountainCarContinuous-v0": "MountainCarContinuous",
    "Pendulum-v1": "Pendulum",
}
MUJOCO = (
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "HumanoidStandup-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)
NATIVE = (*CLASSIC, *MUJOCO)
"""The ids with a batched implementation of our own, under Gymnasium's names."""

OWN = {
    "AntCoverage-v0": ("envs.coverage", "ant_coverage"),
    "Bandit-v0": ("envs.classic", "Bandit"),
    "CostBudget-v0": ("envs.stock", "CostBudget"),
    "GridCoverage-v0": ("envs.coverage", "grid_coverage"),
    "GridDesign-v0": ("envs.coverage", "grid_design"),
    "GridFacility-v0": ("envs.coverage", "grid_facility"),
    "GridItems-v0": ("envs.coverage", "grid_items"),
    "HazardCorridor-v0": ("envs.maze", "HazardCorridor"),
    "Homeostat-v0": ("envs.stock", "Homeostat"),
    "InventoryManyWarehousesLost-v0": ("envs.inventory", "many_warehouses_lost_demand"),
    "InventoryManyWarehousesRecorded-v0": ("envs.inventory", "many_warehouses_real_data"),
    "InventoryOneStoreBacklogged-v0": ("envs.inventory", "one_store_backlogged"),
    "InventoryOneStoreLost-v0": ("envs.inventory", "one_store_lost"),
    "InventoryOneStoreRecorded-v0": ("envs.inventory", "one_store_real_data"),
    "InventoryOneWarehouseLost-v0": ("envs.inventory", "one_warehouse_lost_demand"),
    "InventoryOwn-v0": ("envs.inventory", "own_demand"),
    "InventorySerial-v0": ("envs.inventory", "serial_system"),
    "InventoryTransshipment-v0": ("envs.inventory", "transshipment_backlogged"),
    "LQR-v0": ("envs.classic", "LQR"),
    "MountainCarTwoActions-v0": ("envs.classic", "MountainCarTwoActions"),
    "OrderExecution-v0": ("envs.stock", "OrderExecution"),
    "PointCoverage-v0": ("envs.coverage", "point_coverage"),
    "PointGoal-v0": ("envs.hacking", "point_goal"),
    "PointMazeLarge-v0": ("envs.maze", "large"),
    "PointMazeMedium-v0": ("envs.maze", "medium"),
    "PointMazeU-v0": ("envs.maze", "u_maze"),
    "RandomMDP-v0": ("envs.classic", "RandomMDP"),
    "RandomWalk-v0": ("envs.classic", "RandomWalk"),
    "RiskGridworld-v0": ("envs.stock", "RiskGridworld"),
    "SABChain-v0": ("envs.stock", "SABChain"),
    "ShipSteering-v0": ("envs.classic", "ShipSteering"),
    "Tomato-v0": ("envs.hacking", "tomato"),
    "TwoRooms-v0": ("envs.coverage", "two_rooms"),
}
"""Tasks that are only ours, ``ccrl/<id>``: the module and the class, called with ``(num_envs, device=, autoreset_mode=,
**options)``."""

LAB_FAMILIES = ("isaac", "mjlab")
"""Simulators whose tasks are made by ``envs.isaac``: what stands before the colon of an id."""

BACKENDS = ("native", "sync", "async", "gymnasium")


@checked
def make(
    id: str,
    num_envs: Count = 1,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    autoreset_mode: AutoresetMode | str | None = None,
    seed: Natural | None = None,
    **env_kwargs: Any,
) -> BatchedEnv:
    """``num_envs`` copies of an environment.

    Args:
        id: Gymnasium's id (``"HalfCheetah-v5"``), ours (``"ccrl/HalfCheetah-v5"``), or a simulator's
            (``"isaac:Isaac-Ant-Direct"``, ``"mjlab:..."``, see ``envs.isaac``). ``"module:id"`` imports the module
            first, which is how packages that register environments are loaded.
        num_envs: number of copies.
        device: where observations and rewards go. The native MuJoCo tasks simulate on the CPU, and with
            ``engine="warp"`` on any.
        backend: ``"native"`` is ours; ``"sync"`` and ``"async"`` are Gymnasium's environments in one or in many
            processes; ``"gymnasium"`` is the environment's own vector entry point. ``None`` takes the native one where
            there is one, else the vector entry point, else ``"sync"``. What a vector entry point made with
            ``ccrl.adapters.as_vector_env`` is taken out of it again.
        autoreset_mode: ``None`` is ``SAME_STEP``, or for vector entry points what they do.
        seed: resets the environment once with this seed.
        env_kwargs: options of the environment, under Gymnasium's names.

    Raises:
        ValueError: an unknown id, backend, device or mode, or a combination that does not exist.
        ModuleNotFoundError: the module in front of the id.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"expected backend None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if autoreset_mode is not None:
        autoreset_mode = as_autoreset_mode(autoreset_mode, where=id)
    if id.partition(":")[0] in LAB_FAMILIES:
        if backend is not None:
            raise ValueError(f"{id}: expected backend=None, got {backend!r}")
        from envs.isaac import make_lab

        lab = make_lab(id, num_envs, device, autoreset_mode, env_kwargs)
        if seed is not None:
            lab.reset(seed=seed)
        return lab
    module, _, name = id.rpartition(":")
    if module:
        registry.import_module(id)
    bare = name.removeprefix("ccrl/")
    native = (bare in NATIVE and (backend is None or bare != name)) or (bare in OWN and bare != name)
    if native and backend not in (None, "native"):
        other = "leave backend=None" if bare in OWN else f"for backend={backend!r} use Gymnasium's id {bare!r}"
        raise ValueError(f"{name} is native; {other}")
    if native or backend == "native":
        env = _make_native(bare, num_envs, device, autoreset_mode, env_kwargs)
    else:
        env = _make_gymnasium(name, num_envs, device, backend, autoreset_mode, env_kwargs)
    if seed is not None:
        env.reset(seed=seed)
    return env


def make_functional(id: str, **options: Any) -> FunctionalEnv:
    """The simulator behind an id as pure functions, for agents that differentiate through it.

    Args:
        id: of an inventory task, ``"ccrl/InventoryOneStoreLost-v0"``.
        options: of the task, as for :func:`make`.

    Raises:
        ValueError: an id that has no such simulator.
    """
    module, task = OWN.get(id.removeprefix("ccrl/"), ("", ""))
    if module != "envs.inventory":
        known = [f"ccrl/{name}" for name, (where, _) in OWN.items() if where == "envs.inventory"]
        raise ValueError(f"{id!r} is no differentiable simulator; expected one of {', '.join(known)}")
    inventory = importlib.import_module(module)
    made: FunctionalEnv = inventory.InventoryEnv(inventory.make_task(task, **options))
    return made


def make_vector_env(task: str, num_envs: int = 1, render_mode: str | None = None, **options: Any) -> TorchVectorEnv:
    """The native environment ``task`` as a Gymnasium vector environment: the entry point of ``gymnasium.make_vec``."""
    return as_vector_env(make(task, num_envs, backend="native", **options), render_mode)


def make_single_env(task: str, render_mode: str | None = None, **options: Any) -> SingleEnv:
    """One copy of the native environment ``task`` as a Gymnasium environment: the entry point of ``gymnasium.make``."""
    env = make(task, 1, backend="native", autoreset_mode=AutoresetMode.DISABLED, **options)
    return SingleEnv(env, render_mode)


def _make_task(name: str, **options: Any) -> TextTask:
    from envs.text import make_task  # late: who plays cart-pole needs none of it

    return make_task(name, **options)


def _make_flow_task(name: str, **options: Any) -> FlowTask:
    from envs.flow import make_flow_task

    return make_flow_task(name, **options)


def _make_native(
    id: str,
    num_envs: int,
    device: torch.device | str,
    autoreset_mode: AutoresetMode | str | None,
    options: dict[str, Any],
) -> BatchedEnv:
    mode = as_autoreset_mode(autoreset_mode or AutoresetMode.SAME_STEP, where=id)
    if id not in MUJOCO:
        check_device(device)
    if id in CLASSIC:
        factory: Callable[..., BatchedEnv] = getattr(importlib.import_module("envs.classic"), CLASSIC[id])
        return _built(factory, id, options, num_envs, device=device, autoreset_mode=mode)
    if id in OWN:
        module, name = OWN[id]
        factory = getattr(importlib.import_module(module), name)
        return _built(factory, id, options, num_envs, device=device, autoreset_mode=mode)
    if id in MUJOCO:
        require("mujoco", "mujoco")
        # Imported late: loading MuJoCo takes most of a second, which a cart-pole should not wait for.
        from envs.mujoco import make_mujoco

        return make_mujoco(id, num_envs, device=device, autoreset_mode=mode, **options)
    raise ValueError(f"there is no native {id!r}; expected one of {', '.join((*NATIVE, *OWN))}, or another backend")


def _built(
    factory: Callable[..., BatchedEnv], id: str, options: dict[str, Any], num_envs: int, **fixed: Any
) -> BatchedEnv:
    try:
        return factory(num_envs, **fixed, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error) or not options:
            raise
        inits = [vars(cls)["__init__"] for cls in getattr(factory, "__mro__", ())[:-1] if "__init__" in vars(cls)]
        found = {
            p.name for init in inits for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        known = f"among {', '.join(sorted(found - fixed.keys()))}" if found else f"that it takes ({error})"
        raise TypeError(f"{id}: expected options {known}, got {', '.join(sorted(options))}") from error


def _make_gymnasium(
    id: str,
    num_envs: int,
    device: torch.device | str,
    backend: str | None,
    autoreset_mode: AutoresetMode | str | None,
    options: dict[str, Any],
) -> BatchedEnv:
    if id not in gymnasium.registry:
        near = difflib.get_close_matches(id, gymnasium.registry, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(
            f"no environment {id!r}; {hint}One registered by another package needs that package's module in front: "
            f"'module:{id}'"
        )
    entry_point = gymnasium.spec(id).vector_entry_point
    if backend == "gymnasium" and entry_point is None:
        raise ValueError(f"{id} has no vector entry point; use backend='sync' or 'async'")
    if backend == "gymnasium" or (backend is None and entry_point is not None):
        assert entry_point is not None
        if check_device(device).type != "cpu" and _takes_device(entry_point):
            options = {"device": str(device)} | options
        with shielded():
            made = gymnasium.make_vec(id, num_envs, "vector_entry_point", **options)
        # one of as_vector_env is a BatchedEnv inside: with its state, which Gymnasium cannot save, and in torch
        env = made.env if isinstance(made, TorchVectorEnv) else GymnasiumEnv(made, device=device)
        if env.device.type != torch.device(device).type:
            raise ValueError(
                f"{id} is made on {env.device}, got device={str(device)!r}; give its vector entry point an argument "
                "device, or leave device at 'cpu'"
            )
        if autoreset_mode is not None and as_autoreset_mode(autoreset_mode, where=id) != env.autoreset_mode:
            raise ValueError(
                f"the vector entry point of {id} resets in {env.autoreset_mode}, got autoreset_mode={autoreset_mode}; "
                "use backend='sync' or 'async' to choose it"
            )
        return env
    mode = autoreset_mode or AutoresetMode.SAME_STEP
    asynchronous = backend == "async"
    if id.startswith("HalfCheetah-"):
        require("mujoco", "mujoco")
        from envs.mujoco.model import make_quietly

        make = functools.partial(make_quietly, id, options)
        return from_gymnasium(make, num_envs, device=device, autoreset_mode=mode, asynchronous=asynchronous)
    return from_gymnasium(id, num_envs, device=device, autoreset_mode=mode, asynchronous=asynchronous, **options)


def _takes_device(entry_point: Any) -> bool:
    creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
    return "device" in inspect.signature(creator).parameters


for _id in (*NATIVE, *OWN):
    if f"ccrl/{_id}" not in gymnasium.registry:
        gymnasium.register(
            f"ccrl/{_id}",
            entry_point="envs:make_single_env",
            vector_entry_point="envs:make_vector_env",
            kwargs={"task": _id},
        )


registry.environments.register_finder(lambda id: partial(make, id))
for _id, (_module, _) in OWN.items():
    if _module == "envs.inventory":
        for _name in (f"ccrl/{_id}", _id):
            registry.functional_environments.register(_name, partial(make_functional, f"ccrl/{_id}"))
registry.text_tasks.register_finder(lambda name: None if registry.is_module_name(name) else partial(_make_task, name))
registry.flow_tasks.register_finder(
    lambda name: None if registry.is_module_name(name) else partial(_make_flow_task, name)
)
