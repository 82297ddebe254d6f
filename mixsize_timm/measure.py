"""What a model does at an image size: accuracy and its interval, operations, speed."""
import copy
import math
import time
from contextlib import nullcontext
from statistics import median
from typing import Any, Callable, ContextManager, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .bn_stats import BatchNormStats, digest, fingerprint

Z_95 = 1.959964  # of the normal distribution: 95 % lie within so many deviations


def measure_sizes(
        model: nn.Module,
        sizes: Sequence[int],
        validate: Callable[[Sequence[nn.Module], int], List[Dict[str, float]]],
        calibrate: Optional[Callable[[nn.Module, int], nn.Module]] = None,
        *,
        num_images: Optional[int],
        shape: Callable[[int], Tuple[int, int, int]],
        stats: Optional[BatchNormStats] = None,
) -> List[Dict[str, Any]]:
    """Metrics of a model at each of several image sizes.

    Args:
        model: The model.
        sizes: Image sizes in pixels.
        validate: Gives the metrics of each of some models at a size: accuracies in per cent, and ``loss``.
        calibrate: Gives the model calibrated for a size; without it only the model's own statistics are used.
        num_images: Images that are validated on, if that is known: without there is no interval.
        shape: Gives the channels, height and width of an image of a size.
        stats: Gets the statistics of each calibrated size.

    Returns:
        A row for each size: ``img_size``, ``images``, ``gmacs``, the metrics as the model is used, and with
        ``_uncalibrated`` behind their names those with its own statistics; of ``top1`` and ``top5`` with ``_low`` and
        ``_high`` the ends of the 95 % interval; ``statistics``, the :func:`~mixsize_timm.bn_stats.digest` of the
        batch-norm statistics as the model is used.
    """
    rows = []
    for size in sizes:
        models = [model] if calibrate is None else [model, calibrate(model, size)]
        metrics = validate(models, size)
        own, used = metrics[0], metrics[-1]
        if calibrate is not None and stats is not None:
            stats.add(size, models[-1])
        row = {'img_size': size, 'images': num_images, 'gmacs': count_gmacs(model, shape(size)), **used}
        for name in ('top1', 'top5'):
            if name in used and num_images:
                row[f'{name}_low'], row[f'{name}_high'] = accuracy_interval(used[name], num_images)
        rows.append({**row, **{f'{name}_uncalibrated': value for name, value in own.items()},
                     'statistics': digest(models[-1])})
    return rows


def describe_weights(model: nn.Module) -> Dict[str, Any]:
    """What results say about the model that they are of.

    Returns:
        ``weights``, the :func:`~mixsize_timm.bn_stats.fingerprint`; ``statistics``, the
        :func:`~mixsize_timm.bn_stats.digest` of its own statistics; ``num_params``.
    """
    return {'weights': fingerprint(model), 'statistics': digest(model),
            'num_params': sum(parameter.numel() for parameter in model.parameters())}


def accuracy_interval(accuracy: float, num_images: int) -> Tuple[float, float]:
    """The 95 % interval of an accuracy in per cent, by the rule of Wilson (JASA 22, 1927), in per cent.

    It says how far the accuracy on further images of the same kind may lie from that on these ``num_images``, not how
    much another training run would differ.
    """
    if num_images < 1:
        return 0., 100.
    share, z2 = accuracy / 100, Z_95**2 / num_images
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 / (1 + z2) * math.sqrt(share * (1 - share) / num_images + z2 / (4 * num_images))
    return 100 * max(0., centre - half), 100 * min(1., centre + half)


@torch.inference_mode()
def count_gmacs(model: nn.Module, input_size: Tuple[int, int, int] = (3, 224, 224)) -> float:
    """Billions of multiply-accumulates of one image's forward pass.

    Half the operations that PyTorch's ``FlopCounterMode`` counts: those of convolutions, matrix products and
    attention, without what is done element by element. The pass runs on a copy on the meta device, without arithmetic,
    where the model works there, else on the model itself.

    Args:
        model: The model.
        input_size: Channels, height and width of the image.
    """
    counter = FlopCounterMode(display=False)
    try:
        probe: Any = copy.deepcopy(model).to(device='meta', dtype=torch.float32).eval()
        with counter:
            probe(torch.zeros(1, *input_size, device='meta'))
    except Exception:  # whatever it is that a model cannot do on the meta device
        counter, parameter, training = FlopCounterMode(display=False), next(model.parameters()), model.training
        model.eval()
        with counter:
            model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
        model.train(training)
    return counter.get_total_flops() / 2e9


