"""Steps that do not fit into memory, trained in parts."""
import logging
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from timm.task import TrainingTask

from .engine import in_format
from .errors import UsageError
from .randomness import own_randomness

_logger = logging.getLogger(__name__)

OPTIMIZER_COPIES = 2  # of the weights, that an optimizer's state takes: as much as Adam's


def scaled_by_area(images: int, base_size: int) -> Callable[[int], int]:
    """Images of a size in pixels that make as many pixels as ``images`` of the base size, at least 1."""
    return lambda size: max(1, int(images * (base_size / size) ** 2))


def fit_micro_batches(
        task: TrainingTask,
        largest: Mapping[int, int],
        accelerator: Accelerator,
        *,
        in_chans: int = 3,
        soft_targets: bool = False,
        num_classes: int = 1000,
        channels_last: bool = False,
        dtype: Optional[torch.dtype] = None,
) -> Dict[int, int]:
    """Find out by trial how many images of each size a process can train at once.

    A forward and a backward pass are tried with the whole batch, and with half of it for as long as memory does not
    do, beside room for the optimizer's state. Weights, buffers and random states are as before. Called by every
    process; the least of all counts.

    Args:
        task: timm task around the prepared model.
        largest: For each size in pixels the images, with duplicates, of the largest batch that a process may have.
        accelerator: Owns devices, precision and processes.
        in_chans: Channels of the images.
        soft_targets: Whether targets are vectors of ``num_classes`` numbers.
        num_classes: Number of classes.
        channels_last: Memory format of the images.
        dtype: Type of the images.

    Returns:
        For each size in pixels the number of images.

    Raises:
        UsageError: A single image of a size does not fit.
    """
    def attempt(size: int, number: int) -> None:
        images = torch.zeros(number, in_chans, size, size, device=accelerator.device, dtype=dtype)
        targets = torch.zeros(number, num_classes) if soft_targets else torch.zeros(number, dtype=torch.long)
        with accelerator.autocast():
            loss = task(in_format(images, channels_last), targets.to(accelerator.device))['loss']
        loss.backward()

    result = {}
    for size in sorted(largest):
        fitting = torch.tensor([_fitting(task, partial(attempt, size), largest[size], accelerator.device)])
        number = int(accelerator.gather(fitting.to(accelerator.device)).min())
        if not number:
            raise UsageError(f'not even one image of {size} px fits into memory: choose a smaller model or size')
        if number < largest[size]:
            _logger.info('%d px: a batch of %d images a process is trained in parts of %d', size, largest[size], number)
        result[size] = number
    return result


def _fitting(task: TrainingTask, attempt: Callable[[int], None], number: int, device: torch.device) -> int:
    """The most images, halving ``number``, with which an attempt does not run out of memory; 0 for none."""
    prepared: Any = task.get_trainable_module()
    module = getattr(prepared, 'module', prepared)  # without data parallelism, which would wait for other processes
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    task.trainable_module = module.train()
    try:
        with own_randomness(device=device):
            while number:
                try:
                    room = [torch.empty_like(p) for p in module.parameters() for _ in range(OPTIMIZER_COPIES)]
                    attempt(number)
                    return number
                except RuntimeError as error:
                    if not should_reduce_batch_size(error):
                        raise
                    number = -(-number // 2) if number > 1 else 0
                finally:
                    room = []  # noqa: F841
                    module.zero_grad(set_to_none=True)
                    clear_device_cache(garbage_collection=True)
        return 0
    finally:
        task.trainable_module = prepared
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
