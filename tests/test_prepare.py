"""``mixsize prepare``: a data set rewritten as shards, the same whatever happens in between."""
import argparse
import errno
import importlib
import io
import json
import os
import shlex
import signal
import tarfile
import time
from contextlib import nullcontext
from pathlib import Path, PureWindowsPath

import numpy as np
import psutil
import pytest
import timm.data
from conftest import write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from mixsize_timm import prepare
from mixsize_timm.datasets import class_names, create_dataset
from mixsize_timm.errors import UsageError
from mixsize_timm.parser import build_parser

ROOT = Path(__file__).parents[1]
FEW = ['--short-side', '24', '--shard-size', '5']


def command(*argv):
    return prepare.main([*map(str, argv), *([] if '-j' in argv else ['-j', '0'])])


def contents(folder):
    """Bytes of all files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def smooth(size, seed=0, mode='RGB'):
    """A picture that JPEG hardly changes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Two splits of two classes; one image is small enough already, one cannot be read."""
    folder = tmp_path_factory.mktemp('source') / 'photos'
    for split, count in (('train', 12), ('validation', 4)):
        for number, name in enumerate(('cat', 'dog')):
            write_images(folder / split / name, count, seed=number)
    Image.new('RGB', (20, 24)).save(folder / 'train' / 'cat' / '003.jpg')
    (folder / 'train' / 'dog' / '004.jpg').write_bytes(b'no image')
    return folder


@pytest.fixture(scope='module')
def prepared(source, tmp_path_factory):
    """The tar shards of it, made without any disturbance by one process."""
    folder = tmp_path_factory.mktemp('prepared') / 'out'
    assert command(source, folder, *FEW, '--max-bad-images', '0.1') == 0
    return folder


@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 5), st.sampled_from(prepare.FORMATS))
def test_each_image_is_in_one_shard_and_all_but_the_last_are_full(num_images, per_shard, seed, kind):
    shards = prepare.plan_shards('train', num_images, per_shard, seed, kind)
    assert sorted(np.concatenate([[], *(shard.images for shard in shards)]).tolist()) == list(range(num_images))
    assert all(len(shard.images) == per_shard for shard in shards[:-1])
    assert [shard.first for shard in shards] == [per_shard * number for number in range(len(shards))]
    assert len({shard.file for shard in shards}) == len(shards)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.sampled_from(['JPEG', 'PNG']))
def test_images_are_reduced_in_proportion_and_never_enlarged(width, height, short_side, kind):
    source = encode(Image.new('RGB', (width, height)), kind)
    data, kept = prepare.shrink(source, short_side)
    size = Image.open(io.BytesIO(data)).size
    scale = min(1., short_side / min(width, height))
    assert all(abs(new - max(1, old * scale)) <= 0.5 for new, old in zip(size, (width, height)))
    assert min(size) == min(short_side, width, height)
    assert kept == (kind == 'JPEG' and min(width, height) <= short_side) and (data == source) == kept


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_and_looks_the_same(monkeypatch):
    source, scales = encode(smooth((800, 640)), 'JPEG', quality=95), []
    draft = Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda image, *args: scales.append(image.size) or draft(image, *args))
    data, _ = prepare.shrink(source, 64, 95)
    assert scales == [(200, 160)]  # a quarter, still twice the size
    expected = draft(Image.open(io.BytesIO(source)), (80, 64), Image.Resampling.BICUBIC)
    assert np.abs(decode(data) - np.asarray(expected).astype(int)).mean() < 2


@pytest.mark.parametrize('mode, options', [
    ('L', {}), ('1', {}), ('P', {}), ('P', {'transparency': 0}), ('RGBA', {}), ('LA', {}), ('CMYK', {})])
def test_pixels_are_those_of_timms_conversion(mode, options):
    image = smooth((60, 40), mode='RGB').convert(mode)
    source = encode(image, 'TIFF' if mode == 'CMYK' else 'PNG', **options)
    data, kept = prepare.shrink(source, 40, 95)
    expected = encode(Image.open(io.BytesIO(source)).convert('L' if mode == 'L' else 'RGB'), 'JPEG', quality=95)
    assert not kept and np.array_equal(decode(data), decode(expected))
    assert Image.open(io.BytesIO(data)).mode == ('L' if mode == 'L' else 'RGB')


def test_a_cmyk_jpeg_and_16_bits_look_right():
    image = smooth((60, 40))
    data, _ = prepare.shrink(encode(image.convert('CMYK'), 'JPEG', quality=95), 20, 95)
    assert np.abs(decode(data) - np.asarray(image.resize((30, 20))).astype(int)).mean() < 5
    grey = np.asarray(image.convert('L'))
    data, _ = prepare.shrink(encode(Image.fromarray(grey.astype(np.uint16) * 257)), 40, 95)
    assert np.abs(decode(data)[..., 0] - grey).mean() < 3


def test_orientation_is_kept_and_not_applied_and_other_metadata_is_left_out():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, 'somebody'
    source = encode(smooth((60, 40)), 'JPEG', quality=95, exif=exif, comment=b'private', icc_profile=b'profile')
    data, _ = prepare.shrink(source, 30, 95)
    image = Image.open(io.BytesIO(data))
    assert image.size == (45, 30) and dict(image.getexif()) == {ExifTags.Base.Orientation: 6}
    assert b'private' not in data and b'somebody' not in data and 'icc_profile' not in image.info
    small, _ = prepare.shrink(encode(smooth((60, 40)), exif=exif), 100)
    assert dict(Image.open(io.BytesIO(small)).getexif()) == {ExifTags.Base.Orientation: 6}
    broken = source.replace(b'MM\0*', b'MM\0\xff')
    assert broken != source and len(prepare.shrink(broken, 30)[0])


def test_tar_shards_hold_all_images_with_their_labels(source, prepared):
    info = json.loads((prepared / '_info.json').read_text())
    assert info['class_names'] == ['cat', 'dog']
    assert info['splits']['validation'] == {
        'name': 'validation', 'num_samples': 8, 'shard_lengths': [5, 3],
        'filenames': ['validation-000000.tar', 'validation-000001.tar']}
    train = info['splits']['train']
    assert train['num_samples'] == 23 and sum(train['shard_lengths']) == 23 and len(train['filenames']) == 5
    files = dict(sum((members(prepared / name) for name in train['filenames']), []))
    keys = [name[:-4] for name in files]
    assert len(files) == 46 and sorted(keys) == keys  # they ascend over the shards
    dataset = create_dataset('', str(source), 'train')
    expected = {}
    for index in range(len(dataset)):
        name = dataset.filename(index, absolute=True)
        if not name.endswith('dog/004.jpg'):
            with open(name, 'rb') as file:
                expected[prepare.shrink(file.read(), 24)[0]] = b'01'[index >= 12:][:1]
    found = {data: files[name.replace('.jpg', '.cls')] for name, data in files.items() if name.endswith('.jpg')}
    assert found == expected and (source / 'train' / 'cat' / '003.jpg').read_bytes() in found
    assert {label for _, label in list(found.items())[:5]} == {b'0', b'1'}  # shuffled


def test_timms_reader_of_tar_shards_reads_them(prepared):
    dataset = timm.data.create_dataset('wds/photos', root=str(prepared), split='validation')
    images = list(dataset)
    assert len(dataset) == 8 and sorted(target for _, target in images) == [0] * 4 + [1] * 4
    assert all(min(image.size) == 24 for image, _ in images)


def test_a_second_run_writes_nothing_and_tells_the_same(source, prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob('*.tar')}
    assert command(source, prepared, *FEW, '--max-bad-images', '0.1', '-j', '3') == 0
    out = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob('*.tar')} == before
    assert 'holds 31 images in 7 shards, 1 of them as they were' in out
    assert f'1 could not be read and are left out: {prepared}/bad-images.txt' in out
    assert (prepared / 'bad-images.txt').read_text() == (
        f'{source}/train/dog/004.jpg\tnot an image that PIL knows\n')


def test_the_number_of_workers_changes_no_byte(source, prepared, tmp_path, capsys):
    assert command(source, tmp_path / 'out', *FEW, '--max-bad-images', '0.1', '-j', '2') == 0
    assert contents(tmp_path / 'out') == contents(prepared)
    assert 'ms an image before' in capsys.readouterr().out


def test_ctrl_c_stops_and_the_same_command_goes_on(source, prepared, tmp_path, monkeypatch, capsys):
    shrink, calls = prepare.shrink, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) in (20, 45):
            raise KeyboardInterrupt
        return shrink(*args)

    monkeypatch.setattr(prepare, 'shrink', interrupted)
    codes, out = [], tmp_path / 'out'
    while not codes or codes[-1]:
        codes.append(command(source, out, *FEW, '--max-bad-images', '0.1'))
        assert not list(out.rglob('*.part'))
        if codes[-1]:
            assert 'mixsize prepare: stopped; the same command goes on' in capsys.readouterr().err
    assert codes == [130, 130, 0] and contents(out) == contents(prepared)


def test_a_kill_loses_only_the_shard_that_is_not_whole(source, prepared, tmp_path, monkeypatch):
    shrink, out = prepare.shrink, tmp_path / 'out'
    monkeypatch.setattr(prepare, 'shrink', lambda *args: time.sleep(0.01) or shrink(*args))
    options = [source, out, *FEW, '--max-bad-images', '0.1', '-j', '1']
    for number in (1, 3):
        process = os.fork()
        if not process:
            os._exit(command(*options))
        while not (out / f'train-{number:06d}.tar').exists():
            assert os.waitpid(process, os.WNOHANG) == (0, 0)
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    whole = {path: path.stat().st_mtime_ns for path in out.glob('train-00000[012].tar')}
    assert len(whole) == 3
    assert command(*options) == 0
    assert contents(out) == contents(prepared)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole


@pytest.mark.parametrize('damage', ['state', 'shard', 'missing'])
def test_what_is_broken_off_is_made_again(source, prepared, tmp_path, damage):
    out = tmp_path / 'out'
    assert command(source, out, *FEW, '--split', 'validation') == 0
    before = contents(out)
    if damage == 'missing':
        (out / 'validation-000000.tar').unlink()
    else:
        path = out / ('.prepare.jsonl' if damage == 'state' else 'validation-000001.tar')
        path.write_bytes(path.read_bytes()[:-20])
    (out / f'.{"0" * 32}.part').write_bytes(b'half a shard')
    assert command(source, out, *FEW, '--split', 'validation') == 0
    after = contents(out)
    assert {name: after[name] for name in after if name[0] != '.'} == {
        name: before[name] for name in before if name[0] != '.'}
    assert sorted(after) == sorted(before)
    assert sorted(after['.prepare.jsonl'].splitlines()) == sorted(before['.prepare.jsonl'].splitlines())


def test_a_full_disk_is_one_line_and_space_helps(source, prepared, tmp_path, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(file)

    monkeypatch.setattr(os, 'fsync', full)
    options = [source, tmp_path / 'out', *FEW, '--max-bad-images', '0.1']
    assert command(*options) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith('mixsize prepare: error')]
    assert len(error) == 1 and 'No space left on device; once that is mended the same command goes on' in error[0]
    assert len(list((tmp_path / 'out').glob('*.tar'))) == 2 and not list((tmp_path / 'out').rglob('*.part'))
    assert command(*options) == 0 and contents(tmp_path / 'out') == contents(prepared)


def test_too_many_bad_images_stop_it_with_a_list(source, tmp_path, capsys):
    out = tmp_path / 'out'
    assert command(source, out, *FEW) == 2
    error = capsys.readouterr().err
    assert '1 of 24 images cannot be read, more than the 1.000% allowed' in error and '--max-bad-images' in error
    assert (out / 'bad-images.txt').read_text().count('\n') == 1
    assert command(source, out, *FEW, '--max-bad-images', '0.1') == 0  # that may be said anew


def test_other_arguments_and_other_peoples_files_are_refused(source, prepared, tmp_path, capsys):
    before = contents(prepared)
    for options, message in ((['--short-side', '20', '--shard-size', '5'], '--short-side: 24, not 20'),
                             ([*FEW, '--quality', '80'], '--quality: 90, not 80'),
                             ([*FEW, '--seed', '1'], '--seed: 42, not 1'),
                             ([*FEW, '--split', 'train'], "--split: ['train', 'validation'], not ['train']")):
        assert command(source, prepared, *options) == 2
        error = capsys.readouterr().err
        assert f'was begun with another {message}' in error and error.count('\n') == 1
    (tmp_path / 'film.part').write_text('half a download')
    assert command(source, tmp_path, *FEW) == 2
    assert 'holds other files: choose a new folder' in capsys.readouterr().err
    assert contents(prepared) == before and os.listdir(tmp_path) == ['film.part']


@pytest.mark.parametrize('argv, message', [
    (['{src}/none', '{dst}'], 'no data at'),
    (['{src}', '{src}/out'], 'lies in'),
    (['{src}', '{src}'], 'lies in'),
    (['{src}', '{src}/train/cat/000.jpg/out', '--dataset', 'torch/image_folder'], 'lies in'),
    (['{src}', '{file}/out'], 'is a file'),
    (['{empty}', '{dst}'], 'images'),
    (['{src}/train', '{dst}'], 'has not all of the splits train, validation: say which there are'),
    (['{src}', '{dst}', '--split', 'test'], 'has not all of the splits test'),
    (['{src}', '{dst}', '--split', 'train', 'target'], '--split target makes no name of files'),
    (['{src}', '{dst}', '--split', 'train', 'train[:3]'], 'train is there twice'),
    (['{src}', '{dst}', '--short-side', '0'], '--short-side must be from 1'),
    (['{src}', '{dst}', '--quality', '100'], '--quality must be from 1 to 95'),
    (['{src}', '{dst}', '--shard-size', '0MB'], '--shard-size takes'),
    (['{src}', '{dst}', '--max-bad-images', '2'], '--max-bad-images must be from 0 to 1'),
    (['{src}', '{dst}', '-j', '-1'], '--workers must be at least 0'),
])
def test_what_cannot_work_is_one_line(source, tmp_path, capsys, argv, message):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'empty').mkdir()
    places = {'src': source, 'dst': tmp_path / 'out', 'file': tmp_path / 'file', 'empty': tmp_path / 'empty'}
    assert command(*(word.format(**places) for word in ['--short-side', '24', *argv])) == 2
    error = capsys.readouterr().err
    assert error.startswith('mixsize prepare: error: ') and error.count('\n') == 1 and message in error
    assert sorted(os.listdir(tmp_path)) == ['empty', 'file'] and 'out' not in os.listdir(source)


@pytest.mark.parametrize('src, dst, message', [
    ('C:\\img', 'D:\\out', ''), ('', 'D:\\out', ''), ('C:\\img', 'C:\\img2', ''),
    ('C:\\img', 'c:\\IMG\\out', 'lies in'),
])
def test_folders_on_the_drives_of_windows_are_compared(monkeypatch, src, dst, message):
    monkeypatch.setattr(prepare, 'PurePath', PureWindowsPath)
    monkeypatch.setattr(prepare.os.path, 'realpath', str)
    args = argparse.Namespace(dataset='hfds/x', src=src, dst=dst)
    with pytest.raises(UsageError, match=message) if message else nullcontext():
        prepare.Preparation._check_folders(argparse.Namespace(args=args))


def test_parquet_without_pyarrow_is_one_line(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow.parquet', None)
    assert command(source, tmp_path / 'out', *FEW, '--format', 'parquet') == 2
    assert '--format parquet needs pyarrow: pip install pyarrow' in capsys.readouterr().err


def test_parquet_is_read_by_the_command_that_is_printed(source, prepared, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip('datasets')
    monkeypatch.chdir(tmp_path)
    assert command(source, 'out', *FEW, '--max-bad-images', '0.1', '--format', 'parquet') == 0
    line = capsys.readouterr().out.splitlines()[-1]
    args = build_parser().parse_args(shlex.split(line)[2:])
    assert args.num_classes == 2 and args.dataset == 'hfds/out'
    tar = [name for name, _ in members(prepared / 'train-000000.tar')]
    for split, count in ((args.train_split, 23), (args.val_split, 8)):
        dataset = create_dataset(args.dataset, 'cache', split)
        assert len(dataset) == count and class_names(dataset) == ['cat', 'dog']
        rows = datasets.load_dataset('out', split=split, cache_dir='cache').cast_column(
            'image', datasets.Image(decode=False))
        tars = dict(sum((members(path) for path in sorted(prepared.glob(f'{split}-*.tar'))), []))
        assert [row['image']['bytes'] for row in rows] == [tars[name] for name in tars if name.endswith('.jpg')]
        assert [row['label'] for row in rows] == [int(tars[name]) for name in tars if name.endswith('.cls')]
        assert all(row['image']['path'].endswith('.jpg') for row in rows)
    assert len(tar) in (8, 10)


def test_a_tar_file_gives_the_shards_of_its_folder(source, prepared, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(source / 'train', 'train')
    for workers in (0, 2):  # each worker opens it for itself
        out = tmp_path / f'out{workers}'
        assert command(tmp_path / 'train.tar', out, *FEW, '--max-bad-images', '0.1', '--split', 'train', '-j',
                       str(workers)) == 0
        assert all((out / path.name).read_bytes() == path.read_bytes() for path in prepared.glob('train-*.tar'))


def test_folders_of_torchvision_are_read_as_they_are_encoded(source, prepared, tmp_path):
    options = [*FEW, '--max-bad-images', '0.1', '--split', 'train', '--dataset', 'torch/image_folder']
    assert command(source, tmp_path / 'out', *options) == 0
    assert (tmp_path / 'out' / 'train-000000.tar').read_bytes() == (prepared / 'train-000000.tar').read_bytes()


def test_data_sets_of_pixels_are_encoded(tmp_path, capsys):
    assert command('digits', tmp_path / 'out', '--short-side', '8', '--split', 'validation') == 0
    out = capsys.readouterr().out
    assert 'holds 360 images in 16 shards, 0 of them' in out and 'before' not in out
    assert '--train-split validation --val-split \'\' --num-classes 10' in out


def test_shards_are_about_as_large_as_asked_for(tmp_path, capsys):
    write_images(tmp_path / 'flat', 60)
    assert command(tmp_path / 'flat', tmp_path / 'out', '--short-side', '28', '--split', 'train', '--shard-size',
                   '1MB') == 0
    assert [path.name for path in (tmp_path / 'out').glob('*.tar')] == ['train-000000.tar']
    assert json.loads((tmp_path / 'out' / '_info.json').read_text())['class_names'] is None
    assert '--num-classes' not in capsys.readouterr().out


def test_workers_end_when_the_main_process_is_killed(tmp_path, monkeypatch):
    """Also where the pipe to it is full of images: some 200 kB of each batch."""
    write_images(tmp_path / 'noise', 64, size=(100, 100))
    monkeypatch.setattr(prepare.Preparation, '_write_shard',
                        lambda self, shard, items, *others: next(items) and time.sleep(60))
    process = os.fork()
    if not process:
        os._exit(command(tmp_path / 'noise', tmp_path / 'out', '--short-side', '90', '--shard-size', '64', '--split',
                         'train', '-j', '2'))
    while len(workers := psutil.Process(process).children()) < 2:
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_labels_of_several_classes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.EncodedDataset, 'encoded', lambda self, index: (Image.new('RGB', (9, 9)), [0, 1]))
    assert command('digits', tmp_path / 'out', '--short-side', '8', '--split', 'validation') == 2
    assert 'not the index of a class' in capsys.readouterr().err


def test_no_progress_bar_where_there_is_no_terminal(prepared, source, tmp_path, capfd):
    assert command(source, tmp_path / 'out', *FEW, '--split', 'validation') == 0
    assert 'images/s' not in capfd.readouterr().err


def test_the_tables_of_the_document_are_what_was_measured(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    results = json.loads((ROOT / 'benchmarks' / 'results' / 'prepare-cpu.json').read_text())['results']
    importlib.import_module('prepare').show(results)
    tables = capsys.readouterr().out.strip().split('\n\n')
    text = (ROOT / 'docs' / 'data.md').read_text(encoding='utf-8')
    assert len(tables) == 2 and all(table in text for table in tables)
