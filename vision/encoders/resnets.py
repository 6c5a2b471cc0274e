"""SimCLR v2's ResNets: wider ones, and with selective kernels."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.vision.encoders.backbones import Features, ImageEncoder, Images, Maps, coarsest, run_stages

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Residual blocks of each of the four stages, by depth (He et al. 2016, table 1)."""
FIRST_BOTTLENECK = 50
SELECTIVE_RATIO = 1 / 16
SMALLEST_BOTTLENECK = 32

SIMCLR_RESNETS = [
    f"resnet{depth}-{width}x{kernels}"
    for depth, width, kernels in itertools.product(BLOCKS, (1, 2, 3, 4), ("", "-sk"))
]
"""The names of SimCLR v2's ResNets."""

BatchMaps = Float[Tensor, "batch _ _ _"]


class SimCLRResNet(ImageEncoder):
    """A ResNet of SimCLR v2 (Chen et al. 2020, arXiv 2006.10029, section 3 and table 1), as in the released code.

    The width multiplies the channels of every layer, stem and output included; torchvision's ``wide_resnet`` and
    ``width_per_group`` widen the inside of bottlenecks only. With selective kernels the 3x3 convolution of each
    bottleneck becomes ``SelectiveKernel``, and stem and shortcuts are those of ResNet-D. The depths 18 and 34 have no
    bottlenecks: the released code leaves their convolutions as they are; here the first of a block becomes selective.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: multiplies the channels.
        selective_kernels: whether to use them.
        small_stem: a 3x3 convolution and no pooling (SimCLR, Chen et al. 2020, appendix B.9).

    Shapes:
        (B, 3, H, W) -> (B, 512 * width), 2048 * width from depth 50 on.
    """

    def __init__(self, depth: int, width: int = 1, selective_kernels: bool = False, small_stem: bool = False) -> None:
        super().__init__()
        block = Bottleneck if depth >= FIRST_BOTTLENECK else BasicBlock
        channels = 64 * width
        self.stem = _stem(channels, selective_kernels, small_stem)
        self.stages = nn.ModuleList()
        for number, blocks in enumerate(BLOCKS[depth]):
            stage = nn.Sequential()
            for position in range(blocks):
                filters, stride = 64 * width * 2**number, 2 if number > 0 and position == 0 else 1
                stage.append(block(channels, filters, stride, position == 0, selective_kernels))
                channels = filters * block.expansion
            self.stages.append(stage)
        self.feature_dim = channels
        _initialise(self)

    def forward(self, images: Images) -> Features:
        """Mean over the places of the last feature map."""
        *_, last = self._maps(images)
        return last.mean(dim=(2, 3))

    def feature_maps(self, images: Images) -> Maps:
        """As ``ImageEncoder.feature_maps``: the four stages' outputs; the last one's mean is the encoder's output."""
        return coarsest(self._maps(images))

    def _maps(self, images: Images) -> Iterator[Tensor]:
        return run_stages(self.stages, self.stem(images))


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions whose outputs are mixed, channel by channel, as the image asks for.

    Li et al. 2019 (arXiv 1903.06586), section 3.1, in the form of SimCLR v2's released code: both branches have
    3x3 kernels without dilation and one BatchNorm, and the mixing weights come from a bottleneck of a sixteenth of
    the channels, at least 32.

    Args:
        inputs: channels read.
        outputs: channels given.
        stride: of the convolutions.

    Shapes:
        (B, inputs, H, W) -> (B, outputs, H / stride, W / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        bottleneck = max(int(outputs * SELECTIVE_RATIO), SMALLEST_BOTTLENECK)
        self.branches = _convolution(inputs, 2 * outputs, 3, stride)
        self.mixing = nn.Sequential(
            *_convolution(outputs, bottleneck, 1), nn.Conv2d(bottleneck, 2 * outputs, 1, bias=False)
        )

    def forward(self, maps: BatchMaps) -> BatchMaps:
        """The two branches, weighted by a softmax between them."""
        both = self.branches(maps).unflatten(1, (2, -1))
        weights = self.mixing(both.sum(dim=1).mean(dim=(2, 3), keepdim=True)).unflatten(1, (2, -1))
        return (both * weights.softmax(dim=1)).sum(dim=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, filters: int, stride: int, project: bool, selective_kernels: bool) -> None:
        super().__init__()
        first: Callable[..., nn.Module] = SelectiveKernel if selective_kernels else _convolution_3x3
        self.shortcut = _shortcut(inputs, filters, stride, selective_kernels) if project else nn.Identity()
        self.residual = nn.Sequential(
            first(inputs, filters, stride), nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters)
        )

    def forward(self, maps: BatchMaps) -> BatchMaps:
        """Residual and shortcut, added and rectified."""
        return F.relu(self.residual(maps) + self.shortcut(maps))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, figure 5 right); the 3x3 has the stride."""

    expansion = 4

    def __init__(self, inputs: int, filters: int, stride: int, project: bool, selective_kernels: bool) -> None:
        super().__init__()
        outputs = filters * self.expansion
        middle: Callable[..., nn.Module] = SelectiveKernel if selective_kernels else _convolution_3x3
        self.shortcut = _shortcut(inputs, outputs, stride, selective_kernels) if project else nn.Identity()
        self.residual = nn.Sequential(
            _convolution(inputs, filters, 1),
            middle(filters, filters, stride),
            nn.Conv2d(filters, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, maps: BatchMaps) -> BatchMaps:
        """Residual and shortcut, added and rectified."""
        return F.relu(self.residual(maps) + self.shortcut(maps))


class ShortcutPool(nn.Module):
    """ResNet-D's 2x2 mean before a shortcut's projection (He et al. 2019, arXiv 1812.01187, figure 2c).

    At stride 1 the released code averages too, with TensorFlow's padding at the lower and right edges, which leaves
    the padding out of the mean; so does repeating the edge.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, maps: BatchMaps) -> BatchMaps:
        """(B, C, H, W) -> (B, C, H / stride, W / stride), rounded up."""
        padded = F.pad(maps, (0, 1, 0, 1), mode="replicate" if self.stride == 1 else "constant")
        return F.avg_pool2d(padded, 2, self.stride)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _convolution_3x3(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return _convolution(inputs, outputs, 3, stride)


def _shortcut(inputs: int, outputs: int, stride: int, resnet_d: bool) -> nn.Sequential:
    pool = [ShortcutPool(stride)] if resnet_d else []
    projection = nn.Conv2d(inputs, outputs, 1, 1 if resnet_d else stride, bias=False)
    return nn.Sequential(*pool, projection, nn.BatchNorm2d(outputs))


def _stem(channels: int, resnet_d: bool, small: bool) -> nn.Sequential:
    if small:
        return _convolution(3, channels, 3)
    # TensorFlow pads the pooling at the lower and right edges only; with ceil_mode so does this.
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    if not resnet_d:
        return nn.Sequential(_convolution(3, channels, 7, 2), pool)
    half = channels // 2
    deep = [_convolution(3, half, 3, 2), _convolution(half, half, 3), _convolution(half, channels, 3)]
    return nn.Sequential(*deep, pool)


def _initialise(network: nn.Module) -> None:
    """As the released code: TensorFlow's variance scaling by default; the last BatchNorm of a block begins at 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # Cut at two standard deviations and scaled so that what is left has the variance 1 / fan-in.
            deviation = math.sqrt(1 / module.weight[0].numel()) / 0.87962566103423978
            nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        elif isinstance(module, (BasicBlock, Bottleneck)):
            last = module.residual[-1]
            assert isinstance(last, nn.BatchNorm2d)
            nn.init.zeros_(last.weight)


def simclr_resnet(name: str, small_stem: bool) -> SimCLRResNet:
    """One of ``SIMCLR_RESNETS`` with random weights: ``resnet50-2x-sk`` is twice as wide, with selective kernels."""
    depth, width, kernels = re.fullmatch(r"resnet(\d+)-(\d)x(-sk)?", name).groups()  # type: ignore[union-attr]
    return SimCLRResNet(int(depth), int(width), kernels is not None, small_stem)
