"""The MixSize loader: images decoded once, duplicated, and transformed for the size of their step."""
import copy
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from .buffers import Recycled, SharedSlots
from .datasets import ReadableDataset
from .images import Part, Picture
from .randomness import own_randomness, seed_for
from .regime import Regime
from .regularization import SizeRegularization
from .sampler import DealtBatchSampler, Group, MixSizeBatchSampler
from .streaming import WINDOW, StreamBatches, StreamLoader, num_images
from .transforms import Box, TensorTransform, pad_crop
from .workers import Read, Watched, WatchedLoader, WorkerError, read_batch

_OF_TIMMS_SAMPLERS = (
    'input_size_choices', 'batch_size_choices', 'batch_choice_weights', 'batch_schedule_epochs', 'num_batches',
    'num_aug_repeats', 'num_aug_splits', 'use_multi_epochs_loader')
_OF_TIMMS_CROP = ('no_aug', 'train_crop_mode', 'scale', 'ratio')
_WAITED_FOR = ('cpu', 'cuda')  # devices of which it is known that a batch's memory is read when it is let go


class BatchMaker:
    """Makes the batch of a :class:`~mixsize_timm.sampler.Group`: each image decoded once, transformed ``D`` times.

    An augmentation is a function of (seed, epoch, image, duplicate): the number of workers or processes changes no
    pixel, and neither does what was drawn before. (Mixup is drawn for a process's batch as a whole.) The caller's
    random state is left as it was.

    Args:
        transforms: A transform for each size in pixels.
        collate_fn: Makes a batch of a list of samples; timm's mixup is one. ``None`` to stack them.
        seed: Seed of the run.
        set_size: Called with the size of each batch before it is made.
        scaled_decoding: Decode a JPEG at 1/2, 1/4 or 1/8 where no crop of it is enlarged for that.

    Attributes:
        slots: Where workers put the batches that they stack, if not in memory of their own.
    """

    def __init__(
            self,
            transforms: Dict[int, TensorTransform],
            collate_fn: Optional[Callable] = None,
            seed: int = 42,
            set_size: Optional[Callable[[int], None]] = None,
            scaled_decoding: bool = False,
    ) -> None:
        self.transforms = transforms
        self.collate_fn: Any = collate_fn
        self.seed = seed
        self.set_size = set_size
        self.scaled_decoding = scaled_decoding
        self.slots: Optional[SharedSlots] = None
        # number and size of the image whose crop was drawn last, and the crop
        self._drawn: Optional[Tuple[int, Tuple[int, int], Optional[Box]]] = None

    def part(self, group: Group, number: int, size: Tuple[int, int]) -> Optional[Part]:
        """What of an image all of its duplicates need, as far as it is worth the while to draw their crops for it.

        Args:
            group: The group.
            number: Number of the image, as in :meth:`__call__`.
            size: Width and height of the image in pixels.
        """
        if group.duplicates > 1 and not self.scaled_decoding:
            return None  # two crops already need nearly all rows
        transform, parts = self.transforms[group.size], []
        for duplicate in range(group.duplicates):
            seed_for(self.seed, group.epoch, number, duplicate)
            box = transform.box(size)
            parts.append(transform.part(size, box))
        self._drawn = (number, size, box) if len(parts) == 1 else None
        bottoms, denominators = zip(*parts)
        return Part(max(bottoms), min(denominators) if self.scaled_decoding else None)

    def __call__(self, group: Group, images: Iterable[Tuple[Picture, Any, int]], num_images: int) -> Any:
        """The batch of ``num_images * duplicates`` samples, the duplicates of an image one after the other.

        Args:
            group: The group.
            images: Each image's pixels, its target, and a number that tells it from the others of the epoch.
            num_images: Number of the images.
        """
        transform = self.transforms[group.size]
        if self.set_size is not None:
            self.set_size(group.size)
        samples: Any = _Batch(num_images * group.duplicates, self.slots) if self.collate_fn is None else []
        first = 0
        with own_randomness():
            for picture, target, number in images:
                first = first if len(samples) else number
                for duplicate in range(group.duplicates):
                    box = self._take_drawn(number, picture.size)
                    if box is None:
                        seed_for(self.seed, group.epoch, number, duplicate)
                    samples.append((transform(picture, box), target))
            if self.collate_fn is None:
                return samples.collated()
            if hasattr(self.collate_fn, 'mixup_enabled'):
                self.collate_fn.mixup_enabled = group.mixup
            seed_for(self.seed, group.epoch, first, -1)
            return self.collate_fn(samples)

    def _take_drawn(self, number: int, size: Tuple[int, int]) -> Optional[Box]:
        """The crop of an image, if it was the last thing drawn; so it is drawn once."""
        drawn, self._drawn = self._drawn, None
        return drawn[2] if drawn is not None and drawn[:2] == (number, size) else None


