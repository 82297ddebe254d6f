"""The training command, run in this process on tiny models and real files."""
import csv
import json
import tarfile
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import copy_run, write_image_folder
from safetensors.torch import load_file
from timm.data import IterableImageDataset
from timm.optim import create_optimizer_v2

from mixsize_timm import train
from mixsize_timm.datasets import DigitsDataset
from mixsize_timm.errors import UsageError
from mixsize_timm.failures import explaining

TINY = ['--model', 'test_resnet', '--img-size', '32', '-j', '0', '--opt', 'lamb', '--lr', '0.005', '--warmup-epochs',
        '0', '--log-interval', '1', '--calibrate', '2', '--calibrate-val', '1']


def run(tmp_path, *argv, name='run'):
    assert train.main([*TINY, '--output', str(tmp_path), '--experiment', name, *map(str, argv)]) == 0
    return tmp_path / name


def folder_run(tmp_path, image_folder, *argv, **kwargs):
    return run(tmp_path, '--data-dir', image_folder, '--num-classes', 2, '-b', 4, *argv, **kwargs)


@pytest.fixture(scope='module')
def first_run(tmp_path_factory):
    """A run of one epoch, trained once; tests that change it take the copy."""
    tmp = tmp_path_factory.mktemp('first')
    return folder_run(tmp, write_image_folder(tmp / 'data'), '--epochs', 1)


@pytest.fixture
def copy(first_run, tmp_path):
    return copy_run(first_run, tmp_path / 'run')


def weights(folder):
    return load_file(folder / 'last' / 'model.safetensors')


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def summary(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


def sizes(folder):
    document = json.loads((folder / 'sizes.json').read_text())
    return document['checkpoints'][0]


def test_a_run_leaves_what_it_says(tmp_path, image_folder, capsys, caplog):
    with caplog.at_level('INFO'):
        folder = folder_run(tmp_path, image_folder, '--epochs', 2, '--calibrate', 200, '--calibrate-val', 10)
    results = sizes(folder)['results']
    assert [row['img_size'] for row in results] == [16, 24, 32, 48]
    assert all({'top1', 'top1_uncalibrated', 'top5', 'loss'} <= row.keys() for row in results)
    assert [row['epoch'] for row in summary(folder)] == ['0', '1']
    assert {'train_loss', 'eval_top1', 'eval_top1_uncalibrated', 'lr'} <= summary(folder)[0].keys()
    assert yaml.safe_load((folder / 'args.yaml').read_text())['num_classes'] == 2
    assert (folder / 'last' / 'state.json').exists()
    model = timm.create_model('test_resnet', num_classes=2)
    model.load_state_dict(load_file(folder / 'best' / 'model.safetensors'))
    out = capsys.readouterr().out
    assert 'img_size  top-1 calibrated  95 % interval  top-1 own statistics' in out and str(folder) in out
    assert ' size  share   batch  dup  batches' in caplog.text and 'Train 1 [' in caplog.text and 'norm' in caplog.text
    assert 'Validation 1  32 px  calibrated' in caplog.text


def test_best_carries_calibrated_statistics_and_last_its_own(first_run):
    last, best = weights(first_run), load_file(first_run / 'best' / 'model.safetensors')
    for name in last:
        assert torch.equal(last[name], best[name]) != ('running' in name or 'num_batches' in name), name


REGULARISED = ['--epochs', 3, '--drop-path', 0.2, '--reprob', 0.5, '--mixup', 0.2, '--cutmix', 0.5, '--aa', 'rand-m5']


@pytest.mark.parametrize('options', [
    ['--sched-on-updates'], ['--mixsize-adapt', 'b+', '-j', '2'], ['--mixsize', 'off'],
    ['--sched', 'plateau', '--patience-epochs', '0'],
], ids=' '.join)
def test_a_resumed_run_gives_the_same_numbers(tmp_path, image_folder, monkeypatch, options):
    options = [*REGULARISED, *map(str, options)]
    straight = folder_run(tmp_path, image_folder, *options, name='straight')

    original = train.train_one_epoch

    def stop_in_the_last(progress, *args, **kwargs):
        if progress.epoch == 2:
            raise KeyboardInterrupt
        return original(progress, *args, **kwargs)

    monkeypatch.setattr(train, 'train_one_epoch', stop_in_the_last)
    argv = [*TINY, '--data-dir', str(image_folder), '--num-classes', '2', '-b', '4', *map(str, options)]
    assert train.main([*argv, '--output', str(tmp_path), '--experiment', 'stopped']) == 130
    assert not (tmp_path / 'stopped' / 'sizes.json').exists()
    monkeypatch.setattr(train, 'train_one_epoch', original)
    torch.manual_seed(12345)  # whatever happened in between
    assert train.main(['--resume', str(tmp_path / 'stopped')]) == 0

    assert_same_weights(straight, tmp_path / 'stopped')
    assert summary(straight) == summary(tmp_path / 'stopped')
    one, two = sizes(straight), sizes(tmp_path / 'stopped')
    assert one['results'] == two['results']
    for cost in ('steps', 'images', 'megapixels', 'gmacs'):  # of both parts together
        assert one['training'][cost] == two['training'][cost] > 0


def test_off_equals_a_plain_loop_of_timm(tmp_path, monkeypatch):
    losses = []
    original = timm.task.ClassificationTask.forward

    def recording(self, *args):
        result = original(self, *args)
        losses.append(result['loss'].item())
        return result

    monkeypatch.setattr(timm.task.ClassificationTask, 'forward', recording)
    run(tmp_path, '--mixsize', 'off', '--no-grad-smoothing', '--epochs', 1, '--smoothing', 0.1, '-b', 64)

    timm.utils.random_seed(42)
    model = timm.create_model('test_resnet', num_classes=10)
    loader = timm.data.create_loader(
        DigitsDataset('train'), (3, 32, 32), 64, is_training=True, scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0.,
        color_jitter=0., interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3, num_workers=0,
        device=torch.device('cpu'))
    optimizer = create_optimizer_v2(model, opt='lamb', lr=0.005, weight_decay=0.02, max_grad_norm=None)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer, 'cosine', num_epochs=1, warmup_epochs=0, warmup_lr=1e-5, step_on_epochs=False,
        updates_per_epoch=len(loader))
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    model.train()
    expected = []
    for step, (images, targets) in enumerate(loader):
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        expected.append(loss.item())
    assert len(expected) == 22 and losses == pytest.approx(expected, abs=1e-5)


