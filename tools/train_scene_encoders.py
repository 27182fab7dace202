"""Train the small frozen encoders for scenes that ship with ifvit.

    OMP_WAIT_POLICY=PASSIVE python tools/train_scene_encoders.py --seed 0

Writes a KL autoencoder (Rombach et al. 2022) and a CLIP (Radford et al. 2021), of the same classes
as published weights, in the Hugging Face folder layout, and `provenance.json` with recipe and
quality. Takes about twelve minutes on two slow, otherwise idle cores.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import tokenizers
import torch
import transformers
from diffusers import AutoencoderKL
from scene_encoders import clip as clip_training
from scene_encoders import vae as vae_training
from scene_encoders.data import SceneSet, normalise, psnr
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from ifvit.scenes.score import score_image

ENCODERS = Path(__file__).parents[1] / "ifvit" / "scenes" / "encoders"
TRAIN_SEED_OFFSET = 1_000_000
TEST_SEED_OFFSET = 2_000_000
LATENT_NOISE = 0.1  # relative to the latents' std; CLIP must judge imperfect latents too
NUM_CHOICES = 16


@torch.no_grad()
def retrieval_accuracy(
    clip: CLIPModel, tokenizer: CLIPTokenizer, images: Tensor, scenes: SceneSet
) -> float:
    """Share of images whose own caption is nearest among 16, 15 of them of other scenes."""
    generator = torch.Generator().manual_seed(0)
    texts = clip_training.embed_texts(clip, clip_training.tokenize(tokenizer, scenes)[:, 0])
    similarity = clip_training.embed_images(clip, normalise(images)) @ texts.T
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


def parse_options() -> argparse.Namespace:
    """Read the command-line options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=16_000)
    parser.add_argument("--num_test_images", type=int, default=512)
    parser.add_argument("--vae_steps", type=int, default=1_500)
    parser.add_argument("--clip_steps", type=int, default=1_200)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ENCODERS)
    return parser.parse_args()


def measure(
    vae: AutoencoderKL, clip: CLIPModel, tokenizer: CLIPTokenizer, test: SceneSet
) -> dict[str, Any]:
    """Measure both encoders on scenes outside the training set."""
    decoded = vae_training.reconstruct(vae, test.images)
    error = functional.mse_loss(normalise(decoded), normalise(test.images)).item()
    return {
        "params": {"vae": vae.num_parameters(), "clip": clip.num_parameters()},
        "reconstruction_psnr_db": round(psnr(error), 2),
        "retrieval_accuracy": retrieval_accuracy(clip, tokenizer, test.images, test),
        "retrieval_accuracy_decoded": retrieval_accuracy(clip, tokenizer, decoded, test),
        "score_decoded": score(decoded, test),
    }


def main() -> None:
    """Render scenes, train both encoders, measure them and write the record."""
    options = parse_options()
    torch.set_num_threads(options.num_threads)
    train = SceneSet(TRAIN_SEED_OFFSET + options.seed, options.num_images)
    test = SceneSet(TEST_SEED_OFFSET + options.seed, options.num_test_images)

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.monotonic()
    trained = vae_training.train_vae(train.images, options.vae_steps, generator)
    seconds = {"vae": round(time.monotonic() - started)}
    trained.half().save_pretrained(options.output / "vae")
    vae = AutoencoderKL.from_pretrained(options.output / "vae").eval()

    tokenizer = clip_training.build_tokenizer(
        [text for captions in train.captions for text in captions]
    )
    generator = torch.manual_seed(options.seed)
    half = train.images[: options.num_images // 2]
    decoded = vae_training.reconstruct(vae, half, noise=LATENT_NOISE)
    started = time.monotonic()
    clip = clip_training.train_clip(tokenizer, train, decoded, options.clip_steps, generator)
    seconds["clip"] = round(time.monotonic() - started)
    clip_training.save_clip(clip, tokenizer, options.output / "clip")

    recipe = {
        "command": " ".join(["python", "tools/train_scene_encoders.py", *sys.argv[1:]]),
        "seed": options.seed,
        "data": f"{options.num_images} scenes to train on, {options.num_test_images} unseen ones",
        "steps": {"vae": options.vae_steps, "clip": options.clip_steps},
        "batch_size": {"vae": vae_training.BATCH_SIZE, "clip": clip_training.BATCH_SIZE},
        "loss": {"vae": vae_training.LOSS, "clip": clip_training.LOSS},
        "train_seconds": seconds,
    }
    libraries = (torch, diffusers, transformers, np, tokenizers)
    versions = {library.__name__: library.__version__ for library in libraries}
    record = recipe | measure(vae, clip, tokenizer, test) | {"libraries": versions}
    (options.output / "provenance.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
