"""Small environments with known answers; `environments:Name-v0` makes one by id."""

import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
from gymnasium import spaces

from vecpg.envs.answers import mask_sizes


class Counting(gymnasium.Env):
    """Observation (episode, step), reward = the action taken.

    The episode's length (1 to 6) and the way it ends (terminated, truncated or both) are drawn at
    reset, so each reset seed gives its own pattern.
    """

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(5)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.episode = -1
        self.episode += 1
        self.steps = 0
        self.length = int(self.np_random.integers(1, 7))
        self.end = int(self.np_random.integers(0, 3))
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == self.length
        return self._obs(), float(action), over and self.end != 1, over and self.end != 0, {}

    def _obs(self):
        return np.array([self.episode, self.steps], np.float32)


class CoinLength(gymnasium.Env):
    """Episodes of 2 or of 200 steps, by a fair coin: mean length 101. Reward 1."""

    def __init__(self):
        self.observation_space = spaces.Box(0, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 2 if self.np_random.random() < 0.5 else 200
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


class Faulty(gymnasium.Env):
    """Raises, or returns NaN, at one step of one copy: `index` counts the copies made."""

    made = 0

    def __init__(self, fault="raise", at=3, index=2):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.fault, self.at = fault, at
        self.guilty = Faulty.made % 4 == index
        Faulty.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if self.guilty and self.fault == "raise at reset":
            raise OSError("the simulator did not start")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        at_fault = self.guilty and self.steps == self.at
        self.steps += 1
        obs, reward = np.zeros(1, np.float32), 1.0
        if at_fault and self.fault == "raise":
            raise ZeroDivisionError("the pole fell off")
        if at_fault and self.fault == "nan observation":
            obs[:] = np.nan
        if at_fault and self.fault == "nan reward":
            reward = float("nan")
        return obs, reward, self.steps == 6, False, {}


class Constant(gymnasium.Env):
    """Every episode returns -5: nothing can be learnt."""

    def __init__(self):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), -1.0, self.steps == 5, False, {}


class Catch(gymnasium.Env):
    """A ball falls through a picture of 10 x 10 x 3, and a paddle of 3 below has to be under it.

    Actions: left, stay, right. It takes 9 steps; the reward at the end is 1 or -1. `channels` says
    where those are, "last" or "first", and `of` in what the picture is: "uint8" or "float32".
    """

    def __init__(self, channels="last", of="uint8"):
        self.first, self.dtype = channels == "first", np.dtype(of)
        self.bright = 255 if of == "uint8" else 1
        shape = (3, 10, 10) if self.first else (10, 10, 3)
        self.observation_space = spaces.Box(0, self.bright, shape, self.dtype.type)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = 0, int(self.np_random.integers(10))
        self.paddle = int(self.np_random.integers(1, 9))
        return self._picture(), {}

    def step(self, action):
        self.paddle = min(8, max(1, self.paddle + int(action) - 1))
        self.row += 1
        over = self.row == 9
        caught = abs(self.column - self.paddle) <= 1
        return self._picture(), (1.0 if caught else -1.0) if over else 0.0, over, False, {}

    def _picture(self):
        picture = np.zeros((10, 10, 3), self.dtype)
        picture[9, self.paddle - 1 : self.paddle + 2, 1] = self.bright
        picture[self.row, self.column, 0] = self.bright
        picture[9, :, 2] = self.bright  # the ground
        return picture.transpose(2, 0, 1).copy() if self.first else picture


