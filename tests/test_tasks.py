"""What is trained: losses, distillation, the moving average, compiled and scripted models, timm's other loaders."""
import copy
import csv
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data import FastCollateMixup, Mixup
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils.agc import unitwise_norm
from torch import nn

from mixsize_timm import GradientSmoother, Regime, create_loader, train
from mixsize_timm.engine import Progress
from mixsize_timm.errors import UsageError
from mixsize_timm.models import create_model
from mixsize_timm.sampler import EpochPlan

TINY = ['--model', 'test_resnet', '-j', '0', '-b', '8', '--lr', '0.01', '--warmup-epochs', '0', '--img-size', '32',
        '--num-classes', '2', '--mixsize-sizes', '24', '32', '--epochs', '2', '--log-interval', '1', '--calibrate', '2',
        '--calibrate-val', '1']
OFF = ['--mixsize', 'off']
DISTILLED = ['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'embed_dim=48', 'depth=1', 'num_heads=2',
             'dynamic_img_size=True']


@pytest.fixture
def run(tmp_path, image_folder):
    """Runs the command on a few images; the folder and the trained :class:`~mixsize_timm.train.Training`."""
    def run(*argv, off=False):
        tiny = [*TINY[:TINY.index('--mixsize-sizes')], *TINY[TINY.index('--epochs'):], *OFF] if off else TINY
        training = train.Training(train.parse_args(
            [*tiny, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', 'run',
             *map(str, argv)]))
        training.run()
        return tmp_path / 'run', training
    return run


def summary(folder):
    return list(csv.DictReader((folder / 'summary.csv').open()))


@pytest.fixture
def teacher(tmp_path):
    model = timm.create_model('test_efficientnet', num_classes=2)
    save_for_hf(model, str(tmp_path / 'teacher'), safe_serialization=True)
    return f'local-dir:{tmp_path / "teacher"}'


def test_the_moving_average_is_what_is_validated_and_best(run):
    folder, training = run('--model-ema', '--model-ema-decay', 0.9)
    raw, average = (load_file(folder / 'best' / f'{name}.safetensors') for name in ('model', 'model_ema'))
    assert raw.keys() == average.keys()
    assert any(not torch.equal(raw[name], average[name]) for name in raw if name.endswith('conv1.weight'))
    with torch.no_grad():  # the summary is of the average: of the last epoch, calibrated
        used = training.data.calibrate(training.ema, 32, training.args.calibrate_val)
    metrics, = training._evaluate([used], 32)
    assert float(summary(folder)[-1]['eval_loss']) == pytest.approx(metrics['loss'], abs=1e-6)


def test_the_moving_average_follows_each_optimizer_step(run, monkeypatch):
    steps = []
    original = timm.task.ClassificationTask.update_ema
    monkeypatch.setattr(timm.task.ClassificationTask, 'update_ema',
                        lambda self, step=None: (steps.append(step), original(self, step))[1])
    _, training = run('--model-ema', '--grad-accum-steps', 2)
    assert steps == list(range(1, 2 * training.data.num_steps + 1))


def test_the_moving_average_on_the_cpu_is_saved_but_not_validated(run, caplog):
    with caplog.at_level('INFO'):
        folder, _ = run('--model-ema', '--model-ema-force-cpu')
    assert (folder / 'last' / 'model_ema.safetensors').exists() and 'of the average' not in caplog.text


@pytest.mark.parametrize('kind, extra', [
    ('logit', ['--task-loss-weight', 0.3]), ('feature', ['--distill-loss-weight', 2]),
    ('token', [*DISTILLED, *OFF, '--kd-token-distill-type', 'hard']),
])
def test_each_distillation_trains_the_student_and_leaves_the_teacher(run, teacher, kind, extra):
    folder, training = run('--kd-model-name', teacher, '--kd-distill-type', kind, '--epochs', 1, *extra,
                           off=kind == 'token')
    before = timm.create_model(teacher, pretrained=True, num_classes=2).state_dict()
    assert all(map(torch.equal, before.values(), training.task.teacher.model.state_dict().values()))
    names = load_file(folder / 'last' / 'model.safetensors').keys()
    assert names == training.model.state_dict().keys() and not any(name.startswith('student.') for name in names)
    state = json.loads((folder / 'last' / 'state.json').read_text())
    assert ('projection' in json.dumps(state)) == (kind == 'feature')


