"""Collecting from environments on tensors: nothing leaves the device until it is over."""

import importlib.util
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vecpg.envs.tensor import TensorVectorEnv
from vecpg.kernels import graphs
from vecpg.kernels.announce import once
from vecpg.memory import in_words
from vecpg.noise import KeyedNoise, Purpose, Stream, steps_at_once
from vecpg.policy import Policy
from vecpg.policy.sampling import sampler
from vecpg.rollout.data import FINISHED, PLAYING, RESETTING, Rollout, Rows, check_finite

_log = logging.getLogger(__name__)

SERVED = "environments on tensors in float32 on a GPU, with Triton installed"

# Rows between two looks, from the host, at whether everything is over, and how many blocks of so
# many rows are begun before a look is read. On a CPU a look costs as little as a row that nobody
# needs; for a GPU the host must not wait.
_ROWS_BETWEEN_LOOKS = {"cpu": 1}
_ROWS_BETWEEN_LOOKS_ELSEWHERE = 16
_BLOCKS_AHEAD = {"cpu": 0}
_BLOCKS_AHEAD_ELSEWHERE = 1


class Copies(NamedTuple):
    """What every environment has come to, on the device. All of it is written in place.

    state:    (V, N), of the environments' dtype.
    lengths:  (N,) int32, steps since its episode began.
    steps:    (N,) int32, real steps in this iteration.
    episodes: (N,) int32, how many have ended.
    cut:      (N,) int32, how many of them by the time limit.
    now:      (N,) int8, what it does at the next row, as in `data.NEXT`.
    bad:      (N,) bool, a number of it that counts was not finite.
    seen:     (N, F) float32, what the policy sees at the next row.
    acted:    (N, A) float32, the actions of this row as the environment takes them.
    t:        (1,) int64, the row that comes next.
    key:      (6,) int64, as `KeyedNoise` takes it.
    """

    state: Tensor
    lengths: Tensor
    steps: Tensor
    episodes: Tensor
    cut: Tensor
    now: Tensor
    bad: Tensor
    seen: Tensor
    acted: Tensor
    t: Tensor
    key: Tensor


class Kernels(NamedTuple):
    """Triton kernels, a launch each: see `vecpg.rollout.cuda` and `vecpg.policy.cuda`.

    start:    begins a collection, of (copies, rows).
    step:     a row, of (copies, rows, offset) and the numbers of `TensorCollector`.
    draw:     a row's actions, of (parameters, copies, rows, offset); None where the policy draws
              in torch.
    uniforms: its random numbers then, and those of dropout, of (out, copies, purpose, offset).
    """

    start: Callable[..., None]
    step: Callable[..., None]
    draw: Callable[..., None] | None
    uniforms: Callable[..., None]


class Tallies(NamedTuple):
    """What the host learns of a collection at a look.

    playing:     environments that have not finished.
    counted:     rows that count, so far.
    episodes:    that have ended.
    truncations: of them.
    """

    playing: int
    counted: int
    episodes: int
    truncations: int


def why_not(envs: Any, policy: Policy) -> str | None:
    """Why environments and a policy are not collected from in this way; None if they are."""
    if not isinstance(envs, TensorVectorEnv):
        return "these are no environments on tensors"
    if type(envs) is not TensorVectorEnv:
        return f"{type(envs).__name__} may do something else than its definition"
    if policy.obs_shape != envs.single_observation_space.shape:
        return "its observations are not those of the environments"
    if policy.distribution.space != envs.single_action_space:
        return "its actions are not those of the environments"
    return None


def why_no_kernels(envs: Any, policy: Policy) -> str | None:
    """Why rows are not played by Triton kernels; None if they are."""
    reason = why_not(envs, policy)
    if reason is not None:
        return reason
    if envs.device.type != "cuda":
        return f"the environments are on {envs.device}"
    if envs.dtype != torch.float32:
        return "the environments are not in float32"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from vecpg.rollout import cuda

    try:
        cuda.make_step(envs.definition, envs.dynamics.num_variables)
    except ValueError as error:
        return str(error)
    return None


