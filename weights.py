"""Weights in and out: BERT's, the authors' release, run directories; nothing in a file is ever run.

    load_bert(model, DIR)     an original BERT (sec. 5.2): Hugging Face's files, safetensors or .bin
    load_mmpt(model, FILE)    the authors' fairseq checkpoint
    save_run(DIR, model, tokenizer)       what vlm.load_run and Hugging Face's classes read

    python vlm.py convert CHECKPOINT --bert BERT --out RUN

Each says which tensors were loaded, are new, or were in the file and not used.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import Tensor, nn

from benchmarks import DataError, one_line, read_text

# ---------------------------------------------------------------------------------------------
# Files of tensors


@dataclass
class LoadReport:
    """What became of every tensor: of the file (loaded, unused) and of the model (loaded, new)."""

    loaded: list[str]
    new: list[str]
    unused: list[str]
    found: int

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} of {self.found} tensors loaded"]
        for title, names in (("newly initialised", self.new), ("in the file, unused", self.unused)):
            lines += [f"  {title}: {', '.join(names)}"] if names else []
        return "\n".join(lines)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a .safetensors or a PyTorch .bin/.pt of tensors alone; nothing in it is ever run.

    Raises: ValueError for a file that is missing, cut or of another kind.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            refuse_programs(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # torch's reader fails in a dozen ways on what is no checkpoint
        raise DataError(f"{path}: not a plain file of tensors ({first_line(error)})") from None
    return plain_tensors(path, tensors)


def refuse_programs(path: Path) -> None:
    """Raise ValueError for a TorchScript program, a tar or a compressed file.

    torch.load hands the first to be run and before torch 2.6 trusts the second, weights_only or
    not; torch.save writes none of them, and a small file that unpacks to a huge one is no use.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("it is a tar file")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.filename.endswith("constants.pkl") for member in members):
            raise ValueError("it is a TorchScript program")
        if any(member.compress_type for member in members):
            raise ValueError("it is compressed")


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.int8, torch.uint8, torch.bool)


def plain_tensors(path: Path, found: object) -> dict[str, Tensor]:
    """Give back what is a dict of tensors by name that stand in the file, number by number.

    Raises: DataError for anything else, such as a view of one number as a matrix of a billion.
    """
    if not isinstance(found, dict) or not found:
        raise DataError(f"{path}: wanted a dict of tensors by name")
    size = 0
    for name, x in found.items():
        if not isinstance(name, str) or not isinstance(x, Tensor):
            raise DataError(f"{path}: {str(name)[:80]} is no tensor; wanted tensors by name")
        if x.dtype not in DTYPES or x.layout != torch.strided or x.device.type != "cpu":
            raise DataError(f"{path}: {name} is {x.dtype}, {x.layout}; wanted plain numbers")
        size += x.numel() * x.element_size()
    if size > 4 * path.stat().st_size:  # twice would do for weights that are tied
        raise DataError(f"{path}: its tensors are {size:,} bytes, the file is much smaller")
    return found


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or what kind it is where it says nothing."""
    # torch's reason stands between two pieces of advice to trust the file
    text = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". Please use `torch")[0]
    return one_line((text.strip() or type(error).__name__).splitlines()[0])


def weights_file(path: str | Path) -> Path:
    """Find the weights in a Hugging Face directory (DataError if none), or take a file as it is."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).exists():
            return path / name
    raise DataError(f"{path}: holds neither model.safetensors nor pytorch_model.bin")


def load_bert(model: nn.Module, path: str | Path, say: Callable = print) -> LoadReport:
    """Fill the encoder, and the prediction head if it is there, from an original BERT (sec. 5.2).

    Args:    model: a vlm.VLM. path: a Hugging Face directory or file, with or without the `bert.`
             prefix and the MLM head, LayerNorms named gamma/beta or weight/bias.
    Returns: the report, also handed to `say`: which tensors were loaded, are new, were not used.
    Raises:  ValueError naming the tensor for a wrong shape or a missing encoder tensor.
    """
    file = weights_file(path)

    def ours(name: str) -> str:
        key = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        return key if key.startswith(("bert.", "cls.")) else f"bert.{key}"

    report = fill(model, file, read_tensors(file), ours, ("bert.", "cls."), ("bert.",))
    say(f"BERT {file}: {report}")
    return report


