"""The evaluation command, run in this process on tiny models and real files."""
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import write_image_folder
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

from mixsize_timm import evaluate, plots, train
from mixsize_timm.bn_stats import BatchNormStats
from mixsize_timm.datasets import DigitsDataset
from mixsize_timm.report import REPORT_FILES

SIZES = (24, 32, 40, 48, 64)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two runs on the digits: with mixed sizes, and with one."""
    folder = tmp_path_factory.mktemp('runs')
    for name, options in (('mixed', []), ('fixed', ['--mixsize', 'off'])):
        assert train.main(['--model', 'test_resnet', '-b', '256', '-j', '0', '--epochs', '1', '--calibrate', '3',
                           *options, '--output', str(folder), '--experiment', name]) == 0
    return folder


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    """That of conftest.py, made once: nothing here writes into it."""
    return write_image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A checkpoint of timm's."""
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=2)
    path = tmp_path_factory.mktemp('weights') / 'checkpoint.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'arch': 'test_resnet'}, path)
    return path


@pytest.fixture(scope='module')
def again(runs, tmp_path_factory):
    """The run with mixed sizes, measured with as many batches as its closing table."""
    return measure(runs / 'mixed', '--calibrate', 3, folder=tmp_path_factory.mktemp('again'))['checkpoints'][0]


@pytest.fixture(scope='module')
def plain(image_folder, weights, tmp_path_factory):
    """What timm's checkpoint reaches in single precision."""
    document = measure(weights, *of_folder(image_folder), '--sizes', 32, '--calibrate', 2,
                       folder=tmp_path_factory.mktemp('plain'))
    return document['checkpoints'][0]['results'][0]


def measure(*argv, folder, drawn=False):
    """The results; the plots are empty files unless they are to be ``drawn``, which takes half of the time."""
    def touch(folder, *_):
        for name in REPORT_FILES:
            if name.endswith(plots.FORMATS):
                open(os.path.join(folder, name), 'w').close()
        return dict.fromkeys(plots.PLOTS, '<svg></svg>')

    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            patch.setattr(plots, 'draw', touch)
        assert evaluate.main([*map(str, argv), '--no-speed', '--output', str(folder)]) == 0
    return json.loads((folder / 'sizes.json').read_text())


def of_folder(image_folder):
    return ['--data-dir', str(image_folder), '-j', '0', '-b', '3', '--model', 'test_resnet']


def timms_validation(model, dataset, size, **args):
    """What timm's validation script computes; it rounds to four digits."""
    config = resolve_data_config({'img_size': size, **args}, model=model, use_test_size=True)
    loader = create_loader(
        dataset, config['input_size'], 5, interpolation=config['interpolation'], mean=config['mean'],
        std=config['std'], num_workers=0, crop_pct=config['crop_pct'], crop_mode=config['crop_mode'],
        crop_border_pixels=args.get('crop_border_pixels'), device=torch.device('cpu'))
    outputs, targets = zip(*((model.eval()(images), labels) for images, labels in loader))
    output, target = torch.cat(outputs), torch.cat(targets)
    top1, top5 = accuracy(output, target, topk=(1, 5))
    return {'top1': top1.item(), 'top5': top5.item(), 'loss': torch.nn.functional.cross_entropy(output, target).item()}


