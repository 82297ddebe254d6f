"""What Weights & Biases and TensorBoard are told, without an account or a network."""
import csv
import json
import os
import signal

import pytest
import wandb
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.sdk.wandb_run import Run

from mixsize_timm import train
from mixsize_timm.trackers import append_summary

RUN = ['--model', 'test_resnet', '-j', '0', '-b', '96', '--lr', '0.005', '--epochs', '2', '--log-interval', '5']


@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tracked')
    logged, started = [], {}
    log, init = Run.log, wandb.init

    def recording(self, data, step=None, **kwargs):
        logged.append(({key: value if isinstance(value, (int, float)) else None for key, value in data.items()}, step))
        return log(self, data, step=step, **kwargs)

    def starting(**kwargs):
        started.update({key: kwargs[key] for key in ('project', 'tags', 'name')})
        run = init(**kwargs)
        started.setdefault('runs', []).append([run.id, kwargs.get('resume')])
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('WANDB_MODE', 'offline')
        patch.setenv('WANDB_SILENT', 'true')
        patch.chdir(folder)
        patch.setattr(Run, 'log', recording)
        patch.setattr(wandb, 'init', starting)
        command = [*RUN, '--output', str(folder), '--experiment', 'run', '--log-tensorboard', '--log-wandb',
                   '--wandb-project', 'sizes', '--wandb-tags', 'one', 'two', '--resume', 'auto']
        calls, original = [], train.Training._after_step

        def after_step(self, meter):  # stopped in the second epoch, between two log lines
            calls.append(meter)
            if len(calls) == self.data.num_steps + 8:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, meter)

        with pytest.MonkeyPatch.context() as stopping:
            stopping.setattr(train.Training, '_after_step', after_step)
            assert train.main(command) == 75
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train.main(command) == 0
    (folder / 'logged.json').write_text(json.dumps(logged))
    (folder / 'init.json').write_text(json.dumps(started))
    return folder


def scalars(folder):
    events = EventAccumulator(str(next((folder / 'run').rglob('events.*')).parent), size_guidance={'scalars': 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()['scalars']}


def test_tensorboard_has_every_figure_of_the_summary(tracked):
    rows = list(csv.DictReader((tracked / 'run' / 'summary.csv').open()))
    logged = scalars(tracked)
    for name in rows[0].keys() - {'epoch'}:
        assert list(logged[name].values()) == pytest.approx([float(row[name]) for row in rows], rel=1e-5), name


def test_tensorboard_has_every_step(tracked):
    logged = scalars(tracked)
    steps = sorted(logged['size'])
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 20  # the interval is five
    assert set(logged['size'].values()) == {16, 24, 32, 48}
    assert {(logged['size'][i], logged['duplicates'][i]) for i in steps} >= {(16, 4), (32, 1)}
    for name in ('batch', 'step_loss', 'norm', 'smoothed_norm', 'step_lr'):
        assert sorted(logged[name]) == steps, name
    assert logged['norm'][1] == logged['smoothed_norm'][1] and logged['norm'][9] != logged['smoothed_norm'][9]


def test_tensorboard_has_accuracy_against_size(tracked):
    results = json.loads((tracked / 'run' / 'sizes.json').read_text())['checkpoints'][0]['results']
    curve = scalars(tracked)['sizes/top1']
    assert curve == pytest.approx({row['img_size']: row['top1'] for row in results}, rel=1e-5)


def test_wandb_has_steps_summary_and_the_table_of_sizes(tracked):
    logged = json.loads((tracked / 'logged.json').read_text())
    assert len([row for row, _ in logged if 'norm' in row]) > 20
    assert {row['size'] for row, _ in logged if 'size' in row} == {16, 24, 32, 48}
    summary = list(csv.DictReader((tracked / 'run' / 'summary.csv').open()))
    assert [row['eval_top1'] for row, _ in logged if 'eval_top1' in row] == pytest.approx(
        [float(row['eval_top1']) for row in summary])
    steps = [step for _, step in logged]
    assert steps == sorted(steps) and None not in steps  # wandb drops what goes back
    assert {'sizes', 'sizes/top1', 'sizes/top1_uncalibrated', 'sizes/loss'} <= logged[-1][0].keys()


def test_wandb_keeps_them_offline_with_project_and_tags(tracked):
    results = json.loads((tracked / 'run' / 'sizes.json').read_text())['checkpoints'][0]['results']
    tables = [json.loads(path.read_text()) for path in (tracked / 'wandb').rglob('sizes_*.table.json')]
    columns = [name for name in results[0] if name not in ('images', 'gmacs', 'statistics')
               and not name.endswith(('_low', '_high'))]
    assert {'img_size', 'top1', 'top1_uncalibrated'} <= set(columns)
    assert [[row[name] for name in columns] for row in results] in [table['data'] for table in tables]
    assert list((tracked / 'wandb').glob('offline-run-*/*.wandb'))
    started = json.loads((tracked / 'init.json').read_text())
    (first, new), (again, continued) = started.pop('runs')
    assert first == again and (new, continued) == (None, 'allow')  # a run that goes on is the same one there
    assert started == {'project': 'sizes', 'tags': ['one', 'two'], 'name': 'run'}


def test_a_row_with_other_columns_stands_under_its_own(tmp_path):
    """Such as of a resumed run without validation, whose rate stood under the loss."""
    path = tmp_path / 'summary.csv'
    for row in ({'epoch': 0, 'eval_loss': 2, 'lr': 0.5}, {'epoch': 1, 'eval_loss': 1, 'lr': 0.4},
                {'epoch': 2, 'lr': 0.3}, {'epoch': 3, 'eval_top1': 50, 'lr': 0.2}, {'epoch': 4, 'lr': 0.1}):
        append_summary(str(path), row)
    assert path.read_text().splitlines() == [
        'epoch,eval_loss,lr,eval_top1', '0,2,0.5,', '1,1,0.4,', '2,,0.3,', '3,,0.2,50', '4,,0.1,']
    assert [file.name for file in tmp_path.iterdir()] == ['summary.csv']
