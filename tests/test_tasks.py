"""The five tasks' items: counts on real annotation files, what is left out, bad files."""

import csv
import json
import shutil

import numpy as np
import pytest

from benchmarks import Clip, DataError
from data import FeatureStore, open_features
from tasks import DATASETS, Item, Task, hold_out, open_task, usable, windows


@pytest.fixture
def world(small_toy, tmp_path):
    """A copy of the small toy world, to be damaged."""
    return shutil.copytree(small_toy, tmp_path / "toy")


def edit(path, change) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_windows_cover_every_second_and_only_the_last_is_short():
    for n in (1, 31, 32, 33, 47, 48, 49, 100):
        for stride in (8, 16, 32):
            item = Item(Clip("v", ""), truth=np.arange(n))
            cut = windows(item, stride)
            assert set(np.concatenate([w.truth for w in cut])) == set(range(n))
            assert all(len(w.truth) == 32 for w in cut[:-1])
            assert all(w.truth[0] == w.clip.start and w.truth[-1] == w.clip.end - 1 for w in cut)
            assert len(cut) == 1 or cut[-2].clip.end < n  # no window that the one before covers


def test_held_out_videos_are_never_trained_on(small_toy):
    """Whole videos, in every task: none of their clips, sentences or windows stays in training."""
    features = open_features(small_toy)
    for name, datasets in DATASETS.items():
        for dataset in datasets:
            task = open_task(name, small_toy, features, dataset, held_out=0.3)
            whole = open_task(name, small_toy, features, dataset)
            trained = {item.clip.video for group in task.train for item in group}
            held = {item.clip.video for item in task.val}
            assert held and trained and not held & trained
            assert held | trained == {i.clip.video for group in whole.train for i in group}
            assert not trained & {item.clip.video for item in task.test}
    assert hold_out([1, 2, 3], 0.0, np.random.default_rng(0)) == ([1, 2, 3], [])
    assert hold_out([1], 0.5, np.random.default_rng(0)) == ([1], [])


def test_a_video_tested_with_two_sentences_is_captioned_once(world):
    """Catches two captions of one name, of which the scores would hold one."""
    path = world / "msrvtt" / "MSRVTT_JSFUSION_test.csv"
    header, row = path.read_text().split("\n")[:2]
    video = dict(zip(header.split(","), row.split(","), strict=True))["video_id"]
    again = ["again", *row.split(",")[1:-1], "another sentence"]
    path.write_text(path.read_text() + ",".join(again) + "\n")
    features = open_features(world)
    once = open_task("captioning", world, features, "msrvtt").test
    assert len(open_task("retrieval", world, features, "msrvtt").test) == len(once) + 1
    assert len({item.clip.video for item in once}) == len(once) and once[0].clip.video == video
    edit(world / "msrvtt" / "MSRVTT_data.json", lambda data: data.update(
        sentences=[x for x in data["sentences"] if x["video_id"] != video]))  # fmt: skip
    assert len(open_task("captioning", world, features, "msrvtt").test[0].texts) == 2


def test_seconds_have_the_labels_of_their_segments(small_toy):
    """COIN and CrossTask, second by second from the files themselves."""
    features = open_features(small_toy)
    task = open_task("segmentation", small_toy, features)
    database = json.loads((small_toy / "coin" / "COIN.json").read_text())["database"]
    for item in task.test:
        for t, k in enumerate(item.truth):
            shown = [a["id"] for a in database[item.clip.video]["annotation"]
                     if a["segment"][0] <= t < a["segment"][1]]  # fmt: skip
            assert task.labels[k] == (shown[0] if shown else "")
    task = open_task("localization", small_toy, features)
    for item in task.test:
        path = small_toy / "crosstask/annotations" / f"{item.clip.key}_{item.clip.video}.csv"
        rows = [[float(x) for x in row] for row in csv.reader(path.open())]
        for (t, s), x in np.ndenumerate(item.truth):
            assert x == any(r[0] - 1 == s and r[1] <= t < r[2] for r in rows)


def test_steps_and_videos_without_a_second_are_counted(world):
    """A step that ends when it begins shows nothing; a video of such steps has nothing to find."""
    folder = world / "crosstask"
    task_id, video, _ = (folder / "videos_val.csv").read_text().splitlines()[0].split(",")
    path = folder / "annotations" / f"{task_id}_{video}.csv"
    rows = path.read_text().splitlines()
    path.write_text("\n".join(",".join([*row.split(",")[:2], row.split(",")[1]]) for row in rows))
    task = open_task("localization", world, open_features(world))
    said = "\n".join(task.said)
    assert f"validation videos: {len(rows)} steps end when they begin and show no second" in said
    assert "validation videos: 1 left out, for none of their steps is seen" in said
    assert video not in {item.clip.video for item in task.test}
    path.write_text("1,3.5,3.5\n2,4,4\n")  # floor 3 up to ceil 4: the first one shows second 3
    task = open_task("localization", world, open_features(world))
    assert "validation videos: 1 steps end when they begin and" in "\n".join(task.said)
    truth = next(item.truth for item in task.test if item.clip.video == video)
    assert np.argwhere(truth).tolist() == [[3, 0]]


