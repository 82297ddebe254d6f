"""Files that are packaged with the library, from folders beside it in a clone."""
import importlib.resources
from pathlib import Path
from typing import Any

_FOLDERS = {'recipes': 'recipes', 'cards': 'hub'}  # of the repository, by the name that they are packaged under


def read_resource(package: str, name: str) -> str:
    """The text of a packaged file.

    Args:
        package: ``recipes`` or ``cards``.
        name: File in it.
    """
    try:
        place: Any = importlib.resources.files(f'{__package__}.{package}')
    except ModuleNotFoundError:  # run from a clone that is not installed
        place = Path(__file__).parents[1] / _FOLDERS[package]
    return place.joinpath(name).read_text(encoding='utf-8')