def why_drawn_in_torch(policy: Policy) -> str | None:
    """Why the actions of rows that kernels play are drawn in torch; None if they are not."""
    from vecpg.policy import cuda

    return cuda.why_not(policy)


def find_kernels(envs: TensorVectorEnv, policy: Policy) -> Kernels:
    """Those that `why_no_kernels` has nothing against. They are compiled at their first launch."""
    from vecpg.policy import cuda as policy_cuda
    from vecpg.rollout import cuda

    of = envs.definition, envs.dynamics.num_variables
    draw = policy_cuda.make_draw(policy) if why_drawn_in_torch(policy) is None else None
    return Kernels(cuda.make_start(*of), cuda.make_step(*of), draw, policy_cuda.uniforms)


def prepare_kernels(envs: TensorVectorEnv, policy: Policy) -> None:
    """Compile, or load, those that environments and a policy need."""
    from vecpg.policy import cuda as policy_cuda
    from vecpg.rollout import cuda

    cuda.prepare(envs.definition, envs.dynamics.num_variables, envs.device)
    policy_cuda.prepare(policy)


class _Functions(NamedTuple):
    """What is done on the device, as functions or as graphs of them.

    begin:         resets every copy, and writes the first observations.
    block:         a block of rows.
    numbers:       draws the random numbers of the next rows.
    numbers_all:   the same, and the states in which environments start that are reset in them.
    """

    begin: Callable[[], None]
    block: Callable[[], None]
    numbers: Callable[[], None]
    numbers_all: Callable[[], None]


