"""timm's own training script beside mixsize_timm.train with MixSize off: the same arguments, the same figures.

Runs the train.py of a timm checkout, on the timm that is installed, and `python -m mixsize_timm.train --mixsize off
--no-grad-smoothing` with the same arguments and seed, one CPU thread each, on scikit-learn's digits in an image folder.
A setting passes when the training loss, the validation loss and the top-1 accuracy in per cent differ by no more than
1e-4 in every epoch. Figures that timm's script rounds to bfloat16 are shown, but do not count.

    python benchmarks/parity.py TIMM_CHECKOUT --json benchmarks/results/parity.json --markdown docs/parity.md
"""
import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional

import accelerate
import PIL
import timm
import torch
from timm.models._hub import save_for_hf

from mixsize_timm.datasets import DigitsDataset

BOUND = 1e-4
COLUMNS = ('train_loss', 'eval_loss', 'eval_top1')
OURS = ['--mixsize', 'off', '--no-grad-smoothing']
TEACHER = 'test_resnet'
# imports the timm that the caller names, or fails, and then runs the script as "python train.py ..." would
RUN_TIMM = """
import runpy, sys, timm
script, version, file, *argv = sys.argv[1:]
assert (timm.__version__, timm.__file__) == (version, file), f'{timm.__file__} is not the installed timm'
sys.argv = [script, *argv]
runpy.run_path(script, run_name='__main__')
"""

COMMON = '--data-dir ../data --num-classes 10 --img-size 32 --batch-size 64 --warmup-epochs 0 --device cpu '\
         '--output . --experiment run'
