"""The loader: decoded once, duplicated, the same pixels whoever asks."""
import logging
import random

import numpy as np
import pytest
import timm.data
import torch
from timm.data import FastCollateMixup, create_dataset

from mixsize_timm.data import MixSizeLoader, create_calibration_loader, create_loader
from mixsize_timm.datasets import BadImagesError, DigitsDataset
from mixsize_timm.regime import Regime

REGIME = Regime.preset('cifar', 32, batch_size=8)
OPTIONS = dict(is_training=True, num_workers=0, device=torch.device('cpu'), color_jitter=0.4, scale=(0.5, 1.0))


def loader_of(dataset, regime=REGIME, **kwargs):
    return create_loader(dataset, (3, 32, 32), regime.batch_size, regime=regime, **{**OPTIONS, **kwargs})


class Counting(torch.utils.data.Dataset):
    """Gives each image as its index in all pixels, and counts how often it is read."""
    transform = None

    def __init__(self, length=60):
        self.length = length
        self.reads = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads.append(index)
        return timm.data.dataset.Image.new('RGB', (24, 24), (index, index, index)), index


class Pictures(list):
    """A data set of images that come decoded."""
    transform = None


def test_shapes_follow_the_plan_and_duplicates_are_image_major():
    dataset = Counting()
    loader = loader_of(dataset, use_prefetcher=True, color_jitter=None, mean=(0, 0, 0), std=(1, 1, 1))
    groups = list(loader.batch_sampler.plan.groups())
    assert len(loader) == len(groups)
    for group, (images, targets) in zip(groups, loader):
        assert images.shape == (group.batch * group.duplicates, 3, group.size, group.size)
        assert images.dtype == torch.float32 and targets.dtype == torch.int64
        assert targets.tolist() == np.repeat(group.images, group.duplicates).tolist()
        assert (images[:, 0, 0, 0] * 255).round().long().tolist() == targets.tolist()


def test_an_image_is_decoded_once_for_all_its_duplicates():
    dataset = Counting()
    loader = loader_of(dataset)
    reads = loader.dataset.source.reads
    sum(1 for _ in loader)
    assert len(reads) == len(set(reads)) == 60 - loader.batch_sampler.plan.dropped


def test_duplicates_are_augmented_independently():
    regime = Regime.fixed(32, batch_size=4, duplicates=6)
    images, _ = next(iter(loader_of(DigitsDataset(), regime)))
    for copies in images.split(6):
        assert len({copy.numpy().tobytes() for copy in copies}) > 3


def collect(loader, epoch=1):
    loader.set_epoch(epoch)
    return [(images.clone(), targets.clone()) for images, targets in loader]


def assert_same(a, b):
    assert len(a) == len(b)
    for (images_a, targets_a), (images_b, targets_b) in zip(a, b):
        assert torch.equal(images_a, images_b) and torch.equal(targets_a, targets_b)


def test_workers_change_no_pixel(image_folder):
    dataset = create_dataset('', str(image_folder), 'train')
    options = dict(auto_augment='rand-m5-mstd0.5')
    plain = collect(loader_of(dataset, **options))
    assert_same(plain, collect(loader_of(dataset, num_workers=2, **options)))
    persistent = loader_of(dataset, num_workers=1, persistent_workers=True, **options)
    collect(persistent, 0)
    assert_same(plain, collect(persistent))


@pytest.mark.parametrize('scale', [(0.08, 1.0), (0.5, 1.0)])
def test_images_that_are_decoded_in_part_give_the_pixels_of_those_that_come_decoded(image_folder, scale):
    files = create_dataset('', str(image_folder), 'train')
    pictures = Pictures((image.copy(), target) for image, target in files)
    for regime in (Regime.fixed(32, batch_size=4), Regime.preset('cifar', 32, batch_size=4, adapt='d+')):
        assert_same(*(collect(loader_of(dataset, regime, scale=scale)) for dataset in (files, pictures)))


def test_ranks_change_no_pixel():
    whole = loader_of(Counting(64), Regime.fixed(32, batch_size=8))
    shares = [loader_of(Counting(64), Regime.fixed(32, batch_size=4), rank=r, world_size=2) for r in range(2)]
    for (images, targets), a, b in zip(collect(whole), *map(collect, shares)):
        assert torch.equal(images, torch.cat([a[0], b[0]])) and torch.equal(targets, torch.cat([a[1], b[1]]))


def test_epochs_and_seeds_differ_and_an_iteration_moves_on():
    loader = loader_of(DigitsDataset())
    first, second = list(loader), list(loader)
    assert loader.batch_sampler.epoch == 2
    assert not torch.equal(first[0][1], second[0][1])
    assert_same(second, collect(loader, 1))
    assert not torch.equal(first[0][1], next(iter(loader_of(DigitsDataset(), seed=7)))[1])


def test_the_callers_random_state_is_left_alone():
    loader = loader_of(DigitsDataset(), auto_augment='rand-m5')
    next(iter(loader))  # torch draws a base seed for each iteration
    iterator = iter(loader)
    next(iterator)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    draws = [random.random(), np.random.rand(), torch.rand(1)]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    next(iterator)
    assert [random.random(), np.random.rand(), torch.rand(1)] == draws


