"""Checkpoints of a run: kept, ranked, resumed in place or elsewhere; timm's own are read too."""
import csv
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import save_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import CheckpointSaver

from mixsize_timm import train
from mixsize_timm.args import parse_args
from mixsize_timm.checkpoint import copy_checkpoint, newest_checkpoint, run_folder
from mixsize_timm.errors import STOPPED, Stopped
from mixsize_timm.resume import _NO_OPTIONS, _restore_optimizer
from mixsize_timm.saver import CheckpointHistory

TINY = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--opt', 'sgd', '--lr', '0.05', '--warmup-epochs', '0',
        '--img-size', '32', '--num-classes', '2', '--mixsize-sizes', '24', '32', '--calibrate', '1',
        '--calibrate-val', '1']


@pytest.fixture
def tiny(image_folder):
    """Arguments of a run of three steps an epoch."""
    return [*TINY, '--data-dir', str(image_folder)]


@pytest.fixture
def run(tmp_path, tiny):
    def run(*argv, name='run'):
        assert train.main([*tiny, '--output', str(tmp_path), '--experiment', name, *map(str, argv)]) == 0
        return tmp_path / name
    return run


def epochs_of(folder):
    return [line.split(',')[0] for line in (folder / 'summary.csv').read_text().splitlines()[1:]]


def finished_epochs(folder):
    return json.loads((folder / 'state.json').read_text())['__items__'][0][1]


def same(a, b, file='model.safetensors'):
    a, b = load_file(a / file), load_file(b / file)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stopped_run_goes_on_with_auto_as_if_it_had_not_stopped(tmp_path, run):
    options = ['--epochs', 4, '--checkpoint-hist', 2, '--model-ema', '--model-ema-decay', 0.5]
    straight = run(*options, name='straight')
    first = run(*options, '--resume', 'auto', '--stop-epoch', 2)
    assert epochs_of(first) == ['0', '1'] and finished_epochs(first / 'last') == 2
    assert run(*options, '--resume', 'auto') == first
    assert epochs_of(first) == ['0', '1', '2', '3']
    for file in ('model.safetensors', 'model_ema.safetensors'):
        assert same(straight / 'last', first / 'last', file) and same(straight / 'best', first / 'best', file)
    assert (straight / 'summary.csv').read_text() == (first / 'summary.csv').read_text()
    kept = {path.name for path in first.glob('checkpoint-*')}
    assert len(kept) == 2 and kept == {path.name for path in straight.glob('checkpoint-*')}
    before = (first / 'summary.csv').read_text()
    run(*options, '--resume', 'auto')  # finished: nothing changes
    assert (first / 'summary.csv').read_text() == before


def test_milestones_are_kept_and_validated_although_the_interval_would_pass_over(run):
    folder = run('--epochs', 4, '--stop-epoch', 3, '--val-interval', 4, '--save-epochs', 1, 2)
    assert epochs_of(folder) == ['0', '1', '2']
    assert [finished_epochs(folder / f'milestone-{n}') for n in (1, 2)] == [1, 2]
    assert finished_epochs(folder / 'last') == 3


def test_an_older_checkpoint_is_continued_elsewhere(tmp_path, run):
    straight = run('--epochs', 2, '--save-epochs', 1)
    branch = tmp_path / 'branch'
    assert train.main(['--resume', str(straight / 'milestone-1'), '--output', str(tmp_path), '--experiment', 'branch']
                      ) == 0
    assert same(straight / 'last', branch / 'last') and epochs_of(branch) == ['1']
    assert epochs_of(straight) == ['0', '1']
    shutil.rmtree(branch)
    assert train.main(
        ['--resume', str(straight / 'milestone-1'), '--output', str(tmp_path), '--experiment', 'run']) == 2
    assert finished_epochs(straight / 'last') == 2


