"""Every option reaches what it is for: where each value lands, and which are refused.

A row of ``LANDS`` builds a run with an option and looks at what uses its value. The same look at a run without the
option must find something else, so that a row fails if its option is parsed and then ignored.
"""
import json
import os
import shlex
import sys
from collections import defaultdict
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple

import datasets
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import write_images
from PIL import Image
from safetensors.torch import save_file
from timm.data import IterableImageDataset
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath, SplitBatchNorm2d, set_fast_norm
from timm.models import save_for_hf
from torch import nn
from torchvision import transforms

from mixsize_timm import build, engine, loaders, train
from mixsize_timm.args import _DEPENDENTS, _OFF_ONLY, parse_args
from mixsize_timm.data import MixSizeLoader
from mixsize_timm.datasets import class_names
from mixsize_timm.errors import UsageError
from mixsize_timm.parser import build_parser
from mixsize_timm.saver import CheckpointSaver
from mixsize_timm.sizes import SizeProbe

TINY = '--model test_resnet --img-size 32 -j 0 --output {tmp}/runs '
BASE = TINY + '--data-dir {folder} --num-classes 2 -b 4 --epochs 10 '


class Built:
    """A run that was built and not trained: its parts, and the arguments of the calls that made them."""

    def __init__(self, argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.calls = defaultdict(list)
        with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(
                fail_on_recompile_limit_hit=False, recompile_limit=8, accumulated_recompile_limit=256):
            for owner, name in ((build, 'Accelerator'), (build, 'set_jit_fuser'), (timm.data, 'create_dataset'),
                                (torch, 'compile')):
                patch.setattr(owner, name, self._recording(name, getattr(owner, name)))
            patch.setattr(SizeProbe, '__call__', lambda *_: True)  # which sizes a model takes is asked elsewhere
            self.training = train.Training(parse_args(argv))
        self.args, self.data, self.task = self.training.args, self.training.data, self.training.task
        self.model, self.scheduler = self.training.model, self.training.lr_scheduler
        self.criterion = self.task.criterion
        self.accelerator, self.groups = self.training.accelerator, self.training.optimizer.param_groups

    def _recording(self, name: str, original: Callable) -> Callable:
        def recording(*args, **kwargs):
            self.calls[name].append(dict(enumerate(args)) | kwargs)
            return original(*args, **kwargs)
        return recording

    @property
    def prefetcher(self) -> Any:
        """The training loader under ours: timm's prefetcher, or torch's loader where there is none."""
        loader = self.data.loader
        return loader.loader if isinstance(loader, MixSizeLoader) else loader

    @property
    def loader(self) -> Any:
        return getattr(self.prefetcher, 'loader', self.prefetcher)

    @property
    def collate(self) -> Any:
        return getattr(self.loader.dataset, 'maker', self.loader).collate_fn

    @property
    def validation(self) -> Any:
        return self.data.validation_loader(self.data.base_size)

    @property
    def plan(self) -> Any:
        return self.data.start_epoch(0)

    @property
    def batch(self) -> Any:
        return next(iter(self.data.loader))

    def transform(self, size=32) -> list:
        dataset = self.loader.dataset
        composed = dataset.maker.transforms[size] if hasattr(dataset, 'maker') else dataset.transform
        return list(composed.transforms)

    def step(self, kind: type, size=32) -> Any:
        """The first step of a kind in the training transform."""
        return next(step for step in self.transform(size) if isinstance(step, kind))

    def layers(self, *kinds: type) -> list:
        return [module for module in self.model.modules() if isinstance(module, kinds)]

    @cached_property
    def loop(self) -> dict:
        """What the training loop is handed."""
        handed = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, 'train_one_epoch', lambda *args, **kwargs: handed.update(kwargs) or {'loss': 0.})
            self.training._train(0)
        return handed

    @cached_property
    def epoch(self) -> SimpleNamespace:
        """A trained epoch: the images that the model took, the factor of each loss, and how gradients were clipped."""
        seen = SimpleNamespace(images=[], losses=[], factors=[], clips=[])
        hooks = [self.model.register_forward_pre_hook(lambda _, inputs: seen.images.append(inputs[0])),
                 self.task.register_forward_hook(lambda _, __, result: seen.losses.append(result['loss'].item()))]
        with pytest.MonkeyPatch.context() as patch:
            original = self.accelerator.backward
            patch.setattr(self.accelerator, 'backward', lambda loss, **kwargs: (
                seen.factors.append(loss.item() / seen.losses[-1]), original(loss, **kwargs)))
            patch.setattr(engine, 'dispatch_clip_grad',
                          lambda _, value, mode: seen.clips.append((value, mode)))
            self.training._train(0)
        for hook in hooks:
            hook.remove()
        return seen

    def calibrated(self, measure: Callable) -> list:
        """How many batches each calibration takes in a measurement."""
        batches = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaders, 'create_calibration_loader', lambda dataset, input_size, num_batches, **kwargs: (
                batches.append(num_batches) or torch.zeros(1, 4, *input_size)))
            measure(self.training)
        return batches

    @property
    def trackers(self) -> dict:
        """What the trackers of the run are started with."""
        started = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Accelerator, 'init_trackers', lambda self, project, config, init_kwargs: started.update(
                project=project, names=[str(name) for name in self.log_with], **init_kwargs.get('wandb', {})))
            train.open_trackers(self.args, self.accelerator, self.training.folder)
        return started


class Row(NamedTuple):
    dest: str
    option: str
    look: Callable[[Built], Any]
    found: Any
    beside: str = ''  # what the option needs
    base: str = BASE


def weight_sum(model: nn.Module) -> float:
    return sum(p.abs().sum().item() for p in model.parameters())


def batch_norms(b: Built) -> list:
    return b.layers(nn.BatchNorm2d, BatchNormAct2d)


def root_of(dataset: Any) -> str:
    return Path(dataset.reader.root).name


OFF = '--mixsize off '
MIXSIZE = [
    Row('mixsize', '--mixsize off', lambda b: type(b.data.loader).__name__, 'PrefetchLoader'),
    Row('mixsize', '--mixsize s144', lambda b: b.data.regime.probs[0], pytest.approx(0.8)),
    Row('mixsize', '--mixsize a144', lambda b: b.data.regime.anneal, 1, '--epochs 2'),
    Row('mixsize', '--mixsize a123', lambda b: b.data.regime.sizes, (16, 32), '--epochs 2'),
    Row('mixsize_adapt', '--mixsize-adapt b+', lambda b: set(b.plan.duplicates), {1}),
    Row('mixsize_batch_of', '--mixsize-batch-of mean', lambda b: b.data.regime.base_batch, 5,
        '-b 10 --mixsize-sizes 16 32 --mixsize-probs 2 1 --mixsize-adapt b+'),
    Row('mixsize_sizes', '--mixsize-sizes 32 40', lambda b: sorted(b.loader.dataset.maker.transforms), [32, 40]),
    Row('mixsize_probs', '--mixsize-probs 5 1', lambda b: sum(b.plan.batch[b.plan.size == 32]), 20,
        '--mixsize-sizes 32 48'),
    Row('mixsize_duplicates', '--mixsize-duplicates 3', lambda b: set(b.plan.duplicates[b.plan.size == 32]), {3}),
    Row('mixsize_max_work', '--mixsize-max-work 1', lambda b: set(b.plan.batch[b.plan.size == 48]), {1},
        '--mixsize-sizes 32 48'),
    Row('mixsize_batch_multiple', '--mixsize-batch-multiple 4', lambda b: {*b.plan.batch[b.plan.size == 24]}, {12},
        '-b 6 --mixsize-sizes 24 32 --mixsize-adapt b+ --mixsize-drop reference'),
    Row('mixsize_drop', '--mixsize-drop reference', lambda b: b.plan.dropped, 8, '-b 8 --mixsize-sizes 16 32'),
    Row('mixsize_batch_multiple', '--mixsize-batch-multiple 8', lambda b: b.data.regime.group(32)[0], 16,
        '-b 12 --mixsize-sizes 32'),
    Row('fast_loader', '--fast-loader', lambda b: type(b.data.loader).__name__, 'MixSizeLoader', '--mixsize off'),
    Row('scaled_decoding', '--scaled-decoding', lambda b: b.loader.dataset.maker.scaled_decoding, True),
    Row('mixsize_anneal', '--mixsize-anneal 1', lambda b: max(b.data.regime.at(0).probs), 1.,
        '--mixsize-sizes 16 32 --epochs 2'),
    Row('mixsize_reg', '--mixsize-reg 0.5', lambda b: b.step(transforms.ColorJitter, 16).brightness, (0.7, 1.3)),
    Row('mixsize_reg', '--mixsize-reg 0.5', lambda b: (b.loop['set_size'](48), b.layers(DropPath)[-1].drop_prob)[1],
        pytest.approx(0.25), '--drop-path 0.2'),
    Row('grad_smoothing', '--no-grad-smoothing', lambda b: b.loop['smoother'], None),
    Row('grad_smoothing_momentum', '--grad-smoothing-momentum 0.5', lambda b: b.loop['smoother'].momentum, 0.5),
    Row('calibrate', '--calibrate 5', lambda b: b.calibrated(lambda run: run.measure([32])), [5]),
    Row('calibrate_aug', '--no-calibrate-aug', lambda b: type(
        b.data.calibration_loader(32).loader.dataset.maker.transforms[32].transforms[0]), transforms.Resize),
    Row('calibrate_val', '--calibrate-val 3', lambda b: b.calibrated(lambda run: run._validate(0)), [3]),
]

