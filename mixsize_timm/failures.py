"""What ended a command, in words that say what to do."""
import argparse
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .datasets import BadImagesError
from .engine import NonFiniteLoss
from .errors import LocalError, UsageError
from .workers import WorkerError

_LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'Timed out waiting', 'gloo')

_ENDED = 'another process of this run has ended'


@contextmanager
def explaining(args: argparse.Namespace, loader: Any = None, where_to_go_on: Optional[Callable[[], str]] = None
               ) -> Iterator[None]:
    """Turn the failures of a training, an evaluation or a calibration that have a known cause into one line.

    Args:
        args: Arguments of the command; only options that it has are recommended.
        loader: The training loader, which knows what became of its workers.
        where_to_go_on: Says where a run can be continued from.

    Raises:
        UsageError: In the place of such a failure; a :class:`~mixsize_timm.errors.LocalError` where only this process
            knows of it.
    """
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, RuntimeError, ValueError) as error:
        failure = error
        if not isinstance(error, (BadImagesError, WorkerError)):  # torch's, raised wherever the main process was
            failure = getattr(loader, 'worker_error', None) or error
        line = _line(failure, args)
        if not line:
            raise
        shared = isinstance(error, NonFiniteLoss) or line.startswith(_ENDED)
        line = f'{line}; {where_to_go_on()}' if where_to_go_on is not None else line
        raise (UsageError if shared else LocalError)(line) from error


def _line(error: Exception, args: argparse.Namespace) -> str:
    """One line about an error; empty for one whose cause is not known."""
    text = ' '.join(str(error).split())
    if isinstance(error, NonFiniteLoss):
        return f'{text}: a lower --lr or --clip-grad may help'
    if isinstance(error, (BadImagesError, WorkerError)):
        return text.rpartition(f'{type(error).__name__}: ')[2]  # behind the traceback that torch puts into the text
    if text.startswith('DataLoader worker'):  # of a loader of timm's
        return text
    if should_reduce_batch_size(error):
        parts = '--micro-batch-size auto, or ' if hasattr(args, 'micro_batch_size') else ''
        return f'a batch does not fit into memory: use {parts}a smaller --batch-size ({text[:200]})'
    if text.startswith('Expected more than 1 value per channel'):  # batch norm's, in training
        return ('batch norm has a single value of each channel, of one image whose feature map is 1x1: use a larger '
                '--batch-size or --micro-batch-size, or larger images')
    if text.startswith(('Multi-label', 'Dense multi-label')):  # of timm, on a target
        return f'{text} Check --num-classes and --target-format'
    if getattr(args, 'deterministic', False) and 'deterministic' in text:
        return f'--deterministic: {text[:300]}'
    lost = isinstance(error, torch.distributed.DistError) or any(word in text for word in _LOST)
    if torch.distributed.is_initialized() and lost:
        return f'{_ENDED}, and its own message says why ({text[:150]})'
    return ''
