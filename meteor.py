"""METEOR 1.5 for English (Denkowski and Lavie, WMT 2014), equal to the published program.

Words of a caption and its reference are matched by being equal, by their stems, by WordNet's
synonyms or as paraphrases; the alignment that covers most in the fewest pieces is scored. Read from
top to bottom: words, stems, word lists, candidates, search, score.

    python eval.py captions --references R.json --hypotheses H.json --tokenizer ptb --per-item

The word lists are not ours to pass on. They are read from the package pycocoevalcap (pip install
--no-deps pycocoevalcap) or from a folder with its files; without them METEOR knows only equal words
and equal stems, and is called "METEOR (exact+stem)" wherever it stands.
"""

import gzip
import hashlib
import math
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

from benchmarks import DataError

# ---------------------------------------------------------------------------------------------
# Words

AL = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ԧꙀ-ꙮꙿ-ꚗᴀ-ᵿ"  # what its rules take for letters
NORMALISE = [
    (re.compile(pattern), into)
    for pattern, into in [
        (rf"([^{AL}0-9 \t\n\v\f\r.'`,‘’-])", r" \1 "),
        (r"(\.{2,})", r" \1 "),
        (r"([^0-9]),([^0-9])", r"\1 , \2"),
        (r"([0-9]),([^0-9])", r"\1 , \2"),
        (r"([^0-9]),([0-9])", r"\1 , \2"),
        (r"[`‘’]", "'"),
        (r"[“”]|''", ' " '),
        (r"–", "-"),
        (r"--", "-"),
        (rf"([{AL}0-9.])-([{AL}0-9])", r"\1 \2"),
        (rf"([^{AL}])'([^{AL}])", r"\1 ' \2"),
        (rf"([^{AL}0-9])'([{AL}])", r"\1 ' \2"),
        (rf"([{AL}])'([^{AL}])", r"\1 ' \2"),
        (rf"([{AL}])'([{AL}])", r"\1 '\2"),
        (r"([0-9])'s", r"\1 's"),
    ]
]
ANY_SPACE = re.compile("[ \xa0\u2000-\u200a\u202f\u205f\u3000]+")
CUT = re.compile(r"[ \t\n\f\r]+")
NOTHING = frozenset()


def meteor_words(line: str, prefixes=NOTHING, before_number=NOTHING) -> list[str]:
    """Cut a line into words as METEOR does, whatever tokenizer came before: marks stay.

    Args:    prefixes: words that keep a final dot ("Dr"). before_number: those that keep it where
             the next word begins with a digit ("No").

    >>> meteor_words("The chef's stir-fry: 1,000 e.g. oil. mix...")
    ['the', 'chef', "'s", 'stir', 'fry', ':', '1,000', 'eg', 'oil.', 'mix', '...']
    """
    line = f" {line} "
    for pattern, into in NORMALISE:
        line = pattern.sub(into, line)
    words = [word for word in CUT.split(line) if word]
    for i, word in enumerate(words):
        if len(word) < 2 or word[-1] != "." or word.strip(".") == "":
            continue  # no final dot, or nothing but dots
        stem, after = word[:-1], words[i + 1][0] if i + 1 < len(words) else ""
        if "." in stem and re.search(f"[{AL}]", stem):
            words[i] = word.replace(".", "")  # e.g. -> eg
        elif not (stem in prefixes or "a" <= after <= "z") and not (
            stem in before_number and "0" <= after <= "9"
        ):
            words[i] = f"{stem} ."
    line = ANY_SPACE.sub(" ", " ".join(words)).strip("".join(map(chr, range(33)))).lower()
    return [word for word in CUT.split(line) if word]


# ---------------------------------------------------------------------------------------------
# Stems (the English Snowball stemmer, "Porter2", of 2015)

