"""What a run promises: nothing lost by a kill, a full disk, bad numbers or another rank."""

import ctypes
import errno
import functools
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import features
import finetune
import keep
import loop
import train
from benchmarks import DataError, read_msrvtt
from features import FeatureStore
from keep import Stop, Stopped, read_checkpoint, read_log
from loop import launch
from ranks import Ranks, of_rank, start_ranks
from tests import kill
from tests.runs import (
    REPO,
    RESUME,
    TINY,
    command,
    config,
    flags,
    on_two_ranks,
    poison,
    start,
    tuning,
    until,
)
from train import TrainConfig, main
from vlm import load_tokenizer
from weights import write_aside

# ---- killed


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not():
    """`python tests/kill.py`, in short: at any moment, writing a checkpoint, one of two ranks."""
    assert kill.main(["--kills", "4", "--seed", "1"]) == 0


def test_a_run_that_died_before_its_first_checkpoint_is_begun_again(small_toy, whole, tmp_path):
    """Its lock and its empty log are no other run; anything else in the folder is."""
    out = tmp_path / "run"
    out.mkdir()
    for name in ("lock", "log.jsonl", "trainer.pt.partial"):
        (out / name).touch()
    main(config(small_toy, out))
    assert not kill.differ(whole, out)
    for name in ("trainer.pt", "log.jsonl"):  # as a kill between model and trainer.pt leaves it
        (out / name).unlink()
    (out / "log.jsonl").touch()
    main(config(small_toy, out))
    assert not kill.differ(whole, out)
    for name in ("model.safetensors", "notes.txt"):
        other = tmp_path / name
        other.mkdir()
        (other / "lock").touch()
        (other / name).touch()
        with pytest.raises(ValueError, match="is not empty: add --resume to go on"):
            main(config(small_toy, other))


@pytest.mark.parametrize("every, apart, writes", [(3, 1e9, 3), (None, 0, 4), (None, 1e9, 2)])
def test_checkpoints_are_as_far_apart_as_asked(
    small_toy, tmp_path, monkeypatch, every, apart, writes
):
    """Before the first of six steps and after the last; between them by steps alone, if they are
    given, else by steps and seconds."""
    written, write = [], keep.Checkpoint.write
    monkeypatch.setattr(keep.Checkpoint, "write", lambda *a: written.append(1) or write(*a))
    monkeypatch.setattr(keep.Checkpoint, "STEPS", 2)
    monkeypatch.setattr(keep.Checkpoint, "SECONDS", apart)
    main(config(small_toy, tmp_path / "run", save_every=every))
    assert len(written) == writes


def test_half_a_line_in_the_log_is_said_and_left_out(small_toy, whole, tmp_path, capsys):
    """What a full disk leaves must not keep the run from going on."""
    out = shutil.copytree(whole, tmp_path / "run")
    lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20]]))
    main(TrainConfig(out=str(out), resume=True), RESUME)
    assert "its last line is cut short and left out" in capsys.readouterr().out
    assert not kill.differ(whole, out)


# ---- signals


def test_signals_to_a_whole_group_save_and_exit_0(small_toy, tmp_path):
    """As torchrun and a terminal send them: to the loader processes too, and again and again.

    Catches a run that loses its loaders to the signal, or that a later one ends on its way out.
    """
    args = flags(data=small_toy, out=tmp_path / "run", **TINY | {"steps": 50000})
    process = start(*args, "--workers", "2")
    until(process, "step ")
    os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + 0.8 * Stop.SAME
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    err = re.sub(r"\S*dataloader.py:\d+: UserWarning: .*\n  .*\n", "", err)  # on one core
    assert err.count("\n") == 1 and "stopping at the end of the step" in err
    said = re.search(r"stopped at step (\d+); to go on: torchrun train.py --resume --out (.*)", out)
    assert read_checkpoint(tmp_path / "run" / "trainer.pt")["step"] == int(said[1])
    assert said[2] == str(tmp_path / "run")


def test_a_signal_before_the_first_step_saves_too(small_toy, tmp_path, monkeypatch, capsys):
    """While the data is being opened: one step, a checkpoint, the line that goes on."""
    build = train.build

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args)

    monkeypatch.setattr(train, "build", interrupted)
    summary = main(config(small_toy, tmp_path / "run"))
    assert summary == {"final": False, "steps": 1}
    assert read_checkpoint(tmp_path / "run" / "trainer.pt")["step"] == 1
    assert "stopped at step 1; to go on: torchrun train.py --resume" in capsys.readouterr().out


