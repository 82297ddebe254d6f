"""An image: its size known from its header, its pixels decoded into a tensor, no more of them than are needed."""
import io
import math
from typing import Any, Callable, NamedTuple, Optional, Tuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

DENOMINATORS = (1, 2, 4, 8)  # of the scales that JPEG decodes at
_JPEG, _JPEG_END = b'\xff\xd8', b'\xff\xd9'  # what it begins and ends with
_JPEG_FRAMES, _JPEG_SCAN = (0xC0, 0xC1), 0xDA  # markers: of frames whose rows follow each other, and of a scan
# PIL mode -> JPEG colours whose pixels are the same by libjpeg-turbo and by PIL, and what libjpeg-turbo calls the mode
_COLOURS = {'RGB': (('YCbCr', 'RGB'), 'RGB'), 'L': (('Gray',), 'GRAY')}


class Part(NamedTuple):
    """What of an image is needed."""
    bottom: int  # number of its rows, from the top, at full scale
    denominator: Optional[int] = None  # of the scale: 1, 2, 4 or 8; None for full scale and the pixels that PIL gives


class Picture(NamedTuple):
    """The pixels of an image, perhaps at a smaller scale, perhaps without the rows at its bottom."""
    pixels: torch.Tensor  # uint8 [channels, rows, width]; its memory is mostly in the order rows, width, channels
    size: Tuple[int, int]  # width and height of the image at full scale
    denominator: int = 1  # of the scale of the pixels

    @property
    def scaled(self) -> Tuple[int, int]:
        """Width and height of the whole image at the scale of the pixels."""
        width, height = self.size
        return -(-width // self.denominator), -(-height // self.denominator)


class OpenedImage:
    """An image of which the size is known and nothing is decoded yet, if it comes encoded.

    Decoded as timm does: no EXIF orientation, the first frame of an animation, converted to ``mode`` by PIL; but 16-bit
    greyscale is scaled to 8 bits, where PIL's conversion would make it nearly all white. JPEG goes through
    libjpeg-turbo (simplejpeg) straight into a tensor, and its pixels are those that PIL gives.

    Args:
        source: The encoded image, a PIL image, or an array or tensor of a picture: uint8 ``[height, width]``,
            ``[height, width, channels]`` or, of a tensor, ``[channels, height, width]``.
        mode: PIL mode to convert to; ``None`` for RGB where the image comes encoded, and else for its own. Arrays stay
            as they are.

    The methods raise what PIL raises for a broken image, mostly ``OSError``.
    """

    def __init__(self, source: Any, mode: Optional[str] = 'RGB') -> None:
        self._mode = 'RGB' if mode is None and isinstance(source, (bytes, bytearray, memoryview)) else mode
        self._data: Optional[bytes] = None
        self._image: Optional[Image.Image] = None
        self._pixels: Optional[torch.Tensor] = None
        self._jpeg: Optional[Tuple[int, int, str]] = None  # width, height and colours of one
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._data = bytes(source)
            self._jpeg = _jpeg_header(self._data)
        elif isinstance(source, Image.Image):
            self._image = source
        else:
            self._pixels = _channels_first(source)

    @property
    def size(self) -> Tuple[int, int]:
        """Width and height in pixels; of an encoded image its header is read for them, and nothing is decoded."""
        if self._pixels is not None:
            return self._pixels.shape[2], self._pixels.shape[1]
        return self._jpeg[:2] if self._jpeg is not None else self._opened().size

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

    def decode(self, part: Optional[Callable[[Tuple[int, int]], Optional[Part]]] = None) -> Picture:
        """Decode the image; call it once.

        Args:
            part: Tells from width and height what of it is needed, ``None`` for all; asked for a JPEG only. Where it
                names a scale, libjpeg-turbo's faster ways to transform and to enlarge colours are taken. Of a
                progressive JPEG all rows are decoded.
        """
        if self._pixels is not None:
            return Picture(self._pixels, self.size)
        picture = self._decode_jpeg(part)
        return Picture(pil_to_tensor(self.pil()), self.size) if picture is None else picture

    def _decode_jpeg(self, part: Optional[Callable[[Tuple[int, int]], Optional[Part]]]) -> Optional[Picture]:
        """A JPEG decoded, or ``None`` where PIL has to do it, if only to say what is wrong with the image."""
        colours, mode = _COLOURS.get(self._mode or '', ((), ''))
        if self._jpeg is None or self._jpeg[2] not in colours:
            return None
        width, height, _ = self._jpeg
        if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
            return None
        needed = part((width, height)) if part is not None else None
        bottom, denominator = needed or Part(height)
        scale, fast = denominator or 1, denominator is not None
        rows = min(bottom + 4 * max(scale, 2), height)  # more, as colours are enlarged with the row below
        data = _without_bottom(self._data, rows)
        try:
            pixels = simplejpeg.decode_jpeg(
                data or self._data, mode, fastdct=fast, fastupsample=fast, min_width=-(-width // scale),
                min_height=-(-(rows if data else height) // scale), min_factor=scale,
                strict=data is None)  # what is left of the bottom would be an error
        except ValueError:
            return None
        return Picture(torch.from_numpy(pixels).permute(2, 0, 1), (width, height), scale)

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
    if not isinstance(source, (np.ndarray, torch.Tensor)) or str(source.dtype).split('.')[-1] != 'uint8':
        raise TypeError('an image must come encoded, as a PIL image, or as an array or tensor of uint8, not as '
                        f'{type(source).__name__}{f" of {source.dtype}" if hasattr(source, "dtype") else ""}')
    if isinstance(source, torch.Tensor):
        return source if source.ndim == 3 else source[None]
    array = np.array(source)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _jpeg_header(data: bytes) -> Optional[Tuple[int, int, str]]:
    """Width, height and colours of a JPEG; ``None`` for what is none, or is broken."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data) if data.startswith(_JPEG) else (0, 0, '', '')
    except ValueError:
        return None
    return (width, height, colours) if width else None


def _without_bottom(data: Optional[bytes], rows: int) -> Optional[bytes]:
    """A JPEG of which a decoder decodes some rows and no more, since its header says that there are no others.

    ``None`` where it has no more rows, does not end as a whole file does, or does not have its rows one after the
    other: progressive, or with colours apart.
    """
    if data is None or not data.endswith(_JPEG_END):
        return None
    frame, start = 0, 2  # frame: where rows and columns are written
    while data[start:start + 1] == b'\xff' and len(data) > start + 9:
        marker, length = data[start + 1], _number(data, start + 2)
        if marker in _JPEG_FRAMES:
            frame = start + 5
        elif marker == _JPEG_SCAN:  # its colours are all that there are, and a frame of this kind came before it
            if not frame or data[start + 4] != data[frame + 4] or _number(data, frame) <= rows:
                return None
            return data[:frame] + rows.to_bytes(2, 'big') + data[frame + 2:]
        start += 2 + length
    return None


def _number(data: bytes, start: int) -> int:
    return int.from_bytes(data[start:start + 2], 'big')