def test_accumulation_counts_every_image_once(tmp_path, image_folder, monkeypatch):
    """Two groups of four must make the gradient of one of eight (a model without batch norm)."""
    gradients = {}
    original = train.GradientSmoother.__call__

    def recording(self, parameters):
        parameters = list(parameters)
        gradients.setdefault(key, torch.cat([p.grad.flatten() for p in parameters]))
        return original(self, parameters)

    monkeypatch.setattr(train.GradientSmoother, '__call__', recording)
    options = ['--model', 'test_vit', '--model-kwargs', 'dynamic_img_size=True', '--mixsize-sizes', 32, '--no-aug',
               '--epochs', 1]
    for key, more in {'whole': ['-b', 8], 'parts': ['-b', 4, '--grad-accum-steps', 2]}.items():
        run(tmp_path, '--data-dir', image_folder, '--num-classes', 2, *options, *more, name=key)
    torch.testing.assert_close(gradients['whole'], gradients['parts'], rtol=1e-4, atol=1e-6)


def test_clipping_comes_after_smoothing(tmp_path, image_folder, monkeypatch):
    order = []
    original = train.GradientSmoother.__call__
    monkeypatch.setattr(train.GradientSmoother, '__call__',
                        lambda self, p: (order.append('smooth'), original(self, p))[1])
    monkeypatch.setattr('mixsize_timm.engine.dispatch_clip_grad',
                        lambda *args, **kwargs: order.append(('clip', kwargs['value'], kwargs['mode'])))
    folder_run(tmp_path, image_folder, '--epochs', 1, '--clip-grad', 0.5, '--clip-mode', 'agc')
    assert order[:4] == ['smooth', ('clip', 0.5, 'agc')] * 2


