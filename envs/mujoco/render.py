"""Pictures of one simulation, off screen, with or without a display."""

from __future__ import annotations

import ctypes.util
import importlib
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import mujoco
import numpy as np

__all__ = ["RenderOptions", "Renderer"]


@dataclass(frozen=True)
class RenderOptions:
    """Gymnasium's rendering options. Without a camera of the model, a free camera films the task; it follows the body
    ``trackbodyid`` where the camera configuration names one other than the world."""

    width: int = 480
    height: int = 480
    camera_id: int | None = None
    camera_name: str | None = None
    default_camera_config: dict[str, Any] | None = None
    """Attributes of MjvCamera; they replace the task's own."""
    max_geom: int = 1000
    visual_options: dict[int, bool] = field(default_factory=dict)
    """Values of MjvOption's flags by their index (``mujoco.mjtVisFlag``)."""

    def __post_init__(self) -> None:
        for name in ("width", "height", "max_geom"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, received {getattr(self, name)}")
        if self.camera_id is not None and self.camera_name is not None:
            raise ValueError("expected camera_id or camera_name, received both: drop one")


class Renderer:
    """Draws simulations of ``model``.

    Raises ``ValueError`` for a camera the model does not have and ``RuntimeError`` where no OpenGL backend works.
    """

    def __init__(self, model: mujoco.MjModel, options: RenderOptions, camera: dict[str, Any]) -> None:
        self._camera = _camera(model, options, camera)
        self._option = mujoco.MjvOption()
        for flag, value in options.visual_options.items():
            self._option.flags[flag] = value
        # The frame buffer is made in the model's size, which may be smaller than the picture.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, options.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, options.height)
        self._gl = _context(options.width, options.height)
        self._gl.make_current()
        self._scene = mujoco.MjvScene(model, maxgeom=options.max_geom)
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        self._viewport = mujoco.MjrRect(0, 0, options.width, options.height)
        self._pixels = np.empty((options.height, options.width, 3), np.uint8)

    def render(self, data: mujoco.MjData) -> np.ndarray:
        """``[height, width, 3]`` uint8, a new array. ``data`` may be of a variant of the model."""
        self._gl.make_current()
        mujoco.mjv_updateScene(
            data.model, data, self._option, None, self._camera, mujoco.mjtCatBit.mjCAT_ALL.value, self._scene
        )
        mujoco.mjr_render(self._viewport, self._scene, self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._viewport, self._mjr)
        return self._pixels[::-1].copy()  # OpenGL's first line is the lowest

    def close(self) -> None:
        """Free the OpenGL context."""
        self._gl.make_current()
        self._mjr.free()
        self._gl.free()


def _camera(model: mujoco.MjModel, options: RenderOptions, task_camera: dict[str, Any]) -> mujoco.MjvCamera:
    camera, number = mujoco.MjvCamera(), options.camera_id
    if options.camera_name is not None:
        number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, options.camera_name)
    if number is not None and not (0 <= number < model.ncam or (number == -1 and options.camera_name is None)):
        names = [model.camera(i).name for i in range(model.ncam)]
        raise ValueError(f"camera: expected one of {names} or its index, received {options.camera_name or number!r}")
    if number is not None and number >= 0:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, number
        return camera
    mujoco.mjv_defaultFreeCamera(model, camera)
    config = task_camera if options.default_camera_config is None else options.default_camera_config
    for name, value in config.items():
        if not hasattr(camera, name):
            raise ValueError(f"camera configuration: expected attributes of MjvCamera, received {name!r}")
        if np.ndim(value):
            getattr(camera, name)[:] = value
        else:
            setattr(camera, name, value)
    if camera.trackbodyid > 0:
        camera.type = mujoco.mjtCamera.mjCAMERA_TRACKING
    return camera


def _context(width: int, height: int) -> Any:
    """The first OpenGL context that works: the backend MUJOCO_GL names, else whatever the machine has."""
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted in ("egl", "osmesa", "glfw", "cgl"):
        backends = [wanted]
    elif sys.platform == "linux":
        # PyOpenGL loads one library per process, and a failed import cannot be undone: ask for the library first.
        display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        backends = [name for name, lib in (("egl", "EGL"), ("osmesa", "OSMesa")) if ctypes.util.find_library(lib)][:1]
        backends += ["glfw"] if display else []
    else:
        backends = ["cgl", "glfw"] if sys.platform == "darwin" else ["glfw"]
    failures = []
    for name in backends:
        try:
            return importlib.import_module(f"mujoco.{name}").GLContext(width, height)
        except Exception as error:  # missing libraries surface as ImportError, AttributeError, RuntimeError, GLError
            failures.append(f"{name}: {error}")
    found = "; ".join(failures) or "no EGL, OSMesa or display found"
    raise RuntimeError(
        f"rendering needs OpenGL, and no backend works here ({found}). "
        "Headless on Linux: install EGL (Debian: libegl1 and libgl1-mesa-dri) and set MUJOCO_GL=egl, "
        "or OSMesa (libosmesa6) and MUJOCO_GL=osmesa"
    )
