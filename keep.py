"""What is kept of a run, and how it is kept whole: checkpoints, the log, the lock, signals.

Also what a command does with its memory, and how it ends.

    python tests/kill.py --kills 6      kills runs in two minutes, and compares with whole ones

trainer.pt holds what resuming needs beside the model, log.jsonl what was printed, `lock` who writes
them. A checkpoint is moved into place when it is whole and the log gets whole lines, so that a kill
at any moment costs the steps since the last checkpoint and nothing else.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import time
import typing
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import DataError, shown
from weights import first_line, refuse_programs, write_aside

# ---------------------------------------------------------------------------------------------
# Signals, and two runs in one directory


class Stopped(BaseException):
    """A signal came when the training was done and saved, and nothing else has to be finished.

    No Exception: it comes anywhere, also where a reader takes any for a damaged file.
    """


class Stop:
    """Remember SIGTERM or SIGINT until the step is done.

    torchrun hands on what the terminal may have sent too: all that comes within SAME seconds is one
    signal. A later one ends the process where it is, by KeyboardInterrupt.
    """

    SAME = 10.0

    def __init__(self, speak: bool):
        self.speak, self.pid = speak, os.getpid()  # speak: say on stderr when one comes
        self.asked = self.at_once = False

    def watch(self) -> None:
        """Take over both signals."""
        names = (signal.SIGTERM, signal.SIGINT)
        self.before = {name: signal.signal(name, self) for name in names}

    def unwatch(self) -> None:
        """Give the signals back."""
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def __call__(self, *_) -> None:
        now = time.monotonic()
        if os.getpid() != self.pid:  # a loader process: its parent ends it
            return
        if self.asked:
            if now - self.since > self.SAME:
                raise KeyboardInterrupt
            return
        self.asked, self.since = True, now
        if self.speak:  # print could meet itself here
            again = f"; again after {self.SAME:.0f} s ends it at once"
            os.write(2, f"stopping at the end of the step{again}\n".encode())
        if self.at_once:
            raise Stopped

    @contextlib.contextmanager
    def soon(self):
        """Raise Stopped as soon as a signal comes, or if one has: no rank may wait for another."""
        if self.asked:
            raise Stopped
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False


@contextlib.contextmanager
def deaf_children():
    """Let processes started in here leave signals to their parent, which still wants their work.

    They inherit what is blocked; to ignore signals once they run would come too late for some.
    """
    block = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    names = {signal.SIGTERM, signal.SIGINT}
    block(getattr(signal, "SIG_BLOCK", 0), names)
    try:
        yield
    finally:
        block(getattr(signal, "SIG_UNBLOCK", 0), names)


def ignore_signals() -> None:
    """Ignore them from now on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def hold(out: Path) -> typing.IO | None:
    """Lock a run directory until the returned file is closed or this process ends, however it ends.

    A POSIX lock belongs to one process: the loader processes that a killed run leaves for a moment
    do not hold it. Where there are no locks, that is said. Raises: ValueError if another has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        print(f"no locks here: another run in {out} would not be noticed")
        return None
    file = open(out / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        who = file.read() or "another process"
        raise ValueError(f"{out} is in use by {who}: let it end, or choose another --out") from None
    except OSError as error:  # a file system without them
        print(f"no locks here ({error}): another run in {out} would not be noticed")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


# ---------------------------------------------------------------------------------------------
# The log


class Log:
    """Print a line and write the same as a dict to log.jsonl, on rank 0."""

    def __init__(self, path: Path, start: int, ranks):
        self.ranks = ranks
        if ranks.rank == 0:
            old = read_log(path) if start else []
            kept = [row for row in old if row.get("step", start + 1) <= start]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            write_aside(path, lambda f: f.write_text(text))
            self.file = open(path, "a", buffering=1)

    def __call__(self, row: dict, line: str | None = None) -> None:
        if self.ranks.rank == 0:
            append(self.file, row)
        if line:
            self.ranks.say(line)


def append(file: typing.IO, row: dict) -> None:
    """Write a row as a line; OSError with the file's name and what to do."""
    try:
        file.write(json.dumps(row) + "\n")
        file.flush()
    except OSError as error:
        raise OSError(f"{file.name}: could not be written: {error.strerror}: make room, then "
                      "--resume goes on from the last checkpoint") from None  # fmt: skip


