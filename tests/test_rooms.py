"""The structure of the code: rooms of heavy libraries, layers, and docstrings.

Each heavy library has one room, so replacing the library costs the files that are named here.
"""

import ast
import re
import tomllib
from functools import cache
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
        "ifvit/diffusion/solvers.py",
        "ifvit/models/autoencoders.py",
        "ifvit/models/backbone.py",
        "ifvit/models/fusion_transformer.py",
        "ifvit/models/unet.py",
        "ifvit/sampling/pipeline.py",
        "ifvit/sampling/pipeline_files.py",
    ],
    "fsspec": ["ifvit/connections.py"],
    "huggingface_hub": ["ifvit/models/pretrained.py"],
    "jinja2": ["ifvit/rating/results.py", "ifvit/studies/page.py"],
    "jsonargparse": ["ifvit/config.py"],
    "krippendorff": ["ifvit/rating/agreement.py"],
    "matplotlib": [
        "ifvit/analysis/atlas.py",
        "ifvit/analysis/attention_analysis.py",
        "ifvit/analysis/knockout_analysis.py",
        "ifvit/analysis/run_analysis.py",
        "ifvit/figures.py",
        "ifvit/models/fusion_drawing.py",
        "ifvit/studies/page.py",
        "ifvit/studies/study_figures.py",
    ],
    "sqlite3": ["ifvit/rating/answers.py"],
    "starlette": ["ifvit/rating/server.py"],
    "submitit": ["slurm/jobs.py", "slurm/status.py", "slurm/submit.py", "slurm/supervise.py"],
    "pyarrow": [
        "data_pipeline/sources/caption_files.py",
        "data_pipeline/sources/parquet_images.py",
    ],
    "transformers": [
        "ifvit/evaluation/detectors.py",
        "ifvit/models/clip.py",
        "ifvit/models/image_encoders.py",
        "ifvit/models/image_reward.py",
        "ifvit/models/text_encoders.py",
    ],
    "uvicorn": ["ifvit/rating/limits.py", "ifvit/rating/server.py"],
    "webdataset": ["ifvit/bench/loading_speed.py", "data_pipeline/shard_io.py"],
    "xformers": ["ifvit/models/attention.py"],
}


@cache
def parse_product() -> dict[str, ast.Module]:
    """Syntax tree of every product file, by its path from the root."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}


@cache
def imported_names(file: str) -> set[str]:
    """Every part of a dotted name that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(parse_product()[file]):
        if isinstance(node, ast.Import):
            names.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(node.module.split("."))
    return names


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_is_imported_in_its_rooms_only(library: str) -> None:
    assert [file for file in parse_product() if library in imported_names(file)] == ROOMS[library]


def test_pillow_opens_files_in_one_function_only() -> None:
    callers = [
        file
        for file, tree in parse_product().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "Image.open"
    ]
    assert callers == ["ifvit/images.py"]


def test_nothing_imports_torchvision() -> None:
    assert [file for file in parse_product() if "torchvision" in imported_names(file)] == []


def test_contributing_shows_the_layers_that_the_linter_checks() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    page = (ROOT / "CONTRIBUTING.md").read_text()
    shown = re.search(r"^#+ Layers$.*?^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert shown[1].splitlines() == layers


def test_no_docstring_begins_with_of() -> None:
    wrong = [
        f"{file}:{node.lineno}"
        for file, tree in parse_product().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith("Of ")
    ]
    assert wrong == []
