"""What is registered: environments on tensors, what they stand for, and what any id means."""

import importlib

import gymnasium
from gymnasium.envs.registration import EnvSpec

from vecpg.envs.errors import in_words

# The vector environment around every definition.
_ON_TENSORS = "vecpg.envs.tensor:TensorVectorEnv"
# By the id of Gymnasium's own environment the id of what stands for it on tensors.
_stand_ins: dict[str, str] = {}
# The keyword by which Atari games end their episodes themselves.
_LIMIT_OF_ATARI = "max_num_frames_per_episode"
# What Gymnasium itself registers under the ids for which something of vecpg's stands.
_CLASSES = {
    "CartPole-v1": ("CartPoleEnv", "CartPoleVectorEnv"),
    "Pendulum-v1": ("PendulumEnv",),
    "Acrobot-v1": ("AcrobotEnv",),
    "MountainCarContinuous-v0": ("Continuous_MountainCarEnv",),
}


def register(
    env_id: str,
    definition: str,
    *,
    max_episode_steps: int,
    reward_threshold: float | None = None,
    stands_for: str | None = None,
) -> None:
    """Make an environment on tensors known to Gymnasium and to vecpg.

    Then `gymnasium.make_vec(env_id, num_envs=N, device="cuda", dtype="float64")` makes it, and
    `--env-id` trains it, in machine code on the CPU.

    Args:
        env_id: its id, such as "mine/Ball-v0".
        definition: "module:Class", a definition as `docs/environments.md` shows it. It is imported
            when the environment is made.
        max_episode_steps: time limit, at least 1.
        reward_threshold: the mean return that counts as solved.
        stands_for: the id of an environment of Gymnasium's own that this one equals: it is trained
            in this one's place, and judges what was trained in this one. Only as long as what is
            registered under that id is Gymnasium's own. Without it, evaluation plays this one,
            stepped in float64.

    Raises:
        ValueError: a definition that is not "module:Class", or a limit below 1.

    Example:
        >>> register("example/Cart-v0", "vecpg.envs.cartpole:CartPole", max_episode_steps=50)
        >>> gymnasium.make_vec("example/Cart-v0", 2).max_episode_steps
        50
    """
    if not isinstance(definition, str) or not all(definition.partition(":")):
        raise ValueError(f'definition: expected "module:Class", got {definition!r}')
    if not isinstance(max_episode_steps, int) or max_episode_steps < 1:
        raise ValueError(
            f"max_episode_steps: expected a whole number of at least 1, got {max_episode_steps!r}"
        )
    gymnasium.register(
        env_id,
        vector_entry_point=_ON_TENSORS,
        max_episode_steps=max_episode_steps,
        reward_threshold=reward_threshold,
        kwargs={"definition": definition},
    )
    # What is registered anew stands for what it says now.
    for original in [key for key, stand_in in _stand_ins.items() if stand_in == env_id]:
        del _stand_ins[original]
    if stands_for is not None:
        _stand_ins[stands_for] = env_id


# As text: the environment is imported when it is made.
gymnasium.register(
    "vecpg/LineWorld-v0",
    "vecpg.envs.line_world:LineWorld",
    max_episode_steps=100,
    reward_threshold=7.0,
)
register(
    "vecpg/CartPole-v1",
    "vecpg.envs.cartpole:CartPole",
    max_episode_steps=500,
    reward_threshold=475.0,
    stands_for="CartPole-v1",
)
register(
    "vecpg/Pendulum-v1",
    "vecpg.envs.pendulum:Pendulum",
    max_episode_steps=200,
    stands_for="Pendulum-v1",
)
register(
    "vecpg/Acrobot-v1",
    "vecpg.envs.acrobot:Acrobot",
    max_episode_steps=500,
    reward_threshold=-100.0,
    stands_for="Acrobot-v1",
)
register(
    "vecpg/MountainCarContinuous-v0",
    "vecpg.envs.mountain_car_continuous:MountainCarContinuous",
    max_episode_steps=999,
    reward_threshold=90.0,
    stands_for="MountainCarContinuous-v0",
)


def find_spec(env_id: str) -> EnvSpec:
    """The registered specification of an id, with Gymnasium's own suggestion when there is none."""
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    # The module is the user's own, and may raise anything while it is imported.
    except (Exception, SystemExit) as error:
        versions = [
            known
            for known in gymnasium.registry
            if known.startswith(f"{name}-v") or known.endswith(f"/{name}")
        ]
        hint = f"; did you mean {' or '.join(versions)}?" if versions else ""
        if isinstance(error, gymnasium.error.NamespaceNotFound) and not module:
            package = "ale_py" if name.startswith("ALE/") else "module"
            hint = f"; name the module that registers it: --env-id {package}:{name}"
        raise ValueError(f"--env-id {env_id}: {in_words(error)}{hint}") from error


def original_of(spec: EnvSpec) -> EnvSpec | None:
    """What an environment on tensors stands for, where Gymnasium's own is registered; else None."""
    for original, stand_in in _stand_ins.items():
        found = gymnasium.registry.get(original)
        if stand_in == spec.id and found is not None and not_gymnasiums(found) is None:
            return found
    return None


def on_tensors(spec: EnvSpec) -> str | None:
    """The id of an environment on tensors: its own, or that of what stands for it."""
    if spec.vector_entry_point == _ON_TENSORS:
        return spec.id
    found = gymnasium.registry.get(_stand_ins.get(spec.id, ""))
    return found.id if found is not None and found.vector_entry_point == _ON_TENSORS else None


def not_gymnasiums(spec: EnvSpec) -> str | None:
    """What is not Gymnasium's own about what is registered under one of its ids, if anything."""
    for name in ("entry_point", "vector_entry_point"):
        point = getattr(spec, name)
        own = isinstance(point, str) and point.startswith("gymnasium.envs.")
        if own and spec.id in _CLASSES:
            own = point.rpartition(":")[2] in _CLASSES[spec.id]
        if point is not None and not own:
            return f"{name} is {point!r}"
    if spec.additional_wrappers:
        names = ", ".join(wrapper.name for wrapper in spec.additional_wrappers)
        return f"additional_wrappers are {names}"
    return f"kwargs are {spec.kwargs}" if spec.kwargs else None


def check_time_limit(spec: EnvSpec, max_episode_steps: int | None) -> None:
    """Refuse an environment whose episodes may never end."""
    limited = spec.max_episode_steps is not None or spec.kwargs.get(_LIMIT_OF_ATARI) is not None
    if max_episode_steps is None and not limited:
        raise ValueError(
            f"{spec.id} has no time limit, and REINFORCE needs whole episodes;"
            " give one with --max-episode-steps"
        )
