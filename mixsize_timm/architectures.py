"""Networks for CIFAR's images of 32 px, in timm's registry: a 3x3 stem that keeps the size, and three stages.

Importing this module registers them; :mod:`mixsize_timm` does. ``timm.list_models(module='architectures')`` names them.
"""
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.layers import BatchNormAct2d, calculate_drop_path_rates, create_classifier, create_conv2d, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, make_blocks
from timm.models.resnetv2 import PreActBasic, ResNetStage
from torch import nn
from torch.nn import functional as F

_STAGES = ('layer1', 'layer2', 'layer3')


class CifarNet(nn.Module):
    """A residual network for small images, with the interface of timm's models.

    It takes images of any size from 1 px; the second and third stage halve their side.

    Weights begin as in timm's ResNet: convolutions normal with the variance that ReLU wants for the backward pass
    (``fan_out``), the classifier as torch has it, and without ``preact`` the last batch norm of each block at 0. The
    reference of the paper on mixed sizes (eladhoffer/convNet.pytorch) does the same, but for the classifier: normal of
    deviation 0.01, bias 0. Its wide networks are made of blocks without ``preact``.

    Args:
        depth: Blocks of a stage.
        widths: Channels of the stages.
        preact: Batch norm and ReLU before each convolution, as in wide residual networks, not behind it.
        stem_width: Channels of the stem.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Input channels.
        global_pool: Pooling, as timm has it.
        drop_rate: Dropout before the classifier. (That inside the blocks of wide residual networks is not there.)
        drop_path_rate: Stochastic depth of the last block; it grows linearly.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
            self,
            depth: int,
            widths: Tuple[int, int, int] = (16, 32, 64),
            preact: bool = False,
            stem_width: int = 16,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device: Any = None,
            dtype: Any = None,
    ) -> None:
        super().__init__()
        options: Dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = widths[-1]
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **options)
        self.bn1 = nn.Identity() if preact else nn.BatchNorm2d(stem_width, **options)
        self.act1 = nn.Identity() if preact else nn.ReLU(inplace=True)
        make_stages = _preact_stages if preact else _basic_stages
        self.layer1, self.layer2, self.layer3 = make_stages(depth, widths, stem_width, drop_path_rate, options)
        self.norm = BatchNormAct2d(widths[-1], **options) if preact else nn.Identity()
        self.feature_info: List[Dict[str, Any]] = [
            dict(num_chs=channels, reduction=reduction, module=name)
            for channels, reduction, name in zip((stem_width, *widths), (1, 1, 2, 4), ('act1', *_STAGES))]
        self._set_head(global_pool)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw the weights of the convolutions, and put the last batch norm of each block to 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, BasicBlock):
                module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of the parameters that go together, for the decay of learning rates by layer."""
        return dict(stem=r'^conv1|^bn1', blocks=r'^layer(\d+)' if coarse else [
            (r'^layer(\d+)\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass, or keep them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Put a new classifier, for ``num_classes``, in the place of this one; and another pooling if one is named."""
        self.num_classes = num_classes
        pool: Any = self.global_pool
        self._set_head(pool.pool_type if global_pool is None else global_pool)

    def _set_head(self, pool_type: str) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=pool_type, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Any:
        """The features, and those of the stem (index 0) and the stages on the way to them.

        Args:
            x: Images ``[B, C, H, W]``.
            indices: Which ones: the last n for a number, all for ``None``.
            norm: Give the last stage's behind the final norm.
            stop_early: Leave out the stages behind the last one that is wanted.
            output_fmt: ``NCHW``.
            intermediates_only: Leave out the features.
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        for index, name in enumerate(('', *_STAGES)):
            if stop_early and index > last:
                break
            if name:
                stage = getattr(self, name)
                x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if index in wanted:
                intermediates.append(self.norm(x) if norm and name == _STAGES[-1] else x)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Take out what the intermediates of :meth:`forward_intermediates` do not need; gives their indices."""
        wanted, last = feature_take_indices(len(self.feature_info), indices)
        for name in _STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if prune_norm or last < len(_STAGES):
            self.norm = nn.Identity()
        if prune_head or last < len(_STAGES):
            self.num_features = self.feature_info[last]['num_chs']
            self.reset_classifier(0, '')
        return wanted

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Features ``[B, C, H / 4, W / 4]``, sides rounded up, of images ``[B, C, H, W]``."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of features, or what the classifier makes them of."""
        x = F.dropout(self.global_pool(x), p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, C, H, W]``."""
        return self.forward_head(self.forward_features(x))


def _basic_stages(depth: int, widths: Tuple[int, int, int], stem_width: int, drop_path_rate: float,
                  options: Dict[str, Any]) -> List[nn.Module]:
    stages, _ = make_blocks((BasicBlock,) * 3, widths, (depth,) * 3, stem_width, drop_path_rate=drop_path_rate,
                            norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU, **options)
    return [stage for _, stage in stages]


def _preact_stages(depth: int, widths: Tuple[int, int, int], stem_width: int, drop_path_rate: float,
                   options: Dict[str, Any]) -> List[nn.Module]:
    rates: Any = calculate_drop_path_rates(drop_path_rate, [depth] * 3, stagewise=True)
    return [ResNetStage(in_chs, out_chs, stride, 1, depth, bottle_ratio=1., block_dpr=block_rates, block_fn=PreActBasic,
                        act_layer=nn.ReLU, conv_layer=create_conv2d, norm_layer=BatchNormAct2d, **options).blocks
            for in_chs, out_chs, stride, block_rates in zip((stem_width, *widths), widths, (1, 2, 2), rates)]


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return dict(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1., interpolation='bicubic',
                mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), first_conv='conv1', classifier='fc',
                **kwargs)


_RESNET, _WIDE = _cfg(paper_ids='arXiv:1512.03385'), _cfg(paper_ids='arXiv:1605.07146')
default_cfgs = generate_default_cfgs({
    'resnet8_cifar': _RESNET, 'resnet20_cifar': _RESNET, 'resnet44_cifar': _RESNET,
    'wrn16_4_cifar': _WIDE, 'wrn28_10_cifar': _WIDE})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarNet:
    return build_model_with_cfg(CifarNet, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


def _resnet(variant: str, pretrained: bool, layers: int, **kwargs: Any) -> CifarNet:
    """A ResNet of 6n + 2 layers, with 1x1 convolutions on the shortcuts whose shape changes."""
    return _create(variant, pretrained, depth=(layers - 2) // 6, **kwargs)


def _wide(variant: str, pretrained: bool, layers: int, factor: int, **kwargs: Any) -> CifarNet:
    """A wide residual network of 6n + 4 layers, its stages ``factor`` times as wide as a ResNet's."""
    widths = (16 * factor, 32 * factor, 64 * factor)
    return _create(variant, pretrained, depth=(layers - 4) // 6, widths=widths, preact=True, **kwargs)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-8 for CIFAR, 0.08 M parameters."""
    return _resnet('resnet8_cifar', pretrained, 8, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-20 for CIFAR, 0.27 M parameters."""
    return _resnet('resnet20_cifar', pretrained, 20, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """ResNet-44 for CIFAR, 0.66 M parameters; that of the paper on mixed sizes."""
    return _resnet('resnet44_cifar', pretrained, 44, **kwargs)


@register_model
def wrn16_4_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WRN-16-4, 2.7 M parameters."""
    return _wide('wrn16_4_cifar', pretrained, 16, 4, **kwargs)


@register_model
def wrn28_10_cifar(pretrained: bool = False, **kwargs: Any) -> CifarNet:
    """WRN-28-10, 36.5 M parameters."""
    return _wide('wrn28_10_cifar', pretrained, 28, 10, **kwargs)
