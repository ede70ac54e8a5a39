"""Eq. 5-9 against slow loops in float64: losses, their gradients, chunks, ranks, precisions."""

import dataclasses
import math
from contextlib import nullcontext

import pytest
import torch

import bert
from loss import LOGITS_AT_ONCE, SumAndTrue, nce, nce_in_chunks, sum_and_true
from tests.small import (
    CLS,
    LOSSES,
    SEP,
    SEP_PLACE,
    B,
    Count,
    T,
    W,
    clips,
    gradients,
    hide,
    pad_right,
    random_batch,
    same,
    tiny_config,
    tiny_model,
    value_and_gradients,
)
from vlm import VLM, Batch

# ---- Eq. 9 alone and whole losses


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
    both = nce(torch.cat([e_video, e_text]), [V_, D], own, w0)
    assert both.tolist() == pytest.approx([ln(10 / 3), ln(9 / 2)], abs=1e-14)
    assert nce(e_video, [V_], own).tolist() == pytest.approx([ln(5 / 3)], abs=1e-14)
    bias = torch.tensor([ln(3), 0.0], dtype=torch.float64)
    words = nce(e_text, [D], None, w0, bias)
    assert words.tolist() == pytest.approx([ln(7 / 6)], abs=1e-14)
    nobody = nce(e_video, [V_[:0]], own)  # no candidate but the truth: certain
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("loss", LOSSES)
def test_padding_and_batch_order_never_change_a_gradient(loss):
    """Catches padding that enters V' or the counts; float64, only the order of sums may differ."""
    model, batch = tiny_model(), random_batch()
    expected = value_and_gradients(model, batch, loss)
    same(value_and_gradients(model, pad_right(batch, 4, 2), loss), expected, 1e-10)
    same(value_and_gradients(model, clips(batch, [1, 2, 0]), loss), expected, 1e-10)


@pytest.mark.usefixtures("width")
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
    seen, saved = [], []
    monkeypatch.setattr(
        "loss.nce", lambda e, pools, *a: seen.append((len(e), len(pools[0]))) or nce(e, pools, *a)
    )

    def keep(x):
        saved.append(tuple(x.shape))
        return x

    for target in (dict(index=index, bias=bias), dict(own=own)):
        for at_once, rows in ((1000, [23]), (5 * 17 + 3, [5, 5, 5, 5, 3]), (1, [1] * 23)):
            monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", at_once)  # the default that callers get
            seen.clear(), saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                value = nce_in_chunks(e, [pool], **target).sum()
            assert seen == [(n, 17) for n in rows]
            logits = [shape for shape in saved if len(shape) == 2 and shape[1] == 17]
            assert bool(logits) == (len(rows) == 1)
            value.backward()


@pytest.mark.parametrize("words", [0, 9, 23])
def test_a_sum_and_its_truth_have_pytorchs_gradient_written_once(words):
    """PyTorch's own, bit for bit; in one place of the logits' size, not five and more."""
    g, found, places = torch.Generator().manual_seed(0), [], []
    index = torch.randint(0, 17, (words,), generator=g)
    x, a, b = (torch.randn(n, generator=g) for n in ((23, 17), (23,), (words,)))
    for take in (SumAndTrue.apply, sum_and_true):
        logits = x.clone().requires_grad_()
        total, true = take(logits, index)
        value = (total * a).sum() + (true.sin() * b).sum()
        with Count(23, 17) as count:
            value.backward()
        found.append([total, true, logits.grad])
        places.append(len(count.seen))
    assert all(map(torch.equal, *found)) and places[0] == 1 and places[1] >= 5


def compare_compiled_nce(device: str) -> None:
    """Compare values and gradients of a compiled `nce` with the plain one's, for several sizes."""
    g, plain = torch.Generator().manual_seed(0), nce
    compiled = torch.compile(plain, dynamic=True)
    # several sizes; words alone; no V'; chunk by chunk
    for M, M_v, P, at_once in ((40, 12, 30, 10**6), (28, 0, 30, 10**6), (33, 5, 0, 10**6),
                               (40, 12, 30, 7000)):  # fmt: skip
        leaves = [torch.randn(n, 64, generator=g).to(device) for n in (M, P, 500, M_v)]
        e, V_, D, own = (x.requires_grad_() for x in leaves)
        index = torch.randint(0, 500, (M - M_v,), generator=g).to(device)
        found = []
        for f in (plain, compiled):
            losses = nce_in_chunks(e, [V_, D], own, index, None, at_once, f)
            found.append([losses, *torch.autograd.grad(losses.sum(), (e, V_, D))])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compiled_nce_has_the_gradients_of_the_plain_one():
    """Catches a compiler that spoils them in silence, as PyTorch 2.13 a stack of logsumexps."""
    compare_compiled_nce("cpu")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="PyTorch 2.6 has it first")
def test_a_compiled_step_is_the_plain_one_and_other_lengths_compile_nothing_again(monkeypatch):
    """Catches a layer, or Eq. 9, that is compiled for one number of clips, tokens, hidden ones.

    On the ways of a wide model, whose last layer is another one; a narrow model's are among them.
    """
    monkeypatch.setattr(bert, "WIDE", 1)
    model, plain = (tiny_model(dtype=torch.float32) for _ in range(2))
    model.compile_parts()
    for seed, sizes in enumerate([(4, 6, 7), (7, 5, 9), (3, 8, 6), (9, 3, 4)]):
        batch = random_batch(seed, *sizes)
        batch = dataclasses.replace(batch, video=batch.video.float())
        with torch.compiler.set_stance("fail_on_recompile") if seed else nullcontext():
            found = value_and_gradients(model, batch)
        same(found, value_and_gradients(plain, batch), 1e-4)


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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


@pytest.mark.usefixtures("width")
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
        assert nce(e, [pool], None, index) >= 0
        assert nce(e, [pool[:50], pool[s:]], None, index - s) >= 0
        bias = torch.randn(99, generator=g)
        assert nce(e.float(), [pool.float()], None, index, bias) >= 0
        assert nce(e, [pool], e) >= 0
    e, pool = 32 * torch.eye(12)[:1].to(dtype), torch.ones(99, 12).to(dtype)
    words = nce(e, [pool], None, torch.tensor([7]))
    video = nce(e, [pool[:40], pool[41:]], pool[:1])
    assert [words.item(), video.item()] == pytest.approx([math.log(99)] * 2, abs=1e-5)


def test_the_loss_runs_on_devices_that_nobody_thought_of():
    """Catches a table of devices with no default; "meta" stands for mps, xpu and the rest."""
    e, pool = torch.empty(3, 12, device="meta"), torch.empty(5, 12, device="meta")
    assert nce_in_chunks(e, [pool], e).shape == (3,)


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
