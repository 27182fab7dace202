"""Small random text encoders of every class, saved as Hugging Face folders with real tokenizers.

The vocabularies are trained on a few captions, so other words become several tokens.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CORPUS = [
    "two red circles above a blue square",
    "a green triangle left of three small yellow stars",
    "a photo of a dog on the street, a cat beside it",
    "An old man's café near the river; people walk by.",
]
SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
ROTARY: dict[str, Any] = {
    **SIZE,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def clip_tokenizer() -> CLIPTokenizer:
    """Lower-case BPE with ends of words, start and end tokens; pads to the right."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    vocab, merges = train_bpe(tokenizer, trainer)
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab.setdefault(f"{letter}</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram of the words and their letters; appends </s>, pads to the right."""
    words = {f"▁{word}" for caption in CORPUS for word in caption.split()}
    letters = {letter for word in words for letter in word}
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scores += [(word, -2.0) for word in sorted(words - letters)]
    scores += [(letter, -8.0) for letter in sorted(letters)]
    return T5Tokenizer(vocab=scores, extra_ids=0, additional_special_tokens=[])


def gemma_tokenizer() -> GemmaTokenizer:
    """BPE with bytes for unknown letters; prepends <bos>, pads to the left."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    vocab, merges = train_bpe(tokenizer, trainer)
    return GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE without start and end tokens; "" has no token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    vocab, merges = train_bpe(tokenizer, trainer)
    return Qwen2Tokenizer(vocab=vocab, merges=merges)


def train_bpe(
    tokenizer: Tokenizer, trainer: trainers.BpeTrainer
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train on the captions; return the vocabulary and the merges."""
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def t5_sizes(**changes: Any) -> dict[str, Any]:
    """The small sizes under T5's names."""
    return {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4, **changes}


def t5gemma_sizes(**changes: Any) -> dict[str, Any]:
    """The same sizes for T5Gemma's encoder and decoder."""
    part = {**ROTARY, "layer_types": WINDOWS, **changes}
    return {"encoder": dict(part), "decoder": dict(part), "vocab_size": part["vocab_size"]}


def gemma3_whole(vocab_size: int, **changes: Any) -> Gemma3Config:
    """Configuration of a Gemma 3 that also sees images, as the larger ones do."""
    vision = {**SIZE, "image_size": 28, "patch_size": 14}
    text = {**ROTARY, "layer_types": WINDOWS, "vocab_size": vocab_size, **changes}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


Builder = Callable[..., Any]
KINDS: dict[str, tuple[Callable[[], Any], Builder]] = {
    "clip": (
        clip_tokenizer,
        lambda **keys: CLIPTextModel(
            CLIPTextConfig(**{**SIZE, "bos_token_id": 0, "eos_token_id": 1, **keys})
        ),
    ),
    "t5": (
        t5_tokenizer,
        lambda **keys: T5ForConditionalGeneration(
            T5Config(feed_forward_proj="gated-gelu", **t5_sizes(**keys))
        ),
    ),
    "umt5": (t5_tokenizer, lambda **keys: UMT5EncoderModel(UMT5Config(**t5_sizes(**keys)))),
    "gemma2": (
        gemma_tokenizer,
        lambda **keys: Gemma2ForCausalLM(
            Gemma2Config(**{**ROTARY, "layer_types": WINDOWS, **keys})
        ),
    ),
    "gemma3": (
        gemma_tokenizer,
        lambda **keys: Gemma3ForCausalLM(
            Gemma3TextConfig(**{**ROTARY, "layer_types": WINDOWS, **keys})
        ),
    ),
    "gemma3_with_vision": (
        gemma_tokenizer,
        lambda **keys: Gemma3ForConditionalGeneration(gemma3_whole(**keys)),
    ),
    "t5gemma": (
        gemma_tokenizer,
        lambda **keys: T5GemmaForConditionalGeneration(T5GemmaConfig(**t5gemma_sizes(**keys))),
    ),
    "qwen3": (
        qwen_tokenizer,
        lambda **keys: Qwen3ForCausalLM(Qwen3Config(**{**ROTARY, **keys})),
    ),
    "llama": (
        qwen_tokenizer,
        lambda **keys: LlamaForCausalLM(LlamaConfig(**{**ROTARY, **keys})),
    ),
}
"""Tokenizer and model by kind; the model takes keys of its configuration."""


def make_text_encoder(kind: str, folder: Path | str, **keys: Any) -> str:
    """Save a random encoder of width 32 with 3 layers; return the folder.

    `kind` is a key of KINDS, `keys` replace those of the configuration, such as `sliding_window`.
    """
    make_tokenizer, build = KINDS[kind]
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(**{"vocab_size": len(tokenizer) + 3, **keys})
        for parameter in model.parameters():  # norms and biases that do something
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
