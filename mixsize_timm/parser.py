"""The options of ``mixsize_timm.train``: timm's arguments under timm's names, and MixSize's own."""
import argparse
from typing import Any, NoReturn

from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

from .errors import UsageError
from .regime import ADAPT_MODES, BATCHES, DROP_RULES, PRESETS

MIXSIZE_MODES = ('off', *PRESETS, 'custom')


class _KeyValues(ParseKwargs):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if any('=' not in value for value in values):
            raise UsageError(f'{option_string} takes NAME=VALUE, not {" ".join(values)}')
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # one line, where argparse would print the whole usage first
        raise UsageError(f'{message} (--help lists the arguments)')


def build_parser() -> argparse.ArgumentParser:
    """The parser of the training command; what it cannot parse is a :class:`UsageError`."""
    parser = Parser(
        prog='mixsize_timm.train',
        description='Train a timm model at mixed image sizes. Without a data set it trains on scikit-learn\'s digits.',
        epilog='Launch with "accelerate launch -m mixsize_timm.train ..." or "python -m mixsize_timm.train ...".')
    parser.add_argument('-c', '--config', default='', metavar='FILE',
                        help='YAML file of arguments that replace the defaults below')
    parser.add_argument('--recipe', default='', metavar='NAME',
                        help='packaged recipe whose arguments replace the defaults below; those of --config and of the '
                             'command line replace its own; "mixsize recipes" lists them (default: digits where there '
                             'is no data set)')
    for add_group in (_add_mixsize, _add_dataset, _add_model, _add_device, _add_optimizer, _add_schedule,
                      _add_augmentation, _add_loss, _add_distillation, _add_batch_norm, _add_ema, _add_run,
                      _add_trackers, _add_scheduled_sizes, _add_naflex):
        add_group(parser)
    return parser


