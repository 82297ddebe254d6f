"""What a run will cost, before anything is trained: ``mixsize plan --model resnet50 --mixsize s144 -b 256 ...``."""
import argparse
import copy
import itertools
import json
import logging
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import random_seed
from torch import nn

from .args import mixing, model_dtype, parse_args
from .build import create_accelerator, create_schedule, create_task, scale_lr
from .engine import Progress, in_format, train_one_epoch
from .errors import UsageError, check_writable, refusing, run_command
from .loaders import Data, EvaluationData, fit_regime
from .measure import count_gmacs, count_saved_bytes
from .memory import OPTIMIZER_COPIES, scaled_by_area
from .models import create_model
from .parser import Parser
from .provenance import environment
from .regime import Regime
from .sampler import EpochPlan, describe_annealing, describe_plan, epoch_batches, size_batches
from .smoothing import GradientSmoother

TOLERANCE = 1.01  # a step of so many base steps is not said to cost more: batches are whole numbers
USABLE = 0.9  # of a device's memory; the rest is for workspaces and for what is lost between blocks
WARM_UP, MEASURED = 2, 5  # steps of each size
GIB = 2**30


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, or as :func:`~mixsize_timm.errors.run_command` has it."""
    return run_command('mixsize plan', lambda: Planner(*parse_plan_args(argv)).run(),
                       lambda: 'nothing was written', logging.WARNING)


def parse_plan_args(argv: Optional[List[str]] = None) -> Tuple[argparse.Namespace, argparse.Namespace]:
    """The command's own arguments, and those of the training that is planned.

    Raises:
        UsageError: An argument's value cannot work.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(
        prog='mixsize plan', usage='mixsize plan [options of the training command] [options]',
        allow_abbrev=False, description='Print what a training run will cost, without training. Takes every option of '
        'the training command, which "mixsize train --help" lists, and a configuration with -c.')
    parser.add_argument('--num-images', type=int, default=None, metavar='N',
                        help='training images (default: those of the data set)')
    parser.add_argument('--processes', type=int, default=None, metavar='N',
                        help='processes that train (default: those of this command)')
    parser.add_argument('--memory', type=float, default=None, metavar='GB',
                        help='memory of a device, in GB of 2**30 bytes (default: this device\'s)')
    parser.add_argument('--measure', action='store_true', default=False,
                        help=f'take {MEASURED} real steps of each size on this device, and tell how long a run takes')
    parser.add_argument('--json', default='', metavar='FILE', help='write the plan to this file too')
    parser.add_argument('--overwrite', action='store_true', default=False, help='replace the file of --json')
    given, rest = parser.parse_known_args(argv)
    for name in ('num_images', 'processes', 'memory'):
        value = getattr(given, name)
        if value is not None and not value > 0:
            raise UsageError(f'--{name.replace("_", "-")} must be above 0, not {value}')
    if given.json:
        if os.path.lexists(given.json) and not given.overwrite:
            raise UsageError(f'{given.json} is there already: choose another --json, or --overwrite')
        check_writable(os.path.dirname(given.json) or '.')
    given.command = shlex.join(['mixsize', 'plan', *argv])
    args = parse_args(rest, recipe_without_data=given.num_images is None)
    for name in ('train_img_sizes', 'naflex_loader', 'aug_splits'):
        if getattr(args, name):
            raise UsageError(f'--{name.replace("_", "-")} is not planned: leave it out')
    args.pretrained, args.pretrained_path, args.initial_checkpoint = False, None, ''  # weights change no cost
    return given, args


