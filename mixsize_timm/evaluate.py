"""Accuracy against image size: ``python -m mixsize_timm.evaluate CHECKPOINT ... --sizes 128 160 224``."""
import argparse
import copy
import logging
import os
import shlex
import sys
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch
from timm.task import ClassificationTask, MultiLabelClassificationTask
from timm.utils import random_seed
from torch import nn

from .args import check_seed, model_dtype
from .bn_stats import BatchNormStats, fingerprint
from .calibration import calibrated_layers, warn_of_unserved
from .checkpoint import read_state
from .curves import all_answers, answer_lines, format_table, make_curves
from .datasets import check_classes
from .engine import in_format, validate
from .errors import UsageError, check_writable, refusing, run_command
from .failures import explaining
from .loaders import EvaluationData
from .measure import describe_weights, measure_sizes, measure_speed, training_cost
from .models import Checkpoint, find_checkpoint
from .parser import Parser
from .provenance import environment
from .report import REPORT_FILES, write_report
from .subject import Subject, add_shared_options, model_arguments, start_accelerator

_logger = logging.getLogger(__name__)

KEPT = 'kept'  # --calibrate kept
MAX_CPU_BATCH = 32  # for the throughput of a CPU, which a larger batch does not raise


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return run_command('mixsize_timm.evaluate', lambda: Evaluation(parse_args(argv)).run(),
                       lambda: 'nothing was written')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """What the command line says.

    Raises:
        UsageError: An argument's value cannot work.
    """
    parser = Parser(
        prog='mixsize_timm.evaluate', usage='mixsize evaluate CHECKPOINT [CHECKPOINT ...] [options]',
        description='Measure checkpoints at many image sizes, with batch norm calibrated for each, and write a report.',
        epilog='Also "python -m mixsize_timm.evaluate ..." and "accelerate launch -m mixsize_timm.evaluate ...".')
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT',
                        help='a run\'s folder or a checkpoint in it, a folder in hub layout, a .safetensors or timm '
                             '.pth file, hf-hub:NAME, local-dir:DIR, or with --pretrained a timm model')
    group = parser.add_argument_group('Measurement')
    group.add_argument('--sizes', type=int, nargs='+', metavar='N', help='image sizes (default: those of the run)')
    group.add_argument('--calibrate', type=_calibrate, default=200, metavar='N',
                       help='batches, at most one epoch, that batch norm is calibrated on; 0 for none; "kept" for the '
                            'statistics kept beside the weights (default: 200)')
    group.add_argument('--crop-pct', dest='crop_pcts', type=float, nargs='+', metavar='N',
                       help='centre crop, as a fraction of the resized image; of several each is measured (default: '
                            'the model\'s)')
    group.add_argument('--crop-mode', metavar='MODE', choices=('center', 'squash', 'border'),
                       help='center, squash or border (default: the model\'s)')
    group.add_argument('--crop-border-pixels', type=int, metavar='N', help='crop pixels from the border')
    group.add_argument('--no-speed', dest='speed', action='store_false', default=True,
                       help='do not measure throughput and latency')
    group = parser.add_argument_group('Report')
    group.add_argument('--names', nargs='+', metavar='NAME',
                       help='what the checkpoints are called; those of one name are averaged, such as seeds (default: '
                            'their folders)')
    group.add_argument('--baseline', metavar='NAME',
                       help='name of the checkpoint that the others are compared with')
    group.add_argument('--output', default='', metavar='DIR',
                       help='folder of the report (default: output/evaluate/ and the time)')
    group.add_argument('--overwrite', action='store_true', default=False, help='replace a report in --output')
    add_shared_options(parser)
    args = parser.parse_args(argv)
    args.command = shlex.join(['mixsize', 'evaluate', *(sys.argv[1:] if argv is None else argv)])
    _check(args)
    return args


def _calibrate(text: str) -> Any:
    return text if text == KEPT else int(text)


