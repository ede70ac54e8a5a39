"""Caption metrics: worked examples by hand, slow versions, and (-m coco) the published programs."""

import argparse
import contextlib
import io
import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import captions
from benchmarks import DataError
from captions import bert_decode, bleu, caption_scores, cider_d, common_words, rouge_l
from ptb import ptb_lex, ptb_tokenize

pytestmark = pytest.mark.usefixtures("own_word_lists")
WORDS = "a the man stirs stir rice in bowl , . chops chop quickly pan".split()


def sentences(rng: random.Random, n: int, most: int = 9) -> list[str]:
    """Draw sentences of few different words, so that n-grams repeat; some are empty."""
    return [" ".join(rng.choices(WORDS, k=rng.randrange(most + 1))) for _ in range(n)]


def a_set(seed: int, n: int = 40) -> tuple[list[str], list[list[str]]]:
    """Draw hypotheses and one to four references each."""
    rng = random.Random(seed)
    return sentences(rng, n), [sentences(rng, rng.randint(1, 4)) for _ in range(n)]


# ---------------------------------------------------------------------------------------------
# Tokenizers


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A man (in red) can't cook.", "a man -lrb- in red -rrb- ca n't cook ."),
        ("The chef's knife isn't sharp!", "the chef 's knife is n't sharp !"),
        ("cook 1 1/2 hours at 350°F", "cook 1\xa01/2 hours at 350 ° f"),
        ('add 10:30am 5pm 1/2" 2-1/2 -5', "add 10:30 am 5pm 1/2 '' 2-1/2 -5"),
        ("end.Start  hello..world  stir...", "end.start hello . . world stir ..."),
        ("I've y'all'd rock 'n' roll o'clock", "i 've y' all 'd rock 'n' roll o'clock"),
        ("“Hi” ‘ok’ it’s a—b 5–6", "`` hi '' ` ok ' it 's a -- b 5 -- 6"),
        ("AT&T salt&pepper 50% $5 €5", "at&t salt & pepper 50 % $ 5 $ 5"),
        ("Mr. Fox etc. a tsp. of U.S. salt", "mr. fox etc. a tsp . of u.s. salt"),
        ("cannot gonna 'twas gonnas cont'd", "can not gon na 't was gonnas cont 'd"),
        ("crème brûlée 1,000.5 stir-fry", "crème brûlée 1,000.5 stir-fry"),
        ("see www.a.com/b-c or me@b.org", "see www.a.com/b-c or me@b.org"),
        ("a <b class='x'>word</b> 😀 :-) x", "a <b\xa0class='x'> word </b> :--rrb- x"),
        ("!!! ?? , ;", "!!! ?? , ;"),
    ],
)
def test_penn_treebank_tokens(text, tokens):
    """Tokens, marks included, as the published program prints them for these lines."""
    assert " ".join(ptb_lex([text])[0]) == tokens


def test_marks_are_dropped_but_not_bracket_names():
    """The published list of marks has capitals where the tokens have small letters."""
    assert ptb_tokenize(["Stir (well), then: serve! -- ... [hot]"]) == [
        "stir -lrb- well -rrb- then serve -lsb- hot -rsb-"
    ]


def test_a_token_may_depend_on_the_next_caption():
    """An abbreviation before a new sentence loses its dot: the only look into the next line."""
    assert ptb_tokenize(["take vitamin C.", "The man eats"])[0] == "take vitamin c"
    assert ptb_tokenize(["take vitamin C.", "a man eats"])[0] == "take vitamin c."


def test_what_ends_a_line_does_not_shift_captions():
    """One caption stays one caption, whatever character of a line's end is inside it."""
    texts = [f"me@a{end}b" for end in "\n\r\x0b\x0c\x85\u2028\u2029"] + ["", "last"]
    assert ptb_tokenize(texts) == ["me@a b"] * 7 + ["", "last"]


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory):
    """Build a small uncased tokenizer."""
    file = tmp_path_factory.mktemp("pieces") / "vocab.txt"
    special = "[PAD] [UNK] [CLS] [SEP] [MASK]".split()
    words = "salt pepper stir - fry don ' t the chef s . , ! ##s ##ed creme none".split()
    file.write_text("\n".join(special + words))
    return BertWordPieceTokenizer(str(file), lowercase=True)._tokenizer