def read_log(path: Path) -> list[dict]:
    """Read the rows of a log.jsonl, if it is there; half a last line is what a full disk leaves.

    Raises: DataError where another line is damaged.
    """
    lines, rows = path.read_text().splitlines() if path.exists() else [], []
    for n, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if n < len(lines):
                raise DataError(f"{path}, line {n}: {shown(line)}, wanted JSON") from None
            print(f"{path}: its last line is cut short and left out")
    return rows


# ---------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    seconds: float = 0.0  # of training
    skipped: int = 0  # steps whose gradient was not finite, or whose data could not be read


@dataclass
class Checkpoint:
    """trainer.pt: what resuming needs beside the model's config and tokenizer, moved in whole."""

    path: Path
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: object  # a dataclass: the settings
    facts: dict[str, object]  # what all ranks must hold alike and a resumed run should
    save: Callable[[], None]  # writes the model beside it
    ranks: object  # ranks.Ranks

    # From one to the next, at least, where config.save_every is not given: all ranks wait for one,
    # and at eight GPUs' rate 500 steps take 21 seconds.
    STEPS, SECONDS = 500, 300

    def resume(self) -> Progress:
        """Fill model, optimizer and scaler from it, if it is there; say what is not as it was.

        Raises: ValueError where it does not fit them, or where ranks differ.
        """
        state, self.reached = None, Progress()
        if self.path.exists():
            state = read_checkpoint(self.path)
            self.reached = self.fill(state)
        self.ranks.agree(self.facts | {"its checkpoint at step": self.reached.step})
        if state:
            said = [*differences(state, self.facts), f"resumed at step {self.reached.step}"]
            self.ranks.say("\n".join(said))
        self.begun = self.written = time.monotonic()
        self.before = self.reached.seconds
        return self.reached

    def count_seconds(self) -> None:
        """Bring the seconds of training in `reached` up to now."""
        self.reached.seconds = self.before + time.monotonic() - self.begun

    def due(self, step: int) -> bool:
        """Say whether it is to be written; all ranks ask at the same steps, rank 0's clock answers.

        Args: step: the one just done.
        """
        if step % (self.config.save_every or self.STEPS):
            return False
        waited = time.monotonic() - self.written
        return bool(self.config.save_every) or self.ranks.share(waited >= self.SECONDS)

    def write(self) -> None:
        """Write it on rank 0, all ranks waiting; OSError on all, naming the one still there."""
        self.ranks.first(self.write_here)

    def write_here(self) -> None:
        """Write it, after the model beside it; OSError naming the one still there."""
        self.count_seconds()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scaler": self.scaler.state_dict(), **dataclasses.asdict(self.reached)}
        state |= {"config": dataclasses.asdict(self.config), "facts": self.facts}

        def write(aside: Path) -> None:
            with open(aside, "wb") as f:  # torch.save to a path would not say that the disk is full
                torch.save(state, f)

        try:
            self.save()  # first: what trainer.pt resumes needs config.json and tokenizer.json
            write_aside(self.path, write)
        except OSError as error:
            last = last_checkpoint(self.path.parent)
            raise OSError(f"{error}; the last checkpoint is {last}") from None
        self.written = time.monotonic()

    def fill(self, state: dict) -> Progress:
        """Take over what `read_checkpoint` read; ValueError if it is another model's."""
        try:
            self.model.load_state_dict(state["model"])
            saved = in_groups(state["optimizer"], self.optimizer, self.model)
            self.optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{self.path} does not fit config.json beside it: {said}") from None
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return Progress(state["step"], state["seconds"], state.get("skipped", 0))


