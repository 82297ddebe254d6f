"""A data set rewritten as shards of images no larger than needed: ``mixsize prepare SRC DST --short-side N``."""
import argparse
import copy
import io
import json
import logging
import multiprocessing
import os
import re
import shlex
import sys
import tarfile
import threading
import time
import uuid
from contextlib import closing, contextmanager, suppress
from itertools import chain, islice
from pathlib import PurePath
from typing import (
    Any,
    BinaryIO,
    Callable,
    Dict,
    Generator,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
from PIL import ExifTags, Image
from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from .datasets import (
    DIGITS,
    BadImagesError,
    ReadableDataset,
    check_classes,
    check_not_train,
    check_splits,
    class_names,
    create_dataset,
)
from .errors import UsageError, check_writable, refusing, run_command
from .images import of_8_bits, unreadable
from .parser import Parser, build_parser
from .workers import Read, Watched, WatchedLoader, WorkerError

_logger = logging.getLogger(__name__)

NAME = 'mixsize prepare'
FORMATS = ('wds', 'parquet')
STATE_FILE = '.prepare.jsonl'
_BROKEN_OFF = re.compile(r'\.[0-9a-f]{32}\.part')  # names of files whose writing was
INFO_FILE = '_info.json'  # timm's name
BAD_FILE = 'bad-images.txt'
SHARD_BYTES = 100e6
MIN_SHARDS = 16  # of a split, unless --shard-size says otherwise: a worker that streams needs one of its own
SAMPLE = 64  # images that sizes and times are estimated from
BATCH = 16  # images that a worker prepares at a time
ROW_GROUP = 256  # rows
MAX_QUALITY = 95  # above it a JPEG grows and looks the same, says PIL
_DATA_OPTIONS = ('dataset', 'dataset_download', 'class_map', 'input_key', 'target_key', 'dataset_trust_remote_code',
                 'max_bad_images', 'worker_timeout')  # of the training command
_ADVICE = (
    'Which N: a random resized crop takes 8 to 100 per cent of an image\'s area and is resized to its step\'s size. '
    'The smaller the images, the more crops are enlarged, and lose detail; the larger, the longer they take to decode. '
    'From 1.15 times the largest size of the regime, as evaluation has it, to twice that is usual: for 224 px 256 to '
    '448. docs/data.md has what was measured.')


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return run_command(NAME, lambda: Preparation(parse_args(argv)).run(), lambda: 'the same command goes on with it')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """What the command line says.

    Raises:
        UsageError: An argument's value cannot work.
    """
    parser = Parser(
        prog=NAME, usage='mixsize prepare SRC DST --short-side N [options]', epilog=_ADVICE,
        description='Rewrite a data set as tar shards or Parquet, its images no larger than training needs. Stopped or '
                    'killed, the same command goes on.')
    parser.add_argument('src', metavar='SRC',
                        help='image folder or tar file, the data folder of a --dataset, or hfds/NAME')
    parser.add_argument('dst', metavar='DST', help='folder that is made')
    group = parser.add_argument_group('Images')
    group.add_argument('--short-side', type=int, required=True, metavar='N',
                       help='reduce the shorter side to N px; smaller images are not enlarged')
    group.add_argument('--quality', type=int, default=90, metavar='Q',
                       help=f'JPEG quality, 1 to {MAX_QUALITY}; JPEGs that are small enough are kept byte for byte '
                            '(default: 90)')
    group = parser.add_argument_group('Shards')
    group.add_argument('--format', choices=FORMATS, default='wds',
                       help='wds: tar shards to stream, --dataset wds/NAME in training; parquet: --dataset hfds/DST '
                            '(default: wds)')
    group.add_argument('--shard-size', metavar='SIZE', default=None,
                       help='images of a shard, or about so many megabytes with MB behind the number (default: 100MB, '
                            f'less where that makes fewer than {MIN_SHARDS} shards of a split)')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='seed of the images\' order (default: 42)')
    group.add_argument('-j', '--workers', type=int, default=_num_cores(), metavar='N',
                       help='processes that prepare images; 0 for none beside the main one (default: one a CPU core)')
    group = parser.add_argument_group('Data set, as for the training command')
    group.add_argument('--split', nargs='+', default=['train', 'validation'], metavar='NAME',
                       help='splits to rewrite (default: train validation)')
    options = {action.dest: action for action in build_parser()._actions}
    helps = {'dataset': 'kind and name as timm has them, such as torch/cifar10 (default: image folder or tar file)',
             'target_key': 'key of the label in a data set\'s items',
             'max_bad_images': 'stop when more than this part of a split cannot be read; up to that they are left out, '
                               f'and listed in {BAD_FILE} (default: 0.01)'}
    for name in _DATA_OPTIONS:
        action = copy.copy(options[name])
        action.help = helps.get(name, action.help)
        group._add_action(action)
    args = parser.parse_args(argv)
    _check(args)
    return args


