"""One episode to look at: as a video file, or on the screen.

It is played apart from training and evaluation, in one copy of the environment that renders.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.wrappers import HumanRendering
from numpy.typing import NDArray

from vecpg.envs import (
    EnvironmentFailure,
    check_time_limit,
    find_spec,
    load_wrappers,
    make_wrapped,
)
from vecpg.envs.answers import mask_sizes, read_action_mask
from vecpg.noise import Purpose, Stream

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec

    from vecpg.policy import Policy

_REMEDY = "pip install 'vecpg[video]'"

# What pygame's library, SDL, draws on.
_DRIVER = "SDL_VIDEODRIVER"

# For environments that do not say; it is also Gymnasium's own choice.
_FRAMES_PER_SECOND = 30


def record(
    policy: "Policy",
    env_id: str,
    path: str | Path,
    *,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    greedy: bool = True,
    seed: int = 1,
    draw: int = 0,
    action_masks: bool = False,
) -> None:
    """Play one whole episode and write it to `path`, an mp4 file, whole or not at all.

    The first frame shows the state after the reset, every further one that after a step. They pass
    at the environment's own rate (`metadata["render_fps"]`, 30 a second where it has none), and go
    to the file one by one: memory does not grow with the episode.

    Args:
        policy: is not changed.
        env_id: a registered id, or `module:Id`.
        path: ends in .mp4, in a directory that exists. A file that is there is replaced.
        env_kwargs: keyword arguments of the environment.
        max_episode_steps: time limit; None keeps the environment's own.
        wrappers: as for `vecpg.envs.make_envs`.
        greedy: True = the most probable action; False = draw actions.
        seed: with `draw` fixes the start state and the draws; it is none of the start states of
            training, confirmation or evaluation.
        draw: a further number for another episode.
        action_masks: take only what `info["action_mask"]` of the environment allows.

    Raises:
        ValueError: what can be known before the first step: an environment that cannot be made or
            has no such form of rendering, moviepy or pygame are missing, no file can be written.
        EnvironmentFailure: the environment raised, or returned something that is not a frame.
        OSError: the file could not be finished.

    Example:
        >>> from vecpg import Policy, make_envs
        >>> envs = make_envs("CartPole-v1", 1)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> record(policy, "CartPole-v1", "film.avi")
        Traceback (most recent call last):
            ...
        ValueError: film.avi: expected the name of an mp4 file, such as film.mp4
    """
    check_recording(env_id, path)
    seeds = Stream(seed, draw, 0, 2).reset_seeds(Purpose.VIDEO_RESET)
    started = _started(env_id, "rgb_array", env_kwargs, max_episode_steps, wrappers, seeds[0])
    with started as (env, obs, info):
        _check_seen(policy, env_id, obs)
        frame = _frame(env)
        fps = env.metadata.get("render_fps") or _FRAMES_PER_SECOND
        with _film(Path(path), frame.shape, fps) as add:
            add(frame)
            _play(env, obs, info, policy, greedy, seeds, add, action_masks)


def show(
    policy: "Policy",
    env_id: str,
    *,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
    greedy: bool = True,
    seed: int = 1,
    draw: int = 0,
    action_masks: bool = False,
) -> None:
    """Play on the screen the episode that `record` writes for the same arguments.

    Args:
        policy: as all that follow, see `record`.
        env_id: as there.
        env_kwargs: as there.
        max_episode_steps: as there.
        wrappers: as there.
        greedy: as there.
        seed: as there.
        draw: as there.
        action_masks: as there.

    Raises:
        ValueError: what can be known before the first step; there may be no display.
        EnvironmentFailure: the environment raised.

    Example:
        >>> import os
        >>> os.environ["SDL_VIDEODRIVER"] = "dummy"  # a display that shows nothing
        >>> from vecpg import Policy, make_envs
        >>> envs = make_envs("CartPole-v1", 1)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> show(policy, "CartPole-v1", max_episode_steps=9)
    """
    seeds = Stream(seed, draw, 0, 2).reset_seeds(Purpose.VIDEO_RESET)
    started = _started(env_id, "human", env_kwargs, max_episode_steps, wrappers, seeds[0])
    with started as (env, obs, info):
        _check_seen(policy, env_id, obs)
        _play(env, obs, info, policy, greedy, seeds, None, action_masks)


def _check_seen(policy: "Policy", env_id: str, obs: Any) -> None:
    """Refuse a policy of a vectorized form that shows something else than a single copy."""
    if np.shape(obs) != policy.obs_shape:
        raise ValueError(
            f"{env_id} cannot be rendered for this policy: a single copy, which is rendered, shows"
            f" observations of shape {np.shape(obs)}, and it was trained on {policy.obs_shape}"
        )


def check_recording(env_id: str, path: str | Path) -> None:
    """Refuse what `record` could not write, without making the environment.

    Raises:
        ValueError: an unknown id, no frames of it, no moviepy, or a file that cannot be written.

    Example:
        >>> check_recording("CartPole-v1", "no/such/directory/film.mp4")
        Traceback (most recent call last):
            ...
        ValueError: no/such/directory/film.mp4 cannot be written: No such file or directory
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(
            f"{path}: expected the name of an mp4 file, such as {path.with_suffix('.mp4')}"
        )
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a directory")
    _mode_to_make(find_spec(env_id), "rgb_array")
    _check_moviepy()
    probe = _beside(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def check_filming(
    env_id: str,
    *,
    env_kwargs: dict[str, Any] | None = None,
    max_episode_steps: int | None = None,
    wrappers: Sequence[str] = (),
) -> None:
    """Refuse what `record` could not film, by rendering one frame.

    Raises:
        ValueError: no frames of the environment, or no moviepy.
    """
    _check_moviepy()
    with _started(env_id, "rgb_array", env_kwargs, max_episode_steps, wrappers, 0):
        pass


def _check_moviepy() -> None:
    try:
        import moviepy.video.io.ffmpeg_writer  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a video needs moviepy, which is not installed: {_REMEDY}") from error


def _beside(path: Path) -> Path:
    """Where a file is written before it takes its place. (ffmpeg reads the format off the end.)"""
    return path.absolute().with_name(f".{path.stem}.{os.getpid()}.mp4")


def _mode_to_make(spec: "EnvSpec", mode: str) -> str:
    """The render mode to make the environment with, so that it can be seen in `mode`."""
    if spec.entry_point is None:
        raise ValueError(f"{spec.id} cannot be rendered: it has a vectorized form only")
    given = spec.entry_point
    metadata = getattr(load_env_creator(given) if isinstance(given, str) else given, "metadata", 0)
    if not isinstance(metadata, dict):  # made by a function: it has to be tried
        return mode
    modes = metadata.get("render_modes", [])
    for usable in (mode, "rgb_array"):  # frames can be shown in a window of Gymnasium's
        if usable in modes:
            return usable
    raise ValueError(
        f"{spec.id} cannot be rendered: expected the render mode {mode},"
        f" got an environment with {', '.join(modes) or 'none'}"
    )


@contextmanager
def _started(
    env_id: str,
    mode: str,
    env_kwargs: dict[str, Any] | None,
    max_episode_steps: int | None,
    wrappers: Sequence[str],
    seed: int,
) -> "Iterator[tuple[gymnasium.Env[Any, Any], Any, Any]]":
    """One copy that renders in `mode`, just reset, its observation and its info.

    Whatever fails up to its first frame is known before the first step.
    """
    spec = find_spec(env_id)
    check_time_limit(spec, max_episode_steps)
    made, around = _mode_to_make(spec, mode), load_wrappers(wrappers)
    with ExitStack() as stack:
        if mode == "rgb_array":
            stack.enter_context(_no_display())
        try:
            # Training and evaluation have had it checked.
            env = make_wrapped(
                spec,
                around,
                max_episode_steps=max_episode_steps,
                disable_env_checker=True,
                **{**(env_kwargs or {}), "render_mode": made},
            )
            stack.callback(env.close)
            if made != mode:
                env = HumanRendering(env)
                stack.callback(env.close)
            obs, info = env.reset(seed=seed)
            if mode == "rgb_array":
                _frame(env)
            else:
                _check_display()
        # Its constructor, its reset and its renderer may raise anything.
        except Exception as error:
            raise ValueError(f"{env_id} cannot be rendered: {_words(error, mode)}") from error
        yield env, obs, info


@contextmanager
def _no_display() -> Iterator[None]:
    """Frames need no display: SDL, told so, does not look for one and complain."""
    chosen = os.environ.get(_DRIVER)
    os.environ.setdefault(_DRIVER, "dummy")
    try:
        yield
    finally:
        if chosen is None:
            os.environ.pop(_DRIVER, None)


def _check_display() -> None:
    """Refuse the driver that SDL takes by itself where it finds no display: it shows nothing."""
    pygame = sys.modules.get("pygame")  # some environments have a renderer of their own
    if pygame is None or not pygame.display.get_init():
        return
    driver = pygame.display.get_driver()
    if driver == "offscreen" and os.environ.get(_DRIVER) != driver:
        raise RuntimeError("there is no display")


def _words(error: Exception, mode: str) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled):
        # Gymnasium names an extra of its own for pygame, and rightly so for everything else.
        return f"pygame is not installed: {_REMEDY}" if "pygame" in text else text
    display = "; without a display, --video records an episode" if mode == "human" else ""
    return f"{type(error).__name__}: {text}{display}"


