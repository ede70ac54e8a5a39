"""METEOR by worked examples, slow searches, and its files in every state."""

import gzip
import itertools
import multiprocessing
import random
import zipfile
from collections import Counter

import numpy as np
import pytest

import meteor
from benchmarks import DataError
from captions import caption_scores
from meteor import (
    NO_LISTS,
    align,
    candidates,
    meanings,
    meteor_score,
    meteor_scores,
    meteor_words,
    read_lines,
    statistics,
    stem,
)

pytestmark = pytest.mark.usefixtures("own_word_lists")

# ---------------------------------------------------------------------------------------------
# Stage by stage


@pytest.mark.parametrize(
    "text, words",
    [
        ("the chef's knife isn't sharp", "the chef 's knife isn 't sharp"),
        ("the chef 's knife is n't sharp", "the chef ' s knife is n 't sharp"),
        ("1/2 cup 1,000 3.5 10:30am", "1 / 2 cup 1,000 3.5 10 : 30am"),
        ("U.S. e.g. vs. No. 5 wait... x..y us", "us eg vs. no. 5 wait ... x .. y us"),
        ('"hi" “hi” it’s 1990\'s a--b', '" hi " " hi " it \'s 1990 \'s a b'),
        ("add oil. mix it. Stir.", "add oil. mix it . stir ."),
        ("so... Then", "so ... then"),
        ("a-b-c 5-6 -7 x - y", "a b-c 5 6 -7 x - y"),
        ("No. Five No. 5 3,a a,4 ,", "no . five no. 5 3 , a a , 4 ,"),
        ("crème\xa0brûlée\u3000x", "crème brûlée x"),
    ],
)
def test_meteor_words(text, words):
    """One line a rule of the published normaliser; "vs" is a prefix, "No" one before a number."""
    assert meteor_words(text, frozenset(["vs"]), frozenset(["No"])) == words.split()


STEMS = (
    "caresses:caress ponies:poni ties:tie cries:cri gas:gas gaps:gap kiwis:kiwi this:this us:us "
    "agreed:agre feed:feed plastered:plaster bled:bled motoring:motor sing:sing luxuriating:luxuri "
    "troubling:troubl sizing:size hopping:hop falling:fall failing:fail filing:file hoping:hope "
    "happy:happi say:say by:by cry:cri relational:relat conditional:condit valency:valenc "
    "digitizer:digit operator:oper feudalism:feudal callously:callous formality:formal "
    "sensibility:sensibl analogy:analog apologi:apolog quickly:quick triplicate:triplic "
    "formative:format electrical:electr hopeful:hope goodness:good revival:reviv adoption:adopt "
    "adjustment:adjust replacement:replac dependent:depend controlling:control roll:roll rate:rate "
    "cease:ceas generate:generat general:general communism:communism arsenal:arsenal skies:sky "
    "dying:die news:news inning:inning innings:inning proceed:proceed youth:youth boyish:boyish "
    "jolly:jolli sayyid:sayyid chef's:chef 'tis:tis added:ad ing:ing a:a is:is added':ad"
)


@pytest.mark.parametrize("pair", STEMS.split())
def test_stems(pair):
    """Published stems of the English Snowball stemmer's 2015 version, a step or exception each."""
    word, want = pair.split(":")
    assert stem(word) == want


TABLE = """0.5
in order to
to
0.4
in order to
so as to
0.3
to
in order to
0.2
frying pan
skillet
"""


