import pytest
import timm
import torch
import torchvision

from contrastive_mm.errors import UserError
from contrastive_mm.vision.encoders import libraries
from contrastive_mm.vision.encoders.backbones import coarsest
from contrastive_mm.vision.encoders.build import build_image_encoder

SIZES = [
    ("small-conv", 8),
    ("small-conv", 96),
    ("resnet18", 32),
    ("resnet18", 64),
    ("resnet18", 96),
    ("resnet18", 224),
    ("timm/resnet10t", 32),
    ("timm/resnet10t", 96),
    ("resnet18-1x-sk", 32),
    ("resnet18-1x", 96),
    ("mobilenet_v3_small", 64),
    ("googlenet", 96),
    ("shufflenet_v2_x0_5", 96),
    ("maxvit_t", 224),
    ("vit_b_32", 64),
    ("vit_tiny_patch16_224", 96),
    ("vit-tiny-moco-v3", 32),
    ("vit-tiny-moco-v3", 224),
    ("swin_t", 64),
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_features_and_maps_are_what_the_encoder_declares(name, size):
    with torch.device("meta"):  # shapes without the work
        encoder = build_image_encoder(name, size)
        images = torch.randn(2, 3, size, size)
    assert encoder(images).shape == (2, encoder.feature_dim)
    maps = encoder.feature_maps(images)
    assert [found.shape[:2] for found in maps] == [(2, dim) for dim in encoder.map_dims]
    assert [found.shape[2] for found in maps] == [-(-size // stride) for stride in encoder.map_strides]
    assert encoder.map_strides == sorted(set(encoder.map_strides)), "each coarser than the one before"


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t", "resnet18-1x", "resnet18-1x-sk", "small-conv"])
@pytest.mark.parametrize("size", [32, 96])
def test_the_mean_of_the_last_map_is_the_output_of_a_convolutional_network(name, size):
    encoder = build_image_encoder(name, size).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(encoder.feature_maps(images)[-1].mean(dim=(2, 3)), encoder(images))


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "timm/resnet18d", "resnet18-1x", "resnet18-1x-sk"])
def test_a_resnet_keeps_the_resolution_of_small_images_and_divides_large_ones_by_32(name):
    with torch.device("meta"):
        small, large = build_image_encoder(name, 64), build_image_encoder(name, 65)
    assert small.map_strides == [1, 2, 4, 8]
    assert large.map_strides == [4, 8, 16, 32]
    assert small.map_dims == large.map_dims == [64, 128, 256, 512]


def test_the_small_stem_is_one_3x3_convolution_without_pooling():
    for name in ("resnet18", "timm/resnet18d"):
        model = build_image_encoder(name, 32).model
        assert (model.conv1.kernel_size, model.conv1.stride) == ((3, 3), (1, 1))
        assert isinstance(model.maxpool, torch.nn.Identity)
        model = build_image_encoder(name, 32, small_stem=False).model
        assert isinstance(model.maxpool, torch.nn.MaxPool2d)


def test_maps_of_replaced_layers_are_the_new_layers():
    encoder = build_image_encoder("resnet18", 32).eval()
    encoder.model.layer4 = torch.nn.Identity()
    assert encoder.feature_maps(torch.randn(1, 3, 32, 32))[-1].shape == (1, 256, 8, 8)


def test_coarsest_takes_the_last_of_each_of_four_resolutions():
    maps = [torch.full((1, 1, side, side), float(i)) for i, side in enumerate([64, 32, 32, 16, 8, 8, 4])]
    assert [int(found[0, 0, 0, 0]) for found in coarsest(maps)] == [2, 3, 5, 6]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_features_are_what_torchvisions_classifier_reads(name):
    encoder = build_image_encoder(name, 96).eval()
    classifier = torchvision.models.get_model(name, weights=None).eval()
    left = classifier.load_state_dict(encoder.model.state_dict(), strict=False)
    path = [path for path, layer in classifier.named_modules() if isinstance(layer, torch.nn.Linear)][-1]
    assert left.unexpected_keys == []
    assert left.missing_keys == [f"{path}.weight", f"{path}.bias"]
    read = []
    classifier.get_submodule(path).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        classifier(images)
        torch.testing.assert_close(encoder(images), read[0], atol=1e-5, rtol=1e-4)


def test_features_are_timms_before_the_classifier():
    encoder = build_image_encoder("timm/vit_tiny_patch16_224", 96).eval()
    model = timm.create_model("vit_tiny_patch16_224", img_size=96).eval()
    left = model.load_state_dict(encoder.model.state_dict(), strict=False)
    assert left.unexpected_keys == []
    assert left.missing_keys == ["head.weight", "head.bias"]
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(encoder(images), expected)
        assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 192), "small crops"


