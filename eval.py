"""Metrics and tables (sec. 5.3-5.5): what a run knows, beside chance and a constant predictor.

    python eval.py retrieval --run RUN --data DATA      one of the five tasks, fine-tuned or not
    python eval.py captions --references R.json --hypotheses H.json        captions from files
    python eval.py search --run RUN --features FEATURES "pour the sauce"   one's own videos
    python eval.py heads --run RUN --data DATA --plot FILE.png          pictures, also masks,
                                                          sequence, space, curves (matplotlib)

Retrieval, qa and localization need no fine-tuning; segmentation needs its classifier, and captions
are poor without. `--json`, `--predictions` and `--errors N` (Tables 10 and 11) say more.

Similarity is the paper's dot product or, before fine-tuning, also the centred cosine: each modality
minus its mean over training clips (kept in the run), then the cosine. Scores are unbounded logits
or lie in -1..1. Letters as in vlm.py, and N items, K candidates or labels.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import captions
import pictures
import search
from benchmarks import Clip
from captions import caption_scores
from data import Corpus, FeatureStore, pairs
from keep import can_write, write_json
from loss import LossSums, nce
from meteor import meteor_files
from search import centre, embed_clips, embed_texts, fitting_features, read_video, spaces, whole
from tasks import DATASETS, SPLITS, Item, Task, open_task, refuse_seen
from vlm import VLM, load_run, run

# ---------------------------------------------------------------------------------------------
# Retrieval metrics (Tables 2 and 3)


def as_good(score: Tensor, own: Tensor) -> Tensor:
    """Tell which of score (.., N) are as good as own (.., 1): within 1e-9 of it is a tie.

    DEVIATION: ties count against the model; the authors' metric counts one text several times then.
    """
    return score >= own - 1e-9 * own.abs()


def ranks(text: Tensor, video: Tensor, rows: int = 1024) -> np.ndarray:
    """Rank each text's own video among all: 1 is best (sec. 5.4).

    Args:    text, video (N, D): row i of one belongs to row i of the other. rows: texts at a time.
    Returns: (N,) int. A tie counts against the model: whatever scores as well as the own video
             stands before it.
    Raises:  ValueError for a NaN or infinite score, naming the text.
    """
    text, video = text.double(), video.double()
    out = []
    for first in range(0, len(text), rows):
        score = text[first : first + rows] @ video.T  # (rows, N)
        if not score.isfinite().all():
            bad = int((~score.isfinite()).any(1).nonzero()[0]) + first
            raise ValueError(f"text {bad} has a similarity that is NaN or infinite")
        own = score.diagonal(first)[:, None]
        out.append(as_good(score, own).sum(1))
    return torch.cat(out).numpy()


def retrieval(text: Tensor, video: Tensor) -> dict[str, float]:
    """Score text-to-video retrieval: R@1, R@5, R@10 as fractions, and the median rank.

    Args: text, video (N, D): row i of one belongs to row i of the other.
    """
    rank = ranks(text, video)
    return {f"R@{k}": float((rank <= k).mean()) for k in (1, 5, 10)} | {
        "median rank": float(np.median(rank))
    }


def retrieval_chance(n: int) -> dict[str, float]:
    """Return what a random order of n videos scores.

    >>> retrieval_chance(20)
    {'R@1': 0.05, 'R@5': 0.25, 'R@10': 0.5, 'median rank': 10.5}
    """
    return {f"R@{k}": min(1.0, k / n) for k in (1, 5, 10)} | {"median rank": (n + 1) / 2}


# ---------------------------------------------------------------------------------------------
# Action segmentation and step localization (Tables 4 and 5)


def segmentation(guess: Iterable[np.ndarray], truth: Iterable[np.ndarray]) -> dict[str, float]:
    """Score labels second by second, all videos together; label 0 is the background.

    Args:    guess, truth: of each video (seconds,) int labels.
    Returns: frame accuracy, as COIN reports it; the same without background seconds, which tell
             more, for calling everything background is right most of the time; and the mean over
             the classes that occur. NaN where nothing but background occurs.
    """
    guess, truth = np.concatenate(list(guess)), np.concatenate(list(truth))
    right, shown = guess == truth, truth > 0
    classes = [right[truth == k].mean() for k in np.unique(truth)]
    return {
        "frame accuracy": float(right.mean()),
        "without background": float(right[shown].mean()) if shown.any() else float("nan"),
        "mean over classes": float(np.mean(classes)),
    }


def assign(score: np.ndarray) -> np.ndarray:
    """Give every step one second, in order, so that the sum of scores is greatest (CrossTask).

    Dynamic programming: best[k, t] = score[t, k] + max of best[k-1, u] over the seconds u < t.

    Args:    score (n, K): any finite number for each second and step.
    Returns: (K,) strictly increasing seconds; of equal sums the one with the earlier seconds.
    Raises:  ValueError when there are fewer seconds than steps.

    >>> assign(np.array([[0.0, 5.0], [1.0, 0.0], [0.0, 3.0]])).tolist()
    [1, 2]
    """
    n, K = score.shape
    if n < K:
        raise ValueError(f"{n} seconds cannot hold {K} steps in order")
    best, back = score[:, 0].astype(np.float64), np.zeros((K, n), dtype=int)
    for k in range(1, K):
        top = np.maximum.accumulate(best)  # max over u <= t
        first = np.r_[True, best[1:] > top[:-1]]
        where = np.maximum.accumulate(np.where(first, np.arange(n), 0))  # and the first such u
        back[k, 1:] = where[:-1]
        best = score[:, k] + np.r_[-np.inf, top[:-1]]
    steps = [int(best.argmax())]
    for k in range(K - 1, 0, -1):
        steps.append(int(back[k, steps[-1]]))
    return np.array(steps[::-1])


def recall(hits: Iterable[tuple[str, float, int]]) -> float:
    """Average recall over tasks: of the steps that a task's videos show, how many were hit.

    Args: hits: (task, steps whose second falls inside the step's time, steps shown) of each video.
    """
    hit, shown = Counter(), Counter()
    for task, right, total in hits:
        hit[task] += right
        shown[task] += total
    return float(np.mean([hit[task] / shown[task] for task in shown]))


def zero_shot_retrieval(
    model: VLM, tokenizer: Tokenizer, features: FeatureStore, clips: list[Clip]
) -> dict[str, dict[str, float]]:
    """Retrieve clips by their texts without any training for it.

    Returns: {"dot product": metrics, "centred cosine": metrics, "chance": metrics}.
    """
    text, video = embed_clips(model, tokenizer, features, clips)
    return {
        "dot product": retrieval(text, video),
        "centred cosine": retrieval(*centre(model, text, video)),
        "chance": retrieval_chance(len(clips)),
    }


# ---------------------------------------------------------------------------------------------
# The five tasks: a model's answers to items, and their score


@dataclass
class Answers:
    """How a model did: `rows` of metrics by name, the first one the paper's protocol.

    predictions: what goes to --predictions. errors: (what was asked, wrong, right) texts.
    """

    rows: dict[str, dict[str, float]]
    predictions: object
    errors: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Options:
    """How to answer: captions' search and tokenizer, the stride of windows (seconds)."""

    beams: int = 5
    max_new_tokens: int = 24
    tokenizer: str = "bert"
    meteor_data: str | None = None
    stride: int = 16

    def __post_init__(self):
        if self.meteor_data:
            meteor_files(self.meteor_data)  # a folder without them is named now, not after the work


def answer_retrieval(model, tokenizer, features, items: list[Item], options: Options) -> Answers:
    """Find each sentence's clip among all (sec. 4.1)."""
    clips = [item.clip for item in items]
    both = spaces(model, *embed_clips(model, tokenizer, features, clips))
    text, video = both["dot product"]
    predictions, errors = [], []
    for i in range(0, len(clips), 1024):
        top = (text[i : i + 1024] @ video.T).topk(min(10, len(clips))).indices.tolist()
        for clip, found in zip(clips[i : i + 1024], top, strict=True):
            best = clips[found[0]]
            ids = [name(clips[j]) for j in found]
            predictions.append({"text": clip.text, "video": name(clip), "top": ids})
            if best != clip:
                errors.append((clip.text, best.text, clip.text))
    return Answers({k: retrieval(*pair) for k, pair in both.items()}, predictions, errors)


def answer_qa(model, tokenizer, features, items: list[Item], options: Options) -> Answers:
    """Choose the answer most similar to the video (sec. 4.4); a tie is wrong.

    Raises: ValueError for a similarity that is NaN or infinite.
    """
    texts = [text for item in items for text in item.texts]
    _, video = embed_clips(model, tokenizer, features, [item.clip for item in items])
    counts = torch.tensor([len(item.texts) for item in items])
    video = video.repeat_interleave(counts, 0)  # row i: the video that answer i is about
    rows, predictions, errors = {}, [], []
    for space, (t, v) in spaces(model, embed_texts(model, tokenizer, texts), video).items():
        score = (t.double() * v.double()).sum(1)
        if not score.isfinite().all():
            raise ValueError("an answer has a similarity that is NaN or infinite")
        right = 0
        for item, s in zip(items, score.split(counts.tolist()), strict=True):
            own = s[item.right]
            right += int(as_good(s, own).sum()) == 1  # a tie counts against the model
            if not rows:
                guess = int(s.argmax())
                predictions.append({"video": item.clip.video, "answer": guess})
                if guess != item.right:
                    errors.append((item.clip.video, item.texts[guess], item.texts[item.right]))
        rows[space] = {"accuracy": right / len(items)}
    return Answers(rows, predictions, errors)


@torch.no_grad()
def answer_segmentation(model, tokenizer, features, items, options: Options) -> Answers:
    """Label every second of whole videos (sec. 4.2); names of labels are COIN's ids."""
    guesses = []
    for item in items:
        logits = model.segment(*whole(model, features, item.clip.video), options.stride)
        guesses.append(logits[0].argmax(1).cpu().numpy())
    labels = model.config.labels or [str(k) for k in range(model.config.num_labels)]
    predictions = {
        item.clip.video: [labels[k] for k in guess]
        for item, guess in zip(items, guesses, strict=True)
    }
    truths = [item.truth for item in items]
    wrong = Counter()
    for guess, truth in zip(guesses, truths, strict=True):
        wrong.update(zip(guess[guess != truth], truth[guess != truth], strict=True))
    shown = [*(x or "background" for x in labels), "unknown label"]
    errors = [(f"{seconds} seconds", shown[a], shown[b]) for (a, b), seconds in wrong.most_common()]
    return Answers({"model": segmentation(guesses, truths)}, predictions, errors)


@torch.no_grad()
def answer_localization(model, tokenizer, features, items, options: Options) -> Answers:
    """Find the second of each step of a video's task (sec. 4.3).

    A second's dot products with the steps become log-probabilities over steps, and every step gets
    one second, in order. "any order" takes each step's best second instead. NaN: ValueError.
    """
    said = list(dict.fromkeys(text for item in items for text in item.texts))
    e = dict(zip(said, embed_texts(model, tokenizer, said), strict=True))
    hits, predictions, errors = {}, {}, []
    for item in items:
        steps = torch.stack([e[text] for text in item.texts])  # (S, D)
        h = read_video(model, features, item.clip.video, options.stride).float().cpu()  # (n, D)
        n, S = item.truth.shape
        for space, (t, v) in spaces(model, steps, h).items():
            log_p = (v.double() @ t.double().T).log_softmax(1).numpy()  # (n, S)
            if not np.isfinite(log_p).all():
                raise ValueError(f"{item.clip.video}: a similarity is NaN or infinite")
            # fewer seconds than steps: no assignment in order exists, every step is missed
            found = {"": assign(log_p) if n >= S else None, ", any order": log_p.argmax(0)}
            for order, seconds in found.items():
                right = 0 if seconds is None else item.truth[seconds, range(S)].sum()
                row = (item.clip.key, right, item.truth.any(0).sum())
                hits.setdefault(space + order, []).append(row)
            if space == "dot product" and n >= S:
                video = f"{item.clip.key}_{item.clip.video}"
                predictions[video] = found[""].tolist()
                for s, second in enumerate(found[""]):
                    if item.truth[:, s].any() and not item.truth[second, s]:
                        when = np.flatnonzero(item.truth[:, s])
                        where = f"{when[0]}-{when[-1] + 1} s"
                        said = f"{video}: {item.texts[s]}"
                        errors.append((said, f"{second}-{second + 1} s", where))
    rows = {name: {"recall": recall(h)} for name, h in hits.items()}
    return Answers(rows, predictions, errors)


@torch.no_grad()
def answer_captioning(model, tokenizer, features, items, options: Options) -> Answers:
    """Caption clips (sec. 4.5) and score them against all references of each."""
    device, said = model.video_mean.device, []
    for i in range(0, len(items), 32):
        batch = pairs(features, [x.clip for x in items[i : i + 32]], tokenizer, model.config)
        video = batch.video.to(device), batch.video_valid.to(device)
        said += model.generate(*video, options.beams, options.max_new_tokens)
    texts = [tokenizer.decode(ids) for ids in said]
    rows = {"model": score_captions(items, texts, tokenizer, options)}
    predictions = [
        {"image_id": name(item.clip), "caption": text}
        for item, text in zip(items, texts, strict=True)
    ]
    errors = [
        (name(item.clip), text, item.texts[0])
        for item, text in zip(items, texts, strict=True)
        if text not in item.texts
    ]
    return Answers(rows, predictions, errors)


def score_captions(items: list[Item], texts: list[str], tokenizer, options: Options) -> dict:
    """Score one caption for each item (Table 7): BLEU-3, BLEU-4, METEOR, ROUGE-L, CIDEr."""
    names = [name(item.clip) for item in items]
    assert len(set(names)) == len(names), "two clips of one name would be scored as one"
    found = caption_scores(
        {x: list(item.texts) for x, item in zip(names, items, strict=True)},
        dict(zip(names, texts, strict=True)),
        options.tokenizer,
        word_pieces=tokenizer,
        meteor_data=options.meteor_data,
    )
    return {k: v for k, v in found.items() if k not in ("BLEU-1", "BLEU-2")}


def name(clip: Clip) -> str:
    """Name a clip: its video, or its segment of the video."""
    return f"{clip.video}_{clip.key}" if clip.key else clip.video


ANSWER = {
    "retrieval": answer_retrieval,
    "qa": answer_qa,
    "segmentation": answer_segmentation,
    "localization": answer_localization,
    "captioning": answer_captioning,
}


# ---------------------------------------------------------------------------------------------
# Beside the model: chance, the constant predictor, the paper

PAPER = {  # percentages as fractions; median rank and CIDEr as they are
    # Table 2, text-to-video retrieval on MSR-VTT; Table 3 on YouCook2
    ("retrieval", "msrvtt"): {"R@1": 0.281, "R@5": 0.555, "R@10": 0.674, "median rank": 4},
    ("retrieval", "youcook2"): {"R@1": 0.2705, "R@5": 0.5688, "R@10": 0.6938, "median rank": 4},
    ("qa", "msrvtt"): {"accuracy": 0.9164},  # Table 6
    ("segmentation", "coin"): {"frame accuracy": 0.6839},  # Table 4
    ("localization", "crosstask"): {"recall": 0.465},  # Table 5
    ("captioning", "youcook2"): {  # Table 7
        "BLEU-3": 0.1778, "BLEU-4": 0.1227, "METEOR": 0.1822, "ROUGE-L": 0.4151, "CIDEr": 1.3869
    },
}  # fmt: skip
ZERO_SHOT = {("localization", "crosstask"): {"recall": 0.285}}


def chance(task: Task, tokenizer: Tokenizer, options: Options) -> dict[str, float]:
    """Return what guessing scores on the test items."""
    items, rng = task.test, np.random.default_rng(0)
    if task.name == "retrieval":
        return retrieval_chance(len(items))
    if task.name == "qa":
        return {"accuracy": float(np.mean([1 / len(item.texts) for item in items]))}
    if task.name == "segmentation":  # any label equally likely, whatever is shown
        metrics = segmentation([x.truth for x in items], [x.truth for x in items])
        return {k: 1 / len(task.labels) for k in metrics}
    if task.name == "localization":  # a random second for each step
        return {
            "recall": recall(
                (x.clip.key, x.truth.mean(0).sum(), x.truth.any(0).sum()) for x in items
            )
        }
    said = [item.clip.text for group in task.train for item in group]
    said = said or [""]
    texts = [said[i] for i in rng.integers(len(said), size=len(items))]  # any training sentence
    return score_captions(items, texts, tokenizer, options)


def commonest(task: Task) -> int:
    """Find the commonest label of segmentation's training seconds, each counted once; else 0."""
    seen, seconds = {}, np.zeros(max(1, len(task.labels)), dtype=int)
    for item in (item for group in task.train for item in group):
        fresh = item.truth[max(0, seen.get(item.clip.video, 0) - int(item.clip.start)) :]
        seen[item.clip.video] = int(item.clip.end)  # windows overlap, in order
        # labels that the model does not know, K, are none that it could say
        seconds += np.bincount(fresh, minlength=len(seconds))[: len(seconds)]
    return int(seconds.argmax())


def constant(task: Task, tokenizer: Tokenizer, options: Options) -> tuple[str, dict[str, float]]:
    """Return a predictor that does not look at the video: (what it does, its score)."""
    items = task.test
    if task.name == "retrieval":
        return "one order of clips for all texts", retrieval_chance(len(items))
    if task.name == "qa":
        right = Counter(item.right for item in items).most_common(1)[0]
        return f"always answer {right[0]}", {"accuracy": right[1] / len(items)}
    if task.name == "segmentation":
        truths = [item.truth for item in items]
        k = commonest(task)
        what = f"always {task.labels[k]}" if k else "background only"
        return what, segmentation([np.full_like(t, k) for t in truths], truths)
    if task.name == "localization":  # steps spread evenly over the video, in order
        hits = []
        for x in items:
            n, S = x.truth.shape
            seconds = np.minimum(np.round((np.arange(S) + 0.5) * n / S), n - 1).astype(int)
            hits.append((x.clip.key, x.truth[seconds, range(S)].sum(), x.truth.any(0).sum()))
        return "steps spread evenly", {"recall": recall(hits)}
    said = Counter(item.clip.text for group in task.train for item in group)
    text = said.most_common(1)[0][0] if said else ""
    found = score_captions(items, [text] * len(items), tokenizer, options)
    return "the commonest training sentence", found


@dataclass
class Report:
    """One table: the model's rows, chance, the constant predictor and the paper's own row."""

    task: str
    dataset: str
    n: int
    stage: str
    answers: Answers
    chance: dict[str, float]
    constant: dict[str, float]
    constant_name: str
    paper: dict[str, float]
    note: str
    split: str  # of localization: the paper's row is the authors'

    @property
    def model(self) -> dict[str, float]:
        """The row of the paper's protocol."""
        return next(iter(self.answers.rows.values()))

    def to_json(self) -> dict:
        """Return what --json writes (percentages as fractions)."""
        rows = {"model": self.model, "chance": self.chance, "constant": self.constant}
        rows |= {"paper": self.paper}
        out = {"task": self.task, "dataset": self.dataset, "n": self.n, "stage": self.stage}
        out |= {name: known(row) for name, row in rows.items()}
        return out | {"rows": {name: known(row) for name, row in self.answers.rows.items()}}

    def __str__(self) -> str:
        rows = {k if k != "model" else "this model": v for k, v in self.answers.rows.items()} | {
            "chance": self.chance,
            self.constant_name: self.constant,
        }
        if self.paper:
            on = "other videos" if self.split == "val" else "real data"
            rows[f"the paper's model, {on}"] = self.paper
        columns = list(self.model)
        columns += [c for c in self.paper if c not in columns]
        wide = max(map(len, rows))
        head = f"{self.task} on {self.dataset}, {self.n} items, {self.stage}{self.note}"
        lines = [head, " " * wide + "".join(f"  {c}" for c in columns)]
        for title, row in rows.items():
            cells = (f"{row[c]:.3f}" if c in row else "-" for c in columns)
            lines.append(title.ljust(wide) + "".join(
                f"  {x:>{len(c)}}" for x, c in zip(cells, columns, strict=True)
            ))  # fmt: skip
        return "\n".join(lines)


def known(row: dict[str, float]) -> dict[str, float | None]:
    """Write what could not be measured (NaN) as None, for JSON has no NaN."""
    return {k: None if x != x else x for k, x in row.items()}


def evaluate(model: VLM, tokenizer: Tokenizer, task: Task, options: Options) -> Report:
    """Answer a task's test items and set the score beside chance, a constant and the paper.

    Raises: ValueError for segmentation by a run without a classifier, or with another one.
    """
    c = model.config
    if task.name == "segmentation" and not c.num_labels:
        raise ValueError("this run has no classifier: torchrun finetune.py segmentation makes one")
    if task.name == "segmentation" and c.num_labels != len(task.labels):
        raise ValueError(f"this run tells {c.num_labels} labels apart, the data has "
                         f"{len(task.labels)}: they are not a pair")  # fmt: skip
    model.eval()
    answers = ANSWER[task.name](model, tokenizer, task.features, task.test, options)
    key = task.name, task.dataset
    fine_tuned = c.stage == "fine-tuned"
    stage = f"fine-tuned for {c.task}" if fine_tuned else f"{c.stage}, not fine-tuned"
    text, row = constant(task, tokenizer, options)
    return Report(
        task.name,
        task.dataset,
        len(task.test),
        stage,
        answers,
        chance(task, tokenizer, options),
        row,
        text,
        PAPER.get(key, {}) if fine_tuned else ZERO_SHOT.get(key, {}),
        f", tokenizer {options.tokenizer}" if task.name == "captioning" else "",
        task.split,
    )


def error_table(report: Report, n: int) -> str:
    """Write rows as Table 10 and Table 11 do (sec. 5.5.1): question, the model's answer, truth."""
    head = {
        "retrieval": ("query", "text of the clip that came first", "its own"),
        "qa": ("video", "chosen", "right"),
        "segmentation": ("how long", "label", "truth"),
        "localization": ("step", "found at", "shown at"),
        "captioning": ("clip", "hypothesis", "reference"),
    }[report.task]
    rows = report.answers.errors
    lines = [f"{len(rows)} errors, the first {min(n, len(rows))}"]
    for row in rows[:n]:
        columns = zip(head, row, strict=True)
        if report.task == "retrieval":
            columns = list(columns)[:2]
        lines.append("\n".join(f"  {title:>{max(map(len, head))}}  {x}" for title, x in columns))
    return "\n\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The pre-training loss on held-out videos, beside what no model is needed for


@torch.no_grad()
def validate(
    model: VLM, corpus: Corpus, loss: str, batch: int, mmm: float, ranks, batches: int = 8
) -> dict[str, dict[str, float]]:
    """Measure the pre-training loss on fixed clips beside the best constant predictors.

    Args:    corpus: held-out videos. loss: "vlm" or "mfm-mlm". batch: clips over all ranks.
             mmm: share of clips that lose a whole modality; at 1 every hidden token has to be read
             from the other modality. ranks: ranks.Ranks. batches: how many.
    Returns: nats a token, {"model" | "constant" | "chance": {"video", "text", "loss"}}. Constant:
             one prediction for all words (their own frequencies in these very clips, so that no
             other can beat it) and one for all seconds (the mean video token, at the best of
             several scales, against V' alone). Chance: all candidates equally likely.
    """
    was_training = model.training
    model.eval()
    corpus = dataclasses.replace(corpus, seed=0, mmm=mmm)
    device = model.video_mean.device
    scales = (0, 0.01, 0.03, 0.1, 0.3, 1.0)
    sums = torch.zeros(6 + len(scales), dtype=torch.float64, device=device)
    words = torch.zeros(model.config.vocab_size, dtype=torch.float64, device=device)
    for step in range(batches):
        b = ranks.every(lambda n=step: corpus.step(n, batch, ranks.rank, ranks.world)).to(device)
        part = model.pretrain_loss(b, loss, ranks.gather)
        words += torch.bincount(b.text_target[b.text_hidden], minlength=len(words))
        own, hidden = model.videomlp(b.video[b.video_valid]), b.video_hidden[b.video_valid]
        pool = ranks.gather(own[~hidden])  # V'
        # a small batch may show no second at all: nothing is then the mean, not 0 / 0
        mean = (pool.sum(0) / max(1, len(pool))).expand(int(hidden.sum()), -1)
        row = [part.video_sum, part.video_count, part.text_sum, part.text_count]
        row += [part.video_count * part.video_chance, part.text_count * part.text_chance]
        row += [nce(scale * mean, [pool], own[hidden]).sum() for scale in scales]
        sums += torch.stack([x.double() for x in row])
    model.train(was_training)
    ranks.sum(sums)
    chances = (sums[4:6] / sums[[1, 3]].clamp(min=1)).tolist()  # V' differs from batch to batch
    whole = LossSums(*sums[:4], *chances, part.joint)
    share = ranks.sum(words) / words.sum().clamp(min=1)
    text_sum = -torch.special.xlogy(share, share).sum() * whole.text_count
    constant = dataclasses.replace(whole, video_sum=sums[6:].min(), text_sum=text_sum)
    chance = {"video": chances[0], "text": chances[1], "loss": whole.chance()}
    return {"model": whole.means(), "constant": constant.means(), "chance": chance}


QUESTION = 8  # word pieces of the texts that text_mean averages: the shortest clips' (sec. 5.2)


def beginnings(text: Tensor, text_valid: Tensor, sep: int, n: int) -> tuple[Tensor, Tensor]:
    """Cut texts to their first n word pieces and [SEP].

    Args: text (B, T) int64 with its [SEP], whose id is sep; text_valid (B, T) bool.

    >>> [x.tolist() for x in beginnings(torch.tensor([[7, 8, 9, 3]]), torch.ones(1, 4) > 0, 3, 2)]
    [[[7, 8, 3]], [[True, True, True]]]
    """
    text, text_valid = text[:, : n + 1], text_valid[:, : n + 1]
    last = torch.arange(text.shape[1], device=text.device) == text_valid.sum(1, keepdim=True) - 1
    return text.masked_fill(last, sep), text_valid


@torch.no_grad()
def set_means(model: VLM, corpus: Corpus, clips: int = 2048) -> None:
    """Fill the means of embed_video and embed_text over training clips, for the centred cosine.

    Their texts are cut to the length of a question. An embedding also tells how long its text is: a
    narration's 8 to 64 pieces have another mean than a sentence's few, and that difference, which
    has another direction in every run, would stay in all questions and outweigh what they ask.
    """
    model.eval()
    corpus = dataclasses.replace(corpus, mmm=0.0, clips_per_video=1)  # of as many videos as may be
    device = model.video_mean.device
    text, video = [], []
    for step in range(clips // 64):
        batch = corpus.step(step, 64).to(device)
        whole = batch.text_target, batch.text_valid
        text.append(model.embed_text(*beginnings(*whole, model.config.sep_token_id, QUESTION)))
        video.append(model.embed_video(batch.video, batch.video_valid))
    model.text_mean.copy_(torch.cat(text).mean(0))
    model.video_mean.copy_(torch.cat(video).mean(0))


# ---------------------------------------------------------------------------------------------
# python eval.py TASK | captions | masks | sequence | heads | space | curves | search


def add_task_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Declare one task's flags."""
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--run", required=True, metavar="RUN", help="run directory, of train.py or finetune.py")
    add("--data", required=True, metavar="DIR", help="folder laid out as data.py says")
    add("--features", metavar="DIR|FILE", help="features elsewhere than in DATA")
    if len(DATASETS[name]) > 1:
        add("--dataset", choices=DATASETS[name], help="the benchmark (default: the first there)")
    add("--skip-bad", action="store_true", help="leave bad rows out, counted, instead of stopping")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1 .. (default: cuda if there is one)")  # fmt: skip
    if name in ("segmentation", "localization"):
        how = "seconds from one window to the next (default: the paper's 16)"
        add("--stride", type=int, default=16, metavar="N", help=how)
    if name == "localization":
        how = "test by videos_val.csv, or as the authors do by all but those and 30 a task, for "
        how += "Table 5 (default: what RUN was trained beside, else val)"
        add("--split", choices=SPLITS, help=how)
    if name == "captioning":
        how = "beams, 1: greedy search (default: 5, the authors')"
        add("--beams", type=int, default=5, metavar="N", help=how)
        how = "longest caption in word pieces (default: 24; the authors' 24 count three prompt ids)"
        add("--max-new-tokens", type=int, default=24, metavar="N", help=how)
        how = "how texts become words: as the authors' (default: bert), COCO's, nlg-eval's"
        add("--tokenizer", choices=("bert", "ptb", "space"), default="bert", help=how)
        add("--meteor-data", metavar="DIR", help="METEOR's word lists (default: pycocoevalcap's)")
    add = parser.add_argument_group("what is written").add_argument
    add("--errors", type=int, default=0, metavar="N", help="mistakes to print (default: 0)")
    add("--predictions", metavar="FILE", help="write all answers to this file as JSON")
    add("--json", metavar="FILE", help="write the table to this file as JSON")


def task_command(name: str, args: argparse.Namespace) -> int:
    """Evaluate a run on one task."""
    can_write(args.predictions, "--predictions")
    can_write(args.json, "--json")
    model, tokenizer = load_run(args.run, args.device)
    features = fitting_features(args, model)
    c = model.config
    split = getattr(args, "split", None) or (c.split.split() or ["val"])[0]  # "authors 540 (..)"
    task = open_task(name, args.data, features, getattr(args, "dataset", None), args.skip_bad,
                     labels=c.labels, split=split)  # fmt: skip
    print("\n".join(task.said))
    refuse_seen(task, c, args.run)
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Options)}
    options = Options(**{k: v for k, v in given.items() if v is not None})
    report = evaluate(model, tokenizer, task, options)
    print(f"\n{report}")
    if args.errors:
        print(f"\n{error_table(report, args.errors)}")
    write_json(args.predictions, report.answers.predictions, indent=None)
    write_json(args.json, report.to_json())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one of this file's commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str, example: str) -> argparse.ArgumentParser:
        example = f"example: python eval.py {name} {example}"
        return commands.add_parser(name, allow_abbrev=False, help=about, description=about,
                                   epilog=example, formatter_class=raw)  # fmt: skip

    for name in DATASETS:
        about = ANSWER[name].__doc__.split("\n")[0]
        a = command(name, about, f"--run runs/toy-{name} --data toy --errors 5")
        add_task_arguments(a, name)
    a = command("captions", "Score captions from files.", captions.EXAMPLE)
    captions.add_arguments(a)
    for name, about in pictures.PICTURES.items():
        example = "" if name == "masks" else "--run runs/toy "
        example += "" if name in ("masks", "curves") else "--data toy "
        a = command(name, about, f"{example}--plot {name}.png")
        pictures.add_arguments(a, name)
    a = command("search", "Find moments by a sentence.", search.EXAMPLE)
    search.add_arguments(a)
    args = parser.parse_args(argv)
    if args.command == "captions":
        return captions.command(args)
    if args.command == "search":
        return search.command(args)
    if args.command in pictures.PICTURES:
        return pictures.command(args.command, args)
    return task_command(args.command, args)


if __name__ == "__main__":
    run(main)
