"""Folders and files of frozen pretrained models: local, from the Hugging Face hub, or shipped.

`read_safe_config` reads those keys of a config.json that are safe to use, and `load_frozen` the
model that it describes. `reading` turns what libraries raise for broken files into one line.
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from torch import Tensor, nn

import ifvit.scenes
from ifvit.errors import UserError
from ifvit.models.config import MAX_BLOCKS
from ifvit.records import PlainName, parse_json, record, shorten
from ifvit.shards.format import EncoderIdentity
from ifvit.storage import read_bytes, sha256_of

Config = TypeVar("Config")
_SHIPPED = Path(ifvit.scenes.__file__).parent / "encoders"
_SHIPPED_PREFIX = "scenes/"
_NAMES_CODE = ("implementation", "auto_map", "dtype", "_name_or_path")
"""Ends of keys of config.json that may name code or packages; loading ignores them."""
_COUNTS = ("layer", "block", "expert", "depth")
"""Parts of the keys of config.json that count modules, each of which takes time to build."""


def resolve_pretrained(name: str, flag: str | None = None) -> Path:
    """Return the folder with `config.json` and safetensors weights of the model `name`.

    `name` is a local folder, `scenes/vae` or `scenes/clip` (shipped with the package), or a hub
    repository `org/name`, with a folder inside it as `org/name/subfolder`.
    Raises UserError, which advises to use `flag`, if there is no such folder, and if it has no
    `config.json`.
    """
    folder, remedy = Path(name), f"; name its place with {flag}" if flag else ""
    if name.startswith(_SHIPPED_PREFIX) and not folder.exists():
        folder = _SHIPPED / name.removeprefix(_SHIPPED_PREFIX)
    elif name.startswith(("/", "./", "../")) and not folder.exists():
        raise UserError(f"{name}: no such folder{remedy}")
    elif not folder.exists():
        organisation, _, rest = name.partition("/")
        repository, _, subfolder = rest.partition("/")
        try:
            folder = download_pretrained(f"{organisation}/{repository}", subfolder)
        except UserError as error:
            raise UserError(f"{error}{remedy}") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no config.json in {folder}; expected a Hugging Face model folder")
    return folder


def place_of(name: str) -> str:
    """Hub name, or absolute path of a local folder, by which other directories find the model."""
    # Path.resolve would follow links, which stay when the disk behind them changes.
    return os.path.abspath(name) if Path(name).exists() else name  # noqa: PTH100


def identify(name: str, folder: Path) -> EncoderIdentity:
    """Return place and hash of the weights, which manifests and weights.json store.

    Raises UserError if the folder has no safetensors: a pickle could run code when it is loaded.
    """
    digest = hashlib.sha256()
    for path in weight_files(name, folder):
        digest.update(bytes.fromhex(sha256_of(path)))
    return EncoderIdentity(name=place_of(name), sha256=digest.hexdigest())


def weight_files(name: str, folder: Path) -> list[Path]:
    """Sorted safetensors of a folder. Raises UserError for an index that names other files."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        raise UserError(f"{name}: no *.safetensors in {folder}; pickled weights are not loaded")
    for index in folder.glob("*.safetensors.index.json"):
        named = parse_json(_WeightIndex, read_bytes(str(index)), str(index)).weight_map.values()
        if missing := set(named) - {path.name for path in files}:
            raise UserError(f"{index}: names {shorten(min(missing))}, which is not in {folder}")
    return files


@record
class _WeightIndex:
    """Content of model.safetensors.index.json: the file of each tensor."""

    metadata: dict[str, Any] | None = None
    weight_map: dict[str, PlainName]


def read_model_config(cls: type[Config], folder: Path, *, name: str = "config.json") -> Config:
    """Read those keys of a model's config.json that the record `cls` has.

    Libraries write further keys, which differ between their versions and are ignored. Raises
    UserError that names the file and the key.
    """
    path = folder / name
    return parse_json(cls, read_bytes(str(path)), str(path), ignore_unknown=True)


def read_safe_config(folder: Path) -> dict[str, Any]:
    """Read the keys of config.json without those that may name code.

    Raises UserError for quantised weights, and for numbers of modules that take long to build.
    """
    path = str(folder / "config.json")
    stored = parse_json(dict[str, Any], read_bytes(path), path)
    if stored.get("quantization_config") is not None:
        raise UserError(
            f"{path}: the weights are quantised (quantization_config); use a folder with plain ones"
        )
    return _safe_keys(stored, path)


