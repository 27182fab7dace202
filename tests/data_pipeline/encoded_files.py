"""What the tests of the encode job look at on disk."""

from pathlib import Path

from data_pipeline.config import EncodeConfig
from ifvit.storage import sha256_of


def hashes(config: EncodeConfig) -> dict[str, str]:
    """Every file of the output, hidden ones too, and its hash."""
    folder = Path(config.output)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def image_files(config: EncodeConfig) -> list[Path]:
    """The images, in the order in which COCO's source has them."""
    return sorted(Path(config.images).iterdir())


def truncate(path: Path) -> bytes:
    """Cut a file in half; returns what it held."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data
