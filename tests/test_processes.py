"""Several processes on the CPU: one plan, the same figures, stopped and continued by fewer or more of them."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from safetensors.torch import load_file
from timm.models import save_for_hf

from mixsize_timm.checkpoint import checkpoints_of, position_of, read_state

RANKS = Path(__file__).parent / 'ranks.py'
OPTIONS = ['--model', 'test_resnet', '--img-size', '32', '--mixsize-sizes', '24', '32', '--num-classes', '2', '-j', '0',
           '--no-aug', '--epochs', '2', '--opt', 'sgd', '--lr', '0.01', '--warmup-epochs', '0', '--calibrate', '0',
           '--calibrate-val', '0', '--checkpoint-interval', '0', '--smoothing', '0', '--seed', '1']


def run(*jobs):
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    result = subprocess.run([sys.executable, str(RANKS)], input=json.dumps(jobs), capture_output=True, text=True,
                            env=environment, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def curve(result):
    """Each step's loss over all processes."""
    return [np.mean([sum(step['losses']) for step in steps]) for steps in zip(*result['steps'])]


def seen(result, first=0, last=None):
    return sorted(image for steps in result['steps'] for step in steps[first:last] for image in step['images'])


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """All trainings of this file, from one process."""
    tmp = tmp_path_factory.mktemp('ranks')
    for split, count in (('train', 48), ('validation', 4)):
        for number, name in enumerate(('cat', 'dog')):
            write_images(tmp / 'data' / split / name, count, seed=number)
    (tmp / 'data' / 'validation' / 'cat' / '000.jpg').unlink()  # seven: one is padding on two processes
    (tmp / 'data' / 'train' / 'cat' / '007.jpg').write_bytes(b'broken')
    (tmp / 'data' / 'train' / 'dog' / '011.jpg').write_bytes(b'broken')

    data = ['--data-dir', str(tmp / 'data')]

    def job(name, ranks, batch, *more, **kwargs):
        argv = [*OPTIONS, *data, '--max-bad-images', '0.03', '-b', batch, '--output', tmp, '--experiment', name, *more]
        return {'ranks': ranks, 'argv': list(map(str, argv)), 'freeze': True, **kwargs}

    keeping = ['--model', 'test_vit', '--mixsize-sizes', 32, 48, '--model-ema', '--model-ema-decay', 0.5, '--epochs', 3,
               '--stop-epoch', 2,
               '--checkpoint-hist', 1, '--save-epochs', 1, '--resume', 'auto']
    save_for_hf(timm.create_model('test_resnet', num_classes=2), str(tmp / 'hub-one'), safe_serialization=True)
    shutil.copytree(tmp / 'hub-one', tmp / 'hub-two')
    short = [*data, '--sizes', '24', '32', '-j', '0', '-b', '4']
    jobs = {'one': job('one', 1, 8), 'two': job('two', 2, 4), 'four': job('four', 4, 2),
            'parts': job('parts', 1, 2, '--grad-accum-steps', 4, '--mixsize-sizes', 32),
            'whole': job('whole', 1, 8, '--mixsize-sizes', 32),
            'stopped': job('stopped', 2, 4, signal=(1, signal.SIGTERM, 5)),
            'by four': job('stopped', 4, 4, '--resume', 'auto', signal=(3, signal.SIGUSR1, 9)),
            'by three': job('stopped', 3, 4, '--resume', 'auto'),
            'by five': job('two', 5, 4, '--resume', 'auto', '--epochs', 3),
            'sharded': job('sharded', 2, 4, shard=True, signal=(0, signal.SIGTERM, 4)),
            'sharded on': job('sharded', 2, 4, '--resume', 'auto', shard=True),
            'whole on': job('sharded', 1, 4, '--resume', 'auto', '--epochs', 3),
            'killed': job('killed', 2, 4, signal=(1, signal.SIGKILL, 3)),
            'nowhere': job('nowhere', 2, 4, '--data-dir', 'nowhere')}
    for name, ranks, batch in (('one', 1, 8), ('two', 2, 4)):
        for time in ('', ' again'):  # to the same end, in place
            jobs[f'keeping {name}{time}'] = job(f'keeping-{name}', ranks, batch, *keeping)
        folder = str(tmp / f'hub-{name}')
        jobs[f'evaluated {name}'] = {'ranks': ranks, 'command': 'evaluate', 'argv': [
            folder, *short, '--output', str(tmp / f'report-{name}')]}
        jobs[f'calibrated {name}'] = {'ranks': ranks, 'command': 'calibrate', 'argv': [folder, *short]}
    return {'tmp': tmp, **dict(zip(jobs, run(*jobs.values())))}


