"""The studies' own arithmetic and commands; what they measure is not measured here."""
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mixsize_timm.args import make_regime, parse_args
from mixsize_timm.errors import INTERRUPTED, STOPPED
from mixsize_timm.prepare import parse_args as prepare_args
from mixsize_timm.sampler import plan_epoch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def evidence():
    """The modules of the studies by name, forgotten afterwards."""
    sys.path.insert(0, str(ROOT))
    before = set(sys.modules)
    yield lambda name: importlib.import_module(f'benchmarks.evidence.{name}')
    sys.path.remove(str(ROOT))
    for name in set(sys.modules) - before:
        if name.split('.')[0] == 'benchmarks':
            del sys.modules[name]


@pytest.fixture(scope='module')
def studied(evidence):
    """Each setting with its arms."""
    settings = evidence('settings')
    return [(setting, settings.make_arms(setting)) for setting in map(settings.Setting.read, settings.Setting.names())]


def machine(evidence, folder, **kwargs):
    return evidence('runs').Machine(**{'data': '../shared/data', 'work': folder, 'jobs': 1, 'threads': 1,
                                       'device': 'cpu', 'deadline': None, **kwargs})


def run_of(arm, seed, accuracies, gmacs=(1., 2., 4.), training=10., regime='cifar', through='', date='today'):
    rows = [{'img_size': size, 'top1': value, 'top1_uncalibrated': value - 1, 'gmacs': cost}
            for size, value, cost in zip((16, 24, 32), accuracies, gmacs)]
    return {'title': arm, 'seed': seed, 'date': date, 'results': rows, 'calibrated': 1,
            'options': {'mixsize': regime, 'epochs': 3},
            'training': {'gmacs': training, 'seconds': 2 * training, 'steps': 5},
            'commands': [f'python -m {through} mixsize_timm.train']}


def test_every_arm_of_every_study_is_one_that_can_be_run(evidence, studied):
    for setting, arms in studied:
        studies = evidence('studies').make_studies(setting)
        used = {name for study in studies.values() for name in study.arms}
        assert used == set(arms)
        assert list(studies) == list(evidence('__main__').STUDIES)


def test_what_is_planned_is_there_and_has_a_control(evidence, studied):
    settings = evidence('settings')
    for setting, arms in studied:
        planned = settings.planned_arms(setting)
        assert set(planned) <= set(arms) and settings.CONTROL in planned
        assert all(planned[name] == arms[name] for name in planned)
        assert setting.planned or planned == arms


def test_every_command_of_training_is_taken_by_the_parser(evidence, studied, tmp_path):
    for setting, arms in studied:
        for name, arm in arms.items():
            words = evidence('runs').training_command(setting, name, arm, 1, machine(evidence, tmp_path))
            args = parse_args(words[words.index('mixsize_timm.train') + 1:])
            assert (args.epochs, args.seed, args.experiment) == (arm.epochs, 1, f'{name}-1')
            assert args.warmup_epochs >= 1


def test_arms_of_equal_cost_take_as_many_operations_as_the_control(evidence, studied, tmp_path):
    """To half an epoch, timm's to half a step an epoch; those of less cost no more than they may."""
    for setting, arms in studied:
        for name, arm in arms.items():
            words = evidence('runs').training_command(setting, name, arm, 1, machine(evidence, tmp_path))
            args = parse_args(words[words.index('mixsize_timm.train') + 1:])
            if args.train_img_sizes:
                step = sum(p * batch * setting.gmacs(size) for p, batch, size in zip(
                    args.train_size_probs or [1 / len(args.train_img_sizes)] * len(args.train_img_sizes),
                    args.train_batch_sizes, args.train_img_sizes))
                assert abs(args.train_batches_per_epoch - setting.budget / setting.epochs / step) <= 0.5
                epochs = [setting.budget / arm.epochs] * arm.epochs
            elif args.mixsize == 'off':
                images = setting.num_images // args.batch_size * args.batch_size
                epochs = [images * setting.gmacs(args.img_size)] * arm.epochs
            else:
                regime = make_regime(args, (3, args.img_size, args.img_size))
                epochs = [setting.epoch_gmacs(regime, epoch) for epoch in range(arm.epochs)]
                plan = plan_epoch(regime, setting.num_images, epoch=arm.epochs - 1)
                assert epochs[-1] == pytest.approx(sum(setting.gmacs(size) * images for size, images in zip(
                    plan.size.tolist(), (plan.batch * plan.duplicates).tolist())))
            assert len(epochs) == args.epochs
            if '0.4 of the cost' in arm.title:
                assert sum(epochs) <= 0.4 * setting.budget * 1.001, (setting.name, name)
                assert sum(epochs) + max(epochs) > 0.4 * setting.budget
            else:
                assert abs(sum(epochs) - setting.budget) <= 0.55 * max(epochs), (setting.name, name)