def fill(
    model: nn.Module,
    file: Path,
    found: dict[str, Tensor],
    ours: Callable[[str], str],
    take: tuple[str, ...],
    need: tuple[str, ...],
) -> LoadReport:
    """Load tensors into a model and account for every one of them.

    Args:    found: the file's tensors. ours: a name in the file -> the name in the model.
             take, need: beginnings of the names that may be, and that must be, in the file.
    Raises:  ValueError naming the tensor: there twice, of another shape, not finite, missing.
    """
    state, renamed = model.state_dict(), {}
    for name, tensor in found.items():
        if (key := ours(name)) in renamed:
            raise DataError(f"{file}: {name} and {renamed[key][0]} are the same tensor twice")
        renamed[key] = (name, tensor)
    # The decoder repeats tensors of other names: where equal, it is loaded with those.
    words, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    tied = {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": bias}
    if bias not in renamed and "cls.predictions.decoder.bias" in renamed:
        renamed[bias] = renamed.pop("cls.predictions.decoder.bias")
    loaded, unused, fits = [], [], {}
    for key, (name, tensor) in renamed.items():
        if key in state and key.startswith(take):
            if tensor.shape != state[key].shape:
                raise DataError(
                    f"{file}: {name} is {tuple(tensor.shape)}, this model wants "
                    f"{tuple(state[key].shape)}: build it from the config.json beside the weights"
                )
            if not tensor.isfinite().all():
                raise DataError(f"{file}: {name} holds NaN or infinity")
            fits[key] = tensor
            loaded.append(name)
        elif tied.get(key) in renamed and torch.equal(tensor, renamed[tied[key]][1]):
            loaded.append(name)
        else:
            unused.append(name)
    missing = [k for k in state if k.startswith(need) and k not in fits]
    if missing:
        raise DataError(f"{file}: {len(missing)} encoder tensors are missing, first {missing[0]}")
    model.load_state_dict(fits, strict=False)  # strict above: every name is accounted for
    new = [k for k, _ in model.named_parameters() if k not in fits]
    return LoadReport(loaded, new, unused, len(found))


# ---------------------------------------------------------------------------------------------
# The authors' release: a fairseq checkpoint


class Inert:
    """Take the place of any class or function that a foreign pickle names, and do nothing.

    It can be called, made, filled and used as a key, as fairseq's configuration objects are while
    they are read; what it was to do or to be is never looked up.
    """

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def ignore(self, *args, **kwargs) -> None:
        """Take what a pickle puts into an object, and forget it."""

    __setstate__ = __setitem__ = append = extend = add = ignore


class Harmless(pickle._Unpickler):
    """Read a pickle of tensors and plain containers; every other name in it becomes `Inert`.

    It is pickle's reader in Python: the one in C makes room for four billion objects if told to.
    """

    KNOWN = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }

    def find_class(self, module: str, name: str):
        """Admit tensors; everything else becomes an inert stand-in."""
        return self.KNOWN.get((module, name), Inert)


class _Pickle:
    """What torch.load asks of a `pickle_module`: it reads storages itself, names go to Harmless."""

    Unpickler = Harmless

    @staticmethod
    def load(file, **options):
        return Harmless(file, **options).load()


RELEASE_PREFIX = re.compile(r"^(mmmodel\.)?(mm_encoder\.)?")