def _num_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _check(args: argparse.Namespace) -> None:
    for name, low, high in (('short_side', 1, 65500), ('quality', 1, MAX_QUALITY), ('max_bad_images', 0, 1),
                            ('seed', 0, np.inf), ('workers', 0, np.inf), ('worker_timeout', 0, np.inf)):
        if not low <= getattr(args, name) <= high:
            bounds = f'at least {low}' if high == np.inf else f'from {low} to {high}'
            raise UsageError(f'--{name.replace("_", "-")} must be {bounds}, not {getattr(args, name)}')
    if args.shard_size is not None and not re.fullmatch(r'0*[1-9]\d*(MB)?', args.shard_size):
        raise UsageError(f'--shard-size takes a number of images, or of megabytes such as 100MB, not {args.shard_size}')
    files = [_file_name(split) for split in args.split]
    for split, file in zip(args.split, files):
        if not re.fullmatch(r'\w+([-.]\w+)*', file) or 'tar' in file:  # timm takes one with "tar" for a file's name
            raise UsageError(f'--split {split} makes no name of files')
        if files.count(file) > 1:
            raise UsageError(f'--split {split}: {file} is there twice')
    if args.format == 'parquet':
        try:
            import pyarrow.parquet  # noqa: F401 needed later
        except ImportError as error:
            raise UsageError('--format parquet needs pyarrow: pip install pyarrow, or use --format wds') from error


def _file_name(split: str) -> str:
    """What the files of a split are called; of ``train[:1000]``, as Hugging Face has it, ``train``."""
    return split.split('[')[0]


