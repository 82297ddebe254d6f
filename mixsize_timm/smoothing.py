"""Gradient smoothing: one gradient norm for steps of many sizes."""
from collections import defaultdict
from typing import Dict, Iterable, List, NamedTuple

import torch
from torch.distributed.tensor import DTensor


class GradientNorms(NamedTuple):
    """Norms of one step, as tensors on the gradients' device: reading them waits for it."""
    norm: torch.Tensor  # global L2 norm of the gradient as it came, float32 []
    smoothed: torch.Tensor  # its norm after smoothing, float32 []


class GradientSmoother:
    """Scales each step's gradient to the running mean of gradient norms.

    With ``g`` the global L2 norm, the running norm starts at the first ``g``, whose step is left as it is. Then
    ``n = momentum * n + (1 - momentum) * g`` and the gradient is multiplied by ``n / (g + 1e-6)``. A step whose norm
    is not finite changes neither the running norm nor the gradient. Call it after ``backward`` (under data
    parallelism the gradient is averaged then; under loss scaling, unscale first) and before clipping and
    ``optimizer.step()``. Nothing in it waits for the device. Gradients that are sharded (``fully_shard``) are measured
    over all processes, so that all of them must call it.

    Source: arXiv 1908.08986, and the authors' reference code.

    Args:
        momentum: Weight of the running norm, in [0, 1).

    Raises:
        ValueError: ``momentum`` is out of range.

    Example:
        >>> smoother = GradientSmoother()
        >>> loss.backward()
        >>> smoother(model.parameters())
        >>> optimizer.step()
    """

    def __init__(self, momentum: float = 0.9) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f'momentum must be in [0, 1), not {momentum}')
        self.momentum = momentum
        self.running_norm = torch.tensor(float('nan'))  # not a number until the first step

    @torch.no_grad()
    def __call__(self, parameters: Iterable[torch.Tensor]) -> GradientNorms:
        """Smooth the gradients of ``parameters`` in place; those without a gradient are passed over."""
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(grads)).float()
        running = self.running_norm.to(norm.device, non_blocking=True)  # from the CPU, at the first step
        first = running.isnan()
        smoothed = torch.where(first, norm, self.momentum * running + (1 - self.momentum) * norm)
        finite = norm.isfinite()
        self.running_norm = torch.where(finite, smoothed, running)
        scale = torch.where(finite & ~first, smoothed / (norm + 1e-6), 1.0)
        _scale([_own(grad) for grad in grads], scale)
        return GradientNorms(norm, norm * scale)

    def state_dict(self) -> dict:
        """The running norm; a float, not a number before the first step."""
        return {'running_norm': self.running_norm.item()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.running_norm = torch.tensor(float(state['running_norm']))


def _whole(norm: torch.Tensor) -> torch.Tensor:
    """A norm over all processes, where that of sharded gradients is a sum still to be made."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _own(grad: torch.Tensor) -> torch.Tensor:
    """The part of a gradient that this process has, in the same memory."""
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _scale(grads: List[torch.Tensor], scale: torch.Tensor) -> None:
    by_device: Dict[torch.device, List[torch.Tensor]] = defaultdict(list)
    for grad in grads:
        by_device[grad.device].append(grad)
    for device, group in by_device.items():
        torch._foreach_mul_(group, scale.to(device))
