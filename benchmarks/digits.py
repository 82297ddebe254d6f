"""ResNet-50 on the embedded digits: MixSize beside timm's fixed and scheduled sizes.

The first arm is the README's first command; the others are timm's own loaders with the same recipe. Each is measured
at 16, 24, 32 and 48 px, with its own running statistics and with calibrated ones. Prints a table, and adds to a JSON
file after each run, so that it can be stopped and continued.

    python benchmarks/digits.py --json benchmarks/results/digits-resnet50-cpu.json --plot docs/digits.png
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List

import accelerate
import timm
import torch

from mixsize_timm.args import make_regime, parse_args
from mixsize_timm.curves import make_curves
from mixsize_timm.datasets import DigitsDataset
from mixsize_timm.measure import count_gmacs
from mixsize_timm.plots import save_against_size
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import plan_epoch
from mixsize_timm.train import Training

SIZES = (16, 24, 32, 48)
MIXSIZE = 'MixSize D+'
OFF = ['--mixsize', 'off', '--no-grad-smoothing']
TIMM_ARMS = {
    'timm, fixed 32 px': OFF,
    'timm, scheduled sizes': OFF,
    'timm, scheduled sizes, twice the epochs': [*OFF, '--epochs', '14'],
}
ARMS = (MIXSIZE, *TIMM_ARMS)
PLOTTED = (MIXSIZE, 'timm, fixed 32 px', 'timm, scheduled sizes')


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


def train_mixsize(model: str, seed: int) -> Dict[str, Any]:
    """Run the README's first command with a seed, and read what it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ['--model', model, '--seed', str(seed)]
        start = time.time()
        subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '-m', 'mixsize_timm.train', *argv,
                        '--output', folder, '--experiment', 'run'], check=True)
        seconds = time.time() - start
        with open(os.path.join(folder, 'run', 'sizes.json')) as file:
            results = json.load(file)['checkpoints'][0]['results']
    args = parse_args(argv)
    regime = make_regime(args, (3, args.img_size, args.img_size))
    plan = plan_epoch(regime, len(DigitsDataset('train')), seed=seed)
    pixels = int((plan.size**2 * plan.batch * plan.duplicates).sum())
    return {'argv': argv, 'steps': plan.num_steps * args.epochs, 'megapixels': pixels * args.epochs / 1e6,
            'seconds': seconds, 'results': results}


def train_timm(arm: str, model: str, seed: int) -> Dict[str, Any]:
    """Train with timm's fixed or scheduled sizes, without smoothing, and measure as a MixSize run is measured."""
    start = time.time()
    argv = ['--model', model, '--seed', str(seed), *TIMM_ARMS[arm]]
    with tempfile.TemporaryDirectory() as folder:
        training = Training(parse_args([*argv, '--output', folder]))
        if 'scheduled' in arm:
            training.data.loader = scheduled_loader(training)
            training.data.num_steps = len(training.data.loader)
            training.lr_scheduler = timm.scheduler.create_scheduler_v2(  # anew, for it counts in steps
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
    return {'argv': argv, 'steps': spent['steps'], 'megapixels': spent['pixels'] / 1e6,
            'seconds': time.time() - start, 'results': results}


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
            steps, pixels = (statistics.mean(run[key] for run in own) for key in ('steps', 'megapixels'))
            lines.append(f'| {arm} | {steps:.0f} | {pixels:.1f} | {name} | {cells} |')
    return '\n'.join(lines)


def plot(runs: List[Dict[str, Any]], path: str) -> None:
    """Accuracy against image size, calibrated and not, the mean over the seeds between the lowest and the highest."""
    model = timm.create_model(runs[0]['model'], num_classes=10)
    gmacs = {size: count_gmacs(model, (3, size, size)) for size in SIZES}
    save_against_size(path, make_curves([
        {'name': run['arm'], 'calibrated': 1,
         'results': [{**row, 'gmacs': gmacs[row['img_size']]} for row in run['results']]} for run in runs]), 'top-1')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--arms', nargs='+', default=ARMS, choices=ARMS)
    parser.add_argument('--plot', metavar='FILE', help='file of a plot')
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
    for arm in args.arms:
        for seed in args.seeds:
            if any((r['arm'], r['model'], r['seed']) == (arm, args.model, seed) for r in document['runs']):
                continue
            run = train_mixsize(args.model, seed) if arm == MIXSIZE else train_timm(arm, args.model, seed)
            document['runs'].append({'arm': arm, 'model': args.model, 'seed': seed, **run})
            with open(args.json, 'w') as file:
                json.dump(document, file, indent=1)
    runs = [run for run in document['runs'] if run['model'] == args.model]
    print(table(runs))
    if args.plot:
        plot([run for run in runs if run['arm'] in PLOTTED], args.plot)


if __name__ == '__main__':
    main()
