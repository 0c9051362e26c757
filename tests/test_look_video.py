import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from conftest import save_policy
from gymnasium import spaces

from vecpg import EnvironmentFailure, Policy
from vecpg.cli import evaluate_main
from vecpg.look import video
from vecpg.noise import Purpose, Stream

# Every level of grey is 16 apart: compression does not confuse them.
STEP_OF_GREY = 16


class Painted(gymnasium.Env):
    """Paints the number of steps in grey; 1 to 14 of them by the reset seed. Keeps a record.

    By its masks action 3 is allowed at every third step, and at the others action 4.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}  # noqa: RUF012
    record = []  # noqa: RUF012

    def __init__(self, render_mode=None, fault=None, size=(48, 64)):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2, start=3)
        self.render_mode, self.fault, self.size = render_mode, fault, size

    def _info(self):
        mask = np.array([self.steps % 3 == 0, self.steps % 3 != 0])
        if self.fault == "masks nothing" and self.steps == 2:
            mask[:] = False
        if self.fault == "masks missing" and self.steps == 2:
            return {}
        return {"action_mask": mask}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.length = 1 + seed % 14
        self.steps = 0
        Painted.record.append(("reset", seed))
        if self.fault == "reset":
            raise OSError("the simulator did not start")
        return np.zeros(1, np.float32), self._info()

    def step(self, action):
        Painted.record.append(("step", action))
        if self.fault == "step":
            raise ZeroDivisionError("the paint ran out")
        if self.fault == "leave":
            sys.exit(0)
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, self.steps == self.length, False, self._info()

    def render(self):
        if self.fault == "frame":
            return None
        return np.full((*self.size, 3), STEP_OF_GREY * self.steps, np.uint8)

    def close(self):
        Painted.record.append(("close", None))


gymnasium.register("Painted-v0", Painted, max_episode_steps=100)


class Dark(Painted):
    metadata = {"render_modes": []}  # noqa: RUF012


gymnasium.register("Dark-v0", Dark, max_episode_steps=100)
gymnasium.register("VectorOnly-v0", vector_entry_point=Painted, max_episode_steps=100)


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(Painted, "record", [])


def policy(inputs=1, actions=2, start=3):
    torch.manual_seed(0)
    return Policy(spaces.Box(-1, 1, (inputs,)), spaces.Discrete(actions, start=start))


def frames(path):
    """What a player sees, and the frames a second."""
    from moviepy.config import FFMPEG_BINARY  # its own reader drops the last frame at times

    decode = [FFMPEG_BINARY, "-i", path, "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    result = subprocess.run([*decode, "-f", "rawvideo", "-"], capture_output=True, check=True)
    stream = re.search(r"Video: h264.* yuv420p.*?, (\d+)x(\d+).*? ([\d.]+) fps", str(result.stderr))
    width, height, fps = stream.groups()
    pixels = np.frombuffer(result.stdout, np.uint8)
    return list(pixels.reshape(-1, int(height), int(width), 3)), float(fps)


def grey(frame):
    return round(float(frame.mean()) / STEP_OF_GREY)


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_the_film_has_every_frame_of_one_whole_episode(tmp_path, draw):
    path = tmp_path / "film.mp4"
    video.record(policy(), "Painted-v0", path, seed=5, draw=draw)
    seed = Stream(5, draw, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0]
    length = 1 + seed % 14
    seen, fps = frames(path)
    assert [grey(frame) for frame in seen] == list(range(length + 1))
    assert fps == 7
    assert [what for what, _ in Painted.record] == ["reset", *["step"] * length, "close"]
    assert Painted.record[0] == ("reset", seed)
    assert list(tmp_path.iterdir()) == [path]


def test_frames_of_odd_size_are_padded_not_stretched(tmp_path):
    video.record(policy(), "Painted-v0", tmp_path / "x.mp4", env_kwargs={"size": (31, 45)})
    seen, _ = frames(tmp_path / "x.mp4")
    assert seen[-1].shape == (32, 46, 3)
    assert grey(seen[-1][:31, :45]) == len(seen) - 1
    assert grey(seen[-1][31:]) == grey(seen[-1][:, 45:]) == 0


def video_seed(seed):
    return Stream(seed, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0]


def test_the_limit_is_kept(tmp_path):
    seed = next(
        s for s in range(99) if Stream(s, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0] % 14 > 4
    )
    video.record(policy(), "Painted-v0", tmp_path / "x.mp4", max_episode_steps=2, seed=seed)
    assert [grey(frame) for frame in frames(tmp_path / "x.mp4")[0]] == [0, 1, 2]


class Acting:
    """Nothing but `act`."""

    obs_shape = (1,)

    def __init__(self, act):
        self.act = act


def test_only_act_is_used_on_the_raw_observation_and_its_action_goes_to_the_environment(tmp_path):
    asked = []

    def act(obs, greedy):
        asked.append((obs.dtype, obs.shape, greedy))
        return np.int64(3 + len(asked) % 2)

    video.record(Acting(act), "Painted-v0", tmp_path / "x.mp4", greedy=False)
    steps = [action for what, action in Painted.record if what == "step"]
    assert asked == [(np.float32, (1,), False)] * len(steps)
    assert steps == [3 + i % 2 for i in range(1, len(steps) + 1)]


def test_draws_are_fixed_by_the_seed_and_leave_torchs_generator_alone(tmp_path):
    same = policy()

    def actions(torch_seed, **given):
        Painted.record.clear()
        torch.manual_seed(torch_seed)
        before = torch.random.get_rng_state()
        video.record(same, "Painted-v0", tmp_path / "x.mp4", greedy=False, **given)
        assert torch.equal(torch.random.get_rng_state(), before)
        return [action for what, action in Painted.record if what == "step"]

    seeds = [
        s for s in range(99) if Stream(s, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0] % 14 == 13
    ]
    one = actions(0, seed=seeds[0])
    assert len(one) == 14
    assert set(one) == {3, 4}
    assert actions(9, seed=seeds[0]) == one
    assert actions(0, seed=seeds[1]) != one


def test_greedy_plays_the_most_probable_action(tmp_path):
    sure = policy()
    with torch.no_grad():
        sure.network[-1].bias.copy_(torch.tensor([0.0, 1.0]))
    video.record(sure, "Painted-v0", tmp_path / "x.mp4")
    assert {action for what, action in Painted.record if what == "step"} == {4}


LONG = next(s for s in range(99) if video_seed(s) % 14 == 13)


@pytest.mark.parametrize("greedy", [True, False])
def test_only_what_is_allowed_is_filmed(tmp_path, greedy):
    wanted = policy()
    with torch.no_grad():
        wanted.network[-1].bias.copy_(torch.tensor([9.0, 0.0]))
    for action_masks, expected in ((True, [3, 4, 4] * 4 + [3, 4]), (False, [3] * 14)):
        Painted.record.clear()
        video.record(
            wanted,
            "Painted-v0",
            tmp_path / "x.mp4",
            greedy=greedy,
            seed=LONG,
            action_masks=action_masks,
        )
        assert [action for what, action in Painted.record if what == "step"] == expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("masks nothing", "the environment allows no action at step 1 "),
        ("masks missing", "the environment failed at step 1 .*: expected info.* of 2 booleans"),
    ],
)
def test_a_mask_that_is_none_is_named_with_its_step_and_seed(tmp_path, fault, message):
    seed = video_seed(LONG)
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        video.record(
            policy(),
            "Painted-v0",
            tmp_path / "x.mp4",
            env_kwargs={"fault": fault},
            seed=LONG,
            action_masks=True,
        )
    assert f"(reset with seed {seed})" in str(caught.value)


def test_cartpole_is_filmed_as_it_is_rendered(tmp_path):
    video.record(policy(4, 2, 0), "CartPole-v1", tmp_path / "x.mp4", max_episode_steps=3)
    seen, fps = frames(tmp_path / "x.mp4")
    assert fps == 50
    env = gymnasium.make("CartPole-v1", render_mode="rgb_array")
    env.reset(seed=Stream(1, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0])
    assert np.abs(seen[0].astype(int) - env.render()).mean() < 2
    env.close()
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("film.avi", r"film.avi: expected the name of an mp4 file, such as .*film.mp4"),
        ("missing/film.mp4", "film.mp4 cannot be written: No such file or directory"),
        ("directory.mp4", "directory.mp4 cannot be written: it is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_made(tmp_path, name, message):
    (tmp_path / "directory.mp4").mkdir()
    with pytest.raises(ValueError, match=message):
        video.record(policy(), "Painted-v0", tmp_path / name)
    assert Painted.record == []


def test_environments_that_cannot_be_rendered_are_refused(tmp_path):
    def refused(env_id, how=video.record, **kwargs):
        where = (tmp_path / "x.mp4",) if how is video.record else ()
        with pytest.raises(ValueError, match="cannot be rendered") as caught:
            how(policy(), env_id, *where, **kwargs)
        assert ("step", 3) not in Painted.record
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    assert "render mode rgb_array, got an environment with none" in refused("Dark-v0")
    assert "render mode human, got an environment with none" in refused("Dark-v0", video.show)
    assert "a vectorized form only" in refused("VectorOnly-v0")
    assert "OSError: the simulator did not" in refused("Painted-v0", env_kwargs={"fault": "reset"})
    assert Painted.record[-1] == ("close", None)
    assert "uint8 array, got <class" in refused("Painted-v0", env_kwargs={"fault": "frame"})
    assert "unexpected keyword" in refused("Painted-v0", env_kwargs={"colour": 3})


def test_missing_packages_name_the_remedy(tmp_path, monkeypatch):
    remedy = r"not installed: pip install 'vecpg\[video\]'"
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(ValueError, match=f"CartPole-v1 cannot be rendered: pygame is {remedy}"):
        video.record(policy(4), "CartPole-v1", tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=f"CartPole-v1 cannot be rendered: pygame is {remedy}"):
        video.show(policy(4), "CartPole-v1")
    monkeypatch.setitem(sys.modules, "moviepy.video.io.ffmpeg_writer", None)
    with pytest.raises(ValueError, match=f"a video needs moviepy, which is {remedy}"):
        video.record(policy(4), "CartPole-v1", tmp_path / "x.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "kind"), [("step", "ZeroDivisionError"), ("leave", "SystemExit")]
)
def test_an_environment_that_fails_later_leaves_the_old_film(tmp_path, fault, kind):
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    seed = Stream(1, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0]
    message = rf"the environment failed at step 0 \(reset with seed {seed}\): {kind}: "
    with pytest.raises(EnvironmentFailure, match=message) as caught:
        video.record(policy(), "Painted-v0", path, env_kwargs={"fault": fault})
    assert kind in caught.value.trace
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert Painted.record[-1] == ("close", None)


@pytest.mark.parametrize("when", ["from the start", "at the end"])
def test_an_encoder_that_fails_is_an_error_and_leaves_the_old_film(tmp_path, monkeypatch, when):
    from moviepy.video.io import ffmpeg_writer

    program = tmp_path / "ffmpeg"
    script = "echo no space >&2" if when == "from the start" else "cat >/dev/null"
    # It leaves half a film where it was told to write, its last argument.
    program.write_text(f'#!/bin/sh\nfor film; do :; done\n: >"$film"\n{script}\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(ffmpeg_writer, "FFMPEG_BINARY", str(program))
    path = tmp_path / "x.mp4"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="x.mp4 could not be written: ") as caught:
        # Frames larger than a pipe holds.
        video.record(policy(), "Painted-v0", path, env_kwargs={"size": (400, 600)})
    assert not isinstance(caught.value, BrokenPipeError)
    assert path.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [program, path]


def test_show_draws_the_episode_on_the_screen(monkeypatch):
    import pygame

    colours = []
    monkeypatch.setattr(
        pygame.display,
        "flip",
        lambda: colours.append(pygame.display.get_surface().get_at((5, 5))[0] // STEP_OF_GREY),
    )
    monkeypatch.setitem(Painted.metadata, "render_fps", 1000)
    video.show(policy(), "Painted-v0", seed=5)
    length = 1 + Stream(5, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0] % 14
    assert colours == list(range(length + 1))
    assert not pygame.display.get_init()


def test_without_a_display_nothing_is_shown_in_silence(monkeypatch):
    import pygame

    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")
    with pytest.raises(ValueError, match="there is no display; without a display, --video records"):
        video.show(policy(), "Painted-v0")
    assert not any(what == "step" for what, _ in Painted.record)


def test_frames_need_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("SDL_VIDEODRIVER")
    drivers = []

    def act(obs, greedy):
        drivers.append(os.environ.get("SDL_VIDEODRIVER"))
        return 3

    video.record(Acting(act), "Painted-v0", tmp_path / "x.mp4")
    assert set(drivers) == {"dummy"}
    assert "SDL_VIDEODRIVER" not in os.environ


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a policy for the painted environment."""
    save_policy(tmp_path / "checkpoints" / "7", policy(), env_id="Painted-v0")
    return tmp_path


