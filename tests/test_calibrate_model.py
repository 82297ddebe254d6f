"""``mixsize calibrate``: statistics for any model, beside its weights or with them in a folder."""
import json
import shutil

import pytest
import timm
import torch
from conftest import write_images
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from mixsize_timm import calibrate_model, evaluate, load, train
from mixsize_timm.bn_stats import BatchNormStats
from mixsize_timm.calibration import calibrate
from mixsize_timm.data import create_calibration_loader
from mixsize_timm.loaders import EvaluationData


@pytest.fixture
def hub_folder(tmp_path):
    model = timm.create_model('test_resnet', num_classes=2)
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    return tmp_path / 'hub'


@pytest.fixture
def unlabelled(tmp_path):
    write_images(tmp_path / 'flat', 12)
    return tmp_path / 'flat'


def command(*argv):
    return calibrate_model.main([*map(str, argv), '-j', '0', '-b', '4'])


def test_unlabelled_images_are_enough(hub_folder, unlabelled, capsys):
    weights = load_file(hub_folder / 'model.safetensors')
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32, 48) == 0
    out = capsys.readouterr().out
    assert '32, 48 px are in' in out and f"mixsize_timm.load('{hub_folder}', img_size=32)" in out
    after = load_file(hub_folder / 'model.safetensors')
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
    model = load(str(hub_folder), img_size=32, own_stats=True)
    config = timm.data.resolve_model_data_config(model)
    loader = create_calibration_loader(
        timm.data.create_dataset('', root=str(unlabelled), split='train'), (3, 32, 32), 4, mean=config['mean'],
        std=config['std'], interpolation='random', num_workers=0, device=torch.device('cpu'))
    expected, given = calibrate(model, loader), load(str(hub_folder), img_size=32)
    for (name, a), b in zip(expected.state_dict().items(), given.state_dict().values()):
        assert 'num_batches' in name or torch.equal(a, b), name


def test_sizes_are_added_and_not_replaced_without_being_asked(hub_folder, unlabelled, capsys):
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32) == 0
    path = hub_folder / 'bn_stats.safetensors'
    first = BatchNormStats.load(str(path))
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32, 48) == 2
    assert 'has 32 px already' in capsys.readouterr().err
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 48) == 0
    both = BatchNormStats.load(str(path))
    assert both.sizes == (32, 48)
    assert all(torch.equal(both.by_size[32][name], tensor) for name, tensor in first.by_size[32].items())
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32, '--no-aug', '--overwrite') == 0
    again = BatchNormStats.load(str(path))
    assert again.sizes == (32, 48)
    assert not all(torch.equal(again.by_size[32][name], tensor) for name, tensor in first.by_size[32].items())


def test_statistics_of_other_weights_are_not_replaced_without_being_asked(hub_folder, unlabelled, capsys):
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32) == 0
    save_file(timm.create_model('test_resnet', num_classes=2).state_dict(), hub_folder / 'model.safetensors')
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 48) == 2
    assert 'is of other weights: --overwrite replaces it' in capsys.readouterr().err
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 48, '--overwrite') == 0
    assert BatchNormStats.load(str(hub_folder / 'bn_stats.safetensors')).sizes == (48,)


def test_a_file_gets_them_beside_it_or_becomes_a_folder(tmp_path, unlabelled, capsys):
    model = timm.create_model('test_resnet', num_classes=3)
    (tmp_path / 'timm').mkdir()
    file = tmp_path / 'timm' / 'checkpoint.pth.tar'
    torch.save({'state_dict': model.state_dict()}, file)
    options = ['--model', 'test_resnet', '--data-dir', unlabelled, '--sizes', 32]
    assert command(file, *options) == 0
    assert load(str(file), img_size=32, model='test_resnet').num_classes == 3
    assert command(file, *options, '--output', tmp_path / 'out') == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {
        'config.json', 'model.safetensors', 'bn_stats.safetensors'}
    plain = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))
    assert not torch.equal(next(load(str(tmp_path / 'out'), img_size=32).buffers()), next(plain.buffers()))
    assert "model='test_resnet') gives" in capsys.readouterr().out
    assert command(file, *options, '--output', tmp_path / 'out') == 2
    assert 'has 32 px already' in capsys.readouterr().err
    assert command(file, *options[:-1], 48, '--output', tmp_path / 'out') == 0
    assert BatchNormStats.load(str(tmp_path / 'out' / 'bn_stats.safetensors')).sizes == (32, 48)


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json'])
def test_other_weights_are_not_written_over_without_being_asked(hub_folder, tmp_path, unlabelled, capsys, name):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / name).write_text('mine')
    options = [hub_folder, '--data-dir', unlabelled, '--sizes', 32, '--output', tmp_path / 'out']
    assert command(*options) == 2
    assert f'already holds {name}' in capsys.readouterr().err and (tmp_path / 'out' / name).read_text() == 'mine'
    (tmp_path / 'out' / 'state.json').write_text('{}')
    assert command(*options, '--overwrite') == 2
    assert 'is a checkpoint of a run' in capsys.readouterr().err and (tmp_path / 'out' / name).read_text() == 'mine'


