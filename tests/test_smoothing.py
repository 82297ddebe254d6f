"""Gradient smoothing: the rule, and what must not disturb it."""
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from hypothesis import given
from hypothesis import strategies as st

from mixsize_timm.smoothing import GradientSmoother


def parameters_with(*grads):
    result = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.zeros_like(grad))
        parameter.grad = grad.clone()
        result.append(parameter)
    return result


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0, 0.99))
def test_follows_the_rule(norms, momentum):
    smoother = GradientSmoother(momentum)
    running = None
    for norm in norms:
        direction = torch.tensor([3.0, 4.0, 12.0, 84.0], dtype=torch.float64) / 85
        grads = (direction[:1] * norm, direction[1:] * norm)
        parameters = parameters_with(*grads)
        result = smoother(parameters)
        first = running is None
        running = norm if first else momentum * running + (1 - momentum) * norm
        factor = 1.0 if first else running / (norm + 1e-6)
        assert result.norm.item() == pytest.approx(norm, rel=1e-5)
        assert result.smoothed.item() == pytest.approx(norm * factor, rel=1e-5)
        for parameter, grad in zip(parameters, grads):
            torch.testing.assert_close(parameter.grad, grad * factor, rtol=1e-5, atol=1e-8)
        assert smoother.state_dict()['running_norm'] == pytest.approx(running, rel=1e-5)


def test_the_first_step_is_left_as_it_is():
    grad = torch.randn(7, 3)
    parameters = parameters_with(grad)
    GradientSmoother()(parameters)
    assert torch.equal(parameters[0].grad, grad)


@pytest.mark.parametrize('bad', [float('inf'), float('nan')])
@pytest.mark.parametrize('first', [True, False])
def test_a_norm_that_is_not_finite_is_left_out(bad, first):
    smoother = GradientSmoother()
    if not first:
        smoother(parameters_with(torch.ones(4)))
    before = smoother.state_dict()
    broken = parameters_with(torch.tensor([1.0, bad]), torch.ones(2))
    smoother(broken)
    after = smoother.state_dict()
    assert torch.equal(broken[1].grad, torch.ones(2))
    assert str(after) == str(before)
    smoother(parameters_with(torch.ones(4)))
    assert smoother.state_dict()['running_norm'] == pytest.approx(2.0)


def test_state_continues_exactly():
    grads = [torch.randn(50) for _ in range(6)]
    straight, first = GradientSmoother(), GradientSmoother()
    for grad in grads[:3]:
        straight(parameters_with(grad))
        first(parameters_with(grad))
    second = GradientSmoother()
    second.load_state_dict(first.state_dict())
    for grad in grads[3:]:
        a, b = parameters_with(grad), parameters_with(grad)
        straight(a)
        second(b)
        assert torch.equal(a[0].grad, b[0].grad)


def test_parameters_without_a_gradient_and_other_dtypes():
    half = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    half.grad = torch.ones(4, dtype=torch.bfloat16)
    smoother = GradientSmoother()
    result = smoother([torch.nn.Parameter(torch.zeros(3)), half])
    assert result.norm.dtype == torch.float32 and result.norm.item() == pytest.approx(2)


def test_it_never_waits_for_the_device():
    """On the meta device a tensor has no value, so reading one would fail."""
    parameter = torch.nn.Parameter(torch.zeros(4, device='meta'))
    parameter.grad = torch.zeros(4, device='meta')
    smoother = GradientSmoother()
    smoother.running_norm = smoother.running_norm.to('meta')
    assert smoother([parameter]).norm.device.type == 'meta'


@pytest.mark.parametrize('momentum', [-0.1, 1.0, 2])
def test_momentum_out_of_range(momentum):
    with pytest.raises(ValueError, match='momentum'):
        GradientSmoother(momentum)


class Scaled:
    """A parameter trained under loss scaling, as Accelerate's optimizer does it, with an explicit scaler on the CPU."""

    def __init__(self, scale, momentum=0.5):
        Accelerator(cpu=True)  # its optimizer asks for the state
        self.parameter = torch.nn.Parameter(torch.zeros(4))
        self.scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        self.inner = torch.optim.SGD([self.parameter], lr=1.0)
        self.optimizer = AcceleratedOptimizer(self.inner, scaler=self.scaler)
        self.smoother = GradientSmoother(momentum)

    def step(self, grad, clip=None):
        """Unscale, smooth, clip, step."""
        self.scaler.scale((self.parameter * grad).sum()).backward()
        self.scaler.unscale_(self.inner)
        norms = self.smoother([self.parameter])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([self.parameter], clip)
        before = self.parameter.detach().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms, (self.parameter.detach() - before).norm().item()


def test_an_overflow_skips_the_optimizer_and_the_running_norm_and_lowers_the_scale():
    scaled = Scaled(2.0**10)
    scaled.step(torch.ones(4))
    assert not scaled.optimizer.step_was_skipped
    norms, moved = scaled.step(torch.full((4,), 3e38))  # finite, and not once it is scaled
    assert scaled.optimizer.step_was_skipped and not norms.norm.isfinite()
    assert moved == 0 and scaled.scaler.get_scale() == 2.0**9
    assert scaled.smoother.state_dict()['running_norm'] == pytest.approx(2)
    norms, moved = scaled.step(torch.full((4,), 2.0))
    assert not scaled.optimizer.step_was_skipped and scaled.scaler.get_scale() == 2.0**9
    assert norms.norm.item() == pytest.approx(4) and moved == pytest.approx(3)  # the mean of 2 and 4


@pytest.mark.parametrize('scale', [1.0, 2.0**16])
def test_unscaled_then_smoothed_then_clipped(scale):
    scaled = Scaled(scale)
    scaled.step(torch.ones(4))
    norms, moved = scaled.step(torch.full((4,), 5.0), clip=1.5)
    assert (norms.norm.item(), norms.smoothed.item()) == (pytest.approx(10), pytest.approx(6))
    assert moved == pytest.approx(1.5)
    assert scaled.smoother.state_dict()['running_norm'] == pytest.approx(6)  # clipping does not reach it
