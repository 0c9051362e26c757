"""Collecting whole episodes from N environments at once."""

from vecpg.rollout.data import Rollout
from vecpg.rollout.stepping import collect, play

__all__ = ["Rollout", "collect", "play"]
