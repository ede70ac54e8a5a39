"""Caption metrics (Table 7): BLEU, ROUGE-L, CIDEr-D and METEOR as the published scorers count.

    tokenizer   who reads captions so           what reaches the scorers
    ptb         COCO's evaluation               Penn Treebank tokens, lower-cased, without marks
    space       nlg-eval                        what stands between spaces, nothing changed
    bert        the paper, with nlg-eval        decoded word pieces, most marks glued to words

Three readings of one caption give three different numbers: every table says which one it used.
Read from top to bottom: tokenizers, BLEU, ROUGE-L, CIDEr-D, all metrics of a set of captions, the
command; METEOR and the Penn Treebank's tokens have files of their own, meteor.py and ptb.py.

    python eval.py captions --references R.json --hypotheses H.json     (4 s for 3,000 captions)

METEOR wants the word lists of the package pycocoevalcap (pip install --no-deps pycocoevalcap) or
--meteor-data; without them it is called "METEOR (exact+stem)" wherever it stands.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import HALF, LONGEST_TEXT, DataError, read_json, shown
from meteor import NO_LISTS, look_up, meteor_scores, word_lists
from ptb import ptb_tokenize

TOKENIZERS = ("ptb", "space", "bert")

# ---------------------------------------------------------------------------------------------
# Word pieces, as the paper's code reads them back


def bert_decode(text: str, word_pieces: Tokenizer, most: int | None = None) -> str:
    """Encode and decode a text by the model's tokenizer, marks glued on as the paper's code did.

    Args:    most: how many word pieces are kept; None keeps all.
    Returns: lower-cased text without accents and without the special tokens, [UNK] among them.
    """
    pieces = word_pieces.encode(text, add_special_tokens=False).tokens[:most]
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    text = " ".join(piece for piece in pieces if piece not in special).replace(" ##", "")
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1])
    text = text.replace(" ' ", "'")
    for ending in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(ending, ending[1:])
    return text


# ---------------------------------------------------------------------------------------------
# N-grams, counted once for BLEU and CIDEr-D


@dataclass
class Counts:
    """How often each n-gram of one order occurs in each text: three arrays, one row a pair.

    text: index of the text, hypotheses first (item i is text i), then all references. gram: a
    number that stands for the n-gram. times: how often. `grams` is how many numbers there are.
    """

    text: np.ndarray
    gram: np.ndarray
    times: np.ndarray
    grams: int


def count_ngrams(texts: list[list[str]], orders: int = 4) -> list[Counts]:
    """Count the n-grams of each text for n = 1..orders, words turned into numbers.

    >>> one, two = count_ngrams([["a", "b", "a"], ["a"]], orders=2)
    >>> one.text.tolist(), one.gram.tolist(), one.times.tolist()  # a twice and b in text 0, then a
    ([0, 0, 1], [0, 1, 0], [2, 1, 1])
    >>> two.text.tolist(), two.times.tolist()  # a b and b a
    ([0, 0], [1, 1])
    """
    flat = list(chain.from_iterable(texts))
    number = {word: i for i, word in enumerate(dict.fromkeys(flat))}
    word = np.fromiter(map(number.__getitem__, flat), np.int64, len(flat))
    length = np.fromiter(map(len, texts), np.int64, len(texts))
    text = np.repeat(np.arange(len(texts)), length)
    left = np.repeat(np.cumsum(length), length) - np.arange(len(flat))  # words up to its end
    start, gram, out = np.arange(len(flat)), word, []
    for n in range(1, orders + 1):
        if n > 1:  # an n-gram is an (n-1)-gram and a word; renumbered, so that numbers stay small
            keep = left[start] >= n
            start, gram = start[keep], gram[keep]
            gram = np.unique(gram * len(number) + word[start + n - 1], return_inverse=True)[1]
        grams = int(gram.max(initial=-1)) + 1
        pair, times = np.unique(text[start] * grams + gram, return_counts=True)
        out.append(Counts(pair // max(grams, 1), pair % max(grams, 1), times, grams))
    return out


# ---------------------------------------------------------------------------------------------
# BLEU (Papineni et al., ACL 2002)


def bleu(
    hypotheses: list[str], references: list[list[str]], counts: list[Counts] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Score BLEU-1..4: clipped n-gram precision, times a penalty for short hypotheses.

        p_n    = sum min(count in hypothesis, most in one reference) / n-grams of hypotheses
        BLEU-k = min(1, exp(1 - r/c)) * (p_1 * .. * p_k) ** (1/k)

    c is the hypotheses' length; r the references', each item's closest to its hypothesis and the
    shorter on ties. The corpus has one fraction p_n for all items together.

    Args:    hypotheses, references: words between spaces. counts: count_ngrams of hypotheses and
             then references, when they are counted already.
    Returns: (4,) for the corpus and (N, 4) for the items.

    >>> corpus, items = bleu(["the the the cat"], [["the cat sat", "the cat is on the mat"]])
    >>> items.round(4).tolist()  # p = 3/4, 1/3, 0/2, 0/1; r/c = 3/4, so no penalty
    [[0.75, 0.5, 0.0, 0.0]]
    """
    words = [h.split() for h in hypotheses], [[r.split() for r in refs] for refs in references]
    counts = counts or count_ngrams(words[0] + list(chain.from_iterable(words[1])))
    N, c = len(hypotheses), np.array([len(h) for h in words[0]])
    r = [min((abs(len(x) - n), len(x)) for x in xs)[1] for n, xs in zip(c, words[1], strict=True)]
    item = _items(references)
    correct = np.zeros((N, 4), np.int64)
    for n, count in enumerate(counts):
        ours = count.text < N
        key = item[count.text] * count.grams + count.gram
        pair, where = np.unique(key[~ours], return_inverse=True)
        most = np.zeros(len(pair), np.int64)
        np.maximum.at(most, where, count.times[~ours])
        clipped = np.minimum(count.times[ours], look_up(key[ours], pair, most))
        correct[:, n] = np.bincount(count.text[ours], clipped, N)
    guess = np.maximum(0, c[:, None] - np.arange(4))
    r = np.array(r)
    corpus = _bleu(*(x.sum(0, keepdims=True) for x in (correct, guess, c, r)))[0]
    return corpus, _bleu(correct, guess, c, r)


