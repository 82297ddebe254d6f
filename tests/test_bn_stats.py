"""Statistics for many sizes: kept, switched, and refused where they do not belong."""
import logging
import os

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from mixsize_timm import calibrate, model_at
from mixsize_timm.bn_stats import BatchNormStats, fingerprint


def images(size, seed=0):
    return [torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 1]


@pytest.fixture
def model():
    return timm.create_model('test_resnet', num_classes=4).eval()


@pytest.fixture
def stats(model):
    stats = BatchNormStats(fingerprint(model))
    for size in (16, 32, 64):
        stats.add(size, calibrate(model, images(size)))
    return stats


def same(a, b):
    return all(torch.equal(x, y) for (name, x), y in zip(a.state_dict().items(), b.state_dict().values())
               if 'num_batches' not in name)


def test_a_model_is_switched_between_sizes_and_back(tmp_path, model, stats):
    path = str(tmp_path / 'bn_stats.safetensors')
    stats.save(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert BatchNormStats.load(path).attach(model)
    for size in (32, 16, 64, 16):
        assert model_at(model, size) is model
        assert same(model, calibrate(model, images(size)))
        assert timm.data.resolve_model_data_config(model)['input_size'] == (3, size, size)
    model_at(model, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_file_is_a_few_per_cent_of_the_weights(tmp_path):
    model = timm.create_model('resnet18')
    stats = BatchNormStats(fingerprint(model))
    for size in range(96, 321, 32):
        stats.add(size, model)
    stats.save(str(tmp_path / 'stats'))
    save_file(model.state_dict(), tmp_path / 'weights')
    assert os.path.getsize(tmp_path / 'stats') < 0.02 * os.path.getsize(tmp_path / 'weights')


def test_a_size_between_takes_the_nearest_and_says_so(model, stats, caplog):
    stats.attach(model)
    with caplog.at_level(logging.WARNING):
        model_at(model, 40)
    assert 'Not calibrated for 40 px: the statistics of 32 px are used' in caplog.text
    assert same(model, calibrate(model, images(32)))
    assert model.pretrained_cfg['input_size'] == (3, 40, 40)


@given(sizes=st.sets(st.integers(8, 512), min_size=1, max_size=6), size=st.integers(8, 512))
def test_the_nearest_size_has_the_smallest_ratio(sizes, size):
    stats = BatchNormStats('')
    stats.by_size = {other: {} for other in sizes}
    nearest = stats.nearest(size)
    ratio = max(nearest, size) / min(nearest, size)
    assert all(ratio <= max(other, size) / min(other, size) * (1 + 1e-12) for other in sizes)
    assert nearest == size or size not in sizes


def test_statistics_of_other_weights_are_left_out(model, stats, caplog):
    other = timm.create_model('test_resnet', num_classes=4)
    with caplog.at_level(logging.WARNING):
        assert not stats.attach(other)
    assert 'of other weights' in caplog.text and not hasattr(other, 'bn_stats')


def test_the_fingerprint_is_of_the_weights_and_not_of_the_statistics(model):
    calibrated = calibrate(model, images(32))
    assert fingerprint(calibrated) == fingerprint(model)
    with torch.no_grad():
        next(calibrated.parameters()).flatten()[0] += 1e-3
    assert fingerprint(calibrated) != fingerprint(model)


@pytest.mark.parametrize('damage', [
    lambda data: data[:100], lambda data: b'', lambda data: b'{' + data[1:], lambda data: os.urandom(len(data))])
def test_a_damaged_file_is_one_line(tmp_path, stats, damage):
    path = tmp_path / 'bn_stats.safetensors'
    stats.save(str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match='not readable') as caught:
        BatchNormStats.load(str(path))
    assert '\n' not in str(caught.value)
    save_file({'weight': torch.zeros(3)}, path)  # a safetensors file of something else
    with pytest.raises(ValueError, match='not readable'):
        BatchNormStats.load(str(path))
    with pytest.raises(FileNotFoundError, match='no statistics'):
        BatchNormStats.load(str(tmp_path / 'nowhere'))


def test_the_fingerprint_is_of_values_and_not_of_types(model):
    low = model.bfloat16()
    assert fingerprint(low) == fingerprint(low.float())


def test_a_model_whose_norms_are_frozen_later_is_switched_all_the_same(model, stats):
    stats.attach(model)
    model.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    model_at(model, 16)
    first = next(iter(stats.by_size[16]))
    assert torch.equal(model.get_buffer(first), stats.by_size[16][first])


def test_sizes_of_a_file_that_is_replaced_can_be_kept(tmp_path, model, stats):
    path = str(tmp_path / 'stats')
    stats.save(path)
    other = BatchNormStats(stats.weights)
    other.add(96, model)
    other.save(path, keep_others=True)
    assert BatchNormStats.load(path).sizes == (16, 32, 64, 96)
    foreign = BatchNormStats('another')
    foreign.add(24, model)
    foreign.save(path, keep_others=True)
    assert BatchNormStats.load(path).sizes == (24,)


def test_a_size_with_fewer_layers_has_the_models_own_in_the_others(tmp_path, model, stats):
    """Whatever was applied before it."""
    first = next(iter(stats.by_size[16]))
    del stats.by_size[16][first]
    stats.attach(model)
    own = model.get_buffer(first).clone()
    model_at(model, 32)
    assert not torch.equal(model.get_buffer(first), own)
    model_at(model, 16)
    assert torch.equal(model.get_buffer(first), own)


def test_sizes_with_other_layers_are_not_kept(tmp_path, model, stats, caplog):
    path = str(tmp_path / 'stats')
    stats.by_size[16].popitem()
    stats.save(path)
    other = BatchNormStats(stats.weights)
    other.add(96, model)
    other.save(path, keep_others=True)
    assert BatchNormStats.load(path).sizes == (32, 64, 96) and 'other layers' in caplog.text


def test_a_model_without_statistics_says_where_they_come_from(model):
    with pytest.raises(ValueError, match='mixsize calibrate'):
        model_at(model, 32)


def test_without_batch_norm_only_the_input_size_changes():
    model = timm.create_model('test_vit', num_classes=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model_at(model, 96).pretrained_cfg['input_size'] == (3, 96, 96)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_fit_a_model_of_lower_precision(model, stats):
    stats.attach(model)
    model_at(model.half(), 16)
    assert all(tensor.dtype == torch.float16 for name, tensor in model.named_buffers() if 'running' in name)