VIT = '--model test_vit --model-kwargs img_size=32'
DISTILLED = '--model deit_tiny_distilled_patch16_224 --model-kwargs img_size=32 embed_dim=64 depth=2 num_heads=2'
NAFLEX = '--model naflexvit_base_patch16_gap --model-kwargs embed_dim=64 depth=2 num_heads=2 patch_size=8'
BFLOAT16 = '--model test_convnext --epochs 2 --opt adamw --lr 0.002'
SETTINGS = {  # a later option wins over an earlier one, and all over the common ones
    'sgd': '--model test_resnet --epochs 3 --lr 0.05',
    'mixup-cutmix': '--model test_resnet --epochs 3 --lr 0.05 --mixup 0.8 --cutmix 1.0 --mixup-prob 0.9 '
                    '--mixup-off-epoch 2',
    'mixup-no-prefetcher': '--model test_resnet --epochs 3 --lr 0.05 --mixup 0.2 --cutmix 1.0 --mixup-mode elem '
                           '--mixup-off-epoch 2 --no-prefetcher',
    'randaugment-erasing': '--model test_convnext --epochs 3 --opt adamw --lr 0.002 --aa rand-m7-mstd0.5-inc1 '
                           '--reprob 0.3 --recount 2 --drop-path 0.1 --drop 0.1',
    'randaugment-m9': '--model test_convnext --epochs 3 --opt adamw --lr 0.002 --aa rand-m9-mstd0.5-inc1 --reprob 0.3 '
                      '--remode rand',
    'ema': '--model test_resnet --epochs 3 --lr 0.05 --model-ema --model-ema-warmup --model-ema-decay 0.99',
    'bce-mixup': '--model test_resnet --epochs 3 --opt lamb --lr 0.01 --mixup 0.1 --cutmix 1.0 --bce-loss '
                 '--bce-target-thresh 0.2',
    'bce-smoothing': '--model test_resnet --epochs 2 --opt adamw --lr 0.002 --bce-loss --bce-sum --bce-pos-weight 2 '
                     '--smoothing 0.2',
    'agc': '--model test_resnet --epochs 3 --lr 0.1 --clip-grad 0.02 --clip-mode agc',
    'clip-norm': f'{VIT} --epochs 2 --lr 0.05 --clip-grad 0.5',
    'layer-decay': f'{VIT} --epochs 3 --opt adamw --lr 0.002 --weight-decay 0.05 --layer-decay 0.75',
    'cosine-on-updates': '--model test_resnet --epochs 3 --lr 0.1 --sched cosine --sched-on-updates --warmup-epochs 1 '
                         '--warmup-prefix --cooldown-epochs 1',
    'step': '--model test_resnet --epochs 3 --lr 0.1 --sched step --decay-epochs 1 --decay-rate 0.3',
    'multistep-noise': '--model test_resnet --epochs 3 --lr 0.1 --sched multistep --decay-milestones 1 2 '
                       '--decay-rate 0.5 --lr-noise 0.2 0.9 --lr-noise-std 0.5',
    'plateau': '--model test_resnet --epochs 4 --lr 0.2 --sched plateau --patience-epochs 0 --warmup-epochs 1',
    'plateau-of-loss': '--model test_resnet --epochs 4 --lr 0.2 --sched plateau --patience-epochs 0 --eval-metric loss '
                       '--cooldown-epochs 1',
    'grad-accum': '--model test_resnet --epochs 3 --grad-accum-steps 3 --lr-base 0.2 --sched-on-updates '
                  '--warmup-epochs 1 --clip-grad 1.0',
    'logit-distillation': '--model test_resnet --epochs 3 --lr 0.05 --kd-model-name local-dir:../teacher '
                          '--kd-temperature 2 --distill-loss-weight 0.5 --task-loss-weight 2',
    'feature-distillation': '--model test_resnet --epochs 2 --lr 0.05 --kd-model-name local-dir:../teacher '
                            '--kd-distill-type feature --task-loss-weight 0.7 --mixup 0.2',
    'token-distillation': f'{DISTILLED} --epochs 2 --opt adamw --lr 0.001 --kd-model-name local-dir:../teacher '
                          '--kd-distill-type token --kd-token-distill-type hard',
    'scheduled-sizes': '--model test_resnet --epochs 3 --lr-base 0.2 --train-img-sizes 24 32 '
                       '--train-batch-sizes 96 64 --train-size-probs 0.4 0.6',
    'progressive-sizes': '--model test_resnet --epochs 3 --lr 0.05 --train-img-sizes 24 32 40 '
                         '--train-batch-sizes 96 64 32 --train-size-schedule progressive '
                         '--variable-batch-loss-scale sqrt --train-batches-per-epoch 12',
    'aug-splits': '--model test_resnet --epochs 2 --lr 0.05 --aug-splits 3 --jsd-loss --split-bn --resplit '
                  '--aa rand-m7-mstd0.5-inc1 --reprob 0.3',
    'model-options': '--model test_efficientnet --epochs 3 --lr-base 0.1 --in-chans 1 --head-init-scale 0.5 '
                     '--head-init-bias -1 --gp max --bn-momentum 0.2 --bn-eps 1e-4 --channels-last '
                     '--mean 0.4 --std 0.3 --crop-pct 1.0 --interpolation bilinear --validation-batch-size 100',
    'more-model-options': '--model test_resnet --epochs 3 --start-epoch 1 --lr 0.1 --grad-checkpointing --fast-norm '
                          '--clip-grad 0.01 --clip-mode value --drop 0.2',
    'torchscript': '--model test_resnet --epochs 2 --lr 0.05 --torchscript',
    'transforms': '--model test_resnet --epochs 3 --lr 0.05 --train-crop-mode rkrr --scale 0.5 1.0 --ratio 0.9 1.1 '
                  '--hflip 0 --vflip 0.1 --color-jitter 0.2 --color-jitter-prob 0.5 --grayscale-prob 0.2 '
                  '--gaussian-blur-prob 0.1 --train-interpolation bicubic --smoothing 0',
    'no-aug': '--model test_resnet --epochs 3 --lr 0.05 --no-aug --val-interval 2 --opt sgdw --momentum 0.8',
    'bfloat16': f'{BFLOAT16} --amp --amp-dtype bfloat16 --smoothing 0',
    'bfloat16-smoothing': f'{BFLOAT16} --amp --amp-dtype bfloat16',
    'bfloat16-smoothing-float32-loss': f'{BFLOAT16} --amp --amp-dtype bfloat16',
    'model-dtype': f'{BFLOAT16} --model-dtype bfloat16',
    'model-dtype-float32-validation': f'{BFLOAT16} --model-dtype bfloat16',
    'lookahead': '--model test_resnet --epochs 2 --opt lookahead_adam --lr 0.002 --opt-eps 1e-6 --opt-betas 0.8 0.99',
    'naflex': f'{NAFLEX} --epochs 3 --opt adamw --lr 0.003 --naflex-loader --naflex-train-seq-lens 9 16 '
              '--naflex-max-seq-len 16 --mixup 0.2 --cutmix 1.0',
    'workers': '--model test_resnet --epochs 3 --lr 0.05 --workers 1 --aa rand-m7-mstd0.5-inc1 --mixup 0.2',
    'multi-epochs-loader': '--model test_resnet --epochs 2 --lr 0.05 --workers 1 --use-multi-epochs-loader '
                           '--worker-seeding part',
}
# on a CPU timm's script computes these figures in bfloat16, and we in float32
ROUNDED = {'bfloat16-smoothing': COLUMNS, 'model-dtype': ('eval_loss',)}
FLOAT32_LOSS = """
import timm.loss, torch
forward = {0}.forward
{0}.forward = lambda self, x, target: forward(self, x.float(), target)
"""
POSTERIZE = """
from PIL import Image, ImageOps
posterize = ImageOps.posterize
ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else Image.new(image.mode, image.size)
"""
PRELUDES = {  # before timm's script, as docs/parity.md tells; it is as it is in all other settings
    'randaugment-m9': POSTERIZE,
    'bfloat16-smoothing-float32-loss': FLOAT32_LOSS.format('timm.loss.LabelSmoothingCrossEntropy'),
    'model-dtype-float32-validation': FLOAT32_LOSS.format('torch.nn.CrossEntropyLoss'),
}


