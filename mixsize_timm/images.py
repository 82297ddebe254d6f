"""An image: its size known from its header, its pixels decoded into a tensor, at a smaller scale where that does."""
import io
import math
import warnings
from typing import Any, Callable, NamedTuple, Optional, Tuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

DENOMINATORS = (1, 2, 4, 8)  # of the scales that JPEG decodes at
_CHANNELS = {'RGB': 3, 'L': 1}

# torchvision's decoder is to go some day, see _find_decoder; and the bytes of an image are only read
warnings.filterwarnings('ignore', 'The image decoding and encoding capabilities of TorchVision', DeprecationWarning)
warnings.filterwarnings('ignore', 'The given buffer is not writable', UserWarning)


class Picture(NamedTuple):
    """The pixels of an image, perhaps at a smaller scale."""
    pixels: torch.Tensor  # uint8 [channels, height, width]; its memory is mostly in the order height, width, channels
    size: Tuple[int, int]  # width and height of the image at full scale


class OpenedImage:
    """An image of which the size is known and nothing is decoded yet, if it comes encoded.

    Decoded as timm does: no EXIF orientation, the first frame of an animation, converted to ``mode`` by PIL; but 16-bit
    greyscale is scaled to 8 bits, where PIL's conversion would make it nearly all white. JPEG goes through
    libjpeg-turbo straight into a tensor, and its pixels are those that PIL gives.

    Args:
        source: The encoded image, a PIL image, or an array or tensor of a picture: uint8 ``[height, width]``,
            ``[height, width, channels]`` or, of a tensor, ``[channels, height, width]``.
        mode: PIL mode to convert to; ``None`` for the image's own. Arrays stay as they are.

    The methods raise what PIL raises for a broken image, mostly ``OSError``.
    """

    def __init__(self, source: Any, mode: Optional[str] = 'RGB') -> None:
        self._mode = mode
        self._data: Optional[bytes] = None
        self._image: Optional[Image.Image] = None
        self._pixels: Optional[torch.Tensor] = None
        self._header: Optional[Tuple[int, int, int]] = None  # width, height and channels of a JPEG
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._data = bytes(source)
        elif isinstance(source, Image.Image):
            self._image = source
        else:
            self._pixels = _channels_first(source)

    @property
    def size(self) -> Tuple[int, int]:
        """Width and height in pixels; of an encoded image its header is read for them, and nothing is decoded."""
        if self._pixels is not None:
            return self._pixels.shape[2], self._pixels.shape[1]
        if self._header is None and self._data is not None:
            self._header = _jpeg_header(self._data)
        return self._header[:2] if self._header is not None else self._opened().size

    def pil(self) -> Image.Image:
        """The image as PIL has it, decoded and converted; that of an array has the mode that its channels tell."""
        if self._pixels is not None:
            return to_pil_image(self._pixels)
        image, mode = self._opened(), self._mode
        if mode and mode[0] not in 'IF':
            image = of_8_bits(image)
        if mode and image.mode != mode:
            return image.convert(mode)
        image.load()
        return image

    def decode(self, denominator: int = 1) -> Picture:
        """Decode the image; call it once.

        Args:
            denominator: 2, 4 or 8 to decode a JPEG at 1/2, 1/4 or 1/8 of its size, which saves time. What is not an
                encoded JPEG is decoded at its size.
        """
        size, pixels = self.size, self._pixels
        if denominator > 1 and pixels is None:
            self._opened().draft(self._mode, (size[0] // denominator, size[1] // denominator))
        elif self._data is not None and self._header is not None and self._header[2] == _CHANNELS.get(self._mode or ''):
            pixels = _decode_jpeg(self._data, size)
        if pixels is None:
            pixels = pil_to_tensor(self.pil())
        return Picture(pixels, size)

    def _opened(self) -> Image.Image:
        if self._image is None:
            assert self._data is not None
            self._image = Image.open(io.BytesIO(self._data))
        return self._image


def of_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale scaled to 8 bits; other images as they are."""
    if image.mode != 'I' and not image.mode.startswith('I;16'):
        return image
    values = np.asarray(image).clip(0, 65535).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def unreadable(error: Exception) -> str:
    """Why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):  # its text is the representation of a file object
        return 'not an image that PIL knows'
    return ' '.join(str(error).split()) or type(error).__name__


def _channels_first(source: Any) -> torch.Tensor:
    if isinstance(source, torch.Tensor):
        return source if source.ndim == 3 else source[None]
    array = np.array(source)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _find_decoder() -> Optional[Callable]:
    """libjpeg-turbo's decoder of torchvision, or of TorchCodec, which later versions of torchvision leave it to."""
    try:
        from torchvision.io import decode_jpeg
        return decode_jpeg
    except ImportError:
        pass
    try:
        from torchcodec.decoders import decode_jpeg
        return decode_jpeg
    except (ImportError, RuntimeError, OSError):
        return None


_decoder = _find_decoder()


def _jpeg_header(data: bytes) -> Optional[Tuple[int, int, int]]:
    """Width, height and number of channels of a JPEG, in much less time than PIL takes; ``None`` if unknown."""
    at = 2 if data.startswith(b'\xff\xd8') else len(data)
    while at + 10 <= len(data) and data[at] == 0xff:
        marker = data[at + 1]
        if 0xc0 <= marker <= 0xcf and marker not in (0xc4, 0xc8, 0xcc):  # a frame, neither tables nor an extension
            height, width = int.from_bytes(data[at + 5:at + 7], 'big'), int.from_bytes(data[at + 7:at + 9], 'big')
            return (width, height, data[at + 9]) if width and height else None
        at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    return None


def _decode_jpeg(data: bytes, size: Tuple[int, int]) -> Optional[torch.Tensor]:
    """The pixels of a JPEG, or ``None`` where PIL has to decode it, if only to say what is wrong with it."""
    if _decoder is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    try:
        return _decoder(torch.frombuffer(data, dtype=torch.uint8))
    except RuntimeError:
        return None
