"""Embed texts and videos apart (sec. 4.1), and find moments in one's own videos by a sentence.

    python eval.py search --run RUN --features FEATURES "pour the sauce over it"

Every window of 32 s, one every 16, is embedded without any text and the sentence without any video;
a video ranks by its best window. Similarity: the centred cosine (-1..1) before fine-tuning, the dot
product (unbounded) after, as sec. 4.1 trains it.
"""

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import Clip
from data import FeatureStore, encode, open_features, pairs
from keep import can_write, write_json
from tasks import spans
from vlm import VLM, load_run

# ---------------------------------------------------------------------------------------------
# Texts and videos, embedded apart


@torch.no_grad()
def embed_clips(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clips: list[Clip], size: int = 64
) -> tuple[Tensor, Tensor]:
    """Embed each clip's text and video apart, `size` clips at a time: (N, D), (N, D).

    Apart (sec. 4.1), for neither may know which clip or text it is to be compared with.
    """
    device = model.video_mean.device
    text, video = [], []
    for i in range(0, len(clips), size):
        batch = pairs(features, clips[i : i + size], tokenizer, model.config).to(device)
        text.append(model.embed_text(batch.text, batch.text_valid).float().cpu())
        video.append(model.embed_video(batch.video, batch.video_valid).float().cpu())
    return torch.cat(text), torch.cat(video)


@torch.no_grad()
def embed_texts(model: VLM, tokenizer: Tokenizer, texts: list[str], size: int = 256) -> Tensor:
    """Embed texts without any video, `size` at a time: (N, D)."""
    out = []
    for i in range(0, len(texts), size):
        text = encode(texts[i : i + size], tokenizer, model.config)
        out.append(model.embed_text(*(x.to(model.video_mean.device) for x in text)).float().cpu())
    return torch.cat(out)


def whole(model: VLM, features: FeatureStore, video: str) -> tuple[Tensor, Tensor]:
    """Read all seconds of a video, for the model's device: (1, seconds, E), valid (1, seconds)."""
    x = torch.from_numpy(features.whole(video))[None].to(model.video_mean.device)
    return x, torch.ones_like(x[:, :, 0], dtype=torch.bool)


@torch.no_grad()
def read_video(model: VLM, features: FeatureStore, video: str, stride: int | None = None) -> Tensor:
    """Encode a whole video without any text, by windows if it is long: h (seconds, D)."""
    return model.encode_video(*whole(model, features, video), stride)[0, :-1]


def centre(model: VLM, text: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """Take each modality's mean over training clips from text, video (N, D); scale to length 1."""
    text, video = text - model.text_mean.cpu(), video - model.video_mean.cpu()
    return tuple(torch.nn.functional.normalize(x, dim=1) for x in (text, video))


def spaces(model: VLM, text: Tensor, video: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the spaces to compare text, video (N, D) in: the paper's and, before fine-tuning, the
    centred one, each {name: (text, video)}. A converted or unfinished run has no means for that."""
    out = {"dot product": (text, video)}
    if model.config.stage == "pre-trained" and model.text_mean.any():
        out["centred cosine"] = centre(model, text, video)
    return out


def fitting_features(args: argparse.Namespace, model: VLM) -> FeatureStore:
    """Open the features; ValueError if the model reads others."""
    features = open_features(getattr(args, "data", "."), args.features)
    if features.width != model.config.video_dim:
        raise ValueError(
            f"features are {features.width} wide, the run {args.run} reads "
            f"{model.config.video_dim}: pass --features of that width"
        )
    return features


# ---------------------------------------------------------------------------------------------
# Search


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
    longest, device = model.config.max_video_len, model.video_mean.device
    cut = []
    for video in videos:
        cut += [(video, *span) for span in spans(len(features.open(video)), longest, stride)]
    out, shown = [], time.monotonic()
    for i in range(0, len(cut), size):
        part = cut[i : i + size]
        ids, start, end = (np.array(x) for x in zip(*part, strict=True))
        video, valid = (x.to(device) for x in features.clips(ids.tolist(), start, end - start))
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
    stride = model.window_stride(stride)
    if not query.strip():
        raise ValueError("the query is empty: say in words what to look for")
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


# ---------------------------------------------------------------------------------------------
# python eval.py search


EXAMPLE = '--run runs/toy --features toy/features --top 3 "slice the onion"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the search's flags."""
    parser.add_argument("query", help='what to look for, in words: "pour the sauce over it"')
    parser.add_argument("--run", required=True, metavar="RUN", help="run directory")
    add = parser.add_argument
    add("--features", required=True, metavar="DIR|FILE", help="features to search")
    add("--within", metavar="VIDEO", help="rank the windows of this video alone")
    add("--top", type=int, default=10, metavar="N", help="rows to print (default: 10)")
    how = "seconds from one window to the next (default: 16)"
    add("--stride", type=int, metavar="N", help=how)
    add("--json", metavar="FILE", help="write all rows, ranked, to this file as JSON")


def command(args: argparse.Namespace) -> int:
    """Rank one's own videos, or the windows of one of them, by a sentence."""
    if args.top < 1:
        raise ValueError(f"--top is {args.top}, wanted at least 1")
    can_write(args.json, "--json")
    model, tokenizer = load_run(args.run)
    features = fitting_features(args, model)
    videos = None if args.within is None else [args.within]
    found = search(model, tokenizer, features, args.query, videos, args.stride)
    rows = found if args.within is not None else best_of_each(found)
    what = (
        f"windows of {args.within}" if args.within is not None else "videos, by their best window"
    )
    print(f"{len(rows)} {what}")
    wide = max(len(m.video) for m in rows[: args.top])
    for n, m in enumerate(rows[: args.top], 1):
        print(f"{n:>4}  {m.video:{wide}}  {m.when}  {m.score:8.3f}")
    write_json(args.json, [dataclasses.asdict(m) | {"when": m.when} for m in rows])
    return 0
