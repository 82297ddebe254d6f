"""The embedded digits, and the faults of a data folder."""
import io
import struct
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from timm.data import ImageDataset
from torchvision.datasets import ImageFolder

from mixsize_timm.datasets import (
    BadImagesError,
    DigitsDataset,
    ReadableDataset,
    check_classes,
    check_splits,
    class_names,
    create_dataset,
)


def test_digits_are_split_for_good():
    train, validation = DigitsDataset('train'), DigitsDataset('validation')
    assert (len(train), len(validation)) == (1437, 360)
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in validation.images}
    assert np.bincount(validation.targets).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert int(train.images.sum()) == 7162982 and train.targets[:8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_digits_are_timm_compatible():
    dataset = create_dataset('digits', split='train')
    image, target = dataset[3]
    assert isinstance(image, Image.Image) and image.mode == 'RGB' and image.size == (8, 8)
    assert isinstance(target, int) and 0 <= target < 10
    dataset.transform = lambda image: image.size
    assert dataset[3] == ((8, 8), target)
    assert create_dataset('digits', split='train', input_img_mode='L')[0][0].mode == 'L'
    assert class_names(dataset) == [str(d) for d in range(10)]


def test_a_folder_is_timms(image_folder):
    dataset = create_dataset('', str(image_folder), 'train')
    assert isinstance(dataset.dataset, ImageDataset) and len(dataset) == 24
    assert class_names(dataset) == ['cat', 'dog']


def test_a_tar_file_works(tmp_path, image_folder):
    path = tmp_path / 'images.tar'
    with tarfile.open(path, 'w') as tar:
        tar.add(image_folder / 'train', arcname='train')
    dataset = create_dataset('', str(path), 'train')
    assert len(dataset) == 24 and dataset[0][0].size == (40, 30)
    assert dataset._known_classes().tolist() == [0] * 12 + [1] * 12


def test_a_torchvision_data_set_works(image_folder):
    dataset = create_dataset('torch/image_folder', str(image_folder), 'train')
    assert len(dataset) == 24 and class_names(dataset) == ['cat', 'dog']


def test_a_hugging_face_data_set_works(tmp_path):
    buffer = io.BytesIO()
    Image.new('RGB', (8, 8)).save(buffer, 'PNG')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
    rows = {'image': [{'bytes': buffer.getvalue(), 'path': None}] * 3, 'label': [0, 1, 0]}
    (tmp_path / 'hf').mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'hf' / 'train.parquet')
    dataset = create_dataset(f'hfds/{tmp_path / "hf"}', str(tmp_path / 'cache'), 'train')
    assert len(dataset) == 3 and class_names(dataset) == ['a', 'b']
    assert dataset[1][0].size == (8, 8) and dataset[1][1] == 1
    assert dataset._known_classes().tolist() == [0, 1, 0]


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no data at '/nowhere': check --data-dir"):
        create_dataset('', '/nowhere')


def test_a_folder_without_images_is_named(tmp_path):
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    with pytest.raises(ValueError, match='Found 0 images'):
        create_dataset('', str(tmp_path), 'train')


def test_an_empty_class_folder_is_named(image_folder):
    (image_folder / 'train' / 'bird').mkdir()
    with pytest.raises(ValueError, match="bird' holds no images"):
        create_dataset('', str(image_folder), 'train')
    (image_folder / 'classes.txt').write_text('bird\ncat\ndog\n')
    assert len(create_dataset('', str(image_folder), 'train', class_map=str(image_folder / 'classes.txt'))) == 24


def test_nested_class_folders_are_not_empty(image_folder):
    write_images(image_folder / 'train' / 'birds' / 'owl', 2)
    assert class_names(create_dataset('', str(image_folder), 'train')) == ['cat', 'dog', 'owl']


def test_an_unknown_data_set_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot open the 'train' split of 'torch/nonsense'") as error:
        create_dataset('torch/nonsense', str(tmp_path), 'train')
    assert '\n' not in str(error.value)


def test_class_counts_and_names_must_agree(image_folder):
    train = create_dataset('', str(image_folder), 'train')
    validation = create_dataset('', str(image_folder), 'validation')
    check_classes(train, validation, num_classes=2)
    check_classes(train, None, num_classes=1000)
    with pytest.raises(ValueError, match='2 classes, the model 1: use --num-classes 2'):
        check_classes(train, validation, num_classes=1)
    write_images(image_folder / 'train' / 'bird', 1)
    with pytest.raises(ValueError, match='differ in bird'):
        check_classes(create_dataset('', str(image_folder), 'train'), validation, num_classes=3)


