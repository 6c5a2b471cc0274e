import importlib
import json

import pytest
import timm
import torch
import yaml
from pictures import picture
from safetensors import safe_open
from safetensors.torch import load_file

from contrastive_mm.checkpoint import save_encoder
from contrastive_mm.cli import main
from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders.build import build_image_encoder
from contrastive_mm.vision.encoders.resnets import BLOCKS
from contrastive_mm.vision.encoders.transformers import MOCO_V3
from contrastive_mm.vision.export import export as export_module
from contrastive_mm.vision.export.constructions import fitting_construction
from contrastive_mm.vision.export.export import export_encoder, load_exported, plain_weights, read_run

SCORES = {
    "untrained encoder": {"knn_accuracy": 0.25},
    "raw input": {"knn_accuracy": 0.5, "linear_probe_accuracy": 0.75},
    "trained encoder": {"knn_accuracy": 0.875, "linear_probe_accuracy": 0.9},
}


@pytest.fixture(autouse=True)
def fewer_blocks(monkeypatch):
    """Networks of the right kind, a fraction of their depth."""
    monkeypatch.setitem(MOCO_V3, "vit-tiny-moco-v3", (2, 192, 12))
    monkeypatch.setitem(BLOCKS, 18, (1, 1, 1, 1))


def make_run(folder, name, size, small_stem=None, **options):
    """A run's folder as training leaves it, and its encoder; BatchNorm has seen images."""
    encoder = build_image_encoder(name, size, small_stem=small_stem)
    encoder.train()(torch.rand(4, 3, size, size) * 3)
    folder.mkdir(exist_ok=True)
    flat = {"domain": "vision", "method": "moco-v3", "data": "digits", "encoder": name, "image_size": size, **options}
    (folder / "config.yaml").write_text(yaml.safe_dump(flat))
    save_encoder(encoder, folder / "encoder.safetensors")
    return encoder.eval()


def run_code(text):
    """What the printed lines make, run as a user would."""
    names = {}
    exec(text.partition("\n\n")[2], names)
    return names


@torch.no_grad()
def assert_same_features(model, encoder, size):
    images = torch.randn(3, 3, size, size)
    torch.testing.assert_close(model(images), encoder(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 32), ("resnet18", 96), ("timm/resnet18", 32), ("mobilenet_v3_small", 64), ("vit-tiny-moco-v3", 16)],
)
def test_torchvision_loads_the_weights_with_only_the_classifier_missing(tmp_path, name, size):
    encoder = make_run(tmp_path / "run", name, size)
    code = export_encoder(tmp_path / "run", tmp_path / "weights.pth", "torchvision")
    model = run_code(code)["model"].eval()
    assert type(model).__module__.startswith("torchvision")
    left = model.load_state_dict(torch.load(tmp_path / "weights.pth"), strict=False)
    path = [path for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert left.unexpected_keys == []
    assert left.missing_keys == [f"{path}.weight", f"{path}.bias"]
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, torch.nn.Identity())
    assert_same_features(model, encoder, size)


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm/resnet10t", 32), ("resnet18", 32), ("timm/vit_tiny_patch16_224", 32), ("vit-tiny-moco-v3", 16)],
)
def test_timm_loads_the_weights_with_nothing_left_over(tmp_path, name, size):
    encoder = make_run(tmp_path / "run", name, size)
    model = run_code(export_encoder(tmp_path / "run", tmp_path / "weights.pth", "timm"))["model"].eval()
    assert type(model).__module__.startswith("timm")
    assert_same_features(model, encoder, size)


@pytest.mark.parametrize("name", ["small-conv", "small-conv-8", "resnet18-1x-sk", "resnet18", "timm/resnet10t"])
def test_safetensors_hold_any_encoder_and_say_which(tmp_path, name):
    encoder = make_run(tmp_path / "run", name, 32)
    path = tmp_path / "weights.safetensors"
    names = run_code(export_encoder(tmp_path / "run", path, "safetensors"))
    if "encoder" in names:
        assert_same_features(names["encoder"].eval(), encoder, 32)
    assert load_file(path).keys() == plain_weights(encoder).keys()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "encoder": name, "image_size": "32"}