def shrink(source: Union[bytes, Image.Image], short_side: int, quality: int = 90) -> Tuple[bytes, bool]:
    """An image as JPEG, its shorter side no longer than asked for.

    The pixels are those that timm sees: grey, or RGB by PIL's conversion, 16 bits scaled to 8, the first frame, no
    colour profile applied, not turned as EXIF says. That EXIF orientation is kept for readers that do turn; all other
    metadata is left out.

    Args:
        source: Encoded image of any kind that PIL reads, or one of PIL's.
        short_side: In pixels. Larger images are reduced with an antialiased bicubic filter, a JPEG from a decoding at
            1/2, 1/4 or 1/8 where that is still twice the size; smaller ones are never enlarged.
        quality: JPEG quality.

    Returns:
        The JPEG, and whether it is the very one that was given: it was small enough.

    Raises:
        Exception: Of any kind of PIL's, for an image that cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return _encode(source, short_side, quality), False
    with Image.open(io.BytesIO(source)) as image:
        if image.format == 'JPEG' and min(image.size) <= short_side:
            image.load()  # one that is broken is found here, not in training
            return source, True
        return _encode(image, short_side, quality), False


def _encode(image: Image.Image, short_side: int, quality: int) -> bytes:
    orientation = None
    with suppress(Exception):  # EXIF can be broken in many ways, and timm does not look at it
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    scale = min(1., short_side / min(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    image.draft(None, (2 * width, 2 * height))  # PIL's own gap in thumbnail()
    image = of_8_bits(image)
    if image.mode != 'L':
        image = image.convert('RGB')
    if scale < 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation not in (None, 1):
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=quality, comment=None, exif=exif.tobytes() if len(exif) else b'')
    return buffer.getvalue()


def decode_seconds(*groups: Sequence[bytes], rounds: int = 5) -> List[float]:
    """Seconds of one core that PIL takes to decode an image to RGB, for each of several groups of encoded images.

    The groups are decoded in turn, so that what disturbs the machine disturbs all; of each image the fastest round
    counts, and of a group the mean of its images.
    """
    def decode(data: bytes) -> float:
        start = time.thread_time()  # which other programs on the machine disturb little
        with Image.open(io.BytesIO(data)) as image:
            image.convert('RGB')
        return time.thread_time() - start

    times = [[[decode(data) for data in group] for group in groups] for _ in range(rounds)]
    return [float(np.min(rows, axis=0).mean()) for rows in zip(*times)]


class Prepared(NamedTuple):
    """One image, ready to be written."""
    data: bytes  # JPEG
    target: Any
    name: str  # its path, or its number
    source_bytes: Optional[int]  # None where the data set has no encoded images
    kept: bool  # byte for byte


class EncodedDataset(ReadableDataset):
    """A data set that gives its images as they are encoded, where it has them so: timm's readers and folders do."""

    def encoded(self, index: int) -> Tuple[Union[bytes, Image.Image], Any]:
        """An image, encoded or else one of PIL's, and its target."""
        if isinstance(self.dataset, ImageDataset):
            file, target, *_ = self.dataset.reader[index]
            with file:
                return file.read(), -1 if target is None else target
        if isinstance(self.dataset, DatasetFolder):
            path, target = self.dataset.samples[index]
            with open(path, 'rb') as file:
                return file.read(), target
        return self.dataset[index]

    def report(self, index: int, name: str, reason: str) -> None:
        """Warn of an image that cannot be read."""
        _logger.warning('Cannot read image %s, it is left out: %s', name, reason)


class PreparedDataset(Watched, Dataset):
    """Answers indices with the prepared images, ``None`` for those that cannot be read: what the workers do."""

    def __init__(self, dataset: EncodedDataset, short_side: int, quality: int, num_workers: int) -> None:
        super().__init__(dataset, num_workers)
        self.short_side = short_side
        self.quality = quality

    def __getitems__(self, indices: Sequence[int]) -> Read:
        bad_images: Dict[int, Tuple[str, str]] = {}
        items: List[Optional[Prepared]] = []
        for index in map(int, indices):
            with self.heartbeats.at(index):
                try:
                    source, target = self.source.encoded(index)
                    data, kept = shrink(source, self.short_side, self.quality)
                    items.append(Prepared(data, target, self.source.name(index),
                                          len(source) if isinstance(source, bytes) else None, kept))
                except Exception as error:  # PIL raises errors of every kind for broken files
                    bad_images[index] = self.source.name(index), unreadable(error)
                    items.append(None)
        return Read(items, bad_images)

    def __len__(self) -> int:
        return len(self.source)


def _collated(batch: Any) -> Any:
    return batch


def _end_with_parent(worker: int) -> None:
    """Let a worker end when the main process is killed, also while it hands over images that nobody takes any more."""
    def wait() -> None:
        parent: Any = multiprocessing.parent_process()
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name='end-with-parent', daemon=True).start()


class Shard(NamedTuple):
    """A part of a split's images that becomes one file."""
    file: str  # in DST
    split: str
    first: int  # place of its first image in the order of the split
    images: np.ndarray  # int [N], in their order


