"""Data: features and captions on disk -> clips -> hidden tokens -> a Batch (sec. 3.2, 5.1, 5.2).

    python data.py check DATA            counts, missing features, bad rows, what to do about them
    python data.py toy DIR               writes the toy world (toy.py) in the benchmarks' own files
    python data.py pack DATA --out DIR   the same corpus as shards and flat caption arrays

    DATA/features*/<video_id>.npy   (seconds, E) float16 or float32, one row a second (features.py)
    DATA/raw_caption.json           {video_id: {"start": [s..], "end": [s..], "text": [str..]}}
    DATA/train.lst, val.lst         a video id a line
    DATA/msrvtt, youcook2, coin, crosstask: the benchmarks' own files (benchmarks.py)

Letters as in vlm.py: `B` clips, `V` seconds of video, `T` text tokens, `E` feature width, `W`
vocabulary. Everything drawn at random depends on (seed, epoch, video, clip) alone.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import (
    ID_WANTED,
    LONGEST_VIDEO,
    Bad,
    Clip,
    DataError,
    is_id,
    is_span,
    is_words,
    read_ids,
    read_json,
    read_msrvtt,
    shown,
    stop,
)
from features import FeatureStore, open_features  # noqa: F401 (their usual address)
from toy import write_toy
from vlm import Batch, VLMConfig, load_tokenizer, run
from weights import first_line

# ---------------------------------------------------------------------------------------------
# Captions: de-duplicated, tokenised once, flat arrays


def deduplicate(
    captions: list[tuple[float, float, str]],
) -> tuple[list[tuple[float, float, str]], int]:
    """Take away what automatic captions say twice (sec. 5.1.1).

    Where a caption begins before its predecessor has ended, the longest run of words that ends the
    one and begins the other is kept in the first alone, and the second starts when the first ends.

    Args:    captions: (start, end, text) of one video, times in seconds, any order.
    Returns: the same by start, without repeats and captions that only repeated; words removed.

    >>> deduplicate([(0.0, 3.0, "now cut the onion"), (2.0, 5.0, "the onion and stir")])
    ([(0.0, 3.0, 'now cut the onion'), (3.0, 5.0, 'and stir')], 2)
    """
    kept: list[tuple[float, float, str]] = []
    said, said_until, removed = [], -math.inf, 0
    for start, end, text in sorted(captions, key=lambda c: c[0]):
        words = text.split()
        low = [word.lower() for word in words]
        again = 0
        if start < said_until:
            longest = min(len(said), len(low))
            again = next((k for k in range(longest, 0, -1) if said[-k:] == low[:k]), 0)
        removed += again
        if again < len(words):
            begin = min(max(start, said_until), end) if again else start
            kept.append((begin, end, " ".join(words[again:])))
        elif kept:
            kept[-1] = (kept[-1][0], max(kept[-1][1], end), kept[-1][2])
        said, said_until = low, end
    return sorted(kept, key=lambda c: c[0]), removed  # a start that moved may pass the next one


class Captions:
    """All captions of a corpus as flat arrays; those of one video stand together, by start.

    ids [n] · first_caption (n+1,) · start, end (C,) seconds · first_token (C+1,) · tokens (N,)
    """

    ARRAYS = ("first_caption", "start", "end", "first_token", "tokens")

    def __init__(
        self, ids: list[str], arrays: dict[str, np.ndarray], words: int = 0, removed: int = 0
    ):
        self.ids, self.words, self.removed = ids, words, removed
        self.index = {video: i for i, video in enumerate(ids)}
        self.first_caption, self.start, self.end, self.first_token, self.tokens = (
            arrays[name] for name in self.ARRAYS
        )

    @classmethod
    def from_json(cls, path: str | Path, tokenizer: Tokenizer, bad: Callable = stop) -> "Captions":
        """Read raw_caption.json, take repeats away, tokenise (large corpora once: see `pack`)."""
        ids, pieces, words, removed = [], [], 0, 0
        counts, lengths, starts, ends = array("q", [0]), array("q", [0]), array("d"), array("d")
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.int32
        found = read_json(path, dict)
        names = iter(list(found))
        while chunk := [(v, found.pop(v)) for v in itertools.islice(names, 200)]:
            texts = []
            for video, entry in chunk:
                if not is_id(video):
                    bad(f"{path}: {shown(video)}, {ID_WANTED}")
                    continue
                clean, n = deduplicate(good_captions(path, video, entry, bad))
                words += n + sum(len(text.split()) for _, _, text in clean)
                removed += n
                ids.append(video)
                counts.append(len(clean))
                starts.extend(start for start, _, _ in clean)
                ends.extend(end for _, end, _ in clean)
                texts += [text for _, _, text in clean]
            encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
            lengths.extend(map(len, encoded))
            pieces.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype))
        flat = np.concatenate(pieces) if pieces else np.zeros(0, dtype)
        arrays = (np.cumsum(counts), np.array(starts), np.array(ends), np.cumsum(lengths), flat)
        return cls(ids, dict(zip(cls.ARRAYS, arrays, strict=True)), words, removed)

    def save(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the arrays as .npy, to be memory-mapped, and say which tokenizer they are for."""
        folder.mkdir(parents=True)
        for name in self.ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        about = {"ids": self.ids, "words": self.words, "removed": self.removed}
        about["tokenizer"] = vocabulary_digest(tokenizer)
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path, tokenizer: Tokenizer) -> "Captions":
        """Memory-map what `save` wrote; DataError if it is cut or of another vocabulary.

        Only the small index is read here: what it leads to is looked at when drawn (`check`).
        """
        about = read_json(folder / "about.json", dict)
        older = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]
        if about.get("tokenizer") not in (vocabulary_digest(tokenizer), older):
            raise DataError(
                f"{folder}: packed with another vocabulary: "
                "name that one with --bert, or pack again"
            )
        ids, words, removed = (about.get(key) for key in ("ids", "words", "removed"))
        known = isinstance(ids, list) and all(map(is_id, ids)) and len(set(ids)) == len(ids)
        if not known or not isinstance(words, int) or not isinstance(removed, int):
            raise DataError(f"{folder}: about.json does not list ids, each once: pack again")
        try:
            arrays = {
                n: np.asarray(np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False))
                for n in cls.ARRAYS
            }
            first_caption, start, end, first_token, tokens = arrays.values()
            kinds = [x.dtype.str[1:] for x in arrays.values()]
        except Exception as error:  # numpy fails in as many ways as a header can be damaged
            raise DataError(f"{folder}: not whole ({first_line(error)}): pack again") from None
        fits = all(x.ndim == 1 for x in arrays.values()) and len(first_caption) == len(ids) + 1
        fits = fits and kinds[:4] == ["i8", "f8", "f8", "i8"] and kinds[4] in ("u2", "i4")
        fits = fits and all(x.dtype.isnative for x in arrays.values()) and len(first_token) > 0
        sizes = [(first_caption, len(start)), (first_token, len(tokens))] if fits else []
        fits = fits and all(x[0] == 0 and x[-1] == n for x, n in sizes)
        fits = fits and len(start) == len(end) == len(first_token) - 1
        if not fits or (np.diff(first_caption) < 0).any():
            raise DataError(f"{folder}: its arrays do not fit each other: pack again")
        return cls(ids, arrays, words, removed)

    def check(self, lo: np.ndarray, hi: np.ndarray, size: int) -> None:
        """Look at captions [lo, hi), arrays (B,), each within a video, and at their word pieces.

        Raises: DataError where times or tokens cannot be: outside, backwards, over `size` tokens.
        """
        a, b = self.first_token[lo], self.first_token[hi]
        start, end = self.start[lo], self.end[hi - 1]
        good = (0 <= a) & (a <= b) & (b <= len(self.tokens)) & (b - a < 1e6)
        good &= (0 <= start) & (start < LONGEST_VIDEO) & (0 <= end) & (end < LONGEST_VIDEO)
        if good.all():
            ids = self.tokens[ranges(a, b - a)]
            if not len(ids) or 0 <= int(ids.min()) <= int(ids.max()) < size:
                return
            odd = np.flatnonzero((ids < 0) | (ids >= size))[0]
            good = np.arange(len(lo)) != np.searchsorted(np.cumsum(b - a), odd, "right")
        n = int(lo[~good][0])
        video = self.ids[int(np.searchsorted(self.first_caption, n, "right")) - 1]
        raise DataError(f"captions of {video} are damaged, near caption {n}: pack again")


