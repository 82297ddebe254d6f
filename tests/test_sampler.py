"""The epoch plan: coverage, equality across ranks, determinism, shares."""
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixsize_timm import sampler as sampler_module
from mixsize_timm.regime import Regime
from mixsize_timm.sampler import (
    DealtBatchSampler,
    EpochPlan,
    MixSizeBatchSampler,
    describe_annealing,
    describe_plan,
    image_shares,
    plan_epoch,
    size_batches,
)

REGIMES = [
    Regime.preset('cifar', 32, batch_size=16, adapt='d+'),
    Regime.preset('cifar', 32, batch_size=16, adapt='b+'),
    Regime.preset('s224', 224, batch_size=8, adapt='bd+', duplicates=2),
]


def epoch_of_rank(regime, rank, world_size, **kwargs):
    sampler = MixSizeBatchSampler(1437, regime, rank=rank, world_size=world_size, **kwargs)
    return sampler, list(sampler)


@pytest.mark.parametrize('world_size', [1, 2, 4])
@pytest.mark.parametrize('regime', REGIMES, ids=lambda r: r.adapt)
def test_ranks_together_see_each_planned_image_once(regime, world_size):
    ranks = [epoch_of_rank(regime, rank, world_size) for rank in range(world_size)]
    seen = np.concatenate([group.images for _, groups in ranks for group in groups])
    dropped = ranks[0][0].plan.dropped
    assert len(seen) == 1437 - dropped
    assert len(np.unique(seen)) == len(seen)
    assert dropped < min(regime.group(s)[0] for s in regime.sizes) * world_size


@pytest.mark.parametrize('world_size', [2, 4])
@pytest.mark.parametrize('regime', REGIMES, ids=lambda r: r.adapt)
def test_all_ranks_take_the_same_shape_at_the_same_step(regime, world_size):
    shapes = [[(g.size, len(g.images), g.batch, g.duplicates, g.step) for g in epoch_of_rank(regime, r, world_size)[1]]
              for r in range(world_size)]
    assert all(s == shapes[0] for s in shapes[1:])


def test_many_images_are_shuffled_in_parts_and_every_order_is_as_likely(monkeypatch):
    for name, value in {'SHUFFLED_AT_ONCE': 1, 'PARTS': 3, 'CHUNK': 2}.items():
        monkeypatch.setattr(sampler_module, name, value)
    rng = np.random.default_rng(0)
    orders = Counter(tuple(sampler_module._shuffled(5, rng)) for _ in range(24_000))
    assert len(orders) == 120 and all(sorted(order) == list(range(5)) for order in orders)
    chi_squared = sum((seen - 200)**2 / 200 for seen in orders.values())
    assert 119 - 4 * 15.4 < chi_squared < 119 + 4 * 15.4  # mean and four standard deviations of chi squared


def test_one_seed_gives_one_plan_and_another_epoch_another():
    def signature(seed, epoch):
        plan = plan_epoch(REGIMES[0], 1437, seed=seed, epoch=epoch)
        return plan.order.tolist(), plan.size.tolist()
    assert signature(1, 0) == signature(1, 0)
    for other in (signature(1, 1), signature(2, 0)):
        assert signature(1, 0)[0] != other[0] and signature(1, 0)[1] != other[1]


def test_the_plan_is_pinned():
    """A change of the stream would break the resumption of every run that is under way."""
    plan = plan_epoch(Regime.preset('cifar', 32, batch_size=4), 40, seed=42, epoch=3)
    assert plan.order[:8].tolist() == [28, 39, 29, 25, 8, 10, 24, 11]
    assert plan.size.tolist() == [24, 16, 24, 16, 24, 32, 32, 32, 48, 48, 48, 48]


def test_a_fresh_partition_gives_an_image_every_size_in_time():
    sizes = set()
    for epoch in range(40):
        for group in plan_epoch(REGIMES[0], 1437, epoch=epoch).groups():
            if 7 in group.images:
                sizes.add(group.size)
    assert sizes == {16, 24, 32, 48}


def test_steps_of_all_sizes_are_shuffled_together():
    sizes = plan_epoch(REGIMES[0], 1437).size
    changes = np.count_nonzero(sizes[1:] != sizes[:-1])
    assert changes > len(sizes) / 3


