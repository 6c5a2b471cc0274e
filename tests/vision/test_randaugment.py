"""RandAugment's operations against torchvision's, and how they are drawn."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from test_augment import pictures
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import RandAugment, _apply_op

from contrastive_mm.vision.views import randaugment
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews
from contrastive_mm.vision.views.draws import draw_plan
from contrastive_mm.vision.views.presets import Recipe
from contrastive_mm.vision.views.randaugment import OPERATIONS, rand_augment_

TORCHVISION = {
    "identity": "Identity",
    "shear-x": "ShearX",
    "shear-y": "ShearY",
    "translate-x": "TranslateX",
    "translate-y": "TranslateY",
    "rotate": "Rotate",
    "brightness": "Brightness",
    "saturation": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterise": "Posterize",
    "solarise": "Solarize",
    "autocontrast": "AutoContrast",
    "equalise": "Equalize",
}
GEOMETRIC = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")


def theirs(image, name, magnitude, sign):
    """One of torchvision's operations at a magnitude of 31, on bytes."""
    strengths, signed = RandAugment()._augmentation_space(31, tuple(image.shape[1:]))[TORCHVISION[name]]
    strength = float(strengths[magnitude]) if strengths.ndim else 0.0
    strength *= sign if signed else 1
    return _apply_op(image, TORCHVISION[name], strength, InterpolationMode.NEAREST, None)


def rand_augment(images, turns, magnitude):
    """Through the draws of a view; these images are smaller than any change of place."""
    plan = draw_plan(Recipe(rand_augment=(turns, magnitude)), len(images), 2, 2, 14, torch.Generator().manual_seed(0))
    rand_augment_(images, plan.operations % len(randaugment.OPERATIONS), plan.signs, magnitude)
    return images


def test_the_operations_are_torchvisions():
    assert set(TORCHVISION.values()) == set(RandAugment()._augmentation_space(31, (40, 52)))
    assert TORCHVISION.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", TORCHVISION)
def test_each_operation_does_what_torchvisions_does(name, magnitude):
    images, signs = pictures(), torch.tensor([1.0, -1.0, 1.0, -1.0])
    mine = OPERATIONS[name](images.float() / 255, magnitude / 30 * signs)
    expected = torch.stack(
        [theirs(image, name, magnitude, float(sign)) for image, sign in zip(images, signs, strict=True)]
    )
    wrong = (mine - expected.float() / 255).abs() > 2.01 / 255
    # Where a pixel's place falls between two, the two may take another neighbour.
    assert float(wrong.float().mean()) < (0.02 if name in GEOMETRIC else 1e-9)


def test_each_image_goes_through_operations_of_its_own_all_equally_often(monkeypatch):
    names = list(OPERATIONS)
    marked = {name: lambda x, s, n=number: x * 20 + n + 1 for number, name in enumerate(names)}
    monkeypatch.setattr(randaugment, "OPERATIONS", marked)
    images = torch.zeros(4200, 3, 2, 2)
    drawn = rand_augment(images, 2, 9)[:, 0, 0, 0].long()
    first, second = drawn // 20 - 1, drawn % 20 - 1
    for turn in (first, second):
        counts = turn.bincount(minlength=14).float()
        assert len(counts) == 14
        assert float(((counts - 300) ** 2 / 300).sum()) < 40, "chi squared of 13 degrees of freedom"
    assert abs(float(torch.corrcoef(torch.stack([first, second]).float())[0, 1])) < 0.1


def test_signs_are_drawn_for_each_image(monkeypatch):
    monkeypatch.setattr(randaugment, "OPERATIONS", {"strength": lambda x, s: x * 0 + s[:, None, None, None]})
    strengths = rand_augment(torch.zeros(1000, 3, 2, 2), 1, 15)[:, 0, 0, 0]
    assert set(strengths.tolist()) == {0.5, -0.5}
    assert 0.4 < float((strengths > 0).float().mean()) < 0.6


def test_the_option_reaches_the_views_and_changes_what_it_says():
    same = pictures(1, 32, 32).expand(64, -1, -1, -1).float() / 255
    off = {"crop_scale": 1.0, "flip": 0.0, "jitter": 0.0, "greyscale": 0.0}
    plain = ImageViews(32, ImageViewConfig(**off)).augment(same)
    moved = [
        float(
            (ImageViews(32, ImageViewConfig(**off, rand_augment=2, rand_augment_magnitude=m)).augment(same) - plain)
            .abs()
            .mean()
        )
        for m in (1, 9, 25)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]
    assert not math.isclose(moved[1], 0)
    grey = ImageViews(32, ImageViewConfig(**off, rand_augment=2)).augment(same[:, :1])
    torch.testing.assert_close(grey, plain[:, :1])


def test_turned_images_are_turned_the_right_way():
    image = pictures(1, 31, 31).float() / 255
    turned = OPERATIONS["rotate"](image, torch.tensor([1.0]))
    expected = TF.rotate(image, 30.0)
    assert float(((turned - expected).abs() > 1e-3).float().mean()) < 0.02
