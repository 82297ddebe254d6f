"""A folder in the layout of the Hugging Face hub: fetched, checked before it is used, and written whole."""
import hashlib
import json
import os
import re
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Sequence, Tuple

import timm
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from ._version import __version__
from .bn_stats import BN_STATS_FILE, STATISTICS
from .checkpoint import MODEL_FILE
from .errors import UsageError, refusing

CONFIG_FILE = 'config.json'
FILES = (CONFIG_FILE, MODEL_FILE, BN_STATS_FILE)  # what a model is loaded from
KEY = 'mixsize'  # what is ours in the configuration
LIBRARY: Dict[str, Any] = dict(library_name='mixsize-timm', library_version=__version__)  # what the hub is told
_PICKLES = ('.bin', '.ckpt', '.joblib', '.npy', '.pickle', '.pkl', '.pt', '.pth', '.tar')
_PICKLED_WEIGHTS = 'pytorch_model.bin'
_ELSEWHERE = ('file', 'hf_hub_filename', 'state_dict', 'custom_load')  # of timm's pretrained_cfg: other weights
_FLOATS = ('BF16', 'F16', 'F32', 'F64')
_DTYPES = (*_FLOATS, 'BOOL', 'I16', 'I32', 'I64', 'I8', 'U8')
_MAX_CONFIG = 32 * 2**20  # bytes
_MAX_NUMBER = 1_000_000  # of an argument of a model
_MAX_SIDE = 2048  # of an image, in pixels


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Say in one line what the hub, or the way to it, refuses."""
    try:
        yield
    except UsageError:
        raise
    except GatedRepoError as error:
        raise UsageError(f'{what}: access has to be asked for on its page') from error
    except RepositoryNotFoundError as error:
        raise UsageError(f'{what}: there is no such repository, or it is private: check the name, and the token of '
                         '"hf auth login" or HF_TOKEN') from error
    except RevisionNotFoundError as error:
        raise UsageError(f'{what}: it has no such revision') from error
    except Exception as error:  # of the client, or of one of the two libraries for HTTP that its versions use
        raise UsageError(f'{what}: {" ".join(str(error).split())[:300] or type(error).__name__}') from error


def fetch(name: str, files: Sequence[str] = FILES, *, unsafe_pickle: bool = False) -> str:
    """Fetch a model repository of the hub into the hub's cache.

    Args:
        name: ``org/name``, or ``org/name@revision``.
        files: The files that are wanted, where they are there; no other is fetched.
        unsafe_pickle: Fetch pickled weights where there are no others. They can run code when they are read.

    Returns:
        The folder.

    Raises:
        UsageError: It cannot be fetched, or its weights are pickled.
    """
    repo_id, _, revision = name.partition('@')
    wanted = [*files, _PICKLED_WEIGHTS] if unsafe_pickle else list(files)
    with hub_errors(f'cannot fetch {name} from the hub'):
        folder = snapshot_download(repo_id, revision=revision or None, allow_patterns=wanted, **LIBRARY)
        if not os.path.exists(os.path.join(folder, MODEL_FILE)) and not unsafe_pickle:
            _refuse_pickles(name, HfApi(**LIBRARY).list_repo_files(repo_id, revision=revision or None))
    return folder


def is_pickle(name: str) -> bool:
    """Whether a file of this name is read by unpickling, which can run code."""
    return name.lower().endswith(_PICKLES)


def _refuse_pickles(name: str, there: Sequence[str]) -> None:
    pickles = sorted(filter(is_pickle, there))
    if pickles:
        raise UsageError(f'{name} has pickled weights only ({pickles[0]}), which can run code when they are read: '
                         '--unsafe-pickle, or unsafe_pickle=True, takes them nevertheless')
    raise UsageError(f'{name} has no {MODEL_FILE}')


def check_folder(folder: str, *, unsafe_pickle: bool = False) -> None:
    """Check a folder before anything is read from it into memory.

    The configuration must be timm's and name no weights but those beside it. The weights must be a whole safetensors
    file whose tensors fit the model, which is built on the meta device for that; of a folder that this package wrote
    exactly, of another one in size; and theirs must be the checksum in the configuration, if it has one.

    Args:
        folder: The folder.
        unsafe_pickle: Accept pickled weights where there are no others, unchecked.

    Raises:
        UsageError: Something is wrong with it.
    """
    config = read_config(folder)
    path = os.path.join(folder, MODEL_FILE)
    if not os.path.isfile(path):
        pickled = os.path.isfile(os.path.join(folder, _PICKLED_WEIGHTS))
        if not (pickled and unsafe_pickle):
            _refuse_pickles(folder, os.listdir(folder))
        return
    tensors = read_header(path)
    ours = config.get(KEY) or {}
    with refusing(f'{folder}/{CONFIG_FILE} makes no model'), torch.device('meta'):
        model: Any = timm.create_model(f'local-dir:{folder}')
    _check_tensors(path, tensors, model, exactly=bool(ours))
    if ours and ours.get('sha256', '') != sha256(path):
        raise UsageError(f'{path} is not the file that {CONFIG_FILE} was written for: it was altered, fetch or export '
                         'it again')
    statistics = os.path.join(folder, BN_STATS_FILE)
    if os.path.isfile(statistics):
        _check_statistics(statistics, model)


def read_config(folder: str) -> Dict[str, Any]:
    """The configuration in a folder.

    Raises:
        UsageError: It is not one of a timm model, or names other weights than those beside it.
    """
    path = os.path.join(folder, CONFIG_FILE)
    try:
        if os.path.getsize(path) > _MAX_CONFIG:
            raise ValueError(f'it has over {_MAX_CONFIG / 2**20:.0f} MiB')
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
        ours = config.get(KEY) or {}
        args, pretrained_cfg = config.get('model_args') or {}, config.get('pretrained_cfg', config)
        if not all(isinstance(part, dict) for part in (args, pretrained_cfg, ours)):
            raise TypeError('its parts are no mappings')
        architecture = config['architecture']
        if not isinstance(architecture, str) or ':' in architecture or not timm.is_model(architecture):
            raise ValueError(f'timm {timm.__version__} has no model {architecture!r}')
    except (OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f'{path} is no configuration of a timm model: {" ".join(str(error).split())}') from error
    for name in _ELSEWHERE:
        if pretrained_cfg.get(name):
            raise UsageError(f'{path} names weights elsewhere ({name}): only those beside it are read')
    for name in ('input_size', 'test_input_size', 'min_input_size'):
        size = pretrained_cfg.get(name)
        if size is not None and not (isinstance(size, list) and len(size) == 3 and all(
                type(side) is int and 0 < side <= _MAX_SIDE for side in size)):
            raise UsageError(f'{path} has no image size in {name}: three whole numbers up to {_MAX_SIDE}')
    _check_numbers(path, args)
    return config


def write_config(folder: str, config: Dict[str, Any]) -> None:
    """Write a configuration into a folder."""
    with open(os.path.join(folder, CONFIG_FILE), 'w', encoding='utf-8') as file:
        file.write(json.dumps(config, indent=2) + '\n')


def _check_numbers(path: str, value: Any) -> None:
    """Refuse numbers that would build a model beyond any memory."""
    if isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(path, item)
    elif isinstance(value, (int, float)) and abs(value) > _MAX_NUMBER:
        raise UsageError(f'{path} has a model argument of {value:g}, which no model has')


def read_header(path: str) -> Dict[str, Tuple[Tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file, from its header alone.

    Raises:
        UsageError: The file is not whole, or not of this kind.
    """
    try:
        with safe_open(path, 'pt') as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f'{path} is truncated or altered: fetch or export it again '
                         f'({" ".join(str(error).split())})') from error


