"""timm's training transforms on tensors: the same draws, pixels alike, and no transform left out."""
import io
import itertools
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import encoded, smooth
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import functional as F

from mixsize_timm.images import OpenedImage, Picture
from mixsize_timm.randomness import seed_for
from mixsize_timm.transforms import OnPIL, TensorTransform, pad_crop

SIZE = 48
CIFAR = Path(os.environ.get('MIXSIZE_DATA', Path(__file__).parents[2] / 'shared' / 'data')) / 'cifar10'


def timms(size=SIZE, pad=0, **kwargs):
    transform = create_transform(size, is_training=True, **{'color_jitter': None, 'use_prefetcher': True, **kwargs})
    if pad:
        pad_crop(transform, pad)
    return transform


def both(transform, image, seed):
    """What timm's transform makes of an image, and ours of the same, drawn alike."""
    seed_for(seed)
    expected = transform(image)
    seed_for(seed)
    return expected, TensorTransform(transform)(OpenedImage(image).decode())


@pytest.mark.parametrize('options', [
    dict(interpolation='bilinear'), dict(interpolation='random'), dict(interpolation='lanczos'),
    dict(vflip=0.5, hflip=0.), dict(color_jitter=0.4), dict(color_jitter=(0.1, 0.1, 0.1, 0.1), color_jitter_prob=0.5),
    dict(auto_augment='rand-m9-mstd0.5-inc1'), dict(auto_augment='original'), dict(auto_augment='augmix-m3-w2'),
    dict(auto_augment='3a', color_jitter=0.3), dict(grayscale_prob=0.5, gaussian_blur_prob=0.5),
    dict(train_crop_mode='rkrc'), dict(train_crop_mode='rkrr'), dict(no_aug=True), dict(scale=(0.5, 0.9), ratio=(1, 1)),
    dict(use_prefetcher=False), dict(use_prefetcher=False, re_prob=0.5), dict(pad=20, interpolation='random'),
    dict(pad=20, interpolation='lanczos'), dict(pad=20, vflip=0.5, color_jitter=0.4, auto_augment='3a'),
    dict(pad=20, use_prefetcher=False)], ids=str)
def test_seeded_alike_it_draws_what_timms_does(options):
    transform = timms(**options)
    for seed in range(6):
        expected, ours = both(transform, smooth(), seed)
        assert ours.shape == expected.shape and ours.dtype == expected.dtype
        grey_levels = 1 if expected.dtype == torch.uint8 else 0.018
        difference = (ours.float() - expected.float()).abs() / grey_levels
        assert difference.mean() < 1 and np.quantile(difference, 0.9) <= 2  # the same crop, flip and operation


def test_another_draw_is_not_alike():
    transform = timms()
    seed_for(0)
    one = transform(smooth())
    seed_for(1)
    assert (one.float() - transform(smooth()).float()).abs().mean() > 5


def test_over_many_draws_crops_flips_and_pixels_have_the_distribution_of_timms():
    """Not seeded alike: 400 draws each of an image whose pixels tell where they come from."""
    y, x = np.mgrid[:100, :140]
    where = Image.fromarray(np.stack([x * 255 // 139, y * 255 // 99, (x + y) % 256], -1).astype(np.uint8))
    transform = timms(interpolation='random')
    ours = TensorTransform(transform)

    def statistics(apply):
        rows = []
        for _ in range(400):
            pixels = apply().float()
            rows.append([
                (pixels[0, :, -1].mean() - pixels[0, :, 0].mean()).abs() / 255,  # width of the crop
                (pixels[1, -1].mean() - pixels[1, 0].mean()).abs() / 255,  # height
                pixels[0].mean() / 255, pixels[1].mean() / 255,  # place
                pixels[0, :, 0].mean() > pixels[0, :, -1].mean(),  # flip
                pixels[2].mean() / 255, pixels[2].std() / 255])
        rows = torch.tensor(rows)
        return rows.mean(0), rows.std(0)

    random.seed(1)
    torch.manual_seed(1)
    mean, std = statistics(lambda: transform(where))
    our_mean, our_std = statistics(lambda: ours(Picture(OpenedImage(where).decode().pixels, where.size)))
    error = std * (2 / 400) ** 0.5
    assert ((mean - our_mean).abs() < 4 * error + 1e-3).all()
    assert ((std - our_std).abs() < 4 * error + 1e-3).all()


def test_a_colour_jitter_of_strength_zero_costs_no_conversion_and_draws_as_timms_does():
    jitter = timms(color_jitter=0.)
    steps = TensorTransform(jitter)._steps
    assert [type(step) for step in steps] == [transforms.RandomHorizontalFlip, transforms.ColorJitter]
    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8)
    torch.manual_seed(3)
    assert torch.equal(steps[1](pixels), pixels)
    ours = torch.rand(1)
    torch.manual_seed(3)
    steps[1](transforms.functional.to_pil_image(pixels))
    assert torch.equal(ours, torch.rand(1))


def test_what_tensors_have_no_version_of_is_done_on_pil_images_and_nothing_else():
    steps = TensorTransform(timms(auto_augment='3a', color_jitter=0.4, grayscale_prob=0.1))._steps
    assert [type(step) for step in steps] == [transforms.RandomHorizontalFlip, OnPIL]
    assert [type(step) for step in steps[1].steps][1:] == [transforms.ColorJitter, transforms.RandomGrayscale]
    assert [type(step) for step in TensorTransform(timms(interpolation='box', hflip=0))._steps[0].steps] == [
        RandomResizedCropAndInterpolation]


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 900), st.integers(20, 900), st.sampled_from([16, 48, 128]), st.integers(0, 99))
def test_no_crop_is_enlarged_because_of_a_smaller_scale(width, height, size, seed):
    transform = TensorTransform(timms(size))
    seed_for(seed)
    box = transform.box((width, height))
    bottom, denominator = transform.part((width, height), box)
    top, _, rows, columns = box
    assert bottom == top + rows
    assert denominator in (1, 2, 4, 8)
    assert denominator == 1 or min(rows, columns) >= denominator * size
    assert denominator == 8 or min(rows, columns) < 2 * denominator * size  # as small as may be


