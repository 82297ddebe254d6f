"""Where streamed images come from: shards of records, read from any record on and never decoded here."""
import json
import logging
import os
import re
import tarfile
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, Generator, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import fsspec
import numpy as np
from timm.data.readers.class_map import load_class_map, remap_target
from timm.data.readers.targets import (
    check_target_format,
    get_field,
    has_field,
    multi_field_class_to_idx,
    multi_field_target,
    parse_target_keys,
)

from .workers import WorkerError

_logger = logging.getLogger(__name__)

IMAGE_KEYS = 'jpg;jpeg;png;webp'  # endings of a tar's images, timm's and one more
_INFO_FILES = ('_info.json', 'info.json')
_MEMBER = re.compile(r'((?:.*/)?[^/.]+)\.([^/]*)')  # WebDataset's: the key ends at the first dot of the file's name
_BLOCK = 1 << 20  # bytes of a tar that are read at once


At = Callable[[int], ContextManager[None]]


def nowhere(index: int) -> ContextManager[None]:
    return nullcontext()


class Record(NamedTuple):
    """An image as it is stored, and what belongs to it."""
    image: Any  # encoded bytes, or a PIL image or array where the source has no other; None where it has none
    target: Any  # None where it is to be left out
    name: str


class Targets:
    """Takes the target out of a record's fields, and renames classes, as timm's readers do.

    Args:
        key: Field of the target, a path with slashes into nested ones; several with commas are binary fields, one a
            class.
        target_format: timm's ``indices`` or ``multihot``.
        class_map: timm's file or dictionary of class names or indices.
        classes: Name -> index as the source numbers them, where it tells.
    """

    def __init__(self, key: Optional[str], target_format: Optional[str] = None, class_map: Any = None,
                 classes: Optional[Dict[str, int]] = None) -> None:
        self.key = key
        self.keys = parse_target_keys(key)
        self.dense = check_target_format(target_format, self.keys) == 'multihot'
        own = multi_field_class_to_idx(self.keys) if self.keys else dict(classes or {})
        self.names = {index: name for name, index in own.items()}
        self.remaps = bool(class_map)
        self.class_to_idx = load_class_map(class_map) if class_map else own

    def __call__(self, fields: Any) -> Any:
        """The target of a record, or ``None`` for a negative one, which timm leaves out.

        Raises:
            ValueError: A field is missing.
        """
        missing = [key for key in self.keys or (str(self.key),) if not has_field(fields, key)]
        if missing:
            raise ValueError(f'no field {missing[0]!r} among {", ".join(sorted(map(str, fields)))}: check --target-key')
        target = multi_field_target(fields, self.keys) if self.keys else get_field(fields, str(self.key))
        if isinstance(target, (str, bytes)):
            target = int(target)
        if isinstance(target, int) and target < 0:
            return None
        return remap_target(target, self.class_to_idx, self.names, dense=self.dense) if self.remaps else target


