"""Vision transformers: torchvision's as encoders, and those of MoCo v3."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders.backbones import Features, ImageEncoder, Images, Maps

MOCO_V3 = {
    "vit-tiny-moco-v3": (12, 192, 12),
    "vit-small-moco-v3": (12, 384, 12),
    "vit-base-moco-v3": (12, 768, 12),
    "vit-large-moco-v3": (24, 1024, 16),
}
"""MoCo v3's vision transformers: blocks, dimensions, heads (table 2; the tiny one is not in the paper)."""

PATCH = 16
SMALL_PATCH = 4
"""Patch side for small images, so that 32 px make the 8 x 8 tokens that a transformer needs to work with."""


class VisionTransformerEncoder(ImageEncoder):
    """A torchvision vision transformer; the class token, behind the last LayerNorm, is the feature.

    The weights lie under ``model.`` with torchvision's own names. Images of another size than the model's (small
    crops) are encoded with its position embeddings interpolated.

    Args:
        model: changed in place: its classifier is taken off.

    Shapes:
        (B, 3, H, W) -> (B, hidden_dim), H and W multiples of the patch's side.

    Raises:
        ValueError: images of other sides.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        model.heads = nn.Identity()  # type: ignore[assignment]
        self.model = model
        self.feature_dim = model.hidden_dim
        self.map_side = model.image_size

    def forward(self, images: Images) -> Features:
        """The class token."""
        return self._tokens(images)[:, 0]

    def feature_maps(self, images: Images) -> Maps:
        """One map (B, hidden_dim, H / patch, W / patch): the patches' tokens, behind the last LayerNorm."""
        rows, columns = (side // self.model.patch_size for side in images.shape[2:])
        patches = self._tokens(images)[:, 1:]
        return [patches.transpose(1, 2).unflatten(2, (rows, columns))]

    @property
    def map_strides(self) -> list[int]:
        """The patch's side."""
        return [self.model.patch_size]

    def _tokens(self, images: Tensor) -> Tensor:
        height, width, patch = images.shape[2], images.shape[3], self.model.patch_size
        if height % patch or width % patch:  # the convolution would leave the rest out in silence
            raise ValueError(f"{height} x {width} pixels don't divide into patches of {patch}")
        patches = self.model.conv_proj(images)
        positions = resized_positions(self.model.encoder.pos_embedding, patches.shape[2], patches.shape[3])
        # The shape, not len(): a traced graph must keep the batch's size open.
        class_token = self.model.class_token.expand(images.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1) + positions
        encoder = self.model.encoder
        return encoder.ln(encoder.layers(encoder.dropout(tokens)))


def resized_positions(
    positions: Float[Tensor, "1 tokens dim"], rows: int, columns: int
) -> Float[Tensor, "1 resized dim"]:
    """Position embeddings for another grid, interpolated (bicubic); the first, of the class token, stays.

    Args:
        positions: of the class token and of a square grid, row after row.
        rows: of the grid wanted.
        columns: of the grid wanted.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if (rows, columns) == (side, side):
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def resize_positions(model: VisionTransformer, image_size: int) -> None:
    """Give a vision transformer the position embeddings of images of another size; nothing changes at its own."""
    side = image_size // model.patch_size
    positions = model.encoder.pos_embedding
    model.encoder.pos_embedding = nn.Parameter(resized_positions(positions.detach(), side, side))
    model.image_size = image_size


def sine_cosine_positions(side: int, dim: int) -> Float[Tensor, "1 tokens dim"]:
    """Fixed position embeddings in two dimensions, with zeros for a class token before them.

    Vaswani et al. 2017, section 3.5, for rows in one half of the dimensions and for columns in the other (MoCo v3,
    section 5 and released code): sines, then cosines, of position / 10000^(4 i / dim).

    Args:
        side: of the square grid.
        dim: dimensions of a token, a multiple of 4.
    """
    frequencies = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    grid = torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), grid])[None].float()


def moco_v3_transformer(name: str, image_size: int) -> VisionTransformerEncoder:
    """A vision transformer as MoCo v3 trains it (Chen, Xie and He 2021, arXiv 2104.02057), with random weights.

    The patch projection keeps its random initial weights: trained, its gradient spikes first and makes the training
    unstable (section 4.2, figures 4 and 5). Position embeddings are fixed sines and cosines in two dimensions.
    Neither has a gradient, so no optimizer, weight decay or momentum ever moves it. As in section 5, the class token
    behind the last LayerNorm is the feature.

    Args:
        name: one of ``MOCO_V3``.
        image_size: side of the images; the patches' is 16 px, 4 up to 64 px.

    Raises:
        UserError: the image doesn't divide into patches.
    """
    blocks, dim, heads = MOCO_V3[name]
    patch = PATCH if image_size > 64 else SMALL_PATCH
    check_patches(name, image_size, patch)
    model = VisionTransformer(
        image_size, patch, blocks, heads, dim, 4 * dim, norm_layer=partial(nn.LayerNorm, eps=1e-6), num_classes=1
    )
    _initialise(model)
    encoder = VisionTransformerEncoder(model)
    freeze_patch_projection(encoder, name)
    model.encoder.pos_embedding.requires_grad_(False)
    return encoder


@torch.no_grad()
def _initialise(model: VisionTransformer) -> None:
    """As MoCo v3's released code: Xavier, with query, key and value each by itself."""
    for block in model.modules():
        if isinstance(block, EncoderBlock):
            _uniform(block.self_attention.in_proj_weight, 2 * model.hidden_dim)
            for layer in (block.self_attention.out_proj, block.mlp[0], block.mlp[3]):
                assert isinstance(layer, nn.Linear)
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
    nn.init.normal_(model.class_token, std=1e-6)
    projection = model.conv_proj
    _uniform(projection.weight, 3 * model.patch_size**2 + model.hidden_dim)
    nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
    positions = model.encoder.pos_embedding
    positions.copy_(sine_cosine_positions(model.image_size // model.patch_size, model.hidden_dim))


def _uniform(weight: Tensor, fans: int) -> None:
    limit = math.sqrt(6 / fans)
    nn.init.uniform_(weight, -limit, limit)


def freeze_patch_projection(encoder: nn.Module, name: str) -> None:
    """Keep the layer that projects patches as it is: it gets no gradient, so no optimizer moves it.

    Args:
        encoder: of torchvision's or timm's vision transformers; changed in place.
        name: for the error.

    Raises:
        UserError: the encoder projects no patches.
    """
    model = getattr(encoder, "model", None)
    projection = getattr(model, "conv_proj", getattr(getattr(model, "patch_embed", None), "proj", None))
    if not isinstance(projection, nn.Module):
        raise UserError(
            f"--freeze-patch-projection is for vision transformers; encoder {name!r} has no patch projection. "
            "Leave the option out."
        )
    projection.requires_grad_(False)


def check_patches(name: str, image_size: int, patch: int) -> None:
    """Refuse images that don't divide into patches.

    Raises:
        UserError: there would be pixels left over.
    """
    if image_size % patch:
        near = max(patch, image_size // patch * patch)
        raise UserError(
            f"Encoder {name!r} divides images into patches of {patch} px, but they have {image_size} px. "
            f"Set --image-size {near}."
        )
