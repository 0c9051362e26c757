"""What kernels that hold a whole policy on the chip know of it, and its parameters in a row."""

from torch import Tensor, nn

from vecpg.kernels.iteration import Shape
from vecpg.policy import Policy
from vecpg.policy.distributions import Categorical, DiagonalGaussian

# What tiles of registers and shared memory hold: units of a hidden layer, numbers of an observation
# (with a bias beside them), and those that the last layer gives.
MOST_UNITS, MOST_FEATURES, MOST_OUTPUTS = 64, 63, 16


def why_not(policy: Policy) -> str | None:
    """Why a policy has no `Shape`; None if it has.

    Example:
        >>> from gymnasium import spaces
        >>> box = spaces.Box(-1, 1, (4,))
        >>> why_not(Policy(box, box)) is None
        True
        >>> why_not(Policy(box, box, hidden_sizes=(64, 128)))
        'its hidden layers are (64, 128), not two of up to 64'
    """
    encoder, distribution = policy.encoder, policy.distribution
    if type(policy) is not Policy or any(
        name in vars(policy) for name in ("forward", "sample", "log_probs_and_entropy")
    ):
        return f"{type(policy).__name__} has functions of its own"
    if encoder.network != "mlp" or encoder.dtype.itemsize != 4 or encoder.normalizer is not None:
        return "its observations are not taken as they are"
    if policy.dropout_units:
        return "it drops units"
    if len(policy.hidden_sizes) != 2 or max(policy.hidden_sizes) > MOST_UNITS:
        return f"its hidden layers are {policy.hidden_sizes}, not two of up to {MOST_UNITS}"
    if encoder.features > MOST_FEATURES:
        return f"an observation has {encoder.features} numbers, more than {MOST_FEATURES}"
    if type(distribution) not in (Categorical, DiagonalGaussian):
        return "its actions are neither Discrete nor a Box"
    if distribution.num_parameters > MOST_OUTPUTS:
        return f"its network gives {distribution.num_parameters} numbers, more than {MOST_OUTPUTS}"
    if isinstance(distribution, DiagonalGaussian) and distribution.raw_log_std is None:
        return "its standard deviation comes from the network"
    return None


def shape_of(policy: Policy) -> Shape:
    """That of a policy that `why_not` has nothing against."""
    distribution = policy.distribution
    gaussian = isinstance(distribution, DiagonalGaussian)
    first, second = policy.hidden_sizes
    return Shape(
        policy.encoder.features,
        (first, second),
        distribution.num_parameters,
        policy.activation == "tanh",
        gaussian,
        distribution.first_action if isinstance(distribution, Categorical) else 0,
    )


def in_a_row(policy: Policy) -> list[Tensor]:
    """The parameters of a policy that has a `Shape`, in its order."""
    layers = [each for each in policy.network if isinstance(each, nn.Linear)]
    numbers = [each for layer in layers for each in (layer.weight, layer.bias)]
    own = getattr(policy.distribution, "raw_log_std", None)
    return numbers if own is None else [*numbers, own]
