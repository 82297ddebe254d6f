"""Train a timm model at mixed image sizes: ``accelerate launch -m mixsize_timm.train --model resnet50``."""
import argparse
import copy
import glob
import json
import logging
import math
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import yaml
from safetensors import SafetensorError
from timm.models import safe_model_name
from timm.utils import distribute_bn, random_seed, unwrap_model
from timm.utils.summary import trim_summary
from torch import nn

from .args import ARGS_FILE, mixing, model_dtype, output_folder, parse_args
from .bn_stats import BN_STATS_FILE, BatchNormStats, fingerprint
from .build import create_accelerator, create_batch_scale, create_schedule, create_task, scale_lr
from .calibration import calibrated_layers, warn_of_unserved
from .checkpoint import (
    LAST,
    RECOVERY,
    SaveError,
    checkpoints_of,
    position_of,
    read_state,
    run_folder,
    take_snapshot,
    write_flushed,
)
from .curves import METRIC_NAMES, SIZES_FILE, format_table, make_curves, write_sizes
from .data import MixSizeLoader
from .datasets import class_names
from .engine import NonFiniteLoss, Progress, StepMeter, train_one_epoch, validate
from .errors import Stopped, UsageError, run_command
from .failures import explaining
from .loaders import Data
from .measure import describe_weights, measure_sizes, training_cost
from .memory import fit_micro_batches, scaled_by_area
from .models import create_model
from .processes import shards
from .provenance import RUN_FILE, command_line, environment
from .randomness import random_state, set_random_state
from .regularization import SizeRegularization
from .resume import newest_whole, restore, restore_timms, share_bad_images, tidy, training_state
from .saver import CheckpointHistory, CheckpointInterval, CheckpointSaver, claim
from .sharding import full_model_state, load_whole
from .signals import StopRequest
from .smoothing import GradientSmoother
from .trackers import append_summary, log_sizes, open_trackers

_logger = logging.getLogger(__name__)

