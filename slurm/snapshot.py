"""The code as it is now, so that jobs which start tomorrow run what was submitted today.

Equal code is kept once, under its hash. Nothing is ever removed: which job will need it again, no
one can say while runs are requeued and submitted anew; and code that is edited often is small.
"""

import hashlib
import shutil
import subprocess
import tempfile
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


def take_snapshot(folder: Path) -> Path:
    """Copy the packages, as they lie on disk, to FOLDER/HASH, unless they are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new_", dir=folder) as new:
        copy = Path(new, "code")
        for package in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                ROOT / package, copy / package, ignore=ignored, copy_function=_copy_read_only
            )
        target = folder / _hash(copy)
        try:
            copy.rename(target)
        except OSError:
            if not target.is_dir():  # if it is, somebody has submitted the same code before
                raise
    return target


def read_revision() -> Revision:
    """Commit and changes of the checkout that the packages lie in."""
    return Revision(commit=_git("rev-parse", "HEAD").strip(), diff=_git("diff", "HEAD"))


def _copy_read_only(source: str, target: str) -> None:
    """Several submissions share the file, so nobody shall edit it in passing."""
    shutil.copyfile(source, target)
    Path(target).chmod(0o444)


def _hash(folder: Path) -> str:
    """Of all names and contents, short enough for a path."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder)} {content}\n".encode())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return ""
