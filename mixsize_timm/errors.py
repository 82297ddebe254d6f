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


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message is one line that says what to do."""


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
        stopped: Says what Ctrl-C leaves.
        level: From which level on the log is shown.

    Returns:
        The exit code: 0, 2 for what the user can mend, 130 after Ctrl-C.
    """
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not logging.root.handlers:  # a caller's own logging is left alone
        setup_default_logging(level if first else logging.WARNING)
    try:
        run()
    except UsageError as error:
        if first:
            print(f'{name}: error: {mask(str(error))}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            print(f'\n{name}: stopped; {stopped()}', file=sys.stderr)
        return 130
    return 0