def _check(args: argparse.Namespace) -> None:
    check_seed(args)
    if args.calibrate != KEPT and args.calibrate < 0:
        raise UsageError(f'--calibrate must not be negative, not {args.calibrate}')
    if any(size < 1 for size in args.sizes or ()):
        raise UsageError('--sizes must be positive')
    if any(not 0 < crop <= 1 for crop in args.crop_pcts or ()):
        raise UsageError('--crop-pct must be above 0 and at most 1')
    if args.names and len(args.names) != len(args.checkpoints):
        raise UsageError(f'--names has {len(args.names)} names for {len(args.checkpoints)} checkpoints')
    if not args.names:
        short = [os.path.basename(os.path.normpath(name)) for name in args.checkpoints]
        args.names = short if len(set(short)) == len(short) else args.checkpoints
    if args.baseline in args.checkpoints:
        args.baseline = args.names[args.checkpoints.index(args.baseline)]
    if args.baseline is not None and args.baseline not in args.names:
        raise UsageError(f'--baseline must be one of {", ".join(dict.fromkeys(args.names))}, not {args.baseline}')
    if args.baseline is not None and len(set(args.names)) == 1:
        raise UsageError('--baseline needs checkpoints of another name to compare with')
    pairs = list(zip(args.checkpoints, args.names))
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise UsageError(f'{pair[0]} is given twice')
    registered = [name for name in args.checkpoints if not os.path.exists(name) and timm.is_model(name)]
    if registered and not args.pretrained:
        raise UsageError(f'{registered[0]} is the name of a model without weights: add --pretrained')


