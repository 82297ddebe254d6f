"""Train a timm model at mixed image sizes: ``accelerate launch -m mixsize_timm.train --model resnet50``."""
import argparse
import glob
import json
import logging
import math
import os
import pickle
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import datetime
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import yaml
from accelerate.utils import gather_object
from timm.models import safe_model_name
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import distribute_bn, random_seed, unwrap_model
from timm.utils.summary import trim_summary, update_summary
from torch import nn

from .args import ARGS_FILE, model_dtype, output_folder, parse_args
from .bn_stats import BN_STATS_FILE, BatchNormStats, fingerprint
from .build import create_accelerator, create_batch_scale, create_schedule, create_task, scale_lr
from .calibration import calibrated_layers, warn_of_unserved
from .checkpoint import (
    LAST,
    RECOVERY,
    CheckpointHistory,
    copy_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    random_state,
    run_folder,
    save_checkpoint,
    set_random_state,
)
from .datasets import class_names
from .engine import train_one_epoch, validate
from .errors import UsageError, refusing, run_command
from .loaders import Data
from .measure import describe_weights, measure_sizes, training_cost
from .models import create_model
from .provenance import RUN_FILE, command_line, environment, read_run
from .regularization import SizeRegularization
from .report import METRIC_NAMES, SIZES_FILE, format_table, make_curves, write_sizes
from .smoothing import GradientSmoother
from .trackers import log_sizes, open_trackers

_logger = logging.getLogger(__name__)