def _frame(env: "gymnasium.Env[Any, Any]") -> NDArray[np.uint8]:
    frame: Any = env.render()
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape[2:] != (3,):
        got = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame)
        raise TypeError(f"expected render() to return a (height, width, 3) uint8 array, got {got}")
    return frame


def _play(
    env: "gymnasium.Env[Any, Any]",
    obs: Any,
    info: Any,
    policy: "Policy",
    greedy: bool,
    seeds: list[int],
    add: Callable[[NDArray[np.uint8]], None] | None,
    action_masks: bool,
) -> None:
    """Play to the end of the episode; hand the frame after each step to `add`.

    seeds: what the episode was reset with, and what fixes the draws.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds[1])
        step, over = 0, False
        while not over:
            given: dict[str, Any] = {}
            if action_masks:
                when = f"step {step - 1}" if step else "its reset"
                given["action_mask"] = _mask(info, env, f"{when} (reset with seed {seeds[0]})")
            action = policy.act(obs, greedy=greedy, **given)
            try:
                obs, _, terminated, truncated, info = env.step(action)
                frame = None if add is None else _frame(env)
            # It may raise anything, or leave the process with a status that means success.
            except (Exception, SystemExit) as error:
                raise EnvironmentFailure(
                    f"the environment failed at step {step} (reset with seed {seeds[0]}):"
                    f" {type(error).__name__}: {error}",
                    "".join(traceback.format_exception(error)),
                ) from None
            if add is not None and frame is not None:
                add(frame)
            step, over = step + 1, terminated or truncated


def _mask(info: Any, env: "gymnasium.Env[Any, Any]", when: str) -> NDArray[np.bool_]:
    """What an info allows: something of every component."""
    try:
        mask = read_action_mask(info, env.action_space)
    except TypeError as error:
        raise EnvironmentFailure(f"the environment failed at {when}: {error}") from None
    last = np.cumsum(mask_sizes(env.action_space))[:-1]
    if not all(component.any() for component in np.split(mask, last)):
        raise EnvironmentFailure(f"the environment allows no action at {when}")
    return mask


@contextmanager
def _film(
    path: Path, shape: tuple[int, ...], fps: float
) -> Iterator[Callable[[NDArray[np.uint8]], None]]:
    """Take frames one by one, and replace `path` by their video if all goes well."""
    from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

    height, width, _ = shape
    temporary = _beside(path)
    writer = FFMPEG_VideoWriter(
        str(temporary),
        (width, height),
        fps,
        threads=1,  # the same file on any machine
        # Players want this format of pixels, which wants even numbers of them.
        ffmpeg_params=["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2,format=yuv420p"],
    )
    process = writer.proc

    def add(frame: NDArray[np.uint8]) -> None:
        if frame.shape != shape:
            raise ValueError(f"expected frames of one size, {shape}, got {frame.shape}")
        writer.write_frame(frame)

    try:
        yield add
        writer.close()
        if process.returncode != 0:
            raise OSError(f"ffmpeg ended with status {process.returncode}")
        os.replace(temporary, path)
    except OSError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        process.kill()
        with suppress(OSError):
            writer.close()
        temporary.unlink(missing_ok=True)
