"""Trainings of several processes on the CPU, forked from one process that has imported everything and computed nothing.

Reads a JSON list of jobs from the standard input, runs them in turn, and writes what became of each to the standard
output: exit codes, what was printed, and each step's loss, size and images by rank. A job has ``ranks``, ``argv`` and
perhaps ``command`` (train), ``freeze`` (batch norm), ``shard`` (the model, over all ranks) and ``signal``: the rank
that gets one, its number, and the step of the epoch.
"""
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

from accelerate import Accelerator
from timm.layers import freeze_batch_norm_2d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mixsize_timm import build, calibrate_model, engine, evaluate, train

COMMANDS = {'train': train.main, 'evaluate': evaluate.main, 'calibrate': calibrate_model.main}


def shard(ranks):
    """Shard what Accelerate prepares, as it does for FSDP, which on CPUs it leaves out."""
    def prepare(accelerator, model, optimizer):
        names = {parameter: name for name, parameter in model.named_parameters()}
        fully_shard(model, mesh=init_device_mesh('cpu', (ranks,)))
        sharded = dict(model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in sharded.values())
        for group in optimizer.param_groups:
            group['params'] = [sharded[names[parameter]] for parameter in group['params']]
        return model, accelerator.prepare_optimizer(optimizer)

    Accelerator.prepare = prepare
    Accelerator.is_fsdp2 = True
    train.shards = build.shards = lambda _: True


def child(rank, job, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job['ranks']), MASTER_ADDR='127.0.0.1',
                      LOCAL_WORLD_SIZE=str(job['ranks']), MASTER_PORT=str(port), ACCELERATE_USE_CPU='true')
    for stream in (1, 2):
        os.dup2(os.open(folder / f'{rank}-{stream}', os.O_WRONLY | os.O_CREAT), stream)
    steps, create_model, step = [], train.create_model, engine.StepMeter.step

    def create(args):
        model = create_model(args)
        return freeze_batch_norm_2d(model) if job.get('freeze') else model

    def add(meter, loss, images, targets, group):
        if not steps or 'norm' in steps[-1]:
            steps.append({'losses': [], 'images': [], 'size': group.size})
        steps[-1]['losses'].append((loss * group.weight).item())
        steps[-1]['images'] += group.images.tolist()
        original(meter, loss, images, targets, group)

    def finish_step(meter, group, norms, optimizer):
        steps[-1]['norm'] = norms.norm.item()
        steps[-1]['smoothed'] = norms.smoothed.item()
        to, number, after = job.get('signal', (None, 0, 0))
        if rank == to and group.step + 1 == after:
            os.kill(os.getpid(), number)
        return step(meter, group, norms, optimizer)

    if job.get('shard'):
        shard(job['ranks'])
    original = engine.StepMeter.add
    train.create_model, engine.StepMeter.add, engine.StepMeter.step = create, add, finish_step
    code = COMMANDS[job.get('command', 'train')](job['argv'])
    print(end='', flush=True)
    (folder / f'{rank}-steps').write_text(json.dumps(steps))
    os._exit(code)


def run(job):
    folder = Path(tempfile.mkdtemp())
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(job['ranks']):
        processes.append(os.fork())
        if not processes[-1]:
            child(rank, job, port, folder)
    statuses = [os.waitpid(process, 0)[1] for process in processes]

    def read(name):
        return (folder / name).read_text() if (folder / name).exists() else ''

    return {'codes': [os.waitstatus_to_exitcode(status) for status in statuses],
            'out': [read(f'{rank}-1') for rank in range(job['ranks'])],
            'err': [read(f'{rank}-2') for rank in range(job['ranks'])],
            'steps': [json.loads(read(f'{rank}-steps') or '[]') for rank in range(job['ranks'])]}


if __name__ == '__main__':
    print(json.dumps([run(job) for job in json.load(sys.stdin)]))
