"""UniVL's files: the same clips as from YouCook2's own, and a pickle that runs nothing."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluation
import finetune
import train
from benchmarks import Bad, DataError
from data import FeatureStore
from tasks import open_task
from univl import read_youcook2


def columns(annotations: list[dict]) -> dict[str, np.ndarray]:
    """One video as UniVL writes it: arrays of objects, the numbers numpy's or Python's."""
    spans = [x["segment"] for x in annotations]
    start, end = [np.int64(a) for a, _ in spans], [float(b) for _, b in spans]
    texts = {"text": [x["sentence"] for x in annotations], "transcript": ["NONE"] * len(spans)}
    return {k: np.array(x, dtype=object) for k, x in {"start": start, "end": end, **texts}.items()}


@pytest.fixture
def world(small_toy, tmp_path) -> Path:
    """The toy YouCook2 in UniVL's files, features in one pickle, and a pre-trained toy run."""
    own, folder = small_toy / "youcook2", tmp_path / "data" / "youcook2"
    folder.mkdir(parents=True)
    database = json.loads((own / "youcookii_annotations_trainval.json").read_text())["database"]
    found = {video: columns(entry["annotations"]) for video, entry in database.items()}
    with open(folder / "youcookii_data.no_transcript.pickle", "wb") as f:
        pickle.dump(found, f, protocol=4)
    for name, theirs in (("train", "youcookii_train"), ("val", "youcookii_val")):
        ids = [line.split("/")[-1] for line in (own / f"{name}_list.txt").read_text().split()]
        lines = ["video_id,feature_file", *(f"{video},{video}" for video in ids)]
        (folder / f"{theirs}.csv").write_text("\n".join(lines) + "\n")
    with open(folder / "youcookii_videos_features.pickle", "wb") as f:
        arrays = {video: np.load(small_toy / "features" / f"{video}.npy") for video in database}
        pickle.dump(arrays, f)
    return folder


def test_the_clips_are_those_of_youcook2s_own_files(small_toy, world):
    """Catches columns that are swapped, a split that is, and numbers of numpy that are refused."""
    found, own = read_youcook2(world), read_youcook2(small_toy / "youcook2")
    assert list(found) == list(own)
    for split, clips in own.items():
        assert found[split] == clips
        assert all(type(c.start) is float for c in found[split])
    shutil.copy(small_toy / "youcook2" / "youcookii_annotations_trainval.json", world)
    with pytest.raises(DataError, match="train_list.txt: no such file"):
        read_youcook2(world)  # YouCook2's own file comes first


@pytest.mark.slow
def test_a_run_is_fine_tuned_and_tested_from_univls_files_alone(small_toy, world, tmp_path):
    """The same table as from YouCook2's own files and a folder of features, to the last digit."""
    sizes = dict(width=32, layers=1, batch=8, steps=1)
    train.main(train.TrainConfig(data=str(small_toy), out=str(tmp_path / "toy"), **sizes))
    pickled = str(world / "youcookii_videos_features.pickle")
    settings = dict(task="retrieval", dataset="youcook2", epochs=1, batch=8)
    settings |= dict(init=str(tmp_path / "toy"), out=str(tmp_path / "tuned"))
    root = str(world.parent)
    finetune.main(finetune.TuneConfig(data=root, features=pickled, **settings))
    tables = []
    for root, features in ((small_toy, str(small_toy / "features")), (world.parent, pickled)):
        args = ["--data", str(root), "--features", features, "--json", str(tmp_path / "table")]
        run = ["retrieval", "--run", str(tmp_path / "tuned"), "--dataset", "youcook2"]
        assert evaluation.main([*run, *args]) == 0
        tables.append(json.loads((tmp_path / "table").read_text()))
    assert tables[0] == tables[1] and tables[0]["n"] > 10


def test_tasks_and_check_read_univls_files(world, capsys):
    """Catches either of them reading YouCook2's own files alone."""
    pickled = str(world / "youcookii_videos_features.pickle")
    task = open_task("captioning", world.parent, FeatureStore(pickled))
    assert (len(task.train), len(task.test)) == (48, 12)
    assert data.main(["check", str(world.parent), "--features", pickled]) == 0
    assert "youcook2    validation: 12 texts in 2 videos" in capsys.readouterr().out


