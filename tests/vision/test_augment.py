import pytest
import torch
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from contrastive_mm.errors import UserError
from contrastive_mm.vision.views.augment import ImageViewConfig, ImageViews, plain_view
from contrastive_mm.vision.views.blur import blur
from contrastive_mm.vision.views.colour import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    adjust_sharpness,
    autocontrast,
    equalise,
    posterise,
    solarise,
    to_grey,
)
from contrastive_mm.vision.views.crops import crop_and_resize
from contrastive_mm.vision.views.draws import random_boxes


def pictures(count=4, height=40, width=52, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 4, width // 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = 0.2 * torch.rand(count, 3, height, width, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize("box", [(0, 0, 40, 52), (3, 7, 30, 20), (10, 5, 9, 11), (39, 51, 1, 1)])
@pytest.mark.parametrize("size", [8, 24, 64])
def test_crop_and_resize_is_pils_to_one_grey_level(box, size):
    images = pictures()
    boxes = torch.tensor([box] * len(images)).float()
    mine = crop_and_resize(images.float() / 255, boxes, size)
    of_bytes = crop_and_resize(images, boxes, size)
    for picture, *both in zip(images, mine, of_bytes, strict=True):
        pil = TF.resized_crop(TF.to_pil_image(picture), *box, [size, size], InterpolationMode.BILINEAR)
        # PIL rounds to whole grey levels after each of its two passes.
        for got in both:
            assert float((TF.to_tensor(pil) - got).abs().max()) <= 1.01 / 255


@pytest.mark.parametrize("size", [16, 64])
def test_mirrored_rows_are_mirrored_and_others_are_not(size):
    images = pictures(2)
    boxes = torch.tensor([[2.0, 3.0, 30.0, 40.0]] * 2)
    plain = crop_and_resize(images, boxes, size)
    mixed = crop_and_resize(images, boxes, size, torch.tensor([True, False]))
    torch.testing.assert_close(mixed[0], plain[0].flip(2))
    torch.testing.assert_close(mixed[1], plain[1])


COLOUR = [
    (adjust_brightness, TF.adjust_brightness, [0.2, 1.0, 1.7, 0.6]),
    (adjust_contrast, TF.adjust_contrast, [0.2, 1.0, 1.7, 0.6]),
    (adjust_saturation, TF.adjust_saturation, [0.0, 1.0, 1.7, 0.6]),
    (adjust_hue, TF.adjust_hue, [-0.2, 0.0, 0.1, 0.5]),
    (adjust_sharpness, TF.adjust_sharpness, [0.0, 1.0, 1.9, 0.1]),
]


@pytest.mark.parametrize(("mine", "torchvision", "factors"), COLOUR)
def test_colour_is_torchvisions_with_a_factor_for_each_image(mine, torchvision, factors):
    images = pictures().float() / 255
    images[0, :, :4] = 0.5  # grey pixels have no hue to turn
    got = mine(images, torch.tensor(factors))
    expected = torch.stack([torchvision(image, factor) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def per_image(change, images, factors):
    """What torchvision makes of each image, in 0..1."""
    return torch.stack([change(image, factor) for image, factor in zip(images, factors, strict=True)]).float() / 255


LEVELS = [(solarise, TF.solarize, [0.0, 100.0, 128.0, 255.0]), (posterise, TF.posterize, [0, 1, 4, 8])]


@pytest.mark.parametrize(("mine", "torchvision", "factors"), LEVELS)
def test_changes_of_grey_levels_are_torchvisions(mine, torchvision, factors):
    images = pictures()
    got = mine(images.float() / 255, torch.tensor(factors))
    torch.testing.assert_close(got, per_image(torchvision, images, factors), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("mine", "torchvision"), [(autocontrast, TF.autocontrast), (equalise, TF.equalize)])
def test_changes_by_the_histogram_are_torchvisions(mine, torchvision):
    images = pictures()
    images[0, :, :, :] //= 4
    images[1, 0] = 7  # a channel of one value
    images[2] = images[2] // 100 * 100  # three values
    got = mine(images.float() / 255)
    torch.testing.assert_close(got, torchvision(images).float() / 255, atol=1.01 / 255, rtol=0)


def test_an_image_of_two_pixels_is_not_sharpened():
    tiny = pictures(2, 8, 8)[:, :, :2, :2].float() / 255
    assert torch.equal(adjust_sharpness(tiny, torch.tensor([0.1, 1.9])), tiny)


def test_grey_is_torchvisions():
    images = pictures().float() / 255
    torch.testing.assert_close(to_grey(images), TF.rgb_to_grayscale(images), atol=1e-6, rtol=0)


@pytest.mark.parametrize("radius", [1, 3, 11])
@pytest.mark.parametrize("height", [12, 40, 96])
def test_blur_is_torchvisions_with_a_width_for_each_image(height, radius):
    images, sigmas = pictures(3, height, 52).float() / 255, [0.1, 0.7, 2.0]
    expected = [
        TF.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2) for image, sigma in zip(images, sigmas, strict=True)
    ]
    torch.testing.assert_close(blur(images, torch.tensor(sigmas), radius), torch.stack(expected), atol=1e-5, rtol=0)


def test_boxes_are_distributed_as_torchvisions(generator):
    height, width, count = 60, 90, 3000
    mine = random_boxes(count, height, width, (0.1, 1.0), generator)
    image = torch.zeros(3, height, width)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.1, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    ).float()
    assert (mine[:, :2] >= 0).all()
    assert (mine[:, 0] + mine[:, 2] <= height).all()
    assert (mine[:, 1] + mine[:, 3] <= width).all()
    error = theirs.std(0) / count**0.5
    assert ((mine.mean(0) - theirs.mean(0)).abs() < 5 * error).all()
    assert ((mine.std(0) / theirs.std(0) - 1).abs() < 0.1).all()


def test_a_picture_too_narrow_for_any_draw_gives_its_middle(generator):
    boxes = random_boxes(50, 100, 5, (0.9, 1.0), generator)
    assert (boxes[:, 3] == 5).all()
    assert set(boxes[:, 2].tolist()) == {7.0}, "5 wide at the ratio 3/4"
    assert set(boxes[:, 0].tolist()) == {47.0}


def test_each_sample_draws_its_own():
    same = pictures(1).expand(64, -1, -1, -1)
    views = ImageViews(16, ImageViewConfig(blur=0.5))({"image": same})
    for view in views.inputs:
        flat = view.flatten(1)
        distances = torch.cdist(flat, flat) + torch.eye(64) * 9
        assert float(distances.min()) > 1e-4, "two of 64 views are equal: drawn once a batch?"


@pytest.mark.parametrize("name", ["flip", "greyscale", "jitter", "blur"])
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_probabilities_are_kept(name, probability):
    off = {"flip": 0.0, "greyscale": 0.0, "jitter": 0.0, "blur": 0.0, "crop_scale": 1.0}
    same = pictures(1, 32, 32).expand(400, -1, -1, -1)
    plain = ImageViews(32, ImageViewConfig(**off)).augment(same.float() / 255)
    some = ImageViews(32, ImageViewConfig(**{**off, name: probability})).augment(same.float() / 255)
    # A sigma below a third of a pixel, an eighth of the draws, changes nothing that can be seen.
    expected = probability * (0.88 if name == "blur" else 1.0)
    changed = ((some - plain).flatten(1).abs().max(1).values > 1e-3).float().mean()
    assert float(changed) == pytest.approx(expected, abs=0.08)


def test_the_seed_decides_and_the_state_goes_on():
    batch = {"image": pictures()}
    first, second = ImageViews(16, seed=3), ImageViews(16, seed=3)
    assert torch.equal(first(batch).inputs[0], second(batch).inputs[0])
    state = first.state_dict()
    expected = first(batch).inputs[1]
    second.load_state_dict(state)
    assert torch.equal(second(batch).inputs[1], expected)
    assert not torch.equal(ImageViews(16, seed=4)(batch).inputs[0], ImageViews(16, seed=3)(batch).inputs[0])


def test_views_are_normalised_and_carry_ids_and_labels():
    batch = {"image": pictures(), "index": torch.arange(4), "label": torch.tensor([1, 0, 1, 0])}
    views = ImageViews(16)(batch)
    assert views.sample_ids is batch["index"]
    assert views.labels is batch["label"]
    assert all(view.shape == (4, 3, 16, 16) for view in views.inputs)
    assert all(-1.001 <= float(view.min()) < float(view.max()) <= 1.001 for view in views.inputs)


def test_grey_images_of_one_channel_work():
    views = ImageViews(8)({"image": pictures()[:, :1]})
    assert views.inputs[0].shape == (4, 1, 8, 8)


def test_plain_view_is_the_whole_image():
    images = pictures(2, 16, 16)
    torch.testing.assert_close(plain_view(images, 16), images.float() / 127.5 - 1)


@pytest.mark.parametrize("options", [{"flip": 1.2}, {"crop_scale": 0.0}, {"jitter_strength": -1.0}])
def test_bad_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options)).replace("_", "-")):
        ImageViewConfig(**options)
