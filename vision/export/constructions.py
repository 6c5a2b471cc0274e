"""How torchvision or timm makes the model that takes an encoder's weights."""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from contrastive_mm.vision.encoders.backbones import ImageEncoder
from contrastive_mm.vision.encoders.build import is_own_encoder
from contrastive_mm.vision.encoders.libraries import find_timm, torchvision_names, use_small_stem
from contrastive_mm.vision.encoders.transformers import VisionTransformerEncoder

Library = Literal["torchvision", "timm"]

LARGEST_DIFFERENCE = 1e-4
"""Between the features of two libraries, in parts of the largest feature; float32 rounds by about 1e-6."""
TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
TIMM_NAMES = (
    (r"class_token", "cls_token"),
    (r"conv_proj", "patch_embed.proj"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1"),
    (r"encoder\.ln", "norm"),
    (r"ln_([12])", r"norm\1"),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"self_attention\.out_proj", "attn.proj"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
)
"""torchvision's names of a vision transformer's weights, and timm's."""


@dataclass(frozen=True)
class Construction:
    """A call of a library that makes a model.

    Attributes:
        function: where it lies, ``torchvision.models.resnet18``.
        arguments: by name.
        small_stem: whether the model then gets the small-image stem.
        renames: patterns of weights' names and what stands for them in this model.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    small_stem: bool = False
    renames: tuple[tuple[str, str], ...] = ()

    def build(self) -> nn.Module:
        """The model, with random weights."""
        model: nn.Module = pkgutil.resolve_name(self.function)(**self.arguments)
        if self.small_stem:
            use_small_stem(model)
        return model

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under this model's names."""
        renamed = {}
        for name, value in weights.items():
            new = name
            for pattern, replacement in self.renames:
                new = re.sub(pattern, replacement, new)
            renamed[new] = value
        return renamed

    def code(self, weights: str) -> str:
        """Lines of Python that make the model and load it, of an expression that gives the weights."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        lines = [f"import {module}" for module in sorted({weights.partition("(")[0].rpartition(".")[0], "torch"})]
        lines += [f"import {self.function.rpartition('.')[0]}", "", f"model = {self.function}({arguments})"]
        if self.small_stem:
            lines.append("model.conv1 = torch.nn.Conv2d(3, model.bn1.num_features, 3, 1, 1, bias=False)")
            lines.append("model.maxpool = torch.nn.Identity()")
        # timm leaves the classifier out; torchvision can't.
        options = "" if self.function.startswith("timm") else ", strict=False"
        comment = "" if not options else "  # misses the classifier only"
        return "\n".join([*lines, f"model.load_state_dict({weights}{options}){comment}"])


def fitting_construction(
    library: Library,
    encoder: ImageEncoder,
    weights: Mapping[str, Tensor],
    name: str,
    image_size: int,
    small_stem: bool,
) -> Construction | None:
    """How a library makes the model that an encoder's weights belong to.

    The model is made and tried: nothing but the classifier may be missing, nothing may be left over, and its features
    of random images must be the encoder's (``LARGEST_DIFFERENCE``).

    Args:
        library: whose model.
        encoder: in eval mode.
        weights: under the names of the library that the encoder is of.
        name: of the encoder.
        image_size: side of its images.
        small_stem: whether a ResNet has the small-image stem.

    Returns:
        The construction, or None where the library has no such model, or isn't installed.
    """
    construction = _candidate(library, encoder, name, image_size, small_stem)
    if construction is None or (library == "timm" and find_timm() is None):
        return None
    model = construction.build().eval()
    try:
        missing, unexpected = model.load_state_dict(construction.rename(weights), strict=False)
    except RuntimeError:  # other shapes
        return None
    classifier = _last_linear(model) if library == "torchvision" else None
    allowed = {f"{classifier}.weight", f"{classifier}.bias"} if classifier else set()
    if unexpected or set(missing) - allowed:
        return None
    return construction if _agree(encoder, model, classifier, image_size) else None


def _candidate(
    library: Library, encoder: ImageEncoder, name: str, image_size: int, small_stem: bool
) -> Construction | None:
    if isinstance(encoder, VisionTransformerEncoder):
        return _transformer(library, encoder.model)
    if is_own_encoder(name):
        return None
    bare = name.rpartition("/")[2].partition(".")[0]
    resnet = small_stem and hasattr(encoder.model, "maxpool") and hasattr(encoder.model, "layer1")
    if library == "torchvision":
        return Construction(f"torchvision.models.{bare}", {}, resnet) if bare in torchvision_names() else None
    timm = find_timm()
    if timm is None or not timm.is_model(bare):
        return None
    arguments: dict[str, Any] = {"model_name": bare, "num_classes": 0}
    if timm.get_pretrained_cfg(bare).fixed_input_size and image_size != timm.get_pretrained_cfg(bare).input_size[1]:
        arguments["img_size"] = image_size
    return Construction("timm.create_model", arguments, resnet)


def _transformer(library: Library, model: VisionTransformer) -> Construction | None:
    layers = len(model.encoder.layers)
    heads = model.encoder.layers[0].num_heads
    if library == "torchvision":
        arguments = {
            "image_size": model.image_size,
            "patch_size": model.patch_size,
            "num_layers": layers,
            "num_heads": heads,
            "hidden_dim": model.hidden_dim,
            "mlp_dim": model.mlp_dim,
        }
        return Construction("torchvision.models.VisionTransformer", arguments)
    patch = 14 if TIMM_SIZES[model.hidden_dim] == "huge" else 16
    arguments = {
        "model_name": f"vit_{TIMM_SIZES[model.hidden_dim]}_patch{patch}_224",
        "num_classes": 0,
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "depth": layers,
        "num_heads": heads,
    }
    return Construction("timm.create_model", arguments, renames=TIMM_NAMES)


def _last_linear(model: nn.Module) -> str:
    return [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]


@torch.no_grad()
def _agree(encoder: ImageEncoder, model: nn.Module, classifier: str | None, image_size: int) -> bool:
    """Whether a model's features are the encoder's."""
    if classifier is not None:
        parent, _, attribute = classifier.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    return relative_difference(model(images), encoder(images)) <= LARGEST_DIFFERENCE


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between two tensors, in parts of the largest value expected; infinite between shapes."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max() / expected.abs().max())
