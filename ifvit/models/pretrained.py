"""Where frozen encoders come from: a local folder, a hub name, or the ones shipped for scenes."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import ifvit.scenes
from ifvit.errors import UserError
from ifvit.shards import EncoderIdentity
from ifvit.storage import sha256_of

_SHIPPED = Path(ifvit.scenes.__file__).parent / "encoders"
_SHIPPED_PREFIX = "scenes/"


def resolve_pretrained(name: str) -> Path:
    """Folder with `config.json` and safetensors weights for `name`.

    `name` is a local folder, `scenes/vae` or `scenes/clip` (shipped with the package), or a hub
    repository `org/name`, with a folder inside it as `org/name/subfolder`.
    Raises UserError when none of these leads to a `config.json`.
    """
    folder = Path(name)
    if name.startswith(_SHIPPED_PREFIX) and not folder.exists():
        folder = _SHIPPED / name.removeprefix(_SHIPPED_PREFIX)
    elif not folder.exists():
        folder = _download(name)
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json in {folder}; expected a Hugging Face model folder")
    return folder


def identify(name: str, folder: Path) -> EncoderIdentity:
    """Name and hash of the weights, so that shards can say which encoder made them.

    Only safetensors are read: a pickle from the internet could run code. Raises UserError when
    the folder has none.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name}: no *.safetensors in {folder}; pickled weights are not loaded")
    digest = hashlib.sha256()
    for path in weights:
        digest.update(bytes.fromhex(sha256_of(path)))
    return EncoderIdentity(name=name, sha256=digest.hexdigest())


def upload_pretrained(folder: Path, repository: str) -> None:
    """Make `folder` the content of a hub repository. Raises UserError when the hub refuses."""
    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{repository}: the hub refused the upload ({reason})") from None


def download_pretrained(
    repository: str,
    folder: str = "",
    files: tuple[str, ...] = ("*.json", "*.safetensors", "*merges.txt"),
    **options: Any,
) -> Path:
    """Local copy of a hub repository, or of one folder in it; of `files` only.

    `options` are those of huggingface_hub's snapshot_download: revision, token, cache_dir, ...
    Raises UserError when it cannot be fetched.
    """
    prefix = f"{folder}/" if folder else ""
    patterns = [f"{prefix}{pattern}" for pattern in files]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options), folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        name = f"{repository}/{folder}".rstrip("/")
        raise UserError(
            f"{name}: neither a local folder nor a hub name that could be fetched ({reason})"
        ) from None


def _download(name: str) -> Path:
    organisation, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    return download_pretrained(f"{organisation}/{repository}", folder)
