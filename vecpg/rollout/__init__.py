"""Collecting whole episodes from N environments at once."""

from vecpg.rollout.data import Rollout
from vecpg.rollout.stepping import collect, play, prepare

__all__ = ["Rollout", "collect", "play", "prepare"]
