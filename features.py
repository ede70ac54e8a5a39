"""Frozen video features on disk, one row a second; only their index is in memory (sec. 3.1).

    <folder>/<video_id>.npy          (seconds, E) float16 or float32
    <folder>/*.safetensors           the same, many to a shard: python data.py pack
    <file>.pickle                    {video_id: array}: as UniVL's authors published; held in memory

`E` is the features' width: 512 for the paper's S3D, whatever it is for others.
"""

import functools
import io
import itertools
import math
import mmap
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import safe_open

from benchmarks import ID_WANTED, DataError, is_id, shown
from weights import first_line


class FeatureStore:
    """Video features by id, from folders of .npy files, folders of shards, or a pickle.

    Raises DataError when a folder is missing or empty, when an id stands in two of them, and on
    reading a file that is cut short, is not (seconds, E) float16/float32 or holds NaN or infinity.
    """

    def __init__(self, *folders: str | Path):
        self.files: list[Path] = []  # one entry a .npy folder or a shard
        self.place: dict[str, int] = {}  # video id -> which of them
        self.shards: dict[int, safe_open] = {}
        self.arrays: dict[str, np.ndarray] = {}  # what stood in a pickle
        for folder in map(Path, folders):
            if folder.suffix in (".pickle", ".pkl") and folder.is_file():
                self.arrays |= (found := read_pickle(folder))
                self._index(folder, found)
                continue
            if not folder.is_dir():
                raise DataError(
                    f"{folder}: no such folder of features (.npy files or shards), nor a .pickle"
                )
            # hidden ones are left alone: macOS writes ._v.npy beside v.npy
            names = sorted(e.name for e in os.scandir(folder) if not e.name.startswith("."))
            arrays = [name[:-4] for name in names if name.endswith(".npy")]
            shards = [folder / name for name in names if name.endswith(".safetensors")]
            if not arrays and not shards:
                there = f"did you mean {folder / 'features'}?" if "features" in names else "empty?"
                raise DataError(f"{folder}: no <video_id>.npy and no *.safetensors in it: {there}")
            if arrays:
                self._index(folder, arrays)
            for shard in shards:
                self._index(shard, self._shard(len(self.files), shard).keys())
        self.width = self._peek()

    def _index(self, file: Path, ids: Iterable[str]) -> None:
        for video in ids:
            if not is_id(video):
                raise DataError(f"{file}: holds features of {shown(video)}, {ID_WANTED}")
            if video in self.place:
                raise DataError(f"{file}: {video} is also in {self.files[self.place[video]]}")
            self.place[video] = len(self.files)
        self.files.append(file)

    def _shard(self, i: int, file: Path):
        if i not in self.shards:
            try:
                self.shards[i] = safe_open(file, framework="np")
            except Exception as error:  # safetensors' own, the system's, numpy's
                first = first_line(error)
                raise DataError(f"{file}: not a readable safetensors shard ({first})") from None
        return self.shards[i]

    def _peek(self) -> int:
        widths, errors = Counter(), []
        for video in itertools.islice(self.place, 100):
            try:
                widths[self.open(video).shape[1]] += 1
            except DataError as error:  # named when it is read
                errors.append(error)
        if not widths and not errors:
            raise DataError(f"{', '.join(map(str, self.files))}: no video in it")
        if not widths:
            raise errors[0]
        return widths.most_common(1)[0][0]  # one odd file is not to make all others odd

    def __contains__(self, video: str) -> bool:
        return video in self.place

    def __len__(self) -> int:
        return len(self.place)

    def open(self, video: str) -> np.ndarray:
        """Return one video's features (seconds, E), memory-mapped where the file allows it.

        Raises: DataError naming the file that is cut, or has another shape or dtype.
        """
        i = self.place[video]
        file = self.files[i]
        if video in self.arrays:
            x = self.arrays[video]
            shape, dtype = x.shape, str(x.dtype)
        elif file.suffix == ".safetensors":
            x = self._shard(i, file).get_slice(video)
            shape, dtype = (
                tuple(x.get_shape()),
                {"F16": "float16", "F32": "float32"}.get(x.get_dtype()),
            )
        else:
            file = file / f"{video}.npy"
            try:
                x = map_array(file)
                shape, dtype = x.shape, str(x.dtype)
            except Exception as error:  # numpy fails in as many ways as a header can be damaged
                raise DataError(f"{file}: not a whole .npy array ({first_line(error)})") from None
        width = getattr(self, "width", shape[1] if len(shape) == 2 else 0)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width or width < 1:
            raise DataError(
                f"{file}: {video} has features {shape}, wanted (seconds, {width or 'E'}) "
                "with at least one second: extract it again"
            )
        if dtype not in ("float16", "float32"):
            raise DataError(f"{file}: {video} has dtype {dtype}, wanted float16 or float32")
        return x if isinstance(x, np.ndarray) else _Slice(x, shape)

    def whole(self, video: str) -> np.ndarray:
        """Read all seconds of a video: (seconds, E) float32, all finite, or DataError."""
        x = self.open(video)
        return self.rows(video, np.arange(len(x)), x)

    def sound(self, videos: Iterable[str], bad: Callable) -> set[str]:
        """Read videos whole; return those without fault, `bad` gets the others' DataError."""
        found = set()
        for video in dict.fromkeys(videos):
            try:
                self.whole(video)
                found.add(video)
            except DataError as error:
                bad(str(error))
        return found

    def rows(self, video: str, index: np.ndarray, x: np.ndarray | None = None) -> np.ndarray:
        """Read seconds `index` (n,) of one video, of x (seconds, E) if it is open already:
        (n, E) float32, all finite, or DataError."""
        x = self.open(video) if x is None else x
        low = int(index.min()) if len(index) else 0
        high = int(index.max()) + 1 if len(index) else 0
        # Read, widened (by torch, whose float16 is eight times as fast) and tested once, however
        # many clips share a second; a second that is not asked for may be what it likes.
        span = torch.from_numpy(np.require(x[low:high], None, "W")).float().numpy()
        rows = span[index - low]
        if not np.isfinite(span).all() and not np.isfinite(rows).all():
            second = int(index[~np.isfinite(rows).all(1)][0])
            raise DataError(
                f"{self.files[self.place[video]]}: {video}: features hold NaN or infinity "
                f"at second {second}: extract it again"
            )
        return rows


