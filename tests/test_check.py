"""`python data.py check` and `pack`, and what all readers say of files that are wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import data
from benchmarks import Bad, read_coin, read_crosstask, read_msrvtt, read_youcook2
from data import Captions, DataError, FeatureStore
from tasks import open_task
from tests.runs import REPO
from vlm import VLMConfig, load_tokenizer


def spoil_narration(path, change):
    """Change raw_caption.json in place."""
    captions = json.loads((path / "raw_caption.json").read_text())
    change(captions)
    (path / "raw_caption.json").write_text(json.dumps(captions))


def first(captions):
    """Give the first video's captions."""
    return captions["how_train_0000"]


# ---- check


def test_check_counts_what_is_there_and_what_is_missing(shared, toy, capsys):
    """`check` on whole data finds no problem; annotations alone are missing their features."""
    assert data.main(["check", str(shared / "workouts"), "--headers"]) == 0
    out = capsys.readouterr().out
    for line in ("1191 videos, 512 wide", "8358 captions, 135027 words", "16017 words",
                 "283 videos", "18 primary tasks of 19", "no problems"):  # fmt: skip
        assert line in out
    assert data.main(["check", str(shared / "annotations")]) == 1
    out = capsys.readouterr().out
    assert "1333 of 1333 videos have no features" in out and "718 labels" in out


def test_check_names_test_videos_that_are_pre_trained_on(small_toy, tmp_path, capsys):
    """Sec. 5.1.2: no overlap. Videos that a benchmark trains on may be pre-trained on, too."""
    assert data.main(["check", str(small_toy), "--headers"]) == 0
    assert "no problems" in capsys.readouterr().out
    world = shutil.copytree(small_toy, tmp_path / "world")
    ids = ["cook_training_000", "cook_validation_001", "cook_validation_000", "cross_20001_0",
           "cross_20001_5", "video0", "video7001", "how_val_0000"]  # fmt: skip
    with open(world / "train.lst", "a") as listed:
        listed.writelines(f"{video}\n" for video in ids)
    spoil_narration(world, lambda c: c.update({video: first(c) for video in ids} | c))
    assert data.main(["check", str(world), "--headers"]) == 1
    out = capsys.readouterr().out
    assert out.count("take them out of train.lst") == 6
    for line in ("youcook2 validation: 2 of 2 videos are in train.lst too, first cook_validation_0",
                 "coin testing: 2 of 2", "msrvtt test: 1 of 15 videos are in train.lst too, ",
                 "msrvtt QA: 1 of 15", "crosstask validation: 1 of", "val.lst: 1 of"):  # fmt: skip
        assert line in out


def test_lists_that_are_missing_are_said(small_toy, tmp_path, capsys):
    """Without them a run would be tested on something else, or not at all, and look the same."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    (world / "msrvtt" / "MSRVTT_JSFUSION_test.csv").unlink()
    (world / "msrvtt" / "MSRVTT_QA_test.csv").unlink()  # which not everybody has
    assert data.main(["check", str(world), "--headers"]) == 1
    out = capsys.readouterr().out
    assert "1 problem\n" in out and "msrvtt test: none: its list is missing or empty" in out
    with pytest.raises(DataError, match="retrieval by: MSRVTT_JSFUSION_test.csv is missing or"):
        open_task("retrieval", world, data.open_features(world), "msrvtt")
    tokenizer, features = load_tokenizer(world), data.open_features(world)
    c = VLMConfig(video_dim=64, **data.special_ids(tokenizer))
    opened, _ = data.open_data(world, features, tokenizer, c)
    assert len(opened.test) == 2 and "one of each video of val.lst (no test" in opened.test_name
    (world / "val.lst").unlink()
    opened, said = data.open_data(world, features, tokenizer, c)
    assert not opened.test and "no val.lst: no held-out loss" in said


def test_check_counts_word_pieces_of_videos_that_have_features(small_toy, tmp_path, capsys):
    """Catches all texts over some videos' seconds."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    data.main(["check", str(world), "--headers"])
    rate = re.search(r"([0-9.]+) tokens a second", capsys.readouterr().out)[1]
    for path in [*(world / "features").glob("how_train_*")][1:]:
        path.unlink()
    data.main(["check", str(world), "--headers"])
    some = re.search(r"([0-9.]+) tokens a second", capsys.readouterr().out)[1]
    assert abs(float(some) - float(rate)) < 1


