"""States of text encoders of every class are those of transformers for each caption alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made_text_encoders import KINDS, make_text_encoder, qwen_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    GPTJConfig,
    GPTJModel,
    T5EncoderModel,
    T5GemmaEncoderModel,
    UMT5EncoderModel,
)

from ifvit.conditions import PaddedContext, rows_of
from ifvit.errors import UserError
from ifvit.models.config import TextOptions
from ifvit.models.text_encoders import (
    TextEncoder,
    cast_parameters,
    default_settings,
    load_text_encoder,
    load_text_model,
    load_token_spans,
)

CAPTIONS = [
    "two red circles above a blue square",
    "",
    "a dog",
    "  Zürich 象 ⚡ &amp; <eos>\tdogs ",
    "a photo of a dog on the street, " * 9,
]
FP32 = TextOptions(precision="fp32")
WITHOUT_PADDING = [kind for kind in KINDS if kind != "clip"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a kind of encoder, made once."""
    made: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = make_text_encoder(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@cache
def load_by_transformers(kind: str, folder: str) -> Any:
    """The model as a user of transformers loads it, and its final norm."""
    if kind == "clip":
        model = CLIPTextModel.from_pretrained(folder)
        return model.eval(), model.final_layer_norm
    if kind in ("t5", "umt5"):
        model = (T5EncoderModel if kind == "t5" else UMT5EncoderModel).from_pretrained(folder)
        return model.eval(), model.encoder.final_layer_norm
    if kind == "t5gemma":
        model = T5GemmaEncoderModel.from_pretrained(folder, is_encoder_decoder=False)
        return model.eval(), model.encoder.norm
    model = AutoModel.from_pretrained(folder)
    model = model.language_model if kind == "gemma3_with_vision" else model
    return model.eval(), model.norm


def states_of_one(kind: str, folder: str, caption: str, max_length: int) -> list[Tensor]:
    """All states of one caption without padding; the last two are without and with final norm."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = {"padding": "max_length"} if kind == "clip" else {}
    ids = tokenizer([caption], truncation=True, max_length=max_length, **padding).input_ids
    ids = torch.tensor(ids if ids[0] else [[tokenizer.pad_token_id]])
    model, norm = load_by_transformers(kind, folder)
    seen: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        found = model(input_ids=ids, output_hidden_states=True)
    hook.remove()
    states = [state[0] for state in found.hidden_states[:-1]]
    return [*states, seen[0][0], found.last_hidden_state[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_a_batch_are_those_of_each_caption_alone(
    kind: str, folders: Callable[..., str]
) -> None:
    encoder = load_text_encoder(folders(kind), options=FP32)
    context = encoder.encode(CAPTIONS)
    assert isinstance(context, PaddedContext) == (kind != "clip")
    length = encoder.identity.settings.max_length
    for caption, found in zip(CAPTIONS, rows_of(context), strict=True):
        expected = states_of_one(kind, folders(kind), caption, length)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    null = rows_of(context)[1]
    torch.testing.assert_close(encoder.null_context(), null, rtol=1e-5, atol=1e-5)
    assert len(null) >= 1
    if isinstance(context, PaddedContext):
        for tokens, row in zip(context.tokens, rows_of(context), strict=True):
            assert not tokens[len(row) :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_state_with_and_without_the_final_norm_is_that_of_transformers(
    kind: str, folders: Callable[..., str]
) -> None:
    length = 77 if kind == "clip" else 256
    *states, last, normed = states_of_one(kind, folders(kind), CAPTIONS[0], length)
    states.append(last)
    _, norm = load_by_transformers(kind, folders(kind))
    wanted = {0: states[0], 2: states[2], "last": last, "penultimate": states[-2], 3: last}
    wanted["mean"] = torch.stack(states[1:]).mean(dim=0)
    whole = load_text_encoder(folders(kind), options=FP32)
    with torch.no_grad():
        torch.testing.assert_close(norm(last), normed)
        for state, expected in wanted.items():
            for final_norm in (False, True):
                settings = replace(whole.identity.settings, state=state, final_norm=final_norm)
                identity = replace(whole.identity, settings=settings)
                encoder = TextEncoder(whole.model, whole.tokenizer, identity)
                found = rows_of(encoder.encode([CAPTIONS[0], CAPTIONS[4]]))[0]
                torch.testing.assert_close(
                    found, norm(expected) if final_norm else expected, rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_surrounds_captions_but_not_the_empty_one(
    kind: str, folders: Callable[..., str]
) -> None:
    plain = load_text_encoder(folders(kind), options=FP32)
    options = TextOptions(template="a photo: {}, of old", precision="fp32", max_length=24)
    encoder = load_text_encoder(folders(kind), options=options)
    found = rows_of(encoder.encode(["red {}", ""]))
    full = rows_of(plain.encode(["a photo: red {}, of old", ""]))
    for one, other in zip(found, full, strict=True):
        torch.testing.assert_close(one, other[: len(one)], rtol=1e-5, atol=1e-5)
    assert encoder.find_cut(["red", "red " * 40, ""]) == {"red " * 40}
    assert len(rows_of(encoder.encode(["red " * 40]))[0]) == 24


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "t5gemma"])
@pytest.mark.parametrize("window", [2, 8])
def test_captions_longer_than_the_attention_window_are_independent_of_the_batch(
    kind: str, window: int, tmp_path: Path
) -> None:
    folder = make_text_encoder(kind, tmp_path, sliding_window=window)
    context = load_text_encoder(folder, options=FP32).encode(CAPTIONS)
    for caption, found in zip(CAPTIONS, rows_of(context), strict=True):
        expected = states_of_one(kind, folder, caption, 256)[-1]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_the_default_except_for_clip_and_gives_nearly_the_same_states(
    kind: str, folders: Callable[..., str]
) -> None:
    encoder = load_text_encoder(folders(kind))
    assert encoder.identity.settings.precision == ("fp32" if kind == "clip" else "bf16")
    exact = load_text_encoder(folders(kind), options=FP32).encode(CAPTIONS)
    rounded = load_text_encoder(folders(kind), options=TextOptions(precision="bf16"))
    for found, expected in zip(rows_of(rounded.encode(CAPTIONS)), rows_of(exact), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.05 * expected.norm()
    model = load_text_model(Path(folders(kind)), torch.float32)
    cast_parameters(model, rounded.identity.settings)
    same = TextEncoder(model, rounded.tokenizer, rounded.identity).encode(CAPTIONS)
    for one, other in zip(rows_of(same), rows_of(rounded.encode(CAPTIONS)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_spans_of_tokens_cover_the_words_of_the_caption(
    kind: str, folders: Callable[..., str]
) -> None:
    options = TextOptions(template="draw circles: {} circles", precision="fp32")
    encoder = load_text_encoder(folders(kind), options=options)
    spans = load_token_spans(encoder.identity)
    caption = "two red  circles"
    found = spans(caption)
    assert len(found) == len(rows_of(encoder.encode([caption]))[0])
    texts = "".join(caption[start:end] for start, end in found)
    assert texts.replace(" ", "") == "tworedcircles"
    assert all(not caption[start:end].startswith(" ") for start, end in found)
    assert not any(start < end for start, end in spans(""))


def test_the_null_context_of_zeros_keeps_the_length_of_the_empty_caption(
    folders: Callable[..., str],
) -> None:
    encoder = load_text_encoder(folders("qwen3"))
    context = encoder.encode(["", "two"], null_context="zeros")
    assert isinstance(context, PaddedContext)
    assert context.lengths.tolist() == [1, 1]
    assert not context.tokens[0].any()
    assert context.tokens[1].any()


def test_settings_of_weights_are_kept_as_they_are(folders: Callable[..., str]) -> None:
    options = TextOptions(state=1, final_norm=False, max_length=9, template="x {}")
    stored = load_text_encoder(folders("t5"), options=options).identity.settings
    assert (stored.state, stored.final_norm, stored.max_length) == (1, False, 9)
    assert load_text_encoder(folders("t5"), options=stored).identity.settings == stored
    assert default_settings(load_text_model(Path(folders("clip")), torch.float32)).max_length == 77


def test_a_context_that_is_not_finite_names_the_caption_and_the_remedy(tmp_path: Path) -> None:
    folder = make_text_encoder("qwen3", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    ids = AutoTokenizer.from_pretrained(folder)("dog").input_ids
    tensors["model.embed_tokens.weight"][ids] = torch.inf
    save_file(tensors, path, {"format": "pt"})
    encoder = load_text_encoder(folder)
    assert rows_of(encoder.encode(["two red"]))[0].isfinite().all()
    with pytest.raises(UserError, match=r"caption dog dog.*\.\.\. is not finite in bf16; use"):
        encoder.encode(["two red", "dog " * 90])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TextOptions(max_length=78), "text.max_length is 78, but .* at most 77"),
        (TextOptions(state=4), "text.state is 4, but the text encoder has 3 layers"),
    ],
)
def test_options_that_do_not_fit_the_encoder_are_one_line(
    options: TextOptions, message: str, folders: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match=message):
        load_text_encoder(folders("clip"), options=options)


# Folders from strangers.


def change(folder: str, **keys: object) -> None:
    path = Path(folder, "config.json")
    stored = json.loads(path.read_text())
    part = stored.get("encoder", stored)
    part.update(keys)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("kind", ["t5", "gemma2", "t5gemma", "qwen3"])
@pytest.mark.parametrize(
    "keys",
    [
        {"num_hidden_layers": 10**9, "num_layers": 10**9, "layer_types": None},
        {"num_hidden_layers": 200, "num_layers": 200, "layer_types": ["full_attention"] * 200},
        {"hidden_size": 65536, "d_model": 65536},
        {"vocab_size": 10**30},
        {"vocab_size": 10**7},
        {"num_attention_heads": 0, "num_heads": 0},
        {"hidden_activation": "os.system", "hidden_act": "os.system", "dense_act_fn": "os.system"},
        {"layer_types": ["os.system"] * 3, "feed_forward_proj": "os-system"},
        {"hidden_size": "x" * 10**5, "d_model": "x" * 10**5},
    ],
)
def test_a_configuration_of_an_impossible_model_is_one_line(
    kind: str, keys: dict[str, object], tmp_path: Path
) -> None:
    folder = make_text_encoder(kind, tmp_path / "encoder")
    change(folder, **keys)
    with pytest.raises(UserError) as error:
        load_text_encoder(folder)
    assert folder in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_huge_table_of_positions_is_refused_before_it_is_made(tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64}
    tokenizer = qwen_tokenizer()
    GPTJModel(GPTJConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert rows_of(load_text_encoder(str(tmp_path)).encode(["a dog"]))[0].isfinite().all()
    change(str(tmp_path), n_positions=10**9)
    with pytest.raises(UserError, match=r"config\.json describes 16000000000 parameters"):
        load_text_encoder(str(tmp_path))


@pytest.mark.parametrize("model_type", ["bart", "vit", "../x", "no such model", "", 3])
def test_a_model_of_another_kind_is_one_line(model_type: object, tmp_path: Path) -> None:
    folder = make_text_encoder("qwen3", tmp_path)
    change(folder, model_type=model_type)
    with pytest.raises(UserError, match=r"config\.json"):
        load_text_encoder(folder)


def test_a_folder_brings_no_code_and_no_other_package(tmp_path: Path) -> None:
    folder = make_text_encoder("qwen3", tmp_path)
    expected = load_text_encoder(folder).encode(["a dog"])
    change(
        folder,
        attn_implementation="stranger/kernels",
        _attn_implementation="stranger/kernels",
        auto_map={"AutoModel": "code.Model", "AutoConfig": "code.Config"},
        dtype="system",
    )
    (tmp_path / "code.py").write_text("raise SystemExit('code of a stranger ran')\n")
    found = load_text_encoder(folder).encode(["a dog"])
    torch.testing.assert_close(rows_of(found), rows_of(expected))
    change(folder, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="quantised"):
        load_text_encoder(folder)


@pytest.mark.parametrize("kind", ["t5", "gemma2", "qwen3"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b"[" * 5000, b'{"model": {}}'])
def test_a_broken_tokenizer_is_one_line(kind: str, name: str, text: bytes, tmp_path: Path) -> None:
    folder = make_text_encoder(kind, tmp_path)
    (tmp_path / name).write_bytes(text)
    if name == "tokenizer_config.json" and text == b'{"model": {}}':
        return  # the class is that of the model
    with pytest.raises(UserError) as error:
        load_text_encoder(folder)
    assert "\n" not in str(error.value)
    assert folder in str(error.value)


def test_a_folder_without_a_vocabulary_is_one_line(tmp_path: Path) -> None:
    folder = make_text_encoder("gemma2", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor vocab\.json"):
        load_text_encoder(folder)


def test_a_tokenizer_of_another_model_is_one_line(tmp_path: Path) -> None:
    folder = make_text_encoder("gemma2", tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="but its model has 300 tokens"):
        load_text_encoder(folder).encode(["two red circles"])
