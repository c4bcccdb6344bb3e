"""Contact sheets: episodes side by side, as a video and as a still."""

import copy
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from domains.robotics import video
from domains.robotics.episodes import unfinished
from twinsim.base import BadInput

BACKENDS = ("egl", "osmesa")
HINT = "expected a GL library (libegl1 and libgl1-mesa-dri, or libosmesa6)"
GAP = 2  # pixels between episodes
PAPER = np.array([0.93, 0.93, 0.95])
BORDER = np.array([70, 70, 70], np.uint8)
WINDOW = 1.0  # width of a drawing in extents of the model, so that all episodes are drawn to one scale

Shoot = Callable[[mujoco.MjvScene, np.ndarray], None]  # a scene, and the picture to draw it into


def pictures(
    model: mujoco.MjModel,
    positions: np.ndarray,
    *,
    size: int = 96,
    camera: str | None = None,
    light: float = 1.0,
    tell: Callable[[str], None] = lambda sentence: None,
) -> np.ndarray:
    """`[frame, size, size, 3]` uint8 of positions `[frame, nq]`: rendered where there is a GL library, else drawn from above.

    Why it was drawn is told. What positions do not move, such as a goal's site, stands where the model has it: see `tasks.Scene.marked`.
    """
    try:
        return render(model, positions, size=size, camera=camera, light=light)
    except BadInput as error:
        tell(f"{error}; drawn from above instead")
        return draw(model, positions, size=size, light=light)


def render(model: mujoco.MjModel, positions: np.ndarray, *, size: int = 96, camera: str | None = None, light: float = 1.0) -> np.ndarray:
    """Frames `[frame, size, size, 3]` uint8 by MuJoCo, without shadows and reflections. Raises BadInput without a GL library.

    Args:
      positions: `[frame, nq]`.
      camera: its name; None is the first of the model, or a free one where there is none.
      light: relative to the model's own.
    """
    backend = _backend()
    if not backend:
        raise BadInput(f"rendering: {HINT}, found none that works")
    cameras = [model.camera(index).name for index in range(model.ncam)]
    if camera is not None and camera not in cameras:
        raise BadInput(f"rendering: camera {camera}: expected one of {', '.join(cameras) or 'none, the model has no camera'}")
    _check_positions(model, positions)
    model = model if light == 1.0 else lit(model, light)
    try:
        with _canvas(backend, model, size) as shoot:
            return _shot(model, positions, cameras.index(camera) if camera is not None else 0 if cameras else -1, size, shoot)
    except (ImportError, RuntimeError, mujoco.FatalError) as error:
        raise BadInput(f"rendering: {HINT}, got one that fails: {error}") from error


def draw(model: mujoco.MjModel, positions: np.ndarray, *, size: int = 96, light: float = 1.0) -> np.ndarray:
    """Frames `[frame, size, size, 3]` uint8 seen from above: geoms and sites as discs, capsules as bars; planes are left out."""
    _check_positions(model, positions)
    data = mujoco.MjData(model)
    axis = model.stat.extent * WINDOW * ((np.arange(size) + 0.5) / size - 0.5)
    where = model.stat.center[:2] + np.stack(np.meshgrid(axis, -axis), -1)
    data = mujoco.MjData(model)
    frames = [_drawn(where, _shapes(model, data, position), axis[1] - axis[0]) for position in positions]
    drawn = np.stack(frames) if frames else np.zeros((0, size, size, 3), np.uint8)
    return drawn if light == 1.0 else np.clip(light * drawn, 0, 255).astype(np.uint8)


def lit(model: mujoco.MjModel, light: float) -> mujoco.MjModel:
    """A copy whose lights, the one on the camera with them, are as strong as `light` times its own."""
    model = copy.copy(model)
    for name in ("light_ambient", "light_diffuse", "light_specular"):
        getattr(model, name)[:] *= light
    for name in ("ambient", "diffuse", "specular"):
        setattr(model.vis.headlight, name, light * getattr(model.vis.headlight, name))
    return model


def write(video_path: Path, still_path: Path, episodes: Sequence[np.ndarray], *, fps: float, columns: int | None = None) -> None:
    """An MP4 of all episodes side by side, each standing still when it has ended, and a PNG of their last frames. Raises BadInput.

    Args:
      episodes: frames of each, `[frame, height, width, 3]` uint8, all of one size.
      columns: how many stand in a row; None makes the sheet about square.
    """
    if not episodes or any(len(frames) == 0 for frames in episodes):
        raise BadInput(f"{video_path}: expected episodes of one frame or more, got {[len(frames) for frames in episodes]}")
    shapes = {frames.shape[1:] for frames in episodes}
    if len(shapes) > 1 or any(frames.dtype != np.uint8 for frames in episodes) or len(episodes[0].shape) != 4:
        raise BadInput(f"{video_path}: expected uint8 pictures [frame, height, width, 3] of one size, got {sorted(shapes)}")
    columns = columns or int(np.ceil(np.sqrt(len(episodes))))
    longest = max(map(len, episodes))
    with unfinished(video_path) as partial:
        height, width = _sheet(episodes, 0, columns).shape[:2]
        with video.encoder(partial, fps, height, width) as encoding:
            for frame in range(longest):
                encoding.add(_sheet(episodes, frame, columns)[None])
    from matplotlib import image

    with unfinished(still_path) as partial:
        image.imsave(partial, _sheet(episodes, longest, columns), format="png")