def good_captions(path: str | Path, video: str, entry: object, bad: Callable) -> list:
    """Check one video's captions; hand every bad one to `bad`: (start, end, text) of the others."""
    columns = [entry.get(k) if isinstance(entry, dict) else 0 for k in ("start", "end", "text")]
    try:
        if not all(isinstance(column, list) for column in columns):
            raise ValueError
        rows = list(zip(*columns, strict=True))
    except ValueError:
        bad(f"{path}: {video}: wanted lists start, end and text of one length")
        return []
    kept = []
    for i, (start, end, text) in enumerate(rows):
        where = f"{path}: {video}, caption {i}"
        if not is_span(start, end):
            bad(f"{where}: start {shown(start)}, end {shown(end)}, wanted seconds with "
                "0 <= start <= end")  # fmt: skip
        elif not is_words(text):
            bad(f"{where}: text is {shown(text)}, wanted words")
        else:
            kept.append((float(start), float(end), text))
    return kept


def vocabulary_digest(tokenizer: Tokenizer) -> str:
    """Name a vocabulary by its pieces and how text becomes words, whatever file it came from."""
    parts = json.loads(tokenizer.to_str())
    how = [parts["normalizer"], parts["pre_tokenizer"], sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:16]


def open_captions(data: str | Path, tokenizer: Tokenizer, bad: Callable = stop) -> Captions:
    """Open DATA's packed captions, or read its raw_caption.json."""
    data = Path(data)
    if (data / "captions").is_dir():
        return Captions.open(data / "captions", tokenizer)
    return Captions.from_json(data / "raw_caption.json", tokenizer, bad)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Find the five special tokens, under the names that VLMConfig has for them, and the size.

    Raises: DataError naming the one that is missing.
    """
    ids = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        ids[f"{name}_token_id"] = tokenizer.token_to_id(f"[{name.upper()}]")
        if ids[f"{name}_token_id"] is None:
            raise DataError(f"the tokenizer has no [{name.upper()}]: wanted a BERT vocabulary")
    return ids | {"vocab_size": tokenizer.get_vocab_size()}


# ---------------------------------------------------------------------------------------------
# Masking (sec. 3.2, 3.3, 5.2)


def uniforms(c: VLMConfig) -> int:
    """Return how many random numbers `hide` wants for a clip."""
    return 1 + c.max_video_len + 3 * c.max_text_len


def hide(batch: Batch, u: Tensor, c: VLMConfig, mmm: float = 0.5, p: float = 0.15) -> Batch:
    """Hide a whole modality (masked modality model, MMM) or single tokens (MFM-MLM): Figure 2.

    mmm/2 of the clips lose all video, mmm/2 all text, the others each token with chance p. A hidden
    word reads [MASK] 80 %, a random word 10 %, itself 10 %; [MASK] always when the text goes whole.
    A token's neighbours tell most about it, and those of its own modality are nearest: only where a
    modality is gone whole, the other one has to be read (sec. 3.3).

    Args:    batch: video, video_valid, text, text_valid. u (B, uniforms(c)) in [0, 1), drawn from
             a torch.Generator; a clip's row decides all about it, whatever it is batched with.
             mmm: 0.5 in the paper, 0..1. p: 0.15.
    Returns: the batch with video_hidden, text_hidden, text_target, and text as the model reads it.
             [CLS], [SEP] and [PAD] are never hidden, and features stay: the model zeroes them.
    Raises:  ValueError for mmm or p outside 0..1.
    """
    if not 0 <= mmm <= 1 or not 0 <= p <= 1:
        raise ValueError(f"mmm is {mmm} and p is {p}, both wanted in 0..1")
    V, T = batch.video.shape[1], batch.text.shape[1]
    # In numpy: at these sizes torch takes twice as long, most of it to begin each operation.
    video_valid, text_valid, text = (
        x.numpy() for x in (batch.video_valid, batch.text_valid, batch.text)
    )
    sizes = [1, c.max_video_len] + 3 * [c.max_text_len]
    scheme, u_video, u_text, how, which = np.split(u.numpy(), np.cumsum(sizes)[:-1], 1)
    all_video, all_text = scheme < mmm / 2, (scheme >= mmm / 2) & (scheme < mmm)  # (B, 1)
    some = scheme >= mmm
    video_hidden = video_valid & (all_video | (some & (u_video[:, :V] < p)))
    pieces = text_valid & (text != c.sep_token_id)
    text_hidden = pieces & (all_text | (some & (u_text[:, :T] < p)))
    # DEVIATION: a random word is never special, and under a whole hidden text all read [MASK]; the
    # authors draw from the whole vocabulary and leave a tenth readable.
    special = [c.pad_token_id, c.unk_token_id, c.cls_token_id, c.sep_token_id, c.mask_token_id]
    words = np.delete(np.arange(c.vocab_size), special)
    word = words[(which[:, :T] * len(words)).astype(np.int64)]
    how = how[:, :T]
    read = np.where(how < 0.9, word, text)
    read = np.where((how < 0.8) | all_text, c.mask_token_id, read)
    read = np.where(text_hidden, read, text)
    return replace(
        batch,
        text=torch.from_numpy(read),
        video_hidden=torch.from_numpy(video_hidden),
        text_hidden=torch.from_numpy(text_hidden),
        text_target=batch.text,
    )


# ---------------------------------------------------------------------------------------------
# Clips and batches


def ranges(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Join n ranges [first, first + length), first (n,) and length (n,) int, into one index.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = np.repeat(first - (np.cumsum(length) - length), length)
    return shift + np.arange(length.sum())


def ragged(
    flat: np.ndarray, length: np.ndarray, width: int, fill: int = 0
) -> tuple[Tensor, Tensor]:
    """Lay flat rows (N, ..) out as (B, width, ..).

    Args:    length (B,): how many rows each gets; they add up to N. fill: what stands behind.
    Returns: the rows laid out, and valid (B, width) bool.
    """
    valid = np.arange(width) < length[:, None]
    assert len(flat) == valid.sum(), f"{len(flat)} rows, but the lengths say {valid.sum()}"
    out = np.full((*valid.shape, *flat.shape[1:]), fill, flat.dtype)
    out[valid] = flat
    return torch.from_numpy(out), torch.from_numpy(valid)


def lay_out(
    video: np.ndarray, seconds: np.ndarray, text: np.ndarray, pieces: np.ndarray, c: VLMConfig
) -> Batch:
    """Build a Batch of flat rows: video (sum of seconds, E), text (sum of pieces,), counts (B,)."""
    V = max(1, int(seconds.max()))
    return Batch(*ragged(video, seconds, V), *lay_out_text(text, pieces, c))


def lay_out_text(text: np.ndarray, pieces: np.ndarray, c: VLMConfig) -> tuple[Tensor, Tensor]:
    """Add [SEP] to flat word pieces (sum of pieces,) and pad: text (B, T), text_valid (B, T)."""
    flat = np.insert(text.astype(np.int64), np.cumsum(pieces), c.sep_token_id)
    return ragged(flat, pieces + 1, int(pieces.max()) + 1, c.pad_token_id)


def encode(texts: list[str], tokenizer: Tokenizer, c: VLMConfig) -> tuple[Tensor, Tensor]:
    """Turn texts into word pieces, cut to what fits: text (B, T), text_valid (B, T)."""
    found = tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = [text.ids[: c.max_text_len - 1] for text in found]
    flat = np.fromiter(itertools.chain.from_iterable(ids), np.int64)
    return lay_out_text(flat, np.array([len(x) for x in ids]), c)


@dataclass
class Corpus:
    """Narrated videos to draw clips from; every draw depends on (seed, epoch, video, clip) alone.

    features, captions: the stores. ids: the videos of this split, with features and captions.
    seed. clips_per_video: clips of one video in a draw. min_text: shortest text in word pieces.
    mmm: share of clips that lose a whole modality. c: sizes. skip_bad: draw others instead of
    clips that cannot be read, and say so once a video and process.
    """

    features: FeatureStore
    captions: Captions
    ids: list[str]
    c: VLMConfig
    seed: int = 0
    clips_per_video: int = 32
    min_text: int = 8
    mmm: float = 0.5
    skip_bad: bool = False
    said: set[str] = field(default_factory=set)  # videos that cannot be read

    MAX_TEXT = 64  # word pieces (sec. 5.2)
    TRIES = 100

    def order(self, epoch: int) -> list[int]:
        """Shuffle the videos of one epoch."""
        if getattr(self, "_order", (None,))[0] != epoch:
            g = generator(self.seed, epoch)
            self._order = epoch, torch.randperm(len(self.ids), generator=g).tolist()
        return self._order[1]

    def step(self, step: int, batch: int, part: int = 0, parts: int = 1) -> Batch:
        """Draw one part of optimizer step `step`'s global batch, tokens hidden.

        Videos stream by, epoch after epoch, `clips_per_video` clips each; a step takes the next
        `batch` clips, of which part i of n is the i-th of n equal shares: who computes what changes
        nothing.

        Raises: DataError for a clip that cannot be read; with skip_bad, if nor can TRIES videos.
        """
        size = batch // parts
        first = step * batch + part * size
        slot, clip = np.divmod(np.arange(first, first + size), self.clips_per_video)
        epoch, place = np.divmod(slot, len(self.ids))
        draws = list(zip(epoch.tolist(), place.tolist(), clip.tolist(), strict=True))
        try:
            return self.clips(self.at(draws))
        except DataError:
            if not self.skip_bad:
                raise
        good = []
        for _, group in itertools.groupby(draws, lambda draw: draw[:2]):  # clips of one video
            good += self.readable(list(group))
        return self.clips(good)

    def at(self, draws: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Turn (epoch, place in its order, clip number) into (epoch, index, clip number)."""
        order = {epoch: self.order(epoch) for epoch in sorted({draw[0] for draw in draws})}
        return [(epoch, order[epoch][place], clip) for epoch, place, clip in draws]

    def readable(self, draws: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
        """Draw, in place of each clip of one video that cannot be read, one more of the next video
        that can, so that a step has as many clips on any number of ranks.

        Args:    draws: (epoch, place, clip number) each, as `at` takes them.
        Returns: as many (epoch, index, clip number).
        Raises:  DataError where none of the next TRIES videos can be read.
        """
        if len(draws) > 1:
            with contextlib.suppress(DataError):
                self.clips(found := self.at(draws))
                return found
            return [draw for one in draws for draw in self.readable([one])]
        ((epoch, place, clip),) = draws
        for i in range(min(self.TRIES, len(self.ids))):
            other = (epoch, (place + i) % len(self.ids), clip + i * self.clips_per_video)
            (draw,) = self.at([other])
            try:
                self.clips([draw])
                return [draw]
            except DataError as error:
                if (video := self.ids[draw[1]]) not in self.said:
                    print(f"other clips are drawn instead: {error}", flush=True)
                self.said.add(video)
        raise DataError(f"none of {i + 1} videos, one after the other, can be read")

    def clips(self, draws: list[tuple[int, int, int]]) -> Batch:
        """Draw clips (epoch, index into ids, clip number): a Batch with hidden tokens."""
        cap, c = self.captions, self.c
        groups = [(*key, [d[2] for d in g]) for key, g in itertools.groupby(draws, lambda d: d[:2])]
        growth = self.MAX_TEXT
        u = []
        for epoch, video, clips in groups:
            g = generator(self.seed, epoch, zlib.crc32(self.ids[video].encode()))
            rows = torch.rand(max(clips) + 1, 2 + growth + uniforms(c), generator=g)
            u.append(rows.numpy()[clips])
        u = np.concatenate(u)

        # sizes of each clip's video, (B,) each
        ids = [self.ids[video] for _, video, _ in groups]
        times = [len(clips) for _, _, clips in groups]
        opened = {video: self.features.open(video) for video in ids[:256]}  # each keeps a file open
        long = [len(opened[i] if i in opened else self.features.open(i)) for i in ids]
        seconds = np.repeat(long, times)
        v = np.repeat([cap.index[video] for video in ids], times)
        lo, hi = self.grow(v, seconds, u[:, : 2 + growth])
        cap.check(lo, hi, c.vocab_size)

        # the clip's seconds of video, its first 32, and its first 61 word pieces
        start = np.minimum(np.floor(cap.start[lo]).astype(np.int64), seconds)
        end = np.maximum(np.ceil(cap.end[hi - 1]).astype(np.int64), start + 1)
        n_video = np.minimum(np.minimum(end, seconds) - start, c.max_video_len)
        first = cap.first_token[lo]
        n_text = np.minimum(cap.first_token[hi] - first, c.max_text_len - 1)
        owners = [video for video, n in zip(ids, times, strict=True) for _ in range(n)]  # (B,)
        video = self.features.clips(owners, start, n_video, opened)
        batch = Batch(*video, *lay_out_text(cap.tokens[ranges(first, n_text)], n_text, c))
        return hide(batch, torch.from_numpy(u[:, 2 + growth :]), c, self.mmm)

    def grow(
        self, v: np.ndarray, seconds: np.ndarray, u: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose each clip's captions [lo, hi): around a random one, neighbours before or after at
        random until the text has U{min_text..64} word pieces or the video is used up (sec. 5.2).

        Args:    v (B,) int, the clips' videos; seconds (B,), how many feature rows these have;
                 u (B, 2 + tosses) in [0, 1), which decides all that is random.
        Returns: lo, hi (B,) int, indices of captions.
        """
        cap = self.captions
        first, last = cap.first_caption[v], cap.first_caption[v + 1]
        # Captions that begin after the last feature row have no video: left out, but for one.
        last = np.maximum(np.minimum(last, self._begun(v, seconds)), first + 1)
        target = self.min_text + np.floor(u[:, 0] * (self.MAX_TEXT - self.min_text + 1))
        lo = first + np.floor(u[:, 1] * (last - first)).astype(np.int64)
        hi = lo + 1
        for toss in u[:, 2:].T:
            short = (cap.first_token[hi] - cap.first_token[lo] < target) & (hi - lo < last - first)
            if not short.any():
                break
            before = ((toss < 0.5) | (hi == last)) & (lo > first)
            lo, hi = lo - (short & before), hi + (short & ~before)
        return lo, hi

    def _begun(self, v: np.ndarray, seconds: np.ndarray) -> np.ndarray:
        """Find the end of the captions that start inside the features, for each clip's video."""
        cap = self.captions
        out = np.empty(len(v), dtype=np.int64)
        for i in np.unique(v):
            a, b = cap.first_caption[i], cap.first_caption[i + 1]
            out[v == i] = a + np.searchsorted(cap.start[a:b], seconds[v == i][0])
        return out


def generator(*key: int) -> torch.Generator:
    """Seed a generator from several numbers at once."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def open_corpus(
    data: str | Path, features: FeatureStore, captions: Captions, split: str, c: VLMConfig,
    bad: Callable = stop, **settings,
) -> tuple[Corpus, list[str]]:  # fmt: skip
    """Open the videos of DATA/<split>.lst.

    Returns: the corpus, and lines that say what was left out and why.
    Raises:  DataError for an id without captions, or when no video is left.
    """
    path = Path(data) / f"{split}.lst"
    listed = read_ids(path, bad)
    count = np.diff(captions.first_caption)
    ids, silent, unseen = [], [], []
    for video in listed:
        if video not in captions.index:
            bad(f"{path}: {video} is not in raw_caption.json, which has {len(captions.ids)} ids")
        elif video not in features:
            unseen.append(video)
        elif not count[captions.index[video]]:
            silent.append(video)
        else:
            ids.append(video)
    said = []
    for names, why in ((unseen, "no features"), (silent, "no captions")):
        if names:
            said.append(
                f"{split}: {len(names)} of {len(listed)} videos have {why}, first {names[0]}"
            )
    if split == "val" and isinstance(bad, Bad):  # what is measured by is read before, not after
        sound = features.sound(ids, bad)
        ids = [video for video in ids if video in sound]
    if not ids:
        raise DataError(f"{path}: none of its {len(listed)} videos has features and captions")
    return Corpus(features, captions, ids, c, **settings, skip_bad=isinstance(bad, Bad)), said


def pairs(features: FeatureStore, clips: list[Clip], tokenizer: Tokenizer, c: VLMConfig) -> Batch:
    """Build a Batch of given clips with their texts, nothing hidden: at most their first 32 s."""
    first, n_video = [], []
    for clip in clips:
        seconds = len(features.open(clip.video))
        start = min(math.floor(clip.start), seconds - 1)
        end = min(
            seconds, max(math.ceil(min(clip.end, seconds)), start + 1), start + c.max_video_len
        )
        first.append(start)
        n_video.append(end - start)
    video = features.clips([clip.video for clip in clips], np.array(first), np.array(n_video))
    return Batch(*video, *encode([clip.text for clip in clips], tokenizer, c))


@dataclass
class Data:
    """What a run reads."""

    features: FeatureStore
    train: Corpus
    val: Corpus | None
    test: list[Clip]  # retrieval at the end: MSR-VTT's test clips, or else a clip of each val video
    test_name: str


def open_data(
    folder: str | Path, features: FeatureStore, tokenizer: Tokenizer, c: VLMConfig,
    skip_bad: bool = False, **settings,
) -> tuple[Data, list[str]]:  # fmt: skip
    """Open captions, splits and test clips of DATA; settings are Corpus's.

    Returns: what a run reads, and lines that say how much it is and what was left out.
    Raises:  DataError at the first bad row, unless skip_bad counts them instead.
    """
    folder, bad = Path(folder), Bad() if skip_bad else stop
    captions = open_captions(folder, tokenizer, bad)
    train, said = open_corpus(folder, features, captions, "train", c, bad, **settings)
    val = None
    if (folder / "val.lst").exists():
        val, more = open_corpus(folder, features, captions, "val", c, bad, **settings)
        said += more
    test, name = [], ""
    if (folder / "msrvtt").is_dir():
        name = f"MSR-VTT test clips of {folder}"
        listed = read_msrvtt(folder / "msrvtt", bad)["test"]
        test = [clip for clip in listed if clip.video in features]
        if len(test) < len(listed):
            said.append(f"test: {len(listed) - len(test)} of {len(listed)} clips have no features")
        if skip_bad:
            sound = features.sound((clip.video for clip in test), bad)
            test = [clip for clip in test if clip.video in sound]
    if not test and val is not None:
        name, test = "clips, one of each video of val.lst (no test list)", val_clips(val, tokenizer)
    if val is None:
        said.append("no val.lst: no held-out loss")
    if isinstance(bad, Bad) and bad.messages:
        said.append(f"{len(bad.messages)} bad rows left out, first: {bad.messages[0]}")
    repeats = f"{captions.removed} of {captions.words} words removed as repeats"
    said.append(f"{len(train.ids)} videos, {len(captions.start)} captions, {repeats}")
    return Data(features, train, val, test, name), said


def val_clips(val: Corpus, tokenizer: Tokenizer, most: int = 1000) -> list[Clip]:
    """Take the middle caption of each validation video, of those that begin inside its features, as
    a query for its seconds."""
    clips, cap = [], val.captions
    for video in val.ids[:most]:
        i = cap.index[video]
        first, seconds = cap.first_caption[i], np.array([len(val.features.open(video))])
        k = (first + max(first + 1, val._begun(np.array([i]), seconds)[0])) // 2
        cap.check(np.array([k]), np.array([k + 1]), tokenizer.get_vocab_size())
        text = tokenizer.decode(cap.tokens[cap.first_token[k] : cap.first_token[k + 1]].tolist())
        clips.append(Clip(video, text, float(cap.start[k]), float(cap.end[k])))
    return clips


# ---------------------------------------------------------------------------------------------
# python data.py check | toy | pack


def main(argv: list[str] | None = None) -> int:
    """Run one of this file's commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about, example in (
        ("check", "print counts, missing features, bad rows; exit code 1 if any", "check toy"),
        ("toy", "write the toy world", "toy world --seed 1"),
        ("pack", "pack features into shards and captions into flat arrays",
         "pack toy --out packed"),
    ):  # fmt: skip
        a = commands.add_parser(name, allow_abbrev=False, help=about, description=about,
                                epilog=f"example: python data.py {example}",
                                formatter_class=raw)  # fmt: skip
        add = a.add_argument
        if name == "toy":
            add("dir", type=Path, metavar="DIR", help="a new folder")
            add("--seed", type=int, default=0, metavar="N",
                help="another seed, another world (default: 0)")  # fmt: skip
            continue
        add("data", type=Path, metavar="DATA", help="the folder, laid out as at the top of data.py")
        add("--features", metavar="DIR|FILE", help="features elsewhere: a folder, or a .pickle")
        use = "count word pieces" if name == "check" else "tokenise the captions"
        add("--bert", metavar="DIR", help=f"{use} with this vocabulary (default: DATA's own)")
        if name == "check":
            add("--headers", action="store_true", help="open features without reading them whole")
        else:
            add(
                "--out", type=Path, required=True, metavar="DIR", help="a new folder: the next DATA"
            )
            how = "size of a shard in MB (default: 1000)"
            add("--shard-mb", type=float, default=1000, metavar="X", help=how)
            how = "leave bad captions and features out, counted, instead of stopping"
            add("--skip-bad", action="store_true", help=how)
    args = parser.parse_args(argv)
    from check import check, pack  # they read what this file defines

    if args.command == "toy":
        write_toy(args.dir, args.seed)
        print(f"toy world written to {args.dir}")
        return 0
    tokenizer = load_tokenizer(args.bert) if args.bert else None
    if args.command == "pack":
        pack(args.data, args.out, tokenizer, args.shard_mb, args.features, args.skip_bad)
        return 0
    return 1 if check(args.data, args.features, tokenizer, not args.headers) else 0


if __name__ == "__main__":
    run(main)
