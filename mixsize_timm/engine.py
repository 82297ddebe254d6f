"""The two loops: one epoch of training, and a validation."""
import logging
import sys
import time
from contextlib import nullcontext
from typing import Any, Dict, Iterable, Optional

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from timm.task.evaluator import evaluation_sample_limit
from timm.utils import dispatch_clip_grad
from torch import nn
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
        clip_grad: Optional[float] = None,
        clip_mode: str = 'norm',
        channels_last: bool = False,
        log_interval: int = 50,
) -> Dict[str, float]:
    """Train one epoch.

    The gradient of an optimizer step is the mean over its images: a group's loss counts for its share of them. It is
    averaged over processes (by the backward pass), unscaled, smoothed, clipped and applied, in this order. Smoothing
    comes before clipping, so that the clipping bound is on the step that is taken.

    Args:
        epoch: Epoch, counted from zero.
        task: timm task around the prepared model; its result's ``loss`` is trained.
        loader: Gives ``(images, targets)`` for each group of the plan, in its order.
        plan: The epoch's plan.
        optimizer: The prepared optimizer.
        accelerator: Owns devices, precision and processes.
        smoother: Gradient smoother, if any.
        lr_scheduler: timm scheduler; its ``step_update`` is called after each step.
        mixup_fn: timm mixup for batches that were not mixed by the loader.
        clip_grad: Clipping bound, if any.
        clip_mode: timm's ``norm``, ``value`` or ``agc``.
        channels_last: Hand the model images in channels-last memory format.
        log_interval: Steps between log lines.

    Returns:
        ``loss``: mean over the images of the epoch.
    """
    model: Any = task.get_trainable_module()
    model.train()
    optimizer.zero_grad()
    meter = _StepMeter(epoch, plan, accelerator, log_interval)
    groups = plan.groups(accelerator.process_index, accelerator.num_processes)
    with logging_redirect_tqdm(), meter:
        for (images, targets), group in zip(loader, groups):
            images, targets = images.to(accelerator.device), targets.to(accelerator.device)
            if mixup_fn is not None:
                images, targets = mixup_fn(images, targets)
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with nullcontext() if group.ends_step else accelerator.no_sync(model):
                batch_loss = task(images, targets)['loss']
                accelerator.backward(batch_loss * group.weight)
            meter.add(batch_loss, group)
            if not group.ends_step:
                continue
            norms = _optimizer_step(task, optimizer, accelerator, smoother, clip_grad, clip_mode)
            meter.step(group, norms, optimizer)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=epoch * plan.num_steps + group.step + 1)
    inner = getattr(optimizer, 'optimizer', optimizer)  # Accelerate's wrapper has the methods of torch only
    if hasattr(inner, 'sync_lookahead'):
        inner.sync_lookahead()
    loss = meter.mean_loss()
    if not meter.bar.disable:
        _logger.info('Train %d  loss %.4f', epoch, loss)  # the bar is gone
    return {'loss': loss}


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
    """Losses and speed of an epoch, shown as a progress bar on a terminal and as log lines elsewhere.

    Sums stay on the device; they are read, which waits for it, only where something is shown.
    """

    def __init__(self, epoch: int, plan: EpochPlan, accelerator: Accelerator, log_interval: int) -> None:
        self.epoch = epoch
        self.plan = plan
        self.accelerator = accelerator
        self.log_interval = log_interval
        self.loss_sum = torch.zeros((), device=accelerator.device)
        self.images = self.images_shown = 0
        self.last_shown = time.perf_counter()
        terminal = accelerator.is_local_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=plan.num_steps, desc=f'Epoch {epoch}', leave=False, disable=not terminal)

    def __enter__(self) -> '_StepMeter':
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def add(self, loss: torch.Tensor, group: Group) -> None:
        images = group.batch * group.duplicates
        self.loss_sum += loss.detach() * images
        self.images += images

    def step(self, group: Group, norms: Optional[GradientNorms], optimizer: torch.optim.Optimizer) -> None:
        self.bar.update()
        if group.step % self.log_interval and group.step + 1 != self.plan.num_steps:
            return
        lr = sum(g['lr'] for g in optimizer.param_groups) / len(optimizer.param_groups)
        text = f'{group.size:>4d} px  batch {group.batch:>4d} x{group.duplicates}  loss {self.mean_loss():#.4g}'
        if norms is not None:
            text += f'  norm {norms.norm.item():#.3g} -> {norms.smoothed.item():#.3g}'
        now = time.perf_counter()
        rate = (self.images - self.images_shown) / (now - self.last_shown)
        text += f'  {rate:.1f} images/s  lr {lr:.3e}'
        self.images_shown, self.last_shown = self.images, now
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            _logger.info('Train %d [%4d/%d]  %s', self.epoch, group.step + 1, self.plan.num_steps, text)

    def mean_loss(self) -> float:
        """Mean loss of the epoch so far, over all processes: all of them must call it."""
        return self.accelerator.reduce(self.loss_sum.clone(), 'mean').item() / max(self.images, 1)


@torch.inference_mode()
def validate(
        model: nn.Module,
        loader: Iterable,
        task: TrainingTask,
        accelerator: Accelerator,
        channels_last: bool = False,
) -> Dict[str, float]:
    """Evaluate a model over a whole data set, each image counted once for any number of processes.

    Args:
        model: The model; put in evaluation mode.
        loader: timm evaluation loader at the size to evaluate at; under several processes a distributed one.
        task: Makes the evaluator that fits the targets.
        accelerator: Owns devices and processes.
        channels_last: As in :func:`train_one_epoch`.

    Returns:
        ``loss``, and ``top1`` and ``top5`` in per cent.
    """
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for images, targets in loader:
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output = model(images)
        evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, targets)
    return evaluator.compute(distributed=accelerator.num_processes > 1)
