import dataclasses
import math

import pytest
import torch
from torchvision.models import VisionTransformer

from contrastive_mm.errors import UserError
from contrastive_mm.methods import get_method
from contrastive_mm.training import Trainer, TrainerConfig
from contrastive_mm.vision.domain import ImageDomain, VisionConfig
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.encoders.transformers import (
    MOCO_V3,
    VisionTransformerEncoder,
    resized_positions,
    sine_cosine_positions,
)
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews

# Millions of weights: MoCo v3, table 2.
PUBLISHED = {"vit-small-moco-v3": 22, "vit-base-moco-v3": 86, "vit-large-moco-v3": 304}


def small_transformer():
    return VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)


@pytest.mark.parametrize(("name", "millions"), PUBLISHED.items())
def test_weights_are_as_many_as_published(name, millions):
    with torch.device("meta"):
        encoder = build_image_encoder(name, 224)
    # The paper doesn't say whether it counts the classifier (0.4 to 1 million).
    assert abs(sum(value.numel() for value in encoder.parameters()) / 1e6 - millions) < 1
    assert encoder.model.encoder.layers[0].num_heads == MOCO_V3[name][2]


def test_features_are_the_class_token_of_torchvisions_model():
    model = small_transformer().eval()
    images = torch.randn(3, 3, 16, 16)
    read = []
    model.heads.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    model(images)
    encoder = VisionTransformerEncoder(model)
    torch.testing.assert_close(encoder(images), read[0])


def test_the_map_holds_each_patchs_token_at_the_patchs_place():
    encoder = VisionTransformerEncoder(small_transformer()).eval()
    with torch.no_grad():
        for block in encoder.model.encoder.layers:  # tokens that can't see each other
            block.self_attention.out_proj.weight.zero_()
            block.self_attention.out_proj.bias.zero_()
    images = torch.zeros(1, 3, 16, 16)
    before = encoder.feature_maps(images)[0]
    images[:, :, 4:8, 12:16] = 1.0
    changed = (encoder.feature_maps(images)[0] - before).abs().sum(dim=1)[0] > 1e-6
    assert changed.nonzero().tolist() == [[1, 3]]
    assert (encoder.map_dims, encoder.map_strides) == ([8], [4])


def test_positions_of_another_grid_are_interpolated():
    positions = torch.randn(1, 17, 8)
    assert resized_positions(positions, 4, 4) is positions
    larger = resized_positions(positions, 8, 8)
    assert larger.shape == (1, 65, 8)
    torch.testing.assert_close(larger[:, 0], positions[:, 0])
    # A ramp stays a ramp, away from the edges.
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(4.0).repeat_interleave(4).reshape(1, 16, 1)], dim=1)
    rows = resized_positions(ramp, 8, 4)[0, 1:, 0].reshape(8, 4)
    torch.testing.assert_close(rows[3:5, 0], torch.tensor([1.25, 1.75]), atol=0.02, rtol=0)
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 4))
    encoder = VisionTransformerEncoder(small_transformer())
    assert encoder(torch.randn(2, 3, 8, 8)).shape == (2, 8), "small crops"


def test_positions_are_sines_and_cosines_of_row_and_column():
    dim, side = 16, 3
    positions = sine_cosine_positions(side, dim)
    assert positions.shape == (1, 1 + side * side, dim)
    assert positions[0, 0].abs().sum() == 0, "the class token has no place"
    for row in range(side):
        for column in range(side):
            waves = []
            for place in (row, column):
                angles = [place / 10_000 ** (4 * i / dim) for i in range(dim // 4)]
                waves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            torch.testing.assert_close(positions[0, 1 + row * side + column], torch.tensor(waves))


@torch.no_grad()
def test_initial_weights_are_those_of_the_released_code():
    encoder = build_image_encoder("vit-tiny-moco-v3", 32)
    dim, patch = 192, 4
    block = encoder.model.encoder.layers[0]
    limits = {
        block.self_attention.in_proj_weight: math.sqrt(6 / (dim + dim)),
        block.mlp[0].weight: math.sqrt(6 / (dim + 4 * dim)),
        encoder.model.conv_proj.weight: math.sqrt(6 / (3 * patch * patch + dim)),
    }
    for weight, limit in limits.items():
        assert 0.98 * limit < float(weight.abs().max()) <= limit
    for bias in (
        encoder.model.conv_proj.bias,
        block.self_attention.in_proj_bias,
        block.mlp[0].bias,
        block.mlp[3].bias,
    ):
        assert bias.abs().sum() == 0


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_patch_projection_stays_put_while_other_weights_move(tmp_path, optimizer):
    encoder = build_image_encoder("vit-tiny-moco-v3", 16)
    encoder.model.encoder.layers = encoder.model.encoder.layers[:2]
    before = {name: value.clone() for name, value in encoder.named_parameters()}
    method = get_method("moco-v3")(encoder, None)
    batches = [{"image": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}]
    config = TrainerConfig(steps=3, weight_decay=0.5, optimizer=optimizer, device="cpu", diagnose=False)
    Trainer(method, ImageViews(16), batches, config, tmp_path).train()
    frozen = {"model.conv_proj.weight", "model.conv_proj.bias", "model.encoder.pos_embedding"}
    still = {name for name, value in encoder.named_parameters() if torch.equal(value.cpu(), before[name])}
    assert still == frozen
    slow = method.momentum_encoder.module[0]
    assert torch.equal(slow.model.conv_proj.weight.cpu(), before["model.conv_proj.weight"])


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "vit_b_32"])
def test_the_patch_projection_of_any_vision_transformer_can_be_frozen(name):
    with torch.device("meta"):
        free, frozen = build_image_encoder(name, 64), build_image_encoder(name, 64, freeze_patches=True)
    fixed = {
        key.rpartition(".")[0]
        for (key, value), other in zip(free.named_parameters(), frozen.parameters(), strict=True)
        if value.requires_grad and not other.requires_grad
    }
    assert fixed in ({"model.patch_embed.proj"}, {"model.conv_proj"})


def test_freezing_needs_a_patch_projection():
    with pytest.raises(UserError, match=r"'resnet18' has no patch projection\. Leave the option out"):
        build_image_encoder("resnet18", 32, freeze_patches=True)


@pytest.mark.parametrize("encoder", ["vit-tiny-moco-v3", "timm/vit_tiny_patch16_224"])
def test_small_crops_that_leave_pixels_over_are_refused_before_training(encoder):
    size, patch = (32, 4) if encoder == "vit-tiny-moco-v3" else (64, 16)
    views = ImageViewConfig("swav-cifar", small_size=patch + 2)
    domain = ImageDomain(VisionConfig("digits", encoder, image_size=size, views=views), 0)
    with pytest.raises(UserError, match=f"can't take images of {patch + 2} px .* Give another --small-size"):
        domain.build_encoder()
    views = dataclasses.replace(views, small_size=2 * patch)
    domain = ImageDomain(VisionConfig("digits", encoder, image_size=size, views=views), 0)
    small = torch.zeros(1, 3, 2 * patch, 2 * patch)
    assert domain.build_encoder().eval()(small).shape == (1, 192)
