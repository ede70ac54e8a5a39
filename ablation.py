"""The ablations of sec. 5.4.1 in miniature: what the choices of pre-training are worth.

    python bench.py ablation                           toy world, 6 rows x 3 seeds: an hour or two
    python bench.py ablation --rows mmm50,mmm0 --seeds 1 --steps 100 --out runs/short     minutes
    python bench.py ablation --report --out runs/ablation-toy         the table of what is there
    python bench.py ablation --data DATA --bert BERT --dataset youcook2 --steps 1000 \\
        --train "--batch 64 --clips-per-video 8"                      your own data

Each row and seed: train.py, then finetune.py retrieval and captioning from its run, each tested by
finetune.py on the test set. The same command goes on after a stop: what has its summary is not done
again, what was cut is resumed. OUT then holds a folder for each row and seed, ablation.json,
ablation.md and, with matplotlib, ablation.png.
"""

import argparse
import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

import pictures
from benchmarks import read_json
from finetune import TASKS_OF, TuneConfig
from keep import cores, hold
from loop import clock, parse
from tasks import DATASETS
from toy import write_toy
from train import TrainConfig, is_toy
from weights import write_aside

RETRIEVAL = ("R@1", "R@5", "R@10", "median rank")  # columns of Table 8
CAPTIONING = ("BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")  # of Table 9
STAGES = {"pre-training": (), "retrieval": RETRIEVAL, "captioning": CAPTIONING}


@dataclass(frozen=True)
class Row:
    """One row of the tables: its name there, train.py's flags, the paper's numbers.

    paper: in the order of RETRIEVAL and CAPTIONING, on YouCook2; percentages as fractions.
    """

    title: str
    flags: tuple[str, ...]
    paper: tuple[float, ...]

    def of_paper(self, metric: str) -> float:
        """Return the paper's number for a metric."""
        return self.paper[(*RETRIEVAL, *CAPTIONING).index(metric)]