def test_every_segment_of_univls_videos_is_captioned_and_scored(world):
    """Catches segments without an id of their own, of which one a video is left in the scores."""
    task = open_task(
        "captioning", world.parent, FeatureStore(world / "youcookii_videos_features.pickle")
    )
    said = [evaluation.name(item.clip) for item in task.test]
    assert len(set(said)) == len(said) == 12
    texts = [item.texts[0] for item in task.test[:-1]] + ["nothing of it"]
    scores = evaluation.score_captions(
        task.test, texts, None, evaluation.Options(tokenizer="space")
    )
    assert 0.5 < scores["ROUGE-L"] < 1


@pytest.mark.parametrize("name", ["youcookii_train.csv", "youcookii_val.csv"])
def test_a_video_listed_twice_or_for_training_and_testing_is_said(world, name):
    path = world / name
    path.write_text(f"{path.read_text()}cook_training_000,cook_training_000\n")
    with pytest.raises(DataError, match="cook_training_000 is listed twice, here or in y"):
        read_youcook2(world)
    assert len(read_youcook2(world, Bad())["training"]) == 48


def edit(folder: Path, change) -> None:
    """Change what a pickle of annotations holds."""
    path = folder / "youcookii_data.no_transcript.pickle"
    found = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(found)))


def in_first(**columns):
    """A change of the first training video's columns."""
    return lambda found: found | {"cook_training_000": found["cook_training_000"] | columns}


@pytest.mark.parametrize("change, message", [
    (lambda found: [found], "wanted {video_id: {'start', 'end', 'text': arrays}}"),
    (lambda found: dict.fromkeys(found, 3), "wanted {video_id:"),
    (in_first(end=None), "cook_training_000: wanted start, end and text, three arrays of one"),
    (in_first(start=np.zeros(2)), "cook_training_000: wanted start, end and text, three arrays of"),
    (in_first(start=np.full(6, np.nan)), "cook_training_000, segment 0: segment is [nan,"),
    (in_first(start=np.full(6, "1")), "cook_training_000, segment 0: segment is ['1',"),
    (in_first(text=np.arange(6)), "cook_training_000, segment 0: sentence is 0, wanted words"),
    (lambda found: {"cook_training_001": found["cook_training_001"]},
     "cook_training_000 is not in youcookii_data.no_transcript.pickle"),
])  # fmt: skip
def test_annotations_of_another_form_are_one_line_that_names_the_video(world, change, message):
    edit(world, change)
    with pytest.raises(DataError) as error:
        read_youcook2(world)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_list_of_other_features_is_refused_and_bad_rows_can_be_counted(world):
    """Features are found by video id: another name in feature_file would be passed over."""
    path = world / "youcookii_val.csv"
    video = path.read_text().split("\n")[1].split(",")[0]
    path.write_text(path.read_text().replace(f"{video},{video}", f"{video},other.npy"))
    with pytest.raises(DataError, match=f"{video}: feature_file is other.npy, wanted the video_id"):
        read_youcook2(world)
    bad = Bad()
    found = read_youcook2(world, bad)
    assert len(bad.messages) == 1 and found["validation"]
    (world / "youcookii_train.csv").unlink()
    with pytest.raises(DataError, match="youcookii_train.csv: no such file"):
        read_youcook2(world)


class Scalar:
    """A number that numpy is asked to make of something else than bytes."""

    def __init__(self, *made_of):
        self.made_of = made_of

    def __reduce__(self):
        return np.float64(1).__reduce__()[0], self.made_of


class Evil:
    """Run a command when opened by a reader that trusts the file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_annotation_is_refused_and_creates_nothing(world, tmp_path):
    """Inside an array of objects too; a numpy scalar is no way around."""
    mark, path = tmp_path / "mark", world / "youcookii_data.no_transcript.pickle"
    edit(world, in_first(text=np.array([Evil(mark)] * 6, dtype=object)))
    evil = path.read_bytes()
    pickle.loads(evil)
    assert mark.exists()  # a reader that trusts it does make it
    mark.unlink()
    with pytest.raises(DataError, match="refused: it names (posix|nt).system"):
        read_youcook2(world)
    assert not mark.exists()
    for made_of in ((np.dtype("O"), Evil(mark)), (np.dtype("O"), b"01234567"), (np.dtype("f8"), 3)):
        path.write_bytes(pickle.dumps({"v": {"start": Scalar(*made_of)}}))
        with pytest.raises(DataError, match="refused|not a whole pickle"):
            read_youcook2(world)
        assert not mark.exists()
    with pytest.raises(DataError, match="refused: it names"):  # features hold arrays alone
        path.write_bytes(pickle.dumps({"v": np.float64(1)}))
        path.rename(world / "x.pickle")
        FeatureStore(world / "x.pickle")
