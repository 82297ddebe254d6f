"""Regime: every number of REFERENCE.md's tables, and what holds for any regime."""
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixsize_timm.regime import ADAPT_MODES, Regime

B_PLUS_224 = {128: 196, 160: 125, 192: 87, 224: 64, 256: 49, 288: 39, 320: 31}
D_PLUS_224 = {128: (64, 3), 160: (64, 2), 192: (64, 1), 224: (64, 1), 256: (64, 1), 288: (64, 1), 320: (31, 1)}
BD_PLUS_224 = {128: (112, 2), 160: (90, 1), 192: (75, 1), 224: (64, 1), 256: (56, 1), 288: (50, 1), 320: (45, 1)}


def groups(regime):
    return {size: regime.group(size) for size in regime.sizes}


@pytest.mark.parametrize('preset, base_size, probs', [
    ('s224', 224, {128: .8 / 6, 160: .8 / 6, 192: .8 / 6, 224: .2, 256: .8 / 6, 288: .8 / 6, 320: .8 / 6}),
    ('s144', 224, {96: .2, 128: .6, 224: .1, 256: .1}),
    ('cifar', 32, {16: .2, 24: .3, 32: .3, 48: .2}),
])
def test_presets_are_the_papers(preset, base_size, probs):
    regime = Regime.preset(preset, base_size)
    assert dict(zip(regime.sizes, regime.probs)) == pytest.approx(probs)


@pytest.mark.parametrize('preset, base_size, adapt, expected', [
    ('s224', 224, 'b+', {s: (b, 1) for s, b in B_PLUS_224.items()}),
    ('s224', 224, 'd+', D_PLUS_224),
    ('s224', 224, 'bd+', BD_PLUS_224),
    ('s224', 224, 'none', dict.fromkeys(B_PLUS_224, (64, 1))),
    ('s144', 224, 'b+', {96: (348, 1), 128: (196, 1), 224: (64, 1), 256: (49, 1)}),
    ('s144', 224, 'd+', {96: (64, 5), 128: (64, 3), 224: (64, 1), 256: (64, 1)}),
    ('cifar', 32, 'b+', {16: (256, 1), 24: (114, 1), 32: (64, 1), 48: (28, 1)}),
    ('cifar', 32, 'd+', {16: (64, 4), 24: (64, 2), 32: (64, 1), 48: (28, 1)}),
])
def test_batches_and_duplicates_are_the_references(preset, base_size, adapt, expected):
    assert groups(Regime.preset(preset, base_size, adapt=adapt, batch_size=64)) == expected


@pytest.mark.parametrize('preset, adapt, cost', [
    ('s144', 'b+', 0.463), ('s144', 'd+', 1.00), ('s224', 'b+', 1.08), ('s224', 'd+', 1.23)])
def test_relative_costs_are_the_references(preset, adapt, cost):
    assert Regime.preset(preset, 224, adapt=adapt).relative_cost == pytest.approx(cost, abs=0.005)


def test_mean_size_and_speed_up():
    assert Regime.preset('s224').mean_size == pytest.approx(224)
    assert Regime.preset('s144').mean_size == pytest.approx(144)
    assert 1 / Regime.preset('s144', adapt='b+').relative_cost == pytest.approx(2.16, abs=0.005)


def test_work_of_each_d_plus_step():
    regime = Regime.preset('s224', adapt='d+', batch_size=64)
    work = [round(regime.relative_work(size), 2) for size in regime.sizes]
    assert work == [0.98, 1.02, 0.73, 1.00, 1.31, 1.65, 0.99]
    assert regime.peak_work == pytest.approx(1.653, abs=0.001)


def test_max_work_caps_every_step():
    regime = Regime.preset('s224', adapt='d+', batch_size=64, max_work=1.0)
    assert regime.peak_work <= 1
    assert regime.group(288) == (38, 1) and regime.group(224) == (64, 1)