class Shards(ABC):
    """Shards of records.

    A record has a number for the whole source, which its index is made of: see :meth:`index` and :meth:`name`.

    Args:
        names: Name of each shard.
        lengths: Records of each, where all are known.
        num_images: Images of an epoch; by default all there are.
        targets: Takes targets out of records.

    Raises:
        ValueError: There are no shards, or nothing tells the number of images.
    """
    divides_itself = False  # whether it gives each data worker of each process records of its own

    def __init__(self, names: Sequence[str], lengths: Optional[Sequence[int]], num_images: Optional[int],
                 targets: Targets) -> None:
        if not len(names):
            raise ValueError('there are no shards')
        self.names = list(names)
        self.lengths = np.asarray(lengths, dtype=np.int64) if lengths is not None else None
        if self.lengths is not None and not num_images:
            num_images = int(self.lengths.sum())
        if not num_images:
            raise ValueError('the number of images is not known: give it with --train-num-samples, or as |N behind the '
                             'files of a split')
        self.num_images = num_images
        self.targets = targets

    @property
    def class_to_idx(self) -> Dict[str, int]:
        """Class names, where they are known."""
        return self.targets.class_to_idx

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 - most sources have nothing to be told
        """Tell the epoch that is read next, for sources that shuffle by themselves."""

    def index(self, shard: int, number: int) -> int:
        """Index of a record among all."""
        return shard << 32 | number

    def name(self, index: int) -> str:
        """Words for a record, given its index."""
        return f'number {index & 0xFFFFFFFF} of shard {self.names[index >> 32]}'

    def report(self, index: int, name: str, reason: str) -> None:
        """Warn of an image that cannot be read."""
        _logger.warning('Cannot read image %s, another one takes its place: %s', name, reason)

    def records(self, shard: int, first: int = 0, last: Optional[int] = None, at: At = nowhere
                ) -> Generator[Tuple[int, Record], None, int]:
        """Numbers and records of a shard, from one on and up to another, which is not among them.

        A remote shard that breaks off is opened once again, and read on from where it broke.

        Args:
            shard: The shard.
            first: Number of the first record.
            last: Number after that of the last one; by default all are read.
            at: Told the index of the record that is waited for.

        Returns:
            As a generator does: the number of records in the shard, where it was read to its end.

        Raises:
            WorkerError: The shard cannot be opened or read, or is shorter than it should be; one line.
        """
        tries = 2 if '://' in self.names[shard] else 1
        while True:
            end = 0
            try:
                reading = self._read(shard, first)
                while last is None or first < last:
                    with at(self.index(shard, end)):
                        read = next(reading, None)
                    if read is None:
                        break
                    end = read[0] + 1
                    if read[0] >= first:
                        first = end
                        yield read
                if last is not None and first < last:
                    raise ValueError(f'it ends after {end} records, where {last} were expected: it is cut off, or '
                                     'the lengths told for the shards are not right')
                return end
            except Exception as error:  # of any storage and any format
                tries -= 1
                reason = ' '.join(str(error).split()) or type(error).__name__
                if not tries:
                    raise WorkerError(f'shard {self.names[shard]} cannot be read: {reason}') from error
                _logger.warning('Shard %s is read once again: %s', self.names[shard], reason)

    @abstractmethod
    def _read(self, shard: int, first: int) -> Iterator[Tuple[int, Record]]:
        """Numbers and records of a shard; those before ``first`` may be left out, or be without content."""


class TarShards(Shards):
    """Tar files in WebDataset's layout, local or at a URL: consecutive files of one key are a record.

    Args:
        paths: Paths or URLs, anything that fsspec opens.
        lengths: Records of each, where known.
        num_images: Images of an epoch; by default all there are.
        targets: Takes the target out of a record's ``.json``; with the key ``cls`` out of the file of that ending.
        input_key: Endings of image files, separated by semicolons, the first that is there counts.
    """

    def __init__(self, paths: Sequence[str], lengths: Optional[Sequence[int]], num_images: Optional[int],
                 targets: Targets, input_key: str = IMAGE_KEYS) -> None:
        missing = [path for path in paths if '://' not in path and not os.path.exists(path)]
        if missing:
            raise FileNotFoundError(f'shard {missing[0]} does not exist, {len(missing)} of {len(paths)} do not: check '
                                    '--data-dir and the split')
        super().__init__(paths, lengths, num_images, targets)
        self.image_keys = input_key.lower().split(';')
        self.label = 'cls' if targets.key == 'cls' else 'json'

    def _read(self, shard: int, first: int) -> Iterator[Tuple[int, Record]]:
        wanted = {*self.image_keys, self.label}
        number, key = -1, None
        files: Dict[str, bytes] = {}
        # in stream mode, so that a URL is read from its beginning to its end and nothing is kept
        with fsspec.open(self.names[shard], 'rb') as file, \
                tarfile.open(fileobj=file, mode='r|*', bufsize=_BLOCK) as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # type: ignore[attr-defined]  # else the headers of all files stay
                match = _MEMBER.fullmatch(member.name)
                if match is None or not member.isfile():
                    continue
                if match[1] != key:
                    if key is not None:
                        yield number, self._record(key, files, number >= first)
                    number, key, files = number + 1, match[1], {}
                ending = match[2].lower()
                if number >= first and ending in wanted:
                    content = tar.extractfile(member)
                    files[ending] = content.read() if content is not None else b''
            if key is not None:
                yield number, self._record(key, files, number >= first)

    def _record(self, key: str, files: Dict[str, bytes], wanted: bool) -> Record:
        if not wanted:
            return Record(None, None, key)
        if self.label not in files:
            raise ValueError(f'record {key!r} has no .{self.label} file: check --target-key')
        fields = files if self.label == 'cls' else json.loads(files['json'])
        try:
            target = self.targets(fields)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f'the target of record {key!r}: {error}') from error
        return Record(next((files[k] for k in self.image_keys if k in files), None), target, key)


