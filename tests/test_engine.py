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
from timm.data import Mixup
from timm.optim import get_optimizer_info
from timm.scheduler import CosineLRScheduler
from timm.task import ClassificationTask
from torch import nn
from torch.amp import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode

from mixsize_timm import memory, train
from mixsize_timm.args import parse_args
from mixsize_timm.build import create_optimizer
from mixsize_timm.engine import NonFiniteLoss, Progress, train_one_epoch, validate
from mixsize_timm.errors import UsageError
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import MixSizeBatchSampler, plan_epoch
from mixsize_timm.smoothing import GradientSmoother

REGIME = Regime.fixed(32, batch_size=6)


class Loop:
    """A tiny model trained on noise, six images a step."""

    def __init__(self, steps=4, scaler=None, model='test_vit', poison=(), accumulation=1, **options):
        torch.manual_seed(0)
        self.model = model if isinstance(model, nn.Module) else timm.create_model(
            model, num_classes=2, **({'img_size': 32} if 'vit' in model else {}))
        self.accelerator = Accelerator(cpu=True)
        self.task = ClassificationTask(self.model, verbose=False)
        self.task.setup_ema(decay=0.5)
        self.task.to(self.accelerator.device)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.accelerator.scaler = scaler
        if scaler is not None:  # Accelerate's own is for fp16, which needs a GPU
            self.accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        self.task.trainable_module, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.plan = plan_epoch(REGIME, 6 * steps, grad_accum_steps=accumulation)
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


class Waits(TorchDispatchMode):
    """Counts what a host waits for a device for: figures read from it, and copies that are not left to it.

    The device is torch's meta device, which has no figures: all else that looks at them is an error.
    """

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.name()
        if name == 'aten::_local_scalar_dense' and args[0].is_meta:
            self.count['read'] += 1
            return 1.
        if name in ('aten::_to_copy', 'aten::copy_'):
            source = args[0] if name == 'aten::_to_copy' else args[1]
            to_meta = args[0].is_meta if name == 'aten::copy_' else 'meta' in str(kwargs.get('device') or source.device)
            if source.is_meta and not to_meta:
                self.count['read'] += 1
                return torch.ones(source.shape, dtype=kwargs.get('dtype') or source.dtype)
            if to_meta and not source.is_meta and not (kwargs.get('non_blocking') or True in args[2:]):
                self.count['copied'] += 1
        return function(*args, **kwargs)


@pytest.mark.parametrize('clip_mode', ['norm', 'value', 'agc'])
def test_nothing_waits_for_the_device_between_log_lines(monkeypatch, clip_mode):
    """With smoothing, clipping, a moving average, mixup, accumulated gradients and batches in parts."""
    monkeypatch.setattr(Accelerator, 'device', torch.device('meta'))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AvgPool2d(15), nn.Flatten(), nn.Linear(4, 2))
    at_step = []
    loop = Loop(steps=16, model=model, accumulation=2, log_interval=3, clip_grad=1., clip_mode=clip_mode,
                mixup_fn=Mixup(mixup_alpha=0.2, cutmix_alpha=1., num_classes=2), mixup_seed=1,
                micro_batch_size=lambda _: 3, on_step=lambda _: at_step.append(waits.count.copy()))
    loop.options['lr_scheduler'] = CosineLRScheduler(loop.optimizer.optimizer, t_initial=8, t_in_epochs=False)
    with Waits() as waits:
        loop.run()
    # two at a log line, for the loss and for the norms, with the steps 1, 4, 7 and the last; one for the whole epoch
    assert [count['read'] for count in at_step] == [2, 2, 2, 4, 4, 4, 6, 8] and waits.count == {'read': 9}


def test_what_waits_for_a_device_is_counted():
    on_device = torch.ones(2, device='meta')
    for wait in (lambda: on_device[0].item(), on_device.tolist, on_device.cpu, lambda: bool(on_device[0]),
                 lambda: torch.ones(2).to('meta'), lambda: on_device.copy_(torch.ones(2)),
                 lambda: torch.ones(2).copy_(on_device)):
        with Waits() as waits:
            wait()
        assert waits.count.total() == 1
    with Waits() as waits:
        torch.ones(2).to('meta', non_blocking=True), on_device.copy_(torch.ones(2), non_blocking=True)
    assert not waits.count


def test_torchs_optimizers_are_fused_on_a_gpu_where_nothing_speaks_against_it(monkeypatch):
    model = nn.Linear(2, 2)

    def fused(*options, device='cuda', scaler=None):
        monkeypatch.setattr(Accelerator, 'device', torch.device(device))
        args, accelerator = parse_args(['--num-classes', '2', '--opt', 'sgd', *options]), Accelerator(cpu=True)
        accelerator.scaler = scaler
        kind = get_optimizer_info(args.opt.split('_')[-1]).opt_class
        optimizer = create_optimizer(args, model, accelerator, kind)
        return bool(optimizer.param_groups[0].get('fused'))

    assert all(fused('--opt', name) for name in ('sgd', 'adam', 'adamw', 'lookahead_sgd'))
    assert not any(fused('--opt', name) for name in ('nadam', 'lamb', 'sgdw', 'lion'))
    assert not fused(device='cpu') and fused('--opt-kwargs', 'fused=True', device='cpu')
    assert not fused('--opt-kwargs', 'fused=False') and not fused('--opt-kwargs', 'foreach=True')
    assert not fused(scaler=GradScaler('cpu'))
    with pytest.raises(UsageError, match='fused=True hides the steps that overflow'):
        fused('--opt-kwargs', 'fused=True', scaler=GradScaler('cpu'))


def test_accelerate_does_not_see_a_step_that_a_fused_optimizer_leaves_out():
    """Why they are not used under loss scaling."""
    for fused in (False, True):
        accelerator = Accelerator(cpu=True)
        weight = nn.Parameter(torch.ones(1))
        accelerator.scaler = GradScaler('cpu')
        optimizer = accelerator.prepare_optimizer(torch.optim.SGD([weight], lr=1., fused=fused))
        accelerator.scaler.scale((weight * float('inf')).sum()).backward()
        optimizer.step()
        assert weight.item() == 1 and accelerator.optimizer_step_was_skipped is not fused
        accelerator.free_memory()


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
    assert memory.fit_micro_batches(loop.task, {32: 6}, loop.accelerator, num_classes=2) == {32: 2}
    assert tried == [6, 3, 2] and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())
    assert all(p.grad is None for p in loop.model.parameters())
    monkeypatch.setattr(memory, '_fitting', lambda *_: 0)
    with pytest.raises(UsageError, match='not even one image of 32 px fits'):
        memory.fit_micro_batches(loop.task, {32: 6}, loop.accelerator, num_classes=2)


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


@pytest.mark.parametrize('tta', [0, 2])
def test_models_that_are_validated_together_share_the_images_and_are_measured_as_alone(tta):
    loop, read = Loop(), []
    models = [loop.model, timm.create_model('test_vit', num_classes=2, img_size=32)]

    def loader():
        for batch in loop.batches:
            read.append(1)
            yield batch

    together = validate(models, loader(), loop.task, loop.accelerator, tta=tta)
    assert len(read) == len(loop.batches)
    alone = [validate([model], loader(), loop.task, loop.accelerator, tta=tta)[0] for model in models]
    assert together == alone and together[0]['loss'] != together[1]['loss']
    assert not any(model.training for model in models)
