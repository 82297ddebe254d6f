"""Checkpoints survive: torn ones are recognised, full disks leave what is there, the last good one is never removed."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import copy_run, save_checkpoint, write_image_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from mixsize_timm import checkpoint, train
from mixsize_timm.checkpoint import (
    SaveError,
    check_whole,
    checkpoints_of,
    load_checkpoint,
    newest_checkpoint,
    position_of,
    take_snapshot,
)
from mixsize_timm.saver import CheckpointHistory, CheckpointInterval, CheckpointSaver

HOLDER = """
import os, sys, time
from mixsize_timm.saver import claim
file = claim(sys.argv[1])
worker = os.fork()
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


class Tiny(torch.nn.Linear):
    def __init__(self, value=0.):
        super().__init__(2, 2)
        torch.nn.init.constant_(self.weight, value)


def saver_of(folder, *milestones, limit=1):
    return CheckpointSaver(str(folder), CheckpointHistory(str(folder), limit), milestones)


def snapshot(epoch, step=0):
    return take_snapshot(Tiny(epoch), {'epoch': epoch}, position=(epoch, step), steps=100 * epoch + step)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved') / 'last'
    save_checkpoint(str(folder), Tiny(), {'epoch': 1, 't': torch.ones(3)}, Tiny(1.), position=(1, 0))
    return folder


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_flipped_byte_and_every_lost_byte_is_noticed(saved, tmp_path_factory, data):
    copy = tmp_path_factory.mktemp('copy') / 'last'
    shutil.copytree(saved, copy)
    name = data.draw(st.sampled_from([name for name in names(saved) if name != 'manifest.json']))
    content = bytearray((copy / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        del content[place:]
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match='is not whole'):
        check_whole(str(copy))
    with pytest.raises(ValueError, match='is not whole'):
        load_checkpoint(str(copy), Tiny())


@pytest.mark.parametrize('damage', ['', '{', '[]', '{"files": {}}', None], ids=str)
def test_a_checkpoint_without_its_manifest_is_not_whole_and_is_looked_at_first(saved, tmp_path, damage):
    shutil.copytree(saved, tmp_path / 'last')
    save_checkpoint(str(tmp_path / 'recovery-3-2'), Tiny(), {}, position=(3, 2))
    (tmp_path / 'last' / 'manifest.json').unlink()
    if damage is not None:
        (tmp_path / 'last' / 'manifest.json').write_text(damage)
    with pytest.raises(ValueError, match='manifest.json is missing or not readable'):
        check_whole(str(tmp_path / 'last'))
    assert [os.path.basename(path) for path in checkpoints_of(str(tmp_path))] == ['last', 'recovery-3-2']


def test_a_snapshot_does_not_change_with_what_it_was_taken_of():
    model, state = Tiny(), {'t': torch.zeros(2)}
    taken = take_snapshot(model, state)
    torch.nn.init.constant_(model.weight, 5.)
    state['t'] += 1
    assert (taken.tensors['model.safetensors']['weight'] == 0).all() and (taken.tensors['state.safetensors']['0'] == 0
                                                                          ).all()


def test_a_full_disk_leaves_what_is_there_and_says_how_much_is_missing(tmp_path, monkeypatch):
    last = tmp_path / 'last'
    save_checkpoint(str(last), Tiny(1.), {'epoch': 1}, position=(1, 0))
    usage = shutil._ntuple_diskusage(100, 90, 10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: usage)
        with pytest.raises(SaveError, match='No space left on device: it has 24 bytes, 14 bytes are missing'):
            save_checkpoint(str(last), Tiny(2.), position=(2, 0))
    original = checkpoint.write_flushed

    def write(path, *content):  # a quota, which the size of the disk does not tell of
        if path.endswith('state.json'):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return original(path, *content)

    monkeypatch.setattr(checkpoint, 'write_flushed', write)
    with pytest.raises(SaveError, match='quota'):
        save_checkpoint(str(last), Tiny(2.), {'epoch': 2}, position=(2, 0))
    assert names(tmp_path) == ['last'] and load_checkpoint(str(last), Tiny()) == {'epoch': 1}


def test_what_was_written_otherwise_than_it_was_meant_does_not_replace_anything(tmp_path, monkeypatch):
    last = tmp_path / 'last'
    save_checkpoint(str(last), Tiny(1.), {'epoch': 1}, position=(1, 0))
    original = checkpoint.write_flushed

    def write(path, *content):  # a disk that loses the end of a file and says nothing
        said = original(path, *content)
        with open(path, 'r+b') as file:
            file.truncate(said['size'] - 1)
        return said

    monkeypatch.setattr(checkpoint, 'write_flushed', write)
    with pytest.raises(SaveError, match='cannot save .*last: the checkpoint .* is not whole'):
        save_checkpoint(str(last), Tiny(2.), {'epoch': 2}, position=(2, 0))
    assert names(tmp_path) == ['last'] and position_of(str(last)) == (1, 0)


def test_the_one_before_the_last_is_kept_and_recovery_is_pruned(tmp_path):
    saver = saver_of(tmp_path, 2)
    for step in (1, 2, 3):
        saver.save_recovery(snapshot(0, step))
    saver.save_epoch(snapshot(1), best=take_snapshot(Tiny()))
    saver.wait()
    assert names(tmp_path) == ['best', 'last', 'recovery-0-2', 'recovery-0-3']
    saver.save_epoch(snapshot(2))
    saver.close(finished=True)
    assert names(tmp_path) == ['best', 'last', 'last.old', 'milestone-2']
    assert position_of(str(tmp_path / 'last')) == (2, 0) and position_of(str(tmp_path / 'last.old')) == (1, 0)
    assert [os.path.basename(path) for path in checkpoints_of(str(tmp_path))] == ['last', 'milestone-2', 'last.old']


def test_a_save_that_fails_is_said_and_removes_nothing_and_the_next_one_makes_up_for_it(tmp_path, monkeypatch, caplog):
    saver = saver_of(tmp_path)
    for epoch in (0, 1):
        saver.history.rank(epoch, float(-epoch))
        saver.save_epoch(snapshot(epoch + 1))
    saver.save_recovery(snapshot(2, 3))
    saver.wait()
    before = names(tmp_path)
    assert 'checkpoint-0' in before
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, '_check_space', lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, 'read-only')))
        saver.history.rank(2, 5.)  # takes the place of epoch 0
        saver.save_epoch(snapshot(3), best=snapshot(3))
        saver.wait()
        assert names(tmp_path) == before and 'read-only; the checkpoints before it are as they were' in caplog.text
        assert position_of(newest_checkpoint(str(tmp_path))) == (2, 0)
    saver.history.rank(3, 4.)
    saver.save_epoch(snapshot(4))
    saver.close()
    assert 'checkpoint-0' not in names(tmp_path) and position_of(str(tmp_path / 'last')) == (4, 0)