def test_mixup_mixes_the_flattened_batch():
    collate = FastCollateMixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0)
    regime = Regime.preset('cifar', 32, batch_size=9, batch_multiple=2)
    for group, (images, targets) in zip(
            loader_of(DigitsDataset(), regime).batch_sampler.plan.groups(),
            loader_of(DigitsDataset(), regime, collate_fn=collate)):
        assert images.shape[0] == group.batch * group.duplicates and group.batch % 2 == 0
        assert targets.shape == (len(images), 10)
        assert torch.allclose(targets.sum(1), torch.ones(len(images)), atol=1e-5)


def test_the_mixup_switch_is_timms():
    collate = FastCollateMixup(mixup_alpha=1.0, num_classes=10, label_smoothing=0.0)
    loader = loader_of(DigitsDataset(), Regime.fixed(32, batch_size=32), collate_fn=collate, num_workers=1)
    assert loader.mixup_enabled and (next(iter(loader))[1].max(1).values < 0.999).any()
    loader.mixup_enabled = False
    assert (next(iter(loader))[1].max(1).values > 0.999).all()


def test_workers_may_be_spawned(image_folder):
    dataset = create_dataset('', str(image_folder), 'train')
    plain = collect(loader_of(dataset, Regime.fixed(32, batch_size=8)))
    loader = loader_of(dataset, Regime.fixed(32, batch_size=8), num_workers=1)
    loader.loader.loader.multiprocessing_context = 'spawn'
    assert_same(plain, collect(loader))


def test_random_erasing_and_no_prefetcher():
    erased, _ = next(iter(loader_of(Counting(), re_prob=1.0, re_mode='const', mean=(0.5,) * 3, std=(0.5,) * 3)))
    assert (erased == 0).any()
    images, _ = next(iter(loader_of(Counting(), use_prefetcher=False)))
    assert images.dtype == torch.float32


def test_without_a_regime_it_is_timms_loader():
    loader = create_loader(DigitsDataset(), (3, 32, 32), 16, **OPTIONS)
    assert isinstance(loader, timm.data.loader.PrefetchLoader)
    torch.manual_seed(3)
    ours = [targets for _, targets in loader]
    torch.manual_seed(3)
    theirs = [targets for _, targets in timm.data.create_loader(DigitsDataset(), (3, 32, 32), 16, **OPTIONS)]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs)) and len(ours) == len(theirs)


def test_the_data_set_is_not_changed():
    dataset = DigitsDataset()
    marker = dataset.transform = object()
    assert isinstance(loader_of(dataset), MixSizeLoader)
    assert dataset.transform is marker


