"""Checkpoints: whole, exact, and without pickles."""
import hashlib
import json
import random

import numpy as np
import pytest
import timm
import torch
from conftest import save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from timm.optim import create_optimizer_v2

from mixsize_timm.checkpoint import SaveError, _safetensors, load_checkpoint, write_flushed
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


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
          torch.complex64]


@given(st.dictionaries(st.text(max_size=4), st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(DTYPES)),
                       max_size=6))
@settings(max_examples=60, deadline=None)
def test_safetensors_reads_every_bit_of_every_tensor(kinds):
    tensors = {name: torch.randint(0, 255, (*shape,)).to(dtype) for name, (shape, dtype) in kinds.items()}
    content = b''.join(_safetensors(tensors))
    again = load(content)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    length = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8:8 + length])
    assert header.pop('__metadata__') == {'format': 'pt'} and length % 8 == 0
    assert all(header[name]['data_offsets'][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_files_of_many_pieces_are_written_whole(tmp_path):
    parts = [b'header', memoryview(np.arange(700_000, dtype=np.int32)).cast('B'), b'', b'x' * (1 << 20)]
    said = write_flushed(str(tmp_path / 'file'), *parts)
    whole = b''.join(parts)
    assert (tmp_path / 'file').read_bytes() == whole
    assert said == {'size': len(whole), 'sha256': hashlib.sha256(whole).hexdigest()}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_not_numbers_are_not_saved_and_infinite_ones_are(tmp_path, dtype):
    weights = torch.full((40_000,), float('inf'), dtype=dtype)
    weights[7] = -weights[7]
    save_checkpoint(str(tmp_path / 'c'), {'w': weights, 'n': torch.tensor(3)})
    weights[39_999] = float('nan')
    with pytest.raises(SaveError, match='w holds what is not a number'):
        save_checkpoint(str(tmp_path / 'c'), {'w': weights, 'n': torch.tensor(3)})
    assert load_file(tmp_path / 'c' / 'model.safetensors')['w'][39_999] == float('inf')


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
