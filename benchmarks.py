"""The benchmarks' own files, read as they were released (sec. 5.1), and the errors of bad files.

    msrvtt/     MSRVTT_train.csv, MSRVTT_data.json, MSRVTT_JSFUSION_test.csv, MSRVTT_QA_test.csv
    youcook2/   youcookii_annotations_trainval.json, train_list.txt, val_list.txt
    coin/       COIN.json
    crosstask/  tasks_primary.txt, tasks_related.txt, videos.csv, videos_val.csv, annotations/*.csv

    python data.py check DATA           reads all that are there and names what is wrong

Every reader takes `bad`, a function that is handed a message for each bad row: `stop` raises at the
first, a `Bad()` counts them and the reader goes on with the good ones. Whatever a file holds, it is
read, or named in one line: no id leads out of its folder, no row is lost without a word.
"""

import csv
import io
import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """A file that cannot be used: which one, where in it, the value seen, the value wanted."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str, most: int = 1000) -> str:
    """Write text that comes from a file on one line: odd characters escaped, cut if very long.

    >>> one_line("a\\nb\\udc80")
    'a\\\\nb\\\\udc80'
    """
    text = text if len(text) <= most else f"{text[:most]}.."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
shown = _short.repr  # a value out of a file, in an error: short however long or deep it is


def stop(message: str) -> None:
    """Meet the first bad row with a DataError; readers take another function to count and go on."""
    raise DataError(message)


class Bad:
    """Count bad rows instead of stopping at the first: pass it to a reader as `bad`."""

    def __init__(self):
        self.messages: list[str] = []

    def __call__(self, message: str) -> None:
        self.messages.append(one_line(message))


# ---------------------------------------------------------------------------------------------
# What any file may hold, and what is wanted of it

HALF = re.compile("[\ud800-\udfff]")  # half a character: JSON may spell one, UTF-8 has none
ID_WANTED = "which would leave the folder or name no file (no / or \\, no dot first, 250 bytes)"
LONGEST_TEXT = 10_000  # characters
LONGEST_VIDEO = 1e7  # seconds


def is_id(x: object) -> bool:
    """Tell whether `<x>.npy` is a file in its folder, and nowhere else.

    >>> [is_id(x) for x in ("dQw4w9WgXcQ", "-a b.c", "../../x", "/etc/x", "a\\0", "", 7)]
    [True, True, False, False, False, False, False]
    """
    if not isinstance(x, str) or not x.isprintable() or x != x.strip():
        return False
    inside = not x.startswith(".") and "/" not in x and "\\" not in x
    return inside and 0 < len(x.encode()) <= 250


def is_words(x: object) -> bool:
    """Tell words that somebody may have said: text, not blank, not a book, no half characters."""
    fits = isinstance(x, str) and 0 < len(x) <= LONGEST_TEXT and not x.isspace()
    return fits and (x.isascii() or not HALF.search(x))


def is_number(x: object) -> bool:
    """Tell a finite number from everything else JSON may hold."""
    return isinstance(x, int | float) and not isinstance(x, bool) and -1e300 < x < 1e300


def is_span(start: object, end: object) -> bool:
    """Tell a stretch of a video, in seconds with 0 <= start <= end."""
    return is_number(start) and is_number(end) and 0 <= start <= end < LONGEST_VIDEO


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, its mark left out; DataError if it is missing or is not text."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # as it is, whatever ends its lines
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_json(path: str | Path, kind: type | tuple[type, ...]) -> object:
    """Read JSON whose top level is a `kind`; DataError if it is not, or if a key stands twice."""

    def once(pairs: list[tuple[str, object]]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):  # json would keep the last of them
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise DataError(f"{path}: key {shown(twice)} is given twice, wanted once")
        return found

    if not (text := read_text(path)).strip():
        raise DataError(f"{path}: is empty, wanted JSON")
    try:
        data = json.loads(text, object_pairs_hook=once)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON; a number of 5,000 digits; too deep
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, kind):
        wanted = {dict: "an object", list: "a list"}.get(kind, "an object or a list")
        raise DataError(f"{path}: holds a {type(data).__name__}, wanted {wanted}")
    return data


def read_rows(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Read a separated-values file: (line, fields) of each row, blank lines left out.

    Raises: DataError where a quote is not closed on its line, or a field has no end.
    """
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        for row in rows:
            if any("\n" in field or "\r" in field for field in row):
                raise DataError(f"{path}: up to line {rows.line_num}: a quote is left open")
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None


