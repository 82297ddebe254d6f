"""The MixSize loader: images decoded once, duplicated, and transformed for the size of their step."""
import copy
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .datasets import BadImagesError, ReadableDataset
from .randomness import own_randomness, seed_for
from .regime import Regime
from .regularization import SizeRegularization
from .sampler import DealtBatchSampler, Group, MixSizeBatchSampler
from .workers import Heartbeats, Read, WatchedLoader, WorkerError

_OF_TIMMS_SAMPLERS = (
    'input_size_choices', 'batch_size_choices', 'batch_choice_weights', 'batch_schedule_epochs', 'num_batches',
    'num_aug_repeats', 'num_aug_splits', 'use_multi_epochs_loader')


class MixSizeDataset(Dataset):
    """Answers a :class:`~mixsize_timm.sampler.Group` with its batch, each image decoded once.

    An augmentation is a function of (seed, epoch, image, duplicate): the number of workers or processes changes no
    pixel, and neither does what was drawn before. (Mixup is drawn for a process's batch as a whole.) The caller's
    random state is left as it was.

    Args:
        dataset: Data set of PIL images and targets, without a transform.
        transforms: A transform for each size in pixels.
        collate_fn: Makes a batch of a list of samples; timm's mixup is one.
        seed: Seed of the run.
        set_size: Called with the size of each batch before it is made.
        num_workers: Number of workers that make batches.
    """

    def __init__(
            self,
            dataset: ReadableDataset,
            transforms: Dict[int, Callable],
            collate_fn: Callable,
            seed: int = 42,
            set_size: Optional[Callable[[int], None]] = None,
            num_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.collate_fn: Any = collate_fn
        self.seed = seed
        self.set_size = set_size
        self.heartbeats = Heartbeats(num_workers)

    def __getitems__(self, group: Group) -> Read:
        """The batch of ``batch * duplicates`` samples, the duplicates of an image one after the other.

        Raises:
            WorkerError: In a worker, for any error of a transform or of the collation.
        """
        bad_images: Dict[int, Tuple[str, str]] = {}
        try:
            return Read(self._batch(group, bad_images), bad_images)
        except BadImagesError as error:
            return Read(None, error.images)
        except Exception as error:
            worker = get_worker_info()
            if worker is None:
                raise
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())
            raise WorkerError(f'data worker {worker.id} failed{self.place(worker.id)}: {reason}') from error

    def _batch(self, group: Group, bad_images: Dict[int, Tuple[str, str]]) -> Any:
        assert group.images is not None, 'a MixSize loader plans its own images'
        transform = self.transforms[group.size]
        if self.set_size is not None:
            self.set_size(group.size)
        samples: List[Tuple[Any, Any]] = []
        with own_randomness():
            for index in group.images.tolist():
                with self.heartbeats.at(index):
                    image, target, bad = self.dataset.read(index, self.seed, group.epoch)
                    bad_images.update(bad)
                    for duplicate in range(group.duplicates):
                        seed_for(self.seed, group.epoch, index, duplicate)
                        samples.append((transform(image), target))
            if hasattr(self.collate_fn, 'mixup_enabled'):
                self.collate_fn.mixup_enabled = group.mixup
            seed_for(self.seed, group.epoch, int(group.images[0]), -1)
            return self.collate_fn(samples)

    def __len__(self) -> int:
        return len(self.dataset)

    def place(self, worker: int) -> str:
        """Words for the image that a worker is at, if any."""
        index = self.heartbeats[worker][1]
        return f' at image {self.dataset.name(index)}' if index >= 0 else ''


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
        max_bad_images: float = 0.01,
        worker_timeout: float = 45.,
        **kwargs: Any,
) -> Any:
    """timm's ``create_loader`` with a regime; without one it *is* timm's.

    Args:
        dataset: Map-style data set of PIL images, such as ``timm.data.create_dataset`` makes. It is not changed.
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
        max_bad_images: Part of the data set's images, in [0, 1], that may be unreadable before iterating over the
            loader raises :class:`~mixsize_timm.datasets.BadImagesError`; of those that this process has come across.
        worker_timeout: Seconds that a worker may be at one image while its batch is waited for, before iterating
            raises :class:`~mixsize_timm.workers.WorkerError`, as it does for a worker that dies; 0 for no limit.
        **kwargs: Every other argument of ``timm.data.create_loader``, with its meaning; with a regime all but those of
            scheduled sizes, repeated and split augmentation, which the regime takes the place of.

    Returns:
        With a regime a :class:`MixSizeLoader`, giving images ``[B·D, C, S, S]`` of this process and targets ``[B·D]``
        (dense ones with mixup), the duplicates of an image one after the other; normalised on ``device`` as timm's
        prefetcher does, in a single pool of workers for all sizes. Else timm's loader.

    Raises:
        TypeError: The data set is iterable-style.
        ValueError: The arguments contradict the regime, or no size gets a step.
    """
    _allow_zero_bits()
    if regime is None:
        return timm.data.create_loader(dataset, input_size, batch_size, is_training, **kwargs)
    if not is_training:
        raise ValueError('a regime is for training: leave it out of an evaluation loader')
    if isinstance(dataset, IterableDataset):
        raise TypeError('MixSize needs a data set with random access, and this one streams')
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
        len(dataset), regime, seed, rank or 0, world_size or 1, grad_accum_steps, drop,  # type: ignore[arg-type]
        plan_world_size)

    return MixSizeLoader(
        _loader_of_groups(dataset, input_size, regime.sizes, sampler, seed,
                          SizeRegularization(size_reg, regime.base_size, mixup=kwargs.get('collate_fn')), kwargs,
                          max_bad_images, worker_timeout),
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
        worker_timeout: float = 45.,
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
        worker_timeout: As for :func:`create_loader`. Any number of images may be unreadable here.
        **kwargs: Every other argument of ``timm.data.create_loader`` for a training loader.

    Returns:
        A loader of images ``[B, C, S, S]`` and targets ``[B]``.
    """
    _allow_zero_bits()
    size = input_size[-1]
    sampler = DealtBatchSampler(len(dataset), size, batch_size, num_batches, seed, rank, world_size)
    return _loader_of_groups(dataset, input_size, (size,), sampler, seed, SizeRegularization(0, size), kwargs,
                             worker_timeout=worker_timeout)


def _loader_of_groups(dataset: Any, input_size: Any, sizes: Sequence[int], sampler: Any, seed: int,
                      regularization: SizeRegularization, kwargs: Dict[str, Any], max_bad_images: float = 1.,
                      worker_timeout: float = 45.) -> Any:
    """A loader of what a sampler of groups asks for.

    timm's own loader of scheduled sizes makes the transforms, collation and prefetcher from its arguments.
    """
    kwargs.setdefault('device', torch.device('cuda' if torch.cuda.is_available() else 'cpu'))
    readable: Any = copy.copy(dataset) if isinstance(dataset, ReadableDataset) else ReadableDataset(dataset)
    transforms: Dict[int, Callable] = {}
    for size in sizes:
        scaled = regularization.augmentation(size, kwargs.get('auto_augment'), kwargs.get('color_jitter', 0.4))
        template = timm.data.create_loader(
            readable, input_size, 1, input_size_choices=(size,), num_batches=1,
            **{**kwargs, **scaled, 'is_training': True})
        inner: Any = template.loader if isinstance(template, PrefetchLoader) else template
        transforms[size] = inner.dataset.transforms[0]
    loader: Any = WatchedLoader(
        MixSizeDataset(readable, transforms, inner.collate_fn, seed,
                       regularization.set_size if regularization.strength else None, inner.num_workers),
        max_bad_images=max_bad_images,
        worker_timeout=worker_timeout,
        batch_sampler=sampler,
        num_workers=inner.num_workers,
        collate_fn=_collated,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator().manual_seed(seed),  # else every new iteration draws from the caller's
    )
    if not isinstance(template, PrefetchLoader):
        return loader
    template.loader = loader
    if template.random_erasing is not None:
        erasing: Any = SeededErasing(template.random_erasing, seed, sampler.rank)
        template.random_erasing = erasing
    return template


def _allow_zero_bits() -> None:
    """Let timm's strongest posterize be drawn: it keeps 0 bits, a black image, which Pillow 13 raises an error for.

    It would end every longer run with RandAugment at high magnitudes, such as ``rand-m9-mstd0.5-inc1``.
    """
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        auto_augment.NAME_TO_OP[name] = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