@given(base_size=st.integers(32, 500), batch_size=st.integers(4, 1000), adapt=st.sampled_from(ADAPT_MODES))
def test_a_batch_can_be_the_mean_over_the_steps(base_size, batch_size, adapt):
    """But for what rounding the batches does, and also after sizes were moved; an annealed run keeps its batches."""
    regime = Regime.preset('s144', base_size, batch_size=batch_size, adapt=adapt, batch_of='mean', anneal=1, epochs=3)
    largest = regime.sizes[-1]
    for one in (regime, regime.with_sizes({largest: largest + 32})):
        assert one.batch_size == batch_size
        rounded = one.base_batch, min(one.group(size)[0] for size in one.sizes)
        bound = math.prod(1 + 0.5 / (batch - 0.5) for batch in rounded)
        assert 1 / bound <= one.mean_batch / batch_size <= bound
        assert base_size not in one.sizes or one.group(base_size)[0] == one.base_batch
    for epoch in range(3):
        of_epoch = regime.at(epoch)
        assert sum(of_epoch.probs) == pytest.approx(1) and of_epoch.anneal == 0
        assert of_epoch.base_batch == regime.base_batch
        assert all(of_epoch.group(size) == regime.group(size) for size in of_epoch.sizes)


def test_the_batch_at_the_base_size_is_what_makes_the_mean():
    """Of B+ that is the batch times the mean area of an image: at s144 46.3 per cent."""
    regime = Regime.preset('a144', batch_size=64, epochs=90)
    assert (regime.base_batch, regime.batch_of, regime.adapt, regime.anneal) == (30, 'mean', 'b+', 1)
    assert groups(regime) == {96: (163, 1), 128: (92, 1), 224: (30, 1), 256: (23, 1)}
    assert regime.relative_work(224) == pytest.approx(30 / 64)  # of 64 images, as one size has them
    assert Regime.preset('a144', batch_size=64, epochs=90, max_work=0.4).group(128) == (78, 1)


def test_most_images_at_half_the_size_in_a_mean_batch():
    """The mean area of an image is 0.325 of that at the base size."""
    regime = Regime.preset('a123', batch_size=64, epochs=90)
    assert regime.probs == pytest.approx((0.9, 0.1)) and groups(regime) == {112: (84, 1), 224: (21, 1)}
    assert (regime.batch_of, regime.adapt, regime.anneal) == ('mean', 'b+', 1)
    assert Regime.preset('a123', base_size=96, batch_size=64, epochs=9).sizes == (48, 96)


def test_what_a_preset_brings_gives_way_to_what_is_said():
    said = Regime.preset('a144', adapt='d+', anneal=0., batch_of='base', batch_size=64)
    assert said == Regime.preset('s144', adapt='d+', batch_size=64)
    with pytest.raises(ValueError, match='number of epochs'):
        Regime.preset('a144')


def test_half_is_rounded_to_even_exactly():
    assert Regime((30, 36), base_size=30, batch_size=18, adapt='b+').group(36) == (12, 1)  # 12.5
    assert Regime((30, 36), base_size=30, batch_size=54, adapt='b+').group(36) == (38, 1)  # 37.5


@pytest.mark.parametrize(
    'preset, base_size', [('s224', 96), ('s224', 160), ('s144', 299), ('cifar', 28), ('s224', 518)])
def test_scaled_presets_round_to_eight_and_keep_the_base(preset, base_size):
    regime = Regime.preset(preset, base_size)
    assert base_size in regime.sizes
    assert all(size % 8 == 0 for size in regime.sizes if size != base_size)
    assert sum(regime.probs) == pytest.approx(1)


def test_sizes_that_meet_merge_their_probabilities():
    tiny = Regime.preset('cifar', 16)  # 8, 12 and 16: 12 rounds to 16
    assert dict(zip(tiny.sizes, tiny.probs)) == pytest.approx({8: .2, 16: .6, 24: .2})
    moved = Regime.preset('cifar', 32).with_sizes({24: 32})
    assert dict(zip(moved.sizes, moved.probs)) == pytest.approx({16: .2, 32: .6, 48: .2})


def test_survives_yaml_and_compares():
    regime = Regime.preset('s144', 224, adapt='bd+', duplicates=2, max_work=1.5, batch_multiple=2)
    again = Regime.from_dict(yaml.safe_load(yaml.safe_dump(regime.to_dict())))
    assert again == regime and hash(again) == hash(regime) and groups(again) == groups(regime)
    assert again != Regime.preset('s144', 224)
    assert 'bd+' in repr(regime)