def test_a_name_of_both_libraries_is_torchvisions_unless_it_says_timm():
    def library(name):
        return type(build_image_encoder(name, 32).model).__module__.partition(".")[0]

    assert library("resnet18") == library("torchvision/resnet18") == "torchvision"
    assert library("timm/resnet18") == library("timm/resnet18.a1_in1k") == "timm"
    assert library("resnet10t") == "timm"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet-50", "resnet50"),
        ("timm/resnet-50", "timm/resnet50"),
        ("resnet50-5x", "resnet50-4x"),
        ("vit-small-mocov3", "vit-small-moco-v3"),
        ("timm/resnet18.a2", "timm/resnet18"),
        ("torchvision/vit_tiny_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name, near):
    with pytest.raises(UserError, match=f"Unknown encoder '{name}'. Did you mean '{near}'"):
        build_image_encoder(name, 32)


def test_without_timm_its_names_say_what_to_install(monkeypatch):
    monkeypatch.setattr("contrastive_mm.vision.encoders.build.find_timm", lambda: None)
    monkeypatch.setattr(libraries, "find_timm", lambda: None)
    for name in ("timm/resnet18", "vit_tiny_patch16_224"):
        with pytest.raises(UserError, match=r'need one more package: pip install "contrastive_mm\[timm\]"'):
            build_image_encoder(name, 32)
    assert build_image_encoder("resnet18", 32).feature_dim == 512


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("squeezenet1_0", 64, "no linear classifier"),
        ("alexnet", 32, "'alexnet' can't take images of 32 px"),
        ("timm/vit_tiny_patch16_224", 33, "can't take images of 33 px .*divisible by patch size"),
        ("vit_b_16", 40, "patches of 16 px, but they have 40 px. Set --image-size 32"),
        ("vit-tiny-moco-v3", 30, "patches of 4 px, but they have 30 px. Set --image-size 28"),
    ],
)
def test_what_an_encoder_cannot_take_is_said_before_training(name, size, said):
    with pytest.raises(UserError, match=said):
        build_image_encoder(name, size)


def test_pretrained_weights_are_asked_of_the_library_and_keep_their_stem(monkeypatch):
    asked = []
    torchvision_model, timm_model = torchvision.models.get_model, timm.create_model

    def get_model(name, weights=None, **options):
        asked.append((name, weights))
        return torchvision_model(name, weights=None, **options)

    def create_model(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return timm_model(name, pretrained=False, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    monkeypatch.setattr(timm, "create_model", create_model)
    encoders = [build_image_encoder(name, 32, pretrained=True) for name in ("resnet18", "timm/resnet18.a1_in1k")]
    assert asked == [("resnet18", "DEFAULT"), ("resnet18.a1_in1k", True)]
    assert [encoder.model.conv1.stride for encoder in encoders] == [(2, 2), (2, 2)]
    # Published at 224 px: the position embeddings are interpolated to the size asked for.
    transformer = build_image_encoder("vit_b_32", 64, pretrained=True)
    assert transformer.model.encoder.pos_embedding.shape == (1, 5, 768)
    assert transformer(torch.randn(1, 3, 64, 64)).shape == (1, 768)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18"])
def test_a_failed_download_is_one_clear_error(monkeypatch, name):
    def fail(*_, **__):
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"weights of 'resnet18' can't be had: Name or service not known\. Check"
    ) as error:
        build_image_encoder(name, 32, pretrained=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["small-conv", "resnet50-2x", "vit-small-moco-v3"])
def test_own_encoders_have_no_pretrained_weights(name):
    with pytest.raises(UserError, match="no pretrained weights of"):
        build_image_encoder(name, 32, pretrained=True)
