"""The files of UniVL's authors: YouCook2 in a pickle, beside features of one row a second.

    youcook2/youcookii_data*.pickle    {video_id: {"start", "end", "text": arrays of objects}}
    youcook2/youcookii_train.csv       video_id,feature_file: the two are the same
    youcook2/youcookii_val.csv
    --features youcookii_videos_features.pickle        {feature_file: (seconds, 1024)}: features.py

    python eval.py retrieval --run RUN --data DATA --dataset youcook2 --features FEATURES.pickle

Their MSR-VTT comes in the benchmark's own files (benchmarks.py) and such a pickle of features.
"transcript", where it is, is not read: sec. 5.1.2's tasks have the video alone.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import benchmarks
from benchmarks import Clip, DataError, read_table, segments, stop
from features import ArrayUnpickler, unpickle


class AnnotationUnpickler(ArrayUnpickler):
    """Admit single numpy numbers too: what arrays of objects may hold."""

    KNOWN = ArrayUnpickler.KNOWN | {
        (f"numpy.{core}.multiarray", "scalar"): "_scalar" for core in ("core", "_core")
    }

    def _scalar(self, dtype, content: bytes) -> np.generic:
        return np.frombuffer(content, dtype.real(), 1)[0]  # which makes no objects of bytes


def read_youcook2(folder: Path, bad: Callable = stop) -> dict[str, list[Clip]]:
    """Read YouCook2 (sec. 5.1.2), its own files or, where these are not, UniVL's.

    Returns: {"training" | "validation": clips}, one sentence a segment.
    Raises:  DataError for a missing file, a pickle of something else or one that wants to run code.
    """
    pickles = sorted(folder.glob("youcookii_data*.pickle"))  # with transcripts or without
    if not pickles or (folder / "youcookii_annotations_trainval.json").exists():
        return benchmarks.read_youcook2(folder, bad)
    path = pickles[0]
    found = unpickle(path, AnnotationUnpickler)
    if not isinstance(found, dict) or not all(isinstance(x, dict) for x in found.values()):
        raise DataError(f"{path}: wanted {{video_id: {{'start', 'end', 'text': arrays}}}}")
    out, seen = {}, set()
    for split, name in (("training", "youcookii_train.csv"), ("validation", "youcookii_val.csv")):
        out[split] = []
        for row in read_table(folder / name, ["video_id", "feature_file"], bad):
            video = row["video_id"]
            if video in seen:
                bad(f"{folder / name}: {video} is listed twice, here or in youcookii_train.csv")
            elif video not in found:
                bad(f"{folder / name}: {video} is not in {path.name}")
            elif row["feature_file"] != video:
                bad(f"{folder / name}: {video}: feature_file is {row['feature_file']}, wanted the "
                    "video_id, by which features are found")  # fmt: skip
            else:
                out[split] += read_video(path, video, found[video], bad)
            seen.add(video)
    return out


def read_video(path: Path, video: str, entry: dict, bad: Callable) -> list[Clip]:
    """Read one video's segments; `bad` gets what is not three columns of one length."""
    columns = [entry.get(key) for key in ("start", "end", "text")]
    columns = [x.tolist() if isinstance(x, np.ndarray) else x for x in columns]
    if not all(isinstance(x, list) for x in columns) or len({len(x) for x in columns}) != 1:
        bad(f"{path}: {video}: wanted start, end and text, three arrays of one length")
        return []
    rows = [
        {"segment": [plain(start), plain(end)], "sentence": text}
        for start, end, text in zip(*columns, strict=True)
    ]
    return segments(path, video, {"annotations": rows}, "annotations", "sentence", bad)


def plain(x: object) -> object:
    """Turn a numpy number into Python's."""
    return x.item() if isinstance(x, np.generic) else x
