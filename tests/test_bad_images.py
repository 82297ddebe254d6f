"""Images of every kind that turn up in large data sets: decoded, or replaced by another of their class."""
import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms.functional import pil_to_tensor

from mixsize_timm.datasets import ReadableDataset, create_dataset
from mixsize_timm.errors import Stopped

RED, GREEN, BLUE = (254, 0, 0), (0, 255, 0), (0, 0, 255)
GREY = (128, 128, 128)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def plain(colour=RED, size=(16, 8), mode='RGB'):
    return Image.new(mode, size, colour)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half(data):
    return data[:len(data) // 2]


def noise(kind, **options):
    return saved(Image.fromarray(NOISE), kind, **options)


def palette(**options):
    image = plain().quantize(4)
    return saved(image, 'PNG', **options)


def deep(top=65535, kind='PNG', dtype=np.uint16):
    """16-bit greyscale whose first pixel is the middle grey of its range."""
    return saved(Image.fromarray(np.full((8, 16), top // 2 + 1, dtype)), kind)


def animated(kind):
    return saved(plain(), kind, save_all=True, append_images=[plain(GREEN)], **(
        {'lossless': True} if kind == 'WEBP' else {}))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return saved(plain(), 'JPEG', exif=exif, quality=95)


def large_exif():
    exif = Image.Exif()
    exif[0x010E] = 'x' * 60000  # the description
    return saved(plain(), 'JPEG', exif=exif, quality=95)


def chunk(name, data):
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


def bomb():
    header = struct.pack('>IIBBBBB', 50000, 50000, 8, 2, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000)))
            + chunk(b'IEND', b''))


def jpeg_bomb():
    data = bytearray(saved(plain(), 'JPEG'))
    place = data.index(b'\xff\xc0')
    data[place + 5:place + 9] = struct.pack('>HH', 50000, 50000)
    return bytes(data)


def text_bomb():
    text = PngImagePlugin.PngInfo()
    text.add_text('comment', 'x' * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return saved(plain(), 'PNG', pnginfo=text)


def wrong_checksum(name):
    data = bytearray(saved(plain(), 'PNG'))
    start = data.index(name)
    length = struct.unpack('>I', data[start - 4:start])[0]
    data[start + 4 + length] ^= 0xFF
    return bytes(data)


def damaged_pixels():
    data = bytearray(noise('PNG'))
    middle = len(data) // 2
    data[middle:middle + 64] = b'\xff' * 64
    return bytes(data)


def tiff_offset():
    data = bytearray(saved(plain(), 'TIFF'))
    data[4:8] = struct.pack('<I', 0x7FFFFFFF)
    return bytes(data)


def scrambled_jpeg():
    data = bytearray(noise('JPEG'))
    data[-400:-200] = np.random.default_rng(1).integers(0, 255, 200, dtype=np.uint8).tobytes()
    return bytes(data)


# timm's folders hold .png, .jpg and .jpeg files only; PIL tells the format by the content
DECODED = [  # kind, extension, how it is made, its first pixel as it is seen
    ('JPEG', 'jpg', lambda: saved(plain(), 'JPEG', quality=95), RED),
    ('progressive JPEG', 'jpg', lambda: saved(plain(), 'JPEG', progressive=True, quality=95), RED),
    ('CMYK JPEG', 'jpg', lambda: saved(plain((0, 255, 255, 0), mode='CMYK'), 'JPEG', quality=95), RED),
    ('greyscale JPEG', 'jpg', lambda: saved(plain(128, mode='L'), 'JPEG'), GREY),
    ('PNG named .jpg', 'jpg', lambda: saved(plain(), 'PNG'), RED),
    ('JPEG named .png', 'png', lambda: saved(plain(), 'JPEG', quality=95), RED),
    ('palette PNG', 'png', palette, RED),
    ('palette PNG, a transparent colour', 'png', lambda: palette(transparency=0), RED),
    ('palette PNG, transparency in bytes', 'png', lambda: palette(transparency=b'\x00\x80\xff\xff'), RED),
    ('RGBA PNG', 'png', lambda: saved(plain((*RED, 0), mode='RGBA'), 'PNG'), RED),
    ('grey and alpha PNG', 'png', lambda: saved(plain((128, 0), mode='LA'), 'PNG'), GREY),
    ('1-bit PNG', 'png', lambda: saved(plain(1, mode='1'), 'PNG'), (255, 255, 255)),
    ('16-bit greyscale PNG', 'png', deep, GREY),
    ('16-bit greyscale TIFF', 'png', lambda: deep(kind='TIFF'), GREY),
    ('16-bit greyscale PGM', 'png', lambda: b'P5 16 8 65535\n' + struct.pack('>H', 32768) * 128, GREY),
    ('32-bit greyscale TIFF of 16-bit values', 'png', lambda: deep(kind='TIFF', dtype=np.int32), GREY),
    ('animated GIF', 'png', lambda: animated('GIF'), RED),
    ('animated WebP', 'jpg', lambda: animated('WEBP'), RED),
    ('animated PNG', 'png', lambda: animated('PNG'), RED),
    ('JPEG with an EXIF rotation', 'jpg', turned, RED),
    ('JPEG with 60 KB of EXIF', 'jpg', large_exif, RED),
    ('JPEG with text after its end', 'jpg', lambda: saved(plain(), 'JPEG', quality=95) + b'text' * 1000, RED),
    ('PNG, wrong checksum of its pixels', 'png', lambda: wrong_checksum(b'IDAT'), RED),
    ('JPEG, 200 bytes scrambled', 'jpg', scrambled_jpeg, None),
    ('one pixel', 'png', lambda: saved(plain(size=(1, 1)), 'PNG'), RED),
]

REPLACED = [  # kind, extension, how it is made, the reason as it is logged
    ('JPEG cut off', 'jpg', lambda: half(noise('JPEG')), 'image file is truncated'),
    ('progressive JPEG cut off', 'jpg', lambda: half(noise('JPEG', progressive=True)), 'image file is truncated'),
    ('PNG cut off', 'png', lambda: half(noise('PNG')), 'image file is truncated'),
    ('GIF cut off', 'png', lambda: half(noise('GIF')), 'image file is truncated'),
    ('WebP cut off', 'jpg', lambda: half(noise('WEBP')), ''),
    ('TIFF cut off', 'png', lambda: half(noise('TIFF')), ''),
    ('BMP cut off', 'jpg', lambda: half(noise('BMP')), 'image file is truncated'),
    ('header only', 'jpg', lambda: noise('JPEG')[:20], ''),
    ('zero bytes', 'jpg', lambda: b'', 'not an image that PIL knows'),
    ('zeros, as after a full disk', 'jpg', lambda: bytes(4096), 'not an image that PIL knows'),
    ('random bytes', 'jpg', lambda: NOISE.tobytes(), 'not an image that PIL knows'),
    ('text named .jpg', 'jpg', lambda: b'not an image', 'not an image that PIL knows'),
    ('HTML page named .jpg', 'jpg', lambda: b'<!DOCTYPE html><html>404</html>', 'not an image that PIL knows'),
    ('SVG named .png', 'png', lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'not an image that PIL knows'),
    ('PNG that claims 50000x50000', 'png', bomb, 'decompression bomb'),
    ('JPEG that claims 50000x50000', 'jpg', jpeg_bomb, 'decompression bomb'),
    ('PNG with a text that unpacks to more than 1 MB', 'png', text_bomb, 'too large'),
    ('PNG, wrong checksum of its header', 'png', lambda: wrong_checksum(b'IHDR'), ''),
    ('PNG, pixels overwritten', 'png', damaged_pixels, ''),
    ('TIFF, wrong offset', 'png', tiff_offset, ''),
]


@pytest.fixture
def opened(tmp_path):
    """Opens a folder of one blue image and the one that is written by a function of its path."""
    def opened(write, extension):
        folder = tmp_path / 'train' / 'cat'
        folder.mkdir(parents=True)
        plain(BLUE).save(folder / 'z.png')
        write(folder / f'a.{extension}')
        return create_dataset('', str(tmp_path), 'train')
    return opened


@pytest.mark.parametrize('kind, extension, make, pixel', DECODED, ids=[row[0] for row in DECODED])
def test_what_pil_can_read_is_decoded_to_8_bit_rgb(opened, kind, extension, make, pixel):
    dataset = opened(lambda path: path.write_bytes(make()), extension)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # PIL's, of transparency in bytes
        image, target, bad_images = dataset.read(0)
        for_timm, _ = dataset[0]
    assert image.pixels.dtype == torch.uint8 and for_timm.mode == 'RGB' and target == 0 and not bad_images
    assert torch.equal(image.pixels, pil_to_tensor(for_timm)) and image.size == for_timm.size
    assert pixel is None or tuple(image.pixels[:, 0, 0].tolist()) == pytest.approx(pixel, abs=3)
    assert pixel is None or image.size in ((16, 8), (1, 1))


@pytest.mark.parametrize('kind, extension, make, reason', REPLACED, ids=[row[0] for row in REPLACED])
def test_what_cannot_be_read_is_replaced_and_named(opened, kind, extension, make, reason):
    dataset = opened(lambda path: path.write_bytes(make()), extension)
    image, target, bad_images = dataset.read(0)
    assert tuple(image.pixels[:, 0, 0].tolist()) == BLUE and target == 0
    assert list(bad_images) == [0] and bad_images[0][0].endswith(f'train/cat/a.{extension}')
    assert reason.lower() in bad_images[0][1].lower() and '\n' not in bad_images[0][1]


def test_a_signal_is_no_fault_of_the_image_that_is_being_read():
    class Interrupted(torch.utils.data.Dataset):
        def __getitem__(self, index):
            raise Stopped('SIGTERM')

    with pytest.raises(Stopped):
        ReadableDataset(Interrupted()).read(0)


def test_a_broken_link_is_replaced(opened):
    assert 'No such file' in opened(lambda path: path.symlink_to('nowhere'), 'jpg').read(0)[2][0][1]


def test_a_file_that_became_a_folder_or_was_removed_is_replaced(opened):
    dataset = opened(lambda path: path.write_bytes(b''), 'jpg')
    path = dataset.name(0)
    os.remove(path)
    assert 'No such file' in dataset.read(0)[2][0][1]
    os.mkdir(path)
    assert 'Is a directory' in dataset.read(0)[2][0][1]


def test_a_folder_named_as_an_image_is_no_image(opened):
    assert len(opened(lambda path: path.mkdir(), 'jpg')) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason=(
    'root may read any file, so this error cannot be made; it is caught where those of the other rows are'))
def test_a_file_without_permission_is_replaced(opened):
    def write(path):
        plain().save(path)
        path.chmod(0)
    assert 'Permission denied' in opened(write, 'jpg').read(0)[2][0][1]


def test_a_wide_mode_that_is_asked_for_is_not_scaled(tmp_path):
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    (tmp_path / 'train' / 'cat' / 'a.png').write_bytes(deep())
    dataset = create_dataset('', str(tmp_path), 'train', input_img_mode='I')
    assert dataset[0][0].mode == 'I' and dataset[0][0].getpixel((0, 0)) == 32768