STEMS = dict(
    skis="ski", skies="sky", dying="die", lying="lie", tying="tie", idly="idl", gently="gentl",
    ugly="ugli", early="earli", only="onli", singly="singl",
)  # fmt: skip
STEMS |= {word: word for word in "sky news howe atlas cosmos bias andes".split()}
DONE = frozenset("inning outing canning herring earring proceed exceed succeed".split())
STEP_2 = dict(
    tional="tion", enci="ence", anci="ance", abli="able", entli="ent", izer="ize", ization="ize",
    ational="ate", ation="ate", ator="ate", alism="al", aliti="al", alli="al", fulness="ful",
    fulli="ful", ousli="ous", ousness="ous", iveness="ive", iviti="ive", biliti="ble", bli="ble",
    lessli="less", ogi="og", li="",
)  # fmt: skip
STEP_3 = dict(
    ational="ate", tional="tion", alize="al", icate="ic", iciti="ic", ical="ic", ful="", ness="",
    ative="",
)  # fmt: skip
STEP_4 = dict.fromkeys(
    "al ance ence er ic able ible ant ement ment ent ism ate iti ous ive ize ion".split(), ""
)
SHORT_END = re.compile(r"(?:[^aeiouy][aeiouy][^aeiouywxY]|^[aeiouy][^aeiouy])$")
REGION = re.compile(r"[aeiouy][^aeiouy]")


def _suffix(word: str, suffixes: Iterable[str]) -> str:
    """Return the longest of the suffixes that the word ends in, or nothing."""
    return max((s for s in suffixes if word.endswith(s)), key=len, default="")


@lru_cache(1 << 16)
def stem(word: str) -> str:
    """Cut a word back to its stem.

    >>> [stem(w) for w in "stirring stirred hopping hoped chopped generously onions".split()]
    ['stir', 'stir', 'hop', 'hope', 'chop', 'generous', 'onion']
    """
    if len(word) < 3 or word in STEMS:
        return STEMS.get(word, word)
    # Y is a y that stands for a consonant: at the start, or after a vowel
    word = re.sub(r"^y|([aeiouy])y", lambda m: (m[1] or "") + "Y", word.removeprefix("'"))
    m = re.match("gener|commun|arsen", word) or REGION.search(word)
    r1 = m.end() if m else len(word)  # R1 and R2 begin here and stay, whatever is cut below
    m = REGION.search(word, r1)
    r2 = m.end() if m else len(word)
    word = word[: len(word) - len(_suffix(word, ("'", "'s", "'s'")))]
    word = _step_1a(word)
    if word in DONE:
        return word
    word = _step_1b(word, r1)
    if re.search(r"[^aeiouy][yY]$", word) and len(word) > 2:
        word = word[:-1] + "i"
    for step, region in ((STEP_2, r1), (STEP_3, r1), (STEP_4, r2)):
        s = _suffix(word, step)
        base = word[: len(word) - len(s)]
        fits = {"ogi": "l", "li": "cdeghkmnrt", "ion": "st"}.get(s)  # what must stand before it
        far_enough = len(base) >= (r2 if s == "ative" else region)
        if s and far_enough and (fits is None or base[-1:] and base[-1] in fits):
            word = base + step[s]
    end = len(word) - 1
    if word[-1:] == "e" and (end >= r2 or end >= r1 and not SHORT_END.search(word[:-1])):
        word = word[:-1]
    elif word[-1:] == "l" and end >= r2 and word[-2:-1] == "l":
        word = word[:-1]
    return word.replace("Y", "y")


def _step_1a(word: str) -> str:
    """Take away the s of plurals."""
    s = _suffix(word, ("sses", "ied", "ies", "us", "ss", "s"))
    if s == "sses":
        return word[:-2]
    if s in ("ied", "ies"):
        return word[:-2] if len(word) > 4 else word[:-1]
    return word[:-1] if s == "s" and re.search("[aeiouy]", word[:-2]) else word


def _step_1b(word: str, r1: int) -> str:
    """Take away -ed and -ing, and mend what they leave: hopping -> hop, hoping -> hope."""
    s = _suffix(word, ("eed", "eedly", "ed", "edly", "ing", "ingly"))
    base = word[: len(word) - len(s)]
    if s in ("eed", "eedly"):
        return base + "ee" if len(base) >= r1 else word
    if not s or not re.search("[aeiouy]", base):
        return word
    if base.endswith(("at", "bl", "iz")):
        return base + "e"
    if base.endswith(("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")):
        return base[:-1]
    return base + "e" if len(base) == r1 and SHORT_END.search(base) else base


