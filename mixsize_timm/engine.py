"""The two loops: one epoch of training, and a validation."""
import logging
import os
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import dispatch_clip_grad
from torch import nn
from torchvision.utils import save_image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .sampler import EpochPlan, Group
from .smoothing import GradientNorms, GradientSmoother

_logger = logging.getLogger(__name__)


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
        loader: Iterable,
        plan: EpochPlan,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        *,
        smoother: Optional[GradientSmoother] = None,
        lr_scheduler: Any = None,
        mixup_fn: Any = None,
        set_size: Optional[Callable[[int], None]] = None,
        batch_scale: Optional[Callable[[int], Any]] = None,
        clip_grad: Optional[float] = None,
        clip_mode: str = 'norm',
        channels_last: bool = False,
        model_dtype: Optional[torch.dtype] = None,
        synchronize_step: bool = False,
        log_interval: int = 50,
        save_images: str = '',
        on_step: Optional[Callable[[int], None]] = None,
        samples: Optional[Counter] = None,
) -> Dict[str, float]:
    """Train one epoch.

    The gradient of an optimizer step is the mean over its images: a group's loss counts for its share of them. It is
    averaged over processes (by the backward pass), unscaled, smoothed, clipped and applied, in this order. Smoothing
    comes before clipping, so that the clipping bound is on the step that is taken. The moving average of the weights
    follows the optimizer.

    Args:
        epoch: Epoch, counted from zero.
        task: timm task around the prepared model; its result's ``loss`` is trained.
        loader: Gives ``(images, targets)`` for each group of the plan, in its order.
        plan: The epoch's plan.
        optimizer: The prepared optimizer.
        accelerator: Owns devices, precision, processes and trackers.
        smoother: Gradient smoother, if any.
        lr_scheduler: timm scheduler; its ``step_update`` is called after each step.
        mixup_fn: timm mixup for batches that were not mixed by the loader.
        set_size: Called with the image size of each group before it is mixed and trained.
        batch_scale: Factor of the loss of a batch, given its number of images on this process.
        clip_grad: Clipping bound, if any.
        clip_mode: timm's ``norm``, ``value`` or ``agc``.
        channels_last: Hand the model images in channels-last memory format.
        model_dtype: Type of the images that the model takes.
        synchronize_step: Wait for the device after each step.
        log_interval: Steps between log lines.
        save_images: Folder for an image of each logged batch, ``train-batch-N.jpg``.
        on_step: Called with the number of finished steps of the epoch after each of them.
        samples: Counts the images, over all processes, that were trained at each (height, width).

    Returns:
        ``loss``: mean over the images of the epoch.
    """
    model: Any = task.get_trainable_module()
    model.train()
    optimizer.zero_grad()
    inner = getattr(optimizer, 'optimizer', optimizer)  # Accelerate's wrapper has the methods of torch only
    second_order = getattr(inner, 'is_second_order', False)
    meter = _StepMeter(epoch, plan, accelerator, log_interval)
    groups = plan.groups(accelerator.process_index, accelerator.num_processes)
    with logging_redirect_tqdm(), meter:
        for number, ((images, targets), group) in enumerate(zip(loader, groups)):
            if set_size is not None:
                set_size(group.size)
            images, targets = to_device(images, accelerator.device, model_dtype), targets.to(accelerator.device)
            if mixup_fn is not None:
                images, targets = mixup_fn(images, targets)
            images = in_format(images, channels_last)
            weight = group.weight * (batch_scale(len(targets)) if batch_scale is not None else 1)
            with nullcontext() if group.ends_step else accelerator.no_sync(model):
                with accelerator.autocast():
                    batch_loss = task(images, targets)['loss']
                accelerator.backward(batch_loss * weight, create_graph=second_order)
            meter.add(batch_loss, images, targets, group)
            if samples is not None and not isinstance(images, dict):
                samples[tuple(images.shape[-2:])] += len(images) * accelerator.num_processes
            if not group.ends_step:
                continue
            norms = _optimizer_step(task, optimizer, accelerator, smoother, clip_grad, clip_mode)
            updates = epoch * plan.num_steps + group.step + 1
            task.update_ema(step=updates)
            if synchronize_step and accelerator.device.type != 'cpu':
                getattr(torch, accelerator.device.type).synchronize()
            if meter.step(group, norms, optimizer) and save_images and accelerator.is_main_process:
                save_image(images, os.path.join(save_images, f'train-batch-{number}.jpg'), padding=0, normalize=True)
            if on_step is not None:
                on_step(group.step + 1)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=updates)
    if hasattr(inner, 'sync_lookahead'):
        inner.sync_lookahead()
    loss = meter.mean_loss()
    if not meter.bar.disable:
        _logger.info('Train %d  loss %.4f', epoch, loss)  # the bar is gone
    return {'loss': loss}


def to_device(images: Any, device: torch.device, dtype: Optional[torch.dtype] = None) -> Any:
    """Images, or the dictionary that a NaFlex loader gives, on a device; the pixels in a type."""
    if isinstance(images, dict):
        return {key: value.to(device=device, dtype=dtype if key == 'patches' else None)
                if isinstance(value, torch.Tensor) else value for key, value in images.items()}
    return images.to(device=device, dtype=dtype)


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