def test_with_timms_loader_a_recovery_checkpoint_trains_its_epoch_again_in_place(tmp_path, tiny, monkeypatch, caplog):
    argv = [*tiny[:tiny.index('--mixsize-sizes')], *tiny[tiny.index('--data-dir'):], '--mixsize', 'off', '--epochs',
            '2', '--recovery-interval', '2', '--output', str(tmp_path), '--experiment', 'run']
    with monkeypatch.context() as patch:
        patch.setattr(train.Training, '_finish_epoch', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert train.main(argv) == 130
    folder = tmp_path / 'run'
    assert [path.name for path in folder.glob('recovery-*')] == ['recovery-0-2']
    assert train.main(['--resume', str(folder / 'recovery-0-2')]) == 0
    assert 'cannot go on inside an epoch: epoch 0 is trained from its beginning' in caplog.text
    assert epochs_of(folder) == ['0', '1'] and finished_epochs(folder / 'last') == 2


def test_auto_finds_what_is_there(tmp_path, tiny, run):
    straight = run('--epochs', 1, '--checkpoint-interval', 2)
    argv = [*tiny, '--output', str(tmp_path), '--resume', 'auto']
    assert parse_args([*argv, '--experiment', 'other']).resume == ''
    assert parse_args([*argv, '--experiment', 'run']).resume == str(straight)
    (tmp_path / 'other').mkdir()
    shutil.copytree(straight / 'last', tmp_path / 'other' / 'recovery-0-2')
    shutil.copy(straight / 'args.yaml', tmp_path / 'other')
    assert os.path.basename(newest_checkpoint(parse_args([*argv, '--experiment', 'other']).resume)) == 'recovery-0-2'


def test_without_the_optimizer_only_weights_and_epoch_are_resumed(tmp_path, run):
    folder = run('--epochs', 2, '--stop-epoch', 1)
    straight, fresh = (train.Training(train.parse_args(['--resume', str(folder), *extra]))
                       for extra in ([], ['--no-resume-opt']))
    assert straight.progress.epoch == fresh.progress.epoch == 1
    for a, b in zip(straight.model.state_dict().values(), fresh.model.state_dict().values()):
        assert torch.equal(a, b)
    assert straight.optimizer.state_dict()['state'] and not fresh.optimizer.state_dict()['state']
    assert straight.smoother.state_dict() != fresh.smoother.state_dict()


def test_the_projection_of_feature_distillation_is_resumed(tmp_path, run):
    teacher = timm.create_model('test_efficientnet', num_classes=2)
    save_for_hf(teacher, str(tmp_path / 'teacher'), safe_serialization=True)
    options = ['--epochs', 2, '--kd-model-name', f'local-dir:{tmp_path / "teacher"}',
               '--kd-distill-type', 'feature', '--model-ema', '--model-ema-decay', 0.5]
    straight = run(*options, name='straight')
    stopped = run(*options, '--stop-epoch', 1)
    assert train.main(['--resume', str(stopped)]) == 0
    assert same(straight / 'last', stopped / 'last') and same(straight / 'last', stopped / 'last', 'state.safetensors')


def test_a_checkpoint_of_timms_script_is_resumed(tmp_path, tiny):
    torch.manual_seed(1)
    other = train.Training(train.parse_args([*tiny, '--model-ema']))
    loss = other.task(torch.randn(4, 3, 32, 32), torch.arange(4) % 2)['loss']
    loss.backward()
    other.optimizer.step()
    other.task.update_ema(step=5)
    saver = CheckpointSaver(other.model, other.optimizer, task=other.task, args=other.args,
                            checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(2, 50.)
    resumed = train.Training(train.parse_args(
        [*tiny, '--model-ema', '--resume', str(tmp_path / 'last.pth.tar')]))
    assert resumed.progress.epoch == 3 and not resumed.progress.counted
    for ours, timms in ((resumed.model, other.model), (resumed.ema, other.ema)):
        assert all(map(torch.equal, ours.state_dict().values(), timms.state_dict().values()))
    momentum = [s['momentum_buffer'] for s in resumed.optimizer.state_dict()['state'].values()]
    assert momentum and all(map(torch.equal, momentum, (
        s['momentum_buffer'] for s in other.optimizer.state_dict()['state'].values())))


def test_what_is_no_checkpoint_of_timms_is_refused_in_one_line(tmp_path, tiny, capsys):
    (tmp_path / 'bad.pth.tar').write_bytes(b'no')
    assert train.main([*tiny, '--resume', str(tmp_path / 'bad.pth.tar')]) == 2
    assert 'cannot resume' in capsys.readouterr().err.strip().splitlines()[-1]


@given(metrics=st.lists(st.sampled_from([1., 2., 3., 4., 5.]), min_size=1, max_size=12), limit=st.integers(1, 4))
def test_the_history_is_timms(metrics, limit):
    saver = CheckpointSaver.__new__(CheckpointSaver)  # its ranking alone, without files
    saver.checkpoint_files, saver.decreasing, saver.max_history = [], False, limit
    saver.best_metric, saver.checkpoint_dir = None, ''
    history = CheckpointHistory('nowhere', limit)
    for epoch, metric in enumerate(metrics):
        history.rank(epoch, metric)
        saver.checkpoint_files = sorted([*saver.checkpoint_files, (epoch, metric)], key=lambda c: c[1],
                                        reverse=not saver.decreasing)[:limit]
        assert history.entries == saver.checkpoint_files


def test_a_copy_of_a_checkpoint_outlives_it_and_shares_its_files(tmp_path):
    model = timm.create_model('test_resnet')
    save_checkpoint(str(tmp_path / 'last'), model, {'epoch': 1})
    copy_checkpoint(str(tmp_path / 'last'), str(tmp_path / 'kept'))
    assert (tmp_path / 'kept' / 'model.safetensors').samefile(tmp_path / 'last' / 'model.safetensors')
    before = load_file(tmp_path / 'kept' / 'model.safetensors')
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_checkpoint(str(tmp_path / 'last'), model, {'epoch': 2})
    after = load_file(tmp_path / 'kept' / 'model.safetensors')
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not same(tmp_path / 'kept', tmp_path / 'last')


def test_the_folder_of_a_run_is_found_from_each_of_its_checkpoints(tmp_path):
    save_checkpoint(str(tmp_path / 'last'), timm.create_model('test_resnet'), {'epoch': 1})
    assert run_folder(str(tmp_path / 'last')) == run_folder(str(tmp_path / 'last') + '/') == str(tmp_path)
    assert run_folder(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize('argv, message', [
    (['--resume', 'auto'], '--resume auto needs --experiment'),
    (['--stop-epoch', '9', '--epochs', '3'], '--stop-epoch 9 is behind the last of 3 epochs'),
    (['--save-epochs', '0'], '--save-epochs counts finished epochs'),
])
def test_what_cannot_be_is_said(tiny, argv, message, capsys):
    assert train.main([*tiny, *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('file', ['checkpoint-1000/weights.bin', 'last.pth.tar', 'summary.csv', 'milestone-3/x'])
def test_a_folder_that_holds_somebody_elses_run_is_left_alone(tmp_path, tiny, capsys, file):
    (tmp_path / 'run' / file).parent.mkdir(parents=True)
    (tmp_path / 'run' / file).write_text('theirs')
    assert train.main([*tiny, '--output', str(tmp_path), '--experiment', 'run', '--epochs', '1']) == 2
    assert 'already holds a run' in capsys.readouterr().err
    assert (tmp_path / 'run' / file).read_text() == 'theirs' and not (tmp_path / 'run' / 'args.yaml').exists()


def test_another_metric_or_another_folder_starts_with_no_best_epoch(run, tmp_path):
    folder = run('--epochs', 2, '--stop-epoch', 1)
    branch = run('--epochs', 2, '--resume', folder / 'checkpoint-0', '--eval-metric', 'loss', name='branch')
    assert (branch / 'best' / 'model.safetensors').exists() and (branch / 'checkpoint-1').exists()
    assert train.main(['--resume', str(folder), '--eval-metric', 'loss']) == 0
    state = dict(json.loads((folder / 'last' / 'state.json').read_text())['__items__'])
    assert state['metric'] == 'loss' and state['best'] < 0


def test_a_first_epoch_without_a_number_is_not_the_best_for_ever(run, monkeypatch):
    losses = iter([float('nan'), 1.])
    original = train.train_one_epoch
    monkeypatch.setattr(train, 'train_one_epoch', lambda *args, **kwargs: {
        **original(*args, **kwargs), 'loss': next(losses)})
    folder = run('--epochs', 2, '--val-split', '', '--checkpoint-hist', 1)
    assert (folder / 'checkpoint-1').exists() and not (folder / 'checkpoint-0').exists()


def test_every_optimizers_state_can_be_kept(run):
    folder = run('--epochs', 2, '--stop-epoch', 1, '--opt', 'adafactorbv')  # it has a torch.dtype in its settings
    assert train.main(['--resume', str(folder)]) == 0


def test_weights_alone_are_not_resumed(run, capsys):
    folder = run('--epochs', 1)
    assert train.main(['--resume', str(folder / 'best')]) == 2
    assert 'start from them with --initial-checkpoint' in capsys.readouterr().err


def test_without_the_optimizer_can_be_said_before_there_is_a_run(tmp_path, tiny):
    args = parse_args([*tiny, '--resume', 'auto', '--experiment', 'new', '--output', str(tmp_path), '--no-resume-opt'])
    assert args.resume == ''


def test_the_optimizers_options_are_those_of_this_start():
    """Of its kernels too, which fit the device and the precision; what it counts is the run's."""
    model = torch.nn.Linear(2, 2)
    saved = torch.optim.SGD(model.parameters(), lr=0.25, fused=True).state_dict()
    saved['param_groups'][0]['step'] = 7  # as timm's Lamb has it
    run = SimpleNamespace(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.5, foreach=True, momentum=0.5), smoother=None,
        args=SimpleNamespace(opt='sgd', sched='cosine'), accelerator=SimpleNamespace(scaler=None))
    _restore_optimizer(run, {'opt': 'sgd', 'optimizer': saved, 'smoother': None, 'scaler': None}, 'last')
    group = run.optimizer.param_groups[0]
    assert group['lr'] == 0.5 and group['momentum'] == 0.5 and group['step'] == 7
    assert not group['fused'] and group['foreach']


@pytest.mark.parametrize('name', [name for name in list_optimizers() if not name.startswith(('bnb', 'fused', 'kron'))])
def test_every_optimizer_of_timm_counts_beside_its_options(name):
    """Else a resumed run would put what it counted back to where it began. Those left out want CUDA or a compiler."""
    model = torch.nn.Linear(4, 4)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.1)
    before = [{key: str(value) for key, value in group.items() if key not in _NO_OPTIONS}
              for group in optimizer.param_groups]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().mean().backward(create_graph=name == 'adahessian')
        optimizer.step()
    after = [{key: str(group[key]) for key in options} for group, options in zip(optimizer.param_groups, before)]
    assert after == before


@pytest.mark.parametrize('before, after, rate', [
    (['--sched', 'cosine'], ['--sched', 'none', '--lr', '0.01'], 0.01),
    (['--sched', 'cosine'], ['--sched', 'plateau', '--lr', '0.01'], 0.01),
    (['--sched', 'plateau', '--patience-epochs', '0'], ['--lr', '0.01'], 0.01),
    (['--sched', 'cosine'], ['--start-epoch', '0'], 0.05),
])
def test_a_rate_that_is_asked_for_at_a_resumption_is_the_rate(run, before, after, rate):
    folder = run('--epochs', 1, *before)
    assert train.main(['--resume', str(folder), '--epochs', '2', '--stop-epoch', '2', *after]) == 0
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert float(rows[0 if '--start-epoch' in after else 1]['lr']) == rate


def test_a_plateau_goes_on_at_the_rate_that_it_came_to(run, monkeypatch):
    """And with the patience of today: only what it counted is the run's."""
    monkeypatch.setattr(train, 'validate', lambda models, *_: [{'loss': 1., 'top1': 50., 'top5': 100.}] * len(models))
    folder = run('--epochs', 3, '--sched', 'plateau', '--patience-epochs', '0', '--decay-rate', '0.5')
    assert train.main(['--resume', str(folder), '--epochs', '4', '--patience-epochs', '9']) == 0
    rates = [float(row['lr']) for row in csv.DictReader((folder / 'summary.csv').open())]
    assert rates == [0.05, 0.05, 0.025, 0.0125]  # that of the last epoch was left by the third


def test_a_stop_inside_the_validation_of_timms_loader_changes_nothing(image_folder, tmp_path, monkeypatch):
    """timm's loader draws from the generator that dropout draws from."""
    arguments = [*TINY[:TINY.index('--mixsize-sizes')], '--data-dir', str(image_folder), '--epochs', '2', '--mixsize',
                 'off', '--drop', '0.3', '--output', str(tmp_path), '--experiment']
    original, calls = train.Training._before_batch, []
    assert train.main([*arguments, 'whole']) == 0

    def stop(self):
        calls.append(1)
        if len(calls) == 1:
            raise Stopped('SIGTERM')
        original(self)

    monkeypatch.setattr(train.Training, '_before_batch', stop)
    assert train.main([*arguments, 'stopped']) == STOPPED
    assert train.main(['--resume', str(tmp_path / 'stopped')]) == 0
    assert same(tmp_path / 'whole' / 'last', tmp_path / 'stopped' / 'last')