@pytest.mark.parametrize('options, args', [
    ([], {}), (['--crop-pct', '0.7'], {'crop_pct': 0.7}), (['--crop-mode', 'squash'], {'crop_mode': 'squash'}),
    (['--crop-mode', 'border'], {'crop_mode': 'border'}), (['--crop-border-pixels', '4'], {'crop_border_pixels': 4}),
    (['--interpolation', 'nearest', '--mean', '0.2', '--std', '0.3'],
     {'interpolation': 'nearest', 'mean': [0.2], 'std': [0.3]}),
], ids=str)
def test_uncalibrated_it_is_timms_validation(tmp_path, image_folder, weights, options, args):
    document = measure(weights, *of_folder(image_folder), '--sizes', *SIZES, '--calibrate', 0, *options,
                       folder=tmp_path / 'report')
    model = timm.create_model('test_resnet', num_classes=2, checkpoint_path=str(weights))
    dataset = create_dataset('', root=str(image_folder), split='validation')
    for row, size in zip(document['checkpoints'][0]['results'], SIZES):
        theirs = timms_validation(model, dataset, size, **args)
        assert (row['img_size'], row['top1'], row['top5']) == (size, theirs['top1'], theirs['top5'])
        assert row['loss'] == pytest.approx(theirs['loss'], rel=1e-5)


@pytest.mark.skipif('TIMM_CHECKOUT' not in os.environ, reason=(
    "timm's wheel has no validate.py, and the tests fetch nothing: the test before this one compares with timm's "
    'loader and accuracy; set TIMM_CHECKOUT to a clone of its repository to compare with the script itself'))
def test_uncalibrated_it_is_timms_script(tmp_path, image_folder, weights, runs):
    """One checkpoint of timm's on image folders, and one of ours, on the digits as files."""
    for split in ('train', 'validation'):
        digits = DigitsDataset(split)
        for number in range(0, len(digits), 5):
            image, label = digits[number]
            place = tmp_path / 'digits' / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f'{number}.png')
    ours = runs / 'mixed' / 'last' / 'model.safetensors'
    for file, data, options in ((weights, image_folder, []), (ours, tmp_path / 'digits', [
            '--mean', '0.5', '--std', '0.5', '--crop-pct', '1.0', '--interpolation', 'bicubic'])):
        document = measure(file, '--model', 'test_resnet', '--data-dir', data, '-j', 0, '-b', 7, '--sizes', *SIZES,
                           '--calibrate', 0, *options, folder=tmp_path / f'report-{file.name}')
        for row in document['checkpoints'][0]['results']:
            classes = 2 if file is weights else 10
            out = subprocess.run(
                [sys.executable, os.path.join(os.environ['TIMM_CHECKOUT'], 'validate.py'), '--data-dir', str(data),
                 '--model', 'test_resnet', '--checkpoint', str(file), '--num-classes', str(classes), '--img-size',
                 str(row['img_size']), '-b', '7', '-j', '1', '--device', 'cpu', *options],
                capture_output=True, text=True, check=True).stdout
            theirs = json.loads(out.split('--result')[1])
            assert (round(row['top1'], 4), round(row['top5'], 4)) == (theirs['top1'], theirs['top5'])


def test_a_run_is_measured_as_its_closing_table_was(runs, again):
    closing = json.loads((runs / 'mixed' / 'sizes.json').read_text())['checkpoints'][0]
    assert again['training'] == closing['training']
    for row, other in zip(again['results'], closing['results']):
        assert all(row[name] == value for name, value in other.items())


def test_kept_statistics_are_those_that_training_left(tmp_path, runs, again):
    kept = measure(runs / 'mixed', '--calibrate', 'kept', folder=tmp_path / 'kept')['checkpoints'][0]['results']
    assert kept == again['results']
    assert any(row['top1'] != row['top1_uncalibrated'] for row in kept)


def test_calibrating_twice_gives_the_same(tmp_path, image_folder, weights):
    documents = [measure(weights, *of_folder(image_folder), '--sizes', 32, 48, '-j', workers, '--calibrate', 3,
                         folder=tmp_path / str(workers)) for workers in (0, 1)]
    assert documents[0]['checkpoints'] == documents[1]['checkpoints']
    assert all(row['loss'] != row['loss_uncalibrated'] for row in documents[0]['checkpoints'][0]['results'])


