"""The networks for CIFAR: what the papers say of them, what timm promises, and what this package does with models."""
import warnings

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.layers import DropPath
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from torch import nn

from mixsize_timm import architectures, calibrate, hub, load, train
from mixsize_timm.bn_stats import fingerprint
from mixsize_timm.measure import count_gmacs
from mixsize_timm.sizes import SizeProbe

KINDS = ('resnet8_cifar', 'wrn16_4_cifar')  # one with batch norm behind the convolutions, one with it before
MILLIONS = {'resnet8_cifar': 0.08, 'resnet20_cifar': 0.27, 'resnet44_cifar': 0.66, 'wrn16_4_cifar': 2.7,
            'wrn28_10_cifar': 36.5}


def of_shape(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


def test_timm_lists_them():
    assert set(timm.list_models(module='architectures')) == set(MILLIONS)
    assert not timm.list_pretrained('*_cifar')


@pytest.mark.parametrize('name', MILLIONS)
def test_depth_and_parameters_are_those_of_the_papers(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 2 if MILLIONS[name] < 1 else 1) == MILLIONS[name]
    kernels = [layer.kernel_size for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    # one paper counts all convolutions, the other those off the shortcuts and the classifier
    counted = len(kernels) if name.startswith('wrn') else kernels.count((3, 3)) + 1
    assert counted == int(''.join(filter(str.isdigit, name.split('_')[0])))


def test_operations_are_those_of_the_papers():
    assert count_gmacs(make('resnet44_cifar'), (3, 32, 32)) == pytest.approx(0.0973, rel=0.01)
    with torch.device('meta'):
        wide = timm.create_model('wrn28_10_cifar')
    assert count_gmacs(wide, (3, 32, 32)) == pytest.approx(5.25, rel=0.01)


def test_only_where_the_shape_changes_is_a_shortcut_convolved():
    for name, changing in zip(KINDS, (('layer2.0', 'layer3.0'), ('layer1.0', 'layer2.0', 'layer3.0'))):
        blocks = {key: block for key, block in make(name).named_modules() if hasattr(block, 'downsample')}
        assert tuple(key for key, block in blocks.items() if block.downsample is not None) == changing


def test_a_block_of_a_resnet_begins_as_its_shortcut_and_convolutions_with_the_variance_of_fan_out():
    model = make('resnet20_cifar')
    images = of_shape(2, 16, 8, 8).relu()
    assert torch.equal(model.layer1(images), images)
    assert all((block.bn2.weight == 0).all() for block in model.modules() if isinstance(block, BasicBlock))
    for net in (model, make('wrn16_4_cifar')):
        weight = net.layer3[1].conv1.weight.detach()
        assert weight.std() == pytest.approx((2 / (9 * len(weight))) ** 0.5, rel=0.03)


def test_any_size_is_taken(name):
    takes = SizeProbe(make(name), known_size=32)
    assert all(takes(size) for size in (1, 8, 17, 32, 48, 224, (24, 40)))
    assert make(name).forward_features(of_shape(1, 3, 17, 32)).shape[2:] == (5, 8)


def test_timms_options_are_taken(name):
    model = make(name, num_classes=7, in_chans=1, drop_rate=0.5, drop_path_rate=0.2, global_pool='catavgmax')
    images = of_shape(2, 1, 32, 32)
    hidden = model.forward_head(model.forward_features(images), pre_logits=True)
    assert model(images).shape == (2, 7) and hidden.shape == (2, model.head_hidden_size)
    rates = [layer.drop_prob for layer in model.modules() if isinstance(layer, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.2)
    assert not torch.equal(model.train()(images), model(images))
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        make(name, pretrained=True)


def test_the_classifier_is_changed_and_taken_off(name):
    model, images = make(name), of_shape(2, 3, 32, 32)
    assert model.get_classifier() is model.fc and model.fc.out_features == model.num_classes == 10
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(0, '')
    assert torch.equal(model(images), model.forward_features(images))


def test_intermediates_are_those_of_features_only(name):
    model, images = make(name), of_shape(1, 3, 32, 32)
    features, stages = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    listed = make(name, features_only=True)
    listed.load_state_dict(model.state_dict(), strict=False)
    assert [tuple(stage.shape[1:]) for stage in stages] == [
        (channels, 32 // reduction, 32 // reduction)
        for channels, reduction in zip(listed.feature_info.channels(), listed.feature_info.reduction())]
    for stage, other in zip(stages, listed(images)):
        assert torch.equal(stage, other)
    last = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    assert torch.equal(last[0], features)
    early = model.forward_intermediates(images, [0, 1], stop_early=True, intermediates_only=True)
    assert all(map(torch.equal, early, stages))


def test_pruned_it_gives_the_intermediates_that_are_left(name):
    model, images = make(name), of_shape(1, 3, 32, 32)
    _, stages = model.forward_intermediates(images)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    assert torch.equal(model(images), stages[2]) and not list(model.layer3.parameters())
    assert model.num_features == stages[2].shape[1]


def test_checkpointing_gradients_changes_nothing(name):
    gradients = []
    for enable in (False, True):
        model = make(name).train()
        model.set_grad_checkpointing(enable)
        model(of_shape(4, 3, 16, 16)).logsumexp(1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_learning_rates_decay_from_the_head_to_the_stem(name):
    model = make(name)
    groups = create_optimizer_v2(model, 'sgd', lr=1., layer_decay=0.5).param_groups
    scale = {id(parameter): group['lr_scale'] for group in groups for parameter in group['params']}
    stages = [model.conv1, model.layer1[0], model.layer2[0], model.layer3[0], model.fc]
    scales = [{scale[id(parameter)] for parameter in stage.parameters()} for stage in stages]
    assert all(len(found) == 1 for found in scales)
    values = [found.pop() for found in scales]
    assert values == sorted(set(values)) and values[-1] == 1


def test_it_is_compiled_by_torchscript(name):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', (DeprecationWarning, FutureWarning))
        scripted = torch.jit.script(make(name, scriptable=True))
    images = of_shape(2, 3, 24, 24)
    torch.testing.assert_close(scripted(images), make(name)(images))


def test_torch_warns_of_nothing(name, recwarn):
    model = make(name).train()
    model(of_shape(2, 3, 32, 32)).sum().backward()
    model.to(memory_format=torch.channels_last)(of_shape(2, 3, 24, 24)).sum().backward()
    assert not recwarn.list


def test_every_batch_norm_is_calibrated(name):
    model = make(name)
    calibrated = calibrate(model, [of_shape(8, 3, 16, 16)])
    for (key, one), other in zip(model.named_buffers(), calibrated.buffers()):
        assert not torch.equal(one, other), key


def test_a_run_is_trained_and_published_and_its_card_says_what_the_model_needs(tmp_path, image_folder, capsys):
    assert train.main(['--model', 'resnet8_cifar', '--data-dir', str(image_folder), '--num-classes', '2', '--epochs',
                       '1', '-j', '0', '-b', '12', '--mixsize-sizes', '24', '32', '--train-pad', '4', '--output',
                       str(tmp_path), '--experiment', 'run']) == 0
    folder = tmp_path / 'hub'
    assert hub.main(['export', str(tmp_path / 'run'), str(folder)]) == 0
    assert 'loads it, after import mixsize_timm; ' in capsys.readouterr().out
    assert hub.main(['verify', str(folder)]) == 0
    assert fingerprint(load(str(folder))) == fingerprint(load(str(tmp_path / 'run')))
    text = ' '.join(ModelCard.load(folder / 'README.md').text.split())
    assert 'after `import mixsize_timm` (`pip install mixsize-timm`):' in text and 'timm alone' not in text
    assert 'import mixsize_timm, timm, torch' in text
    assert architectures.default_cfgs.keys() == MILLIONS.keys()