def test_a_second_signal_counts_only_after_a_while(monkeypatch, capfd):
    """torchrun repeats what the terminal sent; a user who has waited must get out all the same."""
    stop = Stop(speak=True)
    stop(signal.SIGINT)
    stop(signal.SIGTERM)
    assert stop.asked and capfd.readouterr().err.count("stopping") == 1
    stop.since -= Stop.SAME + 1
    with pytest.raises(KeyboardInterrupt):
        stop(signal.SIGINT)

    def aborted(*_):
        raise KeyboardInterrupt

    assert launch(aborted, TrainConfig, "", []) == 130
    assert capfd.readouterr().err == (
        "error: ended at once; --resume goes on from the last checkpoint\n"
    )
    stop = Stop(speak=False)
    with pytest.raises(Stopped), stop.soon():
        stop(signal.SIGTERM)
    with pytest.raises(Stopped), stop.soon():
        raise AssertionError("a signal that came before is known")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_two_ranks_under_torchrun_stop_once_and_go_on(small_toy, tmp_path, name):
    """The signal goes to torchrun, which hands it on to the groups of both ranks."""
    out = tmp_path / "run"
    args = flags(data=small_toy, out=out, **TINY | {"steps": 50000, "workers": 1})
    process = start(*args, ranks=2)
    until(process, "step ")
    process.send_signal(signal.Signals[name])
    said, err = process.communicate(timeout=90)
    found = re.findall(
        r"stopped at step (\d+); to go on: torchrun --nproc_per_node=2 train.py --resume", said
    )
    assert len(found) == 1, (said, err)
    step = int(found[0])
    assert read_checkpoint(out / "trainer.pt")["step"] == step
    more = command("--resume", "--out", str(out), "--steps", str(step + 2), ranks=2)
    assert subprocess.run(more, capture_output=True).returncode == 0
    assert read_log(out / "log.jsonl")[-1]["steps"] == step + 2


def test_a_signal_is_no_damage_of_the_file_that_is_being_read(small_toy, tmp_path, monkeypatch):
    """Readers take any Exception of numpy, zipfile or Rust for a damaged file; Stopped is none."""

    def stop(*_, **__):
        raise Stopped

    store = FeatureStore(small_toy / "features")
    monkeypatch.setattr(features, "open_array", stop)
    with pytest.raises(Stopped):
        store.open("how_train_0001")
    monkeypatch.setattr("weights.Tokenizer", SimpleNamespace(from_str=stop))
    with pytest.raises(Stopped):
        load_tokenizer(small_toy)


# ---- the disk


def broken(how: str):
    """Make a writer that gets to half of its file, as each of the libraries fails."""

    def write(aside: Path) -> None:
        aside.write_bytes(b"half")
        full = OSError(errno.ENOSPC, "No space left on device")
        if how == "torch":
            try:
                raise full
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc:672]")  # noqa: B904
        raise SafetensorError("I/O error: No space left on device") if how == "safe" else full

    return write


