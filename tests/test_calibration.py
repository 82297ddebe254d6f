"""Batch-norm calibration: what it computes, and what it leaves alone."""
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import (
    BatchNormAct2d,
    EvoNorm2dB0,
    EvoNorm2dB1,
    EvoNorm2dB2,
    FrozenBatchNormAct2d,
    convert_splitbn_model,
)
from torch import nn

from mixsize_timm.calibration import calibrate, calibrated_layers


def batches(count=3, size=16, length=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 3, size, size, generator=generator) * 3 + 1 for _ in range(count)]


def test_population_statistics_are_those_of_all_images_at_once():
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = [x * (i + 1) + i for i, x in enumerate(batches(3))] + [batches()[0][:3]]  # the last one is shorter
    calibrated = calibrate(model, data)[0]
    everything = torch.cat(data)
    torch.testing.assert_close(calibrated.running_mean, everything.mean((0, 2, 3)))
    torch.testing.assert_close(calibrated.running_var, everything.var((0, 2, 3)))
    assert calibrated.num_batches_tracked == 4


def test_batch_statistics_are_the_mean_of_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = batches()
    calibrated = calibrate(model, data, variance='batch')[0]
    torch.testing.assert_close(calibrated.running_mean, torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0))
    torch.testing.assert_close(calibrated.running_var, torch.stack([x.var((0, 2, 3)) for x in data]).mean(0))


def test_equals_pytorchs_update_bn_where_that_is_right():
    model = timm.create_model('test_resnet', num_classes=4)
    data = batches(4, 32)
    theirs = timm.create_model('test_resnet', num_classes=4)
    theirs.load_state_dict(model.state_dict())
    torch.optim.swa_utils.update_bn(data, theirs)
    ours = calibrate(model, data, variance='batch').state_dict()
    for (name, a), b in zip(ours.items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), world_size=st.integers(1, 3))
def test_processes_together_compute_what_one_does(lengths, world_size):
    """Batches dealt out to processes, of which some may get none, and their sums reduced."""
    generator = torch.Generator().manual_seed(sum(lengths))
    data = [torch.randn(length + 1, 3, 4, 4, generator=generator) * 2 + 5 for length in lengths]
    model = nn.Sequential(nn.BatchNorm2d(3))
    one = calibrate(model, data)[0]
    processes = Processes(world_size)
    results = processes.run(lambda rank, reduce: calibrate(model, data[rank::world_size], reduce=reduce)[0])
    for result in results:
        torch.testing.assert_close(result.running_mean, one.running_mean)
        torch.testing.assert_close(result.running_var, one.running_var)
        assert result.num_batches_tracked == len(data)


class Processes:
    """Threads that sum tensors as processes would."""

    def __init__(self, number):
        self.number, self.barrier, self.parts = number, threading.Barrier(number), {}

    def run(self, function):
        def reduce(rank):
            def summed(tensor):
                self.parts[rank] = tensor
                self.barrier.wait(60)
                total = sum(self.parts[other] for other in range(self.number))
                self.barrier.wait(60)
                return total
            return summed
        with ThreadPoolExecutor(self.number) as pool:
            return list(pool.map(lambda rank: function(rank, reduce(rank)), range(self.number)))


@pytest.mark.parametrize('lengths', [[1], [1, 1, 1], [4, 1], [1, 4]])
def test_a_batch_of_one_does_not_break_it(lengths):
    """At 32 px this model's last layers see one pixel: one image has no variance there."""
    model = timm.create_model('resnet18', num_classes=2)
    calibrated = calibrate(model, [torch.randn(length, 3, 32, 32) for length in lengths])
    assert all(torch.isfinite(v).all() for v in calibrated.state_dict().values())
    if sum(lengths) > 1:
        last = calibrated.layer4[1].bn2
        assert (last.running_var > 0).all() and not torch.equal(last.running_var, torch.ones(512))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_model_of_lower_precision(dtype):
    model = timm.create_model('test_resnet', num_classes=4)
    full, low = calibrate(model, batches(4, 32)), calibrate(model.to(dtype), batches(4, 32))
    assert low.conv1[0].weight.dtype == dtype
    for (name, a), b in zip(full.named_buffers(), low.buffers()):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0.05, atol=0.02, msg=name)


