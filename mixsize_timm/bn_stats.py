"""Batch-norm statistics of one model for many image sizes, kept beside its weights."""
import hashlib
import json
import logging
import math
import os
from typing import Any, Dict, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .calibration import calibrated_layers

_logger = logging.getLogger(__name__)

BN_STATS_FILE = 'bn_stats.safetensors'
STATISTICS = ('running_mean', 'running_var')
_NOT_WEIGHTS = (*STATISTICS, 'num_batches_tracked')


class BatchNormStats:
    """The statistics of one model's batch-norm layers at several image sizes.

    The file is a safetensors file of tensors ``[channels]`` named ``SIZE/LAYER.running_mean`` and
    ``SIZE/LAYER.running_var``; its metadata says which weights they belong to, and has their checksum.

    Args:
        weights: Fingerprint of the weights, see :func:`fingerprint`.
    """

    def __init__(self, weights: str) -> None:
        self.weights = weights
        self.by_size: Dict[int, Dict[str, torch.Tensor]] = {}
        self.own: Optional[Dict[str, torch.Tensor]] = None  # of the model, before it was given another size's

    @property
    def sizes(self) -> Tuple[int, ...]:
        """Calibrated sizes in pixels, ascending."""
        return tuple(sorted(self.by_size))

    def add(self, size: int, model: nn.Module) -> None:
        """Keep the statistics of a model that was calibrated for a size in pixels."""
        self.by_size[size] = _statistics(model)

    def digest(self, size: int) -> str:
        """The :func:`digest` of the statistics for a size."""
        return _digest(self.by_size[size])

    def nearest(self, size: int) -> int:
        """The calibrated size with the smallest ratio to ``size``; the larger of two."""
        return min(self.by_size, key=lambda other: (abs(math.log(other / size)), -other))

    def attach(self, model: nn.Module) -> bool:
        """Let :func:`model_at` switch a model; false, with a warning, where its weights are not those of the file."""
        if self.weights != fingerprint(model):
            _logger.warning('The batch-norm statistics kept beside the weights are of other weights, and left out: '
                            'mixsize calibrate makes them again')
            return False
        self.own = _statistics(model)
        model.bn_stats = self  # type: ignore[assignment]
        return True

    def apply(self, model: nn.Module, size: Optional[int]) -> None:
        """Give a model the statistics of the calibrated size nearest to ``size``, or with ``None`` its own again.

        Raises:
            ValueError: The layers of the model are others.
        """
        if size is None:
            statistics = self.own or {}
        else:
            nearest = self.nearest(size)
            if nearest != size:
                _logger.warning('Not calibrated for %d px: the statistics of %d px are used; mixsize calibrate makes '
                                'those of %d px', size, nearest, size)
            statistics = {**(self.own or {}), **self.by_size[nearest]}  # not those of a size that was applied before
        buffers = dict(model.named_buffers())
        for name, tensor in statistics.items():
            if name not in buffers or buffers[name].shape != tensor.shape:
                raise ValueError(f'the statistics are of another model: {name} does not fit {type(model).__name__}')
        for name, tensor in statistics.items():
            buffers[name].copy_(tensor)

    def save(self, path: str, *, keep_others: bool = False) -> None:
        """Write the file; one that stood there is replaced when the new one is whole.

        Args:
            path: The file.
            keep_others: Keep the sizes of a file that stood there and is of the same weights and layers.
        """
        if keep_others and os.path.exists(path):
            there = BatchNormStats.load(path)
            if there.weights == self.weights:
                layers = {name for statistics in self.by_size.values() for name in statistics}
                others = {size: statistics for size, statistics in there.by_size.items() if set(statistics) == layers}
                if len(others) < len(there.by_size):
                    _logger.warning('Statistics in %s are of other layers of the model, and are not kept', path)
                self.by_size = {**others, **self.by_size}
        tensors = {f'{size}/{name}': tensor for size, statistics in self.by_size.items()
                   for name, tensor in statistics.items()}
        save_file(tensors, path + '.new', metadata={
            'format': 'pt', 'weights': self.weights, 'sizes': json.dumps(self.sizes), 'sha256': _sha256(tensors)})
        os.replace(path + '.new', path)

    @classmethod
    def load(cls, path: str) -> 'BatchNormStats':
        """Read the file.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not readable, or was altered.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f'no statistics at {path}')
        try:
            with safe_open(path, 'pt') as file:
                metadata = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dictionary
            stats = cls(metadata['weights'])
            if metadata.get('sha256', checksum := _sha256(tensors)) != checksum:
                raise ValueError('they were altered')
            for key, tensor in tensors.items():
                size, name = key.split('/', 1)
                if not torch.isfinite(tensor).all() or (name.endswith('running_var') and (tensor < 0).any()):
                    raise ValueError(f'{key} has values that no statistics have')
                stats.by_size.setdefault(int(size), {})[name] = tensor
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f'the statistics {path} are not readable: {" ".join(str(error).split())}') from error
        return stats


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's weights, without its batch-norm statistics: tells whether statistics belong to them."""
    return _sha256({name: tensor for name, tensor in model.state_dict().items()
                    if name.rpartition('.')[2] not in _NOT_WEIGHTS})


def digest(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a model's batch-norm statistics: tells results' origin."""
    return _digest(_statistics(model))


def _digest(statistics: Dict[str, torch.Tensor]) -> str:
    return _sha256(statistics)[:16]


def _sha256(tensors: Dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and values; a copy in another floating-point type is the same."""
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values: Any = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        result.update(f'{name} {tuple(values.shape)}'.encode())
        result.update(values.contiguous().flatten().view(torch.uint8).numpy())
    return result.hexdigest()


def model_at(model: nn.Module, img_size: Optional[int]) -> nn.Module:
    """Switch a model that :func:`mixsize_timm.load` gave to the statistics of another size, without reloading.

    Args:
        model: The model; its statistics and the input size in its ``pretrained_cfg`` change in place.
        img_size: Size in pixels; ``None`` for the statistics that the weights were saved with.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no statistics beside its own.
    """
    stats: Any = getattr(model, 'bn_stats', None)
    if stats is not None:
        stats.apply(model, img_size)
    elif calibrated_layers(model):  # else nothing depends on the size
        raise ValueError('the model has no statistics for other sizes: take it from mixsize_timm.load, and make them '
                         'with mixsize calibrate')
    if img_size is not None:
        set_input_size(model, img_size)
    return model


def input_size(model: Any) -> int:
    """The image size in pixels (of an oblong one the width) that a timm model says it is meant for."""
    return model.pretrained_cfg['input_size'][-1]


def set_input_size(model: Any, img_size: int) -> None:
    """Let a timm model say that it is meant for square images of a size in pixels."""
    channels = model.pretrained_cfg['input_size'][0]
    model.pretrained_cfg.update(input_size=(channels, img_size, img_size), test_input_size=None)


def _statistics(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Copies of the statistics of the layers that calibration serves, on the CPU."""
    layers = calibrated_layers(model).items()
    return {f'{layer}.{name}': tensor.detach().to('cpu', copy=True) for layer, module in layers
            for name in STATISTICS if (tensor := getattr(module, name, None)) is not None}
