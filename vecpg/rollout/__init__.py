"""Collecting whole episodes from N environments at once."""

from dataclasses import dataclass, replace
from typing import Any

from gymnasium.vector import VectorEnv, VectorWrapper

from vecpg.envs import check_autoreset, has_one_generator
from vecpg.envs.answers import mask_sizes
from vecpg.envs.tensor import TensorVectorEnv
from vecpg.noise import Stream
from vecpg.policy import Policy, sampling
from vecpg.policy.sampling import sampler
from vecpg.rollout import cpu, stepping, tensor
from vecpg.rollout.cpu import collect_in_blocks
from vecpg.rollout.data import Rollout, check_shards
from vecpg.rollout.stepping import collect_by_stepping, play
from vecpg.rollout.tensor import TensorCollector

__all__ = ["Collector", "Rollout", "choose_collector", "collect", "play"]

# Wrappers that turn one kind of arrays into another.
_CONVERSIONS = {
    f"gymnasium.wrappers.vector.{name}"
    for name in ("array_conversion", "jax_to_numpy", "jax_to_torch", "numpy_to_torch")
}

BACKENDS = ("auto", "reference", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class Collector:
    """The way that collecting goes, chosen once for environments and a policy.

    backend:           "reference", "cpu" or "cuda".
    reason:            why it is "reference"; of "cuda", why actions are drawn in torch; else None.
    draws_on_host:     actions are drawn in machine code (always so where the backend is "cpu").
    on_tensors:        what the environments do is done on the policy's device, by
                       `vecpg.rollout.tensor`.
    action_masks:      infos say which actions are allowed, and the others are not taken.
    activation_memory: bytes of hidden activations to keep for the update (the backend "cpu").
    kept:              what collects on tensors, once it is prepared.
    """

    backend: str
    reason: str | None
    draws_on_host: bool
    on_tensors: bool = False
    action_masks: bool = False
    activation_memory: int = 0
    kept: TensorCollector | None = None

    def __str__(self) -> str:
        graphs = ""
        if self.kept is not None and self.kept.graphs:
            graphs = f", in CUDA graphs of {self.kept.between} rows"
        why = "" if self.reason is None else f": {self.reason}"
        drawing = "" if self.draws_on_host or self.reason is None else ", actions drawn in torch"
        way = {"cpu": "in machine code", "cuda": "in Triton kernels", "reference": "by stepping"}
        return f"{way[self.backend]}{graphs}{drawing}{why}"

    def collect(
        self,
        envs: Any,
        policy: Policy,
        *,
        num_steps: int,
        seed: int,
        iteration: int,
        first_env: int = 0,
        shards: int = 1,
        wait: bool = True,
    ) -> Rollout:
        """As the function `collect`.

        What `prepare` has kept is used for the environments, policy and numbers that it was given.
        """
        check_shards(shards, envs.num_envs)
        if first_env and has_one_generator(envs) and not isinstance(envs, TensorVectorEnv):
            raise ValueError(
                f"first_env: expected 0 for {type(envs).__name__}, whose copies draw from one"
                f' generator, got {first_env}; make them with vectorization="sync"'
            )
        stream = Stream(seed, iteration, first_env, envs.num_envs)
        if self.backend == "cpu":
            return collect_in_blocks(
                envs,
                policy,
                num_steps=num_steps,
                stream=stream,
                activation_memory=0 if shards > 1 else self.activation_memory,
            )
        if self.on_tensors:
            kept = self.kept
            if kept is None or not kept.serves(envs, policy, num_steps, shards):
                kept = self._on_tensors(envs, policy, num_steps, shards)
            return kept.collect(stream, wait=wait)
        # A wrapper around environments on tensors is stepped like any other.
        draw = sampler(policy, stream, shards=shards, in_machine_code=self.draws_on_host)
        return collect_by_stepping(
            envs,
            policy,
            draw,
            num_steps=num_steps,
            stream=stream,
            action_masks=self.action_masks,
        )

    def prepare(
        self, envs: Any, policy: Policy, num_steps: int | None = None, shards: int = 1
    ) -> "Collector":
        """Compile, or load, the kernels that collecting this way, and evaluating, will need.

        Args:
            envs: that will be collected from.
            policy: whose parameters will change in place.
            num_steps: the start window, if it is known: on a GPU memory for every rollout of it is
                set aside, which each overwrites, and what is done is recorded in CUDA graphs.
            shards: as in `collect`.

        Returns:
            the collector that has what was set aside.
        """
        if self.backend == "cpu":
            cpu.prepare(envs, policy)
        elif self.backend == "cuda":
            tensor.prepare_kernels(envs, policy)
        elif self.draws_on_host:
            sampling.prepare(policy)
        stepping.prepare()  # evaluation steps
        if not self.on_tensors or num_steps is None:
            return self
        static = policy.device.type != "cpu"
        return replace(self, kept=self._on_tensors(envs, policy, num_steps, shards, static=static))

    def _on_tensors(
        self, envs: Any, policy: Policy, num_steps: int, shards: int, static: bool = False
    ) -> TensorCollector:
        return TensorCollector(
            envs,
            policy,
            num_steps=num_steps,
            shards=shards,
            draws_on_host=self.draws_on_host,
            kernels=tensor.find_kernels(envs, policy) if self.backend == "cuda" else None,
            static=static,
        )


def collect(
    envs: VectorEnv,
    policy: Policy,
    *,
    num_steps: int,
    seed: int,
    iteration: int,
    first_env: int = 0,
    shards: int = 1,
    backend: str | Collector = "auto",
    action_masks: bool = False,
    activation_memory: int = 0,
    wait: bool = True,
) -> Rollout:
    """Whole episodes from a fresh reset, with the start window.

    An environment starts another episode if and only if it has made fewer than `num_steps` real
    steps in this iteration, and collecting goes on until every started episode has ended. Whether
    an episode starts depends on the past alone, so no outcome is favoured.

    Args:
        envs: N environments in NEXT_STEP mode.
        policy: on any device; environments on tensors must be on the same one.
        num_steps: the start window in real steps. 1 = exactly one episode for each environment.
        seed: of the run.
        iteration: which collection this is.
        first_env: the index in the whole run of the first environment: these are a part of it.
            (seed, iteration, index) fixes every random number of an environment.
        shards: groups of environments that go through the network one by one. The rollout of each,
            collected alone with its own `first_env`, is the same, bit for bit.
        backend: "reference" steps the environments in Python, or plays rows in torch of those on
            tensors; "cpu" plays whole rollouts in machine code, of environments on tensors on the
            CPU under a plain network; "cuda" plays rows of those on a GPU in Triton kernels; "auto"
            takes "cpu" or "cuda" where it serves. A `Collector` was chosen before, and nothing is
            asked again; one that was prepared on a GPU has all its rollouts in the same memory, so
            that the next overwrites this one.
        action_masks: take only actions that `infos["action_mask"]` of the environments, (N, A),
            allows; the rollout has them as `action_masks`. A `Collector` knows by itself.
        activation_memory: bytes that the rollout may keep of hidden activations, so that `update`
            with the same policy need not compute them again: of wide layers in machine code, and of
            one shard. No bit depends on it. A `Collector` knows by itself.
        wait: False: of environments on tensors on a GPU, do not wait for the device but to see
            whether all is over. Then the rollout says by `finite` whether its numbers are, instead
            of an error, and may have rows at its end in which nothing counts.

    Returns:
        a `Rollout` on the policy's device.

    Raises:
        ValueError: environments in another autoreset mode, or on another device than the policy;
            a wrapper of Gymnasium's that computes with NumPy around environments on tensors; an
            unknown backend; "cpu" where it does not serve; shards that do not divide N; a
            `first_env` for environments that have one generator together; action masks of
            environments on tensors, or of actions that are neither Discrete nor MultiDiscrete.
        EnvironmentFailure: an environment raised or returned a number that is not finite, or no
            action mask, or one that allows nothing; the message has its index, the step and the
            seed.

    Example:
        >>> from vecpg.envs import make_envs
        >>> envs = make_envs("CartPole-v1", 4)
        >>> policy = Policy(envs.single_observation_space, envs.single_action_space)
        >>> rollout = collect(envs, policy, num_steps=1, seed=1, iteration=0)
        >>> rollout.dones.sum().item()
        4
    """
    chosen = backend
    if not isinstance(chosen, Collector):
        chosen = choose_collector(
            envs,
            policy,
            chosen,
            action_masks=action_masks,
            activation_memory=activation_memory,
        )
    return chosen.collect(
        envs,
        policy,
        num_steps=num_steps,
        seed=seed,
        iteration=iteration,
        first_env=first_env,
        shards=shards,
        wait=wait,
    )


def choose_collector(
    envs: Any,
    policy: Policy,
    backend: str = "auto",
    *,
    action_masks: bool = False,
    activation_memory: int = 0,
) -> Collector:
    """The way that `collect` goes; it holds as long as environments and policy keep their kind.

    Raises:
        ValueError: as `collect`, for what can be known before the first reset.
    """
    check_autoreset(envs)
    _check_wrappers(envs)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if action_masks:
        mask_sizes(policy.distribution.space)
        if isinstance(envs, TensorVectorEnv):
            raise ValueError("action_masks: environments on tensors give no infos")
    masked = "its actions are masked" if action_masks else None
    refused = {
        "cpu": masked or cpu.why_not(envs, policy),
        "cuda": masked or tensor.why_no_kernels(envs, policy),
    }
    if refused.get(backend) is not None:
        served = {"cpu": cpu.SERVED, "cuda": tensor.SERVED}[backend]
        raise ValueError(
            f'backend="{backend}": {refused[backend]}; it serves {served}. Use'
            ' backend="reference" or "auto"'
        )
    if backend in ("auto", "cpu") and refused["cpu"] is None:
        return Collector("cpu", None, draws_on_host=True, activation_memory=activation_memory)
    if backend in ("auto", "cuda") and refused["cuda"] is None:
        reason = tensor.why_drawn_in_torch(policy)
        return Collector("cuda", reason, draws_on_host=False, on_tensors=True)
    kind = "cuda" if policy.device.type == "cuda" else "cpu"
    off_tensors = tensor.why_not(envs, policy)
    inner = envs.unwrapped
    if (
        off_tensors is not None
        and isinstance(inner, TensorVectorEnv)
        and inner.device.type == "cuda"
    ):
        raise ValueError(
            f"envs: expected a TensorVectorEnv itself on {inner.device}, got what cannot be stepped"
            f' there: {off_tensors}; make it with device="cpu"'
        )
    return Collector(
        "reference",
        "as asked" if backend == "reference" else refused[kind],
        draws_on_host=not action_masks and sampling.why_not(policy) is None,
        on_tensors=off_tensors is None,
        action_masks=action_masks,
    )


def _check_wrappers(envs: Any) -> None:
    """Refuse wrappers of Gymnasium's that would compute with NumPy on tensors."""
    if isinstance(envs, TensorVectorEnv) or not isinstance(envs.unwrapped, TensorVectorEnv):
        return
    from gymnasium.wrappers import vector

    on_numpy = (
        vector.VectorizeTransformObservation,
        vector.VectorizeTransformAction,
        vector.VectorizeTransformReward,
        vector.NormalizeObservation,
        vector.NormalizeReward,
        vector.RecordEpisodeStatistics,
    )
    found: list[str] = []
    layer = envs
    while isinstance(layer, VectorWrapper):
        if type(layer).__module__ in _CONVERSIONS:
            found.clear()
        elif isinstance(layer, on_numpy):
            found.append(type(layer).__name__)
        layer = layer.env
    if found:
        raise ValueError(
            f"{found[0]} computes with NumPy, and these environments are on tensors: put it around"
            ' make_envs(..., vectorization="sync"), "async" or "vector_entry_point", or put'
            " gymnasium.wrappers.vector.ArrayConversion between"
        )
