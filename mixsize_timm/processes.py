"""The processes of a run: whether they are those that were asked for, and what they can share."""
import argparse
import hashlib
import os
import platform
import socket
from typing import Any, Dict, List, Sequence, Tuple

import accelerate
import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast, gather_object, parse_flag_from_env
from torch import nn

from ._version import __version__
from .errors import UsageError, refusing
from .provenance import launcher_command

_PLAIN = 'configure Accelerate for plain data parallelism, or for FSDP with fsdp_version: 2'
_FOREIGN = {
    'DEEPSPEED': f'DeepSpeed steps inside the backward pass, where the smoother never sees the gradient: {_PLAIN}',
    'MEGATRON_LM': f'Megatron-LM trains models of its own in a loop of its own, not timm\'s: {_PLAIN}',
}
_ON_CPU = 'on CPUs add --device cpu, or set ACCELERATE_USE_CPU=true'
# Who says in the environment how many processes there are, and what helps where they do not find each other
_WORLDS = {
    'WORLD_SIZE': f'{_ON_CPU}; on GPUs use torchrun or accelerate launch, which also set LOCAL_RANK',
    'OMPI_COMM_WORLD_SIZE': f'{_ON_CPU}; on GPUs use torchrun or accelerate launch in place of mpirun',
    'PMI_SIZE': f'{_ON_CPU}; on GPUs use torchrun or accelerate launch in place of mpirun',
    'SLURM_STEP_NUM_TASKS': 'let srun start one launcher on each machine, as recipes/accelerate/slurm.sh does; if each '
                            'task is a run of its own, unset SLURM_STEP_NUM_TASKS',
}
# Arguments that may differ from machine to machine
_OF_A_MACHINE = ('local_rank', 'config', 'data', 'data_dir', 'workers')


def check_launch() -> None:
    """Refuse what cannot train here, before Accelerate starts it.

    Raises:
        UsageError: It is DeepSpeed or Megatron-LM.
    """
    kind = _launched_for()[1]
    for name, why in _FOREIGN.items():
        if kind == name or parse_flag_from_env(f'ACCELERATE_USE_{name}'):
            raise UsageError(why)


