"""The arguments of a run: the command line over configuration files over defaults, checked."""
import argparse
import difflib
import logging
import math
import os
from typing import Any, Dict, List, Optional, Set, Tuple

import torch
import yaml
from timm.loss import CLASS_WEIGHT_METHODS
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from timm.utils import ParseKwargs

from .checkpoint import checkpoints_of, holds_checkpoint, newest_checkpoint, run_folder
from .datasets import DIGITS
from .errors import UsageError, refusing
from .parser import build_parser
from .recipe import read_recipe
from .regime import PRESET_OPTIONS, Regime
from .saver import CheckpointInterval
from .tokens import holds_token

_logger = logging.getLogger(__name__)

ARGS_FILE = 'args.yaml'

_OF_ONE_START = ('resume', 'no_resume_opt', 'output', 'experiment', 'start_epoch', 'stop_epoch', 'wandb_resume_id',
                 'resume_auto')  # arguments that a run does not bring along when it is resumed


def parse_args(argv: Optional[List[str]] = None, *, recipe_without_data: bool = True) -> argparse.Namespace:
    """Arguments of the training command: the command line over ``--config`` over the resumed run, or else the recipe,
    over the defaults.

    Args:
        argv: The command line; ``None`` for that of the process.
        recipe_without_data: Where no data set is named, take the recipe of the digits, and refuse one that needs data.

    Raises:
        UsageError: A file cannot be read or an argument's value cannot work.
    """
    parser = build_parser()
    given = parser.parse_args(argv)
    stated_here = _stated(argv)
    configured = read_yaml(given.config) if given.config else {}
    resume = _resume_from(*(getattr(given, name) or configured.get(name) or ''
                            for name in ('resume', 'output', 'experiment')))
    layers: List[Dict[str, Any]] = [configured]
    name = _recipe_of(given, configured)
    if os.path.isdir(resume):
        resumed = read_yaml(os.path.join(run_folder(resume), ARGS_FILE))
        begun_with = resumed.get('recipe') or ''
        if name not in ('', begun_with):
            raise UsageError(f'{resume} was begun with {"the recipe " + begun_with if begun_with else "no recipe"}, '
                             f'not {name}: leave out --recipe')
        name = ''  # all that it says is in the run's arguments
        layers.insert(0, {key: value for key, value in resumed.items() if key not in _OF_ONE_START})
    stated: Dict[str, Any] = {key: value for layer in layers for key, value in layer.items()}
    data = {str(getattr(given, key) or stated.get(key) or '') for key in ('data', 'data_dir', 'dataset')} - {''}
    if not name and data <= {DIGITS} and (data or recipe_without_data):
        name = DIGITS
    recipe: Dict[str, Any] = {**yaml.safe_load(read_recipe(name)), 'recipe': name} if name else {}
    layers.insert(0, recipe)
    _drop_overridden(layers, stated_here)
    _leave_to_preset(layers, given.mixsize)
    for layer in layers:
        _set_defaults(parser, layer)
    args = parser.parse_args(argv)
    args.resume = resume
    args.resume_auto = given.resume == 'auto' or (not given.resume and configured.get('resume') == 'auto')
    _adapt_recipe(args, recipe, stated_here | configured.keys())
    _resolve(args, given)
    if recipe_without_data and not args.data_dir and args.dataset.partition('/')[0] in ('', 'torch'):
        what = f'the recipe {name} needs a data set: name its folder' if recipe else (
            f'--dataset {args.dataset} is in a folder, or downloaded to one: name it')
        raise UsageError(f'{what} with --data-dir')
    _check(args, given)
    return args


def _resume_from(resume: str, output: str, experiment: str) -> str:
    """The folder or file that ``--resume`` means, empty for a new run."""
    if resume != 'auto':
        if resume and not os.path.exists(resume):
            raise UsageError(f'no run at {resume}: check --resume')
        if holds_checkpoint(resume) and run_folder(resume) == resume and not os.path.exists(
                os.path.join(resume, ARGS_FILE)):
            raise UsageError(f'{resume} holds weights only: start from them with --initial-checkpoint')
        return resume
    if not experiment:
        raise UsageError('--resume auto needs --experiment, the name of the run\'s folder')
    folder = output_folder(output, experiment)
    return folder if any(map(holds_checkpoint, (newest_checkpoint(folder), *checkpoints_of(folder)))) else ''