@pytest.mark.parametrize('options', [
    ['--mixed-precision', 'bf16', '--channels-last', '--mixsize-sizes', '32', '48'],  # not 16: docs/compatibility.md
    ['--val-split', ''],
    ['--mixsize', 'off', '--grad-accum-steps', '2', '--input-size', '3', '32', '48'],
    ['--opt', 'lookahead_sgd'],
    ['--calibrate', '0', '--calibrate-val', '0', '--val-interval', '2'],
    ['--in-chans', '1', '--mixsize-drop', 'reference', '--grad-checkpointing'],
    ['--no-grad-smoothing', '--layer-decay', '0.7', '--opt-kwargs', 'betas=(0.9,0.99)'],
], ids=' '.join)
def test_other_ways_to_run(tmp_path, image_folder, options):
    folder = folder_run(tmp_path, image_folder, '--epochs', 1, *options)
    assert (folder / 'last' / 'model.safetensors').exists()
    assert (folder / 'sizes.json').exists() == ('--val-split' not in options)


@pytest.mark.parametrize('options', [[], ['--no-prefetcher'], ['--mixsize', 'off'], ['-j', '1']], ids=' '.join)
def test_mixing_stops_at_its_epoch(tmp_path, image_folder, monkeypatch, options):
    targets = {0: [], 1: []}
    original = train.train_one_epoch

    def recording(progress, task, *args, **kwargs):
        hook = task.register_forward_pre_hook(lambda _, inputs: targets[progress.epoch].append(inputs[1]))
        result = original(progress, task, *args, **kwargs)
        hook.remove()
        return result

    monkeypatch.setattr(train, 'train_one_epoch', recording)
    folder_run(tmp_path, image_folder, '--epochs', 2, '--mixup', 1, '--mixup-off-epoch', 1, '--smoothing', 0, *options)
    sharp = {epoch: torch.cat(seen).max(1).values for epoch, seen in targets.items()}
    assert (sharp[0] < 0.999).any() and (sharp[1] > 0.999).all()


def test_a_broken_image_does_not_stop_a_run(tmp_path, image_folder, caplog):
    (image_folder / 'train' / 'cat' / '001.jpg').write_bytes(b'broken')
    folder_run(tmp_path, image_folder, '--epochs', 1, '--max-bad-images', 0.1)
    assert 'cat/001.jpg' in caplog.text