def test_checkpoints_are_compared_with_a_baseline(tmp_path, runs, capsys):
    document = measure(runs / 'mixed', runs / 'fixed', '--baseline', 'fixed', '--calibrate', 2, '--sizes', 16, 32,
                       folder=tmp_path / 'report', drawn=True)
    assert [part['name'] for part in document['answers']] == ['mixed']
    assert document['answers'][0]['training_gmacs'] > 0
    out = capsys.readouterr().out
    assert 'mixed against fixed' in out and 'Resilience: within 1 point' in out and 'The report is in' in out
    assert {path.name for path in (tmp_path / 'report').iterdir()} == set(REPORT_FILES)


def test_crops_are_swept(tmp_path, image_folder, weights):
    document = measure(weights, *of_folder(image_folder), '--sizes', 32, 48, '--calibrate', 2, '--crop-pct', 0.5, 1.0,
                       folder=tmp_path / 'report', drawn=True)
    rows = document['checkpoints'][0]['results']
    again = measure(weights, *of_folder(image_folder), '--sizes', 32, 48, '--calibrate', 2, '--crop-pct', 1.0,
                    folder=tmp_path / 'again')['checkpoints'][0]['results']
    assert rows[2:] == again
    assert [(row['crop_pct'], row['img_size']) for row in rows] == [(0.5, 32), (0.5, 48), (1.0, 32), (1.0, 48)]
    assert rows[0]['loss'] != rows[2]['loss']
    assert 'checkpoint.pth.tar, crop 0.5' in (tmp_path / 'report' / 'report.html').read_text()


@pytest.mark.parametrize('options', [['--model-dtype', 'bfloat16'], ['--model-dtype', 'float16'], ['--channels-last'],
                                     ['--mixed-precision', 'bf16'], ['--no-prefetcher'], ['--no-use-ema']], ids=str)
def test_precisions_and_formats(tmp_path, image_folder, weights, plain, options):
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps its precision for a process
    other = measure(weights, *of_folder(image_folder), '--sizes', 32, '--calibrate', 2, *options,
                    folder=tmp_path / 'other')['checkpoints'][0]['results'][0]
    assert other['loss'] == pytest.approx(plain['loss'], rel=0.05)


def test_speed_is_measured_unless_it_is_left_out(tmp_path, image_folder, weights):
    assert evaluate.main([str(weights), *of_folder(image_folder), '--sizes', '32', '--calibrate', '0', '--output',
                          str(tmp_path / 'report')]) == 0
    row = json.loads((tmp_path / 'report' / 'sizes.json').read_text())['checkpoints'][0]['results'][0]
    assert row['images_per_second'] > 0 and row['latency_ms'] > 0


def test_a_model_without_batch_norm_says_so(tmp_path, image_folder, caplog):
    model = timm.create_model('test_vit', num_classes=2, dynamic_img_size=True)
    save_file(model.state_dict(), tmp_path / 'v.safetensors')
    with caplog.at_level('INFO'):
        part = measure(tmp_path / 'v.safetensors', '--data-dir', image_folder, '-j', 0, '--model', 'test_vit',
                       '--model-kwargs', 'dynamic_img_size=True', '--sizes', 64, 96,
                       folder=tmp_path / 'report')['checkpoints'][0]
    assert 'has no batch norm' in caplog.text and part['calibrated'] == 0
    assert all(row['loss'] == row['loss_uncalibrated'] for row in part['results'])


