"""The command line: defaults, the recipe, configuration files, regimes, and what is refused."""
from pathlib import Path

import pytest
import yaml

from mixsize_timm import train
from mixsize_timm.args import make_regime, parse_args
from mixsize_timm.errors import UsageError
from mixsize_timm.parser import build_parser


def test_without_data_the_recipe_trains_the_digits():
    args = parse_args(['--model', 'resnet18'])
    assert args.dataset == 'digits' and args.img_size == 32 and args.num_classes == 10
    assert args.hflip == 0 and args.model == 'resnet18'


def test_any_argument_overrides_the_recipe():
    args = parse_args(['--epochs', '3', '-b', '16', '--hflip', '0.5'])
    assert (args.epochs, args.batch_size, args.hflip, args.num_classes) == (3, 16, 0.5, 10)


def test_of_two_crops_the_command_lines_is_taken(tmp_path):
    assert parse_args(['--train-pad', '4']).scale == [0.08, 1.0]  # not that of the digits
    assert parse_args(['--train-pad', '0']).scale == [0.7, 1.0]
    config = tmp_path / 'config.yaml'
    config.write_text('train_pad: 4')
    args = parse_args(['-c', str(config), '--ratio', '1', '1'])
    assert args.train_pad == 0 and args.ratio == [1, 1] and parse_args(['-c', str(config)]).train_pad == 4


def test_with_data_the_defaults_are_timms():
    for argv in (['--data-dir', 'x'], ['x'], ['--dataset', 'hfds/x']):
        args = parse_args(argv)
        assert (args.epochs, args.batch_size, args.img_size, args.opt) == (300, 128, None, 'sgd')
    assert parse_args(['x']).data_dir == 'x'
    with pytest.raises(UsageError, match='the digits are embedded'):
        parse_args(['x', '--dataset', 'digits'])
    with pytest.raises(UsageError, match='--dataset torch/cifar10 is in a folder.* name it with --data-dir'):
        parse_args(['--dataset', 'torch/cifar10'])


def test_a_configuration_file_is_under_the_command_line(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text(yaml.safe_dump({'data_dir': 'x', 'epochs': 7, 'lr': 0.5, 'opt': 'adamw'}))
    args = parse_args(['-c', str(path), '--epochs', '9'])
    assert (args.data_dir, args.epochs, args.lr, args.opt, args.batch_size) == ('x', 9, 0.5, 'adamw', 128)


def test_the_command_line_wins_over_a_configuration(tmp_path):
    path = tmp_path / 'c.yaml'
    path.write_text(yaml.safe_dump({'data_dir': 'x', 'mixsize': 'custom', 'mixsize_sizes': [32, 48],
                                    'mixsize_adapt': 'b+'}))
    assert parse_args(['-c', str(path), 'y']).data_dir == 'y'
    assert parse_args(['-c', str(path)]).mixsize_sizes == [32, 48]
    assert parse_args(['-c', str(path), '--mixsize', 's224']).mixsize_sizes is None
    assert parse_args(['-c', str(path), '--mixsize', 'off']).mixsize == 'off'
    path.write_text(yaml.safe_dump({'data_dir': 'x', 'mixsize': 's224'}))
    assert parse_args(['-c', str(path), '--mixsize-sizes', '64']).mixsize == 'custom'


def test_an_unknown_key_is_named_with_its_neighbour(tmp_path, caplog):
    (tmp_path / 'c.yaml').write_text('batchsize: 3\n')
    parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert "'batchsize'" in caplog.text and "'batch_size'" in caplog.text


def test_a_resumed_run_brings_its_arguments(tmp_path):
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(
        {'data_dir': 'x', 'epochs': 7, 'output': 'o', 'experiment': 'e', 'resume': ''}))
    args = parse_args(['--resume', str(tmp_path), '--epochs', '8'])
    assert (args.data_dir, args.epochs, args.resume) == ('x', 8, str(tmp_path))
    assert args.output == '' and args.experiment == ''


@pytest.mark.parametrize('img_size, expected', [(32, 'cifar'), (95, 'cifar'), (96, 's224'), (224, 's224')])
def test_the_default_regime_depends_on_the_base_size(img_size, expected):
    regime = make_regime(parse_args(['x']), (3, img_size, img_size))
    assert len(regime.sizes) == {'cifar': 4, 's224': 7}[expected] and regime.adapt == 'd+'


def test_arguments_reach_the_regime():
    args = parse_args(['x', '--mixsize-sizes', '48', '32', '--mixsize-probs', '1', '3', '--mixsize-adapt', 'b+',
                       '--mixsize-duplicates', '2', '--mixsize-max-work', '1.5', '-b', '20', '--mixup', '0.2'])
    regime = make_regime(args, (3, 32, 32))
    assert args.mixsize == 'custom'
    assert (regime.sizes, regime.probs) == ((32, 48), (0.75, 0.25))
    assert (regime.base_size, regime.batch_size, regime.duplicates) == (32, 20, 2)
    assert (regime.adapt, regime.max_work, regime.batch_multiple) == ('b+', 1.5, 2)
    assert make_regime(parse_args(['x', '--mixsize', 'off']), (3, 32, 48)) is None