SUMMARY_FILE = 'summary.csv'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, or as :func:`~mixsize_timm.errors.run_command` has it."""
    started: List[Training] = []

    def run() -> None:
        started.append(Training(parse_args(argv), command_line(argv, 'mixsize_timm.train')))
        started[0].run()

    def stopped() -> str:
        return started[0].where_to_go_on() if started else 'nothing was trained'

    return run_command('mixsize_timm.train', run, stopped)


class Training:
    """One run of the command. The constructor finds all that cannot work; :meth:`run` trains.

    Args:
        args: Parsed arguments.
        command: The command, for the run's records.
    """

    def __init__(self, args: argparse.Namespace, command: str = '') -> None:
        self.args = args
        self.command = command
        self.stated = {key: value for key, value in vars(args).items() if key != 'resume_auto'}  # as it was asked for
        self.accelerator = create_accelerator(args)
        random_seed(args.seed, self.accelerator.process_index)
        model = create_model(args)
        self.resumed_from = newest_whole(args.resume, self.accelerator) if os.path.isdir(args.resume) else ''
        self.data = Data(args, model, self.accelerator, read_state(self.resumed_from, 'world_size'))
        self.data.describe()
        args.lr = scale_lr(args, self.data)
        self._copy = copy.deepcopy(model) if shards(self.accelerator) else None
        self.task, self.optimizer = create_task(args, model, self.accelerator, self.data)
        self.smoother = GradientSmoother(args.grad_smoothing_momentum) if args.grad_smoothing else None
        self.regularization = None
        if args.mixsize_reg and self.data.regime is not None:
            self.regularization = SizeRegularization(
                args.mixsize_reg, self.data.base_size, self.model, self.data.mixup_fn)
        self.lr_scheduler, self.num_epochs = create_schedule(args, self.optimizer, self.data)
        self.stop_epoch = args.stop_epoch or self.num_epochs
        if self.stop_epoch > self.num_epochs:
            raise UsageError(f'--stop-epoch {self.stop_epoch} is behind the last of {self.num_epochs} epochs')
        self.progress = Progress()
        self.best: Optional[float] = None
        self.starts: List[Dict[str, Any]] = []
        self.wandb_id: Optional[str] = None
        self.folder = self._choose_folder()
        self.history = CheckpointHistory(self.folder, args.checkpoint_hist)
        with explaining(args):  # before a resumed optimizer's state takes memory
            self.micro_batch_size = self._choose_micro_batches()
        if self.resumed_from:
            restore(self, self.resumed_from)
        elif args.resume:
            restore_timms(self, args.resume)
        if args.start_epoch is not None:
            self.progress.start_epoch(args.start_epoch)
            self.history = CheckpointHistory(self.folder, args.checkpoint_hist, self.history.entries, args.start_epoch)
        if self.progress.epoch or self.progress.step:
            self._set_schedule()
        self.interval = CheckpointInterval(args.checkpoint_interval)
        self.saver = CheckpointSaver(self.folder, self.history, args.save_epochs)
        self.stop = StopRequest(self.accelerator)

    @property
    def model(self) -> nn.Module:
        """The model without the wrappers of Accelerate, torch.compile and the task."""
        return unwrap_model(self.task.get_eval_model())

    @property
    def ema(self) -> Optional[nn.Module]:
        """The moving average of the model, if one is kept."""
        return unwrap_model(self.task.get_eval_model(ema=True)) if self.task.has_ema() else None

    @property
    def whole_model(self) -> nn.Module:
        """The model; of one that is sharded a whole copy, which all processes must ask for."""
        return self.model if self._copy is None else load_whole(self._copy.to(self.accelerator.device), self.model)

    @property
    def metric(self) -> str:
        """What ``best`` is chosen by."""
        return self.args.eval_metric if self.data.validation is not None else 'train_loss'

    def run(self) -> None:
        """Train, validate and save every epoch, then report the accuracy at each size."""
        self._open_folder()
        try:
            with self.stop, explaining(self.args, self.data.loader, self.where_to_go_on):
                try:
                    self._train_epochs()
                finally:
                    self._list_bad_images()
                    self.saver.wait()
                self._close_saver()
                self.stop.stop_at_once()
                self._report_sizes()
        except (Stopped, UsageError):
            for tracker in self.accelerator.trackers:  # the group of processes is left to its launcher
                tracker.finish()
            raise
        self.accelerator.end_training()

    def _train_epochs(self) -> None:
        progress = self.progress
        for epoch in range(progress.epoch, self.stop_epoch):
            try:
                train_metrics = self._train(epoch)
                finished = epoch + 1
                if finished % self.args.val_interval and finished not in (*self.args.save_epochs, self.stop_epoch):
                    self._step_schedule(finished)
                    progress.start_epoch(finished)
                else:
                    self._finish_epoch(epoch, train_metrics)
            except Stopped:
                self._save_inside()
                raise
        if progress.nonfinite:
            raise NonFiniteLoss(f'the loss is not finite since {progress.nonfinite_since}')

    def _train(self, epoch: int) -> Dict[str, float]:
        args, accelerator = self.args, self.accelerator
        plan = self.plan = self.data.start_epoch(epoch, self.progress.step)
        with _compile_limit() if args.torchcompile else nullcontext():
            metrics = train_one_epoch(
                self.progress, self.task, self.data.loader if self.progress.step < plan.num_steps else (), plan,
                self.optimizer, accelerator, smoother=self.smoother,
                lr_scheduler=self.lr_scheduler, mixup_fn=self.data.mixup_fn,
                mixup_seed=args.seed if self.data.loader_regime is not None else None,
                set_size=self.regularization.set_size if self.regularization else None,
                batch_scale=create_batch_scale(args, self.data, accelerator),
                micro_batch_size=self.micro_batch_size, clip_grad=args.clip_grad,
                clip_mode=args.clip_mode, channels_last=args.channels_last, model_dtype=model_dtype(args),
                synchronize_step=args.synchronize_step, log_interval=args.log_interval,
                max_nonfinite=args.max_nonfinite, save_images=self.folder if args.save_images else '',
                on_step=self._after_step)
        if self.regularization:
            self.regularization.set_size(self.data.base_size)
        if args.torchcompile:
            _logger.info('torch.compile has made %d graphs', torch._dynamo.utils.counters['stats']['unique_graphs'])
        if accelerator.num_processes > 1 and args.dist_bn and not args.sync_bn:
            for model in filter(None, (self.model, None if args.model_ema_force_cpu else self.ema)):
                distribute_bn(model, accelerator.num_processes, args.dist_bn == 'reduce')
        return metrics

    def _after_step(self, meter: StepMeter) -> None:
        """Save where it is time to, and stop where it is asked for."""
        step = self.plan.steps_before + self.progress.step
        reason, late = self.stop.agreed(self.interval.minutes_over())
        if not (reason or late or self.interval.step_is_due(step)):
            return
        meter.read()
        meter.log_steps()
        if reason:
            raise Stopped(reason)
        self._save_inside()

    def _save_inside(self) -> None:
        """Save a checkpoint from inside an epoch. Called by every process."""
        self.interval.restart()
        if self.progress.nonfinite:
            _logger.warning('No checkpoint is saved: the loss is not finite since %s', self.progress.nonfinite_since)
            return
        state, weights = training_state(self), full_model_state(self.model)
        if self.accelerator.is_main_process:
            position = self.progress.epoch, self.progress.step
            self.saver.save_recovery(take_snapshot(weights, state, self.ema, position, self.progress.steps))

    def _close_saver(self) -> None:
        try:
            self.saver.close(finished=self.progress.epoch >= self.stop_epoch)
        except SaveError as error:
            raise UsageError(f'{error}; {self.where_to_go_on()}') from error

    def where_to_go_on(self) -> str:
        """Says where the run can be continued from."""
        self.saver.wait()
        found = checkpoints_of(self.folder)
        if not found:
            return 'no checkpoint was saved'
        epoch, step = position_of(found[0])
        place = f'after epoch {epoch - 1}' if epoch and not step else f'after step {step} of epoch {epoch}'
        return f'--resume {self.folder} continues {place}'

    def _list_bad_images(self) -> None:
        """Write the images that this process could not read into a file, of every process its own."""
        bad_images: Dict[int, Tuple[str, str]] = getattr(self.data.loader, 'bad_images', {})
        if bad_images and os.path.isdir(self.folder):
            lines = [f'{name}\t{reason}\n' for name, reason in bad_images.values()]
            with suppress(OSError):
                _write_text(os.path.join(self.folder, f'bad-images-{self.accelerator.process_index}.txt'),
                            ''.join(lines))

    def _finish_epoch(self, epoch: int, train_metrics: Dict[str, float]) -> None:
        """Validate, write the summary, step the schedule and save."""
        before = random_state()
        try:
            used, eval_metrics = self._validate(epoch)
        except Stopped:
            set_random_state(before)  # it is validated anew, from here
            raise
        train_metrics = {**train_metrics, **self._count_faults()}
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        if self.accelerator.is_main_process:
            self._summarize(epoch, train_metrics, eval_metrics, lr)
        self.accelerator.log({
            'epoch': epoch, 'lr': lr, **{f'train_{k}': v for k, v in train_metrics.items()},
            **{f'eval_{k}': v for k, v in eval_metrics.items()}}, step=self.plan.steps_before + self.plan.num_steps)

        metric = eval_metrics[self.args.eval_metric] if eval_metrics else train_metrics['loss']
        self._step_schedule(epoch + 1, metric)
        self.progress.start_epoch(epoch + 1)
        if self.progress.nonfinite:
            _logger.warning('Epoch %d is not saved: the loss is not finite since %s', epoch,
                            self.progress.nonfinite_since)
            return
        rank = float('-inf') if math.isnan(metric) else -metric if self.data.decreasing_metric else metric
        self.saver.wait()  # the ranks are read while a checkpoint is written
        improved, best = self.best is None or rank > self.best, self.best
        self.best = rank if improved else self.best
        self.history.rank(epoch, rank)
        state, weights = training_state(self), full_model_state(self.model)
        self.interval.restart()
        if self.accelerator.is_main_process:
            self.saver.save_epoch(
                take_snapshot(weights, state, self.ema, (epoch + 1, 0), self.progress.steps),
                take_snapshot(used['model'], ema=used.get('ema'), position=(epoch + 1, 0)) if improved else None,
                on_lost_best=partial(setattr, self, 'best', best))

    def _count_faults(self) -> Dict[str, int]:
        """Images that could not be read by any process, and steps that overflowed, since the run began."""
        counts: Dict[str, int] = {}
        if isinstance(self.data.loader, MixSizeLoader):
            counts['bad_images'] = len(share_bad_images(self.data.loader))
        if self.accelerator.scaler is not None:
            counts['skipped_steps'] = self.progress.skipped
        return counts

    def _summarize(self, epoch: int, train_metrics: Dict[str, float], eval_metrics: Dict[str, float], lr: float
                   ) -> None:
        try:
            append_summary(os.path.join(self.folder, SUMMARY_FILE), {
                'epoch': epoch, **{f'train_{k}': v for k, v in train_metrics.items()},
                **{f'eval_{k}': v for k, v in eval_metrics.items()}, 'lr': lr})
        except OSError as error:  # training goes on, as it does where a checkpoint cannot be written
            _logger.error('Cannot write %s: %s', os.path.join(self.folder, SUMMARY_FILE), error.strerror)

    def _validate(self, epoch: int) -> Tuple[Dict[str, nn.Module], Dict[str, float]]:
        """The model and its moving average as they are used at the base size, and the metrics.

        They are the moving average's where there is one, with those of its running statistics beside.
        """
        size, metrics = self.data.base_size, {}
        calibrating = self.data.regime and self.args.calibrate_val and calibrated_layers(self.model)
        used: Dict[str, nn.Module] = {}
        for name, model in (('model', self.whole_model), ('ema', self.ema)):
            if model is None:
                continue
            used[name] = model
            if name == 'ema' and self.args.model_ema_force_cpu:
                continue
            if calibrating:
                used[name] = self.data.calibrate(model, size, self.args.calibrate_val)
            if self.data.validation is None:
                continue
            own, *others = self._evaluate([model, used[name]] if calibrating else [model], size)
            metrics, text = own, _summary(own)
            if others:
                metrics = others[0]
                text = f'calibrated: {_summary(metrics)}   running statistics: {text}'
                metrics = {**metrics, **{f'{k}_uncalibrated': v for k, v in own.items()}}
            _logger.info('Validation %d%s  %d px  %s', epoch, ' of the average' if name == 'ema' else '', size, text)
        return used, metrics

    def _report_sizes(self) -> None:
        """Measure the final weights at every size of the regime, and keep the statistics for each beside them."""
        try:
            self._measure_and_report()
        except (OSError, SafetensorError) as error:
            raise UsageError(f'cannot write the accuracies to {self.folder}: {error}; all epochs are saved, and '
                             f'--resume {self.folder} measures again') from error

    def _measure_and_report(self) -> None:
        sizes = sorted({self.data.base_size, *(self.data.regime.sizes if self.data.regime else ())})
        model = self._used_model()
        stats = BatchNormStats(fingerprint(model))
        if self.data.validation is not None:
            self._report(self.measure(sizes, stats))
        elif self.data.regime and self.args.calibrate and calibrated_layers(model):
            for size in sizes:
                stats.add(size, self.data.calibrate(model, size, self.args.calibrate))
        last = os.path.join(self.folder, LAST)
        if not self.accelerator.is_main_process:
            return
        if self.data.regime and stats.sizes and os.path.isdir(last):
            stats.save(os.path.join(last, BN_STATS_FILE), keep_others=True)
        if self.data.validation is None:
            _logger.info('No validation split, so no accuracy is reported; the run is in %s', self.folder)

    def _report(self, results: List[Dict[str, Any]]) -> None:
        args, calibrated = self.args, bool(self.args.calibrate and calibrated_layers(self.model))
        if args.calibrate and not calibrated:
            warn_of_unserved(self.model)
        used = self._used_model()
        if self.accelerator.is_main_process:
            checkpoint = {
                'name': os.path.basename(self.folder), 'checkpoint': self.folder, 'model': args.model,
                **describe_weights(used),
                'calibrated': self.data.num_calibration_batches(args.calibrate) if calibrated else 0,
                'training': training_cost(used, self.progress.to_dict(), self.data.channels,
                                          {self.data.shape(row['img_size']): row['gmacs'] for row in results}),
                'data': self.data.to_dict(calibrated),
                'regime': self.data.regime.to_dict() if self.data.regime else None, 'results': results}
            write_sizes(os.path.join(self.folder, SIZES_FILE),
                        {'metric': args.eval_metric, 'checkpoints': [checkpoint]})
            print('\nThe final weights on the validation images, accuracies in per cent\n')
            print(format_table(make_curves([checkpoint], args.eval_metric), args.eval_metric))
            print(f'\nThe run is in {self.folder}')
        log_sizes(self.accelerator, results, self.data.steps_before(self.stop_epoch) + 1)

    def measure(self, sizes: Sequence[int], stats: Optional[BatchNormStats] = None) -> List[Dict[str, Any]]:
        """Metrics at each size of the model, or its moving average where that is validated.

        As it is used, calibrated, and with its running statistics beside. ``stats`` gets the statistics.
        """
        model = self._used_model()

        def calibrate(model: nn.Module, size: int) -> nn.Module:
            return self.data.calibrate(model, size, self.args.calibrate)

        return measure_sizes(
            model, sizes, self._evaluate, calibrate if self.args.calibrate and calibrated_layers(model) else None,
            num_images=self.data.num_images, shape=self.data.shape, stats=stats)

    def _used_model(self) -> nn.Module:
        """The moving average where it is validated, else the model."""
        return self.ema if self.ema is not None and not self.args.model_ema_force_cpu else self.whole_model

    def _evaluate(self, models: Sequence[nn.Module], size: int) -> List[Dict[str, float]]:
        # torch's loaders draw from the global generator; only with --mixsize off shall training feel it, as timm's does
        with torch.random.fork_rng(devices=[], enabled=self.data.loader_regime is not None):
            return validate(models, self.data.validation_loader(size), self.task, self.accelerator,
                            self.args.channels_last, model_dtype(self.args), self.args.tta, self._before_batch)

    def _before_batch(self) -> None:
        """Stop inside a validation where it is asked for; only where all processes have as many batches."""
        if self.accelerator.num_processes == 1 or self.data.num_images is not None:
            reason, _ = self.stop.agreed()
            if reason:
                raise Stopped(reason)

    def _step_schedule(self, epoch: int, metric: Optional[float] = None) -> None:
        if self.lr_scheduler is not None:  # timm has none for --sched none
            self.lr_scheduler.step(epoch, metric)

    def _set_schedule(self) -> None:
        """Put the schedule where a run that goes on from here finds it; a plateau's is its history."""
        progress = self.progress
        if self.lr_scheduler is None or self.args.sched == 'plateau':
            return
        if self.args.sched_on_updates:
            updates = self.data.steps_before(progress.epoch) + progress.step - progress.skipped
            self.lr_scheduler.step_update(updates)
        else:
            self.lr_scheduler.step(progress.epoch)

    def _choose_micro_batches(self) -> Optional[Callable[[int], int]]:
        args = self.args
        if args.micro_batch_size != 'auto':
            size = int(args.micro_batch_size or 0)
            return scaled_by_area(size, self.data.base_size) if size else None
        return fit_micro_batches(
            self.task, self.data.largest_batches(), self.accelerator, in_chans=self.data.channels,
            soft_targets=mixing(args) or args.task == 'multilabel', num_classes=args.num_classes,
            channels_last=args.channels_last, dtype=model_dtype(args)).__getitem__

    # The run's folder

    def _choose_folder(self) -> str:
        args = self.args
        run = run_folder(args.resume) if os.path.isdir(args.resume) else ''
        newest = [run, *checkpoints_of(run)[:1]] if run else []  # not an older checkpoint: later ones would go
        in_place = os.path.realpath(args.resume) in map(os.path.realpath, newest)
        if in_place and not (args.output or args.experiment):
            return run
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(self.data.base_size)])
        folder = output_folder(args.output, name)
        if in_place and os.path.realpath(folder) == os.path.realpath(run):
            return folder
        others = (LAST, LAST + '.old', RECOVERY + '*', 'best', SIZES_FILE, SUMMARY_FILE, 'checkpoint-*', 'milestone-*',
                  '*.pth.tar')  # the last are of timm's script
        found = [path for other in others for path in glob.glob(os.path.join(glob.escape(folder), other))
                 if not path.endswith('.new')]  # half written by one that was killed
        begun = args.resume_auto and {os.path.basename(path) for path in found} <= {SUMMARY_FILE, 'best'}
        if found and not begun:  # what --resume auto found nothing to go on from in, was killed before there was any
            raise UsageError(f'{folder} already holds a run: choose another --experiment, or --resume {folder}')
        return folder

    def _open_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have seen that the folder is free
        if self.accelerator.is_main_process:
            try:
                os.makedirs(self.folder, exist_ok=True)
                self._claim = claim(self.folder)
                if self.resumed_from and os.path.samefile(run_folder(self.resumed_from), self.folder):
                    tidy(self)
                self._trim_summary()
                _write_text(os.path.join(self.folder, ARGS_FILE), yaml.safe_dump(self.stated))
                _write_text(os.path.join(self.folder, RUN_FILE), json.dumps(self._describe(), indent=2) + '\n')
            except OSError as error:
                raise UsageError(f'cannot write to {self.folder}: {error.strerror}') from error
        self.wandb_id = open_trackers(self.args, self.accelerator, self.folder, self.wandb_id)
        if self.progress.epoch >= self.stop_epoch:
            _logger.info('All %d epochs of this run are trained: raise --%s to train on', self.stop_epoch,
                         'stop-epoch' if self.args.stop_epoch else 'epochs')
            return
        if self.resumed_from:
            _logger.info('Going on from %s%s', self.resumed_from,
                         f', after step {self.progress.step} of the epoch' if self.progress.step else '')
        _logger.info('Training %s for epochs %d to %d on %d %s of %s, results in %s', self.args.model,
                     self.progress.epoch, self.stop_epoch - 1, self.accelerator.num_processes,
                     'process' if self.accelerator.num_processes == 1 else 'processes',
                     self.accelerator.device.type, self.folder)

    def _trim_summary(self) -> None:
        """Leave the epochs out of the summary that are trained once more."""
        path = os.path.join(self.folder, SUMMARY_FILE)
        if os.path.exists(path):
            shutil.copyfile(path, path + '.new')
            trim_summary(path + '.new', self.progress.epoch)
            os.replace(path + '.new', path)

    def _describe(self) -> Dict[str, Any]:
        """What the run's folder says of its starts and its data."""
        data = self.data
        start = {'command': self.command, 'epoch': self.progress.epoch, 'step': self.progress.step,
                 **environment(self.accelerator)}
        return {'starts': [*self.starts, start], 'regime': data.regime.to_dict() if data.regime else None,
                'data': {'train_images': data.num_train_images,
                         'validation_images': data.num_images if data.validation is not None else 0,
                         'class_names': class_names(data.train)}}


@contextmanager
def _compile_limit() -> Iterator[None]:
    """Say in one line that torch.compile gave up."""
    try:
        yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise UsageError('torch.compile made more graphs of one function than the regime has shapes: leave out '
                         '--torchcompile for this model') from error


def _summary(metrics: Dict[str, float]) -> str:
    text = [f'{METRIC_NAMES.get(name, name)} {value:.2f}' for name, value in metrics.items() if name != 'loss']
    return '  '.join([*text, f'loss {metrics["loss"]:.4f}'])


def _write_text(path: str, text: str) -> None:
    write_flushed(path + '.new', text.encode())
    os.replace(path + '.new', path)


if __name__ == '__main__':
    sys.exit(main())