HUGGING_FACE = '--dataset hfds/{hf} --data-dir {tmp}/cache --num-classes 3 '
TAGGED = HUGGING_FACE + '--task multilabel --target-key tags '


def call_of_split(b: Built, number: int) -> dict:
    return b.calls['create_dataset'][number]


DATA = [
    Row('config', '-c {tmp}/config.yaml', lambda b: max(g['weight_decay'] for g in b.groups), 0.3),
    Row('recipe', '--recipe imagenet_resnet50_fixed224', lambda b: max(g['weight_decay'] for g in b.groups), 1e-4),
    Row('data', '{folder}', lambda b: class_names(b.data.train), ['cat', 'dog'], base=TINY),
    Row('data_dir', '--data-dir {folder}', lambda b: class_names(b.data.train), ['cat', 'dog'], base=TINY),
    Row('dataset', '--dataset torch/image_folder', lambda b: type(b.data.train.dataset).__name__, 'ImageFolder'),
    Row('train_split', '--train-split other', lambda b: root_of(b.data.train), 'other'),
    Row('val_split', '--val-split other', lambda b: root_of(b.data.validation), 'other'),
    Row('val_split', "--val-split ''", lambda b: b.data.validation, None),
    Row('dataset_download', '--dataset-download', lambda b: [call['download'] for call in b.calls['create_dataset']],
        [True, True]),
    Row('class_map', '--class-map {tmp}/classes.txt', lambda b: class_names(b.data.train), ['dog', 'cat']),
    Row('input_img_mode', '--input-img-mode YCbCr', lambda b: b.data.train[0][0].mode, 'YCbCr'),
    Row('input_key', '--input-key picture', lambda b: b.data.train[0][0].size, (9, 9), HUGGING_FACE),
    Row('target_key', '--target-key kind', lambda b: b.data.train[0][1], 1, HUGGING_FACE),
    Row('target_key', '--target-key a,b,c', lambda b: b.data.train[0][1].tolist(), [0, 0, 1], TAGGED),
    Row('target_format', '--target-format multihot', lambda b: b.data.train[0][1].tolist(), [1, 1, 0],
        TAGGED + '--target-key hot'),
    Row('dataset_trust_remote_code', '--dataset-trust-remote-code',
        lambda b: [call['trust_remote_code'] for call in b.calls['create_dataset']], [True, True]),
    Row('max_bad_images', '--max-bad-images 0.5', lambda b: b.loader.max_bad_images, 0.5),
    Row('worker_timeout', '--worker-timeout 7', lambda b: b.loader.worker_timeout, 7),
]

MODEL = [
    Row('model', '--model test_efficientnet', lambda b: type(b.model).__name__, 'EfficientNet'),
    Row('pretrained', '--pretrained', lambda b: b.model.conv1[0].weight.unique().tolist(), [0.25],
        '--pretrained-cfg-overlay file={tmp}/quarter.safetensors'),
    Row('pretrained_cfg_overlay', '--pretrained-cfg-overlay mean=(0.1,0.2,0.3)', lambda b: b.data.config['mean'],
        (0.1, 0.2, 0.3)),
    Row('pretrained_path', '--pretrained-path {tmp}/quarter.safetensors',
        lambda b: b.model.conv1[0].weight.unique().tolist(), [0.25]),
    Row('initial_checkpoint', '--initial-checkpoint {tmp}/quarter.safetensors',
        lambda b: b.model.fc.weight.unique().tolist(), [0.25]),
    Row('resume', '--resume {run}', lambda b: b.training.progress.epoch, 1),
    Row('no_resume_opt', '--no-resume-opt', lambda b: len(b.training.optimizer.state), 0, '--resume {run}'),
    Row('num_classes', '--num-classes 5', lambda b: b.model.fc.out_features, 5),
    Row('gp', '--gp max', lambda b: b.model.global_pool.pool_type, 'max'),
    Row('img_size', '--img-size 64', lambda b: (b.data.base_size, max(b.plan.size)), (64, 96)),
    Row('in_chans', '--in-chans 1', lambda b: (b.model.conv1[0].in_channels, b.batch[0].shape[1]), (1, 1)),
    Row('input_size', '--input-size 1 32 48', lambda b: (b.model.conv1[0].in_channels, *b.batch[0].shape[1:]),
        (1, 1, 32, 48), OFF),
    Row('crop_pct', '--crop-pct 0.5', lambda b: b.validation.dataset.transform.transforms[0].size, 64),
    Row('mean', '--mean 0.2', lambda b: [loader.mean.unique().item() for loader in (b.prefetcher, b.validation)],
        [pytest.approx(51)] * 2),
    Row('std', '--std 0.2', lambda b: [loader.std.unique().item() for loader in (b.prefetcher, b.validation)],
        [pytest.approx(51)] * 2),
    Row('interpolation', '--interpolation lanczos',
        lambda b: b.validation.dataset.transform.transforms[0].interpolation.value, 'lanczos'),
    Row('batch_size', '-b 6', lambda b: b.loader.batch_size, 6, OFF),
    Row('batch_size', '-b 6', lambda b: set(b.plan.batch[b.plan.size == 32]), {6}),
    Row('validation_batch_size', '-vb 3', lambda b: b.validation.loader.batch_size, 3),
    Row('channels_last', '--channels-last', lambda b: [
        tensor.is_contiguous(memory_format=torch.channels_last)
        for tensor in (b.model.conv1[0].weight, b.epoch.images[0])], [True, True]),
    Row('fuser', '--fuser te', lambda b: b.calls['set_jit_fuser'], [{0: 'te'}], OFF + '--torchscript'),
    Row('grad_accum_steps', '--grad-accum-steps 2', lambda b: (len(b.plan), b.plan.num_steps), (6, 3), OFF),
    Row('grad_accum_steps', '--grad-accum-steps 2', lambda b: (len(b.plan), b.plan.num_steps), (6, 3),
        '--mixsize-sizes 32'),
    Row('grad_accum_steps', '--grad-accum-steps 2', lambda b: b.calibrated(lambda run: run.measure([32])), [4],
        '--calibrate 2'),
    Row('micro_batch_size', '--micro-batch-size 2', lambda b: [b.loop['micro_batch_size'](size) for size in (16, 32)],
        [8, 2]),
    Row('micro_batch_size', '--micro-batch-size 2', lambda b: max(map(len, b.epoch.images)), 2, OFF),
    Row('micro_batch_size', '--micro-batch-size auto --mixsize-sizes 32', lambda b: b.loop['micro_batch_size'](32), 4),
    Row('micro_batch_size', '--micro-batch-size auto',  # the first epoch of an annealed run has not all sizes
        lambda b: [b.loop['micro_batch_size'](size) for size in (16, 32)], [16, 4],
        '--mixsize-sizes 16 32 --mixsize-adapt b+ --mixsize-anneal 1 --epochs 2'),
    Row('checkpoint_interval', '--checkpoint-interval 5m', lambda b: b.training.interval.seconds, 300),
    Row('recovery_interval', '--recovery-interval 7', lambda b: b.training.interval.steps, 7),
    Row('grad_checkpointing', '--grad-checkpointing', lambda b: b.model.grad_checkpointing, True),
    Row('fast_norm', '--fast-norm', lambda b: b.model.norm._fast_norm, True,
        OFF + '--model test_vit --model-kwargs img_size=32'),
    Row('model_kwargs', '--model-kwargs stem_width=8', lambda b: b.model.conv1[0].out_channels, 8),
    Row('head_init_scale', '--head-init-scale 0', lambda b: weight_sum(b.model.get_classifier()), 0),
    Row('head_init_bias', '--head-init-bias -4.5', lambda b: b.model.fc.bias.tolist(), [-4.5, -4.5]),
    Row('torchcompile_mode', '--torchcompile-mode reduce-overhead', lambda b: b.calls['compile'][0]['mode'],
        'reduce-overhead', '--torchcompile eager'),
    Row('torchscript', '--torchscript', lambda b: isinstance(b.task.trainable_module, torch.jit.ScriptModule), True,
        OFF),
    Row('torchcompile', '--torchcompile eager', lambda b: [
        type(b.task.trainable_module).__name__, *map(b.calls['compile'][0].get, ('backend', 'dynamic'))],
        ['OptimizedModule', 'eager', False]),
    Row('torchcompile', '--torchcompile', lambda b: b.calls['compile'][0]['backend'], 'inductor'),
]

