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

    def open(self, video: str) -> "np.ndarray | _File | _Slice":
        """Return one video's features (seconds, E), to be read by x[low:high]; x.shape and len(x)
        are known before.

        Raises: DataError naming the file that is cut, or has another shape or dtype.
        """
        i = self.place[video]
        file = self.files[i]
        if video in self.arrays:
            x = self.arrays[video]
        elif file.suffix == ".safetensors":
            x = _Slice(self._shard(i, file).get_slice(video))
        else:
            file = file / f"{video}.npy"
            try:
                x = open_array(file)
            except Exception as error:  # numpy fails in as many ways as a header can be damaged
                raise DataError(f"{file}: not a whole .npy array ({first_line(error)})") from None
        shape, dtype = x.shape, str(x.dtype)
        width = getattr(self, "width", shape[1] if len(shape) == 2 else 0)
        if len(shape) != 2 or shape[0] < 1 or shape[1] != width or width < 1:
            raise DataError(
                f"{file}: {video} has features {shape}, wanted (seconds, {width or 'E'}) "
                "with at least one second: extract it again"
            )
        if dtype not in ("float16", "float32"):
            raise DataError(f"{file}: {video} has dtype {dtype}, wanted float16 or float32")
        return x

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

    def clips(
        self, videos: list[str], start: np.ndarray, length: np.ndarray,
        opened: dict[str, np.ndarray] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Read B clips, padded: seconds [start, start + length) of their videos.

        Args:    videos: B ids; what follows one another of one video is read at once. start (B,)
                 and length (B,) int, inside the videos. opened: those that are open already, by id.
        Returns: video (B, V, E) float32, zeros at padding, V the longest length; valid (B, V) bool.
        Raises:  DataError, as `rows`.
        """
        place = np.arange(max(1, int(length.max())))
        valid = place < length[:, None]
        second = np.where(valid, start[:, None] + place, -1)
        # What bounds this is memory: every row, padding too, is written once, where it is to stand.
        out = np.empty((*valid.shape, self.width), np.float32)
        b = 0
        for video, run in itertools.groupby(videos):
            mine = slice(b, b := b + len(list(run)))
            self.rows(video, second[mine], (opened or {}).get(video), out[mine])
        return torch.from_numpy(out), torch.from_numpy(valid)

    def rows(
        self, video: str, index: np.ndarray,
        x: np.ndarray | None = None, out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Read seconds of one video.

        Args:    index (n,) or (B, V) int: which, -1 for none. x (seconds, E): the video, if it is
                 open already. out (n, E) or (B, V, E) float32: where to write them.
        Returns: (n, E) or (B, V, E) float32, all finite, zeros for -1.
        Raises:  DataError for NaN or infinity in a second of index, or for one that cannot be read.
        """
        x = self.open(video) if x is None else x
        asked = index[index >= 0]
        low, high = (int(asked.min()), int(asked.max()) + 1) if len(asked) else (0, 0)
        # Read, widened (by torch, whose float16 is eight times as fast) and tested once, however
        # many clips share a second; a second that is not asked for may be what it likes.
        span = np.empty((1 + high - low, x.shape[1]), np.float32)
        span[0] = 0  # stands for no second
        torch.from_numpy(span[1:]).copy_(torch.from_numpy(np.require(x[low:high], None, "W")))
        rows = np.take(span, index - low + 1, 0, out, mode="clip")  # -1 comes to 0 or less: row 0
        if not np.isfinite(span).all() and not np.isfinite(rows).all():
            second = int(index[~np.isfinite(rows).all(-1)][0])
            raise DataError(
                f"{self.files[self.place[video]]}: {video}: features hold NaN or infinity "
                f"at second {second}: extract it again"
            )
        return rows


def open_array(file: Path) -> "_File | np.ndarray":
    """Open a .npy array (seconds, E) to read rows of: an eighth of what np.load takes to map it.

    To read a clip's few rows takes half as long as to map the file and let go of it; and a failing
    disk is an error, where it would end a process that reads a map.

    Raises: ValueError for a file that is cut or no array, and whatever numpy raises.
    """
    x = _File(open(file, "rb", buffering=0))
    if not x.plain:  # numpy reads the rest, or says why not
        x = np.load(file, mmap_mode="r", allow_pickle=False)
        if not isinstance(x, np.ndarray):
            raise ValueError("an archive of arrays")
    return x


class _File:
    """A .npy file's array, read row by row on demand."""

    def __init__(self, lazy: io.FileIO):
        self.lazy, self.plain = lazy, False
        head = lazy.read(128)  # as long as np.save makes it
        self.start = 10 + int.from_bytes(head[8:10], "little")
        if head[:8] != npy.magic(1, 0) or self.start > 128:
            return
        self.shape, by_column, self.dtype = _header(head[: self.start])
        self.plain = len(self.shape) == 2 and not by_column and not self.dtype.hasobject
        size = os.fstat(lazy.fileno()).st_size - self.start
        wanted = math.prod(self.shape) * self.dtype.itemsize
        if size < wanted:
            raise ValueError(f"{size} bytes of {wanted}")

    def __del__(self):
        self.lazy.close()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice) -> np.ndarray:
        low, high, _ = key.indices(len(self))
        rows = np.empty((high - low, self.shape[1]), self.dtype)
        try:
            self.lazy.seek(self.start + low * self.shape[1] * self.dtype.itemsize)
            if self.lazy.readinto(rows) == rows.nbytes:
                return rows
            why = "cut short since it was opened"
        except OSError as error:
            why = first_line(error)
        raise DataError(f"{self.lazy.name}: seconds {low} to {high} cannot be read ({why})")


@functools.lru_cache(4096)  # videos of one length have one header
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parse a .npy file's first bytes: shape, whether it lies by column, dtype."""
    return npy.read_array_header_1_0(io.BytesIO(head[8:]))


class _Slice:
    """A shard's tensor, read row by row on demand."""

    def __init__(self, lazy):
        self.lazy, self.shape = lazy, tuple(lazy.get_shape())
        self.dtype = {"F16": "float16", "F32": "float32"}.get(lazy.get_dtype())

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
