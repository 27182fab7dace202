"""What arXiv 2403.16530 prints, and whether our numbers may be set against it."""

from dataclasses import dataclass, replace

from ifvit.analysis.runs import Run
from ifvit.analysis.settings import PAPER_SETTINGS, shape_of
from ifvit.analysis.sheet import Sheet
from ifvit.evaluation.protocol import describe_field
from ifvit.models.presets import PRESETS

CLIP_SCALE = 2.5
"""Of the paper's CLIP Score, 2.5 max(cosine, 0); its code shows it, its text does not."""

_CLIP = "clip-vit-large-patch14"
_FID_PROTOCOL = {
    "num_samples": 30_000,
    "caption_rule": "random",
    "guidance_scale": 2.0,
    "num_steps": 50,
    "method": "plain",
}
_CLIP_PROTOCOL = {**_FID_PROTOCOL, "score_caption": "first", "paper_prefix": "A photo depicts "}
_BATCH_SIZE = 256
_GPU = "4090"


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A row of Table 1; parameters in millions, GFLOPs without those of attention."""

    fid: float
    clip_score: float
    mparams: float
    iterations_per_s: float
    gflops: float


PAPER_TABLE_1 = dict(
    zip(
        PAPER_SETTINGS,
        (
            PaperRow(fid=5.98, clip_score=0.584, mparams=45, iterations_per_s=1.81, gflops=29.56),
            PaperRow(fid=5.77, clip_score=0.588, mparams=48, iterations_per_s=2.31, gflops=25.84),
            PaperRow(fid=6.48, clip_score=0.575, mparams=45, iterations_per_s=2.54, gflops=23.82),
            PaperRow(fid=5.68, clip_score=0.588, mparams=48, iterations_per_s=2.74, gflops=23.66),
        ),
        strict=True,
    )
)

FOUNDATION_MODELS = (
    ("DALLE 3", None, "0.320"),
    ("Imagen", 7.27, "~0.29"),
    ("Stable Diffusion", 8.59, "0.325"),
    ("SDXL", None, "0.305"),
)
"""Of Table 2, all early fusion by cross-attention: name, zero-shot FID, CLIP Score as printed."""

PAPER_OWN = {"U-ViT-Small": PAPER_SETTINGS[0], "IF-U-ViT": PAPER_SETTINGS[3]}
"""Of Table 2, trained on COCO; their CLIP Scores are on the other scale."""


def other_backbone(sheet: Sheet) -> str | None:
    """Why these backbones are not those of the paper; None if they are."""
    paper = PRESETS["small"]
    for setting, runs in sheet.settings.items():
        shape = shape_of(runs[0])
        same = replace(
            paper,
            conditioning=setting.conditioning,
            num_image_blocks=paper.num_image_blocks if setting.image_blocks else 0,
            num_text_blocks=paper.num_text_blocks if setting.text_blocks else 0,
            init_std=shape.init_std,
            timestep_offset=shape.timestep_offset,
        )
        if shape != same:
            return (
                f"a backbone of width {shape.width} and depth {shape.depth} on latents of "
                f"{shape.latent_size} x {shape.latent_size} is not the paper's"
            )
    return None


def other_fid(sheet: Sheet) -> str | None:
    """Why FID was not measured as the paper did; None if it was."""
    return _other_protocol(sheet, _FID_PROTOCOL)


def other_clip_score(sheet: Sheet) -> str | None:
    """Why the CLIP Score was not measured as the paper did; None if it was."""
    reason = _other_protocol(sheet, _CLIP_PROTOCOL)
    if reason or sheet.reference is None:
        return reason
    features = sheet.reference.protocol.features
    return None if features.endswith(_CLIP) else f"scored by {features}, not by {_CLIP}"


def _other_protocol(sheet: Sheet, paper: dict[str, object]) -> str | None:
    if sheet.reference is None:
        return "nothing was evaluated"
    ours = sheet.reference.protocol.facts
    found = [
        f"{describe_field(name)} {ours[name]!r}, the paper's {value!r}"
        for name, value in paper.items()
        if ours[name] != value
    ]
    return "; ".join(found) or None


def other_hardware(sheet: Sheet) -> str | None:
    """Why the training speed is not that of the paper's GPU; None if it is."""
    runs = [run for members in sheet.settings.values() for run in members]
    names, sizes = devices(sheet), {batch_size(run) for run in runs}
    if len(names) == 1 and _GPU in names[0] and sizes == {_BATCH_SIZE}:
        return None
    found = ", ".join(names) or "unknown hardware"
    batches = ", ".join(str(size) for size in sizes)
    return f"{found} at batch {batches} is not an RTX 4090 at batch {_BATCH_SIZE}"


def devices(sheet: Sheet) -> list[str]:
    """What trained, as metrics.jsonl names it."""
    runs = [run for members in sheet.settings.values() for run in members]
    return sorted({str(row["device"]) for run in runs for row in run.curve if "device" in row})


def batch_size(run: Run) -> int | None:
    """Of the run's recipe, over all processes."""
    size: int | None = (run.recipe or {}).get("global_batch_size")
    return size
