"""Files that are packaged with the library, from folders beside it in a clone."""
import importlib.resources
from pathlib import Path
from typing import Any, List

_FOLDERS = {'recipes': 'recipes', 'cards': 'hub'}  # of the repository, by the name that they are packaged under


def read_resource(package: str, name: str) -> str:
    """The text of a packaged file.

    Args:
        package: ``recipes`` or ``cards``.
        name: File in it.
    """
    return _place(package).joinpath(name).read_text(encoding='utf-8')


def list_resources(package: str) -> List[str]:
    """The names of what is packaged beside each other, in alphabetical order; folders are among them.

    Args:
        package: ``recipes`` or ``cards``.
    """
    return sorted(entry.name for entry in _place(package).iterdir())


def _place(package: str) -> Any:
    try:
        return importlib.resources.files(f'{__package__}.{package}')
    except ModuleNotFoundError:  # run from a clone that is not installed
        return Path(__file__).parents[1] / _FOLDERS[package]
