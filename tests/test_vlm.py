"""The six masks, what they forbid, and encoding, against hand-written matrices and slow loops."""

import dataclasses
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import bert
import vlm
from loss import nce
from tests.small import (
    FIRST_WORD,
    LOSSES,
    PAD,
    SEP,
    SEP_PLACE,
    UNK,
    B,
    L,
    T,
    V,
    clips,
    hide,
    pad_right,
    random_batch,
    real_places,
    same,
    tiny_config,
    tiny_model,
)
from vlm import ISOLATED, KINDS, VLM, Batch, attention_mask

ROOT = Path(__file__).parents[1]

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


@pytest.mark.usefixtures("width")
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
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("loss.nce", lambda e, *args: seen.append(e) or nce(e, *args))
        value = model.pretrain_loss(batch, loss).value()
    return seen, value


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("rows", [[0], [2], [2, 0, 1]])
@pytest.mark.parametrize("kind", ISOLATED)
@torch.no_grad()
def test_video_and_text_encoded_apart_equal_the_one_isolated_pass(kind, rows):
    """Catches wrong positions or segments in the two short cuts; 1e-5 is DESIGN 4's, for fp32."""
    model, batch = tiny_model(dtype=torch.float32), clips(hide(random_batch()), rows)
    h = model(batch, kind)
    same(model.encode_video(batch.video, batch.video_valid), h[:, 1 : V + 2], 1e-5)
    same(model.encode_text(batch.text, batch.text_valid), h[:, V + 2 :], 1e-5)


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
@torch.no_grad()
def test_segment_classifies_every_second_and_not_the_sep():
    """Catches logits shifted by one place: row v must come from second v's own hidden state."""
    model, batch = tiny_model(num_labels=4), hide(random_batch())
    h = model.encode_video(batch.video, batch.video_valid)
    logits = model.segment(batch.video, batch.video_valid)
    assert logits.shape == (B, V, 4)
    for v in range(V):
        same(logits[:, v], model.classifier(h[:, v]), 1e-12)


@pytest.mark.usefixtures("width")
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
def test_padding_is_not_computed_and_heads_run_on_hidden_tokens_only(width):
    """Catches a layer that multiplies padding, a head on all tokens, an MLP that runs twice; in a
    wide model the last layer too runs on hidden tokens alone."""
    model, batch, rows = tiny_model(), random_batch(), {}
    layers = model.bert.encoder["layer"]
    for name, module in {
        "layer": layers[0].intermediate["dense"],
        "last": layers[1].intermediate["dense"],
        "head": model.cls["predictions"].transform["dense"],
        "mlp": model.videomlp.linear2,
    }.items():
        module.register_forward_hook(
            lambda m, x, y, name=name: rows.setdefault(name, []).append(len(y))
        )
    model.pretrain_loss(batch)
    hidden = batch.video_hidden.sum(), batch.text_hidden.sum()
    assert rows["layer"] == [real_places(batch).sum()] and rows["head"] == [*hidden]
    assert rows["last"] == ([sum(hidden)] if width == "wide" else rows["layer"])
    assert rows["mlp"] == [
        batch.video_valid.sum(),
        1,
    ]  # each real second once, and one zero feature


@torch.no_grad()
def test_dropout_acts_where_bert_has_it_in_training_and_never_in_eval(monkeypatch, width):
    """Catches a missing dropout, and attention dropout, a mere number, that stays on in eval."""
    changes = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.25)
    model, batch, calls = tiny_model(**changes), hide(random_batch()), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, dropout_p=0.0):
        calls.append(dropout_p)
        return attention(*args, dropout_p=dropout_p)

    def draw(shape, p):
        if len(shape) == 1:  # for attention; for hidden states the modules' hooks tell
            calls.append(p)
        return survivors(shape, p)

    survivors = bert.survivors
    monkeypatch.setattr(bert, "survivors", draw)
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
    assert calls == [0.0] * (7 if width == "narrow" else 5)


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
    assert said.err == "error: --video 4 --text 0: wanted 0..100 and 1..100\n"


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
