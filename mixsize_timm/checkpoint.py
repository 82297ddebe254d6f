"""One checkpoint: a folder of safetensors and JSON with a manifest, written whole or not at all, nothing pickled."""
import errno
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Dict, List, Optional, Tuple, Union

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from .sharding import load_full_model_state

MODEL_FILE = 'model.safetensors'
EMA_FILE = 'model_ema.safetensors'
STATE_FILE = 'state.safetensors'
STATE_JSON = 'state.json'
MANIFEST_FILE = 'manifest.json'  # sizes and hashes of the others, and where training was
LAST = 'last'  # the checkpoint after the last finished epoch
RECOVERY = 'recovery-'  # begins the names of those from inside an epoch

_TENSOR, _TUPLE, _ITEMS, _DTYPE = '__tensor__', '__tuple__', '__items__', '__dtype__'
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PIECE = 1 << 20  # bytes written, read and hashed at once
_NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)


class SaveError(OSError):
    """A checkpoint cannot be written; the message is one line. Those that stood before are as they were."""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds, in host memory and shared with nothing: training may go on while it is written.

    Attributes:
        tensors: Files of tensors.
        state: What ``state.json`` holds; ``None`` for a checkpoint of weights alone.
        position: Finished epochs, and finished steps of the next one.
        steps: Optimizer steps since the run began, by which its checkpoints are older or newer.
    """
    tensors: Dict[str, Dict[str, torch.Tensor]] = field(repr=False)
    state: Optional[Any] = field(repr=False)
    position: Tuple[int, int]
    steps: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors; the JSON beside them is small."""
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())


def take_snapshot(model: Any, state: Any = None, ema: Any = None, position: Tuple[int, int] = (0, 0), steps: int = 0
                  ) -> Snapshot:
    """Copy what a checkpoint holds to host memory.

    Args:
        model: Module whose weights and buffers are saved as ``model.safetensors``, or its state dict.
        state: What else training needs: nested dicts, lists and tuples of tensors and plain values.
        ema: Moving average of the model, saved as ``model_ema.safetensors``.
        position: Finished epochs, and finished steps of the next one.
        steps: Optimizer steps since the run began.

    Raises:
        TypeError: ``state`` holds something else.
    """
    tensors = {name: {key: _on_host(tensor) for key, tensor in _state_dict(part).items()}
               for part, name in ((model, MODEL_FILE), (ema, EMA_FILE)) if part is not None}
    plain = None
    if state is not None:
        tensors[STATE_FILE] = {}
        plain = _pack(state, tensors[STATE_FILE])
    return Snapshot(tensors, plain, position, steps)


def write_snapshot(folder: str, snapshot: Snapshot, *, keep_previous: bool = False) -> None:
    """Write a checkpoint folder: aside, to the disk, read again, and only then under its name.

    It is written beside the steps of training, and leaves them their cores. It calls nothing for which torch starts
    threads: while a second Python thread has a pool of them, those of the first one do not wait actively for each other
    any more, and every step is slower. It copies no tensors, and holds Python's lock for no longer than it takes to
    hand a piece of a file to the system.

    Args:
        folder: The folder to make; one that stood there before is replaced.
        snapshot: What it holds.
        keep_previous: Keep the one that stood there before as ``folder.old``.

    Raises:
        SaveError: It cannot be written. What stood there before is as it was.
    """
    new = folder + '.new'
    try:
        _check_numbers(snapshot)
        _remove(new)
        os.makedirs(new)
        _check_space(new, snapshot.num_bytes)
        files = {}
        for name, tensors in snapshot.tensors.items():
            files[name] = write_flushed(os.path.join(new, name), *_safetensors(tensors))
        if snapshot.state is not None:
            files[STATE_JSON] = write_flushed(os.path.join(new, STATE_JSON), json.dumps(snapshot.state).encode())
        manifest = {'position': list(snapshot.position), 'steps': snapshot.steps, 'files': files}
        write_flushed(os.path.join(new, MANIFEST_FILE), (json.dumps(manifest, indent=2) + '\n').encode())
        check_whole(new)
        _flush_folder(new)
        _replace(folder, keep_previous)
    except (OSError, ValueError) as error:
        raise SaveError(f'cannot save {folder}: {_reason(error, new, snapshot.num_bytes)}') from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def copy_checkpoint(source: str, folder: str) -> None:
    """Keep a checkpoint under another name, sharing its files where the file system can: they are never written to.

    Raises:
        SaveError: It cannot be copied.
    """
    def link(file: str, copied: str) -> None:
        try:
            os.link(file, copied)
        except OSError:
            shutil.copy2(file, copied)

    try:
        _remove(folder + '.new')
        shutil.copytree(source, folder + '.new', copy_function=link)
        _replace(folder)
    except OSError as error:
        raise SaveError(f'cannot save {folder}: {error.strerror or error}') from error