def test_bert_text_is_glued_as_in_the_papers_code(word_pieces):
    """Marks stick to the word before, apostrophes to both, hyphens stand alone; accents go."""
    text = "Salt, stirs-Fry! The chef's crème. Don't"
    want = "salt, stirs - fry! the chef's creme. don't"
    assert bert_decode(text, word_pieces) == want
    assert bert_decode("salt zebra [SEP] stir", word_pieces) == "salt stir"  # [UNK] goes, too
    assert bert_decode("salt stirs", word_pieces, 2) == "salt stir"


def test_bert_reading_cuts_references_only_and_names_an_empty_hypothesis(word_pieces):
    """61 pieces of a reference count; a hypothesis keeps all, and becomes "none" if empty."""
    ours, refs = captions.read_captions(
        ["salt " * 70, ""], [["salt " * 70], ["salt ,"]], "bert", word_pieces
    )
    assert [len(ours[0].split()), ours[1]] == [70, "none"]
    assert [len(refs[0][0].split()), refs[1][0]] == [61, "salt,"]


def test_space_reading_changes_nothing():
    """Case and marks stay, as nlg-eval reads captions."""
    refs = {"a": ["A man, a  plan."]}
    assert caption_scores(refs, {"a": " A man, a  plan. "}, "space")["ROUGE-L"] == 1
    assert caption_scores(refs, {"a": "a man a plan"}, "space")["BLEU-1"] < 0.5


# ---------------------------------------------------------------------------------------------
# BLEU, ROUGE-L, CIDEr-D


def slow_bleu(hypotheses, references):
    """Score BLEU by counting one item at a time."""

    def grams(text, n):
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def score(correct, guess, c, r):
        product, out = 1.0, []
        for k in range(4):
            product *= (correct[k] + 1e-15) / (guess[k] + 1e-9)
            out.append(product ** (1 / (k + 1)))
        ratio = (c + 1e-15) / (r + 1e-9)
        return [x * math.exp(1 - 1 / ratio) if ratio < 1 else x for x in out]

    items, sums = [], np.zeros(10)
    for text, refs in zip(hypotheses, references, strict=True):
        correct, guess, c = [], [], len(text.split())
        for n in range(1, 5):
            most = Counter()
            for ref in refs:
                most |= grams(ref, n)
            correct.append(sum((grams(text, n) & most).values()))
            guess.append(max(0, c - n + 1))
        r = min((abs(len(ref.split()) - c), len(ref.split())) for ref in refs)[1]
        items.append(score(correct, guess, c, r))
        sums += [*correct, *guess, c, r]
    return score(sums[:4], sums[4:8], sums[8], sums[9]), items


@pytest.mark.parametrize("seed", range(5))
def test_bleu_equals_counting_by_hand(seed):
    """Catches a wrong clip, reference length or product; equal but for the order of a product."""
    hypotheses, references = a_set(seed)
    corpus, items = bleu(hypotheses, references)
    want, want_items = slow_bleu(hypotheses, references)
    assert np.abs(corpus - want).max() < 1e-14
    assert np.abs(items - want_items).max() < 1e-14


def test_bleu_takes_the_shorter_of_two_references_equally_close():
    """3 words between 2 and 4: no penalty, since 2 is taken."""
    _, items = bleu(["a b c"], [["a b c d", "a b"]])
    assert items[0, 0] == pytest.approx(1, abs=1e-8)
    _, items = bleu(["a b"], [["a b c d"]])
    assert items[0, 0] == pytest.approx(math.exp(1 - 4 / 2), abs=1e-8)


def test_bleu_of_a_short_perfect_caption_is_not_one():
    """Three words have no 4-gram: 1e-15 / 1e-9 stands for its precision."""
    assert bleu(["a b c"], [["a b c"]])[1][0, 3] == pytest.approx(1e-6**0.25, rel=1e-6)


def test_common_words_equals_the_table():
    """The bit-wise column equals the plain table, also beyond 64 words."""
    rng = random.Random(0)
    for n in (0, 1, 5, 30, 150):
        a, b = rng.choices(WORDS, k=n), rng.choices(WORDS, k=n + 7)
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, j in itertools.product(range(len(a)), range(len(b))):
            up = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if a[i] == b[j] else up
        assert common_words(a, b) == table[-1, -1]


