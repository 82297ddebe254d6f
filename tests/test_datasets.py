"""The embedded digits, and the faults of a data folder."""
import io
import tarfile

import datasets
import numpy as np
import pytest
from conftest import write_images
from PIL import Image
from timm.data import ImageDataset
from torchvision.datasets import ImageFolder

from mixsize_timm.datasets import (
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


@pytest.mark.parametrize('name', ['', 'torch/image_folder'])
def test_a_broken_file_is_named_and_replaced_in_any_data_set(image_folder, caplog, name):
    (image_folder / 'train' / 'cat' / '011.jpg').write_bytes(b'broken')
    dataset = create_dataset(name, str(image_folder), 'train')
    image, target = dataset[11]
    assert target == 1 and image.size == (40, 30)  # the next file is the first of the dogs
    assert ('cat/011.jpg' in caplog.text) if name == '' else ('number 11' in caplog.text)
    dataset.transform = lambda image: image.mode
    assert dataset[0] == ('RGB', 0)
