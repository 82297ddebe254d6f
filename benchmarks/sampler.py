"""Planning and walking an epoch of many images: seconds and peak memory, ours beside torch's and timm's samplers.

    python benchmarks/sampler.py

Each figure is of a process of its own, forked from this one; its memory is what it took at most above what it began
with. A plan is what stands before the first batch. Batches are s144 B+ of 256 images; torch's sampler gives equal ones.
"""
import multiprocessing
import resource
import time
from functools import partial
from statistics import median
from typing import Any, Callable, Dict, List, Tuple

import psutil
import torch
from common import make_parser, parse_args, print_table, verdict, write
from loader import delivered
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import BatchSampler, RandomSampler

from mixsize_timm.regime import Regime
from mixsize_timm.sampler import MixSizeBatchSampler

BATCH = 256
PLANNED = 14_200_000  # ImageNet-21k


def ours(num_images: int) -> Any:
    return MixSizeBatchSampler(num_images, _regime())


def torchs(num_images: int) -> Any:
    return BatchSampler(RandomSampler(range(num_images)), BATCH, drop_last=True)  # type: ignore[arg-type]


def timms(num_images: int) -> Any:
    batches, weights = delivered(_regime())
    return ScheduledBatchSampler(RandomSampler(range(num_images)), batches, weights)  # type: ignore[arg-type]


def _regime() -> Regime:
    return Regime.preset('s144', 224, batch_size=BATCH, adapt='b+')


def spend(make: Callable[[int], Any], num_images: int) -> Tuple[float, float, float, float]:
    """Seconds and peak MB of the plan, and of plan and iteration together."""
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()

    def spent() -> Tuple[float, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return time.perf_counter() - start, max(0., (peak - before) / 1e6)

    sampler = make(num_images)
    plan = spent()
    for _ in sampler:
        pass
    return (*plan, *spent())


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('--images', type=int, nargs='+', default=[1_281_167, PLANNED], help='images of a data set')
    args = parse_args(parser, 'sampler')
    torch.set_num_threads(1)  # forked processes have no others
    results: List[Dict[str, Any]] = []
    rows = []
    with multiprocessing.get_context('fork').Pool(1, maxtasksperchild=1) as pool:
        for num_images in args.images:
            makers = {'ours': ours, 'torch, equal batches': torchs, 'timm, scheduled sizes': timms}
            figures: Dict[str, List[Tuple[float, ...]]] = {name: [] for name in makers}
            for _ in range(args.rounds):
                for name, make in makers.items():
                    figures[name].append(pool.apply(partial(spend, make, num_images)))
            for name, values in figures.items():
                names = ('plan_seconds', 'plan_mb', 'seconds', 'mb')
                result = dict(zip(names, map(median, zip(*values))))
                results.append({'images': num_images, 'sampler': name, **result, 'figures': values})
                wanted = ''
                if (name, num_images) == ('ours', PLANNED):
                    seconds, megabytes = result['plan_seconds'], result['plan_mb']
                    wanted = f's {verdict(seconds, at_most=1)}, MB {verdict(megabytes, at_most=150)}'
                rows.append([num_images, name, *result.values(), wanted])
            write(args, results)
    print_table(['images', 'sampler', 'plan, s', 'plan, MB', 'plan and iteration, s', 'MB', 'plan wanted'], rows)


if __name__ == '__main__':
    main()
