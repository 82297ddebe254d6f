"""What a training run is made of, built from its arguments; each fault is found here and said in one line."""
import argparse
import importlib
import inspect
import logging
import os
import platform
from contextlib import suppress
from typing import Any, Callable, Dict, Optional, Tuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DynamoBackend, patch_environment
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss, load_class_stats, resolve_class_weights
from timm.optim import create_optimizer_v2, get_optimizer_info, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    MultiLabelClassificationTask,
    TokenDistillationTask,
    TrainingTask,
)
from timm.utils import set_jit_fuser
from torch import nn

from .args import mixing, model_dtype
from .errors import UsageError, refusing
from .loaders import Data
from .models import check_source
from .processes import check_launch, check_processes, check_sharding, shards, share_weights
from .sizes import SizeProbe

_logger = logging.getLogger(__name__)


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """The Accelerator of the run, if it is what was asked for: its processes, its device and its precision.

    On the CPU with all cores, where the launcher would leave one thread a process.

    Raises:
        UsageError: It cannot be had, or Accelerate would replace something silently.
    """
    check_launch()
    precision = args.mixed_precision or os.environ.get('ACCELERATE_MIXED_PRECISION') or 'no'
    if precision not in ('no', 'fp16', 'bf16'):
        raise UsageError(f'{precision} is not supported: choose no, fp16 or bf16 with --mixed-precision')
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when CUDA starts
    if args.local_rank:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    trackers = [name for name, wanted in (('wandb', args.log_wandb), ('tensorboard', args.log_tensorboard)) if wanted]
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise UsageError(f'{missing[0]} is not installed: pip install {missing[0]}, or leave out --log-{missing[0]}')
    with refusing('--device-modules'):
        for module in args.device_modules or ():
            importlib.import_module(module)
    with refusing(f'--device {args.device}'):
        torch.zeros(1, device=args.device if args.device != 'cuda' else 'cpu')  # says whether there is one
    with refusing('Accelerate'):
        device = {} if args.device in ('cpu', 'cuda') else {'ACCELERATE_TORCH_DEVICE': args.device}
        with patch_environment(**device):
            accelerator = Accelerator(
                mixed_precision=args.mixed_precision, cpu=args.device == 'cpu', log_with=trackers or None,
                project_dir='.',
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=not args.no_ddp_bb)])
    check_processes(args, accelerator)
    _check_accelerator(args, accelerator, precision)
    if accelerator.mixed_precision != 'no' and args.model_dtype not in (None, 'float32'):
        raise UsageError(f'--model-dtype {args.model_dtype} cannot be had with mixed precision: leave out one of them')
    if args.aug_repeats and args.mixsize == 'off' and accelerator.num_processes == 1:
        raise UsageError('--aug-repeats with --mixsize off repeats over processes, and this is a single one')
    _set_backend(args, accelerator)
    return accelerator


def _check_accelerator(args: argparse.Namespace, accelerator: Accelerator, precision: str) -> None:
    """Refuse what Accelerate or torch has replaced, or would replace, by something else without saying so."""
    device, processes = torch.device(args.device), accelerator.num_processes
    if device.type not in ('cuda', accelerator.device.type):
        raise UsageError(f'--device {args.device}: Accelerate is configured for {accelerator.device.type}')
    if device.index is not None and processes > 1:
        raise UsageError(f'--device {args.device} would be that of all {processes} processes: leave out its number')
    if accelerator.mixed_precision != precision:
        raise UsageError(f'Accelerate trains with {accelerator.mixed_precision}, not {precision}: choose it with '
                         '--mixed-precision')
    if precision == 'fp16' and accelerator.scaler is None:  # float32, without a word
        raise UsageError('fp16 needs a GPU: use --mixed-precision bf16, or --amp-dtype bfloat16')
    on_cuda = accelerator.device.type == 'cuda'
    if precision == 'bf16' and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UsageError(f'{torch.cuda.get_device_name()} has no units for bf16 and would emulate it: use '
                         '--mixed-precision fp16')
    if args.no_tf32 and not (on_cuda and torch.cuda.is_tf32_supported()):
        raise UsageError(f'there is no TF32 on this {accelerator.device.type}: leave out --no-tf32')
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UsageError('Accelerate is configured to compile by itself: leave out dynamo, and use --torchcompile')
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError('Accelerate is configured to accumulate gradients and would divide each loss: use '
                         '--grad-accum-steps instead')
    if accelerator.parallelism_config is not None:
        raise UsageError('Accelerate\'s parallelism_config is not supported: each process takes its share of the batch')