def map_array(file: Path) -> np.ndarray:
    """Memory-map a .npy file (seconds, E): np.load(mmap_mode="r") at a fifth of its price."""
    with open(file, "rb") as f:
        whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    if whole[:8] != npy.magic(1, 0):  # what np.save writes; numpy reads the rest, or says why not
        return np.load(file, mmap_mode="r", allow_pickle=False)
    shape, order, dtype, start = _header(whole[: 10 + int.from_bytes(whole[8:10], "little")])
    return np.ndarray(shape, dtype, whole, start, order=order)


@functools.lru_cache(4096)  # videos of one length have one header
def _header(head: bytes) -> tuple[tuple[int, ...], str, np.dtype, int]:
    """Parse a .npy file's first bytes: shape, order, dtype, where the array begins."""
    shape, by_column, dtype = npy.read_array_header_1_0(io.BytesIO(head[8:]))
    if dtype.hasobject:  # its bytes would be taken for addresses
        raise ValueError(f"holds objects, {dtype}")
    return shape, "F" if by_column else "C", dtype, len(head)


class _Slice:
    """A shard's tensor, read row by row on demand."""

    def __init__(self, lazy, shape: tuple[int, int]):
        self.lazy, self.shape = lazy, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key) -> np.ndarray:
        return self.lazy[key]


