"""Data that stream: what each data worker reads, exact resumption, broken shards and records, and a run from shards."""
import io
import json
import os
import signal
import tarfile

import fsspec
import numpy as np
import pytest
import torch
from conftest import write_images
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.data import IterableImageDataset
from torch.utils.data import IterableDataset

from mixsize_timm import evaluate
from mixsize_timm.data import create_loader
from mixsize_timm.datasets import BadImagesError
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import MixSizeBatchSampler, plan_epoch
from mixsize_timm.shards import Record, Shards, Targets, expand_braces, parquet_shards, tar_shards
from mixsize_timm.smoothing import GradientSmoother
from mixsize_timm.streaming import (
    Part,
    PartReader,
    ShardReader,
    StreamBatches,
    create_stream,
    num_images,
    part_of,
    spans,
)
from mixsize_timm.train import main
from mixsize_timm.workers import WorkerError

REGIME = Regime(sizes=(16, 24, 32), probs=(0.5, 0.3, 0.2), base_size=24, batch_size=4, adapt='b+')


def image_bytes(number, kind='PNG'):
    buffer = io.BytesIO()
    Image.new('RGB', (40, 30), (number % 256, number // 256, 9)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, records):
    """A shard of ``(key, {ending: bytes})`` in WebDataset's layout."""
    with tarfile.open(path, 'w') as tar:
        for key, files in records:
            for ending, data in files.items():
                member = tarfile.TarInfo(f'{key}.{ending}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_tars(folder, lengths, info=True, broken=(), split='train'):
    """Shards whose records have their own number as target, so that batches tell what they are of."""
    folder.mkdir(exist_ok=True)
    names, number = [], 0
    for shard, length in enumerate(lengths):
        names.append(f'{split}-{shard:02d}.tar')
        write_tar(folder / names[-1], [
            (f'{n:05d}', {'png': b'broken' if n in broken else image_bytes(n), 'cls': str(n).encode()})
            for n in range(number, number + length)])
        number += length
    if info:
        (folder / '_info.json').write_text(json.dumps({'splits': {split: {
            'name': split, 'filenames': names, 'shard_lengths': list(lengths), 'num_samples': sum(lengths)}}}))
    return folder


class Numbers(Shards):
    """Shards of numbers; notes which of them are opened, and which records are looked at."""

    def __init__(self, lengths, told=True):
        super().__init__([f's{i}' for i in range(len(lengths))], lengths if told else None, sum(lengths), Targets(None))
        self.all = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
        self.opened, self.looked_at = [], []

    def _read(self, shard, first):
        self.opened.append(shard)
        for number, value in enumerate(self.all[shard].tolist()):
            if number >= first:
                self.looked_at.append(value)
            yield number, Record(b'', value, str(value))


def values_of(shards, part, used=0, seed=0, window=7):
    reader = PartReader(shards, part, seed, window)
    return [window[slot % len(window)][1].target for window, slot in reader.slots(used)], reader


def loader_of(dataset, regime=REGIME, **kwargs):
    options = dict(is_training=True, num_workers=0, device=torch.device('cpu'), persistent_workers=False,
                   shuffle_window=8, seed=3)
    return create_loader(dataset, (3, regime.base_size, regime.base_size), regime.batch_size, regime=regime,
                         **{**options, **kwargs})


def train_stream(folder, split='train', **kwargs):
    return create_stream('wds/x', str(folder), split, is_training=True, **kwargs)


def batches_of(loader):
    return [(images.shape[-1], targets.tolist(), images.double().sum().item()) for images, targets in loader]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.data())
@settings(deadline=None, max_examples=60)
def test_the_spans_of_an_epoch_hold_each_record_once_wherever_it_is_cut(lengths, data):
    lengths, total = np.array(lengths), sum(lengths)
    last = data.draw(st.integers(0, 3 * total))
    cuts = sorted(data.draw(st.lists(st.integers(0, last), max_size=4)))
    records = [(shard, number) for first, end in zip([0, *cuts], [*cuts, last])
               for shard, start, stop in spans(lengths, first, end, 0, 0) for number in range(start, stop)]
    assert len(records) == last
    for begin in range(0, last - total + 1, total):
        assert len(set(records[begin:begin + total])) == total
    assert records == [(shard, number) for shard, start, stop in spans(lengths, 0, last, 0, 0)
                       for number in range(start, stop)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_where_lengths_are_known_an_epoch_has_each_record_once_and_a_resumed_one_the_rest(
        lengths, world_size, workers, step):
    lengths = [*lengths, 60]
    plan = plan_epoch(REGIME, sum(lengths), world_size=world_size, random_access=False)
    seen, rest = [], []
    for rank in range(world_size):
        for worker in range(workers):
            part, _ = part_of(plan, 0, rank, world_size, worker, workers)
            values, _ = values_of(Numbers(lengths), part)
            _, used = part_of(plan, step, rank, world_size, worker, workers)
            assert values_of(Numbers(lengths), part, used)[0] == values[used:]
            seen += values
            rest += values[used:]
    assert len(seen) == len(set(seen)) == plan.batch.sum()
    assert len(rest) == plan.batch[plan.first_group(step):].sum()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.integers(1, 12), st.integers(0, 60))
@settings(deadline=None, max_examples=60)
def test_where_lengths_are_not_known_parts_share_no_record_and_begin_again_when_they_run_out(lengths, parts, used):
    seen = []
    for number in range(parts):
        shards = Numbers(lengths, told=False)
        part = Part(2, number, parts, 0, 60)
        try:
            values, reader = values_of(shards, part)
        except WorkerError as error:
            assert len(lengths) < parts and 'fewer --workers' in str(error)
            return
        own = set(values)
        assert reader.restarts == (60 - 1) // len(own) and set(values[-len(own):]) <= own
        assert not own & set(seen)
        seen += own
        assert values_of(Numbers(lengths, told=False), part, used)[0] == values[used:]
    assert sum(lengths) >= len(seen) >= min(60, sum(lengths))


def test_shards_before_the_window_that_is_gone_on_with_are_not_opened():
    part = Part(0, 0, 1, 0, 100)
    values, _ = values_of(Numbers([10] * 10), part, window=20)
    shards = Numbers([10] * 10)
    assert values_of(shards, part, used=45, window=20)[0] == values[45:]
    assert len(shards.opened) == 6 and len(shards.looked_at) == 60
    unknown = Numbers([10] * 10, told=False)
    values, _ = values_of(Numbers([10] * 10, told=False), part, window=20)
    assert values_of(unknown, part, used=45, window=20)[0] == values[45:]
    assert len(unknown.opened) == 10 and len(unknown.looked_at) == 60


def test_an_epoch_is_another_order_than_the_one_before_and_the_seed_decides():
    first, again, other, seeded = (
        values_of(Numbers([10] * 5), Part(epoch, 0, 1, 0, 50), seed=seed)[0] for epoch, seed in (
            (0, 0), (0, 0), (1, 0), (0, 1)))
    assert first == again and sorted(other) == sorted(seeded) == sorted(first)
    assert first != other and first != seeded and first != sorted(first)


def test_ranks_have_the_same_sizes_at_each_step_and_share_the_images_of_the_epoch(tmp_path):
    dataset = train_stream(write_tars(tmp_path / 'tars', [9, 14, 20, 11, 18, 25, 13]))
    ranks = [batches_of(loader_of(dataset, rank=rank, world_size=2)) for rank in range(2)]
    assert [size for size, *_ in ranks[0]] == [size for size, *_ in ranks[1]]
    assert [len(targets) for _, targets, _ in ranks[0]] == [len(targets) for _, targets, _ in ranks[1]]
    plan = loader_of(dataset, rank=0, world_size=2).batch_sampler.plan
    assert [size for size, *_ in ranks[0]] == plan.size.tolist()
    targets = [target for rank in ranks for _, targets, _ in rank for target in targets]
    assert len(targets) == len(set(targets)) == plan.batch.sum() > 100
    shares = {size: sum(len(targets) for rank in ranks for s, targets, _ in rank if s == size) for size in REGIME.sizes}
    mapped = MixSizeBatchSampler(110, REGIME, 3, 0, 2).plan  # as for map-style data
    assert shares == {size: mapped.batch[mapped.size == size].sum() for size in REGIME.sizes}


def test_a_loader_goes_on_at_a_step_with_the_batches_of_one_that_was_not_interrupted(tmp_path):
    folder = write_tars(tmp_path / 'tars', [12] * 10, broken={17, 18, 80})
    options = dict(num_workers=2, max_bad_images=1, persistent_workers=True)
    whole = loader_of(train_stream(folder), **options)
    whole.set_epoch(1)
    batches = batches_of(whole)
    assert len(whole.bad_images) == 3 and whole.batch_sampler.epoch == 2
    other = loader_of(train_stream(folder), **options)
    assert batches_of(other) != batches  # of epoch 0: its workers hear of the epoch
    failing = loader_of(train_stream(folder))
    steps = len(batches)
    needed = set()
    for worker in range(2):
        part, used = part_of(whole.batch_sampler.plan, steps - 3, 0, 1, worker, 2)
        first = part.first + used // 8 * 8
        needed |= {span.shard for span in spans(np.full(10, 12), first, part.first + part.records, 3, 1)}
    assert len(needed) < 6
    for shard in set(range(10)) - needed:
        (folder / f'train-{shard:02d}.tar').unlink()
    whole.set_epoch(1)
    plan = whole.batch_sampler.plan
    for step in (steps - 3, steps - 2):  # the first worker in turn is another one
        other.set_epoch(1, step)
        assert batches_of(other) == batches[plan.first_group(step):]
    with pytest.raises(WorkerError, match=r'^shard .*train-\d\d.tar cannot be read: .*No such file'):
        batches_of(failing)


def test_the_number_of_workers_decides_on_records_only(tmp_path, caplog):
    dataset = train_stream(write_tars(tmp_path / 'tars', [61]))
    shapes = []
    for workers in (0, 2):
        loader = loader_of(dataset, num_workers=workers)
        batches = batches_of(loader)
        shapes.append([(size, len(targets)) for size, targets, _ in batches])
        targets = sum((targets for _, targets, _ in batches), [])
        assert len(targets) == len(set(targets))
    assert shapes[0] == shapes[1] and len(loader) == len(shapes[0])
    assert '1 shards for 2 data workers' in caplog.text and 'at least 2 shards' in caplog.text
    assert loader.dataset.layout == {'processes': 1, 'workers': 2}


def test_a_broken_record_is_replaced_by_the_next_and_counted(tmp_path, caplog):
    folder = write_tars(tmp_path / 'tars', [30, 30], broken={3, 31, 32})
    good = sum((targets for _, targets, _ in batches_of(loader_of(train_stream(write_tars(
        tmp_path / 'good', [30, 30]))))), [])
    loader = loader_of(train_stream(folder), max_bad_images=0.05)
    targets = sum((targets for _, targets, _ in batches_of(loader)), [])
    changed = [target for before, target in zip(good, targets) if before != target]
    assert len(changed) == 3 and not {3, 31, 32} & set(targets)
    assert sorted(name for name, _ in loader.bad_images.values()) == sorted(
        f'{n:05d} of shard {folder}/train-{n // 30:02d}.tar' for n in (3, 31, 32))
    assert caplog.text.count('another one takes its place: not an image that PIL knows') == 3
    with pytest.raises(BadImagesError, match='3 of 60 images cannot be read, more than the 4.000%'):
        batches_of(loader_of(train_stream(folder), max_bad_images=0.04))
    with pytest.raises(BadImagesError, match='8 images in a row'):
        batches_of(loader_of(train_stream(write_tars(tmp_path / 'all', [60], broken=range(60))), max_bad_images=1))


def test_tar_records_are_what_timm_takes_for_them(tmp_path):
    write_tar(tmp_path / 'a-0.tar', [
        ('__meta__', {'txt': b'x'}), ('d/one.v1', {'JPG': b'1', 'json': b'{"label": "2", "x": {"y": 5}}'}),
        ('d/two', {'txt': b'', 'webp': b'2', 'json': b'{"label": -1, "x": {"y": 6}}'})])
    (tmp_path / 'names.txt').write_text('a\n')

    def records(**kwargs):
        return [record for _, record in tar_shards(str(tmp_path), 'a-0.tar|3', **kwargs).records(0)]

    # the key ends at the first dot, and a record without an image is told apart from one without a label
    with pytest.raises(WorkerError, match="record '__meta__' has no .json file"):
        records(target_key='label')
    write_tar(tmp_path / 'a-0.tar', [
        ('d/one', {'JPG': b'1', 'json': b'{"label": "2", "x": {"y": 5}}'}),
        ('d/two', {'txt': b'', 'webp': b'2', 'json': b'{"label": -1, "x": {"y": 6}}'})])
    assert records(target_key='label') == [Record(b'1', 2, 'd/one'), Record(b'2', None, 'd/two')]
    assert [record.target for record in records(target_key='x/y', class_map={5: 0, 6: 1})] == [0, 1]
    with pytest.raises(WorkerError, match="no field 'z' among label, x"):
        records(target_key='z')
    with pytest.raises(WorkerError, match="record 'd/one' has no .cls file: check --target-key"):
        records()


def test_splits_are_named_as_timm_names_them(tmp_path):
    assert expand_braces('a-{08..10}.tar') == ['a-08.tar', 'a-09.tar', 'a-10.tar']
    assert expand_braces('{a,b}{1..2}') == ['a1', 'a2', 'b1', 'b2']
    folder = str(write_tars(tmp_path / 'tars', [3, 4, 5]))
    assert tar_shards(folder, 'train').lengths.tolist() == [3, 4, 5]
    assert tar_shards(folder, 'train-{01..02}.tar').num_images == 9
    assert tar_shards(folder, 'train-00.tar::train-02.tar|7').num_images == 7
    assert tar_shards(folder, 'train', 5).num_images == 5
    with pytest.raises(ValueError, match="no split 'test' in .*there is splits train"):
        tar_shards(folder, 'test')
    with pytest.raises(FileNotFoundError, match='train-03.tar does not exist, 1 of 2'):
        tar_shards(folder, 'train-{02..03}.tar')
    info = json.loads((tmp_path / 'tars/_info.json').read_text())
    (tmp_path / 'tars/_info.json').write_text(json.dumps({**info, 'class_names': ['a', 'b']}))
    assert tar_shards(folder, 'train').class_to_idx == {'a': 0, 'b': 1}
    (tmp_path / 'tars/_info.json').unlink()
    assert tar_shards(folder, 'train-00.tar|3').lengths is None
    with pytest.raises(ValueError, match='give it with --train-num-samples'):
        tar_shards(folder, 'train-00.tar')


def test_a_shard_that_cannot_be_read_is_named_and_a_remote_one_tried_once_more(tmp_path, monkeypatch, caplog):
    folder = write_tars(tmp_path / 'tars', [6])
    data = (folder / 'train-00.tar').read_bytes()
    (folder / 'train-00.tar').write_bytes(data[:len(data) // 2])
    with pytest.raises(WorkerError, match=r'shard .*train-00.tar cannot be read: (it ends after|unexpected end)'):
        list(tar_shards(str(folder), 'train').records(0, 0, 6))
    MemoryFileSystem.store.clear()
    with fsspec.open('memory://bucket/train-00.tar', 'wb') as file:
        file.write(data)
    failures, original = [], MemoryFileSystem._open

    def flaky(self, *args, **kwargs):
        if failures and failures.pop():
            raise OSError('connection reset')
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, '_open', flaky)
    failures.clear()
    shards = tar_shards('memory://bucket', 'train-00.tar|6')
    failures[:] = [1]
    assert [record.target for _, record in shards.records(0)] == list(range(6))
    assert 'read once again: connection reset' in caplog.text
    failures[:] = [1, 1]
    with pytest.raises(WorkerError, match='shard memory://bucket/train-00.tar cannot be read: connection reset'):
        list(shards.records(0))


def test_a_shard_that_stands_still_while_it_is_read_ends_the_run_and_is_named():
    class Standing(Numbers):
        def _read(self, shard, first):
            for number, record in super()._read(shard, first):
                if number == 13:
                    signal.pause()
                yield number, record._replace(image=image_bytes(number))

    dataset = IterableImageDataset('', reader=ShardReader(Standing([60])))
    loader = loader_of(dataset, num_workers=1, worker_timeout=1, shuffle_window=4)
    with pytest.raises(WorkerError, match='data worker 0 hung at image number 1[23] of shard s0 for more than 1 sec'):
        batches_of(loader)


def write_parquet(path, numbers, rows=4):
    pa = pytest.importorskip('pyarrow')
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    features = {'image': {'_type': 'Image'}, 'label': {'names': [f'c{n}' for n in range(200)], '_type': 'ClassLabel'}}
    table = pa.table({'image': [{'bytes': image_bytes(n), 'path': f'{n}.png'} for n in numbers], 'label': numbers},
                     metadata={'huggingface': json.dumps({'info': {'features': features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def test_parquet_shards_are_read_from_a_row_group_on(tmp_path, monkeypatch):
    for shard in range(3):
        write_parquet(tmp_path / f'data/train-0000{shard}-of-00003.parquet', list(range(shard * 10, shard * 10 + 10)))
    shards = parquet_shards(str(tmp_path), 'train')
    assert shards.lengths.tolist() == [10] * 3 and shards.class_to_idx['c7'] == 7
    assert [(n, record.target, record.name) for n, record in shards.records(1, 5, 7)] == [
        (5, 15, '15.png'), (6, 16, '16.png')]
    assert parquet_shards(str(tmp_path), 'data/train-0000{0..1}-of-00003.parquet').num_images == 20
    dataset = create_stream('parquet/', str(tmp_path), 'train', is_training=True)
    targets = sum((targets for _, targets, _ in batches_of(loader_of(dataset))), [])
    assert len(targets) == len(set(targets)) > 25
    with pytest.raises(FileNotFoundError, match='no test-\\*.parquet'):
        parquet_shards(str(tmp_path), 'test')
    with pytest.raises(ValueError, match="no column 'photo', but image, label: check --input-key"):
        parquet_shards(str(tmp_path), 'train', input_key='photo')
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow.parquet', None)
    with pytest.raises(ValueError, match='Parquet shards need pyarrow: pip install pyarrow'):
        parquet_shards(str(tmp_path), 'train')


def test_hugging_face_streams_are_read_undecoded_shard_by_shard(tmp_path):
    pytest.importorskip('datasets')
    from timm.data import create_dataset

    for shard in range(3):
        write_parquet(tmp_path / f'train-0000{shard}-of-00003.parquet', list(range(shard * 10, shard * 10 + 10)))
    dataset = create_dataset(f'hfids/{tmp_path}', split='train', is_training=True, num_samples=30,
                             root=str(tmp_path / 'cache'))
    loader = loader_of(dataset, num_workers=2, persistent_workers=True)
    assert all(record.image[:4] == b'\x89PNG' for _, record in loader.dataset.source.records(1))
    batches = batches_of(loader)
    assert sum(len(targets) for _, targets, _ in batches) == loader.batch_sampler.plan.batch.sum()
    assert loader.dataset.restarts  # one of two workers has one shard of three
    loader.set_epoch(0, 3)
    assert batches_of(loader) == batches[loader.batch_sampler.plan.first_group(3):]


def test_any_iterable_data_set_of_images_does_and_one_without_a_length_is_refused():
    class Images(IterableDataset):
        def __iter__(self):
            for number in range(50):
                yield Image.new('RGB', (40, 30)), number

    with pytest.raises(TypeError, match='Images streams without telling its length'):
        loader_of(Images())
    Images.__len__ = lambda self: 50
    loader = loader_of(Images())
    targets = sum((targets for _, targets, _ in batches_of(loader)), [])
    assert len(targets) == len(set(targets)) and loader.dataset.restarts == 0


def test_loaders_of_timms_have_each_image_once_from_shards_in_evaluation_and_whole_batches_in_training(tmp_path):
    from timm.data import create_loader as timms_loader

    folder = write_tars(tmp_path / 'tars', [9, 8, 7], broken={5})
    evaluation = create_stream('wds/x', str(folder), 'train')
    for workers in (0, 2):
        loader = timms_loader(evaluation, (3, 16, 16), 5, num_workers=workers, device=torch.device('cpu'),
                              persistent_workers=False)
        targets = torch.cat([targets for _, targets in loader]).tolist()
        assert sorted(targets) == sorted([*set(range(24)) - {5}, 6])
    training = train_stream(folder, batch_size=5)
    loader = timms_loader(training, (3, 16, 16), 5, True, num_workers=2, device=torch.device('cpu'),
                          persistent_workers=False)
    batches = [targets.tolist() for _, targets in loader]
    assert len(batches) == len(loader) == 4 and all(len(batch) == 5 for batch in batches)


@pytest.mark.parametrize('repeats, images', [(0., 24), (0.5, 24), (1.4, 34), (2., 48)])
def test_an_epoch_repeats_the_images_any_number_of_times_rounded_up(tmp_path, repeats, images):
    dataset = train_stream(write_tars(tmp_path / 'tars', [9, 8, 7]), repeats=repeats, batch_size=5)
    assert num_images(dataset) == len(dataset) == images
    assert len(list(dataset.reader)) == images // 5 * 5
    loader = loader_of(dataset)
    assert len(loader.dataset) == images
    seen = np.bincount(sum((targets for _, targets, _ in batches_of(loader)), []))
    assert images - 4 < seen.sum() <= images and seen.max() == -(-images // 24)


def write_classes(folder):
    """Tar shards of two classes for a run, with a validation split."""
    write_images(folder / 'images', 24)
    files = sorted((folder / 'images').iterdir())
    info = {}
    for split, count in (('train', 4), ('validation', 1)):
        names = [f'{split}-{shard}.tar' for shard in range(count)]
        for shard, name in enumerate(names):
            write_tar(folder / name, [(file.stem, {'jpg': file.read_bytes(), 'cls': b'%d' % (i % 2)})
                                      for i, file in enumerate(files[shard * 6:shard * 6 + 6])])
        info[split] = {'name': split, 'filenames': names, 'shard_lengths': [6] * count, 'num_samples': 6 * count}
    (folder / 'info.json').write_text(json.dumps({'splits': info}))


def test_a_run_from_shards_goes_on_from_its_step_and_says_when_other_workers_go_on(tmp_path, monkeypatch, caplog):
    write_classes(tmp_path / 'tars')
    options = ['--dataset', 'wds/x', '--data-dir', str(tmp_path / 'tars'), '--model', 'test_resnet', '--num-classes', 2,
               '--img-size', 16, '--mixsize', 'custom', '--mixsize-sizes', 16, 24, '-b', 4, '--epochs', 1, '-j', 0,
               '--device', 'cpu', '--output', str(tmp_path / 'out'), '--calibrate', 1, '--calibrate-val', 1]

    def run(name):
        return main([str(word) for word in [*options, '--experiment', name, '--resume', 'auto']])

    assert run('straight') == 0
    with monkeypatch.context() as patch:
        smooth = GradientSmoother.__call__
        patch.setattr(GradientSmoother, '__call__',
                      lambda *args: (os.kill(os.getpid(), signal.SIGTERM), smooth(*args))[1])
        patch.setattr(StreamBatches, 'layout', {'processes': 1, 'workers': 4})
        assert run('stopped') == 75
    assert run('stopped') == 0
    assert 'Epoch 0 was begun by 1 processes of 4 data workers and goes on with 1 of 1' in caplog.text
    straight, stopped = (load_file(tmp_path / f'out/{name}/last/model.safetensors') for name in ('straight', 'stopped'))
    assert all(torch.equal(straight[name], stopped[name]) for name in straight)
    described = json.loads((tmp_path / 'out/stopped/run.json').read_text())
    assert described['data']['train_images'] == 24 and [start['step'] for start in described['starts']] == [0, 1]
    report = tmp_path / 'report'
    words = ['straight', '--sizes', 16, '--calibrate', 2, '--no-calibrate-aug', '--no-speed', '--output', report]
    assert evaluate.main([str(tmp_path / 'out' / words[0]), *map(str, words[1:])]) == 0
    measured, = json.loads((report / 'sizes.json').read_text())['checkpoints']
    assert measured['calibrated'] == 2 and measured['data']['calibrated on'] == 'images as in use'
