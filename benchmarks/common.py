"""What the benchmarks share: arms measured in turn, medians and ratios, where results come from, tables."""
import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

import torch
from accelerate import Accelerator

from mixsize_timm.provenance import environment

HERE = Path(__file__).resolve().parent
MIN_ROUNDS = 5


def make_parser(doc: str, device: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        doc: The command's docstring.
        device: Whether it can be run on another device than the CPU.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=MIN_ROUNDS, help='times that each arm is measured, in turn')
    parser.add_argument('--json', metavar='FILE', type=Path,
                        help='file of the results (default: benchmarks/results/NAME-DEVICE.json)')
    parser.add_argument('--overwrite', action='store_true', help='replace the file of the results')
    if device:
        parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    return parser


def parse_args(parser: argparse.ArgumentParser, name: str, training: bool = False) -> argparse.Namespace:
    """Parse, and say early what would be said at the end.

    Args:
        parser: From :func:`make_parser`.
        name: Name of the command.
        training: Whether options that the parser does not know are those of training, as ``args.options``.
    """
    args, options = parser.parse_known_args()
    if options and not training:
        parser.error(f'unrecognized arguments: {" ".join(options)}')
    args.name, args.options = name, options
    args.device = getattr(args, 'device', 'cpu')
    args.json = args.json or HERE / 'results' / f'{name}-{args.device}.json'
    if args.rounds < 1:
        parser.error(f'--rounds {args.rounds}: measure each arm at least once')
    if args.json.exists() and not args.overwrite:
        parser.error(f'{args.json} exists: name another file with --json, or add --overwrite')
    if not args.json.parent.is_dir():
        parser.error(f'{args.json.parent} is no folder')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here')
    return args


def measure(arms: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> Dict[str, List[float]]:
    """Measure arms in turn (a, b, c, a, b, c, ...), so that what disturbs the machine disturbs all of them.

    Args:
        arms: Names, and what is measured: called once a round, it answers with a figure.
        rounds: Figures of each arm.
        warmup: Rounds before them that are not counted.

    Returns:
        The figures of each arm, round by round.
    """
    figures: Dict[str, List[float]] = {name: [] for name in arms}
    for number in range(-warmup, rounds):
        for name, arm in arms.items():
            figure = arm()
            if number >= 0:
                figures[name].append(figure)
    return figures


def ratio(figures: Mapping[str, Sequence[float]], arm: str, over: str) -> float:
    """Median over the rounds of one arm's figure over another's in the same round."""
    return median(a / b for a, b in zip(figures[arm], figures[over], strict=True))


def verdict(value: float, *, at_least: float = float('-inf'), at_most: float = float('inf')) -> str:
    """What is wanted of a value, and whether it is so, in words for the table."""
    wanted = [f'{words} {bound:g}' for words, bound in (('at least', at_least), ('at most', at_most))
              if abs(bound) != float('inf')]
    return f'{" and ".join(wanted)}: {"met" if at_least <= value <= at_most else "NOT MET"}'


def data_options(folder: str) -> List[str]:
    """Options of training for a folder of images: image folders, or Parquet files as the ``datasets`` package reads."""
    return ['--dataset', f'hfds/{folder}'] if any(Path(folder).glob('*.parquet')) else ['--data-dir', folder]


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table in Markdown; floats with three digits that count."""
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.3g}'
        return '-' if value is None else str(value)

    lines = [[cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ['-' * width for width in widths])
    for line in lines:
        print('| ' + ' | '.join(text.ljust(width) for text, width in zip(line, widths)) + ' |', flush=True)


def write(args: argparse.Namespace, results: Any) -> None:
    """Write results beside where they come from; a benchmark of several parts calls it after each of them."""
    document = {**origin(args), 'results': results}
    temporary = args.json.with_name(args.json.name + '.new')
    temporary.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    temporary.replace(args.json)


def origin(args: argparse.Namespace) -> Dict[str, Any]:
    """Where results come from: the command, the commit, the date, the machine with what was used of it, versions."""
    return {'command': shlex.join(['python', f'benchmarks/{args.name}.py', *sys.argv[1:]]), 'commit': commit(),
            **environment(Accelerator(cpu=args.device == 'cpu')), 'cores': usable_cores(),
            'threads': torch.get_num_threads(), 'rounds': args.rounds}


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def commit() -> Optional[str]:
    """Commit that the code is at, ``+`` behind it where files of it have been changed; ``None`` without git."""
    git = ['git', '-C', str(HERE)]
    try:
        head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', '../mixsize_timm', '*.py']).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + '+' * bool(changed)