@pytest.fixture
def meteor_folder(tmp_path, monkeypatch):
    """Write METEOR's files with a handful of words each, and turn the cache to a new folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "meteor"
    folder.mkdir()
    with zipfile.ZipFile(folder / "meteor-1.5.jar", "w") as jar:
        jar.writestr("function/english.words", "the\na\nin\nto\n")
        jar.writestr("nonbreaking/english.prefixes", "# dots\n\nDr\nNo #NUMERIC_ONLY# \n")
        jar.writestr(
            "synonym/english.synsets",
            "big\n00000001 00000002\nlarge\n00000002\nmouse\n00000003\nrodent\n00000003\n"
            "box\n00000004\ncrate\n00000004\nbos\n00000005\nx\n00000006\n",
        )
        jar.writestr("synonym/english.exceptions", "mouse\nmice mouses\n")
    with gzip.open(folder / "paraphrase-en.gz", "wt") as table:
        table.write(TABLE)
    return folder


def stages(hypothesis, reference, lists=NO_LISTS):
    """List the candidates of two lines as (reference words, hypothesis words, stage)."""
    lines = read_lines([hypothesis, reference], lists)
    h, r = lines[hypothesis], lines[reference]
    return [
        (" ".join(r.words[j : j + words]), " ".join(h.words[i : i + n]), stage)
        for found in candidates(h, r)
        for j, words, i, n, stage in found
    ]


def test_meanings_of_base_forms(meteor_folder):
    """An irregular form has its base's meanings; else an ending is taken off, first rule first."""
    lists = meteor.word_lists(meteor_folder)
    assert meanings("mice", lists) == meanings("mouse", lists) == {"00000003"}
    assert meanings("boxes", lists) == {"00000004"}
    assert meanings("big", lists) == {"00000001", "00000002"}
    assert meanings("boss", lists) == meanings("xs", lists) == meanings("zebra", lists) == set()


def test_candidates_of_each_stage(meteor_folder):
    """All stages find their pairs, in both directions of the table, and duplicates stay."""
    lists = meteor.word_lists(meteor_folder)
    assert lists.function_words == {"the", "a", "in", "to"}
    assert (lists.prefixes, lists.before_number) == ({"Dr"}, {"No"})
    assert stages("the cat", "the dog", lists) == [("the", "the", meteor.EXACT)]
    assert stages("stirring", "stirred", lists) == [("stirred", "stirring", meteor.STEM)]
    assert stages("large", "big", lists) == [("big", "large", meteor.SYNONYM)]
    assert stages("a skillet", "a frying pan", lists) == [
        ("a", "a", meteor.EXACT),
        ("frying pan", "skillet", meteor.PARAPHRASE),
    ]
    # "to" is inside both phrases; "in order to" <-> "to" is in the table in both directions
    assert Counter(stages("x to", "in order to", lists)) == {
        ("to", "to", meteor.EXACT): 1,
        ("in order to", "to", meteor.PARAPHRASE): 2,
    }
    assert stages("the the", "the the", lists) == [("the", "the", meteor.EXACT)] * 4
    assert stages("mouse mice", "mouse mice", lists) == [
        ("mouse", "mouse", meteor.EXACT),
        ("mice", "mice", meteor.EXACT),
    ]
    assert stages("a big", "the big", lists) == [("big", "big", meteor.EXACT)]
    assert stages("mice", "mouse", lists) == [("mouse", "mice", meteor.SYNONYM)]


def aligned(hypothesis, reference, lists=NO_LISTS):
    """Align two lines: [(start in the reference, words, start in the hypothesis, words)]."""
    lines = read_lines([hypothesis, reference], lists)
    h, r = lines[hypothesis], lines[reference]
    return [match[:4] for match in align(candidates(h, r), len(h.words))]


def test_alignment_prefers_fewer_chunks_among_equal_coverage():
    """The second "the" goes with "cat": 2 chunks, not 3."""
    assert aligned("the dog saw the cat", "the cat ran") == [(0, 1, 3, 1), (1, 1, 4, 1)]
    assert aligned("a b a", "a a b") == [(0, 1, 2, 1), (1, 1, 0, 1), (2, 1, 1, 1)]


def test_half_credit_is_rounded_down():
    """One word that is not exact weighs floor(0.5) on each side, nothing; exact ones weigh 1."""
    assert meteor.weight((0, 1, 0, 1, meteor.EXACT)) == 2
    assert meteor.weight((0, 1, 0, 1, meteor.STEM)) == 0
    assert meteor.weight((0, 3, 0, 2, meteor.PARAPHRASE)) == 1 + 1


def test_movement_is_charged_to_the_path_that_is_left():
    """Taking the first "b" is free; leaving it for the second pays the movement not made."""
    assert aligned("a b", "b b") == [(0, 1, 1, 1)]
    # two matches for one word: charged to themselves, the nearer one (i = 1) would win
    lists = [[(0, 1, 4, 1, 0), (0, 1, 1, 1, 0)], [(1, 1, 6, 1, 0)]]
    assert align(lists, 7)[0] == (0, 1, 4, 1, 0)