def read_table(path: Path, columns: list[str], bad: Callable, delimiter: str = ",") -> list[dict]:
    """Read a separated-values file with a header; DataError if that does not name all `columns`.

    Those called video_id are ids; the others, words.
    """
    rows = read_rows(path, delimiter)
    _, header = next(rows, (0, []))
    if not header:
        raise DataError(f"{path}: is empty, wanted a header with {', '.join(columns)}")
    if odd := [name for name in columns if header.count(name) != 1]:
        raise DataError(f"{path}: columns are {shown(header)}, wanted also {', '.join(odd)}, once")
    found = []
    for line, fields in rows:
        row = dict(zip(header, fields, strict=False))
        odd = [n for n in columns if not (is_id if n == "video_id" else is_words)(row.get(n))]
        if len(fields) != len(header):
            bad(f"{path}, line {line}: {len(fields)} fields, the header has {len(header)}")
        elif odd and odd[0] == "video_id":
            bad(f"{path}, line {line}: video_id is {shown(row['video_id'])}, {ID_WANTED}")
        elif odd:
            bad(f"{path}, line {line}: {odd[0]} is {shown(row[odd[0]])}, wanted words")
        else:
            found.append(row)
    return found


def read_ids(path: Path, bad: Callable, before: str = "") -> list[str]:
    """Read video ids, one a line, each once; `before`: a pattern that may stand before an id."""
    found: dict[str, int] = {}
    for i, line in enumerate(read_text(path).split("\n"), 1):
        video = re.sub(f"^(?:{before})", "", line.strip())
        if video and not is_id(video):
            bad(f"{path}, line {i}: {shown(video)}, {ID_WANTED}")
        elif video in found:
            bad(f"{path}, line {i}: {video} is listed twice, first in line {found[video]}")
        elif video:
            found[video] = i
    return list(found)


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
        for row in rows:
            if names.setdefault(row["vid_key"], row["video_id"]) != row["video_id"]:
                bad(f"{path}: vid_key {shown(row['vid_key'])} is given to two videos")
        listed = Counter(Clip(row["video_id"], row["sentence"]) for row in rows)
        for clip in (clip for clip, n in listed.items() if n > 1):
            bad(f"{path}: {clip.video} is listed twice with one sentence")
        out["test"] = list(listed)
    if (path := folder / "MSRVTT_data.json").exists():
        train = set(read_training(training_list(folder), {c.video for c in out["test"]}, bad))
        sentences = read_json(path, dict).get("sentences")
        if not isinstance(sentences, list):
            raise DataError(f"{path}: sentences is {shown(sentences)}, wanted a list")
        for i, row in enumerate(sentences):
            video, caption = (
                row.get(k) if isinstance(row, dict) else None for k in ("video_id", "caption")
            )
            if not is_id(video) or not is_words(caption):
                bad(f"{path}: sentence {i} is {shown(row)}, wanted video_id and caption")
            elif video in train:
                out["train"].append(Clip(video, caption))
            else:
                out["references"].setdefault(video, []).append(caption)
        if silent := train - {clip.video for clip in out["train"]}:
            bad(f"{path}: {len(silent)} training videos have no sentence, first {min(silent)}")
    if (path := folder / "MSRVTT_QA_test.csv").exists():
        columns = ["vid_key", *(f"a{i}" for i in range(1, 6)), "answer"]
        for i, row in enumerate(read_table(path, columns, bad, delimiter="\t")):
            if row["answer"] not in ("0", "1", "2", "3", "4"):
                bad(f"{path}, question {i}: answer is {shown(row['answer'])}, wanted 0..4")
                continue
            video = names.get(row["vid_key"], row["vid_key"].replace("msr", "video"))
            if not is_id(video):
                bad(f"{path}, question {i}: vid_key is {shown(row['vid_key'])}, {ID_WANTED}")
                continue
            out["qa"].append((video, [row[f"a{k}"] for k in range(1, 6)], int(row["answer"])))
    return out