DEVICE = [
    Row('mixed_precision', '--mixed-precision bf16', lambda b: b.accelerator.mixed_precision, 'bf16'),
    Row('device', '--device cpu', lambda b: b.calls['Accelerator'][0]['cpu'], True),
    Row('amp', '--amp --amp-dtype bfloat16', lambda b: b.accelerator.mixed_precision, 'bf16'),
    Row('amp_dtype', '--amp-dtype bfloat16', lambda b: b.accelerator.mixed_precision, 'bf16', '--amp'),
    Row('model_dtype', '--model-dtype bfloat16', lambda b: {
        b.model.fc.weight.dtype, b.prefetcher.img_dtype, b.validation.img_dtype, b.epoch.images[0].dtype},
        {torch.bfloat16}),
    Row('model_dtype', '--model-dtype bfloat16', lambda b: b.epoch.images[0].dtype, torch.bfloat16,
        '--no-prefetcher'),
    Row('no_ddp_bb', '--no-ddp-bb', lambda b: b.accelerator.ddp_handler.broadcast_buffers, False),
    Row('synchronize_step', '--synchronize-step', lambda b: b.loop['synchronize_step'], True),
    Row('device_modules', '--device-modules module_of_a_device',
        lambda b: sys.modules.pop('module_of_a_device', None) is not None, True),
]

OPTIMIZER = [
    Row('opt', '--opt adamw', lambda b: type(b.training.optimizer.optimizer).__name__, 'AdamW'),
    Row('opt_eps', '--opt-eps 0.01', lambda b: b.groups[0]['eps'], 0.01, '--opt adamw'),
    Row('opt_betas', '--opt-betas 0.8 0.7', lambda b: list(b.groups[0]['betas']), [0.8, 0.7], '--opt adamw'),
    Row('momentum', '--momentum 0.7', lambda b: b.groups[0]['momentum'], 0.7),
    Row('weight_decay', '--weight-decay 0.3', lambda b: max(g['weight_decay'] for g in b.groups), 0.3),
    Row('clip_grad', '--clip-grad 0.5', lambda b: set(b.epoch.clips), {(0.5, 'norm')}),
    Row('clip_mode', '--clip-mode agc', lambda b: set(b.epoch.clips), {(0.5, 'agc')}, '--clip-grad 0.5'),
    Row('layer_decay', '--layer-decay 0.5', lambda b: sorted({g['lr_scale'] for g in b.groups})[-3:], [0.25, 0.5, 1]),
    Row('layer_decay_min_scale', '--layer-decay-min-scale 0.4', lambda b: min(g['lr_scale'] for g in b.groups), 0.4,
        '--layer-decay 0.5'),
    Row('layer_decay_no_opt_scale', '--layer-decay-no-opt-scale 0.3',
        lambda b: any(not p.requires_grad for p in b.model.parameters()), True, '--layer-decay 0.5'),
    Row('opt_kwargs', '--opt-kwargs nesterov=False', lambda b: b.groups[0]['nesterov'], False),
]


def first_rate(b: Built) -> Any:
    return pytest.approx(b.groups[0]['initial_lr'])


SCHEDULE = [
    Row('sched', '--sched step', lambda b: type(b.scheduler).__name__, 'StepLRScheduler'),
    Row('sched', '--sched none', lambda b: b.scheduler, None),
    Row('sched_on_updates', '--sched-on-updates', lambda b: (b.scheduler.t_in_epochs, b.scheduler.warmup_t),
        (False, 30), OFF),
    Row('lr', '--lr 0.3', first_rate, 0.3),
    Row('lr_base', '--lr-base 0.2', first_rate, 0.2 * 4 / 256),
    Row('lr_base_size', '--lr-base-size 16', first_rate, 0.1 * 4 / 16),
    Row('lr_base_scale', '--lr-base-scale sqrt', first_rate, 0.1 * (4 / 256)**0.5),
    Row('lr_base_scale', '--lr-base-scale linear', first_rate, 0.1 * 4 / 256, '--opt lamb'),
    Row('lr_noise', '--lr-noise 0.2 0.8', lambda b: b.scheduler.noise_range_t, [2, 8]),
    Row('lr_noise_pct', '--lr-noise-pct 0.3', lambda b: b.scheduler.noise_pct, 0.3, '--lr-noise 0.2'),
    Row('lr_noise_std', '--lr-noise-std 0.3', lambda b: b.scheduler.noise_std, 0.3, '--lr-noise 0.2'),
    Row('lr_cycle_mul', '--lr-cycle-mul 2', lambda b: b.training.num_epochs, 30, '--lr-cycle-limit 2'),
    Row('lr_cycle_decay', '--lr-cycle-decay 0.3', lambda b: b.scheduler.cycle_decay, 0.3, '--lr-cycle-limit 2'),
    Row('lr_cycle_limit', '--lr-cycle-limit 3', lambda b: (b.scheduler.cycle_limit, b.training.num_epochs), (3, 30)),
    Row('lr_k_decay', '--lr-k-decay 0.5', lambda b: b.scheduler.k_decay, 0.5),
    Row('lr_decay_fn', '--lr-decay-fn cosine', lambda b: b.scheduler.decay_fn, 'cosine', '--sched wsd'),
    Row('lr_stable_timescale', '--lr-stable-timescale 3', lambda b: b.scheduler.stable_timescale, 3, '--sched rsqrt'),
    Row('warmup_lr', '--warmup-lr 0.001', lambda b: b.groups[0]['lr'], 0.001),
    Row('min_lr', '--min-lr 0.001', lambda b: b.scheduler.lr_min, 0.001),
    Row('epochs', '--epochs 7', lambda b: (b.training.num_epochs, b.training.stop_epoch, b.scheduler.t_initial),
        (7, 7, 7)),
    Row('stop_epoch', '--stop-epoch 4', lambda b: (b.training.stop_epoch, b.training.num_epochs), (4, 10)),
    Row('start_epoch', '--start-epoch 5', lambda b: (b.training.progress.epoch, b.groups[0]['lr']), (5, 0.25),
        '--warmup-epochs 0 --lr 0.5'),
    Row('decay_milestones', '--decay-milestones 3 6', lambda b: b.scheduler.decay_t, [3, 6], '--sched multistep'),
    Row('decay_epochs', '--decay-epochs 4', lambda b: b.scheduler.decay_t, 4, '--sched step'),
    Row('warmup_epochs', '--warmup-epochs 2', lambda b: b.scheduler.warmup_t, 2),
    Row('warmup_prefix', '--warmup-prefix', lambda b: (b.scheduler.warmup_prefix, b.training.num_epochs), (True, 15)),
    Row('cooldown_epochs', '--cooldown-epochs 2', lambda b: b.training.num_epochs, 12),
    Row('patience_epochs', '--patience-epochs 2', lambda b: b.scheduler.lr_scheduler.patience, 2, '--sched plateau'),
    Row('decay_rate', '--decay-rate 0.3', lambda b: b.scheduler.decay_rate, 0.3, '--sched step'),
]

NAFLEX_MODEL = ('--model naflexvit_base_patch16_gap --model-kwargs embed_dim=48 depth=1 num_heads=2 --img-size 64 '
                '--mixsize off ')