@pytest.mark.parametrize('arguments, message', [
    (dict(sizes=()), 'at least one size'),
    (dict(sizes=(32, 32)), 'stands twice'),
    (dict(sizes=(32, -1)), 'at least 1'),
    (dict(sizes=(32, 48), probs=(1.0,)), '2 sizes but 1 probabilities'),
    (dict(sizes=(32, 48), probs=(1.5, -0.5)), 'not negative'),
    (dict(sizes=(32, 48), probs=(float('nan'), 1)), 'finite'),
    (dict(sizes=(32, 48), probs=(0, 0)), 'all probabilities are zero'),
    (dict(sizes=(32,), batch_size=0), 'batch_size'),
    (dict(sizes=(32,), duplicates=0), 'duplicates'),
    (dict(sizes=(32,), adapt='c+'), 'adapt must be one of'),
    (dict(sizes=(32,), max_work=0), 'max_work'),
    (dict(sizes=(32,), anneal=1.5, epochs=3), 'anneal must be from -1 to 1'),
    (dict(sizes=(32,), anneal=1), 'number of epochs'),
    (dict(sizes=(32,), batch_of='median'), 'batch_of must be one of base, mean'),
    (dict(sizes=(448,), batch_size=1, adapt='b+'), 'rounds to zero at 448 px'),
])
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regime(**arguments)


def test_unknown_preset_is_named():
    with pytest.raises(ValueError, match='s224, s144, cifar'):
        Regime.preset('s300')


regimes = st.builds(
    Regime,
    sizes=st.lists(st.integers(8, 512), min_size=1, max_size=8, unique=True).map(tuple),
    base_size=st.integers(32, 448),
    batch_size=st.integers(256, 1024),  # large enough that no size's batch rounds to zero
    duplicates=st.integers(1, 4),
    adapt=st.sampled_from(ADAPT_MODES),
)


@given(regimes)
def test_any_regime_stays_near_its_budget(regime):
    base = regime.base_size**2 * regime.batch_size * regime.duplicates
    for size in regime.sizes:
        batch, duplicates = regime.group(size)
        assert batch >= 1 and duplicates >= 1
        if regime.adapt == 'b+':  # only rounding is between the work and the budget
            assert abs(size**2 * batch * duplicates - base) <= size**2 * duplicates / 2 + 1e-6
        if regime.adapt == 'none':
            assert (batch, duplicates) == (regime.batch_size, regime.duplicates)


@given(regimes, st.data())
def test_zero_probabilities_leave_sizes_out(regime, data):
    weights = data.draw(st.lists(st.floats(0, 10), min_size=len(regime.sizes), max_size=len(regime.sizes)))
    if not any(weights):
        weights[0] = 1.0
    weighted = Regime(regime.sizes, tuple(weights), regime.base_size, regime.batch_size)
    assert weighted.sizes == tuple(s for s, w in zip(regime.sizes, weights) if w > 0)
    assert sum(weighted.probs) == pytest.approx(1)
    assert min(weighted.sizes) <= weighted.mean_size + 1e-9 and weighted.mean_size <= max(weighted.sizes) + 1e-9


def test_annealing_moves_the_shares_from_small_sizes_to_large_ones():
    regime = Regime.preset('cifar', 32, anneal=1, epochs=5)
    first, middle, last = (regime.at(epoch) for epoch in (0, 2, 4))
    assert first.sizes == (16, 24, 32) or first.probs[-1] < 0.01  # the one that is farthest has next to nothing
    assert dict(zip(middle.sizes, middle.probs)) == pytest.approx(dict(zip(regime.sizes, regime.probs)))
    assert first.mean_size < middle.mean_size < last.mean_size
    assert max(dict(zip(last.sizes, last.probs)).values()) <= 2 * max(regime.probs)
    assert last == regime.at(99) and Regime.preset('cifar', 32).at(3) == Regime.preset('cifar', 32)
    backwards = Regime.preset('cifar', 32, anneal=-1, epochs=5)
    assert backwards.at(0).mean_size == pytest.approx(last.mean_size)


@given(regimes, st.floats(-1, 1), st.integers(1, 20), st.data())
def test_annealed_or_not_every_size_keeps_its_share_of_a_run(regime, anneal, epochs, data):
    weights = data.draw(st.lists(st.floats(0.01, 1), min_size=len(regime.sizes), max_size=len(regime.sizes)))
    annealed = Regime(regime.sizes, tuple(weights), regime.base_size, regime.batch_size, regime.duplicates,
                      regime.adapt, anneal=anneal, epochs=epochs)
    total = dict.fromkeys(annealed.sizes, 0.)
    for epoch in range(epochs):
        at = annealed.at(epoch)
        assert sum(at.probs) == pytest.approx(1) and not at.anneal
        for size, prob in zip(at.sizes, at.probs):
            total[size] += prob / epochs
            assert at.group(size) == annealed.group(size)
    assert total == pytest.approx(dict(zip(annealed.sizes, annealed.probs)), abs=1e-6)
