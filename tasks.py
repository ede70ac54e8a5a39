"""The five tasks of sec. 4: the benchmarks' files (sec. 5.1.2) as items to train on and to test by.

    retrieval      MSR-VTT, YouCook2      a clip and its sentence
    qa             MSR-VTT                a clip and five answers (trained on retrieval's clips)
    segmentation   COIN                   a label, or background, for each second
    localization   CrossTask              the ordered steps of a task, each found in time
    captioning     YouCook2, MSR-VTT      a clip and its reference sentences

The paper's sizes, by which to tell a whole benchmark from a part of one:

    MSR-VTT      200K clip-text pairs of 10K videos, 20 a training clip; tested by 1,000 pairs
    YouCook2     9,473 clip-text pairs of 1,222 videos to train on, 3,305 of 430 to test by
    COIN         46,354 segments of 11,827 videos (476 hours); 778 labels and the background
    CrossTask    540 videos to train on, 1,690 to test by (the authors' split)

    python eval.py TASK --run RUN --data DATA           says in its first line how many are there

What an item needs and does not have is left out, counted and said. Letters as in vlm.py.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks import (
    Bad,
    Clip,
    DataError,
    read_coin,
    read_crosstask,
    read_msrvtt,
    stop,
)
from data import FeatureStore
from keep import fingerprint
from univl import read_youcook2
from vlm import VLMConfig

DATASETS = {  # each task's benchmarks, as folders of DATA; the first one there is taken
    "retrieval": ("msrvtt", "youcook2"),
    "qa": ("msrvtt",),
    "segmentation": ("coin",),
    "localization": ("crosstask",),
    "captioning": ("youcook2", "msrvtt"),
}
WINDOW = 32  # seconds (sec. 5.1.2)


@dataclass(frozen=True)
class Item:
    """One thing to train on or to be asked.

    clip: the seconds to read, and the sentence that belongs to them. texts: the five answers (qa),
    the references (captioning), the task's steps in order (localization). right: which answer.
    truth: (seconds,) int64 labels, 0 the background (segmentation); (seconds, S) bool, second shows
    step (localization); rows are those of the clip.
    """

    clip: Clip
    texts: tuple[str, ...] = ()
    right: int = 0
    truth: np.ndarray | None = None


@dataclass
class Task:
    """One task on one dataset.

    train: groups of items; an epoch draws one of each group, as MSR-VTT's sentences of a video.
    val: held out of the training videos, to choose the best epoch by. test: what is reported.
    labels: segmentation's label ids in class order, 0 the background.
    said: what was read and what was left out, a line each. bad: who hears of a bad row. split: of
    localization: "val", or "authors" and a fingerprint of what it drew to train on.
    """

    name: str
    dataset: str
    features: FeatureStore
    train: list[list[Item]] = field(default_factory=list)
    val: list[Item] = field(default_factory=list)
    test: list[Item] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    bad: Callable = stop
    split: str = ""


def choose_dataset(name: str, data: Path, dataset: str | None) -> str:
    """Take the dataset that was asked for, or the first of the task's that DATA has.

    Raises: ValueError for an unknown task, DataError for a dataset that it is not read from or
    that is not there.
    """
    if name not in DATASETS:
        raise ValueError(f"task {name!r} is unknown: choose one of {', '.join(DATASETS)}")
    if dataset and dataset not in DATASETS[name]:
        raise DataError(f"--dataset {dataset}: {name} is read from {' or '.join(DATASETS[name])}")
    there = [d for d in ([dataset] if dataset else DATASETS[name]) if (data / d).is_dir()]
    if not there:
        wanted = " or ".join(f"{d}/" for d in ([dataset] if dataset else DATASETS[name]))
        raise DataError(f"{data}: {name} wants the folder {wanted} with the benchmark's own files")
    return there[0]


def open_task(
    name: str, data: str | Path, features: FeatureStore, dataset: str | None = None,
    skip_bad: bool = False, held_out: float = 0.0, labels: list[str] = (), stride: int = 16,
    train_videos: int = 30, split: str = "val", seed: int = 0, join: int = 1,
) -> Task:  # fmt: skip
    """Read one task's files.

    Args:    name: a key of DATASETS. data: the folder. dataset: which benchmark, by its folder.
             skip_bad: count bad rows and go on. held_out: share of the training videos that
             becomes `val`, chosen by seed. labels: a run's label ids, which are then the classes.
             stride: seconds from one training window to the next. train_videos: localization's
             training videos of a task (the authors' 30; 540 in all, sec. 5.4). split: its SPLITS.
             join: sentences that make up one text of a held-out MSR-VTT clip, as in training
             (finetune.py).
    Raises:  DataError for a missing folder or file, a bad row, or when no test item is left;
             ValueError for a share or split that cannot be.
    """
    data = Path(data)
    dataset, bad = choose_dataset(name, data, dataset), Bad() if skip_bad else stop
    task = Task(name, dataset, features, bad=bad)
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out is {held_out}, wanted 0 up to, not with, 1")
    rng = np.random.default_rng(seed)
    folder = data / dataset
    if name == "segmentation":
        _segmentation(task, read_coin(folder, bad), held_out, list(labels), stride, rng)
    elif name == "localization":
        found = read_crosstask(folder, bad)
        _localization(task, found, held_out, stride, train_videos, split, rng)
    else:
        read = read_msrvtt if dataset == "msrvtt" else read_youcook2
        _pairs(task, read(folder, bad), held_out, rng, join)
    if skip_bad:  # what is measured by is read now: a fault must not end a run that has trained
        sound = features.sound((item.clip.video for item in task.val + task.test), bad)
        for items in (task.val, task.test):
            items[:] = [item for item in items if item.clip.video in sound]
    if isinstance(bad, Bad) and bad.messages:
        task.said.append(f"{len(bad.messages)} bad rows left out, first: {bad.messages[0]}")
    if not task.test:
        raise DataError(f"{folder}: nothing to test {name} by: {why_none(task, False)}")
    sizes = f"{len(task.train)} to train on, {len(task.val)} to validate, {len(task.test)} to test"
    where = f"{dataset}, --split {split}" if name == "localization" else dataset
    task.said.insert(0, f"{name} on {where}: {sizes}")
    return task


LISTS = {  # where each benchmark says what is trained on and tested by
    "msrvtt": ("MSRVTT_data.json or MSRVTT_train.csv", "MSRVTT_JSFUSION_test.csv"),
    "youcook2": (
        "train_list.txt (UniVL's: youcookii_train.csv)",
        "val_list.txt (youcookii_val.csv)",
    ),
    "coin": ("COIN.json, subset training,", "COIN.json, subset testing,"),
    "crosstask": ("videos.csv", "videos_val.csv"),
}


def why_none(task: Task, training: bool) -> str:
    """Say why there is nothing to train on or to test by: what was left out, or an empty list."""
    said = [x for x in task.said if "bad rows" in x or x.startswith("train") == training]
    name = LISTS[task.dataset][not training]
    name = "MSRVTT_QA_test.csv" if task.name == "qa" and not training else name
    return "; ".join(said) or f"{name} is missing or lists none"


def usable(task: Task, what: str, clips: Iterable[Clip]) -> list[Clip]:
    """Keep clips whose video has features and that begin inside it; count and say the others."""
    clips = list(clips)
    seen = [c for c in clips if c.video in task.features]
    seconds = {}
    for video in dict.fromkeys(c.video for c in seen):
        try:
            seconds[video] = len(task.features.open(video))
        except DataError as error:
            task.bad(str(error))
    seen = [c for c in seen if c.video in seconds]
    kept = [c for c in seen if c.start < seconds[c.video]]
    if unseen := [c.video for c in clips if c.video not in task.features]:
        first, n = unseen[0], len(unseen)
        task.said.append(f"{what}: {n} of {len(clips)} have no features, first {first}")
    if len(kept) < len(seen):
        first = next(c for c in seen if c.start >= seconds[c.video])
        n = len(seen) - len(kept)
        where = f"first {first.video} at {first.start:g} s"
        task.said.append(f"{what}: {n} of {len(clips)} begin after the last feature row, {where}")
    return kept


def hold_out(keys: list, share: float, rng: np.random.Generator) -> tuple[list, list]:
    """Split training videos in two: (to train on, a `share` in 0..1 to validate by)."""
    n = min(len(keys) - 1, max(1, round(share * len(keys)))) if share and len(keys) > 1 else 0
    chosen = set(rng.permutation(len(keys))[:n].tolist())
    return [k for i, k in enumerate(keys) if i not in chosen], [keys[i] for i in sorted(chosen)]


# ---------------------------------------------------------------------------------------------
# Clips with sentences: retrieval, question answering, captioning


def joined(items: list[Item], first: int, n: int) -> Item:
    """Make one item of n items of a clip (all, if there are fewer), from `first` on and round.

    Their sentences are joined in the file's order.

    >>> items = [Item(Clip("v", text)) for text in ("a.", "b.", "c.")]
    >>> joined(items, 2, 2).clip.text
    'a. c.'
    """
    if n == 1:
        return items[first]
    chosen = sorted({(first + i) % len(items) for i in range(n)})
    text = " ".join(items[i].clip.text for i in chosen)
    return replace(items[first], clip=replace(items[first].clip, text=text))


def _pairs(task: Task, found: dict, held_out: float, rng: np.random.Generator, join: int) -> None:
    """Fill a task of clips and sentences from MSR-VTT or YouCook2."""
    youcook = task.dataset == "youcook2"
    train = usable(task, "training clips", found["training" if youcook else "train"])
    videos: dict[str, list[Clip]] = {}
    for clip in train:
        videos.setdefault(clip.video, []).append(clip)
    kept, held = hold_out(list(videos), held_out, rng)
    for video in kept:  # YouCook2: a segment has one sentence; MSR-VTT: a video has twenty
        items = [Item(c, (c.text,)) for c in videos[video]]
        task.train += [[item] for item in items] if youcook else [items]
    for video in held:
        texts = tuple(c.text for c in videos[video])
        task.val += (
            [Item(c, (c.text,)) for c in videos[video]] if youcook
            else [joined([Item(c, texts) for c in videos[video]], 0, join)]
        )  # fmt: skip
    if task.name == "qa":
        task.val = [_question(task.val, i, rng) for i in range(len(task.val))]
        rows = [Clip(video, texts[right]) for video, texts, right in found["qa"]]
        known = set(usable(task, "questions", rows))
        task.test = [
            Item(clip, tuple(texts), right)
            for clip, (_, texts, right) in zip(rows, found["qa"], strict=True)
            if clip in known
        ]
        return
    test = usable(task, "test clips", found["validation" if youcook else "test"])
    if task.name == "captioning" and not youcook:  # one caption a video, however often it is listed
        listed: dict[str, list[Clip]] = {}
        for clip in test:
            listed.setdefault(clip.video, []).append(clip)
        own = {video: [c.text for c in clips] for video, clips in listed.items()}
        references = own | {v: x for v, x in found["references"].items() if v in own}
        task.test = [Item(listed[v][0], tuple(texts)) for v, texts in references.items()]
        return
    task.test = [Item(c, (c.text,)) for c in test]


def _question(items: list[Item], i: int, rng: np.random.Generator) -> Item:
    """Ask for clip i's sentence among those of four others, as the benchmark's questions do."""
    own = items[i].clip
    others = [x.clip.text for x in items if x.clip.video != own.video and x.clip.text != own.text]
    texts = [others[k] for k in rng.permutation(len(others))[:4]]
    right = int(rng.integers(len(texts) + 1))
    texts.insert(right, own.text)
    return Item(own, tuple(texts), right)


# ---------------------------------------------------------------------------------------------
# Whole videos: action segmentation, action step localization


def spans(n: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Cut n seconds into spans [start, end) of `length`, one every `stride`, up to the end.

    >>> spans(50, 32, 16), spans(7, 32, 16)
    ([(0, 32), (16, 48), (32, 50)], [(0, 7)])
    """
    count = 1 + max(0, math.ceil((n - length) / stride))
    return [(i * stride, min(n, i * stride + length)) for i in range(count)]


def windows(item: Item, stride: int) -> list[Item]:
    """Cut a video into windows of 32 s, one every `stride` s; the last one reaches its end.

    >>> item = Item(Clip("v", ""), truth=np.zeros(50))
    >>> [(int(w.clip.start), int(w.clip.end)) for w in windows(item, 16)]
    [(0, 32), (16, 48), (32, 50)]
    """
    cut = spans(len(item.truth), WINDOW, stride)
    return [
        Item(replace(item.clip, start=float(a), end=float(b)), item.texts, truth=item.truth[a:b])
        for a, b in cut
    ]


def seconds_of(start: float, end: float, n: int) -> slice:
    """Return the rows that a segment covers: floor(start) up to ceil(end), as CrossTask does."""
    return slice(min(n, math.floor(start)), min(n, math.ceil(min(end, n))))


def _segmentation(task: Task, found: dict, held_out: float, labels: list, stride: int, rng) -> None:
    """Fill action segmentation from COIN's segments (sec. 4.2)."""
    if not labels:  # class 0 is the background; COIN's ids in numeric order, its own strings
        ids = {c.key or c.text for clips in found["training"].values() for c in clips}
        number = re.compile("[0-9]{1,18}").fullmatch
        labels = ["", *sorted(ids, key=lambda k: (0, int(k), k) if number(k) else (1, 0, k))]
    index = {label: i for i, label in enumerate(labels)}
    task.labels = labels
    unseen: set[str] = set()

    def label(video: str, clips: list[Clip]) -> Item:
        n = len(task.features.open(video))
        truth = np.zeros(n, dtype=np.int64)
        for c in clips:
            key = c.key or c.text
            # a label that no training video shows cannot be predicted: a class of its own, K
            truth[seconds_of(c.start, c.end, n)] = index.get(key, len(labels))
            if key not in index:
                unseen.add(key)
        return Item(Clip(video, "", 0.0, float(n)), truth=truth)

    splits = {}
    for split, videos in found.items():
        there = [Clip(video, "") for video in videos]
        splits[split] = [c.video for c in usable(task, f"{split} videos", there)]
        usable(task, f"{split} segments", (c for v in splits[split] for c in videos[v]))
    kept, held = hold_out(splits["training"], held_out, rng)
    whole = {v: label(v, found["training"][v]) for v in splits["training"]}
    task.train = [[w] for v in kept for w in windows(whole[v], stride)]
    task.val = [whole[v] for v in held]
    task.test = [label(v, found["testing"][v]) for v in splits["testing"]]
    if unseen:
        task.said.append(
            f"{len(unseen)} labels are unknown to the model's {len(labels)}, first "
            f"{sorted(unseen)[0]}: their seconds count as wrong"
        )


# Of CrossTask. DEVIATION: by videos_val.csv, which names its videos; or as `authors_split` says
SPLITS = ("val", "authors")


def authors_split(task: Task, found: dict, train_videos: int) -> tuple[list, list]:
    """Split CrossTask's pairs of a task and a video as for the paper's rows: (training, test).

    The authors' code, as CrossTask's own, leaves the pairs of videos_val.csv out, draws a primary
    task's training videos by NumPy's old generator, seed 0, and tests by all that are left.
    """
    rng, held_back = np.random.RandomState(0), set(found["validation"])
    videos: dict[str, list[str]] = {}  # in the order in which videos.csv first has a task
    for name, video in found["listed"]:
        if video in task.features and (name, video) in found["steps"]:
            videos.setdefault(name, [])
            videos[name] += [video] * ((name, video) not in held_back)
    training, test = [], []
    for name, vs in videos.items():
        chosen = range(len(vs))
        if name in found["primary"] and len(vs) > train_videos:
            chosen = rng.choice(len(vs), train_videos, replace=False)
        training += [(name, vs[i]) for i in chosen]
        test += [(name, vs[i]) for i in sorted({*range(len(vs))} - {*chosen})]
    if not test:
        most = max(map(len, videos.values()), default=0)
        task.said.append(f"test videos: none left, for --split authors trains on {train_videos} of "
                         f"a task, and none has more than {most}")  # fmt: skip
    return training, test


def refuse_seen(task: Task, c: VLMConfig, run: str) -> None:
    """Raise ValueError if localization is tested by what `run`, of config c, may have seen."""
    was = c.split or ("val" if c.task == "localization" else "")
    if task.name == "localization" and was and task.split not in ("val", was):
        raise ValueError(f"--split {task.split}: {run} was fine-tuned beside {was}, and may have "
                         "been trained on videos that this tests by: give it that split, and the "
                         "features and annotations it had, or fine-tune anew")  # fmt: skip


def _localization(
    task: Task, found: dict, held_out: float, stride: int, train_videos: int, split: str, rng
) -> None:
    """Fill action step localization from CrossTask (sec. 4.3): test on the pairs of videos_val.csv,
    train on other annotated ones, drawn by rng; or the authors' split. ValueError for another."""

    primary_tasks = set(found["primary"])

    def open_videos(split: str, pairs: list[tuple[str, str]]) -> dict[str, list[Item]]:
        """Return {task: its annotated primary videos}."""
        primary = [(t, v) for t, v in pairs if t in primary_tasks]
        annotated = [(t, v) for t, v in primary if found["steps"].get((t, v))]
        if len(annotated) < len(primary):
            n = len(primary) - len(annotated)
            task.said.append(f"{split} videos: {n} of {len(primary)} have no annotated step")
        videos = usable(task, f"{split} videos", (Clip(v, t, key=t) for t, v in annotated))
        out: dict[str, list[Item]] = {}
        late = short = unseen = 0
        for clip in videos:
            texts, n = tuple(found["tasks"][clip.key]), len(task.features.open(clip.video))
            truth = np.zeros((n, len(texts)), dtype=bool)
            for step, start, end in found["steps"][clip.key, clip.video]:
                seen = seconds_of(start, end, n)
                truth[seen, step] = True
                late += start >= n
                short += seen.start == seen.stop < n
            unseen += not truth.any()
            if truth.any():
                item = Item(replace(clip, end=float(n)), texts, truth=truth)
                out.setdefault(clip.key, []).append(item)
        for many, what in ((late, "steps begin after the last feature row"),
                           (short, "steps end when they begin and show no second"),
                           (unseen, "left out, for none of their steps is seen")):  # fmt: skip
            if many:
                task.said.append(f"{split} videos: {many} {what}")
        return out

    task.split = split
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
    training, tested = found["training"], found["validation"]
    if split == "authors":
        training, tested = authors_split(task, found, train_videos)
        task.split += " " + fingerprint([f"{name} {video}" for name, video in sorted(training)])
    train = open_videos("training", training)
    test = open_videos("test" if split == "authors" else "validation", tested)
    chosen = [
        items[i]
        for items in train.values()
        for i in sorted(rng.permutation(len(items))[:train_videos])
    ]
    kept, task.val = hold_out(chosen, held_out, rng)
    task.train = [[w] for item in kept for w in windows(item, stride)]
    task.test = [item for items in test.values() for item in items]