def test_no_two_arms_have_a_title(studied):
    for setting, arms in studied:
        assert len({arm.title for arm in arms.values()}) == len(arms), setting.name


def test_a_mean_batch_is_the_controls(evidence, studied, tmp_path):
    for (setting, arms), name in itertools.product(studied, ('small-bplus-anneal-steps', 'half-bplus')):
        words = evidence('runs').training_command(setting, name, arms[name], 1, machine(evidence, tmp_path))
        args = parse_args(words[words.index('mixsize_timm.train') + 1:])
        regime = make_regime(args, (3, args.img_size, args.img_size))
        assert regime.mean_batch == pytest.approx(setting.batch_size, rel=0.05)


def test_the_commands_that_are_kept_name_no_path_of_a_machine(evidence, studied, tmp_path, monkeypatch):
    """However the folders are named."""
    (tmp_path / 'here').mkdir()
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    args = evidence('__main__')._parse(
        ['inference', '--data', str(tmp_path / 'data'), '--work', str(tmp_path / 'here' / 'runs')])
    assert (args.data, str(args.work)) == (os.path.join('..', 'data'), 'runs')
    place = machine(evidence, args.work, data=args.data)
    for setting, arms in studied:
        words = [*evidence('runs').preparation_command(setting, place),
                 *evidence('runs').training_command(setting, 'fixed', arms['fixed'], 1, place)]
        assert not any(str(tmp_path) in word for word in words)


def test_a_missing_run_is_made_and_one_that_is_there_is_not(evidence, studied, tmp_path, monkeypatch):
    runs, (setting, arms) = evidence('runs'), studied[0]
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'results')
    arms = {'fixed': arms['fixed']}
    monkeypatch.setattr(runs, 'has_fast_bf16', lambda: True)
    called = []

    def call(self, command, log, kept_open):
        called.append(command[2])
        (tmp_path / 'work' / setting.name / 'fixed-7').mkdir(parents=True, exist_ok=True)
        if command[2] == 'mixsize_timm.evaluate':
            folder = Path(command[command.index('--output') + 1])
            folder.mkdir()
            accuracy = {'--calibrate-aug': 50., '--no-calibrate-aug': 51.}[command[-1]]
            (folder / 'sizes.json').write_text(json.dumps({
                'settings': {'command': 'c', 'machine': 'm', 'date': 'today'}, 'checkpoints': [
                    {'model': 'n', 'num_params': 1, 'calibrated': 1, 'training': {},
                     'results': [{'img_size': 16, 'top1': accuracy}]}]}))
        return 0

    monkeypatch.setattr(runs.Machine, 'call', call)
    for _ in range(2):
        assert runs.run_all(setting, arms, [7], machine(evidence, tmp_path / 'work')) == 0
    assert called == ['mixsize_timm.train', 'mixsize_timm.evaluate', 'mixsize_timm.evaluate']
    result, = runs.read_results(setting, 'fixed')
    assert result['seed'] == 7 and result['machine'] == 'm'
    assert result['results'] == [{'img_size': 16, 'top1': 50., 'top1_as_in_use': 51.}]
    assert all(command.startswith('python -m mixsize_timm.') for command in result['commands'])
    changed = {'fixed': replace(arms['fixed'], epochs=arms['fixed'].epochs + 1)}
    with pytest.raises(ValueError, match='other options'):
        runs.run_all(setting, changed, [7], machine(evidence, tmp_path / 'work'))


