"""Pictures: the attention that is drawn is the model's own; files are as wide as promised."""

import struct
import sys

import pytest
import torch

import eval as evaluation
import pictures
from data import open_features, pairs
from pictures import attention, crossing, plane
from tasks import open_task
from vlm import KINDS, VLM, Batch, VLMConfig, attention_mask, load_run


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_attention_is_what_the_layers_use(kind):
    """Rows sum to 1, nothing is drawn where the mask forbids, and attention times values is what
    the layer hands on: the drawn heads are rebuilt into the model's last states."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    sizes |= dict(intermediate_size=32, max_position_embeddings=96, video_dim=5, mask_token_id=4)
    sizes |= dict(unk_token_id=1, cls_token_id=2, sep_token_id=3, initializer_range=0.3)
    model = VLM(VLMConfig(**sizes)).double().eval()
    seconds, pieces = torch.tensor([4, 2]), torch.tensor([3, 6])
    video_valid = torch.arange(4) < seconds[:, None]
    text_valid = torch.arange(6) < pieces[:, None]
    batch = Batch(torch.randn(2, 4, 5).double(), video_valid, torch.full((2, 6), 7), text_valid)
    weights = attention(model, batch, kind)
    attend = attention_mask(kind, video_valid, text_valid)
    assert weights.shape == (2, 2, 3, 12, 12)
    assert (weights.sum(4) - 1).abs().max() < 1e-12
    assert not weights[:, ~attend[:, None].expand(2, 3, 12, 12)].any()

    layer, seen = model.bert.encoder["layer"][1], []
    hook = layer.register_forward_hook(lambda m, inputs, out: seen.append((inputs, out)))
    model(batch, kind)
    hook.remove()
    (x, rows, *_), out = seen[0]
    v = layer.by_clip(layer.qkv(x), rows, 2, 12)[2]  # (B, H, L, D/H)
    a = (weights[1] @ v).transpose(1, 2).reshape(24, 24)[rows]
    parts = layer.attention["output"]
    y = parts["LayerNorm"](x + parts["dense"](a))
    z = layer.output["dense"](torch.nn.functional.gelu(layer.intermediate["dense"](y)))
    assert (layer.output["LayerNorm"](y + z) - out).abs().max() < 1e-12


def test_crossing_counts_the_other_modality_alone():
    """By hand: V = 1, T = 2 with its [SEP]; the word looks half at the video, the video at it."""
    w = torch.zeros(1, 1, 1, 5, 5)  # [CLS] v [SEP] t [SEP]
    w[0, 0, 0, 1] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0])
    w[0, 0, 0, 3] = torch.tensor([0.1, 0.5, 0.1, 0.2, 0.1])
    assert crossing(w, 1).item() == pytest.approx((0.4 + 0.5) / 2)


def test_plane_keeps_the_widest_directions():
    """Points on a flat sheet in space keep all their distances."""
    g = torch.Generator().manual_seed(0)
    sheet = torch.randn(50, 2, generator=g).double() @ torch.randn(2, 9, generator=g).double()
    flat, share = plane(sheet)
    assert torch.allclose(torch.cdist(flat, flat), torch.cdist(sheet, sheet), atol=1e-6)
    assert sum(share) == pytest.approx(1) and share[0] >= share[1]


@pytest.mark.parametrize("name", list(pictures.PICTURES))
def test_pictures_are_written_1200_pixels_wide(small_toy, a_run, tmp_path, name, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    args = [name, "--plot", str(tmp_path / "x.png")]
    args += [] if name == "masks" else ["--run", str(a_run)]
    args += [] if name in ("masks", "curves") else ["--data", str(small_toy)]
    assert evaluation.main(args) == 0
    head = (tmp_path / "x.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20])[0] == 1200
    assert "written to" in capsys.readouterr().out


def test_pictures_say_what_they_lack(small_toy, a_run, tmp_path, monkeypatch):
    curves = ["curves", "--plot", str(tmp_path / "x.png"), "--run"]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ValueError, match="pip install matplotlib"):
            evaluation.main([*curves, str(a_run)])
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    with pytest.raises(ValueError, match="wants a directory that train.py left"):
        evaluation.main([*curves, str(tmp_path)])
    (tmp_path / "log.jsonl").write_text("7\n")
    with pytest.raises(ValueError, match="not a log of train.py"):
        evaluation.main([*curves, str(tmp_path)])
    heads = ["heads", "--run", str(a_run), "--data", str(small_toy), "--item", "15"]
    with pytest.raises(ValueError, match=r"--item is 15, wanted 0\.\.14"):
        evaluation.main([*heads, "--plot", str(tmp_path / "x.png")])
    with pytest.raises(ValueError, match="--plot .* cannot be written"):
        evaluation.main([*heads[:-1], "0", "--plot", str(tmp_path / "no" / "x.png")])


def test_the_clips_of_the_sequence_show_each_way_of_hiding():
    """By hand: rows 0..4 hide nothing, all video, all text, a token of each, all video but long."""
    valid = torch.ones(5, 2, dtype=torch.bool), torch.ones(5, 4, dtype=torch.bool)
    valid[1][:4, 3] = False  # 3 text tokens and 2 seconds, the last clip 4 and 2
    video_hidden, text_hidden = torch.zeros(5, 2).bool(), torch.zeros(5, 4).bool()
    video_hidden[[1, 4]] = True
    text_hidden[2, :2] = True
    video_hidden[3, 1] = text_hidden[3, 0] = True
    text = torch.zeros(5, 4, dtype=torch.int64)
    hidden = dict(video_hidden=video_hidden, text_hidden=text_hidden)
    batch = Batch(torch.zeros(5, 2, 3), valid[0], text, valid[1], **hidden)
    ways = ["25 %: all video", "25 %: all text", "50 %: single tokens"]
    assert pictures.examples(batch, 5) == list(zip(ways, (1, 2, 3), strict=True))
    with pytest.raises(ValueError, match="no clip of at most 4 tokens shows this: 25 %: all video"):
        pictures.examples(batch, 4)


def test_clips_of_a_picture_are_the_test_clips(small_toy, a_run):
    """What `heads --item N` draws is the N-th test clip, its own seconds and words."""
    model, tokenizer = load_run(a_run)
    features = open_features(small_toy)
    clip = open_task("retrieval", small_toy, features).test[3].clip
    batch = pairs(features, [clip], tokenizer, model.config)
    assert int(batch.video_valid.sum()) == len(features.open(clip.video))