class Bandit(gymnasium.Env):
    """One step; the reward is the action, counted from `start`: 3 and 4 by default."""

    def __init__(self, start=3, space=None):
        self.observation_space = spaces.Box(-1, 1, (2, 3), np.float64)
        self.action_space = spaces.Discrete(2, start=start)
        if space == "tuple action":
            self.action_space = spaces.Tuple([spaces.Discrete(2)])
        if space == "no numbers":
            self.observation_space = spaces.Box(-1, 1, (0,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((2, 3)), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return np.zeros((2, 3)), float(action), True, False, {}


class Misbehaving(gymnasium.Env):
    """Does what its action says: 0 step, 1 sleep, 2 and 3 raise, 4 and 5 leave the process."""

    def __init__(self, at_reset=None):
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(6)
        self.resets, self.at_reset = 0, at_reset

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.resets += 1
        if self.resets == self.at_reset:
            raise OSError("the simulator did not start")
        return np.zeros(1, np.float32), {}

    def step(self, action):
        if action == 1:
            time.sleep(3.0)
        if action == 2:
            raise ValueError("100% wrong")
        if action == 3:

            class Local(Exception):
                pass

            raise Local("cannot be pickled")
        if action == 4:
            os._exit(7)
        if action == 5:
            sys.exit(3)
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Stillborn(Constant):
    """Its constructor does what `how` says, in the copy that is made after `at` others.

    `counter` is a file that all processes count copies in.
    """

    def __init__(self, how="raise", counter=None, at=0):
        super().__init__()
        if counter is not None:
            with open(counter, "ab") as file:
                file.write(b".")
                file.flush()
                if file.tell() <= at:
                    return
        if how == "raise":
            raise ValueError("100% wrong")
        if how == "raise what cannot be pickled":

            class Local(Exception):
                pass

            raise Local("cannot be pickled", lambda: None)
        if how == "not installed":
            raise gymnasium.error.DependencyNotInstalled('run `pip install "gymnasium[x]"`')
        if how == "sys.exit":
            sys.exit("no licence")
        if how == "os._exit":
            os._exit(5)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "other spaces":
            self.action_space = spaces.Discrete(3)
        if how == "hang":
            time.sleep(1000)


class Simulated(Constant):
    """Runs a program of its own, until it is closed. Where action is 1, a step takes very long."""

    def __init__(self):
        super().__init__()
        self.program = subprocess.Popen(["sleep", "1000"])

    def step(self, action):
        if action == 1:
            time.sleep(1000)
        return super().step(action)

    def close(self):
        self.program.terminate()
        self.program.wait()


class Unclosable(Constant):
    """Raises when it is closed."""

    def close(self):
        raise RuntimeError("close broke")


class Mortal(Constant):
    """At its `at`-th step since it was made, does what `how` says."""

    def __init__(self, how="kill", at=12):
        super().__init__()
        self.how, self.at = how, at

    def step(self, action):
        self.at -= 1
        if self.at == 0 and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.at == 0 and self.how == "hang":
            time.sleep(1000)
        if self.at == 0:
            raise ValueError("100% wrong")
        return super().step(action)


ODD = {
    "reward": ("reward", "much"),
    "reward text": ("reward", "1.0"),
    "reward None": ("reward", None),
    "reward array": ("reward", np.ones(2)),
    "reward array of none": ("reward", np.ones(0)),
    "reward array of None": ("reward", np.array([None])),
    "reward complex": ("reward", 1j),
    "reward dict": ("reward", {"agent": 1.0}),
    "terminated None": ("terminated", None),
    "terminated array": ("terminated", np.ones(2, bool)),
    "truncated None": ("truncated", None),
    "truncated text": ("truncated", "no"),
}


class Odd(Constant):
    """Where action is 1, returns what Gymnasium cannot use, of the kind that `what` names."""

    def __init__(self, what="reward"):
        super().__init__()
        self.what = what

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        if action != 1:
            return obs, reward, terminated, truncated, info
        if self.what == "four":
            return obs, reward, terminated, info
        if self.what == "shape":
            return np.zeros(7, np.float32), reward, terminated, truncated, info
        if self.what == "dtype":
            return obs + 1j, reward, terminated, truncated, info
        part, value = ODD[self.what]
        if part == "reward":
            return obs, value, terminated, truncated, info
        if part == "terminated":
            return obs, reward, value, truncated, info
        return obs, reward, terminated, value, info


class Paid(Constant):
    """Pays -1 to 2 as `paid` makes it of a number; ends after 4 steps as `flagged` makes it."""

    def __init__(self, paid=None, flagged=None):
        super().__init__()
        self.action_space = spaces.Discrete(4, start=-1)
        self.paid, self.flagged = FORMS.get(paid, float), FORMS.get(flagged, bool)

    def step(self, action):
        obs, *_ = super().step(action)
        over = self.steps == 4
        flags = self.flagged(over), self.flagged(over and action > 0)
        return obs, self.paid(int(action)), *flags, {}


def _tensor(number):
    import torch

    return torch.tensor([number])


FORMS = {
    "int": int,
    "float32": np.float32,
    "int8": np.int8,
    "0-d": np.array,
    "(1,)": lambda number: np.array([number]),
    "(1,) float32": lambda number: np.array([number], np.float32),
    "(1, 1, 1)": lambda number: np.full((1, 1, 1), number),
    "list": lambda number: [number],
    "tensor": _tensor,
    "np.bool_": np.bool_,
}


class Dials(gymnasium.Env):
    """A MultiDiscrete action, or observation: pays for every component that matches its dial.

    Dials start at other numbers than 0, and are of a type that not every integer fits.
    """

    def __init__(self, observed=False):
        self.dials = spaces.MultiDiscrete([2, 3, 4], np.int32, start=[1, -1, 5])
        self.observed = observed
        self.observation_space = spaces.Box(-9, 9, (3,), np.float32)
        self.action_space = self.dials
        if observed:
            self.observation_space = spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[0, 1], [2, 3]])
            self.action_space = spaces.Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.integers(2, 9))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.steps += 1
        paid = float(action == self.shown) if self.observed else float(sum(action == self.shown))
        return self._obs(), paid, self.steps == self.length, False, {}

    def _obs(self):
        first = self.observation_space.start if self.observed else self.dials.start
        sizes = self.observation_space.nvec if self.observed else self.dials.nvec
        self.shown = first + self.np_random.integers(0, sizes)
        obs = self.shown.astype(self.observation_space.dtype)
        assert self.observation_space.contains(obs)
        if self.observed:
            self.shown = self.shown[0, 1] - 2
        return obs


