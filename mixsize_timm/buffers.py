"""Memory of batches that is used again: new memory of that size costs the system more than a batch costs to fill."""
import mmap
import os
import weakref
from typing import Any, Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch


class Recycled:
    """Gives out tensors whose memory is used again when nothing refers to it any more, no view of it either.

    It keeps as many blocks as were ever in use at a time, each as large as the largest tensor asked for.
    """

    def __init__(self) -> None:
        self._free: List[np.ndarray] = []
        self._block = 0  # bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the host, not initialised."""
        size = _num_bytes(shape, dtype)
        if size > self._block:
            self._block = size
            self._free = []
        block = self._free.pop() if self._free else np.empty(self._block, np.uint8)

        def release() -> None:
            if len(block) == self._block:
                self._free.append(block)

        return _tensor(block[:size], shape, dtype, release)


class SharedSlots:
    """Memory that data workers fill with batches, and the main process reads them from.

    torch's own way maps a new file for each batch. This is mapped once, before the workers are forked, for them alone;
    it is not in /dev/shm, of which containers often have little. A worker takes a slot of its own that is free; it is
    free again when nothing refers to the tensor that the main process got of it. Where a batch finds none free, or
    where processes are not forked, it travels in torch's way.

    Args:
        num_workers: Number of workers.
        size: Bytes of the largest batch.
        slots: Slots of each worker.
    """
    _known: 'weakref.WeakValueDictionary[int, SharedSlots]' = weakref.WeakValueDictionary()  # also in forked workers

    def __init__(self, num_workers: int, size: int, slots: int) -> None:
        self._slots = slots
        self._size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # pages are taken from the system when they are written to
        self._memory = np.frombuffer(mmap.mmap(-1, max(num_workers * slots * self._size, 1)), np.uint8)
        self._taken = np.frombuffer(mmap.mmap(-1, max(num_workers * slots, 1)), np.bool_)
        self._known[id(self)] = self

    def __reduce__(self) -> Tuple[Callable, Tuple]:
        return type(None), ()  # a process that is not forked has none of it

    def empty(self, worker: int, shape: Sequence[int], dtype: torch.dtype) -> Optional[Tuple[torch.Tensor, Any]]:
        """In a worker: a tensor to fill, and what to send in its place, which arrives as a tensor.

        ``None`` where no slot is free or large enough.
        """
        size = _num_bytes(shape, dtype)
        own = range(worker * self._slots, (worker + 1) * self._slots)
        slot = next((slot for slot in own if not self._taken[slot]), None)
        if slot is None or size > self._size:
            return None
        self._taken[slot] = True
        tensor = _tensor(self._part(slot, size), shape, dtype)
        return tensor, _Sent(id(self), slot, tuple(shape), dtype)

    def received(self, slot: int, shape: Tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """In the main process: the tensor in a slot."""
        process = os.getpid()

        def release() -> None:
            if os.getpid() == process:  # not in a copy of it
                self._taken[slot] = False

        return _tensor(self._part(slot, _num_bytes(shape, dtype)), shape, dtype, release)

    def _part(self, slot: int, size: int) -> np.ndarray:
        return self._memory[slot * self._size:slot * self._size + size]


class _Sent:
    """A tensor in a slot on its way: pickled as where it is, unpickled as the tensor."""

    def __init__(self, *where: Any) -> None:
        self.where = where

    def __reduce__(self) -> Tuple[Callable, Tuple[Any, ...]]:
        return _receive, self.where


def _receive(slots: int, *where: Any) -> torch.Tensor:
    return SharedSlots._known[slots].received(*where)


def _num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _tensor(memory: np.ndarray, shape: Sequence[int], dtype: torch.dtype, release: Any = None) -> torch.Tensor:
    """A tensor in a part of some memory; ``release`` is called when nothing refers to it any more."""
    if release is not None:
        weakref.finalize(memory, release).atexit = False  # the tensor's storage holds this array, and nothing else does
    return torch.from_numpy(memory).view(dtype).view(tuple(shape))
