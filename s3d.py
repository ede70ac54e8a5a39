"""S3D: the frozen encoder that makes video tokens from video files (sec. 3.1 and 5.2).

    python s3d.py VIDEO_OR_FOLDER.. --weights s3d_howto100m.pth --out DATA/features
    python s3d.py VIDEO_OR_FOLDER.. --random-weights 0 --out DIR      tries the path without weights

One row a second: DIR/<video_id>.npy, (seconds, 512) float16; the id is the file's name without its
suffix. A second of video takes about 1.8 core-seconds on a CPU, so a 4-minute video about 4 minutes
on two free cores; with OMP_NUM_THREADS=1 --precision bf16, where the CPU has it, 0.8. Several
processes or machines share a list with --shard 1/8 .. 8/8; a second run does what is left to do.
The network is the video half of Miech et al. 2020 (MIL-NCE), built as in Xie et al. 2018 (S3D-G);
its public weights are loaded by their own names. PyAV decodes (`pip install av`).

What becomes of a video, as in the authors' extraction: 30 frames a second, short side to 224,
centre crop, values / 255, groups of 30 frames, the last filled up with black, L2-normalised rows.
A frame is shown from its timestamp, rounded to 1/30 s, until the next one, so any rate will do and
a variable one too. Second 0 is the first frame, or where the sound starts if that is half a second
or more before. Phone videos are turned upright; pixels that are not square stay as they are stored.

Letters: `B` seconds at once, `C` channels, `T` frames, `H`, `W` height and width of a frame.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

FPS = 30  # frames a second, and so frames a row
SIZE = 224  # height and width the network gets
HOLD = 600  # seconds: no honest video shows one frame for longer, a damaged timestamp does
SUFFIXES = set(
    ".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .vob .webm .wmv".split()
)

# ---------------------------------------------------------------------------------------------
# The network


class Unit(nn.Module):
    """Convolution, BatchNorm, ReLU; a separable one does this over space, then over time.

    Names are the public weights' own.
    """

    def __init__(self, c_in: int, c_out: int, kernel=1, padding=0, separable: bool = False):
        super().__init__()
        if separable:
            kernel, padding = (1, 3, 3), (0, 1, 1)
        self.conv1 = nn.Conv3d(c_in, c_out, kernel, padding=padding, bias=False)
        self.bn1 = nn.BatchNorm3d(c_out)
        self.separable = separable
        if separable:
            self.conv2 = nn.Conv3d(c_out, c_out, (3, 1, 1), padding=(1, 0, 0), bias=False)
            self.bn2 = nn.BatchNorm3d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c_in, T, H, W) -> (B, c_out, ..)."""
        x = F.relu_(self.bn1(self.conv1(x)))
        return F.relu_(self.bn2(self.conv2(x))) if self.separable else x

    def fuse(self) -> None:
        """Fold each BatchNorm, a fixed scale and shift once trained, into its convolution."""
        self.conv1, self.bn1 = fuse_conv_bn_eval(self.conv1, self.bn1), nn.Identity()
        if self.separable:
            self.conv2, self.bn2 = fuse_conv_bn_eval(self.conv2, self.bn2), nn.Identity()


class Gating(nn.Module):
    """Weigh each channel by what the whole clip shows: x * sigmoid(W mean(x) + b)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) -> the same shape."""
        weight = torch.sigmoid(self.fc(x.mean((2, 3, 4))))  # (B, C)
        return x * weight[:, :, None, None, None]