def test_a_teacher_that_refuses_a_size_is_named_before_training(run, tmp_path):
    save_for_hf(timm.create_model('test_convnext', num_classes=2), str(tmp_path / 'teacher'), safe_serialization=True)
    with pytest.raises(UsageError, match='the teacher does not take images of 24 px'):
        run('--kd-model-name', f'local-dir:{tmp_path / "teacher"}')


def test_a_teacher_of_other_classes_teaches_features_only(run, teacher):
    options = ['--kd-model-name', teacher, '--num-classes', 3, '--epochs', 1, '--calibrate', 0]
    for kind, extra in (('logit', []), ('token', [*DISTILLED, *OFF])):
        with pytest.raises(UsageError, match='trained for 2 classes, and a classifier of 3 would be random'):
            run(*options, '--kd-distill-type', kind, *extra, off=kind == 'token')
    run(*options, '--kd-distill-type', 'feature')


def test_jensen_shannon_divergence_over_splits_with_batch_norms_of_their_own(run, caplog):
    folder, training = run('--jsd-loss', '--aug-splits', 3, '--split-bn', '--aa', 'augmix-m3-w3', off=True)
    assert type(training.task.criterion).__name__ == 'JsdCrossEntropy' and training.task.criterion.num_splits == 3
    assert any('aux_bn' in name for name in load_file(folder / 'last' / 'model.safetensors'))
    assert 'Not calibrated' not in caplog.text
    assert json.loads((folder / 'sizes.json').read_text())['checkpoints'][0]['calibrated'] > 0
    images, targets = next(iter(training.data.loader))
    assert len(images) == len(targets) == 24 and torch.equal(targets[:8], targets[8:16])


@pytest.mark.parametrize('argv, name', [
    (['--bce-loss', '--bce-target-thresh', 0.2, '--mixup', 0.5], 'BinaryCrossEntropy'),
    (['--loss', 'asl'], 'Asymmetric'),
    (['--loss', 'poly'], 'PolyCrossEntropy'),
    (['--mixup', 0.5, '--cutmix', 1], 'SoftTargetCrossEntropy'),
    (['--smoothing', 0], 'CrossEntropyLoss'),
    ([], 'LabelSmoothingCrossEntropy'),
])
def test_the_loss_is_timms(run, argv, name):
    _, training = run(*argv, '--epochs', 1)
    assert type(training.task.criterion).__name__.startswith(name)


