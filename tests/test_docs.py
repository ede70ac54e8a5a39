"""What is written about the code is true of it: docstrings, --help, README, the paper's numbers."""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ablation
import bench
import data
import eval
import finetune
import s3d
import train
import vlm

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p.name for p in ROOT.glob("*.py"))

# ---------------------------------------------------------------------------------------------
# Docstrings: shapes, units, errors


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Yield the public functions, classes and methods of a file with their names."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def annotated(node: ast.FunctionDef) -> dict[str, str]:
    """Return {argument: its annotation}."""
    args = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return {a.arg: ast.unparse(a.annotation) for a in args if a.annotation}


ARRAY = re.compile(r"(?!dict|list|Callable).*\b(Tensor|ndarray)\b")  # those may be of any shape
SHAPE = r"(\((?:[^(),]{1,20}, ?)+(?:[^(),]{0,20}|\w+\(\w\))\)|\(\)|any shape)"  # (B, V), (N,), ()
UNIT = re.compile(r"seconds?\b|nats|mi?b\b|\bshare|\bchance|fraction|0\.\.1|\brate|operations|"
                  r"deviation|difference|\bsteps|\bunit\b|the paper's number", re.I)  # fmt: skip
COMMANDS = ("main", "cli", "command")  # what they raise is one line at exit code 2 (vlm.run)


def gaps(name: str, node: ast.AST) -> list[str]:
    """List what a docstring does not say: each array's shape, each float's unit, each error."""
    doc = ast.get_docstring(node) or ""
    if not doc or isinstance(node, ast.ClassDef):
        return [] if doc else [f"{name} has no docstring"]
    said, args, returns = [], annotated(node), ast.unparse(node.returns) if node.returns else ""
    arrays = [a for a, kind in args.items() if ARRAY.match(kind)]
    before, arrow, _ = doc.partition("->")
    in_order = arrow and len(re.findall(SHAPE, before)) >= len(arrays)  # (B, V, E), (B, V) -> ..
    for a in arrays:
        if not in_order and not re.search(rf"\b{a}\b[^.;]*?{SHAPE}", doc):
            said.append(f"{name}: no shape of {a}")
    if ARRAY.match(returns) and not re.search(SHAPE + r"|\bscalar|the same shape", doc):
        said.append(f"{name}: no shape of what it returns")
    floats = [a for a, kind in args.items() if re.fullmatch(r"float( \| None)?", kind)]
    said += [f"{name}: {a} is not named" for a in floats if not re.search(rf"\b{a}\b", doc)]
    words = f"{node.name.replace('_', ' ')} {doc}"
    if (floats or returns in ("float", "float | None")) and not UNIT.search(words):
        said.append(f"{name}: floats without a unit or range")
    errors = {ast.unparse(n.exc.func) for n in ast.walk(node)
              if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)}  # fmt: skip
    # a DataError is a ValueError
    silent = {e for e in errors if e not in doc and not (e == "DataError" and "ValueError" in doc)}
    if name not in COMMANDS and silent:
        said.append(f"{name}: does not say that it raises {', '.join(sorted(silent))}")
    return said