def _sheet(episodes: Sequence[np.ndarray], frame: int, columns: int) -> np.ndarray:
    """One picture of all episodes at `frame`, or at their last; even in height and width."""
    height, width = (size + GAP for size in episodes[0].shape[1:3])
    rows = -(-len(episodes) // columns)
    whole = np.empty((rows * height + GAP + (rows * height + GAP) % 2, columns * width + GAP + (columns * width + GAP) % 2, 3), np.uint8)
    whole[:] = BORDER
    for index, frames in enumerate(episodes):
        top, left = GAP + index // columns * height, GAP + index % columns * width
        whole[top : top + height - GAP, left : left + width - GAP] = frames[min(frame, len(frames) - 1)]
    return whole


def _check_positions(model: mujoco.MjModel, positions: np.ndarray) -> None:
    if positions.ndim != 2 or positions.shape[1] != model.nq or not np.isfinite(positions).all():
        raise BadInput(f"pictures: expected finite positions [frame, {model.nq}], got {list(positions.shape)}")


# ---------------------------------------------------------------- rendering


@cache
def _backend() -> str:
    """The GL backend that works here: that of MUJOCO_GL where it is set, else the first that does; "" where none does.

    Tried in a process of its own, as a broken GL library may take its process with it.
    """
    if sys.platform == "darwin":
        return "cgl"
    given = os.environ.get("MUJOCO_GL", "").lower()
    for backend in (given,) if given else BACKENDS:
        if backend in ("disable", "disabled", "off", "false", "0"):
            return ""
        script = f"from mujoco.{backend} import GLContext; context = GLContext(8, 8); context.make_current(); print('works')"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"MUJOCO_GL": backend})
        if "works" in done.stdout:
            return backend
    return ""


@contextmanager
def _canvas(backend: str, model: mujoco.MjModel, size: int) -> Iterator[Shoot]:
    """Something that draws into pictures of `size`. MuJoCo's `Renderer` would take the GL that MUJOCO_GL named at its import."""
    context = importlib.import_module(f"mujoco.{backend}").GLContext(size, size)
    context.make_current()
    wide, high = model.vis.global_.offwidth, model.vis.global_.offheight
    model.vis.global_.offwidth, model.vis.global_.offheight = max(wide, size), max(high, size)
    drawing = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
    model.vis.global_.offwidth, model.vis.global_.offheight = wide, high
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, drawing)
    rectangle = mujoco.MjrRect(0, 0, size, size)

    def shoot(scene: mujoco.MjvScene, into: np.ndarray) -> None:
        mujoco.mjr_render(rectangle, scene, drawing)
        mujoco.mjr_readPixels(into, None, rectangle, drawing)

    try:
        yield shoot
    finally:
        drawing.free()
        context.free()


def _shot(model: mujoco.MjModel, positions: np.ndarray, camera: int, size: int, shoot: Shoot) -> np.ndarray:
    """One picture a frame, by the camera of that number, or, for -1, one that sees the whole scene."""
    frames = np.empty((len(positions), size, size, 3), np.uint8)
    data, option, view = mujoco.MjData(model), mujoco.MjvOption(), mujoco.MjvCamera()
    scene = mujoco.MjvScene(model, maxgeom=10_000)
    if camera < 0:
        mujoco.mjv_defaultFreeCamera(model, view)
    else:
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        scene.flags[flag] = 0  # up to ten times slower in software
    for frame, position in enumerate(positions):
        data.qpos[:] = position
        mujoco.mj_forward(model, data)
        mujoco.mjv_updateScene(model, data, option, None, view, mujoco.mjtCatBit.mjCAT_ALL.value, scene)
        shoot(scene, frames[frame])
    return frames[:, ::-1].copy()  # GL counts rows from below


# ---------------------------------------------------------------- drawing


class Shapes(NamedTuple):
    """Bars with round ends, the highest last: `begin`, `end` `[shape, 2]`, `radius` `[shape]`, m; `colour` `[shape, 4]`."""

    begin: np.ndarray
    end: np.ndarray
    radius: np.ndarray
    colour: np.ndarray


def _shapes(model: mujoco.MjModel, data: mujoco.MjData, position: np.ndarray) -> Shapes:
    data.qpos[:] = position
    mujoco.mj_kinematics(model, data)
    long = (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_CYLINDER)
    endless = (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD)
    kinds = np.concatenate([model.geom_type, model.site_type])
    sizes = np.concatenate([model.geom_size, model.site_size])
    centre = np.concatenate([data.geom_xpos, data.site_xpos])
    along = np.concatenate([data.geom_xmat, data.site_xmat]).reshape(-1, 3, 3)[:, :, 2]
    half = np.where(np.isin(kinds, long), sizes[:, 1], 0.0)[:, None] * along
    colour = np.concatenate([model.geom_rgba, model.site_rgba])
    order = np.argsort(centre[:, 2], kind="stable")
    order = order[~np.isin(kinds[order], endless) & (sizes[order, 0] > 0)]
    return Shapes((centre - half)[order, :2], (centre + half)[order, :2], sizes[order, 0], colour[order])


def _drawn(where: np.ndarray, shapes: Shapes, pixel: float) -> np.ndarray:
    """The picture whose pixels stand at `where` `[size, size, 2]`, m; edges are smoothed over one pixel."""
    picture = np.broadcast_to(PAPER, (*where.shape[:2], 3)).copy()
    for begin, end, radius, colour in zip(*shapes, strict=True):
        along = end - begin
        share = np.clip(((where - begin) @ along) / max(along @ along, 1e-12), 0, 1)
        apart = np.linalg.norm(where - begin - share[..., None] * along, axis=-1)
        cover = colour[3] * np.clip((radius - apart) / pixel + 0.5, 0, 1)[..., None]
        picture += cover * (colour[:3] - picture)
    return np.round(255 * picture).astype(np.uint8)
