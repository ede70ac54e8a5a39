"""Walk a data folder and say what is in it and what is wrong with it, or pack it into shards.

    python data.py check DATA           exit code 1 if anything is wrong
    python data.py pack DATA --out DIR

DATA is laid out as at the top of data.py.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import (
    Bad,
    Clip,
    DataError,
    read_coin,
    read_crosstask,
    read_ids,
    read_msrvtt,
    stop,
)
from data import Captions, FeatureStore, open_captions, open_features
from features import want_folder
from univl import read_youcook2
from vlm import load_tokenizer

# Parts that no pre-training may see: it does not overlap with evaluation data (sec. 5.1.2).
HELD_OUT = ("val.lst", " test", " QA", " validation", " testing")


def check(data: Path, features: str | None, tokenizer: Tokenizer | None, scan: bool) -> int:
    """Walk a folder, print what is in it and what is wrong; return the number of problems.

    Raises: DataError when there is no such folder.
    """
    want_folder(data)
    bad = Bad()
    try:
        store = open_features(data, features)
        print(f"features    {len(store)} videos, {store.width} wide, in {len(store.files)} places")
        check_features(store, bad, scan)
    except DataError as error:
        bad(str(error))
        store = {}
    wanted: dict[str, list[str]] = {}  # part -> video ids that need features
    if (data / "raw_caption.json").exists() or (data / "captions").is_dir():
        try:
            wanted |= check_narration(data, store, tokenizer, bad)
        except ValueError as error:
            bad(str(error))
    readers = {
        "msrvtt": read_msrvtt,
        "youcook2": read_youcook2,
        "coin": read_coin,
        "crosstask": read_crosstask,
    }
    found = []
    for name, read in readers.items():
        if (data / name).is_dir():
            found.append(name)
            try:
                wanted |= check_benchmark(name, read(data / name, bad), store, bad)
            except DataError as error:
                bad(str(error))
    if not wanted and not found:
        bad(f"{data}: no raw_caption.json and none of {', '.join(readers)}: nothing to train on")
    trained = set(wanted.get("train.lst", ()))
    for part, ids in wanted.items():
        missing = sorted({video for video in ids if video not in store})
        if missing:
            bad(f"{part}: {len(missing)} of {len(set(ids))} videos have no features, first "
                f"{missing[0]}: extract them, or they are left out")  # fmt: skip
        if part.endswith(HELD_OUT) and (both := sorted(trained.intersection(ids))):
            bad(
                f"{part}: {len(both)} of {len(set(ids))} videos are in train.lst too, first "
                f"{both[0]}: take them out of train.lst (sec. 5.1.2: none is pre-trained on)"
            )
    n = len(bad.messages)
    print(f"\n{n or 'no'} problem{'s' * (n != 1)}")
    for message in bad.messages[:20]:
        print(f"  {message}")
    if n > 20:
        print(f"  and {n - 20} more")
    return n


def check_features(store: FeatureStore, bad: Callable, scan: bool) -> None:
    """Open every feature array, and read it whole when `scan`."""
    seconds, begun, shown = 0, time.monotonic(), time.monotonic()
    for i, video in enumerate(store.place):
        try:
            seconds += len(store.whole(video) if scan else store.open(video))
        except DataError as error:
            bad(str(error))
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            left = (shown - begun) / (i + 1) * (len(store) - i - 1)
            print(f"  {i + 1} of {len(store)} videos, {left:.0f} s left", file=sys.stderr)
    print(f"            {seconds} seconds of video, {seconds / 3600:.1f} hours")


def check_narration(
    data: Path, store, tokenizer: Tokenizer | None, bad: Callable
) -> dict[str, list[str]]:
    """Report the narration: captions, repeats, tokens a second, captions without video."""
    if tokenizer is None:
        tokenizer = load_tokenizer(data) if (data / "tokenizer.json").exists() else _words()
    captions = open_captions(data, tokenizer, bad)
    C = len(captions.start)
    share = captions.removed / max(1, captions.words)
    print(f"captions    {len(captions.ids)} videos, {C} captions, {captions.words} words")
    print(f"            {captions.removed} words ({share:.1%}) removed as repeats")
    counts = np.diff(captions.first_caption)
    for first, n in zip(captions.first_caption, counts, strict=False):
        rows = np.arange(first, first + n)  # one video's; packed ones were not looked at so far
        try:
            captions.check(rows, rows + 1, tokenizer.get_vocab_size())
        except DataError as error:
            bad(str(error))
    if store:
        seen = [i for i, v in enumerate(captions.ids) if v in store and counts[i]]
        late = total = tokens = 0
        for i in seen:
            try:
                n = len(store.open(captions.ids[i]))
            except DataError:
                continue  # counted where the features were read
            a, b = captions.first_caption[i : i + 2]
            tokens += int(captions.first_token[b] - captions.first_token[a])
            late += int((captions.start[a:b] >= n).sum())
            total += n
        rate = f"{tokens / total:.1f}" if total else "no features: no"
        print(f"            {rate} tokens a second of video")
        if late:
            bad(f"captions: {late} start after the last feature row; no clip is drawn around them")
    wanted = {}
    for split in ("train", "val"):
        if (path := data / f"{split}.lst").exists():
            ids = read_ids(path, bad)
            print(f"{split}.lst".ljust(12) + f"{len(ids)} videos")
            for video in ids:
                if video not in captions.index:
                    bad(f"{path}: {video} is not in raw_caption.json")
            wanted[f"{split}.lst"] = ids
            if not ids:
                bad(f"{path}: empty; write one video id a line")
        elif split == "train":
            bad(f"{path}: no such file; write one video id a line")
        else:
            print("val.lst".ljust(12) + "not there: no held-out loss")
    return wanted


def _words() -> Tokenizer:
    """Split at blanks: enough to count words where no vocabulary is at hand."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def check_benchmark(name: str, found: dict, store, bad: Callable) -> dict[str, list[str]]:
    """Print one benchmark's counts, report segments past the end; return ids that need features."""
    clips: dict[str, list[Clip]] = {}
    if name == "msrvtt":
        clips = {"train": found["train"], "test": found["test"]}
        clips["QA"] = [Clip(video, answers[right]) for video, answers, right in found["qa"]]
    elif name == "youcook2":
        clips = found
    elif name == "coin":
        clips = {k: [c for video in v.values() for c in video] for k, v in found.items()}
    else:
        print(f"crosstask   {len(found['primary'])} primary tasks of {len(found['tasks'])}")
        for split in ("training", "validation"):
            clips[split] = [
                Clip(video, found["tasks"][task][step], start, end)
                for task, video in found[split]
                for step, start, end in found["steps"].get((task, video), [])
            ]
            print(f"            {split}: {len(found[split])} videos")
    wanted = {}
    for split, items in clips.items():
        ids = [clip.video for clip in items]
        wanted[f"{name} {split}"] = ids
        line = f"{split}: {len(items)} texts in {len(set(ids))} videos"
        if name == "coin":
            line += f", {len({clip.key for clip in items})} labels"
        print(f"{name:12}{line}")
        if not items and split != "QA":  # which alone may be left out
            done = "trained on" if split.startswith("train") else "tested"
            bad(f"{name} {split}: none: its list is missing or empty, nothing can be {done}")
        ends = {video: _seconds(store, video) for video in dict.fromkeys(ids)}
        past = [clip for clip in items if clip.start >= ends[clip.video]]
        if past:
            bad(f"{name} {split}: {len(past)} segments begin after the last feature row, first "
                f"{past[0].video} at {past[0].start:g} s")  # fmt: skip
    return wanted


