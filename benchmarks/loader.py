"""Images per second of create_loader against timm's, on the same JPEGs, and against the cost of decoding them.

    python benchmarks/loader.py --data-dir ../shared/data/clothing

Random resized crop and flip, no colour; arms in turn over whole epochs of a part of the images, with workers that stay.
The scheduled sizes are s144 D+: timm's loader gets batches of as many images as ours have with their duplicates, and
the seed whose epoch has the shares of ours. The floor is one full decode and one antialiased resize of the uint8 image
to 224 px on one core, the file's bytes being in memory, divided by the workers.
"""
import argparse
import random
import time
from collections import Counter
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm.data
import torch
from common import make_parser, measure, parse_args, print_table, ratio, verdict, write
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional

from mixsize_timm.data import create_loader
from mixsize_timm.regime import Regime

CASES = ('224', '128', 's144')
INTERPOLATIONS = ('bilinear', 'random')  # create_loader's default, and that of the training script
SEEDS = 500  # that timm's schedule is chosen from
TIMM, OURS, SCALED, BYTES, FLOOR = 'timm', 'ours', 'ours, scaled decoding', 'ours, uint8', 'floor'
THRESHOLDS = {('224', OURS): 1.6, ('128', OURS): 1.6, ('128', SCALED): 1.8, ('s144', OURS): 3.0}


def open_images(args: argparse.Namespace, copies: int = 1) -> Any:
    """The training images that are used, each as often as asked for; a random part, equal in all arms."""
    dataset = timm.data.create_dataset('', root=args.data_dir, split=args.split)
    samples = sorted(dataset.reader.samples)
    dataset.reader.samples = random.Random(0).sample(samples, min(args.images, len(samples))) * copies
    return dataset


def options(args: argparse.Namespace, interpolation: str) -> Dict[str, Any]:
    """What all arms have in common."""
    return dict(is_training=True, num_workers=args.workers, device=torch.device('cpu'), color_jitter=None,
                interpolation=interpolation)


def make_ours(args: argparse.Namespace, regime: Regime, interpolation: str, **ours: Any) -> Any:
    base = regime.base_size
    return create_loader(open_images(args), (3, base, base), regime.batch_size, regime=regime,
                         **options(args, interpolation), **ours)


def make_timms(args: argparse.Namespace, regime: Regime, interpolation: str) -> Any:
    """timm's loader, of one size or of the regime's with its batches and shares of delivered images."""
    shape, shared = (3, regime.base_size, regime.base_size), options(args, interpolation)
    if len(regime.sizes) == 1:
        return timm.data.create_loader(open_images(args), shape, regime.batch_size, **shared)
    copies = round(sum(p * regime.group(size)[1] for size, p in zip(regime.sizes, regime.probs)))
    batches, weights = delivered(regime)
    dataset = open_images(args, copies)
    return timm.data.create_loader(
        dataset, shape, regime.batch_size, input_size_choices=regime.sizes, batch_size_choices=batches,
        batch_choice_weights=weights, batch_choice_seed=nearest_seed(len(dataset), batches, weights), **shared)


def delivered(regime: Regime) -> Tuple[List[int], List[float]]:
    """Batches in delivered images, and the weights with which timm draws batches, so that images have their shares.

    A size's share of the distinct images is ``p``, hence ``p / B`` of the batches, each of ``B * D`` images.
    """
    groups = [regime.group(size) for size in regime.sizes]
    return [batch * copies for batch, copies in groups], [p / batch for p, (batch, _) in zip(regime.probs, groups)]


def nearest_seed(num_images: int, batches: List[int], weights: List[float]) -> int:
    """The seed whose epoch is nearest to the shares; timm draws the sizes of an epoch's batches at random."""
    expected = shares(dict(enumerate(b * w for b, w in zip(batches, weights))))

    def distance(seed: int) -> float:
        schedule = ScheduledBatchSampler(range(num_images), batches, weights, seed).schedule  # type: ignore[arg-type]
        counts: Counter = Counter()
        for choice, batch in schedule:
            counts[choice] += batch
        got = shares(counts)
        return sum(abs(got.get(choice, 0.) - share) for choice, share in expected.items())

    return min(range(SEEDS), key=distance)