def test_a_variance_beyond_the_type_is_said():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).half()
    with pytest.raises(ValueError, match='a variance is beyond float16'):
        calibrate(model, [images * 1000 for images in batches()])


def test_the_statistics_of_a_split_layer_are_those_that_evaluation_uses():
    model = convert_splitbn_model(nn.Sequential(nn.BatchNorm2d(3)), 2)
    calibrated = calibrate(model, batches())[0]
    torch.testing.assert_close(calibrated.running_mean, torch.cat(batches()).mean((0, 2, 3)))
    assert torch.equal(calibrated.aux_bn[0].running_mean, torch.zeros(3))


@pytest.mark.parametrize('layer', [EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2])
def test_evonorm_is_served(layer):
    torch.testing.assert_close(calibrate(nn.Sequential(layer(3), nn.Conv2d(3, 1, 1)), batches())[0].running_var,
                               torch.cat(batches()).var((0, 2, 3)))


def test_synchronised_batch_norm_needs_no_process_group():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    torch.testing.assert_close(calibrate(model, batches())[0].running_var, torch.cat(batches()).var((0, 2, 3)))


def test_the_model_is_not_touched():
    model = timm.create_model('test_resnet', num_classes=4).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrated = calibrate(model, batches())
    assert model.training and not calibrated.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.momentum == 0.1 for m in calibrated.modules() if isinstance(m, nn.BatchNorm2d))


def test_twice_gives_the_same_and_stops_at_num_batches():
    model = timm.create_model('test_resnet', num_classes=4)
    first, second = calibrate(model, batches(5), 2), calibrate(calibrate(model, batches(5)), batches(2))
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    a, b = calibrate(model, batches()), calibrate(model, batches())
    assert torch.equal(a[1].running_mean, b[1].running_mean)
    torch.testing.assert_close(a[1].running_mean, torch.cat(batches()).mean((0, 2, 3)))


def test_frozen_layers_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), FrozenBatchNormAct2d(3), nn.BatchNorm2d(3, momentum=0.))
    model[1].requires_grad_(False)
    calibrated = calibrate(model, batches())
    assert not torch.equal(calibrated[0].running_mean, torch.zeros(3))
    for i in (1, 2, 3):
        assert torch.equal(calibrated[i].running_mean, torch.zeros(3)), i


def test_frozen_layers_can_be_served_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].requires_grad_(False)
    images = [torch.randn(8, 3, 8, 8) + 3]
    moved = calibrate(model, images, frozen=True)
    assert not torch.equal(moved[1].running_mean, model[1].running_mean)
    assert list(calibrated_layers(moved)) == ['1'] and not list(calibrated_layers(model))
    assert model[0].weight.requires_grad and not moved[0].weight.requires_grad


def test_a_model_for_inference_is_not_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=0.)).requires_grad_(False)
    moved, kept = calibrate(model, batches())
    assert not torch.equal(moved.running_mean, torch.zeros(3))
    assert torch.equal(kept.running_mean, torch.zeros(3))


@pytest.mark.parametrize('layer', [BatchNormAct2d(3), nn.BatchNorm2d(3, affine=False)])
def test_timms_own_layers_are_served(layer):
    model = nn.Sequential(layer, nn.Conv2d(3, 1, 1))
    assert not torch.equal(calibrate(model, batches())[0].running_mean, torch.zeros(3))


class Whitening(nn.Module):
    """Some other layer with running statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer('running_var', torch.eye(3))

    def forward(self, x):
        return x


def test_layers_of_another_kind_are_named(caplog):
    model = nn.Sequential(nn.BatchNorm2d(3), Whitening())
    with caplog.at_level(logging.WARNING):
        calibrate(model, batches())
    assert '1 (Whitening)' in caplog.text and '0 (' not in caplog.text


def test_without_batch_norm_it_is_a_copy():
    model = timm.create_model('test_vit', num_classes=4)
    for a, b in zip(model.state_dict().values(), calibrate(model, []).state_dict().values()):
        assert torch.equal(a, b)


def test_no_batches_is_an_error():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match='gave no batch'):
        calibrate(model, [])
    with pytest.raises(ValueError, match='at least 1'):
        calibrate(model, batches(), 0)
    with pytest.raises(ValueError, match='variance must be one of'):
        calibrate(model, batches(), variance='none')
