"""REINFORCE at the speed of the hardware, on any Gymnasium environment.

Public names are imported when they are first used, so that `import vecpg` costs nothing. Functions
that share a module's name are taken from the module: `from vecpg.train import train`.
"""

import importlib

TYPE_CHECKING = False  # typing's own would be what takes longest here
if TYPE_CHECKING:
    from typing import Any

    from vecpg.advantage import advantages
    from vecpg.config import Config, ConfigError
    from vecpg.envs import EnvironmentFailure, make_envs
    from vecpg.evaluate import EvalResult
    from vecpg.policy import Policy
    from vecpg.population import train_many
    from vecpg.returns import reward_to_go
    from vecpg.rollout import Rollout, collect
    from vecpg.run.checkpoint import load_policy
    from vecpg.train import TrainResult

__version__ = "0.1.0"

_HOMES = {
    "Config": "vecpg.config",
    "ConfigError": "vecpg.config",
    "EnvironmentFailure": "vecpg.envs",
    "EvalResult": "vecpg.evaluate",
    "Policy": "vecpg.policy",
    "Rollout": "vecpg.rollout",
    "TrainResult": "vecpg.train",
    "advantages": "vecpg.advantage",
    "collect": "vecpg.rollout",
    "load_policy": "vecpg.run.checkpoint",
    "make_envs": "vecpg.envs",
    "reward_to_go": "vecpg.returns",
    "train_many": "vecpg.population",
}

__all__ = [
    "Config",
    "ConfigError",
    "EnvironmentFailure",
    "EvalResult",
    "Policy",
    "Rollout",
    "TrainResult",
    "advantages",
    "collect",
    "load_policy",
    "make_envs",
    "reward_to_go",
    "train_many",
]


def __getattr__(name: str) -> "Any":
    """Import a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vecpg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