def shares(counts: Dict[int, Any]) -> Dict[int, float]:
    """Parts of the whole, in the order of the keys."""
    total = sum(counts.values())
    return {key: counts[key] / total for key in sorted(counts)}


def epoch_of(loader: Any, sizes: Optional[Counter] = None) -> Callable[[], float]:
    """An arm: images per second of a whole epoch; images are added to ``sizes`` by their size."""
    def run() -> float:
        count, start = 0, time.perf_counter()
        for images, _ in loader:
            count += len(images)
            if sizes is not None:
                sizes[images.shape[-1]] += len(images)
        return count / (time.perf_counter() - start)

    return run


def floor_of(args: argparse.Namespace, size: int) -> Callable[[], float]:
    """An arm: images per second that the workers would make if each did nothing but decode and resize."""
    files = [read_file(path) for path, _ in open_images(args).reader.samples]

    def run() -> float:
        start = time.perf_counter()
        for file in files:
            functional.resize(decode_jpeg(file, ImageReadMode.RGB), [size, size], antialias=True)
        return args.workers * len(files) / (time.perf_counter() - start)

    return run


def measure_case(args: argparse.Namespace, case: str, interpolation: str) -> Dict[str, Any]:
    """All arms of a case in turn; what they delivered, and their ratios."""
    regime = (Regime.preset(case, 224, batch_size=args.batch_size, adapt='d+') if case in ('s144',)
              else Regime.fixed(int(case), batch_size=args.batch_size))
    loaders = {TIMM: make_timms(args, regime, interpolation), OURS: make_ours(args, regime, interpolation),
               SCALED: make_ours(args, regime, interpolation, scaled_decoding=True)}
    sizes: Dict[str, Counter] = {name: Counter() for name in loaders}
    arms = {name: epoch_of(loader, sizes[name]) for name, loader in loaders.items()}
    if case == '224':
        arms[BYTES] = epoch_of(make_ours(args, regime, interpolation).loader.loader)  # in front of timm's prefetcher
        arms[FLOOR] = floor_of(args, 224)
    figures = measure(arms, args.rounds)
    ratios = {name: ratio(figures, name, TIMM) for name in arms if name not in (TIMM, FLOOR)}
    over_floor = {name: ratio(figures, FLOOR, name) for name in (OURS, BYTES) if FLOOR in arms}
    return {'case': case, 'interpolation': interpolation, 'images_per_second': figures,
            'median': {name: median(values) for name, values in figures.items()}, 'over_timm': ratios,
            'floor_over': over_floor, 'shares': {name: shares(counts) for name, counts in sizes.items()}}


def rows_of(result: Dict[str, Any]) -> List[List[Any]]:
    """Lines of the table."""
    rows = []
    for name, speed in result['median'].items():
        over = result['over_timm'].get(name)
        floor = result['floor_over'].get(name)
        wanted = [verdict(over, at_least=THRESHOLDS[result['case'], name])
                  ] if over and (result['case'], name) in THRESHOLDS else []
        wanted += ['floor ' + verdict(floor, at_most=1.3)] if floor else []
        rows.append([result['case'], result['interpolation'], name, speed, over, floor, '; '.join(wanted)])
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--data-dir', required=True, help='folder of images as timm takes it')
    parser.add_argument('--split', default='train')
    parser.add_argument('--images', type=int, default=1024, help='images of an epoch')
    parser.add_argument('-b', '--batch-size', type=int, default=32)
    parser.add_argument('-j', '--workers', type=int, default=2)
    parser.add_argument('--cases', nargs='+', default=CASES, choices=CASES)
    parser.add_argument('--interpolations', nargs='+', default=INTERPOLATIONS, choices=INTERPOLATIONS)
    args = parse_args(parser, 'loader')
    torch.set_num_threads(1)
    results = []
    for case in args.cases:
        for interpolation in args.interpolations:
            results.append(measure_case(args, case, interpolation))
            write(args, results)
    print_table(['case', 'interpolation', 'arm', 'images/s', 'over timm', 'floor over it', 'wanted'],
                [row for result in results for row in rows_of(result)])


if __name__ == '__main__':
    main()
