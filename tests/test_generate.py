"""Captions: beam search with a cache against searches that have none; long videos by windows."""

import dataclasses
import itertools
import math

import pytest
import torch

from vlm import VLM, Batch, VLMConfig

SIZES = dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
SIZES |= dict(intermediate_size=40, max_position_embeddings=64, video_dim=6, initializer_range=0.2)
SIZES |= dict(max_video_len=7, max_len=24, hidden_dropout_prob=0.0)
SIZES |= dict(pad_token_id=0, unk_token_id=1, cls_token_id=2, sep_token_id=3, mask_token_id=4)


def make(seed: int = 0, sep_bias: float = 0.0, **changes) -> VLM:
    """A random float64 model with sharp predictions; sep_bias makes its captions end earlier."""
    torch.manual_seed(seed)
    model = VLM(VLMConfig(**SIZES | changes)).double().eval()
    model.cls["predictions"].bias.data.normal_(0, 0.5)
    model.cls["predictions"].bias.data[3] += sep_bias
    return model


def clips(B: int, V: int, seed: int = 1, E: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Random clips of mixed lengths, the first of all V seconds, zeros behind."""
    g = torch.Generator().manual_seed(seed)
    seconds = torch.randint(1, V + 1, (B,), generator=g)
    seconds[0] = V
    valid = torch.arange(V) < seconds[:, None]
    return torch.randn(B, V, E, generator=g).double() * valid[:, :, None], valid


def next_log_probs(model: VLM, video, valid, words: list[int]) -> torch.Tensor:
    """Everything anew under the captioning mask: log-probabilities (W,) after `words`."""
    text = torch.tensor([[2, *words]])
    batch = Batch(video, valid, text, torch.ones_like(text, dtype=torch.bool))
    logits = model.word_logits(model(batch, "captioning")[:, -1])
    log_probs = logits.float().log_softmax(1)[0]
    log_probs[[0, 1, 2, 4]] = -math.inf
    return log_probs


@torch.no_grad()
def slow_beam_search(model: VLM, video, valid, beams: int, most: int) -> list[int]:
    """One clip, lists, no cache: the rule of `generate`'s docstring."""
    alive, done = [([], 0.0)], []
    while True:
        grown = []
        for words, score in alive:
            log_probs = next_log_probs(model, video, valid, words).tolist()
            for token, p in enumerate(log_probs):
                if p > -math.inf and (len(words) < most or token == 3):
                    grown.append((words, token, score + p))
        grown.sort(key=lambda g: -g[2])
        for words, token, score in grown[:beams]:
            if token == 3 and len(done) < beams:
                done.append((score / (len(words) + 1), words))
        alive = [([*w, token], s) for w, token, s in grown if token != 3][:beams]
        if len(done) == beams or not alive:
            return max(done, key=lambda d: d[0])[1]


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize("sep_bias", [0.0, 2.0])
def test_cached_search_equals_one_that_recomputes_everything(beams, sep_bias):
    """Token for token, and a batch of mixed lengths equals its clips one by one.

    Catches a cache in the wrong order, a beam that reads another's words, a wrong position, padding
    that is attended to, a clip that goes on after it is done.
    """
    model = make(sep_bias=sep_bias)
    video, valid = clips(5, 7)
    found = model.generate(video, valid, beams, max_new_tokens=9)
    lengths = set()
    for i, words in enumerate(found):
        n = int(valid[i].sum())
        one = video[i : i + 1, :n], valid[i : i + 1, :n]
        assert words == slow_beam_search(model, *one, beams, 9)
        assert model.generate(*one, beams, 9) == [words]
        assert not {0, 1, 2, 3, 4} & set(words)
        lengths.add(len(words))
    assert max(lengths) <= 9 and (sep_bias or 9 in lengths)
    assert sep_bias == 0 or min(lengths) < 9  # both ways to end are met


def test_wide_search_is_exhaustive():
    """Three words, at most three of them: 40 captions, and the search finds the best of all."""
    for seed in range(8):
        model = make(seed, vocab_size=8)
        video, valid = clips(1, 4, seed)
        best = []
        for n in range(4):
            for words in itertools.product((5, 6, 7), repeat=n):
                with torch.no_grad():
                    prefixes = [list(words[:i]) for i in range(n + 1)]
                    score = sum(
                        float(next_log_probs(model, video, valid, p)[t])
                        for p, t in zip(prefixes, [*words, 3], strict=True)
                    )
                best.append((score / (n + 1), list(words)))
        assert model.generate(video, valid, beams=200, max_new_tokens=3) == [max(best)[1]]


def test_greedy_search_takes_the_likeliest_word_and_is_deterministic():
    """beams=1 stops at the first [SEP], even where a longer caption would score better."""
    model = make(sep_bias=1.0)
    video, valid = clips(4, 5)
    for i, words in enumerate(model.generate(video, valid, beams=1, max_new_tokens=14)):
        n, said = int(valid[i].sum()), []
        while len(said) < 14:
            with torch.no_grad():
                token = int(
                    next_log_probs(model, video[i : i + 1, :n], valid[i : i + 1, :n], said).argmax()
                )
            if token == 3:
                break
            said.append(token)
        assert words == said
    assert model.generate(video, valid, 5, 9) == model.generate(video, valid, 5, 9)


def test_generate_refuses_what_does_not_fit():
    model = make()
    video, valid = clips(2, 5)
    with pytest.raises(ValueError, match="beams 0"):
        model.generate(video, valid, beams=0)
    with pytest.raises(ValueError, match=r"max_new_tokens 15: wanted at least 1, and 1\.\.14"):
        model.generate(video, valid, max_new_tokens=15)
    with pytest.raises(ValueError, match="9 seconds long, at most 7 fit"):
        model.generate(*clips(2, 9), max_new_tokens=5)


# ---- the loss that trains it


@pytest.mark.usefixtures("width")
def test_caption_loss_is_the_likelihood_of_the_text_with_its_sep():
    """Against next_log_probs word by word; padding, other clips and chunks change nothing."""
    model = make()
    video, valid = clips(3, 6)
    texts = [[9, 20, 31], [7], [8, 8, 36, 5, 21]]
    text = torch.zeros(3, 8, dtype=torch.long)
    for row, words in zip(text, texts, strict=True):
        row[: len(words) + 1] = torch.tensor([*words, 3])
    text_valid = torch.arange(8) < torch.tensor([[len(w) + 1] for w in texts])
    slow = 0.0
    for i, words in enumerate(texts):
        for t, token in enumerate([*words, 3]):
            ids = torch.tensor([[2, *words[:t]]])
            batch = Batch(video[i : i + 1], valid[i : i + 1], ids, torch.ones_like(ids).bool())
            logits = model.word_logits(model(batch, "captioning")[:, -1])
            slow = slow - logits.log_softmax(1)[0, token]
    batch = Batch(video, valid, text, text_valid)
    for at_once in (None, 37, 1):
        sums = model.caption_loss(batch, at_once)
        assert int(sums.text_count) == 12 and int(sums.video_count) == 0
        assert abs(sums.text_sum - slow) < 1e-9 and abs(sums.value() - slow / 12) < 1e-10
        assert sums.chance() == pytest.approx(math.log(37))


def test_a_text_of_the_greatest_length_can_be_learnt():
    """61 word pieces and [SEP] at the paper's sizes: nothing is cut off by the shift."""
    model = make()
    video, valid = clips(2, 7)
    text = torch.randint(5, 37, (2, model.config.max_text_len))
    text[:, -1] = 3
    sums = model.caption_loss(Batch(video, valid, text, torch.ones_like(text).bool()))
    assert int(sums.text_count) == 2 * 15


# ---- videos longer than the model's window


def by_hand(model: VLM, video: torch.Tensor, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One video (n, E) in windows, second by second: states (n, D) and [SEP]'s (D,)."""
    n, M = len(video), model.config.max_video_len
    states, seps = [[] for _ in range(n)], []
    start = 0
    while True:
        part = video[None, start : start + M]
        h = model.encode_video(part, torch.ones(part.shape[:2], dtype=torch.bool))[0]
        for i, row in enumerate(h[:-1]):
            states[start + i].append(row)
        seps.append(h[-1])
        if start + M >= n:
            break
        start += stride
    return torch.stack([sum(s) / len(s) for s in states]), sum(seps) / len(seps)


@pytest.mark.usefixtures("width")
@pytest.mark.parametrize("stride", [None, 1, 2, 5, 7])
def test_windows_are_averaged_as_a_loop_does(stride):
    """Lengths around the window's; in a batch each clip is read as if it were alone."""
    model = make(num_labels=4)
    for V in (1, 6, 7, 8, 10, 11, 14, 23):
        video, valid = clips(4, V, seed=V)
        h = model.encode_video(video, valid, stride)
        for i in range(4):
            n = int(valid[i].sum())
            states, sep = by_hand(model, video[i, :n], stride or 3)
            assert (h[i, :n] - states).abs().max() < 1e-12
            assert (h[i, -1] - sep).abs().max() < 1e-12
            assert not h[i, n:-1].any()
    logits = model.segment(video, valid)
    assert (logits[0] - model.classifier(by_hand(model, video[0], 3)[0])).abs().max() < 1e-12


def test_padding_in_front_of_no_window_changes_a_long_video():
    """What lies behind the last real second, however much, is not read."""
    model = make()
    video, valid = clips(2, 16)
    longer = torch.cat([video, torch.randn(2, 9, 6).double()], 1)
    more = torch.cat([valid, torch.zeros(2, 9, dtype=torch.bool)], 1)
    a, b = model.encode_video(video, valid), model.encode_video(longer, more)
    assert (a[:, :16] - b[:, :16]).abs().max() < 1e-12
    assert (a[:, -1] - b[:, -1]).abs().max() < 1e-12
    assert (model.embed_video(video, valid) - model.embed_video(longer, more)).abs().max() < 1e-12


def test_a_stride_that_would_skip_seconds_is_refused():
    model = make()
    for stride in (0, 8, -1):
        with pytest.raises(ValueError, match=f"stride is {stride}, wanted 1..7"):
            model.encode_video(*clips(1, 9), stride)


def test_labels_are_kept_in_the_config():
    model = make()
    with pytest.raises(ValueError, match="fine-tune it for segmentation first"):
        model.segment(*clips(1, 3))
    model.set_labels(["", "7", "12"])
    assert model.segment(*clips(2, 3)).shape == (2, 3, 3)
    assert model.config.num_labels == 3
    with pytest.raises(ValueError, match="3 labels, but num_labels 4"):
        dataclasses.replace(model.config, num_labels=4)
