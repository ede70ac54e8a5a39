"""Penn Treebank tokens as COCO's evaluation makes them (CoreNLP 3.4.1, lower-cased, lines kept).

The published scorers start a Java program for this. Here its rules are regular expressions, tried
at each place of the text: the longest match wins, among equals the earlier rule. captions.py reads
captions so:

    python eval.py captions --references R.json --hypotheses H.json --tokenizer ptb
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

import numpy as np

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