def test_the_script_records_and_says_where(saved, capfd):
    path = saved / "out.mp4"
    args = [str(saved), "--episodes", "3", "--video", str(path), "--render", "human"]
    evaluate_main(args)
    out = capfd.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["video"], result["episodes"]) == (str(path), 3)
    length = 1 + Stream(1, 0, 0, 1).reset_seeds(Purpose.VIDEO_RESET)[0] % 14
    assert len(frames(path)[0]) == length + 1
    # What was shown, what was recorded, and the three episodes that count.
    resets = [seed for what, seed in Painted.record if what == "reset"]
    evaluation = Stream(1, 0, 0, 3).reset_seeds(Purpose.EVALUATION_RESET)
    assert sorted(resets[2:5]) == sorted(evaluation)
    assert resets[0] == resets[1]
    assert resets[0] not in evaluation


@pytest.mark.slow
def test_the_script_takes_masks_from_the_stored_settings(tmp_path, capfd):
    wanted = policy()
    with torch.no_grad():
        wanted.network[-1].bias.copy_(torch.tensor([9.0, 0.0]))
    for action_masks in (True, False):
        folder = tmp_path / str(action_masks)
        folder.mkdir()
        save_policy(
            folder / "checkpoints" / "7", wanted, env_id="Painted-v0", action_masks=action_masks
        )
        for more in ([], ["--stochastic"]):
            Painted.record.clear()
            shown = ["--video", str(folder / "x.mp4")]
            # On a screen it takes as long as people need.
            shown += ["--render", "human"] if action_masks and not more else []
            evaluate_main([str(folder), "--episodes", "9", "--seed", str(LONG), *shown, *more])
            taken = {action for what, action in Painted.record if what == "step"}
            assert taken == ({3, 4} if action_masks else {3})
    assert capfd.readouterr().out.count("return_mean") == 4


@pytest.mark.parametrize("args", [["--video", "no/x.mp4"], ["--video", "x.mp4"]])
def test_the_script_refuses_before_any_episode(saved, capfd, monkeypatch, args):
    if args[1] == "x.mp4":
        monkeypatch.setitem(sys.modules, "moviepy.video.io.ffmpeg_writer", None)
    monkeypatch.chdir(saved)
    with pytest.raises(SystemExit) as caught:
        evaluate_main([str(saved), *args, "--render", "human"])
    assert caught.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert Painted.record == []
    assert not Path("x.mp4").exists()


def test_a_policy_that_sees_something_else_than_a_single_copy_is_not_filmed(tmp_path):
    seeing = Policy(spaces.Box(-1, 1, (4, 2)), spaces.Discrete(2))
    message = (
        r"Painted-v0 cannot be rendered for this policy: a single copy, .* shape \(1,\), and it"
    )
    for film in (
        lambda: video.record(seeing, "Painted-v0", tmp_path / "x.mp4"),
        lambda: video.show(seeing, "Painted-v0"),
    ):
        with pytest.raises(ValueError, match=message):
            film()
    assert list(tmp_path.iterdir()) == []
