"""CLIP for scenes (Radford et al. 2021): a tokenizer for the captions, and two small towers."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ifvit.scenes.captions import NUM_CAPTIONS
from scene_encoders.data import SceneSet, build_optimizer, normalise

BATCH_SIZE = 128
CONTEXT_LENGTH = 16  # the longest caption has 13 words
LOSS = "symmetric cross-entropy; captions of equal scenes count as right"


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """Build CLIP's byte-level BPE, merged until every word of the captions is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(sorted({word for text in captions for word in text.split()}), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a text tower of width 64 and a vision tower of width 96 on 8 x 8 patches."""
    shared = {"hidden_act": "gelu", "projection_dim": 64, "num_attention_heads": 4}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT_LENGTH,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "image_size": 64,
        "patch_size": 8,
    }
    config = CLIPConfig(
        text_config=shared | special | text, vision_config=shared | vision, projection_dim=64
    )
    return CLIPModel(config)


def embed_images(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, 64, 64) in [-1, 1] => (B, E), unit length."""
    pooled = clip.vision_model(pixel_values=pixels).pooler_output
    return functional.normalize(clip.visual_projection(pooled).float(), dim=1)


def embed_texts(clip: CLIPModel, tokens: Tensor) -> Tensor:
    """Tokens (B, M) => (B, E), unit length."""
    pooled = clip.text_model(input_ids=tokens).pooler_output
    return functional.normalize(clip.text_projection(pooled).float(), dim=1)


def tokenize(tokenizer: CLIPTokenizer, scenes: SceneSet) -> Tensor:
    """(N, 5, M) tokens of all captions."""
    flat = [text for captions in scenes.captions for text in captions]
    tokens = tokenizer(flat, padding="max_length", return_tensors="pt").input_ids
    return tokens.view(len(scenes.captions), NUM_CAPTIONS, CONTEXT_LENGTH)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 => [-1, 1], shifted by up to 2 px (the empty margin), half blurred, with noise."""
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    pixels = normalise(images).roll((dy, dx), dims=(2, 3))
    pixels[::2] = functional.avg_pool2d(
        functional.pad(pixels[::2], (1, 1, 1, 1), mode="replicate"), 3, stride=1
    )
    strength = 0.1 * torch.rand(len(pixels), 1, 1, 1, generator=generator)
    return pixels + strength * torch.randn(pixels.shape, generator=generator)


def train_clip(
    tokenizer: CLIPTokenizer,
    scenes: SceneSet,
    decoded: Tensor,
    num_steps: int,
    generator: torch.Generator,
) -> CLIPModel:
    """Train by contrasting images with captions; all captions of equal scenes count as right.

    Half of each batch are rendered images, half are decoded by the VAE (`decoded`, first scenes).
    """
    clip = build_clip(tokenizer)
    tokens = tokenize(tokenizer, scenes)
    optimizer, scheduler = build_optimizer(clip, 1e-3, num_steps)
    progress = tqdm(range(num_steps), desc="train CLIP", mininterval=2)
    half = BATCH_SIZE // 2
    for _ in progress:
        batch = torch.randint(len(tokens), (BATCH_SIZE,), generator=generator)
        batch[half:] %= len(decoded)
        choice = torch.randint(NUM_CAPTIONS, (BATCH_SIZE,), generator=generator)
        images = torch.cat([scenes.images[batch[:half]], decoded[batch[half:]]])
        image_features = embed_images(clip, augment(images, generator))
        text_features = embed_texts(clip, tokens[batch, choice])
        logits = clip.logit_scale.exp() * image_features @ text_features.T
        is_right = (scenes.content[batch, None] == scenes.content[batch]).float()
        target = is_right / is_right.sum(dim=1, keepdim=True)
        loss = (
            functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        ) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        excess = loss.item() + (target * target.clamp_min(1e-9).log()).sum(dim=1).mean().item()
        progress.set_postfix(refresh=False, loss=f"{excess:.3f}")
    return clip.eval()


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save weights, tokenizer and image normalisation in the Hugging Face folder layout."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
