"""Discounted returns over ragged episodes.

The contract is in the functions' own words. Of vecpg only `kernels/` is imported. Kernels are
compiled when they are first called.
"""

from vecpg.returns.advantages import generalized_advantage, lambda_returns
from vecpg.returns.groups import group_advantage
from vecpg.returns.off_policy import vtrace
from vecpg.returns.packed_advantages import packed_generalized_advantage
from vecpg.returns.to_go import packed_reward_to_go, reward_to_go
from vecpg.returns.whiten import masked_whiten

__all__ = [
    "generalized_advantage",
    "group_advantage",
    "lambda_returns",
    "masked_whiten",
    "packed_generalized_advantage",
    "packed_reward_to_go",
    "reward_to_go",
    "vtrace",
]
