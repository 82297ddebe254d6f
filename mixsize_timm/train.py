"""Train a timm model at mixed image sizes: ``accelerate launch -m mixsize_timm.train --model resnet50``."""
import argparse
import copy
import difflib
import json
import logging
import os
import sys
from datetime import datetime
from typing import Any, Callable, Dict, List, Optional

import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import FastCollateMixup, Mixup, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import distribute_bn, random_seed, setup_default_logging
from timm.utils.summary import trim_summary, update_summary
from torch import nn

from .args import ARGS_FILE, UsageError, make_regime, mixing, parse_args
from .calibration import calibrate
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .data import MixSizeLoader, create_loader
from .datasets import DIGITS, check_classes, create_dataset
from .engine import train_one_epoch, validate
from .regime import Regime
from .sampler import EpochPlan, describe_plan
from .sizes import fit_sizes, size_probe
from .smoothing import GradientSmoother

_logger = logging.getLogger(__name__)

SIZES_FILE = 'sizes.json'
SUMMARY_FILE = 'summary.csv'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    setup_default_logging(logging.INFO if os.environ.get('LOCAL_RANK', '0') == '0' else logging.WARNING)
    try:
        Training(parse_args(argv)).run()
    except UsageError as error:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'mixsize_timm.train: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('mixsize_timm.train: stopped; --resume continues after the last finished epoch', file=sys.stderr)
        return 130
    return 0