@pytest.mark.parametrize("file", FILES)
def test_docstrings_name_shapes_units_and_errors(file):
    tree = ast.parse((ROOT / file).read_text())
    assert ast.get_docstring(tree), f"{file} does not say what it is"
    found = [gap for name, node in public(tree) for gap in gaps(name, node)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("code, gap", [
    ("def f(x): ...", "f has no docstring"),
    ("class A:\n  '''A.'''\n  def f(self): ...", "A.f has no docstring"),
    ("def f(x: Tensor):\n  '''Take x (sec. 4.1).'''", "f: no shape of x"),
    ("def f(x: Tensor | None, y: np.ndarray):\n  '''x (B, D); y.'''", "f: no shape of y"),
    ("def f(x: Tensor, y: Tensor) -> Tensor:\n  '''(B, D) -> (B,).'''", "f: no shape of x"),
    ("def f() -> Tensor:\n  '''Make one.'''", "f: no shape of what it returns"),
    ("def f(x: float):\n  '''Wait for a share.'''", "f: x is not named"),
    ("def f(x: float):\n  '''Wait for x.'''", "f: floats without a unit or range"),
    ("def f():\n  '''Do.'''\n  raise ValueError('x')", "f: does not say that it raises ValueError"),
    ("def f(x: Tensor, y: Tensor) -> Tensor:\n  '''(B, D), (B,) -> ().'''", None),
    ("def f():\n  '''Do, or OSError.'''\n  raise OSError('x')\n  raise ValueError('x')",
     "f: does not say that it raises ValueError"),
    ("def f(x: float) -> float:\n  '''Wait for x seconds, or a ValueError.'''\n"
     "  raise ValueError('x')", None),
])  # fmt: skip
def test_gaps_in_docstrings_are_found(code, gap):
    found = [g for name, node in public(ast.parse(code)) for g in gaps(name, node)]
    assert found[:1] == ([gap] if gap else [])


# ---------------------------------------------------------------------------------------------
# --help: grouped, with units, defaults and an example, in 100 columns


READ = argparse.ArgumentParser.parse_args


class Declared(Exception):
    """Carries a parser out of a main that was about to read its arguments."""


@pytest.fixture
def parsers(monkeypatch) -> dict[str, argparse.ArgumentParser]:
    """Collect the parser of every command and sub-command, by its name."""

    def grab(parser, *_):
        raise Declared(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", grab)
    monkeypatch.setenv("COLUMNS", "100")
    found = {}
    for module in (train, finetune, eval, data, s3d, bench, vlm, ablation):
        file = Path(module.__file__).name
        name = {"ablation.py": "bench.py ablation"}.get(file, file)
        with pytest.raises(Declared) as caught:
            getattr(module, "cli", module.main)(*([] if hasattr(module, "cli") else [[]]))
        found[name] = caught.value.args[0]
        for action in found[name]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{name} {sub}": parser for sub, parser in action.choices.items()}
    return found


COUNTED = re.compile(  # what a number may be a number of
    r"clips|steps?\b|seconds|pieces|layers|hidden size|share|dropout|passes|micro-batches|rate|"
    r"norm|seed|processes|items|videos|tokens|heads|MB|runs|rows|sentences|mistakes|beams|"
    r"test clip|weights"
)


def test_every_flag_says_what_it_counts_and_its_default(parsers):
    assert len(parsers) > 20 and "eval.py captioning" in parsers and "train.py" in parsers
    for name, parser in parsers.items():
        hidden = (argparse.SUPPRESS, "command" if name in ("eval.py", "data.py", "vlm.py") else "")
        for action in (a for a in parser._actions if not {a.help, a.dest} & {*hidden}):
            flag, text = f"{name} {'/'.join(action.option_strings) or action.dest}", action.help
            assert text, f"{flag} has no help"
            if action.type in (int, float):
                assert COUNTED.search(text), f"{flag}: {text!r} names no unit"
            default = action.default
            if action.option_strings and default not in (None, False, "", argparse.SUPPRESS):
                assert "default: " in text, f"{flag}: {text!r} does not say its default"
                assert isinstance(default, list) or str(default) in text, flag


@pytest.mark.parametrize("file, Config", [
    ("train.py", train.TrainConfig), ("finetune.py", finetune.TuneConfig),
])  # fmt: skip
def test_every_setting_says_what_is_taken_without_it(parsers, file, Config):
    """A default of None is filled in later: the help says with what; others stand in brackets."""
    said = {a.dest: a.help for a in parsers[file]._actions}
    for f in dataclasses.fields(Config):
        if f.metadata["at"] or "bool" in str(f.type):
            continue
        if f.default is not None:
            assert f"default: {f.default})" in said[f.name]
        else:
            assert "default: " in said[f.name] or f.metadata["metavar"], said[f.name]


def test_every_help_fits_100_columns_is_grouped_and_has_an_example(parsers):
    for name, parser in parsers.items():
        text = parser.format_help()
        long = [line for line in text.splitlines() if len(line) > 100]
        assert not long, f"{name} --help: {long}"
        said = text.replace(parser.format_usage(), "")
        assert re.search(rf"(python|torchrun)( -\S+)* {re.escape(name)}\b", said), name
        flags = [a for a in parser._actions if a.option_strings and a.dest != "help"]
        groups = [g for g in parser._action_groups[2:] if g._group_actions]
        assert len(flags) < 8 or len(groups) >= 2, f"{name} --help: {len(flags)} flags in one heap"


def test_the_papers_settings_stand_beside_others_defaults():
    """Sec. 5.2 in --help: 15 epochs of 256 clips, 32 of a video, from 8 pieces, lr 5e-5, norm 2."""
    said = {f.name: f.metadata["help"] for f in dataclasses.fields(train.TrainConfig)}
    theirs = dict(epochs="15", batch="256", clips_per_video="32", min_text="8", lr="5e-5")
    theirs |= dict(warmup="1000", clip="2.0", precision="fp16", mmm="0.5", layers="12", width="768")
    for name, value in (theirs | dict(dropout="BERT's 0.1")).items():
        assert re.search(rf"paper('s|:)? {value}", said[name]), said[name]
    said = {f.name: f.metadata["help"] for f in dataclasses.fields(finetune.TuneConfig)}
    assert "paper's 122" in said["warmup"] and "paper: 16" in said["stride"]


# ---------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "docs").glob("*.png")))
def test_pictures_are_small_and_1200_pixels_wide(path):
    head = (ROOT / "docs" / path).read_bytes()
    assert len(head) < 60_000, f"docs/{path} has {len(head)} bytes"
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", head[16:20])[0] == 1200


# ---------------------------------------------------------------------------------------------
# README: files, names, tests, flags and commands are there

README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, "small-corpus.md": (ROOT / "docs/small-corpus.md").read_text()}
SOURCE = {name: (ROOT / name).read_text() for name in FILES}
TESTS = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))