NAFLEX = NAFLEX_MODEL + '--naflex-loader --naflex-train-seq-lens 4 16 -b 8 '
AUGMENTATION = [
    Row('no_aug', '--no-aug', lambda b: type(b.transform()[0]).__name__, 'Resize'),
    Row('train_crop_mode', '--train-crop-mode rkrc', lambda b: type(b.transform()[0]).__name__, 'ResizeKeepRatio'),
    Row('scale', '--scale 0.5 0.9', lambda b: b.transform()[0].scale, (0.5, 0.9)),
    Row('ratio', '--ratio 0.8 1.25', lambda b: b.transform()[0].ratio, (0.8, 1.25)),
    Row('train_pad', '--train-pad 4', lambda b: b.transform()[0].padding, 4),
    Row('hflip', '--hflip 0.25', lambda b: b.step(transforms.RandomHorizontalFlip).p, 0.25),
    Row('vflip', '--vflip 0.25', lambda b: b.step(transforms.RandomVerticalFlip).p, 0.25),
    Row('color_jitter', '--color-jitter 0.25', lambda b: b.step(transforms.ColorJitter).contrast, (0.75, 1.25)),
    Row('color_jitter_prob', '--color-jitter-prob 0.25', lambda b: b.step(transforms.RandomApply).p, 0.25),
    Row('grayscale_prob', '--grayscale-prob 0.25', lambda b: b.step(transforms.RandomGrayscale).p, 0.25),
    Row('gaussian_blur_prob', '--gaussian-blur-prob 0.25', lambda b: b.step(transforms.RandomApply).p, 0.25),
    Row('aa', '--aa rand-m5', lambda b: b.step(timm.data.auto_augment.RandAugment).ops[0].magnitude, 5),
    Row('aug_repeats', '--aug-repeats 3', lambda b: set(b.plan.duplicates[b.plan.size == 32]), {3}),
    Row('aug_splits', '--aug-splits 3', lambda b: b.batch[0].shape[0], 12, OFF),
    Row('reprob', '--reprob 0.25', lambda b: b.prefetcher.random_erasing.erasing.probability, 0.25),
    Row('reprob', '--reprob 0.25', lambda b: b.transform()[-1].probability, 0.25, '--no-prefetcher'),
    Row('remode', '--remode rand', lambda b: b.prefetcher.random_erasing.erasing.mode, 'rand', '--reprob 0.25'),
    Row('recount', '--recount 3', lambda b: b.prefetcher.random_erasing.erasing.max_count, 3, '--reprob 0.25'),
    Row('resplit', '--resplit', lambda b: b.prefetcher.random_erasing.erasing.num_splits, 2, '--reprob 0.25'),
    Row('mixup', '--mixup 0.3', lambda b: b.collate.mixup_alpha, 0.3),
    Row('mixup', '--mixup 0.3', lambda b: b.loop['mixup_fn'].mixup_alpha, 0.3, '--no-prefetcher'),
    Row('mixup', '--mixup 0.3', lambda b: b.data.loader.dataset.mixup_fn.mixup_alpha, 0.3, NAFLEX),
    Row('cutmix', '--cutmix 0.3', lambda b: b.collate.cutmix_alpha, 0.3),
    Row('cutmix_minmax', '--cutmix-minmax 0.2 0.8', lambda b: b.collate.cutmix_minmax, [0.2, 0.8]),
    Row('mixup_prob', '--mixup-prob 0.25', lambda b: b.collate.mix_prob, 0.25, '--mixup 0.3'),
    Row('mixup_switch_prob', '--mixup-switch-prob 0.25', lambda b: b.collate.switch_prob, 0.25,
        '--mixup 0.3 --cutmix 1'),
    Row('mixup_mode', '--mixup-mode elem', lambda b: b.collate.mode, 'elem', '--mixup 0.3'),
    Row('smoothing', '--smoothing 0.3', lambda b: b.criterion.smoothing, 0.3),
    Row('smoothing', '--smoothing 0.3', lambda b: b.collate.label_smoothing, 0.3, '--mixup 0.3'),
    Row('train_interpolation', '--train-interpolation bilinear', lambda b: b.transform()[0].interpolation.value,
        'bilinear'),
    Row('drop', '--drop 0.25', lambda b: b.model.drop_rate, 0.25),
    Row('drop_connect', '--drop-connect 0.25', lambda b: b.layers(DropPath)[-1].drop_prob, 0.25),
    Row('drop_path', '--drop-path 0.25', lambda b: b.layers(DropPath)[-1].drop_prob, 0.25),
    Row('drop_block', '--drop-block 0.25', lambda b: b.layers(DropBlock2d)[-1].drop_prob, 0.25),
]

BCE = '--loss bce '
COUNTED = BCE + '--loss-pos-weight neg_pos '  # three of twelve images in class 0, nine in class 1
LOSS = [
    Row('task', '--task multilabel', lambda b: type(b.task).__name__, 'MultiLabelClassificationTask',
        HUGGING_FACE + '--target-key tags'),
    Row('multilabel_threshold', '--multilabel-threshold 0.3', lambda b: b.task.create_evaluator().threshold, 0.3,
        TAGGED),
    Row('loss', '--loss bce', lambda b: type(b.criterion).__name__, 'BinaryCrossEntropy'),
    Row('jsd_loss', '--jsd-loss', lambda b: b.criterion.num_splits, 3, OFF + '--aug-splits 3'),
    Row('bce_loss', '--bce-loss', lambda b: type(b.criterion).__name__, 'BinaryCrossEntropy'),
    Row('bce_sum', '--bce-sum', lambda b: b.criterion.sum_classes, True, BCE),
    Row('bce_target_thresh', '--bce-target-thresh 0.3', lambda b: b.criterion.target_threshold, 0.3, BCE),
    Row('bce_pos_weight', '--bce-pos-weight 3', lambda b: b.criterion.pos_weight.tolist(), 3, BCE),
    Row('loss_pos_weight', '--loss-pos-weight 1,3', lambda b: b.criterion.pos_weight.tolist(), [1, 3], BCE),
    Row('loss_class_weight', '--loss-class-weight 1,3', lambda b: b.criterion.weight.tolist(), [1, 3], BCE),
    Row('loss_weight_power', '--loss-weight-power 2', lambda b: b.criterion.pos_weight.tolist(),
        pytest.approx([9, 1 / 9]), COUNTED + '--class-stats {tmp}/stats.json'),
    Row('class_stats', '--class-stats {tmp}/stats.json', lambda b: b.criterion.pos_weight.tolist(),
        pytest.approx([3, 1 / 3]), COUNTED),
    Row('poly_epsilon', '--poly-epsilon 3', lambda b: b.criterion.epsilon, 3, '--loss poly'),
    Row('poly_gamma', '--poly-gamma 3', lambda b: b.criterion.gamma, 3, TAGGED + '--loss poly'),
]

TEACHER = '--kd-model-name local-dir:{tmp}/teacher '
FEATURES = TEACHER + '--kd-distill-type feature '
TOKEN = (OFF + TEACHER + '--kd-distill-type token --model deit_tiny_distilled_patch16_224 '
         '--model-kwargs img_size=32 embed_dim=48 depth=1 num_heads=2 ')
DISTILLATION = [
    Row('kd_model_name', TEACHER, lambda b: b.task.teacher.model.fc.weight.unique().tolist(), [0.25]),
    Row('kd_distill_type', '--kd-distill-type feature', lambda b: type(b.task).__name__, 'FeatureDistillationTask',
        TEACHER),
    Row('distill_loss_weight', '--distill-loss-weight 3', lambda b: b.task.distill_loss_weight, 3, TEACHER),
    Row('distill_loss_weight', '--distill-loss-weight 3', lambda b: b.task.distill_loss_weight, 3, FEATURES),
    Row('distill_loss_weight', '--distill-loss-weight 3', lambda b: b.task.distill_loss_weight, 3, TOKEN),
    Row('task_loss_weight', '--task-loss-weight 0.25', lambda b: (b.task.task_loss_weight, b.task.distill_loss_weight),
        (0.25, 0.75), TEACHER),
    Row('kd_temperature', '--kd-temperature 3', lambda b: b.task.temperature, 3, TEACHER),
    Row('kd_temperature', '--kd-temperature 3', lambda b: b.task.temperature, 3, TOKEN),
    Row('kd_student_feature_dim', '--kd-student-feature-dim 7',
        lambda b: b.task.trainable_module.projection.in_features, 7, FEATURES),
    Row('kd_teacher_feature_dim', '--kd-teacher-feature-dim 7',
        lambda b: b.task.trainable_module.projection.out_features, 7, FEATURES),
    Row('kd_token_distill_type', '--kd-token-distill-type hard', lambda b: b.task.distill_type, 'hard', TOKEN),
]

EFFICIENT = '--model test_efficientnet '  # those of ResNets cannot be set
BATCH_NORM = [
    Row('bn_momentum', '--bn-momentum 0.3', lambda b: {layer.momentum for layer in batch_norms(b)}, {0.3},
        EFFICIENT),
    Row('bn_eps', '--bn-eps 0.3', lambda b: {layer.eps for layer in batch_norms(b)}, {0.3}, EFFICIENT),
    Row('split_bn', '--split-bn', lambda b: {layer.num_splits for layer in b.layers(SplitBatchNorm2d)}, {3},
        OFF + '--aug-splits 3'),
    Row('split_bn', '--split-bn', lambda b: {layer.num_splits for layer in b.layers(SplitBatchNorm2d)}, {2},
        OFF + '--resplit'),
]

EMA = '--model-ema '
MOVING_AVERAGE = [
    Row('model_ema', EMA, lambda b: type(b.training.ema).__name__, 'ResNet'),
    Row('model_ema_force_cpu', '--model-ema-force-cpu', lambda b: b.task.trainable_module_ema.device,
        torch.device('cpu'), EMA),
    Row('model_ema_decay', '--model-ema-decay 0.3', lambda b: b.task.trainable_module_ema.decay, 0.3, EMA),
    Row('model_ema_warmup', '--model-ema-warmup', lambda b: b.task.trainable_module_ema.use_warmup, True, EMA),
]