def plan_shards(split: str, num_images: int, per_shard: int, seed: int, format: str) -> List[Shard]:
    """The shards of a split: its images in an order drawn by the seed, cut into equal parts but for the last."""
    order = np.random.default_rng(seed).permutation(num_images)
    count = -(-num_images // per_shard)
    names = [f'{_file_name(split)}-{number:06d}.tar' if format == 'wds' else
             f'data/{_file_name(split)}-{number:05d}-of-{count:05d}.parquet' for number in range(count)]
    return [Shard(name, split, first, order[first:first + per_shard])
            for name, first in zip(names, range(0, num_images, per_shard))]


@contextmanager
def _tar_shard(file: BinaryIO, names: Optional[List[str]]) -> Iterator[Callable[[int, Prepared], None]]:
    """Takes images for a tar shard in WebDataset's layout, which has no place for the names of classes."""
    with tarfile.open(fileobj=file, mode='w', format=tarfile.USTAR_FORMAT) as tar:
        def add(position: int, item: Prepared) -> None:
            for kind, data in (('jpg', item.data), ('cls', str(int(item.target)).encode())):
                member = tarfile.TarInfo(f'{position:09d}.{kind}')
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

        yield add


@contextmanager
def _parquet_shard(file: BinaryIO, names: Optional[List[str]]) -> Iterator[Callable[[int, Prepared], None]]:
    """Takes images for a Parquet file in the layout of Hugging Face's ``datasets``."""
    import pyarrow as pa  # optional
    import pyarrow.parquet as pq

    label = {'_type': 'Value', 'dtype': 'int64'} if names is None else {'names': names, '_type': 'ClassLabel'}
    features = {'info': {'features': {'image': {'_type': 'Image'}, 'label': label}}}
    image = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    schema = pa.schema([('image', image), ('label', pa.int64())], {'huggingface': json.dumps(features)})
    rows: List[Dict[str, Any]] = []
    with pq.ParquetWriter(file, schema, compression='none', use_dictionary=False, write_statistics=False) as writer:
        def write() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        def add(position: int, item: Prepared) -> None:
            stem = os.path.splitext(os.path.basename(item.name))[0]
            rows.append({'image': {'bytes': item.data, 'path': f'{stem}.jpg'}, 'label': int(item.target)})
            if len(rows) == ROW_GROUP:
                write()

        yield add
        if rows:
            write()


_WRITERS = {'wds': _tar_shard, 'parquet': _parquet_shard}


@contextmanager
def _aside(folder: str, name: str) -> Iterator[BinaryIO]:
    """A file that takes its place in the folder when it is whole."""
    path = os.path.join(folder, f'.{uuid.uuid4().hex}.part')
    try:
        with open(path, 'xb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path, os.path.join(folder, name))
    finally:
        with suppress(OSError):
            os.remove(path)


class State:
    """What is done, in a file of JSON lines: what was asked for, then a line for each shard that is whole.

    Args:
        folder: The folder of the shards.
        arguments: What was asked for, as plain values.

    Attributes:
        per_shard: Images of a shard, by split.
        done: What is known of the shards that are whole, by file.

    Raises:
        UsageError: The folder holds something else, or was begun with other arguments.
    """

    def __init__(self, folder: str, arguments: Dict[str, Any]) -> None:
        self.folder = folder
        self.path = os.path.join(folder, STATE_FILE)
        self.arguments = arguments
        self.per_shard: Dict[str, int] = {}
        self.done: Dict[str, Dict[str, Any]] = {}
        there = os.listdir(folder) if os.path.isdir(folder) else []
        if STATE_FILE in there:
            self._read()
        elif any(not _BROKEN_OFF.fullmatch(name) for name in there):
            raise UsageError(f'{folder} holds other files: choose a new folder')

    def _read(self) -> None:
        with refusing(f'cannot read {self.path}'), open(self.path, encoding='utf-8') as file:
            header = json.loads(file.readline())
            for line in file:
                with suppress(ValueError):  # one whose writing was broken off
                    record = json.loads(line)
                    self.done[record['file']] = record
        for name, value in self.arguments.items():
            if header['arguments'].get(name) != value:
                raise UsageError(f'{self.folder} was begun with another {name}: {header["arguments"].get(name)}, not '
                                 f'{value}; say the same again to go on, or choose a new folder')
        self.per_shard = header['per_shard']
        self.done = {name: record for name, record in self.done.items() if self._is_whole(record)}

    def _is_whole(self, record: Dict[str, Any]) -> bool:
        path = os.path.join(self.folder, record['file'])
        return not record['samples'] or os.path.isfile(path) and os.path.getsize(path) == record['bytes']

    def start(self) -> None:
        """Begin the file, or begin it anew with what is whole; remove what was broken off."""
        os.makedirs(self.folder, exist_ok=True)
        for name in os.listdir(self.folder):
            if _BROKEN_OFF.fullmatch(name):
                os.remove(os.path.join(self.folder, name))
        lines = [{'arguments': self.arguments, 'per_shard': self.per_shard}, *self.done.values()]
        with _aside(self.folder, STATE_FILE) as file:
            file.write(''.join(json.dumps(line) + '\n' for line in lines).encode())

    def add(self, record: Dict[str, Any]) -> None:
        """Note a shard that is whole."""
        with open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')
        self.done[record['file']] = record


class Preparation:
    """One run of the command. The constructor finds what cannot work and writes nothing; :meth:`run` writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._check_folders()
        with refusing():
            self.splits = {split: self._open(split) for split in args.split}
            self._check_splits()
        first = self.splits[args.split[0]]
        self.classes = class_names(first)
        if self.classes is not None and not any(self.classes):  # of a folder without folders for classes
            self.classes = None
        self.state = State(args.dst, self._arguments())
        check_writable(args.dst)

    def _check_folders(self) -> None:
        args = self.args
        if not args.dataset and not os.path.exists(args.src):
            if args.src != DIGITS and not args.src.lower().startswith('hfds/'):
                raise UsageError(f'no data at {args.src}')
            args.dataset, args.src = args.src, ''
        if args.src and PurePath(os.path.realpath(args.dst)).is_relative_to(os.path.realpath(args.src)):
            raise UsageError(f'{args.dst} lies in {args.src}: choose a folder outside it')

    def _open(self, split: str) -> EncodedDataset:
        args = self.args
        dataset = create_dataset(
            args.dataset, args.src or None, split, class_map=args.class_map, download=args.dataset_download,
            input_key=args.input_key, target_key=args.target_key, trust_remote_code=args.dataset_trust_remote_code)
        if isinstance(dataset, IterableDataset):
            raise UsageError(f'{args.dataset} streams: images are taken in another order, which needs random access')
        return EncodedDataset(dataset.dataset if isinstance(dataset, ReadableDataset) else dataset)

    def _check_splits(self) -> None:
        """Refuse splits that timm has not found, or whose classes are numbered differently."""
        (first, dataset), *others = self.splits.items()
        try:
            for split, other in others:
                check_splits(dataset, other, split)
            if first != 'train':
                check_not_train(dataset, self.args.src, first, 'train')
        except ValueError as error:
            raise UsageError(f'{self.args.src} has not all of the splits {", ".join(self.splits)}: say which there are '
                             'with --split') from error
        for _, other in others:
            check_classes(dataset, other, sys.maxsize)

    def _arguments(self) -> Dict[str, Any]:
        """What must be the same to go on."""
        args = self.args
        names = ('short_side', 'quality', 'format', 'shard_size', 'seed', 'dataset', 'class_map', 'input_key',
                 'target_key')
        return {'source': os.path.realpath(args.src) if args.src else '',
                **{f'--{name.replace("_", "-")}': getattr(args, name) for name in names},
                '--split': args.split, 'number of images': [len(dataset) for dataset in self.splits.values()],
                'list of classes': self.classes}

    def run(self) -> None:
        """Write what is missing, and say what came of it."""
        for split in self.splits:
            if split not in self.state.per_shard:
                self.state.per_shard[split] = self._images_per_shard(split)
        try:
            self.state.start()
            self._write()
        except OSError as error:
            reason = ' '.join(str(error).split())
            raise UsageError(f'cannot write to {self.args.dst}: {reason}; once that is mended the same command goes on '
                             'with it') from error
        print(self._report())

    def _images_per_shard(self, split: str) -> int:
        wanted, num_images = self.args.shard_size, len(self.splits[split])
        if wanted and not wanted.endswith('MB'):
            return int(wanted)
        sample = np.random.default_rng(self.args.seed).permutation(num_images)[:SAMPLE]
        sizes = [len(item.data) for item in self._prepared(split, sample, {}) if item is not None]
        if not sizes:
            raise UsageError(f'none of {len(sample)} images of the {split} split can be read')
        per_shard = int((int(wanted[:-2]) * 1e6 if wanted else SHARD_BYTES) / np.mean(sizes))
        return max(1, per_shard if wanted else min(per_shard, -(-num_images // MIN_SHARDS)))

    def _prepared(self, split: str, images: np.ndarray, bad_images: Dict[int, Tuple[str, str]]
                  ) -> Generator[Optional[Prepared], None, None]:
        """The prepared images in their order; those that cannot be read are ``None``, and put into ``bad_images``."""
        args = self.args
        workers = min(args.workers, -(-len(images) // BATCH))
        dataset = PreparedDataset(self.splits[split], args.short_side, args.quality, workers)
        loader = WatchedLoader(dataset, max_bad_images=args.max_bad_images, worker_timeout=args.worker_timeout,
                               sampler=images, batch_size=BATCH, num_workers=workers, collate_fn=_collated,
                               worker_init_fn=_end_with_parent)
        loader.bad_images = bad_images
        try:
            yield from chain.from_iterable(loader)
        except (BadImagesError, WorkerError) as error:
            raise UsageError(f'{error}; the same command goes on with it') from error

    def _write(self) -> None:
        total = sum(map(len, self.splits.values()))
        shards = {split: plan_shards(split, len(dataset), self.state.per_shard[split], self.args.seed, self.args.format)
                  for split, dataset in self.splits.items()}
        done = sum(len(shard.images) for part in shards.values() for shard in part if shard.file in self.state.done)
        bad_images: Dict[str, Dict[int, Tuple[str, str]]] = {split: {} for split in self.splits}
        try:
            with tqdm(total=total, initial=done, unit=' images', disable=None) as bar, logging_redirect_tqdm():
                for split, part in shards.items():
                    self._write_split(part, bad_images[split], bar)
        finally:
            self._list_bad_images(bad_images)
        if self.args.format == 'wds':
            self._write_info(shards)

    def _write_split(self, shards: List[Shard], bad_images: Dict[int, Tuple[str, str]], bar: Any) -> None:
        done = [self.state.done[shard.file] for shard in shards if shard.file in self.state.done]
        bad_images.update((index, (name, reason)) for record in done for index, name, reason in record['bad_images'])
        missing = [shard for shard in shards if shard.file not in self.state.done]
        if not missing:
            return
        items = self._prepared(shards[0].split, np.concatenate([shard.images for shard in missing]), bad_images)
        with closing(items):
            for shard in missing:
                self.state.add(self._write_shard(shard, islice(items, len(shard.images)), bad_images, bar))

    def _write_shard(self, shard: Shard, items: Iterator[Optional[Prepared]], bad_images: Dict[int, Tuple[str, str]],
                     bar: Any) -> Dict[str, Any]:
        """Write one shard; what is noted of it."""
        written: List[Prepared] = []
        os.makedirs(os.path.dirname(os.path.join(self.args.dst, shard.file)), exist_ok=True)
        with _aside(self.args.dst, shard.file) as file:
            with _WRITERS[self.args.format](file, self.classes) as add:
                for position, item in enumerate(items, shard.first):
                    if item is not None:
                        self._check_target(item)
                        add(position, item)
                        written.append(item._replace(data=b''))
                    bar.update()
            size = file.tell()
        sources = [item.source_bytes for item in written]
        return {'file': shard.file, 'samples': len(written), 'bytes': size,
                'source_bytes': None if None in sources else sum(sources),  # type: ignore[arg-type]
                'kept': sum(item.kept for item in written),
                'bad_images': [[index, *bad_images[index]] for index in shard.images.tolist() if index in bad_images]}

    def _check_target(self, item: Prepared) -> None:
        if not isinstance(item.target, (int, np.integer)):
            raise UsageError(f'the label of image {item.name} is {str(item.target)[:50]!r}, not the index of a class: '
                             'only those can be written, one for each image')

    def _list_bad_images(self, bad_images: Dict[str, Dict[int, Tuple[str, str]]]) -> None:
        lines = [f'{name}\t{reason}\n' for part in bad_images.values() for _, (name, reason) in sorted(part.items())]
        if lines:
            with suppress(OSError), open(os.path.join(self.args.dst, BAD_FILE), 'w', encoding='utf-8') as file:
                file.writelines(lines)

    def _write_info(self, shards: Dict[str, List[Shard]]) -> None:
        """Describe the splits as timm's reader of tar shards reads it, the names of the classes beside them."""
        splits = {}
        for split, part in shards.items():
            counts = {shard.file: self.state.done[shard.file]['samples'] for shard in part
                      if self.state.done[shard.file]['samples']}
            splits[_file_name(split)] = {'name': _file_name(split), 'num_samples': sum(counts.values()),
                                         'filenames': list(counts), 'shard_lengths': list(counts.values())}
        with _aside(self.args.dst, INFO_FILE) as file:
            file.write((json.dumps({'splits': splits, 'class_names': self.classes}, indent=1) + '\n').encode())

    def _report(self) -> str:
        records = list(self.state.done.values())
        total, kept = (sum(record[name] for record in records) for name in ('samples', 'kept'))
        num_bad, after = sum(len(record['bad_images']) for record in records), sum(r['bytes'] for r in records)
        sources = [record['source_bytes'] for record in records]
        lines = [f'{self.args.dst} holds {total:,} images in {len(records):,} shards, {kept:,} of them as they were']
        if num_bad:
            lines.append(f'{num_bad:,} could not be read and are left out: {os.path.join(self.args.dst, BAD_FILE)}')
        if None in sources:
            lines.append(f'Bytes: {after / 1e6:,.1f} MB')
        else:
            lines.append(f'Bytes: {sum(sources) / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after '
                         f'({after / max(1, sum(sources)):.0%})')
        return '\n'.join([*lines, *self._measure(), f'Train on it with\n  {self._train_command()}'])

    def _measure(self) -> List[str]:
        """What decoding costs before and after, of a sample of the first split."""
        dataset = self.splits[self.args.split[0]]
        before: List[bytes] = []
        after: List[bytes] = []
        for index in np.random.default_rng(self.args.seed).permutation(len(dataset))[:SAMPLE].tolist():
            with suppress(Exception):  # one that cannot be read
                source, _ = dataset.encoded(index)
                after.append(shrink(source, self.args.short_side, self.args.quality)[0])
                before += [source] if isinstance(source, bytes) else []
        if not before:
            return []
        times = decode_seconds(before, after)
        return [f'Decoding on one core: {times[0] * 1e3:.2f} ms an image before, {times[1] * 1e3:.2f} ms after '
                f'({len(before)} images, PIL)']

    def _train_command(self) -> str:
        splits = [_file_name(split) for split in self.args.split]
        train = 'train' if 'train' in splits else splits[0]
        validation = next((split for split in splits if split != train), '')
        name = os.path.basename(os.path.abspath(self.args.dst))
        data = (['--data-dir', self.args.dst, '--dataset', f'wds/{name}'] if self.args.format == 'wds'
                else ['--dataset', f'hfds/{self.args.dst}'])
        classes = ['--num-classes', str(len(self.classes))] if self.classes else []
        return shlex.join(['mixsize', 'train', *data, '--train-split', train, '--val-split', validation, *classes])


if __name__ == '__main__':
    sys.exit(main())