def rows(heading: str) -> list[list[str]]:
    """Read the first table under a heading of README: its cells, without the head."""
    part = README[README.index(f"{heading}\n") :]
    lines = part[part.index("\n|") :].strip().split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_readme_lists_every_file_with_its_length():
    """Within a tenth: enough to choose what to read, and no commit has to touch README for it."""
    said = {}
    for files, lengths, *_ in rows("## Read it"):
        names = re.findall(r"`([\w./]+)`", files)
        if lengths:  # tests/ has none
            said |= zip(names, map(int, lengths.split(",")), strict=True)
    assert sorted(said) == FILES, set(said) ^ set(FILES)
    for name, length in said.items():
        n = len(SOURCE[name].splitlines())
        assert abs(length - n) <= n / 10, f"{name} has {n} lines, README says {length}"


def test_readme_names_code_and_tests_that_are_there():
    """The table paper -> code -> test: every name is imported, every test is one, or a marker."""
    table = rows("### Paper, code, test")
    assert len(table) > 20
    for paper, code, test in table:
        for name in re.findall(r"`([^`]+)`", code):
            if name.startswith("-"):
                continue  # flags: below
            first, *rest = name.split(".")
            here = importlib.import_module(first) if f"{first}.py" in FILES else getattr(vlm, first)
            for part in rest:
                here = getattr(here, part)
        for node in re.findall(r"`([^`]+)`", test):
            marker = re.fullmatch(r"pytest -m (\w+)", node)
            if marker:
                assert f"pytest.mark.{marker[1]}" in TESTS, f"{paper}: there is no {node}"
                continue
            file, _, name = node.partition("::")
            assert f"def {name}(" in (ROOT / file).read_text(), f"{paper}: there is no {node}"
    for name in re.findall(r"`(test_\w+)`", "".join(TEXTS.values())):
        assert f"def {name}(" in TESTS, f"there is no {name}"


def test_readme_says_where_each_part_of_the_paper_is():
    """Every equation, figure, results table and section of the method is in a row's first cell."""
    found = set()
    for said, *_ in rows("### Paper, code, test"):
        for kind, a, b in re.findall(r"(Eq\.|Table|Figure|footnote)s? (\d+)(?:-(\d+))?", said):
            found |= {f"{kind} {n}" for n in range(int(a), int(b or a) + 1)}
        found |= set(re.findall(r"(?<![\d.])\d(?:\.\d)+", said))
    wanted = {f"Eq. {n}" for n in range(1, 10)} | {f"Table {n}" for n in range(1, 12)}
    wanted |= {f"Figure {n}" for n in range(1, 5)} | {f"4.{n}" for n in range(1, 6)}
    wanted |= {"footnote 2", "3.2", "3.3", "5.1.1", "5.1.2", "5.2", "5.5.2"}
    assert not wanted - found, f"not in README's table: {', '.join(sorted(wanted - found))}"


