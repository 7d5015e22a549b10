"""A configuration as a run's folder keeps it: flags for prompts are options of a task, files by whole paths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["absolute_files", "whole_paths", "with_prompts"]


def with_prompts(config: Any) -> Any:
    """A configuration with a file of prompts as one of the task jsonl.

    :raises ValueError: test questions, rewards or tools without prompts, or prompts for another task.
    """
    if getattr(config, "prompts", None) is None:
        for name in ("test_prompts", "reward", "tools"):
            if getattr(config, name, None):
                raise ValueError(f"{name}: expected prompts beside it, got none; a task that is named judges itself")
        return config
    task = "tools" if getattr(config, "tools", ()) else "jsonl"
    if config.env not in (task, type(config)().env):
        raise ValueError(f"prompts: expected no other task, got --task {config.env}; leave one of them out")
    options: dict[str, Any] = {"path": str(config.prompts)}
    if config.test_prompts is not None:
        options["test_path"] = str(config.test_prompts)
    if config.reward:
        # of a reward model the folder, which is read from other folders too
        names = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in config.reward]
        options["reward"] = names[0] if len(names) == 1 else names
    if task == "tools":
        options["tools"] = list(config.tools)
    if cap := config.agent.max_new_tokens:  # the task's own cap would be the lower one
        options["max_new_tokens"] = cap
    if twice := sorted(options.keys() & config.env_kwargs.keys()):
        raise ValueError(f"env_kwargs: expected none of {', '.join(twice)}, which flags of their own say")
    return replace(config, env=task, env_kwargs=options | config.env_kwargs, prompts=None, test_prompts=None,
                   reward=(), tools=())  # fmt: skip


def whole_paths(config: Any) -> Any:
    """A configuration whose files (of an environment, the data set, the base policy, a judge) and whose model's folder
    have their whole paths: a run is resumed and evaluated from other folders too."""
    config, model = replace(config, env_kwargs=absolute_files(config.env_kwargs)), getattr(config.agent, "model", None)
    if isinstance(model, str) and model not in ("tiny", "tabular") and Path(model).is_dir():
        config = replace(config, agent=replace(config.agent, model=str(Path(model).resolve())))
    if (folder := getattr(config.agent, "generation_folder", None)) is not None:
        config = replace(config, agent=replace(config.agent, generation_folder=Path(folder).resolve()))
    for name in ("judge", "value", "data_file"):  # of POLAR, V0 and reward models
        value = getattr(config.agent, name, None)
        if isinstance(value, str) and value != getattr(type(config.agent)(), name) and Path(value).exists():
            config = replace(config, agent=replace(config.agent, **{name: str(Path(value).resolve())}))
    for name in ("dataset", "base"):
        value = getattr(config.agent, name, None)
        if isinstance(value, str) and (whole := _whole(value)) != value:
            config = replace(config, agent=replace(config.agent, **{name: whole}))
    return config


def _whole(name: str) -> str:
    """A file by its whole path, also behind the name of its kind (``ogbench:FILE``, ``d4rl:FILE``); others as they
    are."""
    kind, colon, file = name.rpartition(":")
    known = kind in ("", "ogbench", "d4rl")
    return f"{kind}{colon}{Path(file).resolve()}" if known and Path(file).is_file() else name


def absolute_files(options: dict[str, Any]) -> dict[str, Any]:
    """Options of an environment with the files among them (recorded demand, prompts) by their whole path: a run is
    resumed and evaluated from other folders too."""
    return {k: str(Path(v).resolve()) if isinstance(v, str) and Path(v).is_file() else v for k, v in options.items()}
