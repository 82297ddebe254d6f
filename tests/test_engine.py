"""The training loop: parts of batches, steps that overflow, losses that are not numbers, uneven shares."""
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch.amp import GradScaler

from mixsize_timm import memory, train
from mixsize_timm.engine import NonFiniteLoss, Progress, train_one_epoch
from mixsize_timm.errors import UsageError
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import MixSizeBatchSampler, plan_epoch
from mixsize_timm.smoothing import GradientSmoother

REGIME = Regime.fixed(32, batch_size=6)


class Loop:
    """A tiny model trained on noise, six images a step."""

    def __init__(self, steps=4, scaler=None, model='test_vit', poison=(), **options):
        torch.manual_seed(0)
        self.model = timm.create_model(model, num_classes=2, **({'img_size': 32} if 'vit' in model else {}))
        self.accelerator = Accelerator(cpu=True)
        self.task = ClassificationTask(self.model, verbose=False)
        self.task.setup_ema(decay=0.5)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.accelerator.scaler = scaler
        if scaler is not None:  # Accelerate's own is for fp16, which needs a GPU
            self.accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        self.task.trainable_module, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.plan = plan_epoch(REGIME, 6 * steps)
        generator = torch.Generator().manual_seed(1)
        self.batches = [(torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 2) for _ in range(steps)]
        for step in poison:
            self.batches[step][0][0] = float('inf')
        self.progress = Progress()
        self.smoother = GradientSmoother()
        self.options = options

    def run(self):
        return train_one_epoch(self.progress, self.task, self.batches[self.progress.step:], self.plan, self.optimizer,
                               self.accelerator, smoother=self.smoother, **self.options)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.mark.parametrize('size', [1, 2, 4, 6, 100])
def test_a_batch_in_parts_gives_the_step_of_the_whole(size):
    whole, parts = Loop(), Loop(micro_batch_size=lambda _: size)
    one, other = whole.run()['loss'], parts.run()['loss']
    torch.testing.assert_close(whole.weights(), parts.weights(), rtol=1e-5, atol=1e-6)
    assert one == pytest.approx(other, rel=1e-5) and whole.progress.images == parts.progress.images == 24


def test_micro_batches_are_found_by_trial_and_leave_no_trace(monkeypatch):
    loop = Loop(model='test_resnet')
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    random = torch.get_rng_state()
    original, tried = loop.model.forward, []

    def forward(images):
        tried.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')
        return original(images)

    monkeypatch.setattr(loop.model, 'forward', forward)
    assert memory.fit_micro_batches(loop.task, loop.plan, loop.accelerator, num_classes=2) == {32: 2}
    assert tried == [6, 3, 2] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    assert all(p.grad is None for p in loop.model.parameters())
    monkeypatch.setattr(memory, '_fitting', lambda *_: 0)
    with pytest.raises(UsageError, match='not even one image of 32 px fits'):
        memory.fit_micro_batches(loop.task, loop.plan, loop.accelerator, num_classes=2)


def test_micro_batches_have_equal_pixels():
    of_size = memory.scaled_by_area(32, 224)
    assert [of_size(size) for size in (112, 224, 448, 4480)] == [128, 32, 8, 1]