class Training:
    """One run of the command. The constructor builds it, finding all that cannot work; :meth:`run` trains."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = _create_accelerator(args)
        random_seed(args.seed, self.accelerator.process_index)

        model = _create_model(args)
        self.data_config = resolve_data_config(vars(args), model=model)
        self.regime = self._fit_regime(model)
        self._create_datasets(model)
        self.loader = self._train_loader()
        self.num_steps = self._set_epoch(0).num_steps  # of every epoch
        if self.regime is not None:
            self._log_regime(self.regime)
        args.lr = args.lr or self._scaled_lr()

        self.task, self.optimizer = self._prepare(model)
        self.smoother = GradientSmoother(args.grad_smoothing_momentum) if args.grad_smoothing else None
        self.lr_scheduler, self.num_epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args, decreasing_metric=self.dataset_eval is None),
            updates_per_epoch=self.num_steps)
        self.start_epoch = 0
        self.best: Optional[float] = None
        self.folder = self._run_folder()
        if args.resume:
            self._resume(args.resume)
        if args.start_epoch is not None:
            self.start_epoch = args.start_epoch
        if self.start_epoch:
            self._set_schedule(self.start_epoch)

    @property
    def model(self) -> nn.Module:
        """The model without the wrappers of Accelerate."""
        return self.accelerator.unwrap_model(self.task.get_trainable_module())

    def run(self) -> None:
        """Train, validate and save every epoch, then report the accuracy at each size."""
        args = self.args
        self._open_folder()
        for epoch in range(self.start_epoch, self.num_epochs):
            plan = self._set_epoch(epoch)
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                self._stop_mixing()
            train_metrics = train_one_epoch(
                epoch, self.task, self.loader, plan, self.optimizer, self.accelerator,
                smoother=self.smoother, lr_scheduler=self.lr_scheduler, mixup_fn=self.mixup_fn,
                clip_grad=args.clip_grad, clip_mode=args.clip_mode, channels_last=args.channels_last,
                log_interval=args.log_interval)
            if self.accelerator.num_processes > 1 and args.dist_bn and not args.sync_bn:
                distribute_bn(self.model, self.accelerator.num_processes, args.dist_bn == 'reduce')
            if (epoch + 1) % args.val_interval and epoch + 1 != self.num_epochs:
                self._set_schedule(epoch + 1)
                continue
            self._finish_epoch(epoch, train_metrics)
        self._report_sizes()
        self.accelerator.end_training()

    def _finish_epoch(self, epoch: int, train_metrics: Dict[str, float]) -> None:
        """Validate, write the summary, step the schedule and save."""
        used, eval_metrics = self._validate(epoch)
        lr = sum(g['lr'] for g in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        if self.accelerator.is_main_process:
            update_summary(epoch, train_metrics, eval_metrics, os.path.join(self.folder, SUMMARY_FILE), lr=lr)
        row = {f'train_{k}': v for k, v in train_metrics.items()} | {f'eval_{k}': v for k, v in eval_metrics.items()}
        self.accelerator.log({'epoch': epoch, 'lr': lr, **row}, step=epoch)

        metric = eval_metrics['top1'] if eval_metrics else -train_metrics['loss']
        improved = self.best is None or metric > self.best
        self.best = metric if improved else self.best
        self.lr_scheduler.step(epoch + 1, eval_metrics.get('top1', train_metrics['loss']))
        state = self._state(epoch + 1)
        if self.accelerator.is_main_process:
            save_checkpoint(os.path.join(self.folder, 'last'), self.model, state)
            if improved:
                save_checkpoint(os.path.join(self.folder, 'best'), used)
        self.accelerator.wait_for_everyone()

    def _validate(self, epoch: int) -> Any:
        """The model as it is used at the base size, and its metrics with those of the running statistics beside."""
        if self.dataset_eval is None:
            return self.model, {}
        size = self.data_config['input_size'][-1]
        own = self._evaluate(self.model, size)
        if self.regime is None or not self.args.calibrate_val:
            _logger.info('Validation %d  %d px  top-1 %.2f  top-5 %.2f  loss %.4f', epoch, size, own['top1'],
                         own['top5'], own['loss'])
            return self.model, own
        calibrated = self._calibrated(size, self.args.calibrate_val)
        metrics = self._evaluate(calibrated, size)
        _logger.info('Validation %d  %d px  calibrated: top-1 %.2f  top-5 %.2f  loss %.4f   running statistics: '
                     'top-1 %.2f  loss %.4f', epoch, size, metrics['top1'], metrics['top5'], metrics['loss'],
                     own['top1'], own['loss'])
        return calibrated, {**metrics, **{f'{k}_uncalibrated': v for k, v in own.items()}}

    def _report_sizes(self) -> None:
        """Evaluate the final weights at every size of the regime; a table on the terminal and ``sizes.json``."""
        if self.dataset_eval is None:
            _logger.info('No validation split, so no accuracy is reported')
            return
        results = []
        for size in self.regime.sizes if self.regime else (self.data_config['input_size'][-1],):
            own = self._evaluate(self.model, size)
            used = self._evaluate(self._calibrated(size, self.args.calibrate), size) if self.args.calibrate else own
            results.append({'img_size': size, **used, **{f'{k}_uncalibrated': v for k, v in own.items()}})
        if not self.accelerator.is_main_process:
            return
        _write_text(os.path.join(self.folder, SIZES_FILE), json.dumps({'results': results}, indent=2) + '\n')
        count = len(self.dataset_eval)
        print(f'\nTop-1 accuracy in per cent of the final weights ({self.num_epochs} epochs) on {count} validation '
              'images\n\n img_size  calibrated  running statistics')
        for row in results:
            print(f'{row["img_size"]:>9d}  {row["top1"]:>10.2f}  {row["top1_uncalibrated"]:>18.2f}')
        mean, own_mean = (sum(r[k] for r in results) / len(results) for k in ('top1', 'top1_uncalibrated'))
        print(f'     mean  {mean:>10.2f}  {own_mean:>18.2f}\n\nThe run is in {self.folder}')

    # What a run is made of

    def _fit_regime(self, model: nn.Module) -> Optional[Regime]:
        regime = make_regime(self.args, self.data_config['input_size'])
        if regime is None:
            return None
        takes = size_probe(model, self.data_config['input_size'][0], regime.base_size)
        try:
            regime, moved = fit_sizes(regime, takes)
        except ValueError as error:
            raise UsageError(f'{self.args.model}: {error}') from error
        for old, new in moved.items():
            _logger.warning('%s does not take %d px: trained at %d px instead', self.args.model, old, new)
        return regime

    def _create_datasets(self, model: nn.Module) -> None:
        args = self.args
        channels = self.data_config['input_size'][0]
        options = dict(
            class_map=args.class_map, download=args.dataset_download, batch_size=args.batch_size, seed=args.seed,
            input_img_mode=args.input_img_mode or ('RGB' if channels == 3 else 'L'), input_key=args.input_key,
            target_key=args.target_key, trust_remote_code=args.dataset_trust_remote_code)
        try:
            self.dataset_train: Any = create_dataset(
                args.dataset, args.data_dir, args.train_split, is_training=True,
                num_samples=args.train_num_samples, **options)
            self.dataset_eval: Any = args.val_split and create_dataset(
                args.dataset, args.data_dir, args.val_split, num_samples=args.val_num_samples, **options) or None
            check_classes(self.dataset_train, self.dataset_eval, model.num_classes)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        if args.dataset == DIGITS:
            _logger.info('Training on the embedded digits: %d scans of 8x8 px from scikit-learn, and %d for validation; '
                         'name your own images with --data-dir or --dataset', len(self.dataset_train),
                         len(self.dataset_eval or ()))

    def _loader(self, dataset: Any, size: int, batch_size: int, **kwargs: Any) -> Any:
        """A loader at one base size with what all loaders of the run share."""
        args = self.args
        channels = self.data_config['input_size'][0]
        height_width = self.data_config['input_size'][1:] if size == self.data_config['input_size'][-1] else (size, size)
        return create_loader(
            copy.copy(dataset), (channels, *height_width), batch_size, mean=self.data_config['mean'],
            std=self.data_config['std'], num_workers=args.workers, pin_memory=args.pin_mem,
            device=self.accelerator.device, use_prefetcher=not args.no_prefetcher,
            distributed=self.accelerator.num_processes > 1, **kwargs)

    def _augmentation(self) -> Dict[str, Any]:
        args = self.args
        own = self.data_config['interpolation']
        return dict(
            is_training=True, no_aug=args.no_aug, re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
            train_crop_mode=args.train_crop_mode, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
            vflip=args.vflip, color_jitter=args.color_jitter, color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob, gaussian_blur_prob=args.gaussian_blur_prob, auto_augment=args.aa,
            interpolation=own if args.no_aug else args.train_interpolation or own, worker_seeding=args.worker_seeding)

    def _train_loader(self) -> Any:
        args = self.args
        self.mixup_fn: Optional[Mixup] = None
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
        size = self.data_config['input_size'][-1]
        planned = {} if self.regime is None else dict(
            regime=self.regime, seed=args.seed, grad_accum_steps=args.grad_accum_steps, drop=args.mixsize_drop)
        try:
            loader = self._loader(self.dataset_train, size, args.batch_size, collate_fn=collate_fn, **planned,
                                  **self._augmentation())
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error
        if not len(loader):
            raise UsageError(f'{len(self.dataset_train)} training images fill no batch: lower --batch-size')
        return loader

    def _eval_loader(self, size: int) -> Any:
        return self._loader(
            self.dataset_eval, size, self.args.validation_batch_size or self.args.batch_size, is_training=False,
            interpolation=self.data_config['interpolation'], crop_pct=self.data_config['crop_pct'])

    def _calibration_loader(self, size: int) -> Any:
        """Training images at one size, augmented as in training, the same ones each time."""
        regime = Regime.fixed(size, batch_size=self.args.batch_size)
        return self._loader(self.dataset_train, size, self.args.batch_size, regime=regime, seed=self.args.seed,
                            persistent_workers=False, **self._augmentation())

    def _calibrated(self, size: int, num_batches: int) -> nn.Module:
        model = calibrate(self.model, self._calibration_loader(size), num_batches)
        if self.accelerator.num_processes > 1:
            distribute_bn(model, self.accelerator.num_processes, reduce=True)
        return model

    def _evaluate(self, model: nn.Module, size: int) -> Dict[str, float]:
        return validate(model, self._eval_loader(size), self.task, self.accelerator, self.args.channels_last)

    def _prepare(self, model: nn.Module) -> Any:
        """The task and the optimizer, on the device; neither the loader nor the schedule is Accelerate's to prepare."""
        args = self.args
        model.to(self.accelerator.device)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.sync_bn and self.accelerator.num_processes > 1:
            model = convert_sync_batchnorm(model)
        try:
            optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        except (AssertionError, ValueError, TypeError) as error:
            raise UsageError(f'--opt {args.opt}: {error}') from error
        model, optimizer = self.accelerator.prepare(model, optimizer)
        task = ClassificationTask(
            model, criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=mixing(args)),
            device=self.accelerator.device, verbose=False)
        return task, optimizer

    def _scaled_lr(self) -> float:
        args = self.args
        batch = args.batch_size * self.accelerator.num_processes * args.grad_accum_steps
        sqrt = args.lr_base_scale == 'sqrt' or (
            not args.lr_base_scale and any(name in args.opt.lower() for name in ('ada', 'lamb')))
        ratio = (batch / args.lr_base_size)**(0.5 if sqrt else 1)
        lr = args.lr_base * ratio
        mean = self.regime.mean_batch / args.batch_size * batch if self.regime else batch
        _logger.info('Learning rate %.4g: %g for %d images, scaled %s to the base batch of %d; the mean batch is %.1f',
                     lr, args.lr_base, args.lr_base_size, 'by the root' if sqrt else 'linearly', batch, mean)
        return lr

    def _log_regime(self, regime: Regime) -> None:
        args = self.args
        table, warnings = describe_plan(
            regime, len(self.dataset_train), self.accelerator.num_processes, args.mixsize_drop)
        _logger.info('MixSize %s: base size %d px, base batch %d, base duplicates %d, %d steps an epoch\n%s',
                     regime.adapt, regime.base_size, regime.batch_size * self.accelerator.num_processes,
                     regime.duplicates, self.num_steps, table)
        if regime.batch_multiple > 1:
            _logger.info('mixup and cutmix mix pairs: every batch is rounded to an even number')
        for line in warnings:
            _logger.warning(line)

    def _set_epoch(self, epoch: int) -> EpochPlan:
        """Turn the loader to an epoch, and give its plan."""
        if isinstance(self.loader, MixSizeLoader):
            self.loader.set_epoch(epoch)
            return self.loader.batch_sampler.plan
        if hasattr(self.loader.sampler, 'set_epoch'):
            self.loader.sampler.set_epoch(epoch)
        return EpochPlan.of_loader(len(self.loader), self.data_config['input_size'][-1],
                                   self.args.batch_size * self.accelerator.num_processes,
                                   self.args.grad_accum_steps, epoch)

    def _stop_mixing(self) -> None:
        if self.mixup_fn is not None:
            self.mixup_fn.mixup_enabled = False
        else:
            self.loader.mixup_enabled = False

    def _set_schedule(self, epoch: int) -> None:
        if self.args.sched == 'plateau':
            return  # its state is its history
        if self.args.sched_on_updates:
            self.lr_scheduler.step_update(epoch * self.num_steps)
        else:
            self.lr_scheduler.step(epoch)

    # Where a run is kept

    def _run_folder(self) -> str:
        args = self.args
        if args.resume and not (args.output or args.experiment):
            return args.resume
        name = args.experiment or '-'.join([
            datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model),
            str(self.data_config['input_size'][-1])])
        folder = os.path.join(args.output or os.path.join('output', 'train'), name)
        if os.path.exists(os.path.join(folder, ARGS_FILE)):
            raise UsageError(f'{folder} already holds a run: choose another --experiment, or --resume {folder}')
        return folder

    def _open_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have seen that the folder is free
        if self.accelerator.is_main_process:
            try:
                os.makedirs(self.folder, exist_ok=True)
                trim_summary(os.path.join(self.folder, SUMMARY_FILE), self.start_epoch)
                _write_text(os.path.join(self.folder, ARGS_FILE), yaml.safe_dump(vars(self.args)))
            except OSError as error:
                raise UsageError(f'cannot write to {self.folder}: {error.strerror}') from error
        if self.args.log_wandb:
            self.accelerator.init_trackers(
                self.args.wandb_project or 'mixsize-timm', config=vars(self.args),
                init_kwargs={'wandb': dict(name=os.path.basename(self.folder), tags=self.args.wandb_tags)})
        _logger.info('Training %s for epochs %d to %d on %d %s of %s, results in %s', self.args.model,
                     self.start_epoch, self.num_epochs - 1, self.accelerator.num_processes,
                     'process' if self.accelerator.num_processes == 1 else 'processes',
                     self.accelerator.device.type, self.folder)

    def _state(self, epoch: int) -> Dict[str, Any]:
        """What resuming before ``epoch`` needs besides the model. Called by every process."""
        scaler = self.accelerator.scaler
        return {
            'epoch': epoch,
            'best': self.best,
            'optimizer': self.optimizer.state_dict(),
            'smoother': self.smoother.state_dict() if self.smoother else None,
            'scaler': scaler.state_dict() if scaler else None,
            'schedule': self.lr_scheduler.state_dict() if self.args.sched == 'plateau' else None,
            'random': gather_object([random_state()]),
        }

    def _resume(self, folder: str) -> None:
        try:
            state = load_checkpoint(os.path.join(folder, 'last'), self.model)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        self.optimizer.load_state_dict(state['optimizer'])
        if self.smoother and state['smoother']:
            self.smoother.load_state_dict(state['smoother'])
        if self.accelerator.scaler and state['scaler']:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        if state['schedule']:
            self.lr_scheduler.load_state_dict(state['schedule'])
        if len(state['random']) == self.accelerator.num_processes:
            set_random_state(state['random'][self.accelerator.process_index])
        else:
            _logger.warning('The run was saved by %d processes: random states start afresh', len(state['random']))
        self.start_epoch, self.best = state['epoch'], state['best']


