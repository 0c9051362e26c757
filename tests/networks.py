"""Networks of a user's own; `networks:small` names one."""

import math

import torch
from torch import nn


class Small(nn.Module):
    """Any observations, with a buffer beside the parameters."""

    def __init__(self, inputs, features):
        super().__init__()
        self.layer = nn.Linear(inputs, features)
        self.register_buffer("shift", torch.arange(features))

    def forward(self, obs):
        return torch.tanh(self.layer(obs.reshape(len(obs), -1).float()) + self.shift / 10)


def small(observation_space):
    return Small(math.prod(observation_space.shape or ()), 5)


def other(observation_space):
    return Small(math.prod(observation_space.shape or ()), 6)


class Colours(nn.Module):
    """The mean of each channel of (B, H, W, C): no parameters at all."""

    def forward(self, obs):
        return obs.mean(dim=(1, 2))


def colours(observation_space):
    return Colours()


_ONE = Small(4, 5)


def shared(observation_space):
    return _ONE