def test_shares_are_over_images():
    regime = Regime.preset('s144', 224, batch_size=64, adapt='b+')
    plan = plan_epoch(regime, 200_000)
    for size, prob in zip(regime.sizes, regime.probs):
        assert plan.batch[plan.size == size].sum() / 200_000 == pytest.approx(prob, abs=0.005)


def test_small_data_on_many_ranks_loses_no_size():
    regime = Regime.preset('s224', 224, batch_size=64, adapt='d+')
    ours = size_batches(regime, 3068, world_size=8)
    assert all(ours.values())
    assert sum(map(sum, ours.values())) > 3068 * 0.9
    assert all(batch % 8 == 0 for batches in ours.values() for batch in batches)
    reference = size_batches(regime, 3068, world_size=8, drop='reference')
    assert [size for size, batches in reference.items() if not batches] == [128, 160, 192, 256, 288]
    assert 1 - sum(map(sum, reference.values())) / 3068 == pytest.approx(0.75, abs=0.01)


def test_reference_rule_drops_the_tail_of_each_size():
    regime = Regime.preset('cifar', 32, batch_size=64, adapt='b+')
    batches = size_batches(regime, 1437, drop='reference')
    shares = dict(zip(regime.sizes, image_shares(regime.probs, 1437)))
    assert {s: sum(b) for s, b in batches.items()} == {
        s: shares[s] // regime.group(s)[0] * regime.group(s)[0] for s in regime.sizes}


def test_what_is_lost_is_said():
    regime = Regime.preset('s224', 224, batch_size=64)
    table, warnings = describe_plan(regime, 3068, world_size=8, drop='reference')
    assert '320' in table and 'peak work 1.65x at 288 px' in table
    assert [w for w in warnings if 'No step at 128 px' in w] and [w for w in warnings if '75% ' in w or '(75%)' in w]
    assert describe_plan(regime, 50_000)[1] == []


def test_no_batch_at_all_is_an_error():
    with pytest.raises(ValueError, match='make no batch at any size'):
        MixSizeBatchSampler(3, Regime.fixed(32, batch_size=8), world_size=8)


def test_accumulated_groups_share_a_size_and_sum_to_one():
    plan = plan_epoch(REGIMES[1], 1437, grad_accum_steps=3)
    groups = list(plan.groups())
    by_step = [[g for g in groups if g.step == step] for step in range(plan.num_steps)]
    assert max(map(len, by_step)) == 3
    for step in by_step:
        assert len({g.size for g in step}) == 1
        assert sum(g.weight for g in step) == pytest.approx(1)
        assert [g.ends_step for g in step] == [False] * (len(step) - 1) + [True]


def test_plan_of_a_foreign_loader_accumulates_as_timm():
    plan = EpochPlan.of_loader(7, size=32, batch=8, grad_accum_steps=3)
    groups = list(plan.groups())
    assert [g.ends_step for g in groups] == [False, False, True, False, False, True, True]
    assert [g.weight for g in groups] == pytest.approx([1 / 3] * 6 + [1])
    assert plan.num_steps == 3 and groups[0].images is None


def test_index_arrays_stay_small():
    plan = plan_epoch(Regime.preset('s224', batch_size=128), 1_281_167)
    assert plan.order.dtype == np.int32 and plan.order.nbytes < 6e6
    assert plan.dropped < 128


def test_a_sampler_of_imagenet_21k_stays_small_from_epoch_to_epoch():
    regime = Regime.preset('s144', batch_size=256, adapt='b+')
    tracemalloc.start()
    try:
        sampler = MixSizeBatchSampler(14_197_122, regime, rank=63, world_size=64)
        sampler.set_epoch(1)
        images = sum(len(group.images) for group in sampler)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert images == int(sampler.plan.batch.sum()) // 64
    assert peak < 90e6  # 57 MB of indices, and 14 to shuffle: the plan of one epoch gives way to that of the next


@settings(deadline=None)
@given(
    num_images=st.integers(1, 5000), world_size=st.integers(1, 8), batch_size=st.integers(4, 96),
    adapt=st.sampled_from(['b+', 'd+', 'bd+', 'none']), multiple=st.sampled_from([1, 2]),
    drop=st.sampled_from(['tail', 'reference']), accum=st.integers(1, 3))
def test_any_plan_is_whole(num_images, world_size, batch_size, adapt, multiple, drop, accum):
    regime = Regime.preset('cifar', 32, batch_size=batch_size, adapt=adapt, batch_multiple=multiple)
    batches = size_batches(regime, num_images, world_size, drop)
    assert all(b % (world_size * multiple) == 0 and b > 0 for group in batches.values() for b in group)
    used = sum(map(sum, batches.values()))
    assert used <= num_images
    if not used:
        return
    plan = plan_epoch(regime, num_images, world_size=world_size, drop=drop, grad_accum_steps=accum)
    images = np.concatenate([g.images for rank in range(world_size) for g in plan.groups(rank, world_size)])
    assert len(np.unique(images)) == len(images) == used == num_images - plan.dropped
    assert images.min() >= 0 and images.max() < num_images
    if drop == 'tail':
        smallest = min(regime.group(s)[0] for s in regime.sizes) * world_size
        assert plan.dropped < smallest


@settings(deadline=None, max_examples=40)
@given(num_images=st.integers(300, 3000), anneal=st.floats(-1, 1), epochs=st.integers(1, 7),
       adapt=st.sampled_from(['b+', 'd+']), accum=st.integers(1, 3), drop=st.sampled_from(['tail', 'reference']))
def test_the_epochs_of_an_annealed_run_follow_on_each_other(num_images, anneal, epochs, adapt, accum, drop):
    """A step has one number in the run, however many the epochs before it had."""
    regime = Regime.preset('cifar', 32, batch_size=16, adapt=adapt, anneal=anneal, epochs=epochs)
    sampler = MixSizeBatchSampler(num_images, regime, grad_accum_steps=accum, drop=drop)
    before = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        assert sampler.plan.steps_before == sampler.steps_before(epoch) == before
        before += sampler.plan.num_steps
        full = {size: regime.group(size)[0] for size in regime.sizes}
        if anneal:  # no size is kept with a batch of a few
            assert all(batch == full[size] for size, batch in zip(sampler.plan.size, sampler.plan.batch))
    assert sampler.steps_before(epochs) == before


def test_an_annealed_run_costs_what_the_run_without_costs():
    runs = [Regime.preset('s224', 96, batch_size=16, adapt='b+', anneal=anneal, epochs=10) for anneal in (0, 1, -0.5)]
    flat, *annealed = (sum(int((plan.size**2 * plan.batch * plan.duplicates).sum()) for plan in (
        plan_epoch(regime, 20_000, epoch=epoch) for epoch in range(10))) for regime in runs)
    assert annealed == pytest.approx([flat, flat], rel=0.005)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9), st.integers(0, 10_000))
