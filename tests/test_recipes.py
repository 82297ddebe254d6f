"""The packaged recipes: each is whole, parses, costs what it says, and has the values of the paper that it names."""
import json
import logging
import math
import re
import shlex

import pytest
import timm
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import write_image_folder
from recipe_costs import DOCS, ROOT, arguments, cost_line, header_of, table
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from mixsize_timm import cli, planner, train
from mixsize_timm.args import make_regime, parse_args, read_yaml
from mixsize_timm.errors import UsageError
from mixsize_timm.parser import build_parser
from mixsize_timm.recipe import LABELS, list_recipes, read_recipe, recipe_header, recipe_names

NAMES = recipe_names()
WITH_DATA = [name for name in NAMES if name != 'digits']
TINY = ['--model', 'test_resnet', '--img-size', '32', '-b', '8', '-j', '0']


def regime_of(name, *argv):
    args = parse_args(['--recipe', name, *(['--data-dir', 'x'] if name in WITH_DATA else []), *argv])
    return make_regime(args, (3, args.img_size, args.img_size))


def groups(regime):
    """The batch of each size, with its duplicates where there are any."""
    return {size: batch if copies == 1 else (batch, copies)
            for size in regime.sizes for batch, copies in [regime.group(size)]}


# Each file

def test_the_recipes_of_the_issue_are_there():
    paper = [f'imagenet_resnet50_{regime}_{arm}' for regime in ('s224', 's144') for arm in ('bplus', 'dplus')]
    small = [f'imagenet_efficientnet_b0_{arm}' for arm in ('s224_bplus', 's224_dplus', 'fixed224')]
    modern = [f'imagenet_{name}_s224_bplus' for name in ('resnet50_a1', 'resnet50_a2', 'resnet50_a3', 'convnext_tiny')]
    arms = [f'{name}_{arm}' for name in ('cifar_resnet44', 'cifar_wrn28_10', 'finetune')
            for arm in ('fixed', 'bplus', 'dplus')]
    ours = ['scratch_bplus', 'scratch_fixed']  # of the studies
    assert sorted([*paper, *small, *modern, *arms, *ours, 'imagenet_resnet50_fixed224', 'digits']) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_has_a_whole_header_and_known_arguments(name, caplog):
    text = read_recipe(name)
    header, values = recipe_header(text), yaml.safe_load(text)
    assert tuple(header) == LABELS and all(header.values())
    assert max(map(len, text.splitlines())) <= 120
    assert values.keys() <= vars(build_parser().parse_args([])).keys()
    assert not values.keys() & {'data', 'data_dir', 'output', 'experiment', 'seed', 'device', 'config', 'resume'}
    with caplog.at_level(logging.WARNING):
        args = vars(parse_args(['--recipe', name, *(['--data-dir', 'x'] if name in WITH_DATA else [])]))
    assert not caplog.records and args['recipe'] == name
    for key, value in values.items():
        if not isinstance(value, bool):  # YAML's off is not the text that it becomes
            assert args[key] == value, key


@pytest.mark.parametrize('name', NAMES)
def test_a_recipes_commands_can_be_launched_and_parsed(name):
    header = header_of(name)
    for label, processes in (('launch', 1), ('8 GPUs', 8)):
        words = shlex.split(header[label])
        assert words[:2] == ['accelerate', 'launch']
        launcher = _validate_launch_command(launch_command_parser().parse_args(
            [*words[2:words.index('-m')], '--gpu_ids', 'all', 'script']))[0]
        assert launcher.num_processes == processes
        assert launcher.multi_gpu == (processes == 8)
        assert parse_args(arguments(header[label])).recipe == name


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_costs_what_its_header_says(name):
    assert header_of(name)['costs'] == cost_line(name), 'run: python tests/recipe_costs.py --write'


