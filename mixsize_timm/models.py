"""Models: made from arguments, and loaded from whatever holds a trained one, ready for an image size."""
import argparse
import difflib
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model
from timm.models import load_state_dict, parse_model_name
from torch import nn

from . import architectures  # noqa: F401 - registers them
from .args import ARGS_FILE, parse_args, read_yaml
from .bn_stats import BN_STATS_FILE, BatchNormStats, input_size, model_at, set_input_size
from .calibration import calibrated_layers
from .checkpoint import EMA_FILE, MODEL_FILE, STATE_JSON, newest_checkpoint
from .errors import UsageError, refusing
from .layout import CONFIG_FILE, KEY, check_folder, fetch, read_config

_HUB = ('hf-hub:', 'hf_hub:')


def create_model(args: argparse.Namespace) -> nn.Module:
    """timm's model; ``args.num_classes`` is set to its number of classes."""
    if ':' not in args.model and not timm.is_model(args.model):
        raise UsageError(_no_model(args.model))
    fresh = not args.resume  # a resumed run brings its own weights
    for name in ('pretrained_path', 'initial_checkpoint'):
        if fresh and getattr(args, name) and not os.path.exists(getattr(args, name)):
            raise UsageError(f'no weights at {getattr(args, name)}: check --{name.replace("_", "-")}')
    if fresh and args.pretrained:
        check_source(args.model, unsafe_pickle=args.unsafe_pickle)
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else {}
    overlay.update(args.pretrained_cfg_overlay)
    with refusing(f'cannot make {args.model}'):
        model: Any = timm.create_model(
            args.model, pretrained=fresh and bool(args.pretrained or args.pretrained_path),
            in_chans=args.in_chans or (args.input_size or [3])[0],
            num_classes=args.num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block, global_pool=args.gp, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps,
            scriptable=args.torchscript, checkpoint_path=args.initial_checkpoint if fresh else '',
            pretrained_cfg_overlay=overlay or None, **args.model_kwargs)
        _check_classifier(model)
        _init_head(args, model)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    args.num_classes = model.num_classes
    return model


def check_source(name: str, *, unsafe_pickle: bool = False) -> None:
    """Check the weights that timm is about to load, where they are named as a repository of the hub or a folder.

    Args:
        name: Name as timm has them.
        unsafe_pickle: As in :func:`find_checkpoint`.

    Raises:
        UsageError: They are not to be trusted.
    """
    if ':' in name:
        with refusing():
            check_folder(_hub_folder(name, unsafe_pickle), unsafe_pickle=unsafe_pickle)


def _no_model(name: str) -> str:
    close = difflib.get_close_matches(name.split('.')[0], timm.list_models(), 3)
    return f'timm has no model {name!r}' + (
        f': did you mean {" or ".join(close)}?' if close else ': timm.list_models() names them')


@torch.no_grad()
def _init_head(args: argparse.Namespace, model: Any) -> None:
    if args.head_init_scale is None and args.head_init_bias is None:
        return
    heads = model.get_classifier()
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        if getattr(head, 'weight', None) is None or getattr(head, 'bias', None) is None:
            raise ValueError('--head-init-scale and --head-init-bias need a classifier with a weight and a bias')
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            nn.init.constant_(head.bias, args.head_init_bias)