class TensorCollector:
    """Collects from environments on tensors, which themselves are left as they were.

    A block of rows is one function of tensors alone, so that a CUDA graph can hold it. Which rows
    count is itself a matter of tensors, by the rule of `data.NEXT`.

    Args:
        envs: N environments that `why_not` has nothing against.
        policy: on their device.
        num_steps: the start window.
        shards: groups of environments, each of which goes through the network by itself.
        draws_on_host: actions are drawn in machine code, row by row.
        kernels: that play and draw; None: in torch.
        static: keep the memory, in which then every rollout lies until the next is collected, and
            record what is done in CUDA graphs.

    Raises:
        ValueError: environments on another device than the policy.
    """

    # What is kept is written to while somebody only infers, and differentiated later.
    @torch.inference_mode(False)
    def __init__(
        self,
        envs: TensorVectorEnv,
        policy: Policy,
        *,
        num_steps: int,
        shards: int = 1,
        draws_on_host: bool = False,
        kernels: Kernels | None = None,
        static: bool = False,
    ) -> None:
        device = policy.device
        if envs.device != device:
            raise ValueError(
                f"envs: expected them on {device} like the policy, got {envs.device}; make"
                f' them with device="{device}"'
            )
        self.envs, self.policy, self.num_steps, self.shards = envs, policy, num_steps, shards
        self.graphs = False
        self._draws_on_host = draws_on_host
        self._kernels = kernels
        # An environment that starts its last episode has made fewer than num_steps real steps, so
        # that at most num_steps - 1 episodes ended before, and a row that resets followed each. At
        # most 2 * (num_steps - 1) rows are before it, and the time limit's number in it.
        self._resetting_rows = 2 * (num_steps - 1)
        longest = self._resetting_rows + envs.max_episode_steps
        between = _ROWS_BETWEEN_LOOKS.get(device.type, _ROWS_BETWEEN_LOOKS_ELSEWHERE)
        self.between = min(between, longest)
        self._ahead = _BLOCKS_AHEAD.get(device.type, _BLOCKS_AHEAD_ELSEWHERE)
        self._blocks = -(-longest // self.between)
        self._make_copies(device)
        self._make_noise(device)
        size = envs.num_envs // shards
        self._parts = [slice(first, first + size) for first in range(0, envs.num_envs, size)]
        self._rows: Any = None
        self._functions = _Functions(
            self._begin, self._block, self._draw_numbers, self._draw_all_numbers
        )
        self._does = self._functions
        self._static = static and self._has_room(device)
        if self._static:
            # To record a block, two are played.
            self._rows = self._make_rows(max(2, self._blocks) * self.between)
            self._capture()

    # -- Memory ----------------------------------------------------------------------------------

    def _make_copies(self, device: torch.device) -> None:
        envs, num_envs = self.envs, self.envs.num_envs
        policy, real = self.policy, torch.float32

        def zeros(*shape: int, of: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=of, device=device)

        # Each begins where Triton finds memory aligned, as it does where kernels are prepared.
        self._counts = zeros(4, -(-num_envs // 4) * 4, of=torch.int32)[:, :num_envs]
        lengths, steps, episodes, cut = self._counts
        self._copies = Copies(
            state=zeros(envs.dynamics.num_variables, num_envs, of=envs.dtype),
            lengths=lengths,
            steps=steps,
            episodes=episodes,
            cut=cut,
            now=zeros(num_envs, of=torch.int8),
            bad=zeros(num_envs, of=torch.bool),
            seen=zeros(num_envs, math.prod(policy.obs_shape), of=real),
            acted=zeros(num_envs, math.prod(policy.action_shape), of=real),
            t=zeros(1, of=torch.int64),
            key=zeros(6, of=torch.int64),
        )
        # What no environment lives to see is no limit.
        limits = [min(each, 2**31 - 1) for each in (envs.max_episode_steps, self.num_steps)]
        self._limits = torch.tensor(limits, dtype=torch.int32).to(device)[:, None]
        self._following = torch.arange(self.between, device=device)
        self._tallies = torch.zeros(4, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._host_key = torch.zeros(6, dtype=torch.int64, pin_memory=pinned)
        self._host_tallies = [
            torch.zeros(4, dtype=torch.int64, pin_memory=pinned) for _ in range(self._ahead + 1)
        ]
        self._arrived: list[Any] = []
        if pinned:
            self._arrived = [torch.cuda.Event() for _ in self._host_tallies]  # type: ignore[no-untyped-call]

    def _make_noise(self, device: torch.device) -> None:
        envs, policy = self.envs, self.policy
        kernels = self._kernels
        draws = not self._draws_on_host and (kernels is None or kernels.draw is None)
        counts = {Purpose.ACTION: policy.num_uniforms} if draws else {}
        if policy.dropout_units:
            counts[Purpose.DROPOUT] = policy.dropout_units
        self._purposes = [*counts]
        with_starts = counts | {Purpose.START: envs.definition.num_uniforms}
        between, num_envs = self.between, envs.num_envs
        rows = between  # kernels make those of a block at a time
        if kernels is None:
            numbers = 4 * num_envs * sum((count + 3) // 4 for count in with_starts.values())
            most = min(steps_at_once(numbers, device), self._blocks * between)
            rows = max(1, most // between) * between
        self._rows_of_noise = rows
        self._numbers = [
            torch.zeros(count, rows, num_envs, dtype=torch.float32, device=device)
            for count in counts.values()
        ]
        if kernels is not None:
            return
        starts = {Purpose.START: with_starts[Purpose.START]}
        self._noise = KeyedNoise(counts, rows, num_envs, device)
        self._noise_and_starts = KeyedNoise(with_starts, rows, num_envs, device)
        self._first_starts = KeyedNoise(starts, 1, num_envs, device)
        self._before = torch.full((1,), -1, dtype=torch.int64, device=device)
        shape = len(self._copies.state), rows, num_envs
        self._starts = torch.zeros(shape, dtype=envs.dtype, device=device)

    def _make_rows(self, capacity: int) -> Rows:
        policy = self.policy
        return Rows(
            capacity,
            self.envs.num_envs,
            (policy.obs_shape, policy.obs_dtype),
            (policy.action_shape, policy.action_dtype),
            policy.device,
        )

    # -- What is done on the device ---------------------------------------------------------------

    def _begin(self) -> None:
        copies, dynamics = self._copies, self.envs.dynamics
        if self._kernels is not None:
            self._kernels.start(copies, self._rows)
            return
        (numbers,) = self._first_starts(copies.key, self._before)
        copies.state.copy_(dynamics.start(numbers[:, 0].to(self.envs.dtype)))
        self._counts.zero_()
        copies.now.fill_(PLAYING)
        copies.t.zero_()
        copies.seen.copy_(dynamics.observation(copies.state).view_as(copies.seen))
        self._rows.obs[0].copy_(copies.seen.view_as(self._rows.obs[0]))

    def _draw_numbers(self) -> None:
        numbers = self._noise(self._copies.key, self._copies.t)
        for kept, each in zip(self._numbers, numbers, strict=True):
            kept.copy_(each)

    def _draw_all_numbers(self) -> None:
        *numbers, uniforms = self._noise_and_starts(self._copies.key, self._copies.t)
        for kept, each in zip(self._numbers, numbers, strict=True):
            kept.copy_(each)
        self._starts.copy_(self.envs.dynamics.start(uniforms.to(self.envs.dtype)))

    def _advance(self) -> tuple[Tensor, Tensor]:
        """A block of rows. Returns its terminations and truncations."""
        copies, rows, dynamics = self._copies, self._rows, self.envs.dynamics
        at = copies.t + self._following
        place = at % self._rows_of_noise
        numbers = [each.index_select(1, place) for each in self._numbers]
        starts = self._starts.index_select(1, place)
        counts, lengths = self._counts[:2], copies.lengths
        playing, resetting = copies.now == PLAYING, copies.now == RESETTING
        state, obs = copies.state, copies.seen.view(-1, *self.policy.obs_shape)
        block: list[tuple[Tensor, ...]] = []
        for k in range(self.between):
            actions = self._draw(k, obs, numbers)
            following, rewards, ended = dynamics.step(
                state, self.policy.distribution.clipped(actions)
            )
            counts.add_(playing)
            lengths.mul_(playing)
            # Whether it is within the time limit, and whether it may start another episode.
            within, early = (counts < self._limits).unbind()
            ends = (ended >= within).logical_and_(playing)
            state = torch.where(playing, following, starts[:, k])
            obs = dynamics.observation(state).to(self.policy.obs_dtype)
            block.append((obs, actions, rewards, ended, within, playing))
            # Only the row that resets asks whether there is another episode: see `data.NEXT`.
            playing, resetting = torch.where(resetting, early, playing ^ ends), ends
        seen, actions, rewards, ended, within, mask = (
            torch.stack(each) if len(each) > 1 else each[0][None]
            for each in zip(*block, strict=True)
        )
        terminations, truncations = ended & mask, mask > within
        rows.obs.index_copy_(0, at + 1, seen)
        rows.actions.index_copy_(0, at, actions)
        rows.rewards.index_copy_(0, at, torch.where(mask, rewards, 0.0).to(torch.float32))
        rows.terminations.index_copy_(0, at, terminations)
        rows.truncations.index_copy_(0, at, truncations)
        rows.mask.index_copy_(0, at, mask)
        copies.state.copy_(state)
        copies.seen.copy_(obs.view_as(copies.seen))
        torch.add(
            playing.view(torch.int8),
            (resetting & early).view(torch.int8),
            alpha=RESETTING,
            out=copies.now,
        )
        copies.t.add_(self.between)
        return terminations, truncations

    def _advance_by_kernels(self) -> None:
        """A block of rows, the same rows where rounding does not decide."""
        kernels, copies, rows, policy = self._kernels, self._copies, self._rows, self.policy
        assert kernels is not None
        for kept, purpose in zip(self._numbers, self._purposes, strict=True):
            kernels.uniforms(kept, copies, purpose, 0)
        at = copies.t + self._following
        obs = copies.seen.view(-1, *policy.obs_shape)
        for k in range(self.between):
            if kernels.draw is None:
                actions = self._draw(k, obs, self._numbers)
                rows.actions.index_copy_(0, at[k : k + 1], actions[None])
                clipped = policy.distribution.clipped(actions)
                copies.acted.copy_(clipped.view_as(copies.acted))
            else:
                parameters = [
                    policy(obs[part], *(each[:, k, part].contiguous() for each in self._numbers))
                    for part in self._parts
                ]
                joined = parameters[0] if len(parameters) == 1 else torch.cat(parameters, dim=1)
                kernels.draw(joined, copies, rows, k)
            kernels.step(
                copies,
                rows,
                k,
                num_steps=self.num_steps,
                max_episode_steps=self.envs.max_episode_steps,
            )
        copies.t.add_(self.between)

    def _draw(self, k: int, obs: Tensor, numbers: list[Tensor]) -> Tensor:
        """The actions of row k of a block."""
        if self._draws_on_host:
            actions = torch.empty(len(obs), dtype=torch.int64)
            self._draw_on_host(self._t + k, obs, actions)
            return actions
        own, *dropped = (each[:, k] for each in numbers)
        drawn = [
            self.policy.sample(
                obs[part],
                own[:, part].contiguous(),
                *(each[:, part].contiguous() for each in dropped),
            )
            for part in self._parts
        ]
        return drawn[0] if len(drawn) == 1 else torch.cat(drawn)

    def _block(self) -> None:
        """A block of rows, and what the host is told of it."""
        copies = self._copies
        if self._kernels is not None:
            self._advance_by_kernels()
        else:
            terminations, truncations = self._advance()
            copies.episodes.add_((terminations | truncations).sum(dim=0))
            copies.cut.add_(truncations.sum(dim=0))
        playing = (copies.now != FINISHED).sum(dim=0, keepdim=True)
        torch.cat([playing, self._counts[1:].sum(dim=1)], out=self._tallies)

    # -- CUDA graphs -----------------------------------------------------------------------------

    def _has_room(self, device: torch.device) -> bool:
        if device.type != "cuda":
            return True
        policy, num_envs = self.policy, self.envs.num_envs
        row = (
            math.prod(policy.obs_shape) * policy.obs_dtype.itemsize
            + math.prod(policy.action_shape) * policy.action_dtype.itemsize
            + 4
            + 3
        )
        need = self._blocks * self.between * num_envs * row
        free = graphs.room(device)
        if 2 * need <= free:
            return True
        once(
            _log,
            f"collecting: op by op, as the longest rollout takes {in_words(need)}, more than half"
            f" of the {in_words(free)} that are free; lower --num-envs (or --num-steps)",
        )
        return False

    def _capture(self) -> None:
        """Record everything, for the parameters where they are now."""
        wanted = self._functions if self._kernels is None else self._functions[:2]
        with torch.inference_mode():
            does = [graphs.capture(each, self.policy.device, "collecting") for each in wanted]
        self._does = _Functions(*does, *self._functions[len(does) :])
        self.graphs = self._does != self._functions
        self._recorded = self._addresses()

    def _addresses(self) -> list[int]:
        policy = self.policy
        return [each.data_ptr() for each in itertools.chain(policy.parameters(), policy.buffers())]

    # -- A collection ----------------------------------------------------------------------------

    def serves(self, envs: Any, policy: Policy, num_steps: int, shards: int) -> bool:
        """Whether this is made for them."""
        others = envs, policy, num_steps, shards
        return others == (self.envs, self.policy, self.num_steps, self.shards)

    def collect(self, stream: Stream, *, wait: bool = True) -> Rollout:
        """As `Collector.collect`, of the stream's environments."""
        if not self._static:
            self._rows = self._fresh_rows()
        elif self._recorded != self._addresses():
            self._capture()
        rows: Rows = self._rows
        device = self.policy.device
        at_once = wait and device.type == "cpu"
        with torch.inference_mode():
            self._prepare(stream)
            length, tallies = self._play_at_once() if at_once else self._play()
        if tallies is not None and not wait:
            rollout = _without_waiting(rows, length, tallies, stream)
            if self._kernels is None:
                return replace(rollout, finite=_finite(rollout))
            return replace(rollout, finite=~self._copies.bad.any())
        if not self._static:
            self._rows = None  # they are the rollout's
        length = int(rows.mask[:length].any(dim=1).nonzero().max()) + 1
        rollout = rows.rollout(length, device, stream)
        check_finite(rollout)
        return rollout

    def _prepare(self, stream: Stream) -> None:
        """Tell the device which numbers are to be drawn. Those before were read long ago."""
        self._host_key.numpy()[:] = stream.device_key()
        self._copies.key.copy_(self._host_key, non_blocking=True)
        if self._draws_on_host:
            self._draw_on_host = sampler(self.policy, stream, in_machine_code=True)

    def _begin_block(self, number: int) -> None:
        """Have room and random numbers for it."""
        self._t = number * self.between
        self._rows.make_room(self._t + self.between)
        if self._kernels is None and self._t % self._rows_of_noise == 0:
            resets = self._t < self._resetting_rows
            (self._does.numbers_all if resets else self._does.numbers)()

    def _play_at_once(self) -> tuple[int, None]:
        """All rows, of which there are the returned number, and a look at the end of each block."""
        self._begin()
        for number in range(self._blocks):
            self._begin_block(number)
            self._advance()
            if not bool(self._copies.now.any()):
                break
        return self._t + self.between, None

    def _play(self) -> tuple[int, Tallies]:
        """The same; a look is read while the device is at the next block already."""
        self._does.begin()
        for number in range(self._blocks + self._ahead):
            if number < self._blocks:
                self._begin_block(number)
                self._does.block()
                self._look(number)
            if number >= self._ahead:
                tallies = self._read(number - self._ahead)
                if not tallies.playing:
                    break
        return (number - self._ahead + 1) * self.between, tallies

    def _look(self, number: int) -> None:
        """Send a block's tallies to the host."""
        at = number % len(self._host_tallies)
        self._host_tallies[at].copy_(self._tallies, non_blocking=True)
        if self._arrived:
            self._arrived[at].record(torch.cuda.current_stream(self.policy.device))

    def _read(self, number: int) -> Tallies:
        at = number % len(self._host_tallies)
        if self._arrived:
            self._arrived[at].synchronize()
        return Tallies(*self._host_tallies[at].tolist())

    def _fresh_rows(self) -> Rows:
        capacity = min(self.num_steps, 1024) + 1
        if self.policy.device.type == "cuda" and self._has_room(self.policy.device):
            capacity = self._blocks * self.between
        return self._make_rows(capacity)


def _without_waiting(rows: Rows, length: int, tallies: Tallies, stream: Stream) -> Rollout:
    """The first rows as a rollout, of which the host knows what shapes depend on."""
    obs, mask, truncations = rows.obs[: length + 1], rows.mask[:length], rows.truncations[:length]
    num_envs = mask.shape[1]
    cut = _places(truncations, tallies.truncations)
    final_obs = obs.flatten(0, 1).index_select(0, cut + num_envs)
    return Rollout(
        obs=obs[:-1],
        actions=rows.actions[:length],
        rewards=rows.rewards[:length],
        terminations=rows.terminations[:length],
        truncations=truncations,
        mask=mask,
        final_obs=final_obs,
        final_rows=torch.stack([cut // num_envs, cut % num_envs], dim=1),
        stream=stream,
        counted=_places(mask, tallies.counted),
        num_episodes=tallies.episodes,
    )


def _places(flags: Tensor, count: int) -> Tensor:
    """(count,) int64: where in (T, N) the flags are True, rising, if so many are."""
    kind = torch.int32 if flags.numel() < 2**31 else torch.int64
    passed = flags.flatten().cumsum(0, dtype=kind)
    return torch.searchsorted(passed, torch.arange(1, count + 1, dtype=kind, device=flags.device))


def _finite(rollout: Rollout) -> Tensor:
    """What `check_finite` looks at, as a flag on the device."""
    counts = rollout.mask.flatten()
    ends = torch.ones_like(rollout.final_rows[:, 0], dtype=torch.bool)
    finite = [_all_finite(rollout.final_obs, ends)]
    finite += [
        _all_finite(rows.flatten(0, 1), counts)
        for rows in (rollout.obs, rollout.actions, rollout.rewards)
        if rows.is_floating_point()
    ]
    return torch.stack(finite).all()


def _all_finite(values: Tensor, mask: Tensor) -> Tensor:
    """Whether the numbers of (R, ...) are finite in all rows where (R,) `mask` is True."""
    low, high = (values.flatten(1) if values.ndim > 1 else values[:, None]).aminmax(dim=1)
    # Both are NaN where a number is.
    return ((low > -math.inf) & (high < math.inf) | ~mask).all()