@pytest.mark.parametrize('words, adapt, anneal, epochs, batch_of', [
    ('', 'b+', 1, 7, 'mean'), ('--mixsize-adapt d+', 'd+', 1, 7, 'mean'),
    ('--mixsize-anneal 0.5', 'b+', 0.5, 7, 'mean'), ('--mixsize-anneal 0', 'b+', 0, None, 'mean'),
    ('--mixsize-batch-of base', 'b+', 1, 7, 'base')])
def test_a_preset_brings_options_that_the_command_line_changes(words, adapt, anneal, epochs, batch_of):
    regime = make_regime(parse_args(['x', '--mixsize', 'a144', '--epochs', '7', *words.split()]), (3, 224, 224))
    assert (regime.adapt, regime.anneal, regime.epochs, regime.batch_of) == (adapt, anneal, epochs, batch_of)


@pytest.mark.parametrize('values, adapt', [
    ({'mixsize': 's144', 'mixsize_adapt': 'd+', 'mixsize_anneal': 0.5}, 'b+'), ({'mixsize_adapt': 'd+'}, 'd+'),
    ({'mixsize': None, 'mixsize_adapt': 'd+'}, 'b+'), ({'mixsize': 'a144', 'mixsize_adapt': 'd+'}, 'd+')])
def test_a_preset_is_not_mixed_with_another_regime_under_it(tmp_path, values, adapt):
    """What a configuration says of another regime is left out; what it says of this one, or of any, counts."""
    path = tmp_path / 'c.yaml'
    path.write_text(yaml.safe_dump(values))
    regime = make_regime(parse_args(['x', '-c', str(path), '--mixsize', 'a144']), (3, 224, 224))
    assert (regime.adapt, regime.anneal, regime.batch_of) == (adapt, 1, 'mean')


@pytest.mark.parametrize('asked, mixup, multiple', [('1', '0', 1), ('8', '0', 8), ('3', '0.2', 6), ('8', '0.2', 8)])
def test_batches_suit_the_device_and_the_pairs_of_mixup(asked, mixup, multiple):
    args = parse_args(['x', '--mixsize-batch-multiple', asked, '--mixup', mixup, '-b', '100'])
    regime = make_regime(args, (3, 224, 224))
    assert regime.batch_multiple == multiple
    assert all(regime.group(size)[0] % multiple == 0 for size in regime.sizes)


@pytest.mark.parametrize('argv, message', [
    (['-b', '0'], '--batch-size must be at least 1'),
    (['--epochs', '0'], '--epochs must be at least 1'),
    (['-j', '-1'], '--workers must not be negative'),
    (['--calibrate', '-1'], '--calibrate must not be negative'),
    (['--mixsize', 'custom'], 'needs --mixsize-sizes'),
    (['--mixsize', 's224', '--mixsize-sizes', '32'], 'need --mixsize custom'),
    (['--mixsize-probs', '1'], 'need --mixsize custom'),
    (['--grad-smoothing-momentum', '1'], 'must be in'),
    (['--nonsense'], 'unrecognized arguments: --nonsense'),
    (['--epochs', 'many'], 'invalid int value'),
    (['--mixsize', 'huge'], 'invalid choice'),
    (['-c', '/nowhere.yaml'], 'cannot read /nowhere.yaml'),
    (['--resume', '/nowhere'], 'no run at /nowhere'),
    (['--sched', 'plateau', '--sched-on-updates'], 'plateau'),
    (['--mixsize', 'off', '--mixsize-max-work', '1'], 'leave out --mixsize-max-work'),
    (['--lr-base-size', '0'], '--lr-base-size must be at least 1'),
    (['--train-pad', '-1'], '--train-pad must not be negative'),
    (['--train-pad', '4', '--scale', '0.5', '1'], '--train-pad and --scale exclude each other'),
    (['--train-pad', '4', '--train-crop-mode', 'rrc'], '--train-pad and --train-crop-mode exclude each other'),
    (['--train-pad', '4', '--no-aug'], '--train-pad and --no-aug exclude each other'),
    (['--train-pad', '4', '--mixsize', 'off'], 'leave it out, or add --fast-loader'),
])
def test_what_cannot_work_is_one_line(argv, message):
    with pytest.raises(UsageError) as error:
        parse_args(argv)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('argv, message', [
    (['--mixsize-sizes', '32', '48', '--mixsize-probs', '1'], '2 sizes but 1 probabilities'),
    (['--mixsize-sizes', '32', '48', '--mixsize-probs', '-1', '2'], 'not negative'),
    (['--mixsize-sizes', '32', '48', '--mixsize-probs', '0', '0'], 'all probabilities are zero'),
    (['--mixsize-sizes', '96', '-b', '2'], 'rounds to zero at 96 px'),
])
def test_a_regime_that_cannot_be_is_one_line(argv, message):
    with pytest.raises(UsageError, match=message):
        make_regime(parse_args(argv), (3, 32, 32))


