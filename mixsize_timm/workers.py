"""Data workers watched: one that dies or hangs ends the iteration with its cause, and bad images are counted."""
import os
import signal
import threading
from contextlib import contextmanager, suppress
from multiprocessing import RawArray
from multiprocessing.connection import wait
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from torch.utils.data import DataLoader, get_worker_info

from .buffers import SharedSlots
from .datasets import BadImagesError

_CURES = {
    'SIGKILL': 'most likely the machine ran out of memory: use fewer --workers',
    'SIGBUS': 'most likely shared memory is full: enlarge /dev/shm (docker: --shm-size) or use fewer --workers',
    'SIGSEGV': 'a library crashed, most likely on that image: try it alone, or --workers 0',
}


class WorkerError(RuntimeError):
    """A data worker died, hung or raised an error; the message is one line that says which and where."""


class WorkerInit:
    """Starts a data worker that outlives, for a while, a signal which launchers send to all processes of a run.

    The main process needs it for the step that it finishes. torch's own workers end at once, and an error is raised in
    the main process wherever it is.

    Args:
        worker_init_fn: What else starts a worker.
    """
    SECONDS = 30  # in which launchers, too, expect a run to end

    def __init__(self, worker_init_fn: Optional[Callable[[int], None]] = None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker: int) -> None:
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)
        for name in ('SIGINT', 'SIGHUP', 'SIGUSR1'):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        # in the place of torch's, for threads that a library started before this, which the mask below does not reach
        signal.signal(signal.SIGTERM, self._end_later)
        if hasattr(signal, 'sigwaitinfo'):  # elsewhere nobody can tell who sent a signal
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=self._await_end, name='data-worker-end', daemon=True).start()

    def _await_end(self) -> None:
        """End at once when the main process asks, and later when somebody else does."""
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            self._end_later()
        os._exit(0)

    @classmethod
    def _end_later(cls, *_: Any) -> None:
        signal.alarm(cls.SECONDS)


class Read(NamedTuple):
    """What a worker hands over: a batch, and the images that it could not read for it."""
    batch: Any  # None where ten images in a row could not be read
    bad_images: Dict[int, Tuple[str, str]]  # index -> path, reason


def read_batch(make: Callable[[Dict[int, Tuple[str, str]]], Any], place: Callable[[int], str]) -> Read:
    """A batch, and what could not be read for it.

    Args:
        make: Makes the batch, given where to note images that cannot be read.
        place: Words for the image that a worker is at.

    Raises:
        WorkerError: In a worker, for any error but unreadable images.
    """
    bad_images: Dict[int, Tuple[str, str]] = {}
    try:
        return Read(make(bad_images), bad_images)
    except BadImagesError as error:
        return Read(None, error.images)
    except WorkerError:
        raise
    except Exception as error:
        worker = get_worker_info()
        if worker is None:
            raise
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        raise WorkerError(f'data worker {worker.id} failed{place(worker.id)}: {reason}') from error


