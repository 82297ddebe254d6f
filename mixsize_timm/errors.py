"""What the user can mend, said in one line."""
from contextlib import contextmanager
from typing import Iterator

from safetensors import SafetensorError


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is one line that says what to do."""


@contextmanager
def refusing(what: str = '') -> Iterator[None]:
    """Turn the many ways in which timm and others refuse an argument into a :class:`UsageError`."""
    try:
        yield
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
            SafetensorError) as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        raise UsageError(f'{what}: {reason}' if what else reason) from error
