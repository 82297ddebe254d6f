"""The checkpoints of a run: written aside while training goes on, ranked, kept and removed."""
import glob
import logging
import os
import shutil
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, List, Optional, Sequence, TextIO, Tuple

from .checkpoint import LAST, RECOVERY, SaveError, Snapshot, age_of, copy_checkpoint, write_snapshot
from .errors import UsageError

fcntl: Any
try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_logger = logging.getLogger(__name__)

CLAIM_FILE = '.lock'


def claim(folder: str) -> TextIO:
    """Have a run's folder for this process alone, while it lives and what is returned stays open.

    The lock is the process's own: workers that outlive it for a moment do not hold it. Where the file system has no
    locks, nothing is guarded.

    Raises:
        UsageError: Another process has it.
    """
    file = open(os.path.join(folder, CLAIM_FILE), 'a+', encoding='utf-8')  # noqa: SIM115  # open as long as the run is
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # the two that POSIX allows
        with file:
            file.seek(0)
            owner = file.read().strip()
        raise UsageError(f'{folder} belongs to a run that is still alive ({owner}): wait for it or stop it, or choose '
                         'another --experiment') from error
    except OSError:
        return file
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()
    return file


class CheckpointHistory:
    """The checkpoints of the best epochs, as timm's ``CheckpointSaver`` keeps them: ``checkpoint-E`` beside ``last``.

    Args:
        folder: The run's folder.
        limit: Number of checkpoints to keep.
        entries: Epoch and metric of those that are kept, of a run that is resumed.
        epochs: Its finished epochs: later entries are of epochs that are trained once more. Of the last of them the
            checkpoint may be missing still, where the run was killed before it was copied.
    """

    def __init__(self, folder: str, limit: int, entries: Sequence[Tuple[int, float]] = (), epochs: int = 0) -> None:
        self.folder = folder
        self.limit = limit
        self.entries = [(epoch, metric) for epoch, metric in entries
                        if epoch == epochs - 1 or (epoch < epochs and os.path.isdir(self._path(epoch)))]
        self._removed: List[int] = []
        self._before = list(self.entries), list(self._removed)

    def rank(self, epoch: int, metric: float) -> None:
        """Give an epoch its place: a higher metric is better, and of equal ones the earlier epoch."""
        self._before = list(self.entries), list(self._removed)
        others = [entry for entry in self.entries if entry[0] != epoch]  # it may be trained once more
        ranked = sorted([*others, (epoch, metric)], key=lambda entry: (-entry[1], entry[0]))
        self.entries, without = ranked[:self.limit], ranked[self.limit:]
        self._removed += [other for other, _ in without if other != epoch]

    def undo(self) -> None:
        """Take the last :meth:`rank` back: there is no checkpoint of its epoch."""
        self.entries, self._removed = self._before

    def keep(self, epoch: int) -> None:
        """Keep ``last`` as the checkpoint of an epoch if it has a place, and remove those that lost theirs."""
        if any(place == epoch for place, _ in self.entries):
            copy_checkpoint(os.path.join(self.folder, LAST), self._path(epoch))
        while self._removed:
            shutil.rmtree(self._path(self._removed.pop()), ignore_errors=True)

    def _path(self, epoch: int) -> str:
        return os.path.join(self.folder, f'checkpoint-{epoch}')


class CheckpointInterval:
    """When a checkpoint is due inside an epoch.

    Args:
        interval: A number of optimizer steps such as ``500``, minutes such as ``30m``, or ``0`` for never.

    Raises:
        ValueError: It is something else.
    """

    def __init__(self, interval: str) -> None:
        number = interval[:-1] if interval.endswith('m') else interval
        try:
            minutes, steps = (float(number), 0) if interval.endswith('m') else (0., int(number))
        except ValueError:
            minutes = steps = -1
        if not minutes >= 0 or steps < 0:
            raise ValueError(f'must be a number of steps such as 500, minutes such as 30m, or 0, not {interval!r}')
        self.steps = steps
        self.seconds = 60 * minutes
        self.restart()

    def restart(self) -> None:
        """Count the minutes from now."""
        self._since = time.monotonic()

    def step_is_due(self, step: int) -> bool:
        """Whether it is, by its number, after a step counted over all epochs."""
        return bool(self.steps) and step % self.steps == 0

    def minutes_over(self) -> bool:
        """Whether it is, by this process's clock."""
        return bool(self.seconds) and time.monotonic() - self._since >= self.seconds