class ParquetShards(Shards):
    """Parquet files in the layout of Hugging Face: a column of images ``{bytes, path}``, and one of labels.

    Args:
        paths: Paths or URLs, anything that fsspec opens.
        num_images: Images of an epoch; by default all there are.
        input_key: Column of the images.
        target_key: Column of the target, as for :class:`Targets`.
        **kwargs: The other arguments of :class:`Targets`.

    Raises:
        ValueError: A file cannot be read, or has no such column.
    """

    def __init__(self, paths: Sequence[str], num_images: Optional[int], input_key: str = 'image',
                 target_key: str = 'label', **kwargs: Any) -> None:
        self._parquet = _import_parquet()
        lengths: List[int] = []
        schema: Any = None
        for path in paths:
            try:
                with fsspec.open(path, 'rb') as file:
                    metadata = self._parquet.read_metadata(file)
            except Exception as error:  # of any storage
                reason = ' '.join(str(error).split()) or type(error).__name__
                raise ValueError(f'shard {path} cannot be read: {reason}') from error
            lengths.append(metadata.num_rows)
            schema = schema or metadata.schema.to_arrow_schema()
        self.columns = list(dict.fromkeys([input_key, *(
            key if schema is None or key in schema.names else key.split('/')[0]
            for key in parse_target_keys(target_key) or (target_key,))]))
        missing = [name for name in self.columns if schema is not None and name not in schema.names]
        if missing:
            raise ValueError(f'{paths[0]} has no column {missing[0]!r}, but {", ".join(schema.names)}: check '
                             '--input-key and --target-key')
        self.input_key = input_key
        classes = _class_names(schema, target_key) if schema is not None else {}
        super().__init__(paths, lengths, num_images, Targets(target_key, classes=classes, **kwargs))

    def _read(self, shard: int, first: int) -> Iterator[Tuple[int, Record]]:
        with fsspec.open(self.names[shard], 'rb') as file:
            parquet = self._parquet.ParquetFile(file)
            number = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                if number + rows <= first:  # not read
                    number += rows
                    continue
                for batch in parquet.iter_batches(64, row_groups=[group], columns=self.columns, use_threads=False):
                    for row in batch.slice(max(0, first - number)).to_pylist():
                        row_number = max(number, first)
                        yield row_number, self._record(row, row_number)
                        first = row_number + 1
                    number += len(batch)

    def _record(self, row: Dict[str, Any], number: int) -> Record:
        image = row[self.input_key]
        path = image.get('path') if isinstance(image, dict) else None
        return Record(encoded(image), self.targets(row), path or f'row {number}')


