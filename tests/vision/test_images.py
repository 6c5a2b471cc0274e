import numpy as np
import pytest
import torch
from pictures import break_file, levels, picture
from PIL import Image

from contrastive_mm.errors import UserError
from contrastive_mm.vision.data.decoding import decode
from contrastive_mm.vision.data.images import ImageSet, to_classes
from contrastive_mm.vision.data.sources import find_images
from contrastive_mm.vision.domain import ImageDomain, VisionConfig

BOTH_MODES = pytest.mark.parametrize("memory_limit", [0, 1 << 30], ids=["decoded as read", "in memory"])


@pytest.fixture
def partly_broken(tmp_path):
    for i in range(10):
        picture(i).save(tmp_path / f"{i}.png")
    break_file(tmp_path / "3.png")
    (tmp_path / "7.png").write_bytes(b"")
    return tmp_path


@BOTH_MODES
def test_broken_images_are_named_once_counted_and_left_out(partly_broken, capsys, memory_limit):
    images = ImageSet(find_images(str(partly_broken)), 8, 0.2, memory_limit)
    assert len(images) == 8
    assert images.ids == [f"{i}.png" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert levels(images.read(torch.arange(8))) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert levels(images.read(torch.tensor([7, 3]))) == [9, 4]
    said = capsys.readouterr().out
    assert said.count("Left out 2 broken of 10") == 1
    assert "3.png" in said
    assert "7.png" in said


@BOTH_MODES
def test_too_many_broken_images_stop_the_run(partly_broken, memory_limit):
    with pytest.raises(UserError, match=r"2 of 10 images are broken, more than --max-broken 0.1.*3\.png.*7\.png"):
        ImageSet(find_images(str(partly_broken)), 8, 0.1, memory_limit)


@BOTH_MODES
def test_id_label_and_pixels_agree_around_broken_files_in_class_folders(tmp_path, memory_limit):
    for number, name in enumerate(["ape", "bee", "cow"]):
        (tmp_path / name).mkdir()
        for i in range(4):
            picture(50 * number + i).save(tmp_path / name / f"{i}.png")
    # The last of one class and the first of the next: what comes after a broken image is of another class.
    for broken in ("ape/3.png", "bee/0.png", "cow/2.png"):
        break_file(tmp_path / broken)
    images = ImageSet(find_images(str(tmp_path)), 8, 0.5, memory_limit)
    seen = levels(images.read(torch.arange(len(images))))
    classes = ["ape", "bee", "cow"]
    assert images.ids == [f"{classes[level // 50]}/{level % 50}.png" for level in seen]
    assert images.labels.tolist() == [level // 50 for level in seen]
    assert seen == [0, 1, 2, 51, 52, 53, 100, 101, 103]


def test_a_file_that_breaks_later_stops_the_run_by_name(tmp_path):
    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    images = ImageSet(find_images(str(tmp_path)), 8, 0.5, memory_limit=0)
    break_file(tmp_path / "2.png")
    (tmp_path / "3.png").unlink()
    assert levels(images.read(torch.arange(2))) == [0, 1]
    for number in (2, 3):
        with pytest.raises(UserError, match=rf"{number}\.png looked whole at the start and can't be read"):
            images.read(torch.tensor([0, number]))


@pytest.mark.parametrize("error", [KeyError, IndexError, EOFError, TypeError, ZeroDivisionError])
def test_whatever_a_reader_raises_means_a_broken_image(tmp_path, error):
    source = find_images("digits")
    whole = source.open_image

    def fail_on_one(row):
        if row == 5:
            raise error("bad")
        return whole(row)

    source.open_image = fail_on_one
    assert list(ImageSet(source, 8).broken) == [5]


def test_pictures_of_many_kinds_become_rgb_squares(tmp_path):
    picture(200).convert("L").save(tmp_path / "grey.png")
    picture(200).convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture(200).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.gif")
    picture(200).convert("RGBA").save(tmp_path / "alpha.png")
    picture(200, (1, 1)).save(tmp_path / "pixel.png")
    picture(200, (300, 100)).save(tmp_path / "wide.png")
    images = ImageSet(find_images(str(tmp_path)), 8, max_broken=0.0).read(torch.arange(6))
    assert images.shape == (6, 3, 8, 8)
    assert (images.float() - 200).abs().max() <= 3


def halves(left, right, dtype):
    """An array of 8 x 8 whose left half is one value and whose right half another."""
    return np.concatenate([np.full((8, 4), left), np.full((8, 4), right)], axis=1).astype(dtype)


@pytest.mark.parametrize(
    ("left", "right", "dtype", "expected"),
    [
        (100 * 257, 200 * 257, np.uint16, [100, 200]),
        (100 * 257, 200 * 257, ">u2", [100, 200]),
        (100 * 257, 200 * 257, np.int32, [100, 200]),
        (-5000, 1_000_000, np.int32, [0, 255]),
        (0.2, 0.8, np.float32, [51, 204]),
        (-3.0, 700.0, np.float32, [0, 255]),
        (np.nan, 0.4, np.float32, [0, 102]),
        (np.inf, 0.4, np.float32, [255, 102]),
        (70_000, 70_000, np.int32, [0, 0]),
    ],
)
def test_grey_values_of_more_than_eight_bits_are_rescaled_and_not_clipped(tmp_path, left, right, dtype, expected):
    Image.fromarray(halves(left, right, dtype)).save(tmp_path / "deep.tif")
    with Image.open(tmp_path / "deep.tif") as image:
        assert image.mode[0] in "IF"
        got = decode(image, 8)
    assert got[0, 0].tolist() == [expected[0]] * 3
    assert got[7, 7].tolist() == [expected[1]] * 3


def test_a_sixteen_bit_png_keeps_its_levels(tmp_path):
    Image.fromarray(halves(1000, 60_000, np.uint16)).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        got = decode(image, 8)
    assert got[0, [0, 7], 0].tolist() == [round(1000 / 257), round(60_000 / 257)]


def test_a_float_image_without_a_number_is_broken():
    with pytest.raises(ValueError, match="no pixel is a finite number"):
        decode(Image.fromarray(halves(np.nan, np.nan, np.float32)), 8)


def with_hidden_colour(kind):
    """An image whose left half is transparent over a hidden black and whose right half is a grey of 100."""
    colour, alpha = Image.fromarray(halves(0, 100, np.uint8)), Image.fromarray(halves(0, 255, np.uint8))
    if kind == "RGBA":
        return Image.merge("RGBA", (colour, colour, colour, alpha))
    if kind == "LA":
        return Image.merge("LA", (colour, alpha))
    if kind == "PA":
        return with_hidden_colour("RGBA").convert("PA")
    image = colour.convert(kind)
    if kind == "P":
        image = colour.quantize(2)
        image.info["transparency"] = image.getpixel((0, 0))
    else:
        image.info["transparency"] = (0, 0, 0) if kind == "RGB" else 0
    return image


@pytest.mark.parametrize("kind", ["RGBA", "LA", "PA", "P", "RGB", "L"])
def test_what_is_transparent_lets_white_through(kind):
    got = decode(with_hidden_colour(kind), 8)
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[7, 7].tolist() == [100, 100, 100]


def test_what_is_half_transparent_is_half_white(tmp_path):
    image = picture(100, (8, 8)).convert("RGBA")
    image.putalpha(128)
    image.save(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as reopened:
        assert abs(int(decode(reopened, 8)[0, 0, 0]) - (100 * 128 + 255 * 127) / 255) <= 1


def test_a_gif_of_a_transparent_palette_lets_white_through(tmp_path):
    with_hidden_colour("P").save(tmp_path / "p.gif", transparency=with_hidden_colour("P").getpixel((0, 0)))
    with Image.open(tmp_path / "p.gif") as image:
        assert decode(image, 8)[0, 0].tolist() == [255, 255, 255]


# EXIF orientation -> where the file's top left and top right corners belong in the upright picture.
ORIENTATIONS = {
    1: ((0, 0), (0, -1)),
    2: ((0, -1), (0, 0)),
    3: ((-1, -1), (-1, 0)),
    4: ((-1, 0), (-1, -1)),
    5: ((0, 0), (-1, 0)),
    6: ((0, -1), (-1, -1)),
    7: ((-1, -1), (0, -1)),
    8: ((-1, 0), (0, 0)),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_the_exif_orientation_turns_the_picture_upright(tmp_path, orientation):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8], pixels[:8, 8:] = 255, 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    with Image.open(tmp_path / "turned.jpg") as image:
        got = decode(image, 16)[..., 0].astype(int)
    white, grey = ORIENTATIONS[orientation]
    assert abs(got[white] - 255) < 5
    assert abs(got[grey] - 128) < 5


@pytest.mark.parametrize("upright", [True, False])
def test_the_middle_is_cut_out_and_not_squeezed(upright):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 255
    pixels[5:15, 25:35] = 100
    image = Image.fromarray(pixels.transpose(1, 0, 2) if upright else pixels)
    got = decode(image, 20)[..., 0]
    expected = np.full((20, 20), 255)
    expected[5:15, 5:15] = 100
    assert (got == expected).all()


def test_labels_become_class_numbers():
    numbers, names = to_classes(["bee", "ape", "bee"], "here")
    assert (numbers.tolist(), names) == ([1, 0, 1], ["ape", "bee"])
    numbers, names = to_classes([2, 0], "here", ["ape", "bee", "cow"])
    assert (numbers.tolist(), names) == ([2, 0], ["ape", "bee", "cow"])
    assert to_classes([-1, None, float("nan")], "here", ["ape"]) == (None, None)


@pytest.mark.parametrize("missing", [-1, None, float("nan")])
def test_what_has_no_label_among_others_is_minus_one(missing):
    numbers, names = to_classes([1, missing, 0], "here", ["ape", "bee"])
    assert (numbers.tolist(), names) == ([1, -1, 0], ["ape", "bee"])
    numbers, names = to_classes([7, missing, 5], "here")
    assert (numbers.tolist(), names) == ([1, -1, 0], ["5", "7"])


def test_a_class_without_a_name_is_refused():
    with pytest.raises(UserError, match="here holds the class 2, but only classes 0 to 1 have names"):
        to_classes([0, 2], "here", ["ape", "bee"])


def test_the_side_is_that_of_the_images_or_224(tmp_path):
    picture(1, (40, 30)).save(tmp_path / "a.png")
    assert ImageDomain(VisionConfig(data=str(tmp_path)), 0).config.image_size == 30
    picture(1, (400, 300)).save(tmp_path / "a.png")
    assert ImageDomain(VisionConfig(data=str(tmp_path)), 0).config.image_size == 224


def test_a_tiny_image_that_comes_first_is_no_measure_of_the_rest(tmp_path):
    picture(1, (1, 1)).save(tmp_path / "a.png")
    picture(2, (9, 3)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"Not one of the 2 images of .* has 4 pixels a side, a\.png .* --image-size"):
        ImageDomain(VisionConfig(data=str(tmp_path)), 0)
    picture(3, (30, 20)).save(tmp_path / "c.png")
    domain = ImageDomain(VisionConfig(data=str(tmp_path)), 0)
    assert domain.config.image_size == 20
    assert len(domain.images) == 3
    assert ImageDomain(VisionConfig(data=str(tmp_path), image_size=8), 0).config.image_size == 8


def test_a_folder_of_nothing_readable_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"Not one of the 1 images of .* could be opened, a\.png the first of them \(cannot identify"
    ):
        ImageDomain(VisionConfig(data=str(tmp_path)), 0)
