"""What the user can mend, said in one line."""
import logging
import os
import sys
from contextlib import contextmanager
from typing import Callable, Iterator

from safetensors import SafetensorError
from timm.utils import setup_default_logging
from yaml import YAMLError

from .tokens import mask

USAGE = 2  # exit codes: something that the user can mend
STOPPED = 75  # asked to stop by a signal or the end of the launcher; EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 130  # Ctrl-C


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message is one line that says what to do."""


class LocalError(UsageError):
    """One that only this process knows of, so that it is the one to say it."""


class Stopped(BaseException):
    """A run was asked to stop, and can go on: by a signal, such as a scheduler sends, or by Ctrl-C.

    It may come while anything runs, so that like ``KeyboardInterrupt`` it is no ``Exception``: an image that is being
    read is not broken by it.

    Args:
        reason: What asked it, such as ``SIGTERM``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = INTERRUPTED if reason == 'SIGINT' else STOPPED


@contextmanager
def refusing(what: str = '') -> Iterator[None]:
    """Turn the many ways in which timm and others refuse an argument into a :class:`UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
            SafetensorError, YAMLError) as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        if isinstance(error, KeyError) and ' ' not in reason:  # the key alone
            reason = f'{reason} is unknown'
        raise UsageError(f'{what}: {reason}' if what else reason) from error


def check_writable(folder: str) -> None:
    """Refuse a folder that cannot be written to, or made, before any work is done for it."""
    place = os.path.abspath(folder)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place) or not os.access(place, os.W_OK):
        raise UsageError(f'cannot write to {folder}: {place} is {"read-only" if os.path.isdir(place) else "a file"}')


def run_command(name: str, run: Callable[[], None], stopped: Callable[[], str], level: int = logging.INFO) -> int:
    """Do a command's work; what the user can mend is said once, in one line.

    Args:
        name: The command.
        run: Its work.
        stopped: Says what Ctrl-C or a signal leaves.
        level: From which level on the log is shown.

    Returns:
        The exit code: 0, :data:`USAGE` for what the user can mend, :data:`STOPPED` after a signal that asks to stop,
        :data:`INTERRUPTED` after Ctrl-C.
    """
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not logging.root.handlers:  # a caller's own logging is left alone
        setup_default_logging(level if first else logging.WARNING)
    try:
        run()
    except UsageError as error:
        if first or isinstance(error, LocalError):
            rank = f'rank {os.environ["RANK"]}: ' if isinstance(error, LocalError) and 'RANK' in os.environ else ''
            print(f'{name}: error: {rank}{mask(str(error))}', file=sys.stderr)
        return USAGE
    except Stopped as error:
        if first:
            print(f'\n{name}: stopped by {error}; {stopped()}', file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        if first:
            print(f'\n{name}: stopped; {stopped()}', file=sys.stderr)
        return INTERRUPTED
    return 0