def output_folder(output: str, experiment: str) -> str:
    """The folder of a run, as timm has it."""
    return os.path.join(output or os.path.join('output', 'train'), experiment)


def _recipe_of(given: argparse.Namespace, configured: Dict[str, Any]) -> str:
    """Name of the recipe that is asked for, on the command line or in a configuration; empty for none."""
    named = str(configured.get('recipe') or '')
    if given.recipe and named not in ('', given.recipe):
        raise UsageError(f'{given.config} is for the recipe {named}, not {given.recipe}: leave out --recipe')
    if vars(given).keys() - configured.keys() <= {'resume_auto'}:  # a run's args.yaml holds all that its recipe said
        return given.recipe
    return given.recipe or named


def _adapt_recipe(args: argparse.Namespace, recipe: Dict[str, Any], stated: Set[str]) -> None:
    """Leave out what the recipe says for its model, its optimizer and its loader where others are asked for.

    Args:
        args: The arguments of all layers.
        recipe: The lowest layer.
        stated: Names of those that the layers above it state.
    """
    others: Tuple[str, ...] = ()
    if args.model != recipe.get('model', args.model):
        others += ('model_kwargs',)
    if args.opt != recipe.get('opt', args.opt):
        others += ('opt_eps', 'opt_betas', 'opt_kwargs')
    if args.mixsize != 'off':
        others += ('fast_loader',)  # MixSize has that loader anyway
    elif recipe.get('mixsize', 'off') != 'off' and recipe.get('mixsize_duplicates', 1) != 1:
        raise UsageError(f'the recipe {recipe["recipe"]} repeats images as MixSize does: it is not for --mixsize off')
    for name in others:
        if name in recipe and name not in stated:
            setattr(args, name, build_parser().get_default(name))


def read_yaml(path: str) -> Dict[str, Any]:
    """The arguments in a YAML file."""
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f'cannot read {path}: {" ".join(str(error).split())}') from error
    if not isinstance(values, dict):
        raise UsageError(f'{path} holds no arguments: expected lines of "name: value"')
    return values


# Arguments that say the same in several ways, or of which one takes the place of the other
_SPELLINGS = (('mixed_precision', 'amp'), ('drop_path', 'drop_connect'), ('loss', 'bce_loss', 'jsd_loss'),
              ('loss_pos_weight', 'bce_pos_weight'), ('mixsize_duplicates', 'aug_repeats'),
              ('checkpoint_interval', 'recovery_interval'), ('train_pad', 'scale'), ('train_pad', 'ratio'),
              ('train_pad', 'train_crop_mode'), ('train_pad', 'no_aug'))