class CheckpointSaver:
    """Writes a run's checkpoints in a thread, one job after the other.

    What cannot be written is said in the log and tried again with the next one; :meth:`close` tells whether the last
    one was. Only the main process has one.

    Args:
        folder: The run's folder.
        history: Its best checkpoints.
        milestones: Numbers of epochs after which a checkpoint is kept for good.
    """
    NUM_RECOVERY = 2  # kept from inside an epoch: a newer one may turn out to be torn

    def __init__(self, folder: str, history: CheckpointHistory, milestones: Sequence[int] = ()) -> None:
        self.folder = folder
        self.history = history
        self.milestones = milestones
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix='checkpoint')
        self._job: Optional[Future] = None
        self._error: Optional[SaveError] = None

    def save_recovery(self, snapshot: Snapshot) -> None:
        """Write a checkpoint from inside an epoch, and remove those before it but one."""
        def job() -> None:
            write_snapshot(os.path.join(self.folder, RECOVERY + '{}-{}'.format(*snapshot.position)), snapshot)
            self._prune_recovery(self.NUM_RECOVERY)

        self._submit(job)

    def save_epoch(self, snapshot: Snapshot, best: Optional[Snapshot] = None,
                   on_lost_best: Callable[[], None] = lambda: None) -> None:
        """Write the checkpoint of a finished epoch, keep it where it has a place, and remove what lost its own.

        Args:
            snapshot: The checkpoint.
            best: The weights to keep as the best, where the epoch is.
            on_lost_best: Called where these cannot be written.
        """
        def job() -> None:
            try:
                if best is not None:  # first: the state that follows says that it is there
                    write_snapshot(os.path.join(self.folder, 'best'), best)
            except SaveError:
                on_lost_best()
                self.history.undo()
                raise
            try:
                write_snapshot(os.path.join(self.folder, LAST), snapshot, keep_previous=True)
                self.keep_last(snapshot.position[0])
            except SaveError:
                self.history.undo()
                raise
            self._prune_recovery(self.NUM_RECOVERY)

        self._submit(job)

    def keep_last(self, epoch: int) -> None:
        """Keep ``last``, of so many finished epochs, under its other names, and remove what lost its place."""
        if epoch in self.milestones:
            copy_checkpoint(os.path.join(self.folder, LAST), os.path.join(self.folder, f'milestone-{epoch}'))
        self.history.keep(epoch - 1)

    def remove_half_written(self) -> None:
        """Remove what a run that was killed has left half written."""
        for name in ('best', LAST, RECOVERY + '*', 'checkpoint-*', 'milestone-*'):
            for path in glob.glob(os.path.join(glob.escape(self.folder), name + '.new')):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Wait for what is being written."""
        if self._job is not None:
            self._job.result()
            self._job = None

    def close(self, finished: bool = False) -> None:
        """Wait for what is being written.

        Args:
            finished: The run is at its end: checkpoints from inside epochs are not needed any more.

        Raises:
            SaveError: The last checkpoint was not written.
        """
        self.wait()
        self._thread.shutdown()
        if self._error is not None:
            raise self._error
        if finished:
            self._prune_recovery(0)

    def _submit(self, job: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                job()
                self._error = None
            except SaveError as error:
                self._error = error
                _logger.error('%s; the checkpoints before it are as they were, and training goes on', error)

        self.wait()
        self._job = self._thread.submit(guarded)

    def _prune_recovery(self, number: int) -> None:
        """Remove all but the newest checkpoints from inside epochs; all of them only where ``last`` is newer."""
        found = glob.glob(os.path.join(glob.escape(self.folder), RECOVERY + '*'))
        whole = [path for path in found if not os.path.splitext(path)[1]]
        last = os.path.join(self.folder, LAST)
        done = age_of(last) if os.path.isdir(last) else (0, 0, 0)
        for path in sorted(whole, key=age_of, reverse=True)[number:]:
            if number or age_of(path) < done:
                shutil.rmtree(path, ignore_errors=True)