def test_crosstask_is_split_as_the_authors_code_does(world):
    """Against that code's own steps, by NumPy's global generator: tasks in the order of the file, a
    validation pair first; what has no features or no annotation is not drawn from."""
    folder = world / "crosstask"
    lines = (folder / "videos.csv").read_text().splitlines()
    lines = lines[-3:] + lines[:-3]  # a task in two parts, the validation pairs first
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    rows = [tuple(line.split(",")[:2]) for line in lines]
    (folder / "annotations" / "{}_{}.csv".format(*rows[5])).unlink()
    next(world.glob(f"features*/{rows[6][1]}.npy")).unlink()
    val = [line.split(",")[1] for line in (folder / "videos_val.csv").read_text().splitlines()]
    there = [row for i, row in enumerate(rows) if i not in (5, 6)]
    np.random.seed(0)
    test, train = [], []
    for task_id in dict.fromkeys(t for t, _ in there):
        videos = [v for t, v in there if t == task_id and v not in val]
        chosen = np.random.choice(videos, 3, replace=False).tolist() if len(videos) > 3 else videos
        train += chosen
        test += [v for v in videos if v not in chosen]
    task = open_task("localization", world, open_features(world), split="authors", train_videos=3)
    assert [item.clip.video for item in task.test] == test
    assert {w.clip.video for group in task.train for w in group} == set(train)
    assert task.split.startswith(f"authors {len(train)} (")
    with pytest.raises(DataError, match="trains on 30 of a task, and none has more than 5"):
        open_task("localization", world, open_features(world), split="authors")
    with pytest.raises(ValueError, match="split is 'x', wanted one of val, authors"):
        open_task("localization", world, open_features(world), split="x")


def test_test_labels_that_training_never_shows_are_a_class_of_their_own(world):
    """They cannot be predicted, so their seconds are wrong, and that is said."""

    def rename(data):
        video = next(v for v in data["database"].values() if v["subset"] == "testing")
        video["annotation"][0]["id"] = "999"

    edit(world / "coin" / "COIN.json", rename)
    task = open_task("segmentation", world, open_features(world))
    assert max(item.truth.max() for item in task.test) == len(task.labels)
    assert any("1 labels are unknown to the model's" in line for line in task.said)
    assert any("first 999" in line for line in task.said)
    # a run's own labels decide, whatever this folder's training videos show
    task = open_task("segmentation", world, open_features(world), labels=["", "1", "2"])
    assert task.labels == ["", "1", "2"] and any("unknown" in line for line in task.said)


def test_what_has_no_features_or_lies_past_the_end_is_counted(world):
    """Left out and said, in training and in the test, of every task."""
    for video in ("video0", "video7001", "cook_validation_000"):
        (world / "features" / f"{video}.npy").unlink()

    def push(data):
        for video, entry in data["database"].items():
            if video == "cook_training_001":
                entry["annotations" if "annotations" in entry else "annotation"][0]["segment"] = [
                    9000,
                    9001,
                ]

    edit(world / "youcook2" / "youcookii_annotations_trainval.json", push)
    edit(world / "coin" / "COIN.json", push)
    features = open_features(world)
    said = "\n".join(open_task("retrieval", world, features, "msrvtt").said)
    assert "training clips: 3 of 90 have no features, first video0" in said
    assert "test clips: 1 of 15 have no features, first video7001" in said
    assert "questions: 1 of 15 have no features" in "\n".join(open_task("qa", world, features).said)
    said = "\n".join(open_task("captioning", world, features, "youcook2").said)
    assert "test clips: 6 of" in said and "first cook_validation_000" in said
    assert "begin after the last feature row, first cook_training_001 at 9000 s" in said
    said = "\n".join(open_task("segmentation", world, features).said)
    assert "testing videos: 1 of" in said and "training segments: 1 of" in said


def test_many_segments_open_each_video_once_and_are_not_compared_in_pairs(tmp_path, monkeypatch):
    """COIN has 46,354 in 11,827 videos: catches a file opened for each, and minutes of `==`."""
    for video in "abc":
        np.save(tmp_path / f"{video}.npy", np.zeros((50, 4), np.float32))
    task, opened = Task("segmentation", "coin", FeatureStore(tmp_path)), []
    plain = FeatureStore.open
    monkeypatch.setattr(FeatureStore, "open", lambda s, v: opened.append(v) or plain(s, v))
    monkeypatch.setattr(Clip, "__eq__", lambda *_: pytest.fail("clips are compared in pairs"))
    clips = [Clip(video, "cut", float(start)) for start in range(51) for video in "cab"]
    assert len(usable(task, "segments", clips)) == 150 and opened == list("cab")
    said = "3 of 153 begin after the last feature row, first c at 50 s"
    assert task.said == [f"segments: {said}"]


