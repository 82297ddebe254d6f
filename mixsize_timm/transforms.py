"""timm's training transforms on uint8 tensors; the crop can be chosen before the image is decoded."""
import random
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
import torchvision.transforms.functional as F
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, MaybeToTensor, RandomResizedCropAndInterpolation
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from .images import DENOMINATORS, Part, Picture

Box = Tuple[int, int, int, int]  # of a crop: top, left, height and width in pixels of the image at full scale

# those that take a tensor, and are faster with one
_ON_TENSORS = (
    RandomErasing, transforms.Normalize, transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_INTERPOLATIONS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)  # as PIL has them


class RandomPaddedCrop(RandomResizedCropAndInterpolation):
    """A crop of the image's own size, at random out of the image with a black border around it; then resized.

    It takes the place of timm's random resized crop. The flip comes behind it, as with timm's: a flipped image resized
    is the resized image flipped.

    Args:
        crop: timm's.
        padding: Width of the border, in pixels of the image.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, padding: int) -> None:
        vars(self).update(vars(crop))
        self.padding = padding

    def get_params(  # type: ignore[override]  # timm's is static, and has no need of an attribute
            self, img: Any, scale: Any = None, ratio: Any = None) -> Tuple[int, int, int, int]:
        """Top, left, height and width of a crop, in pixels of the image: from ``-padding`` to ``padding`` away."""
        _, height, width = F.get_dimensions(img)
        top, left = (random.randint(-self.padding, self.padding) for _ in range(2))
        return top, left, height, width

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, padding={self.padding})'


def pad_crop(transform: Any, padding: int) -> None:
    """Put a :class:`RandomPaddedCrop` in the place of the crop of what ``timm.data.create_transform`` made.

    Raises:
        ValueError: There is no random resized crop, or less than one pixel to pad.
    """
    crop = transform.transforms[0] if isinstance(transform, transforms.Compose) else None
    if not isinstance(crop, RandomResizedCropAndInterpolation):
        raise ValueError('train_pad takes the place of timm\'s random resized crop, and there is none')
    if padding < 1:
        raise ValueError(f'train_pad must be at least 1, not {padding}')
    transform.transforms[0] = RandomPaddedCrop(crop, padding)


class TensorTransform:
    """A training transform that timm made for PIL images, on uint8 tensors.

    It draws the same random numbers in the same order, so that seeded alike it takes the same crops, flips and
    operations as timm's. Pixels differ a little, since torchvision resizes tensors in other arithmetic than PIL. What
    tensors have no version of, or a slower one (timm's automatic augmentations, colour jitter), is done on PIL images,
    one such transform after the other without a conversion between them.

    Args:
        transform: What ``timm.data.create_transform`` makes for training.

    Attributes:
        transforms: timm's transforms, in their order.
    """

    def __init__(self, transform: transforms.Compose) -> None:
        self.transforms: List[Any] = list(transform.transforms)
        first, *others = self.transforms
        self._crop: Any = None
        if isinstance(first, RandomResizedCropAndInterpolation) and all(
                mode in _INTERPOLATIONS for mode in _modes(first)):
            self._crop = first
        else:
            others.insert(0, first)
        self._steps = _on_tensors(others)

    def box(self, size: Tuple[int, int]) -> Optional[Box]:
        """Draw the crop of an image, the first of what is drawn for it; ``None`` where the crop is one of PIL's.

        Args:
            size: Width and height of the image in pixels.
        """
        if self._crop is None:
            return None
        return self._crop.get_params(torch.empty((1, *size[::-1]), device='meta'), self._crop.scale, self._crop.ratio)

    def part(self, size: Tuple[int, int], box: Optional[Box]) -> Part:
        """What of an image a crop needs, at the smallest scale at which nothing is enlarged for it.

        Args:
            size: Width and height of the image in pixels.
            box: What :meth:`box` gave.
        """
        if box is None:
            return Part(size[1], 1)
        top, _, height, width = box
        rows, columns = self._crop.size
        return Part(min(top + height, size[1]), max(
            d for d in DENOMINATORS if d == 1 or d * rows <= height and d * columns <= width))

    def __call__(self, picture: Picture, box: Optional[Box] = None) -> torch.Tensor:
        """Transform a picture.

        Args:
            picture: The picture.
            box: Its crop, where :meth:`box` has drawn it already.

        Returns:
            uint8 ``[channels, size, size]``, or float where timm's transform normalises it.
        """
        box = box or self.box(picture.size)
        pixels = picture.pixels if box is None else self._cropped(picture, box)
        for step in self._steps:
            pixels = step(pixels)
        return pixels

    def _cropped(self, picture: Picture, box: Box) -> torch.Tensor:
        pixels, (top, left, rows, columns) = picture.pixels, box
        if picture.scaled != picture.size:  # the nearest box of whole pixels
            across, down = (part / whole for part, whole in zip(picture.scaled, picture.size))
            top, rows = _scaled(top, rows, down)
            left, columns = _scaled(left, columns, across)
        modes = _modes(self._crop)
        mode = random.choice(modes) if len(modes) > 1 else modes[0]
        if min(top, left) < 0 or top + rows > pixels.shape[1] or left + columns > pixels.shape[2]:
            crop = F.crop(pixels, top, left, rows, columns)  # black where that is outside of the image
        else:
            crop = pixels[:, top:top + rows, left:left + columns]  # the same in less time
        return interpolate(crop[None], self._crop.size, mode=mode.value, antialias=True)[0]


class OnPIL:
    """Transforms of PIL images, applied to a tensor.

    Args:
        steps: The transforms.
    """

    def __init__(self, steps: List[Callable]) -> None:
        self.steps = steps

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        image = F.to_pil_image(pixels)
        for step in self.steps:
            image = step(image)
        return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)


def _on_tensors(steps: List[Any]) -> List[Callable]:
    taken: List[Callable] = []
    for step in steps:
        if isinstance(step, MaybePILToTensor):
            continue
        if isinstance(step, MaybeToTensor):
            taken.append(F.convert_image_dtype)  # to float in [0, 1]
        elif isinstance(step, _ON_TENSORS) or _changes_no_colour(step):
            taken.append(step)
        elif taken and isinstance(taken[-1], OnPIL):
            taken[-1].steps.append(step)
        else:
            taken.append(OnPIL([step]))
    return taken


def _changes_no_colour(step: Any) -> bool:
    """Whether it is a colour jitter of strength zero, which draws a random number and changes nothing."""
    return isinstance(step, transforms.ColorJitter) and not any(
        (step.brightness, step.contrast, step.saturation, step.hue))


def _modes(crop: RandomResizedCropAndInterpolation) -> Sequence[InterpolationMode]:
    """The ways to interpolate that a crop draws from; it draws nothing where there is one."""
    return crop.interpolation if isinstance(crop.interpolation, (tuple, list)) else [crop.interpolation]


def _scaled(start: int, length: int, scale: float) -> Tuple[int, int]:
    """A stretch in pixels of a picture at a smaller scale, at least one long."""
    first, last = round(start * scale), round((start + length) * scale)
    return first, max(last - first, 1)
