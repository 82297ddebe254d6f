"""The data sets of a run, and its loaders at any size; what cannot work is found here and said in one line."""
import argparse
import copy
import logging
from contextlib import nullcontext
from itertools import islice
from typing import Any, Dict, Optional, Tuple

import torch
from accelerate import Accelerator
from PIL import ImageMode
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_naflex_loader,
    resolve_data_config,
)
from timm.data.target_transforms import MultiLabelTarget
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .args import make_regime, mixing, model_dtype
from .calibration import calibrate
from .data import MixSizeLoader, create_calibration_loader, create_loader
from .datasets import DIGITS, check_classes, check_not_train, check_splits, class_names, create_dataset
from .errors import UsageError, refusing
from .regime import Regime
from .regularization import SizeRegularization
from .sampler import EpochPlan, describe_plan
from .sizes import SizeProbe, fit_sizes
from .streaming import create_stream, num_images
from .workers import WorkerError, WorkerInit

_logger = logging.getLogger(__name__)


def fit_regime(args: argparse.Namespace, model: nn.Module, input_size: Tuple[int, int, int]) -> Optional[Regime]:
    """The regime asked for, moved to sizes that the model takes; ``None`` for ``--mixsize off``."""
    regime = make_regime(args, input_size)
    channels, height, width = input_size
    if args.naflex_loader:
        return None
    takes = SizeProbe(model, channels, (height, width))
    if regime is None:
        for size in ((height, width), *((size, size) for size in args.train_img_sizes or ())):
            if not takes(size):
                raise UsageError(f'{args.model} does not take images of {size[0]}x{size[1]} px: {takes.reason}')
        return None
    try:
        regime, moved = fit_sizes(regime, takes)
    except ValueError as error:
        reason = '' if takes(regime.base_size) else f' ({takes.reason})'
        raise UsageError(f'{args.model}: {error}{reason}') from error
    for old, new in moved.items():
        _logger.warning('%s does not take %d px: trained at %d px instead', args.model, old, new)
    return regime