# ---------------------------------------------------------------------------------------------
# Word lists


@dataclass(frozen=True)
class WordLists:
    """METEOR's data: what is read from its files.

    function_words: words that count for little. prefixes, before_number: for `meteor_words`.
    synsets: word -> the numbers of its WordNet meanings, as text. bases: irregular form -> base
    words. table (2, rows): hashes of phrases, in order, and of what each may be put as.
    """

    function_words: frozenset[str]
    prefixes: frozenset[str]
    before_number: frozenset[str]
    synsets: dict[str, str]
    bases: dict[str, list[str]]
    table: np.ndarray


NO_LISTS = WordLists(NOTHING, NOTHING, NOTHING, {}, {}, np.zeros((2, 0), np.uint64))


def meteor_files(folder: str | Path | None = None) -> tuple[Path, Path] | None:
    """Find METEOR's program and paraphrase table, in a folder or where pycocoevalcap has them.

    Returns: (meteor-1.5.jar, paraphrase-en.gz), or None if no folder was given and none is known.
    Raises:  DataError if the given folder lacks one.
    """
    if folder is None:
        spec = find_spec("pycocoevalcap")
        places = list(spec.submodule_search_locations or []) if spec else []
        folders = [Path(place) / "meteor" for place in places]
    else:
        folders = [Path(folder)]
    for place in folders:
        jar = place / "meteor-1.5.jar"
        for table in (place / "data/paraphrase-en.gz", place / "paraphrase-en.gz"):
            if jar.is_file() and table.is_file():
                return jar, table
    if folder is not None:
        raise DataError(f"{folder}: wanted meteor-1.5.jar and data/paraphrase-en.gz in it")
    return None


@lru_cache(2)
def word_lists(folder: str | Path | None = None) -> WordLists:
    """Read METEOR's data (half a second; half a minute the first time, for the paraphrase table).

    Returns: NO_LISTS if no folder was given and pycocoevalcap is not installed.
    Raises:  DataError naming the file that is missing or damaged.
    """
    files = meteor_files(folder)
    if files is None:
        return NO_LISTS
    try:
        with zipfile.ZipFile(files[0]) as jar:
            function_words, prefixes, synsets, exceptions = (
                read_member(jar, name).split("\n")
                for name in (
                    "function/english.words",
                    "nonbreaking/english.prefixes",
                    "synonym/english.synsets",
                    "synonym/english.exceptions",
                )
            )
    except Exception as error:  # zipfile fails in as many ways as a zip can be damaged or locked
        raise DataError(f"{files[0]}: not METEOR 1.5's jar ({error})") from None
    bases = defaultdict(list)
    for base, forms in zip(exceptions[::2], exceptions[1::2], strict=False):
        for form in forms.split():
            bases[form].append(base)
    prefixes = [line.split() for line in prefixes if line.strip() and line[0] != "#"]
    return WordLists(
        frozenset(filter(None, function_words)),
        frozenset(word for word, *mark in prefixes if not mark),
        frozenset(word for word, *mark in prefixes if mark),  # "No #NUMERIC_ONLY#"
        dict(zip(synsets[::2], synsets[1::2], strict=False)),
        dict(bases),
        paraphrase_table(files[1]),
    )


def read_member(jar: zipfile.ZipFile, name: str) -> str:
    """Read a member of a zip that is text of some megabytes; ValueError for more."""
    if jar.getinfo(name).file_size > 1 << 26:
        raise ValueError(f"{name} unpacks to {jar.getinfo(name).file_size:,} bytes")
    return jar.read(name).decode("utf-8")


def phrase_hash(phrase: bytes) -> bytes:
    """Name a phrase by 8 bytes: among 10 million, two alike are a chance of one in 300,000."""
    return hashlib.blake2b(phrase, digest_size=8).digest()


LONGEST_PHRASE, MOST_PHRASES = 1 << 16, 15_000_000  # bytes; rows, half as many again as there are


