import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from contrastive_mm.errors import UserError
from contrastive_mm.vision.evaluation.corruptions import KINDS, LARGE, SMALL, corrupt


@pytest.fixture
def images(generator):
    """Smooth colourful pictures with an edge and a black corner, 20 x 24."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 24), indexing="ij")
    phase = 6 * torch.rand(5, 3, 1, 1, generator=generator)
    pictures = 127 + 90 * torch.sin(5 * x + 3 * y + phase)
    pictures[:, :, :, 12:] *= 0.6
    pictures[:, :, :3, :3] = 0
    return pictures.round().to(torch.uint8)


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def hsv_brightness(pixel, added):
    import colorsys

    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel))
    return [255 * channel for channel in colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + added))]


@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_is_the_image_itself(images, kind):
    assert torch.equal(corrupt(images, kind, 0), images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 7])
def test_each_severity_does_more_than_the_one_before(images, kind, size):
    enlarged = images.repeat_interleave(size, 2).repeat_interleave(size, 3)
    assert (max(enlarged.shape[2:]) > 96) == (size == 7), "both sets of constants"
    distances = [
        float((corrupt(enlarged, kind, severity).float() - enlarged.float()).square().mean()) for severity in range(6)
    ]
    if kind == "pixelate":  # a side of 12 divides 24 evenly, where 18 does not: only the ends are sure
        assert distances[0] == 0 < distances[1] < distances[5]
    else:
        assert distances == sorted(set(distances))


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_brightness_is_that_of_hsv(images, severity):
    got = corrupt(images, "brightness", severity)
    for row in range(0, 20, 3):
        for column in range(0, 24, 3):
            pixel = images[1, :, row, column].tolist()
            expected = hsv_brightness(pixel, SMALL["brightness"][severity - 1])
            assert got[1, :, row, column].tolist() == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_contrast_draws_each_channel_to_its_own_mean(images, severity):
    factor = SMALL["contrast"][severity - 1]
    got = corrupt(images, "contrast", severity)
    for channel in range(3):
        values = images[2, channel].flatten().tolist()
        mean = sum(values) / len(values)
        expected = [mean + factor * (value - mean) for value in values]
        assert got[2, channel].flatten().tolist() == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("severity", range(1, 6))
def test_blur_equals_scipy(images, severity):
    sigma = SMALL["gaussian_blur"][severity - 1]
    expected = gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    assert np.abs(corrupt(images, "gaussian_blur", severity).numpy() - expected).max() < 0.51


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("size", [(20, 24), (32, 32), (7, 96), (130, 224)])
def test_pixelate_equals_pil(severity, size, generator):
    height, width = size
    noise = torch.randint(0, 256, (2, 3, height, width), generator=generator).to(torch.uint8)
    share = (SMALL if max(size) <= 96 else LARGE)["pixelate"][severity - 1]
    for image, got in zip(noise, corrupt(noise, "pixelate", severity), strict=True):
        small = as_pil(image).resize((int(width * share), int(height * share)), Image.Resampling.BOX)
        expected = as_tensor(small.resize((width, height), Image.Resampling.BOX))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("severity", [1, 5])
def test_jpeg_equals_pil(images, severity):
    for image, got in zip(images, corrupt(images, "jpeg", severity), strict=True):
        buffer = io.BytesIO()
        as_pil(image).save(buffer, "JPEG", quality=SMALL["jpeg"][severity - 1])
        assert torch.equal(got, as_tensor(Image.open(buffer)))


@pytest.mark.parametrize(("side", "constants"), [(96, SMALL), (97, LARGE)])
def test_noise_has_the_stated_deviation(side, constants):
    grey = torch.full((40, 3, side, side), 128, dtype=torch.uint8)
    for severity in (1, 5):
        noise = corrupt(grey, "gaussian_noise", severity).float() - 128
        middle = noise[(noise.abs() < 127)]
        assert abs(float(noise.mean())) < 0.5
        if severity == 1:
            assert float(middle.std()) == pytest.approx(255 * constants["gaussian_noise"][0], rel=0.01)
        else:
            inside = 255 * constants["gaussian_noise"][4]
            assert float((noise.abs() < inside).float().mean()) == pytest.approx(0.683, abs=0.01)


def test_noise_belongs_to_the_image_and_the_seed_and_to_nothing_else(images):
    together = corrupt(images, "gaussian_noise", 3, torch.arange(10, 15), seed=4)
    alone = corrupt(images[2:3], "gaussian_noise", 3, torch.tensor([12]), seed=4)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together, corrupt(images, "gaussian_noise", 3, torch.arange(10, 15), seed=5))
    same = images[:1].expand(3, -1, -1, -1)
    first, second, third = corrupt(same, "gaussian_noise", 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    # (seed, number) = (0, 1) and (1, 0) are not the same noise either.
    assert not torch.equal(
        corrupt(same[:1], "gaussian_noise", 3, torch.tensor([1]), seed=0),
        corrupt(same[:1], "gaussian_noise", 3, torch.tensor([0]), seed=1),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_one_pixel_and_no_image_survive(kind):
    assert corrupt(torch.full((2, 3, 1, 1), 9, dtype=torch.uint8), kind, 5).shape == (2, 3, 1, 1)
    assert corrupt(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), kind, 5).shape == (0, 3, 8, 8)


def test_unknown_kinds_and_severities_are_named():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match="Did you mean 'gaussian_blur'"):
        corrupt(image, "gausian_blur", 1)
    with pytest.raises(UserError, match="from 0 to 5"):
        corrupt(image, "jpeg", 6)
