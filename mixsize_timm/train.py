"""Train a timm model at mixed image sizes: ``accelerate launch -m mixsize_timm.train --model resnet50``."""
import argparse
import json
import logging
import os
import sys
from datetime import datetime
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import yaml
from accelerate.utils import gather_object
from timm.models import safe_model_name
from timm.utils import distribute_bn, random_seed, setup_default_logging
from timm.utils.summary import trim_summary, update_summary
from torch import nn

from .args import ARGS_FILE, parse_args
from .build import Data, create_accelerator, create_model, create_schedule, create_task, scale_lr
from .calibration import calibrate, calibrated_layers
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .engine import train_one_epoch, validate
from .parser import UsageError
from .smoothing import GradientSmoother

_logger = logging.getLogger(__name__)

SIZES_FILE = 'sizes.json'
SUMMARY_FILE = 'summary.csv'
LAST = 'last'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    first = os.environ.get('LOCAL_RANK', '0') == '0'
    if not logging.root.handlers:  # a caller's own logging is left alone
        setup_default_logging(logging.INFO if first else logging.WARNING)
    training = None
    try:
        training = Training(parse_args(argv))
        training.run()
    except UsageError as error:
        if first:
            print(f'mixsize_timm.train: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if first:
            folder = training.folder if training else 'FOLDER'
            print(f'\nmixsize_timm.train: stopped; --resume {folder} continues after the last finished epoch',
                  file=sys.stderr)
        return 130
    return 0


class Training:
    """One run of the command. The constructor finds all that cannot work; :meth:`run` trains."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.stated = dict(vars(args))  # before anything is derived from it
        self.accelerator = create_accelerator(args)
        random_seed(args.seed, self.accelerator.process_index)
        model = create_model(args)
        self.data = Data(args, model, self.accelerator)
        self.data.describe()
        args.lr = scale_lr(args, self.data.regime, self.accelerator.num_processes)
        self.task, self.optimizer = create_task(args, model, self.accelerator)
        self.smoother = GradientSmoother(args.grad_smoothing_momentum) if args.grad_smoothing else None
        self.lr_scheduler, self.num_epochs = create_schedule(args, self.optimizer, self.data)
        self.start_epoch = 0
        self.best: Optional[float] = None
        self.folder = self._choose_folder()
        if args.resume:
            self._load(args.resume)
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
            train_metrics = train_one_epoch(
                epoch, self.task, self.data.loader, self.data.start_epoch(epoch), self.optimizer, self.accelerator,
                smoother=self.smoother, lr_scheduler=self.lr_scheduler, mixup_fn=self.data.mixup_fn,
                clip_grad=args.clip_grad, clip_mode=args.clip_mode, channels_last=args.channels_last,
                log_interval=args.log_interval)
            if self.accelerator.num_processes > 1 and args.dist_bn and not args.sync_bn:
                distribute_bn(self.model, self.accelerator.num_processes, args.dist_bn == 'reduce')
            if (epoch + 1) % args.val_interval and epoch + 1 != self.num_epochs:
                self._step_schedule(epoch + 1)
            else:
                self._finish_epoch(epoch, train_metrics)
        self._report_sizes()
        self.accelerator.end_training()

    def _finish_epoch(self, epoch: int, train_metrics: Dict[str, float]) -> None:
        """Validate, write the summary, step the schedule and save."""
        used, eval_metrics = self._validate(epoch)
        lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
        if self.accelerator.is_main_process:
            update_summary(epoch, train_metrics, eval_metrics, os.path.join(self.folder, SUMMARY_FILE), lr=lr)
        self.accelerator.log({
            'epoch': epoch, 'lr': lr, **{f'train_{k}': v for k, v in train_metrics.items()},
            **{f'eval_{k}': v for k, v in eval_metrics.items()}}, step=epoch)

        metric = eval_metrics['top1'] if eval_metrics else -train_metrics['loss']
        improved = self.best is None or metric > self.best
        self.best = metric if improved else self.best
        self._step_schedule(epoch + 1, eval_metrics.get('top1', train_metrics['loss']))
        state = self._state(epoch + 1)
        if self.accelerator.is_main_process:
            if improved:  # first: the state that follows says that it is there
                save_checkpoint(os.path.join(self.folder, 'best'), used)
            save_checkpoint(os.path.join(self.folder, LAST), self.model, state)
        self.accelerator.wait_for_everyone()

    def _validate(self, epoch: int) -> Tuple[nn.Module, Dict[str, float]]:
        """The model as it is used at the base size, and its metrics with those of the running statistics beside."""
        size = self.data.base_size
        calibrating = self.data.regime and self.args.calibrate_val and calibrated_layers(self.model)
        if self.data.validation is None:
            return self._calibrated(size, self.args.calibrate_val) if calibrating else self.model, {}
        own = self._evaluate(self.model, size)
        if not calibrating:
            _logger.info('Validation %d  %d px  %s', epoch, size, _summary(own))
            return self.model, own
        calibrated = self._calibrated(size, self.args.calibrate_val)
        metrics = self._evaluate(calibrated, size)
        _logger.info('Validation %d  %d px  calibrated: %s   running statistics: %s', epoch, size, _summary(metrics),
                     _summary(own))
        return calibrated, {**metrics, **{f'{k}_uncalibrated': v for k, v in own.items()}}

    def _report_sizes(self) -> None:
        """Evaluate the final weights at every size of the regime; a table on the terminal and ``sizes.json``."""
        if self.data.validation is None:
            _logger.info('No validation split, so no accuracy is reported; the run is in %s', self.folder)
            return
        results = self.measure(self.data.regime.sizes if self.data.regime else (self.data.base_size,))
        if self.accelerator.is_main_process:
            regime = self.data.regime.to_dict() if self.data.regime else None
            _write_text(os.path.join(self.folder, SIZES_FILE),
                        json.dumps({'results': results, 'regime': regime}, indent=2) + '\n')
            print(_sizes_table(results, bool(self.args.calibrate)))
            print(f'\nThe run is in {self.folder}')

    def measure(self, sizes: Sequence[int]) -> List[Dict[str, float]]:
        """Metrics at each size as the model is used, calibrated, and with its running statistics beside."""
        results = []
        for size in sizes:
            own = self._evaluate(self.model, size)
            used = own
            if self.args.calibrate and calibrated_layers(self.model):
                used = self._evaluate(self._calibrated(size, self.args.calibrate), size)
            results.append({'img_size': size, **used, **{f'{k}_uncalibrated': v for k, v in own.items()}})
        return results

    def _calibrated(self, size: int, num_batches: int) -> nn.Module:
        model = calibrate(self.model, self.data.calibration_loader(size), num_batches)
        if self.accelerator.num_processes > 1:
            distribute_bn(model, self.accelerator.num_processes, reduce=True)
        return model

    def _evaluate(self, model: nn.Module, size: int) -> Dict[str, float]:
        # torch's loaders draw from the global generator; only with --mixsize off shall training feel it, as timm's does
        with torch.random.fork_rng(devices=[], enabled=self.data.regime is not None):
            return validate(
                model, self.data.validation_loader(size), self.task, self.accelerator, self.args.channels_last)

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
        if args.resume and not (args.output or args.experiment):
            return args.resume
        name = args.experiment or '-'.join(
            [datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(self.data.base_size)])
        folder = os.path.join(args.output or os.path.join('output', 'train'), name)
        if any(os.path.exists(os.path.join(folder, kept)) for kept in (LAST, LAST + '.old', SIZES_FILE)):
            raise UsageError(f'{folder} already holds a run: choose another --experiment, or --resume {folder}')
        return folder

    def _open_folder(self) -> None:
        self.accelerator.wait_for_everyone()  # all have seen that the folder is free
        if self.accelerator.is_main_process:
            try:
                os.makedirs(self.folder, exist_ok=True)
                trim_summary(os.path.join(self.folder, SUMMARY_FILE), self.start_epoch)
                _write_text(os.path.join(self.folder, ARGS_FILE), yaml.safe_dump(self.stated))
            except OSError as error:
                raise UsageError(f'cannot write to {self.folder}: {error.strerror}') from error
        if self.args.log_wandb:
            self.accelerator.init_trackers(
                self.args.wandb_project or 'mixsize-timm', config=vars(self.args),
                init_kwargs={'wandb': dict(name=os.path.basename(self.folder), tags=self.args.wandb_tags)})
        if self.start_epoch >= self.num_epochs:
            _logger.info('All %d epochs of this run are trained: raise --epochs to train on', self.num_epochs)
            return
        _logger.info('Training %s for epochs %d to %d on %d %s of %s, results in %s', self.args.model,
                     self.start_epoch, self.num_epochs - 1, self.accelerator.num_processes,
                     'process' if self.accelerator.num_processes == 1 else 'processes',
                     self.accelerator.device.type, self.folder)

    def _state(self, epoch: int) -> Dict[str, Any]:
        """What a run that starts at ``epoch`` needs besides the model. Called by every process."""
        scaler = self.accelerator.scaler
        return {
            'epoch': epoch,
            'best': self.best,
            'opt': self.args.opt,
            'optimizer': self.optimizer.state_dict(),
            'smoother': self.smoother.state_dict() if self.smoother else None,
            'scaler': scaler.state_dict() if scaler else None,
            'plateau': self.lr_scheduler.lr_scheduler.state_dict() if self.args.sched == 'plateau' else None,
            'random': gather_object([random_state()]),
        }

    def _load(self, folder: str) -> None:
        try:
            state = load_checkpoint(os.path.join(folder, LAST), self.model)
        except (OSError, ValueError) as error:
            raise UsageError(str(error)) from error
        if state['opt'] != self.args.opt:
            raise UsageError(f'{folder} was trained with --opt {state["opt"]}, not {self.args.opt}')
        try:
            self.optimizer.load_state_dict(state['optimizer'])
        except (KeyError, ValueError) as error:
            raise UsageError(f'{folder} does not fit the optimizer: resume with the arguments it was started with'
                             ) from error
        if self.smoother and state['smoother']:
            self.smoother.load_state_dict(state['smoother'])
        if self.accelerator.scaler and state['scaler']:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        if self.args.sched == 'plateau' and state['plateau']:
            self.lr_scheduler.lr_scheduler.load_state_dict(state['plateau'])
        if len(state['random']) == self.accelerator.num_processes:
            set_random_state(state['random'][self.accelerator.process_index])
        else:
            _logger.warning('The run was saved by %d processes: random states start afresh', len(state['random']))
        self.start_epoch, self.best = state['epoch'], state['best']


def _summary(metrics: Dict[str, float]) -> str:
    return f'top-1 {metrics["top1"]:.2f}  top-5 {metrics["top5"]:.2f}  loss {metrics["loss"]:.4f}'


def _sizes_table(results: List[Dict[str, float]], calibrated: bool) -> str:
    columns = {'calibrated': 'top1', 'running statistics': 'top1_uncalibrated'}
    if not calibrated:
        del columns['calibrated']
    rows: List[List[Any]] = [[row['img_size'], *(row[key] for key in columns.values())] for row in results]
    rows.append(['mean', *(sum(column) / len(rows) for column in list(zip(*rows))[1:])])
    lines = ['\nTop-1 accuracy of the final weights on the validation images, in per cent\n', '  '.join(
        [' img_size', *columns])]
    lines += ['  '.join([f'{size:>9}', *(f'{x:>{len(name)}.2f}' for name, x in zip(columns, values))])
              for size, *values in rows]
    return '\n'.join(lines)


def _write_text(path: str, text: str) -> None:
    with open(path + '.new', 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(path + '.new', path)


if __name__ == '__main__':
    sys.exit(main())