RUN = [
    Row('seed', '--seed 7', lambda b: [
        torch.initial_seed(), b.scheduler.noise_seed, b.loader.dataset.maker.seed, call_of_split(b, 0)['seed'],
        b.loader.batch_sampler._arguments['seed']], [7] * 5),
    Row('seed', '--seed 7', lambda b: b.loader.batch_sampler.seed, 7, '--train-img-sizes 24 32'),
    Row('workers', '-j 2', lambda b: (b.loader.num_workers, b.validation.loader.num_workers), (2, 2)),
    Row('worker_seeding', '--worker-seeding part', lambda b: b.loader.worker_init_fn.worker_init_fn.keywords,
        {'worker_seeding': 'part'}, OFF),
    Row('pin_mem', '--pin-mem', lambda b: (b.loader.pin_memory, b.validation.loader.pin_memory), (True, True)),
    Row('no_prefetcher', '--no-prefetcher', lambda b: (type(b.prefetcher).__name__, type(b.validation).__name__),
        ('WatchedLoader', 'DataLoader')),
    Row('use_multi_epochs_loader', '--use-multi-epochs-loader', lambda b: type(b.loader).__name__,
        'MultiEpochsDataLoader', OFF),
    Row('output', '--output {tmp}/elsewhere', lambda b: Path(b.training.folder).parent.name, 'elsewhere'),
    Row('experiment', '--experiment mine', lambda b: Path(b.training.folder).name, 'mine'),
    Row('eval_metric', '--eval-metric loss', lambda b: b.scheduler.lr_scheduler.mode, 'min', '--sched plateau'),
]

WANDB = '--log-wandb '
TRACKERS = [
    Row('log_wandb', WANDB, lambda b: b.trackers['names'], ['wandb']),
    Row('wandb_project', '--wandb-project mine', lambda b: b.trackers['project'], 'mine', WANDB),
    Row('wandb_tags', '--wandb-tags a b', lambda b: b.trackers['tags'], ['a', 'b'], WANDB),
    Row('wandb_resume_id', '--wandb-resume-id x1', lambda b: (b.trackers['id'], b.trackers['resume']), ('x1', 'must'),
        WANDB + '--resume {run}'),
    Row('log_tensorboard', '--log-tensorboard', lambda b: b.trackers['names'], ['tensorboard']),
]

SIZES = '--train-img-sizes 24 32 '
BATCHES = SIZES + '--train-batch-sizes 8 4 '
PROGRESSIVE = SIZES + '--train-size-schedule progressive '
SCHEDULED_SIZES = [
    Row('train_img_sizes', SIZES, lambda b: {images.shape[-1] for images, _ in b.data.loader}, {24, 32}),
    Row('train_batch_sizes', '--train-batch-sizes 8 4', lambda b: b.loader.batch_sampler.batch_sizes, (8, 4), SIZES),
    Row('train_size_probs', '--train-size-probs 1 3', lambda b: b.loader.batch_sampler.choice_weights.tolist(),
        [0.25, 0.75], SIZES),
    Row('train_size_schedule', '--train-size-schedule progressive', lambda b: (
        b.loader.batch_sampler.choice_schedule, b.loader.batch_sampler.schedule_epochs), ('progressive', 10), SIZES),
    Row('train_size_schedule_spread', '--train-size-schedule-spread 0.3',
        lambda b: b.loader.batch_sampler.schedule_spread, 0.3, PROGRESSIVE),
    Row('train_size_random_mix', '--train-size-random-mix 0.3',
        lambda b: b.loader.batch_sampler.schedule_random_mix, 0.3, PROGRESSIVE),
    Row('train_batches_per_epoch', '--train-batches-per-epoch 9', lambda b: (len(b.data.loader), b.data.num_steps),
        (9, 9), SIZES),
    Row('variable_batch_loss_scale', '--variable-batch-loss-scale linear',
        lambda b: sorted({round(factor, 3) for factor in b.epoch.factors}), [0.667, 1.333], BATCHES),
    Row('variable_batch_loss_scale', '--variable-batch-loss-scale sqrt',
        lambda b: sorted({round(factor, 3) for factor in b.epoch.factors}), [0.816, 1.155], BATCHES),
]

PATCHES = '--naflex-patch-sizes 8 16 '
NAFLEX_LOADER = [
    Row('naflex_loader', '--naflex-loader', lambda b: [type(loader).__name__ for loader in (
        b.data.loader, b.validation)], ['NaFlexPrefetchLoader'] * 2, NAFLEX_MODEL),
    Row('naflex_train_seq_lens', '--naflex-train-seq-lens 4 9', lambda b: {
        images['patches'].shape[1] for images, _ in b.data.loader}, {4, 9}, NAFLEX),
    Row('naflex_max_seq_len', '--naflex-max-seq-len 9', lambda b: next(iter(b.validation))[0]['patches'].shape[1], 9,
        NAFLEX),
    Row('naflex_patch_sizes', PATCHES, lambda b: b.data.loader.dataset.patch_sizes, [(8, 8), (16, 16)], NAFLEX),
    Row('naflex_patch_size_probs', '--naflex-patch-size-probs 1 3', lambda b: b.data.loader.dataset.patch_size_probs,
        [0.25, 0.75], NAFLEX + PATCHES),
    Row('naflex_loss_scale', '--naflex-loss-scale none', lambda b: {round(x, 3) for x in b.epoch.factors}, {1},
        NAFLEX),
    Row('naflex_loss_scale', '--naflex-loss-scale sqrt', lambda b: max(round(x, 3) for x in b.epoch.factors), 1.732,
        NAFLEX),
    Row('naflex_patchify_channels_first', '--naflex-patchify-channels-first', lambda b: [
        loader.patchify_channels_last for loader in (b.data.loader, b.validation)], [False, False], NAFLEX),
]

LANDS = [*MIXSIZE, *DATA, *MODEL, *DEVICE, *OPTIMIZER, *SCHEDULE, *AUGMENTATION, *LOSS, *DISTILLATION, *BATCH_NORM,
         *MOVING_AVERAGE, *RUN, *TRACKERS, *SCHEDULED_SIZES, *NAFLEX_LOADER]

# Options that a test of their own follows, here
FOLLOWED = {
    'kd_loss_type': 'test_the_loss_of_distillation_reaches_the_task',
    'no_tf32': 'test_there_is_no_tf32_on_a_device_without_it_and_deterministic_algorithms_are_switched_on',
    'deterministic': 'test_there_is_no_tf32_on_a_device_without_it_and_deterministic_algorithms_are_switched_on',
    'local_rank': 'test_the_local_rank_is_in_the_environment_before_accelerate_looks',
    **dict.fromkeys(('epoch_repeats', 'train_num_samples', 'val_num_samples'),
                    'test_streamed_data_are_counted_and_repeated_as_told_and_others_refuse'),
    'mixup_off_epoch': 'test_mixing_stops_at_its_epoch_where_workers_persist',
    'sync_bn': 'test_batch_statistics_are_of_all_processes_on_gpus_and_refused_on_cpus',
    'dist_bn': 'test_running_statistics_of_processes_become_one',
    'unsafe_pickle': 'test_pickled_weights_are_taken_where_their_risk_is_named',
    'tta': 'test_an_image_is_validated_together_with_its_mirror_image',
    'max_nonfinite': 'test_the_loop_hears_of_losses_that_are_not_finite_and_of_the_seed_of_mixup',
    **dict.fromkeys(('log_interval', 'val_interval', 'save_epochs', 'checkpoint_hist', 'save_images'),
                    'test_a_run_shows_validates_and_keeps_what_it_is_told_to'),
}


@pytest.fixture(scope='module')
def fill(tmp_path_factory):
    """Put the names of files made here into a command line, and split it."""
    tmp = tmp_path_factory.mktemp('arguments')
    places = dict(tmp=tmp, folder=tmp / 'images', hf=tmp / 'hf', run=tmp / 'runs' / 'first')
    for split, count in (('train', 12), ('validation', 4), ('other', 4)):
        for number, name in enumerate(('cat', 'dog')):
            write_images(places['folder'] / split / name, count, seed=number)
    write_hugging_face(places['hf'])
    quarter = timm.create_model('test_resnet', num_classes=2)
    for parameter in quarter.parameters():
        nn.init.constant_(parameter, 0.25)
    save_file(quarter.state_dict(), tmp / 'quarter.safetensors')
    timm.models.save_for_hf(quarter, tmp / 'teacher', safe_serialization=True)
    (tmp / 'config.yaml').write_text('weight_decay: 0.3\n')
    (tmp / 'classes.txt').write_text('dog\ncat\n')
    (tmp / 'stats.json').write_text(json.dumps({'pos_counts': [3, 9], 'num_samples': 12}))
    (tmp / 'module_of_a_device.py').touch()

    def filled(argv):
        return shlex.split(argv.format(**places))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other tests have the cores
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '2')  # so that no run raises them
        patch.syspath_prepend(str(tmp))
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train.main(filled(BASE + OFF + '--experiment first --stop-epoch 1')) == 0
        yield filled
    torch.set_num_threads(threads)
    set_fast_norm(False)


def write_hugging_face(folder):
    """A data set with two columns of images and six of labels."""
    tags = datasets.ClassLabel(names=['a', 'b', 'c'])
    features = datasets.Features(
        image=datasets.Image(), picture=datasets.Image(), label=tags, kind=tags, tags=datasets.Sequence(tags),
        hot=datasets.Sequence(datasets.Value('float32')), **{name: datasets.Value('int64') for name in 'abc'})
    row = dict(image=Image.new('RGB', (8, 8)), picture=Image.new('RGB', (9, 9)), label=0, kind=1, tags=[0, 2],
               hot=[1, 1, 0], a=0, b=0, c=1)
    folder.mkdir()
    for split, count in (('train', 12), ('validation', 4)):
        rows = {name: [value] * count for name, value in row.items()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f'{split}.parquet')


