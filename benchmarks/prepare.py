"""What `mixsize prepare` saves, and what it costs, for several sizes and qualities: bytes, decode time, enlarged crops.

    python benchmarks/prepare.py --data-dir ../shared/data/clothing

Of a sample of training images: bytes, and milliseconds of one core to decode one with PIL, as they are and prepared
(median of the rounds, the settings in turn). Of timm's random resized crop of the same images (8 to 100 per cent of the
area): the share that is smaller in area than the step's size, so that it is enlarged and lacks detail. And the seconds
of the whole command on the splits of --timed, with one and with two workers; those of its processor beside them, which
other programs on the machine disturb less.
"""
import io
import os
import random
import shutil
import tempfile
from contextlib import redirect_stdout
from statistics import mean, median
from typing import Any, Callable, Dict, List, Tuple

import numpy as np
from common import make_parser, measure, parse_args, print_table, write  # benchmarks/common.py, beside this file
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from mixsize_timm import prepare
from mixsize_timm.datasets import create_dataset

ORIGINAL = 'as they are'
SCALE, RATIO = (0.08, 1.), (3 / 4, 4 / 3)  # timm's
CROPS = 20  # of each image


def sample(data_dir: str, split: str, count: int) -> List[bytes]:
    """Encoded images drawn from a split."""
    dataset = prepare.EncodedDataset(create_dataset('', data_dir, split).dataset)  # type: ignore[attr-defined]
    order = np.random.default_rng(0).permutation(len(dataset))[:count]
    return [bytes(dataset.encoded(index)[0]) for index in order.tolist()]  # type: ignore[arg-type]


def side_of_crops(images: List[bytes]) -> np.ndarray:
    """Square root of the area, in pixels, of random resized crops; the same crops for the same shapes."""
    random.seed(0)
    sides = []
    for data in images:
        with Image.open(io.BytesIO(data)) as image:
            blank = Image.new('L', image.size)
        for _ in range(CROPS):
            _, _, height, width = RandomResizedCropAndInterpolation.get_params(blank, SCALE, RATIO)
            sides.append((height * width) ** 0.5)
    return np.array(sides)


def command(data_dir: str, splits: List[str], short_side: int, workers: int) -> Tuple[float, float]:
    """Seconds by the clock, and of the processor, of the whole command."""
    folder = tempfile.mkdtemp()
    before = os.times()
    with redirect_stdout(io.StringIO()):
        code = prepare.main([data_dir, os.path.join(folder, 'out'), '--short-side', str(short_side), '--split', *splits,
                             '-j', str(workers)])
    after = os.times()
    shutil.rmtree(folder)
    assert code == 0, code
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def measure_images(args: Any, images: List[bytes]) -> List[Dict[str, Any]]:
    """Bytes, decode time and enlarged crops of each setting."""
    groups: Dict[Tuple[Any, Any], List[bytes]] = {(ORIGINAL, None): images}
    for short_side in args.short_sides:
        for quality in args.qualities:
            groups[short_side, quality] = [prepare.shrink(data, short_side, quality)[0] for data in images]

    def decoding(group: List[bytes]) -> Callable[[], float]:
        return lambda: prepare.decode_seconds(group, rounds=1)[0] * 1e3

    times = measure({str(key): decoding(group) for key, group in groups.items()}, args.rounds)
    rows = []
    for key, group in groups.items():
        sides = side_of_crops(group)
        rows.append({
            'short side': key[0], 'quality': key[1], 'kB': mean(map(len, group)) / 1e3,
            'decode ms': median(times[str(key)]), 'decode ms of each round': times[str(key)],
            'enlarged': {size: float((sides < size).mean()) for size in args.largest}})
    return rows


def show(results: Dict[str, Any]) -> None:
    """Print the two tables."""
    rows = results['settings']
    enlarged = [f'enlarged at {size} px' for size in rows[0]['enlarged']]
    print_table(['short side', 'quality', 'kB an image', 'decode ms', *enlarged],
                [[row['short side'], row['quality'], row['kB'], row['decode ms'],
                  *(f'{share:.0%}' for share in row['enlarged'].values())] for row in rows])
    timed = results['command']
    walls, cores = timed['seconds by workers'], timed['processor seconds by workers']
    print()
    print_table(['workers', f'seconds for {timed["images"]} images', 'of the processor'],
                [[workers, median(walls[workers]), median(cores[workers])] for workers in walls])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--data-dir', required=True, help='image folder with train/')
    parser.add_argument('--count', type=int, default=400, help='images of the sample')
    parser.add_argument('--short-sides', type=int, nargs='+', default=[168, 224, 256, 288, 320, 368])
    parser.add_argument('--qualities', type=int, nargs='+', default=[80, 90])
    parser.add_argument('--largest', type=int, nargs='+', default=[128, 168, 224, 320],
                        help='sizes that crops are resized to: the largest of a regime')
    parser.add_argument('--timed', nargs='+', default=['validation', 'test'],
                        help='splits that the command is timed on')
    args = parse_args(parser, 'prepare')
    images = sample(args.data_dir, 'train', args.count)
    results: Dict[str, Any] = {'images': len(images), 'settings': measure_images(args, images)}
    write(args, results)
    times: Dict[str, List[Tuple[float, float]]] = {'1': [], '2': []}
    for _ in range(args.rounds):
        for workers in times:
            times[workers].append(command(args.data_dir, args.timed, 256, int(workers)))
    results['command'] = {
        'images': sum(len(create_dataset('', args.data_dir, split)) for split in args.timed),  # type: ignore[arg-type]
        'short side': 256, 'seconds by workers': {workers: [wall for wall, _ in pairs]
                                                  for workers, pairs in times.items()},
        'processor seconds by workers': {workers: [core for _, core in pairs] for workers, pairs in times.items()}}
    write(args, results)
    show(results)


if __name__ == '__main__':
    main()
