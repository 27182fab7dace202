"""Train the small frozen encoders for scenes that ship with ifvit.

    OMP_WAIT_POLICY=PASSIVE python tools/train_scene_encoders.py --seed 0

Writes a KL autoencoder (Rombach et al. 2022) and a CLIP (Radford et al. 2021), of the same classes
as published weights, in the Hugging Face folder layout, and `provenance.json` with recipe and
quality. Takes about twelve minutes on two slow, otherwise idle cores.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from ifvit.scenes.captions import NUM_CAPTIONS, write_captions
from ifvit.scenes.drawings import render_sampled_scene
from ifvit.scenes.score import score_image

ENCODERS = Path(__file__).parents[1] / "ifvit" / "scenes" / "encoders"
TRAIN_SEED_OFFSET = 1_000_000
TEST_SEED_OFFSET = 2_000_000
LATENT_NOISE = 0.1  # relative to the latents' std; CLIP must judge imperfect latents too
NUM_CHOICES = 16
CONTEXT_LENGTH = 16  # the longest caption has 13 words
BATCH_SIZE = {"vae": 16, "clip": 128}
# Without the whiteness term one or two channels hold nearly all variance, and a diffusion model
# learns the content of the other channels, mostly colours, very late.
KL_WEIGHT = 1e-4
L1_WEIGHT = 0.1
WHITENESS_WEIGHT = 0.02
LOSS = {
    "vae": f"MSE + {L1_WEIGHT} L1 + {KL_WEIGHT} KL, means over pixels and latents, + "
    f"{WHITENESS_WEIGHT} (|Cov(latents) - I|^2 + |mean(latents)|^2), means over entries",
    "clip": "symmetric cross-entropy; captions of equal scenes count as right",
}


class SceneSet:
    """Scenes 0 to count - 1 of the series `seed`: images (N, 3, 64, 64) uint8, five captions each.

    `content` (N,) is equal for images that show the same scene.
    """

    def __init__(self, seed: int, count: int) -> None:
        progress = tqdm(range(count), "render", mininterval=2)
        rendered = [render_sampled_scene(seed, number) for number in progress]
        self.scenes = [one.scene for one in rendered]
        images = np.stack([one.image for one in rendered])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.captions = [write_captions(scene) for scene in self.scenes]
        numbers = {scene: number for number, scene in enumerate(dict.fromkeys(self.scenes))}
        self.content = torch.tensor([numbers[scene] for scene in self.scenes])


def normalise(images: Tensor) -> Tensor:
    """uint8 => float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def optimise(
    model: torch.nn.Module, lr: float, num_steps: int, compute_loss: Callable[[], Tensor]
) -> None:
    """Train with AdamW: 100 warm-up steps, then cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    progress = tqdm(range(num_steps), desc=f"train {type(model).__name__}", mininterval=2)
    for _ in progress:
        loss = compute_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        progress.set_postfix(refresh=False, loss=f"{loss.item():.4f}")
    model.eval()


def build_vae() -> AutoencoderKL:
    """Build an autoencoder between 64 x 64 x 3 images and 8 x 8 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(images: Tensor, num_steps: int, generator: torch.Generator) -> AutoencoderKL:
    """Train an autoencoder with LOSS["vae"]."""
    vae = build_vae()

    def compute_loss() -> Tensor:
        batch = torch.randint(len(images), (BATCH_SIZE["vae"],), generator=generator)
        pixels = normalise(images[batch])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = functional.mse_loss(decoded, pixels)
        loss = loss + L1_WEIGHT * functional.l1_loss(decoded, pixels) + KL_WEIGHT * kl
        return loss + WHITENESS_WEIGHT * whiteness_error(posterior.mean.float())

    optimise(vae, 2e-3, num_steps, compute_loss)
    return vae