def test_a_gap_after_a_match_closes_a_chunk_before_the_end():
    """A match and then nothing is a chunk already; a match at the end not yet: it is taken."""
    assert aligned("a b", "a a") == [(1, 1, 0, 1)]


def slow_align(lists, hypothesis_words):
    """Search as the published program is described: copies, sets, every branch sorted."""
    covered = Counter()
    for j, words, i, n, _ in itertools.chain.from_iterable(lists):
        covered.update(
            [("r", k) for k in range(j, j + words)] + [("h", k) for k in range(i, i + n)]
        )

    def spots(match):
        j, words, i, n, _ = match
        return {("r", k) for k in range(j, j + words)} | {("h", k) for k in range(i, i + n)}

    alone = [found[0] for found in lists if len(found) == 1]
    fixed = {m[0]: m for m in alone if all(covered[spot] == 1 for spot in spots(m))}
    start = dict(weight=0, chunks=0, moved=0, free=0, last=-1, chosen=[])
    start["used"] = set().union(*map(spots, fixed.values()))
    paths = [start]

    def rank(path):
        return -path["weight"], path["chunks"], path["moved"]

    def extended(path, match):
        j, words, i, n, stage = match
        return dict(
            weight=path["weight"] + (2 if stage == 0 else int(words / 2) + int(n / 2)),
            chunks=path["chunks"] + (path["last"] not in (-1, i)),
            moved=path["moved"],
            free=j + words,
            last=i + n,
            chosen=[*path["chosen"], match],
            used=path["used"] | spots(match),
        )

    for j in range(len(lists)):
        after = []
        for path in sorted(paths, key=rank)[:40]:
            if ("r", j) in path["used"]:
                if j < path["free"]:
                    after.append(path)
                elif path["free"] in fixed:
                    match = fixed[path["free"]]
                    after.append(extended(path, match))
                    after[-1]["moved"] += abs(match[0] - match[2])
                continue
            path = dict(path)
            for match in lists[j]:
                if not spots(match) & path["used"]:
                    after.append(extended(path, match))
                    path["moved"] += abs(match[0] - match[2])
            path["chunks"] += path["last"] != -1
            after.append(path | dict(last=-1, free=path["free"] + 1))
        paths = after or sorted(paths, key=rank)[:1]
    paths = sorted(paths, key=rank)[:40]
    for path in paths:
        path["chunks"] += path["last"] != -1
    return sorted(paths, key=rank)[0]["chosen"]


def test_alignment_equals_the_slow_search(meteor_folder):
    """Catches a wrong beam, bit or short cut: the lines repeat words, so the beam overflows."""
    lists, rng = meteor.word_lists(meteor_folder), random.Random(5)
    pool = "in order to so as frying pan skillet big large the cook cooks mice mouse".split()
    for k in range(150):
        some, most = (pool, 14) if k % 2 else (pool[:4], 14) if k % 10 else (pool[2:5], 25)
        h, r = (" ".join(rng.choices(some, k=rng.randint(1, most))) for _ in range(2))
        lines = read_lines([h, r], lists)
        found = candidates(lines[h], lines[r])
        assert align(found, len(lines[h].words)) == slow_align(found, len(lines[h].words)), (h, r)


def brute_force(lists, hypothesis_words):
    """Return the greatest weight any choice of matches that share no word can have."""
    best = 0
    every = [match for found in lists for match in found]
    for size in range(min(len(every), 5) + 1):
        for chosen in itertools.combinations(every, size):
            r = [k for j, words, _, _, _ in chosen for k in range(j, j + words)]
            h = [k for _, _, i, n, _ in chosen for k in range(i, i + n)]
            if len(set(r)) == len(r) and len(set(h)) == len(h):
                best = max(best, sum(map(meteor.weight, chosen)))
    return best


def test_alignment_covers_as_much_as_any_choice_of_matches(meteor_folder):
    """On short lines a beam of 40 finds the greatest weight, and no word is used twice."""
    lists, rng = meteor.word_lists(meteor_folder), random.Random(3)
    pool = "in order to so as frying pan skillet big large the".split()
    for _ in range(60):
        h, r = (" ".join(rng.choices(pool, k=5)) for _ in range(2))
        lines = read_lines([h, r], lists)
        found = candidates(lines[h], lines[r])
        chosen = align(found, 5)
        weight = sum(map(meteor.weight, chosen))
        assert weight == brute_force(found, 5)
        for side in (0, 2):
            used = [k for m in chosen for k in range(m[side], m[side] + m[side + 1])]
            assert len(used) == len(set(used))


