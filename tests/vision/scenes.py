"""Scenes of coloured shapes to test detection and segmentation with, in COCO's and VOC's formats."""

import json

import numpy as np
from PIL import Image

SHAPES = ("disc", "square")
COLOURS = ((220, 40, 40), (40, 80, 230))


def draw_scene(generator, height=48, width=48, most=3, sides=(12, 20)):
    """Pixels, and a class, box and mask for each of 1 to ``most`` shapes that don't touch; dark noise behind them."""
    pixels = generator.integers(0, 60, (height, width, 3)).astype(np.uint8)
    taken = np.zeros((height, width), bool)
    objects = []
    for _ in range(int(generator.integers(1, most + 1))):
        kind, side = int(generator.integers(2)), int(generator.integers(*sides))
        left, top = int(generator.integers(width - side)), int(generator.integers(height - side))
        if taken[top : top + side, left : left + side].any():
            continue
        taken[top : top + side, left : left + side] = True
        rows, columns = np.mgrid[:height, :width]
        mask = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if kind == 0:
            centre = (side - 1) / 2
            mask &= (rows - top - centre) ** 2 + (columns - left - centre) ** 2 <= (side / 2) ** 2
        pixels[mask] = COLOURS[kind]
        objects.append((kind, [left, top, left + side, top + side], mask.astype(np.uint8)))
    return pixels, objects


def counts(mask):
    """A mask in COCO's uncompressed format: runs of 0 and 1 in turn, down the columns."""
    flat = mask.flatten(order="F").tolist()
    runs, last = [], 0
    for value in flat:
        if value != last or not runs:
            runs.extend([0] if not runs else [])
            if value != last:
                runs.append(0)
                last = value
        runs[-1] += 1
    return {"size": list(mask.shape), "counts": runs}


def coco_scenes(folder, number, seed=0, **options):
    """A COCO file with the ids 5 and 9 for discs and squares, beside a folder of images."""
    generator = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    content = {"images": [], "annotations": [], "categories": [{"id": 5, "name": "disc"}, {"id": 9, "name": "square"}]}
    for image in range(number):
        pixels, objects = draw_scene(generator, **options)
        Image.fromarray(pixels).save(folder / "images" / f"{image}.png")
        height, width = pixels.shape[:2]
        content["images"].append({"id": image, "file_name": f"{image}.png", "height": height, "width": width})
        for kind, (left, top, right, bottom), mask in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image,
                    "category_id": (5, 9)[kind],
                    "bbox": [left, top, right - left, bottom - top],
                    "iscrowd": 0,
                    "area": int(mask.sum()),
                    "segmentation": counts(mask),
                }
            )
    return write_json(folder / "annotations.json", content)


def write_json(file, content):
    file.write_text(json.dumps(content))
    return file


def voc_scene(folder, name="one", size=(20, 16), objects=(("cat", (1, 1, 8, 8), 0),), class_map=None):
    """An image of a VOC folder: width and height, then a class, four corners counted from 1 and 'difficult' each."""
    for part in ("Annotations", "JPEGImages", "SegmentationClass"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), 90, np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
    corners = ("xmin", "ymin", "xmax", "ymax")
    entries = [
        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{corner}>{value}</{corner}>" for corner, value in zip(corners, box, strict=True))
        + "</bndbox></object>"
        for kind, box, difficult in objects
    ]
    text = (
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(entries)}</annotation>"
    )
    (folder / "Annotations" / f"{name}.xml").write_text(text)
    if class_map is not None:
        picture = Image.fromarray(class_map).convert("P")
        picture.putdata(class_map.flatten().tolist())
        picture.save(folder / "SegmentationClass" / f"{name}.png")