def test_rouge_takes_each_best_from_any_reference():
    """P = 2/2 by the first, R = 2/3 by both: F = 2.44 * 2/3 / (2/3 + 1.44)."""
    assert rouge_l(["a b"], [["a x b", "b c a b c"]])[0] == pytest.approx(
        2.44 * (2 / 3) / (2 / 3 + 1.44), abs=1e-15
    )
    # P from the long reference (2/2), R from the short one (1/1)
    assert rouge_l(["a b"], [["a b c d e f", "b"]])[0] == 1


def test_rouge_cuts_at_single_spaces_and_keeps_other_spaces():
    """An empty caption is one empty word; U+00A0 does not cut."""
    assert rouge_l(["", "a", "1\xa01/2"], [[""], ["", "b"], ["1\xa01/2"]]).tolist() == [1, 0, 1]
    assert bleu(["1\xa01/2"], [["1 1/2"]])[1][0, 1] == pytest.approx(
        1, abs=1e-8
    )  # but here it does


def slow_cider(hypotheses, references):
    """Score CIDEr-D from its formula, dictionaries throughout."""

    def grams(text):
        words = text.split()
        spans = ((n, i) for n in range(1, 5) for i in range(len(words) - n + 1))
        return Counter(tuple(words[i : i + n]) for n, i in spans)

    seen = Counter(g for refs in references for g in {g for ref in refs for g in grams(ref)})

    def vector(text):
        weights = [{} for _ in range(4)]
        for g, times in grams(text).items():
            idf = math.log(len(hypotheses)) - math.log(max(1, seen[g]))
            weights[len(g) - 1][g] = times * idf
        norms = [math.sqrt(sum(x * x for x in w.values())) for w in weights]
        return weights, norms, max(0, len(text.split()) - 1)

    out = []
    for text, refs in zip(hypotheses, references, strict=True):
        total, (h, h_norms, h_len) = 0.0, vector(text)
        for r, r_norms, r_len in map(vector, refs):
            for n in range(4):
                dot = sum(min(h[n][g], r[n].get(g, 0)) * r[n].get(g, 0) for g in h[n])
                if h_norms[n] and r_norms[n]:
                    near = math.exp(-((h_len - r_len) ** 2) / 72)
                    total += near * dot / (h_norms[n] * r_norms[n])
        out.append(10 * total / 4 / len(refs))
    return out


@pytest.mark.parametrize("seed", range(5))
def test_cider_equals_its_formula(seed):
    """Catches a wrong count of items, a length in words, a missing clip; tolerance: summation."""
    hypotheses, references = a_set(seed)
    want = slow_cider(hypotheses, references)
    assert max(want) > 1
    assert np.abs(cider_d(hypotheses, references) - want).max() < 1e-12


def test_cider_by_hand():
    """Two items. All words are in one item's references, weigh ln 2: cosine 1 / sqrt(2) for n = 1.

    No longer n-gram is shared, and "a b" has 1 bigram, "b" none: exp(-1 / 72) / sqrt(2) / 4 * 10.
    """
    got = cider_d(["a b", "a"], [["b"], ["a c"]])
    assert got[0] == pytest.approx(10 * math.exp(-1 / 72) / math.sqrt(2) / 4, abs=1e-12)


# ---------------------------------------------------------------------------------------------
# All metrics


EDGES = {
    "empty hypothesis": (["a man"], ""),
    "empty reference": ([""], "a man"),
    "one empty reference": (["", "a man"], "a man"),
    "both empty": ([""], ""),
    "identical": (["a man stirs rice in a bowl"], "a man stirs rice in a bowl"),
    "only marks": (["... !"], "?! --"),
    "unicode": (["“crème brûlée” – it’s ½ done…"], "créme brûlée ‘its’ ½ done 日本 😀"),
    "numbers": (["1,000 g, 2.5 oz"], "1000 g 2.5 oz"),
    "long": (["stir the rice and " * 60], "and stir the pan " * 50),
    "repeated": (["the the the the cat"], "the the the the the the the"),
    "half a word": (["s"], "'s"),
}


@pytest.mark.parametrize("tokenizer", ["ptb", "space", "bert"])
def test_edge_cases_score_between_nothing_and_all(tokenizer, word_pieces):
    """No NaN, nothing below 0 or above 1 (CIDEr 10); identical captions score 1."""
    refs, hyps = ({k: v[i] for k, v in EDGES.items()} for i in (0, 1))
    scores = caption_scores(refs, hyps, tokenizer, word_pieces, per_item=True)
    rows = scores.pop("per item")
    for row in (scores, *rows.values()):
        for name, value in row.items():
            assert 0 <= value <= (10 + 1e-9 if name == "CIDEr" else 1), (name, value)
    assert list(rows) == list(EDGES)
    if tokenizer != "bert":
        assert rows["identical"]["ROUGE-L"] == rows["identical"][list(scores)[4]] == 1
        assert rows["empty hypothesis"]["BLEU-1"] == rows["empty hypothesis"]["ROUGE-L"] == 0


