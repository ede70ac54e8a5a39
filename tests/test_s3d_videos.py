"""Video files of many kinds through s3d.py, against ffmpeg where it is there."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import s3d
from s3d import S3D, VideoError, random_weights
from tests.test_s3d import clips_of

REPO = Path(__file__).resolve().parents[1]


# ---- video files


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av", reason="PyAV is not installed: pip install av")


def flat(i: int, W: int = 48, H: int = 32) -> np.ndarray:
    """Frame i of a test video: one grey that tells its number, from 1 (black is padding)."""
    return np.full((H, W, 3), i % 250 + 1, np.uint8)


def write_video(
    path, frames, times=None, rate=30, codec="ffv1", pixels="bgr0", tone=None, **display
):
    """Encode frames (H, W, 3), shown at `times` (milliseconds) or at a rate; tone: seconds of sound
    that starts at 0 with the pictures; display: set_display_rotation's."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate)
        if display:
            stream.set_display_rotation(**display)
        sound = out.add_stream("pcm_s16le", rate=8000, layout="mono") if tone else None
        clock = Fraction(1, 1000) if times else 1 / Fraction(rate)
        stream.codec_context.time_base = clock
        for i, (picture, t) in enumerate(zip(frames, times or itertools.count(), strict=False)):
            if i == 0:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = pixels
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t, clock
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
        for k in range(math.ceil((tone or 0) * 8)):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.int16), layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 8000, k * 1000, Fraction(1, 8000)
            out.mux(sound.encode(frame))
        if sound:
            out.mux(sound.encode())
    return path


def shown(path) -> list[int]:
    """Read which frame of a `flat` video each 1/30 s shows; -1 is black."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3d, "SIZE", 16)
        seconds = list(s3d.seconds(path))
    assert all(x.shape == (30, 16, 16, 3) and x.dtype == np.uint8 for x in seconds)
    return [int(x[8, 8, 0]) - 1 for x in np.concatenate(seconds)]


def fps_filter(path, frames: int) -> list[int]:
    """The same by FFmpeg's own `fps=30` filter, the one of the authors' extraction."""
    import av

    out = []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        graph = av.filter.Graph()
        nodes = graph.add_buffer(template=stream), graph.add("fps", "30"), graph.add("buffersink")
        graph.link_nodes(*nodes).configure()
        for frame in itertools.chain(file.decode(stream), [None]):
            graph.push(frame)
            while True:
                try:
                    out.append(graph.pull())
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return [int(f.to_ndarray(format="rgb24")[8, 8, 0]) - 1 for f in out]


@pytest.mark.parametrize("rate", [30, 10, 25, 60, Fraction(30000, 1001), 7], ids=str)
@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_any_frame_rate_becomes_30_as_ffmpeg_does_it(av, tmp_path, rate, suffix):
    """Catches frames taken by number, and times rounded down: Matroska's are in milliseconds."""
    n = math.ceil(rate * 2.3)
    path = write_video(tmp_path / f"a.{suffix}", map(flat, range(n)), rate=rate)
    ours, theirs = shown(path), fps_filter(path, n)
    assert ours[: len(theirs)] == theirs
    assert len(ours) == 90 and set(ours[len(theirs) :]) == {-1}  # black to the whole second
    assert abs(len(theirs) - n / rate * 30) <= 1


def test_variable_frame_rates_keep_their_times(av, tmp_path):
    """Catches a constant rate assumed: a still of 1.5 s, then bursts."""
    dice = random.Random(5)
    times = list(
        itertools.accumulate([0, 1500, *(dice.choice([5, 33, 40, 100]) for _ in range(30))])
    )
    path = write_video(tmp_path / "a.mkv", map(flat, range(len(times))), times)
    ours, theirs = shown(path), fps_filter(path, len(times))
    assert ours[: len(theirs)] == theirs and len(ours) == math.ceil(len(theirs) / 30) * 30
    for slot, i in enumerate(ours[: len(theirs)]):  # and the rule itself, in milliseconds
        rounded = [math.floor(t * 30 / 1000 + 0.5) for t in times]
        assert i == max(k for k, r in enumerate(rounded) if r <= slot)


