"""Frozen text encoders: captions => context tokens of CLIP, T5, Gemma, Qwen and other models.

`load_text_encoder` fills the settings that a recipe leaves out with the defaults of the model's
class. Contexts of CLIP keep their padding, which the paper attends to; those of all other encoders
have the tokens of the caption only. Shapes: B captions, M context tokens, D context width.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
)
from transformers.models.auto.tokenization_auto import AutoTokenizer

from ifvit.conditions import Condition, PaddedContext, is_visible, tokens_of, with_tokens
from ifvit.errors import UserError
from ifvit.models.clip import (
    MAX_CHARACTERS,
    load_text_tower,
    load_transformers,
    require_vocabulary,
    tokenize,
)
from ifvit.models.clip import load_tokenizer as load_clip_tokenizer
from ifvit.models.config import NullContext, TextOptions
from ifvit.models.pretrained import (
    identify,
    read_model_config,
    read_safe_config,
    reading,
    resolve_pretrained,
)
from ifvit.records import PlainName, record, shorten
from ifvit.shards.format import Precision, TextEncoderIdentity, TextSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MAX_LENGTH = 256
"""Default largest length of all encoders but CLIP, as SD3 uses for T5 and Lumina for Gemma."""
_CAPTIONS_AT_ONCE = 64
"""Captions of similar lengths that are encoded together."""
_CLIP = ("clip", "clip_text_model")
_FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "final_norm")
"""Names that transformers gives the norm after the last layer."""
_TEXT_PREFIX = {r"^(model\.)?language_model\.(model\.)?": ""}
"""Where models that also see images have the tensors of their language model."""


@record
class ModelType:
    """The key of config.json that names the class of the model."""

    model_type: PlainName = _CLIP[0]


class NotFiniteError(UserError):
    """The context of `caption` is not finite."""

    def __init__(self, caption: str, precision: Precision) -> None:
        other = "bf16" if precision == "fp32" else "fp32"
        super().__init__(
            f"text encoder: the context of caption {shorten(caption)} is not finite in {precision};"
            f" use --text.precision {other}"
        )
        self.caption = caption


class TextEncoder:
    """Captions => hidden states of a frozen model."""

    def __init__(self, model: Any, tokenizer: Any, identity: TextEncoderIdentity) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.identity = identity

    @property
    def context_shape(self) -> tuple[int, int]:
        """(M, D): largest number of tokens and their width; 77 and 768 for CLIP ViT-L/14."""
        return self.identity.settings.max_length, _sizes(self.model).hidden_size

    def encode(self, captions: list[str], null_context: NullContext = "empty_caption") -> Condition:
        """B captions => contexts (B, M, D); see `encode_captions`."""
        settings = self.identity.settings
        return encode_captions(self.model, self.tokenizer, captions, settings, null_context)

    def null_context(self) -> Tensor:
        """(M, D) context of the empty caption, which stands for "no text" under guidance."""
        return tokens_of(self.encode([""]))[0]

    def find_cut(self, captions: Iterable[str]) -> frozenset[str]:
        """Captions of more tokens than the encoder reads, whose last tokens have no effect."""
        given, settings = list(captions), self.identity.settings
        if not given:
            return frozenset()
        texts = [fill_template(settings.template, caption) for caption in given]
        tokens = self.tokenizer(texts, verbose=False).input_ids
        return frozenset(
            caption
            for caption, ids in zip(given, tokens, strict=True)
            if len(ids) > settings.max_length
        )


@torch.no_grad()
def encode_captions(
    model: Any,
    tokenizer: Any,
    captions: list[str],
    settings: TextSettings,
    null_context: NullContext = "empty_caption",
) -> Condition:
    """B captions => contexts (B, M, D), float32.

    If `null_context` is zeros, the context of the empty caption is zeros. Raises NotFiniteError for
    a caption whose context is not finite.
    """
    encode = _encode_with_padding if settings.keeps_padding else _encode_without_padding
    context = encode(model, tokenizer, captions, settings)
    tokens = tokens_of(context)
    is_finite = tokens.isfinite().flatten(1).all(dim=1)
    if not is_finite.all():
        raise NotFiniteError(captions[int(is_finite.int().argmin())], settings.precision)
    if null_context == "zeros":
        is_empty = torch.tensor([not caption for caption in captions], device=tokens.device)
        context = with_tokens(context, tokens.masked_fill(is_empty[:, None, None], 0.0))
    return context


def _encode_with_padding(
    model: Any, tokenizer: Any, captions: list[str], settings: TextSettings
) -> Tensor:
    """Contexts of max_length tokens each, without a mask."""
    texts = [fill_template(settings.template, caption) for caption in captions]
    tokens = tokenize(tokenizer, texts, settings.max_length).input_ids
    _check_ids(model, int(tokens.max()))
    return _hidden_state(model, settings, input_ids=tokens.to(model.device)).float()


def _encode_without_padding(
    model: Any, tokenizer: Any, captions: list[str], settings: TextSettings
) -> PaddedContext:
    """Contexts of the tokens of each caption; zeros fill the tensor."""
    ids = token_ids(tokenizer, captions, settings)
    _check_ids(model, max(map(max, ids)))
    lengths = torch.tensor([len(one) for one in ids])
    contexts: list[Tensor] = [torch.empty(0)] * len(ids)
    for rows in _batches(lengths.tolist(), getattr(_sizes(model), "sliding_window", None)):
        padded = pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True)
        mask = is_visible(lengths[rows], padded.shape[1]).long()
        states = _hidden_state(
            model,
            settings,
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
        )
        for row, state in zip(rows, states.float(), strict=True):
            contexts[row] = state[: lengths[row]]
    tokens = pad_sequence(contexts, batch_first=True)
    return PaddedContext(tokens=tokens, lengths=lengths.to(tokens.device))


def _batches(lengths: list[int], window: int | None) -> list[list[int]]:
    """Divide captions, by number, into batches of similar lengths.

    Padding beyond the window of sliding attention would see no token at all, and NaN of such a row
    reaches visible tokens in the next layer; the captions of such a batch have one length.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__)
    if window is not None and max(lengths) > window:
        return [list(equal) for _, equal in groupby(rows, key=lengths.__getitem__)]
    return [
        rows[start : start + _CAPTIONS_AT_ONCE] for start in range(0, len(rows), _CAPTIONS_AT_ONCE)
    ]