class SavedBytes(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass, beside the parameters and buffers themselves."""
    per_image: float
    constant: float  # whatever the batch, such as weights that are standardised


def count_saved_bytes(
        model: nn.Module,
        input_size: Tuple[int, int, int] = (3, 224, 224),
        *,
        dtype: torch.dtype = torch.float32,
        constant: Optional[float] = None,
) -> SavedBytes:
    """Bytes of activations that training keeps for the backward pass, without compilation.

    Passes of 2 and 4 images run on a copy on the meta device, without arithmetic, where the model works there, else on
    a copy on the CPU. What an operation needs only while it runs is not counted.

    Args:
        model: The model.
        input_size: Channels, height and width of the images.
        dtype: Type that the model calculates in.
        constant: The part that does not depend on the batch, where it is known from another size: one pass less.
    """
    try:
        probe: Any = copy.deepcopy(model).to(device='meta', dtype=dtype).train()
        two = _saved_bytes(probe, torch.zeros(2, *input_size, device='meta', dtype=dtype))
    except Exception:  # whatever it is that a model cannot do on the meta device
        probe = copy.deepcopy(model).to(device='cpu', dtype=dtype).train()
        two = _saved_bytes(probe, torch.zeros(2, *input_size, dtype=dtype))
    if constant is None:
        device = next(probe.parameters()).device
        constant = max(0., 2 * two - _saved_bytes(probe, torch.zeros(4, *input_size, device=device, dtype=dtype)))
    return SavedBytes((two - constant) / 2, constant)


def _saved_bytes(model: nn.Module, images: torch.Tensor) -> float:
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: Dict[int, torch.UntypedStorage] = {}  # held, so that none takes the place of another; each counts once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)  # noqa: F841, holds what is saved
        return float(sum(storage.nbytes() for storage in saved.values()))


def training_cost(
        model: nn.Module,
        cost: Optional[Dict[str, Any]],
        in_chans: int = 3,
        counted: Optional[Mapping[Tuple[int, int, int], float]] = None,
) -> Optional[Dict[str, float]]:
    """What a training run cost.

    Args:
        model: The model.
        cost: A :class:`~mixsize_timm.engine.Progress` as a checkpoint keeps it.
        in_chans: Channels of the images.
        counted: :func:`count_gmacs` by channels, height and width, where it is known already.

    Returns:
        ``steps``, ``seconds``, ``images`` with duplicates, ``megapixels``, and ``gmacs``: billions of
        multiply-accumulates, three times those of the forward pass for each image. ``None`` where nothing was counted.
    """
    if not cost or not cost['counted'] or not cost['samples']:
        return None
    samples = [((in_chans, height, width), number) for height, width, number in cost['samples']]
    gmacs = {shape: count_gmacs(model, shape) for shape, _ in samples if shape not in (counted or ())}
    gmacs.update(counted or {})
    return {
        'steps': cost['steps'], 'seconds': cost['seconds'], 'images': sum(number for _, number in samples),
        'megapixels': sum(height * width * number for (_, height, width), number in samples) / 1e6,
        'gmacs': 3 * sum(number * gmacs[shape] for shape, number in samples)}


@torch.inference_mode()
def measure_speed(
        model: nn.Module,
        images: torch.Tensor,
        *,
        autocast: Callable[[], ContextManager] = nullcontext,
        seconds: float = 1.,
) -> Dict[str, float]:
    """Speed of a model's forward pass on the device that it is on.

    Args:
        model: The model, in evaluation mode.
        images: A batch ``[N, C, H, W]`` on the model's device, in its type and memory format.
        autocast: Context of the passes.
        seconds: How long to measure, at least three passes, behind a warm-up.

    Returns:
        ``images_per_second`` with the whole batch, and ``latency_ms``, the median milliseconds of a batch of one.
    """
    result = {}
    for batch in (images, images[:1]):
        times: List[float] = []
        warm_up = 2
        while len(times) < warm_up + 3 or sum(times[warm_up:]) < seconds:
            _synchronize(images.device)
            start = time.perf_counter()
            with autocast():
                model(batch)
            _synchronize(images.device)
            times.append(time.perf_counter() - start)
        times = times[warm_up:]
        if batch is images:
            result['images_per_second'] = len(images) * len(times) / sum(times)
        else:
            result['latency_ms'] = 1000 * median(times)
    return result


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
