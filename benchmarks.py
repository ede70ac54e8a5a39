"""The benchmarks' own files, read as they were released (sec. 5.1), and the errors of bad files.

    msrvtt/     MSRVTT_train.csv, MSRVTT_data.json, MSRVTT_JSFUSION_test.csv, MSRVTT_QA_test.csv
    youcook2/   youcookii_annotations_trainval.json, train_list.txt, val_list.txt, or UniVL's files
    coin/       COIN.json
    crosstask/  tasks_primary.txt, tasks_related.txt, videos.csv, videos_val.csv, annotations/*.csv

Every reader takes `bad`, a function that is handed a message for each bad row: `stop` raises at the
first, a `Bad()` counts them and the reader goes on with the good ones.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used: which one, where in it, the value seen, the value wanted."""


def stop(message: str) -> None:
    """Meet the first bad row with a DataError; readers take another function to count and go on."""
    raise DataError(message)


class Bad:
    """Count bad rows instead of stopping at the first: pass it to a reader as `bad`."""

    def __init__(self):
        self.messages: list[str] = []

    def __call__(self, message: str) -> None:
        self.messages.append(message)


# ---------------------------------------------------------------------------------------------
# The benchmarks' own files


@dataclass(frozen=True)
class Clip:
    """A stretch of a video and a text: a sentence, a label or a step; times in seconds."""

    video: str
    text: str
    start: float = 0.0
    end: float = math.inf
    key: str = ""  # COIN's label id: some of its labels share their words


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file; DataError says which one is missing or is not text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_json(path: str | Path, kind: type) -> object:
    """Read JSON whose top level is a `kind`; DataError if it is not, or not JSON."""
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, kind):
        raise DataError(f"{path}: holds a {type(data).__name__}, wanted a {kind.__name__}")
    return data


def read_table(path: Path, columns: list[str], bad: Callable, delimiter: str = ",") -> list[dict]:
    """Read a separated-values file with a header; DataError if that does not name all `columns`."""
    reader = csv.DictReader(read_text(path).splitlines(), delimiter=delimiter, restkey="(more)")
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError(
            f"{path}: columns are {reader.fieldnames}, wanted also {', '.join(missing)}"
        )
    rows = []
    try:
        for row in reader:
            if any(not row[name] for name in columns):
                bad(f"{path}, line {reader.line_num}: wanted {', '.join(columns)}, some are empty")
            else:
                rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def read_msrvtt(folder: Path, bad: Callable = stop) -> dict:
    """Read MSR-VTT (sec. 5.1.2), those of its files that are there.

    Returns: {"train": clips, one a sentence; "test": 1k-A clips; "qa": (video, 5 answers, right);
             "references": {video: its sentences}, of videos that are not trained on}.
    Raises:  DataError for files that do not say the split or are of another form.
    """
    out = {"train": [], "test": [], "qa": [], "references": {}}
    names = {}
    if (path := folder / "MSRVTT_JSFUSION_test.csv").exists():
        rows = read_table(path, ["vid_key", "video_id", "sentence"], bad)
        names = {row["vid_key"]: row["video_id"] for row in rows}
        out["test"] = [Clip(row["video_id"], row["sentence"]) for row in rows]
    if (path := folder / "MSRVTT_data.json").exists():
        train = {row["video_id"] for row in read_table(training_list(folder), ["video_id"], bad)}
        sentences = read_json(path, dict).get("sentences")
        if not isinstance(sentences, list):
            raise DataError(f"{path}: sentences is {type(sentences).__name__}, wanted a list")
        for i, row in enumerate(sentences):
            video, caption = (
                row.get(k) if isinstance(row, dict) else None for k in ("video_id", "caption")
            )
            if not isinstance(video, str) or not isinstance(caption, str) or not caption.strip():
                bad(f"{path}: sentence {i} is {str(row)[:80]}, wanted video_id and caption")
            elif video in train:
                out["train"].append(Clip(video, caption))
            else:
                out["references"].setdefault(video, []).append(caption)
    if (path := folder / "MSRVTT_QA_test.csv").exists():
        columns = ["vid_key", *(f"a{i}" for i in range(1, 6)), "answer"]
        for i, row in enumerate(read_table(path, columns, bad, delimiter="\t")):
            if row["answer"] not in ("0", "1", "2", "3", "4"):
                bad(f"{path}, question {i}: answer is {row['answer']!r}, wanted 0..4")
                continue
            video = names.get(row["vid_key"], row["vid_key"].replace("msr", "video"))
            out["qa"].append((video, [row[f"a{k}"] for k in range(1, 6)], int(row["answer"])))
    return out


def training_list(folder: Path) -> Path:
    """Find which videos MSR-VTT is trained on: MSRVTT_train.csv, else the only MSRVTT_train*.csv.

    Raises: DataError where there is none, or several and nothing says which.
    """
    lists = sorted(folder.glob("MSRVTT_train*.csv"))
    if folder / "MSRVTT_train.csv" in lists or len(lists) == 1:
        return folder / "MSRVTT_train.csv" if len(lists) > 1 else lists[0]
    what = f"{folder}: MSRVTT_data.json without MSRVTT_train.csv, which names the split"
    if lists:
        raise DataError(
            f"{what}; there are {' and '.join(x.name for x in lists)}: copy the one to train on "
            "to MSRVTT_train.csv"
        )
    raise DataError(
        f"{what}: copy the benchmark's there (MSRVTT_train.9k.csv is one), or write it: a line "
        "video_id, then a line for each video to train on"
    )