class Evaluation:
    """One run of the command. The constructor finds what cannot work; :meth:`run` measures and writes the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found = [find_checkpoint(name, model=args.model, use_ema=args.use_ema, unsafe_pickle=args.unsafe_pickle,
                                      **model_arguments(args)) for name in args.checkpoints]
        self.folder = args.output or os.path.join('output', 'evaluate', time.strftime('%Y%m%d-%H%M%S'))
        there = [name for name in REPORT_FILES if os.path.exists(os.path.join(self.folder, name))]
        if there and not args.overwrite:
            raise UsageError(f'{self.folder} already holds {there[0]}: choose another --output, or --overwrite')
        self.accelerator = start_accelerator(args)
        self.sizes: List[Tuple[int, ...]] = []
        for found in self.found:
            subject = self._subject(found)
            model, data = subject.create(self.accelerator)
            if not subject.args.val_split:
                raise UsageError(f'{found.name} was trained without a validation split: name one with --val-split')
            data.open(train=self._counted, validation=True)
            with refusing():
                check_classes(data.validation if data.train is None else data.train, data.validation,
                              subject.args.num_classes)
            self.sizes.append(subject.sizes(model, data, args.sizes))
            data.validation_loader(self.sizes[-1][0])  # what a loader refuses is found here
            if self._counted and calibrated_layers(model):
                data.calibration_loader(self.sizes[-1][0])
            if args.calibrate == KEPT and calibrated_layers(model):
                stats = found.statistics()
                if stats is None or not stats.attach(model):
                    raise UsageError(f'{found.name} has no statistics of its own for other sizes: make them with '
                                     'mixsize calibrate')
        self._check_together()
        check_writable(self.folder)

    def _check_together(self) -> None:
        """Refuse checkpoints that a table cannot show side by side."""
        for name, sizes in zip(self.args.names, self.sizes):
            if sizes != self.sizes[self.args.names.index(name)]:
                raise UsageError(f'the checkpoints of the name {name} have other sizes: say which with --sizes')
        places = {(args.dataset, os.path.realpath(args.data_dir or ''), args.val_split)
                  for args in (self._subject(found).args for found in self.found)}
        if len(places) > 1:
            raise UsageError('the runs were trained on other images: say which to measure on, with --data-dir or '
                             '--dataset')

    @property
    def _counted(self) -> bool:
        """Whether there are batches to calibrate on."""
        return self.args.calibrate not in (0, KEPT)

    def _subject(self, found: Checkpoint) -> Subject:
        return Subject(found, self.args, self.found)

    def run(self) -> None:
        """Measure every checkpoint, print the table and write the report."""
        with explaining(self.args):
            checkpoints = [self._measure(number) for number in range(len(self.found))]
        if self.accelerator.is_main_process:
            self._report(checkpoints)
        self.accelerator.end_training()

    def _report(self, checkpoints: List[Dict[str, Any]]) -> None:
        metric = 'top1' if 'top1' in checkpoints[0]['results'][0] else 'map'
        curves = make_curves(checkpoints, metric)
        print(f'\nAccuracies in per cent\n\n{format_table(curves, metric)}')
        for answers in all_answers(curves, self.args.baseline):
            print(f'\n{answers["name"]} against {answers["baseline"]}')
            print('\n'.join(f'  {line}' for line in answer_lines(answers)))
        document = {'metric': metric, 'baseline': self.args.baseline, 'settings': self._settings(),
                    'checkpoints': checkpoints}
        with refusing(f'cannot write to {self.folder}'):
            os.makedirs(self.folder, exist_ok=True)
            write_report(self.folder, document)
        print(f'\nThe report is in {self.folder}')

    def _measure(self, number: int) -> Dict[str, Any]:
        found, name = self.found[number], self.args.names[number]
        subject = self._subject(found)
        random_seed(subject.args.seed, self.accelerator.process_index)
        model, data = subject.create(self.accelerator)
        stats = found.statistics() if self.args.calibrate == KEPT else None
        if stats is None or not stats.attach(model):
            stats = BatchNormStats(fingerprint(model))
        identity = describe_weights(model)
        model.to(device=self.accelerator.device, dtype=model_dtype(subject.args))
        if subject.args.channels_last:
            model.to(memory_format=torch.channels_last)
        warn_of_unserved(model)
        if not calibrated_layers(model):
            _logger.info('%s has no batch norm: there is nothing to calibrate', name)
        data.open(train=self._counted, validation=True)
        results: List[Dict[str, Any]] = []
        for crop_pct in self.args.crop_pcts or (data.config['crop_pct'],):
            data.config['crop_pct'] = crop_pct
            results += [{**row, 'crop_pct': crop_pct}
                        for row in self._measure_sizes(name, model, data, self.sizes[number], stats)]
        if self.args.speed:
            speeds = {size: self._speed(model, data, size) for size in self.sizes[number]}
            results = [{**row, **speeds[row['img_size']]} for row in results]
        calibrated: Any = self.args.calibrate if calibrated_layers(model) else 0
        if self._counted and calibrated:
            calibrated = data.num_calibration_batches(calibrated)
        cost = read_state(found.folder, 'progress') if found.folder else None
        pretrained_cfg: Any = model.pretrained_cfg
        return {
            'name': name, 'checkpoint': found.name,
            'model': found.args.model if found.args else pretrained_cfg['architecture'],
            **identity, 'calibrated': calibrated,
            'training': training_cost(model, cost, data.channels,
                                      {data.shape(row['img_size']): row['gmacs'] for row in results}),
            'data': {**data.to_dict(bool(self._counted and calibrated)),
                     'moving average': 'where there is one' if found.use_ema else 'no'},
            'results': results}

    def _measure_sizes(self, name: str, model: nn.Module, data: EvaluationData, sizes: Tuple[int, ...],
                       stats: BatchNormStats) -> List[Dict[str, Any]]:
        args, task = data.args, create_task(model, data)

        def evaluate(models: Sequence[nn.Module], size: int) -> List[Dict[str, float]]:
            all_metrics = validate(models, data.validation_loader(size), task, self.accelerator, args.channels_last,
                                   model_dtype(args), args.tta)
            for metrics in all_metrics:
                _logger.info('%s  %d px  %s', name, size, '  '.join(f'{key} {x:.4g}' for key, x in metrics.items()))
            return all_metrics

        def calibrate(model: nn.Module, size: int) -> nn.Module:
            if self._counted and size not in stats.by_size:
                return data.calibrate(model, size, self.args.calibrate)
            model = copy.deepcopy(model)  # kept, or calibrated for another crop
            stats.apply(model, size)
            return model

        return measure_sizes(
            model, sizes, evaluate, calibrate if self.args.calibrate and calibrated_layers(model) else None,
            num_images=data.num_images, shape=data.shape, stats=stats if self._counted else None)

    def _speed(self, model: nn.Module, data: EvaluationData, size: int) -> Dict[str, float]:
        """Speed of one device, while the other processes wait."""
        result: Dict[str, float] = {}
        if self.accelerator.is_main_process:
            device, args = self.accelerator.device, data.args
            batch = min(args.batch_size, MAX_CPU_BATCH) if device.type == 'cpu' else args.batch_size
            images = torch.randn(batch, *data.shape(size)).to(device=device, dtype=model_dtype(args))
            result = measure_speed(model, in_format(images, args.channels_last), autocast=self.accelerator.autocast)
        self.accelerator.wait_for_everyone()
        return result

    def _settings(self) -> Dict[str, Any]:
        """What the report says about how it was made."""
        return {'command': self.args.command, **environment(self.accelerator)}


def create_task(model: nn.Module, data: EvaluationData) -> Any:
    """timm's task that makes the evaluator, on the device that the outputs are on."""
    device = data.accelerator.device
    if data.args.task == 'multilabel':
        return MultiLabelClassificationTask(model, threshold=data.args.multilabel_threshold, device=device,
                                            verbose=False)
    return ClassificationTask(model, device=device, verbose=False)


if __name__ == '__main__':
    sys.exit(main())
