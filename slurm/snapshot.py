"""The code as it is now, so that jobs which start tomorrow run what was submitted today."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("ifvit", "data_pipeline", "slurm")
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Revision:
    """What a snapshot was taken of; both empty where the code is not a git checkout."""

    commit: str
    diff: str
    """What the files differ from the commit, as `git diff` prints it; new files are not in it."""


def take_snapshot(folder: Path) -> Revision:
    """Copy the packages, as they lie on disk, into `folder`."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    return Revision(commit=_git("rev-parse", "HEAD").strip(), diff=_git("diff", "HEAD"))


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