class MixSizeDataset(Watched, Dataset):
    """Answers a :class:`~mixsize_timm.sampler.Group` with its batch.

    Args:
        dataset: Data set of images and targets.
        maker: Makes the batches.
        num_workers: Number of workers that make batches.
    """

    def __init__(self, dataset: ReadableDataset, maker: BatchMaker, num_workers: int = 0) -> None:
        super().__init__(dataset, num_workers)
        self.maker = maker

    def __getitems__(self, group: Group) -> Read:
        """The batch, and what could not be read for it.

        Raises:
            WorkerError: In a worker, for any error of a transform or of the collation.
        """
        assert group.images is not None, 'a MixSize loader plans its own images'
        length = len(group.images)
        return read_batch(lambda bad: self.maker(group, self._images(group, bad), length), self.place)

    def _images(self, group: Group, bad_images: Dict[int, Tuple[str, str]]) -> Iterator[Tuple[Picture, Any, int]]:
        assert group.images is not None
        for index in group.images.tolist():
            with self.heartbeats.at(index):
                picture, target, bad = self.source.read(
                    index, self.maker.seed, group.epoch, part=partial(self.maker.part, group, index))
                bad_images.update(bad)
                yield picture, target, index

    def __len__(self) -> int:
        return len(self.source)


class _Batch:
    """Samples put one after the other where the main process will read them, as timm's ``fast_collate`` has them.

    Args:
        length: Number of samples.
        slots: Where a worker finds memory for them.
    """

    def __init__(self, length: int, slots: Optional[SharedSlots]) -> None:
        self.length = length
        self.slots = slots
        self.targets: List[Any] = []
        self.sent: Any = None  # what travels in the place of the images

    def __len__(self) -> int:
        return len(self.targets)

    def append(self, sample: Tuple[torch.Tensor, Any]) -> None:
        image, target = sample
        if not self.targets:
            self._open((self.length, *image.shape), image.dtype)
        elif image.shape != self.images.shape[1:] or image.dtype != self.images.dtype:
            raise ValueError(f'an image of {_kind(image)} in a batch of {_kind(self.images[0])}: a data set must '
                             'convert its images to the same number of channels')
        self.images[len(self.targets)].copy_(image)
        self.targets.append(target)

    def _open(self, shape: Tuple[int, ...], dtype: torch.dtype) -> None:
        worker = get_worker_info()
        found = self.slots.empty(worker.id, shape, dtype) if worker and self.slots is not None else None
        self.images, self.sent = found or (torch.empty(shape, dtype=dtype), self.sent)

    def collated(self) -> Tuple[Any, torch.Tensor]:
        targets = default_collate(self.targets)
        return self.images if self.sent is None else self.sent, targets.long() if targets.ndim == 1 else targets


def _kind(image: torch.Tensor) -> str:
    return f'{"x".join(map(str, image.shape))} {str(image.dtype)[6:]}'


