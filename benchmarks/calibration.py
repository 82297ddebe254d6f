"""How batch norm is best calibrated: which variance, and what serves a size that was not calibrated.

Takes the runs of ``benchmarks/sizes.py`` that were trained at mixed sizes. At the sizes of training it compares the
population variance with the mean of the batches' variances, for batches of 32 and of 4 images; at sizes between them
the statistics of the nearest size, and statistics interpolated linearly between the two neighbours, with calibration
for the very size. Prints the tables and writes JSON.

    python benchmarks/calibration.py --json benchmarks/results/calibration-digits-resnet18-cpu.json
"""
import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from typing import Any, Dict, List, Sequence

import timm
import torch
from accelerate import Accelerator
from sizes import ARMS, FIXED  # benchmarks/sizes.py, beside this file
from timm.task import ClassificationTask
from torch import nn

from mixsize_timm.bn_stats import BatchNormStats, fingerprint
from mixsize_timm.calibration import VARIANCES, calibrate
from mixsize_timm.engine import validate
from mixsize_timm.evaluate import parse_args
from mixsize_timm.models import find_checkpoint
from mixsize_timm.subject import Subject

KNOWN, BETWEEN = (16, 24, 32, 48), (20, 28, 40)
BATCHES = (32, 4)


def measure_run(run: str) -> List[Dict[str, Any]]:
    """Accuracy and loss of one run under every way, at every size."""
    subject = Subject(find_checkpoint(run), parse_args([run]))
    model, data = subject.create(Accelerator(cpu=True))
    data.open(train=True, validation=True)
    task = ClassificationTask(model, verbose=False)
    rows = []

    def record(way: str, size: int, used: nn.Module) -> None:
        metrics, = validate([used], data.validation_loader(size), task, data.accelerator)
        rows.append({'way': way, 'img_size': size, 'top1': metrics['top1'], 'loss': metrics['loss']})

    stats = BatchNormStats(fingerprint(model))
    for size in (*KNOWN, *BETWEEN):
        record('own', size, model)
        for batch in BATCHES if size in KNOWN else BATCHES[:1]:
            data.args.batch_size = batch
            for variance in VARIANCES:
                used = calibrate(model, data.calibration_loader(size), variance=variance)
                record(f'{variance}, batches of {batch}', size, used)
                if size in KNOWN and variance == 'population' and batch == BATCHES[0]:
                    stats.add(size, used)
    for size in BETWEEN:
        record('nearest', size, with_statistics(model, stats.by_size[stats.nearest(size)]))
        low, high = max(s for s in KNOWN if s < size), min(s for s in KNOWN if s > size)
        share = (size - low) / (high - low)
        record('interpolated', size, with_statistics(model, {
            name: tensor + share * (stats.by_size[high][name] - tensor)
            for name, tensor in stats.by_size[low].items()}))
    return rows


def with_statistics(model: nn.Module, tensors: Dict[str, torch.Tensor]) -> nn.Module:
    """A copy of a model with these batch-norm statistics."""
    model = copy.deepcopy(model)
    for name, tensor in tensors.items():
        model.get_buffer(name).copy_(tensor)
    return model


def table(runs: List[Dict[str, Any]], sizes: Sequence[int]) -> str:
    """Means over the seeds, in Markdown: top-1 at each size, and the mean loss."""
    lines = ['| setting | statistics | ' + ' | '.join(f'{size} px' for size in sizes) + ' | mean loss |',
             '|---|---|' + '---|' * (len(sizes) + 1)]
    for setting in dict.fromkeys(run['setting'] for run in runs):
        rows = [row for run in runs if run['setting'] == setting for row in run['results']]
        for way in dict.fromkeys(row['way'] for row in rows if row['img_size'] == sizes[0]):
            own = [row for row in rows if row['way'] == way and row['img_size'] in sizes]
            cells = [f'{statistics.mean(row["top1"] for row in own if row["img_size"] == size):.2f}' for size in sizes]
            loss = statistics.mean(row['loss'] for row in own)
            lines.append(f'| {setting} | {way} | ' + ' | '.join(cells) + f' | {loss:.4f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', default=os.path.join('output', 'sizes'),
                        help='folder that benchmarks/sizes.py filled')
    parser.add_argument('--seeds', type=int, nargs='+', default=[42, 43, 44])
    parser.add_argument('--json', required=True, help='file of the results')
    args = parser.parse_args()
    document: Dict[str, Any] = {
        'command': f'python benchmarks/calibration.py {" ".join(sys.argv[1:])}', 'date': time.strftime('%Y-%m-%d'),
        'machine': f'{platform.machine()}, {os.cpu_count()} CPU cores',
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__},
        'runs': [{'setting': setting, 'seed': seed,
                  'results': measure_run(os.path.join(args.runs, f'{number}-{seed}'))}
                 for number, setting in enumerate(ARMS) if setting != FIXED for seed in args.seeds]}
    with open(args.json, 'w') as file:
        json.dump(document, file, indent=1)
    print(table(document['runs'], KNOWN), table(document['runs'], BETWEEN), sep='\n\n')


if __name__ == '__main__':
    main()