def test_an_epoch_that_was_not_saved_takes_no_place_among_the_best(tmp_path, monkeypatch):
    saver, lost = saver_of(tmp_path), []
    for epoch, metric in enumerate((50., 90., 70.)):
        saver.wait()
        saver.history.rank(epoch, metric)
        with monkeypatch.context() as patch:
            if epoch == 1:
                patch.setattr(checkpoint, '_check_space', lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, 'bad')))
            saver.save_epoch(snapshot(epoch + 1), best=take_snapshot(Tiny()), on_lost_best=lambda: lost.append(1))
            saver.wait()
        if epoch == 1:
            assert saver.history.entries == [(0, 50.)] and 'checkpoint-0' in names(tmp_path) and lost == [1]
    saver.close()
    assert 'checkpoint-2' in names(tmp_path) and 'checkpoint-0' not in names(tmp_path) and lost == [1]


def test_a_run_whose_last_checkpoint_was_not_written_says_so_at_its_end(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    saver.save_epoch(snapshot(1))
    saver.wait()
    monkeypatch.setattr(checkpoint, '_check_space', lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, 'read-only')))
    saver.save_epoch(snapshot(2))
    with pytest.raises(SaveError, match='read-only'):
        saver.close(finished=True)
    assert names(tmp_path) == ['last']


def test_at_the_end_a_checkpoint_that_is_newer_than_the_last_epoch_stays(tmp_path):
    saver = saver_of(tmp_path)
    saver.save_epoch(snapshot(1))
    saver.save_recovery(snapshot(1, 5))  # the epochs after it had losses that are not finite
    saver.close(finished=True)
    assert names(tmp_path) == ['last', 'recovery-1-5']


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    release, original = threading.Event(), checkpoint.write_flushed
    monkeypatch.setattr(checkpoint, 'write_flushed', lambda *args: (release.wait(20), original(*args))[1])
    saver = saver_of(tmp_path)
    saver.save_recovery(snapshot(0, 1))  # returns although nothing can be written yet
    assert not (tmp_path / 'recovery-0-1').exists()
    release.set()
    saver.wait()
    assert position_of(str(tmp_path / 'recovery-0-1')) == (0, 1)


