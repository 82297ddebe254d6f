"""Epochs by the clock: a fixed size, s144 B+ and s144 D+, with real images, from the files to the weights.

    python benchmarks/epoch.py --data ../shared/data/clothing --train-split validation

Each arm is a run of the training command, made in this process and trained an epoch at a time, in turn; options that
are not those below go to all of them. Beside the clock stands the arithmetic: the pixels of the images that an epoch
trains at, over those of the fixed size. On a GPU one more epoch of each counts what waits for the device.
"""
import argparse
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List

import torch
from common import data_options, make_parser, measure, parse_args, print_table, ratio, verdict, write
from smoothing import synchronize

from mixsize_timm.args import parse_args as parse_training
from mixsize_timm.train import Training

FIXED, B_PLUS, D_PLUS = 'fixed', 's144 B+', 's144 D+'


def make_training(args: argparse.Namespace, name: str, folder: str) -> Training:
    """The run of an arm."""
    regime = {FIXED: ['--mixsize-sizes', str(args.img_size)], B_PLUS: ['--mixsize', 's144', '--mixsize-adapt', 'b+'],
              D_PLUS: ['--mixsize', 's144', '--mixsize-adapt', 'd+']}[name]
    return Training(parse_training([
        '--model', args.model, '--img-size', str(args.img_size), '-b', str(args.batch_size), '--lr', '0.01',
        '--workers', str(args.workers), *data_options(args.data), '--val-split', '', '--device', args.device,
        '--output', folder, '--experiment', name.replace(' ', '-'), *args.options, *regime]))


def repeat(data: str, copies: int, folder: str) -> str:
    """Parquet files of the training split, several times in a folder: on a GPU a few thousand images end too soon."""
    files = sorted(Path(data).glob('train-*.parquet'))
    for number, file in enumerate(files * copies):
        shutil.copy(file, Path(folder) / f'train-{number:05d}-of-{len(files) * copies:05d}.parquet')
    return folder


def train(training: Training) -> None:
    """Train the next epoch."""
    training.progress.start_epoch(training.progress.epoch + 1)
    training._train(training.progress.epoch)
    synchronize(training.accelerator.device)


def epoch_of(training: Training) -> Callable[[], float]:
    """An arm: seconds of an epoch."""
    def run() -> float:
        start = time.perf_counter()
        train(training)
        return time.perf_counter() - start

    return run


def count_waits(training: Training) -> int:
    """How often an epoch waits for the GPU, as torch's debug mode tells."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        training.progress.start_epoch(training.progress.epoch + 1)
        training._train(training.progress.epoch)
        torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing CUDA operation' in str(warning.message) for warning in seen)


def describe(name: str, training: Training, figures: Dict[str, List[float]], on_gpu: bool) -> Dict[str, Any]:
    """What an arm did in an epoch."""
    regime, plan = training.data.regime, training.data.start_epoch(0)
    images = int((plan.batch * plan.duplicates).sum())
    seconds = median(figures[name])
    lines = len(set(range(0, plan.num_steps, training.args.log_interval)) | {plan.num_steps - 1})
    return {'arm': name, 'steps': plan.num_steps, 'images': images, 'seconds': seconds,
            'images_per_second': images / seconds, 'faster_by_the_clock': ratio(figures, FIXED, name),
            'faster_by_arithmetic': 1 / regime.relative_cost if regime else None, 'log_lines': lines,
            'waits': count_waits(training) if on_gpu else None}


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument('--data', required=True, help='folder of image folders, or of Parquet files')
    parser.add_argument('--model', default='resnet10t')
    parser.add_argument('--img-size', type=int, default=112, help='base size')
    parser.add_argument('-b', '--batch-size', type=int, default=16)
    parser.add_argument('-j', '--workers', type=int, default=2)
    parser.add_argument('--repeat', type=int, default=1, metavar='N', help='take the images of Parquet files N times')
    args = parse_args(parser, 'epoch', training=True)
    if args.repeat > 1 and not any(Path(args.data).glob('train-*.parquet')):
        parser.error(f'--repeat {args.repeat}: no train-*.parquet in {args.data}')
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as images:
        args.data = repeat(args.data, args.repeat, images) if args.repeat > 1 else args.data
        trainings = {name: make_training(args, name, folder) for name in (FIXED, B_PLUS, D_PLUS)}
        figures = measure({name: epoch_of(training) for name, training in trainings.items()}, args.rounds)
        results = [describe(name, training, figures, args.device == 'cuda') for name, training in trainings.items()]
    write(args, {'arms': results, 'figures': figures})
    on_gpu = args.device == 'cuda'  # what is wanted is of a GPU
    print_table(
        ['', 'steps', 'images', 's', 'images/s', 'times as fast as fixed', 'by arithmetic', 'log lines', 'waits',
         'wanted'],
        [[*row.values(), verdict(row['faster_by_the_clock'], at_least=2) if on_gpu and row['arm'] == B_PLUS else '']
         for row in results])


if __name__ == '__main__':
    main()
