"""Kill train.py and finetune.py at random moments, go on, and compare with runs nobody killed.

    python tests/kill.py --kills 30 --seed 0          four to ten minutes on two cores

Three kinds of death by SIGKILL, in turn: at any moment after the start (in the imports too), in the
middle of writing a checkpoint (while a .partial file is there), and, under torchrun, of one of two
ranks. After each, the last checkpoint must be whole; at the end the weights (in fine-tuning also
the best epoch's), the optimizer's state, the logged losses, validations and tables must be those of
the uninterrupted run, bit for bit. Exit code 0: they are.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from keep import read_checkpoint, read_log  # noqa: E402
from tests.runs import command  # noqa: E402
from toy import write_toy  # noqa: E402
from weights import read_tensors  # noqa: E402

TRAIN = ["train.py", "--width", "32", "--layers", "1"]
TUNE = ["finetune.py", "qa", "--held-out", "0.3", "--init"]
SETTINGS = "--batch 8 --save-every 1 --log-every 1 --dropout 0.1".split()


class Run:
    """A run of `program` in `out`, killed and gone on with until it is done."""

    def __init__(
        self, program: list[str], data: Path, out: Path, steps: int, ranks: int,
        rng: np.random.Generator,
    ):  # fmt: skip
        self.program, self.data, self.out, self.steps = program, data, out, steps
        self.ranks, self.rng = ranks, rng
        self.killed = {"any moment": 0, "writing": 0, "one rank": 0}
        self.left_half = self.began_again = 0

    def start(self) -> subprocess.Popen:
        """Start the run, or go on with it if it has a checkpoint."""
        file, *args = self.program
        args += ["--data", str(self.data), "--steps", str(self.steps), *SETTINGS]
        if (self.out / "trainer.pt").exists():
            args = [*self.program[1:2], "--resume"] if file == "finetune.py" else ["--resume"]
        elif self.out.exists():
            self.began_again += 1
        ranks = self.ranks if self.ranks > 1 else 0
        made = command(*args, "--out", str(self.out), ranks=ranks, script=REPO / file)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(made, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=environment, start_new_session=True)  # fmt: skip

    def finish(self) -> None:
        """Let the run come to its end."""
        process = self.start()
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said

    def kill(self, how: str, at: int) -> None:
        """Start, and kill when step `at` is done, as `how` says; nothing if it ends before."""
        process = self.start()
        if how == "any moment" and self.rng.random() < 0.5:  # the start takes longest
            time.sleep(self.rng.uniform(0, 4))
        else:
            for line in process.stdout:
                if line.startswith("step ") and int(line[5:].split("/")[0]) >= at:
                    break
            if how == "writing":
                while not list(self.out.glob("*.partial")) and process.poll() is None:
                    pass
            time.sleep(self.rng.uniform(0, 0.002 if how == "writing" else 0.05))
        if process.poll() is None:
            self.killed[how] += 1
        if how == "one rank":
            self.kill_rank(process)
        else:
            ranks = self.children(process)
            os.killpg(process.pid, signal.SIGKILL)
            for pid in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        self.left_half += bool(list(self.out.glob("*.partial")))
        if (self.out / "trainer.pt").exists():
            read_checkpoint(self.out / "trainer.pt")

    def children(self, process: subprocess.Popen) -> list[int]:
        """Find the ranks that torchrun has started; none when it was not asked."""
        try:
            found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return [int(pid) for pid in found
                    if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
        except OSError:  # it ended meanwhile
            return []

    def kill_rank(self, process: subprocess.Popen) -> None:
        """Kill one rank; torchrun and the other must end by themselves within a minute."""
        os.kill(int(self.rng.choice(self.children(process))), signal.SIGKILL)
        begun = time.monotonic()
        said = process.communicate(timeout=60)[0]
        assert process.returncode != 0 and "SIGKILL" in said, said
        self.slowest = max(getattr(self, "slowest", 0), time.monotonic() - begun)


def differ(a: Path, b: Path) -> list[str]:
    """Name what two finished runs do not have in common, bit for bit."""
    one, two = (read_checkpoint(run / "trainer.pt") for run in (a, b))
    weights = one["model"], two["model"]
    found = [f"weight {k}" for k, x in weights[0].items() if not torch.equal(x, weights[1][k])]
    for i, state in one["optimizer"]["state"].items():
        other = two["optimizer"]["state"][i]
        found += [f"optimizer {i} {k}" for k in state if not torch.equal(state[k], other[k])]
    best = [read_tensors(run / "model.safetensors") for run in (a, b)]
    found += [f"best {k}" for k, x in best[0].items() if not torch.equal(x, best[1][k])]
    keys = ("step", "loss", "video", "text", "lr", "grad", "skipped", "val", "retrieval", "model",
            "validation", "best_step", "held_out")  # fmt: skip
    logs = [[[row.get(k) for k in keys] for row in read_log(run / "log.jsonl")] for run in (a, b)]
    if json.dumps(logs[0]) != json.dumps(logs[1]):
        found.append("log.jsonl")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--kills", type=int, default=30, help="deaths, all kinds together (default: 30)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other moments (default: 0)")
    parser.add_argument("--folder", help="where to work (default: a temporary one, removed)")
    args = parser.parse_args(argv)
    begun = time.monotonic()
    folder = Path(args.folder or tempfile.mkdtemp())
    rng = np.random.default_rng(args.seed)
    write_toy(folder / "world", scale=0.05)
    bad = []
    third, alone, tune = args.kills // 3, ("any moment", "writing"), [*TUNE, str(folder / "whole0")]
    plan = [(TRAIN, 1, args.kills - 2 * third, alone), (tune, 1, third, alone[::-1]),
            (TRAIN, 2, third, ("one rank", "any moment"))]  # fmt: skip
    for i, (program, ranks, kills, kinds) in enumerate(plan):
        steps = 10 * kills + 10
        whole = Run(program, folder / "world", folder / f"whole{i}", steps, ranks, rng)
        whole.finish()
        cut = Run(program, folder / "world", folder / f"cut{i}", steps, ranks, rng)
        for n in range(kills):
            cut.kill(kinds[n % len(kinds)], 10 * n + int(rng.integers(1, 10)))
        cut.finish()
        found = differ(whole.out, cut.out)
        bad += found
        print(f"{program[0]}, {ranks} process{'es' * (ranks > 1)}, {steps} steps, killed: "
              f"{cut.killed}; {cut.left_half} times with half a file left, {cut.began_again} times "
              "begun again; "
              + (f"other ranks ended within {cut.slowest:.0f} s; " if ranks > 1 else "")
              + (f"DIFFERENT: {found[:3]}" if found else "equal bit for bit")
              + f" ({time.monotonic() - begun:.0f} s)", flush=True)  # fmt: skip
    if not args.folder:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
