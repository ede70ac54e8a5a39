"""What foreign files could once do, by name: each test failed before the reader was mended.

Most were found by test_fuzz.py in its long form. The last part: nothing in a file is ever run.
"""

import ast
import gzip
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import data
from benchmarks import (
    Bad,
    DataError,
    one_line,
    read_coin,
    read_crosstask,
    read_json,
    read_msrvtt,
    read_youcook2,
    shown,
)
from captions import caption_scores
from data import Captions, FeatureStore, open_captions, open_corpus, special_ids
from features import open_features
from keep import read_checkpoint
from meteor import index_paraphrases, word_lists
from s3d import load_s3d
from vlm import VLM, VLMConfig, load_bert, load_run, load_tokenizer, read_tensors, save_run
from weights import read_mmpt

REPO = Path(__file__).resolve().parents[1]
SIZES = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16)
SIZES |= dict(max_position_embeddings=96, video_dim=64)


@pytest.fixture
def world(small_toy, tmp_path) -> Path:
    """A toy world to damage; its features are not copied but linked."""
    folder = tmp_path / "world"
    shutil.copytree(small_toy, folder, ignore=shutil.ignore_patterns("features"))
    (folder / "features").symlink_to(small_toy / "features")
    return folder


def put(path: Path, old: str, new: str, count: int = 1) -> None:
    """Replace text in a file, where it must be."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8", errors="surrogatepass")


def captions_of(world: Path, bad=data.stop) -> Captions:
    """Open a world's captions."""
    return open_captions(world, load_tokenizer(world), bad)


READ = {
    "raw_caption.json": captions_of, "msrvtt": lambda d, *b: read_msrvtt(d / "msrvtt", *b),
    "youcook2": lambda d, *b: read_youcook2(d / "youcook2", *b),
    "coin": lambda d, *b: read_coin(d / "coin", *b),
    "crosstask": lambda d, *b: read_crosstask(d / "crosstask", *b),
    "train.lst": lambda d, *b: corpus_of(d, *b),
}  # fmt: skip


def corpus_of(world: Path, *bad):
    """Open a world's training videos."""
    tokenizer = load_tokenizer(world)
    c = VLMConfig(**SIZES, **special_ids(tokenizer))
    captions = open_captions(world, tokenizer, *bad)
    return open_corpus(world, open_features(world), captions, "train", c, *bad, min_text=3)[0]


def refused(world: Path, file: str, message: str) -> None:
    """See that the reader of a file stops with the message, and that `Bad` counts it if it can."""
    read = READ[file.split("/")[0]]
    with pytest.raises(DataError, match=message) as error:
        read(world)
    assert str(error.value).isprintable() and str(world) in str(error.value)
    try:
        read(world, bad := Bad())
        assert bad.messages and re.search(message, bad.messages[0])
    except DataError as error:
        assert re.search(message, str(error))