def read_mmpt(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a fairseq checkpoint, of {"state_dict": ..} or of a bare dict, in fp32.

    The file holds configuration objects of packages that nobody has any more; they are replaced by
    `Inert`, so nothing is imported and nothing in it runs. Raises: ValueError for another file.
    """
    path = Path(path)
    try:
        refuse_programs(path)
        # not torch's own unpickler, which would run the file, but Harmless: see _Pickle
        found = torch.load(path, map_location="cpu", pickle_module=_Pickle, weights_only=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:  # torch's reader fails in a dozen ways on what is no checkpoint
        raise DataError(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from None
    if isinstance(found, dict) and {"model", "config", "facts"} <= set(found):
        raise DataError(f"{path}: a checkpoint of this code: its folder is a run as it stands")
    for key in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    found = plain_tensors(path, found)
    return {k: x.float() if x.is_floating_point() else x for k, x in found.items()}


def load_mmpt(model: nn.Module, path: str | Path, say: Callable = print) -> LoadReport:
    """Fill a model from the authors' fairseq checkpoint, pre-trained or fine-tuned.

    Args:    model: a vlm.VLM of the checkpoint's sizes (`mmpt_config` reads them from it).
    Returns: the report, also handed to `say`. Their table `seg_embeddings`, the position ids and
             the pooler were never used and are not here.
    Raises:  ValueError naming the tensor for a wrong shape, or a missing encoder or MLP tensor.
    """
    take = ("bert.", "cls.", "videomlp.", "classifier.")
    report = fill(model, Path(path), read_mmpt(path), mmpt_name, take, ("bert.", "videomlp."))
    say(f"release {path}: {report}")
    return report


def mmpt_name(name: str) -> str:
    """Translate a tensor's name in the release into ours."""
    return RELEASE_PREFIX.sub("", name)


def mmpt_config(path: str | Path, heads: int | None = None) -> dict:
    """Read a checkpoint's sizes from its tensors, and what it was trained for from which it has.

    Args:    heads: attention heads, which no tensor tells; default: width 64 each, as all BERTs.
    Returns: keyword arguments for vlm.VLMConfig.
    Raises:  ValueError naming the tensor that is missing.
    """
    shapes = {mmpt_name(k): tuple(x.shape) for k, x in read_mmpt(path).items()}
    table = "bert.embeddings.{}_embeddings.weight"
    inner, mlp = "bert.encoder.layer.0.intermediate.dense.weight", "videomlp.linear1.weight"
    for name in (*map(table.format, ("word", "position", "token_type")), inner, mlp):
        if len(shapes.get(name, ())) != 2:
            raise DataError(f"{path}: {name} is missing: not a checkpoint of VLM")
    layers = {k.split(".")[3] for k in shapes if k.startswith("bert.encoder.layer.")}
    W, D = shapes[table.format("word")]
    K = (*shapes.get("classifier.weight", ()), 0)[0]
    if K:
        stage, task = "fine-tuned", "segmentation"
    elif "cls.predictions.bias" in shapes or "cls.predictions.decoder.bias" in shapes:
        stage, task = "fine-tuned", "captioning"
    elif any(k.startswith("cls.") for k in shapes):
        stage, task = "pre-trained", "vlm"
    else:
        stage, task = "fine-tuned", "retrieval, qa or localization"
    sizes = dict(vocab_size=W, hidden_size=D, num_hidden_layers=len(layers), num_labels=K)
    sizes |= dict(num_attention_heads=heads or max(1, D // 64), video_dim=shapes[mlp][1])
    sizes |= dict(intermediate_size=shapes[inner][0])
    sizes |= dict(max_position_embeddings=shapes[table.format("position")][0])
    sizes |= dict(type_vocab_size=shapes[table.format("token_type")][0])
    return sizes | dict(stage=stage, task=task, data="the authors' release")


# ---------------------------------------------------------------------------------------------
# Run directories


def save_run(path: str | Path, model: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Write a run directory that Hugging Face's BERT classes read too.

    Leaves model.safetensors, config.json and, unless it is None, tokenizer.json, each moved into
    place when whole.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = dataclasses.asdict(model.config)
    config |= {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu"}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_aside(
        path / "model.safetensors", lambda f: save_file(tensors, f, metadata={"format": "pt"})
    )
    write_aside(path / "config.json", lambda f: f.write_text(json.dumps(config, indent=1) + "\n"))
    if tokenizer is not None:
        write_aside(path / "tokenizer.json", lambda f: tokenizer.save(str(f)))


def convert(
    make: Callable[[dict], nn.Module],
    checkpoint: Path,
    out: Path,
    bert: str | None,
    heads: int | None,
) -> None:
    """Write the authors' fairseq checkpoint as a run directory; say what became of each tensor.

    Args:   make: sizes (VLMConfig's) -> an untrained VLM. bert: where its vocabulary is.
    Raises: ValueError when `out` is not empty or vocabulary and checkpoint are not a pair.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty: choose another")
    tokenizer = load_tokenizer(bert) if bert else None
    model = make(mmpt_config(checkpoint, heads))
    c = model.config
    if tokenizer and tokenizer.get_vocab_size() != c.vocab_size:
        raise ValueError(
            f"{bert} has {tokenizer.get_vocab_size()} word pieces, the checkpoint {c.vocab_size}: "
            "they are not a pair"
        )
    load_mmpt(model, checkpoint)
    save_run(out, model, tokenizer)
    print(f"{c.stage} ({c.task}), {c.num_hidden_layers} layers of width {c.hidden_size}: {out}")
    if c.stage == "pre-trained":
        print("it holds no means over training clips: zero-shot, dot products alone compare")
    if not tokenizer:
        print(f"no --bert: copy the vocabulary it was trained with, vocab.txt, into {out}")


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it in, so that a reader never sees half of it.

    Raises: OSError with the file, the reason and the room that is left; what was there stays.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        with open(aside, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(aside, 0o644)  # safetensors leaves a file that nobody else may read
        os.replace(aside, path)
    except Exception as error:  # torch, safetensors and tokenizers each have their own
        # torch hides the reason behind an error of its own; OSErrors themselves name the .partial
        reason = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(reason, "strerror", None) or first_line(reason)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free // 2**20 if path.parent.is_dir() else 0
        raise OSError(
            f"{path}: could not be written: {reason} ({free} MiB free there): make room, or mend "
            "the folder; what was there before is whole"
        ) from None


PROBE = "a \u8336 \u0418zq##'\U0001f35c"  # nobody's word: a vocabulary without [UNK] fails on it


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json or an uncased vocab.txt, or a folder that holds one.

    Text is never cut or padded by it, and "[SEP]" in somebody's caption is words to it. Raises:
    ValueError where there is none.
    """
    path = Path(path)
    names = [path / "tokenizer.json", path / "vocab.txt"] if path.is_dir() else [path]
    file = next((f for f in names if f.is_file()), None)
    if file is None:
        what = "found neither" if path.is_dir() else "and there is no such file or folder: fill one"
        raise DataError(f"{path}: wanted tokenizer.json or vocab.txt, {what}")
    if file.suffix not in (".txt", ".json"):
        raise DataError(f"{file}: wanted tokenizer.json, vocab.txt or a folder that holds one")
    text = read_text(file)
    try:
        if file.suffix == ".txt":
            tokenizer = BertWordPieceTokenizer(str(file), lowercase=True)._tokenizer
        else:
            tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        tokenizer.encode_batch([PROBE, "x" * 300, ""], add_special_tokens=False)
        ids = sorted(tokenizer.get_vocab().values())
    except BaseException as error:  # Rust raises a bare Exception, or panics, which is not even one
        if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
            raise  # a signal's
        raise DataError(f"{file}: not a BERT tokenizer ({first_line(error)})") from None
    if ids != list(range(len(ids))):
        raise DataError(f"{file}: its {len(ids)} word pieces are not numbered 0..{len(ids) - 1}")
    return tokenizer