class Switches(gymnasium.Env):
    """A MultiBinary action (2, 3), and observation: pays for every switch that is as it is shown.

    With `alone` the observation is a MultiBinary and the action a Discrete: the first of three.
    """

    def __init__(self, alone=False):
        self.alone = alone
        self.observation_space = spaces.MultiBinary(3 if alone else (2, 3))
        self.action_space = spaces.Discrete(2, start=-1) if alone else spaces.MultiBinary((2, 3))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.integers(2, 9))
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.steps += 1
        right = action + 1 == self.shown[0] if self.alone else (action == self.shown).mean()
        return self._obs(), float(right), self.steps == self.length, False, {}

    def _obs(self):
        self.shown = self.np_random.integers(0, 2, self.observation_space.shape, np.int8)
        return self.shown


class Masked(gymnasium.Env):
    """Allows at each step other actions, and raises when another one is taken.

    Shows what is allowed, and pays for each component 1 / (1 + number of the action), so that the
    first that is allowed is the best. What `info` has of it is what `gives` makes of each
    component's numbers; after an end there is nothing in it, or something that allows nothing.
    With a `fault` it is something else at step `at`, in the copy that is made after `after` others
    in its process, and so on after four more.
    """

    made = 0

    def __init__(self, of="Discrete", gives="int8", fault=None, at=2, after=3, after_end="nothing"):
        self.action_space = MASKED[of]
        self.sizes = mask_sizes(self.action_space)
        self.observation_space = spaces.Box(0, 1, (sum(self.sizes),), np.float32)
        self.gives, self.fault, self.at, self.after_end = gives, fault, at, after_end
        self.guilty = Masked.made % 4 == after
        Masked.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.length = int(self.np_random.integers(3, 9))
        return self._obs(), self._info()

    def step(self, action):
        numbers = np.ravel(action) - np.ravel(self.action_space.start)
        for number, allowed in zip(numbers, self.allowed, strict=True):
            assert allowed[number], f"{action} is not allowed: {self.allowed}"
        self.steps += 1
        over = self.steps == self.length
        obs, info = self._obs(), self._info()
        if over:
            nothing = {"action_mask": np.zeros_like(np.concatenate(self.allowed))}
            info = nothing if self.after_end == "all False" else {}
        return obs, float((1 / (1 + numbers)).mean()), over, False, info

    def _obs(self):
        self.allowed = []
        for size in self.sizes:
            allowed = self.np_random.random(size) < 0.4
            allowed[self.np_random.integers(size)] = True
            self.allowed.append(allowed)
        return np.concatenate(self.allowed).astype(np.float32)

    def _info(self):
        mask = np.concatenate(self.allowed)
        if self.steps == self.at and self.fault is not None and self.guilty:
            return FAULTY_MASKS[self.fault](mask)
        return {"action_mask": GIVEN_MASKS[self.gives](mask, self.allowed), "other": {"a": 1}}


MASKED = {
    "Discrete": spaces.Discrete(5, start=-1),
    "MultiDiscrete": spaces.MultiDiscrete([2, 3, 4], start=[1, -1, 5]),
}
GIVEN_MASKS = {
    "int8": lambda mask, _: mask.astype(np.int8),
    "bool": lambda mask, _: mask,
    "float64": lambda mask, _: mask.astype(np.float64),
    "list": lambda mask, _: [int(each) for each in mask],
    "components": lambda _, allowed: tuple(each.astype(np.int8) for each in allowed),
    "lists of components": lambda _, allowed: [list(each) for each in allowed],
}
FAULTY_MASKS = {
    "nothing allowed": lambda mask: {"action_mask": np.zeros_like(mask)},
    "missing": lambda _: {},
    "None": lambda _: {"action_mask": None},
    "too long": lambda mask: {"action_mask": np.append(mask, True)},
    "2-d": lambda mask: {"action_mask": mask[None]},
    "NaN": lambda mask: {"action_mask": np.where(mask, 1.0, np.nan)},
    "a half": lambda mask: {"action_mask": np.where(mask, 0.5, 0.0)},
    "two": lambda mask: {"action_mask": 2 * mask.astype(np.int8)},
    "negative": lambda mask: {"action_mask": -mask.astype(np.int8)},
    "text": lambda _: {"action_mask": "all"},
    "texts": lambda mask: {"action_mask": ["1"] * len(mask)},
    "complex": lambda mask: {"action_mask": mask * 1j},
}