def assert_close(one, other):
    one, other = load_file(one), load_file(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_one_two_and_four_processes_have_the_same_loss_curve(results):
    curves = [curve(results[name]) for name in ('one', 'two', 'four')]
    assert all(len(losses) >= 20 for losses in curves)
    for losses in curves[1:]:
        np.testing.assert_allclose(losses[:20], curves[0][:20], rtol=0, atol=1e-5)
    for steps in zip(*(results[name]['steps'][0] for name in ('one', 'two', 'four'))):
        assert len({step['size'] for step in steps}) == 1
        np.testing.assert_allclose([step['norm'] for step in steps], steps[0]['norm'], rtol=1e-4)
        np.testing.assert_allclose([step['smoothed'] for step in steps], steps[0]['smoothed'], rtol=1e-4)
    assert_close(*(results['tmp'] / name / 'last' / 'model.safetensors' for name in ('one', 'four')))
    for name in ('two', 'four'):
        assert 'processes of cpu' in results[name]['err'][0] and 'base batch 8' in results[name]['err'][0]
        assert sum(out.count('The run is in') for out in results[name]['out']) == 1
    for name in ('two', 'four'):  # smoothing sees the global gradient: all processes the same one
        for steps in zip(*results[name]['steps']):
            assert len({step['norm'] for step in steps}) == 1 and len({step['size'] for step in steps}) == 1


def test_four_accumulated_batches_are_one_of_four_times_the_size(results):
    parts, whole = curve(results['parts']), curve(results['whole'])
    assert len(parts) == len(whole) >= 20
    for one, other in zip(results['parts']['steps'][0], results['whole']['steps'][0]):
        assert one['images'] == other['images'] and len(one['losses']) == 4
    np.testing.assert_allclose(parts[:20], whole[:20], rtol=0, atol=1e-5)


def test_a_run_goes_on_with_another_number_of_processes_where_it_stopped(results):
    """A signal to one process stops both after the same step; four and then three train what is left, all once."""
    stopped, four, three = results['stopped'], results['by four'], results['by three']
    assert stopped['codes'] == [75, 75] and four['codes'] == [75] * 4 and three['codes'] == [0, 0, 0]
    assert [len(steps) for steps in stopped['steps']] == [6, 6]  # what one knows the other learns a step later
    assert 'stopped by SIGTERM; --resume' in stopped['err'][0]
    assert 'continues after step 6 of epoch 0' in stopped['err'][0]
    assert not stopped['err'][1].strip()
    losses = curve(stopped) + curve(four) + curve(three)
    np.testing.assert_allclose(losses, curve(results['one']), rtol=0, atol=1e-4)
    np.testing.assert_allclose(losses[:20], curve(results['one'])[:20], rtol=0, atol=1e-5)
    steps = len(losses) // 2
    epoch = seen(stopped) + seen(four) + seen(three, 0, steps - 6 - len(four['steps'][0]))
    assert len(epoch) == len(set(epoch)) and sorted(epoch) == seen(results['one'], 0, steps)
    assert 'was saved by 2 processes and goes on with 4: the batches stay those of 2' in four['err'][0]
    folder = str(results['tmp'] / 'stopped')
    assert read_state(checkpoints_of(folder)[0], 'world_size') == 2 and position_of(checkpoints_of(folder)[0]) == (2, 0)


def test_a_batch_is_not_shared_by_more_processes_than_it_has_images(results):
    assert results['by five']['codes'] == [0] * 5  # eight images each
    assert len({len(step['images']) for steps in results['by five']['steps'] for step in steps}) == 2


def test_images_that_cannot_be_read_are_counted_over_all_processes(results):
    for name in ('one', 'two', 'four', 'stopped'):
        lines = [line.split(',') for line in (results['tmp'] / name / 'summary.csv').read_text().splitlines()]
        column = lines[0].index('train_bad_images')
        assert [line[column] for line in lines[1:3]] == ['2', '2'], name
    told = ''.join(results['two']['err'])
    assert told.count('Cannot read image') == 2 and (results['tmp'] / 'two' / 'bad-images-0.txt').exists() | (
        results['tmp'] / 'two' / 'bad-images-1.txt').exists()


def test_a_process_that_dies_ends_the_others_with_one_line(results):
    killed = results['killed']
    assert killed['codes'] == [2, -signal.SIGKILL]
    assert 'another process of this run has ended' in killed['err'][0] and 'Traceback' not in killed['err'][0]


def test_a_sharded_model_trains_stops_goes_on_and_is_measured_as_a_whole_one(results):
    first, second = results['sharded'], results['sharded on']
    assert first['codes'] == [75, 75] and second['codes'] == [0, 0], second['err']
    losses = curve(first) + curve(second)
    np.testing.assert_allclose(losses, curve(results['two']), rtol=0, atol=1e-5)
    assert [step['norm'] for step in first['steps'][0]] == [step['norm'] for step in first['steps'][1]]
    ours, theirs = (json.loads((results['tmp'] / name / 'sizes.json').read_text())['checkpoints'][0]['results']
                    for name in ('sharded', 'two'))
    assert [row['img_size'] for row in ours] == [row['img_size'] for row in theirs] == [24, 32]
    assert results['whole on']['codes'] == [0]  # its checkpoint is any other's


def test_an_error_is_said_once(results):
    assert results['nowhere']['codes'] == [2, 2]
    assert ''.join(results['nowhere']['err']).count('mixsize_timm.train: error: no data at') == 1


def test_two_processes_keep_average_and_checkpoints_as_one_does(results):
    """What only one process writes, and all must agree on."""
    folders = [results['tmp'] / f'keeping-{name}' for name in ('one', 'two')]
    kept = [sorted(path.name for path in folder.iterdir() if path.is_dir()) for folder in folders]
    assert kept[0] == kept[1] and {'best', 'last', 'last.old', 'milestone-1'} <= set(kept[0])
    for part in ('last/model_ema', 'best/model_ema', 'milestone-1/model'):
        assert_close(*(folder / f'{part}.safetensors' for folder in folders))


def test_two_processes_evaluate_and_calibrate_as_one(results):
    """Seven validation images, and training images that do not fill the last batch, dealt to two processes."""
    one, two = (json.loads((results['tmp'] / f'report-{name}' / 'sizes.json').read_text())['checkpoints'][0]['results']
                for name in ('one', 'two'))
    for ours, theirs in zip(two, one):
        for key in ('top1', 'top5', 'top1_uncalibrated', 'top1_low', 'images', 'gmacs'):
            assert ours[key] == theirs[key], key
        assert ours['images'] == 7
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)
        assert ours['loss_uncalibrated'] == pytest.approx(theirs['loss_uncalibrated'], rel=1e-5)
    assert sum(out.count('are in') for out in results['calibrated two']['out']) == 1
    assert_close(*(results['tmp'] / f'hub-{name}' / 'bn_stats.safetensors' for name in ('one', 'two')))
