"""The epoch plan, and the batch sampler that walks it.

An epoch is a function of (regime, number of images, seed, epoch, world size): every rank computes the same plan and
takes its own slice of each group, so no communication is needed to agree on a size.
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from torch.utils.data import Sampler

from .regime import DROP_RULES, Regime

SHUFFLED_AT_ONCE = 2**21  # images, at most; more are dealt out to parts first, a chunk of images at a time
PARTS = 256
CHUNK = 2**18


class Group(NamedTuple):
    """What the loader reads at once: ``batch`` images of one size, each ``duplicates`` times.

    Consecutive groups with the same ``step`` accumulate into one optimizer step.
    """
    size: int  # pixels
    batch: int  # distinct images, over all ranks
    duplicates: int  # augmented copies of each
    step: int  # optimizer step of the epoch that it belongs to
    weight: float  # its share of the step's images, what its loss counts for
    ends_step: bool  # the optimizer steps after it
    epoch: int
    images: Optional[np.ndarray]  # indices into the data set; a rank's own where taken by rank
    mixup: bool = True  # whether a mixup collation mixes it


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The groups of one epoch in the order of training, as arrays of one entry a group.

    Args:
        size: Image size in pixels, int ``[groups]``.
        batch: Distinct images over all ranks, int ``[groups]``.
        duplicates: Augmented copies of each image, int ``[groups]``.
        step: Optimizer step each group belongs to, int ``[groups]``, not decreasing.
        start: Where the group's images start in ``order``, int ``[groups]``.
        order: Permutation of the data set's indices; a ``range`` for data that stream, where an image is a position in
            the epoch; or ``None`` where a loader of timm's chooses the images.
        num_images: Images in the data set.
        epoch: Epoch the plan is for.
        steps_before: Optimizer steps of the epochs before it.
        multiple: A process's share of a batch is a multiple of it.
    """
    size: np.ndarray
    batch: np.ndarray
    duplicates: np.ndarray
    step: np.ndarray
    start: np.ndarray
    order: Union[np.ndarray, range, None]
    num_images: int
    epoch: int = 0
    steps_before: int = 0
    multiple: int = 1

    def __len__(self) -> int:
        return len(self.size)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the epoch."""
        return int(self.step[-1]) + 1 if len(self) else 0

    @property
    def dropped(self) -> int:
        """Images of the data set that the epoch does not use."""
        return self.num_images - int(self.batch.sum())

    def groups(self, rank: int = 0, world_size: int = 1, first_step: int = 0) -> Iterator[Group]:
        """The groups with the images of one rank, by default with those of all, from a step on.

        Shares are equal where a batch is a multiple of the world size that it was rounded for. Where the plan is of
        another one they are as equal as can be, and a group's weight makes up for it.
        """
        work = self.batch * self.duplicates
        weights = work / np.bincount(self.step, weights=work)[self.step] if len(self) else work
        ends = np.append(self.step[1:] != self.step[:-1], True)
        for i in range(self.first_group(first_step), len(self)):
            images, weight = None, float(weights[i])
            if self.order is not None:
                units = int(self.batch[i]) // self.multiple
                first, last = (self.multiple * (n * units // world_size) for n in (rank, rank + 1))
                images = np.asarray(self.order[int(self.start[i]) + first:int(self.start[i]) + last])
                weight *= len(images) * world_size / int(self.batch[i])
            yield Group(int(self.size[i]), int(self.batch[i]), int(self.duplicates[i]), int(self.step[i]),
                        weight, bool(ends[i]), self.epoch, images)

    def share(self, rank: int, world_size: int) -> np.ndarray:
        """Distinct images of one rank in each group, int ``[groups]``."""
        units = self.batch // self.multiple
        return self.multiple * ((rank + 1) * units // world_size - rank * units // world_size)

    def first_group(self, step: int) -> int:
        """Number of the first group of a step."""
        return int(np.searchsorted(self.step, step))

    @classmethod
    def of_loader(cls, num_batches: int, size: int, batch: int, grad_accum_steps: int = 1, epoch: int = 0):
        """The plan of a loader that is not ours: equal batches, accumulated as timm does."""
        ones = np.ones(num_batches, dtype=np.int64)
        index = np.arange(num_batches)
        return cls(ones * size, ones * batch, ones, index // grad_accum_steps, index * batch, None,
                   num_batches * batch, epoch, epoch * -(-num_batches // grad_accum_steps))


def size_batches(
        regime: Regime,
        num_images: int,
        world_size: int = 1,
        drop: str = 'tail',
        shrink: bool = True,
) -> Dict[int, List[int]]:
    """The batches, counted over all ranks, that an epoch trains at each size.

    The paper's rule gives a size with probability ``p`` the share ``p`` of the images and drops what does not fill
    a batch. On small data or many ranks that loses whole sizes, so by default a share too small for one batch is
    trained as one smaller batch, and what is left of all shares goes to the smallest batches that it fills.

    Args:
        regime: The regime.
        num_images: Images in the data set.
        world_size: Processes that share each batch. Batches are multiples of it.
        drop: ``tail`` as above, or ``reference`` for the paper's rule.
        shrink: Whether a share too small for one batch makes a smaller one, and is not left to the other sizes.

    Returns:
        For each size, ascending, its batches; an empty list for a size that gets none.
    """
    if drop not in DROP_RULES:
        raise ValueError(f'drop must be one of {", ".join(DROP_RULES)}, not {drop!r}')
    full = {size: regime.group(size)[0] * world_size for size in regime.sizes}
    multiple = regime.batch_multiple * world_size
    batches: Dict[int, List[int]] = {}
    left = 0
    for size, share in zip(regime.sizes, image_shares(regime.probs, num_images)):
        count = share // full[size]
        batches[size] = [full[size]] * count
        shrunk = share // multiple * multiple
        several = shrunk * regime.group(size)[1] > world_size  # one image has no variance
        if drop == 'tail' and shrink and several and not count:
            batches[size] = [shrunk]
        left += share - sum(batches[size])
    if drop == 'tail':
        for size in sorted(full, key=lambda s: full[s]):
            if full[size] <= left:
                batches[size].append(full[size])
                left -= full[size]
        smallest = min(full, key=lambda s: full[s])
        batches[smallest] += [full[smallest]] * (left // full[smallest])
    return batches


def image_shares(probs: Sequence[float], num_images: int) -> List[int]:
    """Split ``num_images`` by probability, exactly: the largest remainders get the images that rounding leaves."""
    exact = [p * num_images for p in probs]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(probs)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[:num_images - sum(shares)]:
        shares[i] += 1
    return shares


def plan_epoch(
        regime: Regime,
        num_images: int,
        *,
        seed: int = 42,
        epoch: int = 0,
        world_size: int = 1,
        grad_accum_steps: int = 1,
        drop: str = 'tail',
        random_access: bool = True,
) -> EpochPlan:
    """Plan one epoch: a fresh partition of the images over the sizes, cut into groups, the steps shuffled.

    Args:
        regime: The regime; of an annealed one the shares of the epoch count.
        num_images: Images in the data set.
        seed: Seed of the run.
        epoch: Epoch, counted from zero.
        world_size: Processes that share each group.
        grad_accum_steps: Groups of one size that make an optimizer step.
        drop: See :func:`size_batches`.
        random_access: Whether the plan chooses the images; else they come as they stream, and it only counts them.

    Returns:
        The plan, equal for equal arguments on every machine.

    Raises:
        ValueError: No size gets a step.
    """
    batches = epoch_batches(regime, num_images, world_size, drop, epoch)
    if not any(batches.values()):
        raise ValueError(f'{num_images} images on {world_size} processes make no batch at any size of the regime: '
                         'lower the batch size or add images')
    rng = np.random.default_rng([seed, epoch])
    order = _shuffled(num_images, rng) if random_access else range(num_images)

    steps: List[Tuple[int, List[int]]] = []  # (size, batches of its groups)
    for size, of_size in batches.items():
        steps += [(size, of_size[i:i + grad_accum_steps]) for i in range(0, len(of_size), grad_accum_steps)]
    shuffled = [steps[i] for i in rng.permutation(len(steps))]
    lengths = [len(groups) for _, groups in shuffled]
    batch = np.array([b for _, groups in shuffled for b in groups])
    return EpochPlan(
        size=np.repeat([s for s, _ in shuffled], lengths),
        batch=batch,
        duplicates=np.repeat([regime.group(s)[1] for s, _ in shuffled], lengths),
        step=np.repeat(np.arange(len(shuffled)), lengths),
        start=np.cumsum(batch) - batch,
        order=order, num_images=num_images, epoch=epoch, multiple=regime.batch_multiple,
        steps_before=steps_before(epoch, regime, num_images, world_size, grad_accum_steps, drop) if regime.anneal
        else epoch * len(steps))


def _shuffled(num_images: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation, each as likely as any other.

    Of many images each goes to a part at random, and the parts are shuffled (Rao 1961; Sandelius 1962): a part fits
    the processor's cache, while a shuffle of all waits for memory at every image.
    """
    dtype = np.int32 if num_images < 2**31 else np.int64
    if num_images <= SHUFFLED_AT_ONCE:
        order = np.arange(num_images, dtype=dtype)
        rng.shuffle(order)
        return order
    part = rng.integers(PARTS, size=num_images, dtype=np.uint8)
    chunks = range(0, num_images, CHUNK)
    counts = [np.bincount(part[first:first + CHUNK], minlength=PARTS) for first in chunks]
    ends = np.cumsum(sum(counts))
    order = np.empty(num_images, dtype=dtype)
    free = np.append(0, ends[:-1])  # where the next image of each part goes
    for first, count in zip(chunks, counts):
        images = first + np.argsort(part[first:first + CHUNK], kind='stable')  # part after part
        order[np.repeat(free - np.cumsum(count) + count, count) + np.arange(len(images))] = images
        free += count
    for of_part in np.split(order, ends[:-1]):
        rng.shuffle(of_part)
    return order