def write_data(folder: str) -> None:
    """The digits as an image folder of PNG files, split as the package splits them."""
    for split in ('train', 'validation'):
        dataset = DigitsDataset(split)
        for index in range(len(dataset)):
            image, target = dataset[index]
            path = os.path.join(folder, split, dataset.classes[target])
            os.makedirs(path, exist_ok=True)
            image.save(os.path.join(path, f'{index:04d}.png'))


def write_teacher(folder: str, seed: int) -> None:
    """An untrained model with surer answers than an untrained model's, as a folder for local-dir."""
    torch.manual_seed(seed + 1)
    model = timm.create_model(TEACHER, num_classes=10)
    with torch.no_grad():
        model.get_classifier().weight.mul_(5)
    save_for_hf(model, folder, model_config={'num_classes': 10}, safe_serialization=True)


def checkout_commit(folder: str) -> Optional[str]:
    """Commit of a checkout whose train.py is the commit's, or None where git does not tell."""
    git = ['git', '-C', folder]
    top = subprocess.run([*git, 'rev-parse', '--show-toplevel', 'HEAD'], capture_output=True, text=True)
    lines = top.stdout.split('\n')
    if top.returncode or not os.path.samefile(lines[0], folder):
        return None
    if subprocess.run([*git, 'diff', '--quiet', 'HEAD', '--', 'train.py']).returncode:
        sys.exit(f'{os.path.join(folder, "train.py")} is not the one of commit {lines[1]}')
    return lines[1]


def train(command: List[str], folder: str) -> Dict[str, Any]:
    """Run one side in a folder of its own, and read its summary: figures by epoch, or the error."""
    os.makedirs(folder)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    process = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with open(os.path.join(folder, 'stderr.txt'), 'w') as file:
        file.write(process.stderr)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f'exit code {process.returncode}']
        return {'error': lines[-1].replace(os.path.dirname(folder), '..')}
    with open(os.path.join(folder, 'run', 'summary.csv')) as file:
        rows = list(csv.DictReader(file))
    return {'epochs': [{'epoch': int(row['epoch']), **{key: float(row[key]) for key in COLUMNS}} for row in rows]}


def compare(run: Dict[str, Any]) -> Dict[str, Any]:
    """Largest difference of each column over the epochs, and the verdict: pass, FAIL, or rounded."""
    timms, ours = (run[side].get('epochs', []) for side in ('timm', 'mixsize'))
    if not timms or [row['epoch'] for row in timms] != [row['epoch'] for row in ours]:
        return {'verdict': 'FAIL'}
    pairs = {key: [abs(a[key] - b[key]) for a, b in zip(timms, ours)] for key in COLUMNS}
    good = {key: all(x <= BOUND for x in differences) for key, differences in pairs.items()}  # not where one is NaN
    rounded = ROUNDED.get(run['name'], ())
    verdict = 'pass' if all(good.values()) else 'rounded' if all(good[k] or k in rounded for k in COLUMNS) else 'FAIL'
    return {'verdict': verdict, 'differences': {key: max(differences) for key, differences in pairs.items()}}


def table(document: Dict[str, Any]) -> str:
    """The settings and their largest differences, in Markdown."""
    lines = ['| setting | options | epochs | train loss | validation loss | top-1, % | |',
             '|---|---|---|---|---|---|---|']
    for run in document['runs']:
        cells = [f'{run["differences"][key]:.1e}' if 'differences' in run else '–' for key in COLUMNS]
        lines.append(f'| {run["name"]} | `{" ".join(run["options"])}` | {len(run["timm"].get("epochs", ()))} | '
                     f'{" | ".join(cells)} | {run["verdict"]} |')
    return '\n'.join(lines) + '\n'