def check_whole(folder: str) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is torn, truncated or altered; the message says where.
    """
    if not os.path.isfile(os.path.join(folder, MODEL_FILE)):
        raise FileNotFoundError(f'no checkpoint at {folder}')
    files = _manifest(folder).get('files')
    if not files:
        raise ValueError(f'the checkpoint {folder} is not whole: {MANIFEST_FILE} is missing or not readable')
    for name, expected in files.items():
        path = os.path.join(folder, name)
        try:
            if os.path.getsize(path) != expected['size']:
                raise ValueError(f'the checkpoint {folder} is not whole: {name} has {os.path.getsize(path)} of '
                                 f'{expected["size"]} bytes')
            if _sha256(path) != expected['sha256']:
                raise ValueError(f'the checkpoint {folder} is not whole: {name} was altered after it was saved')
        except OSError as error:
            raise ValueError(f'the checkpoint {folder} is not whole: {name}: {error.strerror}') from error


def holds_checkpoint(folder: str) -> bool:
    """Whether a checkpoint was saved there."""
    return any(os.path.isfile(os.path.join(place, MODEL_FILE)) for place in (folder, folder + '.old'))


def run_folder(path: str) -> str:
    """The folder of the run that a path names: it, or the folder around one of its checkpoints."""
    return os.path.dirname(os.path.abspath(path)) if os.path.isfile(os.path.join(path, STATE_JSON)) else path


def checkpoints_of(run: str) -> List[str]:
    """The checkpoints in a run's folder that training can go on from, the newest first; whole or not."""
    found = []
    for entry in os.scandir(run) if os.path.isdir(run) else ():
        kept = entry.name.endswith('.old') or not os.path.splitext(entry.name)[1]  # not what is half written
        if kept and os.path.isfile(os.path.join(entry.path, STATE_JSON)):
            found.append((age_of(entry.path), entry.name == LAST, entry.path))
    return [path for _, _, path in sorted(found, reverse=True)]


def newest_checkpoint(path: str) -> str:
    """The checkpoint that a path names: it, or the one that stands for the run in this folder."""
    if run_folder(path) != path:
        return path
    last = os.path.join(path, LAST)
    return last if holds_checkpoint(last) else next(iter(checkpoints_of(path)), last)


def position_of(folder: str) -> Tuple[int, int]:
    """Finished epochs of a checkpoint, and finished steps of the next one."""
    return age_of(folder)[1:]


def age_of(folder: str) -> Tuple[int, int, int]:
    """What checkpoints of a run are ordered by, the newest last: steps since the run began, and :func:`position_of`.

    One that does not say is beyond all others, so that it is looked at, and warned of, first.
    """
    manifest = _manifest(folder)
    try:
        epoch, step = manifest['position']
        return int(manifest['steps']), int(epoch), int(step)
    except (KeyError, TypeError, ValueError):
        return sys.maxsize, 0, 0


def load_checkpoint(folder: str, model: nn.Module, ema: Optional[nn.Module] = None) -> Any:
    """Read a checkpoint folder into a model, if it is whole.

    Args:
        folder: What :func:`write_snapshot` wrote.
        model: Gets the weights and buffers.
        ema: Gets those of the moving average; the model's, where none was saved.

    Returns:
        The ``state`` that was saved.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It is not whole, or is of another model.
    """
    if not os.path.isdir(folder) and os.path.isdir(folder + '.old'):  # stopped between two renames
        folder += '.old'
    check_whole(folder)
    try:
        weights = averaged = load_file(os.path.join(folder, MODEL_FILE))
        if ema is not None and os.path.isfile(os.path.join(folder, EMA_FILE)):
            averaged = load_file(os.path.join(folder, EMA_FILE))
        with open(os.path.join(folder, STATE_JSON), encoding='utf-8') as file:
            plain = json.load(file)
        state = _unpack(plain, load_file(os.path.join(folder, STATE_FILE)))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f'the checkpoint {folder} is not readable: {" ".join(str(error).split())}') from error
    try:
        load_full_model_state(model, weights)
        if ema is not None:
            ema.load_state_dict(averaged)
    except RuntimeError as error:
        raise ValueError(f'the checkpoint {folder} is of another model than {type(model).__name__} with these '
                         'arguments: resume with the arguments it was started with') from error
    return state


