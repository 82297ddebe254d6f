"""What gradient smoothing costs: against a loop that reads the norm of each parameter, and as a part of a step.

    python benchmarks/smoothing.py [--device cuda]

The time of a call is that of many calls in a row, up to where the device has finished. On a GPU a call is also made
with torch's debug mode in which waiting for the device is an error.
"""
import argparse
import time
from statistics import median
from typing import Callable, Dict, Iterable, Optional

import timm
import torch
from common import make_parser, measure, parse_args, print_table, ratio, verdict, write
from timm.optim import create_optimizer_v2

from mixsize_timm.smoothing import GradientSmoother

OURS, LOOP, OFF = 'smoothing', 'loop over parameters', 'off'


class LoopSmoother:
    """The same smoothing, written with a Python number for each parameter."""

    def __init__(self, momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.running_norm: Optional[float] = None

    def __call__(self, parameters: Iterable[torch.Tensor]) -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = sum(grad.norm().item()**2 for grad in grads)**0.5
        if self.running_norm is None:
            self.running_norm = norm
            return
        self.running_norm = self.momentum * self.running_norm + (1 - self.momentum) * norm
        for grad in grads:
            grad.mul_(self.running_norm / (norm + 1e-6))


def synchronize(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], calls: int, device: torch.device) -> Callable[[], float]:
    """An arm: seconds of one of many calls in a row."""
    def run() -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    return run


def make_steps(args: argparse.Namespace, device: torch.device) -> Dict[str, Callable[[], None]]:
    """A training step of the model with each kind of smoothing."""
    model = timm.create_model(args.model).to(device, memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, 'sgd', lr=1e-4, **({'fused': True} if device.type == 'cuda' else {}))
    shape = args.batch_size, 3, args.img_size, args.img_size
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(args.batch_size, dtype=torch.long, device=device)
    smoothers = {OURS: GradientSmoother(), LOOP: LoopSmoother(), OFF: None}

    def step(name: str) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = torch.nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        smoother = smoothers[name]
        if smoother is not None:
            smoother(model.parameters())
        optimizer.step()
        optimizer.zero_grad()

    return {name: (lambda name=name: step(name)) for name in smoothers}


def main() -> None:
    parser = make_parser(__doc__, device=True)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('-b', '--batch-size', type=int, default=4, help='images of the step (on a GPU take 256)')
    parser.add_argument('--calls', type=int, default=10, help='calls of smoothing in a row')
    parser.add_argument('--steps', type=int, default=1, help='training steps in a row')
    args = parse_args(parser, 'smoothing')
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    steps = measure({name: seconds_of(step, args.steps, device) for name, step in make_steps(args, device).items()},
                    args.rounds)
    parameters = list(timm.create_model(args.model).to(device).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    smoother, loop = GradientSmoother(), LoopSmoother()
    waits = None
    if device.type == 'cuda':
        smoother(parameters)
        torch.cuda.set_sync_debug_mode('error')
        smoother(parameters)  # raises an error where it waits
        torch.cuda.set_sync_debug_mode('default')
        waits = 0
    calls = measure({OURS: seconds_of(lambda: smoother(parameters), args.calls, device),
                     LOOP: seconds_of(lambda: loop(parameters), args.calls, device)}, args.rounds)
    share = median(calls[OURS]) / median(steps[OFF])
    cheaper = ratio(calls, LOOP, OURS)
    write(args, {'seconds_of_a_call': calls, 'seconds_of_a_step': steps, 'share_of_a_step': share,
                 'loop_over_smoothing': cheaper, 'waits_in_a_call': waits})
    on_gpu = device.type == 'cuda'  # what is wanted is of a GPU
    print_table(['', 'call, ms', 'step, ms', 'step over off', 'wanted'], [
        [OURS, 1e3 * median(calls[OURS]), 1e3 * median(steps[OURS]), ratio(steps, OURS, OFF),
         f'share of a step {share:.3%}' + (f', {verdict(share, at_most=0.01)}' if on_gpu else '')],
        [LOOP, 1e3 * median(calls[LOOP]), 1e3 * median(steps[LOOP]), ratio(steps, LOOP, OFF),
         f'{cheaper:.1f} times as dear' + (f', {verdict(cheaper, at_least=20)}' if on_gpu else '')],
        [OFF, None, 1e3 * median(steps[OFF]), 1., '']])


if __name__ == '__main__':
    main()