class HuggingFaceShards(Shards):
    """The shards of a Hugging Face data set that streams; how many records each has is not known.

    Args:
        reader: timm's reader of it, ``ReaderHfids``.
    """

    def __init__(self, reader: Any) -> None:
        import datasets

        if reader.download:
            stream = reader.builder.as_dataset(split=reader.split).to_iterable_dataset()
        else:
            stream = reader.builder.as_streaming_dataset(split=reader.split)
        if isinstance((stream.features or {}).get(reader.input_key), datasets.Image):
            stream = stream.cast_column(reader.input_key, datasets.Image(decode=False))
        self.stream = stream
        self.input_key = reader.input_key
        targets = Targets(reader.target_key)
        targets.dense, targets.remaps = reader.dense_target, reader.remap_class
        targets.class_to_idx, targets.names = reader.class_to_idx, reader._source_names
        names = [f'{number} of {reader.name}' for number in range(stream.num_shards)]
        super().__init__(names, None, reader.num_samples, targets)

    def _read(self, shard: int, first: int) -> Iterator[Tuple[int, Record]]:
        # by batches of one, since an iteration by rows divides the shards among torch's workers once more
        rows = self.stream.shard(num_shards=len(self.names), index=shard).iter(batch_size=1)
        for number, row in enumerate(rows):
            fields = {name: values[0] for name, values in row.items()}
            if number < first:
                yield number, Record(None, None, '')
                continue
            image = fields[self.input_key]
            path = image.get('path') if isinstance(image, dict) else None
            yield number, Record(encoded(image), self.targets(fields), path or f'row {number}')


class IterableShards(Shards):
    """Any iterable data set of torch's as one shard; it divides itself among workers and processes, as timm's do.

    Args:
        dataset: Gives images, encoded or not, and targets.
        num_images: Images of an epoch, over all processes.
    """
    divides_itself = True

    def __init__(self, dataset: Any, num_images: int) -> None:
        reader: Any = getattr(dataset, 'reader', None)
        self.dataset = dataset
        targets = Targets(None)
        targets.class_to_idx = getattr(reader, 'class_to_idx', None) or {}
        super().__init__([type(dataset).__name__], None, num_images, targets)

    def set_epoch(self, epoch: int) -> None:  # noqa: B027 - most sources have nothing to be told
        if hasattr(self.dataset, 'set_epoch'):
            self.dataset.set_epoch(epoch)

    def _read(self, shard: int, first: int) -> Iterator[Tuple[int, Record]]:
        for number, (image, target) in enumerate(self.dataset):
            yield number, Record(image, target, f'number {number}')


def encoded(image: Any) -> Any:
    """What Hugging Face has for an image: its bytes, those of its file where only a path is stored, or itself."""
    if not isinstance(image, dict):
        return image
    if image.get('bytes') is None and image.get('path'):
        with fsspec.open(image['path'], 'rb') as file:
            return file.read()
    return image.get('bytes')


def tar_shards(root: str, split: str, num_images: Optional[int] = None, *, class_map: Any = None,
               input_key: Optional[str] = None, target_key: Optional[str] = None,
               target_format: Optional[str] = None) -> TarShards:
    """The tar shards of a split as timm's ``wds/`` names them.

    Args:
        root: Folder or URL, with an ``_info.json`` or ``info.json`` where there is one.
        split: A split of the info file; or file names with braces, ``train-{000..127}.tar``, several of them with
            ``::`` between, with ``|N`` at the end for N images.
        num_images: Images of an epoch; by default those of the info file or the split.
        class_map: As for :class:`Targets`.
        input_key: As for :class:`TarShards`.
        target_key: As for :class:`Targets`; by default the info file's ``alt_label``, else ``cls``.
        target_format: As for :class:`Targets`.

    Raises:
        FileNotFoundError: A local shard does not exist.
        ValueError: There is no such split, or nothing tells the number of images.
    """
    info = _read_info(root)
    splits: Dict[str, Any] = info.get('splits', {})
    known = {name: length for part in splits.values()
             for name, length in zip(part['filenames'], part.get('shard_lengths', ()))}
    label = None
    if 'tar' in split or '..' in split:  # as timm tells them apart
        pattern, _, number = split.partition('|')
        files = [file for part in pattern.split('::') for file in expand_braces(part)]
        num_images = num_images or (int(number) if number else None)
    elif split in splits:
        files, label = list(splits[split]['filenames']), splits[split].get('alt_label')
        num_images = num_images or splits[split].get('num_samples')
    else:
        there = f'splits {", ".join(splits)}' if splits else f'no {" or ".join(_INFO_FILES)} with splits'
        raise ValueError(f'no split {split!r} in {root or os.curdir!r}, there is {there}: check --data-dir, name a '
                         'split, or the files as in "train-{000..127}.tar|N" for N images')
    lengths = [known[file] for file in files] if all(file in known for file in files) else None
    key = target_key or label or 'cls'
    names = info.get('class_names') or () if key == 'cls' else ()  # as `mixsize prepare` writes them
    targets = Targets(key, target_format, class_map, {name: number for number, name in enumerate(names)})
    return TarShards([os.path.join(root, file) for file in files], lengths, num_images, targets,
                     input_key or IMAGE_KEYS)