def test_times_that_run_backwards_do_not_lose_frames():
    """Catches trust in AVI's guessed presentation times: decoding times are in order."""

    class Fake:
        def __init__(self, pts, dts, duration=1):
            self.pts, self.dts, self.duration, self.time_base = pts, dts, duration, Fraction(1, 30)

    def starts(*stamps):
        return [float(s * 30) for _, s, _ in s3d.timed(itertools.starmap(Fake, stamps), None)]

    assert starts((0, 0), (1, 1), (3, 2), (2, 3), (5, 4), (4, 5)) == [0, 1, 3, 3, 4, 5]
    assert starts((None, None), (None, None), (None, None)) == [0, 1, 2]  # a raw stream
    assert starts((100, 100), (101, 101), (0, 0), (1, 1)) == [100, 101, 102, 103]  # a clock reset
    frames = [Fake(0, None, 0), Fake(6, None, None)]
    assert [float(e * 30) for *_, e in s3d.timed(frames, Fraction(10))] == [3, 9]


def test_sound_that_starts_earlier_keeps_its_place(av, tmp_path):
    """Captions are timed by the sound: pictures 1.2 s late must not slide to second 0."""
    times = [1200 + 100 * i for i in range(12)]
    path = write_video(tmp_path / "late.mkv", map(flat, range(12)), times, tone=2.4)
    ours = shown(path)
    assert ours[:39] == [0] * 39 and ours[39:42] == [1, 1, 1] and len(ours) == 90
    near = [t - 900 for t in times]  # 0.3 s: nothing to wait for
    assert shown(write_video(tmp_path / "near.mkv", map(flat, range(12)), near, tone=1.5))[3] == 1


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
def test_a_clock_that_does_not_begin_at_0_makes_no_video_cut_short(av, tmp_path, suffix):
    """Matroska says when pictures end, others how long they last; a recording begins anywhere."""
    times = [10_000 + round(1000 * i / 30) for i in range(60)]
    codec = {} if suffix == "mkv" else dict(codec="libx264", pixels="yuv420p")
    path = write_video(tmp_path / f"t.{suffix}", map(flat, range(60)), times, **codec)
    assert len(shown(path)) == 60
    with open(path, "r+b") as f:  # and what is cut short is still said
        f.truncate(path.stat().st_size * 2 // 5) if suffix == "mkv" else None
    if suffix == "mkv":
        with pytest.raises(VideoError, match="cut short"):
            shown(path)


@pytest.mark.parametrize("W, H", [(64, 48), (48, 64), (37, 301), (225, 223), (5, 3), (1, 1)])
def test_the_centre_is_cut_out_of_any_shape(av, tmp_path, W, H):
    """Catches a squeezed picture, a crop at the edge, width and height swapped, odd sizes."""
    picture = np.zeros((H, W, 3), np.uint8)
    picture[..., 0] = (np.arange(W) * 255 // max(W - 1, 1))[None, :]
    picture[..., 1] = (np.arange(H) * 255 // max(H - 1, 1))[:, None]
    (second,) = s3d.seconds(write_video(tmp_path / "a.mkv", [picture] * 30))
    red, green = second[7, ..., 0].astype(float).mean(0), second[7, ..., 1].astype(float).mean(1)
    for ramp, n in ((red, W), (green, H)):
        if n > 30:
            kept = min(W, H) / n  # of the ramp; its middle stays in the middle
            assert abs(ramp[112] - 127.5) < 4
            assert abs((ramp[-8] - ramp[7]) / 255 - kept * 208 / 223) < 0.03


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_phone_videos_are_turned_upright(av, tmp_path, degrees, hflip):
    """Catches a turn the wrong way: the file says how to turn, the pixels lie as the sensor did."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32], picture[:24, 32:] = (200, 0, 0), (0, 200, 0)
    picture[24:, :32], picture[24:, 32:] = (0, 0, 200), (200, 200, 0)
    path = write_video(
        tmp_path / "a.mp4", [picture] * 10, codec="mpeg4", pixels="yuv420p",
        degrees=degrees, hflip=hflip,
    )  # fmt: skip
    (second,) = s3d.seconds(path)
    wanted = np.rot90(picture, degrees // 90)  # counter-clockwise, then mirrored
    wanted = wanted[:, ::-1] if hflip else wanted
    H, W = wanted.shape[:2]
    for row, column in itertools.product((0.3, 0.7), (0.3, 0.7)):
        seen = second[5, int(row * 224), int(column * 224)].astype(int)
        assert abs(seen - wanted[int(row * H), int(column * W)]).max() < 40
    with pytest.raises(VideoError, match="no quarter turn"):
        s3d.upright(picture, np.array([46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30]))


def test_short_videos_are_padded_with_black_to_a_second(av, tmp_path):
    """One second is one row, one frame more is two, a single frame one; the rest is black."""
    for n, rows in ((30, 1), (31, 2), (1, 1), (59, 2)):
        ours = shown(write_video(tmp_path / f"{n}.mkv", map(flat, range(n))))
        assert len(ours) == 30 * rows
        assert ours[:n] == list(range(n)) and set(ours[n:]) <= {-1}
    flash = [("a", Fraction(5), Fraction(501, 100))]  # less than half of 1/30 s: still a picture
    assert list(s3d.at_30_fps(iter(flash))) == ["a"] and list(s3d.at_30_fps(iter([]))) == []


def write_sound(path):
    """Write a second of silence."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le" if path.suffix == ".wav" else "aac", rate=8000)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.int16), layout="mono")
            frame.sample_rate = 8000
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def test_the_picture_on_a_songs_cover_is_no_video():
    """Catches one row of features for a song; a video with a cover keeps its own pictures."""

    def stream(disposition):
        return SimpleNamespace(disposition=disposition, start_time=None)

    cover, video, audio = stream(1024), stream(1), stream(1)
    streams = SimpleNamespace(video=[cover], audio=[audio])
    with pytest.raises(VideoError, match="sound only"):
        s3d.choose_stream(SimpleNamespace(streams=streams), 1024)
    streams.video.append(video)
    assert s3d.choose_stream(SimpleNamespace(streams=streams), 1024) == (video, None)


