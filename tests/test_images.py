"""An image opened: its size before it is decoded, its pixels those of PIL, at a smaller scale where asked for."""
import io

import numpy as np
import pytest
import torch
from conftest import encoded, smooth
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from mixsize_timm import images
from mixsize_timm.images import OpenedImage, Part

KINDS = [
    {}, {'subsampling': 0}, {'subsampling': 1}, {'restart_marker_rows': 1}, {'progressive': True}, {'quality': 100}]


def whole(denominator):
    """Asks for all of an image, at a scale."""
    return lambda size: Part(size[1], denominator)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize('mode', ['RGB', 'L'])
@pytest.mark.parametrize('source, options', [
    ('RGB', {}), ('RGB', {'progressive': True}), ('RGB', {'subsampling': 0}), ('L', {}), ('CMYK', {})], ids=str)
def test_the_pixels_of_a_jpeg_are_those_of_pil(source, options, mode):
    data = encoded(smooth(mode=source), **options)
    picture = OpenedImage(data, mode).decode()
    expected = pil_to_tensor(Image.open(io.BytesIO(data)).convert(mode))
    assert picture.size == (150, 101) and picture.pixels.dtype == torch.uint8
    difference = (picture.pixels.int() - expected.int()).abs()
    assert picture.pixels.shape == expected.shape and difference.max() == 0


def test_pil_decodes_no_jpeg_that_tensors_have_a_decoder_for(monkeypatch):
    data = encoded(smooth())
    expected = OpenedImage(data).decode()
    monkeypatch.setattr(Image.Image, 'convert', None)
    assert torch.equal(OpenedImage(data).decode().pixels, expected.pixels)


def test_what_the_decoder_of_tensors_refuses_pil_decodes(monkeypatch):
    data = encoded(smooth())
    expected = OpenedImage(data).decode()

    def refuse(*args, **kwargs):
        raise ValueError('extraneous bytes')

    for name in ('decode_jpeg', 'decode_jpeg_header'):
        monkeypatch.setattr(images.simplejpeg, name, refuse)
        assert torch.equal(OpenedImage(data).decode().pixels, expected.pixels)


def test_the_size_is_known_from_the_header():
    opened = OpenedImage(encoded(smooth())[:700])  # the rest is missing
    assert opened.size == (150, 101)
    with pytest.raises(OSError, match='truncated'):
        opened.decode()


@pytest.mark.parametrize('denominator', [2, 4, 8])
def test_a_jpeg_is_decoded_at_a_smaller_scale(denominator):
    picture = OpenedImage(encoded(smooth(), quality=95)).decode(whole(denominator))
    assert picture.size == (150, 101) and picture.denominator == denominator
    assert picture.scaled == picture.pixels.shape[:0:-1]
    assert picture.pixels.shape == (3, -(-101 // denominator), -(-150 // denominator))
    reduced = pil_to_tensor(smooth().reduce(denominator))
    difference = (picture.pixels[:2].float() - reduced[:2].float()).abs()  # the third channel has jumps
    assert difference.mean() < 3


def test_another_format_is_decoded_at_its_size_whatever_is_asked_for():
    picture = OpenedImage(encoded(smooth(), 'PNG')).decode(lambda size: Part(10, 4))
    assert picture.pixels.shape == (3, 101, 150) and picture.scaled == (150, 101)


@given(st.integers(1, 70), st.integers(1, 130), st.integers(1, 130), st.sampled_from([None, 1, 2, 4, 8]),
       st.sampled_from(KINDS), st.sampled_from(['RGB', 'L']))
def test_the_rows_that_are_asked_for_are_those_of_the_whole_image(width, height, bottom, denominator, kind, mode):
    data = encoded(noise(width, height).convert(mode), **kind)
    bottom = min(bottom, height)
    all_rows = OpenedImage(data, mode).decode(whole(denominator))
    picture = OpenedImage(data, mode).decode(lambda size: Part(bottom, denominator))
    rows = -(-bottom // (denominator or 1))
    assert torch.equal(picture.pixels[:, :rows], all_rows.pixels[:, :rows])
    assert picture.scaled == all_rows.scaled and picture.size == (width, height)


def test_rows_below_what_is_asked_for_are_not_decoded(monkeypatch):
    data = encoded(smooth(150, 1000))
    assert OpenedImage(data).decode(lambda size: Part(100)).pixels.shape[1] < 120
    assert OpenedImage(data).decode(lambda size: Part(100, 4)).pixels.shape[1] < 120 / 4
    assert OpenedImage(encoded(smooth(150, 1000), progressive=True)).decode(
        lambda size: Part(100)).pixels.shape[1] == 1000


@pytest.mark.parametrize('bottom', [1, 40, 101])
def test_a_file_that_is_cut_short_is_an_error_whatever_is_asked_for(bottom):
    with pytest.raises(OSError, match='truncated'):
        OpenedImage(encoded(smooth())[:-300]).decode(lambda size: Part(bottom))


@given(st.lists(st.tuples(st.integers(650, 2500), st.integers(0, 255)), min_size=1, max_size=3))
def test_a_damaged_jpeg_has_the_rows_that_pil_sees_in_it(damage):
    data = bytearray(encoded(noise(60, 60)))
    for place, value in damage:
        data[place] = value
    try:
        expected = pil_to_tensor(Image.open(io.BytesIO(data)).convert('RGB'))
    except OSError:  # PIL sees no pixels in it; ours may, where that is said below the rows that are asked for
        return
    assert torch.equal(OpenedImage(data).decode(lambda size: Part(30)).pixels[:, :30], expected[:, :30])


def test_a_file_with_more_behind_its_end_is_decoded():
    data = encoded(smooth())
    expected = OpenedImage(data).decode()
    assert torch.equal(OpenedImage(data + bytes(100)).decode(lambda size: Part(10)).pixels[:, :10],
                       expected.pixels[:, :10])


@pytest.mark.parametrize('source', [
    smooth(), np.asarray(smooth()), pil_to_tensor(smooth()), encoded(smooth(), 'PNG'),
    bytearray(encoded(smooth(), 'PNG'))], ids=['pil', 'array', 'tensor', 'bytes', 'bytearray'])
def test_whatever_a_reader_gives_becomes_the_same_tensor(source):
    opened = OpenedImage(source)
    assert opened.size == (150, 101)
    picture = opened.decode(whole(2) if isinstance(source, np.ndarray) else None)
    assert torch.equal(picture.pixels, pil_to_tensor(smooth()))
    assert opened.pil().tobytes() == smooth().tobytes()


@pytest.mark.parametrize('source', [np.zeros((5, 7, 3)), torch.zeros(3, 5, 7), 'a/path.jpg'], ids=type)
def test_what_is_no_image_of_bytes_is_refused(source):
    with pytest.raises(TypeError, match='uint8'):
        OpenedImage(source)


def test_an_encoded_image_of_another_mode_becomes_rgb():
    picture = OpenedImage(encoded(smooth().quantize(16), 'PNG'), None).decode()
    assert torch.equal(picture.pixels, pil_to_tensor(smooth().quantize(16).convert('RGB')))


@pytest.mark.parametrize('source', [np.zeros((5, 7), np.uint8), torch.zeros(5, 7, dtype=torch.uint8)], ids=type)
def test_an_array_without_channels_has_one(source):
    assert OpenedImage(source).decode().pixels.shape == (1, 5, 7)
