"""Regularisation that grows with the image size."""
import re
from typing import Any, Dict, List, Optional, Tuple

from timm.layers import DropBlock2d, DropPath
from torch import nn

MAX_DROP = 0.99


class SizeRegularization:
    """Regularises large images more and small ones less.

    Whatever is scaled is multiplied by ``1 + strength (size / base_size - 1)``, at least 0: with strength 1, in
    proportion to the size. At the base size everything is as it was asked for. The idea is that of EfficientNetV2's
    progressive learning (arXiv 2104.00298, section 4): a small image holds less to overfit to, and strong
    regularisation hurts there.

    Args:
        strength: 0 leaves everything as it is.
        base_size: Image size in pixels that the settings are meant for.
        model: Its dropout and stochastic depth are set by :meth:`set_size`.
        mixup: timm's ``Mixup`` or ``FastCollateMixup``, whose alphas are set by :meth:`set_size`.

    Raises:
        ValueError: ``strength`` is negative.
    """

    def __init__(self, strength: float, base_size: int, model: Optional[nn.Module] = None, mixup: Any = None) -> None:
        if strength < 0:
            raise ValueError(f'strength must not be negative, not {strength}')
        self.strength = strength
        self.base_size = base_size
        self._rates: List[Tuple[Any, str, float]] = []
        for module in model.modules() if model is not None else ():
            self._rates += [(module, name, rate) for name, rate in _drop_rates(module).items() if rate]
        self._mixup = mixup
        self._mixing = {name: getattr(mixup, name) for name in ('mixup_alpha', 'cutmix_alpha', 'cutmix_minmax')
                        if getattr(mixup, name, None)}

    def factor(self, size: int) -> float:
        """What the settings are multiplied by at an image size in pixels."""
        return max(0., 1 + self.strength * (size / self.base_size - 1))

    def set_size(self, size: int) -> None:
        """Set dropout, stochastic depth and mixup for images of a size in pixels."""
        factor = self.factor(size)
        for module, name, rate in self._rates:
            setattr(module, name, min(rate * factor, MAX_DROP))
        for name, value in self._mixing.items():
            if name == 'cutmix_minmax':
                value = tuple(min(part * factor, 1.) for part in value)
            else:  # Beta(0, 0) cannot be drawn from; close to it nothing is mixed
                value = max(value * factor, 1e-3)
            setattr(self._mixup, name, value)

    def augmentation(self, size: int, auto_augment: Optional[str], color_jitter: Any) -> Dict[str, Any]:
        """Arguments of timm's ``create_transform`` for images of a size in pixels.

        Args:
            size: Image size.
            auto_augment: timm's string. The magnitude of RandAugment and AugMix is scaled, to a whole number; the
                policies of AutoAugment have none.
            color_jitter: timm's factor, or one for each of its components.
        """
        factor = self.factor(size)
        if isinstance(color_jitter, (tuple, list)):
            color_jitter = tuple(part * factor for part in color_jitter)
        elif color_jitter:
            color_jitter = color_jitter * factor
        return dict(auto_augment=_scale_magnitude(auto_augment, factor), color_jitter=color_jitter)


def _drop_rates(module: nn.Module) -> Dict[str, float]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return {'p': module.p}
    if isinstance(module, (DropPath, DropBlock2d)):
        return {'drop_prob': module.drop_prob}
    rate = getattr(module, 'drop_rate', None)  # where a model of timm's calls torch's function
    return {'drop_rate': rate} if isinstance(rate, float) else {}


def _scale_magnitude(config: Optional[str], factor: float) -> Optional[str]:
    kind = (config or '').split('-')[0]
    if kind not in ('rand', 'augmix'):
        return config
    assert config is not None
    magnitude = re.search(r'-m(\d+)', config)
    value = int(magnitude.group(1)) if magnitude else {'rand': 10, 'augmix': 3}[kind]  # timm's defaults
    scaled = f'-m{round(value * factor)}'
    return config.replace(magnitude.group(0), scaled, 1) if magnitude else config + scaled
