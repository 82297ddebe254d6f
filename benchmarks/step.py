"""A training step at each size of a regime: time, images per second, peak memory, and their ratio to the base size's.

    python benchmarks/step.py [--device cuda --amp-dtype bfloat16 --channels-last --model resnet50 -b 256]

Random images that are on the device already; loss, backward pass, smoothing and optimizer as in training. With
``--modes compiled`` there is one static graph for each size. Memory is what torch has allocated on a GPU.
"""
import argparse
from contextlib import nullcontext
from statistics import median
from typing import Any, Callable, Dict, List

import timm
import torch
from common import make_parser, measure, parse_args, print_table, ratio, verdict, write
from smoothing import seconds_of
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from mixsize_timm.regime import ADAPT_MODES, PRESET_OPTIONS, PRESETS, Regime
from mixsize_timm.smoothing import GradientSmoother

MODES = ('eager', 'compiled')
TIME, MEMORY = 1.15, 1.1  # over the base size's, at most


class Stepper:
    """Trains a model on random images of a size."""

    def __init__(self, args: argparse.Namespace, regime: Regime, mode: str) -> None:
        self.device = torch.device(args.device)
        self.regime = regime
        self.format = torch.channels_last if args.channels_last else torch.contiguous_format
        self.dtype = getattr(torch, args.amp_dtype) if args.amp_dtype else None
        model = timm.create_model(args.model).to(self.device, memory_format=self.format)
        self.task = ClassificationTask(model, device=self.device, verbose=False)
        fused: Dict[str, Any] = {'fused': True} if args.device == 'cuda' else {}
        self.optimizer = create_optimizer_v2(model, 'sgd', lr=1e-4, weight_decay=1e-4, **fused)
        self.smoother = GradientSmoother()
        if mode == 'compiled':
            self.task.compile(dynamic=False)

    def at(self, size: int) -> Callable[[], None]:
        """A step at a size, its images made."""
        batch, duplicates = self.regime.group(size)
        images = torch.randn(batch * duplicates, 3, size, size, device=self.device).to(memory_format=self.format)
        targets = torch.zeros(batch * duplicates, dtype=torch.long, device=self.device)

        def step() -> None:
            with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
                loss = self.task(images, targets)['loss']
            loss.backward()
            self.smoother(self.task.parameters())
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


def with_peak(step: Callable[[], float], peaks: List[float], device: torch.device) -> Callable[[], float]:
    """The same arm, its peak memory in MB added to ``peaks`` where torch counts it."""
    def run() -> float:
        if device.type != 'cuda':
            return step()
        torch.cuda.reset_peak_memory_stats(device)
        figure = step()
        peaks.append(torch.cuda.max_memory_allocated(device) / 1e6)
        return figure

    return run


def measure_mode(args: argparse.Namespace, regime: Regime, mode: str) -> Dict[str, Any]:
    """Figures of all sizes, measured in turn. Images are made anew for each, for they would count as its memory."""
    torch._dynamo.reset()
    stepper = Stepper(args, regime, mode)
    peaks: Dict[str, List[float]] = {str(size): [] for size in regime.sizes}

    def arm(size: int) -> Callable[[], float]:
        return lambda: seconds_of(stepper.at(size), args.steps, stepper.device)()

    for size in regime.sizes:  # compiled, or its kernels chosen, outside of what is measured
        for _ in range(2):
            arm(size)()
    arms = {str(size): with_peak(arm(size), peaks[str(size)], stepper.device) for size in regime.sizes}
    seconds = measure(arms, args.rounds)
    base = str(regime.base_size)
    rows = []
    for size in regime.sizes:
        batch, duplicates = regime.group(size)
        own = median(seconds[str(size)])
        peak = median(peaks[str(size)]) if peaks[str(size)] else None
        rows.append({'size': size, 'batch': batch, 'duplicates': duplicates, 'seconds': own,
                     'images_per_second': batch * duplicates / own, 'time_over_base': ratio(seconds, str(size), base),
                     'peak_mb': peak, 'memory_over_base': peak and peak / median(peaks[base])})
    return {'mode': mode, 'regime': regime.to_dict(), 'sizes': rows, 'figures': seconds}


def table_rows(result: Dict[str, Any], on_gpu: bool) -> List[List[Any]]:
    """Lines of the table; what is wanted is of a GPU."""
    rows = []
    for row in result['sizes']:
        wanted = f'time {verdict(row["time_over_base"], at_most=TIME)}' if on_gpu else ''
        if row['memory_over_base']:
            wanted += f', memory {verdict(row["memory_over_base"], at_most=MEMORY)}'
        rows.append([result['mode'], row['size'], f'{row["batch"]} x{row["duplicates"]}', 1e3 * row['seconds'],
                     row['images_per_second'], row['peak_mb'], row['time_over_base'], row['memory_over_base'], wanted])
    return rows


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--mixsize', default='s144', choices=sorted(set(PRESETS) - set(PRESET_OPTIONS)))
    parser.add_argument('--mixsize-adapt', default='b+', choices=ADAPT_MODES)
    parser.add_argument('--mixsize-batch-multiple', type=int, default=1)
    parser.add_argument('--img-size', type=int, default=112, help='base size')
    parser.add_argument('-b', '--batch-size', type=int, default=8)
    parser.add_argument('--steps', type=int, default=1, help='steps in a row')
    parser.add_argument('--amp-dtype', choices=('bfloat16',), help='train with automatic mixed precision')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--modes', nargs='+', default=('eager',), choices=MODES)
    args = parse_args(parser, 'step')
    torch.backends.cudnn.benchmark = True
    regime = Regime.preset(args.mixsize, args.img_size, batch_size=args.batch_size, adapt=args.mixsize_adapt,
                           batch_multiple=args.mixsize_batch_multiple)
    torch._dynamo.config.recompile_limit = max(8, len(regime.sizes) + 1)  # type: ignore[attr-defined]
    results = []
    for mode in args.modes:
        results.append(measure_mode(args, regime, mode))
        write(args, results)
    print_table(['mode', 'size', 'batch', 'step, ms', 'images/s', 'peak, MB', 'time over base', 'memory over base',
                 'wanted'], [row for result in results for row in table_rows(result, args.device == 'cuda')])


if __name__ == '__main__':
    main()
