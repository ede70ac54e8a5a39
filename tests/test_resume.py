"""The same numbers, whatever comes between: loader workers, a stop, other ranks, other versions."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finetune
import train
from keep import read_checkpoint
from tests import kill
from tests.fixtures.make_run import answers, write_world
from tests.runs import REPO, RESUME, TINY, command, config, flags, losses, tuning, until
from train import TrainConfig, main
from vlm import load_run

FIXTURES = REPO / "tests" / "fixtures"


# ---- loader workers


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_seed_gives_the_same_run_for_any_number_of_loader_workers(
    small_toy, whole, tmp_path, workers
):
    """Bit for bit: weights, Adam's state, the log, the evaluation."""
    main(config(small_toy, tmp_path / "run", workers=workers))
    assert not kill.differ(whole, tmp_path / "run")


def test_another_seed_gives_another_run(small_toy, whole, tmp_path):
    """Shows that the comparison above can fail."""
    main(config(small_toy, tmp_path / "run", seed=1))
    assert "log.jsonl" in kill.differ(whole, tmp_path / "run")


def test_fine_tuning_is_the_same_for_any_number_of_loader_workers(small_toy, whole, tmp_path):
    for workers in (0, 2):
        finetune.main(tuning(small_toy, tmp_path / str(workers), whole, workers=workers))
    assert not kill.differ(tmp_path / "0", tmp_path / "2")


def test_loader_workers_start_where_python_would_not_fork(small_toy, tmp_path):
    """As on macOS, and from Python 3.14 on: what draws the batches cannot be pickled."""
    try:
        torch.multiprocessing.set_start_method("spawn", force=True)
        assert main(config(small_toy, tmp_path / "run", workers=1))["final"]
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)


# ---- a stop in the evaluation


@pytest.mark.parametrize("where", ["validate", "zero_shot_retrieval"])
def test_a_signal_in_the_evaluation_ends_it_and_it_is_done_again(
    small_toy, whole, tmp_path, monkeypatch, capsys, where
):
    """Training is saved by then: no need to wait. Going on evaluates, with the same numbers."""
    real, after = getattr(train, where), []

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        after.append(where)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, where, interrupted)
        assert main(config(small_toy, tmp_path / "run")) == {"final": False, "steps": 6}
    assert after == ([where] if where == "validate" else [])  # a collective is not left in between
    assert "stopped at step 6; to go on" in capsys.readouterr().out
    main(TrainConfig(out=str(tmp_path / "run"), resume=True), RESUME)
    assert not kill.differ(whole, tmp_path / "run")


def test_fine_tuning_stops_in_its_evaluation_and_goes_on(
    small_toy, whole, tmp_path, monkeypatch, capsys
):
    """A signal while the best epoch is tested: the line that goes on, then the same table."""
    first = finetune.main(tuning(small_toy, tmp_path / "one", whole))
    real = finetune.evaluate

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluate", interrupted)
        stopped = finetune.main(tuning(small_toy, tmp_path / "two", whole))
    assert not stopped["final"]
    assert "to go on: torchrun finetune.py qa --resume --out" in capsys.readouterr().out
    again = finetune.TuneConfig(task="qa", out=str(tmp_path / "two"), resume=True)
    second = finetune.main(again, RESUME)
    other = {"seconds", "settings"}  # `out`, `resume`
    first, second = ({k: x for k, x in s.items() if k not in other} for s in (first, second))
    assert first == second and not kill.differ(tmp_path / "one", tmp_path / "two")


