"""Videos of a policy, headless."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import torch
from numpy.typing import NDArray

from ccrl.batched_env import AutoresetMode, BatchedEnv
from ccrl.experiment.evaluation import Predict
from ccrl.seeding import stream_seed

__all__ = ["record_video"]


@torch.no_grad()
def record_video(
    env: BatchedEnv,
    predict: Predict,
    path: str | os.PathLike[str],
    episodes: int = 1,
    fps: float = 30.0,
    seed: int = 0,
    deterministic: bool = True,
    max_steps: int = 10_000,
) -> float:
    """Film slot 0 for ``episodes`` episodes (at most ``max_steps`` steps in all) into an ``.mp4`` or ``.gif``.

    A frame shows the state before each action; frames are ``env.render(0)``: ``[height, width, 3]`` uint8. The global
    torch generators are put back afterwards.

    Returns:
        Mean return of the episodes that ended (of the begun one if none did).

    Raises:
        TypeError: the env has no ``render``.
        ValueError: another suffix, or frames of another shape.
    """
    path = Path(path)
    options: dict[str, dict[str, Any]] = {
        # macro_block_size=1: the default rescales frames to multiples of 16.
        ".mp4": {"fps": fps, "codec": "libx264", "macro_block_size": 1, "quality": 8},
        ".gif": {"duration": 1000.0 / fps, "loop": 0},
    }
    if path.suffix not in options:
        raise ValueError(f"{path}: expected a name ending in .mp4 or .gif; received {path.suffix or 'no suffix'!r}.")
    render = getattr(env, "render", None)
    if render is None:
        raise TypeError(f"expected an env with render(index) -> frame; received {type(env).__name__} without it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    devices = [env.device] if env.device.type == "cuda" else []
    finished, total, begun, resetting = 0, 0.0, 0.0, False
    with torch.random.fork_rng(devices=devices), _writer(path, options[path.suffix]) as writer:
        torch.manual_seed(stream_seed(seed, "evaluation: actions"))
        obs = env.reset(seed=stream_seed(seed, "evaluation"))
        restart = getattr(predict, "restart", None)  # a policy with a memory is told where episodes begin
        dummy = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
        if restart is not None:
            restart()
        for _ in range(max_steps):
            writer.append_data(_frame(render(0)))
            result = env.step(predict(obs, deterministic).to(env.device))
            obs = result.obs
            done = result.terminated | result.truncated
            if restart is not None:
                late = env.autoreset_mode == AutoresetMode.NEXT_STEP
                restart(dummy if late else done)
                dummy = done & ~dummy
            if not resetting:
                begun += float(result.reward[0])
            ended = bool(done[0]) and not resetting
            if ended:
                total, begun = total + begun, 0.0
            resetting = ended and env.autoreset_mode == AutoresetMode.NEXT_STEP
            finished += ended
            if finished == episodes:
                break
            if env.autoreset_mode == AutoresetMode.DISABLED and bool(done.any()):
                obs = env.reset(mask=done)
    return total / finished if finished else begun


def _writer(path: Path, options: dict[str, Any]) -> Any:
    return imageio.get_writer(path, **options)


def _frame(image: Any) -> NDArray[np.uint8]:
    frame = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"render: expected [height, width, 3] uint8; received {frame.shape} {frame.dtype}.")
    height, width = frame.shape[0] // 2 * 2, frame.shape[1] // 2 * 2  # H.264 in yuv420p takes even sizes only
    return np.ascontiguousarray(frame[:height, :width])