def commands(text: str, remark: str) -> Iterator[tuple[str, bool]]:
    """Yield what a text calls from the shell, and whether it is whole: a line of its own.

    A name between back-ticks, as in `python eval.py TASK`, may leave arguments out. remark: what
    a remark behind a command begins with, a regular expression.
    """
    for line in re.findall(r"^(?:    )?((?:pip .* && )?(?:python|torchrun) .*)$", text, re.M):
        line = re.sub(r"^pip .* && ", "", line)
        yield re.split(remark, line)[0], True
    for line in re.findall(r"`((?:python|torchrun) [^`]+)`", text):
        yield line, "--" in line


def arguments(command: str, parsers: dict) -> tuple[argparse.ArgumentParser, list[str]] | None:
    """Find a command's parser and arguments; placeholders become something that it can read."""
    launcher = ("--nproc", "--nnodes", "--rdzv")
    words = [w for w in shlex.split(command)[1:] if not w.startswith(launcher)]
    if words[0] not in FILES:
        return None  # python -m, python -c
    swap = {"TASK": "retrieval", "VIDEO_OR_FOLDER..": "x.mp4", "VIDEO..": "x.mp4"}
    words = [swap.get(w, w) for w in words]
    if words[:2] == ["bench.py", "ablation"]:
        words = ["bench.py ablation", *words[2:]]
    return parsers[words[0]], words[1:]


@pytest.mark.parametrize("where", [*TEXTS, *FILES])
def test_every_command_that_is_written_down_is_one_that_is_understood(where, parsers, monkeypatch):
    """Only read, not run: unknown flags, missing ones and wrong choices end with a usage error."""
    text = TEXTS.get(where) or ast.get_docstring(ast.parse(SOURCE[where])) or ""
    text = text.replace("\\\n", "")
    seen = 0
    remark = "  # " if where in TEXTS else "   +|  # "  # README's lines can be pasted
    for command, whole in commands(text, remark):
        if found := arguments(command, parsers):
            parser, argv = found
            seen += 1
            if not whole:
                names = [n for a in parser._actions if a.dest in ("command", "task", "name")
                         for n in a.choices]  # fmt: skip
                assert not argv or not names or argv[0] in names, f"{where}: {command}"
                continue
            try:
                READ(parser, argv)
            except SystemExit as ended:
                assert not ended.code, f"{where}: {command}"
    assert seen >= 20 if where == "README.md" else True


BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture
def beside_a_run(small_toy, a_run, tmp_path, monkeypatch):
    """Stand in a folder with toy/ and runs/toy, as a reader of README does."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "toy").symlink_to(a_run)
    (tmp_path / "toy").symlink_to(small_toy)
    monkeypatch.chdir(tmp_path)


def test_readmes_python_embeds_a_video_and_a_sentence(beside_a_run):
    exec(BLOCKS[0], found := {})
    assert found["score"].shape == found["cosine"].shape == (2,) and len(BLOCKS) == 2
    assert found["score"].isfinite().all() and found["cosine"].abs().max() <= 1


@pytest.mark.hf
def test_readmes_hugging_face_code_gives_our_hidden_states(beside_a_run):
    exec(BLOCKS[1], found := {})
    model, _ = vlm.load_run("runs/toy")
    ours = model.encode_text(found["text"], torch.ones_like(found["text"], dtype=torch.bool))
    assert torch.allclose(found["h"], ours, atol=1e-5)


def constants(tree: ast.Module) -> str:
    """Join a file's texts, a line each; what an f-string fills in is a bar."""
    said = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "|" for v in node.values)
            said.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append(node.value)
    return "\n".join(said)


