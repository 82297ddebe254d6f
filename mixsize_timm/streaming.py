"""MixSize for data that stream: shards dealt out to data workers, which make the batches of the plan from them.

What a worker reads is a function of (seed, epoch, process, worker), and how much of it is used at a step follows from
the plan: so a run goes on exactly, without a state of its own.
"""
import copy
import hashlib
import logging
import math
import os
import threading
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from multiprocessing import RawArray
from queue import Empty, SimpleQueue
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from timm.data import IterableImageDataset
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info

from .datasets import BadImagesError
from .images import OpenedImage, Picture, unreadable
from .sampler import EpochPlan, Group, MixSizeBatchSampler
from .shards import At, HuggingFaceShards, IterableShards, Record, Shards, nowhere, parquet_shards, tar_shards
from .workers import Read, Watched, WatchedLoader, WorkerError, read_batch

_logger = logging.getLogger(__name__)

WINDOW = 1000  # records
DECODED_WINDOW = 32  # where a source gives decoded images, and shuffles by itself
MAX_UNREADABLE = 10  # in a row, as for map-style data
_SHARDS, _WINDOW = 1, 2  # what a random order is for

Window = List[Tuple[int, Record]]  # with the index of each
BadImages = Dict[int, Tuple[str, str]]  # index -> name, reason


class Span(NamedTuple):
    """Records of a shard, from ``first`` up to ``last``, which is not among them."""
    shard: int
    first: int
    last: int


class Part(NamedTuple):
    """What one data worker of one process reads in an epoch."""
    epoch: int
    number: int  # process * workers + worker
    parts: int
    first: int  # records of the parts before it
    records: int  # that it uses


