"""Damage a valid file in the ways files get damaged, or are made to be; same seed, same damage.

    mutant(valid, kind, rng)    kind: bytes, text, json, zip, npy, safetensors

Formats that check or wrap their contents are opened, damaged inside and closed again.
"""

import io
import json
import random
import re
import zipfile

LONG, DEEP = 300_000, 100_000
IDS = ["../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "C:\\x", "a\0b", "x" * 300, "", " ", "~",
       "a\nb", "\u202egpj", "\ufeffx", "é" * 130, "-rf", "$(touch x)", "%s", "{0}"]  # fmt: skip
NUMBERS = ["-1", "-0.0", "1e308", "1e309", "-1e308", "1" + "0" * 400, "9" * 5000, "NaN", "Infinity",
           "-Infinity", "0", "1", "2147483648", "4294967295", "9223372036854775807", "1e7", "0.1",
           "18446744073709551616", "1_000", "٣", "²", "0x10", "1e-320", "true"]  # fmt: skip
VALUES = ["null", "true", "false", "{}", "[]", "[[]]", '""', '"x"', '{"a": 1}', "[1, 2, 3]", '" "']
VALUES += ["[" * n + "]" * n for n in (9, 500, DEEP)] + [
    '{"a":' * n + "1" + "}" * n for n in (400,)
]
VALUES += ["[" * DEEP, f'"{"word " * (LONG // 5)}"', f'"{"x" * LONG}"']
VALUES += ['"\\ud800"', '"a \\udfff b"', '"\\ud83c\\udf5c"', '"\\u0000"', '"\\u202e\\u0007"']
FIELDS = ["", " ", '"', "'", '"a\nb"', ",", "\t", "\0", "\ufeff", "\u2028", "\x85", "\r", "\u202e",
          "x" * LONG, "word " * (LONG // 5), "a,b,c", "🍜", "nan", "inf", "#"]  # fmt: skip
JSON_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"(?!\s*:)|-?\d[\d.eE+-]*|true|false|null')
JSON_KEY = re.compile(rb'"(?:[^"\\]|\\.)*"(?=\s*:)')


def mutant(valid: bytes, kind: str, rng: random.Random) -> bytes:
    """Damage a file once, seldom twice."""
    inside = {"json": in_json, "text": in_text, "zip": in_zip, "npy": in_npy}
    inside["safetensors"] = in_safetensors
    for _ in range(1 if rng.random() < 0.8 else 2):
        how = inside.get(kind) if rng.random() < 0.75 else None
        try:
            valid = (how or in_bytes)(valid, rng)
        except (ValueError, LookupError, RecursionError, zipfile.BadZipFile):  # not to be opened
            valid = in_bytes(valid, rng)
    return valid


def in_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, insert, delete, repeat or overwrite bytes, whatever they stand for."""
    if not data:
        return rng.choice([b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"{}", b"\n"])
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 2, 4, 8, 100, len(data)]))
    junk = rng.choice([b"\0", b"\xff", b"\x80", b"\n", rng.randbytes(1)]) * rng.choice(
        [1, 4, 8, 64]
    )
    damage = rng.randrange(8)
    if damage == 0:
        return data[:a]
    if damage == 1:
        return data[b:] if rng.random() < 0.5 else data[:a] + data[b:]
    if damage == 2:
        return data[:a] + junk + data[a:]
    if damage == 3:
        return data[:a] + data[a:b] * 2 + data[b:]
    if damage == 4:  # a size or an offset, perhaps
        n = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
        wide = rng.choice([4, 8])
        return data[:a] + (n % 256**wide).to_bytes(wide, "little") + data[a + wide :]
    if damage == 5:
        return data[:a] + junk + data[a + len(junk) :]
    if damage == 6 and rng.random() < 0.2:
        return rng.choice([b"", data * 2, bytes(len(data)), b"\xef\xbb\xbf" + data])
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def in_json(data: bytes, rng: random.Random) -> bytes:
    """Put another value or key into JSON, or take one away; the result is mostly still JSON."""
    damage = rng.randrange(10)
    if damage < 5:
        new = rng.choice([*VALUES, *NUMBERS, *map(json.dumps, IDS)]).encode()
        return _replace(JSON_VALUE, data, new, rng)
    if damage < 8:
        keys = JSON_KEY.findall(data)
        new = rng.choice([rng.choice(keys), rng.choice(keys), json.dumps(rng.choice(IDS)).encode()])
        return _replace(JSON_KEY, data, new, rng)
    top = json.loads(data)
    place, key = top, None
    for _ in range(rng.choice([1, 1, 2, 3, 4, 5])):  # go down, a random way
        if not isinstance(place, dict | list) or not place:
            break
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        above, place = place, place[key]
    if damage == 8:
        del above[key]
    else:
        above[key] = rng.choice([above, place, [place], {}, [], {"a": place}, None])
        if above[key] is above:
            above[key] = json.loads(json.dumps(top))
    return json.dumps(top).encode()


def _replace(what: re.Pattern, data: bytes, new: bytes, rng: random.Random) -> bytes:
    """Put `new` in the place of one match, drawn at random."""
    spot = rng.choice([m.span() for m in what.finditer(data)])
    return data[: spot[0]] + new + data[spot[1] :]


def in_text(data: bytes, rng: random.Random) -> bytes:
    """Damage a line, or a field of a separated one."""
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    damage = rng.randrange(8)
    if damage == 0:
        del lines[i]
    elif damage == 1:
        lines.insert(rng.randrange(len(lines)), lines[i])
    elif damage == 2:
        lines[i] = rng.choice([b"", b'"', lines[i] * 2, b"\xff", b"\xef\xbb\xbf" + lines[i]])
    else:
        cut = b"\t" if b"\t" in lines[i] else b"," if b"," in lines[i] else b" "
        fields = lines[i].split(cut)
        new = rng.choice(rng.choice([IDS, NUMBERS, FIELDS])).encode()
        fields[rng.randrange(len(fields))] = new
        lines[i] = cut.join(fields)
    return b"\n".join(lines)


def in_zip(data: bytes, rng: random.Random) -> bytes:
    """Damage a member of a zip, which then fits its checksum again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        hit = rng.choice([n for n in names if n.endswith(".pkl")] * 3 + names)
        for name in names:
            inside = old.read(name)
            if name == hit:
                text = name.rpartition("/")[0] in ("function", "nonbreaking", "synonym")
                inside = (in_text if text else in_bytes)(inside, rng)
            if name != hit or rng.random() < 0.95:
                new.writestr(name, inside)
    return out.getvalue()


def in_npy(data: bytes, rng: random.Random) -> bytes:
    """Damage the header of a .npy file: shape, type, order, or what it is written in."""
    n = int.from_bytes(data[8:10], "little")
    head, body = data[10 : 10 + n].rstrip().decode("latin1"), data[10 + n :]
    number = rng.choice(
        [*NUMBERS, "(1, 2)", "'a'", "None", "[" * 99, "10**9", "2, 3", "9999999999"]
    )
    kind = rng.choice(["|O", ">f2", ">f4", "<f8", "<c8", "|V8", "<U9", "|b1", "<M8[s]", "<f4,<f4",
                       "(3,)<f4", "<f16", "", "|S0", "<i2", "O8", "|V99999999"])  # fmt: skip
    damage = rng.randrange(5)
    if damage == 0:
        head = re.sub(r"\d+(?=[,)])", lambda m: rng.choice([m[0], number]), head)
    elif damage == 1:
        head = re.sub(r"'descr': '[^']*'", lambda m: f"'descr': {kind!r}", head)
    elif damage == 2:
        head = re.sub(r"\([^)]*\)", lambda m: rng.choice(["()", "(0,)", number, "(0, 8)"]), head)
    elif damage == 3:
        head = head.replace("False", rng.choice(["True", "1", "None", "__import__('os')"]))
    else:
        head = in_bytes(head.encode("latin1"), rng).decode("latin1")
    size = len(head.encode("latin1")) % 65536
    return data[:8] + size.to_bytes(2, "little") + head.encode("latin1") + body


def in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage the JSON header of a safetensors file."""
    n = int.from_bytes(data[:8], "little")
    head = in_json(data[8 : 8 + n].rstrip(), rng)
    return len(head).to_bytes(8, "little") + head + data[8 + n :]