def test_bad_files_are_one_clear_error_or_counted(world):
    """An answer outside 0..4, an empty caption, a segment that ends before it begins."""
    features = open_features(world)
    path = world / "msrvtt" / "MSRVTT_QA_test.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-1] + "7", *lines[2:]]))
    with pytest.raises(DataError, match="question 0: answer is '7', wanted 0..4"):
        open_task("qa", world, features)
    task = open_task("qa", world, features, skip_bad=True)
    assert len(task.test) == 14 and "1 bad rows left out" in task.said[-1]

    def empty(data):
        next(iter(data["database"].values()))["annotations"][0]["sentence"] = " "

    edit(world / "youcook2" / "youcookii_annotations_trainval.json", empty)
    with pytest.raises(DataError, match="sentence is ' ', wanted words"):
        open_task("captioning", world, features, "youcook2")

    def turn(data):
        next(iter(data["database"].values()))["annotation"][0]["segment"] = [9, 3]

    edit(world / "coin" / "COIN.json", turn)
    with pytest.raises(DataError, match=r"segment is \[9, 3\], wanted 0 <= start < end"):
        open_task("segmentation", world, features)


def test_skip_bad_leaves_out_features_that_cannot_be_read(world):
    """A header that is none and numbers that are none, of training and test videos, are counted."""
    features = open_features(world)
    whole = open_task("segmentation", world, features, held_out=0.2)
    lost, odd = whole.train[0][0].clip.video, [whole.val[0].clip.video, whole.test[0].clip.video]
    (world / "features" / f"{lost}.npy").write_bytes(b"no array")
    for video in odd:
        path = world / "features" / f"{video}.npy"
        np.save(path, np.load(path) * np.nan)
    with pytest.raises(DataError, match=f"{lost}.npy: not a whole .npy array"):
        open_task("segmentation", world, features)
    task = open_task("segmentation", world, open_features(world), skip_bad=True, held_out=0.2)
    used = {i.clip.video for i in [*task.val, *task.test, *(g[0] for g in task.train)]}
    assert lost not in used and odd[1] not in used and len(task.test) == len(whole.test) - 1
    assert not {i.clip.video for i in task.val} & set(odd) and "bad rows left out" in task.said[-1]


def test_tasks_and_datasets_that_are_not_there_are_named(world):
    features = open_features(world)
    with pytest.raises(ValueError, match="task 'dancing' is unknown: choose one of retrieval, qa"):
        open_task("dancing", world, features)
    with pytest.raises(DataError, match="--dataset coin: qa is read from msrvtt"):
        open_task("qa", world, features, "coin")
    shutil.rmtree(world / "coin")
    with pytest.raises(DataError, match="segmentation wants the folder coin/"):
        open_task("segmentation", world, features)
    (world / "crosstask" / "videos_val.csv").write_text("")
    with pytest.raises(DataError, match="nothing to test localization by"):
        open_task("localization", world, features)
    assert open_task("retrieval", world, features).dataset == "msrvtt"


@pytest.mark.parametrize(
    "name, dataset, train, test",
    [
        ("retrieval", "msrvtt", 566, 129),
        ("retrieval", "youcook2", 2268, 134),
        ("qa", "msrvtt", 566, 129),
        ("captioning", "youcook2", 2268, 134),
        ("segmentation", "coin", 320, 19),
        ("localization", "crosstask", 81, 72),
    ],
)
def test_real_files_have_the_counts_that_their_description_gives(
    shared, name, dataset, train, test
):
    """shared/data/README.md: clips, segments, videos; of 85 training videos 81 are primary."""
    task = open_task(name, shared / "workouts", open_features(shared / "workouts"), dataset)
    assert len(task.test) == test and len(task.said) == 1
    if name in ("segmentation", "localization"):
        assert len({group[0].clip.video for group in task.train}) == train
    else:
        assert len(task.train) == train
    if name == "segmentation":
        assert len(task.labels) == 18 and sum(len(x.truth) for x in task.test) == 3609


def test_whole_annotation_files_are_read_and_missing_features_are_said(shared, tmp_path):
    """YouCook2's, COIN's and MSR-VTT's real files, of which only one video has features here."""
    np.save(tmp_path / "unrelated.npy", np.zeros((400, 4), np.float32))
    store = FeatureStore(tmp_path)
    with pytest.raises(DataError, match="captioning by: test clips: 3492 of 3492 have no"):
        open_task("captioning", shared / "annotations", store, "youcook2")
    database = json.loads(
        (shared / "annotations/youcook2/youcookii_annotations_trainval.json").read_text()
    )["database"]
    video = next(v for v, entry in database.items() if entry["subset"] == "validation")
    np.save(tmp_path / f"{video}.npy", np.zeros((2000, 4), np.float32))
    task = open_task("captioning", shared / "annotations", FeatureStore(tmp_path), "youcook2")
    assert len(task.test) == len(database[video]["annotations"])
    assert "of 3492 have no features" in "\n".join(task.said)