@pytest.mark.parametrize('pad', [0, 60])
def test_a_crop_of_a_smaller_scale_is_the_same_crop(pad):
    data = encoded(smooth().resize((600, 404), Image.Resampling.BICUBIC), quality=95)
    transform = TensorTransform(timms(interpolation='bicubic', pad=pad))
    taken = 0
    for seed in range(20):
        seed_for(seed)
        part = transform.part((600, 404), transform.box((600, 404)))
        taken += part.denominator > 1
        made = []
        for needed in (None, lambda size: part):  # noqa: B023
            seed_for(seed)
            made.append(transform(OpenedImage(data).decode(needed))[:2].float())
        assert (made[0] - made[1]).abs().mean() < (6 if pad else 4)  # the edge of the border is a sharp one
    assert taken > 10


@pytest.mark.parametrize('pad', [0, 60])
def test_a_crop_of_the_rows_that_it_needs_is_the_same_crop(pad):
    data = encoded(smooth(100, 300))
    transform = TensorTransform(timms(pad=pad))
    fewer = 0
    for seed in range(20):
        seed_for(seed)
        box = transform.box((100, 300))
        part = transform.part((100, 300), box)._replace(denominator=None)
        made = []
        for needed in (None, lambda size: part):  # noqa: B023
            picture = OpenedImage(data).decode(needed)
            seed_for(seed)
            made.append(transform(picture))
        fewer += picture.pixels.shape[1] < 300
        seed_for(seed)
        made.append(transform(picture, transform.box((100, 300))))
        assert torch.equal(made[0], made[1]) and torch.equal(made[1], made[2])
    assert fewer > 5


def test_a_transform_that_does_not_crop_decodes_at_full_scale():
    transform = TensorTransform(timms(train_crop_mode='rkrc'))
    assert transform.box((1000, 900)) is None and transform.part((1000, 900), None) == (900, 1)


@pytest.fixture(scope='module')
def small_images():
    """An image of blurred noise, and two of CIFAR-10 where that is at hand."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)]
    for file in CIFAR.glob('test-*.parquet'):
        rows = pytest.importorskip('pyarrow.parquet').read_table(file, columns=['image']).slice(0, 2).to_pylist()
        images += [Image.open(io.BytesIO(row['image']['bytes'])).convert('RGB') for row in rows]
    return images


@pytest.mark.parametrize('size', [16, 32, 48])
def test_padded_crops_are_those_of_torchvision_and_as_frequent(small_images, size):
    """Each of 810 draws is one of the 162 that there are, each of these about five times, by ours and torchvision's."""
    torch.manual_seed(0)
    ours = TensorTransform(timms(size, pad=4, interpolation='bicubic'))
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    theirs = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), resize])
    for image in small_images:
        padded = F.pad(image, 4)
        crops = [F.crop(padded, top, left, 32, 32) for top, left in itertools.product(range(9), repeat=2)]
        there_are = torch.stack([F.pil_to_tensor(resize(one)).flatten().float()
                                 for crop in crops for one in (crop, F.hflip(crop))])
        picture = OpenedImage(image).decode()
        for draw in (lambda picture=picture: ours(picture), lambda image=image: F.pil_to_tensor(theirs(image))):
            drawn = torch.stack([draw().flatten().float() for _ in range(810)])
            distance, nearest = torch.cdist(drawn, there_are).min(1)
            assert (distance / drawn.shape[1] ** 0.5 < 1).all()  # of 255 grey levels
            counts = nearest.bincount(minlength=162)
            assert ((counts - 5.) ** 2 / 5).sum() < 161 + 5 * 322 ** 0.5  # chi squared of 161 degrees of freedom


def test_a_padded_crop_needs_one_of_timms_to_take_the_place_of():
    for transform in (timms(train_crop_mode='rkrc'), timms(no_aug=True), create_transform(SIZE), None):
        with pytest.raises(ValueError, match='there is none'):
            pad_crop(transform, 4)
    with pytest.raises(ValueError, match='must be at least 1'):
        pad_crop(timms(), -4)
    assert 'RandomPaddedCrop(size=(48, 48), padding=4)' in repr(timms(pad=4))