def _add_mixsize(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('MixSize')
    group.add_argument('--mixsize', choices=MIXSIZE_MODES, default=None,
                       help='regime of sizes: a preset relative to the base size, "custom" with --mixsize-sizes, or '
                            '"off" for timm\'s own loader; a144 is s144, and a123 nine images of ten at half the base '
                            'size, each annealed, by B+, its mean batch --batch-size (default: cifar for a base size '
                            'under 96, else s224)')
    group.add_argument('--mixsize-adapt', choices=ADAPT_MODES, default=None,
                       help='what small images save is spent on: a larger batch, duplicates, or both (default: d+; b+ '
                            'with a144 and a123)')
    group.add_argument('--mixsize-batch-of', choices=BATCHES, default=None,
                       help='what --batch-size is: the batch at the base size, or the mean over the steps (default: '
                            'base; mean with a144 and a123)')
    group.add_argument('--mixsize-sizes', type=int, nargs='+', default=None, metavar='N',
                       help='image sizes of a custom regime')
    group.add_argument('--mixsize-probs', type=float, nargs='+', default=None, metavar='P',
                       help='share of the images for each of --mixsize-sizes (default: equal shares)')
    group.add_argument('--mixsize-duplicates', type=int, default=1, metavar='D',
                       help='augmented duplicates of each image at the base size (default: 1)')
    group.add_argument('--mixsize-max-work', type=float, default=None, metavar='X',
                       help='lower a size\'s batch where its step costs more than X steps of --batch-size images at '
                            'the base size (default: no limit)')
    group.add_argument('--mixsize-batch-multiple', type=int, default=1, metavar='N',
                       help='round the batch of every size to a multiple of N; 8 suits tensor cores (default: 1)')
    group.add_argument('--mixsize-drop', choices=DROP_RULES, default='tail',
                       help='what becomes of images that fill no batch of their size: handed to other sizes, or '
                            'dropped as in the paper (default: tail)')
    group.add_argument('--mixsize-anneal', type=float, default=None, metavar='X',
                       help='train small images early and large ones late: at 1 the size farthest from the mean has '
                            'twice its share at one end of the run and none at the other; over the run every size '
                            'keeps its share; below 0 large ones come first (default: 0, off; 1 with a144 and a123)')
    group.add_argument('--mixsize-reg', type=float, default=0., metavar='X',
                       help='regularise large images more and small ones less: augmentation magnitude, dropout, '
                            'stochastic depth and mixup are multiplied by 1 + X (size / base size - 1) '
                            '(default: 0, off)')
    group.add_argument('--no-grad-smoothing', dest='grad_smoothing', action='store_false', default=True,
                       help='leave gradient norms as they are')
    group.add_argument('--grad-smoothing-momentum', type=float, default=0.9, metavar='M',
                       help='momentum of the running gradient norm (default: 0.9)')
    group.add_argument('--calibrate', type=int, default=200, metavar='N',
                       help='global batches, at most one epoch, that batch norm is calibrated on for the final '
                            'accuracy at each size; 0 for none (default: 200)')
    group.add_argument('--calibrate-val', type=int, default=10, metavar='N',
                       help='the same for the validation after each epoch (default: 10)')
    group.add_argument('--calibrate-aug', action=argparse.BooleanOptionalAction, default=True,
                       help='calibrate on training images augmented as in training, but not mixed, as in the paper; '
                            'without on images prepared as in evaluation (default: yes)')


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Data set')
    parser.add_argument('data', nargs='?', metavar='DIR', default=None, help='data folder, the same as --data-dir')
    group.add_argument('--data-dir', metavar='DIR', default=None, help='data folder')
    group.add_argument('--dataset', metavar='NAME', default='',
                       help='kind and name as timm has them: torch/cifar10, hfds/..., those that stream wds/..., '
                            'hfids/... and ours parquet/, or digits (default: image folder or tar file; digits where '
                            'there is no --data-dir)')
    group.add_argument('--train-split', metavar='NAME', default='train', help='training split (default: train)')
    group.add_argument('--val-split', metavar='NAME', default='validation',
                       help='validation split, "" for none (default: validation)')
    group.add_argument('--train-num-samples', type=int, default=None, metavar='N',
                       help='number of training images, for data sets that stream')
    group.add_argument('--val-num-samples', type=int, default=None, metavar='N',
                       help='number of validation images, for data sets that stream')
    group.add_argument('--dataset-download', action='store_true', default=False,
                       help='allow a torch/ or tfds/ data set to be downloaded')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    group.add_argument('--input-img-mode', default=None, metavar='MODE',
                       help='PIL mode of the images (default: RGB for three channels, else L)')
    group.add_argument('--input-key', default=None, metavar='KEY', help='key of the image in a data set\'s items')
    group.add_argument('--target-key', default=None, metavar='KEY',
                       help='key of the label in a data set\'s items; several, with commas, for multi-label targets of '
                            'one field a class')
    group.add_argument('--target-format', default='indices', choices=('indices', 'multihot'),
                       help='form of multi-label targets: class indices or a vector of 0 and 1 (default: indices)')
    group.add_argument('--dataset-trust-remote-code', action='store_true', default=False,
                       help='let a Hugging Face data set run code from its repository')
    group.add_argument('--max-bad-images', type=float, default=0.01, metavar='X',
                       help='stop when more than this part of the training images cannot be read, 0 to 1; others of '
                            'their class take their place (default: 0.01)')
    group.add_argument('--worker-timeout', type=float, default=45., metavar='S',
                       help='stop when a data worker that is waited for is at one image for so many seconds; 0 for '
                            'never (default: 45)')


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='resnet50', metavar='MODEL', help='timm model (default: resnet50)')
    group.add_argument('--pretrained', action='store_true', default=False, help='start from timm\'s trained weights')
    group.add_argument('--unsafe-pickle', action='store_true', default=False,
                       help='take pickled weights of a repository of the hub that has no others; they can run code '
                            'when they are read')
    group.add_argument('--pretrained-path', default=None, metavar='PATH',
                       help='start from this file as if it held timm\'s trained weights, the head adapted')
    group.add_argument('--pretrained-cfg-overlay', nargs='*', default={}, action=_KeyValues, metavar='K=V',
                       help='entries of the model\'s pretrained configuration to replace')
    group.add_argument('--initial-checkpoint', default='', metavar='PATH', help='start from the weights in this file')
    group.add_argument('--resume', default='', metavar='RUN',
                       help='continue a run with the arguments it was started with, from its newest checkpoint that is '
                            'whole: its folder, or one checkpoint in it; "auto" for --experiment\'s own folder, new '
                            'or begun; or a timm checkpoint file')
    group.add_argument('--no-resume-opt', action='store_true', default=False,
                       help='resume the weights only, not the optimizer')
    group.add_argument('--num-classes', type=int, default=None, metavar='N',
                       help='number of classes (default: the model\'s)')
    group.add_argument('--gp', default=None, metavar='POOL', help='global pooling (default: the model\'s)')
    group.add_argument('--img-size', type=int, default=None, metavar='N', help='base size (default: the model\'s)')
    group.add_argument('--in-chans', type=int, default=None, metavar='N', help='input channels (default: 3)')
    group.add_argument('--input-size', type=int, nargs=3, default=None, metavar='N',
                       help='channels, height and width (default: the model\'s)')
    group.add_argument('--crop-pct', type=float, default=None, metavar='N',
                       help='centre crop in validation, as a fraction of the resized image (default: the model\'s)')
    group.add_argument('--mean', type=float, nargs='+', default=None, metavar='MEAN', help='mean pixel value')
    group.add_argument('--std', type=float, nargs='+', default=None, metavar='STD', help='deviation of pixel values')
    group.add_argument('--interpolation', default='', metavar='NAME', help='resizing (default: the model\'s)')
    group.add_argument('-b', '--batch-size', type=int, default=128, metavar='N',
                       help='images of a step per process, at the base size or as --mixsize-batch-of says (default: '
                            '128)')
    group.add_argument('-vb', '--validation-batch-size', type=int, default=None, metavar='N',
                       help='images of a validation batch per process (default: --batch-size)')
    group.add_argument('--channels-last', action='store_true', default=False, help='channels-last memory format')
    group.add_argument('--fuser', default='', metavar='NAME', help='fuser of --torchscript: te, old or nvfuser')
    group.add_argument('--grad-accum-steps', type=int, default=1, metavar='N',
                       help='batches of one size that make an optimizer step (default: 1)')
    group.add_argument('--micro-batch-size', default='', metavar='N',
                       help='images of the base size, or as many pixels of other sizes, that a process takes at once: '
                            'larger batches are trained in parts with the same gradient, but for batch norm; "auto" '
                            'tries what fits into memory (default: whole batches)')
    group.add_argument('--grad-checkpointing', action='store_true', default=False,
                       help='recompute activations in the backward pass to save memory')
    group.add_argument('--fast-norm', action='store_true', default=False, help='timm\'s fast norm layers')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=_KeyValues, metavar='K=V',
                       help='further arguments of the model')
    group.add_argument('--head-init-scale', type=float, default=None, metavar='X',
                       help='multiply the initial weights of the classifier')
    group.add_argument('--head-init-bias', type=float, default=None, metavar='X',
                       help='initial bias of the classifier')
    group.add_argument('--torchcompile-mode', default=None, metavar='MODE', help='mode of --torchcompile')
    compiled = group.add_mutually_exclusive_group()
    compiled.add_argument('--torchscript', action='store_true', default=False,
                          help='script the model; with --mixsize off only')
    compiled.add_argument('--torchcompile', nargs='?', default=None, const='inductor', metavar='BACKEND',
                          help='compile the model, one static graph for each size (default backend: inductor)')