def test_a_broken_image_is_named_and_replaced(image_folder, caplog):
    (image_folder / 'train' / 'cat' / '003.jpg').write_bytes(b'not an image')
    whole = (image_folder / 'train' / 'dog' / '005.jpg').read_bytes()
    (image_folder / 'train' / 'dog' / '005.jpg').write_bytes(whole[:len(whole) // 2])
    dataset = create_dataset('', str(image_folder), 'train')
    with caplog.at_level(logging.WARNING):
        loader = loader_of(dataset, Regime.fixed(32, batch_size=4), max_bad_images=0.1)
        first = collect(loader, 0)
        collect(loader)
    assert [caplog.text.count(name) for name in ('cat/003.jpg', 'dog/005.jpg')] == [1, 1]
    assert_same(first, collect(loader_of(dataset, Regime.fixed(32, batch_size=4), max_bad_images=0.1,
                                         num_workers=2), 0))
    targets = torch.cat([t for _, t in first])
    assert len(targets) == 24 and targets.bincount().tolist() == [12, 12]
    assert {name[-11:] for name, _ in loader.bad_images.values()} == {'cat/003.jpg', 'dog/005.jpg'}


@pytest.mark.parametrize('num_workers', [0, 2])
def test_too_many_broken_images_end_the_iteration_with_their_names(image_folder, num_workers):
    for name in ('cat/003.jpg', 'cat/004.jpg', 'dog/005.jpg'):
        (image_folder / 'train' / name).write_bytes(b'not an image')
    dataset = create_dataset('', str(image_folder), 'train')
    loader = loader_of(dataset, Regime.fixed(32, batch_size=4), max_bad_images=2 / 24, num_workers=num_workers)
    with pytest.raises(BadImagesError, match='3 of 24 images cannot be read, more than the 8.333% allowed: .*/cat/.*'
                                             'repair or remove them, or raise --max-bad-images') as error:
        collect(loader, 0)
    assert '\n' not in str(error.value) and error.value.images == loader.bad_images and len(loader.bad_images) == 3


def test_limits_out_of_range_are_refused():
    with pytest.raises(ValueError, match='max_bad_images must be in'):
        loader_of(DigitsDataset(), max_bad_images=1.5)
    with pytest.raises(ValueError, match='worker_timeout must not be negative'):
        loader_of(DigitsDataset(), worker_timeout=-1)


def test_nothing_but_broken_images_is_an_error(image_folder):
    for path in (image_folder / 'train').rglob('*.jpg'):
        path.write_bytes(b'')
    for num_workers in (0, 1):
        loader = loader_of(create_dataset('', str(image_folder), 'train'), Regime.fixed(32, batch_size=4),
                           num_workers=num_workers, max_bad_images=1)
        with pytest.raises(BadImagesError, match='10 images in a row cannot be read') as error:
            next(iter(loader))
        assert len(error.value.images) == 10


def test_contradictions_are_named():
    with pytest.raises(ValueError, match='regime is for training'):
        loader_of(DigitsDataset(), is_training=False)
    with pytest.raises(ValueError, match='num_aug_splits cannot be had together with a regime'):
        loader_of(DigitsDataset(), num_aug_splits=2)
    with pytest.raises(ValueError, match='is not the base size 32'):
        create_loader(DigitsDataset(), (3, 48, 48), 8, True, regime=REGIME)
    with pytest.raises(ValueError, match='batch_size 4 is not the 8'):
        create_loader(DigitsDataset(), 32, 4, True, regime=REGIME)


class Framed(torch.utils.data.Dataset):
    """Grey images of 24 px that know no colour but one, as PIL images, arrays or tensors."""
    transform = None

    def __init__(self, kind=None):
        self.kind = kind

    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = timm.data.dataset.Image.new('RGB', (24, 24), (200, 200, 200))
        array = np.asarray(image)
        image = {'array': array, 'tensor': torch.from_numpy(array.copy()).permute(2, 0, 1)}.get(self.kind, image)
        return (image if self.transform is None else self.transform(image)), index


PADDED = dict(scale=None, color_jitter=None, mean=(0, 0, 0), std=(1, 1, 1), train_pad=6)


def black_border(images):
    """Share of black rows and columns of each image, which nothing but the border is."""
    black = (images < 0.1).all(1).float()
    return black.mean(2).gt(0.99).float().mean(1), black.mean(1).gt(0.99).float().mean(1)


@pytest.mark.parametrize('kind', [None, 'array', 'tensor'])
def test_crops_are_of_the_padded_image_at_every_size(kind):
    for images, _ in loader_of(Framed(kind), **PADDED):
        rows, columns = black_border(images)
        assert max(rows.max(), columns.max()) <= 0.25 + 1 / images.shape[-1]
        assert len(set(rows.tolist())) > 1 and len(set(columns.tolist())) > 1
        assert images.max() == pytest.approx(200 / 255, abs=0.01)


def test_calibration_and_timms_own_loader_pad_alike():
    options = {**OPTIONS, **PADDED}
    calibration = create_calibration_loader(Framed(), (3, 16, 16), 40, 1, **{**options, 'is_training': True})
    plain = create_loader(Framed(), (3, 16, 16), 40, **options)
    for loader in (calibration, plain, create_loader(Framed(), (3, 16, 16), 40, use_prefetcher=False, **options)):
        (images, _), = loader
        rows, columns = black_border(images)
        assert images.shape == (40, 3, 16, 16) and rows.max() > 0.1 and columns.max() > 0.1
        assert 0.02 < rows.mean() < 0.2  # 6 of 24 pixels at most, on average an eighth


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('shape', [(3, 32, 32), (3, 48, 24)])
def test_calibration_as_in_use_gives_the_pixels_of_timms_evaluation(image_folder, shape, num_workers):
    dataset = create_dataset('', str(image_folder), 'train')
    options = dict(crop_pct=0.9, interpolation='bicubic', num_workers=num_workers, device=torch.device('cpu'))
    (images, _), = timm.data.create_loader(dataset, shape, 1000, **options)
    loaders = [create_calibration_loader(dataset, shape, 4, is_training=False, rank=rank, world_size=2, **options)
               for rank in (0, 1)]
    given = torch.cat([batch for loader in loaders for batch, _ in loader])
    assert given.shape == images.shape
    order = torch.cdist(given.flatten(1), images.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(len(images))) != order.tolist()
    torch.testing.assert_close(given, images[order], rtol=0, atol=1e-6)


def test_workers_change_no_pixel_of_padded_crops(image_folder):
    dataset = create_dataset('', str(image_folder), 'train')
    options = dict(PADDED, scaled_decoding=True)
    assert_same(collect(loader_of(dataset, **options)), collect(loader_of(dataset, num_workers=1, **options)))


def test_a_crop_is_padded_or_timms_not_both():
    for name, value in (('scale', (0.5, 1)), ('ratio', (1, 1)), ('train_crop_mode', 'rrc'), ('no_aug', True)):
        for regime in (REGIME, None):
            with pytest.raises(ValueError, match=f'train_pad and {name} exclude each other'):
                create_loader(Framed(), (3, 32, 32), 8, regime=regime, **{**OPTIONS, **PADDED, name: value})
    with pytest.raises(ValueError, match='there is none'):
        create_loader(Framed(), (3, 32, 32), 8, train_pad=4, device=torch.device('cpu'))
