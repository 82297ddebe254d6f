"""The packaged recipes: arguments of a training, by name; ``mixsize recipes`` lists and prints them."""
import difflib
import sys
from typing import Dict, List, Optional

from .errors import UsageError, run_command
from .parser import Parser
from .resources import list_resources, read_resource

LABELS = ('gives', 'launch', '8 GPUs', 'costs', 'was run')  # of the lines of a recipe's header, in their order
_TEXT = 13  # column of the text behind a label


def recipe_names() -> List[str]:
    """The recipes that there are, in alphabetical order."""
    return [name.removesuffix('.yaml') for name in list_resources('recipes') if name.endswith('.yaml')]


def read_recipe(name: str) -> str:
    """The YAML of a recipe.

    Raises:
        UsageError: There is no such recipe.
    """
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, cutoff=0.5)
        raise UsageError(f'there is no recipe {name!r}{f", but {close[0]!r}" if close else ""}: '
                         '"mixsize recipes" lists them')
    return read_resource('recipes', f'{name}.yaml')


def recipe_header(text: str) -> Dict[str, str]:
    """The lines of a recipe's header, by the :data:`LABELS` that they have; a long one is joined."""
    header: Dict[str, str] = {}
    label = ''
    for line in text.splitlines():
        if not line.startswith('#'):
            break
        name = line[4:_TEXT].strip()
        label = name if name in LABELS else '' if name or not line[_TEXT:] else label
        if label:
            header[label] = f'{header.get(label, "")} {line[_TEXT:].strip()}'.removesuffix('\\').strip()
    return header


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is that of :func:`~mixsize_timm.errors.run_command`."""
    return run_command('mixsize recipes', lambda: _show(argv), lambda: 'nothing was written')


def _show(argv: Optional[List[str]]) -> None:
    parser = Parser(
        prog='mixsize recipes', description='List the recipes that "mixsize train --recipe NAME" takes, or print one, '
        'such as into a file to edit, for "mixsize train --config FILE".')
    parser.add_argument('name', nargs='?', metavar='NAME', help='the recipe to print (default: list all)')
    name = parser.parse_args(argv).name
    sys.stdout.write(read_recipe(name) if name else list_recipes())


def list_recipes() -> str:
    """A line for each recipe: its name, whether it was run, and what it gives."""
    headers = {name: recipe_header(read_recipe(name)) for name in recipe_names()}
    width = max(map(len, headers))
    return ''.join(f'{name:<{width}}  {"not run" if header["was run"].startswith("not run") else "was run"}  '
                   f'{header["gives"]}\n' for name, header in headers.items())