def test_files_that_cannot_be_used_say_why(av, tmp_path, monkeypatch):
    """Sound only, empty, text, cut in the header, cut in the middle, a frame far in the future."""
    monkeypatch.setattr(s3d, "SIZE", 16)

    def why(path) -> str:
        with pytest.raises(VideoError) as caught:
            for _ in s3d.seconds(path):
                pass
        return str(caught.value)

    for suffix in ("wav", "mp4"):
        write_sound(tmp_path / f"sound.{suffix}")
        assert "sound only" in why(tmp_path / f"sound.{suffix}")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.avi").write_text("not a video, whatever its name says\n" * 50)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n")
    for name in ("empty.mp4", "text.avi", "list.m3u8"):
        assert "cannot be decoded" in why(tmp_path / name)
    noise = np.random.default_rng(0).integers(0, 255, (120, 32, 48, 3), np.uint8)
    for suffix, message in (("mp4", "cannot be decoded"), ("avi", "cut short"), ("mkv", "cut")):
        whole = write_video(
            tmp_path / f"whole.{suffix}", noise, codec="mpeg4", pixels="yuv420p"
        ).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        assert message in why(tmp_path / f"cut.{suffix}")
    far = write_video(tmp_path / "far.mkv", map(flat, range(2)), [0, 700_000])
    assert "no frame between second 0 and 700" in why(far)
    assert "cannot be decoded" in why(tmp_path)  # a folder
    strip = write_video(tmp_path / "strip.mkv", [np.zeros((2, 102, 3), np.uint8)])
    assert "pictures of 102 x 2" in why(strip)  # to be blown up to 224 rows
    monkeypatch.setattr(s3d, "picture", lambda *_: [][0])  # PyAV has its bugs too
    assert "cannot be decoded (IndexError: list" in why(strip)


@pytest.mark.parametrize(
    "name, streams, file_us, frames, stream, seconds",
    [
        ("mov,mp4", 2, 9_000_000, 75, {"duration": 250}, 2.5),
        ("matroska,webm", 2, 9_000_000, 0, {"metadata": {"DURATION": "01:02:03.5"}}, 3723.5),
        ("matroska,webm", 2, 0, 0, {"metadata": {"DURATION": "00:00:12.0"}, "start_time": 1000}, 2),
        ("matroska,webm", 1, 12_000_000, 0, {"start_time": 1000}, 2),  # an end, not a length
        ("flv", 1, 9_000_000, 0, {"start_time": 1000}, 9),
        ("flv", 1, 9_000_000, 0, {}, 9),
        ("flv", 2, 9_000_000, 0, {}, 0),  # the sound may be what lasts nine seconds
        ("avi", 1, 9_000_000, 75, {"duration": 250}, 3),  # by its frames at 25 a second
        ("h264", 1, None, 0, {}, 0),
    ],
)
def test_what_a_file_says_of_its_length(name, streams, file_us, frames, stream, seconds):
    """Catches a file's length, sound included, taken for that of its pictures."""
    container = SimpleNamespace(
        format=SimpleNamespace(name=name), streams=[None] * streams, duration=file_us
    )
    settings = {"duration": None, "metadata": {}, "frames": frames, "start_time": None} | stream
    stream = SimpleNamespace(time_base=Fraction(1, 100), average_rate=Fraction(25), **settings)
    assert s3d.stated_seconds(container, stream, None) == seconds


