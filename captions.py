"""Caption metrics (Table 7): BLEU, ROUGE-L, CIDEr-D and METEOR as the published scorers count.

    tokenizer   who reads captions so           what reaches the scorers
    ptb         COCO's evaluation               Penn Treebank tokens, lower-cased, without marks
    space       nlg-eval                        what stands between spaces, nothing changed
    bert        the paper, with nlg-eval        decoded word pieces, most marks glued to words

Three readings of one caption give three different numbers: every table says which one it used.
Read from top to bottom: tokenizers, BLEU, ROUGE-L, CIDEr-D, all metrics of a set of captions, the
command; METEOR has a file of its own, meteor.py.

    python eval.py captions --references R.json --hypotheses H.json     (4 s for 3,000 captions)

METEOR wants the word lists of the package pycocoevalcap (pip install --no-deps pycocoevalcap) or
--meteor-data; without them it is called "METEOR (exact+stem)" wherever it stands.
"""

import argparse
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import HALF, LONGEST_TEXT, DataError, read_json, shown
from meteor import NO_LISTS, look_up, meteor_scores, word_lists

TOKENIZERS = ("ptb", "space", "bert")

# ---------------------------------------------------------------------------------------------
# Penn Treebank tokens, as COCO's evaluation makes them (CoreNLP 3.4.1, lower-cased, lines kept)

BLANK = " \t\xa0\u2000-\u200a\u3000"
DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
# What is inside words besides Unicode's letters, and the marks that are tokens by themselves.
INSIDE_WORDS = (
    "ad 2c2-2c5 2d2-2df 2e5-2eb 2ed 2ef-36f 375 378-379 384-385 3f6 483-487 55a-55f 591-5bd 5bf"
    " 5c1-5c2 5c4-5c5 5c7 615-61a 64b-65e 670 6d6-6e4 6e7-6ed 6fd-6fe 70f 711 730-74c 7a6-7b0"
    " 7eb-7f3 900-903 93c 93e-94e 951-955 962-963 981-983 9bc 9be-9c4 9c7-9c8 9cb-9cd 9d7 9e2-9e3"
    " a01-a03 a3c a3e-a4f a81-a83 abc abe-acf b82 bbe-bc2 bc6-bc8 bca-bcd c01-c03 c3e-c56 d3e-d44"
    " d46-d48 e31 e34-e3a e47-e4e eb1 eb4-ebc ec8-ecd 1885-1886"
)
SYMBOLS = (
    "25-26 2a-2b 5c 5e 7c 7e a5-a9 ac ae-b1 b4-b8 ba d7 f7 37e 387 589 5be 5c0 5c3 5c6 5f3-5f4"
    " 600-603 606-60c 614 61b 61e-61f 66a 66d 6d4 700-70d 7f6-7f8 964-965 e3f e4f 1fbd 2016-2017"
    " 2020-2023 2030-2038 203b 203e-2042 2044 207a-207e 208a-208e 20a4 2100-2101 2103-2106"
    " 2108-2109 2114 2116-2118 211e-2123 2125 2127 2129 212e 213a-213b 2140-2144 214a-214d 214f"
    " 2190-2bff 3012 30fb ff01-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff65 ffe0-ffe1 ffe5-ffe6"
)
QUOTES = {"‘": "`", "‛": "`", "‹": "`", "\x91": "`", "’": "'", "›": "'", "\x92": "'"}
QUOTES |= {"“": "``", "«": "``", "\x93": "``", "”": "''", "»": "''", "\x94": "''", "&apos;": "'"}
OTHER_NAMES = {"&amp;": "&", "<": "<", "&lt;": "<", ">": ">", "&gt;": ">", "£": "#", "¢": "cents"}
OTHER_NAMES |= dict.fromkeys("¤€₠\x80", "$")
OTHER_NAMES |= {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}