def _items(references: list[list[str]]) -> np.ndarray:
    """Tell which item each text belongs to, hypotheses first and then all references."""
    N = np.arange(len(references))
    return np.concatenate([N, np.repeat(N, [len(refs) for refs in references])])


def _bleu(correct: np.ndarray, guess: np.ndarray, c: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Put the counts (N, 4), (N, 4), (N,), (N,) together; the small terms are COCO's own."""
    score = np.cumprod((correct + 1e-15) / (guess + 1e-9), 1) ** (1 / np.arange(1, 5))
    ratio = (c + 1e-15) / (r + 1e-9)
    return score * np.exp(np.minimum(0, 1 - 1 / ratio))[:, None]


# ---------------------------------------------------------------------------------------------
# ROUGE-L (Lin, 2004)


def common_words(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence, a column of the table at a time.

    Bit k of `flat` is 0 where the column's length grows between its rows k and k+1; the addition
    carries each match to where the next growth stood (Hyyrö, 2004).

    >>> common_words("mix the rice with oil".split(), "the rice and oil mix".split())
    3
    """
    where: dict[str, int] = {}
    for k, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << k
    flat = every = (1 << len(b)) - 1
    for word in a:
        if word in where:
            match = flat & where[word]
            flat = (flat + match) | (flat - match)
    return len(b) - (flat & every).bit_count()


def rouge_l(hypotheses: list[str], references: list[list[str]]) -> np.ndarray:
    """Score ROUGE-L: an F measure of the longest common subsequence, beta = 1.2.

        P = LCS / words of the hypothesis,  R = LCS / words of the reference
        F = (1 + beta^2) P R / (R + beta^2 P)

    P and R are each the best over the references, not necessarily of the same one. Words are cut at
    single spaces here: an empty caption is one empty word.

    Returns: (N,); the corpus score is their mean.

    >>> rouge_l(["mix the rice"], [["mix rice", "mix the brown rice now"]]).round(4).tolist()
    [1.0]
    """
    out = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        words, P, R = hypothesis.split(" "), 0.0, 0.0
        for ref in refs:
            others = ref.split(" ")
            lcs = common_words(words, others)
            P, R = max(P, lcs / len(words)), max(R, lcs / len(others))
        out.append((1 + 1.2**2) * P * R / (R + 1.2**2 * P) if P and R else 0.0)
    return np.array(out)


# ---------------------------------------------------------------------------------------------
# CIDEr-D (Vedantam et al., CVPR 2015)


def cider_d(
    hypotheses: list[str], references: list[list[str]], counts: list[Counts] | None = None
) -> np.ndarray:
    """Score CIDEr-D: cosines of n-gram vectors in which common n-grams weigh little.

        g(n-gram) = times in the text * (ln N - ln(items whose references hold it, at least 1))
        CIDEr_n   = mean over references of exp(-(l_h - l_r)^2 / (2 * 6^2))
                    * sum min(g_h, g_r) g_r / (|g_h| |g_r|)
        CIDEr-D   = 10 * mean of CIDEr_1 .. CIDEr_4

    N is the number of items: the score of one item depends on all others, and N = 1 scores 0. The
    length l of a text is its number of bigrams, as in the published scorer.

    Returns: (N,) between 0 and 10; the corpus score is their mean.

    >>> two = ["stir the rice now", "cut one onion here"]
    >>> cider_d(two, [[two[0]], [two[1]]]).tolist(), cider_d(two[:1], [two[:1]]).tolist()
    ([10.0, 10.0], [0.0])
    """
    texts = [*hypotheses, *chain.from_iterable(references)]
    counts = counts or count_ngrams([text.split() for text in texts])
    N, T, item = len(hypotheses), len(texts), _items(references)
    length = np.bincount(counts[1].text, counts[1].times, T)
    near = np.exp(-((length[item] - length) ** 2) / (2 * 6.0**2))  # item i's hypothesis is text i
    total = np.zeros(T)
    for count in counts:
        ours = count.text < N
        key = item[count.text] * count.grams + count.gram
        seen = np.bincount(np.unique(key[~ours]) % max(count.grams, 1), minlength=count.grams)
        idf = np.log(float(N)) - np.log(np.maximum(1.0, seen))
        g = count.times * idf[count.gram]
        norm = np.sqrt(np.bincount(count.text, g * g, T))
        g_r, text = g[~ours], count.text[~ours]
        g_h = look_up(key[~ours], key[ours], g[ours])
        dot = np.bincount(text, np.minimum(g_h, g_r) * g_r, T)
        scale = norm[item] * norm
        total += near * np.divide(dot, scale, out=np.zeros(T), where=scale > 0)
    per_item = np.bincount(item[N:], total[N:], N) / np.bincount(item[N:], minlength=N)
    return per_item / 4 * 10


# ---------------------------------------------------------------------------------------------
# All metrics of a set of captions

MOST_PIECES = 61  # of a reference in the paper's code: 96 positions - 32 seconds - 3 special tokens


def check_captions(references: dict[str, list[str]], hypotheses: dict[str, str]) -> None:
    """Meet captions that cannot be scored with a DataError that names the item."""
    if not references:
        raise DataError("no captions: wanted at least one item")
    for ours, others, side in (
        (references, hypotheses, "hypotheses"),
        (hypotheses, references, "references"),
    ):
        if missing := [key for key in ours if key not in others]:
            raise DataError(f"item {missing[0]!r} is not in the {side} ({len(missing)} are not)")
    for key, refs in references.items():
        if HALF.search(key):
            raise DataError(f"item {key!r}: the name holds half a character, wanted text")
        if not isinstance(refs, list | tuple) or not refs:
            raise DataError(f"item {key!r}: references are {shown(refs)}, wanted a list of texts")
        for text in (*refs, hypotheses[key]):
            if not isinstance(text, str):
                raise DataError(f"item {key!r}: a caption is {shown(text)}, wanted a text")
            if len(text) > LONGEST_TEXT:
                raise DataError(f"item {key!r}: a caption of {len(text)} characters, wanted at "
                                f"most {LONGEST_TEXT}")  # fmt: skip
            if HALF.search(text):
                raise DataError(f"item {key!r}: {shown(text)} holds half a character, wanted text")


def read_captions(
    hypotheses: list[str],
    references: list[list[str]],
    tokenizer: str,
    word_pieces: Tokenizer | None,
) -> tuple[list[str], list[list[str]]]:
    """Bring captions into the form that the scorers read; ValueError for an unknown tokenizer."""
    flat = list(chain.from_iterable(references))
    if tokenizer == "ptb":
        flat, hypotheses = ptb_tokenize(flat), ptb_tokenize(hypotheses)
    elif tokenizer == "space":
        flat, hypotheses = ([text.strip() for text in texts] for texts in (flat, hypotheses))
    elif tokenizer != "bert":
        raise ValueError(f"tokenizer is {tokenizer!r}, wanted one of {', '.join(TOKENIZERS)}")
    elif word_pieces is None:
        raise ValueError("tokenizer 'bert' wants word_pieces, the model's tokenizer")
    else:
        flat = [bert_decode(text, word_pieces, MOST_PIECES).strip() for text in flat]
        hypotheses = [bert_decode(text, word_pieces).strip() or "none" for text in hypotheses]
    texts = iter(flat)
    return hypotheses, [[next(texts) for _ in refs] for refs in references]


def caption_scores(
    references: dict[str, list[str]],
    hypotheses: dict[str, str],
    tokenizer: str = "ptb",
    word_pieces: Tokenizer | None = None,
    meteor_data: str | Path | None = None,
    per_item: bool = False,
) -> dict:
    """Score captions against one or more references each (Table 7).

    Args:    references, hypotheses: by item, the same items. tokenizer: "ptb" as COCO, "space" as
             nlg-eval, "bert" as the paper: both sides through `word_pieces`, references cut to 61
             of them, an empty hypothesis read as "none". meteor_data: the folder of METEOR's
             files; None looks for the package pycocoevalcap.
    Returns: {"BLEU-1" .. "BLEU-4", "METEOR", "ROUGE-L", "CIDEr" (CIDEr-D, 0..10)}, fractions else;
             "METEOR (exact+stem)" in place of "METEOR" where its word lists are missing. With
             per_item also {"per item": {item: the same metrics}}.
    Raises:  DataError (a ValueError) naming the item that cannot be scored.
    """
    check_captions(references, hypotheses)
    items = list(references)
    ours, refs = [hypotheses[k] for k in items], [references[k] for k in items]
    ours, refs = read_captions(ours, refs, tokenizer, word_pieces)
    counts = count_ngrams([text.split() for text in chain(ours, *refs)])
    lists = word_lists(meteor_data)
    corpus_bleu, bleus = bleu(ours, refs, counts)
    lcs, cider = rouge_l(ours, refs), cider_d(ours, refs, counts)
    if tokenizer != "ptb":  # nlg-eval makes one space of any space before METEOR
        ours = [re.sub(r"\s+", " ", text) for text in ours]
        refs = [[re.sub(r"\s+", " ", text) for text in texts] for texts in refs]
    corpus_meteor, meteors = meteor_scores(ours, refs, lists)
    names = [*(f"BLEU-{n}" for n in range(1, 5)), "METEOR", "ROUGE-L", "CIDEr"]
    if lists is NO_LISTS:
        names[4] = "METEOR (exact+stem)"
    corpus = [*corpus_bleu, corpus_meteor, lcs.mean(), cider.mean()]
    out = dict(zip(names, map(float, corpus), strict=True))
    if per_item:
        table = np.column_stack([bleus, meteors, lcs, cider]).tolist()
        rows = (dict(zip(names, row, strict=True)) for row in table)
        out["per item"] = dict(zip(items, rows, strict=True))
    return out


# ---------------------------------------------------------------------------------------------
# python eval.py captions


def rows_by_item(path: str | Path, rows: list, item: Callable, text: str) -> dict[str, list[str]]:
    """Collect the texts of a list of {.., text: ".."}, the item's name made of each row.

    Raises: DataError naming the row without a name or a text.
    """
    out = defaultdict(list)
    for i, row in enumerate(rows):
        key = item(row) if isinstance(row, dict) else None
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise DataError(f"{path}: row {i} is {shown(row)}, wanted a name or number as its id")
        if not isinstance(row.get(text), str):
            raise DataError(f"{path}: {key!r}: {text} is {shown(row.get(text))}, wanted a text")
        out[str(key)].append(row[text])
    return dict(out)


def one_each(path: str | Path, texts: dict[str, list[str]]) -> dict[str, str]:
    """Take the one text of each item; DataError where there are more."""
    for key, found in texts.items():
        if len(found) > 1:
            raise DataError(f"{path}: {key!r} is given {len(found)} times, wanted once")
    return {key: found[0] for key, found in texts.items()}


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Read {id: [texts]}, COCO's {"annotations": [..]} or YouCook2's {"database": {..}}.

    Returns: texts by id; COCO's numbers as strings, YouCook2's segments as "<video>_<id>".
    Raises:  DataError naming the file, the item and what is wrong with it.
    """
    data = read_json(path, dict)
    rows = data.get("annotations")
    if isinstance(rows, list) and any(isinstance(row, dict) for row in rows):
        return rows_by_item(path, rows, lambda row: row.get("image_id"), "caption")
    if isinstance(data.get("database"), dict):
        out = {}
        for video, entry in data["database"].items():
            rows = entry.get("annotations") if isinstance(entry, dict) else None
            if not isinstance(rows, list):
                raise DataError(f"{path}: {video}: annotations is {shown(rows)}, wanted a list")
            found = rows_by_item(path, rows, lambda row: row.get("id"), "sentence")
            one_each(f"{path}: {video}", found)
            out |= {f"{video}_{key}": texts for key, texts in found.items()}
        return out
    for key, texts in data.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}: {key!r} has {shown(texts)}, wanted a list of texts")
        if not texts:
            raise DataError(f"{path}: {key!r} has no text, wanted at least one")
    return data


def read_hypotheses(path: str | Path) -> dict[str, str]:
    """Read {id: text} or COCO's results [{"image_id", "caption"}, ..]; ids as strings.

    Raises: DataError for another form, naming the item.
    """
    data = read_json(path, (dict, list))
    if isinstance(data, list):
        return one_each(path, rows_by_item(path, data, lambda row: row.get("image_id"), "caption"))
    for key, text in data.items():
        if not isinstance(text, str):
            raise DataError(f"{path}: {key!r} has {shown(text)}, wanted a text")
    return data


EXAMPLE = "--references R.json --hypotheses H.json --tokenizer ptb"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `captions`."""
    add = parser.add_argument_group("what is scored").add_argument
    add("--references", required=True, metavar="JSON", help="{id: [texts]}, COCO's or YouCook2's")
    add("--hypotheses", required=True, metavar="JSON", help="{id: text}, or COCO's results")
    group = parser.add_argument_group("how")
    add = group.add_argument
    add("--tokenizer", choices=TOKENIZERS, default="ptb",
        help="read captions as COCO (default: ptb), nlg-eval or the paper does")  # fmt: skip
    model = group.add_mutually_exclusive_group()
    model.add_argument("--run", metavar="RUN", help="for bert: the run whose tokenizer it is")
    model.add_argument("--vocab", metavar="FILE", help="for bert: its tokenizer.json or vocab.txt")
    add("--meteor-data", metavar="DIR", help="folder with meteor-1.5.jar and paraphrase-en.gz "
        "(default: the package pycocoevalcap)")  # fmt: skip
    add = parser.add_argument_group("what is written").add_argument
    add("--json", metavar="FILE", help="write the scores to this file as JSON")
    add("--per-item", action="store_true", help="print (and write) each item's scores, too")


def command(args: argparse.Namespace) -> int:
    """Score the captions of one file against those of another, and print the table."""
    from keep import can_write, write_json

    can_write(args.json, "--json")
    word_pieces, vocabulary = None, args.run or args.vocab
    if (args.tokenizer == "bert") != bool(vocabulary):
        raise DataError("--tokenizer bert and one of --run and --vocab go together")
    if vocabulary:
        from vlm import load_tokenizer

        word_pieces = load_tokenizer(vocabulary)
    references, hypotheses = read_references(args.references), read_hypotheses(args.hypotheses)
    both = [key for key in references if key in hypotheses]
    only = {"references": len(references) - len(both), "hypotheses": len(hypotheses) - len(both)}
    if not both:
        raise DataError(
            f"{args.hypotheses}: none of its {len(hypotheses)} ids is among the "
            f"{len(references)} of {args.references}"
        )
    scores = caption_scores(
        {key: references[key] for key in both},
        {key: hypotheses[key] for key in both},
        args.tokenizer,
        word_pieces,
        args.meteor_data,
        args.per_item,
    )
    items = scores.pop("per item", {})
    name = Path(args.references).name
    how = "with its word lists"
    if "METEOR" not in scores:
        how = "without its word lists (pip install --no-deps pycocoevalcap, or --meteor-data)"
    print(f"{name}: {len(both)} items, tokenizer {args.tokenizer}, METEOR {how}")
    if any(only.values()):
        print(f"left out: {only['references']} only in the references, "
              f"{only['hypotheses']} only in the hypotheses")  # fmt: skip
    print(scores_table(scores, items))
    found = {"task": "captions", "dataset": name, "n": len(both), "tokenizer": args.tokenizer}
    found |= {"left out": only, "model": scores} | ({"per item": items} if items else {})
    write_json(args.json, found)
    return 0


def scores_table(scores: dict[str, float], items: dict[str, dict[str, float]]) -> str:
    """Lay the scores out, the items' below the corpus'.

    >>> print(scores_table({"BLEU-1": 0.5, "CIDEr": 1.25}, {"a": {"BLEU-1": 1.0, "CIDEr": 0.0}}))
              BLEU-1     CIDEr
    corpus    0.5000    1.2500
    a         1.0000    0.0000
    """
    widths = [max(10, len(name) + 2) for name in scores]
    left = max(map(len, ["corpus", *items]))
    lines = [" " * left + "".join(f"{name:>{w}}" for name, w in zip(scores, widths, strict=True))]
    for item, row in {"corpus": scores, **items}.items():
        numbers = "".join(f"{x:{w}.4f}" for x, w in zip(row.values(), widths, strict=True))
        lines.append(f"{item:<{left}}{numbers}")
    return "\n".join(lines)
