import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders import build_image_encoder


@pytest.mark.parametrize(
    ("name", "size"),
    [("small-conv", 8), ("resnet18", 32), ("resnet18", 96), ("mobilenet_v3_small", 64), ("vit_b_32", 64)],
)
def test_encoders_give_what_they_declare(name, size):
    encoder = build_image_encoder(name, size).eval()
    with torch.no_grad():
        assert encoder(torch.randn(2, 3, size, size)).shape == (2, encoder.feature_dim)


def test_small_images_get_the_small_stem():
    small, large = build_image_encoder("resnet18", 32), build_image_encoder("resnet18", 224)
    assert small.model.conv1.stride == (1, 1)
    assert large.model.conv1.stride == (2, 2)
    assert small.feature_dim == large.feature_dim == 512


def test_unknown_and_headless_names():
    with pytest.raises(UserError, match="Did you mean 'resnet50'"):
        build_image_encoder("resnet-50", 32)
    with pytest.raises(UserError, match="no linear classifier"):
        build_image_encoder("squeezenet1_0", 64)
