"""What a name of a checkpoint may be, and what comes of it."""
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import mixsize_timm
from mixsize_timm import calibrate_model, models, train
from mixsize_timm.bn_stats import BatchNormStats
from mixsize_timm.errors import UsageError
from mixsize_timm.models import find_checkpoint, load

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run on a few of the digits, with an average of the weights."""
    folder = tmp_path_factory.mktemp('runs')
    assert train.main(['--model', 'test_resnet', '-b', '256', '-j', '0', '--epochs', '1', '--model-ema',
                       '--model-ema-decay', '0.5', '--calibrate', '2', '--calibrate-val', '1', '--output', str(folder),
                       '--experiment', 'run']) == 0
    return folder / 'run'


def outputs(model):
    with torch.no_grad():
        return model(IMAGES)


def of(path):
    model = timm.create_model('test_resnet', num_classes=10)
    model.load_state_dict(load_file(path))
    return model.eval()


def test_a_run_gives_its_last_average_calibrated_for_the_base_size(run):
    model = load(str(run))
    own = load(str(run), own_stats=True)
    assert torch.equal(outputs(own), outputs(of(run / 'last' / 'model_ema.safetensors')))
    assert not torch.equal(outputs(own), outputs(model)) and not model.training
    stats = BatchNormStats.load(str(run / 'last' / 'bn_stats.safetensors'))
    assert stats.sizes == (16, 24, 32, 48)
    for name, tensor in stats.by_size[32].items():
        assert torch.equal(model.get_buffer(name), tensor)
    small = load(str(run), img_size=16)
    for name, tensor in stats.by_size[16].items():
        assert torch.equal(small.get_buffer(name), tensor)


def test_the_preprocessing_of_a_run_comes_with_it(run):
    config = timm.data.resolve_model_data_config(load(str(run), img_size=24))
    assert config['input_size'] == (3, 24, 24) and config['mean'] == (0.5, 0.5, 0.5) and config['crop_pct'] == 1


def test_a_part_of_a_run_can_be_named(run):
    raw = load(str(run / 'last'), use_ema=False, own_stats=True)
    assert torch.equal(outputs(raw), outputs(of(run / 'last' / 'model.safetensors')))
    best = load(str(run / 'best'))  # calibrated for the base size when it was saved
    assert torch.equal(outputs(best), outputs(of(run / 'best' / 'model_ema.safetensors')))
    with pytest.raises(ValueError, match='no statistics for other sizes than its own 32 px'):
        load(str(run / 'best'), img_size=16)
    file = load(str(run / 'best' / 'model.safetensors'))
    assert torch.equal(outputs(file), outputs(of(run / 'best' / 'model.safetensors')))


def test_the_weights_without_average_do_not_take_its_statistics(run, caplog):
    for size in (16, 32, None):
        with pytest.raises(ValueError, match='its statistics are of no size'):
            load(str(run), img_size=size, use_ema=False)
    assert 'of other weights' in caplog.text


def test_what_was_trained_at_mixed_sizes_and_never_calibrated_says_so(run, tmp_path):
    """Its own statistics are an average over sizes; they are there for who asks by name."""
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'last' / 'bn_stats.safetensors').unlink()
    for place in ('', 'last', 'checkpoint-0', 'last/model.safetensors'):
        with pytest.raises(ValueError, match='its statistics are of no size: make them with mixsize calibrate'):
            load(str(tmp_path / 'run' / place))
    own = load(str(tmp_path / 'run' / 'checkpoint-0'), own_stats=True)
    assert torch.equal(outputs(own), outputs(of(run / 'checkpoint-0' / 'model_ema.safetensors')))
    args = (tmp_path / 'run' / 'args.yaml').read_text()
    (tmp_path / 'run' / 'args.yaml').write_text(args.replace('calibrate_val: 1', 'calibrate_val: 0'))
    with pytest.raises(ValueError, match='its statistics are of no size'):
        load(str(tmp_path / 'run' / 'best'))
    (tmp_path / 'run' / 'args.yaml').write_text(args + "\nmixsize: 'off'\n")
    assert torch.equal(outputs(load(str(tmp_path / 'run' / 'best'))), outputs(load(str(run / 'best'))))


def test_a_regime_without_the_base_size_is_calibrated_for_it_too(tmp_path, image_folder):
    assert train.main(['--data-dir', str(image_folder), '--model', 'test_resnet', '-b', '8', '-j', '0', '--epochs', '1',
                       '--img-size', '32', '--num-classes', '2', '--mixsize-sizes', '24', '48', '--calibrate', '1',
                       '--calibrate-val', '1', '--layer-decay', '0.6', '--layer-decay-no-opt-scale', '0.3',
                       '--output', str(tmp_path), '--experiment', 'run']) == 0
    stats = BatchNormStats.load(str(tmp_path / 'run' / 'last' / 'bn_stats.safetensors'))
    assert stats.sizes == (24, 32, 48)
    model = load(str(tmp_path / 'run'))
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert {len(layers) for layers in stats.by_size.values()} == {2 * norms}  # also what layer decay froze


def test_a_run_that_was_stopped_between_two_renames_is_found(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    (tmp_path / 'run' / 'last').rename(tmp_path / 'run' / 'last.old')
    assert torch.equal(outputs(load(str(tmp_path / 'run'))), outputs(load(str(run))))


def test_a_file_needs_the_name_of_its_model_and_knows_its_classes(tmp_path, run):
    shutil.copy(run / 'last' / 'model.safetensors', tmp_path / 'weights.safetensors')
    weights = str(tmp_path / 'weights.safetensors')
    with pytest.raises(ValueError, match='name it with --model'):
        load(weights)
    model = load(weights, model='test_resnet')
    assert model.num_classes == 10 and torch.equal(outputs(model), outputs(of(weights)))
    with pytest.raises(ValueError, match='cannot load .*weights.safetensors'):
        load(weights, model='test_vit')


def test_what_gives_features_is_no_classifier(run):
    with pytest.raises(UsageError, match='a FeatureListNet is no classifier'):
        load(str(run / 'last' / 'model.safetensors'), model='test_resnet', features_only=True)


def test_timms_checkpoints_are_read_without_running_what_is_in_them(tmp_path):
    model, average = (timm.create_model('test_resnet', num_classes=7).eval() for _ in range(2))
    path = str(tmp_path / 'model_best.pth.tar')
    torch.save({'state_dict': model.state_dict(), 'state_dict_ema': average.state_dict(), 'epoch': 1}, path)
    assert torch.equal(outputs(load(path, model='test_resnet')), outputs(average))
    assert torch.equal(outputs(load(path, model='test_resnet', use_ema=False)), outputs(model))

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'touched'), 'w')

    torch.save({'state_dict': model.state_dict(), 'x': Evil()}, path)
    with pytest.raises(ValueError, match='weights_only'):
        load(path, model='test_resnet')
    assert not (tmp_path / 'touched').exists()


@pytest.fixture
def hub_folder(tmp_path):
    model = timm.create_model('test_resnet', num_classes=5).eval()
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    return tmp_path / 'hub', model


@pytest.mark.parametrize('prefix', ['', 'local-dir:'])
def test_a_folder_in_hub_layout(hub_folder, prefix):
    folder, model = hub_folder
    assert torch.equal(outputs(load(f'{prefix}{folder}')), outputs(model))


def test_a_repository_of_the_hub_is_loaded_as_the_folder_it_is_fetched_to(hub_folder, monkeypatch):
    folder, model = hub_folder
    data = ['--dataset', 'digits', '--mean', '0.5', '--std', '0.5', '-j', '0', '-b', '256', '--no-aug']
    assert calibrate_model.main([str(folder), '--sizes', '16', '24', *data]) == 0
    asked = []
    monkeypatch.setattr(models, 'fetch', lambda name, **options: asked.append((name, options)) or str(folder))
    remote, local = load('hf-hub:org/name@v1', img_size=16), load(str(folder), img_size=16)
    assert asked == [('org/name@v1', {'unsafe_pickle': False})]
    assert torch.equal(outputs(remote), outputs(local)) and not torch.equal(outputs(remote), outputs(model))
    (folder / 'bn_stats.safetensors').unlink()
    assert torch.equal(outputs(load('hf-hub:org/name@v1')), outputs(model))


@pytest.mark.parametrize('name, message', [
    ('{tmp}', 'no checkpoint in'), ('{tmp}/nowhere.safetensors', 'no checkpoint at'),
    ('resnet5O', 'did you mean resnet50'), ('local-dir:{tmp}', 'no configuration of a timm model'),
    ('ftp:x', 'timm has no model'),
])
def test_what_is_not_there_is_one_line(tmp_path, name, message):
    with pytest.raises(UsageError, match=message) as caught:
        load(name.format(tmp=tmp_path))
    assert '\n' not in str(caught.value)


def test_truncated_weights_are_one_line(run, tmp_path):
    shutil.copytree(run, tmp_path / 'run')
    weights = tmp_path / 'run' / 'last' / 'model_ema.safetensors'
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match='cannot load') as caught:
        load(str(tmp_path / 'run'))
    assert '\n' not in str(caught.value)


def test_a_split_batch_norm_model_loads(tmp_path):
    assert train.main(['--model', 'test_resnet', '-b', '256', '-j', '0', '--epochs', '1', '--mixsize', 'off',
                       '--aug-splits', '2', '--split-bn', '--aa', 'rand-m1', '--calibrate', '1', '--output',
                       str(tmp_path), '--experiment', 'split']) == 0
    assert any('aux_bn' in name for name in load(str(tmp_path / 'split')).state_dict())


def test_a_run_whose_average_is_kept_on_the_cpu_is_not_the_average(tmp_path):
    """Training then validates the weights themselves, and keeps their statistics."""
    assert train.main(['--model', 'test_resnet', '-b', '256', '-j', '0', '--epochs', '1', '--model-ema',
                       '--model-ema-force-cpu', '--calibrate', '1', '--calibrate-val', '1', '--output',
                       str(tmp_path), '--experiment', 'run:1']) == 0
    model = load(str(tmp_path / 'run:1'), own_stats=True)
    assert torch.equal(outputs(model), outputs(of(tmp_path / 'run:1' / 'last' / 'model.safetensors')))
    assert load(str(tmp_path / 'run:1'), img_size=16).bn_stats.sizes == (16, 24, 32, 48)


def test_a_checkpoint_beside_timms_arguments_knows_its_model(tmp_path):
    torch.save({'state_dict': timm.create_model('test_resnet', num_classes=4).state_dict()}, tmp_path / 'best.pth.tar')
    (tmp_path / 'args.yaml').write_text('model: test_resnet\nnum_classes: 4\ndata_dir: /data\naug_splits: 3\n')
    found = find_checkpoint(str(tmp_path / 'best.pth.tar'))
    assert found.create().num_classes == 4 and found.args.mixsize == 'off'


def test_a_folder_of_bare_weights_needs_the_name_of_its_model(tmp_path):
    save_file(timm.create_model('test_resnet', num_classes=4).state_dict(), tmp_path / 'model.safetensors')
    with pytest.raises(ValueError, match='name it with --model'):
        load(str(tmp_path))
    assert load(str(tmp_path), model='test_resnet').num_classes == 4


def test_without_batch_norm_any_size_is_ready():
    model = timm.create_model('test_vit', num_classes=3)
    assert mixsize_timm.model_at(model, 64).pretrained_cfg['input_size'] == (3, 64, 64)


def test_what_training_cost_is_kept_with_the_checkpoint(run):
    cost = json.loads((run / 'sizes.json').read_text())['checkpoints'][0]['training']
    assert cost['steps'] > 0 and cost['gmacs'] > 0
    found = find_checkpoint(str(run))
    assert models.os.path.basename(found.folder) == 'last'


def test_saved_weights_of_another_shape_are_refused(tmp_path):
    save_file({'weight': torch.zeros(3)}, tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match='cannot load'):
        load(str(tmp_path / 'x.safetensors'), model='test_resnet')
