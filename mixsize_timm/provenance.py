"""Where results come from: the command, the machine and the versions behind a run."""
import json
import os
import platform
import shlex
import sys
import time
from typing import Any, Dict, List, Optional, Sequence

import accelerate
import psutil
import timm
import torch
from accelerate import Accelerator

from ._version import __version__

RUN_FILE = 'run.json'  # in a run's folder: its starts, and what it was trained on


def environment(accelerator: Accelerator) -> Dict[str, Any]:
    """What a command runs on, as plain values: ``date``, ``device``, ``machine``, ``precision`` and ``versions``."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    return {
        'date': time.strftime('%Y-%m-%d'),
        'device': f'{name}, {accelerator.num_processes} process{"es" if accelerator.num_processes > 1 else ""}',
        'machine': f'{platform.machine()}, {os.cpu_count()} CPU cores',
        'precision': accelerator.mixed_precision,
        'versions': versions()}


def versions() -> str:
    """Versions of this package and of what it stands on, for the record of a run or of a fault."""
    return (f'mixsize-timm {__version__}, timm {timm.__version__}, torch {torch.__version__}, accelerate '
            f'{accelerate.__version__}, Python {platform.python_version()}')


def command_line(argv: Optional[Sequence[str]], module: str) -> str:
    """The command that this process was started with, its launcher included, as it would be typed.

    Args:
        argv: Arguments that the command was called with; ``None`` for those of the process.
        module: Module of the command.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for words in (launcher_command(), list(sys.orig_argv)):
        if words[len(words) - len(arguments):] == arguments and any(_names(word, module) for word in words):
            return shlex.join(_typed(words))
    return shlex.join(['python', '-m', module, *arguments])


def _names(word: str, module: str) -> bool:
    """Whether a word of a command line is a module, its file, or the ``mixsize`` command."""
    return word == module or os.path.basename(word) == 'mixsize' or word.endswith(module.replace('.', os.sep) + '.py')


def launcher_command() -> List[str]:
    """Command line of the process that started this one; empty where it cannot be read."""
    try:
        return psutil.Process().parent().cmdline()  # a launcher waits for what it launched
    except (AttributeError, psutil.Error):
        return []


def _typed(words: List[str]) -> List[str]:
    """A process's command line without the interpreter that a script's first line names, and without its folders."""
    first = 1 if len(words) > 1 and not words[1].startswith('-') and not words[1].endswith('.py') else 0
    return [os.path.basename(words[first]), *words[first + 1:]]


def read_run(folder: str) -> Dict[str, Any]:
    """What a run's folder says: ``starts``, ``regime`` and ``data``; empty where there is nothing.

    Raises:
        ValueError: The file is not readable.
    """
    path = os.path.join(folder, RUN_FILE)
    if not folder or not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding='utf-8') as file:
            record = json.load(file)
        if not isinstance(record, dict) or not isinstance(record.get('data', {}), dict):
            raise ValueError('it holds no records of a run')
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} is not readable: {error}') from error
    return record