def _add_device(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--mixed-precision', choices=('no', 'fp16', 'bf16'), default=None,
                       help='precision of the forward pass (default: as Accelerate is configured)')
    group.add_argument('--device', default='cuda', metavar='DEVICE',
                       help='"cpu", or a device such as cuda:1; "cuda" is the accelerator that there is, if any '
                            '(default: cuda)')
    group.add_argument('--amp', action='store_true', default=False,
                       help='the same as --mixed-precision with --amp-dtype')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'),
                       help='precision of --amp (default: float16)')
    group.add_argument('--model-dtype', default=None, choices=('float32', 'float16', 'bfloat16'),
                       help='precision of the weights, without --amp (default: float32)')
    group.add_argument('--no-tf32', action='store_true', default=False,
                       help='multiply and convolve float32 exactly on NVIDIA GPUs, not with the short mantissa of TF32')
    group.add_argument('--deterministic', action='store_true', default=False,
                       help='use deterministic algorithms only, so that two runs on one machine are bit-equal; slower')
    group.add_argument('--no-ddp-bb', action='store_true', default=False,
                       help='do not broadcast buffers between processes in the forward pass')
    group.add_argument('--synchronize-step', action='store_true', default=False,
                       help='wait for the device after each step')
    group.add_argument('--local_rank', type=int, default=0, metavar='N',
                       help='set by old launchers, the same as LOCAL_RANK in the environment')
    group.add_argument('--device-modules', nargs='+', default=None, metavar='MODULE',
                       help='Python modules to import first, such as a device\'s backend')


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Optimizer')
    group.add_argument('--opt', default='sgd', metavar='OPTIMIZER', help='timm optimizer (default: sgd)')
    group.add_argument('--opt-eps', type=float, default=None, metavar='EPSILON', help='epsilon of the optimizer')
    group.add_argument('--opt-betas', type=float, nargs='+', default=None, metavar='BETA', help='its betas')
    group.add_argument('--momentum', type=float, default=0.9, metavar='M', help='its momentum (default: 0.9)')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='W', help='weight decay (default: 2e-5)')
    group.add_argument('--clip-grad', type=float, default=None, metavar='NORM',
                       help='clip gradients, after smoothing them (default: no clipping)')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'),
                       help='how to clip (default: norm)')
    group.add_argument('--layer-decay', type=float, default=None, metavar='X', help='learning rate decay by layer')
    group.add_argument('--layer-decay-min-scale', type=float, default=0, metavar='X',
                       help='its smallest factor (default: 0)')
    group.add_argument('--layer-decay-no-opt-scale', type=float, default=None, metavar='X',
                       help='layers with a smaller factor are not trained')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=_KeyValues, metavar='K=V',
                       help='further arguments of the optimizer')


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Learning rate')
    group.add_argument('--sched', default='cosine', metavar='SCHEDULER', help='timm schedule (default: cosine)')
    group.add_argument('--sched-on-updates', action='store_true', default=False,
                       help='step the schedule after each update, not after each epoch')
    group.add_argument('--lr', type=float, default=None, metavar='LR', help='learning rate, overrides --lr-base')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='LR',
                       help='learning rate for a batch of --lr-base-size, scaled to the --batch-size of all processes; '
                            'duplicates do not count (default: 0.1)')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='see --lr-base (default: 256)')
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
                       help='how it scales (default: sqrt for ada* and lamb, else linear)')
    group.add_argument('--lr-noise', type=float, nargs='+', default=None, metavar='PCT',
                       help='when learning rate noise is on, as fractions of the epochs')
    group.add_argument('--lr-noise-pct', type=float, default=0.67, metavar='PCT', help='its limit (default: 0.67)')
    group.add_argument('--lr-noise-std', type=float, default=1.0, metavar='STD', help='its deviation (default: 1)')
    group.add_argument('--lr-cycle-mul', type=float, default=1.0, metavar='X', help='cycle growth (default: 1)')
    group.add_argument('--lr-cycle-decay', type=float, default=0.5, metavar='X', help='cycle decay (default: 0.5)')
    group.add_argument('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles (default: 1)')
    group.add_argument('--lr-k-decay', type=float, default=1.0, metavar='K', help='k-decay (default: 1)')
    group.add_argument('--lr-decay-fn', default=None, metavar='NAME',
                       help='form of the decay of wsd and rsqrt (default: 1-sqrt for wsd, linear for rsqrt)')
    group.add_argument('--lr-stable-timescale', type=float, default=None, metavar='N',
                       help='timescale of rsqrt in epochs (default: the warm-up)')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='LR', help='first rate (default: 1e-5)')
    group.add_argument('--min-lr', type=float, default=0, metavar='LR', help='lowest rate (default: 0)')
    group.add_argument('--epochs', type=int, default=300, metavar='N', help='epochs (default: 300)')
    group.add_argument('--stop-epoch', type=int, default=None, metavar='N',
                       help='stop after N epochs and leave the schedule as it is')
    group.add_argument('--epoch-repeats', type=float, default=0., metavar='N',
                       help='passes over the data in an epoch, for data sets that stream')
    group.add_argument('--start-epoch', type=int, default=None, metavar='N', help='first epoch, counted from 0')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs where a multistep schedule decays (default: 90 180 270)')
    group.add_argument('--decay-epochs', type=float, default=None, metavar='N',
                       help='epochs between decays of a step schedule, or the length of the decay of wsd and rsqrt, '
                            'where below 1 it is a fraction (default: 90; 0.2)')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='warm-up (default: 5)')
    group.add_argument('--warmup-prefix', action='store_true', default=False, help='warm up before the schedule')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr (default: 0)')
    group.add_argument('--patience-epochs', type=int, default=10, metavar='N', help='plateau patience (default: 10)')
    group.add_argument('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='decay (default: 0.1)')


def _add_augmentation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Augmentation and regularisation')
    group.add_argument('--no-aug', action='store_true', default=False, help='no training augmentation')
    group.add_argument('--train-crop-mode', default=None, choices=('rrc', 'rkrc', 'rkrr'),
                       help='how training images are cropped (default: rrc, a random resized crop)')
    group.add_argument('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT',
                       help='area of the crop (default: 0.08 1)')
    group.add_argument('--ratio', type=float, nargs='+', default=[3 / 4, 4 / 3], metavar='RATIO',
                       help='aspect ratio of the crop (default: 0.75 1.33)')
    group.add_argument('--train-pad', type=int, default=0, metavar='N',
                       help='instead, crop the image\'s own size out of it with a black border of N pixels, as is '
                            'usual for CIFAR with 4, and resize that (default: 0, off)')
    group.add_argument('--hflip', type=float, default=0.5, metavar='P', help='horizontal flips (default: 0.5)')
    group.add_argument('--vflip', type=float, default=0., metavar='P', help='vertical flips (default: 0)')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='X', help='colour jitter (default: 0.4)')
    group.add_argument('--color-jitter-prob', type=float, default=None, metavar='P', help='its probability')
    group.add_argument('--grayscale-prob', type=float, default=None, metavar='P', help='probability of grayscale')
    group.add_argument('--gaussian-blur-prob', type=float, default=None, metavar='P', help='probability of blur')
    group.add_argument('--aa', default=None, metavar='NAME', help='AutoAugment, RandAugment or AugMix string')
    group.add_argument('--aug-repeats', type=float, default=0, metavar='N',
                       help='augmented copies of each image, the same as --mixsize-duplicates; with --mixsize off '
                            'timm\'s repeated augmentation over processes (default: 0)')
    group.add_argument('--aug-splits', type=int, default=0, metavar='N',
                       help='augmentation splits, with --mixsize off only (default: 0)')
    group.add_argument('--reprob', type=float, default=0., metavar='P', help='random erasing (default: 0)')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'),
                       help='what erases (default: pixel)')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='erased regions (default: 1)')
    group.add_argument('--resplit', action='store_true', default=False,
                       help='do not erase in the first augmentation split, or half of the batch')
    group.add_argument('--mixup', type=float, default=0.0, metavar='A', help='alpha of mixup (default: 0, off)')
    group.add_argument('--cutmix', type=float, default=0.0, metavar='A', help='alpha of cutmix (default: 0, off)')
    group.add_argument('--cutmix-minmax', type=float, nargs='+', default=None, metavar='X',
                       help='smallest and largest cutmix ratio, instead of alpha')
    group.add_argument('--mixup-prob', type=float, default=1.0, metavar='P', help='share of mixed batches (default: 1)')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='P',
                       help='share of cutmix where both are on (default: 0.5)')
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'),
                       help='one mixture per batch, pair or element (default: batch)')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N',
                       help='turn mixing off from this epoch, 0 for never (default: 0)')
    group.add_argument('--smoothing', type=float, default=None, metavar='X',
                       help='label smoothing (default: 0.1; 0 for multi-label)')
    group.add_argument('--train-interpolation', default='random', metavar='NAME',
                       help='resizing in training: random, bilinear, bicubic (default: random)')
    group.add_argument('--drop', type=float, default=0.0, metavar='P', help='dropout (default: 0)')
    group.add_argument('--drop-connect', type=float, default=None, metavar='P', help='old name of --drop-path')
    group.add_argument('--drop-path', type=float, default=None, metavar='P', help='stochastic depth')
    group.add_argument('--drop-block', type=float, default=None, metavar='P', help='drop block')


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Loss')
    group.add_argument('--task', default='classification', choices=('classification', 'multilabel'),
                       help='one class an image, or any number (default: classification)')
    group.add_argument('--multilabel-threshold', type=float, default=0.5, metavar='P',
                       help='probability from which a label counts in F1 scores (default: 0.5)')
    group.add_argument('--loss', default=None, choices=LOSS_TYPES,
                       help='training loss (default: ce; bce for multi-label)')
    group.add_argument('--jsd-loss', action='store_true', default=False, help='the same as --loss jsd')
    group.add_argument('--bce-loss', action='store_true', default=False, help='the same as --loss bce')
    group.add_argument('--bce-sum', action='store_true', default=False, help='sum bce over the classes')
    group.add_argument('--bce-target-thresh', type=float, default=None, metavar='X',
                       help='soft targets above this count as 1 in bce')
    group.add_argument('--bce-pos-weight', type=float, default=None, metavar='W',
                       help='the same as --loss-pos-weight')
    group.add_argument('--loss-pos-weight', default=None, metavar='W',
                       help='weight of positives in bce and asl: a number, a list with commas, a file, or neg_pos to '
                            'compute it from --class-stats')
    group.add_argument('--loss-class-weight', default=None, metavar='W',
                       help='weight of classes, likewise; computed by inv_freq or effective_num')
    group.add_argument('--loss-weight-power', type=float, default=1.0, metavar='X',
                       help='exponent of neg_pos and inv_freq (default: 1)')
    group.add_argument('--class-stats', default=None, metavar='FILE',
                       help='JSON file of class counts as timm\'s class_weights.py writes it')
    group.add_argument('--poly-epsilon', type=float, default=2.0, metavar='X', help='epsilon of poly (default: 2)')
    group.add_argument('--poly-gamma', type=float, default=0.0, metavar='X',
                       help='focusing of multi-label poly (default: 0)')


