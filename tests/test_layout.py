"""A folder in hub layout is checked before anything in it is used."""
import json
import os
import struct

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from mixsize_timm import load
from mixsize_timm.bn_stats import BatchNormStats, fingerprint
from mixsize_timm.errors import UsageError
from mixsize_timm.layout import check_folder, read_header, sha256, staged


@pytest.fixture
def folder(tmp_path):
    """A folder as timm writes it."""
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=3), str(tmp_path / 'hub'), safe_serialization=True)
    return tmp_path / 'hub'


def change(folder, **values):
    """Change entries of the configuration; one of ``pretrained_cfg`` with its name before."""
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    for name, value in values.items():
        part, _, entry = name.rpartition('__')
        (config[part] if part else config)[entry] = value
    path.write_text(json.dumps(config))


def claim(folder, **values):
    """Make the folder one that this package wrote."""
    change(folder, mixsize={'sha256': sha256(str(folder / 'model.safetensors')), **values})


def refusal(folder, **options):
    with pytest.raises(UsageError) as caught:
        check_folder(str(folder), **options)
    assert '\n' not in str(caught.value)
    with pytest.raises(UsageError):
        load(str(folder), **options)
    return str(caught.value)


def rewrite(folder, make):
    """Write the tensors again as ``make`` changes them."""
    tensors = load_file(folder / 'model.safetensors')
    make(tensors)
    save_file(tensors, folder / 'model.safetensors')


def test_what_timm_and_this_package_write_is_in_order(folder):
    check_folder(str(folder))
    claim(folder)
    check_folder(str(folder))
    assert load(str(folder)).num_classes == 3


@pytest.mark.parametrize('values, message', [
    (dict(architecture='resnet5000'), "has no model 'resnet5000'"),
    (dict(architecture='hf-hub:evil/model'), "has no model 'hf-hub:evil/model'"),
    (dict(architecture='local-dir:/etc'), 'has no model'),
    (dict(architecture='../../evil'), 'has no model'),
    (dict(architecture=['test_resnet']), 'has no model'),
    (dict(pretrained_cfg='x'), 'no mappings'),
    (dict(model_args=[1]), 'no mappings'),
    (dict(mixsize='x'), 'no mappings'),
    (dict(pretrained_cfg__file='/etc/passwd'), 'names weights elsewhere (file)'),
    (dict(pretrained_cfg__hf_hub_filename='../../../evil.bin'), 'names weights elsewhere (hf_hub_filename)'),
    (dict(pretrained_cfg__state_dict={'a': 1}), 'names weights elsewhere (state_dict)'),
    (dict(pretrained_cfg__custom_load='hf'), 'names weights elsewhere (custom_load)'),
    (dict(model_args__num_classes=10**12), 'model argument of 1e+12'),
    (dict(model_args__layers=[1, 10**9]), 'model argument of 1e+09'),
    (dict(pretrained_cfg__input_size=[3, 40000, 40000]), 'no image size in input_size'),
    (dict(pretrained_cfg__input_size='abc'), 'no image size in input_size'),
    (dict(pretrained_cfg__test_input_size=[3, 32.5, 32.5]), 'no image size in test_input_size'),
    (dict(model_args__checkpoint_path='/etc/passwd'), 'makes no model'),
    (dict(model_args__no_such_argument=1), 'makes no model'),
])
def test_a_configuration_that_is_not_timms_or_points_elsewhere_is_refused(folder, values, message):
    change(folder, **values)
    assert message in refusal(folder)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"architecture": "test_resnet"', '[' * 100_000])
def test_a_configuration_that_is_no_json_of_a_model_is_refused(folder, text):
    (folder / 'config.json').write_text(text)
    assert 'no configuration of a timm model' in refusal(folder)


def test_a_configuration_that_is_too_large_is_not_read(folder):
    with (folder / 'config.json').open('r+b') as file:
        file.truncate(2**26)  # sparse
    assert 'over 32 MiB' in refusal(folder)


def test_a_model_beyond_its_weights_is_not_built(folder):
    change(folder, model_args__channels=[64, 500_000, 500_000, 500_000])  # terabytes of float32
    assert 'makes a model of' in refusal(folder)


@pytest.mark.parametrize('size', [0, 5, 100, -1000, -1])
def test_weights_that_are_truncated_are_one_line(folder, size):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:size])
    assert 'model.safetensors is truncated or altered' in refusal(folder)