def spans(codes: str) -> str:
    """Write code points as the inside of a regular expression's set.

    >>> spans("41-5a 61")
    'A-Za'
    """
    ends = ([re.escape(chr(int(c, 16))) for c in part.split("-")] for part in codes.split())
    return "".join("-".join(part) for part in ends)


def of_category(name: str) -> str:
    """Write a Unicode category up to 0xffff as the inside of a set: L letters, Lu capitals."""
    inside = [unicodedata.category(chr(c)).startswith(name) for c in range(0x10000)]
    edges = np.flatnonzero(np.diff([False, *inside, False])).reshape(-1, 2)
    return spans(" ".join(f"{first:x}-{last - 1:x}" for first, last in edges))


def any_case(pattern: str) -> str:
    """Let a pattern's letters match in both cases, save those inside its [sets].

    >>> any_case(r"mr|[D]ak")
    '[mM][rR]|[D][aA][kK]'
    """
    both = lambda m: f"[{m[0]}{m[0].swapcase()}]" if len(m[0]) == 1 else m[0]  # noqa: E731
    return re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]|[A-Za-z]", both, pattern)


def one_of(words: str, *patterns: str) -> str:
    """Write words, and patterns as they are, as alternatives; a capital stays a capital.

    >>> one_of("mr Ark", "[x]y")
    '(?:mr|[A]rk|[x]y)'
    """
    exact = (re.sub("[A-Z]", r"[\g<0>]", word) for word in words.split())
    return f"(?:{'|'.join([*exact, *patterns])})"