def _add_distillation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Distillation')
    group.add_argument('--kd-model-name', default=None, metavar='MODEL',
                       help='teacher: a timm model with trained weights, hf-hub:... or local-dir:...')
    group.add_argument('--kd-distill-type', default='logit', choices=('logit', 'feature', 'token'),
                       help='what the student learns from it (default: logit)')
    group.add_argument('--kd-loss-type', default='kl', choices=('kl',), help='loss of logits (default: kl)')
    group.add_argument('--distill-loss-weight', type=float, default=None, metavar='W',
                       help='weight of the distillation loss (default: 1, or 1 - --task-loss-weight)')
    group.add_argument('--task-loss-weight', type=float, default=None, metavar='W',
                       help='weight of the training loss (default: 1)')
    group.add_argument('--kd-temperature', type=float, default=4.0, metavar='T', help='temperature (default: 4)')
    group.add_argument('--kd-student-feature-dim', type=int, default=None, metavar='N',
                       help='width of the student\'s features (default: the model\'s)')
    group.add_argument('--kd-teacher-feature-dim', type=int, default=None, metavar='N',
                       help='width of the teacher\'s features (default: the model\'s)')
    group.add_argument('--kd-token-distill-type', default='soft', choices=('soft', 'hard'),
                       help='targets of a distillation token (default: soft)')