@pytest.mark.parametrize("how", ["torch", "safe", "python"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, how):
    """File, reason, room; nothing half beside it."""
    path = tmp_path / "trainer.pt"
    path.write_text("old")
    wanted = r"trainer.pt: could not be written: .*No space left on device.*MiB free there"
    with pytest.raises(OSError, match=wanted):
        write_aside(path, broken(how))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["trainer.pt"]


def test_a_disk_that_fills_up_stops_the_run_and_leaves_its_last_checkpoint(
    small_toy, whole, tmp_path
):
    """A real limit on file size, which the second checkpoint (with Adam's state) meets midway."""
    limit = (whole / "trainer.pt").stat().st_size * 2 // 3
    out = tmp_path / "run"

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    made = command(*flags(data=small_toy, out=out, **TINY))
    done = subprocess.run(made, capture_output=True, text=True, preexec_fn=small)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    wanted = r"error: .*run/trainer.pt: could not be written: File too large .*MiB free"
    assert re.match(wanted, done.stderr), done.stderr
    assert f"the last checkpoint is {out}/trainer.pt, step 0" in done.stderr
    assert not list(out.glob("*.partial"))
    main(TrainConfig(out=str(out), resume=True), RESUME)
    assert not kill.differ(whole, out)


def test_a_full_disk_under_the_log_is_named(tmp_path):
    """/dev/full takes a file open for writing and refuses every byte."""
    log = keep.Log(tmp_path / "log.jsonl", 0, Ranks())
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(OSError, match="/dev/full: could not be written: No space left on device"):
        log({"step": 1})
    log.file = io.StringIO()  # what is left in the other's buffer is lost, as it should be


def test_a_place_that_cannot_be_written_is_named_before_any_step(small_toy, tmp_path):
    """A file where a folder is wanted; a file system that takes nothing."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--out .*file/run cannot be written: Not a directory"):
        main(config(small_toy, tmp_path / "file" / "run"))
    with pytest.raises(OSError, match="--out /proc/run cannot be written: No such file"):
        main(config(small_toy, Path("/proc/run")))
    if os.geteuid():  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(OSError, match="--out .*locked/run cannot be written: Permission"):
            main(config(small_toy, tmp_path / "locked" / "run"))


# ---- memory


FAULTS = """
import resource, torch, keep
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults()
keep.hold_pages()
faults()  # from now on there is room
print(given_back, faults())
"""


def test_where_there_is_no_glibc_nothing_is_held(monkeypatch):
    """Catches every small model's training that ends in ctypes' TypeError on Windows."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: "/" in name)
    keep.hold_pages()


@pytest.mark.skipif(sys.platform != "linux", reason="not glibc's malloc")
def test_a_tensor_finds_the_pages_of_the_one_before_it():
    """Catches large tensors that go back to the system: 16,384 page faults for each new one."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=REPO, capture_output=True, text=True)
    given_back, held = map(int, done.stdout.split())
    if given_back < 8 * 1000:
        pytest.skip(f"huge pages: {given_back} faults for 8 tensors of 64 MiB anyway")
    assert held < 500, (given_back, held)


@pytest.mark.parametrize("width, calls", [(32, 1), (512, 0)])
def test_narrow_models_keep_what_they_free(small_toy, tmp_path, monkeypatch, width, calls):
    """Catches a loop that no longer asks for it, or asks for it where it costs memory only."""
    asked = []
    monkeypatch.setattr(loop, "hold_pages", lambda: asked.append(1))
    main(config(small_toy, tmp_path / "run", width=width, steps=1))
    assert len(asked) == calls


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_ends_does_so_before_anything_can_abort_it(monkeypatch, capsys, world):
    """Catches one whose end torchrun reports as an abort, -6; alone nothing is held."""

    class Ended(Exception):
        pass

    def end(code):
        raise Ended(code)

    def fails():
        raise ValueError("no such file")

    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(os, "_exit", end)
    for do, code in ((lambda: 0, 0), (fails, 2)):
        with pytest.raises((Ended, SystemExit)) as how:
            keep.run(do)
        assert how.type is (Ended if world > 1 else SystemExit) and how.value.args == (code,)
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("code", [0, 1])
def test_a_rank_that_ends_loses_no_line_that_it_wrote(code):
    """Into a pipe, which Python fills before it writes."""
    me = [sys.executable, "-c", f"import keep; print('done'); keep.run(lambda: {code})"]
    env = os.environ | {"WORLD_SIZE": "2", "PYTHONUNBUFFERED": ""}  # empty: it is buffered
    done = subprocess.run(me, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == code and done.stdout == "done\n", done.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """On every rank, before any waits for another."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node is 2, and there are 1 GPUs"):
        start_ranks()


