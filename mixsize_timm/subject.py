"""A trained model under examination: its arguments and its images; what ``evaluate`` and ``calibrate`` share."""
import argparse
import copy
from typing import Any, Dict, Optional, Sequence, Tuple

from accelerate import Accelerator
from torch import nn

from .args import check_crop, make_regime, resolve_precision
from .build import create_accelerator
from .errors import UsageError
from .loaders import EvaluationData
from .models import Checkpoint
from .parser import Parser, build_parser
from .sizes import SizeProbe, fit_sizes

# Options of the training command that these commands take too. Of a run its own are taken, but for the mixed precision
# of its training.
DATA_OPTIONS = ('data_dir', 'dataset', 'train_split', 'val_split', 'train_num_samples', 'val_num_samples',
                'dataset_download', 'class_map', 'input_img_mode', 'input_key', 'target_key', 'target_format',
                'dataset_trust_remote_code')
TASK_OPTIONS = ('task', 'multilabel_threshold')
MODEL_OPTIONS = ('num_classes', 'in_chans', 'gp', 'model_kwargs')
IMAGE_OPTIONS = ('mean', 'std', 'interpolation', 'batch_size', 'workers', 'pin_mem', 'no_prefetcher', 'seed')
AUGMENTATION_OPTIONS = (
    'calibrate_aug', 'no_aug', 'train_crop_mode', 'train_pad', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter',
    'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'aa', 'reprob', 'remode', 'recount',
    'train_interpolation')
DEVICE_OPTIONS = ('mixed_precision', 'device', 'amp', 'amp_dtype', 'model_dtype', 'channels_last', 'fast_norm',
                  'local_rank', 'device_modules')
_VALIDATION_ONLY = ('val_split', 'val_num_samples', 'target_format', *TASK_OPTIONS)


def add_shared_options(parser: Parser, *, evaluation: bool = True) -> None:
    """Add the options that the commands share.

    One of the training command appears in the result only where the command line says it.
    """
    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='', metavar='MODEL',
                       help='timm model that the weights of a .safetensors or .pth file are of (default: as the '
                            'args.yaml beside it says)')
    if evaluation:
        group.add_argument('--pretrained', action='store_true', default=False,
                           help='take timm\'s trained weights where a checkpoint is the name of a timm model')
    group.add_argument('--use-ema', action=argparse.BooleanOptionalAction, default=True,
                       help='take the moving average of the weights where there is one (default: yes)')
    group.add_argument('--unsafe-pickle', action='store_true', default=False,
                       help='take pickled weights where a repository of the hub, or a folder in its layout, has no '
                            'others; they can run code when they are read')
    _share(group, MODEL_OPTIONS)
    _share(parser.add_argument_group('Data set (default: the one that the run was trained on)'),
           [name for name in (*DATA_OPTIONS, *TASK_OPTIONS) if evaluation or name not in _VALIDATION_ONLY])
    _share(parser.add_argument_group('Images'), IMAGE_OPTIONS)
    _share(parser.add_argument_group('Augmentation of the images that are calibrated on (default: as the run\'s; '
                                     'else timm\'s)'), AUGMENTATION_OPTIONS)
    _share(parser.add_argument_group('Device'), DEVICE_OPTIONS)


def _share(group: Any, names: Sequence[str]) -> None:
    """Give a group options of the training command, without a default."""
    actions = {action.dest: action for action in build_parser()._actions}
    helps = {'batch_size': 'images of a batch, per process (default: the run\'s; else 256)',
             'num_classes': 'number of classes (default: as the weights have it)',
             'dataset': 'kind and name as timm has them: torch/cifar10, hfds/..., or digits (default: image folder or '
                        'tar file)',
             'val_split': 'split that is measured on (default: validation)',
             'train_split': 'split that is calibrated on (default: train)'}
    for name in names:
        action = copy.copy(actions[name])
        action.default = argparse.SUPPRESS
        action.help = helps.get(name, action.help)
        group._add_action(action)


def start_accelerator(given: argparse.Namespace) -> Accelerator:
    """The Accelerator that the command line asks for."""
    return create_accelerator(_merged({}, given))


def model_arguments(given: argparse.Namespace) -> Dict[str, Any]:
    """The arguments of ``timm.create_model`` that the command line asks for."""
    said = {name: getattr(given, name) for name in MODEL_OPTIONS if hasattr(given, name)}
    said.update(said.pop('model_kwargs', {}))
    return {{'gp': 'global_pool'}.get(name, name): value for name, value in said.items()}


def _merged(values: Dict[str, Any], given: argparse.Namespace) -> argparse.Namespace:
    """The training command's arguments: its defaults, under ``values``, under what the command line says."""
    defaults = vars(build_parser().parse_args([]))
    args = argparse.Namespace(**{**defaults, 'batch_size': 256, **values,
                                 **{name: value for name, value in vars(given).items() if name in defaults}})
    resolve_precision(args)
    check_crop(args)
    if args.batch_size < 1 or args.workers < 0:
        raise UsageError('--batch-size must be at least 1' if args.batch_size < 1 else '--workers must not be negative')
    return args


class Subject:
    """A checkpoint with the arguments that say on which images it is examined, and how they are prepared.

    Args:
        found: Where it is.
        given: The command line.
        others: Further checkpoints; where neither the command line nor this one's own run names a data set, theirs is
            taken.
    """

    def __init__(self, found: Checkpoint, given: argparse.Namespace, others: Sequence[Checkpoint] = ()) -> None:
        self.found = found
        values = vars(found.args) if found.args else {}
        if getattr(given, 'data_dir', None) or getattr(given, 'dataset', None):
            values = {name: value for name, value in values.items() if name not in (*DATA_OPTIONS, 'data')}
        elif not found.args:
            donor = next((other.args for other in others if other.args), None)
            if donor is None:
                raise UsageError('no images named: say which with --data-dir, or --dataset')
            values = {name: getattr(donor, name) for name in DATA_OPTIONS}
        values = {**values, 'naflex_loader': False, 'validation_batch_size': None, 'epoch_repeats': 0, 'amp': False,
                  'mixed_precision': None}
        self.args = _merged(values, given)
        self.args.img_size = self.args.input_size = None
        self.args.crop_pct = None  # the model's own stands in its pretrained_cfg, a run's too
        self.args.crop_mode = getattr(given, 'crop_mode', None)
        self.args.crop_border_pixels = getattr(given, 'crop_border_pixels', None)

    def create(self, accelerator: Accelerator) -> Tuple[nn.Module, EvaluationData]:
        """The model as it was saved, and its images, which are not opened yet."""
        model: Any = self.found.create()
        self.args.num_classes = model.num_classes
        self.args.in_chans = (self.found.model_args or {}).get('in_chans') or model.pretrained_cfg['input_size'][0]
        return model, EvaluationData(self.args, model, accelerator)

    def sizes(self, model: nn.Module, data: EvaluationData, wanted: Optional[Sequence[int]]) -> Tuple[int, ...]:
        """The sizes that were asked for, or those of the run's regime.

        Raises:
            UsageError: The model does not take a size, or none is known.
        """
        takes = SizeProbe(model, data.channels, (data.height_width[0], data.height_width[1]))
        if wanted:
            for size in wanted:
                if not takes(size):
                    raise UsageError(f'{self.found.name} does not take images of {size} px: {takes.reason}')
            return tuple(sorted(set(wanted)))
        regime = make_regime(self.found.args, data.config['input_size']) if self.found.args else None
        if regime is None:
            raise UsageError(f'{self.found.name} was not trained at mixed sizes: say which with --sizes')
        return fit_sizes(regime, takes)[0].sizes