def max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Max-pool with TensorFlow's SAME padding: max(kernel - stride, 0) zeros, sizes rounded up.

    The smaller half of the zeros stands in front; that half is empty for every pool of S3D.
    x (B, C, T, H, W) is never negative (ReLU came before), so a window that hangs over the end
    (ceil_mode) already sees as much as one that sees zeros, and only sizes that the stride does not
    divide need real ones.
    """
    pad = []
    for k, s, n in zip(kernel[::-1], stride[::-1], x.shape[:1:-1], strict=True):  # W, H, T
        pad += [0, (k - s) * (n % s > 0)]
    return F.max_pool3d(F.pad(x, pad) if any(pad) else x, kernel, stride, ceil_mode=True)


class Mixed(nn.Module):
    """Four branches side by side, each gated, joined along the channels (S3D-G's Inception block).

    Widths: c_in, then the outputs of conv_b0, b1_a, b1_b, b2_a, b2_b, b3_b.
    """

    def __init__(self, c_in: int, b0: int, b1_a: int, b1_b: int, b2_a: int, b2_b: int, b3_b: int):
        super().__init__()
        self.conv_b0 = Unit(c_in, b0)
        self.conv_b1_a = Unit(c_in, b1_a)
        self.conv_b1_b = Unit(b1_a, b1_b, separable=True)
        self.conv_b2_a = Unit(c_in, b2_a)
        self.conv_b2_b = Unit(b2_a, b2_b, separable=True)
        self.conv_b3_b = Unit(c_in, b3_b)
        self.gating_b0, self.gating_b1 = Gating(b0), Gating(b1_b)
        self.gating_b2, self.gating_b3 = Gating(b2_b), Gating(b3_b)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, c_in, T, H, W) -> (B, b0 + b1_b + b2_b + b3_b, T, H, W)."""
        b0 = self.conv_b0(x)
        b1 = self.conv_b1_b(self.conv_b1_a(x))
        b2 = self.conv_b2_b(self.conv_b2_a(x))
        b3 = self.conv_b3_b(F.max_pool3d(x, 3, stride=1, padding=1))
        return torch.cat(
            [self.gating_b0(b0), self.gating_b1(b1), self.gating_b2(b2), self.gating_b3(b3)], 1
        )


def space_to_depth(frames: Tensor) -> Tensor:
    """Fold 2x2x2 blocks of (time, row, column) into channels, colour fastest.

    (B, 3, T, H, W) -> (B, 24, T/2, H/2, W/2), laid out in memory with the channels last.
    """
    B, C, T, H, W = frames.shape
    blocks = frames.view(B, C, T // 2, 2, H // 2, 2, W // 2, 2)
    x = blocks.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, T // 2, H // 2, W // 2, 8 * C)
    return x.permute(0, 4, 1, 2, 3)


class S3D(nn.Module):
    """The video tower: `forward` gives the 512-d embedding VLM reads, `features` what is below it.

    Frames are (B, 3, T, H, W) float in [0, 1], T, H and W even; 30 frames of 224 x 224 in this
    project. Call `eval()` before use: BatchNorm must read its stored statistics.
    """

    def __init__(self):
        super().__init__()
        self.conv1 = Unit(24, 64, kernel=(2, 4, 4), padding=(1, 2, 2))
        self.conv_2b = Unit(64, 64)
        self.conv_2c = Unit(64, 192, separable=True)
        self.gating = Gating(192)
        self.mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.fc = nn.Linear(1024, 512)

    def features(self, frames: Tensor) -> Tensor:
        """Average the last feature map: frames (B, 3, T, H, W) -> (B, 1024).

        Raises ValueError for frames of another shape, type or range (0..255 instead of 0..1).
        """
        check_frames(frames)
        x = space_to_depth(frames)  # (B, 24, 15, 112, 112) for a second of 224 x 224
        if not x.is_cpu:
            x = x.contiguous()  # channels last is what the CPU is faster with
        x = self.conv1(x)[:, :, 1:, 1:, 1:]  # padded on both sides, SAME wants it behind only
        x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 64, 15, 56, 56)
        x = self.gating(self.conv_2c(self.conv_2b(x)))
        x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (B, 192, 15, 28, 28)
        x = self.mixed_3c(self.mixed_3b(x))
        x = max_pool(x, (3, 3, 3), (2, 2, 2))  # (B, 480, 8, 14, 14)
        for block in (self.mixed_4b, self.mixed_4c, self.mixed_4d, self.mixed_4e, self.mixed_4f):
            x = block(x)
        x = max_pool(x, (2, 2, 2), (2, 2, 2))  # (B, 832, 4, 7, 7)
        return self.mixed_5c(self.mixed_5b(x)).mean((2, 3, 4))

    def forward(self, frames: Tensor) -> Tensor:
        """Embed clips: frames (B, 3, T, H, W) float in [0, 1] -> (B, 512), not normalised."""
        return self.fc(self.features(frames))

    def fuse(self) -> "S3D":
        """Make this network faster and no longer loadable or trainable; results stay the same."""
        for unit in [m for m in self.modules() if isinstance(m, Unit)]:
            unit.fuse()
        return self


def check_frames(frames: Tensor) -> None:
    """Meet frames that are not (B, 3, T, H, W) floats in [0, 1] with a ValueError."""
    shape = tuple(frames.shape)
    if len(shape) != 5 or shape[1] != 3 or 0 in shape or any(n % 2 for n in shape[2:]):
        raise ValueError(
            f"frames are {shape}, wanted (B, 3, frames, height, width), the last three even"
        )
    if not frames.is_floating_point():
        raise ValueError(f"frames are {frames.dtype}, wanted floats in [0, 1]: divide by 255")
    low, high = (x.item() for x in frames.aminmax())
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"frames range from {low:g} to {high:g}, wanted [0, 1]: divide by 255")