def spans(lengths: np.ndarray, first: int, last: int, seed: int, epoch: int) -> Iterator[Span]:
    """Where the records ``first`` to ``last`` of an epoch lie, ``last`` not among them.

    An epoch goes through all shards in a random order, and where that is not enough once more, in another one.

    Args:
        lengths: Records of each shard.
        first: First record, counted from the beginning of the epoch.
        last: The record after the last one.
        seed: Seed of the run; negative for the order as it is.
        epoch: The epoch.
    """
    total = int(lengths.sum())
    if not total:
        return
    while first < last:
        order = _order(len(lengths), seed, epoch, _SHARDS, first // total)
        ends = np.cumsum(lengths[order]) + first // total * total
        for i in range(int(np.searchsorted(ends, first, 'right')), len(order)):
            shard, end = int(order[i]), int(min(ends[i], last))
            skipped = first - int(ends[i] - lengths[shard])
            if end > first:
                yield Span(shard, skipped, skipped + end - first)
            first = max(first, end)


class PartReader:
    """Reads a part.

    Where all shards tell their lengths, the parts share the records of an epoch exactly: each takes a range of the
    sequence of shards, and at its ends a part of a shard. Else whole shards are dealt out in turn, and a part that runs
    out of them begins its own again; where there are fewer shards than parts, parts take the records of one in turn.

    Args:
        shards: The shards.
        part: The part.
        seed: Seed of the run; negative to read in the order of the shards.
        window: Records that are shuffled at a time.
        at: Told the index of the record that is waited for.

    Attributes:
        restarts: How often the shards of the part were begun again.
    """

    def __init__(self, shards: Shards, part: Part, seed: int, window: int, at: At = nowhere) -> None:
        self.shards = shards
        self.part = part
        self.seed = seed
        self.window = window
        self.at = at
        self.restarts = 0

    def slots(self, used: int = 0) -> Iterator[Tuple[Window, int]]:
        """For each record that is not used yet, the window that it is in, and where.

        Args:
            used: Records used before. Those of earlier windows are not read, where the lengths of shards are known;
                else their content is not.
        """
        begun, begin = divmod(used, self.window)
        windows = self._windows(begun)
        if get_worker_info() is not None and not self.shards.divides_itself:  # which may draw random numbers
            windows = self._ahead(windows)
        for window, slots in windows:
            for slot in range(begin, slots):
                yield window, slot
            begin = 0
            window.clear()  # before the next one is waited for

    def _windows(self, begun: int) -> Iterator[Tuple[Window, int]]:
        """The windows from one on, and the slots of each."""
        part, size = self.part, self.window
        records = (self._dealt if self.shards.lengths is None else self._shared)(begun * size)
        for number in range(begun, -(-part.records // size)):
            read = list(islice(records, min(size, part.records - number * size)))
            order = _order(len(read), self.seed, part.epoch, _WINDOW, part.number, number)
            window = [read[i] for i in order if read[i][1].target is not None]
            if not window:
                raise WorkerError(f'all of {len(read)} records in a row have a negative target: check --target-key')
            del read
            yield window, len(order)

    def _ahead(self, windows: Iterator[Tuple[Window, int]]) -> Iterator[Tuple[Window, int]]:
        """Windows read in a thread, one ahead of the one that is in use.

        While one is waited for, this worker is where the thread is.
        """
        place = [-1]  # index of the record that the thread is at
        at, self.at = self.at, lambda index: nullcontext(place.__setitem__(0, index))
        wanted: SimpleQueue = SimpleQueue()
        done: SimpleQueue = SimpleQueue()

        def read() -> None:
            while wanted.get():
                try:
                    done.put((next(windows, None), None))
                except Exception as error:
                    done.put((None, error))

        # a daemon, for which a worker that ends does not wait
        threading.Thread(target=read, name='shard-reader', daemon=True).start()
        wanted.put(True)
        try:
            while True:
                result = None
                while result is None:
                    index = place[0]
                    with at(index):
                        while result is None and index == place[0]:
                            with suppress(Empty):
                                result = done.get(timeout=0.05)
                window, error = result
                if error is not None:
                    raise error
                if window is None:
                    return
                wanted.put(True)
                yield window
        finally:
            wanted.put(False)

    def _shared(self, skip: int) -> Iterator[Tuple[int, Record]]:
        shards, part = self.shards, self.part
        assert shards.lengths is not None
        last = part.first + part.records
        for shard, first, end in spans(shards.lengths, part.first + skip, last, self.seed, part.epoch):
            for number, record in shards.records(shard, first, end, self.at):
                yield shards.index(shard, number), record

    def _dealt(self, skip: int) -> Iterator[Tuple[int, Record]]:
        shards, part = self.shards, self.part
        order = _order(len(shards.names), self.seed, part.epoch, _SHARDS)
        offset, step = 0, 1  # of the records that are this part's
        if shards.divides_itself:
            pass
        elif len(order) >= part.parts:
            order = order[part.number::part.parts]
        else:
            offset, step = part.number // len(order), len(range(part.number % len(order), part.parts, len(order)))
            order = order[part.number % len(order)][None]
        while True:
            found = 0
            for shard in order.tolist():
                end = yield from self._every(shard, offset, step, skip)
                own = len(range(offset, end, step))
                found += own
                skip = max(0, skip - own)
            if not found:
                raise WorkerError(f'shard {shards.names[shard]} has no records for data worker {part.number} of '
                                  f'{part.parts}: use fewer --workers or more shards')
            self.restarts += 1

    def _every(self, shard: int, offset: int, step: int, skip: int) -> Any:
        """Every so many records of a shard, after some that are skipped; returns how many records it has."""
        reading = self.shards.records(shard, offset + step * skip, None, self.at)
        while True:
            try:
                number, record = next(reading)
            except StopIteration as stop:
                return stop.value
            if number % step == offset:
                yield self.shards.index(shard, number), record


def _order(length: int, seed: int, *key: int) -> np.ndarray:
    """A random order as a function of a key, or that of numbers for a negative seed; int ``[length]``."""
    return np.arange(length) if seed < 0 else np.random.default_rng([seed, *key]).permutation(length)


class ShardReader:
    """Reads shards as timm's readers do for its ``IterableImageDataset``, so for a loader of timm's.

    Processes and workers share the images: in evaluation each image is given once (for one that cannot be read the next
    one is given again, with a warning); in training each process gives whole batches of its part of an epoch.

    Args:
        shards: The shards.
        input_img_mode: PIL mode of the images.
        is_training: Whether images are in random order, and fill batches.
        batch_size: Images of a batch.
        repeats: Passes over the images in an epoch of training.
        seed: Seed of the order.
        window: Records that are shuffled at a time.
    """

    def __init__(self, shards: Shards, input_img_mode: str = 'RGB', is_training: bool = False, batch_size: int = 1,
                 repeats: float = 0, seed: int = 42, window: int = WINDOW) -> None:
        self.shards = shards
        self.input_img_mode = input_img_mode
        self.is_training = is_training
        self.batch_size = batch_size if is_training else 1
        self.num_samples = shards.num_images
        self.repeats = repeats if is_training else 0
        self.seed = seed
        self.window = window
        self.process = _process()  # asked here, as workers that are not forked know of no other processes
        self.epoch = SharedCount()

    @property
    def class_to_idx(self) -> Dict[str, int]:
        """Class names, where they are known."""
        return self.shards.class_to_idx

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is read next."""
        self.epoch.value = epoch

    def __len__(self) -> int:
        """Images of this process in an epoch."""
        rank, world_size = self.process
        if self.is_training:
            return _repeated(self.num_samples, self.repeats) // world_size
        return self._range(rank, world_size)[1]

    def __iter__(self) -> Iterator[Tuple[Any, Any]]:
        worker, (rank, world_size) = get_worker_info(), self.process
        workers = worker.num_workers if worker is not None else 1
        number, parts = rank * workers + (worker.id if worker is not None else 0), world_size * workers
        if self.is_training:  # the whole batches of a process, dealt out to its workers
            batches = len(self) // self.batch_size
            counts = [len(range(w, batches, workers)) * self.batch_size for w in range(workers)] * world_size
            first, count = sum(counts[:number]), counts[number]
        else:
            first, count = self._range(number, parts)
        reader = PartReader(self.shards, Part(self.epoch.value, number, parts, first, count),
                            self.seed if self.is_training else -1, self.window if self.is_training else MAX_UNREADABLE)
        reported: BadImages = {}
        for window, slot in reader.slots():
            if slot >= len(window) and not self.is_training:
                continue  # a record without a target
            bad_images: BadImages = {}
            image, target = _first_readable(self.shards, window, slot, bad_images,
                                            lambda image: OpenedImage(image, self.input_img_mode).pil())
            for index in bad_images.keys() - reported.keys():
                self.shards.report(index, *bad_images[index])
            reported.update(bad_images)
            yield image, target

    def _range(self, number: int, parts: int) -> Tuple[int, int]:
        """First image and number of images of one of several equal parts."""
        first = self.num_samples * number // parts
        return first, self.num_samples * (number + 1) // parts - first


def _process() -> Tuple[int, int]:
    """Number of this process, and of all."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _first_readable(shards: Shards, window: Window, slot: int, bad_images: BadImages,
                    decode: Callable[[Any], Any]) -> Tuple[Any, Any]:
    """The image in a slot of a window and its target, or the first after it that can be decoded.

    The one after it has its own turn as well: so the records that are used up can be told without reading them.

    Raises:
        BadImagesError: Ten images in a row, or all of the window, cannot be read.
    """
    for place in range(slot, slot + min(MAX_UNREADABLE, len(window))):
        index, record = window[place % len(window)]
        try:
            if record.image is None:
                raise ValueError('the record holds no image: check --input-key')
            return decode(record.image), record.target
        except Exception as error:  # PIL raises errors of every kind for broken files
            bad_images[index] = f'{record.name} of shard {shards.names[index >> 32]}', unreadable(error)
    name, reason = bad_images[index]
    raise BadImagesError(f'{len(bad_images)} images in a row cannot be read, the last one {name}: {reason}', bad_images)


class StreamBatches(Watched, IterableDataset):
    """The batches of a plan from data that stream.

    A data worker ``w`` of ``W`` makes the groups ``g`` with ``g % W == w``, which torch's loader takes in turn: so all
    processes have the same size at the same step, as for map-style data.

    Args:
        dataset: Data set of timm's or torch's that streams. It is not changed.
        maker: Makes the batch of a group of images, a :class:`~mixsize_timm.data.BatchMaker`.
        sampler: Knows the plan, made without random access, and this process.
        num_workers: Number of workers that make batches.
        window: Records that a worker shuffles at a time, and keeps encoded in memory.
    """

    def __init__(self, dataset: Any, maker: Any, sampler: MixSizeBatchSampler, num_workers: int = 0,
                 window: int = WINDOW) -> None:
        shards, self.mode, self.target_transform = _source(dataset)
        super().__init__(shards, num_workers)
        self.maker = maker
        self.sampler = sampler
        self.window = DECODED_WINDOW if self.source.divides_itself else window
        self.num_workers = max(1, num_workers)
        self._position = RawArray('q', 3)  # epoch, first step, whether mixup is on: workers may outlive an epoch
        self._restarts = RawArray('q', self.num_workers)
        parts = self.num_workers * sampler.world_size
        if len(self.source.names) < parts and not self.source.divides_itself:
            _logger.warning(
                '%d shards for %d data workers (%d of each of %d processes): several read the same shard and leave out '
                "the others' records; use fewer --workers, or write at least %d shards", len(self.source.names), parts,
                self.num_workers, sampler.world_size, parts)

    def start(self) -> None:
        """Tell the workers where the next iteration starts."""
        sampler = self.sampler
        self._position[:] = [sampler.epoch, sampler.first_step, int(sampler.mixup_enabled)]
        self._restarts[:] = [0] * self.num_workers

    @property
    def restarts(self) -> int:
        """How often workers of this process ran out of records in an epoch and began their shards again."""
        return sum(self._restarts)

    @property
    def identity(self) -> bytes:
        """Stands for what is streamed, wherever it lies: if it is another, a position in an epoch means nothing."""
        names = [os.path.basename(name) for name in self.source.names]
        lengths = self.source.lengths.tolist() if self.source.lengths is not None else None
        return hashlib.sha256(repr((names, lengths, self.window)).encode()).digest()

    @property
    def layout(self) -> Dict[str, int]:
        """What the sequence of the images depends on, besides seed and epoch."""
        return {'processes': self.sampler.world_size, 'workers': self.num_workers}

    def __len__(self) -> int:
        """Images of an epoch, over all processes."""
        return self.sampler.plan.num_images

    def __iter__(self) -> Iterator[Read]:
        worker = get_worker_info()
        sampler, workers = self.sampler, self.num_workers
        epoch, first_step, mixup = self._position
        sampler.epoch = epoch
        plan = sampler.plan
        # torch's loader takes the workers in turn from the first one on, wherever an epoch is gone on with
        own = worker.id if worker is not None else 0
        turn = (plan.first_group(first_step) + own) % workers
        part, used = part_of(plan, first_step, sampler.rank, sampler.world_size, turn, workers)
        self.source.set_epoch(epoch)
        reader = PartReader(self.source, part, self.maker.seed, self.window, self.heartbeats.at)
        slots = reader.slots(used)
        for group in islice(plan.groups(sampler.rank, sampler.world_size, first_step), own, None, workers):
            yield self._read(group._replace(mixup=bool(mixup)), slots)
            self._restarts[own] = reader.restarts

    def _read(self, group: Group, slots: Iterator[Tuple[Window, int]]) -> Read:
        assert group.images is not None
        length = len(group.images)
        return read_batch(lambda bad: self.maker(group, self._images(group, slots, bad), length), self.place)

    def _images(self, group: Group, slots: Iterator[Tuple[Window, int]], bad_images: BadImages
                ) -> Iterator[Tuple[Picture, Any, int]]:
        assert group.images is not None

        def decode(image: Any) -> Picture:
            return OpenedImage(image, self.mode).decode(partial(self.maker.part, group, number))

        for number in group.images.tolist():
            window, slot = next(slots)
            with self.heartbeats.at(window[slot % len(window)][0]):
                picture, target = _first_readable(self.source, window, slot, bad_images, decode)
                yield picture, target if self.target_transform is None else self.target_transform(target), number


class StreamLoader(WatchedLoader):
    """A :class:`~mixsize_timm.workers.WatchedLoader` of :class:`StreamBatches`."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.dataset.start()
        return super().__iter__()

    def __len__(self) -> int:
        return len(self.dataset.sampler)


def part_of(plan: EpochPlan, first_step: int, rank: int, world_size: int, worker: int, workers: int
            ) -> Tuple[Part, int]:
    """The part of an epoch that a data worker reads, and how much of it is used before a step.

    Args:
        plan: The epoch's plan.
        first_step: The optimizer step.
        rank: Its process.
        world_size: Number of processes.
        worker: The worker, which makes each group whose number modulo ``workers`` is its own.
        workers: Workers of each process.
    """
    turns = np.arange(len(plan)) % workers
    needs = np.concatenate([
        np.bincount(turns, plan.share(r, world_size), workers) for r in range(world_size)]).astype(np.int64)
    number, before = rank * workers + worker, plan.first_group(first_step)
    used = plan.share(rank, world_size)[:before][turns[:before] == worker].sum()
    return Part(plan.epoch, number, len(needs), int(needs[:number].sum()), int(needs[number])), int(used)


def _repeated(num_samples: int, repeats: float) -> int:
    """Images of an epoch of several passes; the last one may be a part, rounded up as in timm's readers."""
    return math.ceil(num_samples * max(1, repeats))


def num_images(dataset: Any) -> int:
    """Images of an epoch over all processes, of a data set of any kind."""
    reader: Any = getattr(dataset, 'reader', None)
    if isinstance(dataset, IterableDataset) and getattr(reader, 'num_samples', None):
        return _repeated(reader.num_samples, getattr(reader, 'repeats', 0))
    try:
        return len(dataset)
    except TypeError as error:
        raise TypeError(f'{type(dataset).__name__} streams without telling its length: give it a __len__, the images '
                        'of an epoch over all processes') from error


def create_stream(name: str, root: Optional[str], split: str, *, is_training: bool = False,
                  num_samples: Optional[int] = None, batch_size: int = 1, seed: int = 42, repeats: float = 0,
                  class_map: Any = None, input_key: Optional[str] = None, input_img_mode: str = 'RGB',
                  target_key: Optional[str] = None, target_format: Optional[str] = None,
                  target_transform: Optional[Callable] = None, window: int = WINDOW) -> IterableImageDataset:
    """timm's data set that streams, of tar or Parquet shards read here.

    Args:
        name: ``wds/...`` for tar shards, ``parquet/...`` for Parquet.
        root: Folder or URL.
        split: See :func:`~mixsize_timm.shards.tar_shards` and :func:`~mixsize_timm.shards.parquet_shards`.
        is_training: Whether it is for training.
        num_samples: Images of an epoch; by default all there are.
        batch_size: Images of a batch, for a loader of timm's.
        seed: Seed of the order of images, for a loader of timm's.
        repeats: Passes over the images in an epoch of training.
        class_map: As timm has it.
        input_key: Where a record's image is.
        input_img_mode: PIL mode of the images.
        target_key: Where a record's target is.
        target_format: As timm has it.
        target_transform: Called with each target.
        window: Records that are shuffled at a time, for a loader of timm's.

    Raises:
        FileNotFoundError: There are no such shards.
        ValueError: They cannot be read, or nothing tells the number of images.
    """
    open_shards: Any = tar_shards if name.lower().startswith('wds/') else parquet_shards
    shards = open_shards(root or '', split, num_samples, class_map=class_map, input_key=input_key,
                         target_key=target_key, target_format=target_format)
    reader: Any = ShardReader(shards, input_img_mode, is_training, batch_size, repeats, seed, window)
    return IterableImageDataset(root or '', reader=reader, target_transform=target_transform)


def _source(dataset: Any) -> Tuple[Shards, Optional[str], Optional[Callable]]:
    """Shards of a data set, the mode that their images are converted to, and what its targets go through."""
    reader: Any = getattr(dataset, 'reader', None)
    if isinstance(reader, ShardReader):
        return reader.shards, reader.input_img_mode, dataset.target_transform
    if type(reader).__name__ == 'ReaderHfids':  # importing it prints where the library is missing
        return HuggingFaceShards(reader), reader.input_img_mode, dataset.target_transform
    dataset = copy.copy(dataset)
    dataset.transform = None
    return IterableShards(dataset, num_images(dataset)), None, None
