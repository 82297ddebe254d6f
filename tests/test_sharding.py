"""Sharded models: the smoother's norm and step are those of data parallel, and states are whole."""
import json
import subprocess
import sys

import pytest

WORKER = """
import json, os, sys, timm, torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from timm.optim import create_optimizer_v2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from mixsize_timm.sharding import (
    full_model_state, full_optimizer_state, load_full_model_state, load_full_optimizer_state)
from mixsize_timm.processes import share_weights
from mixsize_timm.smoothing import GradientSmoother

FOLDER = sys.argv[1]


def make(sharded, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model('test_vit', num_classes=5, img_size=32)
    if sharded:
        mesh = init_device_mesh('cpu', (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model, optimizer, smoother, rank, steps, clip=None):
    norms = []
    for step in steps:
        torch.manual_seed(2 * step + rank)
        images, targets = torch.randn(4, 3, 32, 32) * (step + 1), torch.randint(0, 5, (4,))
        F.cross_entropy(model(images), targets).backward()
        result = smoother(model.parameters())
        assert not isinstance(result.norm, DTensor) and not isinstance(result.smoothed, DTensor)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        norms.append([result.norm.item(), result.smoothed.item()])
    return norms


def difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


def on_all(state):  # as every process reads it from a checkpoint
    holder = [state]
    dist.broadcast_object_list(holder)
    return holder[0]


def work(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{FOLDER}/meeting', rank=rank, world_size=2)
    PartialState(cpu=True)
    found = {}
    plain, sharded = make(False), make(True)
    found['parts'] = [[p.to_local().numel(), p.numel(), isinstance(p, DTensor)] for p in sharded.parameters()]
    models = torch.nn.parallel.DistributedDataParallel(plain), sharded
    optimizers = [create_optimizer_v2(model, opt='sgd', lr=0.05, weight_decay=0.01) for model in (plain, sharded)]
    smoothers = GradientSmoother(), GradientSmoother()
    for name, steps, clip in (('smoothed', range(4), None), ('clipped', range(4, 6), 0.1)):
        found[name] = [train(*parts, rank, steps, clip) for parts in zip(models, optimizers, smoothers)]
        state = full_model_state(sharded)
        found[name + ' difference'] = difference(state, plain.state_dict()) if rank == 0 else len(state)
    moments = full_optimizer_state(sharded, optimizers[1])
    if rank == 0:
        reference = optimizers[0].state_dict()
        found['groups alike'] = all(
            {**one, 'params': None} == {**other, 'params': None} and one['params'] == other['params']
            for one, other in zip(moments['param_groups'], reference['param_groups']))
        found['moments difference'] = max(
            difference(moments['state'][number], reference['state'][number]) for number in reference['state'])
    found['back'] = {}
    state, moments = on_all(state), on_all(moments)
    for kind, again in (('sharded', make(True, seed=1)), ('plain', make(False, seed=1))):
        load_full_model_state(again, state)
        optimizer = create_optimizer_v2(again, opt='sgd', lr=0.5, weight_decay=0.01)
        load_full_optimizer_state(again, optimizer, moments)
        loaded, resumed = full_model_state(again), full_optimizer_state(again, optimizer)
        if rank == 0:
            found['back'][kind] = [difference(loaded, state), max(
                difference(resumed['state'][number], values) for number, values in moments['state'].items()),
                resumed['param_groups'][0]['lr']]
    adam = create_optimizer_v2(sharded, opt='adamw', lr=0.001)
    train(sharded, adam, GradientSmoother(), rank, range(2))
    moments = full_optimizer_state(sharded, adam)
    moments = on_all(moments)
    other = create_optimizer_v2(sharded, opt='adamw', lr=0.001)
    load_full_optimizer_state(sharded, other, moments)
    resumed = full_optimizer_state(sharded, other)
    found['adamw'] = max(difference(resumed['state'][number], values)
                         for number, values in moments['state'].items()) if rank == 0 else 0
    sharded.eval()
    with torch.inference_mode():
        found['outputs'] = list(sharded(torch.randn(2, 3, 32, 32)).shape)
    lone = make(False, seed=rank)
    lone.register_buffer('of_rank', torch.tensor([rank]))
    share_weights(lone)
    found['shared'] = [difference(lone.state_dict(), {**make(False).state_dict(), 'of_rank': torch.tensor([0])})]
    with open(f'{FOLDER}/{rank}.json', 'w') as file:
        json.dump(found, file)
    dist.destroy_process_group()


if __name__ == '__main__':
    torch.multiprocessing.start_processes(work, nprocs=2, start_method='fork')
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What two gloo processes found, one of them after the other."""
    folder = tmp_path_factory.mktemp('sharding')
    (folder / 'worker.py').write_text(WORKER)
    result = subprocess.run([sys.executable, folder / 'worker.py', folder], capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]


def test_the_parameters_really_are_sharded(found):
    for parts in zip(found[0]['parts'], found[1]['parts']):
        assert all(sharded for _, _, sharded in parts)
        assert sum(own for own, _, _ in parts) == parts[0][1]
    assert all(0.45 < sum(own for own, _, _ in rank['parts']) / sum(whole for _, whole, _ in rank['parts']) < 0.55
               for rank in found)


@pytest.mark.parametrize('name', ['smoothed', 'clipped'])
def test_norms_and_steps_are_those_of_data_parallel(found, name):
    for rank in found:
        plain, sharded = rank[name]
        for one, other in zip(plain, sharded):
            assert other == pytest.approx(one, rel=1e-5)
    assert found[0][name + ' difference'] < 1e-5
    assert found[0][name] == found[1][name]


def test_states_are_gathered_whole_on_the_first_process_alone(found):
    assert found[1]['smoothed difference'] == 0  # entries of the second's
    assert found[0]['groups alike'] and found[0]['moments difference'] < 1e-5


def test_whole_states_load_back_into_models_sharded_or_not(found):
    assert found[0]['back'] == {'sharded': [0, 0, 0.05], 'plain': [0, 0, 0.05]}
    assert found[0]['adamw'] == 0


def test_a_sharded_model_is_evaluated(found):
    assert found[0]['outputs'] == found[1]['outputs'] == [2, 5]


def test_weights_that_differ_are_the_first_ones_before_they_are_sharded(found):
    assert found[0]['shared'] == found[1]['shared'] == [0]
