"""Metrics and evaluation (sec. 5.3-5.5): text-to-video retrieval by two encoders that never meet.

Similarity is the paper's dot product or the centred cosine: each modality minus its mean over
training clips (kept in the run), then the cosine. Scores are unbounded logits or lie in -1..1.
"""

import dataclasses

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import Clip
from data import Corpus, FeatureStore, pairs
from vlm import VLM, nce


def ranks(text: Tensor, video: Tensor, rows: int = 1024) -> np.ndarray:
    """Rank each text's own video among all: 1 is best (sec. 5.4).

    Args:    text, video (N, D): row i of one belongs to row i of the other. rows: texts at a time.
    Returns: (N,) int. A tie counts against the model: whatever scores as well as the own video
             stands before it. Equal to within 1e-9 of the score is a tie.
    Raises:  ValueError for a NaN or infinite score, naming the text.
    """
    text, video = text.double(), video.double()
    out = []
    for first in range(0, len(text), rows):
        score = text[first : first + rows] @ video.T  # (rows, N)
        if not score.isfinite().all():
            bad = int((~score.isfinite()).any(1).nonzero()[0]) + first
            raise ValueError(f"text {bad} has a similarity that is NaN or infinite")
        own = score.diagonal(first)[:, None]
        out.append((score >= own - 1e-9 * own.abs()).sum(1))
    return torch.cat(out).numpy()


def retrieval(text: Tensor, video: Tensor) -> dict[str, float]:
    """Score text-to-video retrieval: R@1, R@5, R@10 as fractions, and the median rank."""
    rank = ranks(text, video)
    return {f"R@{k}": float((rank <= k).mean()) for k in (1, 5, 10)} | {
        "median rank": float(np.median(rank))
    }


def retrieval_chance(n: int) -> dict[str, float]:
    """Return what a random order of n videos scores.

    >>> retrieval_chance(20)
    {'R@1': 0.05, 'R@5': 0.25, 'R@10': 0.5, 'median rank': 10.5}
    """
    return {f"R@{k}": min(1.0, k / n) for k in (1, 5, 10)} | {"median rank": (n + 1) / 2}


@torch.no_grad()
def embed_clips(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clips: list[Clip], size: int = 64
) -> tuple[Tensor, Tensor]:
    """Embed each clip's text and video apart (sec. 4.1), `size` clips at a time: (N, D), (N, D)."""
    device = model.video_mean.device
    text, video = [], []
    for i in range(0, len(clips), size):
        batch = pairs(features, clips[i : i + size], tokenizer, model.config).to(device)
        text.append(model.embed_text(batch.text, batch.text_valid).float().cpu())
        video.append(model.embed_video(batch.video, batch.video_valid).float().cpu())
    return torch.cat(text), torch.cat(video)


def centre(model: VLM, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Take away each modality's mean over training clips and scale to length 1."""
    text, video = text - model.text_mean.cpu(), video - model.video_mean.cpu()
    return (torch.nn.functional.normalize(x, dim=1) for x in (text, video))


def zero_shot_retrieval(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clips: list[Clip]
) -> dict[str, dict[str, float]]:
    """Retrieve clips by their texts without any training for it.

    Returns: {"dot product": metrics, "centred cosine": metrics, "chance": metrics}.
    """
    text, video = embed_clips(model, tokenizer, features, clips)
    return {
        "dot product": retrieval(text, video),
        "centred cosine": retrieval(*centre(model, text, video)),
        "chance": retrieval_chance(len(clips)),
    }


# ---------------------------------------------------------------------------------------------
# The pre-training loss on held-out videos, beside what no model is needed for


@torch.no_grad()
def validate(
    model: VLM, corpus: Corpus, loss: str, batch: int, mmm: float, ranks, batches: int = 8
) -> dict[str, dict[str, float]]:
    """Measure the pre-training loss on fixed clips beside the best constant predictors.

    Args:    corpus: held-out videos. loss: "vlm" or "mfm-mlm". batch: clips over all ranks.
             mmm: share of clips that lose a whole modality; at 1 every hidden token has to be read
             from the other modality. ranks: train.Ranks. batches: how many.
    Returns: nats a token, {"model" | "constant" | "chance": {"video", "text", "loss"}}. Constant:
             one prediction for all words (their own frequencies in these very clips, so that no
             other can beat it) and one for all seconds (the mean video token, at the best of
             several scales, against V' alone). Chance: all candidates equally likely.
    """
    was_training = model.training
    model.eval()
    corpus = dataclasses.replace(corpus, seed=0, mmm=mmm)
    device = model.video_mean.device
    scales = (0, 0.01, 0.03, 0.1, 0.3, 1.0)
    sums = torch.zeros(4 + len(scales), dtype=torch.float64, device=device)
    words = torch.zeros(model.config.vocab_size, dtype=torch.float64, device=device)
    for step in range(batches):
        b = corpus.step(step, batch, ranks.rank, ranks.world).to(device)
        part = model.pretrain_loss(b, loss, ranks.gather)
        words += torch.bincount(b.text_target[b.text_hidden], minlength=len(words))
        own, hidden = model.videomlp(b.video[b.video_valid]), b.video_hidden[b.video_valid]
        pool = ranks.gather(own[~hidden])  # V'
        mean = pool.mean(0).expand(int(hidden.sum()), -1)
        row = [part.video_sum, part.video_count, part.text_sum, part.text_count]
        row += [nce(scale * mean, pool, own=own[hidden]) for scale in scales]
        sums += torch.stack([x.double() for x in row])
    model.train(was_training)
    video_sum, n_video, text_sum, n_text, *constants = ranks.sum(sums).tolist()
    share = ranks.sum(words) / words.sum().clamp(min=1)
    n_video, n_text = max(1, n_video), max(1, n_text)
    table = {
        "model": (video_sum / n_video, text_sum / n_text),
        "constant": (min(constants) / n_video, float(-torch.special.xlogy(share, share).sum())),
        "chance": (part.video_chance, part.text_chance),
    }
    w = n_video / (n_video + n_text)
    return {
        name: {"video": v, "text": t, "loss": w * v + (1 - w) * t if part.joint else v + t}
        for name, (v, t) in table.items()
    }


@torch.no_grad()
def set_means(model: VLM, corpus: Corpus, clips: int = 2048) -> None:
    """Fill the means of embed_video and embed_text over training clips, for the centred cosine."""
    model.eval()
    corpus, device = dataclasses.replace(corpus, mmm=0.0), model.video_mean.device
    text, video = [], []
    for step in range(clips // 64):
        batch = corpus.step(step, 64).to(device)
        text.append(model.embed_text(batch.text_target, batch.text_valid))
        video.append(model.embed_video(batch.video, batch.video_valid))
    model.text_mean.copy_(torch.cat(text).mean(0))
    model.video_mean.copy_(torch.cat(video).mean(0))
