"""An installed wheel is complete, and finds out when another package took one of its names."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the content of the wheel, as `pip install --no-deps --target` makes it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("ifvit", "data_pipeline", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(target)], cwd=source, check=True, capture_output=True
    )
    [wheel] = target.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def run_ifvit(*path: Path) -> subprocess.CompletedProcess[str]:
    """Show a shipped recipe with the given folders first on the path."""
    return subprocess.run(
        [sys.executable, "-m", "ifvit", "train", "--recipe", "scenes", "--print_config"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_wheel_holds_three_packages_and_the_shipped_recipes(installed: Path) -> None:
    folders = {path.name for path in installed.iterdir() if path.is_dir()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {
        *("ifvit", "data_pipeline", "slurm")
    }
    ran = run_ifvit(installed)
    assert ran.returncode == 0, ran.stderr
    assert "backbone:" in ran.stdout


@pytest.mark.parametrize("name", ["slurm", "data_pipeline"])
def test_a_package_of_another_distribution_is_named(
    name: str, installed: Path, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemError('imported')")
    ran = run_ifvit(tmp_path, installed)
    assert ran.returncode == 2
    [line] = ran.stderr.splitlines()
    assert str(tmp_path / name) in line
    assert "virtual environment" in line
    ran = run_ifvit(installed, tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_a_package_that_was_overwritten_is_named(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "slurm" / "__init__.py").write_text("")
    ran = run_ifvit(tmp_path)
    assert ran.returncode == 2
    assert str(tmp_path / "slurm") in ran.stderr
