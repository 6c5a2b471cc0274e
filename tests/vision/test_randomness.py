"""Each random choice is drawn for each image, with the spread that the options ask for."""

import math

import pytest
import torch
from test_augment import pictures

from contrastive_mm.vision.views import colour as colours
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews
from contrastive_mm.vision.views.draws import draw_jitter
from contrastive_mm.vision.views.presets import Preset, Recipe, simclr_jitter

COPIES = 64
OFF = {"crop_scale": 1.0, "flip": 0.0, "jitter": 0.0, "greyscale": 0.0, "blur": 0.0}
COLOURS = ["brightness", "contrast", "saturation", "hue"]


def copies(count=COPIES, height=32, width=32):
    return pictures(1, height, width).expand(count, -1, -1, -1).float() / 255


def kinds(images):
    """How many of the images differ."""
    return len(torch.unique(images.flatten(1), dim=0))


def replace_changes(monkeypatch, changes):
    monkeypatch.setattr(colours, "CHANGES", tuple(changes))


def only(monkeypatch, colour, change=None):
    """Switch the other three colour changes off."""
    own = change or getattr(colours, f"adjust_{colour}")
    replace_changes(monkeypatch, [own if name == colour else lambda images, factor: images for name in COLOURS])


def colour_jitter(images, strengths, generator):
    images = images.clone()
    colours.jitter_(images, torch.ones(len(images), dtype=torch.bool), *draw_jitter(len(images), strengths, generator))
    return images


def random_blur(images):
    """The blur alone, of images that fill their views."""
    recipe = Recipe((1.0, 1.0), flip=0.0, jitter=0.0, greyscale=0.0, blur=1.0)
    return ImageViews(images.shape[-1], Preset(recipe, normalisation="none")).augment(images)


def test_nothing_is_random_with_everything_off():
    assert kinds(ImageViews(32, ImageViewConfig(**OFF)).augment(copies())) == 1


@pytest.mark.parametrize("option", [{"crop_scale": 0.5}, {"blur": 1.0}, {"jitter": 1.0}])
def test_each_image_has_a_crop_a_blur_and_a_jitter_of_its_own(option):
    views = ImageViews(32, ImageViewConfig(**{**OFF, **option})).augment(copies())
    assert kinds(views) > 0.8 * COPIES


@pytest.mark.parametrize("name", ["flip", "greyscale"])
def test_each_image_is_flipped_or_made_grey_for_itself(name):
    views = ImageViews(32, ImageViewConfig(**{**OFF, name: 0.5})).augment(copies())
    assert kinds(views) == 2
    changed = (views != views[0]).flatten(1).any(dim=1).float().mean()
    assert 0.2 < float(changed) < 0.8


def test_a_flip_mirrors_left_and_right():
    image = copies(1)
    flipped = ImageViews(32, ImageViewConfig(**{**OFF, "flip": 1.0})).augment(image)
    torch.testing.assert_close(flipped, image.flip(3) * 2 - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("colour", COLOURS)
def test_each_image_has_a_factor_of_its_own_for_each_colour(monkeypatch, colour, generator):
    only(monkeypatch, colour)
    assert kinds(colour_jitter(copies(), simclr_jitter(0.5), generator)) > 0.8 * COPIES


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.25])
def test_factors_fill_the_range_that_the_strength_gives(monkeypatch, colour, strength, generator):
    only(monkeypatch, colour, lambda images, factor: images * 0 + factor[:, None, None, None])
    drawn = colour_jitter(copies(2000, 4, 4), simclr_jitter(strength), generator)[:, 0, 0, 0]
    low, high = (max(0.0, 1 - 0.8 * strength), 1 + 0.8 * strength) if colour != "hue" else (-0.2 * strength,) * 2
    high = 0.2 * strength if colour == "hue" else high
    slack = 0.02 * (high - low) + 1e-6
    assert low - 1e-6 <= float(drawn.min()) <= low + slack
    assert high - slack <= float(drawn.max()) <= high + 1e-6
    assert float(drawn.mean()) == pytest.approx((low + high) / 2, abs=0.05 * (high - low) + 1e-6)


def test_the_strength_of_the_options_reaches_the_jitter():
    image, moved = copies(200), []
    for strength in (0.0, 0.25, 1.0):
        views = ImageViews(32, ImageViewConfig(**{**OFF, "jitter": 1.0, "jitter_strength": strength})).augment(image)
        moved.append(float((views / 2 + 0.5 - image).abs().mean()))
    assert moved[0] < 1e-3
    assert moved[0] * 10 < moved[1] < moved[2] / 2


def test_all_orders_of_the_colour_changes_come_up_equally_often(monkeypatch, generator):
    # Maps of which no two orders give the same: the result tells the order.
    replace_changes(monkeypatch, [lambda images, factor, n=number: images * (n + 2) + 7**n for number in range(4)])
    count = 2400
    ends = colour_jitter(torch.zeros(count, 3, 2, 2), simclr_jitter(0.5), generator)[:, 0, 0, 0]
    orders, counts = ends.unique(return_counts=True)
    assert len(orders) == math.factorial(4)
    expected = count / 24
    assert float(((counts - expected) ** 2 / expected).sum()) < 60, "chi squared of 23 degrees of freedom"


@pytest.mark.parametrize("size", [10, 40, 100, 224])
def test_the_kernel_of_the_blur_is_a_tenth_of_the_image(size):
    impulse = torch.zeros(8, 1, size, size)
    impulse[:, :, size // 2, size // 2] = 1
    reached = random_blur(impulse).amax(dim=(0, 1, 2)) > 0
    assert int(reached.sum()) == max(3, 2 * (size // 20) + 1)


def test_the_blurs_sigma_is_uniform_from_a_tenth_to_two_pixels():
    lines = torch.zeros(200, 1, 200, 200)
    lines[:, :, 100] = 1  # a line across: only the blur along the height changes it
    profile = random_blur(lines)[:, 0, :, 100]
    sigma = (profile * (torch.arange(200) - 100.0) ** 2).sum(dim=1).sqrt()
    assert float(sigma.max()) == pytest.approx(2.0, abs=0.1)
    assert float(sigma.median()) == pytest.approx(1.05, abs=0.2)
    assert float(sigma.min()) < 0.3