def test_shares_add_up(weights, num_images):
    probs = [w / sum(weights) for w in weights]
    shares = image_shares(probs, num_images)
    assert sum(shares) == num_images
    assert all(abs(share - p * num_images) < 1 + 1e-6 for share, p in zip(shares, probs))


@given(num_images=st.integers(1, 60), batch_size=st.integers(1, 9), num_batches=st.none() | st.integers(1, 20),
       world_size=st.integers(1, 4), seed=st.integers(0, 5))
def test_dealt_batches_are_the_same_for_any_number_of_processes(num_images, batch_size, num_batches, world_size, seed):
    arguments = num_images, 32, batch_size, num_batches, seed
    one = [group.images.tolist() for group in DealtBatchSampler(*arguments)]
    dealt = [[group.images.tolist() for group in DealtBatchSampler(*arguments, rank, world_size)]
             for rank in range(world_size)]
    assert sorted(batch for part in dealt for batch in part) == sorted(one)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    images = [image for batch in one for image in batch]
    assert len(set(images)) == len(images)
    batch_size = max(batch_size, 2)
    assert all(len(batch) == batch_size for batch in one[:-1])
    assert len(one[-1]) in range(2, batch_size + 2) or num_images == 1  # no image is alone
    assert num_batches is not None or len(images) == num_images
    assert len(one) == min(num_batches or num_images, max(1, (num_images + batch_size - 2) // batch_size))


def test_an_annealed_regime_says_where_it_begins_and_ends():
    regime = Regime.preset('cifar', 32, batch_size=16, anneal=1, epochs=4)
    line, = describe_annealing(regime)
    assert line in describe_plan(regime, 1000)[0]
    first, last = (', '.join(f'{size}: {prob:.3f}' for size, prob in zip(at.sizes, at.probs))
                   for at in (regime.at(0), regime.at(3)))
    assert f'shares of {first} in the first epoch, {last} in the last' in line
    assert describe_annealing(Regime.preset('cifar', 32)) == []