def _stated(argv: Optional[List[str]]) -> Set[str]:
    """The arguments that a command line states, be it with the value of the default."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    stated = vars(parser.parse_args(argv))
    return {name for name, value in stated.items() if (name, value) != ('train_pad', 0)}  # which takes no place


def _drop_overridden(layers: List[Dict[str, Any]], above: Set[str]) -> None:
    """Leave out of each layer what one above it, or the command line, says under another name."""
    parser = build_parser()
    if 'amp_dtype' in above:  # of a resumed run, which has both: what it was turned into
        for layer in layers:
            layer.pop('mixed_precision', None)
    for layer in reversed(layers):
        stated = {name for name, value in layer.items() if value != parser.get_default(name)}
        for spellings in _SPELLINGS:
            for name in set(spellings) - above if above & set(spellings) else ():
                layer.pop(name, None)
        above = above | stated


def _leave_to_preset(layers: List[Dict[str, Any]], mixsize: Optional[str]) -> None:
    """Leave out of each layer of another regime what the preset that is named above it brings.

    Args:
        layers: The layers under the command line, the lowest first.
        mixsize: The regime that the command line names, if it does.
    """
    for layer in reversed(layers):
        if layer.get('mixsize', mixsize) != mixsize:
            for name in PRESET_OPTIONS.get(mixsize or '', ()):
                layer.pop(f'mixsize_{name}', None)
        mixsize = mixsize or layer.get('mixsize')


def _set_defaults(parser: argparse.ArgumentParser, values: Dict[str, Any]) -> None:
    known = {action.dest: action for action in parser._actions}
    for key in values.keys() - known:
        close = difflib.get_close_matches(str(key), known, 1)
        _logger.warning('Unknown argument %r in the configuration%s', key,
                        f': did you mean {close[0]!r}?' if close else '')
    parser.set_defaults(**{key: _checked(known[key], value) for key, value in values.items() if key in known})


def _checked(action: argparse.Action, value: Any) -> Any:
    """A configuration's value, converted and checked as on the command line: argparse does not check defaults."""
    if value is None:
        return value
    if action.nargs == 0 or isinstance(action, ParseKwargs):
        kind = 'true or false' if action.nargs == 0 else 'a mapping'
        if not isinstance(value, bool if action.nargs == 0 else dict):
            raise UsageError(f'{action.dest} must be {kind}, not {value!r}')
        return value
    if value is True and action.const is not None:
        return action.const
    if value is False and action.choices:  # YAML reads a bare off or no so
        value = next((word for word in ('off', 'no') if word in action.choices), value)
    many = action.nargs in ('+', '*') or isinstance(action.nargs, int)
    values = value if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, (list, tuple)) and not many or isinstance(action.nargs, int) and len(values) != action.nargs:
        raise UsageError(f'{action.dest} must be {action.nargs if many else 1} '
                         f'value{"s" if many else ""}, not {value!r}')
    values = [_converted(action, item) for item in values]
    return values if many else values[0]


def _converted(action: argparse.Action, value: Any) -> Any:
    kind: Any = action.type or str
    try:
        converted = kind(value)
        if isinstance(value, (bool, list, dict)) or (kind is int and converted != float(value)):
            raise ValueError
    except (TypeError, ValueError):
        what = {int: 'a whole number', float: 'a number'}.get(kind, 'text')
        raise UsageError(f'{action.dest} must be {what}, not {value!r}') from None
    if action.choices and converted not in action.choices:
        raise UsageError(f'{action.dest} must be one of {", ".join(map(str, action.choices))}, not {value!r}')
    return converted


# Options that do nothing without another one, under its name
_DEPENDENTS = {
    'amp': ('amp_dtype',),
    'torchcompile': ('torchcompile_mode',),
    'torchscript': ('fuser',),
    'clip_grad': ('clip_mode',),
    'layer_decay': ('layer_decay_min_scale', 'layer_decay_no_opt_scale'),
    'model_ema': ('model_ema_force_cpu', 'model_ema_decay', 'model_ema_warmup'),
    'kd_model_name': ('kd_distill_type', 'kd_loss_type', 'distill_loss_weight', 'task_loss_weight', 'kd_temperature',
                      'kd_student_feature_dim', 'kd_teacher_feature_dim', 'kd_token_distill_type'),
    'log_wandb': ('wandb_project', 'wandb_tags', 'wandb_resume_id'),
    'resume': ('no_resume_opt', 'wandb_resume_id'),
    'train_img_sizes': ('train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread',
                        'train_size_random_mix', 'train_batches_per_epoch', 'variable_batch_loss_scale'),
    'naflex_loader': ('naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_loss_scale',
                      'naflex_patchify_channels_first'),
    'naflex_patch_sizes': ('naflex_patch_size_probs',),
}

# What MixSize takes the place of, or cannot be had with: dest -> (the value that leaves it off, why)
_OFF_ONLY = {
    'aug_splits': (0, 'its duplicates take the place of splits'),
    'split_bn': (False, 'its duplicates take the place of splits'),
    'torchscript': (False, 'the batch norm of a scripted model cannot be calibrated; --torchcompile can be had'),
    'use_multi_epochs_loader': (False, 'its own loader keeps its workers anyway'),
    'worker_seeding': ('all', 'each augmentation is seeded by its image'),
    'train_img_sizes': (None, 'name them with --mixsize-sizes and --mixsize-probs'),
    'naflex_loader': (False, 'NaFlex has sizes of its own'),
}


