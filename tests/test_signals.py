"""A run that is asked to stop finishes its step, and goes on later as if it had not."""
import json
import os
import shutil
import signal

import pytest
import torch
from conftest import save_checkpoint
from safetensors.torch import load_file

from mixsize_timm import engine, train
from mixsize_timm.checkpoint import age_of, checkpoints_of
from mixsize_timm.errors import LocalError, UsageError, run_command

TINY = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--opt', 'sgd', '--lr', '0.05', '--warmup-epochs', '0',
        '--img-size', '32', '--num-classes', '2', '--mixsize-sizes', '24', '32', '--epochs', '2', '--calibrate', '1',
        '--calibrate-val', '1', '--sched-on-updates', '--model-ema', '--model-ema-decay', '0.5', '--drop', '0.2',
        '--mixup', '0.5', '--reprob', '0.5']
FILES = ('last/model.safetensors', 'last/model_ema.safetensors', 'best/model.safetensors', 'last/state.safetensors')


def main(tmp_path, image_folder, name, *argv):
    return train.main([*TINY, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', name,
                       '--resume', 'auto', *map(str, argv)])


def send(monkeypatch, place, number, *signals):
    """Send this process signals when a function of a class is called for the ``number``-th time."""
    owner, name = place
    original, calls = getattr(owner, name), []

    def calling(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            for sent in signals:
                os.kill(os.getpid(), sent)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, calling)


def assert_same(one, other):
    for file in FILES:
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), file
    assert (one / 'summary.csv').read_text() == (other / 'summary.csv').read_text()


STEP = engine.GradientSmoother, '__call__'  # once in each step
VALIDATION = train.Training, '_before_batch'  # once before each batch of it


@pytest.mark.parametrize('options', [
    [], ['--no-prefetcher', '--micro-batch-size', 3], ['--grad-accum-steps', 2, '--mixsize-anneal', 1]], ids=str)
def test_a_stopped_run_goes_on_from_its_step_bit_for_bit(tmp_path, image_folder, monkeypatch, capsys, options):
    assert main(tmp_path, image_folder, 'straight', *options) == 0
    places = [(STEP, 1, signal.SIGTERM, 75), (STEP, 2, signal.SIGINT, 130), (VALIDATION, 2, signal.SIGUSR1, 75)]
    for place, number, sent, code in places:
        with monkeypatch.context() as patch:
            send(patch, place, number, sent)
            assert main(tmp_path, image_folder, 'stopped', *options) == code
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith(f'mixsize_timm.train: stopped by {sent.name}; --resume ')
        assert 'continues after step' in message
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert main(tmp_path, image_folder, 'stopped', *options) == 0
    assert_same(tmp_path / 'straight', tmp_path / 'stopped')
    starts = json.loads((tmp_path / 'stopped' / 'run.json').read_text())['starts']
    positions = [(start['epoch'], start['step']) for start in starts]
    assert positions == sorted(positions) and positions[1] == (0, 1) and positions[3] > positions[1]
    assert not list((tmp_path / 'stopped').glob('recovery-*'))


def test_a_second_interrupt_stops_at_once_and_a_signal_after_training_leaves_the_run(tmp_path, image_folder,
                                                                                     monkeypatch, capsys):
    with monkeypatch.context() as patch:
        send(patch, STEP, 1, signal.SIGINT, signal.SIGINT)
        assert main(tmp_path, image_folder, 'run') == 130
    assert 'stopped; no checkpoint was saved' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        send(patch, (train.Training, '_report_sizes'), 1, signal.SIGTERM)
        assert main(tmp_path, image_folder, 'run') == 75
    assert 'continues after epoch 1' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'sizes.json').exists()
    assert main(tmp_path, image_folder, 'run') == 0
    assert (tmp_path / 'run' / 'sizes.json').exists()