def _add_batch_norm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Batch norm')
    group.add_argument('--bn-momentum', type=float, default=None, metavar='M', help='momentum of batch norm')
    group.add_argument('--bn-eps', type=float, default=None, metavar='EPS', help='epsilon of batch norm')
    group.add_argument('--sync-bn', action='store_true', default=False, help='batch statistics over all processes')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''),
                       help='what becomes of the processes\' running statistics after an epoch (default: reduce)')
    group.add_argument('--split-bn', action='store_true', default=False,
                       help='statistics of their own for each augmentation split, with --mixsize off only')


def _add_ema(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Moving average of the weights')
    group.add_argument('--model-ema', action='store_true', default=False,
                       help='keep a moving average of the weights; validation is of it')
    group.add_argument('--model-ema-force-cpu', action='store_true', default=False,
                       help='keep it on the CPU; it is then saved but not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='decay (default: 0.9998)')
    group.add_argument('--model-ema-warmup', action='store_true', default=False,
                       help='let the decay grow to its value')


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=int, default=42, metavar='S', help='random seed (default: 42)')
    group.add_argument('--log-interval', type=int, default=50, metavar='N', help='steps between lines (default: 50)')
    group.add_argument('--val-interval', type=int, default=1, metavar='N',
                       help='epochs between validations and checkpoints (default: 1)')
    group.add_argument('--eval-metric', default=None, metavar='METRIC',
                       help='what best/ is chosen by: loss, top1 or top5; for multi-label loss, map, micro_f1, '
                            'macro_f1 or sample_f1 (default: top1; map)')
    group.add_argument('--tta', type=int, default=0, metavar='N',
                       help='2 validates each image together with its mirror image (default: 0, off)')
    group.add_argument('--save-epochs', type=int, nargs='+', default=[], metavar='N',
                       help='keep the checkpoints after these many epochs as milestone-N')
    group.add_argument('--checkpoint-hist', type=int, default=10, metavar='N',
                       help='checkpoints of the best epochs to keep (default: 10)')
    group.add_argument('--checkpoint-interval', default='30m', metavar='N',
                       help='steps, or with an "m" minutes, between checkpoints inside an epoch; 0 for none '
                            '(default: 30m)')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='the same in steps, as timm has it')
    group.add_argument('--max-nonfinite', type=int, default=10, metavar='N',
                       help='stop when the loss was not finite for so many steps in a row; 0 for never (default: 10)')
    group.add_argument('--save-images', action='store_true', default=False,
                       help='save the batch of each log line as an image in the run\'s folder')
    group.add_argument('-j', '--workers', type=int, default=4, metavar='N',
                       help='processes that load images (default: 4)')
    group.add_argument('--worker-seeding', default='all', choices=('all', 'part'),
                       help='seeding of the workers of timm\'s own loader; part leaves out NumPy (default: all)')
    group.add_argument('--pin-mem', action='store_true', default=False, help='pin the memory of batches')
    group.add_argument('--no-prefetcher', action='store_true', default=False,
                       help='normalise and erase in the workers, not on the device')
    group.add_argument('--fast-loader', action='store_true', default=False,
                       help='MixSize\'s loader for one size too, with --mixsize off: the same augmentation, faster')
    group.add_argument('--scaled-decoding', action='store_true', default=False,
                       help='decode a JPEG at 1/2, 1/4 or 1/8 of its size where its step still has all its '
                            'pixels: faster for small sizes, pixels differ a little')
    group.add_argument('--use-multi-epochs-loader', action='store_true', default=False,
                       help='timm\'s loader that keeps its workers, with --mixsize off only')
    group.add_argument('--output', default='', metavar='DIR', help='folder of runs (default: ./output/train)')
    group.add_argument('--experiment', default='', metavar='NAME',
                       help='name of the run\'s folder (default: time, model and size)')


