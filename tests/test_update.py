import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from vecpg import update as update_module
from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.noise import Purpose, Stream
from vecpg.policy import Policy
from vecpg.policy import network as network_module
from vecpg.rollout import Rollout, collect
from vecpg.update import Learner, choose_learner, update

T, N = 37, 5


@pytest.fixture(params=["machine code", "autograd"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "autograd":
        monkeypatch.setattr(update_module.policy_cpu, "why_not", lambda policy: "a test")
    return request.param


def make_policy(hidden_sizes=(8,)):
    torch.manual_seed(1)
    policy = Policy(spaces.Box(-1, 1, (3,)), spaces.Discrete(3), hidden_sizes=hidden_sizes)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return policy


def make_case(seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(T, N, generator=g) < 0.6
    rollout = Rollout(
        obs=torch.randn(T, N, 3, generator=g),
        actions=torch.randint(0, 3, (T, N), generator=g),
        rewards=torch.zeros(T, N),
        terminations=torch.zeros(T, N, dtype=bool),
        truncations=torch.zeros(T, N, dtype=bool),
        mask=mask,
        final_obs=torch.zeros(0, 3),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    rollout.obs[~mask] = math.nan
    return rollout, torch.randn(T, N, generator=g).masked_fill(~mask, math.nan)


def expected_gradient(policy, rollout, advantages, config):
    """Row by row: grad log softmax is onehot - p, through the chain rule of one linear layer."""
    weight = policy.network[0].weight.detach().double()
    bias = policy.network[0].bias.detach().double()
    rows = rollout.mask.nonzero().tolist()
    divisor = {"episode": N, "step": len(rows), "sum": 1}[config.reduction]
    total_w, total_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for t, n in rows:
        x = rollout.obs[t, n].double()
        p = torch.softmax(weight @ x + bias, dim=0)
        onehot = torch.eye(3, dtype=torch.float64)[rollout.actions[t, n]]
        entropy = -(p * p.log()).sum()
        to_logits = -advantages[t, n].double() * (onehot - p) / divisor
        to_logits += config.ent_coef / len(rows) * p * (p.log() + entropy)
        total_w += torch.outer(to_logits, x)
        total_b += to_logits
    return total_w, total_b


@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["episode", "step", "sum"])
def test_the_gradient_is_the_formula_whatever_the_chunks(
    monkeypatch, reduction, ent_coef, chunk_rows
):
    monkeypatch.setattr(update_module, "CHUNK_ROWS", chunk_rows)
    policy = make_policy(hidden_sizes=())
    rollout, advantages = make_case()
    config = Config(reduction=reduction, ent_coef=ent_coef)
    weight, bias = expected_gradient(policy, rollout, advantages, config)
    stats = update(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, advantages, config)
    layer = policy.network[0]
    torch.testing.assert_close(layer.weight.grad.double(), weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.bias.grad.double(), bias, atol=1e-5, rtol=1e-4)
    norm = math.sqrt(weight.square().sum() + bias.square().sum())
    assert stats.grad_norm.item() == pytest.approx(norm, rel=1e-4)


def test_the_statistics_are_means_over_counted_rows():
    policy = make_policy()
    rollout, advantages = make_case()
    log_probs, entropy = policy.log_probs_and_entropy(
        rollout.obs[rollout.mask], rollout.actions[rollout.mask]
    )
    stats = update(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, advantages, Config())
    assert stats.entropy.item() == pytest.approx(entropy.mean().item(), rel=1e-5)
    surrogate = -(log_probs * advantages[rollout.mask]).sum().item() / N
    assert stats.policy_loss.item() == pytest.approx(surrogate, rel=1e-4, abs=1e-5)


def test_masked_rows_change_nothing_bit_for_bit():
    gradients = []
    for other in (math.nan, 7.0):
        policy = make_policy()
        rollout, advantages = make_case()
        rollout.obs[~rollout.mask] = other
        rollout.actions[~rollout.mask] = 1
        advantages = advantages.masked_fill(~rollout.mask, other)
        optimizer = torch.optim.SGD(policy.parameters(), 0.1)
        update(policy, optimizer, rollout, advantages, Config())
        gradients.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_step_of_the_optimizer_is_taken():
    policy = make_policy()
    before = [p.detach().clone() for p in policy.parameters()]
    update(policy, torch.optim.SGD(policy.parameters(), 0.5), *make_case(), Config())
    for old, new in zip(before, policy.parameters(), strict=True):
        assert torch.equal(new, old - 0.5 * new.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whether_gradients_are_on_makes_no_difference(mode):
    policies = []
    for off in (False, True):
        policy, (rollout, advantages) = make_policy(), make_case()
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
        with mode() if off else contextlib.nullcontext():
            update(policy, optimizer, rollout, advantages * 1.0, Config(num_envs=N))
        # The second step is an ordinary one, on what the first has left.
        update(policy, optimizer, rollout, advantages, Config(num_envs=N))
        policies.append(policy)
    for plain, other in zip(*(policy.parameters() for policy in policies), strict=True):
        assert torch.equal(plain, other)
        assert torch.equal(plain.grad, other.grad)


def test_gradients_of_an_earlier_update_do_not_add_up():
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    first = update(policy, optimizer, *make_case(), Config())
    second = update(policy, optimizer, *make_case(), Config())
    assert torch.equal(first.grad_norm, second.grad_norm)


def test_clipping_scales_the_gradient_down_to_the_limit_and_reports_what_it_was():
    policy, free = make_policy(), make_policy()
    case = make_case()
    plain = update(free, torch.optim.SGD(free.parameters(), 0.0), *case, Config())
    norm = plain.grad_norm.item()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    clipped = update(policy, optimizer, *case, Config(max_grad_norm=norm / 3))
    assert clipped.grad_norm.item() == pytest.approx(norm)
    for long, short in zip(free.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(short.grad, long.grad / 3, rtol=1e-4, atol=1e-7)
    loose = update(policy, optimizer, *case, Config(max_grad_norm=norm * 3))
    assert loose.grad_norm.item() == pytest.approx(norm)
    for long, same in zip(free.parameters(), policy.parameters(), strict=True):
        assert torch.equal(same.grad, long.grad)


@pytest.mark.parametrize("limit", [0.37, 1e-320, 1e3])
def test_clipping_has_the_bits_of_torchs_own(limit):
    policy, case = make_policy(), make_case()
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    norm = update(policy, optimizer, *case, Config()).grad_norm
    torch.nn.utils.clip_grads_with_norm_(policy.parameters(), limit, norm)
    expected = [p.grad.clone() for p in policy.parameters()]
    update(policy, optimizer, *case, Config(max_grad_norm=limit))
    assert all(map(torch.equal, (p.grad for p in policy.parameters()), expected))


@pytest.mark.parametrize("advantage", [math.inf, 1e30])  # NaN, and a norm beyond float32
def test_a_gradient_that_is_not_finite_changes_nothing(advantage):
    policy = make_policy()
    before = [p.detach().clone() for p in policy.parameters()]
    rollout, advantages = make_case()
    advantages[tuple(rollout.mask.nonzero()[0])] = advantage
    with pytest.raises(FloatingPointError, match=r"left as it was: the .*; scale the rewards"):
        update(policy, torch.optim.SGD(policy.parameters(), 0.5), rollout, advantages, Config())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("advantage", "norm is inf, .*: the largest advantage is 1e.30; scale .* give --normalize"),
        ("advantage of infinity", "the advantage at step 5 of environment 42 is inf, .* beyond"),
        ("entropy", "norm is inf, .*: the largest entropy coefficient is 1e.30; lower --ent-coef"),
        ("parameter", "the largest parameter is 3e.38; lower --learning-rate .now 0.012"),
        ("observation", "the largest observation is 2e.38; scale .* or give --normalize-obs"),
    ],
)
def test_the_setting_to_change_is_that_of_the_largest_number(what, message):
    policy = make_policy()
    rollout, advantages = make_case()
    rollout.mask[5, 2] = True
    rollout.obs[5, 2], advantages[5, 2] = 1.0, 1.0
    settings = {}
    if what == "advantage":
        advantages[5, 2] = -1e30
    elif what == "advantage of infinity":
        advantages[5, 2] = math.inf
        rollout = dataclasses.replace(rollout, stream=Stream(1, 0, 40, N))
    elif what == "entropy":
        settings = {"ent_coef": 1e30}
    elif what == "parameter":
        policy.network[2].weight.data.fill_(-3e38)
    else:
        rollout.obs[5, 2, 1] = -2e38
        policy.network[0].weight.data[0, 1] = policy.network[0].weight.data[1, 1] = 0.0
        policy.activation = "relu"
        policy.network[1] = torch.nn.ReLU()
    with pytest.raises(FloatingPointError, match=message):
        update(
            policy,
            torch.optim.SGD(policy.parameters(), 0.5),
            rollout,
            advantages,
            Config(**settings),
        )


def test_a_step_that_leaves_the_numbers_is_named():
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), 3e38)
    with pytest.raises(
        FloatingPointError, match=r"^network\.\d\.\w+ is -?inf after the step; lower"
    ):
        update(policy, optimizer, *make_case(), Config(reduction="sum"))


def test_a_rollout_without_counted_rows_has_no_gradient():
    policy = make_policy()
    rollout, advantages = make_case()
    rollout.mask[:] = False
    optimizer = torch.optim.SGD(policy.parameters(), 0.5)
    stats = update(policy, optimizer, rollout, advantages, Config(reduction="step", ent_coef=1.0))
    assert (stats.grad_norm.item(), stats.policy_loss.item(), stats.entropy.item()) == (0, 0, 0)


def test_the_way_is_chosen_once_and_can_be_asked_for(backend, monkeypatch):
    served = backend == "machine code"
    auto = choose_learner(make_policy())
    assert (auto.backend, auto.reason) == (("cpu", None) if served else ("reference", "a test"))
    assert str(auto) == ("in machine code" if served else "by autograd: a test")
    asked = choose_learner(make_policy(), "reference")
    assert (asked.backend, str(asked)) == ("reference", "by autograd: as asked")
    if not served:
        with pytest.raises(ValueError, match='backend="cpu": a test; use backend="reference"'):
            choose_learner(make_policy(), "cpu")
    with pytest.raises(
        ValueError, match="backend: expected one of auto, reference, cpu, got 'gpu'"
    ):
        choose_learner(make_policy(), "gpu")
    # What was chosen is done, and nothing asks again.
    taken = []
    auto.prepare(make_policy())
    for name in ("by_autograd", "by_machine_code"):
        real = getattr(update_module, name)
        monkeypatch.setattr(
            update_module,
            name,
            lambda *args, name=name, real=real, **more: taken.append(name) or real(*args, **more),
        )
    monkeypatch.setattr(update_module.policy_cpu, "why_not", None)
    for learner in (auto, asked):
        policy = make_policy()
        learner.update(policy, torch.optim.SGD(policy.parameters(), 0.5), *make_case(), Config())
    assert taken == ["by_machine_code" if served else "by_autograd", "by_autograd"]


ENVIRONMENTS = ["CartPole-v1", "vecpg/LineWorld-v0", "environments:Dials-v0", "environments:Pay-v0"]


@pytest.mark.parametrize("chunk_rows", [1, 7, 4096])
@pytest.mark.parametrize("env_id", ENVIRONMENTS)
def test_what_was_dropped_in_collecting_is_dropped_in_the_update(monkeypatch, env_id, chunk_rows):
    """The log-probabilities that are differentiated are those of the policy that acted."""
    monkeypatch.setattr(update_module, "CHUNK_ROWS", chunk_rows)
    envs = make_envs(env_id, 3, vectorization="sync")
    torch.manual_seed(0)
    policy = Policy(
        envs.single_observation_space,
        envs.single_action_space,
        hidden_sizes=(9, 6),
        dropout=0.5,
        normalize_obs=env_id == "environments:Pay-v0",
    )
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    acted, differentiated = [], []
    real_sample, real_log_probs = policy.sample, policy.log_probs_and_entropy

    def sample(obs, uniforms, dropout=None):
        assert dropout is not None
        actions = real_sample(obs, uniforms, dropout)
        acted.append(real_log_probs(obs, actions, dropout)[0])
        return actions

    def log_probs_and_entropy(*args):
        both = real_log_probs(*args)
        differentiated.append(both[0].detach())
        return both

    monkeypatch.setattr(policy, "sample", sample)
    rollout = collect(envs, policy, num_steps=8, seed=2**40 + 5, iteration=3)
    assert rollout.mask.numel() > 8
    assert not rollout.mask.all()
    monkeypatch.setattr(policy, "log_probs_and_entropy", log_probs_and_entropy)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update(policy, optimizer, rollout, torch.ones(rollout.mask.shape), Config())
    then, now = torch.stack(acted)[rollout.mask], torch.cat(differentiated)
    torch.testing.assert_close(now, then, rtol=1e-5, atol=1e-5)
    other = real_log_probs(rollout.obs[rollout.mask], rollout.actions[rollout.mask])[0]
    assert (other - then).abs().max() > 0.01, "dropping nothing would make a difference"


def test_memory_does_not_grow_with_the_rollout(backend):
    """The largest tensor that a forward pass keeps has one chunk's rows."""
    policy = make_policy(hidden_sizes=(16,))
    rows = 3 * update_module.CHUNK_ROWS
    rollout = Rollout(
        obs=torch.zeros(rows, 1, 3),
        actions=torch.zeros(rows, 1, dtype=torch.int64),
        rewards=torch.zeros(rows, 1),
        terminations=torch.zeros(rows, 1, dtype=bool),
        truncations=torch.zeros(rows, 1, dtype=bool),
        mask=torch.ones(rows, 1, dtype=bool),
        final_obs=torch.zeros(0, 3),
        final_rows=torch.zeros(0, 2, dtype=torch.int64),
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        optimizer = torch.optim.SGD(policy.parameters(), 0.0)
        update(policy, optimizer, rollout, torch.ones(rows, 1), Config(ent_coef=0.1))
    assert max(kept, default=0) <= 16 * update_module.CHUNK_ROWS
    assert bool(kept) == (backend == "autograd")


# -- Action masks --------------------------------------------------------------------------------


def collected_under_masks(of, dropout=0.0):
    envs = make_envs(
        "environments:Masked-v0",
        12,
        vectorization="sync",
        env_kwargs={"of": of},
        action_masks=True,
    )
    torch.manual_seed(1)
    policy = Policy(envs.single_observation_space, envs.single_action_space, dropout=dropout)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rollout = collect(envs, policy, num_steps=8, seed=1, iteration=3, action_masks=True)
    return policy, rollout


@pytest.mark.parametrize("chunk_rows", [7, 4096])
@pytest.mark.parametrize("of", ["Discrete", "MultiDiscrete"])
def test_the_gradient_is_that_of_the_masked_distribution(monkeypatch, of, chunk_rows):
    """By a plain sum over rows and components, of the allowed logits alone, in float64."""
    monkeypatch.setattr(update_module, "CHUNK_ROWS", chunk_rows)
    policy, rollout = collected_under_masks(of)
    space, sizes = policy.distribution.space, policy.distribution.mask_sizes
    advantages = torch.randn(rollout.mask.shape).masked_fill(~rollout.mask, torch.nan)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    stats = update(policy, optimizer, rollout, advantages, Config(ent_coef=0.3))
    exact = copy.deepcopy(policy).double()
    total, entropies = 0.0, 0.0
    counted = rollout.mask.nonzero().tolist()
    for t, n in counted:
        logits = exact.network(rollout.obs[t, n].double())
        taken = (rollout.actions[t, n] - torch.as_tensor(space.start)).reshape(-1).tolist()
        cut = torch.split(logits, sizes), torch.split(rollout.action_masks[t, n], sizes)
        for number, own, allowed in zip(taken, *cut, strict=True):
            assert allowed[number]
            log_z = torch.logsumexp(own[allowed], dim=0)
            log_probs = own[allowed] - log_z
            entropies = entropies - (log_probs.exp() * log_probs).sum()
            total = total - (own[number] - log_z) * advantages[t, n].double() / 12
    exact.zero_grad()
    (total - 0.3 * entropies / len(counted)).backward()
    for ours, theirs in zip(policy.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    assert stats.entropy.item() == pytest.approx(entropies.item() / len(counted), rel=1e-5)
    assert stats.policy_loss.item() == pytest.approx(total.item(), rel=1e-4)


def test_masks_are_learnt_from_by_autograd_and_the_reason_is_said():
    policy, rollout = collected_under_masks("Discrete")
    learner = choose_learner(policy, action_masks=True)
    assert str(learner) == "by autograd: its actions are masked"
    with pytest.raises(ValueError, match='backend="cpu": its actions are masked'):
        choose_learner(policy, "cpu", action_masks=True)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    given = optimizer, rollout, torch.ones(rollout.mask.shape), Config()
    with pytest.raises(ValueError, match='backend="cpu": its actions are masked'):
        update(policy, *given, backend="cpu")
    with pytest.raises(ValueError, match="rollout.action_masks: expected None for a learner in"):
        update(policy, *given, backend=Learner("cpu", None))


def test_masks_and_what_was_dropped_act_together(monkeypatch):
    policy, rollout = collected_under_masks("MultiDiscrete", dropout=0.5)
    found, real = [], policy.log_probs_and_entropy

    def log_probs_and_entropy(obs, actions, dropout, action_mask):
        assert dropout is not None
        found.append(real(obs, actions, dropout, action_mask)[0].detach())
        return real(obs, actions, dropout, action_mask)

    monkeypatch.setattr(policy, "log_probs_and_entropy", log_probs_and_entropy)
    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    update(policy, optimizer, rollout, torch.ones(rollout.mask.shape), Config())
    steps, envs = rollout.mask.nonzero().t()
    dropped = rollout.stream.uniforms_at(steps, envs, Purpose.DROPOUT, policy.dropout_units)
    own = (each[rollout.mask] for each in (rollout.obs, rollout.actions))
    expected = real(*own, dropped, rollout.action_masks[rollout.mask])[0]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
    assert torch.cat(found).isfinite().all()


@pytest.mark.parametrize("most", [2**24, 40_000])
def test_the_gradient_of_convolutions_is_that_of_single_rows(monkeypatch, most):
    """Against the formula of each row in float64; in chunks that are small where pictures are."""
    monkeypatch.setattr(network_module, "_MOST_KEPT", most)
    torch.manual_seed(0)
    policy = Policy(spaces.Box(0, 255, (8, 9, 3), np.uint8), spaces.Discrete(3), hidden_sizes=(6,))
    for parameter in policy.network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rollout, advantages = make_case()
    g = torch.Generator().manual_seed(3)
    obs = torch.randint(0, 256, (T, N, 8, 9, 3), generator=g).to(torch.uint8)
    rollout = dataclasses.replace(rollout, obs=obs)
    config, rows = Config(ent_coef=0.3), rollout.mask.nonzero().tolist()
    exact = copy.deepcopy(policy).double()
    for t, n in rows:
        image = (obs[t, n].double() / 255)[None]
        logits = exact.network(exact.encoder.body(image))[0]
        p = torch.exp(logits - logits.max())
        p = p / p.sum()
        chosen = p[rollout.actions[t, n]].log()
        loss = -chosen * advantages[t, n].double() / N
        loss = loss + config.ent_coef / len(rows) * (p * p.log()).sum()
        loss.backward()
    asked = []
    policy.encoder.register_forward_hook(lambda module, given, output: asked.append(len(output)))
    update(policy, torch.optim.SGD(policy.parameters(), 0.0), rollout, advantages, config)
    for ours, theirs in zip(policy.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)
    assert max(asked) == (len(rows) if most == 2**24 else most // policy.encoder._kept)
