"""Batch-norm calibration: what it computes, and what it leaves alone."""
import logging

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d
from torch import nn

from mixsize_timm.calibration import calibrate


def batches(count=3, size=16, length=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 3, size, size, generator=generator) * 3 + 1 for _ in range(count)]


def test_statistics_are_the_mean_of_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = batches()
    calibrated = calibrate(model, data)
    means = torch.stack([x.mean((0, 2, 3)) for x in data]).mean(0)
    variances = torch.stack([x.var((0, 2, 3)) for x in data]).mean(0)
    torch.testing.assert_close(calibrated[0].running_mean, means)
    torch.testing.assert_close(calibrated[0].running_var, variances)
    assert calibrated[0].num_batches_tracked == 3


def test_equals_pytorchs_update_bn_where_that_is_right():
    model = timm.create_model('test_resnet', num_classes=4)
    data = batches(4, 32)
    theirs = timm.create_model('test_resnet', num_classes=4)
    theirs.load_state_dict(model.state_dict())
    torch.optim.swa_utils.update_bn(data, theirs)
    for (name, a), b in zip(calibrate(model, data).state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


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
    torch.testing.assert_close(a[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches()]).mean(0))


def test_frozen_layers_keep_their_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), FrozenBatchNormAct2d(3), nn.BatchNorm2d(3, momentum=0.))
    model[1].requires_grad_(False)
    calibrated = calibrate(model, batches())
    assert not torch.equal(calibrated[0].running_mean, torch.zeros(3))
    for i in (1, 2, 3):
        assert torch.equal(calibrated[i].running_mean, torch.zeros(3)), i


def test_a_model_for_inference_is_not_frozen():
    model = nn.Sequential(nn.BatchNorm2d(3)).requires_grad_(False)
    assert not torch.equal(calibrate(model, batches())[0].running_mean, torch.zeros(3))


@pytest.mark.parametrize('layer', [BatchNormAct2d(3), nn.BatchNorm2d(3, affine=False)])
def test_timms_own_layers_are_served(layer):
    model = nn.Sequential(layer, nn.Conv2d(3, 1, 1))
    assert not torch.equal(calibrate(model, batches())[0].running_mean, torch.zeros(3))


def test_layers_of_another_kind_are_named(caplog):
    model = nn.Sequential(nn.BatchNorm2d(3), EvoNorm2dB0(3))
    with caplog.at_level(logging.WARNING):
        calibrate(model, batches())
    assert '1 (EvoNorm2dB0)' in caplog.text and '0 (' not in caplog.text


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
