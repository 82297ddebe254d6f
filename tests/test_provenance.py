"""What a run records of itself, and what results say of where they are from."""
import json
import re
import sys

import pytest
import timm
import torch

from mixsize_timm import evaluate, train
from mixsize_timm.bn_stats import BatchNormStats, digest, fingerprint
from mixsize_timm.models import load
from mixsize_timm.provenance import command_line, read_run

TRAIN = ['--model', 'test_resnet', '-b', '256', '-j', '0', '--epochs', '1', '--calibrate', '2']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    assert train.main([*TRAIN, '--output', str(folder), '--experiment', 'run']) == 0
    return folder / 'run'


def entry(folder):
    return json.loads((folder / 'sizes.json').read_text())['checkpoints'][0]


def test_a_run_records_its_command_machine_versions_and_data(run):
    record = read_run(str(run))
    (start,) = record['starts']
    assert start['command'] == ' '.join(['python -m mixsize_timm.train', *TRAIN, '--output', str(run.parent),
                                         '--experiment run'])
    assert re.fullmatch(r'20\d\d-\d\d-\d\d', start['date']) and start['epoch'] == 0 and start['precision'] == 'no'
    assert f'timm {timm.__version__}' in start['versions'] and f'torch {torch.__version__}' in start['versions']
    assert record['data'] == {'train_images': 1437, 'validation_images': 360,
                              'class_names': [str(i) for i in range(10)]}
    assert record['regime']['sizes'] == [16, 24, 32, 48]


def test_a_run_that_goes_on_adds_its_start_in_the_same_folder_and_in_another(run, tmp_path):
    to = ['--output', str(tmp_path), '--experiment', 'other']
    assert train.main(['--resume', str(run), '--epochs', '2', *to]) == 0
    assert [start['epoch'] for start in read_run(str(tmp_path / 'other'))['starts']] == [0, 1]
    assert train.main(['--resume', str(tmp_path / 'other'), '--epochs', '2']) == 0
    assert [start['epoch'] for start in read_run(str(tmp_path / 'other'))['starts']] == [0, 1, 2]
    assert len(read_run(str(run))['starts']) == 1


def test_a_record_that_is_broken_is_one_line(tmp_path):
    assert read_run(str(tmp_path)) == {}
    (tmp_path / 'run.json').write_text('{')
    with pytest.raises(ValueError, match='run.json is not readable'):
        read_run(str(tmp_path))


@pytest.mark.parametrize('command, expected', [
    ([sys.executable, '-m', 'mixsize_timm.train', '--help me'], "python -m mixsize_timm.train '--help me'"),
    ([sys.executable, '-m', 'mixsize_timm.cli', 'train', '-j', '0'], 'python -m mixsize_timm.train -j 0'),
])
def test_the_command_is_that_which_was_typed(command, expected, monkeypatch):
    monkeypatch.setattr(sys, 'orig_argv', command)
    monkeypatch.setattr(sys, 'argv', command[2:])
    typed = command_line(command[4:] if 'train' in command else None, 'mixsize_timm.train')
    assert re.sub(r'^python\S*', 'python', typed) == expected


def test_a_call_from_python_is_a_command_that_does_the_same():
    assert command_line(['--epochs', '3'], 'mixsize_timm.train') == 'python -m mixsize_timm.train --epochs 3'


def test_results_say_of_which_weights_and_statistics_they_are(run):
    own, calibrated = load(str(run), own_stats=True), BatchNormStats.load(str(run / 'last' / 'bn_stats.safetensors'))
    assert entry(run)['weights'] == fingerprint(own) == calibrated.weights
    assert entry(run)['statistics'] == digest(own)
    for row in entry(run)['results']:
        assert row['statistics'] == calibrated.digest(row['img_size']) != digest(own)
    assert len({row['statistics'] for row in entry(run)['results']}) == 4
    assert entry(run)['num_params'] == sum(parameter.numel() for parameter in own.parameters())


def test_an_evaluation_says_the_same_of_the_kept_statistics_and_another_of_those_it_makes(run, tmp_path):
    for name, calibrate in (('kept', 'kept'), ('made', '1'), ('none', '0')):
        assert evaluate.main([str(run), '--calibrate', calibrate, '--no-speed', '--output', str(tmp_path / name)]) == 0
    kept, made, none = (entry(tmp_path / name) for name in ('kept', 'made', 'none'))
    assert kept['weights'] == made['weights'] == none['weights'] == entry(run)['weights']
    of = {name: [row['statistics'] for row in part['results']] for name, part in (
        ('run', entry(run)), ('kept', kept), ('made', made))}
    assert of['kept'] == of['run'] and not set(of['made']) & set(of['run'])
    assert {row['statistics'] for row in none['results']} == {none['statistics']} == {entry(run)['statistics']}


def test_the_digest_does_not_depend_on_the_type(run):
    model = load(str(run), own_stats=True)
    before = digest(model)
    for buffer in model.buffers():
        buffer.copy_(buffer.to(torch.bfloat16)) if buffer.is_floating_point() else None
    rounded = digest(model)
    assert rounded != before and digest(model.to(torch.bfloat16)) == rounded
