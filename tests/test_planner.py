"""The planner: what a run will cost, before it is paid."""
import json
import math
import re
import shlex
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import write_image_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixsize_timm import cli, planner, streaming
from mixsize_timm.measure import count_saved_bytes
from mixsize_timm.planner import TOLERANCE, EpochCost, Memory, Planner, parse_plan_args
from mixsize_timm.regime import Regime
from mixsize_timm.sizes import SizeProbe

DOCS = Path(__file__).parents[1] / 'docs' / 'planner.md'
TINY = ['--model', 'test_resnet', '--img-size', '32', '--num-classes', '5', '--device', 'cpu', '-b', '8']
IMAGES = ['--num-images', '1000']
OFF = ['--mixsize', 'off']
NONE = ['--mixsize-sizes', '32', '48', '--mixsize-adapt', 'none']  # steps of 8 images

regimes = st.builds(
    Regime.preset, st.sampled_from(['s224', 's144', 'cifar']), st.sampled_from([96, 160, 224]),
    adapt=st.sampled_from(['b+', 'd+', 'bd+', 'none']), batch_size=st.integers(32, 300),
    duplicates=st.sampled_from([1, 2]), batch_multiple=st.sampled_from([1, 2, 8]))


def gmacs_of(regime, exponent=2.):
    """Operations that grow with a power of the size."""
    return {size: (size / 100)**exponent for size in {*regime.sizes, regime.base_size}}


def run(capsys, *argv):
    """What the command prints, and writes."""
    assert cli.main(['plan', *argv]) == 0
    return capsys.readouterr().out


@settings(deadline=None, max_examples=40)
@given(regimes, st.integers(1, 100_000), st.sampled_from([1, 2, 8]), st.sampled_from([1, 3]),
       st.sampled_from(['tail', 'reference']))
def test_images_shares_and_steps_add_up(regime, num_images, world_size, accum, drop):
    cost = EpochCost(regime, num_images, gmacs_of(regime), world_size, accum, drop)
    if not cost.num_steps:
        return
    rows = cost.rows()
    assert sum(row['share'] for row in rows) == pytest.approx(1)
    assert sum(row['images'] for row in rows) + cost.left_out == num_images
    assert sum(row['steps'] for row in rows) == cost.num_steps
    assert cost.pixels == sum(row['images'] * row['duplicates'] * row['img_size']**2 for row in rows)
    for row in rows:
        assert row['batch'] * row['steps'] * accum >= row['images']
        assert row['batch'] * (row['steps'] - 1) * accum < max(row['images'], 1)


@settings(deadline=None, max_examples=40)
@given(regimes)
def test_on_large_data_an_epoch_costs_what_the_regime_says(regime):
    fixed = Regime.fixed(regime.base_size, batch_size=regime.batch_size)
    cost, base = (EpochCost(r, 2_000_000, gmacs_of(regime)) for r in (regime, fixed))
    assert cost.pixels / base.pixels == pytest.approx(regime.relative_cost, rel=0.005)
    assert cost.epoch_gmacs / base.epoch_gmacs == pytest.approx(cost.pixels / base.pixels)  # they grow alike here


@settings(deadline=None, max_examples=40)
@given(regimes, st.floats(1.7, 2.3))
def test_the_cure_lowers_the_work_of_every_size(regime, exponent):
    cost = EpochCost(regime, 20_000, gmacs_of(regime, exponent))
    assert 0 < cost.cure <= 1
    try:
        cured = cost.with_regime(max_work=cost.cure)
    except ValueError as error:  # not an image of a size is as cheap
        assert 'rounds to zero' in str(error)
        return
    assert cured.costly == []
    for size in regime.sizes:
        assert cured.regime.relative_work(size) <= 1 and cured.work(size) <= TOLERANCE
    assert set(cost.costly) == {size for size, batches in cost.batches.items() if batches and
                                max(regime.relative_work(size), cost.work(size)) > TOLERANCE}


