"""Retrieval metrics against loops; the constant predictors against their formulas."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

import eval as evaluation
from benchmarks import Clip
from data import open_captions, open_corpus, open_features, special_ids, val_clips
from eval import (
    Options,
    answer_localization,
    answer_qa,
    assign,
    centre,
    chance,
    constant,
    embed_clips,
    error_table,
    evaluate,
    ranks,
    recall,
    retrieval,
    retrieval_chance,
    segmentation,
    set_means,
    validate,
)
from ranks import Ranks
from tasks import DATASETS, Item, Task, open_task, windows
from vlm import VLM, VLMConfig, load_tokenizer


@pytest.fixture(scope="module")
def small(small_toy):
    """A random model of the small toy world: (model, tokenizer, validation corpus)."""
    tokenizer = load_tokenizer(small_toy)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    sizes |= dict(max_position_embeddings=96, video_dim=64)
    torch.manual_seed(0)
    model = VLM(VLMConfig(**sizes, **special_ids(tokenizer))).eval()
    stores = open_features(small_toy), open_captions(small_toy, tokenizer)
    corpus, _ = open_corpus(small_toy, *stores, "val", model.config, clips_per_video=3)
    return model, tokenizer, corpus


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_ranks_equal_a_loop_and_ties_count_against_the_model(rows):
    """Small whole numbers make many exact ties; however many texts are scored at a time."""
    g = torch.Generator().manual_seed(0)
    text, video = (torch.randint(-1, 2, (13, 3), generator=g).float() for _ in range(2))
    score = text @ video.T
    slow = [sum(s >= score[i, i] for s in score[i].tolist()) for i in range(13)]
    assert ranks(text, video, rows).tolist() == [int(r) for r in slow]
    found = retrieval(text, video)
    assert found["R@5"] == sum(r <= 5 for r in slow) / 13
    assert found["median rank"] == sorted(slow)[6]


def test_constant_scores_are_not_rewarded():
    """A model that says the same of all videos is last everywhere, whatever rounding does."""
    one = torch.randn(1, 77, generator=torch.Generator().manual_seed(1))
    same = one.repeat(1000, 1)
    assert (ranks(same, same) == 1000).all()
    assert retrieval(same, same)["R@10"] == 0


def test_a_perfect_model_is_first_and_a_nan_is_an_error():
    """Catches a rank that starts at 0 and a query that vanishes."""
    eye = torch.eye(7)
    assert retrieval(eye, eye) == {"R@1": 1, "R@5": 1, "R@10": 1, "median rank": 1}
    broken = eye.clone()
    broken[5, 2] = math.nan
    with pytest.raises(ValueError, match="text 5 has a similarity that is NaN"):
        ranks(broken, eye)
    with pytest.raises(ValueError, match="text 0"):
        ranks(eye, broken)


def test_chance_is_what_random_orders_score():
    """2,000 random orders of 40 videos: R@5 within 4.5 deviations, the median rank within one."""
    rng, n = np.random.default_rng(0), 40
    rank = rng.integers(1, n + 1, (2000, n))
    chance = retrieval_chance(n)
    assert abs((rank <= 5).mean() - chance["R@5"]) < 4.5 * math.sqrt(0.125 * 0.875 / rank.size)
    assert abs(np.median(rank, axis=1).mean() - chance["median rank"]) < 1


def test_queries_of_held_out_videos_begin_inside_their_features(small_toy, tmp_path):
    """Catches a question about seconds that are not there, which nobody can answer."""
    world = shutil.copytree(small_toy, tmp_path / "world")
    path = world / "features" / "how_val_0000.npy"
    np.save(path, np.load(path)[:20])
    features, tokenizer = open_features(world), load_tokenizer(world)
    c = VLMConfig(max_position_embeddings=96, **special_ids(tokenizer))
    captions = open_captions(world, tokenizer)
    corpus, _ = open_corpus(world, features, captions, "val", c)
    clips = val_clips(corpus, tokenizer)
    assert clips[0].video == "how_val_0000" and clips[0].start < 20
    assert all(clip.start < len(features.open(clip.video)) for clip in clips)


def test_clips_are_embedded_alike_in_batches_of_any_size(small):
    """Catches padding or order that reaches an embedding."""
    model, tokenizer, corpus = small
    clips = val_clips(corpus, tokenizer) * 3
    a = embed_clips(model, tokenizer, corpus.features, clips, size=64)
    b = embed_clips(model, tokenizer, corpus.features, clips, size=1)
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_means_are_of_training_clips_and_centring_takes_them_away(small):
    """Centred, training clips whose texts are as short as questions average to nothing."""
    model, tokenizer, corpus = small
    set_means(model, corpus, clips=64)
    batch = dataclasses.replace(corpus, mmm=0.0, clips_per_video=1).step(0, 64)
    sep = model.config.sep_token_id
    with torch.no_grad():
        text = []
        for ids, valid in zip(batch.text_target, batch.text_valid, strict=True):
            cut = torch.tensor([[*[i for i in ids[valid].tolist() if i != sep][:8], sep]])
            text.append(model.embed_text(cut, torch.ones_like(cut, dtype=torch.bool)))
        text = torch.cat(text)
        video = model.embed_video(batch.video, batch.video_valid)
    assert torch.allclose(model.text_mean, text.mean(0), atol=1e-6)
    assert torch.allclose(model.video_mean, video.mean(0), atol=1e-6)
    for x, raw in zip(centre(model, text, video), (text, video), strict=True):
        by_hand = raw - raw.mean(0)
        by_hand = by_hand / by_hand.norm(dim=1, keepdim=True)
        assert torch.allclose(x, by_hand, atol=1e-4)


def test_constant_predictors_are_the_best_that_look_at_nothing(small):
    """Words: entropy of the hidden words, the least of all. Seconds: at most log(|V'| + 1)."""
    model, _, corpus = small
    table = validate(model, corpus, "vlm", 6, 0.5, Ranks(), batches=2)
    batches = [dataclasses.replace(corpus, seed=0).step(i, 6) for i in range(2)]
    words = torch.cat([b.text_target[b.text_hidden] for b in batches])
    share = [(words == w).float().mean().item() for w in words.unique()]
    assert math.isclose(
        table["constant"]["text"], -sum(p * math.log(p) for p in share), rel_tol=1e-5
    )
    uniform = torch.full((model.config.vocab_size,), 1 / model.config.vocab_size)
    assert table["constant"]["text"] < -uniform[words].log().mean()
    counts = [
        (int(b.video_hidden.sum()), int((b.video_valid & ~b.video_hidden).sum())) for b in batches
    ]
    flat = sum(n * math.log(pool + 1) for n, pool in counts) / sum(n for n, _ in counts)
    assert table["constant"]["video"] <= flat + 1e-6
    assert not model.training
    n_video, n_text = sum(n for n, _ in counts), len(words)
    row = table["model"]
    both = (row["video"] * n_video + row["text"] * n_text) / (n_video + n_text)
    assert math.isclose(row["loss"], both, rel_tol=1e-5)
    W = model.config.vocab_size  # chance: each batch's own candidates, V' and D, counted by hand
    texts = [int(b.text_hidden.sum()) for b in batches]
    chance = {"video": sum(n * math.log(pool + W + 1) for n, pool in counts) / n_video}
    pools = [pool for _, pool in counts]
    chance["text"] = sum(n * math.log(p + W) for n, p in zip(texts, pools, strict=True)) / n_text
    chance["loss"] = (chance["video"] * n_video + chance["text"] * n_text) / (n_video + n_text)
    assert table["chance"] == pytest.approx(chance, rel=1e-6)


# ---- segmentation and localization


def best_by_brute_force(score: np.ndarray) -> float:
    """Try every strictly increasing choice of seconds."""
    n, K = score.shape
    choices = itertools.combinations(range(n), K)
    return max(sum(score[t, k] for k, t in enumerate(chosen)) for chosen in choices)


@pytest.mark.parametrize("n, K", [(1, 1), (4, 4), (7, 1), (9, 3), (8, 5)])
def test_assignment_equals_brute_force_over_all_monotone_ones(n, K):
    """Whole numbers make ties; the seconds found are in order and worth the best sum there is."""
    rng = np.random.default_rng(n * K)
    for _ in range(20):
        score = rng.integers(-3, 4, (n, K)).astype(float)
        seconds = assign(score)
        assert (np.diff(seconds) > 0).all() and len(seconds) == K
        assert score[seconds, range(K)].sum() == best_by_brute_force(score)
        fine = score + rng.normal(0, 1, (n, K))
        assert fine[assign(fine), range(K)].sum() == pytest.approx(best_by_brute_force(fine))
    assert assign(np.zeros((n, K))).tolist() == list(range(K))  # ties: the earliest


def test_too_few_seconds_for_the_steps_is_an_error():
    with pytest.raises(ValueError, match="2 seconds cannot hold 3 steps"):
        assign(np.zeros((2, 3)))


def test_frame_accuracy_by_hand():
    """Eight seconds of two videos: 5 right; of six with an action 3 right; classes 0, 1, 2."""
    truth = [np.array([0, 1, 1, 1]), np.array([2, 2, 2, 0])]
    guess = [np.array([0, 1, 0, 1]), np.array([2, 1, 0, 0])]
    found = segmentation(guess, truth)
    assert found["frame accuracy"] == 5 / 8
    assert found["without background"] == 3 / 6
    assert found["mean over classes"] == pytest.approx((2 / 2 + 2 / 3 + 1 / 3) / 3)
    silent = segmentation([np.zeros(3, int)], [np.zeros(3, int)])
    assert silent["frame accuracy"] == 1 and math.isnan(silent["without background"])


def test_recall_is_averaged_over_tasks_not_over_videos():
    """CrossTask: task a 3 of 4 steps, task b 1 of 8; the mean of the two."""
    hits = [("a", 2, 2), ("a", 1, 2), ("b", 1, 8)]
    assert recall(hits) == pytest.approx((3 / 4 + 1 / 8) / 2)


def test_a_sequence_of_features_is_localized_as_a_loop_does(small, small_toy):
    """Windows, log-softmax over steps, assignment, recall: all again, step by step."""
    model, tokenizer, _ = small
    task = open_task("localization", small_toy, open_features(small_toy))
    found = answer_localization(model, tokenizer, task.features, task.test, Options())
    per_task = {}
    for item in task.test:
        x = torch.from_numpy(task.features.rows(item.clip.video, np.arange(len(item.truth))))
        states = [[] for _ in x]
        start = 0
        while True:
            part = x[None, start : start + 32]
            h = model.encode_video(part, torch.ones(1, part.shape[1], dtype=torch.bool))[0, :-1]
            for i, row in enumerate(h):
                states[start + i].append(row)
            if start + 32 >= len(x):
                break
            start += 16
        steps = []
        for text in item.texts:
            ids = [*tokenizer.encode(text, add_special_tokens=False).ids, 3]
            steps.append(model.embed_text(torch.tensor([ids]), torch.ones(1, len(ids)).bool())[0])
        score = torch.stack([  # averaged over windows after the dot product, as the paper says
            torch.stack([torch.stack([h @ e for h in second]).mean() for e in steps])
            for second in states
        ])  # fmt: skip
        seconds = assign(score.double().log_softmax(1).detach().numpy())
        video = f"{item.clip.key}_{item.clip.video}"
        assert found.predictions[video] == seconds.tolist()
        row = per_task.setdefault(item.clip.key, [0, 0])
        for s, second in enumerate(seconds):
            row[0] += bool(item.truth[second, s])
            row[1] += bool(item.truth[:, s].any())
    slow = sum(a / b for a, b in per_task.values()) / len(per_task)
    assert found.rows["dot product"]["recall"] == pytest.approx(slow)


# ---- tables


def test_questions_with_tied_answers_are_wrong(small, small_toy):
    """Twice the right answer: the model cannot tell them apart, so it has not answered."""
    model, tokenizer, _ = small
    task = open_task("qa", small_toy, open_features(small_toy))
    item = task.test[0]
    same = dataclasses.replace(item, texts=(item.texts[item.right],) * 5)
    found = answer_qa(model, tokenizer, task.features, [same] * 3, Options())
    assert found.rows["dot product"]["accuracy"] == 0
    alone = dataclasses.replace(item, texts=(item.texts[item.right],), right=0)
    found = answer_qa(model, tokenizer, task.features, [alone], Options())
    assert found.rows["dot product"]["accuracy"] == 1


def test_questions_are_answered_as_a_loop_does(small, small_toy):
    """Five dot products a question, one at a time."""
    model, tokenizer, _ = small
    task = open_task("qa", small_toy, open_features(small_toy))
    found = answer_qa(model, tokenizer, task.features, task.test, Options())
    right = 0
    for item, said in zip(task.test, found.predictions, strict=True):
        scores = []
        for text in item.texts:
            one = [dataclasses.replace(item.clip, text=text)]
            t, v = embed_clips(model, tokenizer, task.features, one)
            scores.append(float((t * v).sum()))
        assert said == {"video": item.clip.video, "answer": int(np.argmax(scores))}
        right += int(np.argmax(scores)) == item.right
    assert found.rows["dot product"]["accuracy"] == right / len(task.test)


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_table_has_chance_a_constant_and_the_json_of_the_design(small, small_toy, name):
    """And what is written is what was asked: one prediction an item, ids as in the files."""
    model, tokenizer, _ = small
    model = copy.deepcopy(model)
    task = open_task(name, small_toy, open_features(small_toy))
    if name == "segmentation":
        with pytest.raises(ValueError, match="no classifier: torchrun finetune.py segmentation"):
            evaluate(model, tokenizer, task, Options())
        model.set_labels(task.labels)
    report = evaluate(model, tokenizer, task, Options(beams=2, max_new_tokens=5))
    found = json.loads(json.dumps(report.to_json()))
    assert found["task"] == name and found["n"] == len(task.test)
    assert set(found["model"]) == set(found["constant"]) == set(found["chance"])
    assert all(math.isfinite(x) for row in ("model", "constant", "chance")
               for x in found[row].values())  # fmt: skip
    assert len(report.answers.predictions) == len(task.test)
    assert "chance" in str(report) and str(len(task.test)) in str(report)
    assert "errors, the first" in error_table(report, 2)
    theirs = "other videos" if name == "localization" else "real data"
    wanted = bool(report.paper)
    assert (f"the paper's model, {theirs}" in str(report)) == wanted
    as_theirs = dataclasses.replace(report, split="authors")
    assert ("the paper's model, real data" in str(as_theirs)) == wanted


def test_errors_are_the_texts_of_the_clips_that_came_first(small, small_toy):
    """Tables 10 and 11: each wrong first answer beside its question, and no right one."""
    model, tokenizer, _ = small
    task = open_task("retrieval", small_toy, open_features(small_toy))
    report = evaluate(model, tokenizer, task, Options())
    text, video = embed_clips(model, tokenizer, task.features, [i.clip for i in task.test])
    wanted = []
    for n, item in enumerate(task.test):
        first = max(range(len(video)), key=lambda k: float(text[n].double() @ video[k].double()))
        if first != n:
            wanted.append((item.clip.text, task.test[first].clip.text, item.clip.text))
    assert report.answers.errors == wanted and len(wanted) > 2
    table = error_table(report, 2)
    assert table.startswith(f"{len(wanted)} errors, the first 2\n")
    shown = re.findall(r"^ +(?:query|text of the clip that came first)  (.*)$", table, re.M)
    assert shown == [text for row in wanted[:2] for text in row[:2]]


def test_constants_and_chance_by_hand(small, small_toy):
    """Background only, the commonest answer, a random second: counted again here."""
    _, tokenizer, _ = small
    features = open_features(small_toy)
    task = open_task("segmentation", small_toy, features)
    seconds = np.concatenate([item.truth for item in task.test])
    assert constant(task, tokenizer, Options())[1]["frame accuracy"] == (seconds == 0).mean()
    assert constant(task, tokenizer, Options())[1]["without background"] == 0
    assert chance(task, tokenizer, Options())["frame accuracy"] == 1 / len(task.labels)
    task = open_task("localization", small_toy, features)
    shares = {}
    for item in task.test:
        for s in range(len(item.texts)):
            if item.truth[:, s].any():
                shares.setdefault(item.clip.key, []).append(item.truth[:, s].mean())
    slow = np.mean([np.mean(x) for x in shares.values()])
    assert chance(task, tokenizer, Options())["recall"] == pytest.approx(slow)
    task = open_task("qa", small_toy, features)
    right = [item.right for item in task.test]
    assert constant(task, tokenizer, Options())[1]["accuracy"] == max(
        right.count(k) for k in range(5)
    ) / len(right)


def test_what_could_not_be_measured_is_null_and_no_training_text_is_no_error(small, small_toy):
    """A test of background alone; captions where no training clip has features."""
    model, tokenizer, _ = small
    model = copy.deepcopy(model)
    task = open_task("segmentation", small_toy, open_features(small_toy))
    model.set_labels(task.labels)
    task.test = [dataclasses.replace(x, truth=np.zeros_like(x.truth)) for x in task.test]
    found = evaluate(model, tokenizer, task, Options()).to_json()
    assert found["model"]["without background"] is None and json.dumps(found, allow_nan=False)
    task = open_task("captioning", small_toy, open_features(small_toy))
    task.train = []
    assert chance(task, tokenizer, Options())["BLEU-4"] < 1e-3
    assert constant(task, tokenizer, Options())[1]["BLEU-4"] < 1e-3


WRITES = (
    "qa --data x --run x --predictions",
    "qa --data x --run x --json",
    "search --run x --features x y --json",
    "captions --references x --hypotheses x --json",
)


@pytest.mark.parametrize("command", WRITES)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path):
    """Catches answers that were computed and then had no place: x is not even looked for."""
    for place, message in (
        (tmp_path, "is a folder, wanted a file"),
        (tmp_path / "no" / "f.json", "there is no folder .*no: make it"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluation.main([*command.split(), str(place)])


def test_segmentations_constant_is_the_commonest_label_of_training():
    """Background in COIN; elsewhere an action may be commoner, and a better constant."""
    clip = Clip("v", "")
    task = Task("segmentation", "coin", None, labels=["", "7", "8"])
    task.test = [Item(clip, truth=np.array([2, 2, 1, 0]))]
    cases = {(0, 0, 2): ("background only", 0.25), (0, 2, 2): ("always 8", 0.5),
             (3, 3, 3, 1): ("always 7", 0.25),  # 3: a label that the model does not know
             (1,) * 20 + (2,) * 38 + (1,) * 22: ("always 7", 0.25)}  # fmt: skip
    for seconds, expected in cases.items():
        whole = Item(Clip("v", "", 0.0, float(len(seconds))), truth=np.array(seconds))
        task.train = [[window] for window in windows(whole, 16)]  # overlapping: each second once
        what, row = constant(task, None, Options())
        assert (what, row["frame accuracy"]) == expected