def test_the_planner_says_the_same(capsys):
    assert planner.main(['--recipe', 'cifar_resnet44_dplus', '--num-images', '50000', '--device', 'cpu']) == 0
    steps, relative = re.search(r'An epoch: (\d+) steps, [\d.]+x the pixels and ([\d.]+)x the GMACs',
                                capsys.readouterr().out).groups()
    said = header_of('cifar_resnet44_dplus')['costs']
    assert f': {steps} steps, ' in said and f' {relative}x those of one at 32 px' in said


@pytest.mark.parametrize('name', NAMES)
def test_eight_devices_have_the_batch_and_rate_of_one(name):
    one, eight = (parse_args(arguments(header_of(name)[label])) for label in ('launch', '8 GPUs'))
    batch = one.batch_size * one.grad_accum_steps
    assert 8 * eight.batch_size * eight.grad_accum_steps == batch and one.lr is None
    if not name.startswith('finetune'):  # the others state their rate for their own batch
        assert batch == pytest.approx(one.lr_base_size, rel=0.01)


def test_the_page_lists_all_of_them():
    assert table() in DOCS.read_text(encoding='utf-8'), 'run: python tests/recipe_costs.py --write'


def test_no_recipe_says_it_was_run_without_a_file_that_shows_it():
    for name in NAMES:
        said = header_of(name)['was run']
        assert said == 'not run' or (ROOT / said.split(': ')[-1]).is_file(), name


@pytest.mark.parametrize('name, run', [('scratch_bplus', 'small-bplus-anneal-steps-1'), ('scratch_fixed', 'fixed-1')])
def test_a_recipe_of_the_studies_is_what_they_ran(name, run):
    assert run in header_of(name)['was run']
    path = ROOT / 'benchmarks' / 'results' / 'evidence' / 'clothing-cpu' / f'{run}.json'
    options = json.loads(path.read_text(encoding='utf-8'))['options']
    args = vars(parse_args(['--recipe', name, '--data-dir', 'x', '--num-classes', '10']))
    assert {key for key, value in options.items() if args[key] != value} <= {'lr', 'amp', 'amp_dtype', 'workers'}
    assert args['lr_base'] == options['lr'] and args['lr_base_size'] == options['batch_size']


# What they train

@pytest.mark.parametrize('name, expected', [
    ('s224_bplus', {128: 196, 160: 125, 192: 87, 224: 64, 256: 49, 288: 39, 320: 31}),
    ('s224_dplus', {128: (64, 3), 160: (64, 2), 192: 64, 224: 64, 256: 64, 288: 64, 320: 31}),
    ('s144_bplus', {96: 348, 128: 196, 224: 64, 256: 49}),
    ('s144_dplus', {96: (64, 5), 128: (64, 3), 224: 64, 256: 64}),
])
def test_the_paper_recipes_have_the_papers_batches(name, expected):
    regime = regime_of(f'imagenet_resnet50_{name}')
    assert groups(regime) == expected
    shares = {'s224': [0.8 / 6] * 3 + [0.2] + [0.8 / 6] * 3, 's144': [0.2, 0.6, 0.1, 0.1]}[name[:4]]
    assert regime.probs == pytest.approx(shares)


@pytest.mark.parametrize('net', ['resnet44', 'wrn28_10'])
@pytest.mark.parametrize('arm, expected', [
    ('bplus', {16: 256, 24: 114, 32: 64, 48: 28}),
    ('dplus', {16: (64, 4), 24: (64, 2), 32: 64, 48: 28}),
])
def test_the_cifar_recipes_have_the_papers_batches(net, arm, expected):
    regime = regime_of(f'cifar_{net}_{arm}')
    assert groups(regime) == expected
    assert regime.probs == pytest.approx([0.2, 0.3, 0.3, 0.2])


def test_procedure_a3_trains_at_the_size_that_it_is_tested_at():
    regime = regime_of('imagenet_resnet50_a3_s224_bplus')
    assert regime.base_size == 160 and regime.sizes[-1] == 224