ROWS = {
    "mmm50": Row("MMM 50 %", (),
                 (0.2705, 0.5688, 0.6938, 4, 0.1778, 0.1227, 0.1822, 0.4151, 1.3869)),
    "mmm0": Row("MMM 0 %", ("--mmm", "0"),
                (0.1512, 0.3947, 0.5281, 9, 0.1547, 0.1054, 0.1649, 0.3883, 1.2163)),
    "mmm30": Row("MMM 30 %", ("--mmm", "0.3"),
                 (0.2530, 0.5480, 0.6896, 4, 0.1657, 0.1130, 0.1755, 0.4076, 1.3215)),
    "mmm70": Row("MMM 70 %", ("--mmm", "0.7"),
                 (0.2517, 0.5498, 0.6911, 4, 0.1694, 0.1168, 0.1767, 0.4124, 1.3739)),
    "min16": Row("min. 16 text tokens", ("--min-text", "16"),
                 (0.2584, 0.5443, 0.6829, 5, 0.1725, 0.1200, 0.1767, 0.4062, 1.3076)),
    "mfm-mlm": Row("L_MFM-MLM", ("--loss", "mfm-mlm"),
                   (0.2693, 0.5592, 0.6986, 4, 0.1666, 0.1153, 0.1734, 0.4036, 1.3224)),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Running


@dataclass
class Plan:
    """What is to be run, and where; `settings` may not change while an OUT is being filled."""

    out: Path
    rows: list[str]
    seeds: list[int]
    settings: dict
    jobs: int = 1
    held: object = None  # the lock of `out`: no second command may clear away what this one writes
    took: dict[str, list[float]] = field(default_factory=dict)  # seconds, by stage
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def folder(self, row: str, seed: int) -> Path:
        """Name the folder of one row's runs with one seed."""
        return self.out / f"{row}-{seed}"

    def command(self, row: str, seed: int, stage: str) -> list[str]:
        """Write the command line of one process: a new run, or the one that goes on."""
        s, run = self.settings, self.folder(row, seed) / stage
        name = ["train.py"] if stage == "pre-training" else ["finetune.py", stage]
        me = [sys.executable, str(Path(__file__).with_name(name[0])), *name[1:], "--out", str(run)]
        if (run / "trainer.pt").exists():
            return [*me, "--resume"]
        me += ["--data", s["data"], "--seed", str(seed)]
        if stage == "pre-training":
            me += ["--bert", s["bert"]] * bool(s["bert"])
            me += ["--steps", str(s["steps"])] * bool(s["steps"])
            return [*me, *ROWS[row].flags, *shlex.split(s["train"])]
        me += ["--init", str(self.folder(row, seed) / "pre-training")]
        me += ["--dataset", s["dataset"]] * bool(s["dataset"])
        me += ["--limit", str(s["limit"][stage])] * bool(s["limit"][stage])
        return [*me, *tune_flags(s["tune"], stage)]

    def progress(self) -> str:
        """Say how much is done and how long the rest will take, by what its like has taken."""
        runs = [self.folder(r, s) for s in self.seeds for r in self.rows]
        left = {stage: sum(summary(run / stage) is None for run in runs) for stage in STAGES}
        done = len(runs) * len(STAGES) - sum(left.values())
        head = f"[{done}/{len(runs) * len(STAGES)}]"
        known = [t for times in self.took.values() for t in times]
        if not known or not any(left.values()):
            return head
        seconds = sum(n * statistics.mean(self.took.get(k) or known) for k, n in left.items())
        return f"{head} about {clock(seconds / min(self.jobs, len(runs)))} left"


def tune_flags(tune: str, task: str) -> list[str]:
    """Split --tune into finetune.py's flags for a task; those of the other task alone are not its.

    >>> tune_flags("--lr 1e-4 --tokenizer ptb", "retrieval")
    ['--lr', '1e-4']
    """
    flags, mine = [], True
    for word in shlex.split(tune):
        if word.startswith("--"):
            name = word[2:].split("=")[0].replace("-", "_")
            mine = task in TASKS_OF.get(name, DATASETS)
        flags += [word] * mine
    return flags


def check_flags(plan: Plan) -> None:
    """Let the programs read their command lines now, not after hours.

    Raises: ValueError for a setting that cannot be, or a flag of neither task.
    """
    tune = shlex.split(plan.settings["tune"])
    taken = [word for task in STAGES for word in tune_flags(plan.settings["tune"], task)]
    if odd := [word for word in tune if word not in taken]:
        raise ValueError(f"--tune: {odd[0]} is for neither retrieval nor captioning")
    for row, stage in itertools.product(plan.rows, STAGES):
        command = plan.command(row, plan.seeds[0], stage)
        if "--resume" not in command:
            parse(TrainConfig if stage == "pre-training" else TuneConfig, command[2:])


def summary(run: Path) -> dict | None:
    """Read a run's summary, the last line of its log; None as long as there is none."""
    try:
        last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError):
        return None
    return last if last.get("final") else None


def run_stage(plan: Plan, row: str, seed: int, stage: str) -> None:
    """Run one process to its summary, on one thread, unless that is there.

    Raises: ValueError with the last line that the process said, if it ends without a summary.
    """
    run, begun = plan.folder(row, seed) / stage, time.monotonic()
    if summary(run) or plan.stopped:
        return
    if run.exists() and not (run / "trainer.pt").exists():
        with hold(run) or contextlib.nullcontext():  # unless a process is still at it
            shutil.rmtree(run)  # cut before its first checkpoint: there is nothing to go on from
    run.parent.mkdir(parents=True, exist_ok=True)
    said = run.with_suffix(".txt")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with open(said, "a") as f:
        process = subprocess.Popen(plan.command(row, seed, stage), stdin=subprocess.DEVNULL,
                                   stdout=f, stderr=f, env=os.environ | threads)  # fmt: skip
        told = False
        while process.poll() is None:
            if plan.stopped and not told:
                process.terminate()  # it finishes its step and saves; told again it would not
                told = True
            time.sleep(0.2)
    if found := summary(run):
        # nothing will be resumed: three quarters of the disk come back
        (run / "trainer.pt").unlink(missing_ok=True)
        numbers = found.get("model") or {k: found.get(k) for k in ("loss", "R@1", "R@10")}
        words = "  ".join(f"{k} {v:.3f}" for k, v in numbers.items() if v is not None)
        with plan.lock:
            plan.took.setdefault(stage, []).append(time.monotonic() - begun)
            print(f"{plan.progress()} | {row}, seed {seed}, {stage}: {words}", flush=True)
    elif not plan.stopped:
        last = (said.read_text().splitlines() or ["nothing"])[-1]
        raise ValueError(f"{row}, seed {seed}, {stage}: ended with code {process.returncode} and "
                         f"said {last!r}; all of it is in {said}")  # fmt: skip