def test_the_best_of_a_run_can_be_calibrated_too(tmp_path, image_folder):
    assert train.main(['--model', 'test_resnet', '--img-size', '32', '--data-dir', str(image_folder), '--num-classes',
                       '2', '-b', '4', '-j', '0', '--epochs', '1', '--warmup-epochs', '0', '--output', str(tmp_path),
                       '--experiment', 'run']) == 0
    best = tmp_path / 'run' / 'best'
    assert command(best) == 0  # the sizes and the images of the run
    assert BatchNormStats.load(str(best / 'bn_stats.safetensors')).sizes == (16, 24, 32, 48)
    assert evaluate.main([str(best), '--calibrate', 'kept', '--no-speed', '--output', str(tmp_path / 'report')]) == 0
    rows = json.loads((tmp_path / 'report' / 'sizes.json').read_text())['checkpoints'][0]['results']
    assert [row['img_size'] for row in rows] == [16, 24, 32, 48]


def test_a_checkpoint_of_a_run_is_never_made_a_folder_of_the_hub(tmp_path, image_folder, capsys):
    """Its statistics are of the average: the weights themselves beside them would be lost."""
    assert train.main(['--model', 'test_resnet', '--img-size', '32', '--data-dir', str(image_folder), '--num-classes',
                       '2', '-b', '4', '-j', '0', '--epochs', '1', '--model-ema', '--output', str(tmp_path),
                       '--experiment', 'run']) == 0
    last = tmp_path / 'run' / 'last'
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    assert command(tmp_path / 'run', '--output', last, '--sizes', 40, '--overwrite') == 2
    assert 'is a checkpoint of a run' in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before


@pytest.mark.parametrize('options, message', [
    (['--sizes', '32'], 'no images named'),
    (['--data-dir', '{flat}'], 'say which with --sizes'),
    (['--data-dir', '{flat}', '--sizes', '-3'], '--sizes must be positive'),
    (['--data-dir', '{flat}', '--sizes', '32', '--calibrate', '0'], '--calibrate must be at least 1'),
    (['--data-dir', '{flat}/none', '--sizes', '32'], 'no data at'),
    (['--data-dir', '{flat}', '--sizes', '32', '--aa', 'none'], 'cannot load the images'),
    (['--data-dir', '{flat}', '--sizes', '32', '--seed', '-1'], '--seed must be from 0'),
])
def test_what_cannot_work_is_one_line(hub_folder, unlabelled, capsys, options, message):
    before = sorted(hub_folder.iterdir())
    assert command(hub_folder, *(option.format(flat=unlabelled) for option in options)) == 2
    error = capsys.readouterr().err
    assert error.startswith('mixsize calibrate: error: ') and error.count('\n') == 1 and message in error
    assert sorted(hub_folder.iterdir()) == before


def test_a_model_without_batch_norm_is_refused(tmp_path, unlabelled, capsys):
    save_for_hf(timm.create_model('test_vit', num_classes=2), str(tmp_path / 'vit'), safe_serialization=True)
    assert command(tmp_path / 'vit', '--data-dir', unlabelled, '--sizes', 160) == 2
    assert 'has no batch norm: there is nothing to calibrate' in capsys.readouterr().err


def test_what_ends_a_calibration_is_one_line(hub_folder, unlabelled, monkeypatch, capsys):
    def error_of():
        assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32) == 2
        return capsys.readouterr().err.splitlines()[-1]

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationData, 'calibration_loader', lambda *_: ())
        assert error_of() == ('mixsize calibrate: error: cannot calibrate for 32 px: the loader gave no batch to '
                              'calibrate on: lower its batch size or add images')
    for path in unlabelled.iterdir():
        path.write_bytes(b'broken')
    assert error_of().startswith('mixsize calibrate: error: 10 images in a row cannot be read, the last one ')
    assert not (hub_folder / 'bn_stats.safetensors').exists()


def test_ctrl_c_leaves_what_was_there(hub_folder, unlabelled, monkeypatch, capsys):
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 32) == 0
    shutil.copytree(hub_folder, hub_folder.parent / 'before')

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_model.BatchNormStats, 'add', stop)
    assert command(hub_folder, '--data-dir', unlabelled, '--sizes', 48) == 130
    assert 'nothing was written' in capsys.readouterr().err
    for path in hub_folder.iterdir():
        assert path.read_bytes() == (hub_folder.parent / 'before' / path.name).read_bytes()