@settings(deadline=None, max_examples=40)
@given(regimes, st.integers(2, 16))
def test_a_multiple_changes_a_step_by_no_more_than_half_of_it(regime, multiple):
    one = EpochCost(regime, 100_000, gmacs_of(regime)).with_regime(batch_multiple=1)
    many = one.with_regime(batch_multiple=multiple)
    for size in regime.sizes:
        batch, rounded = one.regime.group(size)[0], many.regime.group(size)[0]
        assert rounded % multiple == 0 and abs(rounded - batch) <= (multiple + 1) / 2
        image = one.regime.relative_work(size) / batch
        change = many.regime.relative_work(size) - one.regime.relative_work(size)
        assert change == pytest.approx(image * (rounded - batch), abs=1e-9)
    assert many.pixels / one.pixels == pytest.approx(1, abs=0.05)


@settings(deadline=None, max_examples=40)
@given(regimes, st.floats(0, 1e9), st.floats(1e5, 1e7), st.floats(1e8, 1e11), st.booleans())
def test_the_largest_batch_size_is_the_largest(regime, whatever, per_pixel, limit, capped):
    changes = {'max_work': 1.} if capped else {}
    memory = Memory({'weights': whatever}, {size: per_pixel * size**2 / 1e4 for size in regime.sizes}, False)

    def fits(batch):
        try:
            changed = replace(regime, batch_size=batch, **changes)
        except ValueError:
            return False
        return all(memory.of(size, math.prod(changed.group(size))) <= limit for size in changed.sizes)

    batch = memory.largest_batch_size(regime, limit, **changes)
    if batch:
        assert fits(batch) and not fits(batch + 1)
    else:
        assert not any(map(fits, range(1, 40)))


def test_a_small_batch_is_planned_where_max_work_would_leave_nothing(capsys):
    options = ['-b', '1', '--mixsize-sizes', '32', '48', '--mixsize-adapt', 'none', '--mixsize-anneal', '1']
    out = run(capsys, *TINY, *options, '--num-images', '1000')
    assert 'annealed: shares of 32: ' in out
    assert 'leaves no image of a size: raise the batch size' in out and 'with --mixsize-max-work 1: ' in out


def test_what_is_kept_for_the_backward_pass_is_counted():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4 * 64, 2))
    saved = count_saved_bytes(model, (3, 8, 8))
    assert saved.per_image == 4 * (3 * 64 + 4 * 64)  # the image, and the layer between, once
    assert saved.constant == 0 and next(model.parameters()).device.type == 'cpu'
    assert count_saved_bytes(model, (3, 8, 8), dtype=torch.bfloat16).per_image == saved.per_image / 2

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight * self.weight.exp())

    constant = count_saved_bytes(Doubled(3, 4, 1), (3, 8, 8))
    assert constant.constant == 2 * 4 * 12 and constant.per_image == 4 * 3 * 64  # exp(weight), and the product
    assert count_saved_bytes(Doubled(3, 4, 1), (3, 8, 8), constant=96) == constant


def test_a_model_that_does_not_work_on_the_meta_device_is_run():
    class NotOnMeta(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x[:, 0, 0] * float(x.sum().item() == 0))

    assert count_saved_bytes(NotOnMeta(), (3, 4, 4)).per_image == 4 * 4


def memory_of(*options):
    """What is said of the memory of one size."""
    AcceleratorState._reset_state(reset_partial_state=True)
    document = Planner(*parse_plan_args([*TINY, *IMAGES, '--mixsize', 'off', *options])).describe()
    return document['memory'], document['sizes'][0]['memory']


def test_what_takes_memory_whatever_the_batch_is_counted():
    plain = memory_of()[0]['parts']
    assert plain['optimizer'] == pytest.approx(plain['gradients'], rel=0.001)  # the momentum
    more = memory_of('--opt', 'adamw', '--model-ema', '--processes', '4', '--mixed-precision', 'bf16')[0]['parts']
    assert more['optimizer'] == pytest.approx(2 * plain['gradients'], rel=0.001)
    assert set(more) - set(plain) == {'moving average', 'buckets of data parallelism', 'weights in mixed precision'}
    assert more['weights in mixed precision'] == pytest.approx(plain['gradients'] / 2)