def test_a_gpu_without_room_is_said_in_one_line(capsys):
    """With what to do about it; PyTorch's error is a RuntimeError, which launch would pass on."""

    def fill(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    assert launch(fill, TrainConfig, "", []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: CUDA out of memory. Tried to allocate 2.00 GiB. Lower --batch")
    assert said.count("\n") == 1


# ---- two runs in one directory


def test_a_directory_in_use_is_refused_and_a_killed_run_gives_it_back(small_toy, tmp_path):
    """Both as a new run and with --resume; loader processes that outlive a kill hold nothing."""
    out = tmp_path / "run"
    process = start(*flags(data=small_toy, out=out, **TINY | {"steps": 50000, "workers": 1}))
    until(process, "step ")
    wanted = rf"{out} is in use by process {process.pid} on .*: let it end, or choose another --out"
    with pytest.raises(ValueError, match=wanted):
        main(config(small_toy, out))
    with pytest.raises(ValueError, match=wanted):
        main(TrainConfig(out=str(out), resume=True), RESUME)
    process.kill()
    process.wait()
    step = read_checkpoint(out / "trainer.pt")["step"]
    again = TrainConfig(out=str(out), resume=True, steps=step + 1)
    assert main(again, RESUME | {"steps"})["final"]


def test_two_runs_that_start_at_once_take_two_directories(tmp_path, monkeypatch):
    """The name is taken by making the folder, not by looking first."""
    monkeypatch.chdir(tmp_path)
    assert [str(train.new_directory("a")) for _ in range(3)] == ["runs/a", "runs/a-2", "runs/a-3"]


# ---- one rank fails


WRAPPED = """
import os, sys
sys.path.insert(0, {repo!r})
from benchmarks import DataError
from train import Corpus, cli, run
if os.environ["RANK"] == "1":
    step = Corpus.step
    def fail(self, n, *args):
        if n == 3:
            {what}
        return step(self, n, *args)
    Corpus.step = fail
run(cli)
"""


FAILS = {  # what rank 1 does, and what must be said
    "raise ZeroDivisionError('a bug')": ("ZeroDivisionError: a bug", "rank      : 1"),
    "raise DataError('x.npy: bad')": ("error: on rank 1: x.npy: bad",),
    "os._exit(7)": ("exitcode  : 7", "rank      : 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", FAILS)
def test_when_one_rank_fails_the_others_end_within_a_minute(small_toy, tmp_path, what):
    """An exception, a bad file, a sudden death (SIGKILL: kill.py): named, not 0, no hang."""
    script = tmp_path / "wrapped.py"
    script.write_text(WRAPPED.format(repo=str(REPO), what=what))
    args = flags(data=small_toy, out=tmp_path / "run", **TINY)
    process = start(*args, ranks=2, script=script)
    until(process, "step 2")
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and all(said in err for said in FAILS[what]), err
    assert err.count("Traceback (most recent call last)") <= 2  # the bug's and torchrun's own


LATE = """
import os, sys, time
sys.path.insert(0, {repo!r})
import loop
from train import run, cli
if os.environ["RANK"] == "1":
    log = loop.Log
    loop.Log = lambda *args: time.sleep(2) or log(*args)
run(cli)
"""


@pytest.mark.slow
def test_a_rank_that_comes_late_to_the_first_checkpoint_still_takes_part(small_toy, tmp_path):
    """Catches ranks that look for trainer.pt to know whether the run is new: the late one finds
    rank 0's, leaves out what all must do together, and both hang or fail."""
    script = tmp_path / "late.py"
    script.write_text(LATE.format(repo=str(REPO)))
    process = start(*flags(data=small_toy, out=tmp_path / "run", **TINY), ranks=2, script=script)
    try:
        said, err = process.communicate(timeout=60)
    finally:
        process.terminate()  # torchrun then ends both ranks
    assert process.returncode == 0 and "step 6/6" in said, err


@pytest.fixture(scope="module")
def two(small_toy, tmp_path_factory) -> dict:
    """What two ranks did in tests/two_ranks.py: one start for all tests below."""
    path = tmp_path_factory.mktemp("two") / "found.json"
    on_two_ranks(str(small_toy), "safety", str(path))
    return json.loads(path.read_text())


@pytest.mark.slow
def test_ranks_learn_of_each_others_errors(two):
    """Both end by the same error; the other rank's says whose it is."""
    assert two["every"] == ["on rank 1: b.json: bad", "b.json: bad"]
    assert two["first"] == ["disk full", "on rank 0: disk full"]
    assert two["unread"] == ["on rank 1: x.npy: bad"] * 2


@pytest.mark.slow
def test_ranks_with_other_commands_are_refused(two):
    """Catches a node that was started with other flags: rank 0's would silently be taken."""
    wanted = "rank 1 has --lr 2.0, rank 0 1.0: start all ranks by the same command"
    assert all(said.startswith(wanted) for said in two["agree"]), two


@pytest.mark.slow
def test_all_ranks_skip_a_step_that_is_bad_on_one(two):
    """One rank's poisoned batch, one rank's unreadable file: the weights stay alike and finite."""
    assert two["skipped"] == [2, 2]
    assert two["weights"][0] == two["weights"][1]
    assert all(math.isfinite(x) for x in two["weights"])


def test_a_rank_that_loses_another_says_so_in_one_line(monkeypatch, capsys):
    """Where no torchrun ends it first: not gloo's traceback. Other errors keep theirs."""

    def lose(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:554] Connection closed by peer [::1]:7")

    monkeypatch.setattr(loop.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(loop.time, "sleep", lambda seconds: None)
    assert launch(lose, TrainConfig, "", []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: rank 0 lost another rank ([gloo") and said.count("\n") == 1

    def bug(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        launch(bug, TrainConfig, "", [])


def test_a_damaged_log_is_named_on_every_rank(tmp_path):
    """An error that wants more than a text must not become another one on its way to the ranks."""
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nno json\n{"step": 2}\n')
    with pytest.raises(DataError, match="log.jsonl, line 2: 'no json', wanted JSON"):
        read_log(tmp_path / "log.jsonl")
    for error, kind in ((json.JSONDecodeError("x", "y", 0), ValueError), (OSError("x"), OSError),
                        (DataError("x"), DataError)):  # fmt: skip
        assert type(of_rank(3, error)) is kind and "on rank 3: x" in str(of_rank(3, error))


# ---- numbers go bad


def test_skipped_steps_are_counted_in_the_summary_across_a_resume(
    small_toy, tmp_path, monkeypatch, capsys
):
    """Two before the stop, one after: three."""
    poison(monkeypatch, {1, 2, 5})
    main(config(small_toy, tmp_path / "run", steps=4, decay_steps=6))
    again = TrainConfig(out=str(tmp_path / "run"), resume=True, steps=6)
    assert main(again, RESUME | {"steps"})["skipped"] == 3
    skipped = [row["skipped"] for row in read_log(tmp_path / "run" / "log.jsonl")[:-1]]
    assert skipped == [0, 1, 2, 2, 2, 3]
    assert "3 steps skipped; the model is in" in capsys.readouterr().out


def test_fine_tuning_skips_and_counts_too(small_toy, whole, tmp_path, monkeypatch):
    poison(monkeypatch, {1})
    summary = finetune.main(tuning(small_toy, tmp_path / "run", whole))
    state = read_checkpoint(tmp_path / "run" / "trainer.pt")
    assert summary["skipped"] == 1 and all(x.isfinite().all() for x in state["model"].values())


def test_features_that_are_not_numbers_stop_a_run_or_are_skipped_and_counted(
    small_toy, tmp_path, monkeypatch, capsys
):
    """By default the file is named and the run ends; --skip-bad draws other clips instead, as many
    on one rank as on two, and skips a step only where no video is left."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    for n, value in ((1, np.nan), (2, np.inf)):
        path = world / "features" / f"how_train_{n:04}.npy"
        features = np.load(path)
        features[3:] = value
        np.save(path, features)
    few = functools.partial(train.set_means, clips=64)
    monkeypatch.setattr(train, "set_means", few)
    long = dict(steps=16, accumulate=2)
    with pytest.raises(ValueError, match=r"how_train_000[12]: features hold NaN or infinity"):
        main(config(world, tmp_path / "stops", **long))
    summary = main(config(world, tmp_path / "run", skip_bad=True, **long))
    said = capsys.readouterr().out
    assert summary["skipped"] == 0
    bad = re.findall("other clips are drawn instead: .*(how_train_000[12]): features", said)
    assert sorted(bad) == ["how_train_0001", "how_train_0002"]  # each once, whatever second it is
    state = read_checkpoint(tmp_path / "run" / "trainer.pt")
    assert all(x.isfinite().all() for x in state["model"].values())
    cfg = config(world, tmp_path, skip_bad=True, clips_per_video=8)
    corpus = train.build(cfg, print)[2].train
    for step in range(4):
        whole = corpus.step(step, 64)
        parts = [corpus.step(step, 64, part, 4) for part in range(4)]
        assert len(whole.video) == 64 and whole.video.isfinite().all()
        rows = torch.cat([x.text[:, :8] for x in parts])  # of the shortest, 8 pieces and [SEP]
        assert torch.equal(whole.text[:, :8], rows)
    for path in (world / "features").glob("how_train_*"):
        np.save(path, np.full((90, 64), np.nan, np.float32))
    with pytest.raises(ValueError, match="ten steps in a row .* none of 30 videos"):
        main(config(world, tmp_path / "none", skip_bad=True, **long))


def test_a_step_without_any_clip_that_can_be_read_is_skipped_and_the_run_goes_on(
    small_toy, tmp_path, monkeypatch, capsys
):
    """What one rank could not read: no update, counted and said, and the next step is like any."""
    read = loop.Steps.__getitem__
    bad = DataError("x.npy: cut")
    monkeypatch.setattr(loop.Steps, "__getitem__", lambda self, i: bad if i == 2 else read(self, i))
    summary = main(config(small_toy, tmp_path / "run", skip_bad=True))
    assert summary["final"] and summary["skipped"] == 1
    assert "a step is skipped: x.npy: cut" in capsys.readouterr().out
    state = read_checkpoint(tmp_path / "run" / "trainer.pt")
    steps = {int(x["step"]) for x in state["optimizer"]["state"].values()}
    assert state["step"] == 6 and steps == {5}


def test_a_disk_that_is_gone_is_noticed_at_once_however_many_videos_there_are(small_toy, tmp_path):
    """Catches a search through a million videos, each with more random numbers than the last."""
    cfg = config(small_toy, tmp_path, skip_bad=True, clips_per_video=8)
    corpus = train.build(cfg, print)[2].train
    corpus.ids = corpus.ids * 1000
    tried = []

    def gone(video):
        tried.append(video)
        raise DataError(f"{video}: gone")

    corpus.features.open = gone
    with pytest.raises(DataError, match="none of 100 videos, one after the other, can be read"):
        corpus.step(0, 64)
    assert len(tried) < 200


def test_skip_bad_leaves_out_items_that_cannot_be_trained_on(small_toy, whole, tmp_path, capsys):
    """Catches a run of one step an epoch in which a single bad video spoils every step."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    clips = read_msrvtt(world / "msrvtt")["train"]
    path = world / "features" / f"{clips[0].video}.npy"
    features = np.load(path)
    features[-1] = np.nan
    np.save(path, features)
    cfg = dict(task="retrieval", held_out=0, batch=1000)
    with pytest.raises(DataError, match="features hold NaN"):
        finetune.main(tuning(world, tmp_path / "stops", whole, **cfg))
    assert finetune.main(tuning(world, tmp_path / "run", whole, skip_bad=True, **cfg))["final"]
    n = len({clip.video for clip in clips})
    assert f"1 of {n} items to train on are left out, for 1 videos" in capsys.readouterr().out


def test_skip_bad_finds_faults_of_held_out_and_test_videos_before_training(
    small_toy, tmp_path, capsys
):
    """Catches a run that trains to its end and dies, its summary lost, in the evaluation."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    clips = read_msrvtt(world / "msrvtt")["test"]
    for video in ("how_val_0000", clips[0].video):
        np.save(world / "features" / f"{video}.npy", np.full((90, 64), np.nan, np.float32))
    summary = main(config(world, tmp_path / "run", skip_bad=True))
    said = capsys.readouterr().out
    assert "2 bad rows left out, first: " in said and "how_val_0000: features hold NaN" in said
    assert summary["val"] and f"{len(clips) - 1} MSR-VTT test clips" in said
    with pytest.raises(DataError, match="how_val_0000"):  # by default it stops, and goes on with it
        main(config(world, tmp_path / "late"))
    assert "final" not in read_log(tmp_path / "late" / "log.jsonl")[-1]
    again = dict(resume=True, skip_bad=True, data=str(world), out=str(tmp_path / "late"))
    assert main(TrainConfig(**again), set(again))["final"]


def test_an_overflow_in_fp16_is_skipped_and_the_scaler_recovers(small_toy, tmp_path, monkeypatch):
    """From a scale that no gradient survives: halved at each skip until one does."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda *a, init_scale, **k: scaler(*a, init_scale=2.0**15, **k)
    )
    main(config(small_toy, tmp_path / "run", precision="fp16", steps=12))
    log = read_log(tmp_path / "run" / "log.jsonl")[:-1]
    skipped = log[-1]["skipped"]
    assert 0 < skipped < 10 and log[-1]["loss"] is not None
    state = read_checkpoint(tmp_path / "run" / "trainer.pt")
    assert state["scaler"]["scale"] == 2.0 ** (15 - skipped)
    assert all(x.isfinite().all() for x in state["model"].values())
