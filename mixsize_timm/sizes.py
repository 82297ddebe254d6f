"""Which image sizes a model takes: asked of the model, since no rule on strides answers it."""
import copy
from typing import Callable, Dict, Iterator, List, Tuple

import torch
from torch import nn

from .regime import SIZE_MULTIPLE, Regime


def size_probe(model: nn.Module, in_chans: int = 3, known_size: int = 224) -> Callable[[int], bool]:
    """A function that tells whether a model's forward pass takes a square image size.

    The passes run on the meta device, without arithmetic or memory, where the model works there at ``known_size``;
    otherwise on a copy on the CPU. The model itself is not touched.

    Args:
        model: An image model that takes ``[N, C, H, W]``.
        in_chans: Channels ``C``.
        known_size: A size in pixels that the model is known to take.
    """
    probed = copy.deepcopy(model).eval()
    device = 'meta'

    def takes(size: int) -> bool:
        try:
            with torch.inference_mode():
                probed(torch.zeros(1, in_chans, size, size, device=device))
        except Exception:  # what a refusal looks like is each model's own: assertion, shape, kernel size
            return False
        return True

    probed.to(device)
    if not takes(known_size):
        probed, device = copy.deepcopy(model).to('cpu').eval(), 'cpu'
    return takes


def nearest_size(takes: Callable[[int], bool], size: int) -> int:
    """The nearest size that is taken, at most a quarter of ``size`` away, the larger of two; 0 if there is none."""
    for distance in range(size // 4 + 1):
        for candidate in (size + distance, size - distance):
            if takes(candidate):
                return candidate
    return 0


def fit_sizes(regime: Regime, takes: Callable[[int], bool]) -> Tuple[Regime, Dict[int, int]]:
    """Move the sizes that a model refuses to the nearest that it takes.

    Args:
        regime: The regime as asked for.
        takes: Whether the model takes a size, see :func:`size_probe`.

    Returns:
        The regime that fits, and the sizes that were moved, old to new.

    Raises:
        ValueError: The model refuses the base size, or a size and all that are near it; names sizes that would do.
    """
    moved = {size: nearest_size(takes, size) for size in regime.sizes if not takes(size)}
    refused = [size for size, new in moved.items() if not new]
    if refused or not takes(regime.base_size):
        would_do = list(_taken_sizes(takes, regime))
        raise ValueError(
            f'the model does not take images of {_join(refused or [regime.base_size])} px; of the sizes near the '
            f'regime it takes {_join(would_do) or "none"}. '
            + ('Choose among them with --mixsize custom --mixsize-sizes' if len(would_do) > 1 else
               'Use --mixsize off, or a model built for many sizes (--model-kwargs dynamic_img_size=True for a ViT)'))
    return regime.with_sizes(moved), moved


def _taken_sizes(takes: Callable[[int], bool], regime: Regime) -> Iterator[int]:
    low, high = min(regime.sizes[0], regime.base_size), max(regime.sizes[-1], regime.base_size)
    candidates = {*range(low, high + SIZE_MULTIPLE + 1, SIZE_MULTIPLE), *regime.sizes, regime.base_size}
    return filter(takes, sorted(candidates))


def _join(sizes: List[int]) -> str:
    return ', '.join(map(str, sizes))