def peak() -> int:
    """Return the most bytes this process has held so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


# ---- ids


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a\\b", "a\0b", "x" * 300])
@pytest.mark.parametrize("file", ["raw_caption.json", "youcook2", "coin", "msrvtt"])
def test_an_id_that_would_leave_its_folder_is_refused_in_json(world, file, name):
    """Features are looked up by it, and a later command might write a file of that name."""
    path = next((world / file).glob("*.json"), world / file)
    found = json.loads(path.read_text())
    if file == "msrvtt":
        found["sentences"][0]["video_id"] = name
    else:
        ids = found if file == "raw_caption.json" else found["database"]
        ids[name] = ids.pop(next(iter(ids)))
    path.write_text(json.dumps(found))
    refused(world, file, "leave the folder|wanted video_id")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".x", "a\\b", "a\0b", "x" * 300])
@pytest.mark.parametrize(
    "file, old",
    [
        ("train.lst", "how_train_0000"), ("msrvtt/MSRVTT_JSFUSION_test.csv", "video7000"),
        ("msrvtt/MSRVTT_train.csv", "video0\n"), ("msrvtt/MSRVTT_QA_test.csv", "msr7000"),
        ("youcook2/train_list.txt", "101/cook_training_000"), ("crosstask/videos.csv", "cross_2"),
        ("crosstask/tasks_primary.txt", "20001\n"),
    ],
)  # fmt: skip
def test_an_id_that_would_leave_its_folder_is_refused_in_text(world, file, old, name):
    put(world / file, old, name + "\n" * old.endswith("\n"))
    refused(world, file, "would leave the folder")


@pytest.mark.parametrize("name", ["../../x", "/x", "..", "a\nb"])
def test_features_of_an_id_that_would_leave_the_folder_are_refused(tmp_path, name):
    """Shards and pickles name their videos themselves; the packed index lists them."""
    x = {name: np.ones((2, 3), np.float32)}
    (tmp_path / "shards").mkdir()
    save_file(x, tmp_path / "shards" / "a.safetensors")
    (tmp_path / "x.pickle").write_bytes(pickle.dumps(x))
    for place in ("shards", "x.pickle"):
        with pytest.raises(DataError, match="would leave the folder") as error:
            FeatureStore(tmp_path / place)
        assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "file, line",
    [("train.lst", "how_train_0000"), ("youcook2/train_list.txt", "101/cook_training_000"),
     ("youcook2/val_list.txt", "101/cook_training_000"),
     ("crosstask/videos.csv", "20001,cross_20001_0,https://example.org/cross_20001_0")],
)  # fmt: skip
def test_an_id_listed_twice_is_said(world, file, line):
    """It was trained on twice, or trained on and tested by."""
    path = world / file
    path.write_text(f"{path.read_text()}{line}\n")
    refused(world, file, "listed twice|also in train_list")


def test_a_segments_id_given_twice_is_said(world):
    """Captions go by it: of two the scores held one. Without ids segments are numbered."""
    path = world / "youcook2" / "youcookii_annotations_trainval.json"
    whole = read_youcook2(world / "youcook2")
    path.write_text(re.sub('"id": [0-9]+, ', "", path.read_text()))
    assert read_youcook2(world / "youcook2") == whole
    put(path, '{"segment"', '{"id": 1, "segment"')
    refused(world, "youcook2", "segment 1: id 1 is given twice")


def test_a_video_trained_on_and_tested_by_is_said(world):
    """And ids that stand twice, have no sentence, or would have been left out without a word."""
    lines = (world / "msrvtt" / "MSRVTT_JSFUSION_test.csv").read_text().splitlines()
    video = lines[1].split(",")[lines[0].split(",").index("video_id")]
    for file, line, message in (
        ("msrvtt/MSRVTT_train.csv", video, f"{video} is also in the test list"),
        ("msrvtt/MSRVTT_train.csv", "video0", "video0 is listed twice"),
        ("msrvtt/MSRVTT_train.csv", "video999", "1 training videos have no sentence, first video9"),
        ("msrvtt/MSRVTT_JSFUSION_test.csv", lines[1], f"{video} is listed twice with one sentence"),
    ):
        path = world / file
        whole = path.read_text()
        path.write_text(f"{whole.rstrip()}\n{line}\n")
        refused(world, file, message)
        assert all(c.video != video for c in read_msrvtt(world / "msrvtt", Bad())["train"])
        path.write_text(whole)


def test_crosstask_is_tested_on_all_of_videos_val_csv(world):
    """Also on pairs that videos.csv does not list: its rows were lost without a word."""
    folder = world / "crosstask"
    whole = read_crosstask(folder)
    lines = (folder / "videos.csv").read_text().splitlines()
    val = {line for line in (folder / "videos_val.csv").read_text().splitlines()}
    (folder / "videos.csv").write_text("\n".join(x for x in lines if x not in val) + "\n")
    found = read_crosstask(folder)
    assert found["validation"] == whole["validation"] and found["training"] == whole["training"]
    assert all(pair in found["steps"] for pair in found["validation"])


def test_a_key_given_twice_is_said(world):
    """json keeps the last of two entries: the captions of the first were lost without a word."""
    put(world / "raw_caption.json", '"how_train_0001"', '"how_train_0000"')
    refused(world, "raw_caption.json", "'how_train_0000' is given twice")
    many = ",".join(f'"k{i}": 0' for i in range(100_000))
    (world / "x.json").write_text(f'{{{many}, "k99999": 1}}')
    with pytest.raises(DataError, match="'k99999' is given twice"):  # found in no time
        read_json(world / "x.json", dict)


# ---- values


@pytest.mark.parametrize("number", ["1" + "0" * 400, "9" * 5000, "1e400", "NaN", "-1", "1e8"])
@pytest.mark.parametrize(
    "file, field",
    [("raw_caption.json", '"end": ['), ("coin/COIN.json", '"segment": ['),
     ("youcook2/youcookii_annotations_trainval.json", '"segment": [')],
)  # fmt: skip
def test_a_time_that_no_video_has_is_refused(world, file, field, number):
    """10 ** 400 was an OverflowError; 5,000 digits a message about sys.set_int_max_str_digits."""
    path = world / file
    text = path.read_text()
    spot = text.index(field) + len(field)
    path.write_text(text[:spot] + number + text[text.index(",", spot) :])
    refused(world, file, "not JSON" if len(number) == 5000 else "wanted .*start <=? end|in seconds")


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("coin/COIN.json", '"subset": "training"', '"subset": ["training"]'),
        ("coin/COIN.json", '"id": "', '"id": [[]], "x": "'),
        ("coin/COIN.json", '"label": "', '"label": "\\ud800'),
        ("raw_caption.json", '"text": ["', '"text": ["\\udfff'),
        ("raw_caption.json", '"text": ["', '"text": ["' + "word " * 3000),
        ("raw_caption.json", '"start": [', '"start": 7, "x": ['),
        ("msrvtt/MSRVTT_data.json", '"caption": "', '"caption": "\\ud800'),
        ("crosstask/tasks_primary.txt", "\n6\n", "\n²\n"),
        ("crosstask/tasks_primary.txt", "\n6\n", "\n6\n,"),
    ],
)
def test_a_value_of_another_kind_is_one_clear_line(world, file, old, new):
    """An unhashable subset, half a character that the tokenizer refuses, a digit that is none."""
    put(world / file, old, new)
    refused(world, file, "wanted|are listed")


def test_label_ids_that_look_like_numbers_do_not_end_the_task(world):
    """'²'.isdigit() is true and int('²') is an error."""
    from tasks import open_task

    put(world / "coin" / "COIN.json", '"id": "', '"id": "²')
    task = open_task("segmentation", world, open_features(world))
    assert any(label.startswith("²") for label in task.labels)


def test_a_table_keeps_its_rows_or_says_which_are_odd(world):
    """A quote left open swallowed all rows behind it; a field too many was dropped; so was the
    first column of a table that Excel had saved, with its mark."""
    path = world / "msrvtt" / "MSRVTT_JSFUSION_test.csv"
    good, lines = read_msrvtt(world / "msrvtt")["test"], path.read_text().splitlines()
    first = re.sub("^key,vid_key,(.*)", r"vid_key,key,\1", lines[0])
    swapped = [first, *(re.sub("^([^,]*),([^,]*)", r"\2,\1", line) for line in lines[1:])]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(swapped).encode())
    assert read_msrvtt(world / "msrvtt")["test"] == good
    for line, message in (
        (lines[1] + ", and a half", "line 2: 5 fields, the header has 4"),
        (re.sub(",([^,]*)$", r',"\1', lines[1]), "quote is left open"),
        (lines[1].rsplit(",", 1)[0] + "," + "x" * 200_000, "field larger than field limit"),
        (lines[1].rsplit(",", 1)[0] + ', \u2028 "', "wanted|quote"),
    ):
        path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
        if "\u2028" in line:
            assert len(read_msrvtt(world / "msrvtt")["test"]) == len(good)  # no end of a line
        else:
            refused(world, "msrvtt/x", message)
    path.write_text("\n".join([lines[0].replace("key,", "video_id,"), *lines[1:]]))
    refused(world, "msrvtt/x", "wanted also vid_key, video_id, once|wanted also video_id, once")


def test_what_a_file_says_is_shown_short_and_on_one_line():
    """A newline or an escape sequence in an id could write lines of its own to the terminal."""
    assert one_line("a\nb\x1b[1m\u202e\ud800é") == "a\\nb\\x1b[1m\\u202e\\ud800é"
    assert len(one_line("x" * 10**6)) < 1100 and len(shown(["x" * 10**6] * 10**5)) < 1000
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) < 100  # repr(deep) ends in a RecursionError
    assert "\n" not in str(DataError("a\nb"))


# ---- packed captions


@pytest.fixture
def packed(small_toy, tmp_path) -> Path:
    """The toy world, packed."""
    data.main(["pack", str(small_toy), "--out", str(tmp_path / "packed")])
    return tmp_path / "packed"


PACKED = {
    "first_caption": [lambda x: x[:-1], lambda x: x[::-1].copy(), lambda x: x + 1,
                      lambda x: x.astype(np.float64), lambda x: x.astype(">i8"),
                      lambda x: np.where(np.arange(len(x)) == 3, -7, x)],
    "start": [lambda x: x[:-1], lambda x: x[None], lambda x: x.astype("U9")],
    "first_token": [lambda x: x[1:], lambda x: np.stack([x, x], 1), lambda x: x[:0]],
    "tokens": [lambda x: x[:-1], lambda x: x.astype(np.float32), lambda x: x.astype("<i2,<i2")],
}  # fmt: skip


@pytest.mark.parametrize("name, i", [(n, i) for n, how in PACKED.items() for i in range(len(how))])
def test_packed_arrays_that_do_not_fit_are_refused_when_opened(packed, name, i):
    """They were found by an IndexError in the middle of training, or not at all."""
    path = packed / "captions" / f"{name}.npy"
    np.save(path, PACKED[name][i](np.load(path)))
    with pytest.raises(DataError, match="do not fit each other: pack again"):
        captions_of(packed)


@pytest.mark.parametrize("key, value", [("ids", None), ("ids", 7), ("ids", [[]]), ("words", "x")])
def test_a_packed_index_without_ids_is_refused(packed, key, value):
    about = json.loads((packed / "captions" / "about.json").read_text())
    (packed / "captions" / "about.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(DataError, match="does not list ids"):
        captions_of(packed)


@pytest.mark.parametrize(
    "name, value",
    [("tokens", 60000), ("start", np.nan), ("end", 1e300), ("start", -5.0), ("first_token", 2**62),
     ("first_token", -3)],
)  # fmt: skip
def test_damage_inside_packed_captions_is_met_where_it_is_drawn(packed, name, value, capsys):
    """Opening reads the small index alone (11 million captions in under 10 s); drawing looks."""
    path = packed / "captions" / f"{name}.npy"
    x = np.load(path)
    x[1:-1] = value
    np.save(path, x)
    corpus = corpus_of(packed)
    with pytest.raises(DataError, match="captions of how_train_.* are damaged"):
        for step in range(5):
            corpus.step(step, 32)
    assert data.main(["check", str(packed)]) == 1 and "are damaged" in capsys.readouterr().out


def test_damaged_word_pieces_are_said_of_the_video_that_has_them(packed):
    """Catches the first video of a batch named in place of another one."""
    captions = captions_of(packed)
    n = int(captions.first_caption[7])  # the first caption of the eighth video
    path = packed / "captions" / "tokens.npy"
    tokens = np.load(path)
    tokens[captions.first_token[n]] = 60000
    np.save(path, tokens)
    captions, lo = captions_of(packed), captions.first_caption[[3, 7, 5]]
    with pytest.raises(DataError, match=f"captions of {captions.ids[7]} are .* near caption {n}:"):
        captions.check(lo, lo + 2, 1000)


# ---- weights, vocabularies, configurations


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 10**12}, {"num_hidden_layers": 10**5}, {"num_labels": 10**12},
     {"vocab_size": 10**400},
     {"hidden_size": 3 * 2**18}, {"layer_norm_eps": float("nan")}, {"initializer_range": -1.0},
     {"initializer_range": float("inf")}, {"labels": [["x"], []], "num_labels": 2},
     {"stage": "\ud800"}, {"video_dim": True}, {"max_position_embeddings": 2**40}],
)  # fmt: skip
def test_a_config_of_sizes_that_nobody_builds_is_refused(tmp_path, changes):
    """Before anything is made room for, with the file's name."""
    (tmp_path / "config.json").write_text(json.dumps(SIZES | changes))
    with pytest.raises(DataError, match="config.json: config: ") as error:
        VLMConfig.from_json(tmp_path / "config.json")
    assert str(error.value).isprintable()