def test_a_header_that_promises_more_than_the_file_holds_is_refused_without_memory_for_it(folder):
    header = json.dumps({'fc.weight': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode()
    (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(header)) + header)
    assert 'truncated or altered' in refusal(folder)


def test_weights_that_were_altered_are_refused(folder):
    claim(folder)
    path = folder / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert 'it was altered' in refusal(folder)


@pytest.mark.parametrize('make, message', [
    (lambda tensors: tensors.pop('fc.bias'), 'fc.bias is missing'),
    (lambda tensors: tensors.update(more=torch.zeros(1)), 'does not fit its configuration: more [1]'),
    (lambda tensors: tensors.update({'fc.bias': torch.zeros(4)}), 'does not fit its configuration: fc.bias [4]'),
    (lambda tensors: tensors.update({'fc.bias': torch.zeros(3, dtype=torch.int64)}), 'fc.bias is of the type I64'),
    (lambda tensors: tensors.update({'fc.bias': torch.zeros(3, dtype=torch.float8_e4m3fn)}), 'which no weights are of'),
])
def test_tensors_that_are_not_the_models_are_refused(folder, make, message):
    rewrite(folder, make)
    claim(folder)
    assert message in refusal(folder)


def test_a_folder_of_others_may_name_its_tensors_otherwise(folder):
    rewrite(folder, lambda tensors: tensors.update(other=torch.zeros(1)))
    check_folder(str(folder))  # timm has filters for some; whether they fit it says itself


def test_statistics_of_another_model_are_refused(folder):
    model = timm.create_model('test_resnet', num_classes=3)
    stats = BatchNormStats(fingerprint(model))
    stats.add(32, model)
    stats.by_size[32]['bn1.running_mean'] = torch.zeros(2**16)
    stats.save(str(folder / 'bn_stats.safetensors'))
    assert 'is of another model: 32/bn1.running_mean' in refusal(folder)


@pytest.mark.parametrize('change, message', [
    (lambda by_size: by_size.update({0: by_size[32]}), 'is of another model: 0/'),
    (lambda by_size: by_size.update({-16: by_size[32]}), 'is of another model: -16/'),
    (lambda by_size: by_size.update({10**30: by_size[32]}), 'is of another model: 1000'),
    (lambda by_size: by_size.update({16: {'bn1.running_mean': by_size[32]['bn1.running_mean']}}), 'not all statistics'),
    (lambda by_size: by_size[32].update({'fc.bias': torch.zeros(3)}), 'is of another model: 32/fc.bias'),
    (lambda by_size: by_size[32]['bn1.running_mean'].fill_(float('nan')), 'values that no statistics have'),
    (lambda by_size: by_size[32]['bn1.running_var'].fill_(-1), 'values that no statistics have'),
])
def test_statistics_that_none_can_be_are_refused(folder, change, message):
    model = load(str(folder))
    stats = BatchNormStats(fingerprint(model))
    stats.add(32, model)
    change(stats.by_size)
    stats.by_size = {size: {name: tensor.clone() for name, tensor in part.items()}
                     for size, part in stats.by_size.items()}
    stats.save(str(folder / 'bn_stats.safetensors'))
    with pytest.raises(UsageError) as caught:
        load(str(folder))
    assert message in str(caught.value) and len(str(caught.value)) < 400


def test_statistics_that_were_altered_are_refused(folder):
    model = load(str(folder))
    stats = BatchNormStats(fingerprint(model))
    stats.add(32, model)
    path = folder / 'bn_stats.safetensors'
    stats.save(str(path))
    assert BatchNormStats.load(str(path)).sizes == (32,)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match='they were altered'):
        load(str(folder))
    path.write_bytes(content[:-10])
    with pytest.raises(UsageError, match='truncated or altered'):
        load(str(folder))


@pytest.fixture
def pickled(folder):
    """A folder with pickled weights alone."""
    torch.save(load_file(folder / 'model.safetensors'), folder / 'pytorch_model.bin')
    os.remove(folder / 'model.safetensors')
    return folder


def test_pickled_weights_are_refused_unless_their_risk_is_taken_by_name(pickled):
    assert 'pickled weights only (pytorch_model.bin), which can run code' in refusal(pickled)
    assert load(str(pickled), unsafe_pickle=True).num_classes == 3


def test_pickled_weights_run_no_code_even_then(pickled, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    torch.save({'fc.weight': Evil()}, pickled / 'pytorch_model.bin')
    with pytest.raises(UsageError, match='cannot load'):
        load(str(pickled), unsafe_pickle=True)
    assert not (tmp_path / 'evil').exists()


def test_pickled_weights_beside_others_are_not_read(folder):
    (folder / 'pytorch_model.bin').write_bytes(b'no pickle')
    assert load(str(folder)).num_classes == 3


def test_a_folder_without_weights_is_refused(folder):
    os.remove(folder / 'model.safetensors')
    assert 'has no model.safetensors' in refusal(folder)


def test_the_header_tells_shapes_and_types(folder):
    header = read_header(str(folder / 'model.safetensors'))
    assert header['fc.weight'][1] == 'F32' and header['fc.weight'][0][0] == 3
    assert header['bn1.num_batches_tracked'] == ((), 'I64')


def test_nothing_takes_its_place_until_all_is_whole(tmp_path):
    (tmp_path / 'a').write_text('old')
    with pytest.raises(RuntimeError), staged(str(tmp_path)) as aside:
        with open(os.path.join(aside, 'a'), 'w') as file:
            file.write('new')
        raise RuntimeError
    assert os.listdir(tmp_path) == ['a'] and (tmp_path / 'a').read_text() == 'old'
    with pytest.raises(RuntimeError), staged(str(tmp_path / 'none')):
        raise RuntimeError
    assert not (tmp_path / 'none').exists()
    with staged(str(tmp_path / 'new')) as aside, open(os.path.join(aside, 'a'), 'w') as file:
        file.write('new')
    assert os.listdir(tmp_path / 'new') == ['a']
    with staged(str(tmp_path / 'new'), ('a', 'b')) as aside, open(os.path.join(aside, 'b'), 'w') as file:
        file.write('newer')
    assert os.listdir(tmp_path / 'new') == ['b']