def run_all(plan: Plan) -> None:
    """Run every row and seed, `jobs` at a time, first seeds first; a signal stops between steps."""

    def stop(*_) -> None:
        plan.stopped = True

    def chain(row: str, seed: int) -> None:
        try:
            for stage in STAGES:
                run_stage(plan, row, seed, stage)
        except ValueError:
            stop()  # what is wrong with one is wrong with all
            raise

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(plan.jobs) as pool:
            chains = [pool.submit(chain, r, s) for s in plan.seeds for r in plan.rows]
        for each in chains:
            each.result()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


# ---------------------------------------------------------------------------------------------
# Reading


def collect(out: Path) -> dict[str, dict[int, dict[str, dict]]]:
    """Read all summaries under OUT: {row: {seed: {stage: summary}}}, rows in the paper's order."""
    found: dict = {}
    for row in ROWS:
        folders = ((p.name.rpartition("-"), p) for p in out.glob(f"{row}-*"))
        seeds = {int(n): p for (name, _, n), p in folders if name == row and n.isdigit()}
        for seed, folder in sorted(seeds.items()):
            stages = {stage: summary(folder / stage) for stage in STAGES}
            if stages := {k: v for k, v in stages.items() if v}:
                found.setdefault(row, {})[seed] = stages
    return found


def after_pre_training(found: dict) -> dict[str, float]:
    """Name what train.py's summary says of a run before any fine-tuning; losses in nats a token."""
    numbers = {}
    for mmm, table in found.get("val", {}).items():
        if mmm == "1.0":
            numbers |= {f"{k} from the other alone": table["model"][k] for k in ("video", "text")}
    for metric in ("R@1", "R@10"):
        for space in ("dot product", "centred cosine"):
            if space in found.get("retrieval", {}):
                numbers[f"{metric} {space}"] = found["retrieval"][space][metric]
    return numbers


def scores(found: dict, stage: str) -> dict[str, dict[str, dict[int, float]]]:
    """Sort a stage's numbers: {metric: {row: {seed: value}}}, in the paper's column order."""
    out: dict = {}
    for row, seeds in found.items():
        for seed, stages in seeds.items():
            if stage in stages:
                if not (numbers := stages[stage].get("model")):
                    numbers = after_pre_training(stages[stage])
                for metric, value in numbers.items():
                    if value is not None:
                        out.setdefault(metric, {}).setdefault(row, {})[seed] = value
    return out


def spread(values: Iterable[float]) -> float | None:
    """Return the standard deviation over seeds; None for a single one.

    >>> spread([1.0, 3.0, 5.0]), spread([1.0])
    (2.0, None)
    """
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def compare(metric: str, a: dict[int, float], b: dict[int, float]) -> tuple[float, float | None]:
    """Say how much better a is than b, seed by seed: (mean, spread); a lower median rank is better.

    >>> compare("R@1", {0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5, 2: 0.9})
    (0.25, 0.0)
    """
    sign = -1 if metric == "median rank" else 1
    both = [sign * (a[s] - b[s]) for s in a if s in b]
    return (statistics.mean(both), spread(both)) if both else (0.0, None)