# ---------------------------------------------------------------------------------------------
# Weights


@dataclass
class LoadReport:
    """What became of every tensor: of the file (loaded, unused) and of the model (new)."""

    loaded: list[str]
    new: list[str]
    unused: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} of {len(self.loaded) + len(self.unused)} tensors loaded"]
        for title, names in (("newly initialised", self.new), ("in the file, unused", self.unused)):
            lines += [f"  {title}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


def refuse_all_but_tensors(path: str | Path) -> None:
    """Raise ValueError for a program, a tar or a compressed file: torch.save writes none of them.

    Before 2.6 torch runs the first and trusts the second, weights_only or not; of the third a
    small one may unpack to more than there is memory.
    """
    members = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    if tarfile.is_tarfile(path) or any(m.filename.endswith("constants.pkl") for m in members):
        raise ValueError("it is a program or a tar file")
    if any(m.compress_type for m in members):
        raise ValueError("it is compressed")


def load_s3d(model: S3D, path: str | Path, say: Callable = print) -> LoadReport:
    """Fill the video tower from `s3d_howto100m.pth`, a dict of tensors (sec. 5.2).

    Returns: the report, also handed to `say`; the text tower's text_module.* is left unused, and
             BatchNorm's counters, which nothing reads, may be new.
    Raises:  ValueError naming the tensor that is missing, of a wrong shape or not finite, and for
             a file that is more than tensors: nothing in it is ever run.
    """
    try:
        refuse_all_but_tensors(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch's reader fails in a dozen ways on what is no checkpoint
        # torch's reason stands between two pieces of advice to trust the file
        text = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". Please use")[0]
        first = (text.strip() or type(error).__name__).splitlines()[0]
        first = "".join(c if c.isprintable() else "?" for c in first[:300])
        raise ValueError(f"{path}: not a plain file of tensors ({first})") from None
    tensors = found.items() if isinstance(found, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(x, Tensor) for k, x in tensors):
        raise ValueError(f"{path}: wanted a dict of tensors by name")
    ours = model.state_dict()
    for name, tensor in ours.items():
        if name not in found:
            if not name.endswith("num_batches_tracked"):
                raise ValueError(f"{path}: {name} is missing: not the weights of S3D's video tower")
        elif found[name].shape != tensor.shape:
            seen, wanted = tuple(found[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: {name} is {seen}, S3D wants {wanted}")
        elif found[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {found[name].dtype}, S3D wants {tensor.dtype}")
        elif found[name].is_meta or not found[name].to(tensor.dtype).isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    fits = {name: found[name] for name in ours if name in found}
    model.load_state_dict(fits, strict=False)  # strict above: every name is accounted for
    new, unused = [n for n in ours if n not in fits], [n for n in found if n not in fits]
    report = LoadReport(list(fits), new, unused)
    say(f"S3D {path}: {report}")
    return report


def random_weights(model: S3D, seed: int) -> None:
    """Draw weights that keep different videos different, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def weights_digest(model: S3D) -> str:
    """Tell weights apart: twelve hexadecimal digits of a digest of all of them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------
# A video file, second by second


class VideoError(ValueError):
    """A video that cannot be turned into features; others may be."""


def import_av():
    """Import PyAV; ValueError says how to get it."""
    try:
        import av
    except ImportError:
        raise ValueError("decoding videos needs PyAV: pip install av") from None
    return av


def timed(frames: Iterator, rate: Fraction | None) -> Iterator[tuple]:
    """Give each decoded frame its (frame, start, end), exact seconds on the file's own clock.

    Presentation times are believed until one goes back: AVI stores none and those guessed for it
    come out of order. From there on decoding times are, and without these frames follow closely.
    """
    last, end, in_order = None, Fraction(0), True
    for frame in frames:
        start = None if frame.pts is None else frame.pts * frame.time_base
        if in_order and None not in (start, last) and start < last:
            in_order = False
        if not in_order:
            start = None if frame.dts is None else frame.dts * frame.time_base
        if start is None or (last is not None and start < last):
            start = end
        end = start + ((frame.duration or 0) * frame.time_base or 1 / (rate or Fraction(FPS)))
        last = start
        yield frame, start, end


def at_30_fps(frames: Iterator[tuple], origin: Fraction | None = None) -> Iterator:
    """Repeat and drop frames: one for each 1/30 s from `origin` to the end of the last frame.

    Args:    frames: (frame, start, end) in seconds; origin: where second 0 is, None = first frame.
    Yields:  the frame to be seen there: the last one whose start, rounded to 1/30 s, has come.
    Raises:  VideoError for a gap of many seconds.

    >>> frames = [("a", Fraction(0), None), ("b", Fraction(1, 10), Fraction(1, 6))]
    >>> "".join(at_30_fps(frames))
    'aaabb'
    """
    slot, shown, end = 0, None, None
    for frame, start, end in frames:  # noqa: B007  the last end is read below
        if shown is None:
            origin, shown = start if origin is None else origin, frame
        place = math.floor((start - origin) * FPS + Fraction(1, 2))
        if place - slot > HOLD * FPS:
            raise VideoError(f"no frame between second {slot // FPS} and {place // FPS}: damaged?")
        yield from (shown for _ in range(slot, place))
        slot, shown = max(slot, place), frame
    if shown is not None:
        place = math.floor((end - origin) * FPS + Fraction(1, 2))
        yield from (shown for _ in range(slot, max(place, 1)))


# DEVIATION: the authors' extraction leaves phone videos lying on their side
def upright(rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror rgb (H, W, 3) as its file's display matrix (9,) asks, 16.16 fixed.

    Raises: VideoError for an angle that is no quarter turn.
    """
    a, b, c, d = np.sign(np.round(matrix[[0, 1, 3, 4]] / 65536)).astype(int)
    if abs(a) + abs(b) != 1 or (a, b) not in ((d, -c), (-d, c)):
        raise VideoError("turned by an angle that is no quarter turn")
    if a == 0:  # x' = c y, y' = b x: rows become columns
        rgb, a, d = rgb.transpose(1, 0, 2), c, b
    return rgb[:: int(d), :: int(a)]


def picture(frame, reformatter) -> np.ndarray:
    """Resize the short side to 224, turn upright, cut out the centre: (224, 224, 3) uint8 RGB.

    Raises: VideoError for a picture of more than 50 to 1.
    """
    short = min(frame.width, frame.height)
    if max(frame.width, frame.height) > 50 * short:
        raise VideoError(f"pictures of {frame.width} x {frame.height}, wanted at most 50 to 1")
    W, H = frame.width * SIZE // short, frame.height * SIZE // short
    # one thread: starting a second one takes longer than a frame of this size
    small = reformatter.reformat(frame, W, H, "rgb24", interpolation="BICUBIC", threads=1)
    rgb = small.to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        rgb = upright(rgb, np.frombuffer(matrix, np.int32))
    top, left = (rgb.shape[0] - SIZE) // 2, (rgb.shape[1] - SIZE) // 2
    return rgb[top : top + SIZE, left : left + SIZE]


def stated_seconds(container, stream, origin: Fraction | None) -> float:
    """Read how long the file says its pictures last, from second 0 at `origin` on; 0 if it does not
    say. Where Matroska's clock does not begin at 0, it says when they end."""
    if container.format.name == "avi" and stream.average_rate:
        return float(stream.frames / stream.average_rate)  # its duration is guessed from its size
    if stream.duration:
        return float(stream.duration * stream.time_base)
    begin = origin if origin is not None else (stream.start_time or 0) * stream.time_base
    clock = stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:01:02.345
    if len(clock) == 3:
        end = sum(float(x) * s for x, s in zip(clock, (3600, 60, 1), strict=True))
        return end - float(begin)
    alone = len(container.streams) == 1  # else it may be the sound that lasts so long
    if not alone or not container.duration:
        return 0.0
    end = container.duration / 1e6
    return end - float(begin) if "matroska" in container.format.name else end


def choose_stream(container, cover: int) -> tuple:
    """Find the pictures of a file: (stream, where second 0 is, or None for its first frame).

    Raises: VideoError when there are none.
    """
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        raise VideoError("no pictures in it, sound only?")
    begins = [s.start_time * s.time_base for s in (streams[0], *container.streams.audio)
              if s.start_time is not None]  # fmt: skip
    late = streams[0].start_time is not None and begins[0] - min(begins) >= Fraction(1, 2)
    return streams[0], min(begins) if late else None


def seconds(path: str | Path) -> Iterator[np.ndarray]:
    """Decode a video, holding one second at a time.

    Yields:  (30, 224, 224, 3) uint8 RGB for each second begun; black where the last one has ended.
    Raises:  VideoError for a file that is no video, has sound only, is damaged or cut short.
    """
    av = import_av()
    cover = av.stream.Disposition.attached_pic  # a song's cover is a video stream of one picture
    n, last, rgb, reformatter = 0, None, None, av.video.reformatter.VideoReformatter()
    try:
        # an absolute path is no URL, and a playlist that poses as a video must not fetch one
        options = {"protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), options=options, metadata_errors="ignore") as container:
            stream, origin = choose_stream(container, cover)
            stream.thread_type = "AUTO"
            stated = stated_seconds(container, stream, origin)
            frames = timed(container.decode(stream), stream.average_rate)
            frames = at_30_fps(frames, origin)
            while group := list(islice(frames, FPS)):
                second = np.zeros((FPS, SIZE, SIZE, 3), np.uint8)
                for i, frame in enumerate(group):
                    if frame is not last:
                        last, rgb = frame, picture(frame, reformatter)
                    second[i] = rgb
                n += len(group)
                yield second
    except VideoError:
        raise
    except Exception as error:  # damaged files fail in a dozen ways; none may end a long run
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise VideoError(f"cannot be decoded ({why})") from None
    if not n:
        raise VideoError("not one frame in it")
    if n / FPS < stated - 1:
        raise VideoError(f"ends after {n / FPS:.1f} of {stated:.1f} seconds: cut short?")


@torch.inference_mode()
def extract(
    model: nn.Module, path: str | Path, batch: int = 4, normalize: bool = True,
    precision: str = "fp32", device: str = "cpu",
) -> np.ndarray:  # fmt: skip
    """Turn a video file into what VLM reads: (seconds, 512) float16 (sec. 5.2).

    Args:    batch: seconds that go through the network at once; normalize: rows of length 1;
             precision: "fp32", or "bf16", which turns a row by about 1 % and takes less time.
    Raises:  VideoError, as `seconds` does.
    """
    half, clip, rows = precision == "bf16", seconds(path), []
    while group := list(islice(clip, batch)):
        frames = torch.from_numpy(np.stack(group)).to(device)  # (B, 30, 224, 224, 3)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            x = model(frames.permute(0, 4, 1, 2, 3).float() / 255).float()
        rows.append((F.normalize(x, dim=1) if normalize else x).half().cpu().numpy())
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise VideoError("its features are not finite in float16")
    return features


# ---------------------------------------------------------------------------------------------
# python s3d.py


def find_videos(paths: list[str]) -> dict[str, Path]:
    """List the videos of files and folders, walked to the bottom, by id in sorted order.

    In folders, names tell videos from other files; hidden ones are passed over.

    Raises: ValueError for a path that is not there, an id that cannot be a file name of --out or
            that two files share, and where there is no video at all; OSError for a closed folder.
    """

    def stop(error: OSError):
        raise error

    files = []
    for path in map(Path, paths):
        if path.is_dir():
            walk = os.walk(path, onerror=stop)
            inside = []
            for top, folders, names in walk:
                folders[:] = [name for name in folders if name[0] != "."]  # walked no further
                inside += [Path(top, name) for name in names if name[0] != "."]
            files += sorted(p for p in inside if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path}: no such file or folder")
    videos = {}
    for path in files:
        odd = path.stem.startswith(".") or "\\" in path.stem or path.stem != path.stem.strip()
        if (n := len(os.fsencode(path.stem))) > 250:
            raise ValueError(f"{path}: a name of {n} bytes, wanted at most 250: rename the file")
        if odd or not path.stem.isprintable():
            raise ValueError(f"{str(path)!r}: {path.stem!r} cannot be a video id: rename the file")
        twin = videos.setdefault(path.stem, path)
        if twin.resolve() != path.resolve():
            raise ValueError(f"{twin} and {path} would both be {path.stem}.npy: rename one")
    if not videos:
        kinds = " ".join(sorted(SUFFIXES))
        raise ValueError(f"{', '.join(map(str, paths))}: no videos there (names in {kinds})")
    return dict(sorted(videos.items()))


def take_shard(videos: dict[str, Path], shard: str) -> dict[str, Path]:
    """Take every N-th video, from the I-th on, of I/N; all shards together take each video once.

    Raises: ValueError for another form.

    >>> take_shard({"a": 1, "b": 2, "c": 3}, "1/2")
    {'a': 1, 'c': 3}
    """
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--shard is {shard!r}, wanted I/N with I from 1 to N, such as 1/8")
    return dict(islice(videos.items(), int(i) - 1, None, int(n)))


def write_aside(path: Path, write: Callable) -> None:
    """Write a file under a name nobody else has, and move it in when it is whole."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with open(handle, "wb") as f:
            write(f)
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)  # mkstemp's file is nobody else's to read
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


def mark_folder(out: Path, marks: dict) -> None:
    """Write down in s3d.json whose features a folder holds; ValueError for a folder of others.

    Features of random weights look like any others: this file is how to tell them apart later.
    """
    path = out / "s3d.json"
    if path.exists():
        try:
            seen = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise ValueError(f"{path}: not JSON: give another --out, or remove it") from None
        if seen != marks:
            raise ValueError(f"{path} says {seen}, these are {marks}: give another --out")
    else:
        write_aside(path, lambda f: f.write((json.dumps(marks, indent=1) + "\n").encode()))


def duration(s: float) -> str:
    """Say seconds as a person would.

    >>> duration(59), duration(600), duration(9000)
    ('59 s', '10 min', '2.5 h')
    """
    return f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min" if s < 6000 else f"{s / 3600:.1f} h"


def extract_all(model: nn.Module, videos: dict[str, Path], out: Path, **settings) -> int:
    """Extract those videos that have no file in `out` yet; settings are `extract`'s.

    Returns: how many were broken: each is named on stderr and leaves no file.
    """
    left = {video: path for video, path in videos.items() if not (out / f"{video}.npy").exists()}
    begin, total, broken = time.monotonic(), 0, 0
    for k, (video, path) in enumerate(left.items(), 1):
        since = time.monotonic()
        try:
            features = extract(model, path, **settings)
        except VideoError as error:
            broken += 1
            print(f"broken: {path}: {error}", file=sys.stderr, flush=True)
            continue
        write_aside(out / f"{video}.npy", lambda f, x=features: np.save(f, x))
        total += len(features)
        now = time.monotonic()
        speed, togo = len(features) / (now - since), (now - begin) / k * (len(left) - k)
        print(
            f"[{k}/{len(left)}] {video}: {len(features)} rows, {speed:.2f} s of video a second"
            f" | about {duration(togo)} left",
            flush=True,
        )
    print(
        f"{len(left) - broken} videos ({duration(total)}) written to {out} in "
        f"{duration(time.monotonic() - begin)}, {len(videos) - len(left)} already there, "
        f"{broken} broken"
    )
    return broken


def arguments() -> argparse.ArgumentParser:
    """Declare the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    a = parser.add_argument
    a("videos", nargs="+", metavar="VIDEO_OR_FOLDER", help="folders are walked to the bottom")
    a = parser.add_argument_group("the network").add_argument
    a("--weights", metavar="FILE", help="s3d_howto100m.pth, the public weights")
    a("--random-weights", type=int, metavar="SEED", help="random weights of a seed: a dry run")
    a = parser.add_argument_group("what is written").add_argument
    a("--out", type=Path, required=True, metavar="DIR", help="features, <video_id>.npy each")
    a("--no-normalize", action="store_true", help="keep rows as they are, not of length 1")
    a = parser.add_argument_group("speed").add_argument
    a("--precision", choices=("fp32", "bf16"), default="fp32",
      help="bf16: faster, 1 %% off (default: fp32)")  # fmt: skip
    a("--shard", default="1/1", metavar="I/N",
      help="every N-th video from the I-th on (default: 1/1)")  # fmt: skip
    a("--batch", type=int, default=4, metavar="N", help="seconds of video at once (default: 4)")
    a("--device", help="cpu, cuda, cuda:1 .. (default: cuda if there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Extract features of videos; the exit code is 1 if some were broken."""
    args = arguments().parse_args(argv)
    if (args.weights is None) == (args.random_weights is None):
        raise ValueError("give --weights s3d_howto100m.pth or, to try without, --random-weights 0")
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}, wanted at least 1")
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file, wanted a folder")
    import_av()
    videos = take_shard(find_videos(args.videos), args.shard)
    model = S3D().eval()
    if args.weights is None:
        weights = f"random, seed {args.random_weights}"
        random_weights(model, args.random_weights)
        print(f"RANDOM WEIGHTS (seed {args.random_weights}): a dry run; the features mean nothing")
    else:
        weights = Path(args.weights).name
        load_s3d(model, args.weights)
    marks = {"weights": weights, "digest": weights_digest(model)}
    marks |= {"normalized": not args.no_normalize, "precision": args.precision}
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.fuse().to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from None
    args.out.mkdir(parents=True, exist_ok=True)
    mark_folder(args.out, marks)
    settings = {"batch": args.batch, "normalize": not args.no_normalize}
    settings |= {"precision": args.precision, "device": device}
    return 1 if extract_all(model, videos, args.out, **settings) else 0


def run(main: Callable[[], object]) -> None:
    """Call main; what the user can mend is one line on stderr and exit code 2."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