def test_damaged_files_are_a_video_error_or_a_video(av, tmp_path, monkeypatch):
    """Catches an exception that would end a run over many videos: 60 files with bytes changed."""
    monkeypatch.setattr(s3d, "SIZE", 16)
    dice, broken = random.Random(0), 0
    for suffix in ("mp4", "mkv", "avi", "gif"):
        codec, pixels = ("gif", "rgb8") if suffix == "gif" else ("mpeg4", "yuv420p")
        frames = list(map(flat, range(20)))
        path = write_video(tmp_path / f"a.{suffix}", frames, codec=codec, pixels=pixels)
        whole = path.read_bytes()
        for _ in range(15):
            bad = bytearray(whole)
            for _ in range(dice.choice([1, 20])):
                bad[dice.randrange(len(bad))] = dice.randrange(256)
            path.write_bytes(bad)
            try:
                for _ in s3d.seconds(path):
                    pass
            except VideoError:
                broken += 1
    assert 5 < broken < 60


def test_memory_does_not_grow_with_the_length_of_a_video(av, tmp_path, monkeypatch):
    """Catches a video held whole, decoded (by how far the decoder runs ahead) or as arrays."""
    monkeypatch.setattr(s3d, "SIZE", 64)
    decoded, timed, peaks = [], s3d.timed, []

    def counted(frames, rate):
        for item in timed(frames, rate):
            decoded.append(item[1])
            yield item

    monkeypatch.setattr(s3d, "timed", counted)
    for n in (90, 900):
        path = write_video(tmp_path / f"{n}.mkv", (flat(i) for i in range(n)))
        tracemalloc.start()
        for k, _ in enumerate(s3d.seconds(path), 1):
            assert len(decoded) <= 30 * k + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert k == n // 30
        decoded.clear()
    assert peaks[1] - peaks[0] < 30 * 64 * 64 * 3  # one second's frames


# ---- the command


@pytest.fixture
def small(monkeypatch):
    """Frames of 32 x 32: the whole path in a hundredth of the time."""
    monkeypatch.setattr(s3d, "SIZE", 32)


@pytest.fixture
def clips(av, tmp_path) -> Path:
    """A folder of three videos, one of them a level down, and of other files."""
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    write_video(folder / "a.mkv", map(flat, range(75)))
    write_video(folder / "b.avi", map(flat, range(30)))
    write_video(folder / "more" / "-c.d.mkv", map(flat, range(40)))
    (folder / "captions.json").write_text("{}")
    (folder / "._a.mp4").write_text("left by another system")
    return folder


def rows(folder) -> dict[str, np.ndarray]:
    return {path.name[:-4]: np.load(path) for path in folder.glob("*.npy")}


def go(*argv) -> int:
    return s3d.main([str(x) for x in argv])


def test_a_folder_of_videos_becomes_a_folder_of_features(small, clips, tmp_path, capsys):
    """One row a second, float16, length 1, finite; random weights are said and written down."""
    out = tmp_path / "features"
    assert go(clips, "--random-weights", 3, "--out", out) == 0
    found = rows(out)
    assert {k: x.shape for k, x in found.items()} == {
        "a": (3, 512), "b": (1, 512), "-c.d": (2, 512)
    }  # fmt: skip
    for x in found.values():
        assert x.dtype == np.float16
        assert np.allclose(np.linalg.norm(x.astype(float), axis=1), 1, atol=2e-3)
    assert abs(found["a"][0] - found["a"][1]).max() > 1e-3  # two seconds, two rows
    text = capsys.readouterr().out
    assert "RANDOM WEIGHTS (seed 3)" in text and "[3/3]" in text and "left" in text
    assert json.loads((out / "s3d.json").read_text())["weights"] == "random, seed 3"
    assert sorted(p.name for p in out.iterdir()) == ["-c.d.npy", "a.npy", "b.npy", "s3d.json"]

    from data import FeatureStore

    assert len(FeatureStore(out)) == 3  # what training reads