def index_paraphrases(path: Path) -> np.ndarray:
    """Read the table's lines "chance", "phrase", "put as" into two rows of hashes.

    Returns: (2, rows) uint64, ordered by the phrase, rows of one phrase as they stand in the file.
    Raises:  DataError when the file is another one (a ValueError inside says how).
    """
    hashes = [bytearray(), bytearray()]
    try:
        with gzip.open(path) as file:
            lines = iter(partial(file.readline, LONGEST_PHRASE), b"")
            for _, *pair in zip(lines, lines, lines, strict=True):
                for side, phrase in zip(hashes, pair, strict=True):
                    side += phrase_hash(phrase.rstrip(b"\n"))
                if max(map(len, pair)) == LONGEST_PHRASE or len(side) > 8 * MOST_PHRASES:
                    raise ValueError("too long: it would not fit into memory")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not METEOR's paraphrase table ({error})") from None
    table = np.stack([np.frombuffer(side, "<u8") for side in hashes])
    return np.ascontiguousarray(table[:, np.argsort(table[0], kind="stable")])


def paraphrase_table(path: Path) -> np.ndarray:
    """Give the index of the paraphrase table (2, rows), from the user's cache where it is there.

    The cache file is named by the gzip's own checksum, so that another table has another file, and
    its last number is a checksum of the rest. It is written aside and moved into place: neither
    two processes at once nor one that stops half-way leave half a file behind. Raises: DataError
    for a table that cannot be read.
    """
    try:
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            name = f"paraphrases-{file.read().hex()}.u8"
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlm"
    except (OSError, RuntimeError) as error:  # a file of less than 8 bytes; no home
        raise DataError(f"{path}: cannot be indexed ({error})") from None
    try:
        numbers = np.memmap(folder / name, "<u8", "r")
        if len(numbers) % 2 and numbers[-1] == zlib.crc32(numbers[:-1]):
            return numbers[:-1].reshape(2, -1)
        print(f"{folder / name} is damaged and made again", file=sys.stderr)
    except (OSError, ValueError):  # not there; empty, or not of whole numbers
        pass
    print("METEOR: indexing its paraphrase table, once (half a minute) ..", file=sys.stderr)
    table = index_paraphrases(path)
    aside = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as aside:
            aside.write(table.tobytes() + np.uint64(zlib.crc32(table)).tobytes())
        os.replace(aside.name, folder / name)
    except OSError as error:
        print(f"METEOR: the index is not kept ({error})", file=sys.stderr)
        if aside is not None:
            Path(aside.name).unlink(missing_ok=True)
    return table


# What may be put for a word's ending to find it in WordNet, the first that gives a word.
ENDINGS = [
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
    ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
]  # fmt: skip


def meanings(word: str, lists: WordLists) -> frozenset[str]:
    """Return the WordNet meanings of a word and of its base forms; synonyms share one."""
    bases = lists.bases.get(word)
    if bases is None:
        shapes = (word[: len(word) - len(a)] + b for a, b in ENDINGS if word.endswith(a))
        if word.endswith("ss") or len(word) <= 2:
            shapes = (word,)
        bases = [next((shape for shape in shapes if shape in lists.synsets), "")]
    found = chain.from_iterable(lists.synsets.get(w, "").split() for w in (word, *bases))
    return frozenset(found)


# ---------------------------------------------------------------------------------------------
# Candidates

EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
Match = tuple[int, int, int, int, int]  # start in the reference, words; in the hypothesis; stage


@dataclass(frozen=True)
class Line:
    """A caption as METEOR reads it, and what its words and phrases may stand for.

    is_function: a word each. stems, meanings: a word each. by_word, by_stem: where each is.
    phrases: those that the table knows, by their start and shorter first: (start, words, what it
    may be put as, in the table's order). places: phrase -> [(start, words)].
    """

    words: list[str]
    is_function: list[bool]
    stems: list[str]
    meanings: list[frozenset[str]]
    by_word: dict[str, list[int]]
    by_stem: dict[str, list[int]]
    phrases: list[tuple[int, int, list[int]]]
    places: dict[int, list[tuple[int, int]]]


def positions(values: Iterable) -> dict[object, list[int]]:
    """Tell where each value stands.

    >>> positions("abca")
    {'a': [0, 3], 'b': [1], 'c': [2]}
    """
    out = defaultdict(list)
    for i, value in enumerate(values):
        out[value].append(i)
    return dict(out)


