"""Signals that ask a run to stop: training ends its step, all processes after the same one."""
import os
import signal
import threading
from types import FrameType
from typing import Any, Dict, Optional, Tuple

import psutil
import torch
from accelerate import Accelerator

from .errors import Stopped

# The first three leave a run to be continued; they are what schedulers, launchers and closed terminals send
_SIGNALS = ('SIGTERM', 'SIGUSR1', 'SIGHUP', 'SIGINT')
_LAUNCHERS = ('accelerate', 'torchrun', 'torch.distributed')
_ORPHANED = len(_SIGNALS) + 1


class StopRequest:
    """Within its context a signal does not end the process: it is noted, and :meth:`agreed` tells of it.

    It notes SIGTERM, SIGUSR1, SIGHUP (unless it was ignored before, as under ``nohup``), a first SIGINT, and that the
    launcher has died (``accelerate launch`` or ``torchrun``; a shell that ends leaves its children to themselves). A
    second SIGINT is Python's ``KeyboardInterrupt``.

    Args:
        accelerator: Its processes agree on whether, and after which step, they stop.

    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._at_once = False
        self._noted = 0
        self._pid = os.getpid()
        self._parent = os.getppid() if _is_launched() else None
        self._before: Dict[int, Any] = {}
        self._pending: Optional[Tuple[Any, torch.Tensor]] = None
        # its own group, so that its messages keep clear of those of the backward pass; on the CPU, so that no device
        # is waited for
        self._group: Any = torch.distributed.new_group(backend='gloo') if accelerator.num_processes > 1 else None

    def __enter__(self) -> 'StopRequest':
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and not (name == 'SIGHUP' and signal.getsignal(number) is signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def stop_at_once(self) -> None:
        """From now on nothing is left to be finished: a signal raises where it comes. Called by every process.

        Raises:
            Stopped: It has come, to any process.
        """
        reasons = [self.agreed()[0] for _ in range(2)]  # the second answer is of what was known at the first
        self._at_once = True
        if any(reasons):
            raise Stopped(max(reasons))

    def agreed(self, also: bool = False) -> Tuple[str, bool]:
        """What all processes have been asked for; they must call it after the same steps.

        With several processes the answer is that of the call before, so that nobody waits: what one process knows
        now, all know at the next step.

        Args:
            also: Something else that one process asks for and all shall do.

        Returns:
            The reason to stop, such as ``SIGTERM``, or an empty string; and whether one of them asked ``also``.
        """
        if self._parent is not None and os.getppid() != self._parent:
            self._noted = self._noted or _ORPHANED
        asked = torch.tensor([self._noted, int(also)])
        if self._group is not None:
            handle = torch.distributed.all_reduce(
                asked, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            pending, self._pending = self._pending, (handle, asked)
            if pending is None:
                return '', False
            pending[0].wait()
            asked = pending[1]
        noted, others = asked.tolist()
        return _name(noted), bool(others)

    def _note(self, number: int, frame: Optional[FrameType]) -> None:
        name = signal.Signals(number).name
        if os.getpid() != self._pid:  # a data worker that was just forked from here
            return
        if name == 'SIGINT' and self._noted:
            raise KeyboardInterrupt
        self._noted = self._noted or _SIGNALS.index(name) + 1
        if self._at_once:
            raise Stopped(name)


def _name(noted: int) -> str:
    return '' if not noted else 'the end of its launcher' if noted == _ORPHANED else _SIGNALS[noted - 1]


def _is_launched() -> bool:
    """Whether the process that started this one is a launcher, which waits for it as long as it lives."""
    try:
        words = psutil.Process().parent().cmdline()
        python = os.path.basename(words[0]).startswith('python')  # not a shell that names one on its command line
        return python and any(name in word for word in words for name in _LAUNCHERS)
    except (AttributeError, IndexError, psutil.Error):
        return False
