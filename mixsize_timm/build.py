"""What a training run is made of, built from its arguments; each fault is found here and said in one line."""
import argparse
import copy
import difflib
import logging
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Tuple

import timm
import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError
from timm.data import FastCollateMixup, Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from torch import nn
from torch.utils.data import IterableDataset

from .args import make_regime, mixing
from .data import MixSizeLoader, create_loader
from .datasets import DIGITS, check_classes, check_splits, class_names, create_dataset
from .parser import UsageError
from .regime import Regime
from .sampler import EpochPlan, describe_plan
from .sizes import SizeProbe, fit_sizes

_logger = logging.getLogger(__name__)


@contextmanager
def _refusing(what: str = '') -> Iterator[None]:
    """Turn the many ways in which timm and others refuse an argument into a :class:`UsageError`."""
    try:
        yield
    except (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError,
            SafetensorError) as error:
        reason = ' '.join(str(error).split())[:500] or type(error).__name__
        raise UsageError(f'{what}: {reason}' if what else reason) from error


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator of the run; on the CPU with all cores, where the launcher would leave one thread a process."""
    with _refusing('Accelerate'):
        accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with='wandb' if args.log_wandb else None)
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise UsageError(f'{accelerator.distributed_type.value} is not supported: configure Accelerate for plain data '
                         'parallelism')
    if accelerator.device.type == 'cpu':
        if accelerator.mixed_precision == 'fp16':
            raise UsageError('--mixed-precision fp16 needs a GPU: use bf16 or no')
        if args.sync_bn and accelerator.num_processes > 1:
            raise UsageError('--sync-bn needs GPUs: leave it out on the CPU')
        if os.environ.get('OMP_NUM_THREADS', '1') == '1':
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    elif accelerator.device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def create_model(args: argparse.Namespace) -> nn.Module:
    """timm's model; ``args.num_classes`` is set to its number of classes."""
    if ':' not in args.model and not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model.split('.')[0], timm.list_models(), 3)
        raise UsageError(f'timm has no model {args.model!r}'
                         + (f': did you mean {" or ".join(close)}?' if close else ': timm.list_models() names them'))
    overlay: Dict[str, Any] = {}
    if args.pretrained_path:
        overlay['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    fresh = not args.resume  # a resumed run brings its own weights
    with _refusing(f'cannot make {args.model}'):
        model: Any = timm.create_model(
            args.model, pretrained=fresh and bool(args.pretrained or args.pretrained_path),
            in_chans=args.in_chans or (args.input_size or [3])[0],
            num_classes=args.num_classes, drop_rate=args.drop, drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block, global_pool=args.gp, bn_momentum=args.bn_momentum, bn_eps=args.bn_eps,
            checkpoint_path=args.initial_checkpoint if fresh else '', **overlay, **args.model_kwargs)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    args.num_classes = model.num_classes
    return model


def fit_regime(args: argparse.Namespace, model: nn.Module, input_size: Tuple[int, int, int]) -> Optional[Regime]:
    """The regime asked for, moved to sizes that the model takes; ``None`` for ``--mixsize off``."""
    regime = make_regime(args, input_size)
    channels, height, width = input_size
    takes = SizeProbe(model, channels, (height, width))
    if not takes((height, width)) and regime is None:
        raise UsageError(f'{args.model} does not take images of {height}x{width} px: {takes.reason}')
    if regime is None:
        return None
    try:
        regime, moved = fit_sizes(regime, takes)
    except ValueError as error:
        reason = '' if takes(regime.base_size) else f' ({takes.reason})'
        raise UsageError(f'{args.model}: {error}{reason}') from error
    for old, new in moved.items():
        _logger.warning('%s does not take %d px: trained at %d px instead', args.model, old, new)
    return regime


class Data:
    """The data sets of a run, and its loaders at any size.

    Args:
        args: The arguments.
        model: Tells the number of classes and the preprocessing.
        accelerator: Owns devices and processes.
    """

    def __init__(self, args: argparse.Namespace, model: nn.Module, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        with _refusing('--input-size, --mean and --std do not fit'):
            self.config = resolve_data_config(vars(args), model=model)
        self.channels, *self.height_width = self.config['input_size']
        self.base_size: int = self.config['input_size'][-1]
        self.regime = fit_regime(args, model, self.config['input_size'])
        self.train, self.validation = self._create_datasets(args.num_classes)
        self.mixup_fn: Optional[Mixup] = None  # for batches that no loader mixes
        self.loader = self._train_loader()
        self._validation_loaders: Dict[int, Any] = {}
        if self.validation is not None:
            with _refusing('cannot load the validation images'):
                self.validation_loader(self.base_size)
        self.num_steps = self.start_epoch(0).num_steps  # of every epoch

    def start_epoch(self, epoch: int) -> EpochPlan:
        """Turn the training loader to an epoch, and give its plan."""
        args = self.args
        if self.mixup_fn is not None and args.mixup_off_epoch:
            self.mixup_fn.mixup_enabled = epoch < args.mixup_off_epoch
        if mixing(args) and args.mixup_off_epoch and not args.no_prefetcher:
            self.loader.mixup_enabled = epoch < args.mixup_off_epoch
        if isinstance(self.loader, MixSizeLoader):
            self.loader.set_epoch(epoch)
            return self.loader.batch_sampler.plan
        for part in (self.loader.dataset, self.loader.batch_sampler, self.loader.sampler):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(epoch)
        return EpochPlan.of_loader(len(self.loader), self.base_size, args.batch_size * self.accelerator.num_processes,
                                   args.grad_accum_steps, epoch)

    def validation_loader(self, size: int) -> Any:
        """timm's loader of the validation images at one size; that of the base size keeps its workers."""
        if size not in self._validation_loaders:
            self._validation_loaders[size] = self._loader(
                self.validation, size, self.args.validation_batch_size or self.args.batch_size, is_training=False,
                interpolation=self.config['interpolation'], crop_pct=self.config['crop_pct'],
                persistent_workers=size == self.base_size)
        return self._validation_loaders[size]

    def calibration_loader(self, size: int) -> Any:
        """Training images at one size in equal batches, augmented as in training.

        The same ones each time; only data that streams, or images that are not square, are drawn by timm's loader.
        """
        planned = {}
        if not isinstance(self.train, IterableDataset) and self.height_width == [self.base_size] * 2:
            planned = dict(regime=Regime.fixed(size, batch_size=self.args.batch_size), seed=self.args.seed)
        return self._loader(self.train, size, self.args.batch_size, persistent_workers=False, **planned,
                            **self._augmentation())

    def describe(self) -> None:
        """Log what is trained on, and at which sizes."""
        if self.args.dataset == DIGITS:
            _logger.info('Training on the embedded digits, scans of 8x8 px from scikit-learn: name your own images '
                         'with --data-dir or --dataset')
        names = class_names(self.train)
        _logger.info('%d training and %d validation images%s, base size %s px, base batch %d, %d steps an epoch',
                     len(self.train), len(self.validation or ()), f' of {len(names)} classes' if names else '',
                     self.base_size, self.args.batch_size * self.accelerator.num_processes, self.num_steps)
        if names and len(names) < self.args.num_classes:
            _logger.warning('The model has %d classes: --num-classes %d would do', self.args.num_classes, len(names))
        if self.regime is None:
            return
        regime, processes = self.regime, self.accelerator.num_processes
        table, warnings = describe_plan(regime, len(self.train), processes, self.args.mixsize_drop)
        _logger.info('MixSize %s, base duplicates %d\n%s', regime.adapt, regime.duplicates, table)
        if regime.batch_multiple > 1:
            _logger.info('mixup and cutmix mix pairs: every batch is rounded to an even number')
        for line in warnings:
            _logger.warning(line)

    def _create_datasets(self, num_classes: int) -> Tuple[Any, Any]:
        args = self.args
        options = dict(
            class_map=args.class_map, download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
            input_img_mode=args.input_img_mode or ('RGB' if self.channels == 3 else 'L'), input_key=args.input_key,
            target_key=args.target_key, trust_remote_code=args.dataset_trust_remote_code)
        with _refusing():
            train = create_dataset(args.dataset, args.data_dir, args.train_split, is_training=True,
                                   num_samples=args.train_num_samples, **options)
            validation = None
            if args.val_split:
                validation = create_dataset(args.dataset, args.data_dir, args.val_split,
                                            num_samples=args.val_num_samples, **options)
                if args.val_split != args.train_split:
                    check_splits(train, validation, args.val_split)
            check_classes(train, validation, num_classes)
        return train, validation

    def _train_loader(self) -> Any:
        args = self.args
        collate_fn = None
        if mixing(args):
            if self.regime is None and args.batch_size % 2:
                raise UsageError(f'mixup and cutmix want an even --batch-size, not {args.batch_size}')
            options = dict(
                mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, cutmix_minmax=args.cutmix_minmax,
                prob=args.mixup_prob, switch_prob=args.mixup_switch_prob, mode=args.mixup_mode,
                label_smoothing=args.smoothing, num_classes=args.num_classes)
            if args.no_prefetcher:
                self.mixup_fn = Mixup(**options)
            else:
                collate_fn = FastCollateMixup(**options)
        if self.regime is not None and isinstance(self.train, IterableDataset):
            raise UsageError('MixSize needs a data set with random access, and this one streams: use --mixsize off')
        planned = {} if self.regime is None else dict(
            regime=self.regime, seed=args.seed, grad_accum_steps=args.grad_accum_steps, drop=args.mixsize_drop)
        with _refusing('cannot load the training images'):
            loader = self._loader(self.train, self.base_size, args.batch_size, collate_fn=collate_fn, **planned,
                                  **self._augmentation())
        if not len(loader):
            raise UsageError(f'{len(self.train)} training images fill no batch: lower --batch-size')
        return loader

    def _loader(self, dataset: Any, size: int, batch_size: int, **kwargs: Any) -> Any:
        """A loader at one base size with what all loaders of the run share."""
        args = self.args
        height_width = self.height_width if size == self.base_size else (size, size)
        return create_loader(
            copy.copy(dataset), (self.channels, *height_width), batch_size, mean=self.config['mean'],
            std=self.config['std'], num_workers=args.workers, pin_memory=args.pin_mem, device=self.accelerator.device,
            use_prefetcher=not args.no_prefetcher, distributed=self.accelerator.num_processes > 1, **kwargs)

    def _augmentation(self) -> Dict[str, Any]:
        args = self.args
        own = self.config['interpolation']
        return dict(
            is_training=True, no_aug=args.no_aug, re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
            train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
            vflip=args.vflip, color_jitter=args.color_jitter, color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob, gaussian_blur_prob=args.gaussian_blur_prob, auto_augment=args.aa,
            interpolation=own if args.no_aug else args.train_interpolation or own, worker_seeding=args.worker_seeding)


def create_task(args: argparse.Namespace, model: nn.Module, accelerator: Accelerator) -> Tuple[TrainingTask, Any]:
    """timm's task and optimizer around the prepared model.

    Neither the loader nor the schedule is Accelerate's to prepare: it would deal the batches of one size out to
    different processes, and step the schedule once for each.
    """
    model.to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    with _refusing(f'--opt {args.opt}'):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    model, optimizer = accelerator.prepare(model, optimizer)
    with _refusing(f'--smoothing {args.smoothing}'):
        return ClassificationTask(
            model, criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=mixing(args)),
            device=accelerator.device, verbose=False), optimizer


def create_schedule(args: argparse.Namespace, optimizer: Any, data: Data) -> Tuple[Any, int]:
    """timm's schedule, in steps of the plan, and the number of epochs."""
    with _refusing(f'--sched {args.sched}'):
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=data.validation is None),
            updates_per_epoch=data.num_steps)


def scale_lr(args: argparse.Namespace, regime: Optional[Regime], num_processes: int) -> float:
    """The learning rate: ``--lr``, or ``--lr-base`` scaled to the base batch of all processes as timm does.

    Duplicates and the batches of other sizes do not count; the mean batch is logged beside.
    """
    batch = args.batch_size * num_processes * args.grad_accum_steps
    mean = batch * regime.mean_batch / regime.batch_size if regime else batch
    if args.lr:
        _logger.info('Learning rate %.4g; the base batch is %d, the mean batch %.1f', args.lr, batch, mean)
        return args.lr
    root = args.lr_base_scale == 'sqrt' or (
        not args.lr_base_scale and any(name in args.opt.lower() for name in ('ada', 'lamb')))
    lr = args.lr_base * (batch / args.lr_base_size)**(0.5 if root else 1)
    _logger.info('Learning rate %.4g: %g for %d images, scaled %s to the base batch of %d; the mean batch is %.1f',
                 lr, args.lr_base, args.lr_base_size, 'by the root' if root else 'linearly', batch, mean)
    return lr
