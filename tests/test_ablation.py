"""The ablations: the commands that are run, what is gone on with, and what the tables say."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ablation
import bench
from ablation import ROWS, STAGES, Plan, check_flags, collect, order, run_all, table, write_report
from finetune import TuneConfig
from loop import parse
from train import TrainConfig

SETTINGS = dict(data="D", bert=None, steps=None, dataset=None, train="", tune="",
                limit=dict(retrieval=0, captioning=0))  # fmt: skip


def finished(run: Path, **summary) -> None:
    """Leave a run directory as train.py or finetune.py would."""
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text('{"step": 1}\n' + json.dumps({"final": True, **summary}) + "\n")


def all_runs(out: Path, values: dict[str, list[float]]) -> None:
    """Leave an OUT in which every metric of row r and seed s is values[r][s]."""
    for row, seeds in values.items():
        for seed, x in enumerate(seeds):
            run = out / f"{row}-{seed}"
            finished(run / "retrieval", model=dict.fromkeys(ablation.RETRIEVAL, x))
            finished(run / "captioning", model=dict.fromkeys(ablation.CAPTIONING, x))
    (out / "settings.json").write_text(json.dumps(SETTINGS))


def test_rows_differ_from_the_papers_model_in_the_one_setting_that_they_name(tmp_path):
    """Through the real parsers: every flag exists, and no row changes a second setting."""
    changed = {}
    for name in ROWS:
        command = Plan(tmp_path, [name], [0], SETTINGS).command(name, 0, "pre-training")
        cfg, _ = parse(TrainConfig, command[2:])
        plain, _ = parse(TrainConfig, ["--data", "D", "--seed", "0", "--out", cfg.out])
        changed[name] = {k: v for k, v in vars(cfg).items() if v != getattr(plain, k)}
    assert changed == {
        "mmm50": {}, "mmm0": {"mmm": 0}, "mmm30": {"mmm": 0.3}, "mmm70": {"mmm": 0.7},
        "min16": {"min_text": 16}, "mfm-mlm": {"loss": "mfm-mlm"},
    }  # fmt: skip


def test_every_row_is_fine_tuned_from_its_own_run_in_the_same_way(tmp_path):
    settings = SETTINGS | dict(limit=dict(retrieval=7, captioning=9), dataset="youcook2")
    settings |= dict(tune="--lr 0.1")
    for task, limit in settings["limit"].items():
        seen = set()
        for name in ROWS:
            command = Plan(tmp_path, [name], [3], settings).command(name, 3, task)
            cfg, _ = parse(TuneConfig, command[2:])
            assert cfg.init == str(tmp_path / f"{name}-3" / "pre-training")
            assert (cfg.task, cfg.limit, cfg.seed, cfg.lr) == (task, limit, 3, 0.1)
            cfg.init = cfg.out = None
            seen.add(str(cfg))
        assert len(seen) == 1


def test_the_papers_numbers_are_those_of_its_tables(shared):
    """Tables 8 and 9 as the paper prints them, row by row."""
    text = (shared.parent / "paper" / "vlm.md").read_text()
    lines = [x.split("\t") for x in text.splitlines() if x.startswith(("w/ MMM", "w/ min", "w/ $"))]
    assert len(lines) == 2 * len(ROWS)
    for row, eight, nine in zip(ROWS.values(), lines[:6], lines[6:], strict=True):
        percent = [float(x) / 100 for x in (*eight[1:4], *nine[1:5])]
        theirs = (*percent[:3], float(eight[4]), *percent[3:], float(nine[5]))
        assert row.paper == pytest.approx(theirs), row.title


class Pretend:
    """A process that leaves a summary (or, told so, none) and has ended."""

    commands: list[list[str]] = []
    returncode, ends_well = 0, True

    def __init__(self, command: list[str], stdout, **_):
        self.commands.append(command)
        run = Path(command[command.index("--out") + 1])
        assert not (run / "left over").exists()
        run.mkdir(exist_ok=True)
        stdout.write("some lines\nerror: the last one\n")
        if self.ends_well:
            (run / "log.jsonl").write_text('{"final": true, "model": {"R@1": 0.5}}\n')

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def pretend(monkeypatch) -> type[Pretend]:
    monkeypatch.setattr(Pretend, "commands", [])
    monkeypatch.setattr(subprocess, "Popen", Pretend)
    return Pretend


def test_what_is_done_is_not_run_again_and_what_was_cut_goes_on(tmp_path, pretend, capsys):
    """A summary: nothing is started. A checkpoint: --resume. Neither: begun anew."""
    plan = Plan(tmp_path, ["mmm0"], [0], SETTINGS)
    done, cut, begun = (tmp_path / "mmm0-0" / stage for stage in STAGES)
    finished(done)
    cut.mkdir()
    (cut / "trainer.pt").touch()
    begun.mkdir()
    (begun / "left over").touch()
    (begun / "log.jsonl").write_text('{"step": 20}\n')
    run_all(plan)
    assert [c[2:6] for c in pretend.commands] == [
        ["retrieval", "--out", str(cut), "--resume"],
        ["captioning", "--out", str(begun), "--data"],
    ]
    assert not (cut / "trainer.pt").exists(), "a finished run keeps no optimizer"
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("[2/3] about 0:0") and said[1].startswith("[3/3] | mmm0, seed 0")
    run_all(plan)
    assert len(pretend.commands) == 2


def test_one_failure_stops_all_and_says_what_the_process_said(tmp_path, pretend, monkeypatch):
    monkeypatch.setattr(pretend, "ends_well", False)
    monkeypatch.setattr(pretend, "returncode", 2)
    plan = Plan(tmp_path, ["mmm50", "mmm0"], [0, 1], SETTINGS)
    with pytest.raises(ValueError, match="code 2 and said 'error: the last one'; .*pre-training.t"):
        run_all(plan)
    assert len(pretend.commands) == 1


def test_one_folder_never_holds_two_settings(tmp_path):
    ablation.check_settings(tmp_path, SETTINGS)
    ablation.check_settings(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="begun with --steps None, not 5: choose another --out"):
        ablation.check_settings(tmp_path, SETTINGS | {"steps": 5})


def test_tables_hold_means_spreads_and_seeds_in_the_papers_order(tmp_path):
    all_runs(tmp_path, {"mmm0": [0.25, 0.75], "mmm50": [0.5]})
    lines = table(collect(tmp_path), "captioning").splitlines()
    assert lines[0] == (
        "| pre-training | BLEU-3 | BLEU-4 | METEOR | ROUGE-L | CIDEr | paper: BLEU-3 | "
        "paper: BLEU-4 | paper: METEOR | paper: ROUGE-L | paper: CIDEr |"
    )
    assert lines[2].startswith("| MMM 50 % | 0.500 |") and lines[2].endswith("| 1.387 |")
    assert lines[3].startswith("| MMM 0 % | 0.500 +- 0.354 (0.250, 0.750) |")


def test_the_order_of_rows_is_judged_seed_by_seed(tmp_path):
    """Differences 0.1 and 0.2 at each seed are clear though the seeds themselves lie 0.5 apart."""
    all_runs(tmp_path, {"mmm50": [0.3, 0.8], "mmm0": [0.2, 0.6], "mmm30": [0.9, 0.1]})
    pairs, lines = order(collect(tmp_path))
    said = {(p["metric"], p["a"], p["b"]): p for p in pairs}
    assert len(said) == 9 * 3
    clear = said["R@1", "mmm50", "mmm0"]
    assert clear["a_better_by"] == pytest.approx(0.15)
    assert clear["spread"] == pytest.approx(0.1 / 2**0.5) and clear["verdict"] == "as in the paper"
    lower_is_better = said["median rank", "mmm50", "mmm0"]
    assert lower_is_better["a_better_by"] == pytest.approx(-0.15)
    assert lower_is_better["verdict"] == "against the paper"
    assert said["CIDEr", "mmm50", "mmm30"]["verdict"] == "smaller than the spread"
    assert said["median rank", "mmm50", "mmm30"]["verdict"] == "equal in the paper"  # 4.0 and 4.0
    assert any("better than MMM 0 % by" in x and "R@1 +0.150 +- 0.071" in x for x in lines)


def test_another_meteor_is_not_set_beside_the_papers(tmp_path):
    all_runs(tmp_path, {"mmm50": [0.5], "mmm0": [0.25]})
    for row in ("mmm50", "mmm0"):
        log = tmp_path / f"{row}-0" / "captioning" / "log.jsonl"
        log.write_text(log.read_text().replace("METEOR", "METEOR (exact+stem)"))
    found = collect(tmp_path)
    assert "| METEOR (exact+stem) |" in (text := table(found, "captioning"))
    assert "paper: METEOR" not in text and "paper: ROUGE-L" in text
    assert "METEOR" not in {p["metric"] for p in order(found)[0]}


def test_flags_for_fine_tuning_reach_the_tasks_that_have_them(tmp_path):
    """Catches a plan that ends after hours of pre-training, for a flag of captioning alone."""
    tune = "--tokenizer ptb --lr 0.1 --meteor-data=D --join-captions 2"
    plan = Plan(tmp_path, ["mmm0"], [0], SETTINGS | dict(tune=tune))
    assert plan.command("mmm0", 0, "captioning")[-7:] == shlex.split(tune)
    assert plan.command("mmm0", 0, "retrieval")[-4:] == ["--lr", "0.1", "--join-captions", "2"]
    out = ["--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    for flags, why in ((["--tune", "--stride 8"], "--stride is for neither retrieval nor"),
                       (["--tune", "--lr -1"], "--lr is -1.0, wanted more than 0"),
                       (["--tune", "--bert B"], "--bert and --init both give weights"),
                       (["--train", "--mmm 2"], "--mmm is 2.0, wanted 0..1")):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            bench.main(["ablation", *out, *flags])
    with pytest.raises(SystemExit):
        bench.main(["ablation", *out, "--tune", "--unknown 1"])
    assert not (tmp_path / "out").exists()
    check_flags(Plan(tmp_path, ["mmm0"], [0], SETTINGS | dict(bert="B", train="--scratch")))


def test_a_report_can_be_had_at_any_time(tmp_path, capsys, monkeypatch):
    """With nothing there it says so; with one seed of one row it is a table; matplotlib or not."""
    with pytest.raises(ValueError, match="no fine-tuned run with its summary"):
        write_report(tmp_path)
    all_runs(tmp_path, {"mmm70": [0.5]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["ablation", "--report", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "| MMM 70 % | 0.500 | 0.500 |" in out and "pip install matplotlib" in err
    assert (tmp_path / "ablation.md").read_text() in out
    kept = json.loads((tmp_path / "ablation.json").read_text())
    assert kept["values"]["CIDEr"] == {"mmm70": {"0": 0.5}} and kept["order"] == []


def test_the_chart_is_1200_pixels_wide(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    all_runs(tmp_path, {row: [0.2, 0.3, 0.4] for row in ROWS})
    write_report(tmp_path)
    assert imread(tmp_path / "ablation.png").shape[1] == 1200


@pytest.mark.parametrize("flag, words", [
    (["--rows", "mmm50,mmm51"], "'mmm51' is unknown: choose among mmm50"),
    (["--jobs", "0"], "--jobs is 0, wanted at least 1"),
])  # fmt: skip
def test_wrong_flags_are_one_line(tmp_path, flag, words):
    with pytest.raises(ValueError, match=words):
        ablation.main([*flag, "--out", str(tmp_path)])


def test_a_run_is_told_to_stop_once(tmp_path, monkeypatch):
    """A second signal after ten seconds would end it where it is, its last steps lost."""
    told = []

    class Busy:
        returncode, polls = 0, 0

        def poll(self):
            self.polls += 1
            return 0 if self.polls > 5 else None

        def terminate(self):
            told.append(self.polls)

    plan = Plan(tmp_path, ["mmm50"], [0], SETTINGS)

    def start(*_, **__):
        plan.stopped = True
        return Busy()

    monkeypatch.setattr(ablation.subprocess, "Popen", start)
    monkeypatch.setattr(ablation.time, "sleep", lambda s: None)
    ablation.run_stage(plan, "mmm50", 0, "pre-training")
    assert told == [1]


def test_a_folder_that_a_process_writes_is_not_cleared_away(tmp_path):
    """It has no checkpoint yet: an earlier command's run may still be at its first steps."""
    run = tmp_path / "mmm50-0" / "pre-training"
    run.mkdir(parents=True)
    hold = f"from keep import hold; from pathlib import Path; f = hold(Path({str(run)!r})); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, text=True,
                              cwd=Path(ablation.__file__).parent)  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (run / "lock").exists() or not (run / "lock").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"is in use by process {holder.pid}"):
            run_all(Plan(tmp_path, ["mmm50"], [0], SETTINGS))
        assert (run / "lock").exists()
    finally:
        holder.communicate("")


@pytest.mark.slow
def test_the_command_is_stopped_goes_on_and_ends_with_its_tables(small_toy, tmp_path):
    """Two rows, one seed, the small world: SIGTERM in the middle, then the same command again."""
    out = tmp_path / "out"
    me = [sys.executable, str(Path(ablation.__file__).with_name("bench.py")), "ablation"]
    me += ["--data", str(small_toy), "--rows", "mmm50,mmm0", "--seeds", "1", "--steps", "24"]
    me += ["--limit", "20", "20", "--train", "--batch 8 --save-every 4", "--tune", "--steps 3"]
    me += ["--jobs", "1", "--out", str(out)]
    first = subprocess.Popen(me, stdout=subprocess.PIPE, text=True)
    checkpoint = out / "mmm50-0" / "pre-training" / "trainer.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "the same command goes on" in said
    again = subprocess.run(me, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "[6/6]" in again.stdout and "| MMM 0 % |" in again.stdout
    assert "resumed at step" in (out / "mmm50-0" / "pre-training.txt").read_text()
    values = json.loads((out / "ablation.json").read_text())["values"]
    assert set(values["R@1"]) == set(values["CIDEr"]) == {"mmm50", "mmm0"}
