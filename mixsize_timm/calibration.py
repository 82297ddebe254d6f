"""Batch-norm statistics for one image size.

Running statistics gathered over mixed sizes fit none of them, so a model is calibrated for the size it is used at.
"""
import copy
import logging
from itertools import islice
from typing import Any, Iterable, List, Optional

import torch
from timm.layers import SplitBatchNorm2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_logger = logging.getLogger(__name__)


def calibrate(model: nn.Module, loader: Iterable[Any], num_batches: Optional[int] = None) -> nn.Module:
    """A copy of a model with batch-norm statistics computed afresh over a loader's images.

    Cumulative averages of the statistics of each batch (arXiv 1908.08986, and the authors' reference code). Only the
    batch-norm layers are in training mode, so dropout and stochastic depth are off as they will be in use, which
    ``torch.optim.swa_utils.update_bn`` does not do. Layers frozen on purpose (affine parameters that all have
    ``requires_grad`` false, or momentum 0) keep their statistics, and layers with running statistics of another
    kind, which cannot be averaged this way, are named in a warning. Without batch norm it is a plain copy.

    Args:
        model: The model; it is not touched.
        loader: Gives training images at the size of use: tensors ``[N, C, S, S]``, or tuples that start with one.
            Batches should be of one length; a short last one would count as much as the others.
        num_batches: Stop after this many; all of the loader by default.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: ``num_batches`` is under 1, or the loader gave no batch to a model that needs one.

    Example:
        >>> loader = timm.data.create_loader(dataset, (3, 160, 160), 64, is_training=True)
        >>> model_160 = calibrate(model, loader, num_batches=200)
    """
    if num_batches is not None and num_batches < 1:
        raise ValueError(f'num_batches must be at least 1, not {num_batches}')
    model = copy.deepcopy(model).eval()
    layers = calibrated_layers(model)
    warn_of_unserved(model)
    if not layers:
        return model
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    _forward_all(model, loader, num_batches)
    for layer, momentum in zip(layers, momenta):
        layer.momentum = momentum
    return model.eval()


def calibrated_layers(model: nn.Module) -> List[_BatchNorm]:
    """The layers whose statistics :func:`calibrate` computes; without any there is nothing to calibrate."""
    split = {id(part) for m in model.modules() if isinstance(m, SplitBatchNorm2d) for part in m.modules()}
    in_training = any(p.requires_grad for p in model.parameters())  # else nothing was frozen on purpose
    return [m for m in model.modules()
            if isinstance(m, _BatchNorm) and m.track_running_stats and id(m) not in split
            and not (in_training and _frozen(m))]


@torch.no_grad()
def _forward_all(model: nn.Module, loader: Iterable[Any], num_batches: Optional[int]) -> None:
    parameter = next(model.parameters())
    count = 0
    for batch in islice(loader, num_batches):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        model(images.to(parameter.device, parameter.dtype, non_blocking=True))
        count += 1
    if not count:
        raise ValueError('the loader gave no batch to calibrate on: lower its batch size or add images')


def _frozen(layer: _BatchNorm) -> bool:
    affine = [p for p in (layer.weight, layer.bias) if p is not None]
    return layer.momentum == 0 or (bool(affine) and not any(p.requires_grad for p in affine))


def warn_of_unserved(model: nn.Module) -> None:
    """Name the layers with running statistics that :func:`calibrate` cannot serve."""
    # timm's and torchvision's FrozenBatchNorm2d are frozen by what they are
    unserved: List[str] = [
        f'{name} ({type(m).__name__})' for name, m in model.named_modules()
        if getattr(m, 'running_var', None) is not None and not type(m).__name__.startswith('Frozen')
        and (isinstance(m, SplitBatchNorm2d) or not isinstance(m, _BatchNorm))
    ]
    if unserved:
        _logger.warning('Not calibrated, for they keep running statistics of another kind: %s', ', '.join(unserved))
