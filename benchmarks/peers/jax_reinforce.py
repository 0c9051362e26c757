"""REINFORCE in JAX, the whole loop compiled, on gymnax's CartPole-v1: stepping and training.

Ours, written for this comparison: nobody publishes one with this net.
Equal: CartPole-v1 (gymnax's `step_env`, checked against Gymnasium's here, and the limit of 500
steps), two layers of 64 tanh units, the same number of copies and rows, float32, reward to go with
a baseline, one step of Adam (optax) for all rows, a fresh reset each iteration, on the CPU. Several
iterations are one compiled program; buffers are donated; compiling is not timed.
Not equal: 512 rows and no more, so the episodes at the end of the window are cut, and their returns
with them, as JAX's fixed shapes suggest; vecpg plays every episode to its end. The baseline is the
mean of all rows (vecpg: of the same age in other copies). A reset takes no row of its own. The
gradient is taken by automatic differentiation.
What was tried: JAX's two families of random numbers, drawn all at once or row by row; unrolling the
loop over rows; the gradient of all rows at once or of parts that stay in the cache.
"""

import functools
import itertools

import numpy as np
from harness import LEARNING_RATE, LENGTH, Entrant, check_limit, check_rows, stepping, training

NEEDS = ("jax", "gymnax", "optax")
PACKAGES = ("jax", "jaxlib", "gymnax", "optax")

SIZES = (4, 64, 64, 2)
GAMMA = 0.99


def entrants():
    many = {
        "numbers by row, parts": {"ahead": False},
        "numbers ahead, parts": {},
        "numbers ahead, parts, unrolled by 4": {"unroll": 4},
        "threefry numbers ahead, parts": {"numbers": "threefry2x32"},
        "numbers ahead, all rows at once": {"part": None},
    }
    few = dict(reversed(many.items()))  # the most promising ones first
    learners = [
        Entrant(
            training(n),
            "JAX on gymnax, whole loop compiled",
            {
                name: functools.partial(make_training, n, **settings)
                for name, settings in tried.items()
            },
            "cuts episodes at row 512; mean of all rows as baseline",
        )
        for n, tried in ((64, few), (4096, many))
    ]
    steppers = [
        Entrant(
            stepping(n),
            "JAX on gymnax, 512 rows compiled",
            {"": functools.partial(make_stepping, n)},
            "no observation leaves the compiled loop",
        )
        for n in (64, 4096)
    ]
    return [*steppers, *learners]