def test_images_that_are_not_square_are_refused():
    with pytest.raises(UsageError, match='not 32x48: use --mixsize off'):
        make_regime(parse_args(['x']), (3, 32, 48))


def test_yaml_reads_off_as_false_and_a_scalar_as_no_list(tmp_path):
    (tmp_path / 'c.yaml').write_text('mixsize: off\nmixed_precision: no\n')
    args = parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert args.mixsize == 'off' and args.mixed_precision == 'no'
    (tmp_path / 'c.yaml').write_text('mixsize_sizes: 64\n')
    assert parse_args(['-c', str(tmp_path / 'c.yaml')]).mixsize_sizes == [64]
    (tmp_path / 'c.yaml').write_text('mixsize: huge\n')
    with pytest.raises(UsageError, match='mixsize must be one of off, s224'):
        parse_args(['-c', str(tmp_path / 'c.yaml')])


def test_the_recipes_optimizer_arguments_leave_with_its_optimizer():
    assert parse_args([]).opt_kwargs == {'max_grad_norm': None}
    assert parse_args(['--opt', 'adamw']).opt_kwargs == {}
    assert parse_args(['--opt', 'adamw', '--opt-kwargs', 'fused=True']).opt_kwargs == {'fused': True}


def test_a_configuration_that_is_no_mapping(tmp_path):
    (tmp_path / 'c.yaml').write_text('- 1\n')
    with pytest.raises(UsageError, match='holds no arguments'):
        parse_args(['-c', str(tmp_path / 'c.yaml')])


def test_help_fits_a_terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    lines = build_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 80 and 'MixSize:' in lines


CONFIGS = Path(__file__).parent / 'configs'
TINY = ['--model', 'test_resnet', '--img-size', '32', '--num-classes', '2', '-b', '8', '--epochs', '1',
        '--warmup-epochs', '0', '--cooldown-epochs', '0', '-j', '0', '--mixsize-sizes', '24', '32']


@pytest.mark.parametrize('name, landed', [
    ('timm_script', dict(opt='adamw', clip_grad=1., sched_on_updates=True, model_ema=True, aa='rand-m5-inc1')),
    ('resnet_strikes_back_a2', dict(lr=5e-3, loss='bce', bce_target_thresh=0.2, smoothing=0., mixsize_duplicates=3,
                                    drop_path=0.05, warmup_lr=1e-6, mixed_precision='fp16')),
    ('older_script', dict(lr=0.048, decay_rate=0.97, drop_path=0.2, lr_noise=[0.42, 0.9], opt='rmsproptf', tta=0)),
])
def test_a_file_of_a_timm_user_loads_and_runs(tmp_path, image_folder, caplog, name, landed):
    config = ['--config', str(CONFIGS / f'{name}.yaml')]
    assert landed.items() <= vars(parse_args([*config, '--data-dir', 'x'])).items()
    unknown = [record.message for record in caplog.records if 'Unknown argument' in record.message]
    assert len(unknown) == (6 if name == 'older_script' else 0)
    run = [*config, *TINY, '--data-dir', str(image_folder), '--output', str(tmp_path), '--experiment', name]
    assert train.main([*run, '--mixed-precision', 'no']) == 0  # one of them asks for fp16, which wants a GPU
    assert (tmp_path / name / 'best' / 'model.safetensors').exists()


@pytest.mark.parametrize('line, message', [
    ('lr: fast', "lr must be a number, not 'fast'"), ('input_size: 224', 'input_size must be 3 values, not 224'),
    ('decay_milestones: [1, x]', "decay_milestones must be a whole number, not 'x'"), ('amp: 3', 'amp must be true or'),
    ('model_kwargs: 3', 'model_kwargs must be a mapping'), ('epochs: [1, 2]', 'epochs must be 1 value, not [1, 2]'),
    ('epochs: 2.5', 'epochs must be a whole number'), ('train_size_schedule: nope', 'must be one of constant, prog'),
])
def test_a_value_of_the_wrong_kind_in_a_file_is_refused(tmp_path, line, message):
    (tmp_path / 'c.yaml').write_text(line)
    with pytest.raises(UsageError) as error:
        parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert message in str(error.value)


def test_the_command_line_wins_over_a_file_even_with_the_value_of_the_default(tmp_path):
    (tmp_path / 'c.yaml').write_text('aug_repeats: 3\namp: true\namp_dtype: bfloat16\nmixed_precision: bf16\n')
    config = ['-c', str(tmp_path / 'c.yaml')]
    assert parse_args([*config, '--mixsize-duplicates', '1']).mixsize_duplicates == 1
    assert parse_args([*config, '--amp-dtype', 'float16']).mixed_precision == 'fp16'
    assert parse_args([*config, '--mixed-precision', 'no']).mixed_precision == 'no'


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    (tmp_path / 'c.yaml').write_text("lr: 3e-4\nepochs: '10'\nmean: ['0.5', 0.4, '0.3']\ntorchcompile: true\n")
    args = parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert (args.lr, args.epochs, args.mean, args.torchcompile) == (3e-4, 10, [0.5, 0.4, 0.3], 'inductor')
