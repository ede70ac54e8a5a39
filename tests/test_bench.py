"""The measurements: what is compared is the same thing, and the rows are as promised."""

import argparse
import json

import pytest
import torch

import bench
import s3d
import step
from step import operations, padded_loss, paper_batch
from toy import write_toy
from vlm import VLM, VLMConfig

SMALL = dict(hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)


def test_the_padded_reading_is_the_same_loss_with_the_same_gradients():
    """In float64: value, and the gradient of every parameter that Eq. 9 reads."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(vocab_size=1200, initializer_range=0.2, **SMALL)).double().eval()
    batch = paper_batch(5, model.config)
    batch.video = batch.video.double()
    params = [p for n, p in model.named_parameters() if n != "cls.predictions.bias"]
    a, b = padded_loss(model, batch), model.pretrain_loss(batch).value()
    assert abs(a - b) < 1e-5 * b  # the padded one takes its softmax in fp32
    for x, y in zip(torch.autograd.grad(a, params), torch.autograd.grad(b, params), strict=True):
        assert torch.allclose(x, y, rtol=1e-3, atol=1e-5)


def test_batches_have_the_lengths_of_the_paper():
    """U{8..64} word pieces, of which 61 fit, at 2.4 a second."""
    batch = paper_batch(2000, VLMConfig())
    pieces, seconds = batch.text_valid.sum(1) - 1, batch.video_valid.sum(1)
    assert pieces.min() == 8 and pieces.max() == 61
    assert abs(pieces.float().mean() - 35.9) < 1.5  # 4 standard errors of U{8..64}, cut at 61
    assert (
        torch.equal(seconds, (pieces / 2.4).ceil().long().clamp(max=32))
        or (seconds - pieces / 2.4).abs().max() < 2
    )


def test_retrieval_is_measured_at_youcook2_s_lengths():
    """Means of the annotations: 16.3 seconds, 9.9 word pieces and [SEP]; deciles leave some out."""
    batch = bench.retrieval_batch(3000, VLMConfig(video_dim=1))
    assert abs(batch.video_valid.sum(1).float().mean() - 16.3) < 1.5
    assert abs(batch.text_valid.sum(1).float().mean() - 10.9) < 1.5


def test_operations_are_counted_by_hand(width):
    """One clip of 2 seconds and 3 pieces, one token hidden: every matrix product on paper. In a
    wide model only the hidden one goes through the last layer's second half."""
    c = VLMConfig(vocab_size=1200, video_dim=5, **SMALL)
    batch = paper_batch(1, c)
    keep = slice(0, 1)
    batch.video_valid = torch.tensor([[True, True]])
    batch.text_valid = torch.tensor([[True, True, True, True]])
    batch.video_hidden = torch.tensor([[True, False]])
    batch.text_hidden = torch.zeros(1, 4, dtype=torch.bool)
    batch.video = torch.zeros(1, 2, 5)[keep]
    qkv, rest = 3 * 24 * 24, 24 * 24 + 2 * 24 * 32
    layer = 8 * qkv + (1 if width == "wide" else 8) * rest
    forward = layer + (24 * 24 + 24 * (1200 + 1)) + 2 * (5 * 24 + 24 * 24)
    assert operations(batch, c) == 3 * 2 * forward


def test_rows_are_ratios_in_which_more_is_better():
    faster = bench.row("x", "speed", 2.0, 6.0, "clips/s", higher=True)
    smaller = bench.row("x", "memory", 6.0, 2.0, "MiB")
    assert faster["ratio"] == smaller["ratio"] == 3.0
    assert set(faster) == {"name", "what", "a", "b", "unit", "ratio"}


def test_both_are_timed_in_turn():
    """After one run of each, a, b, a, b ..: as many of each as asked."""
    seen = []
    bench.in_turn(lambda: seen.append("a"), lambda: seen.append("b"), 3)
    assert "".join(seen) == "abababab"


@pytest.mark.slow
@pytest.mark.parametrize("name, names", [
    ("step", ["memory", "step fp32", "ceiling fp32", "pages", "pages memory"]),
    ("precision", ["precision bf16", "precision fp16"]),
    ("caption", ["caption", "caption unpadded"]),
    ("encode", ["encode", "contrast"]),
    ("data", ["data", "data wide", "data share"]),
    ("s3d", ["s3d fp32", "file fp32"]),
])  # fmt: skip
def test_commands_write_their_rows(tmp_path, capsys, name, names, monkeypatch):
    """`python bench.py NAME`, in short; times are not tested. `scale` has its own."""
    if name == "s3d":
        pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    check_rows(tmp_path, capsys, name, names, monkeypatch)


@pytest.mark.coco
def test_metrics_are_timed_beside_the_published_ones(tmp_path, capsys, monkeypatch, java):
    check_rows(tmp_path, capsys, "metrics", ["metrics", "meteor"], monkeypatch)


def test_all_is_each_of_them_once(monkeypatch, tmp_path):
    """Their rows in one list, in the order of --help."""
    monkeypatch.setattr(bench, "start_ranks", lambda: None)
    for name in bench.BENCHES:
        monkeypatch.setitem(bench.BENCHES, name, lambda args, n=name: [bench.row(n, n, 1, 2, "s")])
    assert bench.main(["all", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [r["name"] for r in rows] == [*bench.BENCHES]


def check_rows(tmp_path, capsys, name: str, names: list[str], monkeypatch) -> None:
    """Run one in short."""
    monkeypatch.setattr(bench, "start_ranks", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two only wait, where another test is busy
    for module in (bench, step):
        monkeypatch.setattr(module, "half", lambda: None)
        monkeypatch.setattr(module, "write_toy", lambda root, scale: write_toy(root, scale=0.05))
    monkeypatch.setattr(step, "STEPS", 20)
    monkeypatch.setattr(s3d, "SIZE", 64)  # of 224
    path = tmp_path / "rows.json"
    short = "--batch 4 --layers 1 --clips 1 --repeat 1 --json".split()
    assert bench.main([name, *short, str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [r["name"] for r in rows] == names and all(r["ratio"] > 0 for r in rows)
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize("padded", [True, False])
def test_searching_again_finds_what_generate_finds(padded):
    """Greedy, for with beams the forced [SEP] may decide at the end, which is not read again."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(vocab_size=300, initializer_range=0.3, **SMALL)).eval()
    model.cls["predictions"].bias.data[[0, 100, 101, 102, 103]] = -1e4
    video, valid = torch.randn(2, 4, 512), torch.ones(2, 4, dtype=torch.bool)
    again = bench.search_again(model, video, valid, 1, 5, padded)
    found = model.generate(video, valid, 1, 5)
    assert [w[1:6].tolist() for w in again[:, 0]] == found


def test_a_file_is_timed_against_the_network_alone(monkeypatch):
    """With a network of no cost: what is left is decoding, and both see the same four seconds."""
    pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    monkeypatch.setattr(bench, "half", lambda: None)
    seen = []

    def network(frames: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(frames.shape))
        return torch.ones(len(frames), 512)

    (row,) = bench.s3d_file(network, argparse.Namespace(repeat=1))
    assert row["name"] == "file fp32" and row["a"] > row["b"] > 0
    assert seen == [(4, 3, 30, 224, 224)] * 4
