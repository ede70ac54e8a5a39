"""Features on disk: rows and clips of them, cut files, and pickles in UniVL's form."""

import errno
import io
import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import data
import features
from benchmarks import DataError
from features import FeatureStore, open_array, open_features, read_pickle


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Two videos as UniVL stores them, one of them in column order."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 7)), rng.normal(size=(9, 7))
    return {"a": first.astype(np.float32), "b": np.asfortranarray(second.astype(np.float16))}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_pickle_protocol_are_read(arrays, tmp_path, protocol):
    path = tmp_path / "features.pickle"
    path.write_bytes(pickle.dumps(arrays, protocol))
    store = open_features("nowhere", path)
    assert len(store) == 2 and store.width == 7 and "b" in store and "c" not in store
    for video, x in arrays.items():
        assert np.array_equal(store.rows(video, np.arange(len(x))), x.astype(np.float32))
    assert np.array_equal(store.rows("b", np.array([8, 2, 2])), arrays["b"][[8, 2, 2]])


def test_hidden_files_beside_features_are_left_alone(arrays, tmp_path):
    """macOS writes ._v.npy beside v.npy on other systems' disks: one made all unreadable."""
    np.save(tmp_path / "v.npy", arrays["a"])
    for name in ("._v.npy", "._shard.safetensors"):
        (tmp_path / name).write_bytes(b"attributes")
    assert [*FeatureStore(tmp_path).place] == ["v"]


