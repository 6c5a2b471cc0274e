"""Published augmentations by name, multi-crop, mixed views, and augmentations of one's own."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats
from test_augment import pictures

from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.methods import SimCLR, SupCon, SwAV, SwAVConfig
from contrastive_mm.vision import PRESETS, ImageViewConfig, ImageViews, Preset, Recipe, SmallConvNet
from contrastive_mm.vision.domain import ImageDomain, VisionConfig
from contrastive_mm.vision.export.model_card import input_scaling
from contrastive_mm.vision.views import augment
from contrastive_mm.vision.views.augment import normalise
from contrastive_mm.vision.views.mixing import CutMix, Mixup, draw_shares
from contrastive_mm.vision.views.presets import NORMALISATIONS

# Crop scale, flip, jitter and its strengths, grey, blur, solarise of each full view: from the papers and the released
# code, as they stand there.
PUBLISHED = {
    "simclr": [((0.08, 1), 0.5, 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0)],
    "simclr-v2": [((0.08, 1), 0.5, 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0)],
    "simclr-cifar": [((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0, 0)],
    "moco-v1": [((0.2, 1), 0.5, 1, (0.4, 0.4, 0.4, 0.4), 0.2, 0, 0)],
    "moco-v2": [((0.2, 1), 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0.5, 0)],
    "moco-v3": [
        ((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1, 0),
        ((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2),
    ],
    "moco-cifar": [((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0, 0)],
    "byol": [
        ((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 1, 0),
        ((0.08, 1), 0.5, 0.8, (0.4, 0.4, 0.2, 0.1), 0.2, 0.1, 0.2),
    ],
    "swav": [((0.14, 1), 0.5, 0.8, (0.8, 0.8, 0.8, 0.2), 0.2, 0.5, 0)],
    "swav-cifar": [((0.14, 1), 0.5, 0.8, (0.4, 0.4, 0.4, 0.1), 0.2, 0, 0)],
}
OFF = {"crop_scale": 1.0, "flip": 0.0, "jitter": 0.0, "greyscale": 0.0, "blur": 0.0}


def numbers(recipe):
    return (
        recipe.crop_scale,
        recipe.flip,
        recipe.jitter,
        pytest.approx(recipe.jitter_strengths),
        recipe.greyscale,
        recipe.blur,
        recipe.solarise,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_was_published(name):
    preset = PRESETS[name]
    recipes = [preset.first] if preset.second is None else [preset.first, preset.second]
    assert [numbers(recipe) for recipe in recipes] == PUBLISHED[name]
    assert preset.first.greyscale_first == (name == "moco-v1")
    views = ImageViews(40, ImageViewConfig(augmentation=name))({"image": pictures(2)})
    sizes = [view.shape for view in views.inputs]
    small = {"swav": 17, "swav-cifar": 20}.get(name)
    assert sizes == [(2, 3, 40, 40)] * 2 + [(2, 3, small, small)] * (6 if small else 0)
    assert views.num_global == 2


def test_small_crops_show_a_small_part_of_the_image():
    ramp = torch.arange(96.0).expand(1, 3, 96, 96).expand(200, -1, -1, -1) / 255
    maker = ImageViews(
        48, ImageViewConfig("swav", flip=0.0, jitter=0.0, greyscale=0.0, blur=0.0, normalisation="none")
    )
    views = maker({"image": ramp})
    for view, low, high in ((views.inputs[0], 0.14, 1.0), (views.inputs[2], 0.05, 0.14)):
        # Of a ramp the slope tells how wide the crop was: its width is a share of 96 pixels.
        width = 255 * (view[:, 0, 0, -1] - view[:, 0, 0, 0]) / 96 * view.shape[3] / (view.shape[3] - 1)
        assert float(width.min()) > (low * 3 / 4) ** 0.5 * 0.9
        assert float(width.max()) < (high * 4 / 3) ** 0.5 * 1.1


def test_swav_trains_on_small_crops_and_methods_of_two_views_name_them():
    views = ImageViews(16, ImageViewConfig("swav-cifar", small_crops=2, small_size=8))({"image": pictures(8)})
    config = SwAVConfig(num_prototypes=4, hidden_dim=8, projection_dim=8)
    SwAV(SmallConvNet(4), config)(views).loss.backward()
    with pytest.raises(UserError, match=r"SimCLR compares exactly 2 views, .* gave 4: .*--small-crops 0.*swav"):
        SimCLR(SmallConvNet(4))(views)


def test_small_crops_may_be_added_to_any_augmentation():
    views = ImageViews(32, ImageViewConfig("byol", small_crops=3))({"image": pictures(2)})
    assert [view.shape[-1] for view in views.inputs] == [32, 32, 14, 14, 14]


def test_options_change_both_views_of_a_preset():
    preset = ImageViewConfig("byol", blur=0.3, jitter_strength=1.0, crop_scale=0.5).preset(224)
    assert [recipe.blur for recipe in (preset.first, preset.second)] == [0.3, 0.3]
    assert preset.second.jitter_strengths == pytest.approx((0.8, 0.8, 0.8, 0.2))
    assert preset.second.crop_scale == (0.5, 1.0)
    assert preset.second.solarise == 0.2, "what no option names stays"


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisation_is_mean_and_deviation(name):
    images = pictures().float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in NORMALISATIONS[name])
    torch.testing.assert_close(normalise(images, name), (images - mean) / deviation)
    maker = ImageViews(40, ImageViewConfig(**OFF, normalisation=name))
    square = pictures(4, 40, 40)
    view = maker.augment(square.float() / 255)
    torch.testing.assert_close(view, maker.plain(square), msg="evaluation sees what training sees")


def test_a_normalisation_of_three_channels_refuses_one():
    with pytest.raises(UserError, match="is of 3 channels, but the images have 1"):
        ImageViews(8, ImageViewConfig("moco-v2"))({"image": pictures()[:, :1]})


def test_greyscale_before_the_jitter_leaves_no_colour():
    recipe = Recipe(crop_scale=(1.0, 1.0), greyscale=1.0, jitter=1.0, blur=0.0)
    for first in (True, False):
        view = ImageViews(40, dataclasses.replace(recipe, greyscale_first=first)).augment(pictures().float() / 255)
        torch.testing.assert_close(view[:, 0], view[:, 1])
    grey = ImageViews(40, dataclasses.replace(recipe, greyscale_first=True, flip=0.0), seed=1)
    colour = ImageViews(40, dataclasses.replace(recipe, flip=0.0), seed=1)
    images = pictures().float() / 255
    assert not torch.allclose(grey.augment(images), colour.augment(images)), "the order makes a difference"


def darken_left(images, generator):
    """Knowledge of a field: the left edge is a ruler, and never the same."""
    shade = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
    return torch.cat([images[..., :4] * shade, images[..., 4:]], dim=3)


RULED = Recipe(crop_scale=(1.0, 1.0), flip=0.0, jitter=0.0, greyscale=0.0, blur=0.0, own=darken_left)


def test_an_augmentation_of_ones_own_goes_by_name_and_as_a_value(monkeypatch):
    monkeypatch.setitem(sys.modules, "my_lab", sys.modules[__name__])
    batch = {"image": pictures(6, 40, 40)}
    by_name = ImageViews(40, ImageViewConfig("my_lab:RULED"), seed=2)(batch)
    by_value = ImageViews(40, Preset(RULED), seed=2)(batch)
    plain = ImageViews(40, dataclasses.replace(RULED, own=None))(batch)
    for mine, value, untouched in zip(by_name.inputs, by_value.inputs, plain.inputs, strict=True):
        assert torch.equal(mine, value)
        torch.testing.assert_close(mine[..., 4:], untouched[..., 4:])
        shade = ((mine[..., :4] + 1) / (untouched[..., :4] + 1)).nanmean(dim=(1, 2, 3))
        assert len(shade.unique()) == 6, "each image has its own"
    for name, problem in [
        ("simclrr", "Did you mean 'simclr'"),
        ("my_lab:nothing", "can't be found"),
        ("no.such.package:x", "can't be found"),
        ("my_lab:OFF", "is a dict; it must be a Preset or a Recipe"),
    ]:
        with pytest.raises(UserError, match=problem):
            ImageViews(8, ImageViewConfig(name))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda images, generator: images[..., 2:, 2:], r"\(8, 3, 14, 14\), torch.float32, cpu"),
        (lambda images, generator: (images * 255).byte(), r"\(8, 3, 16, 16\), torch.uint8, cpu"),
        (lambda images, generator: images.double(), "torch.float64"),
        (lambda images, generator: None, "NoneType"),
    ],
)
def test_an_augmentation_of_ones_own_that_gives_other_images_is_refused(change, found):
    with pytest.raises(UserError, match=rf"own change <lambda> gave .*{found}.* for \(8, 3, 16, 16\)"):
        ImageViews(16, Recipe(own=change))({"image": pictures(8)})


def test_the_recipe_of_the_documentation_trains_from_the_command_line(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.search(r"`microscope.py` holds\n\n```python\n(.*?)```", page, re.DOTALL).group(1)
    (tmp_path / "microscope.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--augmentation=microscope:CELLS", "--data=digits", "--image-size=8", "--batch-size=32", "--steps=2"]
    assert main(["vision", *flags, f"--output={tmp_path / 'run'}"]) == 0
    views = ImageViews(24, ImageViewConfig("microscope:CELLS", crop_scale=1.0, flip=0.0, blur=0.0))
    square = torch.zeros(64, 3, 24, 24, dtype=torch.uint8)
    square[:, :, 0, 0] = 128
    corners = views({"image": square}).inputs[0][:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] > -0.9
    assert corners.sum(1).tolist() == [1] * 64
    assert bool(corners.any(0).all()), "all four turns"


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_come_from_a_beta_distribution(alpha, generator):
    drawn = draw_shares(4000, alpha, generator)
    assert stats.kstest(drawn.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_shares_of_a_tiny_alpha_are_numbers(generator):
    drawn = draw_shares(4000, 1e-3, generator)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    assert 0.4 < float(drawn.mean()) < 0.6


def test_mixup_is_the_weighted_sum_with_the_partner(generator):
    images = pictures(6).float() / 255
    mixing = Mixup.draw(images.shape, 1.0, generator)
    mixed = mixing.apply(images)
    for row, (partner, share) in enumerate(zip(mixing.partner.tolist(), mixing.share.tolist(), strict=True)):
        torch.testing.assert_close(mixed[row], share * images[row] + (1 - share) * images[partner])
    assert sorted(mixing.partner.tolist()) == list(range(6))


def test_cutmix_pastes_a_rectangle_of_the_images_shape_and_its_share_is_what_is_left(generator):
    shape = (3000, 3, 30, 60)
    mixing = CutMix.draw(shape, 1.0, generator)
    whole = []
    for row in range(0, 3000, 10):
        places = mixing.cut[row].nonzero()
        assert float(mixing.share[row]) == pytest.approx(1 - len(places) / 1800)
        if len(places) == 0:
            continue
        (top, left), (bottom, right) = places.min(0).values.tolist(), places.max(0).values.tolist()
        assert len(places) == (bottom - top + 1) * (right - left + 1), "one rectangle"
        if top > 0 and left > 0 and bottom < 29 and right < 59 and right - left > 20:
            whole.append((right - left + 1) / (bottom - top + 1))
    assert 1.8 < sum(whole) / len(whole) < 2.2
    ids = torch.arange(3000.0)[:, None, None, None].expand(-1, 1, 30, 60)
    pasted = mixing.apply(ids)[:, 0]
    expected = torch.where(mixing.cut, mixing.partner[:, None, None].float(), ids[:, 0])
    assert torch.equal(pasted, expected)
    # Where the area before the cut at the borders is uniform, the mean of what lies inside is a quarter.
    assert 0.65 < float(mixing.share.mean()) < 0.8


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_views_tell_their_positives(kind):
    config = ImageViewConfig(**OFF, mix=kind, normalisation="none")
    images = pictures(8, 24, 24)
    views = ImageViews(24, config, seed=5)({"image": images, "label": torch.arange(8) % 2})
    positives, plain = views.positives, images.float() / 255
    torch.testing.assert_close(views.inputs[1], plain)
    # The share of the own image in each mixed view, from the pixels alone.
    for row in range(8):
        own, other = plain[row], plain[positives.partner[row]]
        if positives.partner[row] == row:
            continue
        direction = own - other
        found = ((views.inputs[0][row] - other) * direction).sum() / direction.square().sum()
        # Of a rectangle the pixels' differences weigh, not only its area.
        assert float(found) == pytest.approx(float(positives.share[row]), abs=1e-3 if kind == "mixup" else 0.25)
    SimCLR(SmallConvNet(4))(views).loss.backward()
    both = ImageViews(24, dataclasses.replace(config, mix_both=True), seed=5)(
        {"image": images, "label": torch.arange(8)}
    )
    torch.testing.assert_close(both.inputs[0], both.inputs[1])
    SupCon(SmallConvNet(4))(both).loss.backward()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"solarise": 2.0}, "--solarise = 2"),
        ({"rand_augment": 99}, "--rand-augment = 99; it must lie between 0 and 10"),
        ({"rand_augment_magnitude": 31}, "--rand-augment-magnitude = 31"),
        ({"small_crops": -1}, "--small-crops = -1"),
        ({"small_crops": 2, "small_size": 32}, "--small-size = 32, but full views have a side of 32"),
        ({"mix_alpha": 0.0}, "--mix-alpha = 0.0; it must be above 0"),
        ({"mix_both": True}, "--mix-both has nothing to mix by"),
        ({"mix_alpha": 0.5}, "--mix-alpha has nothing to mix by"),
        ({"rand_augment_magnitude": 5}, "--rand-augment-magnitude has no operations: add --rand-augment"),
        ({"small_size": 8}, "--small-size has no small crops: add --small-crops"),
        ({"jitter_strength": 2.0}, "--jitter-strength = 2.0"),
    ],
)
def test_what_no_view_can_be_made_of_is_refused(options, problem):
    with pytest.raises(UserError, match=problem):
        ImageViews(32, ImageViewConfig(**options))


@pytest.mark.parametrize("name", ["swav-cifar", "moco-v3"])
def test_views_of_presets_and_mixes_go_on_from_a_saved_state(name):
    config = ImageViewConfig(name, rand_augment=1, mix="cutmix")
    batch = {"image": pictures()}
    first, second = ImageViews(16, config, seed=3), ImageViews(16, config, seed=8)
    first(batch)
    second.load_state_dict(first.state_dict())
    mine, theirs = first(batch), second(batch)
    assert all(torch.equal(a, b) for a, b in zip(mine.inputs, theirs.inputs, strict=True))
    assert torch.equal(mine.positives.partner, theirs.positives.partner)


@pytest.mark.parametrize("name", ["simclr", "byol", "swav-cifar"])
@pytest.mark.parametrize("size", [16, 64])
def test_a_batch_in_parts_has_the_views_of_a_whole_one(name, size, monkeypatch):
    batch, config = {"image": pictures(7, 72, 80)}, ImageViewConfig(name, rand_augment=1)
    whole = ImageViews(size, config, seed=1)(batch)
    monkeypatch.setattr(augment, "CACHED", 3 * 3 * size * size)
    parts = ImageViews(size, config, seed=1)(batch)
    for one, other in zip(whole.inputs, parts.inputs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_views_on_a_gpu_are_those_on_the_cpu(name):
    images = pictures(16, 64, 64)
    here, there = (ImageViews(32, ImageViewConfig(name), seed=1)({"image": x}) for x in (images, images.cuda()))
    for one, other in zip(here.inputs, there.inputs, strict=True):
        # TensorFloat32 products and fused additions round otherwise; a hue at a sector's border may jump.
        assert float(((one - other.cpu()).abs() > 0.02).float().mean()) < 1e-3


def test_a_runs_options_say_how_its_images_were_normalised():
    config = VisionConfig(data="digits", image_size=8, views=ImageViewConfig("moco-v2"))
    assert ImageDomain(config, 0).config.views.normalisation == "imagenet"
    mean, deviation = input_scaling({"normalisation": "imagenet"})
    assert (mean, deviation) == tuple(list(values) for values in NORMALISATIONS["imagenet"])


@pytest.mark.parametrize(("size", "name"), [(64, "simclr-cifar"), (65, "simclr")])
def test_the_default_augmentation_fits_the_size_of_the_views(size, name):
    assert ImageViews(size).preset == PRESETS[name]
    mirrored = dataclasses.replace(PRESETS[name].first, flip=0.1)
    assert ImageViews(size, ImageViewConfig(flip=0.1)).preset.first == mirrored
    assert ImageViews(size, ImageViewConfig("byol")).preset == PRESETS["byol"]


def test_a_run_says_which_augmentation_it_had():
    config = VisionConfig(data="digits", image_size=8)
    assert ImageDomain(config, seed=0).config.views.augmentation == "simclr-cifar"


def test_an_augmentation_of_ones_own_that_gives_nan_is_refused():
    with pytest.raises(UserError, match="own change <lambda> gave NaN or infinity"):
        ImageViews(8, Recipe(own=lambda views, source: views / 0 * 0))({"image": pictures(4)})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def (", "SyntaxError"),
    ],
)
def test_a_module_of_ones_own_that_cannot_be_imported_is_named(tmp_path, monkeypatch, code, message):
    (tmp_path / "own_views.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"--augmentation own_views:mine: importing own_views fails with {message}"):
        ImageViews(8, ImageViewConfig(augmentation="own_views:mine"))