@dataclass
class Checkpoint:
    """Where a trained model is, and how it is made.

    Attributes:
        name: As the user named it.
        weights: File of the weights; empty where timm finds them.
        folder: Folder that statistics for other sizes are beside the weights in; empty where there is none.
        run: Folder with the records of the run, if it is a run's.
        args: Arguments of the run that trained it, if it is a run's.
        model_args: Arguments of ``timm.create_model``; for a run's those beside its own.
        use_ema: Whether the moving average is taken where there is one.
    """
    name: str
    weights: str = ''
    folder: str = ''
    run: str = ''
    args: Optional[argparse.Namespace] = None
    model_args: Optional[Dict[str, Any]] = None
    use_ema: bool = True

    @property
    def hub(self) -> bool:
        """Whether it is a folder in the layout of the hub."""
        return bool(self.folder) and not self.weights

    @property
    def published(self) -> Dict[str, Any]:
        """What ``mixsize hub export`` says of it; empty where that did not write it."""
        return read_config(self.folder).get(KEY) or {} if self.hub else {}

    def create(self) -> nn.Module:
        """The model with its weights and its own statistics, in evaluation mode on the CPU."""
        with refusing(f'cannot load {self.name}'):
            if self.args is not None:
                return self._of_run(self.args).eval()
            options = dict(self.model_args or {})
            if not self.weights:
                return timm.create_model(pretrained=True, **options).eval()
            state = load_state_dict(self.weights, use_ema=self.use_ema)
            model: Any = timm.create_model(**options)
            _check_classifier(model)
            classes = _num_classes(model, state)
            if classes != model.num_classes and 'num_classes' not in options:
                model = timm.create_model(num_classes=classes, **options)
            model.load_state_dict(state)
            return model.eval()

    def statistics(self) -> Optional[BatchNormStats]:
        """The statistics kept beside the weights, if there are any."""
        with refusing(f'cannot load {self.name}'):
            path = os.path.join(self.folder, BN_STATS_FILE)
            return BatchNormStats.load(path) if self.folder and os.path.exists(path) else None

    @property
    def has_mixed_statistics(self) -> bool:
        """Whether the weights were saved with the statistics of a training at mixed sizes.

        Those that training goes on from were; those of the best epoch were calibrated, where its validation was.
        """
        if self.args is None or self.args.mixsize == 'off':
            return False
        return not self.args.calibrate_val or os.path.exists(os.path.join(self.folder, STATE_JSON))

    def _of_run(self, args: argparse.Namespace) -> nn.Module:
        options = self.model_args or {}
        fixed = sorted({'num_classes', 'in_chans', 'global_pool'} & set(options))
        if fixed:
            raise UsageError(f'{self.name} is a run, whose arguments say {fixed[0]}')
        args.model_kwargs = {**args.model_kwargs, **options}
        model: Any = create_model(args)
        if args.split_bn:
            model = convert_splitbn_model(model, max(args.aug_splits, 2))
        model.load_state_dict(load_state_dict(self.weights, use_ema=self.use_ema))
        # what the run validated with, where timm's transforms look for it
        model.pretrained_cfg.update(resolve_data_config(vars(args), model=model))
        model.pretrained_cfg.update(crop_mode='center', test_input_size=None, test_crop_pct=None)
        return model


def find_checkpoint(
        name: str,
        *,
        model: str = '',
        use_ema: bool = True,
        unsafe_pickle: bool = False,
        **model_args: Any,
) -> Checkpoint:
    """Find out what a name stands for.

    Args:
        name: A run's folder (its last checkpoint) or a checkpoint in it; a folder in the layout of the Hugging Face
            hub; a ``.safetensors`` or timm ``.pth`` file; ``hf-hub:...`` or ``local-dir:...``; or a timm model name,
            whose trained weights are meant.
        model: timm model that a file's weights are of; read from the run's ``args.yaml`` beside it if it is left out.
        use_ema: Take the moving average of the weights where there is one.
        unsafe_pickle: Take pickled weights of a repository or folder in hub layout that has no others. They can run
            code when they are read.
        **model_args: Further arguments of ``timm.create_model``.

    Raises:
        UsageError: Nothing is there, it does not say what model it is, or it is not to be trusted.
    """
    hub_folder = _hub_folder(name, unsafe_pickle)
    if hub_folder:
        check_folder(hub_folder, unsafe_pickle=unsafe_pickle)
        options = dict(model_name=f'local-dir:{hub_folder}', **model_args)
        return Checkpoint(name, folder=hub_folder, model_args=options, use_ema=use_ema)
    if os.path.isdir(name):
        folder = name if _holds_weights(name) else newest_checkpoint(name)
        folder = folder if _holds_weights(folder) else folder + '.old'  # stopped between two renames
        weights = os.path.join(folder, MODEL_FILE)
        if not _holds_weights(folder):
            raise UsageError(f'no checkpoint in {name}: expected a run with {ARGS_FILE} and last/{MODEL_FILE}, or '
                             f'{CONFIG_FILE} and {MODEL_FILE}')
        if model:
            return Checkpoint(name, weights, folder, model_args=dict(model_name=model, **model_args), use_ema=use_ema)
        run, average = _run_of(name, folder), os.path.join(folder, EMA_FILE)
        args = _run_args(run)
        if use_ema and os.path.isfile(average) and not args.model_ema_force_cpu:  # that one was not validated
            weights = average
        return Checkpoint(name, weights, folder, run, args, model_args, use_ema)
    if os.path.isfile(name):
        folder = os.path.dirname(os.path.abspath(name))
        if model:
            return Checkpoint(name, name, folder, model_args=dict(model_name=model, **model_args), use_ema=use_ema)
        run = _run_of(name, folder)
        return Checkpoint(name, name, folder, run, _run_args(run), model_args, use_ema)
    if not timm.is_model(name):
        raise UsageError(f'no checkpoint at {name}' + (f', and {_no_model(name)}' if os.path.sep not in name else ''))
    return Checkpoint(name, model_args=dict(model_name=name, **model_args), use_ema=use_ema)