def _safe_keys(stored: dict[str, Any], path: str) -> dict[str, Any]:
    keys = {}
    for key, value in stored.items():
        if any(part in key for part in _COUNTS) and _is_too_many(key, value):
            raise UserError(
                f"{path}: {shorten(key)} is {shorten(value)}; at most {MAX_BLOCKS} are loaded"
            )
        if not key.endswith(_NAMES_CODE):
            keys[key] = _safe_keys(value, path) if isinstance(value, dict) else value
    return keys


def _is_too_many(key: str, value: object) -> bool:
    """Whether a count, a list of counts, or the length of a list exceeds MAX_BLOCKS."""
    if isinstance(value, list):
        return len(value) > MAX_BLOCKS or any(_is_too_many(key, entry) for entry in value)
    return isinstance(value, int) and value > MAX_BLOCKS and "channels" not in key


def load_frozen(
    what: str,
    folder: Path,
    build: Callable[[], Any],
    load: Callable[[], tuple[Any, dict[str, Any]]],
) -> Any:
    """Load a frozen model of diffusers or transformers; `Any`, because their types do not hold.

    `build` makes the network that config.json describes, here on the meta device: a file that
    claims a huge network is refused before memory is allocated for it. `load` is from_pretrained
    with `output_loading_info`. Raises UserError for files that are not a whole `what`, because
    libraries replace missing tensors by random numbers.
    """
    with reading(f"{folder}/config.json: not {what}"), torch.device("meta"):
        network = build()
        # Buffers, such as tables of positions, are not stored, but no model has more of them.
        counts = (sum(map(Tensor.numel, each())) for each in (network.parameters, network.buffers))
        claimed = max(counts)
    shapes = [read_shapes(path).values() for path in weight_files(str(folder), folder)]
    stored = sum(torch.Size(shape).numel() for file in shapes for shape in file)
    if claimed > stored:
        raise UserError(
            f"{folder}: config.json describes {claimed} parameters, but the *.safetensors hold "
            f"{stored}; use files of the same model"
        )
    with reading(f"{folder}: does not load as {what}"):
        model, loading = load()
    if missing := loading["missing_keys"]:
        raise UserError(
            f"{folder}: the *.safetensors lack {len(missing)} tensors, such as "
            f"{shorten(min(missing))}; use a complete folder"
        )
    return model.eval().requires_grad_(False)


def require_shapes(what: str, wanted: nn.Module, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless `found` are the tensors of a module on the meta device."""
    expected = {name: tuple(tensor.shape) for name, tensor in wanted.state_dict().items()}
    names = expected.keys() | found.keys()
    differing = [name for name in names if expected.get(name) != found.get(name)]
    if differing:
        name = min(differing)
        raise UserError(
            f"{what}: {shorten(name)} has shape {found.get(name)}, but the configuration describes "
            f"{expected.get(name)}; use files of the same model"
        )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a safetensors file, from its header."""
    with (
        reading(f"{path}: not a complete safetensors file"),
        safe_open(path, framework="pt") as tensors,
    ):
        names = tensors.offset_keys()
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Read the state dict that torch.save wrote, without running pickled code.

    Raises UserError for another file, and if memory would exceed twice the file: tensors may
    repeat one number, and an archive may be compressed.
    """
    with reading(f"{path}: cannot be read as tensors of torch.save without pickled code"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise UserError(f"{path}: a compressed archive; torch.save writes none")
        stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for key, value in stored.items()
    ):
        raise UserError(f"{path}: not a state dict; save nnet_ema.state_dict() by itself")
    if sum(value.nbytes for value in stored.values()) > 2 * path.stat().st_size:
        raise UserError(f"{path}: its tensors are larger than the file; save them contiguously")
    return stored


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise UserError, in one line, for what a library raises on broken files, disks and hubs."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({_line(error)})") from None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return shorten(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 200)


def upload_pretrained(folder: Path, repository: str) -> None:
    """Upload `folder` to a hub repository. Raises UserError if the hub does not accept it."""
    with reading(f"{repository}: the upload to the hub failed"):
        hub = HfApi()
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder)


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
    name = f"{repository}/{folder}".rstrip("/")
    patterns = [str(PurePosixPath(folder, pattern)) for pattern in files]
    with reading(f"{name}: not a local folder, and the download from the hub failed"):
        return Path(snapshot_download(repository, allow_patterns=patterns, **options), folder)
