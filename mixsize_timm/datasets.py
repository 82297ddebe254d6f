"""Data sets: the embedded digits, and timm's with their faults found before the first step."""
import copy
import logging
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import timm.data
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from .images import OpenedImage, Part, Picture, unreadable
from .randomness import own_randomness

_logger = logging.getLogger(__name__)

DIGITS = 'digits'
_TRAIN_SPLITS = ('train', 'training')


class BadImagesError(RuntimeError):
    """Too many images cannot be read; the message is one line that says which and what to do.

    Attributes:
        images: Index of each -> its path and the reason.
    """

    def __init__(self, message: str, images: Optional[Dict[int, Tuple[str, str]]] = None) -> None:
        super().__init__(message)
        self.images = dict(images or {})


class ReadableDataset(Dataset):
    """A map-style data set of images in which a file that cannot be read does not end the run.

    Another image of its class takes its place, drawn by (key, index); where the class cannot be told without reading
    images, or has no other image, the next image does, with its own target. The file is named in a warning. (timm's
    ``ImageDataset`` takes the next image whatever its class and does not name the file; so its reader is read.)

    timm's readers are asked for encoded images; other data sets, such as torchvision's, decode and convert their images
    themselves.

    Args:
        dataset: Data set of targets and PIL images, or arrays or tensors as :class:`~mixsize_timm.images.OpenedImage`
            takes them. It is not changed; its ``transform`` attribute is not used.
    """
    MAX_UNREADABLE = 10  # in a row, as in timm

    def __init__(self, dataset: Any) -> None:
        self.dataset = copy.copy(dataset)
        self.dataset.transform = None
        self.transform: Optional[Callable] = None
        self._is_timms = isinstance(dataset, timm.data.ImageDataset) and not dataset.load_bytes
        self._reported: Set[int] = set()  # copies share it
        self._classes: Optional[np.ndarray] = None  # int [N], empty where they cannot be told

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        """The image, transformed where a ``transform`` is set, and its target.

        Raises:
            BadImagesError: Ten images in a row cannot be read.
        """
        image, target, bad_images = self._read(index, (), self._pil)
        for bad, (name, reason) in bad_images.items():
            self.report(bad, name, reason)
        return (image if self.transform is None else self.transform(image)), target

    def read(self, index: int, *key: int, part: Optional[Callable[[Tuple[int, int]], Optional[Part]]] = None
             ) -> Tuple[Picture, Any, Dict[int, Tuple[str, str]]]:
        """The pixels of an image, or of what takes its place, not transformed; nothing is logged.

        Args:
            index: The image.
            *key: What the choice of another image depends on beside it, such as seed and epoch; not negative.
            part: What of an image is needed, given its width and height; see
                :meth:`~mixsize_timm.images.OpenedImage.decode`.

        Returns:
            The image, its target, and the images that cannot be read: index -> path, reason.

        Raises:
            BadImagesError: Ten images in a row cannot be read.
        """
        def decode(candidate: int) -> Tuple[Picture, Any]:
            opened, target = self._open(candidate)
            return opened.decode(part), target

        return self._read(index, key, decode)

    def _read(self, index: int, key: Tuple[int, ...], decode: Callable[[int], Tuple[Any, Any]]
              ) -> Tuple[Any, Any, Dict[int, Tuple[str, str]]]:
        bad_images: Dict[int, Tuple[str, str]] = {}
        for candidate in self._candidates(index, key):
            try:
                image, target = decode(candidate)
                break
            except Exception as error:  # PIL raises errors of every kind for broken files
                bad_images[candidate] = self.name(candidate), unreadable(error)
        else:
            name, reason = bad_images[candidate]
            raise BadImagesError(
                f'{self.MAX_UNREADABLE} images in a row cannot be read, the last one {name}: {reason}', bad_images)
        if self._is_timms and target is None:
            target = -1  # as timm has it
        elif self._is_timms and self.dataset.target_transform is not None:
            target = self.dataset.target_transform(target)
        return image, target, bad_images

    def report(self, index: int, name: str, reason: str) -> None:
        """Warn of an image that cannot be read, once in this process."""
        if index not in self._reported:
            self._reported.add(index)
            _logger.warning('Cannot read image %s, another one takes its place: %s', name, reason)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def name(self, index: int) -> str:
        """Path of an image where the data set knows it, else its number."""
        try:
            name = (self.dataset.filename(index, absolute=True) if self._is_timms
                    else self.dataset.samples[index][0])  # as torchvision's folders have it
        except Exception:  # not every data set has names, and a broken one may not give them
            name = None
        return name if isinstance(name, str) else f'number {index}'

    def _candidates(self, index: int, key: Tuple[int, ...]) -> Iterator[int]:
        """The image, others of its class in an order drawn by the key, then those that follow it: ten in all."""
        yield index
        others = np.zeros(0, int)
        classes = self._known_classes()
        if len(classes):
            others = np.flatnonzero(classes == classes[index])
            others = others[others != index]
            count = min(len(others), self.MAX_UNREADABLE - 1)
            others = np.random.default_rng((*key, index)).choice(others, count, replace=False)
        yield from others.tolist()
        for step in range(1, self.MAX_UNREADABLE - len(others)):
            yield (index + step) % len(self)

    def _known_classes(self) -> np.ndarray:
        if self._classes is None:
            try:
                classes = _classes_of(self.dataset)
            except Exception:  # no more than a guess how the data set keeps them
                classes = np.zeros(0, np.int32)
            told = classes.shape == (len(self),) and classes.dtype.kind in 'iu'
            self._classes = classes.astype(np.int32) if told else np.zeros(0, np.int32)
        return self._classes

    def _open(self, index: int) -> Tuple[OpenedImage, Any]:
        if not self._is_timms:
            image, target = self.dataset[index]
            return OpenedImage(image, None), target
        file, target, *_ = self.dataset.reader[index]
        with file:
            return OpenedImage(file.read(), self.dataset.input_img_mode), target

    def _pil(self, index: int) -> Tuple[Any, Any]:
        if not self._is_timms:
            return self.dataset[index]
        opened, target = self._open(index)
        return opened.pil(), target


