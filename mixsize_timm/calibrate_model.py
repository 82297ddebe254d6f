"""Batch-norm statistics for many sizes, kept beside a model's weights: ``mixsize calibrate MODEL --sizes ...``."""
import argparse
import copy
import os
import sys
from typing import Any, List, Optional

from timm.models import safe_model_name, save_for_hf
from timm.utils import random_seed

from .args import check_seed, model_dtype
from .bn_stats import BN_STATS_FILE, BatchNormStats, fingerprint
from .calibration import calibrated_layers, warn_of_unserved
from .checkpoint import MODEL_FILE, STATE_JSON
from .errors import UsageError, check_writable, refusing, run_command
from .failures import explaining
from .layout import CONFIG_FILE, staged
from .models import find_checkpoint
from .parser import Parser
from .subject import Subject, add_shared_options, model_arguments, start_accelerator

NAME = 'mixsize calibrate'


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command; the exit code is 0, 2 for what the user can mend, 130 after Ctrl-C."""
    return run_command(NAME, lambda: Calibration(parse_args(argv)).run(),
                       lambda: 'nothing was written')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """What the command line says.

    Raises:
        UsageError: An argument's value cannot work.
    """
    parser = Parser(
        prog=NAME, usage='mixsize calibrate MODEL [options]',
        description='Calibrate batch norm for many image sizes, on training images, which need no labels, and keep the '
                    f'statistics in {BN_STATS_FILE} beside the weights, for mixsize_timm.load(MODEL, img_size=...).')
    parser.add_argument('checkpoint', metavar='MODEL',
                        help='a run\'s folder or a checkpoint in it, a folder in hub layout, a .safetensors or timm '
                             '.pth file, hf-hub:NAME, local-dir:DIR, or a timm model, whose trained weights are meant')
    group = parser.add_argument_group('Calibration')
    group.add_argument('--sizes', type=int, nargs='+', metavar='N', help='image sizes (default: those of the run)')
    group.add_argument('--calibrate', type=int, default=200, metavar='N',
                       help='batches, at most one epoch, that batch norm is calibrated on (default: 200)')
    group.add_argument('--output', default='', metavar='DIR',
                       help='folder that gets the weights too, in the layout of the Hugging Face hub (default: beside '
                            'the weights; for weights that timm finds output/calibrate/ and the model)')
    group.add_argument('--overwrite', action='store_true', default=False,
                       help='replace statistics that are there already')
    add_shared_options(parser, evaluation=False)
    args = parser.parse_args(argv)
    if args.calibrate < 1:
        raise UsageError(f'--calibrate must be at least 1, not {args.calibrate}')
    if any(size < 1 for size in args.sizes or ()):
        raise UsageError('--sizes must be positive')
    check_seed(args)
    return args


class Calibration:
    """One run of the command. The constructor finds what cannot work; :meth:`run` calibrates and writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.found = find_checkpoint(args.checkpoint, model=args.model, use_ema=args.use_ema,
                                     unsafe_pickle=args.unsafe_pickle, **model_arguments(args))
        self.accelerator = start_accelerator(args)
        self.subject = Subject(self.found, args)
        self.model, self.data = self.subject.create(self.accelerator)
        warn_of_unserved(self.model)
        if not calibrated_layers(self.model):
            raise UsageError(f'{args.checkpoint} has no batch norm: there is nothing to calibrate')
        self.sizes = self.subject.sizes(self.model, self.data, args.sizes)
        self.stats = BatchNormStats(fingerprint(self.model))
        self.beside = bool(self.found.folder and not args.output)  # the weights stay where they are
        self.folder = self.found.folder if self.beside else args.output or os.path.join(
            'output', 'calibrate', safe_model_name(args.checkpoint))
        self.saves_model = not self.beside
        self._look_around()
        check_writable(self.folder)
        self.data.open(train=True, validation=False)
        self.data.calibration_loader(self.sizes[0])  # what a loader refuses is found here

    def _look_around(self) -> None:
        """Find what stands where the statistics will; those of other sizes are kept."""
        path = os.path.join(self.folder, BN_STATS_FILE)
        if os.path.exists(path):
            with refusing():
                there = BatchNormStats.load(path)
            if there.weights == self.stats.weights:
                self.stats.by_size.update(there.by_size)
            elif not self.args.overwrite:
                raise UsageError(f'{path} is of other weights: --overwrite replaces it')
            again = [str(size) for size in self.sizes if size in self.stats.by_size]
            if again and not self.args.overwrite:
                raise UsageError(f'{path} has {", ".join(again)} px already: leave them out, or --overwrite')
        if self.beside:
            return
        there_too = [name for name in (CONFIG_FILE, MODEL_FILE) if os.path.exists(os.path.join(self.folder, name))]
        if os.path.exists(os.path.join(self.folder, STATE_JSON)):
            raise UsageError(f'{self.folder} is a checkpoint of a run: choose another --output')
        if self.stats.by_size and CONFIG_FILE in there_too:  # this command wrote that folder, of these weights
            self.saves_model = False
        elif there_too and not self.args.overwrite:
            raise UsageError(f'{self.folder} already holds {there_too[0]}: choose another --output, or --overwrite')

    def run(self) -> None:
        """Calibrate for every size and write."""
        args = self.subject.args
        random_seed(args.seed, self.accelerator.process_index)
        self.saved = copy.deepcopy(self.model) if self.saves_model else None  # in its own type
        self.model.to(device=self.accelerator.device, dtype=model_dtype(args))
        with explaining(self.args):
            for size in self.sizes:
                self.stats.add(size, self.data.calibrate(self.model, size, self.args.calibrate))
        if self.accelerator.is_main_process:
            self._write()
        self.accelerator.end_training()

    def _write(self) -> None:
        path = os.path.join(self.folder, BN_STATS_FILE)
        with refusing(f'cannot write to {self.folder}'):
            if self.saves_model:
                model: Any = self.saved
                with staged(self.folder) as aside:
                    save_for_hf(model, aside, safe_serialization=True)
            self.stats.save(path)
        name = self.found.name if self.beside else self.folder
        named = f', model={self.args.model!r}' if self.args.model and self.beside else ''
        print(f'The statistics for {", ".join(map(str, self.stats.sizes))} px are in {path} '
              f'({os.path.getsize(path) / 1e6:.2f} MB)\n'
              f'mixsize_timm.load({name!r}, img_size={self.sizes[0]}{named}) gives the model for {self.sizes[0]} px')


if __name__ == '__main__':
    sys.exit(main())