ERRORS = [
    ('{tmp}/nowhere', 'no checkpoint at'),
    ('test_resnet --data-dir {data}', 'add --pretrained'),
    ('{weights}', 'name it with --model'),
    ('{weights} --model test_resnet --sizes 32', 'no images named'),
    ('{weights} --model test_resnet --data-dir {tmp}/nowhere --sizes 32', 'no data at'),
    ('{weights} --model test_resnet --data-dir {data}', 'say which with --sizes'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 0', '--sizes must be positive'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --crop-pct 0', '--crop-pct must be above 0'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --calibrate -1', 'must not be negative'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --calibrate some', 'invalid'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --calibrate kept', 'has no statistics of its own'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --names a b', '2 names for 1 checkpoints'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --baseline x', '--baseline must be one of'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --baseline {weights}', 'of another name'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 -b 0', '--batch-size must be at least 1'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --val-split nowhere', "no 'nowhere' split"),
    ('{weights} {weights} --model test_resnet --data-dir {data} --sizes 32', 'is given twice'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --output {weights}/x', 'cannot write to'),
    ('{weights} --model test_resnet --data-dir {alone} --sizes 32 --calibrate 0', "only 'train'"),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --interpolation none', 'cannot load the images'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --aa none', 'cannot load the images'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --ratio 1', '--ratio takes two numbers'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --seed 4294967296', '--seed must be from 0'),
    ('{weights} --model test_resnet --data-dir {data} --sizes 32 --input-img-mode L', 'differ in channels'),
    ('{runs}/mixed --num-classes 3', 'is a run, whose arguments say num_classes'),
    ('{runs}/mixed {runs}/fixed --names a a', 'was not trained at mixed sizes'),
    ('{weights} --model test_vit --data-dir {data} --sizes 32', 'cannot load'),
    ('{weights} --model test_resnet --num-classes 5 --data-dir {data} --sizes 32', 'cannot load'),
    ('{runs}/mixed --data-dir {data} --split', 'unrecognized'),
]