# ---- other ranks, another accumulation


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_losses(small_toy, whole, tmp_path):
    """Two steps on one rank, two on two, two on one: as all six on one, to rounding."""
    out = tmp_path / "run"
    first = flags(data=small_toy, out=out, **TINY | {"steps": 2, "decay_steps": 6, "warmup": 0})
    again = [["--resume", "--out", str(out), "--steps", steps] for steps in "46"]
    said = []
    for args, n in zip((first, *again), (0, 2, 0), strict=True):
        done = subprocess.run(command(*args, ranks=n), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said += re.findall("ranks: .* when the checkpoint was written", done.stdout)
    wanted = "ranks: 2 now, 1 when", "ranks: 1 now, 2 when"
    assert said == [f"{x} the checkpoint was written" for x in wanted]
    assert losses(out) == pytest.approx(losses(whole), rel=1e-4)


def test_another_accumulation_draws_the_same_clips(small_toy):
    """Parts of a step, in order, are the step, whatever there are of them."""
    cfg = train.settle(config(small_toy, Path("x")), set())
    _, _, data = train.build(cfg, print)
    whole = data.train.step(3, 8)
    for parts in (2, 4):
        found = [data.train.step(3, 8, i, parts) for i in range(parts)]
        V = whole.video.shape[1]
        video = [torch.nn.functional.pad(p.video, (0, 0, 0, V - p.video.shape[1])) for p in found]
        assert torch.equal(torch.cat(video), whole.video)
        assert sum(int(p.video_hidden.sum()) for p in found) == int(whole.video_hidden.sum())
        assert sum(int(p.text_hidden.sum()) for p in found) == int(whole.text_hidden.sum())


@pytest.mark.parametrize("task", ["segmentation", "captioning"])
def test_another_accumulation_goes_on_with_the_same_losses(small_toy, whole, tmp_path, task):
    """Where no clip is another's negative: the losses of the rest, to rounding."""
    finetune.main(tuning(small_toy, tmp_path / "one", whole, task, steps=6))
    few = dict(steps=3, decay_steps=6, warmup=0)
    finetune.main(tuning(small_toy, tmp_path / "two", whole, task, **few))
    again = dict(task=task, out=str(tmp_path / "two"), resume=True, steps=6, accumulate=2)
    finetune.main(finetune.TuneConfig(**again), RESUME | {"steps", "accumulate"})
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# ---- more steps, another start


def test_more_epochs_make_a_longer_run(small_toy, tmp_path):
    """Catches an --epochs that is read and not used, because the steps are known."""
    main(config(small_toy, tmp_path / "run", steps=None, epochs=0.5))
    again = TrainConfig(out=str(tmp_path / "run"), resume=True, epochs=1.0)
    first = read_checkpoint(tmp_path / "run" / "trainer.pt")["step"]
    assert main(again, RESUME | {"epochs"})["steps"] == 2 * first


def test_epochs_that_had_no_part_in_a_run_are_asked_for_afresh():
    """`--steps 3`, then `--resume --epochs 15`: a default that had no use is not "as before"."""
    cfg = train.settle(TrainConfig(data="elsewhere", steps=3), {"data", "steps"})
    assert (cfg.steps, cfg.epochs) == (3, None)
    assert train.settle(TrainConfig(data="elsewhere"), {"data"}).epochs == 15


def test_a_run_that_is_further_than_its_steps_keeps_its_summary(small_toy, whole, tmp_path):
    """Catches a log that is cut before the run is refused: it would no longer count as finished."""
    out = shutil.copytree(whole, tmp_path / "run")
    before = (out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="--steps 2: .* is at step 6 already"):
        main(TrainConfig(out=str(out), resume=True, steps=2), RESUME | {"steps"})
    assert (out / "log.jsonl").read_text() == before


def test_a_run_from_another_ones_weights_has_not_its_means(small_toy, whole, tmp_path):
    """Catches a centred cosine by the means of other weights, in a run stopped before its own."""
    assert load_run(whole)[0].text_mean.any()
    main(config(small_toy, tmp_path / "run", init=str(whole)))
    state = read_checkpoint(tmp_path / "run" / "trainer.pt")["model"]
    assert not state["text_mean"].any() and not state["video_mean"].any()


# ---- other versions, changed settings, older runs


def rewrite(run: Path, change) -> None:
    """Change what a checkpoint says."""
    state = read_checkpoint(run / "trainer.pt")
    change(state)
    torch.save(state, run / "trainer.pt")


def test_another_version_and_other_data_are_said(small_toy, whole, tmp_path, capsys):
    """Name, value now, value then; the run goes on, for a new version is no reason to lose it."""
    out = shutil.copytree(whole, tmp_path / "run")

    def other(state):
        state["facts"] |= {"torch": "2.4.1", "training videos": "29 (00000000)", "device": "cuda"}

    rewrite(out, other)
    main(TrainConfig(out=str(out), resume=True), RESUME)
    said = capsys.readouterr().out
    assert f"torch: {torch.__version__} now, 2.4.1 when the checkpoint was written" in said
    assert re.search(r"training videos: 30 \(\w+\) now, 29 \(00000000\) when", said)
    assert "device: cpu now, cuda when" in said
    assert "captions:" not in said and "ranks:" not in said


def test_a_changed_setting_is_said_and_a_changed_model_refused(small_toy, whole, tmp_path, capsys):
    """What can change says so; what the weights are made of cannot, and was silently ignored."""
    out = shutil.copytree(whole, tmp_path / "run")
    again = TrainConfig(out=str(out), resume=True, lr=0.5, batch=8, steps=7)
    main(again, RESUME | {"lr", "batch", "steps"})
    said = capsys.readouterr().out
    assert re.search(r"resuming with --lr 0.5, it was 0.00\d+", said) and "--batch" not in said
    for name, value, was in (("width", 64, 32), ("loss", "mfm-mlm", "vlm"), ("init", "x", None)):
        again = TrainConfig(out=str(out), resume=True, **{name: value})
        with pytest.raises(ValueError, match=f"--{name} {value}: the run in .* has {was}, and its"):
            main(again, RESUME | {name})
    rewrite(out, lambda state: state["config"].update(gone=3))
    main(TrainConfig(out=str(out), resume=True), RESUME)
    assert "the run's setting gone = 3 is unknown here and left out" in capsys.readouterr().out


def test_fine_tuning_refuses_a_directory_in_use_and_another_model(small_toy, whole, tmp_path):
    """One lock, one list of settings that the weights are made of, for both programs."""
    out = tmp_path / "run"
    finetune.main(tuning(small_toy, out, whole))
    holder = "import sys, time; sys.path.insert(0, sys.argv[1]); import keep, pathlib\n"
    holder += "f = keep.hold(pathlib.Path(sys.argv[2])); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(REPO), str(out)], stdout=subprocess.PIPE, text=True
    )
    until(process, "held")
    again = finetune.TuneConfig(task="qa", out=str(out), resume=True)
    try:
        with pytest.raises(ValueError, match=f"is in use by process {process.pid}"):
            finetune.main(again, RESUME)
    finally:
        process.kill()
        process.wait()
    finetune.main(again, RESUME)
    with pytest.raises(ValueError, match="--init elsewhere: the run in .* has"):
        finetune.main(dataclasses.replace(again, init="elsewhere"), RESUME | {"init"})