def test_a_compiled_run_makes_one_graph_a_size_and_gives_the_same_numbers(run, caplog, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    folder, plain = run('--save-epochs', 1)
    (tmp_path / 'run').rename(tmp_path / 'plain')
    with caplog.at_level('INFO'):
        folder, compiled = run('--torchcompile', 'eager', '--model-ema')
    assert 'torch.compile has made 2 graphs' in caplog.text
    assert type(compiled.task.get_trainable_module()).__name__ == 'OptimizedModule'
    assert type(compiled.model).__name__ == 'ByobNet' or not hasattr(compiled.model, '_orig_mod')
    weights = load_file(folder / 'last' / 'model.safetensors')
    assert weights.keys() == plain.model.state_dict().keys()
    expected = load_file(tmp_path / 'plain' / 'last' / 'model.safetensors')
    assert all(torch.allclose(weights[name].float(), expected[name].float(), atol=1e-5) for name in weights)


def test_more_graphs_than_sizes_are_an_error_and_not_a_warning(run, monkeypatch):
    torch._dynamo.reset()
    original = train.train_one_epoch

    def limited(*args, **kwargs):
        with torch._dynamo.config.patch(recompile_limit=1):
            return original(*args, **kwargs)

    monkeypatch.setattr(train, 'train_one_epoch', limited)
    with pytest.raises(UsageError, match='more graphs of one function'):
        run('--torchcompile', 'eager')


def test_the_limit_of_graphs_comes_from_the_plan(run):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        _, training = run('--torchcompile', 'eager', '--epochs', 1)
        assert torch._dynamo.config.recompile_limit == training.data.num_shapes + 1 == 3


def test_a_scripted_model_trains_without_mixsize(run):
    folder, training = run('--torchscript', '--epochs', 1, off=True)
    assert isinstance(training.model, torch.jit.ScriptModule) and len(summary(folder)) == 1


@pytest.mark.parametrize('scale', ['none', 'sqrt', 'linear'])
def test_timms_scheduled_sizes_run_and_scale_their_gradients(run, monkeypatch, scale):
    factors = []
    original = train.create_batch_scale

    def recording(*args):
        made = original(*args)
        return lambda batch: (factors.append((batch, made(batch))), made(batch))[1]

    monkeypatch.setattr(train, 'create_batch_scale', recording)
    _, training = run('--train-img-sizes', 24, 32, '--train-batch-sizes', 8, 4, '--variable-batch-loss-scale', scale,
                      off=True)
    mean = training.data.loader.batch_sampler.average_batch_size
    assert training.data.mean_batch == mean == 6 and {batch for batch, _ in factors} == {4, 8}
    power = {'none': 0, 'sqrt': 0.5, 'linear': 1}[scale]
    assert all(factor == pytest.approx((batch / 6)**power) for batch, factor in factors)


NAFLEX = ['--model', 'naflexvit_base_patch16_gap', '--naflex-loader', '--naflex-train-seq-lens', 4, 9,
          '--naflex-max-seq-len', 4, '--model-kwargs', 'embed_dim=48', 'depth=1', 'num_heads=2']


@pytest.mark.parametrize('extra', [[], ['--mixup', 0.5], ['--no-prefetcher'],
                                   ['enable_patch_interpolator=True', '--naflex-patch-sizes', 8, 16]])
def test_naflex_models_train_with_timms_naflex_loader(run, extra, caplog):
    with caplog.at_level('INFO'):
        folder, _ = run(*NAFLEX, *extra, off=True)
    assert len(summary(folder)) == 2 and '9 patches  batch' in caplog.text


def test_multi_label_targets_train_with_their_own_loss_and_metrics(run, monkeypatch):
    class TwoLabels(torch.utils.data.Dataset):
        transform = None

        def __init__(self, count, target_transform):
            self.count, self.target_transform = count, target_transform

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            from PIL import Image
            image = Image.new('RGB', (32, 32), (index * 20 % 256, 0, 0))
            return self.transform(image) if self.transform else image, self.target_transform([index % 3, 2])

    monkeypatch.setattr('mixsize_timm.loaders.create_dataset', lambda name, root, split, **kwargs: TwoLabels(
        24 if split == 'train' else 8, kwargs['target_transform']))
    folder, training = run('--task', 'multilabel', '--num-classes', 3, '--mixup', 0.2, '--dataset', 'hfds/x')
    row = summary(folder)[-1]
    assert {'eval_map', 'eval_micro_f1', 'eval_macro_f1', 'eval_sample_f1'} <= row.keys() and 'eval_top1' not in row
    assert type(training.task.criterion).__name__ == 'BinaryCrossEntropy' and training.args.eval_metric == 'map'
    assert {'map', 'map_uncalibrated'} <= json.loads(
        (folder / 'sizes.json').read_text())['checkpoints'][0]['results'][0].keys()


@pytest.mark.parametrize('off', [False, True])
def test_two_views_average_an_image_and_its_mirror_image(run, off):
    _, training = run('--tta', 2, '--epochs', 1, off=off)
    outputs, targets = [], []
    for images, target in training.data.validation_loader(32):
        with torch.no_grad():
            outputs.append((training.model(images) + training.model(images.flip(3))) / 2)
        targets.append(target)
    expected = nn.functional.cross_entropy(torch.cat(outputs), torch.cat(targets)).item()
    assert training._evaluate([training.model], 32)[0]['loss'] == pytest.approx(expected, rel=1e-5)


def test_weights_in_half_precision_stay_so_to_the_end(run):
    folder, _ = run('--model-dtype', 'bfloat16', '--epochs', 1)
    weights = load_file(folder / 'best' / 'model.safetensors')
    assert all(w.dtype == torch.bfloat16 for w in weights.values() if w.is_floating_point())


@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_clipping_bounds_the_smoothed_gradient(mode):
    """Smoothing first: were it last, a small gradient scaled up to the running norm would pass the bound."""
    model = timm.create_model('test_resnet', num_classes=2)
    task = timm.task.ClassificationTask(model, verbose=False)
    accelerator = train.create_accelerator(train.parse_args(['--data-dir', 'x']))
    optimizer = accelerator.prepare_optimizer(create_optimizer_v2(model, opt='sgd', lr=0., weight_decay=0.))
    seen = []
    optimizer.optimizer.register_step_pre_hook(
        lambda opt, *_: seen.append([p.grad.clone() for g in opt.param_groups for p in g['params']]))
    smoother = GradientSmoother()
    smoother.load_state_dict({'running_norm': 1e4})
    ones = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    plan = EpochPlan.of_loader(1, 32, 4)
    train.train_one_epoch(Progress(), task, [ones], plan, optimizer, accelerator, smoother=smoother, clip_grad=0.5,
                          clip_mode=mode)
    grads = seen[0]
    if mode == 'norm':
        assert torch.nn.utils.get_total_norm(grads) == pytest.approx(0.5, rel=1e-4)
    elif mode == 'value':
        assert max(g.abs().max() for g in grads) == 0.5
    else:
        for parameter, grad in list(zip(model.parameters(), grads))[:-2]:  # timm leaves the head out
            bound = unitwise_norm(parameter.detach()).clamp(min=1e-3) * 0.5
            assert torch.all(unitwise_norm(grad) <= bound * 1.001)
        assert grads[-1].norm() > 10


@pytest.mark.parametrize('prefetcher', [True, False])
def test_mixup_mixes_the_duplicates_of_one_image_with_those_of_one_other(prefetcher):
    """The flattened batch is mixed end to end: image k, in each of its duplicates, with image B - 1 - k."""
    class Numbered(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            from PIL import Image
            return Image.new('RGB', (32, 32), (index, index, index)), index

    options = dict(mixup_alpha=1., label_smoothing=0., num_classes=32)
    regime = Regime.preset('cifar', 32, batch_size=8, batch_multiple=2)
    loader = create_loader(
        Numbered(), (3, 32, 32), 8, is_training=True, regime=regime, num_workers=0, use_prefetcher=prefetcher,
        device=torch.device('cpu'), collate_fn=FastCollateMixup(**options) if prefetcher else None)
    mixup = Mixup(**options)
    duplicated = 0
    for (images, targets), group in zip(loader, loader.batch_sampler.plan.groups()):
        if not prefetcher:
            _, targets = mixup(images, targets)
        numbers = group.images.tolist()
        pairs = [set(row.nonzero().flatten().tolist()) for row in targets.view(len(numbers) * group.duplicates, 32)]
        for k, number in enumerate(numbers):
            partner = numbers[len(numbers) - 1 - k]
            assert partner != number
            for pair in pairs[k * group.duplicates:(k + 1) * group.duplicates]:
                assert pair <= {number, partner}
        duplicated += group.duplicates > 1
    assert duplicated


def test_dropout_is_set_for_each_step_and_set_back(run, monkeypatch):
    sizes = []
    original = train.SizeRegularization.set_size
    monkeypatch.setattr(train.SizeRegularization, 'set_size',
                        lambda self, size: (self._rates and sizes.append(size), original(self, size))[1])
    _, training = run('--mixsize-reg', 1, '--drop', 0.2, '--epochs', 1)
    planned = training.data.start_epoch(0).size.tolist()
    assert sizes == [*planned, 32]
    assert training.model.drop_rate == pytest.approx(0.2)


def test_evaluation_leaves_the_model_as_it_was(run):
    _, training = run('--model-ema', '--epochs', 1)
    before = copy.deepcopy([m.state_dict() for m in (training.model, training.ema)])
    training.measure((24,))
    for state, model in zip(before, (training.model, training.ema)):
        assert all(map(torch.equal, state.values(), model.state_dict().values()))


@pytest.mark.parametrize('options, message', [
    (['--opt', 'sgd', '--opt-eps', 1e-3], 'no epsilon or no betas'),
    (['--model', 'test_vit', '--model-kwargs', 'img_size=32', '--head-init-bias', 0, '--num-classes', 0],
     'need a classifier'),
    (['--device', 'nowhere'], '--device nowhere'),
])
def test_what_a_model_or_an_optimizer_lacks_is_said(run, options, message):
    with pytest.raises(UsageError, match=message):
        run(*options, off=True)


def test_each_head_of_a_distilled_model_gets_its_first_bias():
    model = create_model(train.parse_args(
        ['--model', 'deit_tiny_distilled_patch16_224', '--model-kwargs', 'embed_dim=48', 'depth=1', 'num_heads=2',
         '--head-init-bias', '-3', '--head-init-scale', '0']))
    for head in model.get_classifier():
        assert set(head.bias.tolist()) == {-3.} and not head.weight.any()


def test_a_label_that_cannot_be_is_an_error_and_not_another_image():
    from timm.data.target_transforms import MultiLabelTarget

    from mixsize_timm.datasets import ReadableDataset

    class Reader(list):
        def _filename(self, *args, **kwargs):
            return None

    images = timm.data.ImageDataset('', reader=Reader(), target_transform=MultiLabelTarget(2))
    readable = ReadableDataset(images)
    readable._pil = lambda index: (None, [5])
    images.reader.extend([None, None])
    with pytest.raises(ValueError, match='must be in'):
        readable[0]
