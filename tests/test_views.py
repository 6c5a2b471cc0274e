import pytest
import torch

from contrastive_mm.errors import UserError
from contrastive_mm.views import RandomStream, Views, encode_views


class Counter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, inputs):
        tensor = inputs if isinstance(inputs, torch.Tensor) else inputs["x"] * inputs["mask"]
        self.calls.append(len(tensor))
        return tensor.flatten(1).sum(1, keepdim=True)


def test_views_of_one_size_share_a_pass():
    encoder = Counter()
    views = (torch.ones(2, 4), 2 * torch.ones(2, 4), torch.ones(2, 3))
    first, second, small = encode_views(encoder, views)
    assert encoder.calls == [4, 2]
    assert first.flatten().tolist() == [4, 4]
    assert second.flatten().tolist() == [8, 8]
    assert small.flatten().tolist() == [3, 3]


def test_the_order_of_views_is_kept_when_sizes_alternate():
    sizes = [4, 3, 4, 3]
    outputs = encode_views(Counter(), tuple(torch.full((2, size), float(i)) for i, size in enumerate(sizes)))
    assert [output[0, 0].item() for output in outputs] == [0, 3, 8, 9]


def test_mappings_are_joined_name_by_name():
    encoder = Counter()
    view = {"x": torch.ones(3, 2), "mask": torch.tensor([[1.0, 0.0]]).expand(3, 2)}
    other = {"x": 5 * torch.ones(3, 2), "mask": torch.ones(3, 2)}
    first, second = encode_views(encoder, (view, other))
    assert encoder.calls == [6]
    assert first.flatten().tolist() == [1, 1, 1]
    assert second.flatten().tolist() == [10, 10, 10]


def test_dense_features_share_a_pass_and_stay_with_their_view_sample_and_step():
    class Dense(torch.nn.Linear):
        def forward(self, series):
            calls.append(len(series))
            return super().forward(series)

    calls = []
    torch.manual_seed(0)
    encoder = Dense(3, 8)
    series = torch.randn(5, 9, 3)
    # Parts of the same series, of six, four and six steps.
    parts = [slice(0, 6), slice(2, 6), slice(3, 9)]
    outputs = encode_views(encoder, tuple(series[:, part] for part in parts))
    assert calls == [10, 5], "one pass for both views of six steps"
    assert [tuple(output.shape) for output in outputs] == [(5, 6, 8), (5, 4, 8), (5, 6, 8)]
    whole = encoder(series)
    for part, output in zip(parts, outputs, strict=True):
        torch.testing.assert_close(output, whole[:, part])


def test_bad_views_are_named():
    with pytest.raises(UserError, match="at least one view"):
        Views(())
    with pytest.raises(UserError, match=r"row counts are \[2, 3\]"):
        Views((torch.ones(2, 1), torch.ones(3, 1)))
    with pytest.raises(UserError, match="num_global = 3"):
        Views((torch.ones(2, 1), torch.ones(2, 1)), num_global=3)
    for name in ("sample_ids", "labels"):
        for value in (torch.arange(3), torch.tensor(2)):
            with pytest.raises(UserError, match=rf"Views\.{name} has shape .* the views have 2 rows"):
                Views((torch.ones(2, 1),), num_global=1, **{name: value})
    with pytest.raises(UserError, match="SimCLR compares exactly 2 views"):
        Views((torch.ones(2, 1),), num_global=1).require_pair("SimCLR")


def test_a_stream_goes_on_from_its_state_and_leaves_the_global_one_alone():
    stream, device = RandomStream(3), torch.device("cpu")
    before = torch.get_rng_state()
    torch.rand(5, generator=stream.on(device))
    state = stream.state_dict()
    expected = torch.rand(5, generator=stream.on(device))
    other = RandomStream(0)
    other.load_state_dict(state)
    assert torch.equal(torch.rand(5, generator=other.on(device)), expected)
    assert torch.equal(torch.get_rng_state(), before)
