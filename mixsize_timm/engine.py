"""The two loops: one epoch of training, and a validation."""
import logging
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import dispatch_clip_grad
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .randomness import own_randomness
from .sampler import EpochPlan, Group
from .smoothing import GradientNorms, GradientSmoother

_logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where training is, and what it has counted: a checkpoint keeps all of it.

    Attributes:
        epoch: Epoch, counted from zero.
        step: Finished optimizer steps of the epoch.
        loss_sum: Sum of the losses of the epoch's images, over all processes, up to where it was resumed.
        images: Images, with duplicates and over all processes, that it is of.
        samples: Images, over all processes, that were trained at each (height, width) since the run began.
        steps: Optimizer steps since the run began.
        skipped: Those of them that gave an overflow and changed nothing.
        seconds: Time spent in steps since the run began.
        counted: Whether those since the run began are known; they are not for a run that timm's script began.
        nonfinite: Steps in a row, up to the last that was looked at, whose loss is not finite.
        nonfinite_since: Words for the first of them.
    """
    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.
    images: int = 0
    samples: Counter = field(default_factory=Counter)
    steps: int = 0
    skipped: int = 0
    seconds: float = 0.
    counted: bool = True
    nonfinite: int = 0
    nonfinite_since: str = ''

    def start_epoch(self, epoch: int) -> None:
        """Go on to the beginning of an epoch."""
        self.epoch, self.step, self.loss_sum, self.images = epoch, 0, 0., 0

    def to_dict(self) -> Dict[str, Any]:
        """What a checkpoint keeps of it, as plain values."""
        kept = {name: value for name, value in vars(self).items() if not name.startswith('nonfinite')}
        return {**kept, 'samples': [[*size, number] for size, number in sorted(self.samples.items())]}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> 'Progress':
        """What :meth:`to_dict` was made of."""
        samples = Counter({(height, width): number for height, width, number in values['samples']})
        return cls(**{**values, 'samples': samples})


class NonFiniteLoss(ArithmeticError):
    """The loss was not finite for too many steps in a row."""


def train_one_epoch(
        progress: Progress,
        task: TrainingTask,
        loader: Iterable,
        plan: EpochPlan,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        smoother: Optional[GradientSmoother] = None,
        lr_scheduler: Any = None,
        mixup_fn: Any = None,
        mixup_seed: Optional[int] = None,
        set_size: Optional[Callable[[int], None]] = None,
        batch_scale: Optional[Callable[[int], Any]] = None,
        micro_batch_size: Optional[Callable[[int], int]] = None,
        clip_grad: Optional[float] = None,
        clip_mode: str = 'norm',
        channels_last: bool = False,
        model_dtype: Optional[torch.dtype] = None,
        synchronize_step: bool = False,
        log_interval: int = 50,
        max_nonfinite: int = 0,
        save_images: str = '',
        on_step: Optional[Callable[['StepMeter'], None]] = None,
) -> Dict[str, float]:
    """Train one epoch, or what is left of it.

    The gradient of an optimizer step is the mean over its images: a group's loss counts for its share of them. It is
    averaged over processes (by the backward pass), unscaled, smoothed, clipped and applied, in this order. Smoothing
    comes before clipping, so that the clipping bound is on the step that is taken. The moving average of the weights
    follows the optimizer. A step whose gradient overflows under loss scaling changes nothing: neither the weights,
    nor their average, nor the running norm, nor the schedule, which goes on a step later.

    Args:
        progress: The epoch, and the steps of it that are done; kept up to date.
        task: timm task around the prepared model; its result's ``loss`` is trained.
        loader: Gives ``(images, targets)`` for each group of the plan, in its order, from the first step not done.
        plan: The epoch's plan.
        optimizer: The prepared optimizer.
        accelerator: Owns devices, precision, processes and trackers.
        smoother: Gradient smoother, if any.
        lr_scheduler: timm scheduler; its ``step_update`` is called after each step.
        mixup_fn: timm mixup for batches that were not mixed by the loader.
        mixup_seed: Makes what it draws a function of (seed, epoch, batch, process); ``None`` leaves it to the
            process's own generators.
        set_size: Called with the image size of each group before it is mixed and trained.
        batch_scale: Factor of the loss of a batch, given its number of images on this process.
        micro_batch_size: Images, given their size, that a process takes at once: a batch of more is trained in parts.
            The gradient is the same but for batch norm, whose statistics are those of a part.
        clip_grad: Clipping bound, if any.
        clip_mode: timm's ``norm``, ``value`` or ``agc``.
        channels_last: Hand the model images in channels-last memory format.
        model_dtype: Type of the images that the model takes.
        synchronize_step: Wait for the device after each step.
        log_interval: Steps between log lines.
        max_nonfinite: Steps in a row whose loss may be not finite, looked at with the log lines; 0 for any number.
        save_images: Folder for an image of each logged batch, ``train-batch-N.jpg``.
        on_step: Called after each step, when everything that belongs to it is done.

    Returns:
        ``loss``: mean over the images of the epoch.

    Raises:
        NonFiniteLoss: ``max_nonfinite`` steps in a row had a loss that is not finite.
    """
    model: Any = task.get_trainable_module()
    model.train()
    optimizer.zero_grad()
    inner = getattr(optimizer, 'optimizer', optimizer)  # Accelerate's wrapper has the methods of torch only
    second_order = getattr(inner, 'is_second_order', False)
    meter = StepMeter(progress, plan, accelerator, log_interval, max_nonfinite)
    groups = plan.groups(accelerator.process_index, accelerator.num_processes, progress.step)
    with logging_redirect_tqdm(), meter:
        for number, ((images, targets), group) in enumerate(zip(loader, groups), plan.first_group(progress.step)):
            if set_size is not None:
                set_size(group.size)
            images = to_device(images, accelerator.device, model_dtype)
            targets = targets.to(accelerator.device, non_blocking=True)
            if mixup_fn is not None:
                key = () if mixup_seed is None else (mixup_seed, accelerator.process_index, progress.epoch, number, -3)
                with own_randomness(*key, device=images.device) if key else nullcontext():
                    images, targets = mixup_fn(images, targets)
            images = in_format(images, channels_last)
            weight = group.weight * (batch_scale(len(targets)) if batch_scale is not None else 1)
            parts = _split(images, targets, micro_batch_size(group.size) if micro_batch_size is not None else None)
            batch_loss = torch.zeros((), device=accelerator.device)
            for number_of_part, (part, part_targets) in enumerate(parts, 1):
                synchronizes = group.ends_step and number_of_part == len(parts)
                share = len(part_targets) / len(targets)
                with nullcontext() if synchronizes else accelerator.no_sync(model):
                    with accelerator.autocast():
                        loss = task(part, part_targets)['loss']
                    accelerator.backward(loss * (weight * share), create_graph=second_order)
                batch_loss += loss.detach() * share
            meter.add(batch_loss, images, targets, group)
            if not group.ends_step:
                continue
            norms = _optimizer_step(task, optimizer, accelerator, smoother, clip_grad, clip_mode)
            skipped = accelerator.optimizer_step_was_skipped
            progress.skipped += skipped
            updates = plan.steps_before + group.step + 1 - progress.skipped
            if not skipped:
                task.update_ema(step=updates)
            if synchronize_step and accelerator.device.type != 'cpu':
                getattr(torch, accelerator.device.type).synchronize()
            if meter.step(group, norms, optimizer) and save_images and accelerator.is_main_process:
                save_image(images, os.path.join(save_images, f'train-batch-{number}.jpg'), padding=0, normalize=True)
            if lr_scheduler is not None and not skipped:
                lr_scheduler.step_update(num_updates=updates)
            if on_step is not None:
                on_step(meter)
    if hasattr(inner, 'sync_lookahead'):
        inner.sync_lookahead()
    loss = meter.read()
    if not meter.bar.disable:
        _logger.info('Train %d  loss %.4f', progress.epoch, loss)  # the bar is gone
    return {'loss': loss}


def _split(images: Any, targets: torch.Tensor, size: Optional[int]) -> List[Tuple[Any, torch.Tensor]]:
    """A batch in parts of about equal length, none with more images than ``size``."""
    if size is None or len(targets) <= size:
        return [(images, targets)]
    parts = -(-len(targets) // size)
    return list(zip(images.tensor_split(parts), targets.tensor_split(parts)))


def to_device(images: Any, device: torch.device, dtype: Optional[torch.dtype] = None) -> Any:
    """Images, or the dictionary that a NaFlex loader gives, on a device; the pixels in a type.

    Nothing waits for the copy: what is queued on the device behind it does.
    """
    if isinstance(images, dict):
        return {key: value.to(device=device, dtype=dtype if key == 'patches' else None, non_blocking=True)
                if isinstance(value, torch.Tensor) else value for key, value in images.items()}
    return images.to(device=device, dtype=dtype, non_blocking=True)


def in_format(images: Any, channels_last: bool) -> Any:
    """Images in the memory format that the model is in; those of NaFlex, which are not pictures, as they are."""
    if channels_last and not isinstance(images, dict):
        return images.contiguous(memory_format=torch.channels_last)
    return images


def _optimizer_step(
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        smoother: Optional[GradientSmoother],
        clip_grad: Optional[float],
        clip_mode: str,
) -> Optional[GradientNorms]:
    norms = None
    model: Any = task.get_trainable_module()
    if smoother is not None or clip_grad is not None:
        accelerator.unscale_gradients(optimizer)
    if smoother is not None:
        norms = smoother(model.parameters())
    if clip_grad is not None:
        parameters = task.get_clip_parameters(exclude_head='agc' in clip_mode)
        dispatch_clip_grad(parameters, value=clip_grad, mode=clip_mode)
    optimizer.step()
    optimizer.zero_grad()
    return norms


class StepMeter:
    """Losses and speed of an epoch: a progress bar on a terminal, log lines elsewhere, and each step for the trackers.

    What is measured stays on the device; it is read, which waits for it, only where something is shown or saved.

    Args:
        progress: Kept up to date with each step.
        plan: The epoch's plan.
        accelerator: Owns devices, processes and trackers.
        log_interval: Steps between log lines.
        max_nonfinite: Steps in a row whose loss may be not finite; 0 for any number.
    """

    def __init__(self, progress: Progress, plan: EpochPlan, accelerator: Accelerator, log_interval: int,
                 max_nonfinite: int = 0) -> None:
        self.progress = progress
        self.plan = plan
        self.accelerator = accelerator
        self.log_interval = log_interval
        self.max_nonfinite = max_nonfinite
        self.loss_sum = torch.zeros((), device=accelerator.device)
        if accelerator.is_main_process:
            self.loss_sum += progress.loss_sum
        self.step_loss = torch.zeros_like(self.loss_sum)
        self.nonfinite = torch.full_like(self.loss_sum, progress.nonfinite)
        self.began: Dict[int, str] = {}  # a step to the words for it
        self.images_shown = progress.images
        self.loss = self.loss_sum
        self.last_shown = self.last_step = time.perf_counter()
        self.unlogged: List[Tuple[Dict[str, float], List[torch.Tensor]]] = []
        terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=plan.num_steps, initial=progress.step, desc=f'Epoch {progress.epoch}', leave=False,
                        disable=not terminal)

    def __enter__(self) -> 'StepMeter':
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, loss: torch.Tensor, images: Any, targets: torch.Tensor, group: Group) -> None:
        """Count a batch."""
        self.loss = loss
        self.loss_sum += loss * len(targets)
        self.step_loss += loss
        planned, naflex = group.images is not None, isinstance(images, dict)
        count = group.batch * group.duplicates if planned else len(targets) * self.accelerator.num_processes
        self.batch = count // group.duplicates
        self.size = images['patches'].shape[1] if naflex else images.shape[-1]
        self.unit = 'patches' if naflex else 'px'
        self.progress.images += count
        if not naflex:
            self.progress.samples[tuple(images.shape[-2:])] += count

    def step(self, group: Group, norms: Optional[GradientNorms], optimizer: torch.optim.Optimizer) -> bool:
        """Count a step; whether it was shown.

        Raises:
            NonFiniteLoss: It is one too many whose loss is not finite.
        """
        progress, now = self.progress, time.perf_counter()
        progress.step, progress.steps = group.step + 1, progress.steps + 1
        progress.seconds, self.last_step = progress.seconds + now - self.last_step, now
        self.nonfinite = torch.where(self.step_loss.isfinite(), 0., self.nonfinite + 1)
        self.step_loss = torch.zeros_like(self.step_loss)
        self.bar.update()
        lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
        self.began[progress.step] = (
            f'step {progress.step} of epoch {progress.epoch} ({self.size} {self.unit}, learning rate {lr:.3g})')
        if self.accelerator.trackers:
            self.unlogged.append((
                {'size': self.size, 'batch': self.batch, 'duplicates': group.duplicates, 'step_lr': lr},
                [self.loss, *([] if norms is None else [norms.norm, norms.smoothed])]))
        if group.step % self.log_interval and progress.step != self.plan.num_steps:
            return False
        loss = self.read()
        text = f'{self.size:>4d} {self.unit}  batch {self.batch:>4d} x{group.duplicates}  loss {loss:#.4g}'
        if norms is not None:
            norm, smoothed = torch.stack([norms.norm, norms.smoothed]).tolist()  # one wait for both
            text += f'  norm {norm:#.3g} -> {smoothed:#.3g}'
        now = time.perf_counter()
        rate = (progress.images - self.images_shown) / (now - self.last_shown)
        text += f'  {rate:.1f} images/s  lr {lr:.3e}'
        self.images_shown, self.last_shown = progress.images, now
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            _logger.info('Train %d [%4d/%d]  %s', progress.epoch, progress.step, self.plan.num_steps, text)
        self.log_steps()
        return True

    def log_steps(self) -> None:
        """Hand the trackers the steps that they have not heard of; one wait for the device."""
        if not self.unlogged:
            return
        last = self.plan.steps_before + self.progress.step  # counted over all epochs
        names = ('step_loss', 'norm', 'smoothed_norm')
        values = torch.stack([torch.stack([x.float() for x in tensors]) for _, tensors in self.unlogged]).tolist()
        for step, ((known, _), measured) in enumerate(zip(self.unlogged, values), last - len(values) + 1):
            self.accelerator.log({**known, **dict(zip(names, measured))}, step=step)
        self.unlogged = []

    def read(self) -> float:
        """Mean loss of the epoch so far; :attr:`Progress.loss_sum` and its count of steps are brought up to date.

        All processes must call it.

        Raises:
            NonFiniteLoss: Too many steps in a row had a loss that is not finite.
        """
        progress = self.progress
        sums, nonfinite = zip(*self.accelerator.gather(torch.stack([self.loss_sum, self.nonfinite])[None]).tolist())
        progress.loss_sum = sum(sums)
        before, progress.nonfinite = progress.nonfinite, int(max(nonfinite))
        if progress.nonfinite and (not before or progress.nonfinite <= len(self.began)):
            progress.nonfinite_since = self.began.get(progress.step - progress.nonfinite + 1, progress.nonfinite_since)
        if self.max_nonfinite and progress.nonfinite >= self.max_nonfinite:
            raise NonFiniteLoss(f'the loss is not finite since {progress.nonfinite_since}, {progress.nonfinite} steps '
                                'in a row')
        return progress.loss_sum / max(progress.images, 1)


@torch.inference_mode()
def validate(
        models: Sequence[nn.Module],
        loader: Iterable,
        task: TrainingTask,
        accelerator: Accelerator,
        channels_last: bool = False,
        model_dtype: Optional[torch.dtype] = None,
        tta: int = 0,
        on_batch: Optional[Callable[[], None]] = None,
) -> List[Dict[str, float]]:
    """Evaluate models over a whole data set, each image read once for all of them and counted once for all processes.

    Args:
        models: The models, such as one with its own batch-norm statistics and one calibrated; put in evaluation mode.
        loader: timm evaluation loader at the size to evaluate at; under several processes a distributed one.
        task: Makes the evaluators that fit the targets.
        accelerator: Owns devices, precision and processes.
        channels_last: As in :func:`train_one_epoch`.
        model_dtype: As in :func:`train_one_epoch`.
        tta: 2 averages the outputs for each image and its mirror image.
        on_batch: Called before each batch.

    Returns:
        What timm's evaluator for the task gives, for each model: ``loss``, and for single labels ``top1`` and ``top5``
        in per cent.
    """
    evaluators = [task.create_evaluator(max_samples=evaluation_sample_limit(loader)) for _ in models]
    for model in models:
        model.eval()
    for images, targets in loader:
        if on_batch is not None:
            on_batch()
        images = to_device(images, accelerator.device, model_dtype)
        targets = targets.to(accelerator.device, non_blocking=True)
        views = [in_format(view, channels_last) for view in ([images, images.flip(-1)] if tta == 2 else [images])]
        for model, evaluator in zip(models, evaluators):
            with accelerator.autocast():
                outputs = [model(view) for view in views]
            outputs = [output[0] if isinstance(output, (tuple, list)) else output for output in outputs]
            evaluator.update(torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0], targets)
    return [evaluator.compute(distributed=accelerator.num_processes > 1) for evaluator in evaluators]