def check_processes(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Check that the processes are as many as were launched, know each other, and were started alike.

    Called by every process.

    Raises:
        UsageError: They do not; the message says what to do, or which ranks disagree.
    """
    known = accelerator.num_processes
    for name, cure in _WORLDS.items():
        if int(os.environ.get(name) or 1) > known:
            raise UsageError(f'{name} is {os.environ[name]}, but the processes do not know each other: this one sees '
                             f'{known}; {cure}')
    asked, kind = _launched_for()
    if asked > 1 and asked != known:
        raise UsageError(f'accelerate launch was asked for {asked} processes and this run has {known}: on CPUs launch '
                         f'with --config_file recipes/accelerate/two_cpu.yaml --num_processes {asked}, and --device '
                         'cpu; on several machines they must divide by --num_machines')
    fsdp = kind == 'FSDP' or parse_flag_from_env('ACCELERATE_USE_FSDP')
    if fsdp and not shards(accelerator):
        raise UsageError('FSDP needs GPUs and a launcher: here Accelerate would train without it, so leave it out')
    if known > 1:
        with refusing('the processes cannot reach each other'):
            ranks = gather_object([(accelerator.process_index, socket.gethostname(), _versions(), _digest(args))])
        _check_alike(args, ranks)


def _check_alike(args: argparse.Namespace, ranks: Sequence[Tuple[int, str, str, str]]) -> None:
    """Compare what the processes say of themselves, in the order of their ranks."""
    if [rank for rank, *_ in ranks] != list(range(len(ranks))):
        raise UsageError(f'the ranks must be 0 to {len(ranks) - 1}, each once, not '
                         f'{", ".join(str(rank) for rank, *_ in ranks)}: check RANK, or --machine_rank')
    _, host, versions, digest = ranks[0]
    others = [(rank, there, other) for rank, there, other, _ in ranks if other != versions]
    if others:
        rank, there, other = others[0]
        raise UsageError(f'{_named([rank for rank, *_ in others])} on {there} with {other}, and rank 0 on {host} with '
                         f'{versions}: install the same on all machines')
    odd = [rank for rank, *_, other in ranks if other != digest]
    if odd:  # rare, so that only now the arguments themselves are sent around
        everyone = gather_object([_comparable(args)])
        names = [name for name, value in everyone[0].items() if any(other.get(name) != value for other in everyone)]
        name = names[0]
        raise UsageError(f'{_named(odd)} started with other arguments than rank 0: {", ".join(names)}; {name} is '
                         f'{everyone[odd[0]].get(name)} and on rank 0 {everyone[0][name]}')


def _named(ranks: List[int]) -> str:
    return f'rank {ranks[0]} was' if len(ranks) == 1 else f'ranks {", ".join(map(str, ranks))} were'


def _versions() -> str:
    return (f'mixsize-timm {__version__}, timm {timm.__version__}, torch {torch.__version__}, accelerate '
            f'{accelerate.__version__}, Python {platform.python_version()}')


def _comparable(args: argparse.Namespace) -> Dict[str, str]:
    return {name: str(value) for name, value in sorted(vars(args).items()) if name not in _OF_A_MACHINE}


def _digest(args: argparse.Namespace) -> str:
    return hashlib.sha256(repr(_comparable(args)).encode()).hexdigest()


def _launched_for() -> Tuple[int, str]:
    """The processes that ``accelerate launch`` was asked for, and the kind; 0 and empty where it was not, or not told.

    A launcher of a single process says neither in the environment, so its command line and configuration are read.
    """
    words = launcher_command()
    names = [os.path.basename(word) for word in words[:4]]
    start = next((number for number, name in enumerate(names)
                  if name in ('launch', 'accelerate-launch', 'accelerate.commands.launch', 'launch.py')), None)
    if start is None or not any('accelerate' in word for word in words[:start + 1]):
        return 0, ''
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser
    try:
        given = launch_command_parser().parse_args(words[start + 1:])
        file = given.config_file or ('' if given.cpu else default_config_file)
        config: Any = load_config_from_file(file) if os.path.isfile(file) else None
    except (SystemExit, OSError, TypeError, ValueError):  # the launcher would have said so
        return 0, ''
    flags = (('DEEPSPEED', given.use_deepspeed), ('FSDP', given.use_fsdp), ('MEGATRON_LM', given.use_megatron_lm),
             ('', given.multi_gpu or given.tpu))
    kind = next((kind for kind, said in flags if said), None)
    if kind is None:
        kind = str(getattr(config, 'distributed_type', '')).split('.')[-1]
    return max(given.num_processes or getattr(config, 'num_processes', 0) or 0, 0), kind


# Models sharded over processes

_SHARDED_OPTIMIZERS = ('sgd', 'nesterov', 'momentum', 'adam', 'adamw')  # a step of others looks at whole parameters


def shards(accelerator: Accelerator) -> bool:
    """Whether models are sharded over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """Refuse what cannot be had with a model that is sharded by FSDP.

    Args:
        args: Arguments of the run.
        accelerator: Of distributed type FSDP.

    Raises:
        UsageError: There is some.
    """
    if not accelerator.is_fsdp2:
        raise UsageError('FSDP of version 1 is not supported: set fsdp_version: 2')
    for name in ('model_ema', 'kd_model_name', 'torchcompile', 'torchscript', 'sync_bn', 'split_bn', 'model_dtype'):
        if getattr(args, name):
            raise UsageError(f'--{name.replace("_", "-")} cannot be had with FSDP: leave it out, or use plain data '
                             'parallelism')
    if args.micro_batch_size == 'auto':
        raise UsageError('--micro-batch-size auto cannot be had with FSDP, whose processes would wait for one another: '
                         'give a number')
    if args.clip_grad is not None and args.clip_mode == 'agc':
        raise UsageError('--clip-mode agc cannot be had with FSDP, where each process has a part of a unit: use norm')
    if args.opt not in _SHARDED_OPTIMIZERS:
        raise UsageError(f'--opt {args.opt} was not tried with FSDP: use one of {", ".join(_SHARDED_OPTIMIZERS)}')


def share_weights(model: nn.Module) -> None:
    """Give all processes the weights and buffers of the first; data parallelism does so itself, FSDP does not."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(broadcast(tensor.detach().clone()))