def steps_before(epoch: int, regime: Regime, num_images: int, world_size: int = 1, grad_accum_steps: int = 1,
                 drop: str = 'tail') -> int:
    """Optimizer steps of all epochs before one; arguments as of :func:`plan_epoch`."""
    def steps(of: int) -> int:
        batches = epoch_batches(regime, num_images, world_size, drop, of)
        return sum(-(-len(of_size) // grad_accum_steps) for of_size in batches.values())

    return sum(map(steps, range(epoch))) if regime.anneal else epoch * steps(0)


def epoch_batches(regime: Regime, num_images: int, world_size: int = 1, drop: str = 'tail', epoch: int = 0
                  ) -> Dict[int, List[int]]:
    """:func:`size_batches` of one epoch. An annealed run may be without a size for an epoch: it has it in others."""
    return size_batches(regime.at(epoch), num_images, world_size, drop, shrink=not regime.anneal)


class MixSizeBatchSampler(Sampler[Group]):
    """Batch sampler for a ``DataLoader``: yields this rank's :class:`Group` for every group of the epoch's plan.

    Call :meth:`set_epoch` before each epoch, as with torch's ``DistributedSampler``.

    Args:
        num_images: Images in the data set.
        regime: The regime.
        seed: Seed of the run, equal on all ranks.
        rank: This process.
        world_size: Number of processes.
        grad_accum_steps: Groups of one size that make an optimizer step.
        drop: See :func:`size_batches`.
        plan_world_size: Number of processes that the batches are rounded for, where it is another one: the plan of a
            run goes on when its number of processes changes.
        random_access: See :func:`plan_epoch`.

    Raises:
        ValueError: No size gets a step, or a batch has too few images for so many processes.
    """

    def __init__(
            self,
            num_images: int,
            regime: Regime,
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
            grad_accum_steps: int = 1,
            drop: str = 'tail',
            plan_world_size: Optional[int] = None,
            random_access: bool = True,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f'rank {rank} is not one of {world_size} processes')
        self.regime = regime
        self.rank = rank
        self.world_size = world_size
        self.epoch = self.first_step = 0
        self.mixup_enabled = True
        self._arguments: Dict[str, Any] = dict(
            regime=regime, num_images=num_images, seed=seed, world_size=plan_world_size or world_size,
            grad_accum_steps=grad_accum_steps, drop=drop, random_access=random_access)
        self._plan: Optional[EpochPlan] = None
        smallest = int(self.plan.batch.min())
        if smallest // regime.batch_multiple < world_size:
            raise ValueError(f'{world_size} processes cannot share batches of {smallest} images: use fewer')

    @property
    def max_pixels(self) -> int:
        """Pixels of the largest batch that this process gets, with its duplicates, about."""
        largest = max(size**2 * math.prod(self.regime.group(size)) for size in self.regime.sizes)
        return largest * -(-self._arguments['world_size'] // self.world_size)

    @property
    def plan(self) -> EpochPlan:
        """The plan of the current epoch."""
        if self._plan is None or self._plan.epoch != self.epoch:
            self._plan = None  # it gives its memory to the next one
            self._plan = plan_epoch(**self._arguments, epoch=self.epoch)
        return self._plan

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before one."""
        arguments = {name: value for name, value in self._arguments.items() if name not in ('seed', 'random_access')}
        return steps_before(epoch, **arguments)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch that the next iteration walks, and the optimizer step that it starts with."""
        self.epoch = epoch
        self.first_step = first_step

    def __iter__(self) -> Iterator[Group]:
        for group in self.plan.groups(self.rank, self.world_size, self.first_step):
            yield group._replace(mixup=self.mixup_enabled)

    def __len__(self) -> int:
        return len(self.plan) - self.plan.first_group(self.first_step)


class DealtBatchSampler(Sampler[Group]):
    """Batches of one size from the images in a fixed random order, dealt out to the processes in turn.

    So any number of processes sees the same batches. The last one may be shorter, or longer by one: no image is
    alone, for it has no variance. A process may have one batch less than others.

    Args:
        num_images: Images in the data set.
        size: Image size in pixels.
        batch_size: Images of a batch.
        num_batches: Batches over all processes, at most one epoch; by default all of it.
        seed: Seed of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
            self,
            num_images: int,
            size: int,
            batch_size: int,
            num_batches: Optional[int] = None,
            seed: int = 42,
            rank: int = 0,
            world_size: int = 1,
    ) -> None:
        order = np.random.default_rng(seed).permutation(num_images)
        batch_size = max(batch_size, 2)
        ends = np.arange(batch_size, num_images + batch_size, batch_size)
        if num_images % batch_size == 1 and len(ends) > 1:
            ends = ends[:-1]
            ends[-1] = num_images
        batches = np.split(order, ends[:-1])[:num_batches][rank::world_size]
        self.groups = [
            Group(size, batch=len(images), duplicates=1, step=0, weight=1., ends_step=True, epoch=0, images=images)
            for images in batches]
        self.rank = rank
        self.max_pixels = size**2 * max(map(len, batches), default=0)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def describe_annealing(regime: Regime) -> List[str]:
    """A line on the shares at both ends of a run; none where they stay."""
    if not regime.anneal:
        return []
    ends = (', '.join(f'{size}: {prob:.3f}' for size, prob in zip(end.sizes, end.probs))
            for end in (regime.at(0), regime.at(regime.epochs or 1)))
    return ['annealed: shares of {} in the first epoch, {} in the last; the table is of all'.format(*ends)]


def describe_plan(regime: Regime, num_images: int, world_size: int = 1, drop: str = 'tail') -> Tuple[str, List[str]]:
    """What a regime makes of a data set: a table of the sizes, and what the user should be warned of.

    Args:
        regime: The regime.
        num_images: Images in the data set.
        world_size: Processes that share each batch.
        drop: See :func:`size_batches`.

    Returns:
        The table, and one line for every size without a step and for more than a tenth of the images dropped.
    """
    batches = size_batches(regime, num_images, world_size, drop)
    lines = [' size  share   batch  dup  batches   images   work']
    for size, prob in zip(regime.sizes, regime.probs):
        batch, duplicates = regime.group(size)
        lines.append(f'{size:>5d}  {prob:>5.3f}  {batch * world_size:>6d}  {duplicates:>3d}  {len(batches[size]):>7d}  '
                     f'{sum(batches[size]):>7d}  {regime.relative_work(size):>4.2f}x')
    lines += describe_annealing(regime)
    dropped = num_images - sum(map(sum, batches.values()))
    lines.append(f'mean size {regime.mean_size:.1f} px, mean batch {regime.mean_batch * world_size:.1f}, an epoch '
                 f'{regime.relative_cost:.2f}x the pixels of one at {regime.base_size} px; '
                 f'peak work {regime.peak_work:.2f}x at {max(regime.sizes, key=regime.relative_work)} px')
    warnings = [f'No step at {size} px: its share of {prob:.3g} of {num_images} images fills no batch'
                for size, prob in zip(regime.sizes, regime.probs) if not batches[size]]
    if dropped > num_images / 10:
        warnings.append(f'{dropped} of {num_images} images ({dropped / num_images:.0%}) are dropped in every epoch: '
                        'lower the batch size')
    if regime.peak_work > 1.25:
        lines.append('a step of over 1x needs as much more memory; --mixsize-max-work 1 lowers its batch')
    return '\n'.join(lines), warnings