def _check_tensors(path: str, tensors: Dict[str, Tuple[Tuple[int, ...], str]], model: nn.Module, *,
                   exactly: bool) -> None:
    expected = model.state_dict()
    for name, (shape, dtype) in tensors.items():
        if dtype not in _DTYPES:
            raise UsageError(f'{path}: {name} is of the type {dtype}, which no weights are of')
        if exactly and (name not in expected or tuple(expected[name].shape) != shape):
            raise UsageError(f'{path} does not fit its configuration: {name} {list(shape)}')
        if exactly and expected[name].is_floating_point() != (dtype in _FLOATS):
            raise UsageError(f'{path}: {name} is of the type {dtype}, the model has {expected[name].dtype}')
    missing = sorted(expected.keys() - tensors.keys())
    if exactly and missing:
        raise UsageError(f'{path} does not fit its configuration: {missing[0]} is missing')
    needed = sum(tensor.numel() for tensor in expected.values())
    stored = sum(torch.Size(shape).numel() for shape, _ in tensors.values())
    if needed > 2 * stored:
        raise UsageError(f'{path} holds {stored} numbers, and its configuration makes a model of {needed}')


def _check_statistics(path: str, model: nn.Module) -> None:
    expected, by_size = model.state_dict(), defaultdict(set)
    for key, (shape, dtype) in read_header(path).items():
        size, _, name = key.partition('/')
        by_size[size].add(name)
        is_statistic = name.rpartition('.')[2] in STATISTICS and re.fullmatch(r'[1-9]\d{0,3}', size)
        if not is_statistic or name not in expected or expected[name].shape != shape or dtype not in _FLOATS:
            raise UsageError(f'{path} is of another model: {key[:100]} {list(shape)} {dtype}')
    if len(set(map(frozenset, by_size.values()))) > 1:
        raise UsageError(f'{path} has not all statistics of each size')


def sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def staged(folder: str, instead_of: Sequence[str] = ()) -> Iterator[str]:
    """A folder beside, whose files take their places in ``folder`` when all of them are whole.

    Args:
        folder: The folder; made where it is missing.
        instead_of: Files that they replace together: one of these that is not among them is removed.
    """
    new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            yield aside
            names = os.listdir(aside)
            for name in names:
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
            for name in set(instead_of) - set(names):
                if os.path.lexists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
    except BaseException:
        if new and not os.listdir(folder):
            os.rmdir(folder)
        raise