def _hidden_state(model: Any, settings: TextSettings, **inputs: Tensor) -> Tensor:
    """Token ids => the state (B, M, D) that the settings name, with or without the final norm."""
    if settings.state == "last" and settings.final_norm:
        last: Tensor = model(**inputs).last_hidden_state
        return last
    # transformers normalises the last of its hidden states for some classes only.
    norm, before_norm = _final_norm(model), []
    hook = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    try:
        states = model(**inputs, output_hidden_states=True).hidden_states
    finally:
        hook.remove()
    states = [*states[:-1], *before_norm]
    if settings.state == "mean":
        state = torch.stack([one.float() for one in states[1:]]).mean(dim=0).to(states[0].dtype)
    else:
        number = {"last": -1, "penultimate": -2}.get(str(settings.state), settings.state)
        state = states[int(number)]
    found: Tensor = norm(state) if settings.final_norm else state
    return found


def token_ids(tokenizer: Any, captions: list[str], settings: TextSettings) -> list[list[int]]:
    """Token ids of each caption, at least one and at most max_length, without padding."""
    tokenizer.truncation_side = "right"  # a tokenizer's file may say left
    texts = [fill_template(settings.template, caption) for caption in captions]
    found = tokenizer(texts, truncation=True, max_length=settings.max_length).input_ids
    # Tokenizers without start and end tokens give the empty caption none.
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    end = next(token for token in ends if token is not None)
    return [ids or [end] for ids in found]


def fill_template(template: str, caption: str) -> str:
    """Put the caption, of at most MAX_CHARACTERS, into the template; the empty one stays empty."""
    return template.replace("{}", caption[:MAX_CHARACTERS]) if caption else ""


def load_token_spans(encoder: TextEncoderIdentity) -> Callable[[str], list[tuple[int, int]]]:
    """Return a function: caption => (first character, last + 1) of each of its tokens.

    Tokens of the template, and start, end and padding tokens, span no characters.
    """
    folder = resolve_pretrained(encoder.name, "--text_encoder")
    tokenizer, settings = load_tokenizer(folder), encoder.settings

    def token_spans(caption: str) -> list[tuple[int, int]]:
        text = fill_template(settings.template, caption)
        first = settings.template.index("{}")
        padding = "max_length" if settings.keeps_padding else False
        batch = tokenizer(
            text,
            padding=padding,
            truncation=True,
            max_length=settings.max_length,
            return_offsets_mapping=True,
        )
        return [_trim(caption, start - first, end - first) for start, end in batch.offset_mapping]

    return token_spans


def _trim(caption: str, start: int, end: int) -> tuple[int, int]:
    """Leave out what is not of the caption, and the space in front of a word."""
    start, end = max(start, 0), min(end, len(caption))
    while start < end and caption[start].isspace():
        start += 1
    return (start, end) if start < end else (0, 0)