@pytest.fixture
def run_folder(small_toy, tmp_path) -> Path:
    """A tiny run."""
    tokenizer = load_tokenizer(small_toy)
    save_run(tmp_path / "run", VLM(VLMConfig(**SIZES, **special_ids(tokenizer))), tokenizer)
    return tmp_path / "run"


def test_a_config_of_more_than_the_weights_file_holds_makes_no_room_for_it(run_folder):
    """Two gigabytes were allocated, and filled at random, to say that they do not fit."""
    config = json.loads((run_folder / "config.json").read_text())
    config |= {"hidden_size": 12000, "num_hidden_layers": 1, "vocab_size": 40000}
    (run_folder / "config.json").write_text(json.dumps(config))
    before = peak()
    with pytest.raises(DataError, match="do not fit config.json"):
        load_run(run_folder)
    assert peak() - before < 2e8


def test_a_run_whose_weights_are_not_finite_or_whose_vocabulary_is_larger_is_refused(run_folder):
    model, tokenizer = load_run(run_folder)
    words = tokenizer.to_str()
    tokenizer.add_tokens([f"word{i}" for i in range(9)])
    tokenizer.save(str(run_folder / "tokenizer.json"))
    with pytest.raises(DataError, match="tokenizer.json has .* word pieces, config.json"):
        load_run(run_folder)
    (run_folder / "tokenizer.json").write_text(words)
    model.video_mean[0] = torch.nan
    save_run(run_folder, model, load_tokenizer(run_folder))
    with pytest.raises(DataError, match="video_mean holds NaN"):
        load_run(run_folder)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a": torch.ones(1).expand(10**6, 10**5)}, "tensors are 400,000,000,000 bytes"),
        ({1: torch.ones(1)}, "1 is no tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "a is torch.complex64"),
        ({"a": torch.ones(2, device="meta")}, "wanted plain numbers|not a plain|is no tensor"),
        ({"a": torch.eye(3).to_sparse()}, "wanted plain numbers|not a plain|is no tensor"),
        ({}, "wanted a dict"),
    ],
)
def test_tensors_that_are_not_plain_numbers_of_the_file_are_refused(tmp_path, tensors, message):
    """A kilobyte could ask for 400 GB: one number seen as a matrix, and widened."""
    torch.save(tensors, tmp_path / "x.bin")
    for read in (read_tensors, read_mmpt):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "x.bin")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "on", "##ion"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([*WORDS, "the", "x"], "not numbered 0..8"),
        ([w for w in WORDS if w != "[UNK]"], "not a BERT tokenizer"),
        ([w for w in WORDS if w != "[SEP]"], "not a BERT tokenizer"),
        ([], "not a BERT tokenizer"),
    ],
)
def test_a_vocabulary_that_would_fail_later_is_refused_when_read(tmp_path, words, message):
    """A word twice made ids up to W: an index error in the model; no [UNK]: a bare Exception."""
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    with pytest.raises(DataError, match=f"vocab.txt: .*{message}") as error:
        load_tokenizer(tmp_path)
    assert str(error.value).isprintable()


