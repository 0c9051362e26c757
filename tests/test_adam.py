import copy

import pytest
import torch

from vecpg.adam import Adam

SHAPES = [(), (1,), (5,), (3, 4), (64, 33), (2, 1, 3), (0,)]


def make_parameters(dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    # Every other one is a view whose rows do not lie one behind the other.
    parameters = [torch.randn(shape, generator=g, dtype=dtype) for shape in shapes]
    parameters[3::2] = [each.mT.contiguous().mT for each in parameters[3::2]]
    return [each.requires_grad_() for each in parameters]


def give_gradients(ours, theirs, seed):
    """Of sizes from 1e-9 to 1e9, the same to both; a third of the parameters gets none."""
    g = torch.Generator().manual_seed(seed)
    for one, other in zip(ours, theirs, strict=True):
        size = 10.0 ** torch.randint(-9, 10, (), generator=g).item()
        gradient = size * torch.randn(one.shape, generator=g, dtype=one.dtype)
        none = bool(torch.rand((), generator=g) < 1 / 3)
        one.grad = None if none else gradient
        other.grad = None if none else gradient.clone()


def check_equal(ours, theirs):
    """Bit for bit, and structure for structure."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            check_equal(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check_equal(one, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"lr": 0.3, "betas": (0.5, 0.99), "eps": 0.01}])
def test_steps_and_state_are_torchs_bit_for_bit(dtype, settings):
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    adam, reference = Adam(ours, **settings), torch.optim.Adam(theirs, **settings)
    check_equal(adam.state_dict()["param_groups"], reference.state_dict()["param_groups"])
    for k in range(300):
        give_gradients(ours, theirs, seed=k)
        adam.step()
        reference.step()
        check_equal(ours, theirs)
    state = adam.state_dict()
    check_equal(state, reference.state_dict())
    assert len({one["step"].item() for one in state["state"].values()}) > 1


def test_one_step_is_the_formula():
    weights = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    adam = Adam([weights], lr=0.1, betas=(0.8, 0.9), eps=0.5)
    mean = square = 0.0
    value = 3.0
    for t, gradient in enumerate([2.0, -1.0, 0.25], start=1):
        weights.grad = torch.tensor([gradient], dtype=torch.float64)
        adam.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * gradient**2
        value -= 0.1 * mean / (1 - 0.8**t) / ((square / (1 - 0.9**t)) ** 0.5 + 0.5)
        assert weights.item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("towards", ["torch", "ours"])
def test_a_state_is_taken_over_in_mid_course(towards):
    """The learning rate that was saved goes on too. What is loaded is a copy."""
    ours, theirs = make_parameters(), make_parameters()
    before = (torch.optim.Adam if towards == "ours" else Adam)(ours, lr=0.02)
    for k in range(7):
        give_gradients(ours, theirs, seed=k)
        before.step()
    theirs = [each.detach().clone().requires_grad_() for each in ours]
    after = (Adam if towards == "ours" else torch.optim.Adam)(theirs, lr=0.5)
    saved = copy.deepcopy(before.state_dict())
    after.load_state_dict(saved)
    for one in saved["state"].values() if towards == "ours" else ():
        one["exp_avg"].fill_(torch.nan)
        one["exp_avg_sq"].fill_(torch.nan)
    for k in range(7, 14):
        give_gradients(ours, theirs, seed=k)
        before.step()
        after.step()
        check_equal(ours, theirs)


def test_a_copy_goes_on_by_itself():
    """Whatever the copy had, and in whichever order its parameters came to make a step."""
    ours, theirs = make_parameters(), make_parameters()
    adam, other = Adam(ours), Adam(theirs)
    ours[3].grad = torch.ones_like(ours[3])
    adam.step()
    kept = adam.state_dict()["state"][3]["exp_avg"]
    theirs[5].grad = torch.ones_like(theirs[5])
    for k in range(5):
        other.step()
        give_gradients(make_parameters(), theirs, seed=k)
    wanted = copy.deepcopy(other.state_dict())
    adam.copy_from(other)
    give_gradients(make_parameters(), theirs, seed=5)
    other.step()
    assert adam.state_dict()["state"][3]["exp_avg"] is kept
    for place, one in wanted["state"].items():
        check_equal(adam.state_dict()["state"][place], one)
    assert len(adam.state_dict()["state"]) == len(wanted["state"])


def test_one_that_resumes_steps_like_the_one_whose_averages_it_has():
    mine, theirs = make_parameters(), make_parameters()
    adam, other = Adam(mine), Adam(theirs)
    for one, own in zip(mine, theirs, strict=True):
        one.grad, own.grad = torch.ones_like(one), torch.full_like(own, 0.5)
    for _ in range(3):
        other.step()
    adam.step()
    kept = adam.state_dict()["state"][0]["exp_avg"]
    averages = other.averages()
    middle = len(averages) // 2
    adam.resume(3, averages[:middle], averages[middle:])
    assert adam.state_dict()["state"][0]["exp_avg"] is kept
    check_equal(adam.state_dict()["state"], other.state_dict()["state"])
    adam.resume(0, averages[:middle], averages[middle:])
    assert adam.state_dict()["state"] == {}
    # From there on it is a new one.
    fresh = [each.detach().clone().requires_grad_() for each in mine]
    new = Adam(fresh)
    for one, own in zip(mine, fresh, strict=True):
        own.grad = one.grad
    adam.step()
    new.step()
    check_equal([each.detach() for each in mine], [each.detach() for each in fresh])


def test_a_parameter_without_a_gradient_stays():
    parameters = make_parameters()
    adam = Adam(parameters)
    before = [each.detach().clone() for each in parameters]
    adam.step()
    check_equal([each.detach() for each in parameters], before)
    assert adam.state_dict()["state"] == {}


def test_gradients_are_dropped_or_zeroed():
    parameters = make_parameters()
    adam = Adam(iter(parameters))
    give_gradients(parameters, make_parameters(), seed=0)
    parameters[1].grad = None
    had = [each.grad is not None for each in parameters]
    adam.zero_grad(set_to_none=False)
    assert [each.grad is not None for each in parameters] == had
    assert all(each.grad is None or not each.grad.any() for each in parameters)
    adam.zero_grad()
    assert all(each.grad is None for each in parameters)


def test_the_state_of_something_else_is_refused_and_nothing_changes():
    ours, theirs = make_parameters(), make_parameters()
    adam = Adam(ours, lr=0.02)
    give_gradients(ours, theirs, seed=0)
    adam.step()
    before = copy.deepcopy(adam.state_dict())

    def saved(parameters, **settings):
        other = torch.optim.Adam(parameters, **settings)
        for each in parameters:
            each.grad = torch.ones_like(each)
        other.step()
        return other.state_dict()

    with pytest.raises(ValueError, match=r"one group of 7 parameters, got groups of \[6\]"):
        adam.load_state_dict(saved(theirs[1:]))
    split = [{"params": theirs[:3]}, {"params": theirs[3:]}]
    with pytest.raises(ValueError, match=r"one group of 7 parameters, got groups of \[3, 4\]"):
        adam.load_state_dict(torch.optim.Adam(split).state_dict())
    wrong = make_parameters(shapes=[*SHAPES[:-1], (2,)])
    with pytest.raises(ValueError, match=r"exp_avg 6 of shape \(0,\), got \(2,\)"):
        adam.load_state_dict(saved(wrong))
    for setting in ({"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}):
        (name,) = setting
        with pytest.raises(ValueError, match=f"expected {name} "):
            adam.load_state_dict(saved(theirs, **setting))
    check_equal(adam.state_dict(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_too():
    ours = [each.detach().cuda().requires_grad_() for each in make_parameters()]
    theirs = [each.detach().cuda().requires_grad_() for each in make_parameters()]
    adam, reference = Adam(ours), torch.optim.Adam(theirs)
    for k in range(20):
        for one, other in zip(ours, theirs, strict=True):
            g = torch.Generator().manual_seed(k)
            one.grad = torch.randn(one.shape, generator=g).cuda()
            other.grad = one.grad.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            adam.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        reference.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    for one in adam.state_dict()["state"].values():
        assert one["exp_avg"].is_cuda
        assert not one["step"].is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_size_beyond_the_parameters_changes_nothing(dtype):
    """Torch's own refuses it too, but only after its averages have changed."""
    largest = torch.finfo(dtype).max
    parameters = make_parameters(dtype)
    before = [each.detach().clone() for each in parameters]
    for lr in (largest / 5, 1e308):
        adam = Adam(parameters, lr)
        for each in parameters:
            each.grad = torch.ones_like(each)
        with pytest.raises(FloatingPointError, match="^Adam's step size overflows to"):
            adam.step()
        assert adam.state_dict()["state"] == {}
        check_equal([each.detach() for each in parameters], before)
    Adam(parameters, largest / 11).step()


def test_the_averages_are_those_of_the_state():
    parameters = make_parameters()
    adam = Adam(parameters)
    assert adam.averages() == []
    give_gradients(parameters, make_parameters(), seed=1)
    adam.step()
    state = adam.state_dict()["state"].values()
    kept = [one["exp_avg"] for one in state] + [one["exp_avg_sq"] for one in state]
    assert [id(each) for each in adam.averages()] == [id(each) for each in kept]
