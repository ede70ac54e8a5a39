"""Retrieval metrics against loops; the constant predictors against their formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from data import open_captions, open_corpus, open_features, special_ids, val_clips
from eval import centre, embed_clips, ranks, retrieval, retrieval_chance, set_means, validate
from train import Ranks
from vlm import VLM, VLMConfig, load_tokenizer


@pytest.fixture(scope="module")
def small(small_toy):
    """A random model of the small toy world: (model, tokenizer, validation corpus)."""
    tokenizer = load_tokenizer(small_toy)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    sizes |= dict(max_position_embeddings=96, video_dim=64)
    torch.manual_seed(0)
    model = VLM(VLMConfig(**sizes, **special_ids(tokenizer))).eval()
    stores = open_features(small_toy), open_captions(small_toy, tokenizer)
    corpus, _ = open_corpus(small_toy, *stores, "val", model.config, clips_per_video=3)
    return model, tokenizer, corpus


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_ranks_equal_a_loop_and_ties_count_against_the_model(rows):
    """Small whole numbers make many exact ties; however many texts are scored at a time."""
    g = torch.Generator().manual_seed(0)
    text, video = (torch.randint(-1, 2, (13, 3), generator=g).float() for _ in range(2))
    score = text @ video.T
    slow = [sum(s >= score[i, i] for s in score[i].tolist()) for i in range(13)]
    assert ranks(text, video, rows).tolist() == [int(r) for r in slow]
    found = retrieval(text, video)
    assert found["R@5"] == sum(r <= 5 for r in slow) / 13
    assert found["median rank"] == sorted(slow)[6]


def test_constant_scores_are_not_rewarded():
    """A model that says the same of all videos is last everywhere, whatever rounding does."""
    one = torch.randn(1, 77, generator=torch.Generator().manual_seed(1))
    same = one.repeat(1000, 1)
    assert (ranks(same, same) == 1000).all()
    assert retrieval(same, same)["R@10"] == 0


def test_a_perfect_model_is_first_and_a_nan_is_an_error():
    """Catches a rank that starts at 0 and a query that vanishes."""
    eye = torch.eye(7)
    assert retrieval(eye, eye) == {"R@1": 1, "R@5": 1, "R@10": 1, "median rank": 1}
    broken = eye.clone()
    broken[5, 2] = math.nan
    with pytest.raises(ValueError, match="text 5 has a similarity that is NaN"):
        ranks(broken, eye)
    with pytest.raises(ValueError, match="text 0"):
        ranks(eye, broken)


def test_chance_is_what_random_orders_score():
    """2,000 random orders of 40 videos: R@5 within 4.5 deviations, the median rank within one."""
    rng, n = np.random.default_rng(0), 40
    rank = rng.integers(1, n + 1, (2000, n))
    chance = retrieval_chance(n)
    assert abs((rank <= 5).mean() - chance["R@5"]) < 4.5 * math.sqrt(0.125 * 0.875 / rank.size)
    assert abs(np.median(rank, axis=1).mean() - chance["median rank"]) < 1


def test_clips_are_embedded_alike_in_batches_of_any_size(small):
    """Catches padding or order that reaches an embedding."""
    model, tokenizer, corpus = small
    clips = val_clips(corpus, tokenizer) * 3
    a = embed_clips(model, tokenizer, corpus.features, clips, size=64)
    b = embed_clips(model, tokenizer, corpus.features, clips, size=1)
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_means_are_of_training_clips_and_centring_takes_them_away(small):
    """The centred training clips average to nothing before they are scaled to length 1."""
    model, tokenizer, corpus = small
    set_means(model, corpus, clips=64)
    batch = dataclasses.replace(corpus, mmm=0.0).step(0, 64)
    with torch.no_grad():
        text = model.embed_text(batch.text_target, batch.text_valid)
        video = model.embed_video(batch.video, batch.video_valid)
    assert torch.allclose(model.text_mean, text.mean(0), atol=1e-6)
    assert torch.allclose(model.video_mean, video.mean(0), atol=1e-6)
    for x, raw in zip(centre(model, text, video), (text, video), strict=True):
        by_hand = raw - raw.mean(0)
        by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
        assert torch.allclose(x, by_hand, atol=1e-4)


def test_constant_predictors_are_the_best_that_look_at_nothing(small):
    """Words: entropy of the hidden words, the least of all. Seconds: at most log(|V'| + 1)."""
    model, _, corpus = small
    table = validate(model, corpus, "vlm", 6, 0.5, Ranks(), batches=2)
    batches = [dataclasses.replace(corpus, seed=0).step(i, 6) for i in range(2)]
    words = torch.cat([b.text_target[b.text_hidden] for b in batches])
    share = [(words == w).float().mean().item() for w in words.unique()]
    assert math.isclose(
        table["constant"]["text"], -sum(p * math.log(p) for p in share), rel_tol=1e-5
    )
    uniform = torch.full((model.config.vocab_size,), 1 / model.config.vocab_size)
    assert table["constant"]["text"] < -uniform[words].log().mean()
    counts = [
        (int(b.video_hidden.sum()), int((b.video_valid & ~b.video_hidden).sum())) for b in batches
    ]
    flat = sum(n * math.log(pool + 1) for n, pool in counts) / sum(n for n, _ in counts)
    assert table["constant"]["video"] <= flat + 1e-6
    assert not model.training
    n_video, n_text = sum(n for n, _ in counts), len(words)
    row = table["model"]
    both = (row["video"] * n_video + row["text"] * n_text) / (n_video + n_text)
    assert math.isclose(row["loss"], both, rel_tol=1e-5)
