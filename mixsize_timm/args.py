"""The arguments of a run: the command line over configuration files over defaults, checked."""
import argparse
import difflib
import importlib.resources
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

from .datasets import DIGITS
from .parser import UsageError, build_parser
from .regime import Regime

_logger = logging.getLogger(__name__)

ARGS_FILE = 'args.yaml'


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Arguments of the training command: the command line over ``--config`` over the resumed run or the built-in
    recipe over the defaults.

    Raises:
        UsageError: A file cannot be read or an argument's value cannot work.
    """
    parser = build_parser()
    given = parser.parse_args(argv)
    layers: List[Dict[str, Any]] = []
    if given.resume:
        resumed = _read_yaml(os.path.join(given.resume, ARGS_FILE))
        own = ('resume', 'output', 'experiment', 'start_epoch')  # of that start, not of the run
        layers.append({key: value for key, value in resumed.items() if key not in own})
    if given.config:
        layers.append(_read_yaml(given.config))
    stated: Dict[str, Any] = {key: value for layer in layers for key, value in layer.items()}
    recipe: Dict[str, Any] = {}
    if not any((given.data, given.data_dir, given.dataset not in ('', DIGITS),
                stated.get('data'), stated.get('data_dir'), stated.get('dataset', '') not in ('', DIGITS))):
        recipe = {**_recipe('digits'), 'dataset': DIGITS}
        layers.insert(0, recipe)
    for layer in layers:
        _set_defaults(parser, layer)
    args = parser.parse_args(argv)
    args.data_dir = given.data_dir or given.data or args.data_dir or args.data
    if recipe and args.opt != recipe['opt'] and args.opt_kwargs == recipe['opt_kwargs']:
        args.opt_kwargs = {}  # they were the other optimizer's
    _check(args, given)
    return args


def _recipe(name: str) -> Dict[str, Any]:
    try:
        folder: Any = importlib.resources.files('mixsize_timm.recipes')
    except ModuleNotFoundError:  # run from a clone that is not installed
        folder = Path(__file__).parents[1] / 'recipes'
    return yaml.safe_load(folder.joinpath(f'{name}.yaml').read_text(encoding='utf-8'))


def _read_yaml(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding='utf-8') as file:
            values = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f'cannot read {path}: {" ".join(str(error).split())}') from error
    if not isinstance(values, dict):
        raise UsageError(f'{path} holds no arguments: expected lines of "name: value"')
    return values


def _set_defaults(parser: argparse.ArgumentParser, values: Dict[str, Any]) -> None:
    known = {action.dest: action for action in parser._actions}
    for key in values.keys() - known:
        close = difflib.get_close_matches(str(key), known, 1)
        _logger.warning('Unknown argument %r in the configuration%s', key,
                        f': did you mean {close[0]!r}?' if close else '')
    parser.set_defaults(**{key: _checked(known[key], value) for key, value in values.items() if key in known})


def _checked(action: argparse.Action, value: Any) -> Any:
    """A configuration's value, checked as the command line's would be: argparse does not check defaults."""
    if value is None:
        return value
    if action.choices:
        if value is False:  # YAML reads a bare off or no so
            value = next((word for word in ('off', 'no') if word in action.choices), value)
        if value not in action.choices:
            raise UsageError(f'{action.dest} must be one of {", ".join(map(str, action.choices))}, not {value!r}')
    if action.nargs == '+' and not isinstance(value, (list, tuple)):
        return [value]
    return value


def _check(args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Refuse what cannot work; ``given`` is what the command line alone says."""
    for name in ('batch_size', 'validation_batch_size', 'grad_accum_steps', 'epochs', 'val_interval', 'log_interval',
                 'lr_base_size'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f'--{name.replace("_", "-")} must be at least 1, not {value}')
    for name in ('workers', 'calibrate', 'calibrate_val', 'seed'):
        if getattr(args, name) < 0:
            raise UsageError(f'--{name.replace("_", "-")} must not be negative, not {getattr(args, name)}')
    if not 0 <= args.grad_smoothing_momentum < 1:
        raise UsageError(f'--grad-smoothing-momentum must be in [0, 1), not {args.grad_smoothing_momentum}')
    if args.dataset == DIGITS and args.data_dir:
        raise UsageError(f'the digits are embedded: leave out {args.data_dir}, or say what it is with --dataset')
    if given.mixsize is None and (given.mixsize_sizes or (args.mixsize is None and args.mixsize_sizes)):
        args.mixsize = 'custom'
    if args.mixsize == 'custom' and not args.mixsize_sizes:
        raise UsageError('--mixsize custom needs --mixsize-sizes')
    if args.mixsize != 'custom':
        if given.mixsize_sizes or given.mixsize_probs:
            raise UsageError('--mixsize-sizes and --mixsize-probs need --mixsize custom')
        args.mixsize_sizes = args.mixsize_probs = None
    if args.mixsize == 'off':
        for name, default in (('adapt', 'd+'), ('duplicates', 1), ('max_work', None), ('drop', 'tail')):
            if getattr(given, f'mixsize_{name}') != default:
                raise UsageError(f'--mixsize off trains one size: leave out --mixsize-{name.replace("_", "-")}')
    if args.sched == 'plateau' and args.sched_on_updates:
        raise UsageError('--sched plateau steps after an epoch: leave out --sched-on-updates')


def mixing(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


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
    options = dict(
        batch_size=args.batch_size, duplicates=args.mixsize_duplicates, adapt=args.mixsize_adapt,
        max_work=args.mixsize_max_work,
        batch_multiple=2 if mixing(args) else 1)  # timm's mixup wants pairs
    try:
        if mode == 'custom':
            return Regime(tuple(args.mixsize_sizes), tuple(args.mixsize_probs or ()), base_size=base_size, **options)
        return Regime.preset(mode, base_size, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error
