"""Which sizes a model takes, asked of real timm architectures."""
import pytest
import timm
import torch

from mixsize_timm.regime import Regime
from mixsize_timm.sizes import SizeProbe, fit_sizes, nearest_size


def probe(name, known_size, **kwargs):
    model = timm.create_model(name, num_classes=2, **kwargs)
    return SizeProbe(model, known_size=known_size)


def takes(name, known_size, candidates, **kwargs):
    accepts = probe(name, known_size, **kwargs)
    return [size for size in candidates if accepts(size)]


def test_resnet_takes_any_size():
    assert takes('resnet18', 224, [16, 57, 83, 224]) == [16, 57, 83, 224]


def test_convnext_needs_a_pixel_at_every_stage():
    assert takes('convnext_atto', 224, [16, 24, 32, 48, 50]) == [32, 48, 50]


def test_swin_takes_only_its_own():
    assert takes('swin_tiny_patch4_window7_224', 224, [192, 224, 256]) == [224]


def test_vit_14_with_a_dynamic_size_takes_multiples_of_14():
    sizes = takes('vit_small_patch14_dinov2', 518, [126, 128, 154, 224], dynamic_img_size=True)
    assert sizes == [126, 154, 224]


def test_hrnet_takes_multiples_of_32():
    assert takes('hrnet_w18_small', 224, [96, 104, 112, 128]) == [96, 128]


def test_maxvit_takes_only_its_own():
    assert takes('maxvit_rmlp_pico_rw_256', 256, [128, 224, 256]) == [256]


@pytest.mark.parametrize('name', ['test_resnet', 'test_convnext', 'test_vit'])
def test_the_meta_device_answers_as_the_cpu_does(name):
    model = timm.create_model(name, num_classes=2).eval()
    known = model.pretrained_cfg['input_size'][-1]
    accepts = SizeProbe(model, known_size=known)
    for size in (8, 16, 24, 33, 64, known):
        try:
            with torch.inference_mode():
                model(torch.zeros(1, 3, size, size))
            real = True
        except (RuntimeError, AssertionError):
            real = False
        assert accepts(size) == real, size


def test_a_model_that_fails_on_meta_is_asked_on_the_cpu():
    class NeedsValues(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 16, 16)

        def forward(self, x):
            assert x.sum().item() == 0  # has no answer on the meta device
            return self.conv(x).mean((2, 3))

    accepts = SizeProbe(NeedsValues(), known_size=32)
    assert accepts(16) and not accepts(8)


def test_probing_leaves_the_model_alone():
    model = timm.create_model('test_resnet', num_classes=2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    SizeProbe(model, known_size=32)(48)
    assert model.training
    assert all(v.device.type == 'cpu' and torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nearest_size_looks_a_quarter_away():
    assert nearest_size(lambda s: s % 14 == 0, 128) == 126
    assert nearest_size(lambda s: s % 32 == 0, 112) == 128  # the larger of two
    assert nearest_size(lambda s: s == 224, 128) == 0


def test_refused_sizes_move_and_merge():
    regime = Regime.preset('s224', 224)
    fitted, moved = fit_sizes(regime, lambda s: s % 14 == 0)
    assert moved == {128: 126, 160: 154, 192: 196, 256: 252, 288: 294, 320: 322}
    assert fitted.sizes == (126, 154, 196, 224, 252, 294, 322)
    merged, moved = fit_sizes(Regime.preset('cifar', 32), lambda s: s in (16, 32, 48) or s == 26)
    assert moved == {24: 26} and merged.sizes == (16, 26, 32, 48)


def test_refusal_names_the_sizes_that_would_do():
    with pytest.raises(ValueError, match='does not take images of 16, 24 px.* it takes 32, 40, 48, 56'):
        fit_sizes(Regime.preset('cifar', 32), probe('convnext_atto', 32))
    with pytest.raises(ValueError, match='Use --mixsize off'):
        fit_sizes(Regime.preset('s224', 224), lambda s: s == 224)
    with pytest.raises(ValueError, match='does not take images of 224 px'):
        fit_sizes(Regime((128,), base_size=224), lambda s: s == 128)