def is_number(x: object) -> bool:
    """Tell a finite number from everything else JSON may hold."""
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def segments(path: Path, video: str, entry: dict, key: str, text: str, bad: Callable) -> list[Clip]:
    """Read one video's annotated segments in the form that YouCook2 and COIN share."""
    rows, clips = entry.get(key), []
    if not isinstance(rows, list):
        bad(f"{path}: {video}: {key} is {type(rows).__name__}, wanted a list")
        return []
    for i, row in enumerate(rows):
        where = f"{path}: {video}, segment {i}"
        span = row.get("segment") if isinstance(row, dict) else None
        if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
            bad(f"{where}: segment is {span!r}, wanted [start, end] in seconds")
        elif not 0 <= span[0] < span[1]:
            bad(f"{where}: segment is {span}, wanted 0 <= start < end")
        elif not isinstance(row.get(text), str) or not row[text].strip():
            bad(f"{where}: {text} is {row.get(text)!r}, wanted words")
        else:
            clips.append(Clip(video, row[text], *map(float, span), key=str(row.get("id", ""))))
    return clips


def read_database(path: Path) -> dict[str, dict]:
    """Read {"database": {video_id: {..}}}; DataError for another form."""
    database = read_json(path, dict).get("database")
    if not isinstance(database, dict) or not all(isinstance(x, dict) for x in database.values()):
        raise DataError(f"{path}: wanted {{'database': {{video_id: {{..}}}}}}")
    return database


def read_youcook2(folder: Path, bad: Callable = stop) -> dict[str, list[Clip]]:
    """Read YouCook2 (sec. 5.1.2): {"training" | "validation": clips}, one sentence a segment.

    Its own files or, where these are not, the ones that UniVL's authors made of them.
    """
    path = folder / "youcookii_annotations_trainval.json"
    if not path.exists() and any(folder.glob("youcookii_data*.pickle")):
        import univl  # on top of this file

        return univl.read_youcook2(folder, bad)
    database = read_database(path)
    out = {}
    for split, name in (("training", "train_list.txt"), ("validation", "val_list.txt")):
        listed = [line.strip().split("/")[-1] for line in read_text(folder / name).splitlines()]
        out[split] = []
        for video in filter(None, listed):
            if video in database:
                out[split] += segments(path, video, database[video], "annotations", "sentence", bad)
            else:
                bad(f"{folder / name}: {video} is not in {path.name}")
    return out


def read_coin(folder: Path, bad: Callable = stop) -> dict[str, dict[str, list[Clip]]]:
    """Read COIN (sec. 5.1.2): {"training" | "testing": {video: its labelled segments}}."""
    path = folder / "COIN.json"
    out = {"training": {}, "testing": {}}
    for video, entry in read_database(path).items():
        if entry.get("subset") not in out:
            bad(f"{path}: {video}: subset is {entry.get('subset')!r}, wanted training or testing")
            continue
        out[entry["subset"]][video] = segments(path, video, entry, "annotation", "label", bad)
    return out


def read_crosstask(folder: Path, bad: Callable = stop) -> dict:
    """Read CrossTask (sec. 5.1.2).

    Returns: {"tasks": {task: step texts}, "primary": task ids, "training" | "validation":
             [(task, video)], "steps": {(task, video): [(step 0.., start s, end s)]}}.
    """
    out = {"tasks": {}, "primary": [], "training": [], "validation": [], "steps": {}}
    for name in ("tasks_primary.txt", "tasks_related.txt"):
        path = folder / name
        if not path.exists() and name == "tasks_related.txt":
            continue
        for block in filter(None, read_text(path).replace("\r\n", "\n").strip().split("\n\n")):
            lines = block.strip().split("\n")
            steps = [s.strip() for s in lines[-1].split(",")]
            if len(lines) != 5 or not lines[3].strip().isdigit() or int(lines[3]) != len(steps):
                bad(f"{path}: task {lines[0]!r}: wanted id, title, url, number of steps, steps")
                continue
            out["tasks"][lines[0].strip()] = steps
            out["primary"] += [lines[0].strip()] * (name == "tasks_primary.txt")
    held_back = set(_videos(folder / "videos_val.csv", out["tasks"], bad))
    for pair in _videos(folder / "videos.csv", out["tasks"], bad):
        out["validation" if pair in held_back else "training"].append(pair)
    for pair in out["training"] + out["validation"]:
        path = folder / "annotations" / f"{pair[0]}_{pair[1]}.csv"
        if path.exists():
            out["steps"][pair] = _steps(path, len(out["tasks"][pair[0]]), bad)
    return out


def _videos(path: Path, tasks: dict, bad: Callable) -> list[tuple[str, str]]:
    """Read lines task,video,url."""
    pairs = []
    for i, row in enumerate(csv.reader(read_text(path).splitlines())):
        if len(row) < 2 or row[0] not in tasks:
            bad(f"{path}, line {i + 1}: {row}, wanted task,video,url with a task of tasks_*.txt")
        elif "/" in row[1] or "\\" in row[1] or row[1].startswith("."):
            bad(f"{path}, line {i + 1}: video id {row[1]!r} would leave the folder")
        else:
            pairs.append((row[0], row[1]))
    return pairs


def _steps(path: Path, K: int, bad: Callable) -> list[tuple[int, float, float]]:
    """Read lines step,start,end with steps 1..K."""
    steps = []
    for i, row in enumerate(csv.reader(read_text(path).splitlines())):
        try:
            step, start, end = int(row[0]), float(row[1]), float(row[2])
            if not (1 <= step <= K and 0 <= start <= end < math.inf):
                raise ValueError
            steps.append((step - 1, start, end))
        except (ValueError, IndexError):
            bad(
                f"{path}, line {i + 1}: {row}, wanted step,start,end with step 1..{K}, start <= end"
            )
    return steps