def test_an_overflowing_step_changes_nothing_and_is_counted():
    """One of four steps overflows, under the CPU's gradient scaler: all goes on as with the three others alone."""
    loop = Loop(scaler=GradScaler('cpu', init_scale=2. ** 10, growth_interval=100), poison=[1])
    seen = []

    def on_step(meter):
        rates = [group['lr'] for group in loop.optimizer.param_groups]
        average = [p.clone() for p in loop.task.get_eval_model(ema=True).parameters()]
        seen.append((loop.weights(), loop.smoother.running_norm.item(), rates, loop.progress.skipped, average,
                     loop.accelerator.scaler.get_scale()))

    inner = loop.optimizer.optimizer
    loop.options.update(on_step=on_step, lr_scheduler=CosineLRScheduler(inner, t_initial=4, t_in_epochs=False))
    loop.run()
    (weights, norm, rates, skipped, average, scale), after = seen[0], seen[1]
    assert (skipped, after[3], loop.progress.skipped) == (0, 1, 1) and after[5] == scale / 2
    assert torch.equal(weights, after[0]) and norm == after[1] and rates == after[2]
    assert all(torch.equal(a, b) for a, b in zip(average, after[4]))
    assert loop.progress.step == loop.progress.steps == 4

    three = Loop(steps=3, scaler=GradScaler('cpu', init_scale=2. ** 10, growth_interval=100))
    del loop.batches[1]
    three.batches = loop.batches
    three.options['lr_scheduler'] = CosineLRScheduler(three.optimizer.optimizer, t_initial=4, t_in_epochs=False)
    three.run()
    torch.testing.assert_close(loop.weights(), three.weights(), rtol=1e-6, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_training_and_says_since_when():
    loop = Loop(steps=8, poison=range(3, 8), max_nonfinite=4, log_interval=2)
    with pytest.raises(NonFiniteLoss, match=r'not finite since step 4 of epoch 0 \(32 px, learning rate 0.05\), '
                                            r'4 steps in a row'):
        loop.run()
    assert loop.progress.step == 7  # with the log line after the fourth


def test_the_count_of_such_steps_goes_on_over_epochs():
    loop = Loop(steps=4, poison=[3], max_nonfinite=3)
    loop.run()  # the weights are not numbers from here on
    assert loop.progress.nonfinite == 1
    loop.progress.start_epoch(1)
    with pytest.raises(NonFiniteLoss, match='since step 4 of epoch 0 .* 5 steps in a row'):
        loop.run()


def test_such_steps_may_be_borne():
    loop = Loop(steps=4, poison=[0], max_nonfinite=0)
    loop.run()
    assert loop.progress.nonfinite == 4 and loop.progress.nonfinite_since.startswith('step 1 of epoch 0')


@pytest.mark.parametrize('kind', ['minutes', 'steps'])
def test_no_checkpoint_is_made_of_what_is_not_finite(tmp_path, image_folder, capsys, caplog, monkeypatch, kind):
    """The last good checkpoint is from before, and the run says how to go on from it."""
    argv = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--opt', 'sgd', '--lr', '0.05', '--warmup-epochs', '0',
            '--img-size', '32', '--num-classes', '2', '--mixsize-sizes', '32', '--calibrate', '0', '--calibrate-val',
            '0', '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run', '--epochs', '4',
            '--max-nonfinite', '5', '--checkpoint-interval', '1' if kind == 'steps' else '0.00001m']
    original, calls = GradientSmoother.__call__, Counter()

    def smooth(self, parameters):
        parameters = list(parameters)
        calls['steps'] += 1
        if calls['steps'] == 5:  # the second of the second epoch
            parameters[0].data.fill_(float('nan'))
        return original(self, parameters)

    monkeypatch.setattr(GradientSmoother, '__call__', smooth)
    assert train.main(argv) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'the loss is not finite since step 3 of epoch 1 (32 px, learning rate ' in message
    assert f'--resume {tmp_path / "run"} continues after step ' in message and ' of epoch 1' in message
    assert 'No checkpoint is saved: the loss is not finite' in caplog.text


def test_two_deterministic_runs_are_bit_equal(tmp_path, image_folder):
    algorithms = torch.are_deterministic_algorithms_enabled()
    argv = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--lr', '0.05', '--img-size', '32', '--num-classes', '2',
            '--mixsize-sizes', '24', '32', '--calibrate', '0', '--calibrate-val', '0', '--data-dir', str(image_folder),
            '--output', str(tmp_path), '--epochs', '2', '--deterministic', '--drop', '0.3', '--reprob', '0.5',
            '--mixup', '0.5']
    try:
        for name in ('one', 'two'):
            assert train.main([*argv, '--experiment', name]) == 0
    finally:
        torch.use_deterministic_algorithms(algorithms)
    one, two = (load_file(tmp_path / name / 'last' / 'model.safetensors') for name in ('one', 'two'))
    assert all(torch.equal(one[name], two[name]) for name in one)


@given(multiple=st.integers(1, 3), units=st.integers(2, 9), saved_by=st.integers(1, 4), world=st.integers(1, 6),
       images=st.integers(30, 90), accumulation=st.integers(1, 3), data=st.data())
def test_another_number_of_processes_shares_the_same_plan(multiple, units, saved_by, world, images, accumulation, data):
    regime = Regime((24, 32), base_size=32, batch_size=multiple * units, batch_multiple=multiple)
    plan = plan_epoch(regime, images * units, world_size=saved_by, grad_accum_steps=accumulation)
    first = data.draw(st.integers(0, plan.num_steps))
    if plan.batch.min() // multiple < world:
        with pytest.raises(ValueError, match='cannot share batches of'):
            MixSizeBatchSampler(images * units, regime, rank=0, world_size=world, plan_world_size=saved_by,
                                grad_accum_steps=accumulation)
        return
    samplers = [MixSizeBatchSampler(images * units, regime, rank=rank, world_size=world, plan_world_size=saved_by,
                                    grad_accum_steps=accumulation) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(0, first)
    whole = [group for group in plan.groups() if group.step >= first]
    shares = list(zip(*samplers))
    assert len(shares) == len(whole) == len(samplers[0])
    for group, parts in zip(whole, shares):
        assert np.array_equal(np.concatenate([part.images for part in parts]), group.images)
        assert all(len(part.images) % multiple == 0 and len(part.images) for part in parts)
        lengths = [len(part.images) for part in parts]
        assert max(lengths) - min(lengths) <= multiple
        # the mean over processes of (weight x mean over its images) is the group's weight times the mean over its own
        assert all(part.weight == pytest.approx(group.weight * len(part.images) * world / group.batch)
                   for part in parts)
