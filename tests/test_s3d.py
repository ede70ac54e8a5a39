"""The S3D tower against its published facts."""

import itertools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import s3d
from s3d import S3D, load_s3d, max_pool, random_weights, space_to_depth

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model() -> S3D:
    """A network whose every tensor matters: He weights, and BatchNorms that are no identity.

    Their scales make up for gates of about a half, so that inputs, not biases, rule the outputs;
    float64, so that no rounding hides a mistake.
    """
    torch.manual_seed(1)
    model = S3D().eval()
    random_weights(model, 0)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm3d):
            m.weight.data.uniform_(1, 2)
            m.bias.data.normal_(0, 0.1)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.6, 1.5)
        elif isinstance(m, torch.nn.Linear):
            m.bias.data.normal_(0, 0.2)
    return model.double()


# ---- the network


def test_names_and_shapes_are_those_of_the_public_weights(shared):
    """Catches any width, kernel or name that would keep s3d_howto100m.pth from loading."""
    wanted = json.loads((shared.parent / "s3d_tensors.json").read_text())
    wanted = {k: v for k, v in wanted.items() if not k.startswith("text_module.")}
    assert {k: list(v.shape) for k, v in S3D().state_dict().items()} == wanted
    assert len(wanted) == 532


class Reference:
    """The tower once more, in float64 from its published facts alone: no module, no trick.

    SAME padding of a kernel k at stride s is max(k - s, 0) zeros, the smaller half in front: for
    the first convolution that is 0, 1, 1 in front and 1, 2, 2 behind.
    """

    def __init__(self, state: dict):
        self.w = {k: v.double() for k, v in state.items()}
        self.sizes = []

    def norm(self, x, name):
        scale, shift, mean, var = (
            self.w[f"{name}.{k}"][:, None, None, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def unit(self, x, name, padding=(0, 0, 0)):
        x = self.norm(F.conv3d(x, self.w[f"{name}.conv1.weight"], padding=padding), f"{name}.bn1")
        if f"{name}.conv2.weight" in self.w:
            x = F.conv3d(x, self.w[f"{name}.conv2.weight"], padding=(1, 0, 0))
            x = self.norm(x, f"{name}.bn2")
        return x

    def gate(self, x, name):
        mean = x.sum((2, 3, 4)) / x[0, 0].numel()
        z = torch.einsum("bc,dc->bd", mean, self.w[f"{name}.fc.weight"]) + self.w[f"{name}.fc.bias"]
        return torch.einsum("bcthw,bc->bcthw", x, 1 / (1 + (-z).exp()))

    def pool(self, x, kernel, stride):
        for dim, (k, s) in enumerate(zip(kernel, stride, strict=True), 2):
            pad, n = max(k - s, 0), x.shape[dim]
            shape = list(x.shape)
            zeros = []
            for size in (pad // 2, pad - pad // 2):
                shape[dim] = size
                zeros.append(x.new_zeros(shape))
            padded = torch.cat([zeros[0], x, zeros[1]], dim)
            out = math.ceil((n + pad - k) / s) + 1
            windows = [padded.narrow(dim, i * s, min(k, n + pad - i * s)) for i in range(out)]
            x = torch.stack([w.amax(dim) for w in windows], dim)
        self.sizes.append(tuple(x.shape[2:]))
        return x

    def mixed(self, x, name):
        b = [
            self.unit(x, f"{name}.conv_b0"),
            self.unit(self.unit(x, f"{name}.conv_b1_a"), f"{name}.conv_b1_b", (0, 1, 1)),
            self.unit(self.unit(x, f"{name}.conv_b2_a"), f"{name}.conv_b2_b", (0, 1, 1)),
        ]
        padded = F.pad(x, (1,) * 6, value=-math.inf)
        for dim in (2, 3, 4):
            padded = padded.unfold(dim, 3, 1).amax(-1)
        b.append(self.unit(padded, f"{name}.conv_b3_b"))
        return torch.cat([self.gate(y, f"{name}.gating_b{i}") for i, y in enumerate(b)], 1)

    def __call__(self, frames):
        frames = frames.double()
        blocks = [
            frames[:, colour, t::2, row::2, column::2]
            for t, row, column, colour in itertools.product((0, 1), (0, 1), (0, 1), (0, 1, 2))
        ]
        x = F.pad(torch.stack(blocks, 1), (1, 2, 1, 2, 0, 1))
        x = self.pool(self.unit(x, "conv1"), (1, 3, 3), (1, 2, 2))
        x = self.unit(self.unit(x, "conv_2b"), "conv_2c", (0, 1, 1))
        x = self.pool(self.gate(x, "gating"), (1, 3, 3), (1, 2, 2))
        x = self.mixed(self.mixed(x, "mixed_3b"), "mixed_3c")
        x = self.pool(x, (3, 3, 3), (2, 2, 2))
        for k in "bcdef":
            x = self.mixed(x, f"mixed_4{k}")
        x = self.pool(x, (2, 2, 2), (2, 2, 2))
        features = self.mixed(self.mixed(x, "mixed_5b"), "mixed_5c").mean((2, 3, 4))
        return features, features @ self.w["fc.weight"].T + self.w["fc.bias"]


@pytest.mark.parametrize(
    "frames, height, width",
    [(14, 36, 44), (2, 34, 54), (6, 2, 2)],
    ids=str,
)
def test_the_network_agrees_with_one_written_from_the_facts(model, frames, height, width):
    """Catches a swapped channel order, padding, pool, gate or branch, at even and odd map sizes."""
    torch.manual_seed(3)
    x = clips_of(3, frames, height, width)
    reference = Reference(model.state_dict())
    features, embedding = reference(x)
    with torch.inference_mode():
        for ours, theirs in ((model.features(x), features), (model(x), embedding)):
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()
    if height > 2:  # the clips do differ
        assert embedding.std(0).max() > 0.05 * embedding.abs().max()


def clips_of(B: int, *size: int) -> torch.Tensor:
    """Draw clips (B, 3, *size) of noise in patches of different brightness, as pictures have."""
    coarse = F.interpolate(torch.rand(B, 3, 3, 5, 4) ** 3, size=size)
    return (coarse * torch.rand(B, 3, *size)).double()


def half(n: int) -> int:
    return (n + 1) // 2


@pytest.mark.parametrize("size", [(30, 32, 48), (32, 18, 26), (6, 18, 20)], ids=str)
def test_every_map_has_the_size_the_facts_give(model, size):
    """Catches a pool that rounds down: each stride of 2 halves a size and rounds it up."""
    seen = {}
    hooks = [
        m.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, tuple(o.shape[1:])))
        for n, m in model.named_children()
    ]
    with torch.inference_mode():
        model(clips_of(1, *size))
    for hook in hooks:
        hook.remove()
    t, h, w = (n // 2 for n in size)
    assert seen["conv1"] == (64, t + 1, h + 1, w + 1)  # before the first slices are dropped
    h, w = half(h), half(w)
    assert seen["conv_2b"] == (64, t, h, w) and seen["gating"] == (192, t, h, w)
    h, w = half(h), half(w)
    assert seen["mixed_3b"] == (256, t, h, w) and seen["mixed_3c"] == (480, t, h, w)
    t, h, w = half(t), half(h), half(w)
    assert seen["mixed_4b"] == (512, t, h, w) and seen["mixed_4f"] == (832, t, h, w)
    t, h, w = half(t), half(h), half(w)
    assert seen["mixed_5c"] == (1024, t, h, w)


def test_a_block_of_pixels_becomes_channels_colour_fastest():
    """Catches another channel order: the weights would load and mean something else."""
    frames = torch.arange(2 * 3 * 4 * 6 * 8).reshape(2, 3, 4, 6, 8)
    x = space_to_depth(frames)
    assert x.shape == (2, 24, 2, 3, 4)
    for t, row, column, colour in itertools.product((0, 1), (0, 1), (0, 1), (0, 1, 2)):
        channel = ((t * 2 + row) * 2 + column) * 3 + colour
        assert x[1, channel, 1, 2, 3] == frames[1, colour, 2 + t, 4 + row, 6 + column]


@pytest.mark.parametrize("place", [(0, 0, 0), (9, 25, 34), (5, 14, 39)], ids=str)
def test_a_pixel_reaches_the_outputs_it_should_after_the_first_pool(place):
    """Catches the first convolution trimmed at the wrong end.

    Weights of one make every connection visible. Output (t, h, w) of the first pool sees frames
    2t .. 2t+3 and rows 4h-2 .. 4h+9: two taps of two frames, SAME-padded behind; four taps of two
    rows, one padded in front; then three of those, two apart.
    """
    model = S3D().eval()
    model.conv1.conv1.weight.data.fill_(1)
    seen = []
    model.conv_2b.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    frames = torch.zeros(1, 3, 10, 26, 40)
    frames[0, 1, place[0], place[1], place[2]] = 1
    with torch.inference_mode():
        model(frames)
    lit = (seen[0][0, 7] > 0).nonzero().tolist()
    t, y, x = (range(n) for n in seen[0].shape[2:])
    assert lit == [
        [i, j, k]
        for i, j, k in itertools.product(t, y, x)
        if 2 * i <= place[0] <= 2 * i + 3
        and 4 * j - 2 <= place[1] <= 4 * j + 9
        and 4 * k - 2 <= place[2] <= 4 * k + 9
    ]
    assert seen[0].shape[2:] == (5, 7, 10)


def test_gates_weigh_channels_by_the_mean_over_the_whole_clip(model):
    """Catches a gate a position: doubling one far corner must change every position alike."""
    x = torch.rand(2, 192, 3, 4, 5).double()
    ratio = model.gating(x) / x
    assert torch.allclose(ratio, ratio[:, :, :1, :1, :1].expand_as(ratio), rtol=1e-5)
    z = model.gating.fc(x.mean((2, 3, 4)))
    assert torch.allclose(ratio[:, :, 0, 0, 0], 1 / (1 + torch.exp(-z)), rtol=1e-5)
    x[0, :, -1, -1, -1] += 5
    assert ((model.gating(x) / x)[0, :, 0, 0, 0] - ratio[0, :, 0, 0, 0]).abs().min() > 0
    assert torch.allclose((model.gating(x) / x)[1], ratio[1])  # the other clip does not care


@pytest.mark.parametrize("n", range(1, 9))
def test_pools_round_up(n):
    """Catches a lost last row: sizes 1..8 through each of S3D's pools."""
    x = torch.rand(2, 3, n, n, n)
    for k, s in (((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((2, 2, 2), (2, 2, 2))):
        assert torch.equal(max_pool(x, k, s), Reference({}).pool(x, k, s))


def test_folded_batchnorms_change_nothing(model):
    """Catches a fold that forgets a statistic."""
    x = clips_of(2, 8, 32, 32)
    fused = S3D().eval().double()
    fused.load_state_dict(model.state_dict())
    fused.fuse()
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in fused.modules())
    with torch.inference_mode():
        assert torch.allclose(fused(x), model(x), rtol=1e-8, atol=1e-8)


def test_clips_of_a_batch_do_not_see_each_other(model):
    """Catches statistics or gates taken over the batch."""
    x = clips_of(3, 6, 24, 32)
    with torch.inference_mode():
        together = model(x)
        apart = torch.cat([model(x[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, apart, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "frames, message",
    [
        (torch.rand(1, 3, 4, 8, 8) * 255, r"range from .* to 25\d.*divide by 255"),
        (torch.rand(1, 3, 4, 8, 8) - 0.5, "range from -0"),
        (torch.full((1, 3, 4, 8, 8), math.nan), "range from nan"),
        (torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8), "uint8, wanted floats"),
        (torch.rand(1, 4, 8, 8, 3), r"\(1, 4, 8, 8, 3\), wanted \(B, 3, frames"),
        (torch.rand(1, 3, 5, 8, 8), "the last three even"),
        (torch.rand(1, 3, 4, 8, 9), "the last three even"),
        (torch.rand(3, 4, 8, 8), "wanted"),
        (torch.rand(0, 3, 4, 8, 8), "wanted"),
    ],
)
def test_frames_that_mean_nothing_are_refused(model, frames, message):
    """Catches 0..255 instead of 0..1, a layout with colour last, odd sizes, NaN."""
    for call in (model, model.features):
        with pytest.raises(ValueError, match=message):
            call(frames)


# ---- weights


def test_weights_load_with_a_report(model, tmp_path):
    """The public file has the text tower too: named as unused, the rest loaded."""
    state = dict(model.state_dict(), **{"text_module.fc1.bias": torch.zeros(2048)})
    del state["mixed_4c.conv_b0.bn1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth")
    fresh, said = S3D().eval().double(), []
    report = load_s3d(fresh, tmp_path / "w.pth", say=said.append)
    assert report.new == ["mixed_4c.conv_b0.bn1.num_batches_tracked"]
    assert report.unused == ["text_module.fc1.bias"]
    assert len(report.loaded) == 531 and "531 of 532 tensors loaded" in said[0]
    x = clips_of(1, 4, 16, 16)
    with torch.inference_mode():
        assert torch.equal(fresh(x), model(x))


def test_weights_that_do_not_fit_are_named(model, tmp_path):
    """Catches a lenient load: one missing, one of a wrong shape, one NaN, one that is no tensor."""
    path, name = tmp_path / "w.pth", "mixed_5b.gating_b2.fc.weight"
    for value, message in (
        (None, f"{name} is missing"),
        (torch.zeros(128, 127), rf"{name} is \(128, 127\), S3D wants \(128, 128\)"),
        (torch.full((128, 128), math.nan), f"{name} holds NaN"),
        ("a word", "wanted a dict of tensors"),
    ):
        state = dict(model.state_dict())
        state.pop(name)
        torch.save(state if value is None else state | {name: value}, path)
        with pytest.raises(ValueError, match=message):
            load_s3d(S3D(), path, say=print)


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY\x01\x00"], ids=repr)
def test_a_file_that_is_no_weights_is_refused(contents, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match="w.pth: not a plain file of tensors"):
        load_s3d(S3D(), path)
    with pytest.raises(ValueError, match="missing.pth: cannot be read"):
        load_s3d(S3D(), tmp_path / "missing.pth")


class Malice:
    """A pickle that creates a file when it is opened carelessly."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("container", ["torch.save", "pickle"])
def test_a_malicious_pickle_is_refused_and_creates_nothing(container, model, tmp_path):
    """Catches weights_only=False; a reader that trusts the file does make its mark: shown first."""
    path, target = tmp_path / "w.pth", tmp_path / "created"
    contents = dict(model.state_dict(), extra=Malice(target))
    if container == "torch.save":
        torch.save(contents, path)
        torch.load(path, weights_only=False)
    else:
        path.write_bytes(pickle.dumps({"extra": Malice(target)}, protocol=2))
        pickle.loads(path.read_bytes())
    assert target.exists()
    target.unlink()
    with pytest.raises(ValueError, match="not a plain file of tensors"):
        load_s3d(S3D(), path)
    assert not target.exists()


def test_random_weights_repeat_and_differ_by_seed():
    """Catches a draw from the global generator, and layers that the draw leaves out."""
    models = [S3D() for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8), strict=True):
        random_weights(model, seed)
    a, b, c = map(s3d.weights_digest, models)
    assert a == b != c
