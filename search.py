"""Find moments in one's own videos by a sentence (sec. 4.1): features in, times and scores out.

    python eval.py search --run RUN --features FEATURES "pour the sauce over it"

Every window of 32 s, one every 16, is embedded without any text and the sentence without any video;
a video ranks by its best window. Similarity: the centred cosine (-1..1) before fine-tuning, the dot
product (unbounded) after, as sec. 4.1 trains it.
"""

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from data import FeatureStore, lay_out_video
from eval import embed_texts, spaces
from tasks import spans
from vlm import VLM


@dataclass(frozen=True)
class Moment:
    """A window of a video: seconds start up to end, and its score."""

    video: str
    start: int
    end: int
    score: float

    @property
    def when(self) -> str:
        """The times as mm:ss-mm:ss.

        >>> Moment("v", 59, 3671, 0.5).when
        '00:59-61:11'
        """
        return "-".join(f"{t // 60:02}:{t % 60:02}" for t in (self.start, self.end))


@torch.no_grad()
def embed_windows(
    model: VLM, features: FeatureStore, videos: list[str], stride: int, size: int = 64
) -> tuple[list[tuple[str, int, int]], Tensor]:
    """Embed every window of the videos, without any text.

    Returns: [(video, start, end)] in seconds, and their embeddings (N, D).
    """
    M, device = model.config.max_video_len, model.video_mean.device
    cut = []
    for video in videos:
        cut += [(video, *span) for span in spans(len(features.open(video)), M, stride)]
    out, shown = [], time.monotonic()
    for i in range(0, len(cut), size):
        part = cut[i : i + size]
        rows = [features.rows(video, np.arange(a, b)) for video, a, b in part]
        lengths = np.array([len(x) for x in rows])
        video, valid = (x.to(device) for x in lay_out_video(np.concatenate(rows), lengths))
        out.append(model.embed_video(video, valid).float().cpu())
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            print(f"  {i + len(part)} of {len(cut)} windows read", file=sys.stderr)
    return cut, torch.cat(out)


def search(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, query: str,
    videos: list[str] | None = None, stride: int | None = None,
) -> list[Moment]:  # fmt: skip
    """Rank all windows of videos by a sentence, the best first.

    Args:    query: words. videos: which to look through; None: all. stride: seconds from one window
             to the next, at most max_video_len; None: half a window.
    Raises:  ValueError for an empty query, an unknown video, or a stride that skips seconds.
    """
    M = model.config.max_video_len
    stride = max(1, M // 2) if stride is None else stride
    if not query.strip():
        raise ValueError("the query is empty: say in words what to look for")
    if not 1 <= stride <= M:
        raise ValueError(f"--stride is {stride}, wanted 1..{M}: every second must be in a window")
    videos = sorted(features.place) if videos is None else videos
    if unknown := [video for video in videos if video not in features]:
        raise ValueError(f"video {unknown[0]!r} has no features; there are {len(features)} others")
    cut, video = embed_windows(model, features, videos, stride)
    text = embed_texts(model, tokenizer, [query])
    t, v = list(spaces(model, text, video).values())[-1]
    score = (v.double() @ t[0].double()).tolist()
    found = [Moment(*where, s) for where, s in zip(cut, score, strict=True)]
    return sorted(found, key=lambda m: (-m.score, m.video, m.start))


def best_of_each(found: list[Moment]) -> list[Moment]:
    """Keep each video's best window, in the order given."""
    seen: dict[str, Moment] = {}
    for moment in found:
        seen.setdefault(moment.video, moment)
    return list(seen.values())
