"""torchvision's and timm's models as encoders."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders.backbones import (
    Features,
    ImageEncoder,
    Images,
    Maps,
    coarsest,
    run_on_meta,
    run_stages,
)
from contrastive_mm.vision.encoders.transformers import VisionTransformerEncoder, check_patches, resize_positions

TIMM_MISSING = 'pip install "contrastive_mm[timm]".'


class HeadlessModel(ImageEncoder):
    """A torchvision classifier without its last linear layer.

    The weights lie under ``model.`` with torchvision's own names.

    Args:
        model: the classifier; changed in place.
        name: for the error.
        map_side: side of the images, where the model takes no other.

    Shapes:
        (B, 3, H, W) -> (B, feature_dim).

    Raises:
        UserError: the model has no linear layer to take off.
    """

    def __init__(self, model: nn.Module, name: str, map_side: int | None = None) -> None:
        super().__init__()
        self.map_side = map_side
        linear = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise UserError(f"Encoder {name!r} has no linear classifier to take off; choose another, e.g. resnet18.")
        path, layer = linear[-1]
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
        self.head = path.partition(".")[0]
        self.feature_dim = layer.in_features
        self.model = model

    def forward(self, images: Images) -> Features:
        """What the classifier's last layer would have read."""
        return self.model(images)

    def feature_maps(self, images: Images) -> Maps:
        """As ``ImageEncoder.feature_maps``; a ResNet's last map, averaged over its places, is the output."""
        # Swin's maps have their channels last.
        last = isinstance(self.model, torchvision.models.SwinTransformer)
        maps = run_stages(self._stages(), images)
        return coarsest(found.permute(0, 3, 1, 2) if last else found for found in maps)

    def _stages(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """The layers before the pooling, in order; looked up at each call, for layers may have been replaced."""
        if getattr(self.model, "transform_input", False):
            yield self.model._transform_input  # type: ignore[misc]
        body = getattr(self.model, "features", self.model)
        for name, part in body.named_children():
            if name == self.head or isinstance(part, nn.AdaptiveAvgPool2d):
                return
            inside = body is self.model and isinstance(part, (nn.Sequential, nn.ModuleList))
            yield from part.children() if inside else [part]


class TimmEncoder(ImageEncoder):
    """A timm model without its classifier.

    The weights lie under ``model.`` with timm's own names.

    Args:
        model: made by ``timm.create_model(..., num_classes=0)``.
        name: for errors.
        image_size: side of the images, in pixels.
        fixed_size: whether the model takes no other size.

    Shapes:
        (B, 3, H, W) -> (B, feature_dim).

    Raises:
        UserError: the model can't take images of this size.
    """

    def __init__(self, model: nn.Module, name: str, image_size: int, fixed_size: bool) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.map_side = image_size if fixed_size else None
        # timm has no single attribute that holds the output's width for every architecture.
        with refuse_size(name, image_size):
            self.feature_dim = int(run_on_meta(model, image_size).shape[1])

    def forward(self, images: Images) -> Features:
        """The pooled features that timm's classifier would have read."""
        return self.model(images)

    def feature_maps(self, images: Images) -> Maps:
        """As ``ImageEncoder.feature_maps``; a ResNet's last map, averaged over its places, is the output.

        Raises:
            UserError: timm gives no maps of this architecture.
        """
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(f"timm gives no feature maps of {self.name}; choose another encoder, e.g. resnet50.")
        maps: Any = self.model.forward_intermediates(images, norm=True, intermediates_only=True)  # type: ignore[operator]
        return coarsest(maps)


@contextmanager
def refuse_size(name: str, image_size: int, option: str = "--image-size") -> Iterator[None]:
    """Say in one error what a library raises in many ways: an encoder can't take images of a size.

    Args:
        name: of the encoder.
        image_size: side of the images, in pixels.
        option: which sets it.
    """
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"Encoder {name!r} can't take images of {image_size} px ({_reason(error)}). Give another {option}, or "
            "another --encoder."
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def torchvision_names() -> list[str]:
    """The classification models that torchvision has."""
    return list(torchvision.models.list_models(module=torchvision.models))


def find_timm() -> Any:
    """The timm library, imported when it is needed; None where it isn't installed."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        return None


def require_timm() -> Any:
    """As ``find_timm``.

    Raises:
        UserError: it isn't installed.
    """
    timm = find_timm()
    if timm is None:
        raise UserError(f"timm's encoders need one more package: {TIMM_MISSING}")
    return timm


def torchvision_encoder(name: str, image_size: int, pretrained: bool, small_stem: bool) -> ImageEncoder:
    """A torchvision classification model as an encoder; see ``build_image_encoder``."""
    if name.startswith("vit_"):
        check_patches(name, image_size, int(name.rpartition("_")[2]))
    if pretrained:
        # Made at the size that the weights were trained with.
        model = _with_weights(name, lambda: torchvision.models.get_model(name, weights="DEFAULT", **_options(name)))
    else:
        with refuse_size(name, image_size):
            model = torchvision.models.get_model(name, weights=None, **_options(name), **_size(name, image_size))
    if isinstance(model, VisionTransformer):
        resize_positions(model, image_size)
        return VisionTransformerEncoder(model)
    if isinstance(model, torchvision.models.ResNet) and small_stem:
        use_small_stem(model)
    encoder = HeadlessModel(model, name, image_size if name.startswith("maxvit") else None)
    with refuse_size(name, image_size):
        run_on_meta(encoder, image_size)
    return encoder


def _options(name: str) -> dict[str, Any]:
    # Without the auxiliary classifiers, which give training several outputs.
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def _size(name: str, image_size: int) -> dict[str, Any]:
    if name.startswith("vit_"):
        return {"image_size": image_size}
    return {"input_size": (image_size, image_size)} if name.startswith("maxvit") else {}


def timm_encoder(name: str, image_size: int, pretrained: bool, small_stem: bool) -> ImageEncoder:
    """A timm model as an encoder; see ``build_image_encoder``."""
    timm = require_timm()
    fixed = bool(timm.get_pretrained_cfg(name).fixed_input_size)
    size = {"img_size": image_size}
    # With dynamic_img_size a vision transformer also takes small crops; not every architecture knows either option.
    attempts: list[dict[str, Any]] = [{**size, "dynamic_img_size": True}, size, {}] if fixed else [{}]
    model = _first_accepted(lambda **options: _create(timm, name, image_size, pretrained, options), attempts)
    if isinstance(model, timm.models.ResNet) and small_stem:
        use_small_stem(model)
    return TimmEncoder(model, name, image_size, fixed)


def _create(timm: Any, name: str, image_size: int, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    def create() -> nn.Module:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
        return model

    if pretrained:
        return _with_weights(name, create)
    with refuse_size(name, image_size):
        return create()


def _first_accepted(create: Callable[..., nn.Module], attempts: list[dict[str, Any]]) -> nn.Module:
    for options in attempts[:-1]:
        try:
            return create(**options)
        except TypeError:  # an option that this architecture doesn't know
            continue
    return create(**attempts[-1])


def _with_weights(name: str, create: Callable[[], nn.Module]) -> nn.Module:
    try:
        return create()
    except TypeError:
        raise
    except Exception as error:  # each hub raises errors of its own HTTP library
        reason = _reason(error).rstrip(".")
        raise UserError(
            f"The pretrained weights of {name!r} can't be had: {reason}. Check the connection, or leave out "
            "--pretrained to train from scratch."
        ) from error


def use_small_stem(model: Any) -> None:
    """Put a 3x3 convolution and no pooling in the place of a ResNet's stem.

    Args:
        model: a ResNet of torchvision or timm; changed in place.
    """
    model.conv1 = nn.Conv2d(3, model.bn1.num_features, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