def parquet_shards(root: str, split: str, num_images: Optional[int] = None, *, input_key: Optional[str] = None,
                   target_key: Optional[str] = None, **kwargs: Any) -> ParquetShards:
    """The Parquet shards of a split, named as Hugging Face names them: ``SPLIT-*.parquet``, ``data/`` before it or not.

    Args:
        root: Folder or URL.
        split: Name of the split; or file names with braces, as for :func:`tar_shards`.
        num_images: Images of an epoch; by default those of the files.
        input_key: Column of the images, by default ``image``.
        target_key: Column of the target, by default ``label``.
        **kwargs: The other arguments of :class:`Targets`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file cannot be read.
    """
    if split.endswith('.parquet'):
        paths = [os.path.join(root, file) for part in split.split('::') for file in expand_braces(part)]
    else:
        system, folder = fsspec.core.url_to_fs(root)
        patterns = (f'{split}-*.parquet', f'{split}.parquet', f'{split}/*.parquet')
        found = (sorted(system.glob(f'{folder.rstrip("/")}/{place}{pattern}'))
                 for place in ('', 'data/') for pattern in patterns)
        paths = [system.unstrip_protocol(path) if '://' in root else path for path in next(filter(None, found), [])]
        if not paths:
            raise FileNotFoundError(f'no {split}-*.parquet in {root or os.curdir!r}: check --data-dir and the split')
    return ParquetShards(paths, num_images, input_key or 'image', target_key or 'label', **kwargs)


def expand_braces(pattern: str) -> List[str]:
    """Names from a pattern as the shell expands it: ``a-{08..10}`` is a-08, a-09, a-10, and ``{a,b}`` is a and b."""
    match = re.search(r'\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}', pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    parts = words.split(',') if words else [
        f'{number:0{len(first) if first[0] == "0" else 0}d}' for number in range(int(first), int(last) + 1)]
    return [pattern[:match.start()] + part + rest for part in parts for rest in expand_braces(pattern[match.end():])]


def _read_info(root: str) -> Dict[str, Any]:
    for name in _INFO_FILES:
        try:
            with fsspec.open(os.path.join(root, name), 'rb') as file:
                return json.load(file)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise ValueError(f'cannot read {os.path.join(root, name)}: {error}') from error
    return {}


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError('Parquet shards need pyarrow: pip install pyarrow') from error
    return pyarrow.parquet


def _class_names(schema: Any, target_key: str) -> Dict[str, int]:
    """Class name -> index from what Hugging Face's library wrote beside the columns."""
    try:
        features = json.loads((schema.metadata or {})[b'huggingface'])['info']['features']
        return {name: index for index, name in enumerate(features[target_key]['names'])}
    except (KeyError, TypeError, ValueError):  # not written by it, or not a class label
        return {}