def test_a_pickle_makes_no_room_for_what_it_does_not_hold(tmp_path):
    """C's reader fills a table of 2**28 places for the 15 bytes of the first; numpy's own functions
    gave the second 4 GB. Also that the bytes and the shape of an array must agree."""
    array = b"\x80\x02}X\x01\x00\x00\x00vcnumpy\nndarray\n(J\x00\x00\x00\x40\x85U\x02f4tR"
    whole = pickle.dumps({"v": np.ones((2, 3), np.float32)}, 3)
    before = peak()
    for content, message in (
        (b"\x80\x02}r" + (2**27).to_bytes(4, "little") + b".", "wanted {video_id"),
        (array + b"s.", "not a whole pickle"),
        (
            whole.replace(b"K\x02K\x03\x86", b"K\x02K\x02\x86"),
            "buffer size does not match array size",
        ),
        (whole.replace(b"K\x02K\x03\x86", b"K\xffK\xff\x86"), "not a whole pickle"),
        (whole.replace(b"X\x02\x00\x00\x00f4", b"X\x02\x00\x00\x00V4"), "an array of 'V4'"),
    ):
        assert content != whole
        (tmp_path / "x.pickle").write_bytes(content)
        with pytest.raises(DataError, match=message):
            FeatureStore(tmp_path / "x.pickle").open("v")
    assert peak() - before < 2e8