class Forbidding(gymnasium.Wrapper):
    """Around CartPole: where the pole leans, the cart may only be pushed that way."""

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info | self._mask()

    def step(self, action):
        assert self._mask()["action_mask"][action]
        self.obs, *answer, info = self.env.step(action)
        return self.obs, *answer, info | self._mask()

    def _mask(self):
        lean = self.obs[2]
        return {"action_mask": np.array([lean < 0.03, lean > -0.03])}


class Scribbling(Dials):
    """Writes into the action it is given."""

    def step(self, action):
        result = super().step(action.copy())
        action[:] = self.dials.start
        return result


class Unsigned(Constant):
    """Observations of an unsigned type; 7, which is none of them, at one step of each copy."""

    def __init__(self, wrong=False):
        super().__init__()
        self.observation_space = spaces.Discrete(5, dtype=np.uint8)
        self.wrong = wrong

    def reset(self, *, seed=None, options=None):
        return np.uint8(super().reset(seed=seed)[0].item()), {}

    def step(self, action):
        _, reward, terminated, truncated, info = super().step(action)
        obs = 7 if self.wrong and self.steps == 3 else self.steps - 1
        return np.uint8(obs), reward, terminated, truncated, info


class Plain(Constant):
    """A uint8 space from which the numbers 253, 254 and `last` come in the form that `of` names."""

    def __init__(self, of="int", last=255):
        super().__init__()
        self.observation_space = spaces.Discrete(3, start=253, dtype=np.uint8)
        forms = {"int": int, "float": float, "array": np.array}
        self.of, self.last = forms.get(of) or np.dtype(of).type, last

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.of(253), {}

    def step(self, action):
        _, reward, *_ = super().step(action)
        obs = self.last if self.steps == 2 else 254
        return self.of(obs), reward, self.steps == 3, False, {}


OFFSET = {
    "uint8": spaces.MultiDiscrete([200, 3], np.uint8, start=[56, 0]),
    "uint16": spaces.MultiDiscrete([[2, 100]], np.uint16, start=[[65_534, 65_436]]),
    "uint64": spaces.MultiDiscrete([3, 3], np.uint64, start=[2**63 - 3] * 2),
    "int8": spaces.MultiDiscrete([100, 7], np.int8, start=[28, -128]),
    "int64": spaces.MultiDiscrete([3, 2], np.int64, start=[2**63 - 3, -(2**63)]),
    "Discrete uint8": spaces.Discrete(3, start=253, dtype=np.uint8),
    "Discrete int8": spaces.Discrete(3, start=-128, dtype=np.int8),
    "Discrete int64": spaces.Discrete(3, start=2**63 - 3),
}


class Offset(Constant):
    """Shows the first and the last values of a space in turn; takes actions of that space too.

    With `beyond` -1 or 1 it shows in the end what follows an end of the space, where the type has
    such a number.
    """

    def __init__(self, of, beyond=0):
        super().__init__()
        self.observation_space, self.beyond = OFFSET[of], beyond
        self.action_space = OFFSET[of] if OFFSET[of].shape != (1, 2) else spaces.Discrete(2)

    def _obs(self):
        space = self.observation_space
        sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
        sizes = np.asarray(sizes).astype(np.int64)
        starts = np.asarray(space.start).astype(np.int64)
        obs = starts + (sizes - 1) * (self.steps % 2)
        if self.steps == 4 and self.beyond:
            obs = starts - 1 if self.beyond < 0 else starts + sizes
        obs = obs.astype(space.dtype)[()]
        assert self.beyond or obs in space
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        assert action in self.action_space
        answer = super().step(action)
        return self._obs(), *answer[1:]