class _StepMeter:
    """Losses and speed of an epoch: a progress bar on a terminal, log lines elsewhere, and each step for the trackers.

    What is measured stays on the device; it is read, which waits for it, only where something is shown.
    """

    def __init__(self, epoch: int, plan: EpochPlan, accelerator: Accelerator, log_interval: int) -> None:
        self.epoch = epoch
        self.plan = plan
        self.accelerator = accelerator
        self.log_interval = log_interval
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.images = self.images_shown = 0
        self.loss = self.loss_sum
        self.last_shown = time.perf_counter()
        self.unlogged: List[Tuple[Dict[str, float], List[torch.Tensor]]] = []
        terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=plan.num_steps, desc=f'Epoch {epoch}', leave=False, disable=not terminal)

    def __enter__(self) -> '_StepMeter':
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, loss: torch.Tensor, images: Any, targets: torch.Tensor, group: Group) -> None:
        self.loss = loss.detach()
        self.loss_sum += self.loss * len(targets)
        self.images += len(targets) * self.accelerator.num_processes
        naflex = isinstance(images, dict)
        self.size = images['patches'].shape[1] if naflex else images.shape[-1]
        self.unit = 'patches' if naflex else 'px'
        self.batch = len(targets) * self.accelerator.num_processes // group.duplicates

    def step(self, group: Group, norms: Optional[GradientNorms], optimizer: torch.optim.Optimizer) -> bool:
        """Count a step; whether it was shown."""
        self.bar.update()
        lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
        if self.accelerator.trackers:
            self.unlogged.append((
                {'size': self.size, 'batch': self.batch, 'duplicates': group.duplicates, 'step_lr': lr},
                [self.loss, *([] if norms is None else [norms.norm, norms.smoothed])]))
        if group.step % self.log_interval and group.step + 1 != self.plan.num_steps:
            return False
        text = f'{self.size:>4d} {self.unit}  batch {self.batch:>4d} x{group.duplicates}  loss {self.mean_loss():#.4g}'
        if norms is not None:
            text += f'  norm {norms.norm.item():#.3g} -> {norms.smoothed.item():#.3g}'
        now = time.perf_counter()
        rate = (self.images - self.images_shown) / (now - self.last_shown)
        text += f'  {rate:.1f} images/s  lr {lr:.3e}'
        self.images_shown, self.last_shown = self.images, now
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            _logger.info('Train %d [%4d/%d]  %s', self.epoch, group.step + 1, self.plan.num_steps, text)
        self._log_steps(self.epoch * self.plan.num_steps + group.step + 1)
        return True

    def _log_steps(self, last: int) -> None:
        """Hand the trackers the steps up to ``last``, counted over all epochs; one wait for the device."""
        if not self.unlogged:
            return
        names = ('step_loss', 'norm', 'smoothed_norm')
        values = torch.stack([torch.stack([x.float() for x in tensors]) for _, tensors in self.unlogged]).tolist()
        for step, ((known, _), measured) in enumerate(zip(self.unlogged, values), last - len(values) + 1):
            self.accelerator.log({**known, **dict(zip(names, measured))}, step=step)
        self.unlogged = []

    def mean_loss(self) -> float:
        """Mean loss of the epoch so far, over all processes: all of them must call it."""
        mean = self.accelerator.reduce(self.loss_sum.clone(), 'mean').item()
        return mean * self.accelerator.num_processes / max(self.images, 1)


@torch.inference_mode()
def validate(
        model: nn.Module,
        loader: Iterable,
        task: TrainingTask,
        accelerator: Accelerator,
        channels_last: bool = False,
        model_dtype: Optional[torch.dtype] = None,
        tta: int = 0,
) -> Dict[str, float]:
    """Evaluate a model over a whole data set, each image counted once for any number of processes.

    Args:
        model: The model; put in evaluation mode.
        loader: timm evaluation loader at the size to evaluate at; under several processes a distributed one.
        task: Makes the evaluator that fits the targets.
        accelerator: Owns devices, precision and processes.
        channels_last: As in :func:`train_one_epoch`.
        model_dtype: As in :func:`train_one_epoch`.
        tta: 2 averages the outputs for each image and its mirror image.

    Returns:
        What timm's evaluator for the task gives: ``loss``, and for single labels ``top1`` and ``top5`` in per cent.
    """
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for images, targets in loader:
        images, targets = to_device(images, accelerator.device, model_dtype), targets.to(accelerator.device)
        views = [images, images.flip(-1)] if tta == 2 else [images]
        with accelerator.autocast():
            outputs = [model(in_format(view, channels_last)) for view in views]
        outputs = [output[0] if isinstance(output, (tuple, list)) else output for output in outputs]
        evaluator.update(torch.stack(outputs).mean(0) if len(outputs) > 1 else outputs[0], targets)
    return evaluator.compute(distributed=accelerator.num_processes > 1)