def test_what_torch_says_of_a_damaged_checkpoint_is_one_printable_line(tmp_path):
    """It quotes the file, control characters and all, behind the advice to trust it."""
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    for old, new in ((b"little", b"li\0\x1btt"), (b"ctorch._utils\n", b"ctorch._\x07tils\n")):
        assert old in whole
        with (
            zipfile.ZipFile(io.BytesIO(whole)) as zip_,
            zipfile.ZipFile(tmp_path / "y.pt", "w") as out,
        ):
            for name in zip_.namelist():
                out.writestr(name, zip_.read(name).replace(old, new))
        for read in (read_tensors, read_checkpoint, lambda path: load_s3d(tower(), path)):
            with pytest.raises(ValueError, match="y.pt: ") as error:
                read(tmp_path / "y.pt")
            assert str(error.value).isprintable() and "trust" not in str(error.value)


# ---- captions and METEOR


def test_captions_that_would_take_minutes_or_cannot_be_written_are_refused():
    with pytest.raises(DataError, match="a caption of 300000 characters"):
        caption_scores({"a": ["x " * 150_000]}, {"a": "x"})
    with pytest.raises(DataError, match="the name holds half a character"):
        caption_scores({"\ud800": ["x"]}, {"\ud800": "x"})


def test_a_locked_or_swollen_jar_or_table_is_refused(tmp_path):
    """A locked zip is a RuntimeError; some kilobytes can unpack to gigabytes."""
    members = {"function/english.words": "a", "nonbreaking/english.prefixes": "",
               "synonym/english.synsets": "", "synonym/english.exceptions": ""}  # fmt: skip
    (tmp_path / "paraphrase-en.gz").write_bytes(gzip.compress(b"0.5\na\nb\n"))
    for damage in ("locked", "swollen"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as jar:
            for name, text in members.items():
                swell = damage == "swollen" and name.endswith("words")
                jar.writestr(name, "\n" * (1 << 27) if swell else text)
        whole = bytearray(out.getvalue())
        if damage == "locked":
            for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
                whole[whole.index(mark) + at] |= 1
        (tmp_path / "meteor-1.5.jar").write_bytes(whole)
        with pytest.raises(DataError, match="not METEOR 1.5's jar .*(encrypted|unpacks to)"):
            word_lists.__wrapped__(tmp_path)
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"0.5\n" + b"x" * 10**7 + b"\nb\n"))
    with pytest.raises(DataError, match="too long"):
        index_paraphrases(tmp_path / "x.gz")