def test_parts_of_a_batch_take_less_memory():
    memory, whole = memory_of()
    assert whole - memory_of('--micro-batch-size', '3')[1] == pytest.approx(memory['per_image'][32] * 5)


# Made once for all commands of the document
count_gmacs, count_saved = map(lru_cache(None), (planner.count_gmacs, planner.count_saved_bytes))


@lru_cache(None)
def create_model(name):
    with torch.device('meta'):
        return timm.create_model(name)


@pytest.mark.parametrize('command, printed', re.findall(
    r'^```text\n\$ mixsize (plan [^\n]*)\n(.*?)^```', DOCS.read_text(encoding='utf-8'), re.M | re.S))
def test_the_document_shows_what_the_command_prints(command, printed, capsys, monkeypatch):
    monkeypatch.setattr(planner, 'create_model', lambda args: create_model(args.model))
    monkeypatch.setattr(planner, 'count_gmacs', count_gmacs)
    monkeypatch.setattr(planner, 'count_saved_bytes', count_saved)
    monkeypatch.setattr(SizeProbe, '__call__', lambda *_: True)
    assert run(capsys, *shlex.split(command)[1:]) == printed


def test_the_document_plans_the_presets_of_the_paper():
    text = DOCS.read_text(encoding='utf-8')
    for preset in ('s144', 's224'):
        for adapt in ('b+', 'd+'):
            assert f'$ mixsize plan --model resnet50 --mixsize {preset} --mixsize-adapt {adapt} ' in text


def test_the_steps_on_many_processes_are_those_of_the_document():
    regimes = Regime.fixed(224, batch_size=256), Regime.preset('s144', 224, batch_size=256, adapt='b+')
    for processes in (1, 8, 64, 256):
        fixed, b_plus = (EpochCost(regime, 1281167, {}, processes, drop=drop)
                         for regime, drop in zip(regimes, ('reference', 'tail')))
        row = f'| {processes} | {256 * processes} | {fixed.num_steps} | {b_plus.num_steps} | {b_plus.left_out} |'
        assert row in (DOCS.parent / 'scaling.md').read_text(encoding='utf-8')


def test_the_plan_is_printed_measured_and_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, 'MEASURED', 2)
    file = tmp_path / 'new' / 'plan.json'
    out = run(capsys, *TINY, *IMAGES, *NONE, '--epochs', '3', '--measure', '--json', str(file))
    document = json.loads(file.read_text())
    assert [(row['img_size'], row['batch'], row['duplicates']) for row in document['sizes']] == [(32, 8, 1), (48, 8, 1)]
    assert document['steps'] == sum(row['steps'] for row in document['sizes']) == 125 == document['fixed_steps']
    assert document['relative_pixels'] == pytest.approx(0.5 + 0.5 * 2.25, rel=0.01)
    assert document['costly'] == [48] and document['cure']['max_work'] <= 1
    times, seconds = document['times'], [row['seconds'] for row in document['sizes']]
    assert times['epoch'] == pytest.approx(sum(row['steps'] * row['seconds'] for row in document['sizes']))
    assert times['run'] == pytest.approx(3 * times['epoch']) and min(seconds) > 0
    assert times['fixed_epoch'] == pytest.approx(125 * seconds[0])
    assert [row['images_per_second'] * row['seconds'] for row in document['sizes']] == pytest.approx([8, 8])
    assert document['settings']['command'].startswith('mixsize plan --model test_resnet')
    for words in ('images/s', '--mixsize-max-work', 'With --mixsize-batch-multiple', 'Loading, validation, calibration',
                  'Memory is estimated', f'3 epochs: {3 * 125} steps'):
        assert words in out
    assert cli.main(['plan', *TINY, *IMAGES, '--json', str(file)]) == 2
    assert 'is there already' in capsys.readouterr().err