def _set_backend(args: argparse.Namespace, accelerator: Accelerator) -> None:
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
    if accelerator.device.type == 'cpu':
        in_bf16 = accelerator.mixed_precision == 'bf16' or args.model_dtype == 'bfloat16'
        if in_bf16 and accelerator.is_main_process and not has_fast_bf16():
            _logger.warning('bf16 is many times slower than float32 on this processor, which has no AVX-512: leave out '
                            '%s', '--model-dtype' if args.model_dtype == 'bfloat16' else '--mixed-precision and --amp')
        if args.sync_bn and accelerator.num_processes > 1:
            raise UsageError('--sync-bn needs GPUs: leave it out on the CPU')
        # launchers set one thread for each process where nobody says how many; a plain python does not
        launched = 'ACCELERATE_MIXED_PRECISION' in os.environ or 'TORCHELASTIC_RUN_ID' in os.environ
        if launched and os.environ.get('OMP_NUM_THREADS', '1') == '1':
            cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    elif accelerator.device.type == 'cuda':
        # of torch's two interfaces the one that torch.compile reads too
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not args.no_tf32
        torch.backends.cudnn.benchmark = not args.deterministic
    if args.fuser:
        with refusing(f'timm has no fuser {args.fuser!r}'):
            set_jit_fuser(args.fuser)
    set_fast_norm(args.fast_norm)


def has_fast_bf16() -> bool:
    """Whether torch's library for convolutions takes bf16 on this processor, as far as is known."""
    x86 = platform.machine().lower() in ('x86_64', 'amd64')
    return not x86 or torch.backends.cpu.get_cpu_capability().startswith('AVX512')


def create_task(args: argparse.Namespace, model: nn.Module, accelerator: Accelerator, data: Data
                ) -> Tuple[TrainingTask, Any]:
    """timm's task around the prepared model, and the optimizer.

    Neither the loader nor the schedule is Accelerate's to prepare: it would deal the batches of one size out to
    different processes, and step the schedule once for each.
    """
    model.to(device=accelerator.device, dtype=model_dtype(args))
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2)).to(accelerator.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and accelerator.num_processes > 1:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        with refusing('--torchscript'):
            model = torch.jit.script(model)
    options: Dict[str, Any] = dict(device=accelerator.device, dtype=model_dtype(args), verbose=False)
    with refusing(f'--loss {args.loss}'):
        options['criterion_kwargs'] = _criterion(args)
        create_classification_loss(multi_label=args.task == 'multilabel', **options['criterion_kwargs'])
    if args.kd_model_name:
        task = _create_distillation(args, model, data, options)
    elif args.task == 'multilabel':
        with refusing('--multilabel-threshold'):
            task = MultiLabelClassificationTask(model, threshold=args.multilabel_threshold, **options)
    else:
        task = ClassificationTask(model, **options)
    trained: Any = task.get_trainable_module()
    with refusing(f'--opt {args.opt}'):
        info = get_optimizer_info(args.opt.lower().split('_')[-1])
        if (args.opt_eps is not None and not info.has_eps) or (args.opt_betas and not info.has_betas):
            raise ValueError('it has no epsilon or no betas: leave out --opt-eps and --opt-betas')
        optimizer = create_optimizer(args, trained, accelerator, info.opt_class)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup,
                       device=torch.device('cpu') if args.model_ema_force_cpu else None)
    if args.torchcompile:
        _compile(args, task, data.num_shapes * (2 if args.micro_batch_size else 1))  # parts differ by one image
    if shards(accelerator):
        check_sharding(args, accelerator)
        share_weights(model)
    task.trainable_module, optimizer = accelerator.prepare(task.get_trainable_module(), optimizer)
    return task, optimizer


def create_optimizer(args: argparse.Namespace, model: nn.Module, accelerator: Accelerator, kind: Any
                     ) -> torch.optim.Optimizer:
    """timm's optimizer; on a GPU with torch's fused kernels where it has them, unless ``--opt-kwargs`` says otherwise.

    Not under loss scaling, for a fused optimizer leaves out a step that overflows where Accelerate cannot see it; and
    not on the CPU, where its sums are others than those of timm's script.

    Args:
        args: The arguments.
        model: What is trained.
        accelerator: Tells the device, and whether losses are scaled.
        kind: The optimizer's class, or a word for one that has to be installed.
    """
    options = {**optimizer_kwargs(cfg=args), **args.opt_kwargs}
    if accelerator.scaler is not None and options.get('fused'):
        raise UsageError('--opt-kwargs fused=True hides the steps that overflow in fp16: leave it out, or use bf16')
    fusible = isinstance(kind, type) and kind.__module__.startswith('torch.optim.') and (
        'fused' in inspect.signature(kind).parameters)
    if (fusible and accelerator.device.type == 'cuda' and accelerator.scaler is None and not shards(accelerator)
            and 'fused' not in options and 'foreach' not in options):
        with suppress(RuntimeError):  # torch has no such kernel for these parameters
            return create_optimizer_v2(model, **options, fused=True)
    return create_optimizer_v2(model, **options)


def _criterion(args: argparse.Namespace) -> Dict[str, Any]:
    """Arguments of timm's ``create_classification_loss``."""
    stats = load_class_stats(args.class_stats)
    options: Dict[str, Any] = dict(
        loss_type=args.loss, smoothing=args.smoothing, soft_targets=mixing(args), bce_sum=args.bce_sum,
        bce_target_thresh=args.bce_target_thresh, poly_epsilon=args.poly_epsilon, poly_gamma=args.poly_gamma,
        jsd_splits=args.aug_splits)
    for kind, value in (('class_weight', args.loss_class_weight), ('pos_weight', args.loss_pos_weight)):
        options[kind] = resolve_class_weights(value, kind, stats, power=args.loss_weight_power)
    if args.loss == 'db' and stats is not None:
        options.update(class_counts=stats[0], num_samples=stats[1])
    for name in ('class_weight', 'pos_weight', 'class_counts'):
        length = getattr(options.get(name), 'numel', lambda: args.num_classes)()
        if length != args.num_classes:
            raise ValueError(f'{name} has {length} entries and the model {args.num_classes} classes')
    return options


