"""Pictures to test with."""

import io

import numpy as np
from PIL import Image


def picture(value, size=(12, 10)):
    """A picture of one colour: a grey level, or (red, green, blue)."""
    return Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8))


def encoded(value):
    buffer = io.BytesIO()
    picture(value).save(buffer, "png")
    return buffer.getvalue()


def break_file(path):
    """Leave only the start of a file, as a download that was cut off does."""
    path.write_bytes(path.read_bytes()[:40])


def levels(images):
    """The mean grey level of each image, to a whole number."""
    return images.float().mean(dim=(1, 2, 3)).round().int().tolist()


def idx(array):
    """An array of bytes in the format of MNIST."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()