def test_rows_are_the_networks_and_can_stay_raw(small, av, tmp_path):
    """Catches an axis, a colour or a scale lost between decoder and network."""
    torch.manual_seed(0)
    frames = (clips_of(3, 30, 32, 32) * 255).byte()  # already of the size it is resized to
    frames[2, :, 15:] = 0  # a video of 75 frames, the rest black
    pictures = frames.permute(0, 2, 3, 4, 1).reshape(90, 32, 32, 3).numpy()[:75]
    clip = write_video(tmp_path / "a.mkv", pictures)
    found = {}
    for kind in (["--no-normalize"], ["--batch", 1], ["--precision", "bf16"]):
        assert go(clip, "--random-weights", 3, "--out", tmp_path / kind[0], *kind) == 0
        found[kind[0]] = rows(tmp_path / kind[0])["a"].astype(float)
    model = S3D().eval()
    random_weights(model, 3)
    with torch.inference_mode():
        wanted = model(frames.float() / 255)
        swapped = model(frames.mT.float() / 255)
    raw, one, bf16 = found.values()
    largest = float(wanted.abs().max())
    assert abs(raw - wanted.numpy()).max() < 2e-3 * largest  # float16, and folded BatchNorms
    assert (swapped - wanted).abs().max() > 2e-2 * largest  # so that the line above can tell
    assert abs(one - F.normalize(wanted, dim=1).numpy()).max() < 1e-3
    assert 3e-4 < abs(bf16 - one).max() < 0.01 and (bf16 * one).sum(1).min() > 0.999


def test_a_second_run_does_only_what_is_left(small, clips, tmp_path, capsys):
    """Also the same bytes again, and no mixture of two networks' features in one folder."""
    out = tmp_path / "features"
    go(clips, "--random-weights", 0, "--out", out)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    (out / "b.npy").unlink()
    capsys.readouterr()
    assert go(clips, "--random-weights", 0, "--out", out) == 0
    assert "2 already there" in capsys.readouterr().out
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    assert before["b.npy"][0] == after["b.npy"][0]
    assert all(before[k] == after[k] for k in before if k != "b.npy")
    same = ["--random-weights", 0]
    for other in (
        ["--random-weights", 1],
        [*same, "--no-normalize"],
        [*same, "--precision", "bf16"],
    ):
        with pytest.raises(ValueError, match="give another --out"):
            go(clips, *other, "--out", out)


def test_a_broken_video_is_named_counted_and_survived(small, clips, tmp_path, capsys):
    """Exit code 1, the others done, nothing written for the broken one."""
    (clips / "aa.mp4").write_bytes(b"\0" * 999)
    assert go(clips, "--random-weights", 0, "--out", tmp_path / "out") == 1
    said = capsys.readouterr()
    assert "aa.mp4: cannot be decoded" in said.err and "1 broken" in said.out
    assert sorted(rows(tmp_path / "out")) == ["-c.d", "a", "b"]