def read_training(path: Path, tested: set[str], bad: Callable) -> list[str]:
    """Read the ids to train on; `bad` hears of one that stands twice or is tested by."""
    listed = Counter(row["video_id"] for row in read_table(path, ["video_id"], bad))
    for video, n in listed.items():
        if n > 1:
            bad(f"{path}: {video} is listed twice")
        if video in tested:
            bad(f"{path}: {video} is also in the test list")
    return [video for video in listed if video not in tested]


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


def segments(path: Path, video: str, entry: dict, key: str, text: str, bad: Callable) -> list[Clip]:
    """Read one video's annotated segments in the form that YouCook2 and COIN share."""
    rows, clips = entry.get(key), []
    numbered = text == "sentence"  # YouCook2's ids tell segments apart; COIN's are labels
    if not isinstance(rows, list):
        bad(f"{path}: {video}: {key} is {shown(rows)}, wanted a list")
        return []
    for i, row in enumerate(rows):
        where, row = f"{path}: {video}, segment {i}", row if isinstance(row, dict) else {}
        span, name = row.get("segment"), row.get("id", i if numbered else "")
        if not isinstance(span, list) or len(span) != 2 or not all(map(is_number, span)):
            bad(f"{where}: segment is {shown(span)}, wanted [start, end] in seconds")
        elif not is_span(*span) or span[0] == span[1]:
            bad(f"{where}: segment is {shown(span)}, wanted 0 <= start < end")
        elif not is_words(row.get(text)):
            bad(f"{where}: {text} is {shown(row.get(text))}, wanted words")
        elif name != "" and not is_words(name) and not is_number(name):
            bad(f"{where}: id is {shown(name)}, wanted a number or a name")
        elif numbered and str(name) in {clip.key for clip in clips}:
            bad(f"{where}: id {shown(name)} is given twice, wanted another for each segment")
        else:
            clips.append(Clip(video, row[text], *map(float, span), key=str(name)))
    return clips


def read_database(path: Path, bad: Callable) -> dict[str, dict]:
    """Read {"database": {video_id: {..}}}; DataError for another form."""
    database = read_json(path, dict).get("database")
    if not isinstance(database, dict) or not all(isinstance(x, dict) for x in database.values()):
        raise DataError(f"{path}: wanted {{'database': {{video_id: {{..}}}}}}")
    for video in filter(lambda video: not is_id(video), database):
        bad(f"{path}: {shown(video)}, {ID_WANTED}")
    return {video: entry for video, entry in database.items() if is_id(video)}


def read_youcook2(folder: Path, bad: Callable = stop) -> dict[str, list[Clip]]:
    """Read YouCook2's own files (sec. 5.1.2), one sentence a segment; univl.py reads UniVL's too.

    Returns: {"training" | "validation": clips}.
    """
    path, out = folder / "youcookii_annotations_trainval.json", {}
    database, seen = read_database(path, bad), set()
    for split, name in (("training", "train_list.txt"), ("validation", "val_list.txt")):
        out[split] = []
        for video in read_ids(folder / name, bad, before=r"\w+/"):  # 101/id
            if video in seen:
                bad(f"{folder / name}: {video} is also in train_list.txt")
            elif video in database:
                out[split] += segments(path, video, database[video], "annotations", "sentence", bad)
            else:
                bad(f"{folder / name}: {video} is not in {path.name}")
            seen.add(video)
    return out