def test_the_steps_that_are_measured_are_those_of_training(monkeypatch):
    seen = defaultdict(list)

    def train(progress, task, loader, plan, optimizer, accelerator, **options):
        seen['plan'].append((set(plan.size), len(plan), plan.num_steps))
        images, targets = next(iter(loader))
        seen['images'].append(tuple(images.shape))
        seen['targets'].append(tuple(targets.shape))
        seen['options'].append(options)
        for _ in range(plan.num_steps):
            options['on_step'](None)

    monkeypatch.setattr(planner, 'train_one_epoch', train)
    options = ['--mixup', '0.2', '--grad-accum-steps', '2', '--clip-grad', '1', '--micro-batch-size', '4']
    plan = Planner(*parse_plan_args([*TINY, *IMAGES, *options, '--mixsize-sizes', '32', '--measure']))
    row, = plan.describe()['sizes']
    assert seen['plan'] == [({32}, 14, 7)] and seen['images'] == [(8, 3, 32, 32)] and seen['targets'] == [(8, 5)]
    assert seen['options'][0]['micro_batch_size'](32) == 4 and seen['options'][0]['clip_grad'] == 1
    assert seen['options'][0]['smoother'] is not None
    assert row['images_per_second'] * row['seconds'] == pytest.approx(16)


def test_what_does_not_fit_has_no_time(capsys, monkeypatch):
    def train(progress, task, loader, plan, *args, **options):
        if plan.size[0] == 48:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        for _ in range(plan.num_steps):
            options['on_step'](None)

    monkeypatch.setattr(planner, 'train_one_epoch', train)
    out = run(capsys, *TINY, *IMAGES, '--mixsize-sizes', '32', '48', '--measure')
    assert 'Not every step fits into memory' in out
    assert next(line for line in out.splitlines() if line.startswith('  48')).split()[-3:] == ['-'] * 3


def test_measured_memory_is_extrapolated(monkeypatch):
    plan = Planner(*parse_plan_args([*TINY, *IMAGES, '--mixsize-sizes', '32', '48']))
    trial = planner.Trial(plan.args, plan.model, plan.accelerator, plan.data)
    shown, resets = [], []
    forward = trial.task.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].shape))
    monkeypatch.setattr(torch.accelerator, 'reset_peak_memory_stats', lambda device: resets.append(device))
    monkeypatch.setattr(torch.accelerator, 'max_memory_allocated',
                        lambda device: 1000 + shown[-1][0] * shown[-1][2]**2)
    memory = trial.memory([32, 48], 2)
    forward.remove()
    assert memory == Memory({'whatever the batch': 1000}, {32: 32**2, 48: 48**2}, measured=True)
    assert [tuple(shape)[::2] for shape in shown] == [(n, s) for s in (32, 48) for n in (2, 2, 4, 4)]
    assert len(resets) == 4


def test_the_images_are_counted_where_no_number_is_given(capsys, tmp_path):
    write_image_folder(tmp_path / 'data')
    config = tmp_path / 'plan.yaml'
    config.write_text(f'data_dir: {tmp_path / "data"}\nbatch_size: 4\nepochs: 7\n')
    out = run(capsys, *TINY[:-2], '-c', str(config), '--memory', '2',
              '--mixsize-sizes', '32')
    assert 'base batch 4 on 1 process, 24 images' in out and '7 epochs:' in out and '90% of 2.0 GB' in out
    assert 'base batch 8 on 2 processes, 24 images' in run(capsys, *TINY[:-2], '-c', str(config), '--processes', '2',
                                                              '--mixsize', 'off')