def test_data_are_made_smaller_once_before_the_runs(evidence, studied, tmp_path, monkeypatch):
    """And the run that was asked for reads them; without them none is begun."""
    runs = evidence('runs')
    setting, arms = next((setting, arms) for setting, arms in studied if setting.short_side)
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'results')
    code, called = 2, []
    monkeypatch.setattr(runs.Machine, 'call', lambda self, command, *_: called.append(command) or code)
    (tmp_path / setting.data).mkdir()
    place = machine(evidence, tmp_path / 'work', data=tmp_path)
    assert runs.run_all(setting, {'fixed': arms['fixed']}, [7, 8], place) == 2
    (prepare,) = called
    given = prepare_args(prepare[prepare.index('mixsize_timm.prepare') + 1:])
    assert given.src == str(tmp_path / setting.data) and given.short_side == setting.short_side
    assert {'train', setting.test_split} <= set(given.split)
    train = runs.training_command(setting, 'fixed', arms['fixed'], 7, place)
    assert train[train.index('--dataset') + 1] == f'hfds/{given.dst}'

    code, called[:] = 0, []
    monkeypatch.setattr(runs, '_run', lambda *args: called.append('run') or True)
    assert runs.run_all(setting, {'fixed': arms['fixed']}, [7, 8], place) == 0
    assert called == [prepare, 'run', 'run']


@pytest.mark.parametrize('code', [INTERRUPTED, STOPPED, -signal.SIGTERM, 128 + signal.SIGKILL])
def test_a_training_that_was_stopped_or_killed_is_no_failure(evidence, studied, tmp_path, monkeypatch, code):
    runs, (setting, arms) = evidence('runs'), studied[0]
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'results')
    monkeypatch.setattr(runs.Machine, 'call', lambda *_: code)
    arms = {'fixed': arms['fixed']}
    assert runs.run_all(setting, arms, [7, 8], machine(evidence, tmp_path)) == 2
    assert not (tmp_path / 'results').exists()


def test_a_training_that_failed_is_a_result(evidence, studied, tmp_path, monkeypatch):
    runs, (setting, arms) = evidence('runs'), studied[0]
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'results')

    def call(self, command, log, kept_open):
        log.write_text('many lines\nmixsize_timm.train: error: the loss is not finite\n')
        return 2

    monkeypatch.setattr(runs.Machine, 'call', call)
    arms = {'fixed': arms['fixed']}
    assert runs.run_all(setting, arms, [7], machine(evidence, tmp_path)) == 0
    assert 'not finite' in runs.read_results(setting, 'fixed')[0]['failed']


def test_nothing_is_begun_when_the_time_is_over(evidence, studied, tmp_path, monkeypatch):
    runs, (setting, arms) = evidence('runs'), studied[0]
    monkeypatch.setattr(runs.Machine, 'call', lambda *_: pytest.fail('it was begun'))
    arms = {'fixed': arms['fixed']}
    assert runs.run_all(setting, arms, [99, 98], machine(evidence, tmp_path, deadline=0.)) == 2


def test_a_run_is_stopped_in_time_and_told_so_gently(evidence, tmp_path):
    """The program answers to SIGTERM as training does, and would otherwise go on for a minute."""
    program = ('import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); '
               'print("begun", flush=True); time.sleep(60)')
    log = tmp_path / 'log'
    limited = machine(evidence, tmp_path, deadline=time.monotonic() + 3)
    with evidence('runs')._locked(tmp_path / 'lock') as lock:
        assert limited.call([sys.executable, '-c', program], log, lock) == 143
    assert log.read_text() == 'begun\n' and limited.over


def test_a_run_that_another_process_is_at_is_left_alone(evidence, studied, tmp_path, monkeypatch, capsys):
    runs, (setting, arms) = evidence('runs'), studied[0]
    monkeypatch.setattr(runs.Machine, 'call', lambda *_: pytest.fail('it was begun'))
    (tmp_path / setting.name).mkdir()
    with runs._locked(tmp_path / setting.name / 'fixed-99.lock') as lock:
        child = subprocess.Popen([sys.executable, '-c', 'input()'], pass_fds=(lock,), stdin=subprocess.PIPE)
    arms = {'fixed': arms['fixed']}
    try:  # the child has it still
        assert runs.run_all(setting, arms, [99], machine(evidence, tmp_path)) == 1
    finally:
        child.communicate(b'\n')
    assert 'in use by another process' in capsys.readouterr().out