class Evil:
    """Run a command when opened by a reader that trusts the file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_pickle_is_refused_by_name_and_creates_nothing(arrays, tmp_path):
    """Shown first: a reader that trusts it does create the file."""
    path, mark = tmp_path / "features.pickle", tmp_path / "mark"
    path.write_bytes(pickle.dumps(arrays | {"c": Evil(mark)}))
    pickle.loads(path.read_bytes())
    assert mark.exists()
    mark.unlink()
    with pytest.raises(DataError, match=r"features.pickle: refused: it names (posix|nt).system"):
        FeatureStore(path)
    assert not mark.exists()
    np.save(tmp_path / "x.npy", np.array([Evil(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="x.npy: not a whole .npy array"):
        FeatureStore(tmp_path)
    assert not mark.exists()


class Forged:
    """An array whose dtype, by its flags, says that objects are plain bytes."""

    def __init__(self, dtype: str, flags: int, content: bytes | list):
        self.dtype, self.flags, self.content = dtype, flags, content

    def __reduce__(self):
        make = np.empty(0).__reduce__()[0]
        dtype = ForgedDtype(self.dtype, self.flags)
        return make, (np.ndarray, (0,), b"b"), (1, (1, 1), dtype, False, self.content)


class ForgedDtype(Forged):
    def __init__(self, dtype: str, flags: int):
        self.dtype, self.flags = dtype, flags

    def __reduce__(self):
        return np.dtype, (self.dtype, False, True), (3, "|", None, None, None, -1, -1, self.flags)


@pytest.mark.parametrize("dtype, flags", [("O8", 0), ("f8", 63), ("O8", 63)])
@pytest.mark.parametrize("content", [b"A" * 8, [1.0]], ids=str)
def test_flags_of_a_forged_dtype_are_not_believed(tmp_path, dtype, flags, content):
    """Reading such an array by numpy's own dtype ends the process; here it is an array or an error.

    Either way what comes out is an array whose dtype is numpy's own.
    """
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps({"v": Forged(dtype, flags, content)}))
    try:
        x = read_pickle(path)["v"]
    except DataError as error:
        assert "not a whole pickle" in str(error)
    else:
        assert x.dtype == np.dtype(dtype) and x.dtype.flags == np.dtype(dtype).flags
        assert type(x) is np.ndarray and (x.dtype != object or x.tolist() == [[1.0]])


def test_a_dtype_with_fields_is_refused(tmp_path):
    path = tmp_path / "x.pickle"
    path.write_bytes(pickle.dumps({"v": np.zeros(3, [("a", "f4"), ("b", "O")])}))
    with pytest.raises(DataError, match="refused: it holds an array of 'V[0-9]*', wanted numbers"):
        read_pickle(path)


BAD = {
    "not a whole pickle": b"",
    "not a whole pickle ": b"hello",
    "wanted {video_id: numpy array}": pickle.dumps({"a": [1.0]}),
    "wanted {video_id: numpy array} ": pickle.dumps({}),
    "wanted {video_id: numpy array}  ": pickle.dumps({1: np.zeros((2, 2), np.float32)}),
    "wanted (seconds, E)": pickle.dumps({"a": np.zeros(5, np.float32)}),
    "dtype int64": pickle.dumps({"a": np.zeros((2, 2), np.int64)}),
    "dtype object": pickle.dumps({"a": np.array([[None, 1]], dtype=object)}),
}


@pytest.mark.parametrize("message", BAD)
def test_a_pickle_of_something_else_is_a_clear_error(tmp_path, message):
    path = tmp_path / "features.pkl"
    path.write_bytes(BAD[message])
    with pytest.raises(DataError) as error:
        FeatureStore(path)
    assert message.strip() in str(error.value) and "\n" not in str(error.value)


def test_a_cut_pickle_is_a_clear_error(arrays, tmp_path):
    """Every place to cut it at."""
    whole, path = pickle.dumps(arrays), tmp_path / "features.pickle"
    for n in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:n])
        with pytest.raises(DataError, match="not a whole pickle"):
            read_pickle(path)


def test_pickled_features_are_packed_into_shards(arrays, small_toy, tmp_path, capsys):
    """`python data.py pack DATA --features FILE.pickle`: the way out of memory."""
    path = tmp_path / "features.pickle"
    path.write_bytes(pickle.dumps(arrays))
    args = ["pack", str(small_toy), "--features", str(path), "--out", str(tmp_path / "packed")]
    assert data.main(args) == 0
    assert "features: 2 videos in 1 shards" in capsys.readouterr().out
    store = open_features(tmp_path / "packed")
    assert len(store) == 2 and np.array_equal(store.rows("a", np.arange(5)), arrays["a"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_array_that_numpy_writes_is_read_as_numpy_reads_it(tmp_path, dtype, order, version):
    """Catches a header read wrongly: order, width of the numbers, where they begin."""
    x = np.asarray(np.random.default_rng(0).normal(size=(9, 5)), dtype, order=order)
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, x, version)
    opened = open_array(tmp_path / "x.npy")
    assert opened.dtype == dtype and opened.shape == (9, 5) and len(opened) == 9
    for low, high in ((0, 9), (2, 7), (8, 9), (3, 3), (4, 99)):
        assert np.array_equal(opened[low:high], x[low:high])
    rows = FeatureStore(tmp_path).rows("x", np.array([7, 0, 7]))
    assert rows.dtype == np.float32 and np.array_equal(rows, x[[7, 0, 7]].astype(np.float32))


def test_a_cut_npy_file_is_a_clear_error(tmp_path):
    """Every place to cut it at, in the header and behind it."""
    np.save(tmp_path / "x.npy", np.ones((3, 4), np.float16))
    whole = (tmp_path / "x.npy").read_bytes()
    for n in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:n])
        with pytest.raises(DataError, match="x.npy: not a whole .npy array"):
            FeatureStore(tmp_path)


def test_one_file_of_another_width_does_not_make_the_others_odd(tmp_path):
    """The width is what most have, not what the first by name has."""
    np.save(tmp_path / "a.npy", np.ones((512, 9), np.float16))
    for name in "bcd":
        np.save(tmp_path / f"{name}.npy", np.ones((9, 512), np.float16))
    store = FeatureStore(tmp_path)
    assert store.width == 512
    with pytest.raises(DataError, match=r"a has features \(512, 9\), wanted \(seconds, 512\)"):
        store.open("a")


def test_a_shard_of_no_video_is_a_clear_error(tmp_path):
    save_file({}, tmp_path / "shard-0.safetensors")
    with pytest.raises(DataError, match="shard-0.safetensors: no video in it"):
        FeatureStore(tmp_path)


def test_reading_never_changes_the_file_and_only_seconds_asked_for_must_be_finite(tmp_path):
    """A float32 array needs no widening: what is handed out must still be a copy."""
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    x[1] = np.nan
    np.save(tmp_path / "x.npy", x)
    store = FeatureStore(tmp_path)
    rows = store.rows("x", np.array([0, 2, 3]))
    rows += 1
    assert np.array_equal(store.rows("x", np.array([0, 2, 3])), x[[0, 2, 3]])
    assert np.array_equal(np.load(tmp_path / "x.npy"), x, equal_nan=True)
    with pytest.raises(DataError, match="x: features hold NaN or infinity at second 1"):
        store.rows("x", np.array([3, 1]))


@pytest.mark.parametrize("packed", [False, True])
def test_clips_equal_a_loop_over_seconds(tmp_path, packed):
    """Clips of videos in a row and apart, of 0 seconds and of all; zeros behind; NaN where none
    looks, which is an error for the clip that does."""
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((n, 5)).astype(np.float16) for name, n in (("a", 9), ("b", 4))}
    x["a"][4] = np.nan
    if packed:
        save_file(x, tmp_path / "0.safetensors")
    else:
        np.save(tmp_path / "a.npy", x["a"])
        np.save(tmp_path / "b.npy", x["b"])
    store = FeatureStore(tmp_path)
    videos, start, length = list("aabab"), np.array([5, 0, 0, 1, 3]), np.array([4, 2, 4, 3, 0])
    for opened in (None, {"a": store.open("a")}):
        video, valid = store.clips(videos, start, length, opened)
        assert video.dtype == torch.float32 and video.shape == (5, 4, 5)
        for i, second in itertools.product(range(5), range(4)):
            there = second < length[i]
            row = x[videos[i]][start[i] + second] if there else np.zeros(5)
            assert valid[i, second] == there and np.array_equal(video[i, second].numpy(), row)
    with pytest.raises(DataError, match="a: features hold NaN or infinity at second 4"):
        store.clips(["b", "a"], np.array([0, 1]), np.array([2, 4]))
    video, valid = store.clips(["b"], np.array([2]), np.array([0]))
    assert video.shape == (1, 1, 5) and not video.any() and not valid.any()


def test_a_file_that_is_cut_or_fails_while_it_is_open_is_a_clear_error(tmp_path, monkeypatch):
    """A map of it would end the process; a reader that takes what comes would hand out junk."""
    np.save(tmp_path / "x.npy", np.ones((9, 5), np.float32))
    store = FeatureStore(tmp_path)
    x = store.open("x")
    os.truncate(tmp_path / "x.npy", 128 + 6 * 20)
    assert np.array_equal(store.rows("x", np.arange(6), x), np.ones((6, 5)))
    with pytest.raises(DataError, match=r"x\.npy: seconds 2 to 9 cannot be read \(cut short"):
        store.rows("x", np.array([2, 8]), x)

    class Failing(io.FileIO):
        def readinto(self, _):
            raise OSError(errno.EIO, "Input/output error")

    np.save(tmp_path / "y.npy", np.ones((9, 5), np.float32))
    with pytest.raises(DataError, match=r"y\.npy: seconds 0 to 9 cannot be read \(.*Input/output"):
        features._File(Failing(tmp_path / "y.npy"))[0:9]