def test_shards_share_the_work(small, clips, tmp_path):
    """Every video is in exactly one shard, into one folder."""
    out, seen = tmp_path / "out", []
    for shard in ("1/2", "2/2"):
        go(clips, "--random-weights", 0, "--out", out, "--shard", shard)
        seen.append(len(rows(out)))
    assert seen == [2, 3]
    for bad in ("0/2", "3/2", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(ValueError, match="wanted I/N"):
            go(clips, "--random-weights", 0, "--out", out, f"--shard={bad}")


def test_videos_that_would_overwrite_each_other_are_refused(av, clips, tmp_path):
    """Two files of one stem, ids that are no file names, and what is not there."""
    out = ["--random-weights", 0, "--out", tmp_path / "out"]
    (clips / "more" / "a.mp4").touch()
    with pytest.raises(ValueError, match=r"a.mkv and .*a.mp4 would both be a.npy"):
        go(clips, *out)
    (clips / "more" / "a.mp4").unlink()
    (clips / ".Trash").mkdir()
    (clips / ".Trash" / "a.mp4").touch()  # hidden: neither a video nor a twin
    assert list(s3d.find_videos([clips, clips / "b.avi", clips])) == ["-c.d", "a", "b"]
    long = clips / f"{'x' * 251}.mkv"
    long.touch()
    with pytest.raises(ValueError, match="a name of 251 bytes, wanted at most 250: rename"):
        go(long, *out)
    long.unlink()
    for name in (
        "._a.mp4",
        "..\\up.mp4",
        "new\nline.mp4",
        b"\xff.mp4".decode(errors="surrogateescape"),
    ):
        (clips / name).touch()
        with pytest.raises(ValueError, match="cannot be a video id"):
            go(clips / name, *out)
    with pytest.raises(ValueError, match="no such file or folder"):
        go(clips / "nothing.mp4", *out)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no videos there"):
        go(tmp_path / "none", *out)
    assert not (tmp_path / "out").exists()


def test_what_the_user_can_mend_is_one_line(clips, tmp_path):
    """The command itself, without weights of either kind: exit code 2 and one line."""
    done = subprocess.run(
        [sys.executable, REPO / "s3d.py", clips, "--out", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: give --weights s3d_howto100m.pth or")
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_are_refused(clips, tmp_path):
    """Both kinds of weights, a file, a batch, a device that are not there."""
    out = ["--out", tmp_path / "out"]
    for argv, message in (
        (["--weights", "w", "--random-weights", 0], "give --weights"),
        (["--weights", tmp_path / "no.pth"], "no.pth: cannot be read"),
        (["--random-weights", 0, "--batch", 0], "--batch is 0"),
        (["--random-weights", 0, "--device", "nowhere"], "--device nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            go(clips, *out, *argv)


def test_without_pyav_there_is_one_line_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs PyAV: pip install av"):
        go(tmp_path, "--random-weights", 0, "--out", tmp_path / "out")


def test_a_long_name_is_written_too(tmp_path):
    """The name that is written first may not be longer than the last one."""
    path = tmp_path / f"{'x' * 250}.npy"
    s3d.write_aside(path, lambda f: f.write(b"x"))
    assert [*tmp_path.iterdir()] == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    """Catches half a file, or a leftover beside it."""

    def cut(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s3d.write_aside(tmp_path / "a.npy", cut)
    assert not list(tmp_path.iterdir())


# ---- real videos


def test_real_clips_have_the_length_their_metadata_says(av, shared, monkeypatch):
    """All 15: rows against the container's seconds, pictures against the stream's frame count."""
    monkeypatch.setattr(s3d, "SIZE", 32)
    paths = sorted((shared / "msvd" / "clips").iterdir())
    assert len(paths) == 15
    for path in paths:
        frames = np.concatenate(list(s3d.seconds(path)))
        with av.open(str(path)) as file:
            stated, pictures = file.duration / 1e6, file.streams.video[0].frames
        assert -0.05 < len(frames) / 30 - stated < 1, path.name
        real = len(frames) - np.argmax(frames[::-1].any((1, 2, 3)))  # less the black at the end
        assert abs(real / 30 - stated) < 0.1, path.name
        changes = 1 + (frames[1:real] != frames[: real - 1]).any((1, 2, 3)).sum()
        assert changes <= pictures, path.name


@pytest.mark.parametrize("name", ["klteYv1Uv9A_27_33.avi", "778mkceE0UQ_40_46.gif"])
def test_real_pixels_are_those_of_ffmpegs_own_filters(av, shared, name):
    """The authors' chain, fps, scale, crop, rgb24, as filters: the same within a step of 255.

    Not to the bit: the filters crop before they turn to RGB, so colour at the edges differs.
    """
    path, theirs = shared / "msvd" / "clips" / name, []
    ours = next(s3d.seconds(path))
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        W, H = stream.width * 224 // stream.height, 224
        graph = av.filter.Graph()
        chain = [("fps", "30"), ("scale", f"{W}:{H}"), ("crop", f"224:224:{(W - 224) // 2}:0")]
        nodes = [graph.add(*x) for x in (*chain, ("format", "rgb24"), ("buffersink",))]
        graph.link_nodes(graph.add_buffer(template=stream), *nodes).configure()
        for frame in file.decode(stream):
            graph.push(frame)
            try:
                while True:
                    theirs.append(graph.pull().to_ndarray())
            except av.error.BlockingIOError:
                if len(theirs) >= 30:
                    break
    assert abs(ours.astype(int) - np.stack(theirs[:30])).mean() < 0.5