def error_of(capsys, *argv):
    capsys.readouterr()
    assert train.main([*TINY, *map(str, argv)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith('mixsize_timm.train: error: ') and 'Traceback' not in '\n'.join(lines)
    return lines[-1]


DATA = ['--data-dir', '{data}']
TWO = [*DATA, '--num-classes', 2]


@pytest.mark.parametrize('argv, message', [
    (['--data-dir', '{tmp}/nowhere'], 'check --data-dir'),
    ([*DATA, '--model', 'resnt50'], 'did you mean resnet50'),
    ([*DATA, '--num-classes', 1], 'use --num-classes 2'),
    ([*DATA, '-b', 0], '--batch-size must be at least 1'),
    ([*TWO, '-b', 1], 'rounds to zero at 48 px'),
    ([*TWO, '--mixsize-sizes', 32, 48, '--mixsize-probs', 1], '2 sizes but 1 probabilities'),
    ([*TWO, '--mixsize-sizes', 32, 48, '--mixsize-probs', -1, 2], 'not negative'),
    ([*TWO, '--mixsize-sizes', 32, 48, '--mixsize-probs', 0, 0], 'all probabilities are zero'),
    ([*TWO, '--input-size', 3, 32, 48], 'use --mixsize off'),
    ([*TWO, '--model', 'vit_tiny_patch16_224', '--img-size', 224], 'does not take images of'),
    ([*TWO, '--initial-checkpoint', '{tmp}/broken.safetensors'], 'cannot make test_resnet'),
    ([*TWO, '--initial-checkpoint', '{tmp}/nowhere.pth'], 'no weights at'),
    ([*TWO, '--pretrained-path', '{tmp}/nowhere.pth'], 'check --pretrained-path'),
    ([*TWO, '--naflex-loader', '--initial-checkpoint', ''], 'needs a NaFlex model'),
    ([*TWO, '--resume', '{tmp}/nowhere'], 'no run at'),
    ([*TWO, '--opt', 'sgdd'], '--opt sgdd'),
    ([*TWO, '--sched', 'sawtooth'], '--sched sawtooth'),
    ([*TWO, '--aa', 'nonsense'], 'nonsense'),
    ([*TWO, '--mixed-precision', 'fp16'], 'fp16 needs a GPU'),
    ([*TWO, '--mixsize', 'off', '-b', 512], 'fill no batch'),
    ([*TWO, '--mixsize', 'off', '-b', 3, '--mixup', 0.5], 'even --batch-size'),
    ([*TWO, '--class-map', '{tmp}/nowhere.txt'], 'cannot open'),
    ([*TWO, '--val-split', 'nonsense'], "no 'nonsense' split beside"),
    ([*TWO, '--model-kwargs', 'x'], 'NAME=VALUE'),
    ([*TWO, '--seed', '-1'], '--seed must be from 0 to 4294967295, not -1'),
    ([*TWO, '--seed', 2**32], '--seed must be from 0'),
    ([*TWO, '--in-chans', 4], 'images of the mode L and of the model differ in channels, 1 and 4'),
    ([*TWO, '--input-img-mode', 'L'], 'differ in channels, 1 and 3'),
    ([*TWO, '--input-img-mode', 'nonsense'], "PIL has no mode 'nonsense'"),
    ([*TWO, '--model-kwargs', 'features_only=True'], 'cannot make test_resnet: a FeatureListNet is no classifier'),
    ([*TWO, '--scale', '0.5'], '--scale takes two numbers'),
    ([*TWO, '--mean', '0.5', '0.5'], '--mean and --std do not fit'),
    ([*TWO, '--smoothing', '1'], '--smoothing must be in [0, 1)'),
    ([*TWO, '--interpolation', 'nonsense'], "cannot load the images: 'nonsense' is unknown"),
    ([*TWO, '--mixsize', 'off', '--model', 'vit_tiny_patch16_224', '--img-size', '100'], 'images of 100x100 px'),
    ([*TWO, '--model', 'convnext_atto', '--img-size', '16'], 'does not take images of'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_every_error_is_one_line_and_leaves_nothing(tmp_path, image_folder, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'broken.safetensors').write_bytes(b'broken')
    assert message in error_of(capsys, *[str(a).format(tmp=tmp_path, data=image_folder) for a in argv])
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('argv', [
    ['-b', 1, '--mixsize', 'off'], ['-b', 4, '--micro-batch-size', 1],
    ['-b', 1, '--mixsize-adapt', 'none', '--micro-batch-size', 'auto']], ids=str)
def test_a_batch_norm_of_single_values_is_one_line(tmp_path, image_folder, capsys, argv):
    """At 32 px the last feature maps of the model are of one pixel."""
    message = error_of(capsys, '--data-dir', image_folder, '--num-classes', 2, '--output', tmp_path, *argv)
    assert 'use a larger --batch-size or --micro-batch-size' in message
    assert message.endswith('no checkpoint was saved') != ('auto' in argv)  # that one is tried before there is a run


def test_a_target_that_timm_refuses_is_one_line():
    with pytest.raises(UsageError, match=r'must be in \[0, 3\). Check --num-classes and --target-format$'), \
            explaining(SimpleNamespace()):
        timm.data.MultiLabelTarget(3)([0, 3])


@pytest.mark.parametrize('argv', [
    [], ['-j', 1], ['--mixup', 0.5], ['-j', 1, '--mixup', 0.5, '--no-prefetcher'],
    ['--mixsize', 'off', '-j', 1], ['--mixsize', 'off', '--mixup', 0.5]], ids=str)
def test_a_label_without_a_class_is_one_line(tmp_path, image_folder, capsys, monkeypatch, argv):
    """Found where the data do not tell how many classes they have, as tar shards may not."""
    monkeypatch.setattr('mixsize_timm.loaders.check_classes', lambda *_: None)
    message = error_of(capsys, '--data-dir', image_folder, '--num-classes', 1, '-b', 4, '--output', tmp_path, *argv)
    assert message.endswith(
        'error: a label is 1, and with --num-classes 1 labels go from 0 to 0: check both; no checkpoint was saved')


def test_a_folder_with_a_run_is_not_overwritten(copy, tmp_path, image_folder, capsys):
    folder, before = copy, weights(copy)
    message = error_of(capsys, '--data-dir', image_folder, '--num-classes', 2, '--output', tmp_path,
                       '--experiment', 'run')
    assert 'already holds a run' in message and f'--resume {folder}' in message
    assert all(torch.equal(v, before[k]) for k, v in weights(folder).items())


def test_a_checkpoint_that_cannot_be_read_is_named(copy, capsys):
    (copy / 'last' / 'model.safetensors').write_bytes(b'broken')
    assert 'is not whole: model.safetensors has 6 of' in error_of(capsys, '--resume', copy)


def test_a_checkpoint_of_another_optimizer_is_named(copy, capsys):
    assert 'was trained with --opt lamb, not muon' in error_of(capsys, '--resume', copy, '--opt', 'muon')
    assert 'does not fit the optimizer' in error_of(capsys, '--resume', copy, '--layer-decay', '0.7')


def test_a_resumed_run_does_not_start_where_it_was_once_told_to(tmp_path, image_folder, caplog):
    folder = folder_run(tmp_path, image_folder, '--epochs', 3, '--start-epoch', 2)
    assert [row['epoch'] for row in summary(folder)] == ['2']
    with caplog.at_level('INFO'):
        assert train.main(['--resume', str(folder), '--epochs', '4']) == 0
    assert 'for epochs 3 to 3' in caplog.text and [row['epoch'] for row in summary(folder)] == ['2', '3']


def test_best_is_calibrated_without_a_validation_split_too(tmp_path, image_folder):
    folder = folder_run(tmp_path, image_folder, '--epochs', 1, '--val-split', '')
    best = load_file(folder / 'best' / 'model.safetensors')
    assert not torch.equal(weights(folder)['bn1.running_mean'], best['bn1.running_mean'])
    assert torch.equal(weights(folder)['bn1.weight'], best['bn1.weight'])


def test_a_finished_run_says_so_and_a_longer_one_goes_on(copy, caplog):
    with caplog.at_level('INFO'):
        assert train.main(['--resume', str(copy)]) == 0
    assert 'All 1 epochs of this run are trained' in caplog.text
    assert train.main(['--resume', str(copy), '--epochs', '2']) == 0
    assert len(summary(copy)) == 2


def test_a_run_stopped_in_its_first_epoch_can_be_started_again(tmp_path, image_folder, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_one_epoch', stop)
        argv = [*TINY, '--data-dir', str(image_folder), '--num-classes', '2', '--output', str(tmp_path)]
        assert train.main([*argv, '--experiment', 'run']) == 130
    folder_run(tmp_path, image_folder, '--epochs', 1)


@pytest.mark.parametrize('opt', ['sgd', 'adamw'])
def test_another_optimizer_trains_the_digits(tmp_path, opt):
    run(tmp_path, '--epochs', 1, '--opt', opt, '-b', 256, '--calibrate', 1, '--mixsize', 'off')


def test_without_calibration_one_column_is_shown(tmp_path, image_folder, capsys):
    folder_run(tmp_path, image_folder, '--epochs', 1, '--calibrate', 0)
    out = capsys.readouterr().out
    assert 'img_size  top-1  95 % interval' in out and 'calibrated' not in out and 'own statistics' not in out


def test_the_embedded_data_set_says_so(tmp_path, caplog):
    with caplog.at_level('INFO'):
        train.Training(train.parse_args([*TINY, '-b', '256', '--output', str(tmp_path)]))
    first, second = (record.getMessage() for record in caplog.records[:2])
    assert 'Training on the embedded digits' in first and '1437 training and 360 validation images of 10' in second


def test_torch_data_sets_and_tar_files_train(tmp_path, image_folder):
    options = ['--num-classes', 2, '-b', 4, '--epochs', 1]
    run(tmp_path, '--dataset', 'torch/image_folder', '--data-dir', image_folder, *options, name='torch')
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(image_folder / 'train', arcname='train')
    run(tmp_path, '--data-dir', tmp_path / 'images.tar', '--val-split', '', *options, name='tar')


def test_streaming_data_train_with_mixsize_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr('mixsize_timm.loaders.create_dataset', lambda name, root, split, **kwargs: IterableImageDataset(
        '', reader=[DigitsDataset(split)[i] for i in range(32)]))
    options = ['--dataset', 'hfids/streaming', '--num-classes', 10, '-b', 8, '--epochs', 1]
    for name, mode in (('mixed', ('custom', '--mixsize-sizes', 24, 32)), ('off', ('off',))):
        folder = run(tmp_path, *options, '--mixsize', *mode, name=name)
        assert sizes(folder)['results'][-1]['img_size'] == 32