def answer(evidence, study, results):
    """The tables of a study as dictionaries of a row by the header, keyed by what the row is of."""
    settings = evidence('settings').Setting
    setting = replace(settings.read(settings.names()[0]), base_size=32, sizes=[16, 24, 32], specialists=[16, 24])
    tables = evidence('studies').make_studies(setting)[study].answer(setting, results)
    assert all(len(row) == len(table.header) for table in tables for row in table.rows)
    return [{row[0]: dict(zip(table.header[1:], row[1:])) for row in table.rows} for table in tables]


def of(arm, *accuracies, **kwargs):
    return [run_of(arm, seed, accuracies, **kwargs) for seed in (1, 2, 3)]


def test_cheaper_inference_counts_from_the_size_that_the_control_was_trained_at(evidence):
    results = {'fixed': of('fixed', 40, 60, 70, regime='off'), 'bplus': of('B+', 70, 72, 74),
               'timm': of('timm', 60, 69, 69.9, regime='off')}
    rows, = answer(evidence, 'inference', results)
    assert list(rows) == ['fixed', 'B+', 'timm'] and rows['fixed']['best top-1'] == '70.00 at 32 px'
    assert list(rows['B+'].values()) == ['74.00 at 32 px', '16 px', '+0.00 ± 0.00', '4.00', 'met']
    assert list(rows['timm'].values()) == ['69.90 at 32 px', 'no size', '–', '–', '**not met**']
    results['fixed'] = of('fixed', 40, 71, 70, gmacs=(1., 9., 4.), regime='off')
    rows, = answer(evidence, 'inference', results)
    assert rows['fixed']['best top-1'] == '71.00 at 24 px'
    assert list(rows['B+'].values())[1:] == ['24 px', '+1.00 ± 0.00', '2.00', '**not met**']


def test_what_one_seed_of_three_says_is_within_the_spread(evidence):
    fixed = of('fixed', 40, 60, 70, regime='off')
    for gains, verdict in (((3, 2, 1), 'met'), ((4, -1, -1), 'met, within the spread'), ((1, 1, -3), '**not met**')):
        arm = [run_of('B+', seed, (70 + gain, 0, 0)) for seed, gain in enumerate(gains, 1)]
        rows, = answer(evidence, 'inference', {'fixed': fixed, 'bplus': arm})
        assert rows['B+']['aim'] == verdict


def test_one_size_of_half_the_pixels_is_among_what_is_compared(evidence):
    results = {'fixed': of('fixed', 40, 60, 70, regime='off'), 'specialist-16': of('fixed 16', 80, 9, 9, regime='off')}
    for study in ('inference', 'accuracy'):
        rows, = answer(evidence, study, results)
        assert rows['fixed 16']['aim'] == 'met'


def test_the_fixed_size_is_given_the_batch_that_suits_it(evidence):
    """What is compared with it is compared with the better, whichever that is."""
    batches = {'fixed': of('in 32', 40, 60, 70, regime='off'), 'fixed-steps': of('in 16', 40, 60, 75, regime='off')}
    for wide, small in (('fixed', 'fixed-steps'), ('fixed-steps', 'fixed')):
        results = {wide: batches['fixed'], small: batches['fixed-steps'], 'bplus': of('B+', 70, 72, 74)}
        inference, = answer(evidence, 'inference', results)
        assert inference['in 16']['best top-1'] == '75.00 at 32 px' and 'in 32' not in inference
        assert inference['B+']['as good as that at'] == 'no size'
        accuracy, = answer(evidence, 'accuracy', results)
        assert accuracy['B+']['error'] == '+4.0%'
        results['specialist-16'], results['specialist-24'] = of('16', 70, 0, 0), of('24', 0, 72, 0)
        results['small-bplus-anneal-steps'] = results['bplus']
        assert answer(evidence, 'resilience', results)[0]['B+']['32 px, its specialist: in 16'] == '-1.00'


def test_what_was_trained_at_one_size_is_given_its_better_statistics(evidence):
    run = run_of('fixed', 1, (40, 60, 70), regime='off')
    run['results'][1]['top1_uncalibrated'] = 64.
    assert [row['top1'] for row in evidence('studies').as_used(run)['results']] == [40, 64, 70]
    assert evidence('studies').as_used({**run, 'options': {'mixsize': 's224'}})['results'] == run['results']