# ---- no code from files


class Evil:
    """Make a file when opened by a reader that trusts what it opens."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def tower() -> nn.Module:
    """Stand in for S3D."""
    return nn.Sequential(nn.Conv3d(2, 3, 1))


DOORS = {
    "features.pickle": FeatureStore,
    "features.npy": lambda path: FeatureStore(path.parent),
    "tokens.npy": lambda path: Captions.open(path.parent, load_tokenizer(path.parent)),
    "pytorch_model.bin": lambda path: load_bert(VLM(VLMConfig(**SIZES)), path),
    "x.pt": read_tensors,
    "checkpoint_best.pt": read_mmpt,
    "trainer.pt": read_checkpoint,
    "s3d_howto100m.pth": lambda path: load_s3d(tower(), path),
    "meteor-1.5.jar": lambda path: word_lists.__wrapped__(path.parent),
    "tokenizer.json": load_tokenizer,
    "config.json": VLMConfig.from_json,
    "model.safetensors": read_tensors,
    "shard.safetensors": lambda path: FeatureStore(path.parent),
    "raw_caption.json": lambda path: read_json(path, dict),
}


@pytest.mark.parametrize("how", ["pickle", "zip", "legacy", "npy", "npz", "tar"])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_runs_what_a_file_holds(door, how, tmp_path, small_toy):
    """Shown first: whoever trusts the file does what it says."""
    mark, path = tmp_path / "mark", tmp_path / door
    evil = {"v": Evil(mark), "a": np.ones((2, 3), np.float32)}
    if door == "tokens.npy":  # beside arrays that are as they should be
        tokenizer = load_tokenizer(small_toy)
        shutil.copyfile(small_toy / "tokenizer.json", tmp_path / "tokenizer.json")
        captions = open_captions(small_toy, tokenizer)
        captions.save(tmp_path / "c", tokenizer)
        for file in (tmp_path / "c").iterdir():
            file.rename(tmp_path / file.name)
    (tmp_path / "paraphrase-en.gz").write_bytes(gzip.compress(b"0.5\na\nb\n"))
    if how == "pickle":
        path.write_bytes(pickle.dumps(evil))
        pickle.loads(path.read_bytes())
    elif how in ("zip", "legacy"):
        torch.save(evil, path, _use_new_zipfile_serialization=how == "zip")
        with open(path, "rb") as file:
            torch.load(file, weights_only=False)
    elif how == "npy":
        with open(path, "wb") as file:
            np.save(file, np.array([evil], object), allow_pickle=True)
        np.load(path, allow_pickle=True)
    elif how == "npz":
        with open(path, "wb") as file:
            np.savez(file, a=np.array([evil], object))
        np.load(path, allow_pickle=True)["a"]
    else:
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                inside = pickle.dumps(evil)
                info = tarfile.TarInfo(name)
                info.size = len(inside)
                tar.addfile(info, io.BytesIO(inside))
        pickle.loads(inside)
    assert mark.exists()
    mark.rmdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as error:
        DOORS[door](path)
    assert "\n" not in str(error.value)
    assert not mark.exists() and sorted(tmp_path.rglob("*")) == before


def test_torch_opens_no_program_no_tar_and_nothing_compressed(tmp_path):
    """torch before 2.6 runs the first two even with weights_only=True (CVE-2025-32434)."""
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pt")
    files = {"program": "TorchScript", "tar": "tar file", "packed": "compressed"}
    with zipfile.ZipFile(tmp_path / "x.pt") as old:
        for name in ("program", "packed"):
            kind = zipfile.ZIP_DEFLATED if name == "packed" else zipfile.ZIP_STORED
            with zipfile.ZipFile(tmp_path / name, "w", kind) as new:
                for member in old.namelist():
                    new.writestr(member, old.read(member))
                if name == "program":
                    new.writestr("x/constants.pkl", b"")
    with tarfile.open(tmp_path / "tar", "w") as tar:
        tar.add(tmp_path / "x.pt", "pickle")
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *a, **k: opened.append(a))
        for name, message in files.items():
            for read in (read_tensors, read_mmpt):
                with pytest.raises(ValueError, match=message):
                    read(tmp_path / name)
            ours = "compressed" if name == "packed" else "a program or a tar"
            with pytest.raises(ValueError, match=f"{name}: not a plain file .*it is {ours}"):
                load_s3d(tower(), tmp_path / name)
    assert not opened


NEVER = "pickle.load pickle.loads pickle.Unpickler torch.jit.load yaml.load joblib.load os.system"
NEVER = set(f"{NEVER} os.popen marshal.loads eval exec compile __import__".split())


def unguarded(source: str) -> list[str]:
    """List the calls of a source text that would run what a file or a string holds."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name, said = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        safe = name not in NEVER and said.get("shell", "False") == "False"
        if name == "torch.load":
            safe = said.get("weights_only") == "True" or said.get("pickle_module") == "_Pickle"
        if name in ("np.load", "numpy.load"):
            safe = said.get("allow_pickle") == "False"
        if not safe or name.endswith((".extractall", ".unpack_archive")):
            found.append(ast.unparse(call))
    return found


def test_imports_run_one_way():
    """Catches a file that imports what stands on it; data.py's and vlm.py's commands alone may."""
    commands = {"data": {"check"}, "vlm": {"pictures"}}
    files, below = {path.stem: path.read_text() for path in REPO.glob("*.py")}, {}
    for file, source in files.items():
        nodes = list(ast.walk(ast.parse(source)))
        names = {x.name for node in nodes if isinstance(node, ast.Import) for x in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        below[file] = files.keys() & names - commands.get(file, set())
    assert set(TopologicalSorter(below).static_order()) == set(files)  # CycleError names a circle


def test_no_source_file_trusts_what_it_reads():
    """Shown first: each of them is found."""
    bad = ["torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p)", "pickle.load(f)",
           "np.load(p, allow_pickle=True)", "eval(x)", "exec(x)", "yaml.load(f)", "z.extractall()",
           "subprocess.run(x, shell=True)", "torch.jit.load(p)"]  # fmt: skip
    assert all(unguarded(line) for line in bad)
    assert not unguarded("model.eval(); re.compile(x); np.load(p, allow_pickle=False)")
    for path in sorted(REPO.glob("*.py")):
        assert not unguarded(path.read_text()), path.name
