"""Image encoders by name."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from torch import nn

from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders.backbones import Features, ImageEncoder, Images, Maps, coarsest, run_stages
from contrastive_mm.vision.encoders.libraries import (
    TIMM_MISSING,
    find_timm,
    require_timm,
    timm_encoder,
    torchvision_encoder,
    torchvision_names,
)
from contrastive_mm.vision.encoders.resnets import SIMCLR_RESNETS, simclr_resnet
from contrastive_mm.vision.encoders.transformers import MOCO_V3, freeze_patch_projection, moco_v3_transformer

SMALL_IMAGE = 64
"""Up to this side, ResNets get the small stem: a 3x3 convolution and no pooling (SimCLR, appendix B.9, for CIFAR-10;
its released code does so up to 32)."""

OWN_ENCODERS = ["small-conv", *SIMCLR_RESNETS, *MOCO_V3]
"""Encoders of this package, always with random weights."""

TIMM, TORCHVISION = "timm/", "torchvision/"


class SmallConvNet(ImageEncoder):
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

    def forward(self, images: Images) -> Features:
        """Mean over the places of the last feature map."""
        return self.layers(images.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def feature_maps(self, images: Images) -> Maps:
        """As ``ImageEncoder.feature_maps``, with the strides 1, 2 and 4; the last one's mean is the output."""
        return coarsest(run_stages(self.layers, images.contiguous(memory_format=torch.channels_last)))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def build_image_encoder(
    name: str,
    image_size: int,
    pretrained: bool = False,
    freeze_patches: bool = False,
    small_stem: bool | None = None,
) -> ImageEncoder:
    """A new image encoder.

    Args:
        name: ``small-conv``, or ``small-conv-8`` for another width than 32; a ResNet of SimCLR v2 such as
            ``resnet50-2x-sk``; ``vit-small-moco-v3`` and its kin; a torchvision classification model such as
            ``resnet18`` or ``vit_b_16``; or a timm model such as ``vit_small_patch16_224``. ``timm/`` or
            ``torchvision/`` before it says which library's is meant; of a name that both have, torchvision's.
        image_size: side of the views in pixels.
        pretrained: take the library's default weights, and the stem that they were trained with. They were trained on
            images normalised by ImageNet's mean and deviation in most cases; ``model.pretrained_cfg`` (timm) and
            ``get_model_weights`` (torchvision) tell.
        freeze_patches: keep a vision transformer's patch projection as it is (``freeze_patch_projection``).
        small_stem: give a ResNet a 3x3 convolution without pooling for its stem; None does so up to 64 px, unless
            its weights are pretrained. It makes no difference to other encoders.

    Raises:
        UserError: no such encoder (the message offers the nearest name), no weights of it, a download that failed,
            an image size that it can't take, or a patch projection to freeze where there is none.
    """
    if small_stem is None:
        small_stem = image_size <= SMALL_IMAGE and not pretrained
    if is_own_encoder(name):
        encoder = _own_encoder(name, image_size, pretrained, small_stem)
    else:
        library, model = find_library(name)
        build = timm_encoder if library == TIMM else torchvision_encoder
        encoder = build(model, image_size, pretrained, small_stem)
    if freeze_patches:
        freeze_patch_projection(encoder, name)
    return encoder


def is_own_encoder(name: str) -> bool:
    """Whether a name means an encoder of this package, and not a library's."""
    return name in OWN_ENCODERS or _small_conv(name) is not None


def find_library(name: str) -> tuple[str, str]:
    """``TIMM`` or ``TORCHVISION``, whichever a name means, and what the model is called there.

    Raises:
        UserError: neither has such a model; the message offers the nearest name.
    """
    if name.removeprefix(TORCHVISION) in torchvision_names():
        return TORCHVISION, name.removeprefix(TORCHVISION)
    model = name.removeprefix(TIMM)
    timm = require_timm() if name.startswith(TIMM) else find_timm()
    if timm is not None and not name.startswith(TORCHVISION) and timm.is_model(model) and _has_tag(timm, model):
        return TIMM, model
    raise _unknown_encoder(name, timm)


def _has_tag(timm: Any, model: str) -> bool:
    """Whether the weights that a name asks for behind a dot, if any, exist."""
    return "." not in model or timm.models.is_model_pretrained(model)


def _unknown_encoder(name: str, timm: Any) -> UserError:
    """An error that offers the nearest of far too many names to list."""
    known = [*OWN_ENCODERS, *torchvision_names()]
    if timm is not None:
        tagged = timm.list_pretrained() if "." in name else []
        prefix = TIMM if name.startswith(TIMM) else ""
        known += [prefix + other for other in (*timm.list_models(), *tagged)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    more = "" if timm is not None else f" timm's models need one more package: {TIMM_MISSING}"
    return UserError(
        f"Unknown encoder {name!r}.{guess} Known: small-conv, SimCLR v2's ResNets (resnet50-2x-sk), MoCo v3's vision "
        f"transformers (vit-small-moco-v3), torchvision's models (resnet18), timm's (timm/resnet50).{more}"
    )


def _small_conv(name: str) -> re.Match[str] | None:
    return re.fullmatch(r"small-conv(?:-([1-9]\d*))?", name)


def _own_encoder(name: str, image_size: int, pretrained: bool, small_stem: bool) -> ImageEncoder:
    if pretrained:
        raise UserError(
            f"There are no pretrained weights of {name!r}. Begin with random ones (no --pretrained; --initialise "
            "without it), or choose another encoder."
        )
    if small := _small_conv(name):
        return SmallConvNet(int(small[1] or 32))
    if name in MOCO_V3:
        return moco_v3_transformer(name, image_size)
    return simclr_resnet(name, small_stem)