def _add_trackers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Trackers')
    group.add_argument('--log-wandb', action='store_true', default=False, help='log to Weights & Biases')
    group.add_argument('--wandb-project', default=None, metavar='NAME', help='its project (default: mixsize-timm)')
    group.add_argument('--wandb-tags', nargs='+', default=[], metavar='TAG', help='its tags')
    group.add_argument('--wandb-resume-id', default='', metavar='ID', help='the run there to continue, with --resume')
    group.add_argument('--log-tensorboard', action='store_true', default=False,
                       help='log to TensorBoard, in the run\'s folder')


def _add_scheduled_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        'timm\'s scheduled sizes', 'timm\'s own way to train at several sizes, instead of --mixsize.')
    group.add_argument('--train-img-sizes', type=int, nargs='+', default=None, metavar='N', help='image sizes')
    group.add_argument('--train-batch-sizes', type=int, nargs='+', default=None, metavar='N',
                       help='batch of each size (default: --batch-size)')
    group.add_argument('--train-size-probs', type=float, nargs='+', default=None, metavar='P',
                       help='share of the steps of each size (default: equal shares)')
    group.add_argument('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
                       help='progressive goes from the first size to the last (default: constant)')
    group.add_argument('--train-size-schedule-spread', type=float, default=0.65, metavar='X',
                       help='spread of a progressive schedule, in sizes (default: 0.65)')
    group.add_argument('--train-size-random-mix', type=float, default=0.1, metavar='P',
                       help='share of random sizes in a progressive schedule (default: 0.1)')
    group.add_argument('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, default=None, metavar='N',
                       help='batches of an epoch (default: from the mean batch)')
    group.add_argument('--variable-batch-loss-scale', default='none', choices=('none', 'sqrt', 'linear'),
                       help='scale gradients by a batch\'s ratio to the mean batch (default: none)')


def _add_naflex(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('NaFlex', 'timm\'s NaFlex loader and models, with --mixsize off only.')
    group.add_argument('--naflex-loader', action='store_true', default=False, help='use timm\'s NaFlex loader')
    group.add_argument('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024], metavar='N',
                       help='sequence lengths in training (default: 128 256 576 784 1024)')
    group.add_argument('--naflex-max-seq-len', type=int, default=576, metavar='N',
                       help='sequence length in validation (default: 576)')
    group.add_argument('--naflex-patch-sizes', type=int, nargs='+', default=None, metavar='N',
                       help='patch sizes in training (default: the model\'s)')
    group.add_argument('--naflex-patch-size-probs', type=float, nargs='+', default=None, metavar='P',
                       help='share of each patch size (default: equal shares)')
    group.add_argument('--naflex-loss-scale', default='linear', choices=('none', 'sqrt', 'linear'),
                       help='scale gradients by a batch\'s ratio to --batch-size (default: linear)')
    group.add_argument('--naflex-patchify-channels-first', action='store_true', default=False,
                       help='lay the pixels of a patch out by channel')