def _classes_of(dataset: Any) -> np.ndarray:
    """Class of each image without reading images, where the data set keeps it in one of the ways known here."""
    reader: Any = getattr(dataset, 'reader', None)
    if isinstance(getattr(reader, 'label_key', None), str):  # timm's of a Hugging Face data set
        column = reader.dataset.select_columns([reader.label_key]).with_format('numpy')
        return np.asarray(column[:][reader.label_key])
    source = dataset if reader is None else reader
    for name in ('targets', 'labels'):
        if getattr(source, name, None) is not None:
            return np.asarray(getattr(source, name))
    return np.fromiter((target for _, target in source.samples), np.int32, len(dataset))


class DigitsDataset(Dataset):
    """scikit-learn's digits: 1,797 scans of handwritten digits, 8×8 pixels in 17 grey levels, ten classes.

    The split is fixed, stratified by class: 1,437 images for training and 360 for validation. An item is a PIL
    image and its class; where a ``transform`` is set, as timm's ``create_loader`` does, its result and the class.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (CC BY 4.0), the test part.

    Args:
        split: ``train`` or ``training`` for the training images; any other name for the validation images.
        input_img_mode: PIL mode of the images.
    """
    NUM_VALIDATION = 360

    def __init__(self, split: str = 'train', input_img_mode: str = 'RGB') -> None:
        with own_randomness():  # scikit-learn draws from Python's generator when it is imported
            from sklearn.datasets import load_digits  # slow to import, and needed here only
            from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(
            np.arange(len(digits.target)), test_size=self.NUM_VALIDATION, stratify=digits.target, random_state=0)
        chosen = np.sort(parts[0] if split in _TRAIN_SPLITS else parts[1])
        self.images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # [N, 8, 8]
        self.targets = digits.target[chosen].astype(np.int64)
        self.classes = [str(name) for name in digits.target_names]
        self.input_img_mode = input_img_mode
        self.transform: Optional[Callable] = None

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image: Any = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        if self.transform is not None:
            image = self.transform(image)
        return image, int(self.targets[index])

    def __len__(self) -> int:
        return len(self.targets)