def test_a_single_item_has_no_cider():
    """ln 1 = 0: every weight is 0, so is the score; not NaN."""
    assert caption_scores({"a": ["a man"]}, {"a": "a man"})["CIDEr"] == 0
    assert caption_scores({"a": [""]}, {"a": ""})["CIDEr"] == 0


@pytest.mark.parametrize(
    "references, hypotheses, message",
    [
        ({}, {}, "no captions"),
        ({"a": ["x"], "b": ["y"]}, {"a": "x"}, "item 'b' is not in the hypotheses"),
        ({"a": ["x"]}, {"a": "x", "c": "y"}, "item 'c' is not in the references"),
        ({"a": []}, {"a": "x"}, "item 'a'.*wanted a list"),
        ({"a": "x"}, {"a": "x"}, "item 'a'.*wanted a list"),
        ({"a": ["x", 3]}, {"a": "x"}, "item 'a'.*3, wanted a text"),
        ({"a": ["x"]}, {"a": None}, "item 'a'.*None, wanted a text"),
        ({"a": ["x\ud800"]}, {"a": "x"}, "item 'a'.*half a character"),
    ],
)
def test_what_cannot_be_scored_is_named(references, hypotheses, message):
    """One line that names the item, instead of an error from deep inside."""
    with pytest.raises(DataError, match=message):
        caption_scores(references, hypotheses)


def test_unknown_or_incomplete_tokenizers_are_refused():
    """An unknown name, and bert without the tokenizer of the model."""
    with pytest.raises(ValueError, match="wanted one of ptb, space, bert"):
        caption_scores({"a": ["x"]}, {"a": "x"}, "moses")
    with pytest.raises(ValueError, match="wants word_pieces"):
        caption_scores({"a": ["x"]}, {"a": "x"}, "bert")


# ---------------------------------------------------------------------------------------------
# The command


def run(tmp_path, references, hypotheses, *flags) -> int:
    """Write both files (text as it is, else JSON) and call the command."""
    for name, data in (("R.json", references), ("H.json", hypotheses)):
        text = data if isinstance(data, str | bytes) else json.dumps(data)
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    parser = argparse.ArgumentParser()
    captions.add_arguments(parser)
    files = ["--references", f"{tmp_path}/R.json", "--hypotheses", f"{tmp_path}/H.json"]
    return captions.command(parser.parse_args([*files, *flags]))


PLAIN = {"1": ["a man stirs", "he stirs"], "2": ["a pan"]}
COCO = {
    "images": [],
    "annotations": [
        {"id": 7, "image_id": 1, "caption": "a man stirs"},
        {"id": 8, "image_id": 2, "caption": "a pan"},
        {"id": 9, "image_id": 1, "caption": "he stirs"},
    ],
}
SEGMENTS = [
    {"id": 1, "segment": [0, 2], "sentence": "a man stirs"},
    {"id": 2, "segment": [3, 4], "sentence": "a pan"},
]
YOUCOOK2 = {"database": {"v": {"subset": "validation", "annotations": SEGMENTS}}}


def test_the_command_reads_all_forms_alike(tmp_path, capsys):
    """Plain and COCO files of the same captions give the same table and JSON."""
    found = []
    results = [{"image_id": 1, "caption": "a man"}, {"image_id": 2, "caption": "a pan"}]
    for refs, hyps in ((PLAIN, {"1": "a man", "2": "a pan"}), (COCO, results)):
        out = tmp_path / "out.json"
        assert run(tmp_path, refs, hyps, "--json", str(out), "--per-item") == 0
        found.append(json.loads(out.read_text()))
        text = capsys.readouterr().out
        assert "R.json: 2 items, tokenizer ptb, METEOR without" in text
        assert "METEOR (exact+stem)" in text
        assert len(text.splitlines()) == 5
    assert found[0] == found[1]
    assert found[0]["task"] == "captions" and found[0]["dataset"] == "R.json"
    assert found[0]["n"] == 2 and found[0]["tokenizer"] == "ptb"
    want = caption_scores(PLAIN, {"1": "a man", "2": "a pan"}, per_item=True)
    assert found[0]["per item"] == want.pop("per item")
    assert found[0]["model"] == want