def test_readmes_errors_are_those_that_the_code_says():
    """Each line of *When something goes wrong*, but for what stands in for a value: a number, NAMES
    in capitals, a flag, brackets, dots. Two lines are not ours: PyTorch's and Hugging Face's."""
    said = "\n".join(constants(ast.parse(text)) for text in SOURCE.values())
    value = r"\b[A-Z]{3,}\b|\b\w+/|--[\w-]+|\([^)]*\)|\.\.|os\.system|[\w-]+\.\w+\b|\b\d[\d.]*"
    table = rows("## When something goes wrong")
    seen = 0
    for left, _ in table:
        if "Hugging Face" in left or "CUDA out of memory" in left:
            continue
        for text in re.findall(r"`([^`]+)`", left):
            for part in re.split(value, text):
                if len(part := part.strip(" ,:;`")) > 3:
                    assert part in said, f"{text!r}: the code does not say {part!r}"
                    seen += 1
    assert len(table) > 20 and seen > 25


def test_every_flag_that_readme_names_exists(parsers):
    known = {flag for parser in parsers.values() for a in parser._actions
             for flag in a.option_strings}  # fmt: skip
    others = {"--no-deps", "--kills"}  # pip's, tests/kill.py's; then torchrun's
    others |= {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", "".join(TEXTS.values())))
    assert len(named) > 30 and not named - known - others, named - known - others


# ---------------------------------------------------------------------------------------------
# The paper, found in the source by its own names


@pytest.mark.parametrize("name", [
    *(f"Eq. {n}" for n in range(1, 10)), *(f"Table {n}" for n in range(1, 12)),
    *(f"Figure {n}" for n in range(1, 5)), "footnote 2",
    *(f"sec. 3.{n}" for n in (1, 2, 3)), *(f"sec. 4.{n}" for n in range(1, 6)),
    *(f"sec. 5.{n}" for n in ("1.1", "1.2", "2", "3", "4", "4.1", "5.1", "5.2")),
    "masked modality model", "masked token loss", "MFM-MLM", "D without s", "dummy",
])  # fmt: skip
def test_what_the_paper_names_is_found_by_that_name(name):
    """`grep "Eq. 6" *.py`, as a reader with the paper open would."""
    found = re.compile(re.escape(name).replace(r"\ ", r"\s+") + r"(?![\d]|\.\d)", re.I)
    assert any(found.search(text) for text in SOURCE.values()), f"no source line says {name}"


@pytest.mark.parametrize("what, file, line", [
    ("30 frames a second", "s3d.py", r"^FPS = 30\b"),
    ("one token of 512 numbers a second", "bert.py", r"video_dim: int = 512\b"),
    ("BERT-base, 768 wide", "bert.py", r"hidden_size: int = 768\b"),
    ("length 96", "bert.py", r"max_len: int = 96\b"),
    ("of which 32 for video", "bert.py", r"max_video_len: int = 32\b"),
    ("2.4 word pieces a second", "toy.py", r"PIECES_PER_SECOND = 2\.4\b"),
    ("8 .. ", "train.py", r"^        8, \"shortest clip text in word pieces"),
    (".. 64 word pieces", "data.py", r"MAX_TEXT = 64\b.*5\.2"),
    ("15 epochs of 8 videos' 32 clips", "train.py", r"epochs=15, batch=256, clips_per_video=32"),
    ("50 % MMM", "train.py", r"mmm: float = opt\(0\.5,"),
    ("15 % of tokens", "data.py", r"p: float = 0\.15"),
    ("Adam, betas", "loop.py", r"optim\.Adam\(.*betas=\(0\.9, 0\.98\)"),
    ("5e-5", "train.py", r"5e-5 \* \(768"),
    ("1000 steps of warm-up", "train.py", r"WARMUP = 1000\b.*5\.2"),
    ("122 in fine-tuning", "finetune.py", r"WARMUP = 122\b.*5\.2"),
    ("norm 2.0", "loop.py", r"clip: float = opt\(2\.0,"),
    ("windows of 32 s", "tasks.py", r"^WINDOW = 32\b.*5\.1\.2"),
    ("every 16 s", "finetune.py", r"stride: int = opt\(16,"),
])  # fmt: skip
def test_each_hyper_parameter_of_the_paper_is_one_line(what, file, line):
    """Sec. 5.2 and 5.1.2, where they are set; what they do is tested where it is done."""
    assert re.search(line, SOURCE[file], re.M), f"{what} is not in {file}"
