"""Batch-norm statistics for one image size.

Running statistics gathered over mixed sizes fit none of them, so a model is calibrated for the size it is used at.
"""
import copy
import logging
from itertools import islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

import torch
from timm.layers import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

_logger = logging.getLogger(__name__)

VARIANCES = ('population', 'batch')
# Layers that keep the mean and variance of what they are given, over all but the channels
_SERVED = (_BatchNorm, EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, InplaceAbn)


@torch.no_grad()
def calibrate(
        model: nn.Module,
        loader: Iterable[Any],
        num_batches: Optional[int] = None,
        *,
        variance: str = 'population',
        reduce: Optional[Callable[[torch.Tensor], torch.Tensor]] = None,
        frozen: bool = False,
) -> nn.Module:
    """A copy of a model with batch-norm statistics computed afresh over a loader's images (arXiv 1908.08986).

    Each batch is normalised with its own statistics, as in training, but dropout and stochastic depth are off as they
    will be in use, which ``torch.optim.swa_utils.update_bn`` does not do. A batch counts for its number of images; a
    lone image, which has no variance in a layer of one pixel, is joined with the next batch. Layers that were frozen
    on purpose (affine parameters that all have ``requires_grad`` false, or momentum 0) keep their statistics, and
    layers with running statistics of an unknown kind are named in a warning. Without batch norm it is a plain copy.

    Args:
        model: The model, on any device and in any floating-point type; it is not touched.
        loader: Gives training images at the size of use: tensors ``[N, C, S, S]``, or tuples that start with one.
        num_batches: Stop after this many; all of the loader by default.
        variance: ``population``, over all images, which adds the variance of the batches' means to the mean of their
            variances; or ``batch``, the latter alone, as the authors' reference code has it.
        reduce: Sums a tensor over processes, each with batches of its own; all must call.
        frozen: Serve layers with frozen affine parameters too, whose statistics moved in training all the same. No
            parameter of the copy requires a gradient then.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: ``num_batches`` is under 1, the loader gave no batch to a model that needs one, or a variance is
            beyond what the model's type can hold.

    Example:
        >>> loader = timm.data.create_loader(dataset, (3, 160, 160), 64, is_training=True)
        >>> model_160 = calibrate(model, loader, num_batches=200)
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, not {num_batches}')
    if variance not in VARIANCES:
        raise ValueError(f'variance must be one of {", ".join(VARIANCES)}, not {variance!r}')
    model = copy.deepcopy(model).eval()
    if frozen:
        model.requires_grad_(False)
    layers = calibrated_layers(model)
    warn_of_unserved(model)
    if not layers:
        return model
    moments = {layer: _Moments(layer, variance) for layer in layers.values()}
    hooks = [layer.register_forward_pre_hook(part.observe) for layer, part in moments.items()]
    parameter: Any = next(model.parameters())
    for images in _without_lone_images(islice(loader, num_batches)):
        model(images.to(parameter.device, parameter.dtype, non_blocking=True))
    for hook in hooks:
        hook.remove()
    observed = [part.finish(reduce) for part in moments.values()]
    if not any(observed):
        raise ValueError('the loader gave no batch to calibrate on: lower its batch size or add images')
    return model


def calibrated_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """The layers, by name, whose statistics :func:`calibrate` computes; without any there is nothing to calibrate."""
    in_training = any(p.requires_grad for p in model.parameters())  # else nothing was frozen on purpose
    return {name: m for name, m in model.named_modules()
            if isinstance(m, _SERVED) and getattr(m, 'running_var', None) is not None
            and getattr(m, 'momentum', None) != 0 and not (in_training and _frozen(m))}


def _frozen(layer: Any) -> bool:
    affine = [p for p in (getattr(layer, 'weight', None), getattr(layer, 'bias', None)) if p is not None]
    return bool(affine) and not any(p.requires_grad for p in affine)


def warn_of_unserved(model: nn.Module) -> None:
    """Name the layers with running statistics that :func:`calibrate` cannot serve."""
    # timm's and torchvision's FrozenBatchNorm2d are frozen by what they are
    unserved: List[str] = [
        f'{name} ({type(m).__name__})' for name, m in model.named_modules()
        if getattr(m, 'running_var', None) is not None and not isinstance(m, _SERVED)
        and not type(m).__name__.startswith('Frozen')
    ]
    if unserved:
        _logger.warning('Not calibrated, for they keep running statistics of another kind: %s', ', '.join(unserved))


class _Moments:
    """Moments of what one layer is given, from batch to batch; the layer in evaluation mode normalises with each's."""

    def __init__(self, layer: Any, variance: str) -> None:
        self.layer = layer
        self.population = variance == 'population'
        self.mean, self.within, self.between = (  # of the means; of the variances; squared deviation of the means
            torch.zeros_like(layer.running_var, dtype=torch.float32) for _ in range(3))
        self.images, self.values, self.batches = (torch.zeros((), device=self.mean.device) for _ in range(3))

    def observe(self, layer: Any, inputs: Any) -> None:
        images = inputs[0].detach()
        mean, var = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        count = images.numel() // len(mean)
        if count > 1:
            F.batch_norm(images.float(), mean, var, training=True, momentum=1.)
        else:
            mean.copy_(images.flatten())
        biased = var * ((count - 1) / count)
        self._set(mean, biased)
        self.images += len(images)
        self.values += count
        self.batches += 1
        share, deviation = len(images) / self.images, mean - self.mean
        self.mean += deviation * share
        self.within += ((biased if self.population else var) - self.within) * share
        self.between += deviation**2 * (len(images) * (1 - share))

    def finish(self, reduce: Optional[Callable[[torch.Tensor], torch.Tensor]]) -> bool:
        """Give the layer the statistics over all batches of all processes; false where there was none."""
        if reduce is not None:
            own_images, own_mean = self.images, self.mean
            self.images, self.values, self.batches = reduce(torch.stack([self.images, self.values, self.batches]))
            weight = own_images / self.images.clamp(min=1)
            self.mean, self.within = reduce(torch.stack([own_mean, self.within]) * weight)
            self.between = reduce(self.between + own_images * (own_mean - self.mean)**2)
        if not self.batches:
            return False
        var = self.within
        if self.population:
            var = (var + self.between / self.images) * (self.values / (self.values - 1).clamp(min=1))
        self._set(self.mean, var)
        if var.isfinite().all() and not self.layer.running_var.isfinite().all():
            raise ValueError(f'a variance is beyond {str(self.layer.running_var.dtype).split(".")[-1]}: calibrate the '
                             'model in float32 or bfloat16')
        if getattr(self.layer, 'num_batches_tracked', None) is not None:
            self.layer.num_batches_tracked.fill_(self.batches)
        return True

    def _set(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        self.layer.running_var.copy_(var)
        if getattr(self.layer, 'running_mean', None) is not None:
            self.layer.running_mean.copy_(mean)


def _without_lone_images(loader: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The images of a loader's batches; one that is alone comes with the next batch, or not at all behind others."""
    lone, given = None, False
    for batch in loader:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        if lone is not None:
            images = torch.cat([lone, images])
        lone = images if len(images) == 1 else None
        if lone is None:
            given = True
            yield images
    if lone is not None and not given:
        yield lone