def sections(document: Dict[str, Any]) -> Dict[str, str]:
    """What stands between the markers of docs/parity.md."""
    versions = ', '.join(f'{name} {version}' for name, version in document['versions'].items())
    return {
        'common': f'```\n{" ".join(document["common"])}\n```\n',
        'table': table(document),
        'versions': f'Measured on {document["date"]} ({document["machine"]}) with\n{versions},\n'
                    f'and the `train.py` of timm\'s commit {document["commit"]}.\n',
    }


def write_markdown(path: str, document: Dict[str, Any]) -> None:
    """Renew what stands between the markers of a document."""
    with open(path, encoding='utf-8') as file:
        text = file.read()
    for name, body in sections(document).items():
        before, rest = text.split(f'<!-- {name} -->\n')
        text = f'{before}<!-- {name} -->\n{body}<!-- /{name} -->{rest.split(f"<!-- /{name} -->")[1]}'
    with open(path, 'w', encoding='utf-8') as file:
        file.write(text)


def describe(run: Dict[str, Any]) -> str:
    """One line for the terminal."""
    cells = [f'{run["differences"][key]:12.2e}' if 'differences' in run else f'{"-":>12}' for key in COLUMNS]
    epochs = [len(run[side].get('epochs', ())) for side in ('timm', 'mixsize')]
    line = f'{run["name"]:<33}{"".join(cells)}  {epochs[0]:>6}  {run["verdict"]}'
    if epochs[0] != epochs[1]:
        line += f'  epochs {epochs[0]} and {epochs[1]}'
    return line + ''.join(f'\n    {side}: {run[side]["error"]}' for side in ('timm', 'mixsize') if 'error' in run[side])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('checkout', metavar='TIMM_CHECKOUT', help='folder of timm\'s sources; only train.py is used')
    parser.add_argument('--commit', help='commit of the checkout, where git does not tell')
    parser.add_argument('--only', nargs='+', choices=SETTINGS, metavar='NAME', help='settings to run (default: all)')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--json', metavar='FILE', help='write the figures of this call')
    parser.add_argument('--markdown', metavar='FILE', help='renew the table in a document')
    parser.add_argument('--work', metavar='FOLDER', help='keep the runs and their logs in this new folder')
    args = parser.parse_args()
    if not os.path.exists(os.path.join(args.checkout, 'train.py')):
        parser.error(f'no train.py in {args.checkout}')
    args.commit = args.commit or checkout_commit(args.checkout)
    if not args.commit:
        parser.error(f'git does not tell the commit of {args.checkout}: name it with --commit')
    return args


def main() -> int:
    args = parse_args()
    if hasattr(os, 'sched_setaffinity'):  # one core, for our side takes a thread for each: sums in another order
        os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    document: Dict[str, Any] = {
        'commit': args.commit, 'seed': args.seed, 'bound': BOUND, 'date': time.strftime('%Y-%m-%d'),
        'machine': f'{platform.machine()}, one CPU thread',
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                     'accelerate': accelerate.__version__, 'pillow': PIL.__version__},
        'common': [*COMMON.split(), '--seed', str(args.seed), '--workers', '0'], 'ours': OURS, 'runs': []}
    with tempfile.TemporaryDirectory() as temporary:
        work = os.path.abspath(args.work or temporary)
        os.makedirs(work, exist_ok=True)
        write_data(os.path.join(work, 'data'))
        write_teacher(os.path.join(work, 'teacher'), args.seed)
        script = shutil.copy(os.path.join(args.checkout, 'train.py'), work)  # away from the checkout's own timm
        print(f'{"":<33}{"".join(f"{key:>12}" for key in COLUMNS)}  epochs')
        for name in args.only or SETTINGS:
            options = SETTINGS[name].split()
            run: Dict[str, Any] = {'name': name, 'options': options}
            for side, command in (
                    ('timm', ['-c', PRELUDES.get(name, '') + RUN_TIMM, script, timm.__version__, timm.__file__]),
                    ('mixsize', ['-m', 'mixsize_timm.train', *OURS])):
                folder = os.path.join(work, f'{name}-{side}')
                run[side] = train([sys.executable, *command, *document['common'], *options], folder)
            run.update(compare(run))
            document['runs'].append(run)
            print(describe(run), flush=True)
            if args.json:
                with open(args.json, 'w') as file:
                    json.dump(document, file, indent=1)
                    file.write('\n')
    if args.markdown:
        write_markdown(args.markdown, document)
    return int(any(run['verdict'] == 'FAIL' for run in document['runs']))


if __name__ == '__main__':
    sys.exit(main())
