"""A run saved and resumed: tensors as safetensors, everything else as JSON, nothing pickled."""
import json
import os
import random
import shutil
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

MODEL_FILE = 'model.safetensors'
EMA_FILE = 'model_ema.safetensors'
STATE_FILE = 'state.safetensors'
STATE_JSON = 'state.json'
LAST = 'last'  # the checkpoint of a run's folder that the run continues from
RECOVERY = 'recovery'  # one from inside an epoch

_TENSOR, _TUPLE, _ITEMS, _DTYPE = '__tensor__', '__tuple__', '__items__', '__dtype__'


def save_checkpoint(folder: str, model: nn.Module, state: Any = None, ema: Optional[nn.Module] = None) -> None:
    """Write a checkpoint folder; one that stood there before is replaced when the new one is whole.

    Args:
        folder: The folder to make.
        model: Its weights and buffers are saved as ``model.safetensors``.
        state: What else training needs: nested dicts, lists and tuples of tensors and plain values.
        ema: Moving average of the model, saved as ``model_ema.safetensors``.
    """
    new = folder + '.new'
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    for module, name in ((model, MODEL_FILE), (ema, EMA_FILE)):
        if module is not None:
            save_file(_distinct(module.state_dict()), os.path.join(new, name), metadata={'format': 'pt'})
    if state is not None:
        tensors: Dict[str, torch.Tensor] = {}
        plain = _pack(state, tensors)
        save_file(tensors, os.path.join(new, STATE_FILE))
        with open(os.path.join(new, STATE_JSON), 'w', encoding='utf-8') as file:
            json.dump(plain, file)
    _replace(folder)


def copy_checkpoint(source: str, folder: str) -> None:
    """Keep a checkpoint under another name, sharing its files where the file system can: they are never written to."""
    def link(file: str, copied: str) -> None:
        try:
            os.link(file, copied)
        except OSError:
            shutil.copy2(file, copied)

    shutil.rmtree(folder + '.new', ignore_errors=True)
    shutil.copytree(source, folder + '.new', copy_function=link)
    _replace(folder)


def _replace(folder: str) -> None:
    """Put ``folder.new`` in the place of ``folder``; there is one that is whole at any time."""
    old = folder + '.old'
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(folder + '.new', folder)
    shutil.rmtree(old, ignore_errors=True)


def holds_checkpoint(folder: str) -> bool:
    """Whether a checkpoint was saved there."""
    return any(os.path.isfile(os.path.join(place, MODEL_FILE)) for place in (folder, folder + '.old'))


def run_folder(path: str) -> str:
    """The folder of the run that a path names: it, or the folder around one of its checkpoints."""
    return os.path.dirname(os.path.abspath(path)) if os.path.isfile(os.path.join(path, STATE_JSON)) else path


def newest_checkpoint(path: str) -> str:
    """The checkpoint that a path names: it, or the one that the run in this folder continues from."""
    if run_folder(path) != path:
        return path
    last, recovery = os.path.join(path, LAST), os.path.join(path, RECOVERY)
    return recovery if holds_checkpoint(recovery) and not holds_checkpoint(last) else last


def load_checkpoint(folder: str, model: nn.Module, ema: Optional[nn.Module] = None) -> Any:
    """Read a checkpoint folder into a model.

    Args:
        folder: What :func:`save_checkpoint` wrote.
        model: Gets the weights and buffers.
        ema: Gets those of the moving average; the model's, where none was saved.

    Returns:
        The ``state`` that was saved.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It cannot be read, or is of another model.
    """
    if not os.path.isdir(folder) and os.path.isdir(folder + '.old'):  # stopped between two renames
        folder += '.old'
    if not os.path.isfile(os.path.join(folder, MODEL_FILE)):
        raise FileNotFoundError(f'no checkpoint at {folder}')
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
        model.load_state_dict(weights)
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


class CheckpointHistory:
    """The checkpoints of the best epochs, as timm's ``CheckpointSaver`` keeps them: ``checkpoint-E`` beside ``last``.

    Args:
        folder: The run's folder.
        limit: Number of checkpoints to keep.
        entries: Epoch and metric of those that are kept, of a run that is resumed.
    """

    def __init__(self, folder: str, limit: int, entries: Sequence[Tuple[int, float]] = ()) -> None:
        self.folder = folder
        self.limit = limit
        self.entries = [(epoch, metric) for epoch, metric in entries if os.path.isdir(self._path(epoch))]

        self._removed: List[int] = []

    def rank(self, epoch: int, metric: float) -> None:
        """Give an epoch its place: a higher metric is better, and of equal ones the earlier epoch."""
        ranked = sorted([*self.entries, (epoch, metric)], key=lambda entry: (-entry[1], entry[0]))
        self.entries, without = ranked[:self.limit], ranked[self.limit:]
        self._removed = [other for other, _ in without if other != epoch]

    def keep(self, epoch: int) -> None:
        """Keep ``last`` as the checkpoint of an epoch if it has a place, and remove those that lost theirs."""
        if any(place == epoch for place, _ in self.entries):
            copy_checkpoint(os.path.join(self.folder, LAST), self._path(epoch))
        for other in self._removed:
            shutil.rmtree(self._path(other), ignore_errors=True)

    def _path(self, epoch: int) -> str:
        return os.path.join(self.folder, f'checkpoint-{epoch}')


def random_state() -> Dict[str, Any]:
    """State of the generators of Python, NumPy and torch on the CPU and the current CUDA device."""
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state()
    state = {'python': (version, list(keys), gauss),
             'numpy': (name, torch.from_numpy(np.asarray(words).astype(np.int64)), *rest),
             'torch': torch.get_rng_state()}
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Dict[str, Any]) -> None:
    """Restore what :func:`random_state` gave."""
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state['numpy']
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def _distinct(tensors: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Contiguous copies where two names share memory, which safetensors refuses."""
    seen: Dict[Tuple[str, int], str] = {}
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = (str(tensor.device), tensor.untyped_storage().data_ptr())
        result[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen[place] = name
    return result


def _pack(value: Any, tensors: Dict[str, torch.Tensor]) -> Any:
    """The value with its tensors moved to ``tensors``, in a form that JSON keeps exactly."""
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().clone(memory_format=torch.contiguous_format)
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