def _resolve(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Give the arguments that say the same in several ways one form; ``given`` is what the command line alone says."""
    args.data_dir = given.data_dir or given.data or args.data_dir or args.data
    resolve_precision(args)
    if args.drop_connect is not None:
        if args.drop_path not in (None, args.drop_connect):
            raise UsageError('--drop-connect is the old name of --drop-path: give one of them')
        args.drop_path = args.drop_connect
    for old, loss in ((args.jsd_loss, 'jsd'), (args.bce_loss, 'bce')):
        if old and args.loss not in (None, loss):
            raise UsageError(f'--{loss}-loss contradicts --loss {args.loss}')
        args.loss = loss if old else args.loss
    if args.bce_pos_weight is not None:
        if args.loss_pos_weight not in (None, str(args.bce_pos_weight)):
            raise UsageError('--bce-pos-weight is the old name of --loss-pos-weight: give one of them')
        args.loss_pos_weight = str(args.bce_pos_weight)
    if args.recovery_interval:
        if args.checkpoint_interval not in (build_parser().get_default('checkpoint_interval'),
                                            str(args.recovery_interval)):
            raise UsageError('--recovery-interval means the same as --checkpoint-interval: give one of them')
        args.checkpoint_interval = str(args.recovery_interval)
    multi_label = args.task == 'multilabel'
    args.loss = args.loss or ('bce' if multi_label else 'ce')
    args.eval_metric = args.eval_metric or ('map' if multi_label else 'top1')
    args.smoothing = args.smoothing if args.smoothing is not None else 0. if multi_label else 0.1
    if args.mixsize is None and (args.train_img_sizes or args.naflex_loader):
        args.mixsize = 'off'
    elif given.mixsize is None and (given.mixsize_sizes or (args.mixsize is None and args.mixsize_sizes)):
        args.mixsize = 'custom'
    if args.aug_repeats and args.mixsize != 'off':
        if args.aug_repeats != int(args.aug_repeats):
            raise UsageError(f'--aug-repeats must be a whole number, not {args.aug_repeats}')
        if args.mixsize_duplicates not in (1, int(args.aug_repeats)):
            raise UsageError('--aug-repeats means the same as --mixsize-duplicates: give one of them')
        args.mixsize_duplicates = int(args.aug_repeats)


def resolve_precision(args: argparse.Namespace) -> None:
    """Turn timm's ``--amp`` into Accelerate's ``--mixed-precision``."""
    if args.amp:
        wanted = {'float16': 'fp16', 'bfloat16': 'bf16'}[args.amp_dtype]
        if args.mixed_precision not in (None, wanted):
            raise UsageError(f'--amp with {args.amp_dtype} contradicts --mixed-precision {args.mixed_precision}')
        args.mixed_precision = wanted


def _check(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Refuse what cannot work; ``given`` is what the command line alone says."""
    for name, value in vars(args).items():
        if holds_token(str(value)):
            raise UsageError(f'{flag(name)} holds an access token, which would be written to {ARGS_FILE}: put it into '
                             'the environment instead, such as HF_TOKEN')
    _check_ranges(args)
    parser = build_parser()
    for name, dependents in _DEPENDENTS.items():
        for dependent in dependents:
            if getattr(given, dependent) != parser.get_default(dependent) and not (
                    getattr(args, name) or getattr(given, name)):
                raise UsageError(f'{flag(dependent)} needs {flag(name)}')
    if args.dataset == DIGITS and args.data_dir:
        raise UsageError(f'the digits are embedded: leave out {args.data_dir}, or say what it is with --dataset')
    _check_mixsize(args, given)
    _check_augmentation(args)
    check_crop(args)
    _check_task(args)
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UsageError('--sched plateau steps after an epoch: leave out --sched-on-updates')
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise UsageError('--amp needs weights of float32: leave out --model-dtype')
    if args.local_rank and os.environ.get('LOCAL_RANK', str(args.local_rank)) != str(args.local_rank):
        raise UsageError(f'--local_rank {args.local_rank} contradicts LOCAL_RANK={os.environ["LOCAL_RANK"]}')


def check_seed(args: argparse.Namespace) -> None:
    """Refuse a ``--seed``, where one is named, that NumPy cannot take: each process adds its number to it."""
    largest = 2**32 - int(os.environ.get('WORLD_SIZE') or 1)
    if not 0 <= getattr(args, 'seed', 0) <= largest:
        raise UsageError(f'--seed must be from 0 to {largest}, not {args.seed}')


def _check_ranges(args: argparse.Namespace) -> None:
    check_seed(args)
    for name in ('batch_size', 'validation_batch_size', 'grad_accum_steps', 'epochs', 'val_interval', 'log_interval',
                 'lr_base_size', 'checkpoint_hist', 'stop_epoch', 'train_batches_per_epoch', 'mixsize_batch_multiple'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f'{flag(name)} must be at least 1, not {value}')
    if abs(args.mixsize_anneal or 0) > 1:
        raise UsageError(f'--mixsize-anneal must be from -1 to 1, not {args.mixsize_anneal}')
    for name in ('workers', 'calibrate', 'calibrate_val', 'recovery_interval', 'mixsize_reg', 'epoch_repeats',
                 'aug_repeats', 'start_epoch', 'max_nonfinite', 'worker_timeout', 'train_pad'):
        if (getattr(args, name) or 0) < 0:
            raise UsageError(f'{flag(name)} must not be negative, not {getattr(args, name)}')
    if args.micro_batch_size not in ('', 'auto') and not (
            args.micro_batch_size.isdecimal() and int(args.micro_batch_size)):
        raise UsageError(f'--micro-batch-size must be a number of images or auto, not {args.micro_batch_size!r}')
    with refusing('--checkpoint-interval'):
        CheckpointInterval(args.checkpoint_interval)
    if not 0 <= args.grad_smoothing_momentum < 1:
        raise UsageError(f'--grad-smoothing-momentum must be in [0, 1), not {args.grad_smoothing_momentum}')
    if args.decay_epochs is not None and args.decay_epochs <= 0:
        raise UsageError(f'--decay-epochs must be above 0, not {args.decay_epochs}')
    if not 0 <= args.max_bad_images <= 1:
        raise UsageError(f'--max-bad-images must be in [0, 1], not {args.max_bad_images}')
    if not 0 <= args.smoothing < 1:
        raise UsageError(f'--smoothing must be in [0, 1), not {args.smoothing}')
    if args.tta not in (0, 1, 2):
        raise UsageError(f'--tta takes 2, for an image and its mirror image, not {args.tta}')
    if any(epoch < 1 for epoch in args.save_epochs):
        raise UsageError('--save-epochs counts finished epochs: from 1')


def _check_mixsize(args: argparse.Namespace, given: argparse.Namespace) -> None:
    if args.mixsize == 'custom' and not args.mixsize_sizes:
        raise UsageError('--mixsize custom needs --mixsize-sizes')
    if args.mixsize != 'custom':
        if given.mixsize_sizes or given.mixsize_probs:
            raise UsageError('--mixsize-sizes and --mixsize-probs need --mixsize custom')
        args.mixsize_sizes = args.mixsize_probs = None
    if args.mixsize == 'off':
        for name, default in (('adapt', None), ('duplicates', 1), ('max_work', None), ('batch_multiple', 1),
                              ('drop', 'tail'), ('reg', 0), ('anneal', None), ('batch_of', None)):
            if getattr(given, f'mixsize_{name}') != default:
                raise UsageError(f'--mixsize off trains one size: leave out --mixsize-{name.replace("_", "-")}')
        _check_loader(args, given)
        return
    if args.fast_loader:
        raise UsageError('--fast-loader is for --mixsize off: MixSize has that loader anyway')
    for name, (absent, why) in _OFF_ONLY.items():
        if getattr(args, name) != absent:
            raise UsageError(f'{flag(name)} cannot be had with MixSize: {why}; or use --mixsize off')


def _check_loader(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Which of two loaders it is with one size, and what only the other one can."""
    if not args.fast_loader:
        for name, standard in (('max_bad_images', 0.01), ('worker_timeout', 45), ('scaled_decoding', False)):
            if getattr(given, name) != standard:
                raise UsageError(f'--mixsize off uses timm\'s own loader: leave out {flag(name)}, or add --fast-loader')
        if args.train_pad:  # in a configuration too, since it is an augmentation
            raise UsageError('timm\'s own loader has no --train-pad: leave it out, or add --fast-loader')
        return
    for name in ('train_img_sizes', 'naflex_loader', 'aug_splits', 'aug_repeats', 'use_multi_epochs_loader'):
        if getattr(args, name):
            raise UsageError(f'--fast-loader and {flag(name)} exclude each other: that is timm\'s loader\'s')


def _check_augmentation(args: argparse.Namespace) -> None:
    if args.aug_splits == 1:
        raise UsageError('--aug-splits must be 2 or more, or 0 for none')
    if args.split_bn and not (args.aug_splits or args.resplit):
        raise UsageError('--split-bn needs --aug-splits or --resplit')
    if args.sync_bn and args.micro_batch_size == 'auto':
        raise UsageError('--micro-batch-size auto and --sync-bn exclude each other: processes would wait for one '
                         'another while they try')
    if args.split_bn and args.sync_bn:
        raise UsageError('--split-bn and --sync-bn exclude each other')
    if args.aug_splits and (mixing(args) or args.no_prefetcher or args.micro_batch_size):
        raise UsageError('--aug-splits cannot be had with mixup, cutmix, --no-prefetcher or --micro-batch-size')
    if args.micro_batch_size == 'auto' and args.mixsize == 'off':
        raise UsageError('--micro-batch-size auto reads the batches of a regime: with --mixsize off give a number')
    if args.naflex_loader:
        for name in ('aug_splits', 'train_img_sizes', 'use_multi_epochs_loader', 'mixup_off_epoch', 'cutmix_minmax',
                     'torchscript', 'tta', 'save_images', 'resplit', 'micro_batch_size'):
            if getattr(args, name):
                raise UsageError(f'--naflex-loader and {flag(name)} exclude each other')
    if args.naflex_loader and args.mixup_mode != 'batch':
        raise UsageError('--naflex-loader mixes by batch: leave out --mixup-mode')
    if args.use_multi_epochs_loader and args.mixup_off_epoch:
        raise UsageError('--use-multi-epochs-loader and --mixup-off-epoch exclude each other: its workers mix on')
    if args.train_img_sizes and args.use_multi_epochs_loader:
        raise UsageError('--train-img-sizes and --use-multi-epochs-loader exclude each other')
    for choices, others in (('naflex_patch_sizes', ('naflex_patch_size_probs',)),
                            ('train_img_sizes', ('train_batch_sizes', 'train_size_probs'))):
        for other in others:
            if getattr(args, other) and len(getattr(args, other)) != len(getattr(args, choices) or ()):
                raise UsageError(f'{flag(other)} must have one value for each of {flag(choices)}')


def check_crop(args: argparse.Namespace) -> None:
    """Refuse bounds of a crop that are no pair, and ``--train-pad`` where something else says what the crop is."""
    for name in ('scale', 'ratio'):
        bounds = getattr(args, name)
        if bounds is not None and len(bounds) != 2:
            raise UsageError(f'{flag(name)} takes two numbers, the least and the largest, not {len(bounds)}')
    if not args.train_pad:
        return
    parser = build_parser()
    for name in ('no_aug', 'train_crop_mode', 'scale', 'ratio'):
        if getattr(args, name) != parser.get_default(name):
            raise UsageError(f'--train-pad and {flag(name)} exclude each other: it is a crop of its own')


def _check_task(args: argparse.Namespace) -> None:
    multi_label = args.task == 'multilabel'
    if args.loss == 'jsd' and args.aug_splits < 2:
        raise UsageError('--loss jsd compares splits of a batch: it needs --aug-splits 2 or more')
    if not multi_label and (args.target_format == 'multihot' or ',' in (args.target_key or '')):
        raise UsageError('targets of several labels need --task multilabel')
    if multi_label and args.kd_model_name:
        raise UsageError('--kd-model-name needs --task classification')
    if multi_label and args.dataset == DIGITS:
        raise UsageError('the digits have one label each: --task multilabel needs a --dataset')
    for name, loss, default in (('bce_sum', 'bce', False), ('bce_target_thresh', 'bce', None),
                                ('poly_epsilon', 'poly', 2), ('poly_gamma', 'poly', 0)):
        if getattr(args, name) != default and args.loss != loss:
            raise UsageError(f'{flag(name)} needs --loss {loss}')
    for name, kinds, unset in (('kd_temperature', ('logit', 'token'), 4), ('kd_token_distill_type', ('token',), 'soft'),
                               ('kd_student_feature_dim', ('feature',), None),
                               ('kd_teacher_feature_dim', ('feature',), None)):
        if getattr(args, name) != unset and args.kd_distill_type not in kinds:
            raise UsageError(f'{flag(name)} needs --kd-distill-type {" or ".join(kinds)}')
    if args.multilabel_threshold != 0.5 and not multi_label:
        raise UsageError('--multilabel-threshold needs --task multilabel')
    computed = {args.loss_pos_weight, args.loss_class_weight} & set(CLASS_WEIGHT_METHODS)
    if args.class_stats and not (computed or args.loss == 'db'):
        raise UsageError('--class-stats needs --loss db, or a method in --loss-pos-weight or --loss-class-weight')
    if args.loss_weight_power != 1 and not computed & {'neg_pos', 'inv_freq'}:
        raise UsageError('--loss-weight-power needs --loss-pos-weight neg_pos or --loss-class-weight inv_freq')
    metrics = (MultiLabelClassificationEvaluator if multi_label else ClassificationEvaluator).metric_names
    if args.eval_metric not in metrics:
        raise UsageError(f'--eval-metric must be one of {", ".join(metrics)}, not {args.eval_metric}')


def flag(name: str) -> str:
    return '--' + name.replace('_', '-')


def mixing(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def model_dtype(args: argparse.Namespace) -> Optional[torch.dtype]:
    """The type of the weights, where one is asked for."""
    return getattr(torch, args.model_dtype) if args.model_dtype else None


def make_regime(args: argparse.Namespace, input_size: Tuple[int, int, int]) -> Optional[Regime]:
    """The regime that the arguments ask for, ``None`` for ``--mixsize off``.

    Args:
        args: Parsed arguments.
        input_size: Channels, height and width of the base size.

    Raises:
        UsageError: The regime cannot be made.
    """
    base_size = input_size[-1]
    mode = args.mixsize or ('cifar' if base_size < 96 else 's224')
    if mode == 'off':
        return None
    if input_size[1] != input_size[2]:
        raise UsageError(f'MixSize trains square images, not {input_size[1]}x{input_size[2]}: use --mixsize off')
    stated = {name: value for name in ('adapt', 'anneal', 'batch_of')
              if (value := getattr(args, f'mixsize_{name}')) is not None}
    options = dict(
        PRESET_OPTIONS.get(mode, {}), batch_size=args.batch_size, duplicates=args.mixsize_duplicates,
        max_work=args.mixsize_max_work, **stated,
        batch_multiple=math.lcm(args.mixsize_batch_multiple, 2 if mixing(args) else 1))  # timm's mixup wants pairs
    if options.get('anneal'):
        options['epochs'] = args.epochs
    try:
        if mode == 'custom':
            return Regime(tuple(args.mixsize_sizes), tuple(args.mixsize_probs or ()), base_size=base_size, **options)
        return Regime.preset(mode, base_size, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error