@dataclass(frozen=True)
class EpochCost:
    """What an epoch of a regime takes.

    Args:
        regime: The regime.
        num_images: Images in the data set.
        gmacs: Billions of multiply-accumulates of one image's forward pass, by size in pixels, the base size among
            them.
        world_size: Processes that share each batch.
        grad_accum_steps: Groups of one size that make an optimizer step.
        drop: See :func:`~mixsize_timm.sampler.size_batches`.
    """
    regime: Regime
    num_images: int
    gmacs: Mapping[int, float]
    world_size: int = 1
    grad_accum_steps: int = 1
    drop: str = 'tail'

    @cached_property
    def batches(self) -> Dict[int, List[int]]:
        """For each size, ascending, its batches over all processes."""
        return size_batches(self.regime, self.num_images, self.world_size, self.drop)

    def images(self, size: int) -> int:
        """Distinct images that an epoch trains at a size."""
        return sum(self.batches[size])

    def steps(self, size: int) -> int:
        """Optimizer steps of an epoch at a size."""
        return -(-len(self.batches[size]) // self.grad_accum_steps)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return sum(map(self.steps, self.batches))

    @property
    def begins(self) -> bool:
        """Whether the first epoch has a step, which an annealed one of few images may lack."""
        return any(epoch_batches(self.regime, self.num_images, self.world_size, self.drop).values())

    @property
    def left_out(self) -> int:
        """Images of the data set that an epoch does not train."""
        return self.num_images - sum(map(self.images, self.batches))

    def total(self, cost: Callable[[int], float]) -> float:
        """The sum over the epoch's images, with duplicates, of what one image of a size costs."""
        return sum(self.images(size) * self.regime.group(size)[1] * cost(size) for size in self.batches)

    @property
    def pixels(self) -> float:
        """Pixels of an epoch, of square images."""
        return self.total(lambda size: size**2)

    @property
    def epoch_gmacs(self) -> float:
        """Billions of multiply-accumulates of an epoch's forward passes."""
        return self.total(self.gmacs.__getitem__)

    def work(self, size: int) -> float:
        """Multiply-accumulates of a step at a size over those of a step at the base size."""
        regime = self.regime
        return regime.relative_work(size) * self.excess(size)

    def excess(self, size: int) -> float:
        """Multiply-accumulates of a pixel at a size over those of one at the base size."""
        base = self.regime.base_size
        return self.gmacs[size] / self.gmacs[base] * (base / size)**2

    def rows(self) -> List[Dict[str, Any]]:
        """A row for each size, of plain values."""
        trained = self.num_images - self.left_out
        return [{
            'img_size': size, 'share': self.images(size) / trained, 'images': self.images(size),
            'batch': self.regime.group(size)[0] * self.world_size, 'duplicates': self.regime.group(size)[1],
            'steps': self.steps(size), 'gmacs': self.gmacs[size],
            'relative_pixels': self.regime.relative_work(size), 'relative_gmacs': self.work(size),
        } for size in self.batches]

    @property
    def costly(self) -> List[int]:
        """Sizes whose step costs more than the base size's, in pixels or in operations."""
        return [size for size, batches in self.batches.items()
                if batches and max(self.regime.relative_work(size), self.work(size)) > TOLERANCE]

    @property
    def cure(self) -> float:
        """The ``max_work`` with which no size's step costs more: 1, or less where operations outgrow pixels."""
        excess = max(map(self.excess, self.batches))
        return 1. if excess <= TOLERANCE else math.floor(100 / excess) / 100

    def with_regime(self, **changes: Any) -> 'EpochCost':
        """The cost with other arguments of the regime.

        Raises:
            ValueError: A batch rounds to zero.
        """
        return replace(self, regime=replace(self.regime, **changes))


class Memory(NamedTuple):
    """Bytes that a process needs: ``parts``, whatever the batch, and those of each image, by size in pixels."""
    parts: Dict[str, float]
    per_image: Dict[int, float]
    measured: bool

    def of(self, size: int, images: int) -> float:
        """Bytes with so many images of a size at once."""
        return sum(self.parts.values()) + images * self.per_image[size]

    def largest_batch_size(self, regime: Regime, memory: float, **changes: Any) -> int:
        """The largest ``batch_size`` with which the whole batch of every size fits; 0 for none.

        Args:
            regime: The regime.
            memory: Bytes that there are.
            **changes: Other arguments of the regime.
        """
        def with_batch(batch: int) -> Optional[Regime]:
            try:
                return replace(regime, batch_size=batch, **changes)
            except ValueError:  # no image is left at a size
                return None

        def fits(batch: int) -> bool:
            changed = with_batch(batch)
            return changed is not None and all(
                self.of(size, math.prod(changed.group(size))) <= memory for size in changed.sizes)

        smallest = next(batch for batch in itertools.count(1) if with_batch(batch))
        low, high = smallest - 1, smallest
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low if low >= smallest else 0


def estimate_memory(args: argparse.Namespace, model: nn.Module, data: 'PlannedData', mixed: Optional[torch.dtype],
                    sizes: Sequence[int]) -> Memory:
    """The tensors of a training step, without what a device's libraries need beside them.

    Args:
        args: Arguments of the run.
        model: The model.
        data: Tells shapes and processes.
        mixed: Type of mixed precision, if any.
        sizes: Image sizes in pixels.
    """
    dtype = model_dtype(args) or torch.float32
    weights = float(sum(p.numel() for p in model.parameters()) * dtype.itemsize)
    gradients = float(sum(p.numel() for p in model.parameters() if p.requires_grad) * dtype.itemsize)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    parts = {'weights': weights + buffers, 'gradients': gradients,
             'optimizer': _optimizer_bytes(args, model, dtype, weights)}
    if args.model_ema and not args.model_ema_force_cpu:
        parts['moving average'] = weights + buffers
    if data.plan_world_size > 1:
        parts['buckets of data parallelism'] = gradients
    if mixed is not None:
        parts['weights in mixed precision'] = weights * mixed.itemsize / dtype.itemsize
    compute = mixed or dtype
    at_base = count_saved_bytes(model, data.shape(data.base_size), dtype=compute)
    parts['kept whatever the batch'] = at_base.constant
    per_image = {}
    for size in sizes:
        saved = at_base if size == data.base_size else count_saved_bytes(
            model, data.shape(size), dtype=compute, constant=at_base.constant)
        following = math.prod(data.shape(size)) * (1 + dtype.itemsize)  # the next batch, as bytes and normalised
        per_image[size] = saved.per_image + following
    return Memory({name: value for name, value in parts.items() if value}, per_image, measured=False)


def _optimizer_bytes(args: argparse.Namespace, model: nn.Module, dtype: torch.dtype, weights: float) -> float:
    """Bytes of the optimizer's state behind a step on the meta device."""
    probe = copy.deepcopy(model).to(device='meta', dtype=dtype)
    with refusing(f'--opt {args.opt}'):
        optimizer = create_optimizer_v2(probe, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    for parameter in probe.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
    except Exception:  # whatever it is that an optimizer cannot do on the meta device
        return OPTIMIZER_COPIES * weights
    return float(sum(value.numel() * value.element_size() for state in optimizer.state.values()
                     for value in state.values() if isinstance(value, torch.Tensor)))


class PlannedData(Data):
    """The data of a run that is planned: there are no loaders, and only the number of images may be asked for.

    Args:
        args: Arguments of the run.
        model: Tells which sizes it takes.
        accelerator: Owns devices and processes.
        num_images: Training images; ``None`` opens the data set.
        processes: Processes that train.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, accelerator: Accelerator,
                 num_images: Optional[int], processes: int) -> None:
        EvaluationData.__init__(self, args, model, accelerator)
        self.plan_world_size = processes
        self.mean_batch = args.batch_size
        self.regime = fit_regime(args, model, self.config['input_size'])
        self.loader_regime = self.regime or (self._one_size() if args.fast_loader else None)
        if num_images is None:
            self.open(train=True, validation=False)
            with refusing('the data set does not say how many images it has: name it with --num-images'):
                # timm's loader has the length of what it reads, in one process and rounded
                num_images = self.num_train_images if self.loader_regime else len(self.train)
        self.num_images_planned = num_images
        self._mixup()  # for what it refuses

    def _resolve_config(self, model: Any) -> Dict[str, Any]:
        return resolve_data_config(vars(self.args), model=model)

    @property
    def num_shapes(self) -> int:
        """Shapes of batch that are compiled at most: one of each size, and that of the fixed size."""
        return len(self.sizes) + 1


class Trial:
    """The steps of a run on images of noise, by the run's own loop.

    Args:
        args: Arguments of the run.
        model: The model.
        accelerator: Owns devices, precision and processes.
        data: Tells shapes.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, accelerator: Accelerator, data: PlannedData) -> None:
        self.args, self.accelerator, self.data = args, accelerator, data
        self.task, self.optimizer = create_task(args, model, accelerator, data)
        for group in self.optimizer.param_groups:
            group['lr'] = 0.  # noise teaches nothing
        self.smoother = GradientSmoother(args.grad_smoothing_momentum) if args.grad_smoothing else None

    def run(self, size: int, images: int, steps: int, on_step: Callable[..., None]) -> bool:
        """Train steps with so many images of a size on each process; ``False`` if memory does not do."""
        args, device, accumulated = self.args, self.accelerator.device, self.args.grad_accum_steps
        groups = np.arange(steps * accumulated)
        ones = np.ones_like(groups)
        plan = EpochPlan(ones * size, ones * images * self.accelerator.num_processes, ones, groups // accumulated,
                         groups * images, None, images * len(groups))
        area = int(args.micro_batch_size) if args.micro_batch_size not in ('', 'auto') else 0
        try:
            noise = torch.randn(images, *self.data.shape(size), device=device, dtype=model_dtype(args))
            soft = mixing(args) or args.task == 'multilabel'
            targets = torch.zeros(images, args.num_classes, device=device) if soft else torch.zeros(
                images, dtype=torch.long, device=device)
            train_one_epoch(
                Progress(), self.task, itertools.repeat((in_format(noise, args.channels_last), targets)), plan,
                self.optimizer, self.accelerator, smoother=self.smoother,
                micro_batch_size=scaled_by_area(area, self.data.base_size) if area else None,
                clip_grad=args.clip_grad, clip_mode=args.clip_mode, channels_last=args.channels_last,
                model_dtype=model_dtype(args), log_interval=steps + 1, on_step=on_step)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            self.optimizer.zero_grad()
            clear_device_cache(garbage_collection=True)
            return False
        return True

    def seconds(self, size: int, images: int) -> Optional[float]:
        """Median time of an optimizer step; ``None`` if it does not fit into memory."""
        ends: List[float] = []

        def on_step(_: Any) -> None:
            if self.accelerator.device.type != 'cpu':
                torch.accelerator.synchronize(self.accelerator.device)
            ends.append(time.perf_counter())

        if not self.run(size, images, WARM_UP + MEASURED, on_step):
            return None
        return median(after - before for before, after in zip(ends[WARM_UP - 1:], ends[WARM_UP:]))

    def peak(self, size: int, images: int) -> Optional[int]:
        """The most bytes that are allocated in a step; ``None`` if it does not fit into memory.

        It is the second of two: in the first the libraries try several algorithms, and the optimizer makes its state.
        """
        device, peaks = self.accelerator.device, []

        def on_step(meter: Any) -> None:
            if meter.progress.step == 1:
                torch.accelerator.reset_peak_memory_stats(device)
            else:
                peaks.append(torch.accelerator.max_memory_allocated(device))

        return peaks[0] if self.run(size, images, 2, on_step) else None

    def memory(self, sizes: Sequence[int], images: int) -> Optional[Memory]:
        """What steps of few images take, extrapolated linearly; ``None`` if they do not fit into memory."""
        per_image: Dict[int, float] = {}
        whatever = 0.
        for size in sizes:
            one, two = self.peak(size, images), self.peak(size, 2 * images)
            if one is None or two is None:
                return None
            per_image[size] = max(1., (two - one) / images)
            whatever = max(whatever, one - images * per_image[size])
        return Memory({'whatever the batch': whatever}, per_image, measured=True)


class Planner:
    """One run of the command. The constructor finds what cannot work; :meth:`run` prints the plan."""

    def __init__(self, given: argparse.Namespace, args: argparse.Namespace) -> None:
        self.given, self.args = given, args
        self.accelerator = create_accelerator(args)
        random_seed(args.seed, self.accelerator.process_index)
        self.model = create_model(args)
        self.data = PlannedData(args, self.model, self.accelerator, given.num_images,
                                given.processes or self.accelerator.num_processes)
        data, base = self.data, self.data.base_size
        fixed = Regime.fixed(base, batch_size=args.batch_size)
        gmacs = {size: count_gmacs(self.model, data.shape(size)) for size in {*data.sizes, base}}
        shared = dict(num_images=data.num_images_planned, gmacs=gmacs, world_size=data.plan_world_size,
                      grad_accum_steps=args.grad_accum_steps)
        self.fixed = EpochCost(fixed, drop='reference', **shared)  # as timm's loader
        planned = data.loader_regime
        self.cost = EpochCost(planned, drop=args.mixsize_drop, **shared) if planned else self.fixed
        if not (self.cost.num_steps and self.cost.begins):
            raise UsageError(f'{self.cost.num_images} images on {self.cost.world_size} processes make no batch at any '
                             'size: lower --batch-size')
        data.num_steps = self.cost.num_steps
        args.lr = scale_lr(args, data)
        nothing = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.lr)
        self.num_epochs = args.stop_epoch or create_schedule(args, nothing, data)[1]

    def run(self) -> None:
        """Print the plan, and write it where that was asked for."""
        document = self.describe()
        if self.accelerator.is_main_process:
            print(format_plan(document))
            if self.given.json:
                self._write(json.dumps(document, indent=2) + '\n')
        self.accelerator.end_training()

    def _write(self, text: str) -> None:
        with refusing(f'cannot write {self.given.json}'):
            os.makedirs(os.path.dirname(self.given.json) or '.', exist_ok=True)
            with open(self.given.json, 'w', encoding='utf-8') as file:
                file.write(text)

    def describe(self) -> Dict[str, Any]:
        """The plan as plain values; sizes are in pixels, memory in bytes, times in seconds."""
        cost, fixed, args, regime = self.cost, self.fixed, self.args, self.cost.regime
        rows, warnings = cost.rows(), describe_plan(regime, cost.num_images, cost.world_size, cost.drop)[1]
        memory, times = self._measure()
        for row in rows:
            row['memory'] = memory.of(row['img_size'], self._at_once(row['img_size']))
        document: Dict[str, Any] = {
            'model': args.model, 'adapt': regime.adapt if self.data.regime else 'off', 'base_size': regime.base_size,
            'base_batch': regime.base_batch * cost.world_size, 'mean_batch': regime.mean_batch * cost.world_size,
            'processes': cost.world_size, 'num_images': cost.num_images, 'epochs': self.num_epochs, 'lr': args.lr,
            'steps': cost.num_steps, 'fixed_steps': fixed.num_steps, 'left_out': cost.left_out,
            'relative_pixels': _over(cost.pixels, fixed.pixels),
            'relative_gmacs': _over(cost.epoch_gmacs, fixed.epoch_gmacs),
            'training_gmacs': 3 * cost.epoch_gmacs * self.num_epochs, 'sizes': rows,
            'memory': self._describe_memory(memory), 'warnings': warnings, 'annealed': describe_annealing(regime),
            'costly': cost.costly, 'cure': self._cure() if cost.costly else None,
            'multiples': self._multiples() if self.data.regime else [],
            'settings': {'command': self.given.command, **environment(self.accelerator)}}
        if times is not None:
            document['times'] = self._describe_times(rows, times)
        return document

    def _at_once(self, size: int) -> int:
        """Images of a size, with duplicates, that a process takes at once."""
        images, parts = math.prod(self.cost.regime.group(size)), self.args.micro_batch_size
        return images if parts in ('', 'auto') else min(images, scaled_by_area(int(parts), self.data.base_size)(size))

    def _measure(self) -> Tuple[Memory, Optional[Dict[Tuple[int, int], Optional[float]]]]:
        """The memory of a step, and if asked for the time of one by size and images; on the device where it can be."""
        sizes, memory, times = sorted(self.cost.gmacs), None, None
        mixed = {'fp16': torch.float16, 'bf16': torch.bfloat16}.get(self.accelerator.mixed_precision)
        estimate = estimate_memory(self.args, self.model, self.data, mixed, sizes)
        # few images are other shapes, for each of which torch.compile would take its minutes
        on_gpu = self.accelerator.device.type == 'cuda' and not self.args.torchcompile
        if self.given.measure or on_gpu:
            trial = Trial(self.args, self.model, self.accelerator, self.data)
            if on_gpu:
                memory = trial.memory(sizes, max(2, min(8, self.args.batch_size // 2)))
            if self.given.measure:
                steps = {(size, math.prod(cost.regime.group(size))) for cost in (self.cost, self.fixed)
                         for size in cost.batches}
                times = {(size, images): trial.seconds(size, images) for size, images in sorted(steps)}
        return memory or estimate, times

    def _describe_memory(self, memory: Memory) -> Dict[str, Any]:
        device, regime = self.accelerator.device, self.cost.regime
        if self.given.memory:
            total = self.given.memory * GIB
        elif device.type == 'cuda':
            total = torch.cuda.mem_get_info(device)[1]
        else:
            total = psutil.virtual_memory().total
        return {'measured': memory.measured, 'parts': memory.parts, 'per_image': memory.per_image,
                'total': total, 'usable': USABLE * total,
                'largest_batch_size': memory.largest_batch_size(regime, USABLE * total),
                'largest_batch_size_max_work_1': memory.largest_batch_size(regime, USABLE * total, max_work=1.)}

    def _cure(self) -> Dict[str, Any]:
        """What ``--mixsize-max-work`` makes of the sizes that cost more; without ``steps`` where it cannot be had."""
        try:
            cured = self.cost.with_regime(max_work=self.cost.cure)
        except ValueError:
            return {'max_work': self.cost.cure}
        return {'max_work': self.cost.cure, 'steps': cured.num_steps, 'batches': {
            row['img_size']: row['batch'] for row in cured.rows()}}

    def _multiples(self) -> List[Dict[str, Any]]:
        """What rounding batches to a multiple costs, for the least that is needed, 8, and the one asked for."""
        least, rows = 2 if mixing(self.args) else 1, []
        for multiple in sorted({least, 8, self.cost.regime.batch_multiple}):
            try:
                cost = self.cost.with_regime(batch_multiple=multiple)
            except ValueError:  # a batch rounds to zero
                continue
            if cost.num_steps:
                rows.append({'multiple': multiple, 'batches': [row['batch'] for row in cost.rows()],
                             'steps': cost.num_steps, 'peak_work': cost.regime.peak_work, 'left_out': cost.left_out,
                             'relative_pixels': _over(cost.pixels, self.fixed.pixels)})
        return rows

    def _describe_times(self, rows: List[Dict[str, Any]], times: Dict[Tuple[int, int], Optional[float]]
                        ) -> Dict[str, Any]:
        """Put the times of a step into the rows, and add them up."""
        def epoch(cost: EpochCost) -> Optional[float]:
            of_size = {size: times[size, math.prod(cost.regime.group(size))] for size in cost.batches}
            return None if None in of_size.values() else sum(cost.steps(size) * (of_size[size] or 0.)
                                                             for size in cost.batches)

        base = self.fixed.regime.base_size
        base_seconds = times[base, self.args.batch_size]
        for row in rows:
            images = math.prod(self.cost.regime.group(row['img_size']))
            seconds = row['seconds'] = times[row['img_size'], images]
            row['images_per_second'] = None if seconds is None else (
                images * self.args.grad_accum_steps * self.cost.world_size / seconds)
            row['relative_seconds'] = seconds / base_seconds if seconds and base_seconds else None
        seconds = epoch(self.cost)
        return {'epoch': seconds, 'run': None if seconds is None else seconds * self.num_epochs,
                'fixed_epoch': epoch(self.fixed) or None, 'processes': self.accelerator.num_processes}


def _over(cost: float, fixed: float) -> Optional[float]:
    """A cost over that of the fixed size; ``None`` where that has no step of whole batches."""
    return cost / fixed if fixed else None


def format_plan(plan: Dict[str, Any]) -> str:
    """The plan as text, of what :meth:`Planner.describe` gives."""
    regime = 'one size' if plan['adapt'] == 'off' else f'MixSize {plan["adapt"]}'
    processes = f'{plan["processes"]} process{"es" if plan["processes"] > 1 else ""}'
    lines = [f'{plan["model"]}, {regime} at a base size of {plan["base_size"]} px, base batch {plan["base_batch"]} on '
             f'{processes}, {plan["num_images"]} images', '', *_format_sizes(plan), '', *_format_epoch(plan), '',
             *_format_memory(plan)]
    if plan['cure']:
        lines += ['', *_format_cure(plan)]
    if plan['multiples']:
        lines += ['', *_format_multiples(plan)]
    if 'times' in plan:
        lines += ['', *_format_times(plan)]
    return '\n'.join([*lines, *(['', *plan['warnings']] if plan['warnings'] else [])])


def _format_sizes(plan: Dict[str, Any]) -> List[str]:
    timed, rows = 'times' in plan, [['size', 'share', 'images', 'batch', 'dup', 'steps', 'GMACs', 'pixels', 'work',
                                     'memory']]
    if timed:
        rows[0] += ['ms', 'time', 'images/s']
    for row in plan['sizes']:
        rows.append([str(row['img_size']), f'{row["share"]:.3f}', str(row['images']), str(row['batch']),
                     str(row['duplicates']), str(row['steps']), f'{row["gmacs"]:.3f}', f'{row["relative_pixels"]:.2f}x',
                     f'{row["relative_gmacs"]:.2f}x', f'{row["memory"] / GIB:.2f}'])
        if timed:
            rows[-1] += ['-', '-', '-'] if row['seconds'] is None else [
                f'{1000 * row["seconds"]:.1f}', f'{row["relative_seconds"]:.2f}x' if row['relative_seconds'] else '-',
                f'{row["images_per_second"]:.1f}']
    return [*_table(rows), '',
            'batch: of all processes; steps: of an epoch; GMACs: of an image, forward; memory: of a process, in GB',
            f'pixels, work: the pixels and GMACs of a step over those of --batch-size images at {plan["base_size"]} px',
            *plan['annealed'],
            *([f'ms: of a step; time: that over one at {plan["base_size"]} px; images/s: of all processes']
              if timed else [])]


def _table(rows: List[List[str]]) -> List[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _format_epoch(plan: Dict[str, Any]) -> List[str]:
    fixed = (f', {plan["relative_pixels"]:.3f}x the pixels and {plan["relative_gmacs"]:.3f}x the GMACs of one at '
             f'{plan["base_size"]} px, which has {plan["fixed_steps"]} steps' if plan['fixed_steps'] else
             f'; one at {plan["base_size"]} px has none, for the images fill no batch')
    return [f'An epoch: {plan["steps"]} steps{fixed}; images left out: {plan["left_out"]}',
            f'{plan["epochs"]} epochs: {plan["steps"] * plan["epochs"]} steps, {plan["training_gmacs"]:.3g} GMACs '
            'forward and backward',
            f'Learning rate {plan["lr"]:.4g}; mean batch {plan["mean_batch"]:.1f}']


def _format_memory(plan: Dict[str, Any]) -> List[str]:
    memory = plan['memory']
    parts = ', '.join(f'{name} {value / GIB:.2f}' for name, value in memory['parts'].items() if value >= 0.005 * GIB)
    what = ('measured in steps of few images, and extrapolated' if memory['measured'] else
            'estimated: its tensors, without what the device\'s context and libraries need')
    return [f'Memory is {what}',
            f'GB of it whatever the batch: {parts or "under 0.005"}; MB of an image of {plan["base_size"]} px: '
            f'{memory["per_image"][plan["base_size"]] / 2**20:.1f}',
            f'Largest --batch-size in {USABLE:.0%} of {memory["total"] / GIB:.1f} GB: '
            f'{memory["largest_batch_size"] or "none"}; with --mixsize-max-work 1: '
            f'{memory["largest_batch_size_max_work_1"] or "none"}']


def _format_cure(plan: Dict[str, Any]) -> List[str]:
    cure, before = plan['cure'], {row['img_size']: row for row in plan['sizes']}
    costs = ', '.join(f'{size} px ({max(before[size]["relative_pixels"], before[size]["relative_gmacs"]):.2f}x)'
                      for size in plan['costly'])
    option = f'--mixsize-max-work {cure["max_work"]:g}'
    if 'steps' not in cure:
        return [f'A step costs more than one at the base size at {costs}; {option} leaves no image of a size: raise '
                'the batch size']
    changed = ', '.join(f'{before[size]["batch"]} -> {batch} at {size} px' for size, batch in cure['batches'].items()
                        if batch != before[size]['batch'])
    return [f'A step costs more than one at the base size at {costs}',
            f'{option} cures it: batch {changed}; {cure["steps"]} steps an epoch instead of {plan["steps"]}']


def _format_multiples(plan: Dict[str, Any]) -> List[str]:
    rows = [['multiple', 'steps', 'largest step', 'left out', 'epoch', 'batches']]
    for row in plan['multiples']:
        epoch = f'{row["relative_pixels"]:.4f}x' if row['relative_pixels'] else '-'
        rows.append([str(row['multiple']), str(row['steps']), f'{row["peak_work"]:.3f}x', str(row['left_out']), epoch,
                     ' '.join(map(str, row['batches']))])
    return ['With --mixsize-batch-multiple (pixels, as above):', '', *_table(rows)]


def _format_times(plan: Dict[str, Any]) -> List[str]:
    times, where = plan['times'], plan['settings']
    if times['epoch'] is None:
        return ['Not every step fits into memory, so there is no expected time: lower --batch-size, or '
                '--mixsize-max-work 1']
    ratio = f', {times["fixed_epoch"] / times["epoch"]:.2f} times as fast as at {plan["base_size"]} px' \
        if times['fixed_epoch'] else ''
    lines = [f'By the median of {MEASURED} steps of each size on {where["device"]}, mixed precision '
             f'{where["precision"]}: an epoch {_duration(times["epoch"])}, {plan["epochs"]} epochs '
             f'{_duration(times["run"])}{ratio}',
             'Loading, validation, calibration and checkpoints are not included']
    if times['processes'] != plan['processes']:
        lines.append(f'Measured on {times["processes"]} of {plan["processes"]} processes: what they exchange is not '
                     'included')
    return lines


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f'{seconds:.3g} s'
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60:02d} min'


if __name__ == '__main__':
    sys.exit(main())
