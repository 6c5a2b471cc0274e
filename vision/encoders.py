"""Image encoders by name."""

from __future__ import annotations

import re

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from contrastive_mm.errors import UserError, unknown_name

SMALL_IMAGE = 64
"""Up to this side, ResNets get the small stem: a 3x3 convolution and no pooling (SimCLR, appendix B.9)."""


class SmallConvNet(nn.Module):
    """Six convolutions for small images on a CPU, 0.6 million weights.

    Args:
        width: channels of the first layer; the features have 8 times as many.

    Shapes:
        (B, 3, H, W) -> (B, 8 * width), H and W at least 4.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.layers = nn.Sequential(
            _convolution(3, width),
            _convolution(width, 2 * width, stride=2),
            _convolution(2 * width, 2 * width),
            _convolution(2 * width, 4 * width, stride=2),
            _convolution(4 * width, 4 * width),
            _convolution(4 * width, 8 * width),
        )
        # Channels last is the layout in which CPUs and GPUs convolve fastest.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Mean over the places of the last feature map."""
        return self.layers(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class HeadlessModel(nn.Module):
    """A torchvision classifier without its last linear layer.

    Args:
        model: the classifier; changed in place.
        name: for the error.

    Shapes:
        (B, 3, H, W) -> (B, feature_dim).

    Raises:
        UserError: the model has no linear layer to take off.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        linear = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise UserError(f"Encoder {name!r} has no linear classifier to take off; choose another, e.g. resnet18.")
        path, layer = linear[-1]
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
        self.feature_dim = layer.in_features
        self.model = model

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """What the classifier's last layer would have read."""
        return self.model(images)


def build_image_encoder(name: str, image_size: int) -> nn.Module:
    """A new image encoder with random weights.

    Args:
        name: ``small-conv``, ``small-conv-8`` for another width than 32, or a torchvision classification model such
            as ``resnet18`` or ``vit_b_16``.
        image_size: side of the views in pixels; ResNets get the small stem up to 64.

    Raises:
        UserError: no such encoder; the message offers the nearest name.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if small := re.fullmatch(r"small-conv(?:-([1-9]\d*))?", name):
        return SmallConvNet(int(small[1] or 32))
    if name not in known:
        raise unknown_name("encoder", name, ["small-conv", *known])
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if isinstance(model, torchvision.models.ResNet) and image_size <= SMALL_IMAGE:
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return HeadlessModel(model, name)
