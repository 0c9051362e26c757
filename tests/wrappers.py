"""Wrappers for the tests. No torch is imported here: workers import this."""

from gymnasium.wrappers import TransformReward


def doubled(env):
    return TransformReward(env, lambda reward: 2 * reward)


def one_more(env):
    return TransformReward(env, lambda reward: reward + 1)


def raising(env):
    raise RuntimeError("no wrapper today")


def nothing(env):
    return None