def _seconds(store, video: str) -> float:
    """Count a video's rows; no end where there are none to read, which is counted elsewhere."""
    try:
        return len(store.open(video)) if video in store else math.inf
    except DataError:
        return math.inf


def pack_features(folder: Path, out: Path, shard_mb: float, bad: Callable) -> None:
    """Copy a folder's features into shards of about shard_mb MB; `bad` hears of unread ones."""
    store, shard, size, n, videos = FeatureStore(folder), {}, 0, 0, 0
    out.mkdir()
    for video in [*sorted(store.place), None]:  # None: what is left
        if shard and (video is None or size >= shard_mb * 1e6):
            save_file(shard, out / f"shard-{n:05d}.safetensors")
            shard, size, n, videos = {}, 0, n + 1, videos + len(shard)
        if video is None:
            break
        try:  # in C's order, for safetensors writes memory as it lies
            shard[video] = np.array(store.open(video)[:], order="C")
            size += shard[video].nbytes
        except DataError as error:
            bad(str(error))
    print(f"{out.name}: {videos} videos in {n} shards")


def pack(
    data: Path, out: Path, tokenizer: Tokenizer | None, shard_mb: float,
    features: str | None = None, skip_bad: bool = False,
) -> None:  # fmt: skip
    """Copy a corpus into shards of about shard_mb MB and flat caption arrays, the rest as it is.

    Raises: DataError when `out` is not empty or stands in `data`, there are no features, or, unless
            skip_bad counts them, a caption or a video's features are bad.
    """
    if out.resolve().is_relative_to(data.resolve()):
        raise DataError(f"--out {out} is inside {data}, and would be packed too: choose another")
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out}: not empty; give --out a new folder")
    folders = sorted(p for p in data.glob("features*") if p.is_dir())
    sources = {folder.name: folder for folder in folders}
    sources = {"features": Path(features)} if features else sources
    if not sources:
        raise DataError(f"{data}: no features/ folder to pack")
    if not shard_mb > 0:
        raise DataError(f"--shard-mb is {shard_mb}, wanted more than 0")
    raw, bad = data / "raw_caption.json", Bad() if skip_bad else stop
    if raw.exists() and tokenizer is None and (data / "tokenizer.json").exists():
        tokenizer = load_tokenizer(data)
    flat = raw.exists() and tokenizer is not None
    out.mkdir(parents=True, exist_ok=True)
    if flat:  # first: a bad row is found before hours of copying
        captions = Captions.from_json(raw, tokenizer, bad)
        captions.save(out / "captions", tokenizer)
        print(f"captions: {len(captions.start)} captions, {len(captions.tokens)} word pieces")
        del captions
    elif raw.exists():
        print("captions: copied as they are (pass --bert DIR to tokenise them once and for all)")
    for name, folder in sources.items():
        pack_features(folder, out / name, shard_mb, bad)
    if isinstance(bad, Bad) and bad.messages:
        print(f"{len(bad.messages)} bad rows left out, first: {bad.messages[0]}")
    made = {*folders, *sources.values(), *([raw, data / "captions"] if flat else [])}
    made = {path.resolve() for path in made}

    def done(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder, name).resolve() in made]

    for path in sorted(data.iterdir()):
        if path.resolve() in made:
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name, ignore=done)
        elif path.is_file():
            shutil.copyfile(path, out / path.name)