def make_env():
    """Resetting and stepping N copies, from random numbers that are given."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    import gymnax
    import jax.numpy as jnp

    env, params = gymnax.make("CartPole-v1")
    step_copies = jax.vmap(env.step_env, in_axes=(None, 0, 0, None))
    _, like = env.reset(jax.random.key(0), params)

    def start(uniforms):
        obs = uniforms * 0.1 - 0.05
        state = like.replace(
            x=obs[:, 0],
            x_dot=obs[:, 1],
            theta=obs[:, 2],
            theta_dot=obs[:, 3],
            time=jnp.zeros(len(obs), jnp.int32),
        )
        return state, obs

    def step(state, actions, uniforms):
        """The next state and observation, rewards, and ends, which are followed by a reset."""
        obs, state, rewards, terminated, _ = step_copies(None, state, actions, params)
        ended = terminated | env.is_truncated(state, params)
        fresh, first = start(uniforms)
        state = jax.tree.map(lambda new, old: jnp.where(ended, new, old), fresh, state)
        return state, jnp.where(ended[:, None], first, obs), rewards, ended

    check(start, step)
    return start, step


def check(start, step):
    import jax

    keys = jax.random.split(jax.random.key(0), 101)
    stepped = jax.jit(step)
    state, obs = start(jax.random.uniform(keys[100], (64, 4)))
    rows = []
    for key in keys[:100]:
        uniforms = jax.random.uniform(key, (64, 5))
        actions = (uniforms[:, 4] < 0.5).astype("int32")
        state, following, rewards, ended = stepped(state, actions, uniforms[:, :4])
        assert (rewards == 1).all()
        rows.append([np.asarray(part) for part in (obs, actions, following, ended)])
        obs = following
    check_rows(*(np.concatenate(part) for part in zip(*rows, strict=True)))
    state, obs = start(jax.random.uniform(keys[0], (64, 4)))

    def balance(actions):
        nonlocal state
        state, after, _, ended = stepped(
            state, actions.astype(np.int32), jax.random.uniform(keys[1], (64, 4))
        )
        return after, ended

    check_limit(balance, obs)


def make_stepping(num_envs):
    start, step = make_env()
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        state, key = carry
        key, now = jax.random.split(key)
        uniforms = jax.random.uniform(now, (LENGTH, num_envs, 5))

        def row(state, uniforms):
            actions = (uniforms[:, 4] < 0.5).astype(jnp.int32)
            state, obs, rewards, ended = step(state, actions, uniforms[:, :4])
            return state, (obs, rewards, ended)

        state, rows = jax.lax.scan(row, state, uniforms)
        return (state, key), rows

    key = jax.random.key(0, impl="unsafe_rbg")
    carry = start(jax.random.uniform(key, (num_envs, 4)))[0], key

    def work():
        nonlocal carry
        carry, rows = run(carry)
        jax.block_until_ready(rows)
        return LENGTH * num_envs

    work()
    return work


def make_training(num_envs, unroll=1, ahead=True, part=8192, numbers="unsafe_rbg"):
    start, step = make_env()
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.adam(LEARNING_RATE)
    iterations = 8 if num_envs == 64 else 1
    size = LENGTH * num_envs

    def make_net(key):
        """As torch begins: uniform within 1 / sqrt(inputs)."""
        net = []
        for wide, high in itertools.pairwise(SIZES):
            key, one, other = jax.random.split(key, 3)
            bound = wide**-0.5
            net.append(
                (
                    jax.random.uniform(one, (wide, high), minval=-bound, maxval=bound),
                    jax.random.uniform(other, (high,), minval=-bound, maxval=bound),
                )
            )
        return net

    def preference(net, obs):
        """The logit of action 1 less that of action 0."""
        for weight, bias in net[:-1]:
            obs = jnp.tanh(obs @ weight + bias)
        weight, bias = net[-1]
        logits = obs @ weight + bias
        return logits[:, 1] - logits[:, 0]

    def collect(net, key):
        first, later = jax.random.split(key)
        carry = start(jax.random.uniform(first, (num_envs, 4)))

        def row(carry, given):
            state, obs = carry
            uniforms = given if ahead else jax.random.uniform(given, (num_envs, 5))
            actions = uniforms[:, 4] < jax.nn.sigmoid(preference(net, obs))
            state, following, rewards, ended = step(
                state, actions.astype(jnp.int32), uniforms[:, :4]
            )
            return (state, following), (obs, actions, rewards, ended)

        if ahead:
            given = jax.random.uniform(later, (LENGTH, num_envs, 5))
        else:
            given = jax.random.split(later, LENGTH)
        return jax.lax.scan(row, carry, given, unroll=unroll)[1]

    def weigh(rewards, ended):
        def back(after, row):
            reward, end = row
            now = reward + GAMMA * jnp.where(end, 0.0, after)
            return now, now

        zeros = jnp.zeros(num_envs)
        weights = jax.lax.scan(back, zeros, (rewards, ended), reverse=True, unroll=8)[1]
        return weights - weights.mean()

    def loss(net, rows):
        obs, actions, weights = rows
        chosen = jnp.where(actions, 1.0, -1.0) * preference(net, obs)
        return -(jax.nn.log_sigmoid(chosen) * weights).sum() / num_envs

    def gradient(net, rows):
        if part is None:
            return jax.grad(loss)(net, rows)
        parts = jax.tree.map(lambda each: each.reshape(-1, part, *each.shape[1:]), rows)

        def add(total, rows):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(net, rows)), None

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, net), parts)[0]

    def iterate(carry, _):
        net, moments, key = carry
        key, now = jax.random.split(key)
        obs, actions, rewards, ended = collect(net, now)
        weights = weigh(rewards, ended)
        rows = obs.reshape(size, 4), actions.reshape(size), weights.reshape(size)
        steps, moments = optimizer.update(gradient(net, rows), moments)
        return (optax.apply_updates(net, steps), moments, key), ended.sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry):
        return jax.lax.scan(iterate, carry, None, length=iterations)

    key = jax.random.key(0, impl=numbers)
    net = make_net(key)
    carry = net, optimizer.init(net), key

    def work():
        nonlocal carry
        carry, ends = run(carry)
        jax.block_until_ready((carry, ends))
        # 22 rows an episode: it plays the policy that it began with, as all the others do.
        assert 15 < iterations * size / int(ends.sum()) < 35
        return iterations * size

    work()
    return work