@pytest.mark.skipif(not os.path.isdir('/proc/self/task'), reason=(
    'this system does not list the threads of a process as Linux does; what the thread writes is tested everywhere'))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_writing_starts_no_threads_of_torch_that_would_slow_down_the_steps_beside_it(tmp_path, dtype):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        taken = take_snapshot(torch.nn.Linear(1000, 1000, dtype=dtype), {'t': torch.ones(1000, 1000, dtype=dtype)})
        saver = saver_of(tmp_path)
        saver.wait()
        threads = len(os.listdir('/proc/self/task'))
        saver.save_epoch(taken, best=taken)
        saver.wait()
        assert len(os.listdir('/proc/self/task')) == threads + 1  # the saver's own
        saver.close()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('text,steps,seconds', [('0', 0, 0), ('500', 500, 0), ('30m', 0, 1800), ('0.5m', 0, 30)])
def test_an_interval_is_in_steps_or_minutes(text, steps, seconds):
    interval = CheckpointInterval(text)
    assert (interval.steps, interval.seconds) == (steps, seconds)
    assert [interval.step_is_due(step) for step in (499, 500)] == [False, bool(steps)]
    interval._since -= 31
    assert interval.minutes_over() == (seconds == 30)


@pytest.mark.parametrize('text', ['', 'm', '-1', '1.5', '5s', 'nan', '-2m', 'nanm'])
def test_other_intervals_are_refused(text):
    with pytest.raises(ValueError, match='must be a number of steps such as 500, minutes such as 30m, or 0'):
        CheckpointInterval(text)


TINY = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--opt', 'sgd', '--lr', '0.05', '--warmup-epochs', '0',
        '--img-size', '32', '--num-classes', '2', '--mixsize-sizes', '24', '32', '--calibrate', '0', '--calibrate-val',
        '0', '--model-ema', '--checkpoint-interval', '2', '--no-aug']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with images and a run of two of its three epochs; and its arguments."""
    tmp = tmp_path_factory.mktemp('trained')
    argv = [*TINY, '--data-dir', str(write_image_folder(tmp / 'data')), '--epochs', '3', '--experiment', 'run',
            '--resume', 'auto', '--checkpoint-hist', '1']
    assert train.main([*argv, '--output', str(tmp), '--stop-epoch', '2']) == 0
    return tmp / 'run', argv


@pytest.mark.parametrize('damaged', ['model.safetensors', 'model_ema.safetensors', 'state.json', 'manifest.json'])
def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one(tmp_path, trained, caplog, damaged):
    folder = copy_run(trained[0], tmp_path / 'run')
    argv = [*trained[1], '--output', str(tmp_path)]
    reference = (folder / 'summary.csv').read_text()
    path = folder / 'last' / damaged
    path.write_bytes(path.read_bytes()[:-7])
    assert train.main([*argv, '--stop-epoch', '2']) == 0
    assert 'the one before it is used' in caplog.text and 'is last.torn now' in caplog.text
    assert (folder / 'summary.csv').read_text() == reference and position_of(str(folder / 'last')) == (2, 0)
    for torn in checkpoints_of(str(folder)):
        os.truncate(os.path.join(torn, 'model.safetensors'), 10)
    assert train.main(argv) == 2
    assert json.loads((folder / 'last' / 'manifest.json').read_text())['position'] == [2, 0]  # nothing is taken away


def test_a_folder_is_one_runs_at_a_time_until_that_dies(tmp_path, trained, capsys):
    folder = copy_run(trained[0], tmp_path / 'run')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and path.name != '.lock'}
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        argv = [*trained[1], '--output', str(tmp_path)]
        assert train.main(argv) == 2
        assert f'a run that is still alive (process {holder.pid} on ' in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before
        holder.kill()
        holder.wait()
        assert train.main(argv) == 0 and position_of(str(folder / 'last')) == (3, 0)  # its worker is alive still
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)
        holder.communicate()