def read_state(folder: str, name: str) -> Any:
    """One entry, without tensors, of the state that a checkpoint was saved with; ``None`` where there is none."""
    try:
        with open(os.path.join(folder, STATE_JSON), encoding='utf-8') as file:
            return _unpack(dict(json.load(file)[_ITEMS]).get(name), {})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _replace(folder: str, keep_previous: bool = False) -> None:
    """Put ``folder.new`` in the place of ``folder``; there is one that is whole at any time."""
    old = folder + '.old'
    if os.path.isdir(folder):
        _remove(old)
        os.rename(folder, old)
    os.rename(folder + '.new', folder)
    if not keep_previous:
        shutil.rmtree(old, ignore_errors=True)
    _flush_folder(os.path.dirname(os.path.abspath(folder)))


def _remove(folder: str) -> None:
    if os.path.lexists(folder):
        shutil.rmtree(folder)


def write_flushed(path: str, *content: Union[bytes, memoryview]) -> Dict[str, Any]:
    """Write a file, to the disk, from where it is read the next time; what a manifest says of it."""
    digest = hashlib.sha256()
    with open(path, 'wb') as file:
        for part in content:
            for start in range(0, len(part), _PIECE):
                piece = memoryview(part)[start:start + _PIECE]
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, 'posix_fadvise'):  # else reading again would compare the system's copy in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return {'size': sum(map(len, content)), 'sha256': digest.hexdigest()}


def _safetensors(tensors: Dict[str, torch.Tensor]) -> List[Union[bytes, memoryview]]:
    """A file of tensors in parts: its header, and the memory of each.

    The library's own function copies all of them into one, and holds Python's lock while it does.
    """
    header: Dict[str, Any] = {'__metadata__': {'format': 'pt'}}
    parts: List[Union[bytes, memoryview]] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):  # so that all is aligned
        parts.append(tensor.flatten().view(torch.uint8).numpy().data)
        start, end = end, end + len(parts[-1])
        header[name] = {'dtype': _type_name(tensor.dtype), 'shape': list(tensor.shape), 'data_offsets': [start, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    return [len(text).to_bytes(8, 'little') + text, *parts]


@cache
def _type_name(dtype: torch.dtype) -> str:
    """What safetensors calls a type."""
    return json.loads(to_bytes({'': torch.empty(0, dtype=dtype)})[8:])['']['dtype']


def _flush_folder(path: str) -> None:
    """Bring a folder's names to the disk, where the system can."""
    if os.name == 'posix':
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_numbers(snapshot: Snapshot) -> None:
    for name, tensor in snapshot.tensors.get(MODEL_FILE, {}).items():
        if tensor.is_floating_point() and _holds_nan(tensor):  # of infinities there may be some, as in masks
            raise ValueError(f'{name} holds what is not a number')


def _holds_nan(tensor: torch.Tensor) -> bool:
    if tensor.dtype in _NUMPY_FLOATS:
        return bool(np.isnan(tensor.numpy()).any())
    return any(bool(part.isnan().any()) for part in tensor.flatten().split(1 << 14))  # too few to start threads for


def _check_space(folder: str, needed: int) -> None:
    if shutil.disk_usage(folder).free < needed:  # before the rest of the disk is filled too
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _reason(error: Exception, folder: str, needed: int) -> str:
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return str(getattr(error, 'strerror', None) or error)
    shutil.rmtree(folder, ignore_errors=True)
    place = os.path.dirname(os.path.abspath(folder))
    missing = needed - shutil.disk_usage(place).free
    return f'{error.strerror}: it has {needed:,} bytes' + (f', {missing:,} bytes are missing' if missing > 0 else '')


def _manifest(folder: str) -> Dict[str, Any]:
    try:
        with open(os.path.join(folder, MANIFEST_FILE), encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sha256(path: str) -> str:
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while part := file.read(_PIECE):
            digest.update(part)
        return digest.hexdigest()


def _state_dict(part: Any) -> Dict[str, torch.Tensor]:
    return part.state_dict() if isinstance(part, nn.Module) else part


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to('cpu', copy=True, memory_format=torch.contiguous_format)


def _pack(value: Any, tensors: Dict[str, torch.Tensor]) -> Any:
    """The value with copies of its tensors in ``tensors``, in a form that JSON keeps exactly."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = _on_host(value)
        return {_TENSOR: key}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).split('.')[-1]}
    if isinstance(value, tuple):
        return {_TUPLE: [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, dict):
        return {_ITEMS: [[key, _pack(item, tensors)] for key, item in value.items()]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f'cannot save a {type(value).__name__} in a checkpoint')


def _unpack(value: Any, tensors: Dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _DTYPE in value:
        return getattr(torch, value[_DTYPE])
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    return {key: _unpack(item, tensors) for key, item in value[_ITEMS]}