def test_better_accuracy_is_a_share_of_the_controls_error(evidence):
    results = {'fixed': [run_of('fixed', seed, (40, 60, best)) for seed, best in enumerate((70, 80, 75))],
               'bplus': of('B+', 70, 80.01, 74)}
    rows, = answer(evidence, 'accuracy', results)
    assert rows['fixed']['best top-1'] == '75.00 at 32 px'
    assert rows['B+'] == {'best top-1': '80.01 at 24 px', 'error': '-20.0%', 'aim': 'met'}


def test_nothing_is_decided_by_two_seeds(evidence):
    results = {'fixed': of('fixed', 40, 60, 70), 'bplus': of('B+', 70, 80, 74)[:2]}
    for study in ('inference', 'accuracy'):
        assert answer(evidence, study, results)[0]['B+']['aim'] == 'undecided, 2 of 3 seeds'


def test_cheaper_training_needs_both_the_accuracy_and_the_cost(evidence):
    for accuracy, cost, met in ((70, 4, True), (69, 4, False), (70, 5, False)):
        results = {'fixed': of('fixed', 40, 60, 70), 'small-bplus-cheap': of('B+', 40, accuracy, 50, training=cost)}
        row = answer(evidence, 'training', results)[0]['B+']
        assert row['aim'] == ('met' if met else '**not met**'), row
        assert row['times fewer operations'] == f'{10 / cost:.2f}' and row['time'] == f'{cost / 10:.2f} ± 0.00'
    results['small-bplus-cheap'] = of('B+', 40, 70, 50, training=4, through=evidence('runs').IN_FLOAT32)
    assert answer(evidence, 'training', results)[0]['B+']['time'] == '–'  # no time of it compares


def test_times_of_runs_whose_bf16_is_computed_in_float32_are_left_out(evidence):
    through = evidence('runs').IN_FLOAT32
    results = {arm: [run_of(arm, 1, (50., 60., 70.), training=native),
                     run_of(arm, 2, (50., 60., 70.), training=90., through=through)]
               for arm, native in (('fixed', 10.), ('bplus', 12.))}
    results['timm'] = results['fixed'][1:]
    times = [evidence('studies').times_as_long(name, results) for name in results]
    assert times == ['1.00', '1.20', '–']


def test_times_are_compared_within_a_day(evidence):
    """On another one it was another machine; a run of a day without the control has no time that compares."""
    accuracies = (50., 60., 70.)
    fixed = [run_of('fixed', seed, accuracies, training=t, date=day) for seed, t, day in (
        (1, 10., 'Mon'), (2, 30., 'Tue'), (3, 50., 'Tue'))]
    timm = [run_of('timm', seed, accuracies, training=t, date=day) for seed, t, day in (
        (1, 11., 'Mon'), (2, 52., 'Tue'), (3, 900., 'Wed'))]
    results = {'fixed': fixed, 'timm': timm, 'bplus': timm[2:]}
    assert [evidence('studies').times_as_long(name, results) for name in results] == [
        '1.00 ± 0.25', '1.20 ± 0.14', '–']


@pytest.mark.parametrize('fast', [True, False])
def test_training_goes_through_float32_only_where_bf16_is_asked_for_and_slow(evidence, studied, tmp_path, monkeypatch,
                                                                             fast):
    runs = evidence('runs')
    monkeypatch.setattr(runs, 'has_fast_bf16', lambda: fast)
    for setting, arms in studied:
        for device in ('cpu', 'cuda'):
            place = machine(evidence, tmp_path, device=device)
            words = runs.training_command(setting, 'fixed', arms['fixed'], 1, place)
            wanted = setting.arguments.get('amp_dtype') == 'bfloat16' and device == 'cpu' and not fast
            assert (runs.IN_FLOAT32 in words) == wanted, (setting.name, device)


