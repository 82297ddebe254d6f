"""Several processes on the CPU, started by the documented command."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

LAUNCH = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines',
          '1', '--mixed_precision', 'no', '--dynamo_backend', 'no', '--main_process_port', '0']

ON_CPU = {**os.environ, 'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}

VALIDATE = """
import json, sys, timm, torch
from accelerate import Accelerator
from timm.data import create_dataset, create_loader
from timm.task import ClassificationTask
from timm.utils import random_seed
from mixsize_timm.engine import validate
accelerator = Accelerator(cpu=True)
random_seed(0)
model = timm.create_model('test_resnet', num_classes=2)
dataset = create_dataset('', root=sys.argv[1], split='validation')
loader = create_loader(dataset, (3, 32, 32), 2, distributed=accelerator.num_processes > 1, num_workers=0,
                       device=accelerator.device)
metrics = validate(model, loader, ClassificationTask(model, verbose=False), accelerator)
if accelerator.is_main_process:
    print(json.dumps({'processes': accelerator.num_processes, **metrics}))
accelerator.end_training()
"""


def launch(*argv, launcher=LAUNCH):
    result = subprocess.run([*launcher, *map(str, argv)], env=ON_CPU, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


@pytest.mark.parametrize('accumulation', [1, 2])
def test_two_processes_train_as_one_of_twice_the_batch(tmp_path, image_folder, accumulation):
    """A model without batch norm, no augmentation: the same plan, cut in two or not, gives the same weights."""
    options = ['--data-dir', image_folder, '--num-classes', 2, '--model', 'test_vit', '--img-size', 32, '--no-aug',
               '--epochs', 2, '-j', 0, '--log-interval', 1, '--opt', 'sgd', '--lr', 0.05, '--output', tmp_path,
               '--grad-accum-steps', accumulation, '--mixsize-sizes', 32, 48]
    result = launch('-m', 'mixsize_timm.train', *options, '-b', 4, '--experiment', 'two')
    launch('-m', 'mixsize_timm.train', *options, '-b', 8, '--experiment', 'one', launcher=[sys.executable])
    assert 'on 2 processes of cpu' in result.stderr and 'base batch 8' in result.stderr
    assert result.stdout.count('The run is in') == 1
    one, two = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('one', 'two'))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=name)
    state = json.loads((tmp_path / 'two' / 'last' / 'state.json').read_text())
    assert len(dict(state['__items__'])['random']) == 2


def test_two_processes_validate_as_one(tmp_path, image_folder):
    script = tmp_path / 'validate.py'
    script.write_text(VALIDATE)
    (image_folder / 'validation' / 'cat' / '000.jpg').unlink()  # seven images: one is padding on two processes
    two = json.loads(launch(script, image_folder).stdout.splitlines()[-1])
    one = json.loads(launch(script, image_folder, launcher=[sys.executable]).stdout.splitlines()[-1])
    assert (two.pop('processes'), one.pop('processes')) == (2, 1)
    assert two == pytest.approx(one, rel=1e-5)


def test_an_error_is_said_once(tmp_path):
    result = subprocess.run([*LAUNCH, '-m', 'mixsize_timm.train', '--data-dir', str(tmp_path / 'nowhere')], env=ON_CPU,
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.count('mixsize_timm.train: error: no data at') == 1


def test_two_processes_keep_average_checkpoints_and_recovery_as_one_does(tmp_path, image_folder):
    """What only one process writes, and all must agree on; without batch norm both give the same."""
    options = ['--data-dir', image_folder, '--num-classes', 2, '--model', 'test_vit', '--img-size', 32, '--no-aug',
               '-j', 0, '--opt', 'sgd', '--lr', 0.05, '--output', tmp_path, '--mixsize-sizes', 32, 48, '--epochs', 3,
               '--stop-epoch', 2, '--model-ema', '--model-ema-decay', 0.5, '--checkpoint-hist', 1, '--save-epochs', 1,
               '--recovery-interval', 2]
    for name, batch, launcher in (('two', 4, LAUNCH), ('one', 8, [sys.executable])):
        for _ in range(2):  # and again: to the same end, in place
            launch('-m', 'mixsize_timm.train', *options, '-b', batch, '--experiment', name, '--resume', 'auto',
                   launcher=launcher)
    kept = [sorted(path.name for path in (tmp_path / name).iterdir() if path.is_dir()) for name in ('one', 'two')]
    assert kept[0] == kept[1] and {'best', 'last', 'milestone-1', 'recovery'} <= set(kept[0])
    for part in ('last/model_ema', 'best/model_ema', 'milestone-1/model'):
        one, two = (load_file(tmp_path / name / f'{part}.safetensors') for name in ('one', 'two'))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5, msg=f'{part} {name}')


def test_two_processes_evaluate_and_calibrate_as_one(tmp_path, image_folder):
    """Seven validation images, and training images that fill six batches and a short one, dealt to two processes."""
    (image_folder / 'validation' / 'cat' / '000.jpg').unlink()
    (image_folder / 'train' / 'dog' / '000.jpg').unlink()
    model = timm.create_model('test_resnet', num_classes=2)
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    rows, statistics = [], []
    for name, launcher in (('two', LAUNCH), ('one', [sys.executable])):
        shutil.copytree(tmp_path / 'hub', tmp_path / name)
        shared = ['--data-dir', image_folder, '--sizes', 32, 48, '-j', 0, '-b', 4]
        launch('-m', 'mixsize_timm.evaluate', tmp_path / name, *shared, '--output', tmp_path / f'report-{name}',
               launcher=launcher)
        rows.append(json.loads((tmp_path / f'report-{name}' / 'sizes.json').read_text())['checkpoints'][0]['results'])
        out = launch('-m', 'mixsize_timm.calibrate_model', tmp_path / name, *shared, launcher=launcher).stdout
        assert out.count('are in') == 1
        statistics.append(load_file(tmp_path / name / 'bn_stats.safetensors'))
    for two, one in zip(*rows):
        for key in ('top1', 'top5', 'top1_uncalibrated', 'top1_low', 'images', 'gmacs'):
            assert two[key] == one[key], key
        assert two['loss'] == pytest.approx(one['loss'], rel=1e-4)
        assert two['loss_uncalibrated'] == pytest.approx(one['loss_uncalibrated'], rel=1e-5)
    for name, tensor in statistics[1].items():
        torch.testing.assert_close(statistics[0][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
