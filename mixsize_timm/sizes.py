"""Which image sizes a model takes: asked of the model, since no rule on strides answers it."""
import copy
from typing import Callable, Dict, Iterator, List, Tuple, Union

import torch
from torch import nn

from .regime import SIZE_MULTIPLE, Regime

Size = Union[int, Tuple[int, int]]


class SizeProbe:
    """Tells whether a model's forward pass takes an image size: ``SizeProbe(model)(160)``.

    The passes run on the meta device, without arithmetic or memory, where the model works there at ``known_size``;
    otherwise on a copy on the CPU. The model itself is not touched.

    Args:
        model: An image model that takes ``[N, C, H, W]``.
        in_chans: Channels ``C``.
        known_size: A size in pixels, or height and width, that the model should take.

    Attributes:
        reason: What the model said when it last refused a size.
    """

    def __init__(self, model: nn.Module, in_chans: int = 3, known_size: Size = 224) -> None:
        self.in_chans = in_chans
        self.reason = ''
        self.device = 'meta'
        self.model = copy.deepcopy(model).to(self.device).eval()
        if not self(known_size):
            self.device = 'cpu'
            self.model = copy.deepcopy(model).to(self.device).eval()

    @torch.inference_mode()
    def __call__(self, size: Size) -> bool:
        """Whether the model takes square images of ``size`` pixels, or of a height and width."""
        height, width = (size, size) if isinstance(size, int) else size
        try:
            self.model(torch.zeros(1, self.in_chans, height, width, device=self.device))
        except Exception as error:  # what a refusal looks like is each model's own: assertion, shape, kernel size
            self.reason = ' '.join(str(error).split())[:200] or type(error).__name__
            return False
        return True


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
        takes: Whether the model takes a size, see :class:`SizeProbe`.

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