def test_bf16_in_float32_rounds_as_bf16_does(evidence):
    """At least five times nearer to the bf16 of torch's own kernels than float32 is; and bf16 it stays."""
    def gradient(mode, in_bf16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                              nn.Linear(128, 10))
        with mode, torch.autocast('cpu', dtype=torch.bfloat16, enabled=in_bf16):
            out = model(torch.randn(8, 3, 8, 8))
            assert out.dtype == (torch.bfloat16 if in_bf16 else torch.float32)
            out.float().square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    true, rounded, wide = (gradient(mode, in_bf16) for mode, in_bf16 in (
        (nullcontext(), True), (evidence('bf16').Bf16InFloat32(), True), (nullcontext(), False)))
    assert (rounded - true).norm() < 0.2 * (wide - true).norm()


def test_a_module_is_run_in_that_way_with_its_own_arguments_and_exit_code(tmp_path):
    command = [sys.executable, '-m', 'benchmarks.evidence.bf16']
    (tmp_path / 'module_of_mine.py').write_text(
        'import sys, torch\nfrom torch.utils._python_dispatch import _get_current_dispatch_mode as mode\n'
        'print(__name__, sys.argv[1:], type(mode()).__name__)\nsys.exit(7)\n')
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run([*command, 'module_of_mine', '--a', '1'], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (7, "__main__ ['--a', '1'] Bf16InFloat32")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith('usage: ')


def test_resilience_compares_each_size_with_its_own_specialist(evidence):
    results = {'fixed': of('fixed', 0, 0, 70), 'specialist-16': of('16', 50, 0, 0), 'specialist-24': of('24', 0, 60, 0),
               'dplus-equal': of('D+', 51, 61, 69.5), 'small-dplus': of('small D+', 51, 59.5, 68)}
    rows, _ = answer(evidence, 'resilience', results)
    assert list(rows['D+'].values()) == ['+1.00', '+1.00', '-0.50', 'met', 'met']
    assert list(rows['small D+'].values())[3:] == ['**not met**', '**not met**']
    assert list(rows['D+'])[:2] == ['16 px, its specialist: 16', '24 px, its specialist: 24']
    results['specialist-16'] = []
    assert answer(evidence, 'resilience', results) == []


def test_resilience_has_the_best_model_of_one_size_too_which_need_not_be_the_specialist(evidence):
    results = {'fixed': of('fixed', 0, 40, 70), 'fixed-steps': of('small', 0, 70, 60),
               'specialist-16': of('16', 50, 0, 0), 'specialist-24': of('24', 0, 60, 0),
               'dplus-equal': of('D+', 51, 61, 69.5)}
    own, best = (rows['D+'] for rows in answer(evidence, 'resilience', results))
    assert own['24 px, its specialist: 24'] == '+1.00' and own['within 1 point of every one'] == 'met'
    assert best['24 px, the best: small'] == '-9.00' and best['within 1 point of every one'] == '**not met**'
    assert best['32 px, the best: fixed'] == own['32 px, its specialist: fixed'] == '-0.50'


def test_what_goes_past_the_paper_beats_its_best_at_the_best_size_and_in_the_mean(evidence):
    paper = {'dplus-equal': of('D+', 50, 60, 70), 'bplus': of('B+', 60, 61, 62),
             'small-bplus': of('small B+', 69, 60, 50), 'small-dplus': of('small D+', 50, 50, 50)}
    studies = evidence('studies')
    for accuracies, cells in (((60, 62, 71), ['71.00 at 32 px', '+1.00', '64.33', '+3.33', 'met']),
                              ((50, 50, 71), ['71.00 at 32 px', '+1.00', '57.00', '-4.00', '**not met**'])):
        table, differences = studies._beyond(None, {**paper, 'smaller-bplus': of('ours', *accuracies)})
        assert table.rows == [['ours', *cells]]
        assert [row[:3] for row in differences.rows] == [['smaller images', 'ours', 'small B+']]
    assert not studies._beyond(None, {'smaller-bplus': of('ours', 60, 62, 71)})[0].rows  # nothing to be beside


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=4))
def test_a_part_is_judged_seed_by_seed(evidence, pairs):
    """What makes a seed easy or hard for both arms is not in the difference; a seed of one arm alone is left out."""
    results = {'small-bplus-cheap': [run_of('B+', seed, (a, a, a)) for seed, (a, _) in enumerate(pairs)] + [
                   run_of('B+', 99, (0, 0, 0))],
               'cheap-rough': [run_of('rough', seed, (b, b, b)) for seed, (_, b) in enumerate(pairs)]}
    row = answer(evidence, 'parts', results)[0]['smoothing']
    assert float(row['calibrated'].split(' ± ')[0]) == pytest.approx(
        sum(a - b for a, b in pairs) / len(pairs), abs=0.006)
    assert (row['top-1 of'], row['less that of'], row['seeds']) == ('B+', 'rough', str(len(pairs)))