@pytest.mark.parametrize(("name", "size"), [("small-conv", 8), ("resnet18-1x-sk", 33), ("vit-tiny-moco-v3", 16)])
def test_onnxruntime_gives_the_same_features_for_any_batch(tmp_path, name, size):
    encoder = make_run(tmp_path / "run", name, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        names = run_code(export_encoder(tmp_path / "run", tmp_path / "model.onnx", "onnx").partition("(features,)")[0])
    for rows in (1, 2, 5):
        images = torch.randn(rows, 3, size, size)
        (features,) = names["session"].run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), encoder(images).detach(), atol=1e-4, rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if "onnx" in path.name] == ["model.onnx"], (
        "one file, no data beside"
    )


def test_an_onnx_file_that_differs_is_not_kept(tmp_path, monkeypatch):
    make_run(tmp_path / "run", "small-conv", 8)
    trace = export_module._trace

    def trace_other(saved, path):
        first = saved.encoder.layers[0][0].weight
        first.data += 0.01
        trace(saved, path)
        first.data -= 0.01

    monkeypatch.setattr(export_module, "_trace", trace_other)
    with pytest.raises(UserError, match=r"differ by .* from PyTorch's, more than 1e-04; nothing was written"):
        export_encoder(tmp_path / "run", tmp_path / "model.onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    make_run(tmp_path / "run", "small-conv", 8)
    imported = importlib.import_module

    def import_module(name, *rest):
        if name == "onnxruntime":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UserError, match=r'pip install "contrastive_mm\[export\]"'):
        export_encoder(tmp_path / "run", tmp_path / "model.onnx", "onnx")


@pytest.mark.parametrize("name", ["small-conv", "vit-tiny-moco-v3", "timm/resnet10t"])
def test_a_hub_folder_loads_back(tmp_path, name):
    encoder = make_run(tmp_path / "run", name, 32)
    said = export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert_same_features(run_code(said.partition("Fill in")[0])["encoder"], encoder, 32)
    assert not load_exported(tmp_path / "hub").training


def test_timm_itself_loads_the_folder_of_a_model_that_it_has(tmp_path):
    encoder = make_run(tmp_path / "run", "timm/vit_tiny_patch16_224", 32)
    export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert_same_features(model, encoder, 32)
    assert model.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert "timm.create_model" in (tmp_path / "hub" / "README.md").read_text()


def test_the_model_card_tells_method_data_scores_and_how_to_load(tmp_path):
    options = {"steps": 7, "batch_size": 16, "temperature": 0.25}
    make_run(tmp_path / "run", "small-conv", 8, data="/home/somebody/secret/birds", **options)
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps({"data": "x", "step": 7, "scores": SCORES}))
    export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["library_name"] == "contrastive_mm"
    for part in (
        "small-conv by moco-v3",
        "data: birds",
        "7 steps, batches of 16",
        "temperature: 0.25",
        "load_exported",
    ):
        assert part in body
    assert "secret" not in body
    assert "| | knn_accuracy | linear_probe_accuracy |" in body
    assert "| untrained encoder | 0.2500 |  |" in body
    assert "| trained encoder | 0.8750 | 0.9000 |" in body
    assert "mean (0.5, 0.5, 0.5) and deviation (0.5, 0.5, 0.5)" in body
    assert "An image encoder trained without labels" in body
    assert "Licence\n\nNone is chosen yet" in body


def test_a_card_without_scores_says_so_and_supcon_names_its_labels(tmp_path):
    make_run(tmp_path / "run", "small-conv", 8, method="supcon")
    export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Not evaluated" in card
    assert "An image encoder trained with labels" in card


@pytest.mark.parametrize("held", ['{"subject": {}, "protocols": {"knn": {}}}', "{", "[1]"])
def test_an_interrupted_or_broken_evaluation_has_no_scores_for_the_card(tmp_path, held):
    make_run(tmp_path / "run", "small-conv", 8)
    (tmp_path / "run" / "evaluation.json").write_text(held)
    export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    assert "Not evaluated" in (tmp_path / "hub" / "README.md").read_text()


def test_a_pretrained_run_is_read_without_a_download_and_with_its_stem(tmp_path):
    encoder = make_run(tmp_path / "run", "resnet18", 32, small_stem=False, pretrained=True)
    assert_same_features(read_run(tmp_path / "run").encoder, encoder, 32)
    assert "Identity" not in export_encoder(tmp_path / "run", tmp_path / "weights.pth", "torchvision")