def rates(name, argv=()):
    """The learning rate of each epoch, on a model of one layer, and the kind of its optimizer."""
    args = parse_args(['--recipe', name, '--data-dir', 'x', '--lr', '1', *argv])
    optimizer = create_optimizer_v2(torch.nn.Linear(1, 1), **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    schedule, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step_update((epoch + 1) * 10)
        schedule.step(epoch + 1)
    return rates, optimizer


@pytest.mark.parametrize('name, epochs, milestones, factor, decay', [
    ('imagenet_resnet50_fixed224', 90, (30, 60, 80), 0.1, 1e-4),
    ('imagenet_resnet50_s144_dplus', 90, (30, 60, 80), 0.1, 1e-4),
    ('cifar_resnet44_dplus', 200, (81, 122, 164), 0.1, 1e-4),
    ('cifar_wrn28_10_bplus', 200, (60, 120, 160), 0.2, 5e-4),
])
def test_the_paper_recipes_have_the_papers_schedule_and_optimizer(name, epochs, milestones, factor, decay):
    found, optimizer = rates(name)
    assert found == pytest.approx([factor**sum(epoch >= m for m in milestones) for epoch in range(epochs)])
    group = next(group for group in optimizer.param_groups if group['weight_decay'])
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group['momentum'], group['nesterov'], group['weight_decay']) == (0.9, False, decay)


def test_efficientnet_has_the_schedule_and_optimizer_of_the_papers_code():
    found, optimizer = rates('imagenet_efficientnet_b0_s224_dplus')
    falling = [(1 + math.cos(math.pi * epoch / 200)) / 2 for epoch in range(200)]
    assert found == pytest.approx([1e-4 + (1 - 1e-4) * part for part in falling])
    group = next(group for group in optimizer.param_groups if group['weight_decay'])
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group['momentum'], group['nesterov'], group['weight_decay']) == (0.9, False, 1e-5)


