"""ResNet-50 on the embedded digits: MixSize beside timm's fixed and scheduled sizes.

Each arm trains with the built-in recipe and is measured at 16, 24, 32 and 48 px, with its own running statistics and
with calibrated ones. Prints a table, and adds to a JSON file after each run, so that it can be stopped and continued.

    python benchmarks/digits.py --seeds 42 43 44 --json benchmarks/results/digits.json
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any, Dict, List

import accelerate
import timm
import torch

from mixsize_timm.args import parse_args
from mixsize_timm.regime import Regime
from mixsize_timm.train import Training

SIZES = (16, 24, 32, 48)
TIMM = ['--mixsize', 'off', '--no-grad-smoothing']
ARMS: Dict[str, List[str]] = {
    'MixSize D+': [],
    'timm, fixed 32 px': TIMM,
    'timm, scheduled sizes': TIMM,
    'timm, scheduled sizes, pixels of D+': [*TIMM, '--epochs', '12'],
}


def scheduled_loader(training: Training) -> Any:
    """timm's own loader of scheduled sizes, with the sizes, weights and batches that the regime has for B+."""
    args, data = training.args, training.data
    regime = Regime.preset('cifar', data.base_size, batch_size=args.batch_size, adapt='b+')
    return timm.data.create_loader(
        data.train, data.config['input_size'], args.batch_size, mean=data.config['mean'], std=data.config['std'],
        num_workers=args.workers, device=training.accelerator.device, input_size_choices=regime.sizes,
        batch_size_choices=[regime.group(size)[0] for size in regime.sizes], batch_choice_weights=regime.probs,
        batch_choice_seed=args.seed, is_training=True, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        color_jitter=args.color_jitter, interpolation=args.train_interpolation)


def train(arm: str, model: str, seed: int) -> Dict[str, Any]:
    """Train one arm with one seed and measure it."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        argv = ['--model', model, '--seed', str(seed), '--output', folder, '--calibrate-val', '0', *ARMS[arm]]
        training = Training(parse_args(argv))
        if 'scheduled' in arm:
            training.data.loader = scheduled_loader(training)
            training.data.num_steps = len(training.data.loader)
            # the schedule of the learning rate is in steps: make it anew
            training.lr_scheduler = timm.scheduler.create_scheduler_v2(
                training.optimizer, **timm.scheduler.scheduler_kwargs(training.args),
                updates_per_epoch=training.data.num_steps)[0]
        spent = {'steps': 0, 'pixels': 0}

        def count(_: Any, inputs: Any) -> None:
            images = inputs[0]
            spent['steps'] += 1
            spent['pixels'] += images.shape[0] * images.shape[2] * images.shape[3]

        training.task.register_forward_pre_hook(count)
        training.run()
        results = training.measure(SIZES)
    return {'arm': arm, 'model': model, 'seed': seed, 'argv': argv[:4] + argv[6:], 'steps': spent['steps'],
            'megapixels': spent['pixels'] / 1e6, 'seconds': time.time() - start, 'results': results}


def table(runs: List[Dict[str, Any]]) -> str:
    """Means over the seeds, in Markdown."""
    lines = ['| arm | steps | megapixels | statistics | ' + ' | '.join(f'{s} px' for s in SIZES) + ' | mean | lowest |',
             '|---|---|---|---|' + '---|' * (len(SIZES) + 2)]
    for arm in ARMS:
        own = [run for run in runs if run['arm'] == arm]
        for key, name in (('top1_uncalibrated', 'running'), ('top1', 'calibrated')) if own else ():
            grid = [[row[key] for row in run['results']] for run in own]
            means = [statistics.mean(column) for column in zip(*grid)]
            cells = ' | '.join(f'{x:.2f}' for x in (*means, statistics.mean(means), min(map(min, grid))))
            lines.append(f'| {arm} | {own[0]["steps"]} | {own[0]["megapixels"]:.1f} | {name} | {cells} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    parser.add_argument('--json', required=True, help='file to add the runs to; what stands in it is not run again')
    args = parser.parse_args()
    document: Dict[str, Any] = {'runs': []}
    if os.path.exists(args.json):
        with open(args.json) as file:
            document = json.load(file)
    document.update(
        command=f'python benchmarks/digits.py {" ".join(sys.argv[1:])}',
        machine=f'{platform.machine()}, {os.cpu_count()} CPU cores', date=time.strftime('%Y-%m-%d'),
        versions={'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                  'accelerate': accelerate.__version__})
    for seed in args.seeds:
        for arm in args.arms:
            if any((r['arm'], r['model'], r['seed']) == (arm, args.model, seed) for r in document['runs']):
                continue
            document['runs'].append(train(arm, args.model, seed))
            with open(args.json, 'w') as file:
                json.dump(document, file, indent=1)
    print(table([run for run in document['runs'] if run['model'] == args.model]))


if __name__ == '__main__':
    main()
