"""Small detectors of the real classes, untrained, saved as the hub has them."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    OwlViTConfig,
    OwlViTForObjectDetection,
    ResNetConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from ifvit.models.pretrained import resolve_pretrained

NUM_BOXES = 20
CLASSES = ("bus", "Sheep", "person")
TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}}


def save_yolos(folder: Path, seen: str | None = None) -> str:
    """Every one of its 20 boxes is a `seen` with a score above 0.99; None: untrained."""
    torch.manual_seed(0)
    model = YolosForObjectDetection(
        YolosConfig(
            **TRANSFORMER,
            **_LABELS,
            image_size=[64, 64],
            patch_size=16,
            num_detection_tokens=NUM_BOXES,
        )
    )
    if seen:
        last = model.class_labels_classifier.layers[-1]
        torch.nn.init.zeros_(last.weight)
        last.bias.data = 10.0 * torch.eye(len(CLASSES) + 1)[CLASSES.index(seen)]
    return _save(folder, model, "Yolos")


def save_detr(folder: Path) -> str:
    """DETR on a ResNet of transformers itself, untrained."""
    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage4"]
    )
    config = DetrConfig(
        **_LABELS,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=NUM_BOXES,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
    )
    return _save(folder, DetrForObjectDetection(config), "Detr")


def save_owlvit(folder: Path, shift: float) -> str:
    """All its 16 boxes have a logit within 1 of `shift`, whatever the words."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(resolve_pretrained("scenes/clip"))
    model = OwlViTForObjectDetection(
        OwlViTConfig(
            text_config={
                **TRANSFORMER, "vocab_size": len(tokenizer), "max_position_embeddings": 16
            },
            vision_config={**TRANSFORMER, "image_size": 64, "patch_size": 16},
            projection_dim=32,
        )
    )  # fmt: skip
    for layer, bias in ((model.class_head.logit_shift, shift), (model.class_head.logit_scale, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    tokenizer.save_pretrained(folder)
    return _save(folder, model, "OwlViT", size={"height": 64, "width": 64})


def _save(folder: Path, model: torch.nn.Module, family: str, **settings: object) -> str:
    model.save_pretrained(folder)
    processor = {"image_processor_type": f"{family}ImageProcessor", "size": 64} | settings
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)