@pytest.fixture(scope='module')
def without(fill):
    """What each row finds without its option; rows that share a command line share the run."""
    found = {}

    def looks(command):
        try:
            built = Built(fill(command))
        except UsageError:
            return defaultdict(lambda: UsageError)
        return {id(row): attempt(row.look, built) for row in LANDS if row.base + row.beside == command}

    def get(row):
        command = row.base + row.beside
        if command not in found:
            found[command] = looks(command)
        return found[command][id(row)]

    return get


def attempt(look, built):
    try:
        return look(built)
    except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:  # nothing there
        return error


@pytest.mark.parametrize('row', LANDS, ids=lambda row: f'{row.option} {row.beside}'.strip())
def test_an_option_reaches_what_it_is_for(row, fill, without):
    assert row.look(Built(fill(f'{row.base} {row.beside} {row.option}'))) == row.found
    assert without(row) != row.found, 'it would be found without the option too'


def test_every_option_is_followed():
    options = {action.dest for action in build_parser()._actions} - {'help'}
    assert {row.dest for row in LANDS} | FOLLOWED.keys() == options
    assert set(FOLLOWED.values()) <= globals().keys()
    for row in LANDS:
        assert any(string in row.option.split() for string in strings_of(row.dest)) or row.dest == 'data', row


def strings_of(dest):
    return next(action.option_strings for action in build_parser()._actions if action.dest == dest)


# Options with a test of their own

def test_the_loss_of_distillation_reaches_the_task(fill):
    args = parse_args(fill(BASE + TEACHER + '--kd-loss-type kl'))  # the only one there is
    args.kd_loss_type = 'another'
    with pytest.raises(UsageError, match="Unsupported loss_type 'another'"):
        train.Training(args)


def test_pickled_weights_are_taken_where_their_risk_is_named(fill, tmp_path):
    model = timm.create_model('test_resnet', num_classes=2)
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=False)
    options = f' --model local-dir:{tmp_path / "hub"} --pretrained'
    with pytest.raises(UsageError, match='pickled weights only'):
        Built(fill(BASE + options))
    built = train.Training(parse_args(fill(BASE + options + ' --unsafe-pickle')))
    assert torch.equal(built.model.fc.weight, model.fc.weight)


def test_the_local_rank_is_in_the_environment_before_accelerate_looks(fill, monkeypatch):
    ranks = []

    def accelerator(**kwargs):
        ranks.append(os.environ.get('LOCAL_RANK'))
        raise ValueError('seen')

    monkeypatch.setenv('LOCAL_RANK', '0')  # so that it is put back
    monkeypatch.setattr(build, 'Accelerator', accelerator)
    for rank, environment in (('0', None), ('1', None), ('1', '1')):
        monkeypatch.delenv('LOCAL_RANK')
        if environment:
            monkeypatch.setenv('LOCAL_RANK', environment)
        with pytest.raises(UsageError, match='seen'):
            build.create_accelerator(parse_args(fill(f'{BASE} --local_rank {rank}')))
        monkeypatch.setenv('LOCAL_RANK', '0')
    assert ranks == [None, '1', '1']


def test_another_device_is_accelerates(fill, monkeypatch):
    monkeypatch.setenv('ACCELERATE_TORCH_DEVICE', 'cpu')  # so that it is put back
    assert build.create_accelerator(parse_args(fill(BASE + '--device meta'))).device.type == 'meta'
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv('ACCELERATE_TORCH_DEVICE', 'meta')
    with pytest.raises(UsageError, match='--device cpu: Accelerate is configured for meta'):
        build.create_accelerator(parse_args(fill(BASE + '--device cpu')))


def test_there_is_no_tf32_on_a_device_without_it_and_deterministic_algorithms_are_switched_on(fill, monkeypatch):
    """On a GPU: test_launch.py."""
    with pytest.raises(UsageError, match='there is no TF32 on this cpu'):
        build.create_accelerator(parse_args(fill(BASE + '--no-tf32')))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # so that it is put back
    try:
        build.create_accelerator(parse_args(fill(BASE + '--deterministic')))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_streamed_data_are_counted_and_repeated_as_told_and_others_refuse(fill, monkeypatch):
    class Streaming(IterableImageDataset):
        def __init__(self):
            super().__init__('', reader=[])

        def __len__(self):
            return 24

        def set_loader_cfg(self, num_workers=None):
            pass

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(timm.data, 'create_dataset', lambda *args, **kwargs: calls.append(kwargs) or Streaming())
        Built(fill(BASE + OFF + '--dataset hfids/x --epoch-repeats 3 --train-num-samples 5 --val-num-samples 7'))
    assert [call.get('repeats') for call in calls] == [3, None]
    assert [call['num_samples'] for call in calls] == [5, 7]
    for option in ('--epoch-repeats', '--train-num-samples', '--val-num-samples'):
        with pytest.raises(UsageError, match=f'{option} is for data that streams'):
            Built(fill(f'{BASE} {option} 3'))


def test_repeated_augmentation_of_timm_is_over_processes(fill, monkeypatch):
    with pytest.raises(UsageError, match='repeats over processes, and this is a single one'):
        Built(fill(BASE + OFF + '--aug-repeats 3'))
    built, handed, original = Built(fill(BASE + OFF)), {}, loaders.create_loader
    built.args.aug_repeats = 3
    monkeypatch.setattr(loaders, 'create_loader', lambda *args, num_aug_repeats, **kwargs: (
        handed.update(repeats=num_aug_repeats), original(*args, **kwargs))[1])
    built.data._train_loader()
    assert handed == {'repeats': 3}


def mixed_epochs(built):
    """The first two epochs in which a batch is mixed."""
    mixed = set()
    for epoch in (0, 1):
        built.data.start_epoch(epoch)
        for images, targets in built.data.loader:
            if built.data.mixup_fn is not None:
                images, targets = built.data.mixup_fn(images, targets)
            if (targets.max(1).values < 0.999).any():
                mixed.add(epoch)
    return mixed


@pytest.mark.parametrize('options', [
    '', '--no-prefetcher', OFF, OFF + '--no-prefetcher', '--train-img-sizes 24 32'])
def test_mixing_stops_at_its_epoch_where_workers_persist(fill, options):
    mixing = BASE + '-j 1 --mixup 1 --smoothing 0 '
    assert mixed_epochs(Built(fill(mixing + '--mixup-off-epoch 1 ' + options))) == {0}


@contextmanager
def two_processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, 'num_processes', 2)
        yield


def test_batch_statistics_are_of_all_processes_on_gpus_and_refused_on_cpus(fill, monkeypatch):
    converted = []
    monkeypatch.setattr(build, 'convert_sync_batchnorm', lambda model: converted.append(model) or model)
    built = Built(fill(BASE + '--sync-bn --device cpu'))
    assert not converted  # one process has nothing to synchronise
    with two_processes(), pytest.raises(UsageError, match='--sync-bn needs GPUs'):
        build._set_backend(built.args, built.accelerator)
    monkeypatch.setattr(train, 'create_task', two_processes()(train.create_task))
    built = Built(fill(BASE + '--sync-bn'))
    assert converted == [built.model]


@pytest.mark.parametrize('options, expected', [
    ('', [True]), ('--dist-bn broadcast', [False]), ("--dist-bn ''", []), ('--model-ema', [True, True])])
def test_running_statistics_of_processes_become_one(fill, monkeypatch, options, expected):
    built, reduced = Built(fill(f'{BASE} {options}')), []
    monkeypatch.setattr(train, 'distribute_bn', lambda model, processes, reduce: reduced.append(reduce))
    with two_processes():
        assert built.loop and reduced == expected


def test_a_step_waits_for_the_device(fill, monkeypatch):
    class Device(str):  # to torch it is the name of a device, and there is none of its type
        type = 'imaginary'

    waits = []
    monkeypatch.setattr(torch, 'imaginary', SimpleNamespace(synchronize=lambda: waits.append(1)), raising=False)
    for option, expected in (('', 0), ('--synchronize-step', 6)):
        built = Built(fill(f'{BASE} {OFF} {option}'))
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, 'device', Device(built.accelerator.device))
            assert built.epoch.losses and len(waits) == expected


@pytest.mark.parametrize('tta, views', [(0, 1), (1, 1), (2, 2)])
def test_an_image_is_validated_together_with_its_mirror_image(fill, tta, views):
    built, seen = Built(fill(f'{BASE} --tta {tta} -vb 8')), []
    built.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    built.training._evaluate([built.model], 32)
    assert len(seen) == views and torch.equal(seen[-1], seen[0].flip(-1)) == (views == 2)


