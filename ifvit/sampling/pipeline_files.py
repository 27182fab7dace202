"""The files of an exported pipeline: its index, and the components in its folders.

No file names code to run, except a scheduler of diffusers by its class.
"""

import tempfile
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from safetensors.torch import load_file
from torch import nn

from ifvit import connections, storage
from ifvit.diffusion.config import Prediction, ScalingFactor, Shift, ShiftFactor
from ifvit.diffusion.schedules import BETA_END, BETA_START
from ifvit.errors import UserError
from ifvit.models.autoencoders import load_vae
from ifvit.models.config import NullContext
from ifvit.models.pretrained import download_pretrained, read_model_config, reading, weight_files
from ifvit.models.text_encoders import DTYPES, load_text_model, load_tokenizer
from ifvit.models.weights import check_shapes, read_backbone_config, restore_backbone
from ifvit.records import Rule, parse_json, parse_value, path_inside, record
from ifvit.shards.format import TextSettings

INDEX_FILE = "model_index.json"
CLASS_NAME = ["pipeline", "FusionPipeline"]
"""Module and class in the index, from which diffusers loads the pipeline."""
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
"""Predictions as diffusers' schedulers call them."""
Named = tuple[str | None, str | None]
"""Package and name of a component's class; (None, None) for a component that is missing."""
_SCHEDULERS = {("diffusers", name) for name in dir(diffusers) if name.endswith("Scheduler")}
Scheduler = Annotated[Named, Rule("a scheduler of diffusers", lambda named: named in _SCHEDULERS)]


@record
class PipelineIndex:
    """Content of model_index.json without the keys of diffusers; a component is a folder.

    Only the scheduler's class is chosen by its name: a file names no other code.
    """

    backbone: Named
    vae: Named
    text_encoder: Named = (None, None)
    tokenizer: Named = (None, None)
    scheduler: Scheduler
    classes: tuple[str, ...] = ()
    null_context: NullContext = "empty_caption"
    prediction: Prediction = "epsilon"
    text_settings: TextSettings | None = None
    """How the text encoder makes contexts; None for the settings of its class."""
    scaling_factor: ScalingFactor
    shift_factor: ShiftFactor = 0.0

    @property
    def components(self) -> list[str]:
        """Names of the components that the pipeline has."""
        names = ("backbone", "vae", "text_encoder", "tokenizer", "scheduler")
        return [name for name in names if getattr(self, name) != (None, None)]


@record
class SchedulerConfig:
    """The keys of scheduler_config.json that are Stable Diffusion's noise schedule."""

    num_train_timesteps: Literal[1000]
    beta_schedule: Literal["scaled_linear"]
    beta_start: Annotated[float, Rule(f"{BETA_START}", lambda value: value == BETA_START)]
    beta_end: Annotated[float, Rule(f"{BETA_END}", lambda value: value == BETA_END)]
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    use_flow_sigmas: Literal[False] = False
    trained_betas: None = None


@record
class FlowSchedulerConfig:
    """The keys of scheduler_config.json that set a flow from 0 to 1."""

    num_train_timesteps: Literal[1000]
    prediction_type: Literal["flow_prediction"] = "flow_prediction"
    use_flow_sigmas: Literal[True] = True
    shift: Shift = 1.0
    flow_shift: Shift = 1.0
    invert_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False


def load_components(
    url: str, dtype: torch.dtype, own: Container[str], of_hub: Mapping[str, Any]
) -> dict[str, Any]:
    """Load the arguments of FusionPipeline from a folder, an `s3://` prefix or a hub name.

    Components in `own` are left out; `of_hub` are options for the hub. `dtype` is the backbone's.
    Raises UserError for a hub name that cannot be fetched, and for a folder that is not a complete
    pipeline of ifvit.
    """
    with tempfile.TemporaryDirectory(prefix="ifvit-") as temporary:
        folder = Path(url)
        if connections.is_remote(url):
            folder = Path(temporary)
            _download(url, folder)
        elif not folder.is_dir():
            folder = Path(download_pretrained(url, **of_hub))
        index = _read_index(folder)
        loaded: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
        for name in index.components:
            if name not in own:
                inside = path_inside(folder, name)
                loaded[name] = _load_component(name, index, inside, dtype)
    settings = ("classes", "null_context", "prediction", "scaling_factor", "shift_factor")
    loaded |= {name: getattr(index, name) for name in settings}
    return loaded | {"text_settings": asdict(index.text_settings) if index.text_settings else None}


def _download(url: str, folder: Path) -> None:
    """Download the pipeline's index and the files of its components."""
    storage.download(storage.join(url, INDEX_FILE), folder / INDEX_FILE)
    for component in _read_index(folder).components:
        for name in storage.list_names(storage.join(url, component)):
            path = path_inside(folder, f"{component}/{name}")
            storage.download(storage.join(url, component, name), path)


def _read_index(folder: Path) -> PipelineIndex:
    path = folder / INDEX_FILE
    stored = parse_json(dict[str, Any], storage.read_bytes(str(path)), str(path))
    if stored.get("_class_name") not in (CLASS_NAME, CLASS_NAME[1]):
        raise UserError(f"{path}: not the index of a {CLASS_NAME[1]}")
    # Other keys that begin with an underscore belong to diffusers.
    own = {key: value for key, value in stored.items() if not key.startswith("_")}
    return parse_value(PipelineIndex, own, str(path))


def _load_component(name: str, index: PipelineIndex, folder: Path, dtype: torch.dtype) -> Any:
    """Load one component from its folder.

    Raises UserError for files that are incomplete, or larger than they claim.
    """
    if name == "backbone":
        config, paths = read_backbone_config(str(folder)), weight_files(str(folder), folder)
        check_shapes(config, *paths)
        with reading(f"{folder}: weights that safetensors cannot load"):
            tensors = {key: one for path in paths for key, one in load_file(path).items()}
        backbone = restore_backbone(config, tensors, copy=False)
        return nn.Module.to(backbone, dtype)  # diffusers' own `to` warns
    if name == "scheduler":
        known: type[SchedulerConfig | FlowSchedulerConfig] = SchedulerConfig
        if index.prediction == "flow":
            known = FlowSchedulerConfig
        found = read_model_config(known, folder, name="scheduler_config.json")
        if found.prediction_type != PREDICTION_TYPES[index.prediction]:
            raise UserError(
                f"{folder}: scheduler_config.json has prediction_type {found.prediction_type}, but "
                f"the backbone predicts {index.prediction}; restore the file"
            )
        scheduler = getattr(diffusers, str(index.scheduler[1]))
        with reading(f"{folder}: not a scheduler that diffusers loads"):
            return scheduler.from_pretrained(folder)
    if name == "tokenizer":
        return load_tokenizer(folder)
    if name == "text_encoder":
        settings = index.text_settings or TextSettings()
        return load_text_model(folder, DTYPES[settings.precision])
    return load_vae(folder, torch.float32)