class _Dtype:
    """What a pickle says of a dtype: its name and byte order, and nothing that numpy would believe.

    A real one takes flags from a pickle, by which an array's bytes become addresses of objects.
    """

    def __init__(self, name: str):
        self.name, self.order = name, ""

    def __setstate__(self, state: tuple):
        self.order = state[1] if state[1] in ("<", ">") else ""

    def real(self) -> np.dtype:
        """Make the dtype: numbers, text or objects."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[biufSUO]\d*", self.name):
            raise DataError(f"it holds an array of {self.name!r}, wanted numbers or text")
        return np.dtype(self.order + self.name if self.name[0] in "biufU" else self.name)


class _Array(np.ndarray):
    """An array that a pickle fills, with a dtype made here."""

    def __setstate__(self, state: tuple):
        _, shape, dtype, by_column, content = state
        if isinstance(content, list) and len(content) != math.prod(shape):
            raise ValueError(f"{len(content)} objects for an array {shape}")
        super().__setstate__((1, shape, dtype.real(), bool(by_column), content))


class ArrayUnpickler(pickle._Unpickler):
    """Read numpy arrays in plain containers; refuse any other name before it is used.

    What the names stand for is made here: methods, which a pickle can call and not change. This is
    pickle's reader in Python: the one in C makes room for four billion objects if a file says so.
    """

    KNOWN = {("numpy", "dtype"): "_dtype", ("_codecs", "encode"): "_encode"}
    for core in ("core", "_core"):  # numpy 1's name and numpy 2's
        KNOWN[f"numpy.{core}.multiarray", "_reconstruct"] = "_reconstruct"
        KNOWN[f"numpy.{core}.numeric", "_frombuffer"] = "_frombuffer"

    def find_class(self, module: str, name: str):
        """Admit what numpy arrays are made of; DataError for all else."""
        if (module, name) == ("numpy", "ndarray"):
            return None  # stands where _reconstruct does not look
        if (module, name) not in self.KNOWN:
            raise DataError(f"it names {module}.{name}, wanted numpy arrays and nothing else")
        return getattr(self, self.KNOWN[module, name])

    def _dtype(self, name: str, *_) -> _Dtype:
        return _Dtype(name)

    def _encode(self, text: str, encoding: str) -> bytes:
        return text.encode("latin1")  # how pickles for Python 2 spell bytes

    def _reconstruct(self, *_) -> np.ndarray:
        return np.empty(0, np.uint8).view(_Array)

    def _frombuffer(self, content: bytes, dtype: _Dtype, shape: tuple, order: str) -> np.ndarray:
        return np.frombuffer(content, dtype.real()).reshape(shape, order=order)


def unpickle(path: Path, reader: type[pickle._Unpickler] = ArrayUnpickler) -> object:
    """Read a pickle of what `reader` admits; DataError where it is cut or wants something run."""
    try:
        with open(path, "rb") as file:
            return reader(file).load()
    except DataError as error:
        raise DataError(f"{path}: refused: {error}") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise DataError(f"{path}: not a whole pickle ({first_line(error)})") from None


def read_pickle(path: Path) -> dict[str, np.ndarray]:
    """Read {video_id: array (seconds, E)}, nothing in it being run; all of it is held in memory.

    Raises: DataError for a file that is cut, holds anything else or wants something run.
    """
    found = unpickle(path)
    if not isinstance(found, dict) or not all(isinstance(x, np.ndarray) for x in found.values()):
        found = {}
    if not found or not all(isinstance(video, str) for video in found):
        raise DataError(f"{path}: wanted {{video_id: numpy array}} and at least one of them")
    return {video: x.view(np.ndarray) for video, x in found.items()}


def want_folder(data: str | Path) -> None:
    """Raise DataError where DATA is no folder."""
    if not Path(data).is_dir():
        what = (
            "a file, wanted the folder that it is in" if Path(data).exists() else "no such folder"
        )
        raise DataError(f"{data}: {what}")


def open_features(data: str | Path, features: str | Path | None = None) -> FeatureStore:
    """Open `--features DIR|FILE`, or each features* folder of DATA as one; DataError if none."""
    if features is not None:
        return FeatureStore(features)
    want_folder(data)
    folders = sorted(p for p in Path(data).glob("features*") if p.is_dir())
    if not folders:
        raise DataError(
            f"{data}: no features/ folder: put <video_id>.npy there or pass --features DIR"
        )
    return FeatureStore(*folders)
