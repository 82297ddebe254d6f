"""Training by timm's own script and by ours, at equal settings: the whole process, and images per second within epochs.

    python benchmarks/train_vs_timm.py TIMM_CHECKOUT --data ../shared/data/clothing --train-split validation

Ours with ``--mixsize off`` (timm's loader), and with a regime of the one size (our loader). Nothing is validated.
Options that are not those below go to all sides, and as many threads as there are cores. Images per second are those
between the first and the last log line of an epoch, of all epochs but the first; the lines are timed as they come.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from statistics import median
from typing import Any, Callable, Dict, List, Tuple

import timm
from common import (
    data_options,
    make_parser,
    measure,
    parse_args,
    print_table,
    ratio,
    usable_cores,
    verdict,
    write,
)
from parity import OURS as OFF
from parity import RUN_TIMM, checkout_commit

TIMM, OURS_OFF, OURS_FIXED = "timm's script", 'ours, --mixsize off', 'ours, one size'
LINE = re.compile(r'Train:? (\d+) \[ *(\d+)/\d+')


def steady(lines: List[Tuple[float, str]], batch_size: int) -> float:
    """Images per second between the first and the last log line of the epochs but the first.

    Args:
        lines: Log lines with the seconds at which they came.
        batch_size: Images of a step.

    Raises:
        ValueError: There are no two lines of such an epoch.
    """
    epochs: Dict[int, List[Tuple[float, int]]] = defaultdict(list)
    for seconds, line in lines:
        found = LINE.search(line)
        if found and int(found[1]):
            epochs[int(found[1])].append((seconds, int(found[2])))
    steps = sum(epoch[-1][1] - epoch[0][1] for epoch in epochs.values())
    if not steps:
        raise ValueError('no two log lines in an epoch behind the first: take more images or epochs')
    return batch_size * steps / sum(epoch[-1][0] - epoch[0][0] for epoch in epochs.values())


def run(command: List[str], folder: str) -> Tuple[float, List[Tuple[float, str]]]:
    """Seconds of a whole process, and its lines with the seconds at which they came."""
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': str(usable_cores())})
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.perf_counter() - start, line))
    if process.wait():
        sys.exit(f'{" ".join(command[:3])} ended with {process.returncode}:\n' + ''.join(x for _, x in lines[-5:]))
    return time.perf_counter() - start, lines


def arm(args: argparse.Namespace, command: List[str], folder: str, whole: List[float]) -> Callable[[], float]:
    """An arm: images per second within epochs; the seconds of the process are added to ``whole``."""
    data = data_options(os.path.abspath(args.data))  # the processes have folders of their own
    common = ['--model', args.model, '--img-size', str(args.img_size), '--batch-size', str(args.batch_size), '--epochs',
              str(args.epochs), '--workers', str(args.workers), '--device', args.device, '--lr', '0.01', '--opt', 'sgd',
              '--warmup-epochs', '0', '--val-split', '', '--num-classes', str(args.num_classes), '--output', '.', *data,
              *args.options]

    def once() -> float:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            seconds, lines = run([sys.executable, *command, *common], own)
        whole.append(seconds)
        return steady(lines, args.batch_size)

    return once


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument('checkout', metavar='TIMM_CHECKOUT', help='folder of timm\'s sources; only train.py is used')
    parser.add_argument('--commit', help='commit of the checkout, where git does not tell')
    parser.add_argument('--data', required=True, help='folder of image folders, or of Parquet files')
    parser.add_argument('--num-classes', type=int, default=10)
    parser.add_argument('--model', default='resnet10t')
    parser.add_argument('--img-size', type=int, default=64)
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('-j', '--workers', type=int, default=1)
    parser.add_argument('--epochs', type=int, default=2)
    args = parse_args(parser, 'train_vs_timm', training=True)
    if not os.path.exists(os.path.join(args.checkout, 'train.py')):
        parser.error(f'no train.py in {args.checkout}')
    args.commit = args.commit or checkout_commit(args.checkout)
    if not args.commit:
        parser.error(f'git does not tell the commit of {args.checkout}: name it with --commit')
    if args.epochs < 2:
        parser.error('--epochs 1: images per second are those of the epochs but the first')
    whole: Dict[str, List[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        script = shutil.copy(os.path.join(args.checkout, 'train.py'), folder)  # away from the checkout's own timm
        ours = ['-m', 'mixsize_timm.train']
        sides = {TIMM: ['-c', RUN_TIMM, script, timm.__version__, timm.__file__], OURS_OFF: [*ours, *OFF],
                 OURS_FIXED: [*ours, '--mixsize-sizes', str(args.img_size), '--no-grad-smoothing', '--calibrate', '0',
                              '--calibrate-val', '0']}  # timm's script calibrates nothing
        arms = {name: arm(args, command, folder, whole[name]) for name, command in sides.items()}
        rates = measure(arms, args.rounds, warmup=0)  # a process has no memory of the one before
    results: Dict[str, Any] = {'timm_commit': args.commit, 'seconds': whole,
                               'images_per_second': rates}
    write(args, results)
    rows = []
    for name in sides:
        longer, faster = ratio(whole, name, TIMM), ratio(rates, name, TIMM)
        wanted = ['', ''] if name == TIMM else [verdict(longer, at_most=1), verdict(faster, at_least=1)]
        rows.append([name, median(whole[name]), longer, wanted[0], median(rates[name]), faster, wanted[1]])
    print_table(['', 'whole process, s', 'over timm', 'wanted', 'images/s', 'over timm', 'wanted'], rows)


if __name__ == '__main__':
    main()