def in_groups(saved: dict, optimizer, model) -> dict:
    """Sort an older run's state, of one group of all parameters, into the optimizer's groups."""
    groups = optimizer.state_dict()["param_groups"]
    if len(saved["param_groups"]) == len(groups):
        return saved
    was = {p: i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    order = [was[p] for group in optimizer.param_groups for p in group["params"]]
    state = {n: saved["state"][i] for n, i in enumerate(order) if i in saved["state"]}
    (one,) = saved["param_groups"]
    return {"state": state, "param_groups": [one | {"params": g["params"]} for g in groups]}


def differences(state: dict, facts: dict) -> list[str]:
    """Say what is not as it was when the checkpoint was written, a line for each."""
    was = {"torch": state.get("torch")} | state.get("facts", {})  # the oldest had torch alone
    return [
        f"{name}: {facts[name]} now, {was[name]} when the checkpoint was written"
        for name in facts
        if name in was and was[name] != facts[name]
    ]


def read_checkpoint(path: Path, mmap: bool = False) -> dict:
    """Read trainer.pt without running anything in it; ValueError if it is not one, or not whole.

    mmap: leave the tensors on disk, for whoever wants the settings.
    """
    try:
        refuse_programs(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise ValueError(f"{path}: no checkpoint to resume from, the run was not begun") from None
    except Exception as error:  # torch's reader fails in a dozen ways on a damaged file
        raise ValueError(f"{path}: not a whole checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or {"model", "optimizer", "step", "config"} - set(state):
        raise ValueError(f"{path}: not a checkpoint of train.py")
    return state


def last_checkpoint(out: Path) -> str:
    """Name the last checkpoint of a run and its step."""
    path = out / "trainer.pt"
    return f"{path}, step {read_checkpoint(path)['step']}" if path.exists() else "none yet"


def fingerprint(names: list[str]) -> str:
    """Make a short name of a list of names, to tell whether two lists are the same.

    >>> fingerprint(["a", "b"])
    '2 (ef0790fb)'
    """
    return f"{len(names)} ({zlib.crc32(chr(10).join(names).encode()):08x})"


# ---------------------------------------------------------------------------------------------
# A command: its memory, its end


def hold_pages() -> None:
    """Let freed memory stay with the process, under glibc; elsewhere nothing changes.

    By default each tensor of 32 MiB and more goes back to the system when it is freed, and the next
    one of that size is zeroed page by page again: a quarter of a small model's step beside a large
    vocabulary. The price is a fifth more memory (`python bench.py step`), which wide models do
    not earn back, for their products take nearly all the time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # of malloc.h
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never


def cores() -> int:
    """Count the cores that this process may use."""
    here = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    return len(here(0)) if here else os.cpu_count() or 1


def can_write(path: str | Path | None, flag: str) -> None:
    """Refuse a file that could not be written after the work: ValueError naming its flag, now."""
    if path is None:
        return
    path, folder = Path(path), Path(path).parent
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, wanted a file")
    if not folder.is_dir():
        raise ValueError(f"{flag} {path}: there is no folder {folder}: make it first")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: choose another place")


def write_json(path: str | Path | None, data: object, indent: int | None = 1) -> None:
    """Write what --json or --predictions asks for, if it does."""
    if path:
        Path(path).write_text(json.dumps(data, indent=indent) + "\n", encoding="utf-8")


def leave(code: int | None) -> typing.NoReturn:
    """End this process. One of several ranks ends at once: all is written, and Python's own end,
    while PyTorch's threads still hold the group, has been seen to abort a rank that was done."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = code or 1
        os._exit(code or 0)
    sys.exit(code)


def run(main: Callable[[], int | None]) -> typing.NoReturn:
    """Call a file's main; what the user can mend is one line on stderr and exit code 2."""
    try:
        leave(main())
    except BrokenPipeError:  # whoever reads our output, as head does, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may exit write there
        leave(1)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # what all ranks meet rank 0 says, and torchrun then ends the others
        print(f"error: {error}", file=sys.stderr)
        leave(2)