@lru_cache(1)
def ptb_rules() -> list[tuple[re.Pattern, Callable[[str], str]]]:
    """Build the rules of tokens: (pattern, how the token is written).

    Group 1 of a pattern is the token; what follows it is context, which is not consumed but counts
    where rules compete: at each position the longest match wins, and on ties the earlier rule.
    """
    # parts of patterns: L a letter or what else may be inside a word, LD or a digit; P, p the same
    # of plain letters; q an apostrophe, Q any single quote. Small letters match in both cases.
    letters, upper = of_category("L"), of_category("Lu")
    inside, entity = letters + spans(INSIDE_WORDS), "&[aeiouAEIOU](?:acute|grave|uml);"
    L, LD = f"(?:[{inside}]|{entity})", rf"(?:[{inside}\d]|{entity})"
    word = rf"{L}{LD}*(?:[.!?]{L}{LD}*)*"
    q, Q = "(?:['’\x92]|&apos;)", "(?:['’\x92`‘‛\x91]|&apos;)"
    clitic = f"{q}(?:[msdMSD]|re|ve|ll)"
    acronym2 = (
        r"(?:u\.s\.-u\.s\.r|u\.s\.-u\.k|(?:canada|sino|korean|eu|japan|non)-u\.s"
        r"|[A-Za-z](?:\.[A-Za-z])+)"
    )
    acronym = f"(?:{acronym2}|[A-Za-z])"
    tag = (
        r"(?:<[A-Za-z][A-Za-z0-9_:.-]*(?: +[A-Za-z][A-Za-z0-9_:.-]*"
        r"(?: *= *(?:'[^'\\\n]*'|\"[^\"\\\n]*\"))?)* */? *>"
        r"|</[A-Za-z][A-Za-z0-9_:.-]* *>|<[!?][A-Za-z-][^>\n]*>)"
    )
    starts_sentence = one_of(
        r"About According Additionally After An A As At But Did During Earlier Here Her He However"
        r" How If In It Last Many More Mr\. Ms\. Now Once One Other Our She Since Some Such That"
        r" Their Then There The These They This We When While What Who Why Yet You"
    )
    begins = rf"[{BLANK}\n]+(?:{starts_sentence}|{tag})[{BLANK}\n]"
    abbr1 = one_of(  # may end a sentence; abbr2 never does
        "jan feb mar apr jun jul aug sept? oct nov dec mon tues? wed thu thurs fri ala ariz Az Ark"
        " calif colo conn ct dak Del fla ga Ill ind kans? ky La Mass md mich minn Miss mo mont neb"
        " nev okla Ore Pa penn tenn Tex va vt Wash wisc? wyo inc cos? corp ltd plc rt bancorp bhd"
        " assn univ intl sys tel est ext sq jr sr blvd rd bros ed\\.d ph\\.d esq etc al seq bldg",
        "[Pp]?[Pp][t][ey][s]?",
    )
    abbr2 = one_of(
        "mr mrs ms Miss drs? profs? sens? reps? attys? lt col gen messrs govs? adm rev maj sgt cpl"
        " pvt mt capt ste? ave pres lieut hon brig co?mdr pfc spc supts? det adj adv asst assoc ens"
        " insp mlle mme msgr sfc ft vs alex wm jos cie cf treas ph invt elec natl dept a\\.k\\.a",
        f"[Mm][ft][g]|{acronym}",
    )
    extension = one_of(
        "bat bmp class cgi cpp c dll docx? exe gif gz html? h jar java jpe?g mov mp3 pdf php pl png"
        " ppt ps py sql tar txt wav xml x zip"
    )
    outside, at_end = ' \t\n"<>|()', ".!?{},-"  # of addresses
    path, label = f"/[^{outside}]+[^{outside}{at_end}]", f"[^{outside}.!?{{}},]+"
    slashed = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
    hyphened = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:{acronym2}\.|[A-Za-z0-9\xad]+))+"
    P, p = f"[{letters}]", rf"[{letters}\d]"
    thing = rf"(?:[dDoOlL]{Q}{p})?{p}+(?:[-_֊‐‑](?:[dDoOlL]{Q}{p})?{p}+)*"
    joined = "[A-Z]+(?:(?:[+]|&(?:amp;)?)[A-Z]+)+"
    d, dash, eye = "[0-9]", "[- \xa0]", "[-^x=~<>']"
    unchanged, own = str, lambda t: OTHER_NAMES.get(t, t)
    one = lambda t: re.sub(f"[{BLANK}]", "\xa0", t)  # noqa: E731
    soft = lambda t: t.replace("\xad", "") or "-"  # noqa: E731
    ands = lambda t: re.sub("&[aA][mM][pP];", "&", t)  # noqa: E731
    stopped = lambda t: f"{t} ."  # noqa: E731
    renamed = lambda t: "".join(BRACKETS[c] if c in "()" else c for c in one(t))  # noqa: E731
    quoted = lambda t: re.sub("&apos;|.", lambda m: QUOTES.get(m[0], m[0]), t)  # noqa: E731
    # fmt: off
    rules = [  # token, context, how it is written
        # names, contractions, tags, entities
        (r"c\+\+|[cCfF]#", "", unchanged),
        ("can", "not", unchanged), ("'t", "was|is", unchanged), ("gon|wan", "na", unchanged),
        ("got", "ta", unchanged), ("lem|gim", "me", unchanged),
        (tag, "", lambda t: t.replace(" ", "\xa0")),
        ("[–—―\x96\x97]|&(?:mdash|ndash|md);", "", lambda t: "--"),
        ("&amp;", "", own), ("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);", "", unchanged),
        # words, with and without apostrophes
        (word, clitic, soft),
        ("[A-Za-z\xad]*[A-MO-Za-mo-z]\xad*", f"n{Q}t", soft),
        (word, "", soft),
        (f"{q}n{q}?|[lLdDjJ]{q}|(?:dunkin|somethin|ol){q}|{q}em|{q}till?", "", unchanged),
        (f"[A-HJ-XZn]{Q}{P}{P}+|{q}[2-9]0s|{q}cause", "", unchanged),
        (f"{P}+[aeiouyAEIOUY]{Q}[aeiouA-Z]{P}*", "", unchanged),
        (r"cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l", "", unchanged),
        (f"o{Q}o", "", unchanged), (f"y{q}", P, unchanged),
        # addresses
        (rf"https?://[^{outside}{{}}]+[^{outside}{at_end}]", "", unchanged),
        (rf"www\.(?:{label}\.)+[a-zA-Z]{{2,4}}", "", unchanged),
        (rf"www\.(?:{label}\.)+?[a-zA-Z]{{2,4}}{path}", "", unchanged),
        (rf"(?:[^{outside}`'.!?{{}},-_$]+\.)+(?:com|net|org|edu)(?:{path})?", "", unchanged),
        (rf"(?:<|&lt;)?[A-Za-z0-9][^{outside}\xa0{{}}]*@(?:[^{outside}{{}}.\xa0]+\.)*"
         rf"[^{outside}{{}}.\xa0]+(?:>|&gt;)?", "", unchanged),
        (f"@[A-Za-z_][A-Za-z_0-9]*|#{L}+", "", unchanged),
        # endings cut off before, numbers, fractions
        (f"{clitic}|n{Q}t", "[^A-Za-z]", quoted),
        (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", "", unchanged),
        (r"[+-]?(?:\d*(?:[.:,\xad٫٬]\d+)+|\d+)", "", soft),
        ("[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)", "", unchanged),
        (rf"(?:\d{{1,4}}{dash})?\d{{1,4}}(?:\\?/|⁄)\d{{1,4}}", "", one),
        ("[¼½¾⅓-⅞]", "", own),
        (rf"-(?:l|r)(?:r|c|s)b-|c\.d\.s|(?:pro|anti)-|s&p-500|s&ls|cap{q}n|c{q}est", "", unchanged),
        (rf"{slashed}(?:\\?/{slashed}){{1,2}}", "", unchanged),
        (r"[A-Z]*\$|#|[¢£¤€₠\x80]", "", own),
        # abbreviations: a dot that ends the sentence, too, is written twice
        (r"[A-Za-z]\.", begins, lambda t: f"{t[0]} ."), (rf"{acronym}\.", begins, stopped),
        (r"(?:ca|figs?|prop|nos?|art|bldg|pp|op)\.", rf"[{BLANK}\n]?\d", unchanged),
        (r"(?:pty|pte|co)\.", f"[{BLANK}](?:ltd|lim)", unchanged),
        (rf"{abbr1}\.", rf"[{BLANK}\n](?:[{BLANK}\n{upper}]|{tag})", stopped),
        (rf"{abbr1}\.", r"[\s\S][\s\S]", unchanged), (rf"{abbr1}\.", "", stopped),
        (rf"{abbr2}\.", "", unchanged), (abbr2, f"[{BLANK}]", unchanged),
        (f"{acronym}|{q}[0-9][0-9]", rf"[{BLANK}\n]", unchanged),
        (rf"{LD}+(?:\.{LD}+)*\.{extension}", rf"[{BLANK}\n.?!,]", unchanged),
        (rf"{word}\.", "[,;:、]", soft),
        # telephone numbers, marks, faces
        (rf"\({d}{{2,3}}\)[ \xa0]?{d}{{3,4}}{dash}?{d}{{3,5}}", "", renamed),
        (rf"(?:\+\+?)?(?:{d}{{2,4}}{dash})?{d}{{2,4}}{dash}{d}{{3,4}}{dash}?{d}{{3,5}}", "", one),
        ('"|&quot;', "[A-Za-z0-9$]", lambda t: "``"), ('"|&quot;', "", lambda t: "''"),
        ("<|&lt;|>|&gt;", "", own),
        (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]", renamed),
        (rf"{eye}_{eye}|\({eye}[_.]?{eye}\)|\([\^x=~<>']-[\^x=~<>'`]\)", "", renamed),
        (r"[()]", "", renamed), (r"[{}\[\]]", "", lambda t: BRACKETS[t]),
        ("-+", "", lambda t: "--" if 3 <= len(t) <= 4 else t),
        (r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|…", "", lambda t: "..."),
        (r"@+|#+|_+|\*+|(?:\\\*){1,3}", "", unchanged),
        ("[,;:、]|[?!]+|[.¡¿。=/]", "", unchanged),
        # hyphenated words, then quotes and all other marks
        (hyphened, "", soft), (rf"{hyphened}\.", "[,;:、]", soft),
        (thing, "", unchanged), (rf"{thing}\.", "[,;:、]", unchanged),
        (joined, "", ands), (rf"{joined}\.", "[,;:、]", ands),
        ("'", r"[A-Za-z][^ \t\n\xa0]", lambda t: "`"),
        (f"{clitic}|n{Q}t", "", quoted),
        (rf"''|[`‘’“”‚‛„‟‹›«»\x91-\x94]{{1,2}}|{q}", "", quoted),
        (f"<<|>>|[{spans(SYMBOLS)}]", "", unchanged),
        ("&nbsp;", "", lambda t: ""),
    ]
    # fmt: on
    return [
        (re.compile(f"({any_case(token)})(?:{any_case(context)})"), out)
        for token, context, out in rules
    ]


BLANKS = re.compile(f"[ \t][{BLANK}]*")
SPLIT_WORDS = frozenset("cannot gonna gotta lemme gimme wanna".split())
PLAIN_WORD = re.compile(r"([A-Za-z]+)(?=[ \n]|\Z)")  # no other rule reaches beyond the space


def ptb_lex(captions: list[str]) -> list[list[str]]:
    """Cut captions into Penn Treebank tokens, punctuation still there.

    Args:    captions: in COCO's order, since a token may depend on how the next caption begins.
    Returns: each caption's tokens, lower-cased.

    >>> ptb_lex(["The chef can't cook 1 1/2 hours (at 350).", "stir-fry, then salt & pepper!"])
    ... # doctest: +NORMALIZE_WHITESPACE
    [['the', 'chef', 'ca', "n't", 'cook', '1\\xa01/2', 'hours', '-lrb-', 'at', '350', '-rrb-', '.'],
     ['stir-fry', ',', 'then', 'salt', '&', 'pepper', '!']]
    """
    # whatever ends a line would move all captions after it by one; digits are known up to 0xffff
    text = "\n".join(re.sub("[\n\r\x0b\x0c\x85\u2028\u2029]", " ", c) for c in captions)
    text = re.sub("[\U00010000-\U0010ffff]", lambda m: "\uffff" if m[0].isdecimal() else m[0], text)
    lines, at, rules = [[]], 0, ptb_rules()
    while at < len(text):
        if text[at] == "\n":
            lines.append([])
            at += 1
        elif m := BLANKS.match(text, at):
            at = m.end()
        elif (m := PLAIN_WORD.match(text, at)) and m[1].lower() not in SPLIT_WORDS:
            lines[-1].append(m[1].lower())
            at = m.end()
        else:
            best, write = None, None
            for pattern, out in rules:
                m = pattern.match(text, at)
                if m and (best is None or m.end() > best.end()):
                    best, write = m, out
            if best is None:  # nobody's character: gone, and it separates
                at += 1
            else:
                lines[-1] += filter(None, write(best[1]).lower().split(" "))
                at = best.end(1)
    return lines


def ptb_tokenize(captions: list[str]) -> list[str]:
    """Clean captions as COCO's evaluation does: Penn Treebank tokens, lower-cased, without marks.

    >>> ptb_tokenize(["A man (in red) isn't here...", "Wow!! Stir-fry: 1,000 it's."])
    ["a man -lrb- in red -rrb- is n't here", "wow !! stir-fry 1,000 it 's"]
    """
    return [" ".join(t for t in line if t not in DROPPED) for line in ptb_lex(captions)]


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


EXAMPLE = "--references references.json --hypotheses captions.json --tokenizer ptb"


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
    if args.json:
        found = {"task": "captions", "dataset": name, "n": len(both), "tokenizer": args.tokenizer}
        found |= {"left out": only, "model": scores} | ({"per item": items} if items else {})
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
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
