"""A run's encoder for other libraries: plain weights, ONNX, a folder for a hub."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tyro.conf import Positional

from contrastive_mm.checkpoint import load_encoder, load_weights, save_with_torch, write_atomically
from contrastive_mm.errors import UserError
from contrastive_mm.evaluation import read_results
from contrastive_mm.vision.encoders.backbones import ImageEncoder
from contrastive_mm.vision.encoders.build import SMALL_IMAGE, build_image_encoder
from contrastive_mm.vision.export.constructions import (
    LARGEST_DIFFERENCE,
    Construction,
    Library,
    fitting_construction,
    relative_difference,
)
from contrastive_mm.vision.export.model_card import OWN_PART, hub_config, model_card

Format = Literal["torchvision", "timm", "safetensors", "onnx", "hub"]

ONNX_BATCHES = (1, 3)
EXPORT_MISSING = 'ONNX files need a few more packages: pip install "contrastive_mm[export]".'


@dataclass(frozen=True)
class SavedEncoder:
    """A run's encoder, and what the run was.

    Attributes:
        encoder: with the run's weights, in eval mode.
        name: as in ``--encoder``.
        image_size: side of the images, in pixels.
        small_stem: whether a ResNet of this run has the small-image stem.
        options: the run's configuration, flat.
        scores: what ``evaluate`` wrote, or None.
    """

    encoder: ImageEncoder
    name: str
    image_size: int
    small_stem: bool
    options: dict[str, Any]
    scores: dict[str, Any] | None


def export(run: Positional[Path], output: Path, format: Format = "safetensors", overwrite: bool = False) -> None:
    """Write a run's encoder for other libraries, checked to give the same features there.

    torchvision and timm: a state_dict that the library's own model loads with only the classifier missing, for
    encoders that the library has. safetensors: the same weights, of any encoder. onnx: a graph for batches of any
    size. hub: a folder with weights, configuration and model card, to fill in and upload.

    Args:
        run: folder of the run.
        output: file to write, or folder for hub.
        format: what to write.
        overwrite: replace what is there.
    """
    print(export_encoder(run, output, format, overwrite))


def export_encoder(run: Path, output: Path, format: Format, overwrite: bool = False) -> str:
    """As ``export``.

    Returns:
        What was written, and the lines of Python that load it.

    Raises:
        UserError: there is no vision run or it has saved no encoder, ``output`` is there already, the encoder doesn't
            fit the format, or a package is missing.
    """
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} exists already. Replace it with --overwrite, or choose another.")
    if output.exists() and output.is_dir() != (format == "hub"):
        raise UserError(
            f"--output {output} must be a {'folder' if format == 'hub' else 'file'} for --format {format}."
        )
    saved = read_run(run)
    return f"{output} holds {saved.name} of {run}.\n\n{_WRITERS[format](saved, output)}"


def read_run(run: Path) -> SavedEncoder:
    """The encoder that a vision run has saved; its data need not be there, and nothing is downloaded.

    Raises:
        UserError: there is no vision run, it has saved no encoder, or its scores can't be read.
    """
    config = run / "config.yaml"
    if not config.is_file():
        raise UserError(f"{run} holds no run: {config.name} is missing.")
    try:
        options = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{config} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(options, dict) or options.get("domain") != "vision":
        raise UserError(f"{config} is not of a vision run; only image encoders can be exported.")
    name, image_size = options.get("encoder"), options.get("image_size")
    if not isinstance(name, str) or not isinstance(image_size, int):
        raise UserError(f"{config} is no configuration that a run saved: it lacks the encoder or the image size.")
    small_stem = image_size <= SMALL_IMAGE and not options.get("pretrained")
    encoder = build_image_encoder(name, image_size, small_stem=small_stem)
    load_encoder(encoder, run / "encoder.safetensors")
    found = read_results(run / "evaluation.json")
    scores = found if isinstance(found.get("scores"), dict) else None  # an evaluation that was killed has none
    return SavedEncoder(encoder.eval(), name, image_size, small_stem, options, scores)


def plain_weights(encoder: ImageEncoder) -> dict[str, Tensor]:
    """An encoder's weights under its library's names."""
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in _plain_module(encoder).state_dict().items()
    }


def _plain_module(encoder: ImageEncoder) -> nn.Module:
    """The library's model inside an encoder, or the encoder itself where it is this package's own."""
    model = getattr(encoder, "model", encoder)
    assert isinstance(model, nn.Module)
    return model


def load_exported(folder: Path | str) -> ImageEncoder:
    """The encoder of a folder that ``--format hub`` wrote, in eval mode.

    Args:
        folder: the folder; of a hub's repository, what ``huggingface_hub.snapshot_download`` returns.

    Raises:
        UserError: the folder holds no encoder of this package.
    """
    config, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    if not config.is_file() or not weights.is_file():
        raise UserError(f"{folder} holds no exported encoder: config.json or model.safetensors is missing.")
    own = read_results(config).get(OWN_PART)
    if not isinstance(own, dict) or not {"encoder", "image_size", "small_stem"} <= own.keys():
        raise UserError(
            f"{config} has no part {OWN_PART!r} that says which encoder it is: contrastive-mm vision export did not "
            "write it, or it was changed. Export again."
        )
    encoder = build_image_encoder(own["encoder"], own["image_size"], small_stem=own["small_stem"])
    load_weights(_plain_module(encoder), load_file(weights), str(weights))
    return encoder.eval()


def _write_torchvision(saved: SavedEncoder, output: Path) -> str:
    return _write_state_dict(saved, output, "torchvision")


def _write_timm(saved: SavedEncoder, output: Path) -> str:
    return _write_state_dict(saved, output, "timm")


def _write_state_dict(saved: SavedEncoder, output: Path, library: Library) -> str:
    construction = _construction(saved, library)
    if construction is None:
        raise UserError(
            f"{library} has no model that computes what {saved.name} does, so --format {library} can't be written. "
            "Take --format safetensors, onnx or hub."
        )
    weights = construction.rename(plain_weights(saved.encoder))
    write_atomically(output, lambda temporary: save_with_torch(weights, temporary))
    return construction.code(f"torch.load({str(output)!r})")


def _construction(saved: SavedEncoder, library: Library) -> Construction | None:
    return fitting_construction(
        library, saved.encoder, plain_weights(saved.encoder), saved.name, saved.image_size, saved.small_stem
    )


def _write_safetensors(saved: SavedEncoder, output: Path) -> str:
    _save_weights(saved, output)
    libraries: tuple[Library, ...] = ("torchvision", "timm")
    for library in libraries:
        construction = _construction(saved, library)
        if construction is not None and not construction.renames:
            return construction.code(f"safetensors.torch.load_file({str(output)!r})")
    return "\n".join(
        [
            "import safetensors.torch",
            "from contrastive_mm.vision import build_image_encoder",
            "",
            f"encoder = build_image_encoder({saved.name!r}, {saved.image_size}, small_stem={saved.small_stem})",
            f"model = {'encoder' if _plain_module(saved.encoder) is saved.encoder else 'encoder.model'}",
            f"model.load_state_dict(safetensors.torch.load_file({str(output)!r}))",
        ]
    )


def _save_weights(saved: SavedEncoder, output: Path) -> None:
    # timm and transformers look for the entry "format".
    metadata = {"format": "pt", "encoder": saved.name, "image_size": str(saved.image_size)}
    weights = plain_weights(saved.encoder)
    write_atomically(output, lambda temporary: save_file(weights, temporary, metadata))


def _write_onnx(saved: SavedEncoder, output: Path) -> str:
    try:
        importlib.import_module("onnxscript")
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(EXPORT_MISSING) from error

    def write(temporary: Path) -> None:
        try:
            _trace(saved, temporary)
            difference = _difference(saved, runtime, temporary)  # before the file gets its name
        except OSError:  # the disk's fault, and write_atomically says so
            raise
        except Exception as error:  # exporter and runtime each have errors of their own
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"{saved.name} can't be written as ONNX ({reason}). Take another --format, or another release of "
                "torch, onnxscript or onnxruntime."
            ) from error
        if not difference <= LARGEST_DIFFERENCE:
            raise UserError(
                f"The ONNX graph of {saved.name} gives features that differ by {difference:.1e} from PyTorch's, more "
                f"than {LARGEST_DIFFERENCE:.0e}; nothing was written. Take another --format."
            )

    write_atomically(output, write)
    side = saved.image_size
    return "\n".join(
        [
            "import onnxruntime",
            "",
            f"session = onnxruntime.InferenceSession({str(output)!r})",
            f'(features,) = session.run(None, {{"images": images}})  # float32 (B, 3, {side}, {side})',
        ]
    )


def _trace(saved: SavedEncoder, path: Path) -> None:
    # Two images: a batch of one would be taken for a constant.
    images = torch.randn(2, 3, saved.image_size, saved.image_size)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        saved.encoder,
        (images,),
        path,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: batch}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


@torch.no_grad()
def _difference(saved: SavedEncoder, runtime: Any, path: Path) -> float:
    """Between onnxruntime's features and PyTorch's, over batches of several sizes."""
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    differences = []
    for size in ONNX_BATCHES:
        images = torch.randn(size, 3, saved.image_size, saved.image_size)
        (found,) = session.run(None, {"images": images.numpy()})
        differences.append(relative_difference(torch.from_numpy(found), saved.encoder(images)))
    return max(differences)


def _write_hub(saved: SavedEncoder, output: Path) -> str:
    output.mkdir(parents=True, exist_ok=True)
    timm = _construction(saved, "timm")
    config = hub_config(saved.encoder, saved.name, saved.image_size, saved.small_stem, saved.options, timm)
    card = model_card(config, saved.options, saved.scores)
    _save_weights(saved, output / "model.safetensors")
    for name, text in (("config.json", json.dumps(config, indent=2) + "\n"), ("README.md", card)):
        write_atomically(output / name, lambda temporary, text=text: _write_text(temporary, text))  # type: ignore[misc]
    return "\n".join(
        [
            "from contrastive_mm.vision.export.export import load_exported",
            "",
            f"encoder = load_exported({str(output)!r})",
            "",
            f"Fill in the licence in README.md, then: hf upload USER/NAME {output}",
        ]
    )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


_WRITERS: dict[str, Callable[[SavedEncoder, Path], str]] = {
    "torchvision": _write_torchvision,
    "timm": _write_timm,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
    "hub": _write_hub,
}