SUMMARY_FILE = 'summary.csv'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    started: List[Training] = []

    def run() -> None:
        started.append(Training(parse_args(argv), command_line(argv, 'mixsize_timm.train')))
        started[0].run()

    def stopped() -> str:
        return f'--resume {started[0].folder if started else "FOLDER"} continues after the last finished epoch'

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
        self.stated = dict(vars(args))  # before anything is derived from it
        self.accelerator = create_accelerator(args)
        random_seed(args.seed, self.accelerator.process_index)
        model = create_model(args)
        self.data = Data(args, model, self.accelerator)
        self.data.describe()
        args.lr = scale_lr(args, self.data, self.accelerator.num_processes)
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
        self.start_epoch = 0
        self.best: Optional[float] = None
        # of the finished epochs; unknown where it was not counted from the start
        self.cost: Optional[Dict[str, Any]] = {'samples': Counter(), 'steps': 0, 'seconds': 0.}
        self.starts: List[Dict[str, Any]] = []
        self.folder = self._choose_folder()
        self.history = CheckpointHistory(self.folder, args.checkpoint_hist)
        if args.resume:
            self._load(args.resume)
        if args.start_epoch is not None:
            self.start_epoch = args.start_epoch
        if self.start_epoch:
            self._set_schedule(self.start_epoch)

    @property
    def model(self) -> nn.Module:
        """The model without the wrappers of Accelerate, torch.compile and the task."""
        return unwrap_model(self.task.get_eval_model())

    @property
    def ema(self) -> Optional[nn.Module]:
        """The moving average of the model, if one is kept."""
        return unwrap_model(self.task.get_eval_model(ema=True)) if self.task.has_ema() else None

    @property
    def _metric(self) -> str:
        """What ``best`` is chosen by."""
        return self.args.eval_metric if self.data.validation is not None else 'train_loss'

    def run(self) -> None:
        """Train, validate and save every epoch, then report the accuracy at each size."""
        self._open_folder()
        for epoch in range(self.start_epoch, self.stop_epoch):
            train_metrics = self._train(epoch)
            finished = epoch + 1
            if finished % self.args.val_interval and finished not in (*self.args.save_epochs, self.stop_epoch):
                self._step_schedule(finished)
            else:
                self._finish_epoch(epoch, train_metrics)
        self._report_sizes()
        self.accelerator.end_training()

    def _train(self, epoch: int) -> Dict[str, float]:
        args, accelerator = self.args, self.accelerator

        def recover(step: int) -> None:
            if args.recovery_interval and step % args.recovery_interval == 0:
                self._save(RECOVERY, self._state(epoch))  # the epoch is trained again

        plan = self.data.start_epoch(epoch)
        start, samples = time.perf_counter(), Counter[Tuple[int, ...]]()
        with _compile_limit() if args.torchcompile else nullcontext():
            metrics = train_one_epoch(
                epoch, self.task, self.data.loader, plan, self.optimizer, accelerator, smoother=self.smoother,
                lr_scheduler=self.lr_scheduler, mixup_fn=self.data.mixup_fn,
                set_size=self.regularization.set_size if self.regularization else None,
                batch_scale=create_batch_scale(args, self.data, accelerator), clip_grad=args.clip_grad,
                clip_mode=args.clip_mode, channels_last=args.channels_last, model_dtype=model_dtype(args),
                synchronize_step=args.synchronize_step, log_interval=args.log_interval,
                save_images=self.folder if args.save_images else '', on_step=recover, samples=samples)
        if self.cost is not None:
            self.cost['samples'] += samples
            self.cost['steps'] += plan.num_steps
            self.cost['seconds'] += time.perf_counter() - start
        if self.regularization:
            self.regularization.set_size(self.data.base_size)
        if args.torchcompile:
            _logger.info('torch.compile has made %d graphs', torch._dynamo.utils.counters['stats']['unique_graphs'])
        if accelerator.num_processes > 1 and args.dist_bn and not args.sync_bn:
            for model in filter(None, (self.model, None if args.model_ema_force_cpu else self.ema)):
                distribute_bn(model, accelerator.num_processes, args.dist_bn == 'reduce')
        return metrics

    def _finish_epoch(self, epoch: int, train_metrics: Dict[str, float]) -> None:
        """Validate, write the summary, step the schedule and save."""
        used, eval_metrics = self._validate(epoch)
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        if self.accelerator.is_main_process:
            update_summary(epoch, train_metrics, eval_metrics, os.path.join(self.folder, SUMMARY_FILE), lr=lr)
        self.accelerator.log({
            'epoch': epoch, 'lr': lr, **{f'train_{k}': v for k, v in train_metrics.items()},
            **{f'eval_{k}': v for k, v in eval_metrics.items()}}, step=(epoch + 1) * self.data.num_steps)

        metric = eval_metrics[self.args.eval_metric] if eval_metrics else train_metrics['loss']
        rank = float('-inf') if math.isnan(metric) else -metric if self.data.decreasing_metric else metric
        improved = self.best is None or rank > self.best
        self.best = rank if improved else self.best
        self.history.rank(epoch, rank)
        self._step_schedule(epoch + 1, metric)
        state = self._state(epoch + 1)
        if improved and self.accelerator.is_main_process:  # first: the state that follows says that it is there
            save_checkpoint(os.path.join(self.folder, 'best'), used['model'], ema=used.get('ema'))
        self._save(LAST, state)
        if self.accelerator.is_main_process:
            self.history.keep(epoch)
            if epoch + 1 in self.args.save_epochs:
                copy_checkpoint(os.path.join(self.folder, LAST), os.path.join(self.folder, f'milestone-{epoch + 1}'))
        self.accelerator.wait_for_everyone()

    def _validate(self, epoch: int) -> Tuple[Dict[str, nn.Module], Dict[str, float]]:
        """The model and its moving average as they are used at the base size, and the metrics.

        They are the moving average's where there is one, with those of its running statistics beside.
        """
        size, metrics = self.data.base_size, {}
        calibrating = self.data.regime and self.args.calibrate_val and calibrated_layers(self.model)
        used: Dict[str, nn.Module] = {}
        for name, model in (('model', self.model), ('ema', self.ema)):
            if model is None:
                continue
            used[name] = model
            if name == 'ema' and self.args.model_ema_force_cpu:
                continue
            if calibrating:
                used[name] = self.data.calibrate(model, size, self.args.calibrate_val)
            if self.data.validation is None:
                continue
            own = metrics = self._evaluate(model, size)
            text = _summary(own)
            if calibrating:
                metrics = self._evaluate(used[name], size)
                text = f'calibrated: {_summary(metrics)}   running statistics: {text}'
                metrics = {**metrics, **{f'{k}_uncalibrated': v for k, v in own.items()}}
            _logger.info('Validation %d%s  %d px  %s', epoch, ' of the average' if name == 'ema' else '', size, text)
        return used, metrics

    def _report_sizes(self) -> None:
        """Measure the final weights at every size of the regime, and keep the statistics for each beside them."""
        sizes = self.data.regime.sizes if self.data.regime else (self.data.base_size,)
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
        if self.accelerator.is_main_process:
            checkpoint = {
                'name': os.path.basename(self.folder), 'checkpoint': self.folder, 'model': args.model,
                **describe_weights(self._used_model()),
                'calibrated': self.data.num_calibration_batches(args.calibrate) if calibrated else 0,
                'training': training_cost(self.model, self._cost_state(), self.data.channels),
                'data': self.data.to_dict(), 'regime': self.data.regime.to_dict() if self.data.regime else None,
                'results': results}
            write_sizes(os.path.join(self.folder, SIZES_FILE),
                        {'metric': args.eval_metric, 'checkpoints': [checkpoint]})
            print('\nThe final weights on the validation images, accuracies in per cent\n')
            print(format_table(make_curves([checkpoint], args.eval_metric), args.eval_metric))
            print(f'\nThe run is in {self.folder}')
        log_sizes(self.accelerator, results, self.stop_epoch * self.data.num_steps + 1)

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
        return self.ema if self.ema is not None and not self.args.model_ema_force_cpu else self.model

    def _evaluate(self, model: nn.Module, size: int) -> Dict[str, float]:
        # torch's loaders draw from the global generator; only with --mixsize off shall training feel it, as timm's does
        with torch.random.fork_rng(devices=[], enabled=self.data.regime is not None):
            return validate(model, self.data.validation_loader(size), self.task, self.accelerator,
                            self.args.channels_last, model_dtype(self.args), self.args.tta)

    def _step_schedule(self, epoch: int, metric: Optional[float] = None) -> None:
        if self.lr_scheduler is not None:  # timm has none for --sched none
            self.lr_scheduler.step(epoch, metric)

    def _set_schedule(self, epoch: int) -> None:
        """Put the schedule where a run that starts at ``epoch`` finds it; a plateau's is its history."""
        if self.lr_scheduler is None or self.args.sched == 'plateau':
            return
        if self.args.sched_on_updates:
            self.lr_scheduler.step_update(epoch * self.data.num_steps)
        else:
            self.lr_scheduler.step(epoch)

    # The run's folder

    def _choose_folder(self) -> str:
        args = self.args
        run = run_folder(args.resume) if os.path.isdir(args.resume) else ''
        in_place = run and os.path.basename(os.path.normpath(args.resume)) in (
            os.path.basename(os.path.normpath(run)), LAST, RECOVERY)  # not an older checkpoint: later ones would go
        if in_place and not (args.output or args.experiment):
            return run
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(self.data.base_size)])
        folder = output_folder(args.output, name)
        if in_place and os.path.realpath(folder) == os.path.realpath(run):
            return folder
        others = (LAST, LAST + '.old', RECOVERY, 'best', SIZES_FILE, SUMMARY_FILE, 'checkpoint-*', 'milestone-*',
                  '*.pth.tar')  # the last are of timm's script
        if any(glob.glob(os.path.join(glob.escape(folder), other)) for other in others):
            raise UsageError(f'{folder} already holds a run: choose another --experiment, or --resume {folder}')
        return folder

    def _open_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have seen that the folder is free
        if self.accelerator.is_main_process:
            try:
                os.makedirs(self.folder, exist_ok=True)
                trim_summary(os.path.join(self.folder, SUMMARY_FILE), self.start_epoch)
                _write_text(os.path.join(self.folder, ARGS_FILE), yaml.safe_dump(self.stated))
                _write_text(os.path.join(self.folder, RUN_FILE), json.dumps(self._describe(), indent=2) + '\n')
            except OSError as error:
                raise UsageError(f'cannot write to {self.folder}: {error.strerror}') from error
        open_trackers(self.args, self.accelerator, self.folder)
        if self.start_epoch >= self.stop_epoch:
            _logger.info('All %d epochs of this run are trained: raise --%s to train on', self.stop_epoch,
                         'stop-epoch' if self.args.stop_epoch else 'epochs')
            return
        _logger.info('Training %s for epochs %d to %d on %d %s of %s, results in %s', self.args.model,
                     self.start_epoch, self.stop_epoch - 1, self.accelerator.num_processes,
                     'process' if self.accelerator.num_processes == 1 else 'processes',
                     self.accelerator.device.type, self.folder)

    def _describe(self) -> Dict[str, Any]:
        """What the run's folder says of its starts and its data."""
        data = self.data
        start = {'command': self.command, 'epoch': self.start_epoch, **environment(self.accelerator)}
        return {'starts': [*self.starts, start], 'regime': data.regime.to_dict() if data.regime else None,
                'data': {'train_images': len(data.train),
                         'validation_images': data.num_images if data.validation is not None else 0,
                         'class_names': class_names(data.train)}}

    def _state(self, epoch: int) -> Dict[str, Any]:
        """What a run that starts at ``epoch`` needs besides the model. Called by every process."""
        scaler = self.accelerator.scaler
        return {
            'epoch': epoch,
            'best': self.best,
            'metric': self._metric,
            'history': self.history.entries,
            'opt': self.args.opt,
            'optimizer': self.optimizer.state_dict(),
            'task': [self.task.get_task_state(), self.task.get_task_state(ema=True)],
            'smoother': self.smoother.state_dict() if self.smoother else None,
            'scaler': scaler.state_dict() if scaler else None,
            'plateau': self.lr_scheduler.lr_scheduler.state_dict() if self.args.sched == 'plateau' else None,
            'random': gather_object([random_state()]),
            'cost': self._cost_state(),
        }

    def _cost_state(self) -> Optional[Dict[str, Any]]:
        if self.cost is None:
            return None
        return {**self.cost, 'samples': [[*size, number] for size, number in sorted(self.cost['samples'].items())]}

    def _save(self, name: str, state: Dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            save_checkpoint(os.path.join(self.folder, name), self.model, state, self.ema)

    def _load(self, path: str) -> None:
        """Continue a run of ours, given its folder or a checkpoint in it, or one of timm's script, given its file."""
        if os.path.isfile(path):
            self._load_timms(path)
            return
        folder = newest_checkpoint(path)
        try:
            state = load_checkpoint(folder, self.model, self.ema)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        for ema, task_state in zip((False, True), state.get('task', ())):
            if task_state and (not ema or self.ema is not None):
                self.task.load_task_state(task_state, ema=ema)
        if not self.args.no_resume_opt:
            self._load_optimizer(state, path)
        if len(state['random']) == self.accelerator.num_processes:
            set_random_state(state['random'][self.accelerator.process_index])
        else:
            _logger.warning('The run was saved by %d processes: random states start afresh', len(state['random']))
        self.start_epoch = state['epoch']
        with refusing():
            self.starts = read_run(run_folder(path)).get('starts', [])
        self.cost = state.get('cost')
        if self.cost is not None:
            self.cost['samples'] = Counter({
                (height, width): number for height, width, number in self.cost['samples']})
        in_place = os.path.realpath(self.folder) == os.path.realpath(run_folder(path))
        if in_place and state.get('metric') == self._metric:  # else another folder's best, or of another scale
            self.best = state['best']
            self.history = CheckpointHistory(self.folder, self.args.checkpoint_hist, state['history'])

    def _load_optimizer(self, state: Dict[str, Any], path: str) -> None:
        if state['opt'] != self.args.opt:
            raise UsageError(f'{path} was trained with --opt {state["opt"]}, not {self.args.opt}')
        try:
            self.optimizer.load_state_dict(state['optimizer'])
        except (KeyError, ValueError) as error:
            raise UsageError(f'{path} does not fit the optimizer: resume with the arguments it was started with'
                             ) from error
        if self.smoother and state['smoother']:
            self.smoother.load_state_dict(state['smoother'])
        if self.accelerator.scaler and state['scaler']:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        if self.args.sched == 'plateau' and state['plateau']:
            self.lr_scheduler.lr_scheduler.load_state_dict(state['plateau'])

    def _load_timms(self, path: str) -> None:
        """timm reads its own checkpoints, with torch's unpickler restricted to tensors and plain values."""
        with refusing(f'cannot resume {path}'):
            try:
                epoch = resume_task_checkpoint(
                    self.task, path, None if self.args.no_resume_opt else self.optimizer, log_info=False)
                if self.ema is not None:
                    load_task_ema_checkpoint(self.task, path)
            except pickle.UnpicklingError as error:
                raise ValueError(str(error)) from error
        self.start_epoch = epoch or 0
        self.cost = None


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
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.new', path)


if __name__ == '__main__':
    sys.exit(main())
