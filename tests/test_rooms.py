"""Each heavy library has one room: replacing it costs the files named here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ifvit", "data_pipeline", "slurm")
ROOMS = {
    "accelerate": [
        "ifvit/training/engine.py",
        "ifvit/training/metrics_log.py",
        "ifvit/training/zero.py",
    ],
    "deepspeed": ["ifvit/training/zero.py"],
    "diffusers": [
        "ifvit/models/autoencoders.py",
        "ifvit/models/backbone.py",
        "ifvit/models/token_transformer.py",
        "ifvit/models/unet.py",
        "ifvit/models/uvit.py",
        "ifvit/sampling/pipeline.py",
        "ifvit/sampling/solvers.py",
    ],
    "fsspec": ["ifvit/storage.py"],
    "huggingface_hub": ["ifvit/models/pretrained.py"],
    "jinja2": ["ifvit/rating/pages.py", "ifvit/studies/report.py"],
    "jsonargparse": ["ifvit/config.py"],
    "krippendorff": ["ifvit/rating/agreement.py"],
    "matplotlib": [
        "ifvit/analysis/attention_analysis.py",
        "ifvit/figures.py",
        "ifvit/studies/object_counts.py",
        "ifvit/studies/paper_figures.py",
        "ifvit/studies/report.py",
    ],
    "numba": ["ifvit/shards/reader.py"],
    "sqlite3": ["ifvit/rating/store.py"],
    "starlette": ["ifvit/rating/server.py"],
    "submitit": ["slurm/jobs.py", "slurm/status.py", "slurm/submit.py", "slurm/supervise.py"],
    "pyarrow": ["data_pipeline/sources/table.py"],
    "transformers": [
        "ifvit/evaluation/detectors.py",
        "ifvit/models/clip.py",
        "ifvit/models/image_reward.py",
    ],
    "uvicorn": ["ifvit/rating/server.py"],
    "webdataset": ["ifvit/bench/loading_speed.py", "data_pipeline/shard_io.py"],
    "xformers": ["ifvit/models/attention.py"],
}


def imported_modules(path: Path) -> set[str]:
    """Every dotted name that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    found = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if any(library in name.split(".") for name in imported_modules(path))
    ]
    assert found == ROOMS[library]


def test_nothing_imports_torchvision() -> None:
    for package in (*PACKAGES, "tools"):
        for path in (ROOT / package).rglob("*.py"):
            assert not any(name.startswith("torchvision") for name in imported_modules(path)), path