def test_statistics_by_hand(meteor_folder):
    """Five words against six: exact the, a; stem stirs; paraphrase skillet; chunks 0-1 and 3-5."""
    lists = meteor.word_lists(meteor_folder)
    h, r = "the cook stirs a skillet", "the chef stirring a frying pan"
    lines = read_lines([h, r], lists)
    got = statistics(lines[h], lines[r])
    assert got[:4] == [5, 6, 2, 2]
    assert got[4:8] == [0, 0, 2, 2]  # exact: no content word, two function words each
    assert got[8:12] == [1, 1, 0, 0]  # stem
    assert got[12:16] == [0, 0, 0, 0]  # synonym
    assert got[16:20] == [1, 2, 0, 0]  # paraphrase: one word for two
    assert got[20:] == [2, 4, 5]
    lines = read_lines(["x y", "x z y"], lists)
    assert statistics(lines["x y"], lines["x z y"])[20:] == [2, 2, 2]  # a gap on one side only


def test_meteor_score_by_hand():
    """3 of 4 content words in one chunk: P = R = 3/4, penalty 0.6 * (1/3) ** 0.2."""
    stats = [4, 4, 0, 0, 3, 3, 0, 0] + [0] * 12 + [1, 3, 3]
    assert meteor_score(stats) == pytest.approx(0.75 * (1 - 0.6 * (1 / 3) ** 0.2), abs=1e-15)
    # function words weigh a third of content words: P = (0.25 * 1) / (0.75 + 0.25), R = 1
    stats = [2, 1, 1, 1, 0, 0, 1, 1] + [0] * 12 + [1, 1, 1]
    want = 1 / (0.15 / 0.25 + 0.85 / 1) * (1 - 0.6 * (1 / 1) ** 0.2)
    assert meteor_score(stats) == pytest.approx(want, abs=1e-15)
    assert meteor_score([4, 4] + [0] * 21) == meteor_score([0] * 23) == 0
    assert meteor_score([4, 4, 0, 0, 4, 4, 0, 0] + [0] * 12 + [1, 4, 4]) == 1


@pytest.mark.parametrize("stage, credit", [(0, 1.0), (1, 0.6), (2, 0.8), (3, 0.6)])
@pytest.mark.parametrize("function", [False, True])
def test_each_stage_has_its_own_credit(stage, credit, function):
    """Four words on each side, all matched by one stage in one chunk: P = R = F = its credit."""
    stats = [4, 4, 4 * function, 4 * function] + [0] * 16 + [1, 4, 4]
    first = 4 + 4 * stage + 2 * function
    stats[first : first + 2] = [4, 4]
    assert meteor_score(stats) == pytest.approx(credit, abs=1e-15)


def test_corpus_meteor_is_the_score_of_the_sums():
    """Not the mean; a perfect item adds no chunk; of several references the best counts."""
    corpus, items = meteor_scores(["a b c", "d x"], [["a c b", "a b c"], ["d y"]])
    assert items[0] == 1 and 0 < items[1] < 0.5
    sums = [5, 5, 0, 0, 4, 4, 0, 0] + [0] * 12 + [1, 4, 4]
    assert corpus == pytest.approx(meteor_score(sums), abs=1e-15)
    assert abs(corpus - items.mean()) > 0.01


# ---------------------------------------------------------------------------------------------
# METEOR's files and the cache


def cache_files(tmp_path):
    """List the files in the cache."""
    return sorted((tmp_path / "cache" / "vlm").iterdir())


def test_paraphrases_are_indexed_once(meteor_folder, tmp_path, monkeypatch):
    """The second time comes from the cache; rows of a phrase keep the file's order."""
    path = meteor_folder / "paraphrase-en.gz"
    first = meteor.paraphrase_table(path)
    assert first.shape == (2, 4) and (np.diff(first[0].astype(object)) >= 0).all()
    found = meteor.find_paraphrases(["so as to", "to", "in order to", "pan"], first)
    assert found == {2: [1, 0], 1: [2]}
    monkeypatch.setattr(meteor, "index_paraphrases", lambda path: pytest.fail("indexed again"))
    again = meteor.paraphrase_table(path)
    assert isinstance(again, np.memmap) and (again == first).all()
    assert len(cache_files(tmp_path)) == 1