class Heartbeats:
    """What each worker is at, in memory that it shares with the main process.

    A worker counts its images and says which one it is at. There is no time in it: the one who watches measures how
    long a count stands still, so that a machine or a process group that was suspended wakes up without an alarm.

    Args:
        num_workers: Number of workers.
    """

    def __init__(self, num_workers: int) -> None:
        self._count = RawArray('q', num_workers)
        self._index = RawArray('q', [-1] * num_workers)  # of the image, -1 between images

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Tell that this worker is at an image, until the block ends well; in the main process nothing is told."""
        worker = get_worker_info()
        if worker is not None:
            self._count[worker.id] += 1
            self._index[worker.id] = index
        yield
        if worker is not None:
            self._index[worker.id] = -1

    def clear(self) -> None:
        """Forget what workers that are no more were at."""
        for worker in range(len(self._index)):
            self._index[worker] = -1

    def __getitem__(self, worker: int) -> Tuple[int, int]:
        """Number of images begun, and the index of the one it is at, -1 for none."""
        return self._count[worker], self._index[worker]


class Watched:
    """What a :class:`WatchedLoader` asks of its data set, besides :class:`Read` batches.

    Args:
        source: Where the images come from: it has their ``name(index)``, and ``report(index, name, reason)`` warns of
            one that cannot be read.
        num_workers: Number of workers that make batches.

    Attributes:
        source: As given.
        heartbeats: What each worker is at.
    """

    def __init__(self, source: Any, num_workers: int) -> None:
        self.source = source
        self.heartbeats = Heartbeats(num_workers)

    def place(self, worker: int) -> str:
        """Words for the image that a worker is at, if any."""
        index = self.heartbeats[worker][1]
        return f' at image {self.source.name(index)}' if index >= 0 else ''


class WatchedLoader(DataLoader):
    """torch's ``DataLoader`` of :class:`Read` batches, which it strips; its workers are watched.

    Args:
        dataset: A :class:`Watched` data set that gives :class:`Read` batches, such as
            :class:`~mixsize_timm.data.MixSizeDataset`.
        max_bad_images: Part of the data set's images that may be unreadable, in [0, 1].
        worker_timeout: Seconds, while a batch is waited for, in which a worker that is at an image must be done with
            it; 0 for no limit. However long a whole batch takes, its worker is not disturbed.
        new_slots: Makes the memory that new workers share with the main process, and hands it to the data set.
        worker_init_fn: What starts a worker, beside :class:`WorkerInit`.
        **kwargs: Every other argument of ``DataLoader``; ``timeout`` is not needed.

    Attributes:
        bad_images: Those found so far: index -> path, reason.
    """
    dataset: Any

    def __init__(self, dataset: Any, *, max_bad_images: float = 1., worker_timeout: float = 45.,
                 new_slots: Optional[Callable[[], SharedSlots]] = None,
                 worker_init_fn: Optional[Callable[[int], None]] = None,
                 **kwargs: Any) -> None:
        if not 0 <= max_bad_images <= 1:
            raise ValueError(f'max_bad_images must be in [0, 1], not {max_bad_images}')
        if not worker_timeout >= 0:
            raise ValueError(f'worker_timeout must not be negative, not {worker_timeout}')
        super().__init__(dataset, worker_init_fn=WorkerInit(worker_init_fn), **kwargs)
        self.max_bad_images = max_bad_images
        self.worker_timeout = worker_timeout
        self.new_slots = new_slots
        self._slots: Optional[SharedSlots] = None
        self.bad_images: Dict[int, Tuple[str, str]] = {}
        self._processes: List[Any] = []
        self._hung: Optional[int] = None  # worker
        self._failure: Optional[WorkerError] = None

    @property
    def worker_error(self) -> Optional[WorkerError]:
        """Why a worker died, if one did.

        torch raises a ``RuntimeError`` for a dead worker wherever the main process is, which may be in the training
        step: who catches one asks here.
        """
        return self._failure or self._death()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._failure = self._hung = None
        if self.new_slots is not None and (not self.persistent_workers or self._iterator is None):
            self._slots = self.new_slots()  # for the workers that are started now
        slots = self._slots  # of this iteration, for as long as there is one
        if not self.persistent_workers:
            self.dataset.heartbeats.clear()
        watch = _Watch(self)
        try:
            with watch.waiting():
                iterator: Any = super().__iter__()
                self._processes = list(getattr(iterator, '_workers', ()))
            while True:
                with watch.waiting():
                    read = next(iterator, None)
                if read is None:
                    return
                yield self._stripped(read)
        except WorkerError as error:  # raised in a worker: torch appends its traceback's text, the last line is ours
            line = str(error).rstrip().rpartition(f'{WorkerError.__name__}: ')[2]
            raise WorkerError(line) from error
        except Exception as error:
            if isinstance(error, (OSError, EOFError)):
                self._await_death()
            self._failure = self._death()
            if self._failure is None or isinstance(error, BadImagesError):
                raise
            raise self._failure from error
        except GeneratorExit:  # by an error of the caller's, or one that torch raised there
            self._failure = self._death()
            raise
        finally:
            watch.stop()
            del slots
            if not self.persistent_workers:
                self._processes = []  # torch ends them now

    def _stripped(self, read: Read) -> Any:
        for index, (name, reason) in read.bad_images.items():
            if index not in self.bad_images:
                self.bad_images[index] = name, reason
                self.dataset.source.report(index, name, reason)
        total = len(self.dataset)
        if len(self.bad_images) > self.max_bad_images * total:
            first = ', '.join(name for name, _ in list(self.bad_images.values())[:5])
            raise BadImagesError(
                f'{len(self.bad_images)} of {total} images cannot be read, more than the {self.max_bad_images:.3%} '
                f'allowed: {first}{", ..." if len(self.bad_images) > 5 else ""}: repair or remove them, or raise '
                '--max-bad-images', self.bad_images)
        if read.batch is None:
            last, reason = list(read.bad_images.values())[-1]
            raise BadImagesError(f'{len(read.bad_images)} images in a row cannot be read, the last one {last}: '
                                 f'{reason}', read.bad_images)
        return read.batch

    def _await_death(self) -> None:
        """Wait for a worker that died while it handed over a batch: its connection breaks before it is gone."""
        with suppress(RuntimeError):  # torch's, of its SIGCHLD
            for process in self._processes:
                if wait([process.sentinel], timeout=1):
                    process.join(timeout=1)

    def _death(self) -> Optional[WorkerError]:
        """What became of the first worker that is no more, in one line."""
        if self._hung is not None:
            return WorkerError(f'data worker {self._hung} hung{self.dataset.place(self._hung)} for more than '
                               f'{self.worker_timeout:g} seconds: check that file and its storage, or raise '
                               '--worker-timeout')
        for worker, process in enumerate(self._processes):
            code = process.exitcode
            if code is None:
                continue
            if code >= 0:
                return WorkerError(f'data worker {worker} ended with exit code {code}{self.dataset.place(worker)}: '
                                   'try --workers 0 for its traceback')
            name = signal.Signals(-code).name
            cure = _CURES.get(name, 'use --workers 0 if it happens again')
            return WorkerError(f'data worker {worker} was killed by {name}{self.dataset.place(worker)}: {cure}')
        return None

    def kill_hung(self, worker: int) -> None:
        """Kill all workers, as one of them hangs: torch then notices at once, and nothing hangs at its exit."""
        self._hung = worker
        for process in self._processes:
            process.kill()


class _Watch:
    """A thread that looks after a loader's workers while the main process waits for them.

    A thread, since the main process waits inside torch's loader: for a batch, or, where workers outlive an epoch, for
    the answer of each to the start of the next one. torch's own ``timeout`` would break off the latter for good.
    """
    INTERVAL = 1.  # seconds

    def __init__(self, loader: WatchedLoader) -> None:
        self._loader = loader
        self._waiting = False
        self._stopped = threading.Event()
        if loader.num_workers and loader.worker_timeout:
            threading.Thread(target=self._run, name='data-worker-watch', daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        loader = self._loader
        interval = min(self.INTERVAL, loader.worker_timeout / 4)
        beats = [(0, -1)] * loader.num_workers
        still = [0.] * loader.num_workers  # seconds of waiting in which a worker was at one image
        while not self._stopped.wait(interval):
            if not self._waiting:
                continue
            for worker in range(loader.num_workers):
                beat = loader.dataset.heartbeats[worker]
                still[worker] = still[worker] + interval if beat == beats[worker] and beat[1] >= 0 else 0.
                beats[worker] = beat
                if still[worker] >= loader.worker_timeout:
                    return loader.kill_hung(worker)
