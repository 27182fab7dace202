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
        "ifvit/models/autoencoder.py",
        "ifvit/models/backbone.py",
        "ifvit/models/token_transformer.py",
        "ifvit/models/unet.py",
        "ifvit/models/uvit.py",
        "ifvit/sampling/pipeline.py",
        "ifvit/sampling/solvers.py",
    ],
    "fsspec": ["ifvit/object_store.py"],
    "huggingface_hub": ["ifvit/models/pretrained.py"],
    "jinja2": ["ifvit/analysis/page.py", "ifvit/rating/pages.py"],
    "jsonargparse": ["ifvit/config.py"],
    "krippendorff": ["ifvit/rating/statistics.py"],
    "matplotlib": [
        "ifvit/analysis/attention_figure.py",
        "ifvit/analysis/curves.py",
        "ifvit/analysis/figure_style.py",
        "ifvit/analysis/object_count_figure.py",
        "ifvit/analysis/paper_figures.py",
    ],
    "numba": ["ifvit/shards/rows.py"],
    "sqlite3": ["ifvit/rating/store.py"],
    "starlette": ["ifvit/rating/protection.py", "ifvit/rating/server.py"],
    "submitit": [
        "slurm/jobs.py",
        "slurm/status.py",
        "slurm/submission.py",
        "slurm/supervise.py",
    ],
    "pyarrow": ["data_pipeline/sources/table.py"],
    "transformers": [
        "ifvit/evaluation/detector.py",
        "ifvit/models/clip.py",
        "ifvit/models/image_reward.py",
    ],
    "uvicorn": ["ifvit/rating/server.py"],
    "webdataset": ["ifvit/bench/loader_peers.py", "data_pipeline/write.py"],
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