def create_dataset(name: str, root: Optional[str] = None, split: str = 'validation', **kwargs: Any) -> Dataset:
    """timm's ``create_dataset``, and ``digits`` as one more name; what cannot work is said here.

    A map-style data set is returned as a :class:`ReadableDataset`.

    Args:
        name: Any name that ``timm.data.create_dataset`` knows, or ``digits``.
        root: Root folder, as timm has it.
        split: Split, as timm has it.
        **kwargs: The other arguments of ``timm.data.create_dataset``.

    Raises:
        FileNotFoundError: The folder does not exist, or holds no images.
        ValueError: A class folder is empty, or timm does not know the name.
    """
    if name == DIGITS:
        return DigitsDataset(split, kwargs.get('input_img_mode', 'RGB'))
    if '/' not in name and not os.path.exists(root or ''):
        raise FileNotFoundError(f'no data at {root!r}: check --data-dir')
    try:
        dataset = timm.data.create_dataset(name, root=root, split=split, **kwargs)
    except (AssertionError, RuntimeError, OSError, ImportError) as error:  # as timm and the libraries behind it refuse
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'cannot open the {split!r} split of {name or root!r}: {reason}') from error
    if isinstance(dataset, IterableDataset):
        return dataset
    if not len(dataset):
        raise FileNotFoundError(f'the {split!r} split of {name or root!r} holds no images')
    if not kwargs.get('class_map'):
        _check_class_folders(dataset)
    return ReadableDataset(dataset)


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """Names of a data set's classes in the order of their indices, or ``None`` where it does not tell them."""
    index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None)
    if index:
        by_number = {number: str(name) for name, number in index.items()}  # some classes have several names
        return [by_number.get(number, '') for number in range(max(by_number) + 1)]
    names = getattr(dataset, 'classes', None)
    return [str(name) for name in names] if names is not None else None


def check_classes(train: Dataset, validation: Optional[Dataset], num_classes: int) -> None:
    """Refuse class counts and names that disagree.

    Raises:
        ValueError: The data has more classes than the model, or the two splits number their classes differently.
    """
    names = class_names(train)
    if names is None:
        return
    if len(names) > num_classes:
        raise ValueError(f'the data has {len(names)} classes, the model {num_classes}: use --num-classes {len(names)}')
    other = class_names(validation) if validation is not None else None
    if other is not None and other != names:
        odd = sorted(set(names) ^ set(other)) or ['the order of the classes']
        raise ValueError(f'the training and the validation split differ in {", ".join(odd[:5])}: '
                         'labels would not mean the same; give both the same class folders, or a --class-map')


def check_splits(train: Dataset, validation: Dataset, split: str) -> None:
    """Refuse a split that timm has not found: it reads the whole folder then, the other split's images and all.

    Raises:
        ValueError: One split's images lie in the other's folder or file.
    """
    roots = [os.path.abspath(root) for root in map(_image_root, (train, validation)) if root]
    if len(roots) < 2:
        return
    whole = os.path.commonpath(roots)
    if whole == roots[1]:
        raise ValueError(f'no {split!r} split beside {roots[0]!r}: name one with --val-split, or none with '
                         '--val-split ""')
    if whole == roots[0]:
        raise ValueError(f'no training split beside {roots[1]!r}: name one with --train-split')


def check_not_train(validation: Dataset, root: Optional[str], split: str, train_split: str) -> None:
    """The same where no training split is opened: told from the folder that it would lie in.

    Raises:
        ValueError: The images are those of the whole folder, of which the training split is a part.
    """
    place = _image_root(validation)
    if place and root and train_split and os.path.realpath(place) == os.path.realpath(root) and os.path.isdir(
            os.path.join(root, train_split)):
        raise ValueError(f'no {split!r} split in {root!r}, only {train_split!r}: name one with --val-split')


def _image_root(dataset: Any) -> Optional[str]:
    """The folder or tar file that holds just this split's images, where the data set is of that kind."""
    reader = getattr(dataset, 'reader', None)
    if isinstance(reader, (ReaderImageFolder, ReaderImageInTar)):
        return reader.root
    inner = getattr(dataset, 'dataset', None)
    if inner is not None and type(inner) is ImageFolder:  # its subclasses mean other things by their root
        return str(inner.root)
    return None


def _check_class_folders(dataset: Dataset) -> None:
    reader = getattr(dataset, 'reader', None)
    root, index = getattr(reader, 'root', None), getattr(reader, 'class_to_idx', None)
    if index is None or not isinstance(root, str) or not os.path.isdir(root):
        return
    with os.scandir(root) as entries:
        folders = [e.path for e in entries if e.is_dir() and e.name not in index and not e.name.startswith('.')]
    empty = [path for path in sorted(folders) if not any(e.is_dir() for e in os.scandir(path))]
    if empty:
        raise ValueError(f'the class folder {empty[0]!r} holds no images: add some, remove the folder, '
                         'or list the classes in a --class-map')
