"""Regularisation by size: what is scaled, by how much, and what stays."""
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data import FastCollateMixup, Mixup
from timm.data.auto_augment import AugmentOp

from mixsize_timm import Regime, create_loader
from mixsize_timm.datasets import DigitsDataset
from mixsize_timm.regularization import SizeRegularization


@given(strength=st.floats(0, 3), base=st.integers(16, 512), sizes=st.lists(st.integers(8, 1024), min_size=2))
def test_the_factor_grows_with_the_size_and_is_one_at_the_base(strength, base, sizes):
    regularization = SizeRegularization(strength, base)
    factors = [regularization.factor(size) for size in sorted(sizes)]
    assert regularization.factor(base) == 1
    assert factors == sorted(factors) and factors[0] >= 0


def test_strength_one_is_in_proportion_to_the_size():
    assert SizeRegularization(1, 224).factor(112) == 0.5
    assert SizeRegularization(1, 224).factor(448) == 2
    assert SizeRegularization(0.5, 224).factor(448) == 1.5
    with pytest.raises(ValueError, match='must not be negative'):
        SizeRegularization(-1, 224)


def test_dropout_and_stochastic_depth_of_a_model_follow_the_size():
    model = timm.create_model('test_convnext', drop_rate=0.2, drop_path_rate=0.4)
    rates = {name: m.drop_prob for name, m in model.named_modules() if type(m).__name__ == 'DropPath'}
    regularization = SizeRegularization(1, 32, model)
    for size, factor in ((16, 0.5), (48, 1.5), (32, 1)):
        regularization.set_size(size)
        for name, rate in rates.items():
            assert model.get_submodule(name).drop_prob == pytest.approx(rate * factor)
        assert model.head.drop.p == pytest.approx(0.2 * factor)
    regularization.set_size(3200)
    assert max(model.get_submodule(name).drop_prob for name in rates) == 0.99


def test_dropout_that_a_model_calls_as_a_function_follows_too():
    model = timm.create_model('test_efficientnet', drop_rate=0.2)
    SizeRegularization(1, 32, model).set_size(16)
    assert model.drop_rate == pytest.approx(0.1)


@pytest.mark.parametrize('cls', [Mixup, FastCollateMixup])
def test_mixup_and_cutmix_follow_the_size(cls):
    mixup = cls(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
    regularization = SizeRegularization(1, 32, mixup=mixup)
    regularization.set_size(16)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.1, 0.5)
    regularization.set_size(64)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.4, 2.0)
    minmax = cls(cutmix_minmax=(0.2, 0.8), num_classes=10)
    SizeRegularization(1, 32, mixup=minmax).set_size(16)
    assert minmax.cutmix_minmax == (0.1, 0.4)


@pytest.mark.parametrize('config, scaled', [
    ('rand-m9-mstd0.5-inc1', 'rand-m4-mstd0.5-inc1'), ('rand-mstd0.5-m8', 'rand-mstd0.5-m4'), ('rand', 'rand-m5'),
    ('augmix-m5-w4-d2', 'augmix-m2-w4-d2'), ('original-mstd0.5', 'original-mstd0.5'), (None, None),
])
def test_the_magnitude_of_a_policy_is_halved_at_half_the_size(config, scaled):
    result = SizeRegularization(1, 32).augmentation(16, config, 0.4)
    assert result == {'auto_augment': scaled, 'color_jitter': 0.2}
    assert SizeRegularization(1, 32).augmentation(16, None, (0.4, 0.2))['color_jitter'] == (0.2, 0.1)


def transforms_of(**kwargs):
    regime = Regime.preset('cifar', 32, batch_size=8)
    loader = create_loader(DigitsDataset(), (3, 32, 32), 8, is_training=True, regime=regime, num_workers=0,
                           device=torch.device('cpu'), **kwargs)
    return loader.dataset


def test_the_loader_scales_the_augmentation_of_each_size():
    def magnitude(transform):
        policy = next(t for t in transform.transforms if hasattr(t, 'ops'))
        assert all(isinstance(op, AugmentOp) for op in policy.ops)
        return policy.ops[0].magnitude

    dataset = transforms_of(auto_augment='rand-m8', size_reg=1.)
    assert {size: magnitude(t) for size, t in dataset.maker.transforms.items()} == {16: 4, 24: 6, 32: 8, 48: 12}
    dataset = transforms_of(auto_augment='rand-m8')
    assert {magnitude(t) for t in dataset.maker.transforms.values()} == {8} and dataset.maker.set_size is None


def test_the_loader_scales_its_mixup_batch_by_batch():
    mixup = FastCollateMixup(mixup_alpha=0.4, num_classes=10)
    dataset = transforms_of(collate_fn=mixup, size_reg=1.)
    dataset.maker.set_size(16)
    assert mixup.mixup_alpha == pytest.approx(0.2)
