"""ResNet-18 on the embedded digits: four settings of equal steps and pixels, measured at 16, 24, 32 and 48 px.

Trains each setting with three seeds, then has ``mixsize evaluate`` measure all of them, with calibrated statistics and
with their own, and write its report. A run that is finished is not trained again, so the command can be stopped and
continued.

    python benchmarks/sizes.py --report docs/sizes
"""
import argparse
import json
import os
import subprocess
import sys
from statistics import mean
from typing import Any, Dict

FIXED = 'timm, fixed 32 px'
# Settings by name: what they are trained with. Epochs differ so that steps, of about equal pixels each, do not.
ARMS = {
    'MixSize D+': ['--mixsize-adapt', 'd+', '--epochs', '10'],
    'MixSize B+': ['--mixsize-adapt', 'b+', '--epochs', '12'],
    'timm, scheduled sizes': ['--train-img-sizes', '16', '24', '32', '48', '--train-size-probs', '0.2', '0.3', '0.3',
                              '0.2', '--train-batch-sizes', '128', '57', '32', '14',
                              '--train-batches-per-epoch', '25', '--no-grad-smoothing', '--epochs', '23'],
    FIXED: ['--mixsize', 'off', '--no-grad-smoothing', '--epochs', '13'],
}
SIZES = ('16', '24', '32', '48')


def table(document: Dict[str, Any]) -> str:
    """The report's accuracies, in Markdown: means over the seeds, and the lowest single one."""
    lines = ['| setting | steps | megapixels | statistics | ' + ' | '.join(f'{size} px' for size in SIZES)
             + ' | mean | lowest |', '|---|---|---|---|' + '---|' * (len(SIZES) + 2)]
    for name in ARMS:
        runs = [run for run in document['checkpoints'] if run['name'] == name]
        steps, pixels = (mean(run['training'][key] for run in runs) for key in ('steps', 'megapixels'))
        for key, statistics in (('top1_uncalibrated', 'own'), ('top1', 'calibrated')):
            grid = [[row[key] for row in run['results']] for run in runs]
            means = [mean(column) for column in zip(*grid)]
            cells = ' | '.join(f'{x:.2f}' for x in (*means, mean(means), min(map(min, grid))))
            lines.append(f'| {name} | {steps:.0f} | {pixels:.1f} | {statistics} | {cells} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--runs', default=os.path.join('output', 'sizes'), help='folder of the runs')
    parser.add_argument('--report', required=True, help='folder of the report; one that is there is replaced')
    args = parser.parse_args()
    runs, names = [], []
    for number, (name, options) in enumerate(ARMS.items()):
        for seed in args.seeds:
            run = os.path.join(args.runs, f'{number}-{seed}')
            runs.append(run)
            names.append(name)
            if not os.path.exists(os.path.join(run, 'sizes.json')):
                subprocess.run([sys.executable, '-m', 'mixsize_timm.train', '--model', 'resnet18', '--seed', str(seed),
                                *options, '--output', args.runs, '--experiment', os.path.basename(run),
                                '--resume', 'auto'], check=True)
    subprocess.run([sys.executable, '-m', 'mixsize_timm.evaluate', *runs, '--names', *names, '--baseline', FIXED,
                    '--sizes', *SIZES, '--output', args.report, '--overwrite'], check=True)
    with open(os.path.join(args.report, 'sizes.json')) as file:
        print(table(json.load(file)))


if __name__ == '__main__':
    main()