class _OnHost(PrefetchLoader):
    """timm's prefetcher where the device is the host: there is nothing to fetch, and memory to use again.

    Args:
        prefetcher: timm's.
    """
    IN_CACHE = 1 << 18  # values that are normalised at a time, to stay in the cache of a core meanwhile

    def __init__(self, prefetcher: PrefetchLoader) -> None:
        vars(self).update(vars(prefetcher))
        self.memory = Recycled()

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for images, targets in self.loader:
            normalised = self.memory.empty(images.shape, self.img_dtype)
            length = max(1, self.IN_CACHE // images[0].numel())
            for part, pixels in zip(normalised.split(length), images.split(length)):
                part.copy_(pixels).sub_(self.mean).div_(self.std)
            yield normalised if self.random_erasing is None else self.random_erasing(normalised), targets


def _collated(batch: Any) -> Any:
    return batch


class SeededErasing:
    """timm's random erasing as a function of (seed, epoch, number of the batch, process).

    timm's prefetcher erases on the device one batch ahead; drawn from the process's own generators, what is erased
    would depend on what else draws from them, and a resumed run would erase elsewhere.

    Args:
        erasing: timm's ``RandomErasing``.
        seed: Seed of the run.
        rank: This process.
    """

    def __init__(self, erasing: Any, seed: int, rank: int = 0) -> None:
        self.erasing = erasing
        self.key = (seed, rank)
        self.start(0, 0)

    def start(self, epoch: int, batch: int) -> None:
        """Choose the epoch and the number of the batch that comes next."""
        self.epoch, self.batch = epoch, batch

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with own_randomness(*self.key, self.epoch, self.batch, -2, device=images.device):
            self.batch += 1
            return self.erasing(images)


class MixSizeLoader:
    """What :func:`create_loader` returns: iterates over ``(images, targets)``, one pair for each group of the plan.

    An iteration that runs to its end moves on to the next epoch; :meth:`set_epoch` chooses one.

    Attributes:
        batch_sampler: The :class:`~mixsize_timm.sampler.MixSizeBatchSampler`; its ``plan`` is the epoch's.
        dataset: The :class:`MixSizeDataset`.
    """

    def __init__(self, loader: Any, batch_sampler: MixSizeBatchSampler) -> None:
        self.loader = loader
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration walks, and the optimizer step that it starts with."""
        self.batch_sampler.set_epoch(epoch, first_step)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def bad_images(self) -> Dict[int, Tuple[str, str]]:
        """The images found so far by this process that cannot be read: index -> path, reason."""
        return self._watched.bad_images

    @property
    def worker_error(self) -> Optional[WorkerError]:
        """Why a data worker died, if one did: see :attr:`WatchedLoader.worker_error`."""
        return self._watched.worker_error

    @property
    def _watched(self) -> Any:
        return self.loader.loader if isinstance(self.loader, PrefetchLoader) else self.loader

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        sampler = self.batch_sampler
        epoch = sampler.epoch
        erasing = getattr(self.loader, 'random_erasing', None)
        if erasing is not None:
            erasing.start(epoch, sampler.plan.first_group(sampler.first_step))
        yield from self.loader
        if sampler.epoch == epoch:
            self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def mixup_enabled(self) -> bool:
        """Whether a mixup ``collate_fn`` mixes; a change reaches the workers with the next iteration."""
        return self.batch_sampler.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.batch_sampler.mixup_enabled = enabled


def create_loader(
        dataset: Any,
        input_size: Any,
        batch_size: int,
        is_training: bool = False,
        *,
        regime: Optional[Regime] = None,
        seed: int = 42,
        rank: Optional[int] = None,
        world_size: Optional[int] = None,
        grad_accum_steps: int = 1,
        drop: str = 'tail',
        plan_world_size: Optional[int] = None,
        size_reg: float = 0.,
        train_pad: int = 0,
        scaled_decoding: bool = False,
        max_bad_images: float = 0.01,
        worker_timeout: float = 45.,
        shuffle_window: int = WINDOW,
        **kwargs: Any,
) -> Any:
    """timm's ``create_loader`` with a regime; without one it *is* timm's.

    Args:
        dataset: Map-style data set, such as ``timm.data.create_dataset`` makes, or of targets and PIL images, arrays
            or tensors as :class:`~mixsize_timm.images.OpenedImage` takes them. It is not changed. With a regime it may
            also stream: see :mod:`~mixsize_timm.streaming`.
        input_size: Base size, as timm takes it: ``(channels, height, width)``.
        batch_size: Distinct images per process at the base size; with a regime it must be the regime's.
        is_training: Must be true with a regime.
        regime: Sizes, batches and duplicates of the steps.
        seed: Seed of the plan and of the augmentations.
        rank: This process; by default asked of ``torch.distributed`` if ``distributed`` is set, else 0.
        world_size: Number of processes, likewise.
        grad_accum_steps: Groups of one size that make an optimizer step.
        drop: See :func:`~mixsize_timm.sampler.size_batches`.
        plan_world_size: See :class:`~mixsize_timm.sampler.MixSizeBatchSampler`.
        size_reg: Strength of :class:`~mixsize_timm.regularization.SizeRegularization` for augmentation and mixup.
        train_pad: In the place of timm's random resized crop, with and without a regime, the augmentation usual for
            CIFAR: so many black pixels around the image, a crop of the image's own size out of that, resized to the
            step's size. 0 for timm's crop.
        scaled_decoding: Decode a JPEG at 1/2, 1/4 or 1/8 of its size where every random resized crop of it, among its
            duplicates, still has at least the pixels of its step's size, and in libjpeg-turbo's faster ways. libjpeg's
            scaling averages blocks of pixels, and the crop's edges move by up to half such a block, so that pixels
            differ a little (docs/loading.md).
        max_bad_images: Part of the data set's images, in [0, 1], that may be unreadable before iterating over the
            loader raises :class:`~mixsize_timm.datasets.BadImagesError`; of those that this process has come across.
        worker_timeout: Seconds that a worker may be at one image while its batch is waited for, before iterating
            raises :class:`~mixsize_timm.workers.WorkerError`, as it does for a worker that dies; 0 for no limit.
        shuffle_window: Of data that stream, the records that a worker shuffles at a time, and keeps encoded in memory.
        **kwargs: Every other argument of ``timm.data.create_loader``, with its meaning; with a regime all but those of
            scheduled sizes, repeated and split augmentation, which the regime takes the place of.

    Returns:
        With a regime a :class:`MixSizeLoader`, giving images ``[B·D, C, S, S]`` of this process and targets ``[B·D]``
        (dense ones with mixup), the duplicates of an image one after the other; normalised on ``device`` as timm's
        prefetcher does, in a single pool of workers for all sizes. Else timm's loader.

    Raises:
        TypeError: The data set streams without telling its length.
        ValueError: The arguments contradict the regime, or no size gets a step.
    """
    _allow_zero_bits()
    if regime is None:
        loader = timm.data.create_loader(dataset, input_size, batch_size, is_training, **kwargs)
        if train_pad:
            plain: Any = loader.loader if isinstance(loader, PrefetchLoader) else loader
            _pad_crop(getattr(plain.dataset, 'transform', None), train_pad, kwargs)
        return loader
    if not is_training:
        raise ValueError('a regime is for training: leave it out of an evaluation loader')
    if batch_size != regime.batch_size:
        raise ValueError(f'batch_size {batch_size} is not the {regime.batch_size} of the regime')
    height_width = tuple(input_size[-2:]) if isinstance(input_size, (tuple, list)) else (input_size, input_size)
    if height_width != (regime.base_size, regime.base_size):
        raise ValueError(f'input_size {height_width} is not the base size {regime.base_size} of the regime')
    misplaced = [name for name in _OF_TIMMS_SAMPLERS if kwargs.get(name)]
    if misplaced:
        raise ValueError(f'{misplaced[0]} cannot be had together with a regime')
    if kwargs.pop('distributed', False) and world_size is None:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sampler = MixSizeBatchSampler(
        num_images(dataset), regime, seed, rank or 0, world_size or 1, grad_accum_steps, drop, plan_world_size,
        random_access=not isinstance(dataset, IterableDataset))

    return MixSizeLoader(
        _loader_of_groups(dataset, input_size, regime.sizes, sampler, seed,
                          SizeRegularization(size_reg, regime.base_size, mixup=kwargs.get('collate_fn')),
                          scaled_decoding, train_pad, kwargs, max_bad_images, worker_timeout, shuffle_window),
        sampler)


def create_calibration_loader(
        dataset: Any,
        input_size: Tuple[int, int, int],
        batch_size: int,
        num_batches: Optional[int] = None,
        *,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        train_pad: int = 0,
        scaled_decoding: bool = False,
        worker_timeout: float = 45.,
        is_training: bool = True,
        **kwargs: Any,
) -> Any:
    """A loader of training images at one size for :func:`~mixsize_timm.calibration.calibrate`.

    It gives the same pixels each time, for any number of workers and, taken together, of processes.

    Args:
        dataset: Map-style data set of PIL images, such as ``timm.data.create_dataset`` makes. It is not changed.
        input_size: Channels, and the size as height and width.
        batch_size: Images of a batch.
        num_batches: Batches over all processes, at most one epoch; by default all of it.
        seed: Seed of the choice of images and of the augmentations.
        rank: This process.
        world_size: Number of processes.
        train_pad: As for :func:`create_loader`.
        scaled_decoding: As for :func:`create_loader`.
        worker_timeout: As for :func:`create_loader`. Any number of images may be unreadable here.
        is_training: Augment the images as in training, as the paper does; otherwise they are prepared as in evaluation,
            and may be oblong.
        **kwargs: Every other argument of ``timm.data.create_loader``.

    Returns:
        A loader of images ``[B, C, S, S]`` and targets ``[B]``.
    """
    _allow_zero_bits()
    size = input_size[-1]
    sampler = DealtBatchSampler(len(dataset), size, batch_size, num_batches, seed, rank, world_size)
    return _loader_of_groups(dataset, input_size, (size,), sampler, seed, SizeRegularization(0, size),
                             scaled_decoding, train_pad, {**kwargs, 'is_training': is_training},
                             worker_timeout=worker_timeout)


def _loader_of_groups(dataset: Any, input_size: Any, sizes: Sequence[int], sampler: Any, seed: int,
                      regularization: SizeRegularization, scaled_decoding: bool, train_pad: int,
                      kwargs: Dict[str, Any], max_bad_images: float = 1., worker_timeout: float = 45.,
                      shuffle_window: int = WINDOW) -> Any:
    """A loader of what a sampler of groups asks for."""
    streams = isinstance(dataset, IterableDataset)
    if streams:
        readable: Any = TensorDataset(torch.zeros(1))  # timm's scheduled sizes are for random access
    else:
        readable = copy.copy(dataset) if isinstance(dataset, ReadableDataset) else ReadableDataset(dataset)
    template, maker = _like_timms(
        readable, input_size, sizes, seed, regularization, scaled_decoding, train_pad, kwargs)
    inner: Any = template.loader if isinstance(template, PrefetchLoader) else template
    channels = input_size[0] if isinstance(input_size, (tuple, list)) and len(input_size) == 3 else 3

    def new_slots() -> SharedSlots:
        maker.slots = SharedSlots(inner.num_workers, channels * sampler.max_pixels, inner.prefetch_factor + 1)
        return maker.slots

    shares = inner.num_workers and maker.collate_fn is None and template.device.type in _WAITED_FOR
    options: Dict[str, Any] = dict(
        new_slots=new_slots if shares else None,
        max_bad_images=max_bad_images,
        worker_timeout=worker_timeout,
        num_workers=inner.num_workers,
        collate_fn=_collated,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator().manual_seed(seed),  # else every new iteration draws from the caller's
    )
    loader: WatchedLoader
    if streams:
        batches = StreamBatches(dataset, maker, sampler, inner.num_workers, shuffle_window)
        loader = StreamLoader(batches, batch_size=None, **options)
    else:
        loader = WatchedLoader(MixSizeDataset(readable, maker, inner.num_workers), batch_sampler=sampler, **options)
    return _prefetched(template, loader, seed, sampler.rank)


def _like_timms(dataset: Any, input_size: Any, sizes: Sequence[int], seed: int, regularization: SizeRegularization,
                scaled_decoding: bool, train_pad: int, kwargs: Dict[str, Any]) -> Tuple[Any, BatchMaker]:
    """timm's own loader, and what makes the batches as its transforms and collation do."""
    device = kwargs.setdefault('device', torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda':
        kwargs['pin_memory'] = True  # else copies to the device would wait for one another
    is_training = kwargs.get('is_training', True)
    transforms: Dict[int, TensorTransform] = {}
    for size in sizes:
        scaled = regularization.augmentation(size, kwargs.get('auto_augment'), kwargs.get('color_jitter', 0.4))
        scheduled: Dict[str, Any] = dict(input_size_choices=(size,), num_batches=1) if is_training else {}
        template = timm.data.create_loader(
            copy.copy(dataset), input_size, 1, **scheduled, **{**kwargs, **scaled, 'is_training': is_training})
        inner: Any = template.loader if isinstance(template, PrefetchLoader) else template
        timms = inner.dataset.transforms[0] if is_training else inner.dataset.transform
        if train_pad:
            _pad_crop(timms, train_pad, kwargs)
        transforms[size] = TensorTransform(timms)
    collate_fn = None if inner.collate_fn is fast_collate else inner.collate_fn
    return template, BatchMaker(transforms, collate_fn, seed,
                                regularization.set_size if regularization.strength else None, scaled_decoding)


def _pad_crop(transform: Any, train_pad: int, kwargs: Dict[str, Any]) -> None:
    for name in _OF_TIMMS_CROP:
        if kwargs.get(name):
            raise ValueError(f'train_pad and {name} exclude each other')
    pad_crop(transform, train_pad)


def _prefetched(template: Any, loader: Any, seed: int, rank: int) -> Any:
    """A loader in timm's prefetcher, which normalises and erases on the device, if the template has one."""
    if not isinstance(template, PrefetchLoader):
        return loader
    template.loader = loader
    if template.random_erasing is not None:
        erasing: Any = SeededErasing(template.random_erasing, seed, rank)
        template.random_erasing = erasing
    return _OnHost(template) if template.device.type == 'cpu' else template


def _allow_zero_bits() -> None:
    """Let timm's strongest posterize be drawn: it keeps 0 bits, a black image, which Pillow 13 raises an error for.

    It would end every longer run with RandAugment at high magnitudes, such as ``rand-m9-mstd0.5-inc1``.
    """
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        auto_augment.NAME_TO_OP[name] = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