def load_text_encoder(
    name: str,
    device: str = "cpu",
    options: TextOptions | TextSettings | None = None,
    precision: Precision = "fp32",
) -> TextEncoder:
    """Load the text encoder `name`: a hub name, a local folder, or scenes/clip.

    What `options` leave out takes the default of the model's class; `precision` is that of CLIP.
    Raises UserError for a folder that does not hold a whole such model, and for options that do not
    fit it.
    """
    folder = resolve_pretrained(name, "--text_encoder")
    options = options or TextOptions()
    model_type = read_model_config(ModelType, folder).model_type
    chosen = options.precision or (precision if model_type in _CLIP else "bf16")
    model = load_text_model(folder, DTYPES[chosen]).to(device)
    given = {key: value for key, value in vars(options).items() if value is not None}
    settings = replace(default_settings(model), **{**given, "precision": chosen})
    _check_settings(settings, model)
    found = identify(name, folder)
    identity = TextEncoderIdentity(name=found.name, sha256=found.sha256, settings=settings)
    return TextEncoder(model, load_tokenizer(folder), identity)


def default_settings(model: Any) -> TextSettings:
    """Settings of a loaded model for which a recipe states none, with fp32 for CLIP."""
    length = getattr(_sizes(model), "max_position_embeddings", _MAX_LENGTH)
    if model.config.model_type in _CLIP:
        return TextSettings(max_length=length)
    return TextSettings(max_length=min(length, _MAX_LENGTH), precision="bf16", keeps_padding=False)


def cast_parameters(model: Any, settings: TextSettings) -> None:
    """Convert the parameters; rotary frequencies stay float32, as when transformers loads them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[settings.precision])


def _check_settings(settings: TextSettings, model: Any) -> None:
    sizes = _sizes(model)
    longest = getattr(sizes, "max_position_embeddings", settings.max_length)
    if settings.max_length > longest:
        raise UserError(
            f"text.max_length is {settings.max_length}, but the text encoder reads at most "
            f"{longest} tokens; set at most that"
        )
    if isinstance(settings.state, int) and settings.state > sizes.num_hidden_layers:
        raise UserError(
            f"text.state is {settings.state}, but the text encoder has {sizes.num_hidden_layers} "
            "layers; set at most that"
        )
    if (settings.state, settings.final_norm) != ("last", True):
        _final_norm(model)


def _final_norm(model: Any) -> nn.Module:
    """The norm after the last layer. Raises UserError if it has an unknown name."""
    for stack in (model, getattr(model, "encoder", None)):
        for name in _FINAL_NORMS:
            norm = getattr(stack, name, None)
            if isinstance(norm, nn.Module):
                return norm
    raise UserError(
        f"text encoder: the final norm of a {type(model).__name__} is not known; leave text.state "
        "and text.final_norm unset"
    )


def _sizes(model: Any) -> Any:
    """The part of the model's configuration that describes its text encoder."""
    return getattr(model.config, "encoder", model.config)


def _check_ids(model: Any, largest: int) -> None:
    count = model.get_input_embeddings().num_embeddings
    if largest >= count:
        raise UserError(
            f"text encoder: its tokenizer gives the token {largest}, but its model has {count} "
            "tokens; use files of the same model"
        )


def load_text_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load the model of a folder: its encoder, or what comes before a language model's head."""
    model_type = read_model_config(ModelType, folder).model_type
    if model_type in _CLIP:
        return load_text_tower(folder, dtype)
    config = _read_config(folder, model_type)
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        config.is_encoder_decoder = False
        cls, prefix = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)], None
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text = config.get_text_config(decoder=True)
        prefix = None if text is config else _TEXT_PREFIX
        config, cls = text, MODEL_MAPPING[type(text)]
    else:
        raise UserError(
            f"{folder}/config.json: {model_type} is neither a text encoder nor a causal language "
            "model; use for example CLIP, T5, Gemma, T5Gemma or Qwen"
        )
    model = load_transformers(cls, config, folder, dtype, key_mapping=prefix)
    if prefix:
        model._weight_conversions = None  # otherwise the model is saved with the prefix again
    return model


def _read_config(folder: Path, model_type: str) -> Any:
    """Read config.json. Raises UserError for an impossible model."""
    path = folder / "config.json"
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"{path}: model_type {model_type} is not one of transformers")
    stored = read_safe_config(folder)
    with reading(f"{path}: not the configuration of a {model_type}"):
        config = CONFIG_MAPPING[model_type](**stored)
    config.use_cache = False
    return config


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder. Raises UserError if its files are missing or broken."""
    config: PreTrainedConfig = CLIPConfig()  # leaves the choice to tokenizer_config.json
    if (folder / "config.json").is_file():
        model_type = read_model_config(ModelType, folder).model_type
        if model_type in _CLIP:
            return load_clip_tokenizer(folder)
        config = _read_config(folder, model_type)
    require_vocabulary(folder)
    with reading(f"{folder}: the tokenizer does not load"):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
    return tokenizer
