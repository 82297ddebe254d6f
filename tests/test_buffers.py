"""Memory of batches used again, but never while anything refers to it."""
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixsize_timm import Regime, create_loader
from mixsize_timm.buffers import Recycled, SharedSlots
from mixsize_timm.datasets import DigitsDataset

FLOAT, BYTE = torch.float32, torch.uint8


def shared(tensor, value, is_view):
    """Something else that has a tensor's memory."""
    tensor = torch.as_tensor(tensor)
    return tensor[-1:].detach() if is_view else tensor.numpy(), value


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(['new', 'drop', 'view']), st.integers(1, 40), st.sampled_from([FLOAT, BYTE])),
                max_size=30))
def test_what_is_held_in_any_way_keeps_its_values(steps):
    memory, held = Recycled(), []
    for value, (step, length, dtype) in enumerate(steps):
        if step == 'new':
            held.append((memory.empty((length, 2), dtype).fill_(value), value))
        elif held and step == 'drop':
            held.pop(length % len(held))
        elif held:
            held.append(shared(*held.pop(length % len(held)), length % 2))
    assert all((torch.as_tensor(kept) == value).all() for kept, value in held)


def test_memory_that_nothing_refers_to_is_used_again():
    memory = Recycled()
    first = memory.empty((4, 3), FLOAT)
    address = first.data_ptr()
    part = first[1:].view(-1)
    del first
    second = memory.empty((4, 3), FLOAT)
    assert second.data_ptr() != address and second.shape == (4, 3) and second.dtype == FLOAT
    del part
    third = memory.empty((7,), BYTE)  # smaller ones use it too
    assert third.data_ptr() == address
    del second, third
    large = memory.empty((40, 3), FLOAT)
    assert memory._free == [] and large.numel() == 120  # smaller blocks are let go


def sent(slots, worker, value, length=6):
    """A tensor filled in a worker and received in the main process; ``None`` where the worker finds no slot."""
    found = slots.empty(worker, (length,), BYTE)
    if found is None:
        return None
    found[0].fill_(value)
    return pickle.loads(pickle.dumps(found[1]))


def test_a_slot_is_free_again_when_nothing_refers_to_what_was_received():
    slots = SharedSlots(2, size=6, slots=2)
    one, two, other = sent(slots, 0, 1), sent(slots, 0, 2), sent(slots, 1, 3)
    assert sent(slots, 0, 4) is None, 'both slots of worker 0 are in use'
    assert [tensor.tolist() for tensor in (one, two, other)] == [[1] * 6, [2] * 6, [3] * 6]
    view = one[2:]
    del one
    assert sent(slots, 0, 4) is None
    del view
    again = sent(slots, 0, 5, length=3)
    assert again.tolist() == [5] * 3 and two.tolist() == [2] * 6


def test_a_batch_that_is_too_large_finds_no_slot():
    slots = SharedSlots(1, size=6, slots=2)
    assert slots.empty(0, (slots._size + 1,), BYTE) is None and slots.empty(0, (slots._size,), BYTE) is not None


def test_a_copy_of_the_process_frees_no_slot():
    slots = SharedSlots(1, size=6, slots=1)
    received = sent(slots, 0, 1)
    child = os.fork()
    if not child:
        del received
        os._exit(0)
    os.waitpid(child, 0)
    assert sent(slots, 0, 2) is None and received.tolist() == [1] * 6


def test_a_process_that_is_not_forked_has_no_slots():
    assert pickle.loads(pickle.dumps(SharedSlots(1, 6, 2))) is None


@pytest.mark.parametrize('prefetcher', [True, False])
def test_batches_that_are_kept_are_not_overwritten(prefetcher):
    def batches(workers):
        loader = create_loader(
            DigitsDataset(), (3, 16, 16), 64, True, regime=Regime((8, 16), base_size=16, batch_size=64), hflip=0.,
            num_workers=workers, device=torch.device('cpu'))
        loader = loader if prefetcher else loader.loader.loader  # uint8, as the workers send them
        return list(loader) + list(loader)

    for kept, expected in zip(batches(1), batches(0), strict=True):
        assert torch.equal(kept[0], expected[0]) and torch.equal(kept[1], expected[1])


def test_two_iterations_at_a_time_do_not_share_memory():
    loader = create_loader(
        DigitsDataset(), (3, 16, 16), 64, True, regime=Regime.fixed(16, batch_size=64), hflip=0., num_workers=1,
        persistent_workers=False, device=torch.device('cpu')).loader.loader
    first = iter(loader)
    started = [next(first)]
    expected = list(loader)  # while the workers of the first go on
    for kept, batch in zip(started + list(first), expected, strict=True):
        assert torch.equal(kept[0], batch[0]) and torch.equal(kept[1], batch[1])