def whiteness_error(latents: Tensor) -> Tensor:
    """Mean squared distance of the channels of latents (B, C, H, W) from mean 0, covariance I."""
    channels = latents.transpose(0, 1).flatten(1)
    off_identity = torch.cov(channels) - torch.eye(len(channels))
    return off_identity.square().mean() + channels.mean(dim=1).square().mean()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor, noise: float = 0.0) -> Tensor:
    """Encode and decode uint8 images; noise of `noise` times the latents' std is added between."""
    parts = []
    for batch in tqdm(images.split(64), "reconstruct", mininterval=2):
        latents = vae.encode(normalise(batch)).latent_dist.mode()
        latents = latents + noise * latents.std() * torch.randn_like(latents)
        decoded = vae.decode(latents).sample.clamp(-1, 1)
        parts.append(((decoded + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


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
    half = BATCH_SIZE["clip"] // 2

    def compute_loss() -> Tensor:
        batch = torch.randint(len(tokens), (2 * half,), generator=generator)
        batch[half:] %= len(decoded)
        choice = torch.randint(NUM_CAPTIONS, (2 * half,), generator=generator)
        images = torch.cat([scenes.images[batch[:half]], decoded[batch[half:]]])
        image_features = embed_images(clip, augment(images, generator))
        text_features = embed_texts(clip, tokens[batch, choice])
        logits = clip.logit_scale.exp() * image_features @ text_features.T
        is_right = (scenes.content[batch, None] == scenes.content[batch]).float()
        target = is_right / is_right.sum(dim=1, keepdim=True)
        by_text = functional.cross_entropy(logits.T, target)
        return (functional.cross_entropy(logits, target) + by_text) / 2

    optimise(clip, 1e-3, num_steps, compute_loss)
    return clip


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save weights, tokenizer and image normalisation in the Hugging Face folder layout."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 64, "width": 64}
    CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)


@torch.no_grad()
def retrieval_accuracy(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, scenes: SceneSet
) -> float:
    """Share of images whose own caption is nearest among 16, 15 of them of other scenes."""
    generator = torch.Generator().manual_seed(0)
    texts = embed_texts(clip, tokenize(tokenizer, scenes)[:, 0])
    similarity = embed_images(clip, normalise(images)) @ texts.T
    num_right = 0
    for index, row in enumerate(similarity):
        others = torch.nonzero(scenes.content != scenes.content[index])[:, 0]
        rivals = others[torch.randperm(len(others), generator=generator)[: NUM_CHOICES - 1]]
        num_right += int(row[index] > row[rivals].max())
    return num_right / len(similarity)


def score(images: Tensor, scenes: SceneSet) -> dict[str, float]:
    """Share of images on which `score_image` finds count, colour, kind and relation right."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    pairs = zip(arrays, scenes.scenes, strict=True)
    rows = [asdict(score_image(image, scene)) for image, scene in pairs]
    found = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
    return {name: round(sum(values) / len(values), 4) for name, values in found.items()}


def measure(
    vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, test: SceneSet
) -> dict[str, Any]:
    """Measure both encoders on scenes outside the training set."""
    decoded = reconstruct(vae, test.images)
    error = functional.mse_loss(normalise(decoded), normalise(test.images)).item()
    return {
        "params": {"vae": vae.num_parameters(), "clip": clip.num_parameters()},
        "reconstruction_psnr_db": round(10 * math.log10(4 / error), 2),
        "retrieval_accuracy": retrieval_accuracy(clip, tokenizer, test.images, test),
        "retrieval_accuracy_decoded": retrieval_accuracy(clip, tokenizer, decoded, test),
        "score_decoded": score(decoded, test),
    }


def main() -> None:
    """Render scenes, train both encoders, measure them and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"num_images": 16_000, "num_test_images": 512, "vae_steps": 1_500, "clip_steps": 1_200}
    for name, default in {"seed": 0, **sizes, "num_threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=ENCODERS)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    train = SceneSet(TRAIN_SEED_OFFSET + options.seed, options.num_images)
    test = SceneSet(TEST_SEED_OFFSET + options.seed, options.num_test_images)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.monotonic()
    trained = train_vae(train.images, options.vae_steps, generator)
    seconds = {"vae": round(time.monotonic() - started)}
    trained.half().save_pretrained(options.output / "vae")
    vae = AutoencoderKL.from_pretrained(options.output / "vae").eval()

    tokenizer = build_tokenizer([text for captions in train.captions for text in captions])
    generator = torch.manual_seed(options.seed)
    half = train.images[: options.num_images // 2]
    decoded = reconstruct(vae, half, noise=LATENT_NOISE)
    started = time.monotonic()
    clip = train_clip(tokenizer, train, decoded, options.clip_steps, generator)
    seconds["clip"] = round(time.monotonic() - started)
    save_clip(clip, tokenizer, options.output / "clip")

    recipe = {
        "command": " ".join(["python", "tools/train_scene_encoders.py", *sys.argv[1:]]),
        "seed": options.seed,
        "data": f"{options.num_images} scenes to train on, {options.num_test_images} unseen ones",
        "steps": {"vae": options.vae_steps, "clip": options.clip_steps},
        "batch_size": BATCH_SIZE,
        "loss": LOSS,
        "train_seconds": seconds,
    }
    libraries = (torch, diffusers, transformers, np, tokenizers)
    versions = {library.__name__: library.__version__ for library in libraries}
    record = recipe | measure(vae, clip, tokenizer, test) | {"libraries": versions}
    (options.output / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
