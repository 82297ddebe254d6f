"""The ``mixsize`` command: one subcommand for each thing the package does."""
import importlib
import sys
from typing import List, Optional

_COMMANDS = {
    'train': ('mixsize_timm.train', 'train a timm model; takes what "python -m mixsize_timm.train" takes'),
    'plan': ('mixsize_timm.planner', 'print what a training will cost; takes what "train" takes'),
    'recipes': ('mixsize_timm.recipe', 'list the packaged recipes, or print one: what "train --recipe NAME" takes'),
    'evaluate': ('mixsize_timm.evaluate', 'measure models at many image sizes, and write a report'),
    'calibrate': ('mixsize_timm.calibrate_model', 'keep batch-norm statistics for many sizes beside a model'),
    'prepare': ('mixsize_timm.prepare', 'rewrite a data set as shards of images no larger than training needs'),
    'hub': ('mixsize_timm.hub', 'publish models on the Hugging Face hub, and fetch them: export, verify, push, pull, '
                                'onnx'),
}


def main(argv: Optional[List[str]] = None) -> int:
    """Run a subcommand with the arguments behind it; its exit code, or 2 if there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    names = '\n'.join(f'  {name:<10} {text}' for name, (_, text) in _COMMANDS.items())
    if argv and argv[0] in ('-h', '--help'):
        print(f'usage: mixsize COMMAND ...\n\n{names}\n  --version  print the versions, to name in a report of a fault')
        return 0
    if argv == ['--version']:
        from .provenance import versions  # torch takes seconds to import
        print(versions())
        return 0
    if not argv or argv[0] not in _COMMANDS:
        what = f'there is no command {argv[0]!r}.' if argv else 'which command?'
        print(f'mixsize: error: {what} Choose from: {", ".join(_COMMANDS)}', file=sys.stderr)
        return 2
    return importlib.import_module(_COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == '__main__':
    sys.exit(main())
