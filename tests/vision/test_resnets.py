import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contrastive_mm.vision.encoders.resnets import SelectiveKernel, ShortcutPool, SimCLRResNet, simclr_resnet

# Millions of weights, BatchNorm's running statistics included: SimCLR v2, table 1.
PUBLISHED = {
    "resnet50-1x": 24,
    "resnet50-1x-sk": 35,
    "resnet50-2x": 94,
    "resnet50-2x-sk": 140,
    "resnet101-1x": 43,
    "resnet101-1x-sk": 65,
    "resnet101-2x": 170,
    "resnet101-2x-sk": 257,
    "resnet152-1x": 58,
    "resnet152-1x-sk": 89,
    "resnet152-2x": 233,
    "resnet152-2x-sk": 354,
    "resnet152-3x-sk": 795,
}


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_weights_are_as_many_as_published(name, millions):
    with torch.device("meta"):
        network = simclr_resnet(name, small_stem=False)
    tensors = [value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")]
    assert round(sum(value.numel() for value in tensors) / 1e6) == millions
    assert network.feature_dim == 2048 * int(name.partition("-")[2][0])


def test_every_layer_is_wider_stem_and_output_included():
    with torch.device("meta"):
        narrow, wide = SimCLRResNet(50), SimCLRResNet(50, width=3)
    pairs = [
        (one, other) for one, other in zip(narrow.modules(), wide.modules(), strict=True) if isinstance(one, nn.Conv2d)
    ]
    assert all(other.out_channels == 3 * one.out_channels for one, other in pairs)
    assert wide.map_dims == [768, 1536, 3072, 6144]


@torch.no_grad()
def test_selective_kernel_mixes_two_branches_channel_by_channel():
    layer = SelectiveKernel(3, 4, stride=2).double().eval()
    images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    convolution, squeeze, excite = layer.branches[0].weight, layer.mixing[0].weight, layer.mixing[3].weight
    assert squeeze.shape[:2] == (32, 4), "a sixteenth of the channels, at least 32"
    scale = 1 / math.sqrt(1 + 1e-5)  # a BatchNorm that has seen nothing
    both = (F.conv2d(images, convolution, stride=2, padding=1) * scale).relu()
    expected = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    for row in range(2):
        summary = [float((both[row, c] + both[row, 4 + c]).mean()) for c in range(4)]
        hidden = [max(0.0, scale * sum(float(squeeze[h, c, 0, 0]) * summary[c] for c in range(4))) for h in range(32)]
        for c in range(4):
            first, second = (sum(float(excite[out, h, 0, 0]) * hidden[h] for h in range(32)) for out in (c, 4 + c))
            share = math.exp(first) / (math.exp(first) + math.exp(second))
            expected[row, c] = share * both[row, c] + (1 - share) * both[row, 4 + c]
    torch.testing.assert_close(layer(images), expected)


def test_the_shortcut_of_stride_1_averages_what_is_inside_the_map():
    maps = torch.arange(9.0).reshape(1, 1, 3, 3)
    expected = torch.zeros(3, 3)
    for row in range(3):
        for column in range(3):
            block = maps[0, 0, row : row + 2, column : column + 2]
            expected[row, column] = block.sum() / block.numel()
    torch.testing.assert_close(ShortcutPool(1)(maps)[0, 0], expected)
    torch.testing.assert_close(ShortcutPool(2)(torch.ones(1, 1, 4, 6)), torch.ones(1, 1, 2, 3))


def test_selective_kernels_take_the_place_of_the_convolution_with_the_stride():
    with torch.device("meta"):
        network = SimCLRResNet(50, selective_kernels=True, small_stem=True)
    kernels = [module for module in network.modules() if isinstance(module, SelectiveKernel)]
    assert len(kernels) == 3 + 4 + 6 + 3
    assert sum(module.branches[0].stride == (2, 2) for module in kernels) == 3
    left = [module.kernel_size for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert left.count((3, 3)) == len(kernels) + 1, "one for both branches, and the stem's"


@torch.no_grad()
def test_blocks_begin_as_their_shortcut_and_weights_with_the_variance_of_the_released_code():
    network = SimCLRResNet(18, small_stem=True).eval()
    block = network.stages[0][1]
    maps = torch.rand(2, 64, 4, 4)
    torch.testing.assert_close(block(maps), maps)
    weight = network.stages[3][1].residual[1].weight
    assert float(weight.std()) == pytest.approx(math.sqrt(1 / weight[0].numel()), rel=0.02)
    assert float(weight.abs().max()) <= 2 * math.sqrt(1 / weight[0].numel()) / 0.8796 + 1e-6


def test_the_stem_of_large_images_divides_by_four():
    for kernels in (False, True):
        with torch.device("meta"):
            network = SimCLRResNet(18, selective_kernels=kernels)
            assert network.stem(torch.randn(1, 3, 64, 64)).shape == (1, 64, 16, 16)
    # ResNet-D: three 3x3 convolutions, half of the channels in the first two.
    widths = [
        (layer.out_channels, layer.kernel_size) for layer in network.stem.modules() if isinstance(layer, nn.Conv2d)
    ]
    assert widths == [(32, (3, 3)), (32, (3, 3)), (64, (3, 3))]