def load(
        checkpoint: str,
        img_size: Optional[int] = None,
        *,
        model: str = '',
        use_ema: bool = True,
        own_stats: bool = False,
        unsafe_pickle: bool = False,
        **model_args: Any,
) -> nn.Module:
    """A trained model ready for an image size.

    Batch norm gets the statistics that were calibrated for the size, or for the nearest one that was;
    :func:`model_at` switches to another. The model's ``pretrained_cfg`` says how images are to be prepared: give
    ``timm.data.resolve_model_data_config(model)`` to ``timm.data.create_transform``.

    Args:
        checkpoint: As in :func:`find_checkpoint`.
        img_size: Size in pixels; by default the size that the model is meant for.
        model: timm model that a file's weights are of.
        use_ema: Take the moving average of the weights where there is one.
        own_stats: Leave the statistics that the weights were saved with.
        unsafe_pickle: Take pickled weights where a repository has no others. They can run code when they are read.
        **model_args: Further arguments of ``timm.create_model``.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ValueError: There is no such checkpoint or it is not readable; or nothing was calibrated for the model, and
            ``img_size`` is named or it was trained at mixed sizes.

    Example:
        >>> model = mixsize_timm.load('output/train/my-run', img_size=160)
        >>> model = mixsize_timm.load('hf-hub:org/name', img_size=160)
    """
    found = find_checkpoint(checkpoint, model=model, use_ema=use_ema, unsafe_pickle=unsafe_pickle, **model_args)
    loaded = found.create()
    if not calibrated_layers(loaded) or own_stats:
        if img_size is not None:
            set_input_size(loaded, img_size)
        return loaded
    stats, base_size = found.statistics(), input_size(loaded)
    if stats is not None and stats.attach(loaded):
        if img_size is None and (found.published or (found.args is None and base_size not in stats.sizes)):
            return loaded  # as it was exported; or not trained at mixed sizes, where at its own size its own are right
        return model_at(loaded, img_size or base_size)
    if found.has_mixed_statistics:
        raise ValueError(f'{checkpoint} was trained at mixed sizes, and its statistics are of no size: make them with '
                         'mixsize calibrate, or take its own with own_stats=True')
    if img_size not in (None, base_size):
        raise ValueError(f'{checkpoint} has no statistics for other sizes than its own {base_size} px: make them with '
                         'mixsize calibrate, or take its own with own_stats=True')
    return loaded


def _holds_weights(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, MODEL_FILE))


def _hub_folder(name: str, unsafe_pickle: bool) -> str:
    """The folder in hub layout that a name stands for, fetched where it is the hub's; empty where it is none."""
    if name.startswith((*_HUB, 'local-dir:')):
        source, place = parse_model_name(name)
        return fetch(place, unsafe_pickle=unsafe_pickle) if source == 'hf-hub' else place
    return name if os.path.isfile(os.path.join(name, CONFIG_FILE)) else ''


def _run_of(name: str, folder: str) -> str:
    """The folder with the arguments of the run that a checkpoint's folder is of."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        if os.path.isfile(os.path.join(place, ARGS_FILE)):
            return place
    raise UsageError(f'{name} does not say what model it is: name it with --model')


def _run_args(run: str) -> argparse.Namespace:
    is_ours = 'mixsize' in read_yaml(os.path.join(run, ARGS_FILE))  # else it is of timm's script
    return parse_args(['--resume', run, *([] if is_ours else ['--mixsize', 'off'])])


def _check_classifier(model: nn.Module) -> None:
    if not hasattr(model, 'num_classes'):  # as of timm's features_only
        raise ValueError(f'a {type(model).__name__} is no classifier: check --model-kwargs')


def _num_classes(model: Any, state: Dict[str, torch.Tensor]) -> int:
    """The number of classes of the weights, as their classifier has it."""
    names = model.pretrained_cfg.get('classifier') or ()
    for name in (names,) if isinstance(names, str) else names:
        if f'{name}.weight' in state:
            return len(state[f'{name}.weight'])
    return model.num_classes