def read_coin(folder: Path, bad: Callable = stop) -> dict[str, dict[str, list[Clip]]]:
    """Read COIN (sec. 5.1.2): {"training" | "testing": {video: its labelled segments}}."""
    path = folder / "COIN.json"
    out = {"training": {}, "testing": {}}
    for video, entry in read_database(path, bad).items():
        if (subset := entry.get("subset")) not in list(out):  # a list: subset may be one
            bad(f"{path}: {video}: subset is {shown(subset)}, wanted training or testing")
        else:
            out[subset][video] = segments(path, video, entry, "annotation", "label", bad)
    return out


def read_crosstask(folder: Path, bad: Callable = stop) -> dict:
    """Read CrossTask (sec. 5.1.2).

    Returns: {"tasks": {task: step texts}, "primary": task ids, "listed": [(task, video)] of
             videos.csv, "training" those of them that are not in "validation", "steps":
             {(task, video): [(step 0.., start s, end s)]}, annotated pairs alone}.
    """
    out = {"tasks": {}, "primary": [], "steps": {}}
    for name in ("tasks_primary.txt", "tasks_related.txt"):
        path = folder / name
        if not path.exists() and name == "tasks_related.txt":
            continue
        for block in filter(None, read_text(path).replace("\r\n", "\n").strip().split("\n\n")):
            where, (task, *lines) = f"{path}: task", map(str.strip, block.strip().split("\n"))
            steps = [step.strip() for step in lines[-1].split(",")] if lines else []
            if len(lines) != 4 or not all(map(is_words, steps)):
                bad(f"{where} {shown(task)}: wanted id, title, url, number of steps, steps")
            elif lines[2] != str(len(steps)):
                seen = shown(lines[2])
                bad(f"{where} {task}: number of steps is {seen}, {len(steps)} are listed")
            elif not is_id(task) or task in out["tasks"]:
                bad(f"{where} {shown(task)} is listed twice, or an id {ID_WANTED}")
            else:
                out["tasks"][task] = steps
                out["primary"] += [task] * (name == "tasks_primary.txt")
    out["validation"] = _videos(folder / "videos_val.csv", out["tasks"], bad)  # whole, as it is
    out["listed"] = _videos(folder / "videos.csv", out["tasks"], bad)
    held_back = set(out["validation"])
    out["training"] = [pair for pair in out["listed"] if pair not in held_back]
    for pair in out["training"] + out["validation"]:
        path = folder / "annotations" / f"{pair[0]}_{pair[1]}.csv"
        if len(path.name.encode()) < 256 and path.exists():
            out["steps"][pair] = _steps(path, len(out["tasks"][pair[0]]), bad)
    return out


def _videos(path: Path, tasks: dict, bad: Callable) -> list[tuple[str, str]]:
    """Read lines task,video,url."""
    pairs: dict[tuple[str, str], int] = {}
    for line, row in read_rows(path):
        if len(row) < 2 or row[0] not in tasks:
            wanted = "wanted task,video,url with a task of tasks_*.txt"
            bad(f"{path}, line {line}: {shown(row)}, {wanted}")
        elif not is_id(row[1]):
            bad(f"{path}, line {line}: video id {shown(row[1])}, {ID_WANTED}")
        elif (row[0], row[1]) in pairs:
            bad(f"{path}, line {line}: {row[0]},{row[1]} is listed twice")
        else:
            pairs[row[0], row[1]] = line
    return list(pairs)


def _steps(path: Path, K: int, bad: Callable) -> list[tuple[int, float, float]]:
    """Read lines step,start,end with steps 1..K."""
    steps = []
    for line, row in read_rows(path):
        try:
            step, start, end = int(row[0]), float(row[1]), float(row[2])
            if not (1 <= step <= K and is_span(start, end)):
                raise ValueError
            steps.append((step - 1, start, end))
        except (ValueError, IndexError):
            bad(f"{path}, line {line}: {shown(row)}, wanted step,start,end, step 1..{K}, in order")
    return steps
