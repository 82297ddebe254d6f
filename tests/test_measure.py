"""What is measured at a size: intervals, operations, speed."""
import random

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mixsize_timm.bn_stats import BatchNormStats
from mixsize_timm.measure import accuracy_interval, count_gmacs, measure_sizes, measure_speed, training_cost


@given(correct=st.integers(0, 1000), extra=st.integers(0, 1000))
def test_the_interval_holds_the_accuracy_and_stays_in_range(correct, extra):
    number = correct + extra
    if not number:
        return
    accuracy = 100 * correct / number
    low, high = accuracy_interval(accuracy, number)
    assert 0 <= low <= accuracy + 1e-9 and accuracy - 1e-9 <= high <= 100
    wider = accuracy_interval(accuracy, number // 2 or 1)
    assert wider[1] - wider[0] >= high - low - 1e-9


def test_the_interval_is_wilsons():
    assert accuracy_interval(80, 10) == pytest.approx((49.02, 94.33), abs=0.01)  # of 8 in 10, as tables have it
    assert accuracy_interval(0, 10) == pytest.approx((0, 27.75), abs=0.01)
    assert accuracy_interval(50, 0) == (0, 100)


@pytest.mark.parametrize('share', [0.5, 0.9, 0.97])
def test_the_interval_covers_in_95_of_100_draws(share):
    draw, number, covered = random.Random(1), 200, 0
    for _ in range(1000):
        low, high = accuracy_interval(100 * sum(draw.random() < share for _ in range(number)) / number, number)
        covered += low <= 100 * share <= high
    assert 925 <= covered <= 975


def test_operations_are_those_of_the_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 5))
    assert count_gmacs(model, (3, 10, 20)) == pytest.approx((10 * 20 * 3 * 8 * 9 + 8 * 5) / 1e9)


@pytest.mark.parametrize('name, size, gmacs', [('resnet50', 224, 4.09), ('resnet50', 160, 2.10),
                                               ('vit_tiny_patch16_224', 224, 1.25)])
def test_operations_of_known_models(name, size, gmacs):
    model = timm.create_model(name)
    assert count_gmacs(model, (3, size, size)) == pytest.approx(gmacs, rel=0.01)
    assert next(model.parameters()).device.type == 'cpu' and model.training


class NotOnMeta(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x[0, 0, :1] * x.sum().item())  # a value is asked for


def test_a_model_that_does_not_work_on_the_meta_device_is_counted_as_it_is():
    assert count_gmacs(NotOnMeta(), (3, 4, 4)) == pytest.approx(8e-9)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()))
    assert count_gmacs(scripted, (3, 8, 8)) == pytest.approx(3 * 4 * 64 / 1e9) and scripted.training


def test_training_counts_forward_and_backward_of_every_image():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    cost = training_cost(model, {'samples': [[8, 8, 100], [4, 2, 10]], 'steps': 7, 'seconds': 1.5,
                                 'counted': True})
    assert training_cost(model, {'samples': [[8, 8, 100]], 'counted': False}) is None
    assert cost['images'] == 110 and cost['steps'] == 7 and cost['seconds'] == 1.5
    assert cost['megapixels'] == pytest.approx((64 * 100 + 8 * 10) / 1e6)
    assert cost['gmacs'] == pytest.approx(3 * 12 * (64 * 100 + 8 * 10) / 1e9)


def test_rows_hold_the_used_and_the_own_metrics():
    model, stats = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)), BatchNormStats('')
    other = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    rows = measure_sizes(
        model, (8, 16), lambda ms, size: [{'top1': 50. if m is model else 75., 'loss': size / 10} for m in ms],
        lambda m, size: other, num_images=100, shape=lambda size: (3, size, size), stats=stats)
    assert [row['img_size'] for row in rows] == [8, 16] and stats.sizes == (8, 16)
    assert all(row['top1'] == 75 and row['top1_uncalibrated'] == 50 and row['images'] == 100 for row in rows)
    assert (rows[0]['top1_low'], rows[0]['top1_high']) == accuracy_interval(75, 100)
    assert rows[1]['gmacs'] == 4 * rows[0]['gmacs'] and rows[1]['loss'] == 1.6
    plain = measure_sizes(model, (8,), lambda ms, size: [{'map': 30.} for _ in ms], num_images=10,
                          shape=lambda size: (3, size, size))
    assert plain[0]['map'] == plain[0]['map_uncalibrated'] == 30 and 'map_low' not in plain[0]


def test_speed_is_of_the_batch_and_of_one_image():
    calls = []

    class Model(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x

    speed = measure_speed(Model(), torch.zeros(8, 3, 4, 4), seconds=0.01)
    assert speed['images_per_second'] > 0 and speed['latency_ms'] > 0
    assert calls.count(8) >= 5 and calls.count(1) >= 5