def look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the value (n,) beside each key in a sorted table, 0 for a key that is not in it.

    Args: keys (n,); table (rows,), sorted, and values (rows,).
    """
    if not len(table):
        return np.zeros(len(keys), values.dtype)
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)


def find_paraphrases(phrases: list[str], table: np.ndarray) -> dict[int, list[int]]:
    """Look phrases up in the paraphrase table (2, rows) of `index_paraphrases`.

    Returns: index of a phrase -> indices of those of `phrases` that it may be put as, in the
             table's order; phrases with none are left out.
    """
    hashes = b"".join(phrase_hash(p.encode("utf-8", "surrogatepass")) for p in phrases)
    hashes = np.frombuffer(hashes, "<u8")
    order = np.argsort(hashes)
    ordered = hashes[order]
    first = np.searchsorted(table[0], ordered)
    rows = np.searchsorted(table[0], ordered, "right") - first
    source = np.repeat(order, rows)
    row = np.repeat(first - np.cumsum(rows) + rows, rows) + np.arange(len(source))
    target = look_up(table[1][row], ordered, order + 1) - 1  # -1: in none of our captions
    out = defaultdict(list)
    for a, b in zip(source[target >= 0].tolist(), target[target >= 0].tolist(), strict=True):
        out[a].append(b)
    return dict(out)


def read_lines(texts: Iterable[str], lists: WordLists) -> dict[str, Line]:
    """Prepare every different text for METEOR; all share one look into the paraphrase table."""
    words = {
        text: meteor_words(text, lists.prefixes, lists.before_number)
        for text in dict.fromkeys(texts)
    }
    senses = {word: meanings(word, lists) for word in set(chain.from_iterable(words.values()))}
    number: dict[str, int] = {}  # phrase -> its number
    grams = {text: number_phrases(line, number) for text, line in words.items()}
    known = find_paraphrases(list(number), lists.table)
    targets = frozenset(chain.from_iterable(known.values()))
    out = {}
    for text, line in words.items():
        spots = [(i, n, gram) for i, row in enumerate(grams[text]) for n, gram in enumerate(row, 1)]
        places = defaultdict(list)
        for i, n, gram in spots:
            if gram in targets:
                places[gram].append((i, n))
        stems = [stem(word) for word in line]
        out[text] = Line(
            words=line,
            is_function=[word in lists.function_words for word in line],
            stems=stems,
            meanings=[senses[word] for word in line],
            by_word=positions(line),
            by_stem=positions(stems),
            phrases=[(i, n, known[gram]) for i, n, gram in spots if gram in known],
            places=dict(places),
        )
    return out


def number_phrases(words: list[str], number: dict[str, int]) -> list[list[int]]:
    """Number the phrases of 1 to 7 words that start at each word, as many as the table may hold."""
    return [
        [
            number.setdefault(" ".join(words[i:end]), len(number))
            for end in range(i + 1, min(i + 7, len(words)) + 1)
        ]
        for i in range(len(words))
    ]


def candidates(hypothesis: Line, reference: Line) -> list[list[Match]]:
    """List what may be aligned, for each word of the reference at which it starts.

    All stages share the lists, and a pair of words that several stages find stands in them several
    times: the search counts them, and its order of trying them decides ties.
    """
    out = [
        [(j, 1, i, 1, EXACT) for i in hypothesis.by_word.get(word, ())]
        for j, word in enumerate(reference.words)
    ]
    if hypothesis.words == reference.words:
        return out
    for j, word in enumerate(reference.words):
        for i in hypothesis.by_stem.get(reference.stems[j], ()):
            if hypothesis.words[i] != word:
                out[j].append((j, 1, i, 1, STEM))
    for j, (word, meaning) in enumerate(zip(reference.words, reference.meanings, strict=True)):
        for i, other in enumerate(hypothesis.meanings if meaning else ()):
            if not meaning.isdisjoint(other) and hypothesis.words[i] != word:
                out[j].append((j, 1, i, 1, SYNONYM))
    for j, words, others in reference.phrases:
        for other in others:
            for i, n in hypothesis.places.get(other, ()):
                out[j].append((j, words, i, n, PARAPHRASE))
    for i, n, others in hypothesis.phrases:
        for other in others:
            for j, words in reference.places.get(other, ()):
                out[j].append((j, words, i, n, PARAPHRASE))
    return out


# ---------------------------------------------------------------------------------------------
# Search

BEAM = 40
RANK = itemgetter(0, 1, 2)


def bits(start: int, words: int) -> int:
    """Return the words of a span as the bits of a number."""
    return ((1 << words) - 1) << start


def certain(lists: list[list[Match]], hypothesis_words: int) -> dict[int, Match]:
    """Pick the matches that nothing competes with: reference word -> its match."""
    cover_r, cover_h = [0] * len(lists), [0] * hypothesis_words
    for j, words, i, n, _ in chain.from_iterable(lists):
        for k in range(j, j + words):
            cover_r[k] += 1
        for k in range(i, i + n):
            cover_h[k] += 1
    return {
        j: (j, words, i, n, stage)
        for j, words, i, n, stage in (found[0] for found in lists if len(found) == 1)
        if set(cover_r[j : j + words]) == set(cover_h[i : i + n]) == {1}
    }


def weight(match: Match) -> int:
    """Weigh a match in the search: its words on both sides, or half of each, rounded down."""
    _, words, _, n, stage = match
    return words + n if stage == EXACT else words // 2 + n // 2


def align(lists: list[list[Match]], hypothesis_words: int) -> list[Match]:
    """Choose matches that share no word: many words, then few chunks, then little movement.

    A beam search over the reference, word by word. A path is (-weight, chunks, movement, words used
    of the hypothesis and of the reference as bits, the first reference word not decided, where the
    last match ends in the hypothesis or -1, (earlier matches, last match)). The published program's
    own ways decide ties and are kept: one word that is not exact weighs nothing, and a match's
    movement is added to the path it branches off from, after the branch.
    """
    fixed = certain(lists, hypothesis_words)
    used_h = sum(bits(i, n) for _, _, i, n, _ in fixed.values())
    used_r = sum(bits(j, words) for j, words, _, _, _ in fixed.values())
    paths = [(0, 0, 0, used_h, used_r, 0, -1, None)]
    for j, found in enumerate(lists):
        paths = sorted(paths, key=RANK)[:BEAM]
        steps = [(m, weight(m), bits(m[2], m[3]), bits(j, m[1])) for m in found]
        longer, limit = [], (math.inf,)
        for path in paths:
            cost, chunks, movement, used_h, used_r, free, last, chosen = path
            if used_r >> j & 1:
                if j < free:
                    longer.append(path)
                elif match := fixed.get(free):
                    _, words, i, n, _ = match
                    rank = (
                        cost - weight(match),
                        chunks + (last not in (-1, i)),
                        movement + abs(j - i),
                    )
                    longer.append((*rank, used_h, used_r, j + words, i + n, (chosen, match)))
                continue
            for match, credit, own_h, own_r in steps:
                _, words, i, n, _ = match
                if used_h & own_h or used_r & own_r:
                    continue
                rank = cost - credit, chunks + (last not in (-1, i)), movement
                if rank < limit:
                    used = used_h | own_h, used_r | own_r
                    longer.append((*rank, *used, j + words, i + n, (chosen, match)))
                movement += abs(j - i)
            chunks += last != -1
            longer.append((cost, chunks, movement, used_h, used_r, free + 1, -1, chosen))
            if len(longer) > 2 * BEAM:  # what comes later and is no better falls out of the beam
                longer = sorted(longer, key=RANK)[:BEAM]
                limit = longer[-1][:3]
        paths = longer or paths[:1]
    paths = sorted(paths, key=RANK)[:BEAM]
    chosen = min(paths, key=lambda p: (p[0], p[1] + (p[6] != -1), p[2]))[7]
    out = []
    while chosen:
        chosen, match = chosen
        out.append(match)
    return out[::-1]


# ---------------------------------------------------------------------------------------------
# Score

CHUNKS, COVERED = 20, slice(21, 23)  # in the numbers that `statistics` returns


def statistics(hypothesis: Line, reference: Line) -> list[int]:
    """Align two lines and count, in the order of the published program.

    Returns: 23 numbers: words of the hypothesis, of the reference; function words of each; for each
             stage the content words it covers of the hypothesis, of the reference, then the
             function words so; chunks (stretches of matches in the same order and without a gap
             in both lines); words covered in the hypothesis, in the reference.
    """
    matches = align(candidates(hypothesis, reference), len(hypothesis.words))
    out = [len(hypothesis.words), len(reference.words)]
    out += [sum(hypothesis.is_function), sum(reference.is_function)] + [0] * 19
    next_j = next_i = -1
    for j, words, i, n, stage in matches:
        of_h, of_r = (
            sum(hypothesis.is_function[i : i + n]),
            sum(reference.is_function[j : j + words]),
        )
        for k, count in enumerate((n - of_h, words - of_r, of_h, of_r)):
            out[4 + 4 * stage + k] += count
        out[CHUNKS] += (j, i) != (next_j, next_i)
        next_j, next_i = j + words, i + n
        out[COVERED.start] += n
        out[COVERED.start + 1] += words
    return out


def perfect(stats: list[int]) -> bool:
    """Tell whether every word of both lines is covered, in one chunk."""
    return stats[COVERED] == stats[:2] and stats[CHUNKS] == 1


def meteor_score(stats: list[int]) -> float:
    """Turn the counts of a caption, or their sums over a corpus, into METEOR, 0..1.

        P, R    = weighted matches / weighted words, of the hypothesis and of the reference
        F       = 1 / ((1 - alpha) / P + alpha / R)                  alpha = 0.85
        METEOR  = F * (1 - gamma * (chunks / matched words) ^ beta)  gamma = 0.6, beta = 0.2

    A content word weighs delta = 0.75, a function word 0.25, times 1, 0.6, 0.8 or 0.6 for an exact,
    stem, synonym or paraphrase match. Nothing is taken off when all is one chunk without a gap.

    >>> meteor_score([4, 4, 0, 0, 3, 3, 0, 0] + [0] * 12 + [1, 3, 3])  # P = R = 3/4, one chunk of 3
    0.38876...
    """
    alpha, beta, gamma, delta = 0.85, 0.2, 0.6, 0.75
    half = []
    for side in (0, 1):
        words, function_words = stats[side], stats[2 + side]
        length = delta * (words - function_words) + (1 - delta) * function_words
        weight = 0.0
        for share, first in ((delta, 4), (1 - delta, 6)):
            for stage, credit in enumerate((1.0, 0.6, 0.8, 0.6)):
                weight += stats[first + 4 * stage + side] * credit * share
        half.append(weight / length if length else 0.0)
    P, R = half
    if not P or not R:
        return 0.0
    F = 1 / ((1 - alpha) / P + alpha / R)
    gaps = 0.0 if perfect(stats) else stats[CHUNKS] / (sum(stats[COVERED]) / 2)
    return max(0.0, F * (1 - gamma * gaps**beta))


def meteor_scores(
    hypotheses: list[str], references: list[list[str]], lists: WordLists = NO_LISTS
) -> tuple[float, np.ndarray]:
    """Score METEOR: against the best reference of each item, the first on ties.

    Returns: the corpus score, and (N,) for the items. The corpus score is not their mean: it is
             the score of the summed counts, to which a perfect item adds no chunk.
    """
    # the published program is handed one line with ||| between the texts
    blank = "".join(map(chr, range(33)))
    hypotheses = [text.replace("|||", "").strip(blank) for text in hypotheses]
    references = [[r.strip(blank) for r in " ||| ".join(refs).split("|||")] for refs in references]
    lines = read_lines(chain(hypotheses, *references), lists)
    total, per_item = [0] * 23, []
    for text, refs in zip(hypotheses, references, strict=True):
        all_stats = [statistics(lines[text], lines[ref]) for ref in refs]
        scores = [meteor_score(stats) for stats in all_stats]
        per_item.append(max(scores))
        stats = all_stats[scores.index(per_item[-1])]
        if perfect(stats):
            stats[CHUNKS] = 0
        total = [a + b for a, b in zip(total, stats, strict=True)]
    return meteor_score(total), np.array(per_item)