def _create_accelerator(args: argparse.Namespace) -> Accelerator:
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with='wandb' if args.log_wandb else None)
    except ValueError as error:
        raise UsageError(' '.join(str(error).split())) from error
    if accelerator.device.type == 'cpu':
        if accelerator.mixed_precision == 'fp16':
            raise UsageError('--mixed-precision fp16 needs a GPU: use bf16 or no')
        # the launcher allows one thread a process
        if os.environ.get('OMP_NUM_THREADS', '1') == '1':
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    else:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return accelerator


def _create_model(args: argparse.Namespace) -> nn.Module:
    if ':' not in args.model and not timm.is_model(args.model):
        close = difflib.get_close_matches(args.model.split('.')[0], timm.list_models(), 3)
        raise UsageError(f'timm has no model {args.model!r}'
                         + (f': did you mean {" or ".join(close)}?' if close else ': timm.list_models() names them'))
    overlay: Dict[str, Any] = {}
    if args.pretrained_path:
        overlay['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    try:
        model = timm.create_model(
            args.model, pretrained=args.pretrained or bool(args.pretrained_path),
            in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3), num_classes=args.num_classes,
            drop_rate=args.drop, drop_path_rate=args.drop_path, drop_block_rate=args.drop_block, global_pool=args.gp,
            bn_momentum=args.bn_momentum, bn_eps=args.bn_eps, checkpoint_path=args.initial_checkpoint, **overlay,
            **args.model_kwargs)
        if args.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    except Exception as error:  # models refuse arguments and weights in their own ways
        raise UsageError(f'cannot make {args.model}: {" ".join(str(error).split())[:500]}') from error
    args.num_classes = model.num_classes
    return model


def _write_text(path: str, text: str) -> None:
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.new', path)


if __name__ == '__main__':
    sys.exit(main())