def test_a_class_may_have_several_names_and_a_subclass_another_root(image_folder):
    class Synonyms(ImageFolder):  # as torchvision's ImageNet is
        def __init__(self, root, split):
            super().__init__(f'{root}/{split}')
            self.root = str(root)
            self.class_to_idx = {'cat': 0, 'tabby': 0, 'dog': 1}

    train, validation = (ReadableDataset(Synonyms(image_folder, split)) for split in ('train', 'validation'))
    check_splits(train, validation, 'validation')
    check_classes(train, validation, num_classes=2)
    with pytest.raises(ValueError, match='2 classes, the model 1'):
        check_classes(train, validation, num_classes=1)


def test_a_split_that_was_not_found_is_named(image_folder):
    train = create_dataset('', str(image_folder), 'train')
    check_splits(train, create_dataset('', str(image_folder), 'validation'), 'validation')
    with pytest.raises(ValueError, match="no 'test' split beside"):
        check_splits(train, create_dataset('', str(image_folder), 'test'), 'test')
    with pytest.raises(ValueError, match="no training split beside '.*validation': name one with --train-split"):
        check_splits(create_dataset('', str(image_folder), 'test'), create_dataset('', str(image_folder), 'validation'),
                     'validation')


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_a_broken_file_is_named_and_replaced_by_one_of_its_class_in_any_data_set(image_folder, caplog, name):
    (image_folder / 'train' / 'cat' / '011.jpg').write_bytes(b'broken')
    dataset = create_dataset(name, str(image_folder), 'train')
    for _ in range(2):
        image, target = dataset[11]  # the next file would be the first of the dogs
        assert target == 0 and image.size == (40, 30)
    assert caplog.text.count('cat/011.jpg, another one takes its place') == 1
    dataset.transform = lambda image: image.mode
    assert dataset[0] == ('RGB', 0)


class Held(torch.utils.data.Dataset):
    """Eight images, of which some cannot be read; an image tells its number by its width."""

    def __init__(self, broken, **attributes):
        self.broken = broken
        vars(self).update(attributes)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index in self.broken:
            raise struct.error('cut off')
        return Image.new('RGB', (index + 1, 1)), index % 2


def width(dataset, index, *key):
    return dataset.read(index, *key)[0].size[0] - 1


@pytest.mark.parametrize('attributes', [
    dict(targets=[0, 1] * 4), dict(targets=torch.tensor([0, 1] * 4)), dict(labels=np.array([0, 1] * 4)),
    dict(samples=[(f'{i}.jpg', i % 2) for i in range(8)])], ids=['list', 'tensor', 'labels', 'samples'])
def test_classes_are_told_without_reading_images(attributes):
    dataset = ReadableDataset(Held({2}, **attributes))
    drawn = [width(dataset, 2, seed, epoch) for seed in range(4) for epoch in range(4)]
    assert set(drawn) == {0, 4, 6}
    assert drawn == [width(dataset, 2, seed, epoch) for seed in range(4) for epoch in range(4)]


@pytest.mark.parametrize('broken, attributes, expected', [
    ({3}, {}, 4),
    ({3, 4}, {}, 5),
    ({7}, {}, 0),
    ({3}, dict(targets=[[0, 1]] * 8), 4),  # of several labels
    ({3}, dict(targets=[0] * 7), 4),
    ({1, 3, 5, 7}, dict(targets=[0, 1] * 4), 4),
    ({3}, dict(targets=[0, 1, 2, 3, 4, 5, 6, 7]), 4),
], ids=str)
def test_the_next_readable_image_is_taken_where_the_class_offers_none(broken, attributes, expected):
    dataset = ReadableDataset(Held(broken, **attributes))
    image, target, bad_images = dataset.read(min(broken - {1}))
    assert image.size[0] - 1 == expected and target == expected % 2
    assert set(bad_images) <= broken and all(reason == 'cut off' for _, reason in bad_images.values())


def test_ten_in_a_row_are_an_error():
    with pytest.raises(BadImagesError, match='10 images in a row cannot be read, the last one number 1: cut') as error:
        ReadableDataset(Held(set(range(8))))[0]
    assert set(error.value.images) == set(range(8))


def test_an_error_of_the_transform_is_not_a_bad_image():
    dataset = ReadableDataset(Held(set()))
    dataset.transform = lambda image: image.no_such_thing
    with pytest.raises(AttributeError, match='no_such_thing'):
        dataset[0]