@pytest.mark.parametrize('line, message', ERRORS)
def test_what_cannot_work_is_one_line(tmp_path, image_folder, weights, runs, capsys, line, message):
    shutil.copytree(image_folder / 'train', tmp_path / 'alone' / 'train')
    argv = line.format(tmp=tmp_path, data=image_folder, weights=weights, runs=runs, alone=tmp_path / 'alone').split()
    places = tmp_path, image_folder, weights.parent
    before = [sorted(place.rglob('*')) for place in places]
    assert evaluate.main(['--output', str(tmp_path / 'report'), *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith('mixsize_timm.evaluate: error: ') and error.count('\n') == 1 and message in error
    assert [sorted(place.rglob('*')) for place in places] == before


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('split, calibrate', [('train', 1), ('validation', 0)])
def test_images_that_cannot_be_read_are_one_line(tmp_path, image_folder, weights, capsys, split, calibrate, workers):
    folder = shutil.copytree(image_folder, tmp_path / 'data')
    for path in (folder / split).rglob('*.jpg'):
        path.write_bytes(b'broken')
    assert evaluate.main([str(weights), *of_folder(folder), '--sizes', '32', '--calibrate', str(calibrate), '-j',
                          str(workers), '--output', str(tmp_path / 'report')]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith('mixsize_timm.evaluate: error: 10 images in a row cannot be read, the last one ')
    assert f'{split}/' in line and line.endswith('not an image that PIL knows')
    assert not (tmp_path / 'report').exists()


def test_too_little_memory_is_one_line(tmp_path, image_folder, weights, monkeypatch, capsys):
    def validate(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 1 GiB')

    monkeypatch.setattr(evaluate, 'validate', validate)
    assert evaluate.main([str(weights), *of_folder(image_folder), '--sizes', '32', '--calibrate', '0', '--output',
                          str(tmp_path / 'report')]) == 2
    assert 'error: a batch does not fit into memory: use a smaller --batch-size (CUDA' in capsys.readouterr().err


def test_a_report_is_not_overwritten_without_being_asked(tmp_path, image_folder, weights, capsys):
    argv = [weights, *of_folder(image_folder), '--sizes', 32, '--calibrate', 0]
    measure(*argv, folder=tmp_path / 'report')
    assert evaluate.main([*map(str, argv), '--output', str(tmp_path / 'report')]) == 2
    assert 'already holds sizes.json: choose another --output, or --overwrite' in capsys.readouterr().err
    measure(*argv, '--overwrite', folder=tmp_path / 'report')


def test_an_evaluation_that_is_stopped_leaves_everything_as_it_was(tmp_path, runs, monkeypatch, capsys):
    def contents():
        return {path: path.read_bytes() for path in sorted(runs.rglob('*')) if path.is_file()}

    before = contents()
    measure(runs / 'mixed', '--sizes', 32, '--calibrate', 1, folder=tmp_path / 'report')
    report = (tmp_path / 'report' / 'sizes.json').read_bytes()
    original, calls = evaluate.validate, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(evaluate, 'validate', stopping)
    assert evaluate.main([str(runs / 'mixed'), '--calibrate', '1', '--overwrite', '--output',
                          str(tmp_path / 'report')]) == 130
    assert 'stopped; nothing was written' in capsys.readouterr().err
    assert contents() == before and (tmp_path / 'report' / 'sizes.json').read_bytes() == report


def test_what_counts_the_outputs_is_on_their_device():
    accelerator = SimpleNamespace(device=torch.device('meta'))
    for args in (SimpleNamespace(task='classification'), SimpleNamespace(task='multilabel', multilabel_threshold=0.5)):
        data = SimpleNamespace(args=args, accelerator=accelerator)
        assert evaluate.create_task(torch.nn.Identity(), data).device.type == 'meta'


def test_runs_of_other_images_are_not_compared(tmp_path, image_folder, runs, capsys):
    assert train.main(['--model', 'test_resnet', '--img-size', '32', '--data-dir', str(image_folder), '--num-classes',
                       '2', '-b', '4', '-j', '0', '--epochs', '1', '--calibrate', '1', '--calibrate-val', '1',
                       '--output', str(tmp_path), '--experiment', 'folder']) == 0
    assert evaluate.main([str(runs / 'mixed'), str(tmp_path / 'folder'), '--sizes', '32', '--output',
                          str(tmp_path / 'report')]) == 2
    assert 'trained on other images' in capsys.readouterr().err


def test_a_run_in_lower_precision_with_regularisation_and_two_views_is_measured_alike(tmp_path, image_folder):
    # few images: bf16 is slow on processors without instructions for it
    assert train.main(['--model', 'test_resnet', '--img-size', '48', '--data-dir', str(image_folder), '--num-classes',
                       '2', '-b', '8', '-j', '0', '--epochs', '1', '--calibrate', '2', '--calibrate-val', '1',
                       '--model-dtype', 'bfloat16', '--mixsize-reg', '1', '--tta', '2', '--aa', 'rand-m9',
                       '--mixsize-sizes', '24', '32', '48',  # at 16 px torch's bf16 gives NaN: docs/compatibility.md
                       '--output', str(tmp_path), '--experiment', 'run']) == 0
    closing = json.loads((tmp_path / 'run' / 'sizes.json').read_text())['checkpoints'][0]['results']
    for calibrated in ('2', 'kept'):
        again = measure(tmp_path / 'run', '--calibrate', calibrated, folder=tmp_path / calibrated)
        for row, other in zip(again['checkpoints'][0]['results'], closing):
            assert row['images'] == 8
            assert row['top1'] == pytest.approx(other['top1'], abs=100 / 8 if calibrated == 'kept' else 0)
            assert row['loss'] == pytest.approx(other['loss'], rel=0.01)


def test_a_copied_run_whose_weights_were_exchanged_has_no_kept_statistics(tmp_path, runs, capsys):
    shutil.copytree(runs / 'mixed', tmp_path / 'mixed')
    save_file(timm.create_model('test_resnet', num_classes=10).state_dict(),
              tmp_path / 'mixed' / 'last' / 'model.safetensors')
    assert BatchNormStats.load(str(tmp_path / 'mixed' / 'last' / 'bn_stats.safetensors')).sizes
    assert evaluate.main([str(tmp_path / 'mixed'), '--calibrate', 'kept', '--output', str(tmp_path / 'report')]) == 2
    assert 'has no statistics of its own' in capsys.readouterr().err