def _create_distillation(args: argparse.Namespace, model: nn.Module, data: Data, options: Dict[str, Any]
                         ) -> TrainingTask:
    options.update(distill_loss_weight=args.distill_loss_weight, task_loss_weight=args.task_loss_weight)
    with refusing(f'--kd-model-name {args.kd_model_name}'):
        check_source(args.kd_model_name, unsafe_pickle=args.unsafe_pickle)
        if args.kd_distill_type == 'feature':
            task: Any = FeatureDistillationTask(
                model, args.kd_model_name, student_feature_dim=args.kd_student_feature_dim,
                teacher_feature_dim=args.kd_teacher_feature_dim, **options)
        elif args.kd_distill_type == 'token':
            task = TokenDistillationTask(model, args.kd_model_name, distill_type=args.kd_token_distill_type,
                                         temperature=args.kd_temperature, **options)
        else:
            task = LogitDistillationTask(model, args.kd_model_name, loss_type=args.kd_loss_type,
                                         temperature=args.kd_temperature, **options)
    _check_teacher(args, task.teacher.model, data)
    return task


def _check_teacher(args: argparse.Namespace, teacher: Any, data: Data) -> None:
    """Refuse a teacher whose classifier timm has drawn anew for the student's classes, or that refuses a size."""
    classes = teacher.pretrained_cfg.get('num_classes')
    if args.kd_distill_type != 'feature' and classes not in (None, args.num_classes):
        raise UsageError(f'--kd-model-name {args.kd_model_name}: it was trained for {classes} classes, and a '
                         f'classifier of {args.num_classes} would be random: take another teacher, or '
                         '--kd-distill-type feature')
    takes = SizeProbe(teacher, data.channels, data.sizes[0])
    for size in data.sizes:
        if not takes(size):
            raise UsageError(f'the teacher does not take images of {size} px: {takes.reason}')


def _compile(args: argparse.Namespace, task: TrainingTask, num_shapes: int) -> None:
    """Compile what is trained, a static graph for each shape; what is evaluated and saved is not compiled."""
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, num_shapes + 1)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)
    config.fail_on_recompile_limit_hit = True  # by default it goes on without compiling
    with refusing(f'--torchcompile {args.torchcompile}'):
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode, dynamic=False)


def create_batch_scale(args: argparse.Namespace, data: Data, accelerator: Accelerator
                       ) -> Optional[Callable[[int], Any]]:
    """The factor of a batch's loss where batches differ in length and a loader of timm's makes them."""
    if not (args.train_img_sizes or args.naflex_loader):
        return None
    mode = args.naflex_loss_scale if args.naflex_loader else args.variable_batch_loss_scale
    exponent = {'none': 0, 'sqrt': 0.5, 'linear': 1}[mode]

    def scale(batch: int) -> Any:
        factor: Any = (batch / data.mean_batch)**exponent
        if args.naflex_loader and accelerator.num_processes > 1:  # each process draws a length of its own
            total = accelerator.reduce(torch.tensor(float(batch), device=accelerator.device), 'sum')
            factor = factor * accelerator.num_processes * batch / total
        return factor

    return scale


def create_schedule(args: argparse.Namespace, optimizer: Any, data: Data) -> Tuple[Any, int]:
    """timm's schedule, in steps of the plan, and the number of epochs."""
    with refusing(f'--sched {args.sched}'):
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=data.decreasing_metric),
            updates_per_epoch=data.num_steps)


def scale_lr(args: argparse.Namespace, data: Data) -> float:
    """The learning rate: ``--lr``, or ``--lr-base`` scaled to the batch of all processes as timm does.

    That is ``--batch-size``: the base batch, or with ``--mixsize-batch-of mean`` the mean batch. Duplicates and the
    batches of other sizes do not count; the base and the mean batch are logged beside.
    """
    regime, processes = data.regime, data.plan_world_size * args.grad_accum_steps
    batch = data.mean_batch * processes
    beside = '' if regime is None else (
        f'; the base batch is {regime.base_batch * processes}, the mean batch {regime.mean_batch * processes:.1f}')
    if args.lr:
        _logger.info('Learning rate %.4g%s', args.lr, beside or f'; the mean batch is {batch:g}')
        return args.lr
    root = args.lr_base_scale == 'sqrt' or (
        not args.lr_base_scale and any(name in args.opt.lower() for name in ('ada', 'lamb')))
    lr = args.lr_base * (batch / args.lr_base_size)**(0.5 if root else 1)
    _logger.info('Learning rate %.4g: %g for %d images, scaled %s to a batch of %g%s',
                 lr, args.lr_base, args.lr_base_size, 'by the root' if root else 'linearly', batch, beside)
    return lr