def test_a_batch_that_is_the_mean_is_planned_as_it_is_trained(capsys, tmp_path):
    """The base batch is the smaller one; work is over --batch-size images, which is what the largest batch is too."""
    run(capsys, *TINY, *IMAGES, '--mixsize-sizes', '16', '32', '--mixsize-adapt', 'b+', '--mixsize-batch-of', 'mean',
        '--memory', '1', '--json', str(tmp_path / 'plan.json'))
    plan = json.loads((tmp_path / 'plan.json').read_text())
    rows = {row['img_size']: row for row in plan['sizes']}
    assert (plan['base_batch'], plan['mean_batch']) == (5, 8) and rows[32]['batch'] == 5 and rows[16]['batch'] == 20
    assert rows[32]['relative_pixels'] == pytest.approx(5 / 8)
    regime = Regime((16, 32), base_size=32, batch_size=8, adapt='b+', batch_of='mean')
    per_image = {int(size): taken for size, taken in plan['memory']['per_image'].items()}
    memory = Memory(plan['memory']['parts'], per_image, measured=False)
    largest = plan['memory']['largest_batch_size']
    assert largest == memory.largest_batch_size(regime, plan['memory']['usable']) > 8


def test_one_size_is_timms_loader(capsys):
    out = run(capsys, *TINY, '--num-images', '1003', '--mixsize', 'off')
    assert 'one size at a base size of 32 px' in out and '125 steps, 1.000x the pixels' in out
    assert 'images left out: 3' in out and '--mixsize-batch-multiple' not in out


def test_few_images_are_planned_as_they_are_trained(capsys, tmp_path):
    few = ['--num-images', '3', '--mixsize-sizes', '32', '48', '--mixsize-adapt', 'none', '--memory', '1']
    out = run(capsys, *TINY, *few, '--json', str(tmp_path / 'plan.json'))
    assert 'An epoch: 1 steps; one at 32 px has none, for the images fill no batch; images left out: 1' in out
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert (plan['steps'], plan['fixed_steps'], plan['relative_pixels'], plan['relative_gmacs']) == (1, 0, None, None)
    assert [row['multiple'] for row in plan['multiples']] == [1]  # of 8 there would be no batch
    assert 'An epoch: 1 steps; one at 32 px' in run(capsys, *TINY, '--num-images', '3', *OFF, '--fast-loader')


def test_the_images_that_stream_are_counted_over_all_processes(capsys, tmp_path, monkeypatch):
    (tmp_path / 'train-0.tar').write_bytes(b'')
    (tmp_path / 'info.json').write_text(json.dumps({'splits': {'train': {
        'name': 'train', 'filenames': ['train-0.tar'], 'shard_lengths': [20], 'num_samples': 20}}}))
    monkeypatch.setattr(streaming, '_process', lambda: (0, 2))
    out = run(capsys, *TINY, *NONE, '--dataset', 'wds/x', '--data-dir', str(tmp_path), '--epoch-repeats', '1.5')
    assert 'on 1 process, 30 images' in out


@pytest.mark.parametrize('options, message', [
    (['--num-images', '0'], '--num-images must be above 0'),
    (['--num-images', '3', *OFF], 'make no batch at any size'),
    (['--num-images', '3', *NONE, '--mixsize-anneal', '1', '--epochs', '2'], 'make no batch at any size'),
    ([*IMAGES, *OFF, '-b', '7', '--mixup', '0.2'], 'mixup and cutmix want an even --batch-size, not 7'),
    ([*IMAGES, '--memory', '-1'], '--memory must be above 0'),
    ([*IMAGES, '--mixsize-batch-multiple', '0'], '--mixsize-batch-multiple must be at least 1'),
    ([*IMAGES, '--mixsize-batch-multiple', '64', '--mixsize-sizes', '32', '48'], 'rounds to zero'),
    ([*IMAGES, '--train-img-sizes', '32'], '--train-img-sizes is not planned'),
    ([*IMAGES, '--nonsense'], 'unrecognized arguments: --nonsense'),
    (['--data-dir', 'nowhere'], 'nowhere'),
    ([*IMAGES, '--opt', 'nonsense'], '--opt nonsense'),
])
def test_what_cannot_be_planned_is_said_in_one_line(options, message, capsys):
    assert cli.main(['plan', *TINY, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith('mixsize plan: error: ') and '\n' not in error