@pytest.mark.parametrize('metric, best', [('top1', 0), ('top5', 1), ('loss', 2)])
def test_best_is_chosen_by_the_metric(fill, tmp_path, monkeypatch, metric, best):
    epochs = iter([dict(loss=3., top1=9., top5=10.), dict(loss=2., top1=7., top5=11.), dict(loss=1., top1=8., top5=9.)])
    built = Built(fill(f'{BASE} --calibrate-val 0 --stop-epoch 3 --output {tmp_path} --eval-metric {metric}'))
    monkeypatch.setattr(train, 'train_one_epoch', lambda *args, **kwargs: {'loss': 0.})
    monkeypatch.setattr(train, 'validate', lambda *args: [next(epochs)])
    monkeypatch.setattr(built.training, '_report_sizes', lambda: None)
    built.training.run()
    assert built.training.history.entries[0][0] == best


def test_the_loop_hears_of_losses_that_are_not_finite_and_of_the_seed_of_mixup(fill):
    built = Built(fill(f'{BASE} --max-nonfinite 4 --seed 7'))
    assert built.loop['max_nonfinite'] == 4 and built.loop['mixup_seed'] == 7
    assert Built(fill(f'{BASE} {OFF}')).loop['mixup_seed'] is None  # timm's own stream


def test_a_run_shows_validates_and_keeps_what_it_is_told_to(fill, tmp_path, caplog, monkeypatch):
    saved = []
    monkeypatch.setattr(CheckpointSaver, 'save_recovery', lambda _, snapshot: saved.append(snapshot.position))
    with caplog.at_level('INFO'):
        Built(fill(f'{BASE} {OFF} --output {tmp_path} --experiment run --stop-epoch 4 --log-interval 4 --val-interval '
                   '2 --save-epochs 1 --checkpoint-hist 1 --recovery-interval 5 --save-images')).training.run()
    folder = tmp_path / 'run'
    summary = (folder / 'summary.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in summary[1:]] == ['0', '1', '3']
    assert caplog.text.count('Train 2 [') == 3 and 'Train 2 [   5/6]' in caplog.text
    assert {path.name for path in folder.glob('*.jpg')} == {f'train-batch-{number}.jpg' for number in (0, 4, 5)}
    assert len(list(folder.glob('checkpoint-*'))) == 1
    assert [path.name for path in folder.glob('milestone-*')] == ['milestone-1']
    assert saved == [(0, 5), (1, 4), (2, 3), (3, 2)]  # every fifth step


# What is refused, and what one option makes of another

def refusal(argv):
    with pytest.raises(UsageError) as error:
        parse_args(argv)
    assert '\n' not in str(error.value)
    return str(error.value)


def stated(dest):
    """An option on the command line with a value that is not its default."""
    action = next(action for action in build_parser()._actions if action.dest == dest)
    if action.nargs == 0:
        return action.option_strings[-1:]
    values = action.choices or ['3' if action.type else 'text']
    return [action.option_strings[-1], next(value for value in values if value != action.default)]


@pytest.mark.parametrize('needed, dest', [
    (needed, dest) for needed, dests in _DEPENDENTS.items() for dest in dests if dest != 'kd_loss_type'])
def test_an_option_without_the_one_it_needs_is_refused(needed, dest):
    earlier = takewhile(lambda name: name != needed, _DEPENDENTS)
    beside = [word for name in earlier if dest in _DEPENDENTS[name] for word in stated(name)]
    assert f'needs --{needed.replace("_", "-")}' in refusal(['x', *OFF.split(), *beside, *stated(dest)])


@pytest.mark.parametrize('dest', _OFF_ONLY)
def test_what_mixsize_takes_the_place_of_is_refused_with_it(dest):
    assert 'cannot be had with MixSize' in refusal(['x', '--mixsize', 's224', *stated(dest)])
    parse_args(['x', *OFF.split(), *stated(dest), *(['--resplit'] if dest == 'split_bn' else [])])


REFUSED = [
    ('--amp --mixed-precision bf16', '--amp with float16 contradicts --mixed-precision bf16'),
    ('--amp --amp-dtype bfloat16 --mixed-precision fp16', '--amp with bfloat16 contradicts'),
    ('--amp --model-dtype bfloat16', '--amp needs weights of float32'),
    ('--drop-connect 0.1 --drop-path 0.2', '--drop-connect is the old name of --drop-path'),
    ('--jsd-loss --loss ce', '--jsd-loss contradicts --loss ce'),
    ('--bce-loss --loss ce', '--bce-loss contradicts --loss ce'),
    ('--bce-loss --jsd-loss', 'contradicts'),
    ('--bce-pos-weight 2 --loss-pos-weight 3 --loss bce', '--bce-pos-weight is the old name of --loss-pos-weight'),
    ('--aug-repeats 3 --mixsize-duplicates 2', '--aug-repeats means the same as --mixsize-duplicates'),
    ('--aug-repeats 1.5', '--aug-repeats must be a whole number, not 1.5'),
    ('--aug-repeats 0.5', '--aug-repeats must be a whole number, not 0.5'),
    ('--aug-repeats -1', '--aug-repeats must'),
    ('--mixsize off --mixsize-adapt b+', 'leave out --mixsize-adapt'),
    ('--mixsize off --mixsize-duplicates 2', 'leave out --mixsize-duplicates'),
    ('--mixsize off --mixsize-drop reference', 'leave out --mixsize-drop'),
    ('--mixsize off --mixsize-reg 1', 'leave out --mixsize-reg'),
    ('--train-img-sizes 24 32 --mixsize-reg 1', 'leave out --mixsize-reg'),
    ('--mixsize off --max-bad-images 0.1', 'leave out --max-bad-images'),
    ('--mixsize off --worker-timeout 9', 'leave out --worker-timeout'),
    ('--max-bad-images 2', '--max-bad-images must be in [0, 1]'),
    ('--max-bad-images -0.1', '--max-bad-images must be in [0, 1]'),
    ('--worker-timeout -1', '--worker-timeout must not be negative'),
    ('--mixsize-reg -1', '--mixsize-reg must not be negative'),
    ('--tta 3', '--tta takes 2, for an image and its mirror image, not 3'),
    ('--tta -1', '--tta takes 2'),
    ('--resume auto', '--resume auto needs --experiment'),
    ('--max-nonfinite -1', '--max-nonfinite must not be negative'),
    ('--checkpoint-interval 5s', '--checkpoint-interval: must be a number of steps such as 500, minutes such as 30m'),
    ('--checkpoint-interval 5m --recovery-interval 3', 'means the same as --checkpoint-interval'),
    ('--micro-batch-size 0', '--micro-batch-size must be a number of images or auto'),
    ('--micro-batch-size some', '--micro-batch-size must be a number of images or auto'),
    ('--micro-batch-size auto --mixsize off', 'with --mixsize off give a number'),
    ('--micro-batch-size 4 --mixsize off --aug-splits 2', 'or --micro-batch-size'),
    ('--recovery-interval -1', '--recovery-interval must not be negative'),
    ('--calibrate-val -1', '--calibrate-val must not be negative'),
    ('--epoch-repeats -1', '--epoch-repeats must not be negative'),
    ('--checkpoint-hist 0', '--checkpoint-hist must be at least 1'),
    ('--stop-epoch 0', '--stop-epoch must be at least 1'),
    ('--log-interval 0', '--log-interval must be at least 1'),
    ('--val-interval 0', '--val-interval must be at least 1'),
    ('--grad-accum-steps 0', '--grad-accum-steps must be at least 1'),
    ('-vb 0', '--validation-batch-size must be at least 1'),
    ('--train-img-sizes 24 --train-batches-per-epoch 0', '--train-batches-per-epoch must be at least 1'),
    ('--save-epochs 0', '--save-epochs counts finished epochs'),
    ('--smoothing -0.1', '--smoothing must be in [0, 1)'),
    ('--mixsize off --aug-splits 1', '--aug-splits must be 2 or more'),
    ('--mixsize off --split-bn', '--split-bn needs --aug-splits or --resplit'),
    ('--mixsize off --split-bn --resplit --sync-bn', '--split-bn and --sync-bn exclude each other'),
    ('--mixsize off --aug-splits 2 --mixup 0.1', '--aug-splits cannot be had with mixup'),
    ('--mixsize off --aug-splits 2 --cutmix 0.1', '--aug-splits cannot be had with mixup'),
    ('--mixsize off --aug-splits 2 --cutmix-minmax 0.1 0.9', '--aug-splits cannot be had with mixup'),
    ('--mixsize off --aug-splits 2 --no-prefetcher', '--aug-splits cannot be had with mixup, cutmix, --no-pre'),
    ('--mixsize off --use-multi-epochs-loader --mixup-off-epoch 1', 'exclude each other: its workers mix on'),
    ('--naflex-loader --mixup-mode elem', '--naflex-loader mixes by batch'),
    ('--naflex-loader --save-images', '--naflex-loader and --save-images exclude'),
    ('--multilabel-threshold 0.3', '--multilabel-threshold needs --task multilabel'),
    ('--kd-model-name x --kd-distill-type feature --kd-temperature 2', '--kd-temperature needs --kd-distill-type'),
    ('--kd-model-name x --kd-token-distill-type hard', '--kd-token-distill-type needs --kd-distill-type token'),
    ('--kd-model-name x --kd-student-feature-dim 8', '--kd-student-feature-dim needs --kd-distill-type feature'),
    ('--kd-model-name x --kd-teacher-feature-dim 8', '--kd-teacher-feature-dim needs --kd-distill-type feature'),
    ('--start-epoch -1', '--start-epoch must not be negative'),
    ('--decay-epochs 0', '--decay-epochs must be above 0'),
    ('--aug-repeats -1', '--aug-repeats must not be negative'),
    ('--naflex-loader --aug-splits 2', '--naflex-loader and --aug-splits exclude each other'),
    ('--naflex-loader --train-img-sizes 24 32', '--naflex-loader and --train-img-sizes exclude each other'),
    ('--naflex-loader --use-multi-epochs-loader', '--naflex-loader and --use-multi-epochs-loader exclude each other'),
    ('--naflex-loader --mixup 1 --mixup-off-epoch 1', '--naflex-loader and --mixup-off-epoch exclude each other'),
    ('--naflex-loader --cutmix-minmax 0.1 0.9', '--naflex-loader and --cutmix-minmax exclude each other'),
    ('--naflex-loader --torchscript', '--naflex-loader and --torchscript exclude each other'),
    ('--naflex-loader --tta 2', '--naflex-loader and --tta exclude each other'),
    ('--train-img-sizes 24 --use-multi-epochs-loader', 'exclude each other'),
    ('--naflex-loader --naflex-patch-sizes 8 16 --naflex-patch-size-probs 1', 'one value for each of --naflex-patch'),
    ('--train-img-sizes 24 32 --train-batch-sizes 8', '--train-batch-sizes must have one value for each'),
    ('--train-img-sizes 24 32 --train-size-probs 1', '--train-size-probs must have one value for each'),
    ('--loss jsd --mixsize off', 'needs --aug-splits 2 or more'),
    ('--jsd-loss', 'needs --aug-splits 2 or more'),
    ('--target-format multihot', 'targets of several labels need --task multilabel'),
    ('--target-key a,b', 'targets of several labels need --task multilabel'),
    ('--task multilabel --kd-model-name resnet18', '--kd-model-name needs --task classification'),
    ('--bce-sum', '--bce-sum needs --loss bce'),
    ('--bce-target-thresh 0.2', '--bce-target-thresh needs --loss bce'),
    ('--poly-epsilon 1', '--poly-epsilon needs --loss poly'),
    ('--poly-gamma 1', '--poly-gamma needs --loss poly'),
    ('--class-stats s.json', '--class-stats needs --loss db'),
    ('--loss bce --loss-pos-weight 2 --class-stats s.json', '--class-stats needs --loss db'),
    ('--loss-weight-power 2', '--loss-weight-power needs --loss-pos-weight neg_pos'),
    ('--loss bce --loss-class-weight effective_num --class-stats s.json --loss-weight-power 2', '--loss-weight-power'),
    ('--eval-metric map', '--eval-metric must be one of loss, top1, top5, not map'),
    ('--eval-metric top1 --task multilabel', '--eval-metric must be one of loss, map'),
    ('--opt-kwargs nesterov', '--opt-kwargs takes NAME=VALUE'),
    ('--torchscript --torchcompile', 'not allowed with argument'),
    ('--mixed-precision fp8', 'invalid choice'),
]


@pytest.mark.parametrize('argv, message', REFUSED, ids=[argv for argv, _ in REFUSED])
def test_what_contradicts_or_does_nothing_is_refused(argv, message):
    assert message in refusal(['x', *argv.split()])


def test_the_digits_have_one_label_each():
    assert 'the digits have one label each' in refusal(['--task', 'multilabel'])


def test_the_local_rank_must_be_that_of_the_environment(monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '2')
    assert '--local_rank 1 contradicts LOCAL_RANK=2' in refusal(['x', '--local_rank', '1'])
    assert parse_args(['x', '--local_rank', '2']).local_rank == 2


@pytest.mark.parametrize('argv, expected', [
    ('', dict(loss='ce', eval_metric='top1', smoothing=0.1, mixed_precision=None, mixsize=None)),
    ('--task multilabel', dict(loss='bce', eval_metric='map', smoothing=0)),
    ('--amp', dict(mixed_precision='fp16')),
    ('--amp --mixed-precision fp16', dict(mixed_precision='fp16')),
    ('--bce-loss --loss bce', dict(loss='bce')),
    ('--drop-connect 0.1 --drop-path 0.1', dict(drop_path=0.1)),
    ('--aug-repeats 3 --mixsize-duplicates 3', dict(mixsize_duplicates=3)),
    ('--train-img-sizes 24 32', dict(mixsize='off')),
    ('--naflex-loader', dict(mixsize='off')),
    ('--train-steps-per-epoch 5 --train-img-sizes 24 32', dict(train_batches_per_epoch=5)),
    ('--dr 0.5', dict(decay_rate=0.5)),
], ids=str)
def test_one_option_can_say_what_another_does(argv, expected):
    args = vars(parse_args(['x', *argv.split()]))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize('text, argv, expected', [
    ('amp: true', '--mixed-precision no', dict(mixed_precision='no')),
    ('mixed_precision: bf16', '--amp', dict(mixed_precision='fp16')),
    ('drop_connect: 0.2', '--drop-path 0.3', dict(drop_path=0.3)),
    ('drop_path: 0.2', '--drop-connect 0.3', dict(drop_path=0.3)),
    ('bce_loss: true', '--loss ce', dict(loss='ce')),
    ('loss: ce', '--bce-loss', dict(loss='bce')),  # a resumed run always states its loss
    ('{bce_pos_weight: 2, loss: bce}', '--loss-pos-weight 3', dict(loss_pos_weight='3')),
    ('{loss_pos_weight: 2, loss: bce}', '--bce-pos-weight 3', dict(loss_pos_weight='3.0')),
    ('aug_repeats: 2', '--mixsize-duplicates 3', dict(mixsize_duplicates=3)),
    ('mixsize_duplicates: 2', '--aug-repeats 3', dict(mixsize_duplicates=3)),
], ids=str)
def test_the_command_line_wins_where_a_configuration_says_it_in_another_way(tmp_path, text, argv, expected):
    args = vars(parse_args([*configured(tmp_path, text), *argv.split()]))
    assert {name: args[name] for name in expected} == expected


def configured(tmp_path, text):
    (tmp_path / 'c.yaml').write_text(text)
    return ['x', '-c', str(tmp_path / 'c.yaml')]


@pytest.mark.parametrize('text, message', [
    ('lr: fast', "lr must be a number, not 'fast'"),
    ('lr: true', 'lr must be a number, not True'),
    ('lr: [0.1]', 'lr must be 1 value, not [0.1]'),
    ('epochs: 1.5', 'epochs must be a whole number, not 1.5'),
    ('epochs: {a: 1}', 'epochs must be a whole number'),
    ('input_size: 224', 'input_size must be 3 values, not 224'),
    ('input_size: [3, 32]', 'input_size must be 3 values'),
    ('decay_milestones: [1, x]', "decay_milestones must be a whole number, not 'x'"),
    ('amp: 3', 'amp must be true or false, not 3'),
    ('amp: yes please', 'amp must be true or false'),
    ('model_kwargs: 3', 'model_kwargs must be a mapping, not 3'),
    ('model: [resnet18]', 'model must be 1 value'),
    ('model: true', 'model must be text, not True'),
    ('loss: mse', 'loss must be one of ce, bce'),
    ('{', 'cannot read'),
    ('tta: 3', '--tta takes 2'),
], ids=str)
def test_a_value_of_the_wrong_type_in_a_configuration_is_refused(tmp_path, text, message):
    assert message in refusal(configured(tmp_path, text))


@pytest.mark.parametrize('text, expected', [
    ("lr: '3e-4'", dict(lr=3e-4)),
    ('lr: 3e-4', dict(lr=3e-4)),  # YAML reads it as text
    ("epochs: '10'", dict(epochs=10)),
    ("mean: ['0.5', 0.4, '0.3']", dict(mean=[0.5, 0.4, 0.3])),
    ('mean: 0.5', dict(mean=[0.5])),
    ('input_size: [3, 32, 48]', dict(input_size=[3, 32, 48])),
    ('torchcompile: true', dict(torchcompile='inductor')),
    ('torchcompile: eager', dict(torchcompile='eager')),
    ('model_kwargs: {a: [1]}', dict(model_kwargs={'a': [1]})),
    ('num_classes: null', dict(num_classes=None)),
    ('grad_smoothing: false', dict(grad_smoothing=False)),
], ids=str)
def test_a_value_in_a_configuration_becomes_that_of_the_command_line(tmp_path, text, expected):
    args = vars(parse_args(configured(tmp_path, text)))
    assert {name: args[name] for name in expected} == expected
