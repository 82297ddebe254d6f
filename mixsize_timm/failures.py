"""What ended a training, in words that say what to do."""
import argparse
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

from .datasets import BadImagesError
from .engine import NonFiniteLoss
from .errors import LocalError, UsageError
from .workers import WorkerError

_LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe', 'Timed out waiting', 'gloo')

_ENDED = 'another process of this run has ended'


@contextmanager
def explaining(args: argparse.Namespace, loader: Any, where_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Turn the failures of a training that have a known cause into one line.

    Args:
        args: Arguments of the run.
        loader: The training loader, which knows what became of its workers.
        where_to_go_on: Says where the run can be continued from.

    Raises:
        UsageError: In the place of such a failure; a :class:`~mixsize_timm.errors.LocalError` where only this process
            knows of it.
    """
    try:
        yield
    except (ArithmeticError, RuntimeError) as error:
        failure = error
        if not isinstance(error, (BadImagesError, WorkerError)):  # torch's, raised wherever the main process was
            failure = getattr(loader, 'worker_error', None) or error
        line = _line(failure, args)
        if not line:
            raise
        shared = isinstance(error, NonFiniteLoss) or line.startswith(_ENDED)
        raise (UsageError if shared else LocalError)(f'{line}; {where_to_go_on()}') from error


def _line(error: Exception, args: argparse.Namespace) -> str:
    """One line about an error; empty for one whose cause is not known."""
    text = ' '.join(str(error).split())
    if isinstance(error, NonFiniteLoss):
        return f'{text}: a lower --lr or --clip-grad may help'
    if isinstance(error, (BadImagesError, WorkerError)):
        return text
    if text.startswith('DataLoader worker'):  # of a loader of timm's
        return text
    if should_reduce_batch_size(error):
        return f'a step does not fit into memory: use --micro-batch-size auto, or a smaller --batch-size ({text[:200]})'
    if args.deterministic and 'deterministic' in text:
        return f'--deterministic: {text[:300]}'
    lost = isinstance(error, torch.distributed.DistError) or any(word in text for word in _LOST)
    if torch.distributed.is_initialized() and lost:
        return f'{_ENDED}, and its own message says why ({text[:150]})'
    return ''