def test_the_command_reads_youcook2_and_counts_what_is_left_out(tmp_path, capsys):
    """Segments are named <video>_<id>; ids of one file alone are counted, not scored."""
    assert run(tmp_path, YOUCOOK2, {"v_2": "a pan", "v_3": "x", "w_1": "y"}) == 0
    text = capsys.readouterr().out
    assert (
        "R.json: 1 items" in text and "1 only in the references, 2 only in the hypotheses" in text
    )


def test_the_command_loads_a_vocabulary(tmp_path, capsys):
    """--tokenizer bert reads captions by a vocab.txt."""
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nman\npan\n")
    flags = ["--tokenizer", "bert", "--vocab", f"{tmp_path}/vocab.txt"]
    assert run(tmp_path, PLAIN, {"1": "a man", "2": "A Pan"}, *flags) == 0
    assert "tokenizer bert" in capsys.readouterr().out


@pytest.mark.parametrize(
    "references, hypotheses, flags, message",
    [
        ("", {}, [], r"R\.json: is empty"),
        ("{", {}, [], r"R\.json: not JSON"),
        (b'{"a": ["\xff"]}', {}, [], r"R\.json: cannot be read as UTF-8"),
        ("[" * 100_000, {}, [], r"R\.json: not JSON"),
        ("[]", {}, [], r"R\.json: holds a list"),
        ("3", {}, [], r"R\.json: holds a int"),
        ('{"a": ["x"], "a": ["y"]}', {}, [], r"R\.json: key 'a' is given twice"),
        ({"a": "x"}, {}, [], r"R\.json: 'a' has 'x', wanted a list"),
        ({"a": [3]}, {}, [], r"R\.json: 'a' has \[3\], wanted a list"),
        ({"a": []}, {}, [], r"R\.json: 'a' has no text"),
        ({"annotations": [{"caption": "x"}]}, {}, [], r"R\.json: row 0.*wanted a name or number"),
        ({"annotations": [{"image_id": True, "caption": "x"}]}, {}, [], "row 0"),
        ({"annotations": [{"image_id": 5, "caption": 6}]}, {}, [], r"5: caption is 6, wanted"),
        ({"annotations": [{}, 3]}, {}, [], "row 0"),
        ({"database": {"v": {}}}, {}, [], r"R\.json: v: annotations is None"),
        ({"database": {"v": {"annotations": SEGMENTS[:1] * 2}}}, {}, [], "v: '1' is given 2 times"),
        (PLAIN, {"1": ["x"]}, [], r"H\.json: '1' has \['x'\], wanted a text"),
        (PLAIN, '{"1": "x", "1": "y"}', [], r"H\.json: key '1' is given twice"),
        (PLAIN, [{"image_id": 1, "caption": "x"}] * 2, [], r"H\.json: '1' is given 2 times"),
        (PLAIN, [{"image_id": i, "caption": "x"} for i in (1, "1")], [], "'1' is given 2 times"),
        (PLAIN, [3], [], r"H\.json: row 0 is 3"),
        (PLAIN, "3", [], r"H\.json: holds a int"),
        (PLAIN, {}, [], r"H\.json: none of its 0 ids"),
        (PLAIN, {"x": "y"}, [], r"H\.json: none of its 1 ids is among the 2"),
        (PLAIN, {"1": "x"}, ["--tokenizer", "bert"], "go together"),
        (PLAIN, {"1": "x"}, ["--vocab", "vocab.txt"], "go together"),
        (PLAIN, {"1": "x"}, ["--meteor-data", "nowhere"], "nowhere: wanted meteor-1.5.jar"),
        (PLAIN, {"1": "x\ud800"}, [], "half a character"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, references, hypotheses, flags, message):
    """File, key, value seen and value wanted, on one line."""
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path, references, hypotheses, *flags)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


# ---------------------------------------------------------------------------------------------
# pycocoevalcap itself (-m coco)


@pytest.fixture
def coco(java):
    """Give pycocoevalcap's scorers, or skip."""
    return coco_scores


def coco_scores(references, hypotheses, ptb=True):
    """Score with pycocoevalcap: (tokenized captions, {metric: (corpus, [each item])}).

    Without its tokenizer the scorers read captions as they are, as nlg-eval calls them.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    refs, hyps = references, {k: [hypotheses[k]] for k in references}
    if ptb:
        refs, hyps = (
            PTBTokenizer().tokenize({k: [{"caption": x} for x in v] for k, v in side.items()})
            for side in (refs, hyps)
        )
    with contextlib.redirect_stdout(io.StringIO()):
        corpus, items = Bleu(4).compute_score(refs, hyps)
        out = {f"BLEU-{n + 1}": (corpus[n], items[n]) for n in range(4)}
        for name, scorer in (("ROUGE-L", Rouge()), ("CIDEr", Cider()), ("METEOR", Meteor())):
            out[name] = scorer.compute_score(refs, hyps)
    return refs, hyps, out


def edited(text: str, other: str, rng: random.Random) -> str:
    """Change a caption: drop, swap, repeat, inflect and replace words, or put marks in."""
    words, others = text.split(), other.split()
    swaps = dict(pan="skillet", add="put", mix="stir", cut="chop", big="large", place="set")
    for _ in range(rng.randrange(5)):
        i = rng.randrange(len(words))
        words[i] = rng.choice(
            [words[i], words[i] + "s", words[i] + "ing", words[i].title(), words[i] + rng.choice(
                [",", ".", "!", "'s", "...", " (hot)", " 1/2", "-cut", "n't", " ¼", "”", " & x"]),
             swaps.get(words[i], words[i]), rng.choice(others), ""]
        )  # fmt: skip
        j = rng.randrange(len(words))
        if rng.random() < 0.3:
            words[i], words[j] = words[j], words[i]
    return " ".join(words)


def real_captions(shared) -> tuple[dict, dict]:
    """Pair MSVD's captions with each other, YouCook2's with edits and neighbours: 2,742."""
    rng, refs, hyps = random.Random(11), {}, {}
    for video, texts in json.loads((shared / "msvd/captions.json").read_text()).items():
        for k, text in enumerate(texts):
            refs[f"{video}_{k}"], hyps[f"{video}_{k}"] = texts[:k] + texts[k + 1 :], text
    path = shared / "annotations/youcook2/youcookii_annotations_trainval.json"
    videos = json.loads(path.read_text())["database"].values()
    texts = [row["sentence"] for video in videos for row in video["annotations"]]
    for k in range(2500):
        text, after = texts[5 * k], texts[5 * k + 1]
        refs[f"y{k}"] = [text, edited(text, after, rng), after][: rng.choice((1, 1, 2, 3))]
        hyps[f"y{k}"] = after if k % 7 == 0 else edited(text, after, rng)
    return refs, hyps


def same_scores(refs, hyps, want, tokenizer):
    """Compare all metrics with the published programs', for the corpus and for each item."""
    got = caption_scores(refs, hyps, tokenizer, per_item=True)
    for name, (corpus, items) in want.items():
        limit = 1e-6 if name == "METEOR" else 1e-9
        assert abs(got[name] - corpus) < limit, name
        for key, value in zip(refs, items, strict=True):
            assert abs(got["per item"][key][name] - value) < limit, (name, key)


@pytest.mark.coco
def test_real_captions_score_as_by_pycocoevalcap(shared, coco):
    """Tokens equal string for string; BLEU, ROUGE-L, CIDEr within 1e-9 an item, METEOR 1e-6."""
    refs, hyps = real_captions(shared)
    assert len(refs) > 2000 and max(map(len, refs.values())) > 3
    coco_refs, coco_hyps, want = coco(refs, hyps)
    flat = [text for texts in refs.values() for text in texts]
    assert ptb_tokenize(flat) == [text for texts in coco_refs.values() for text in texts]
    assert ptb_tokenize(list(hyps.values())) == [text for (text,) in coco_hyps.values()]
    same_scores(refs, hyps, want, "ptb")


@pytest.mark.coco
@pytest.mark.parametrize("tokenizer", ["ptb", "space"])
def test_edge_cases_score_as_by_pycocoevalcap(coco, tokenizer):
    """The edge cases of this file, together as one corpus."""
    refs, hyps = ({k: v[i] for k, v in EDGES.items()} for i in (0, 1))
    refs = {k: [text.strip() for text in texts] for k, texts in refs.items()}
    hyps = {k: text.strip() for k, text in hyps.items()}
    same_scores(refs, hyps, coco(refs, hyps, tokenizer == "ptb")[2], tokenizer)
