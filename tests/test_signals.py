"""A run that is asked to stop finishes its step, and goes on later as if it had not."""
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from mixsize_timm import engine, train

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


@pytest.mark.parametrize('options', [[], ['--no-prefetcher', '--micro-batch-size', 3], ['--grad-accum-steps', 2]],
                         ids=str)
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