def test_check_opens_a_video_once_for_all_its_segments(small_toy, monkeypatch):
    """A real COIN has 46,354 of them; a damaged video is one problem, not one a segment."""
    opened, plain = [], FeatureStore.open
    monkeypatch.setattr(FeatureStore, "open", lambda s, v: opened.append(v) or plain(s, v))
    data.main(["check", str(small_toy), "--headers"])
    assert opened.count("cook_training_001") == 4  # for the width, itself, and once a benchmark


@pytest.mark.parametrize("args", [["check", "nowhere"], ["pack", "nowhere", "--out", "x"]])
def test_bad_commands_are_one_line_and_exit_code_2(args, tmp_path):
    """No traceback reaches whoever mistypes a folder."""
    done = subprocess.run(
        [sys.executable, str(REPO / "data.py"), *args], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: nowhere") and done.stderr.count("\n") == 1


# ---- pack


def test_shards_and_packed_captions_equal_the_files_they_were_packed_from(toy, tmp_path):
    """Catches rows, captions or benchmarks lost or moved by `pack`."""
    data.main(["pack", str(toy), "--out", str(tmp_path / "packed"), "--shard-mb", "2"])
    assert len(list((tmp_path / "packed" / "features").glob("*.safetensors"))) > 1
    loose, packed = data.open_features(toy), data.open_features(tmp_path / "packed")
    assert loose.place.keys() == packed.place.keys() and packed.width == loose.width
    for video in list(loose.place)[::97]:
        rows = np.array([3, 0, 2])
        assert np.array_equal(loose.rows(video, rows), packed.rows(video, rows))
        assert len(loose.open(video)) == len(packed.open(video))
    tokenizer = load_tokenizer(toy)
    raw, flat = (data.open_captions(d, tokenizer) for d in (toy, tmp_path / "packed"))
    assert raw.ids == flat.ids and (raw.words, raw.removed) == (flat.words, flat.removed)
    assert all(np.array_equal(getattr(raw, n), getattr(flat, n)) for n in Captions.ARRAYS)
    assert isinstance(flat.tokens.base, np.memmap)
    assert read_coin(tmp_path / "packed" / "coin") == read_coin(toy / "coin")
    other = BertWordPieceTokenizer({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    with pytest.raises(DataError, match="another vocabulary"):
        data.open_captions(tmp_path / "packed", other._tokenizer)


def test_a_packed_folder_is_packed_again_where_its_captions_are_kept(small_toy, tmp_path):
    """With raw_caption.json put back beside captions/, the new ones are of the new vocabulary."""
    where = [str(tmp_path / name) for name in ("once", "twice")]
    data.main(["pack", str(small_toy), "--out", where[0]])
    shutil.copy(small_toy / "raw_caption.json", where[0])
    data.main(["pack", where[0], "--out", where[1], "--bert", str(small_toy)])
    tokenizer = load_tokenizer(small_toy)
    once, twice = (data.open_captions(folder, tokenizer) for folder in where)
    assert once.ids == twice.ids and np.array_equal(once.tokens, twice.tokens)
    assert (tmp_path / "twice" / "msrvtt").is_dir() and (tmp_path / "twice" / "train.lst").exists()


def test_pack_keeps_columns_that_lie_one_after_the_other_and_leaves_out_what_is_bad(
    small_toy, tmp_path, monkeypatch
):
    """Catches `np.save(x.T)` written as it lies in memory: every number in another place."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    path = world / "features" / "how_train_0000.npy"
    x = np.load(path)
    np.save(path, np.asfortranarray(x))
    data.main(["pack", str(world), "--out", str(tmp_path / "a"), "--shard-mb", "0.01"])
    store = FeatureStore(tmp_path / "a" / "features")
    assert np.array_equal(store.rows("how_train_0000", np.arange(len(x))), x.astype(np.float32))
    path.write_bytes(b"no array")
    spoil_narration(world, lambda captions: first(captions)["end"].__setitem__(1, -1.0))
    args = ["pack", str(world), "--out", str(tmp_path / "b")]
    with pytest.raises(DataError, match="how_train_0000, caption 1"):
        data.main(args)
    assert not list((tmp_path / "b").rglob("*.safetensors"))  # captions first, before the copying
    shutil.rmtree(tmp_path / "b")
    data.main([*args, "--skip-bad"])
    kept = FeatureStore(tmp_path / "b" / "features")
    assert len(kept) == len(store) - 1 and "how_train_0000" not in kept
    for size in ("nan", "-3", "0"):
        with pytest.raises(DataError, match="--shard-mb is"):
            data.main(["pack", str(world), "--out", str(tmp_path / "c"), "--shard-mb", size])
    elsewhere = world / "s3d"
    elsewhere.mkdir()
    np.save(elsewhere / "v.npy", x)
    data.main([*args[:3], str(tmp_path / "d"), "--features", str(elsewhere), "--skip-bad"])
    assert [*FeatureStore(tmp_path / "d" / "features").place] == ["v"]
    assert not (tmp_path / "d" / "s3d").exists()  # not a second time
    (world / "deep" / "er").mkdir(parents=True)
    elsewhere.rename(world / "deep" / "er" / "s3d")
    monkeypatch.chdir(tmp_path)  # nor if one path is relative, or the folder lies deeper
    args = ["pack", "world", "--out", "e", "--features", str(world / "deep" / "er" / "s3d")]
    data.main([*args, "--skip-bad"])
    assert (tmp_path / "e" / "deep" / "er").is_dir() and not [*(tmp_path / "e").rglob("s3d")]


@pytest.mark.parametrize("out", ["packed", "features/packed", ".", "../link/packed"])
def test_pack_refuses_a_folder_inside_the_one_it_packs(out, small_toy, tmp_path):
    """It would be copied into itself, name in name in name, until the disk or a path is full."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    (tmp_path / "link").symlink_to(world)
    before = sorted(world.rglob("*"))
    with pytest.raises(DataError, match="^--out .* is inside .*: choose another$"):
        data.main(["pack", str(world), "--out", str(world / out)])
    assert sorted(world.rglob("*")) == before


# ---- files that are wrong


SPOILT = {
    "missing folder": (lambda d: shutil.rmtree(d), "no such folder"),
    "empty features": (
        lambda d: (shutil.rmtree(d / "features"), (d / "features").mkdir()),
        r"no <video_id>.npy and no \*.safetensors in it: empty",
    ),
    "features deeper": (
        lambda d: shutil.copytree(d / "features", d / "features-2" / "features"),
        "features-2: no <video_id>.npy .* did you mean .*features-2/features",
    ),
    "no features": (lambda d: shutil.rmtree(d / "features"), "no features/ folder"),
    "wrong width": (
        lambda d: np.save(d / "features" / "how_train_0003.npy", np.ones((90, 48), np.float16)),
        r"how_train_0003 has features \(90, 48\), wanted \(seconds, 64\)",
    ),
    "wrong dtype": (
        lambda d: np.save(d / "features" / "how_train_0003.npy", np.ones((90, 64))),
        "dtype float64, wanted float16 or float32",
    ),
    "NaN": (
        lambda d: np.save(
            d / "features" / "how_train_0003.npy", np.full((90, 64), np.nan, np.float32)
        ),
        "how_train_0003: features hold NaN or infinity at second",
    ),
    "truncated": (
        lambda d: (d / "features" / "how_train_0003.npy").write_bytes(
            (d / "features" / "how_train_0003.npy").read_bytes()[:-100]
        ),
        "how_train_0003.npy: not a whole .npy array",
    ),
    "unknown id": (
        lambda d: (d / "train.lst").write_text("how_train_0000\nnobody\n"),
        "train.lst: nobody is not in raw_caption.json",
    ),
    "end before start": (
        lambda d: spoil_narration(d, lambda c: first(c)["end"].__setitem__(0, -1)),
        "how_train_0000, caption 0: start .*, end -1, wanted seconds with 0 <= start <= end",
    ),
    "empty caption": (
        lambda d: spoil_narration(d, lambda c: first(c)["text"].__setitem__(1, " ")),
        "how_train_0000, caption 1: text is ' ', wanted words",
    ),
    "ragged captions": (
        lambda d: spoil_narration(d, lambda c: first(c)["text"].pop()),
        "how_train_0000: wanted lists start, end and text of one length",
    ),
    "not JSON": (lambda d: (d / "raw_caption.json").write_text("{"), "raw_caption.json: not JSON"),
    "nothing left": (
        lambda d: [(d / "features" / f"how_train_{i:04}.npy").unlink() for i in range(30)],
        "none of its 30 videos has features and captions",
    ),
}


@pytest.fixture
def spoilt(small_toy, tmp_path, request) -> tuple[Path, str]:
    """Copy the toy world and damage it: (folder, the message that this must give)."""
    damage, message = SPOILT[request.param]
    shutil.copytree(small_toy, tmp_path / "world")
    damage(tmp_path / "world")
    return tmp_path / "world", message


@pytest.mark.parametrize("spoilt", SPOILT, indirect=True)
def test_bad_data_stops_with_one_clear_line_where_it_is_read(spoilt):
    """Every damage gives a DataError that names the place, the value seen and the value wanted."""
    folder, message = spoilt
    with pytest.raises(DataError, match=message):
        tokenizer = load_tokenizer(folder) if folder.exists() else None
        c = VLMConfig(video_dim=64, **data.special_ids(tokenizer)) if tokenizer else None
        features = data.open_features(folder)
        captions = data.open_captions(folder, tokenizer)
        corpus, _ = data.open_corpus(folder, features, captions, "train", c)
        corpus.clips([(0, video, 0) for video in range(5)])


@pytest.mark.parametrize("spoilt", sorted(set(SPOILT) - {"missing folder"}), indirect=True)
def test_check_reports_bad_data_and_goes_on(spoilt, capsys):
    """`check` never stops at the first problem: exit code 1 and a count."""
    assert data.main(["check", str(spoilt[0])]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^[1-9]\d* problems?$", out, re.M) and "15 texts in 15 videos" in out


def test_bad_rows_are_counted_and_left_out_on_request(small_toy, tmp_path):
    """With a `Bad` in place of `stop` nothing is lost silently: a message for each row left out."""
    shutil.copytree(small_toy, tmp_path / "world")
    spoil_narration(tmp_path / "world", lambda c: first(c)["end"].__setitem__(0, -1))
    bad, tokenizer = Bad(), load_tokenizer(small_toy)
    whole = data.open_captions(small_toy, tokenizer)
    left = data.open_captions(tmp_path / "world", tokenizer, bad)
    assert len(bad.messages) == 1 and len(left.start) == len(whole.start) - 1


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("msrvtt/MSRVTT_QA_test.csv", "\t0\n", "\t7\n", "answer is '7', wanted 0..4"),
        ("msrvtt/MSRVTT_JSFUSION_test.csv", "sentence", "words", "wanted also sentence"),
        ("youcook2/val_list.txt", "101/cook", "101/crook", "is not in youcookii"),
        ("coin/COIN.json", '"subset": "testing"', '"subset": "dev"', "wanted training or testing"),
        ("coin/COIN.json", '"segment": [', '"segment": [9999, ', "wanted .start, end. in seconds"),
        ("crosstask/videos.csv", "20001,", "1,", "with a task of tasks_"),
        ("crosstask/videos.csv", "cross_20001_0", "../x", "would leave the folder"),
        ("crosstask/tasks_primary.txt", "\n6\n", "\n5\n", "number of steps"),
        ("crosstask/annotations/20001_cross_20001_0.csv", "1,", "9,", "step 1..6"),
    ],
)
def test_bad_annotations_name_their_file_and_row(small_toy, tmp_path, file, old, new, message):
    """Each reader raises by default and counts on request; it never skips a row silently."""
    shutil.copytree(small_toy, tmp_path / "world", ignore=shutil.ignore_patterns("features"))
    path = tmp_path / "world" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    folder = tmp_path / "world" / file.split("/")[0]
    read = {"msrvtt": read_msrvtt, "youcook2": read_youcook2, "coin": read_coin}
    read = read.get(folder.name, read_crosstask)
    with pytest.raises(DataError, match=message):
        read(folder)
    if "sentence" not in message:  # a missing column leaves nothing to go on with
        bad = Bad()
        read(folder, bad)
        assert bad.messages


def test_which_list_of_msrvtt_is_trained_on_is_never_a_guess(small_toy, tmp_path):
    """The data comes with 7k and 9k lists: the first one by name is not what was meant."""
    world = shutil.copytree(small_toy / "msrvtt", tmp_path / "msrvtt")
    own, found = world / "MSRVTT_train.csv", read_msrvtt(world)
    (world / "MSRVTT_train.7k.csv").write_text("video_id\nvideo0\n")
    assert read_msrvtt(world) == found  # the one without a number comes first
    own.rename(world / "MSRVTT_train.9k.csv")
    message = (
        r"there are MSRVTT_train.7k.csv and MSRVTT_train.9k.csv: copy the one to train on to M"
    )
    with pytest.raises(DataError, match=message):
        read_msrvtt(world)
    (world / "MSRVTT_train.7k.csv").unlink()
    assert read_msrvtt(world) == found
    (world / "MSRVTT_train.9k.csv").unlink()
    with pytest.raises(
        DataError, match=r"without MSRVTT_train.csv.*copy the benchmark's there .* or"
    ):
        read_msrvtt(world)