def test_hanging_up_stops_a_run_unless_it_was_told_to_ignore_it(tmp_path, image_folder, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with monkeypatch.context() as patch:
            send(patch, STEP, 1, signal.SIGHUP)
            assert main(tmp_path, image_folder, 'ignoring') == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with monkeypatch.context() as patch:
            send(patch, STEP, 1, signal.SIGHUP)
            assert main(tmp_path, image_folder, 'hanging') == 75
    finally:
        signal.signal(signal.SIGHUP, before)


PLAIN = ['--mixsize', 'off', '--mixup', '0']


def off(argv):
    """The arguments without a regime."""
    start = argv.index('--mixsize-sizes')
    return [*argv[:start], *argv[start + 3:], *PLAIN]


def test_with_timms_loader_the_newest_stop_counts_and_a_finished_epoch_is_not_trained_again(tmp_path, image_folder,
                                                                                          monkeypatch, capsys):
    monkeypatch.setitem(globals(), 'TINY', off(TINY))
    assert main(tmp_path, image_folder, 'straight') == 0
    for number, place in ((2, 'after step 2 of epoch 0'), (1, 'after step 1 of epoch 0')):
        with monkeypatch.context() as patch:  # the epoch is begun again each time, with the weights as they were
            send(patch, STEP, number, signal.SIGTERM)
            assert main(tmp_path, image_folder, 'stopped') == 75
        assert f'continues {place}' in capsys.readouterr().err
    with monkeypatch.context() as patch:
        send(patch, VALIDATION, 1, signal.SIGTERM)
        assert main(tmp_path, image_folder, 'stopped') == 75
    assert main(tmp_path, image_folder, 'stopped') == 0
    steps = [json.loads((tmp_path / name / 'sizes.json').read_text())['checkpoints'][0]['training']['steps']
             for name in ('straight', 'stopped')]
    assert steps[1] == steps[0] + 3  # those of the two epochs that were begun again, and no others


def test_an_epoch_of_another_plan_is_trained_from_its_beginning(tmp_path, image_folder, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        send(patch, STEP, 2, signal.SIGTERM)
        assert main(tmp_path, image_folder, 'stopped') == 75
    with monkeypatch.context() as patch:
        send(patch, STEP, 1, signal.SIGTERM)
        assert main(tmp_path, image_folder, 'stopped', '--seed', 7) == 75
    assert 'another plan of the epoch than it was begun with: epoch 0 is trained from its beginning' in caplog.text
    newest = checkpoints_of(str(tmp_path / 'stopped'))[0]
    assert age_of(newest) == (3, 0, 1) and newest.endswith('recovery-0-1')


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(tmp_path, image_folder, monkeypatch, capsys):
    def killed(self, snapshot, best, **_):
        save_checkpoint(os.path.join(self.folder, 'best'), torch.nn.Linear(1, 1))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train.CheckpointSaver, 'save_epoch', killed)
        assert main(tmp_path, image_folder, 'run') == 130
    assert {'best', 'summary.csv'} <= {path.name for path in (tmp_path / 'run').iterdir()}
    argv = [*TINY, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run']
    assert train.main(argv) == 2 and 'already holds a run' in capsys.readouterr().err
    assert main(tmp_path, image_folder, 'run') == 0
    assert len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3


def test_copies_that_were_not_made_are_made_when_a_run_goes_on(tmp_path, image_folder):
    options = ['--save-epochs', 1, '--checkpoint-hist', 3]
    assert main(tmp_path, image_folder, 'run', *options, '--stop-epoch', 1) == 0
    for name in ('checkpoint-0', 'milestone-1'):
        shutil.rmtree(tmp_path / 'run' / name)
    (tmp_path / 'run' / 'milestone-1.new').mkdir()
    assert main(tmp_path, image_folder, 'run', *options) == 0
    names = {path.name for path in (tmp_path / 'run').iterdir()}
    assert {'checkpoint-0', 'checkpoint-1', 'milestone-1'} <= names and 'milestone-1.new' not in names


def test_a_last_checkpoint_that_lost_its_name_is_found_with_its_processes(tmp_path, image_folder, monkeypatch, caplog):
    """As after a kill between the two renames: only ``last.old`` is there."""
    assert main(tmp_path, image_folder, 'run', '--stop-epoch', 1) == 0
    (tmp_path / 'run' / 'last').rename(tmp_path / 'run' / 'last.old')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-0')
    seen = []
    original = train.Data.__init__
    monkeypatch.setattr(train.Data, '__init__', lambda *args: (seen.append(args[-1]), original(*args))[1])
    assert main(tmp_path, image_folder, 'run') == 0
    assert seen == [1] and len((tmp_path / 'run' / 'summary.csv').read_text().splitlines()) == 3


def test_what_only_one_process_knows_it_says_itself(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('RANK', '3')

    def fail(error):
        raise error

    assert run_command('train', lambda: fail(UsageError('all know')), str) == 2
    assert run_command('train', lambda: fail(LocalError('an image')), str) == 2
    assert capsys.readouterr().err == 'train: error: rank 3: an image\n'