def verdict(ours: float, wide: float | None, paper: float) -> str:
    """Set a difference `ours`, with its spread `wide`, beside the paper's of the same two rows.

    >>> verdict(0.2, 0.1, 0.119), verdict(-0.2, 0.1, 0.119), verdict(0.05, 0.1, 0.119)
    ('as in the paper', 'against the paper', 'smaller than the spread')
    >>> verdict(0.2, None, 0.119), verdict(0.2, 0.1, 0.0)
    ('as in the paper, on one seed', 'equal in the paper')
    """
    if paper == 0:
        return "equal in the paper"
    if wide is not None and abs(ours) <= wide or ours == 0:
        return "smaller than the spread"
    said = "as in the paper" if ours * paper > 0 else "against the paper"
    return said if wide is not None else f"{said}, on one seed"


def order(found: dict) -> tuple[list[dict], list[str]]:
    """Compare every two rows by every metric with the paper: (all pairs, what they say in words).

    A difference is taken seed by seed, so that what a seed does to both rows falls out; its spread
    is the standard deviation of these differences.
    """
    pairs, lines = [], []
    measured = scores(found, "retrieval") | scores(found, "captioning")
    for metric in (m for m in (*RETRIEVAL, *CAPTIONING) if m in measured):
        rows = measured[metric]
        for a, b in itertools.combinations([r for r in ROWS if r in rows], 2):
            if not rows[a].keys() & rows[b].keys():
                continue
            ours, wide = compare(metric, rows[a], rows[b])
            paper, _ = compare(metric, *({0: ROWS[x].of_paper(metric)} for x in (a, b)))
            said = verdict(ours, wide, paper)
            pairs.append(dict(metric=metric, a=a, b=b, a_better_by=ours, spread=wide,
                              paper=paper, verdict=said))  # fmt: skip
        mine = [p["verdict"] for p in pairs if p["metric"] == metric]
        counts = "; ".join(f"{n} {said}" for said, n in Counter(mine).items())
        lines.append(f"- {metric}, pairs of rows: {counts}")
    for row in (r for r in ROWS if r != "mmm50"):
        mine: dict[str, list[str]] = {}
        for p in (p for p in pairs if (p["a"], p["b"]) == ("mmm50", row)):
            wide = f" +- {p['spread']:.3f}" if p["spread"] is not None else ""
            said = f"{p['metric']} {round(p['a_better_by'], 3) + 0.0:+.3f}{wide}"  # no -0.000
            mine.setdefault(p["verdict"], []).append(said)
        words = "; ".join(f"{k}: {', '.join(v)}" for k, v in mine.items())
        lines += [f"- MMM 50 % better than {ROWS[row].title} by, {words}"] if mine else []
    return pairs, lines


# ---------------------------------------------------------------------------------------------
# Writing