class CheckedLabel:
    """A target transform that refuses a label without a class, which a GPU would answer with a failed assertion.

    Args:
        num_classes: Number of classes of the model.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, label: Any) -> Any:
        if not 0 <= label < self.num_classes:
            raise WorkerError(f'a label is {label}, and with --num-classes {self.num_classes} labels go from 0 to '
                              f'{self.num_classes - 1}: check both')
        return label


class EvaluationData:
    """The images that a model is measured and calibrated on, and their loaders at any size.

    Args:
        args: The arguments.
        model: Tells the number of classes and the preprocessing.
        accelerator: Owns devices and processes.
    """
    uses_train_labels = False  # there are images without any to calibrate on

    def __init__(self, args: argparse.Namespace, model: Any, accelerator: Accelerator) -> None:
        self.args = args
        self.accelerator = accelerator
        with refusing('--input-size, --mean and --std do not fit'):
            self.config = self._resolve_config(model)
        self.channels, *self.height_width = self.config['input_size']
        self.base_size: int = self.config['input_size'][-1]
        self.train: Any = None
        self.validation: Any = None

    def open(self, *, train: bool, validation: bool) -> None:
        """Open the training images, which calibration needs too, and the validation images."""
        args = self.args
        # one process of a machine fetches what is not there
        alone = self.accelerator.local_main_process_first() if args.dataset_download else nullcontext()
        with refusing(), alone:
            if train:
                self.train = self._create_dataset(args.train_split, True)
            if validation:
                self.validation = self._create_dataset(args.val_split, False)
            if train and validation and args.val_split != args.train_split:
                check_splits(self.train, self.validation, args.val_split)
            elif validation and not train:
                check_not_train(self.validation, args.data_dir, args.val_split, args.train_split)

    @property
    def num_images(self) -> Optional[int]:
        """Validation images; of data that stream the number is not known beforehand."""
        return None if isinstance(self.validation, IterableDataset) else len(self.validation)

    def to_dict(self, calibrated: bool) -> Dict[str, Any]:
        """What results say about the images that they are of, and how they were prepared.

        Args:
            calibrated: Whether there was a calibration, of which it is to be said too.
        """
        args, config = self.args, self.config
        return {'data': args.data_dir or args.dataset, 'split': args.val_split, 'batch size': args.batch_size,
                'mean': config['mean'], 'std': config['std'], 'interpolation': config['interpolation'],
                'crop mode': config['crop_mode'], 'weights': args.model_dtype or 'float32',
                **({'calibrated on': 'augmented images' if args.calibrate_aug else 'images as in use'} if calibrated
                   else {}), **({'tta': args.tta} if args.tta else {})}

    @property
    def batches_of_step(self) -> int:
        """Batches of ``--batch-size`` images that one of ``--calibrate`` stands for."""
        return 1

    def num_calibration_batches(self, wanted: int) -> int:
        """Batches of ``--batch-size`` that calibration takes where so many are asked for: at most one epoch."""
        wanted *= self.batches_of_step
        if isinstance(self.train, IterableDataset):
            return wanted
        return min(wanted, -(-len(self.train) // self.args.batch_size))

    def _resolve_config(self, model: Any) -> Dict[str, Any]:
        config = resolve_data_config(vars(self.args), model=model, use_test_size=True)
        return {**config, 'input_size': (self.args.in_chans, *config['input_size'][1:])}

    def validation_loader(self, size: int) -> Any:
        """timm's loader of the validation images at one size, as its validation script makes it."""
        return self._loader(
            self.validation, size, self.args.validation_batch_size or self.args.batch_size, persistent_workers=False,
            **self._preparation())

    def calibration_loader(self, size: int, num_batches: Optional[int] = None) -> Any:
        """Training images at one size, the same ones for any number of processes.

        They are augmented as in training, or without ``--calibrate-aug`` prepared as in evaluation. Only data that
        streams, or augmented images that are not square, are drawn anew, by timm's loader.

        Args:
            size: Size in pixels.
            num_batches: Batches over all processes; by default one epoch.
        """
        augmented = self.args.calibrate_aug
        images = self._augmentation() if augmented else self._preparation()
        if augmented and self.args.mixsize_reg:
            regularization = SizeRegularization(self.args.mixsize_reg, self.base_size)
            images.update(regularization.augmentation(size, images['auto_augment'], images['color_jitter']))
        processes = self.accelerator.num_processes
        oblong = self.height_width != [self.base_size] * 2
        if isinstance(self.train, IterableDataset) or oblong and augmented:
            loader = self._loader(self.train, size, self.args.batch_size, persistent_workers=False, **images)
            return islice(loader, None if num_batches is None else -(-num_batches // processes))
        return self._loader(
            self.train, size, self.args.batch_size, create=create_calibration_loader, num_batches=num_batches,
            scaled_decoding=self.args.scaled_decoding, worker_timeout=self.args.worker_timeout,
            seed=self.args.seed, rank=self.accelerator.process_index,
            world_size=processes, distributed=False, persistent_workers=False, **images)

    def shape(self, size: int) -> Tuple[int, int, int]:
        """Channels, height and width of an image of a size; only at the base size it may be oblong."""
        height, width = self.height_width if size == self.base_size else (size, size)
        return self.channels, height, width

    def calibrate(self, model: nn.Module, size: int, wanted: int) -> nn.Module:
        """The model calibrated for a size, with the statistics of all processes.

        Args:
            model: The model; it is not touched.
            size: Size in pixels.
            wanted: Batches that are asked for; :meth:`num_calibration_batches` says how many that are.
        """
        accelerator = self.accelerator
        reduce = (lambda tensor: accelerator.reduce(tensor, 'sum')) if accelerator.num_processes > 1 else None
        with accelerator.autocast():
            loader = self.calibration_loader(size, self.num_calibration_batches(wanted))
            try:  # layer decay leaves the statistics of frozen layers moving
                return calibrate(model, loader, reduce=reduce, frozen=True)
            except ValueError as error:
                raise UsageError(f'cannot calibrate for {size} px: {error}') from error

    def _create_dataset(self, split: str, training: bool) -> Any:
        args = self.args
        options: Dict[str, Any] = dict(
            class_map=args.class_map, download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
            input_img_mode=self._image_mode(), input_key=args.input_key, target_key=args.target_key,
            trust_remote_code=args.dataset_trust_remote_code)
        if args.task == 'multilabel':
            dense = args.target_format == 'multihot'
            options['target_transform'] = MultiLabelTarget(args.num_classes, dense=dense)
            options['target_format'] = args.target_format if dense else None
        elif (self.uses_train_labels or not training) and not args.dataset.startswith('torch/'):  # those tell classes
            options['target_transform'] = CheckedLabel(args.num_classes)
        if training:
            options.update(is_training=True, num_samples=args.train_num_samples, repeats=args.epoch_repeats)
        else:
            options['num_samples'] = args.val_num_samples
        if self._reads_shards():
            for name in ('download', 'trust_remote_code'):
                options.pop(name)
            return create_stream(args.dataset, args.data_dir, split, **options)
        dataset = create_dataset(args.dataset, args.data_dir, split, **options)
        for name in ('epoch_repeats', 'train_num_samples', 'val_num_samples'):
            if getattr(args, name) and not isinstance(dataset, IterableDataset):
                raise ValueError(f'--{name.replace("_", "-")} is for data that streams: leave it out')
        return dataset

    def _image_mode(self) -> str:
        """The PIL mode of images of as many channels as the model takes."""
        mode = self.args.input_img_mode or ('RGB' if self.channels == 3 else 'L')
        try:
            channels = len(ImageMode.getmode(mode).bands)
        except KeyError:
            raise ValueError(f'PIL has no mode {mode!r}: check --input-img-mode') from None
        if channels != self.channels:
            raise ValueError(f'images of the mode {mode} and of the model differ in channels, {channels} and '
                             f'{self.channels}: name another --input-img-mode, or --in-chans {channels}')
        return mode

    def _reads_shards(self) -> bool:
        """Whether the data are shards read by :mod:`~mixsize_timm.shards`; tar without a regime is left to timm."""
        kind = self.args.dataset.partition('/')[0].lower() if '/' in self.args.dataset else ''
        return kind == 'parquet' or kind == 'wds' and self.args.mixsize != 'off'

    def _loader(self, dataset: Any, size: int, batch_size: int, create: Any = None, **kwargs: Any) -> Any:
        """A loader at one base size with what all loaders of the run share."""
        args = self.args
        shared: Dict[str, Any] = dict(
            batch_size=batch_size, mean=self.config['mean'], std=self.config['std'], num_workers=args.workers,
            pin_memory=args.pin_mem, device=self.accelerator.device, use_prefetcher=not args.no_prefetcher,
            img_dtype=model_dtype(args) or torch.float32, distributed=self.accelerator.num_processes > 1)
        shared.update(kwargs)
        with refusing('cannot load the images'):
            if args.naflex_loader:
                loader = create_naflex_loader(copy.copy(dataset), channels=self.channels,
                                              patchify_channels_last=not args.naflex_patchify_channels_first, **shared)
            else:
                loader = (create or create_loader)(copy.copy(dataset), self.shape(size), **shared)
        innermost: Any = getattr(loader, 'loader', loader)
        if type(getattr(innermost, 'worker_init_fn', None)) is not WorkerInit and isinstance(innermost, DataLoader):
            innermost.worker_init_fn = WorkerInit(innermost.worker_init_fn)
        return loader

    def _preparation(self) -> Dict[str, Any]:
        """How images are prepared for use, as in timm's validation script."""
        return dict(
            is_training=False, interpolation=self.config['interpolation'], crop_pct=self.config['crop_pct'],
            crop_mode=self.config['crop_mode'], crop_border_pixels=self.args.crop_border_pixels)

    def _augmentation(self) -> Dict[str, Any]:
        """How images are prepared for training."""
        args = self.args
        own = self.config['interpolation']
        crop: Dict[str, Any] = dict(train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio)
        if args.train_pad:
            crop = dict(train_pad=args.train_pad)
        return dict(
            **crop, is_training=True, no_aug=args.no_aug, re_prob=args.reprob, re_mode=args.remode,
            re_count=args.recount, re_split=args.resplit, hflip=args.hflip, vflip=args.vflip,
            color_jitter=args.color_jitter, color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob, gaussian_blur_prob=args.gaussian_blur_prob, auto_augment=args.aa,
            interpolation=own if args.no_aug else args.train_interpolation or own, worker_seeding=args.worker_seeding)


class Data(EvaluationData):
    """The data sets of a training run, and its loaders.

    Args:
        args: The arguments.
        model: Tells the number of classes and the preprocessing.
        accelerator: Owns devices and processes.
        plan_world_size: Processes that a resumed run's batches are rounded for, where it had others.
    """
    uses_train_labels = True

    def __init__(self, args: argparse.Namespace, model: Any, accelerator: Accelerator,
                 plan_world_size: Optional[int] = None) -> None:
        super().__init__(args, model, accelerator)
        self._validation_loaders: Dict[int, Any] = {}
        self.patch_size: Any = None
        self.regime = fit_regime(args, model, self.config['input_size'])
        # what our loader walks; with --mixsize off it may have the one size
        self.loader_regime = self.regime or (self._one_size() if args.fast_loader else None)
        # processes that the batches are for: the global batch is so many times --batch-size
        self.plan_world_size = (plan_world_size if self.loader_regime else None) or accelerator.num_processes
        if args.naflex_loader:
            if not hasattr(model, 'get_patch_size'):
                raise UsageError(f'--naflex-loader needs a NaFlex model such as naflexvit_base_patch16_gap, and '
                                 f'{args.model} is none')
            self.patch_size = model.get_patch_size()
        self.open(train=True, validation=bool(args.val_split))
        with refusing():
            check_classes(self.train, self.validation, args.num_classes)
        self.mixup_fn: Optional[Mixup] = None  # for batches that no loader mixes
        self.loader = self._train_loader()
        if self.validation is not None:
            self.validation_loader(self.base_size)
        self.mean_batch: float = args.batch_size  # per process, what learning rates are scaled to; not MixSize's
        if args.train_img_sizes:
            self.mean_batch = self.loader.batch_sampler.average_batch_size
        self.num_steps = self._mean_steps()

    def _resolve_config(self, model: Any) -> Dict[str, Any]:
        return resolve_data_config(vars(self.args), model=model)

    @property
    def batches_of_step(self) -> int:
        """Those of an optimizer step: runs of the same global batch are calibrated on as many images."""
        return self.plan_world_size * self.args.grad_accum_steps

    @property
    def num_train_images(self) -> int:
        """Training images of an epoch, over all processes."""
        return num_images(self.train)

    @property
    def sizes(self) -> Tuple[int, ...]:
        """Image sizes in training, in pixels; of images that are not square the width."""
        return tuple(self.regime.sizes if self.regime else self.args.train_img_sizes or (self.base_size,))

    @property
    def num_shapes(self) -> int:
        """Shapes of batch that training has at most."""
        args, plan, regime = self.args, self.start_epoch(0), self.regime
        if regime is not None and regime.anneal:  # the sizes of an epoch are not those of another
            return len({(size, *regime.group(size)) for size in regime.sizes})
        if args.naflex_loader:  # what is left at the end of an epoch makes a shorter batch
            return 2 * len(args.naflex_train_seq_lens) * len(args.naflex_patch_sizes or (1,))
        return max(len(set(zip(plan.size, plan.batch * plan.duplicates))), len(args.train_img_sizes or ()))

    @property
    def decreasing_metric(self) -> bool:
        """Whether a lower metric is better: one of loss, which it is too where nothing is validated."""
        return self.validation is None or self.args.eval_metric == 'loss'

    def steps_before(self, epoch: int) -> int:
        """Optimizer steps of all epochs before one."""
        if isinstance(self.loader, MixSizeLoader):
            return self.loader.batch_sampler.steps_before(epoch)
        return epoch * self.num_steps

    def _mean_steps(self) -> int:
        """Optimizer steps of an epoch: of every one, or of an annealed regime in the mean."""
        if self.regime is not None and self.regime.anneal:
            return round(self.steps_before(self.args.epochs) / self.args.epochs)
        return self.start_epoch(0).num_steps

    def start_epoch(self, epoch: int, first_step: int = 0) -> EpochPlan:
        """Turn the training loader to an epoch, and to a step of it if the loader is ours; give its plan."""
        args = self.args
        if self.mixup_fn is not None and args.mixup_off_epoch:
            self.mixup_fn.mixup_enabled = epoch < args.mixup_off_epoch
        if mixing(args) and args.mixup_off_epoch and not args.no_prefetcher:  # timm's prefetcher or ours
            self.loader.mixup_enabled = epoch < args.mixup_off_epoch
        if isinstance(self.loader, MixSizeLoader):
            self.loader.set_epoch(epoch, first_step)
            return self.loader.batch_sampler.plan
        for part in ('dataset', 'batch_sampler', 'sampler'):  # timm's, of whichever kind
            set_epoch: Any = getattr(getattr(self.loader, part, None), 'set_epoch', None)
            if set_epoch is not None:
                set_epoch(epoch)
        return EpochPlan.of_loader(len(self.loader), self.base_size, args.batch_size * self.accelerator.num_processes,
                                   args.grad_accum_steps, epoch)

    def validation_loader(self, size: int) -> Any:
        """timm's loader of the validation images at one size; that of the base size keeps its workers."""
        if size not in self._validation_loaders:
            args = self.args
            options = {**self._preparation(), 'persistent_workers': size == self.base_size}
            if args.naflex_loader:
                options.update(patch_size=self.patch_size, max_seq_len=args.naflex_max_seq_len)
            if self.accelerator.num_processes > 1 and args.dataset.startswith(('tfds', 'wds')):
                options['num_workers'] = min(2, args.workers)  # fewer images are padded, as in timm's script
            self._validation_loaders[size] = self._loader(
                self.validation, size, args.validation_batch_size or args.batch_size, **options)
        return self._validation_loaders[size]

    def _preparation(self) -> Dict[str, Any]:
        """How images are prepared for validation, as in timm's training script."""
        return dict(is_training=False, interpolation=self.config['interpolation'], crop_pct=self.config['crop_pct'])

    def largest_batches(self) -> Dict[int, int]:
        """For each size of the regime, in any epoch, the images with duplicates of a whole batch of a process."""
        assert self.regime is not None
        groups = {size: self.regime.group(size) for size in self.regime.sizes}
        processes = self.accelerator.num_processes  # not always those that the plan was made for
        return {size: -(-batch * self.plan_world_size // processes) * duplicates
                for size, (batch, duplicates) in groups.items()}

    def describe(self) -> None:
        """Log what is trained on, and at which sizes."""
        if self.args.dataset == DIGITS:
            _logger.info('Training on the embedded digits, scans of 8x8 px from scikit-learn: name your own images '
                         'with --data-dir or --dataset')
        names = class_names(self.train)
        base_batch = self.regime.base_batch if self.regime is not None else self.args.batch_size
        _logger.info('%d training and %d validation images%s, base size %s px, base batch %d, %d steps an epoch',
                     self.num_train_images, num_images(self.validation or ()),
                     f' of {len(names)} classes' if names else '',
                     self.base_size, base_batch * self.plan_world_size, self.num_steps)
        if self.args.train_img_sizes:
            _logger.info("timm's scheduled sizes %s px, batches %s a process", self.args.train_img_sizes,
                         self.loader.batch_sampler.batch_sizes)
        if self.args.naflex_loader:
            _logger.info("timm's NaFlex loader, sequences of %s patches", self.args.naflex_train_seq_lens)
        if names and len(names) < self.args.num_classes:
            _logger.warning('The model has %d classes: --num-classes %d would do', self.args.num_classes, len(names))
        if self.regime is None:
            return
        regime, processes = self.regime, self.plan_world_size
        table, warnings = describe_plan(regime, self.num_train_images, processes, self.args.mixsize_drop)
        _logger.info('MixSize %s, base duplicates %d\n%s', regime.adapt, regime.duplicates, table)
        if regime.batch_multiple > 1:
            _logger.info('%severy batch of a process is rounded to a multiple of %d',
                         'mixup and cutmix mix pairs: ' if mixing(self.args) else '', regime.batch_multiple)
        for line in warnings:
            _logger.warning(line)

    def _train_loader(self) -> Any:
        args = self.args
        options = {**self._mixup(), **self._planned()}
        dataset = self.train
        if args.aug_splits:
            dataset = AugMixDataset(copy.copy(dataset), num_splits=args.aug_splits)
        loader = self._loader(dataset, self.base_size, args.batch_size, **options, **self._augmentation())
        if not len(loader):
            raise UsageError(f'{self.num_train_images} training images fill no batch: lower --batch-size')
        return loader

    def _one_size(self) -> Regime:
        if self.height_width != [self.base_size] * 2:
            raise UsageError(f'--fast-loader gives square images, and these are {self.height_width[0]}x'
                             f'{self.height_width[1]} px: leave it out')
        with refusing():
            return Regime.fixed(self.base_size, batch_size=self.args.batch_size,
                                batch_multiple=2 if mixing(self.args) else 1)

    def _mixup(self) -> Dict[str, Any]:
        """The loader's argument that mixes batches; without timm's prefetcher :attr:`mixup_fn` does."""
        args = self.args
        if not mixing(args):
            return {}
        if self.loader_regime is None and args.batch_size % 2 and not args.naflex_loader:
            raise UsageError(f'mixup and cutmix want an even --batch-size, not {args.batch_size}')
        options = dict(
            mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob, label_smoothing=args.smoothing, num_classes=args.num_classes,
            multi_label=args.task == 'multilabel')
        if args.naflex_loader:
            return dict(mixup_fn=NaFlexMixup(**options))
        with refusing('mixup'):
            options.update(mode=args.mixup_mode, cutmix_minmax=args.cutmix_minmax)
            if not args.no_prefetcher:
                # timm's workers would not hear of --mixup-off-epoch if they outlived an epoch
                return dict(collate_fn=FastCollateMixup(**options),
                            persistent_workers=self.loader_regime is not None or not args.mixup_off_epoch)
            self.mixup_fn = Mixup(**options)
        return {}

    def _planned(self) -> Dict[str, Any]:
        """The training loader's arguments on what a batch is: a regime's, timm's scheduled sizes', NaFlex's."""
        args = self.args
        if self.loader_regime is not None:
            return dict(regime=self.loader_regime, seed=args.seed, grad_accum_steps=args.grad_accum_steps,
                        drop=args.mixsize_drop, size_reg=args.mixsize_reg, plan_world_size=self.plan_world_size,
                        scaled_decoding=args.scaled_decoding, max_bad_images=args.max_bad_images,
                        worker_timeout=args.worker_timeout)
        repeats = dict(num_aug_repeats=args.aug_repeats, num_aug_splits=args.aug_splits)
        if args.naflex_loader:
            patches = (dict(patch_size_choices=args.naflex_patch_sizes,
                            patch_size_choice_probs=args.naflex_patch_size_probs)
                       if args.naflex_patch_sizes else dict(patch_size=self.patch_size))
            return dict(train_seq_lens=args.naflex_train_seq_lens, rank=self.accelerator.process_index,
                        world_size=self.accelerator.num_processes, **repeats, **patches)
        if args.train_img_sizes:
            progressive = args.train_size_schedule == 'progressive'
            repeats.update(
                input_size_choices=args.train_img_sizes, batch_size_choices=args.train_batch_sizes,
                batch_choice_weights=args.train_size_probs, batch_choice_seed=args.seed,
                batch_choice_schedule=args.train_size_schedule,
                batch_schedule_epochs=args.epochs if progressive else None,
                batch_schedule_spread=args.train_size_schedule_spread,
                batch_schedule_random_mix=args.train_size_random_mix, num_batches=args.train_batches_per_epoch)
        return dict(use_multi_epochs_loader=args.use_multi_epochs_loader, **repeats)
