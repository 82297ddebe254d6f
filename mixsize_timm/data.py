"""The MixSize loader: images decoded once, duplicated, and transformed for the size of their step."""
import copy
import random
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .datasets import ReadableDataset
from .regime import Regime
from .regularization import SizeRegularization
from .sampler import DealtBatchSampler, Group, MixSizeBatchSampler

_OF_TIMMS_SAMPLERS = (
    'input_size_choices', 'batch_size_choices', 'batch_choice_weights', 'batch_schedule_epochs', 'num_batches',
    'num_aug_repeats', 'num_aug_splits', 'use_multi_epochs_loader')


class MixSizeDataset(Dataset):
    """Answers a :class:`~mixsize_timm.sampler.Group` with its batch, each image decoded once.

    An augmentation is a function of (seed, epoch, image, duplicate): the number of workers or processes changes no
    pixel, and neither does what was drawn before. (Mixup is drawn for a process's batch as a whole.) The caller's
    random state is left as it was.

    Args:
        dataset: Map-style data set of PIL images and targets, without a transform.
        transforms: A transform for each size in pixels.
        collate_fn: Makes a batch of a list of samples; timm's mixup is one.
        seed: Seed of the run.
        set_size: Called with the size of each batch before it is made.
    """

    def __init__(
            self,
            dataset: Dataset,
            transforms: Dict[int, Callable],
            collate_fn: Callable,
            seed: int = 42,
            set_size: Optional[Callable[[int], None]] = None,
    ) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.collate_fn: Any = collate_fn
        self.seed = seed
        self.set_size = set_size

    def __getitems__(self, group: Group) -> Any:
        """The batch of ``batch * duplicates`` samples, the duplicates of an image one after the other."""
        assert group.images is not None, 'a MixSize loader plans its own images'
        transform = self.transforms[group.size]
        if self.set_size is not None:
            self.set_size(group.size)
        samples: List[Tuple[Any, Any]] = []
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            for index in group.images.tolist():
                image, target = self.dataset[index]
                for duplicate in range(group.duplicates):
                    _seed(self.seed, group.epoch, index, duplicate)
                    samples.append((transform(image), target))
            if hasattr(self.collate_fn, 'mixup_enabled'):
                self.collate_fn.mixup_enabled = group.mixup
            _seed(self.seed, group.epoch, int(group.images[0]), -1)
            return self.collate_fn(samples)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def _seed(*key: int) -> None:
    """Seed the three generators that timm's and torchvision's transforms draw from.

    ``torch.manual_seed`` would take a hundred times as long: it visits every device.
    """
    state = 0x9E3779B97F4A7C15
    for part in key:  # the mixing step of SplitMix64, so that neighbouring keys give unlike streams
        state = (state ^ part) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    random.seed(state)
    np.random.seed(state >> 32)
    torch.default_generator.manual_seed(state)


def _collated(batch: Any) -> Any:
    return batch


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

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks."""
        self.batch_sampler.set_epoch(epoch)

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    def __iter__(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        epoch = self.batch_sampler.epoch
        yield from self.loader
        if self.batch_sampler.epoch == epoch:
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
        size_reg: float = 0.,
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
        size_reg: Strength of :class:`~mixsize_timm.regularization.SizeRegularization` for augmentation and mixup.
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
        len(dataset), regime, seed, rank or 0, world_size or 1, grad_accum_steps, drop)  # type: ignore[arg-type]

    return MixSizeLoader(
        _loader_of_groups(dataset, input_size, regime.sizes, sampler, seed,
                          SizeRegularization(size_reg, regime.base_size, mixup=kwargs.get('collate_fn')), kwargs),
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
        **kwargs: Every other argument of ``timm.data.create_loader`` for a training loader.

    Returns:
        A loader of images ``[B, C, S, S]`` and targets ``[B]``.
    """
    _allow_zero_bits()
    size = input_size[-1]
    sampler = DealtBatchSampler(len(dataset), size, batch_size, num_batches, seed, rank, world_size)
    return _loader_of_groups(dataset, input_size, (size,), sampler, seed, SizeRegularization(0, size), kwargs)


def _loader_of_groups(dataset: Any, input_size: Any, sizes: Sequence[int], sampler: Any, seed: int,
                      regularization: SizeRegularization, kwargs: Dict[str, Any]) -> Any:
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
    loader: Any = DataLoader(
        MixSizeDataset(readable, transforms, inner.collate_fn, seed,
                       regularization.set_size if regularization.strength else None),
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
    return template


def _allow_zero_bits() -> None:
    """Let timm's strongest posterize be drawn: it keeps 0 bits, a black image, which Pillow 13 raises an error for.

    It would end every longer run with RandAugment at high magnitudes, such as ``rand-m9-mstd0.5-inc1``.
    """
    for name in ('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'):
        auto_augment.NAME_TO_OP[name] = _posterize


def _posterize(image: Image.Image, bits: int, **kwargs: Any) -> Image.Image:
    return auto_augment.posterize(image, bits, **kwargs) if bits > 0 else Image.new(image.mode, image.size)