def table(found: dict, stage: str) -> str:
    """Write one table in markdown: mean +- spread (each seed), the paper's numbers beside it."""
    measured = scores(found, stage)
    theirs = [m for m in measured if m in STAGES[stage]]  # METEOR without its lists is another
    head = ["pre-training", *measured, *(f"paper: {m}" for m in theirs)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in (r for r in found if any(r in rows for rows in measured.values())):
        cells = [cell(rows.get(name, {})) for rows in measured.values()]
        cells += [f"{ROWS[name].of_paper(m):.4g}" for m in theirs]
        lines.append("| " + " | ".join([ROWS[name].title, *cells]) + " |")
    return "\n".join(lines)


def cell(seeds: dict[int, float]) -> str:
    """Write a number of all seeds.

    >>> cell({0: 0.25, 1: 0.75}), cell({0: 0.25}), cell({})
    ('0.500 +- 0.354 (0.250, 0.750)', '0.250', '')
    """
    if len(seeds) < 2:
        return "".join(f"{x:.3f}" for x in seeds.values())
    each = ", ".join(f"{x:.3f}" for x in seeds.values())
    return f"{statistics.mean(seeds.values()):.3f} +- {spread(seeds.values()):.3f} ({each})"


def write_report(out: Path) -> str:
    """Write ablation.json, ablation.md and, with matplotlib, ablation.png; return the markdown.

    Raises: ValueError when OUT holds no finished run.
    """
    found = collect(out)
    if not any(len(stages) > 1 for seeds in found.values() for stages in seeds.values()):
        raise ValueError(f"--out {out}: no fine-tuned run with its summary is there yet")
    settings = json.loads((out / "settings.json").read_text())
    limit = ", ".join(f"{n or 'all'} for {k}" for k, n in settings["limit"].items())
    pairs, lines = order(found)
    parts = [
        f"Data {Path(settings['data']).name}, labelled items {limit}. Mean +- standard deviation "
        "over seeds (each seed); the paper's numbers are on YouCook2 after HowTo100M.",
        "**Table 8, text-to-video retrieval**", table(found, "retrieval"),
        "**Table 9, captioning**", table(found, "captioning"),
        "**Before fine-tuning**: held-out loss in nats a token, zero-shot retrieval",
        table(found, "pre-training"),
        "**Does the order of the paper's rows hold?** Differences are taken seed by seed.",
        "\n".join(lines),
    ]  # fmt: skip
    text = "\n\n".join(parts)
    (out / "ablation.md").write_text(text + "\n")
    values = {m: rows for stage in STAGES for m, rows in scores(found, stage).items()}
    all_of_it = {"settings": settings, "values": values, "order": pairs}
    (out / "ablation.json").write_text(json.dumps(all_of_it, indent=1) + "\n")
    try:
        draw(found, out / "ablation.png", Path(settings["data"]).name)
    except ValueError as error:  # no matplotlib
        print(f"no chart: {error}", file=sys.stderr)
    return text


def draw(found: dict, path: Path, data: str) -> None:
    """Draw a panel a metric: each row's mean, its spread, its seeds, and the paper's number."""
    plt = pictures.matplotlib()
    both = [scores(found, stage) for stage in ("retrieval", "captioning")]
    wide, names = max(1, *map(len, both)), list(found)[::-1]
    height = 1.4 + 2 * (0.9 + 0.32 * len(names))
    figure, axes = plt.subplots(2, wide, figsize=(12, height), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    for axis in axes.flat:
        axis.set_visible(False)
    for line, numbers in zip(axes, both, strict=True):
        for axis, (metric, rows) in zip(line, numbers.items(), strict=False):
            axis.set_visible(True)
            panel(axis, metric, rows, names)
    title = f"Tables 8 and 9 on {data}: bars mean and spread, dots seeds, "
    figure.suptitle(title + "orange the paper's own, on YouCook2", fontsize=12)
    pictures.save(figure, path)
    plt.close(figure)


def panel(axis, metric: str, rows: dict[str, dict[int, float]], names: list[str]) -> None:
    """Draw one metric of all rows."""
    for y, name in enumerate(names):
        if seeds := rows.get(name):
            mean, values = statistics.mean(seeds.values()), list(seeds.values())
            color = pictures.BLUE if name == "mmm50" else "#90b0d0"
            axis.barh(y, mean, 0.7, color=color, xerr=spread(values) or 0, ecolor="black")
            axis.plot(values, [y] * len(values), "o", color="black", ms=3)
        if metric in (*RETRIEVAL, *CAPTIONING):
            axis.plot(ROWS[name].of_paper(metric), y, "D", color=pictures.ORANGE, ms=5)
    axis.set_yticks(range(len(names)), [ROWS[n].title for n in names], fontsize=10)
    axis.tick_params(axis="x", labelsize=10)
    less = ", less is better" if metric == "median rank" else ""
    axis.set_title(metric + less, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------
# python bench.py ablation


def seed_list(text: str) -> list[int]:
    """Read seeds: so many, or a list; ValueError for anything else.

    >>> seed_list("3"), seed_list("4,7")
    ([0, 1, 2], [4, 7])
    """
    parts = [int(x) for x in text.split(",") if x]
    if not parts or min(parts) < 0 or parts == [0]:
        raise ValueError(text)
    return parts if "," in text else list(range(parts[0]))


def check_settings(out: Path, settings: dict) -> None:
    """Keep the settings beside the runs; refuse to mix two.

    Raises: ValueError when OUT was begun with others, naming them.
    """
    path = out / "settings.json"
    if path.exists():
        old = read_json(path, dict)
        if changed := [k for k in settings if settings[k] != old.get(k)]:
            k = changed[0]
            raise ValueError(f"{out} was begun with --{k} {old.get(k)!r}, not {settings[k]!r}: "
                             "choose another --out")  # fmt: skip
        return
    out.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda f: f.write_text(json.dumps(settings, indent=1) + "\n"))


def arguments() -> argparse.ArgumentParser:
    """Declare the command line."""
    p = argparse.ArgumentParser(
        prog="bench.py ablation", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    jobs = 1 if torch.cuda.is_available() else cores()
    add = p.add_argument_group("what is compared").add_argument
    how = f"rows of the tables, by these names (default: all, {','.join(ROWS)})"
    add("--rows", default=",".join(ROWS), metavar="A,B", help=how)
    add("--seeds", type=seed_list, default=seed_list("3"), metavar="N|A,B",
        help="so many, from 0, or a list of them (default: 3)")  # fmt: skip
    add = p.add_argument_group("pre-training").add_argument
    add("--data", default="toy", metavar="DIR", help="folder as data.py says (default: toy)")
    add("--bert", metavar="DIR", help="Hugging Face BERT to begin with; none on the toy world")
    add("--steps", type=int, metavar="N", help="optimizer steps (default: train.py's; toy 1000)")
    add("--train", default="", metavar="FLAGS", help="more flags for train.py, in one string")
    add = p.add_argument_group("fine-tuning").add_argument
    how = "labelled items for retrieval and captioning, 0: all (default: toy 40 150; paper: 0 0)"
    add("--limit", type=int, nargs=2, metavar="N", help=how)
    add("--dataset", choices=("msrvtt", "youcook2"),
        help="of both tasks (default: each one's first in DATA; paper: youcook2)")  # fmt: skip
    add("--tune", default="", metavar="FLAGS", help="more flags for finetune.py, in one string")
    add = p.add_argument_group("the runs").add_argument
    how = f"processes at a time, one thread each (default: {jobs}: cores, 1 on a GPU)"
    add("--jobs", type=int, default=jobs, metavar="N", help=how)
    add("--out", metavar="DIR", help="folder of all runs (default: runs/ablation-<data>)")
    add("--report", action="store_true", help="run nothing, write the tables of what is there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet, then write the tables."""
    args = arguments().parse_args(argv)
    out = Path(args.out or f"runs/ablation-{Path(args.data).resolve().name}")
    if not args.report:
        rows = args.rows.split(",")
        if unknown := [r for r in rows if r not in ROWS]:
            raise ValueError(f"--rows: {unknown[0]!r} is unknown: choose among {', '.join(ROWS)}")
        if args.jobs < 1:
            raise ValueError(f"--jobs is {args.jobs}, wanted at least 1")
        if is_toy(args.data) and not Path(args.data).exists():
            write_toy(args.data)  # here, once, and not in every process
        limit = args.limit or ((40, 150) if is_toy(args.data) else (0, 0))
        settings = {k: getattr(args, k) for k in ("data", "bert", "steps", "dataset")}
        settings |= dict(train=args.train, tune=args.tune)
        settings |= dict(limit=dict(retrieval=limit[0], captioning=limit[1]))
        plan = Plan(out, rows, args.seeds, settings, args.jobs)
        check_flags(plan)
        check_settings(out, settings)
        plan.held = hold(out)
        print(f"{plan.progress()} under {out}, {plan.jobs} at a time", flush=True)
        run_all(plan)
        if plan.stopped:
            print(f"stopped at {plan.progress()}; the same command goes on")
            return 0
    print(
        f"\n{write_report(out)}\n\nwritten to {out}/ablation.md, .json and, if it was drawn, .png"
    )
    return 0