def test_both_ways_to_calibrate_are_compared_in_the_runs_that_have_both(evidence):
    runs = [run_of('b+', seed, (60., 61., 62.)) for seed in (1, 2, 3)]
    for run, gain in zip(runs[1:], (1., 2.)):
        run['results'] = [{**row, 'top1_as_in_use': row['top1'] + gain * (row['img_size'] == 32)}
                          for row in run['results']]
    calibration, setting = evidence('studies')._calibration, SimpleNamespace(base_size=32, as_in_use=True)
    assert calibration(setting, {'bplus': runs, 'fixed': []}).rows == [
        ['b+', '+1.00 ± 0.00', '3', '+0.50 ± 0.24', '+1.50 ± 0.71', '2']]
    assert calibration(setting, {'bplus': runs[:1]}).rows == [['b+', '+1.00', '1', '–', '–', '–']]
    setting.as_in_use = False
    assert calibration(setting, {'bplus': runs[:1]}).rows == [['b+', '+1.00', '1']]


def test_the_page_has_every_number_with_its_arm(evidence, studied, tmp_path, monkeypatch):
    page, runs, settings = evidence('page'), evidence('runs'), evidence('settings')
    setting, _ = studied[0]
    monkeypatch.setattr(runs, 'RESULTS', tmp_path / 'results')
    monkeypatch.setattr(page, 'ROOT', tmp_path)
    monkeypatch.setattr(page, 'PAGE', tmp_path / 'results.md')
    monkeypatch.setattr(page, 'ARMS', tmp_path / 'arms.md')
    monkeypatch.setattr(page, 'PLOTS', tmp_path / 'plots')
    monkeypatch.setattr(settings.Setting, 'names', classmethod(lambda cls: [setting.name]))
    folder = tmp_path / 'results' / setting.name
    folder.mkdir(parents=True)
    place = {'machine': 'a machine', 'device': 'cpu', 'threads': 1, 'precision': 'no', 'versions': 'torch 0',
             'commit': '0123456789abcdef', 'date': '2026-01-01'}
    assert 'bplus' not in setting.planned
    for arm, base, seeds in (('fixed', 60., 2), ('small-bplus', 61.25, 4), ('bplus', 41.5, 1)):
        for seed in range(1, seeds + 1):
            rows = [{'img_size': size, 'top1': base + seed, 'top1_uncalibrated': 5., 'gmacs': float(size)}
                    for size in setting.sizes]
            (folder / f'{arm}-{seed}.json').write_text(json.dumps({
                'title': arm, 'seed': seed, 'results': rows, 'calibrated': 1, **place, 'commands': ['train'],
                'options': {'mixsize': 'off', 'epochs': 3},
                'training': {'gmacs': 1., 'seconds': 2., 'steps': 3}}))
    (folder / 'timm-1.json').write_text(json.dumps({'title': 'timm', 'seed': 1, 'failed': 'no memory', **place}))
    page.write_page()
    judged, every_arm = ((tmp_path / name).read_text(encoding='utf-8') for name in ('results.md', 'arms.md'))
    assert '63.75 ± 1.29' in judged and '1 of 1 runs failed: no memory' in judged and 'Not run: ' in judged
    assert '**Not finished:** 6 of ' in every_arm  # the fourth seed is not one that was wanted
    assert '0123456789abcdef' in every_arm and 'a machine, cpu' in every_arm
    first, rest = judged.split('## How to read it', 1)
    assert '63.75 ± 1.29' in first and '61.50' not in first and '61.50' in rest  # two seeds of three are not in short
    assert '61.50 ± 0.71' in every_arm
    assert '42.50' in every_arm and '42.50' not in judged  # what is not planned is shown, and judged nowhere
    assert {path.name for path in (tmp_path / 'plots').iterdir()} == {
        f'{setting.name}-size.png', f'{setting.name}-gmacs.png'}