@pytest.mark.parametrize('name', [name for name in WITH_DATA if 'resnet44' not in name and 'wrn' not in name])
def test_the_others_warm_up_and_end_low(name):
    found, _ = rates(name)
    assert max(found) <= 1 and min(found[len(found) // 2:]) == found[-1] < 0.02


def test_a_fixed_recipe_differs_from_its_mixed_ones_in_the_regime_alone():
    regime = {'mixsize', 'mixsize_adapt', 'mixsize_drop', 'grad_smoothing', 'fast_loader'}
    for fixed, others in (('imagenet_resnet50_fixed224', ('s224_bplus', 's224_dplus', 's144_bplus', 's144_dplus')),
                          ('imagenet_efficientnet_b0_fixed224', ('s224_bplus', 's224_dplus')),
                          *((f'{name}_fixed', ('bplus', 'dplus'))
                            for name in ('cifar_resnet44', 'cifar_wrn28_10', 'finetune'))):
        control = yaml.safe_load(read_recipe(fixed))
        assert control['mixsize'] is False and control['grad_smoothing'] is False
        for other in others:
            values = yaml.safe_load(read_recipe(f'{fixed.rpartition("_")[0]}_{other}'))
            assert {key for key in {*values, *control} if values.get(key) != control.get(key)} <= regime, other


# --recipe

def test_the_command_line_wins_over_a_file_and_that_over_the_recipe(tmp_path):
    (tmp_path / 'c.yaml').write_text('epochs: 3\nbatch_size: 5\n')
    argv = ['--recipe', 'imagenet_resnet50_s144_bplus', '--data-dir', 'x', '-c', str(tmp_path / 'c.yaml'), '-b', '7']
    args = parse_args(argv)
    assert (args.batch_size, args.epochs, args.mixsize, args.opt) == (7, 3, 's144', 'momentum')
    assert parse_args([*argv, '--mixsize', 'off']).mixsize == 'off'
    (tmp_path / 'c.yaml').write_text('recipe: cifar_resnet44_dplus\ndata_dir: x\nepochs: 3\n')
    args = parse_args(['-c', str(tmp_path / 'c.yaml')])
    assert (args.recipe, args.train_pad, args.epochs) == ('cifar_resnet44_dplus', 4, 3)


def test_the_digits_are_a_recipe_like_any_other():
    named, default = (vars(parse_args(argv)) for argv in (['--recipe', 'digits'], []))
    assert named == default and default['recipe'] == default['dataset'] == 'digits'
    assert parse_args(['--data-dir', 'x']).recipe == ''
    assert parse_args(['--recipe', 'digits', '--dataset', 'torch/mnist', '--data-dir', 'x']).img_size == 32


@pytest.mark.parametrize('name', WITH_DATA)
def test_a_recipe_that_needs_data_never_trains_the_digits(name):
    with pytest.raises(UsageError, match=f'^the recipe {name} needs a data set: name its folder with --data-dir$'):
        parse_args(['--recipe', name])
    assert parse_args(['--recipe', name], recipe_without_data=False).dataset != 'digits'  # to plan
    assert parse_args(['--recipe', name, '--dataset', 'hfds/some/images']).dataset == 'hfds/some/images'


@pytest.mark.parametrize('name, close', [('imagenet_resnet50_s224', "'imagenet_resnet50_s224_"), ('digit', "'digits'"),
                                         ('finetune_d+', "'finetune_d"), ('qqq', None)])
def test_an_unknown_recipe_is_one_line_with_its_neighbour(name, close):
    with pytest.raises(UsageError) as error:
        parse_args(['--recipe', name])
    said = str(error.value)
    assert said.startswith(f'there is no recipe {name!r}') and said.endswith('"mixsize recipes" lists them')
    assert close in said if close else 'but' not in said


def test_another_model_leaves_the_recipes_arguments_of_its_own():
    argv = ['--recipe', 'scratch_bplus', '--data-dir', 'x']
    assert parse_args(argv).model_kwargs == {'channels': [32, 64, 128, 256], 'stem_width': 16}
    assert parse_args([*argv, '--model', 'efficientnet_b0']).model_kwargs == {}
    assert parse_args([*argv, '--model', 'resnet18', '--model-kwargs', 'stem_width=8']).model_kwargs == {
        'stem_width': 8}


def test_another_optimizer_leaves_the_recipes_settings_of_its_own():
    argv = ['--recipe', 'digits']
    assert parse_args(argv).opt_kwargs == {'max_grad_norm': None}
    assert parse_args([*argv, '--opt', 'sgd']).opt_kwargs == {}
    assert parse_args([*argv, '--opt', 'adamw', '--opt-kwargs', 'fused=False']).opt_kwargs == {'fused': False}


def test_a_baseline_becomes_mixsize_and_mixsize_off_keeps_no_repetition(tmp_path):
    data = ['--data-dir', 'x']
    assert parse_args(['--recipe', 'finetune_fixed', *data]).fast_loader
    mixed = parse_args(['--recipe', 'finetune_fixed', *data, '--mixsize', 's224'])
    assert (mixed.mixsize, mixed.fast_loader) == ('s224', False)
    with pytest.raises(UsageError, match='not for --mixsize off'):
        parse_args(['--recipe', 'imagenet_resnet50_a1_s224_bplus', *data, '--mixsize', 'off'])


def test_a_file_of_another_recipe_is_refused_and_one_of_a_whole_run_needs_none(tmp_path):
    short, whole = tmp_path / 'short.yaml', tmp_path / 'whole.yaml'
    short.write_text('recipe: cifar_resnet44_dplus')
    with pytest.raises(UsageError, match='is for the recipe cifar_resnet44_dplus, not finetune_dplus'):
        parse_args(['--recipe', 'finetune_dplus', '-c', str(short), '--data-dir', 'x'])
    args = vars(parse_args(['--recipe', 'cifar_resnet44_dplus', '--data-dir', 'x']))
    args.pop('resume_auto')
    whole.write_text(yaml.safe_dump({**args, 'recipe': 'one_of_the_past', 'resume': ''}))
    assert parse_args(['-c', str(whole)]).model == 'resnet44_cifar'


def test_a_run_of_a_recipe_keeps_all_that_repeats_it_and_is_resumed_without_it(tmp_path):
    run = ['--recipe', 'digits', *TINY, '-b', '480', '--mixsize', 'off', '--calibrate', '0', '--experiment', 'run',
           '--output', str(tmp_path)]
    assert train.main([*run, '--epochs', '1', '--warmup-epochs', '0', '--resume', 'auto']) == 0
    folder = tmp_path / 'run'
    kept = read_yaml(str(folder / 'args.yaml'))
    assert kept['recipe'] == 'digits'
    for key, value in yaml.safe_load(read_recipe('digits')).items():
        if key not in ('img_size', 'batch_size', 'epochs', 'warmup_epochs'):
            assert kept[key] == value, key
    repeated = vars(parse_args(['-c', str(folder / 'args.yaml')]))
    assert {key for key in kept if repeated[key] != kept[key]} <= {'config', 'resume', 'resume_auto', 'lr'}
    for argv in (['--resume', str(folder)], [*run, '--resume', 'auto']):
        args = parse_args(argv)
        assert (args.recipe, args.epochs, args.model) == ('digits', 1, 'test_resnet')
    with pytest.raises(UsageError, match='was begun with the recipe digits, not finetune_dplus: leave out --recipe'):
        parse_args(['--resume', str(folder), '--recipe', 'finetune_dplus'])


def test_a_run_without_a_recipe_is_not_resumed_with_one(tmp_path):
    (tmp_path / 'args.yaml').write_text('data_dir: x\n')
    with pytest.raises(UsageError, match='was begun with no recipe, not digits'):
        parse_args(['--resume', str(tmp_path), '--recipe', 'digits'])


@pytest.mark.parametrize('name', ['finetune_fixed', 'finetune_dplus'])
def test_ones_own_photographs_are_trained(tmp_path, name):
    weights = tmp_path / 'trained.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), weights)
    argv = ['--recipe', name, '--data-dir', str(write_image_folder(tmp_path / 'photos')), *TINY,
            '--num-classes', '2', '--pretrained-path', str(weights), '--epochs', '1', '--warmup-epochs', '0',
            '--calibrate', '1', '--calibrate-val', '1', '--mixsize-sizes' if name == 'finetune_dplus' else '--mixsize',
            *(['24', '32'] if name == 'finetune_dplus' else ['off'])]
    assert train.main([*argv, '--output', str(tmp_path), '--experiment', 'run']) == 0
    assert (tmp_path / 'run' / 'best' / 'model.safetensors').exists()


# mixsize recipes

def test_the_command_lists_them_and_prints_one(capsys):
    assert cli.main(['recipes']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES and '\n'.join(lines) + '\n' == list_recipes()
    assert 'was run  98.45 % mean top-1' in lines[NAMES.index('digits')]
    assert all(header_of(line.split()[0])['gives'] in line for line in lines)
    assert cli.main(['recipes', 'finetune_bplus']) == 0
    assert capsys.readouterr().out == (ROOT / 'recipes' / 'finetune_bplus.yaml').read_text(encoding='utf-8')
    assert cli.main(['recipes', 'finetune']) == 2
    assert "there is no recipe 'finetune', but 'finetune_" in capsys.readouterr().err


def test_a_printed_recipe_is_a_configuration_of_the_same_run(tmp_path):
    for name in ('digits', 'cifar_wrn28_10_fixed'):
        (tmp_path / 'mine.yaml').write_text(read_recipe(name))
        data = ['--data-dir', 'x'] if name in WITH_DATA else []
        mine, theirs = (vars(parse_args([*data, *argv])) for argv in (
            ['-c', str(tmp_path / 'mine.yaml')], ['--recipe', name]))
        assert {key for key in mine if mine[key] != theirs[key]} <= {'config', 'recipe'}


def test_all_of_them_are_packaged():
    assert [path.stem for path in sorted(ROOT.glob('recipes/*.yaml'))] == NAMES
    packaged = (ROOT / 'pyproject.toml').read_text(encoding='utf-8')
    assert '"mixsize_timm.recipes" = ["*.yaml"' in packaged and '"mixsize_timm.recipes" = "recipes"' in packaged
