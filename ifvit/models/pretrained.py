"""Folders of frozen pretrained models: local, from the Hugging Face hub, or shipped for scenes."""

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

import ifvit.scenes
from ifvit.errors import UserError
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import sha256_of

_SHIPPED = Path(ifvit.scenes.__file__).parent / "encoders"
_SHIPPED_PREFIX = "scenes/"


def resolve_pretrained(name: str) -> Path:
    """Return the folder with `config.json` and safetensors weights of the model `name`.

    `name` is a local folder, `scenes/vae` or `scenes/clip` (shipped with the package), or a hub
    repository `org/name`, with a folder inside it as `org/name/subfolder`.
    Raises UserError if there is no such folder or it has no `config.json`.
    """
    folder = Path(name)
    if name.startswith(_SHIPPED_PREFIX) and not folder.exists():
        folder = _SHIPPED / name.removeprefix(_SHIPPED_PREFIX)
    elif not folder.exists():
        organisation, _, rest = name.partition("/")
        repository, _, subfolder = rest.partition("/")
        folder = download_pretrained(f"{organisation}/{repository}", subfolder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json in {folder}; expected a Hugging Face model folder")
    return folder


def identify(name: str, folder: Path) -> EncoderIdentity:
    """Return name and hash of the weights, which manifests and weights.json store.

    Raises UserError if the folder has no safetensors: a pickle could run code when it is loaded.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name}: no *.safetensors in {folder}; pickled weights are not loaded")
    digest = hashlib.sha256()
    for path in weights:
        digest.update(bytes.fromhex(sha256_of(path)))
    return EncoderIdentity(name=name, sha256=digest.hexdigest())


def upload_pretrained(folder: Path, repository: str) -> None:
    """Upload `folder` to a hub repository. Raises UserError if the hub does not accept it."""
    hub = HfApi()
    try:
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{repository}: the upload to the hub failed ({reason})") from None


def download_pretrained(
    repository: str,
    folder: str = "",
    files: tuple[str, ...] = ("*.json", "*.safetensors", "*merges.txt"),
    **options: Any,
) -> Path:
    """Download `files` of a hub repository, or of one folder in it; return the local folder.

    `options` are those of huggingface_hub's snapshot_download: revision, token, cache_dir, ...
    Raises UserError if the download fails.
    """
    prefix = f"{folder}/" if folder else ""
    patterns = [f"{prefix}{pattern}" for pattern in files]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, **options), folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        name = f"{repository}/{folder}".rstrip("/")
        raise UserError(
            f"{name}: not a local folder, and the download from the hub failed ({reason})"
        ) from None