def test_a_model_that_computes_something_else_does_not_fit():
    encoder = build_image_encoder("resnet18", 32).eval()
    weights = plain_weights(encoder)
    assert fitting_construction("timm", encoder, weights, "resnet18", 32, True) is not None
    assert fitting_construction("timm", encoder, weights, "resnet18", 32, False) is None, "another stem"
    encoder.model.avgpool = torch.nn.AdaptiveMaxPool2d(1)
    assert fitting_construction("timm", encoder, weights, "resnet18", 32, True) is None


@pytest.mark.parametrize(
    ("name", "format"), [("small-conv-8", "timm"), ("resnet18-1x", "torchvision"), ("timm/resnet10t", "torchvision")]
)
def test_a_format_that_does_not_fit_is_refused(tmp_path, name, format):
    make_run(tmp_path / "run", name, 32)
    with pytest.raises(UserError, match=f"{format} has no model that computes what {name} does.*safetensors, onnx"):
        export_encoder(tmp_path / "run", tmp_path / "weights", format)
    assert not (tmp_path / "weights").exists()


def test_what_is_no_run_with_an_image_encoder_is_refused(tmp_path):
    def said(text):
        return pytest.raises(UserError, match=text)

    with said("holds no run: config.yaml is missing"):
        export_encoder(tmp_path / "nothing", tmp_path / "out", "safetensors")
    make_run(tmp_path / "run", "small-conv", 8)
    (tmp_path / "run" / "encoder.safetensors").unlink()
    with said(r"encoder.safetensors does not exist: has this run saved an encoder yet\?"):
        export_encoder(tmp_path / "run", tmp_path / "out", "safetensors")
    for text, message in (
        ("domain: nlp", "not of a vision run"),
        ("domain: vision", "lacks the encoder"),
        ("a: [", "can't"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(text)
        with said(message):
            export_encoder(tmp_path / "run", tmp_path / "out", "safetensors")
    with said("holds no exported encoder"):
        load_exported(tmp_path / "run")
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_unless_overwritten(tmp_path):
    make_run(tmp_path / "run", "small-conv", 8)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name, format in (("file", "safetensors"), ("folder", "hub")):
        with pytest.raises(UserError, match=r"exists already. Replace it with --overwrite"):
            export_encoder(tmp_path / "run", tmp_path / name, format)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="must be a folder"):
        export_encoder(tmp_path / "run", tmp_path / "file", "hub", overwrite=True)
    export_encoder(tmp_path / "run", tmp_path / "file", "safetensors", overwrite=True)
    assert load_file(tmp_path / "file")


def test_the_command_exports_what_training_wrote(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        picture(60 * i, (8, 8)).save(tmp_path / "images" / f"{i}.png")
    train = ["vision", "--data", "images", "--steps", "1", "--batch-size", "4", "--device", "cpu", "--output", "run"]
    assert main(train) == 0
    assert main(["vision", "export", "run", "--format", "hub", "--output", "hub"]) == 0
    assert "encoder = load_exported('hub')" in capsys.readouterr().out
    weights = load_file("run/encoder.safetensors")
    for name, value in load_exported("hub").state_dict().items():
        assert torch.equal(value, weights[name])
    assert main(["vision", "export", "run", "--format", "timm", "--output", "weights.pth"]) == 2
    assert "timm has no model" in capsys.readouterr().err


def test_an_evaluation_that_was_killed_is_no_reason_not_to_export(tmp_path):
    make_run(tmp_path / "run", "small-conv-8", 8)
    for content in ("{", '{"protocols": {}}', "[]"):
        (tmp_path / "run" / "evaluation.json").write_text(content)
        export_encoder(tmp_path / "run", tmp_path / "hub", "hub", overwrite=True)
        assert "No scores" in (tmp_path / "hub" / "README.md").read_text() or read_run(tmp_path / "run").scores is None


@pytest.mark.parametrize("content", ["{", "[]", '{"contrastive_mm": {}}', '{"contrastive_mm": 3}'])
def test_a_changed_configuration_of_an_exported_folder_is_named(tmp_path, content):
    make_run(tmp_path / "run", "small-conv-8", 8)
    export_encoder(tmp_path / "run", tmp_path / "hub", "hub")
    (tmp_path / "hub" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config.json has no part 'contrastive_mm'"):
        load_exported(tmp_path / "hub")
