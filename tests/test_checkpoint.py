"""Checkpoints: whole, exact, and without pickles."""
import json
import random

import numpy as np
import pytest
import timm
import torch
from conftest import save_checkpoint
from timm.optim import create_optimizer_v2

from mixsize_timm.checkpoint import load_checkpoint
from mixsize_timm.randomness import random_state, set_random_state


def model():
    return timm.create_model('test_resnet', num_classes=4)


@pytest.mark.parametrize('opt', ['sgd', 'adamw', 'lamb', 'muon'])
def test_an_optimizers_state_survives_exactly(tmp_path, opt):
    def train(net, optimizer, seed):
        torch.manual_seed(seed)
        net(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = model(), model()
    optimizers = [create_optimizer_v2(m, opt=opt, lr=0.01, momentum=0.9, weight_decay=0.1) for m in (first, second)]
    train(first, optimizers[0], 0)
    save_checkpoint(str(tmp_path / 'last'), first, {'optimizer': optimizers[0].state_dict(), 'epoch': 1})
    state = load_checkpoint(str(tmp_path / 'last'), second)
    optimizers[1].load_state_dict(state['optimizer'])
    assert state['epoch'] == 1
    for net, optimizer in zip((first, second), optimizers):
        train(net, optimizer, 1)
    for a, b in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(a, b)


def test_any_plain_structure_survives(tmp_path):
    state = {'a': [1, 2.5, None, True, 'x', (3, (4,))], 5: {'t': torch.arange(4).view(2, 2)}, 'inf': float('-inf')}
    save_checkpoint(str(tmp_path / 'c'), model(), state)
    again = load_checkpoint(str(tmp_path / 'c'), model())
    assert again['a'] == state['a'] and again['inf'] == state['inf']
    assert torch.equal(again[5]['t'], state[5]['t'])
    with pytest.raises(TypeError, match='cannot save a set'):
        save_checkpoint(str(tmp_path / 'd'), model(), {'s': {1, 2}})


def test_random_states_survive(tmp_path):
    random.random(), np.random.randn(), torch.rand(3)
    save_checkpoint(str(tmp_path / 'c'), model(), random_state())
    expected = random.random(), np.random.randn(), torch.rand(1).item()
    set_random_state(load_checkpoint(str(tmp_path / 'c'), model()))
    assert (random.random(), np.random.randn(), torch.rand(1).item()) == expected


def test_nothing_is_pickled_and_nothing_else_is_left(tmp_path):
    for _ in range(2):
        save_checkpoint(str(tmp_path / 'last'), model(), {'t': torch.ones(2)})
    assert [p.name for p in tmp_path.iterdir()] == ['last']
    assert sorted(p.name for p in (tmp_path / 'last').iterdir()) == [
        'manifest.json', 'model.safetensors', 'state.json', 'state.safetensors']
    json.loads((tmp_path / 'last' / 'state.json').read_text())


def test_tied_weights_are_saved(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    net[1].weight = net[0].weight
    save_checkpoint(str(tmp_path / 'c'), net, {})
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    load_checkpoint(str(tmp_path / 'c'), other)
    assert torch.equal(other[1].weight, net[0].weight)


def test_a_save_that_stopped_between_renames_is_found(tmp_path):
    save_checkpoint(str(tmp_path / 'last'), model(), {'epoch': 3})
    (tmp_path / 'last').rename(tmp_path / 'last.old')
    assert load_checkpoint(str(tmp_path / 'last'), model()) == {'epoch': 3}


def test_what_cannot_be_read_is_one_line(tmp_path):
    folder = tmp_path / 'last'
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        load_checkpoint(str(folder), model())
    save_checkpoint(str(folder), model(), {'t': torch.ones(3)})
    with pytest.raises(ValueError, match='another model'):
        load_checkpoint(str(folder), timm.create_model('test_vit', num_classes=4))
    whole = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(whole[:-100])
    with pytest.raises(ValueError, match='not whole: model.safetensors has') as error:
        load_checkpoint(str(folder), model())
    assert '\n' not in str(error.value)
    (folder / 'model.safetensors').write_bytes(whole)
    (folder / 'state.json').write_text('{')
    with pytest.raises(ValueError, match='not whole: state.json'):
        load_checkpoint(str(folder), model())
