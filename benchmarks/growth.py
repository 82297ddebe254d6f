"""Resident memory of the loader and its workers over many epochs of changing sizes.

    python benchmarks/growth.py --data-dir ../shared/data/clothing

The growth is that from the first fifth of the epochs, without the first ten epochs, to the last tenth.
"""
import argparse
from statistics import mean
from typing import Any, Dict, List

import psutil
import torch
from common import make_parser, parse_args, print_table, verdict, write
from loader import OURS, SCALED, open_images

from mixsize_timm.data import create_loader
from mixsize_timm.regime import Regime

SETTLING = 10  # epochs


def resident(args: argparse.Namespace) -> Dict[str, float]:
    """Megabytes of this process, of its workers, and of what torch keeps of the GPU's memory."""
    process = psutil.Process()
    workers = [child.memory_info().rss for child in process.children()]
    gpu = torch.cuda.memory_reserved() if args.device == 'cuda' else 0
    return {'process': process.memory_info().rss / 1e6, 'workers': sum(workers) / 1e6, 'gpu': gpu / 1e6}


def run(args: argparse.Namespace, **ours: Any) -> List[Dict[str, float]]:
    """Resident memory at the end of each epoch."""
    regime = Regime.preset('s144', 224, batch_size=args.batch_size, adapt='d+')
    loader = create_loader(open_images(args), (3, 224, 224), args.batch_size, is_training=True, regime=regime,
                           num_workers=args.workers, device=torch.device(args.device), re_prob=0.2,
                           pin_memory=args.device == 'cuda', **ours)
    figures = []
    for _ in range(args.epochs):
        for _images, _targets in loader:
            pass
        figures.append(resident(args))
    return figures


def growth(figures: List[float]) -> float:
    """What the end has over the beginning."""
    settled = figures[SETTLING:max(len(figures) // 5, SETTLING + 1)]
    return mean(figures[-max(1, len(figures) // 10):]) / mean(settled)


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument('--data-dir', required=True, help='folder of images as timm takes it')
    parser.add_argument('--split', default='train')
    parser.add_argument('--images', type=int, default=64, help='images of an epoch')
    parser.add_argument('--epochs', type=int, default=200)
    parser.add_argument('-b', '--batch-size', type=int, default=8)
    parser.add_argument('-j', '--workers', type=int, default=2)
    args = parse_args(parser, 'growth')
    if args.epochs < 2 * SETTLING:
        parser.error(f'--epochs {args.epochs}: memory settles in the first {SETTLING}, take at least twice as many')
    results, rows = [], []
    for name, options in ((OURS, {}), (SCALED, {'scaled_decoding': True})):
        figures = run(args, **options)
        totals = [sum(figure.values()) for figure in figures]
        value = growth(totals)
        results.append({'loader': name, 'growth': value, 'megabytes': figures})
        write(args, results)
        rows.append([name, totals[0], totals[SETTLING], totals[-1], max(totals), value,
                     verdict(value, at_most=1.02)])
    print_table(['loader', 'epoch 1, MB', f'epoch {SETTLING + 1}, MB', f'epoch {args.epochs}, MB', 'most, MB',
                 'end over beginning', 'wanted'], rows)


if __name__ == '__main__':
    main()