class Pay(gymnasium.Env):
    """A Box action (2, 3) within +-0.5; pays `scale` times their sum. 5 steps, or cut before."""

    def __init__(self, scale=1.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Box(-0.5, 0.5, (2, 3), np.float64)
        self.scale = scale

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.normal([1000.0, 0.0], [3.0, 1.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        obs = self.np_random.normal([1000.0, self.steps], [3.0, 1.0])
        return obs, self.scale * float(action.sum()), self.steps == 5, False, {}


class Halving(gymnasium.RewardWrapper):
    """Pays half."""

    def reward(self, reward):
        return reward / 2


class Wide(Constant):
    """Shows whole numbers of a wider type than its space has; at a step, one too large for it."""

    def __init__(self, at=0, dtype="int64", value=300):
        super().__init__()
        self.observation_space = spaces.Box(0, 255, (2,), np.uint8)
        self.at, self.shown = at, np.array([7, 255], dtype)
        self.large = np.array([3, value], dtype)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return (self.large if self.at == 0 else self.shown).copy(), {}

    def step(self, action):
        self.steps += 1
        obs = self.large if self.steps == self.at else self.shown
        return obs.copy(), 1.0, False, False, {}


class Restless(Constant):
    """Goes to another directory when it is stepped; leaves Python when it is closed."""

    def __init__(self, to=None, leaves=False):
        super().__init__()
        self.to, self.leaves = to, leaves

    def step(self, action):
        if self.to is not None:
            os.chdir(self.to)
        return super().step(action)

    def close(self):
        if self.leaves:
            sys.exit(0)


class Ragged(Constant):
    """From some step on every copy shows something else than an observation."""

    def __init__(self, what="none"):
        super().__init__()
        self.what = what

    def step(self, action):
        _, *rest = super().step(action)
        shown = {"none": None, "ragged": [[1.0], [1.0, 2.0]], "longer": np.zeros(2, np.float32)}
        return shown[self.what], *rest


class Nested(gymnasium.Env):
    """Shows a dictionary of a tuple and a box."""

    action_space = spaces.Discrete(2)

    def __init__(self, render_mode=None):
        where = spaces.Tuple((spaces.Discrete(3), spaces.MultiBinary(2)))
        # Of its own: what it shows is drawn by the space.
        self.observation_space = spaces.Dict({"where": where, "what": spaces.Box(-1, 1, (2, 2))})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), float(action), False, False, {}


class Unused(gymnasium.vector.VectorEnv):
    """A vectorized form that nobody asked for."""

    def __init__(self, num_envs):
        raise RuntimeError("the vectorized form was made")


class Alone(Constant):
    """There can be no two of it in a process; it writes down where each was made, and closed."""

    there = False

    def __init__(self, diary):
        super().__init__()
        self.diary = diary
        if Alone.there:
            raise RuntimeError("there is one in this process already")
        Alone.there = True
        self.write("made")

    def close(self):
        Alone.there = False
        self.write("closed")

    def write(self, what):
        with open(self.diary, "a") as file:
            file.write(f"{what} {os.getpid()}\n")


class Licensed(Constant):
    """Takes a licence away for each copy that is made, and none can be made when all are gone."""

    def __init__(self, licences):
        super().__init__()
        with open(licences, "r+") as file:
            left = int(file.read()) - 1
            if left < 0:
                raise PermissionError("no licence is left")
            file.seek(0)
            file.write(f"{left} ")


class Suicidal(Constant):
    """Kills its own process at its fourth step, as the system does for want of memory."""

    def step(self, action):
        if self.steps == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Leaving(Constant):
    """Asks Python to end, with a status that would mean success."""

    def step(self, action):
        sys.exit(0)


class Talkative(Constant):
    """Prints in Python and, as a C library would, to the file descriptor."""

    def step(self, action):
        print("hello from Python")
        os.write(1, b"hello from C\n")
        return super().step(action)


for _env, _limit in (
    (Counting, 100),
    (CoinLength, 200),
    (Faulty, 10),
    (Constant, 10),
    (Bandit, 10),
    (Catch, 10),
    (Misbehaving, 100),
    (Stillborn, 10),
    (Simulated, 10),
    (Mortal, 10),
    (Unclosable, 10),
    (Alone, 10),
    (Licensed, 10),
    (Suicidal, 10),
    (Talkative, 10),
    (Leaving, 10),
    (Odd, 10),
    (Paid, 10),
    (Dials, 10),
    (Switches, 10),
    (Masked, 20),
    (Scribbling, 20),
    (Unsigned, 10),
    (Offset, 10),
    (Plain, 10),
    (Pay, 10),
    (Nested, 10),
    (Wide, 10),
    (Restless, 10),
    (Ragged, 10),
):
    gymnasium.register(
        f"{_env.__name__}-v0", f"environments:{_env.__name__}", max_episode_steps=_limit
    )
gymnasium.register("Endless-v0", "environments:CoinLength")