def test_a_checkpoint_that_does_not_fit_its_config_is_one_line(small_toy, whole, tmp_path):
    """Not torch's page of sizes from inside load_state_dict."""
    out = shutil.copytree(whole, tmp_path / "run")
    rewrite(out, lambda state: state["model"].popitem())
    with pytest.raises(ValueError, match="trainer.pt does not fit config.json beside it: .*") as e:
        main(TrainConfig(out=str(out), resume=True), RESUME)
    assert "\n" not in str(e.value)


def test_an_old_run_gives_the_numbers_that_it_gave(tmp_path, capsys):
    """tests/fixtures/run was written by the code of November 2026; see make_run.py.

    Outputs to 1e-5, and going on for two steps the losses that it logged then.
    """
    numbers = json.loads((FIXTURES / "numbers.json").read_text())
    found = answers(load_run(FIXTURES / "run")[0])
    for name, wanted in numbers["answers"].items():
        assert found[name] == pytest.approx(wanted, abs=1e-5), name
    out = shutil.copytree(FIXTURES / "run", tmp_path / "run")
    write_world(tmp_path / "world")
    again = TrainConfig(out=str(out), resume=True, steps=6, data=str(tmp_path / "world"))
    main(again, RESUME | {"steps", "data"})
    wanted = numbers["loss"][:4] + numbers["going on"]
    assert losses(out) == pytest.approx(wanted, rel=1e-4)


def test_a_run_that_has_ended_keeps_its_record(small_toy, whole, tmp_path):
    """Catches a summary that says other settings than those that the weights were trained with."""
    out = shutil.copytree(whole, tmp_path / "run")
    log = (out / "log.jsonl").read_text()
    with pytest.raises(ValueError, match="--mmm 0.0: the run in .* has ended, with 0.5"):
        main(TrainConfig(resume=True, out=str(out), mmm=0.0), RESUME | {"mmm"})
    assert (out / "log.jsonl").read_text() == log