def test_rows_of_a_phrase_keep_the_files_order(tmp_path):
    """A sort that is not stable would mix them; the search tries them in this order."""
    rows = [(f"p{k % 3}", f"q{k}") for k in range(300)]
    with gzip.open(tmp_path / "t.gz", "wt") as file:
        file.writelines(f"0.1\n{a}\n{b}\n" for a, b in rows)
    table = meteor.index_paraphrases(tmp_path / "t.gz")
    found = meteor.find_paraphrases(["p1", *(f"q{k}" for k in range(300))], table)
    assert found == {0: [k + 1 for k in range(1, 300, 3)]}


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "odd"])
def test_a_damaged_cache_is_made_again(meteor_folder, tmp_path, damage):
    """A changed bit, a lost end, nothing at all or half a number: never used, replaced."""
    path = meteor_folder / "paraphrase-en.gz"
    first = meteor.paraphrase_table(path).copy()
    (file,) = cache_files(tmp_path)
    data = file.read_bytes()
    broken = {
        "flip": bytes([data[0] ^ 1]) + data[1:],
        "cut": data[: len(data) // 2],
        "empty": b"",
        "odd": data[:-3],
    }
    file.write_bytes(broken[damage])
    assert (meteor.paraphrase_table(path) == first).all()
    assert file.read_bytes() == data and cache_files(tmp_path) == [file]


def test_two_processes_may_index_at_once(meteor_folder, tmp_path):
    """Four processes that all find no cache leave one whole file, and all get the table."""
    path = meteor_folder / "paraphrase-en.gz"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        tables = pool.map(meteor.paraphrase_table, [path] * 8)
    assert all((table == tables[0]).all() for table in tables)
    assert len(cache_files(tmp_path)) == 1


def test_a_cache_that_cannot_be_written_is_done_without(
    meteor_folder, tmp_path, monkeypatch, capsys
):
    """A file where the folder should be: the table is there all the same, and the user is told."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert meteor.paraphrase_table(meteor_folder / "paraphrase-en.gz").shape == (2, 4)
    assert "not kept" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing_behind(meteor_folder, tmp_path, monkeypatch):
    """The file aside is taken away when it cannot be moved into place."""

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(meteor.os, "replace", fail)
    assert meteor.paraphrase_table(meteor_folder / "paraphrase-en.gz").shape == (2, 4)
    assert cache_files(tmp_path) == []


def test_damaged_or_missing_meteor_files_are_named(meteor_folder, tmp_path):
    """One line that names the file, for each way in which it can be wrong."""
    with pytest.raises(DataError, match="wanted meteor-1.5.jar"):
        meteor.word_lists(tmp_path)
    table, jar = meteor_folder / "paraphrase-en.gz", meteor_folder / "meteor-1.5.jar"
    whole = table.read_bytes()
    for data in (whole[:-9], b"plain text, not gzip", b"", gzip.compress(b"one\ntwo\n")):
        table.write_bytes(data)
        with pytest.raises(DataError, match="paraphrase-en.gz"):
            meteor.word_lists(meteor_folder)
    table.write_bytes(whole)
    for data in (b"no zip", jar.read_bytes()[:200]):
        jar.write_bytes(data)
        with pytest.raises(DataError, match="not METEOR 1.5's jar"):
            meteor.word_lists(meteor_folder)


def test_without_word_lists_meteor_says_so():
    """The key names what is missing, for the corpus and for each item."""
    scores = caption_scores({"a": ["stirring rice"]}, {"a": "stirred rice"}, per_item=True)
    assert "METEOR" not in scores and 0 < scores["METEOR (exact+stem)"] < 1
    assert "METEOR (exact+stem)" in scores["per item"]["a"]


# ---------------------------------------------------------------------------------------------
# All metrics


def test_the_word_lists_raise_meteor(meteor_folder):
    """A synonym and a paraphrase count only with the files."""
    refs, hyps = {"a": ["the big frying pan"]}, {"a": "the large skillet"}
    with_lists = caption_scores(refs, hyps, meteor_data=meteor_folder)["METEOR"]
    assert with_lists > 2 * meteor_scores(["the large skillet"], [["the big frying pan"]])[0] > 0
