"""A trained backbone with its frozen encoders as a diffusers pipeline; `ifvit export` writes it.

Shapes: B images, M text tokens, D context width, C latent channels, S latent size, H, W image.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ifvit import storage
from ifvit.conditions import (
    Condition,
    PaddedContext,
    is_visible,
    map_tensors,
    move,
    tokens_of,
    with_tokens,
)
from ifvit.diffusion.config import Guidance, LatentScaling, Prediction
from ifvit.diffusion.guidance import AlignmentMethod, GuidedPredictor
from ifvit.diffusion.objectives import LatentScaler
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.diffusion.solvers import initial_latents, network_input, set_steps
from ifvit.errors import UserError
from ifvit.models.autoencoders import spatial_factor
from ifvit.models.backbone import Backbone
from ifvit.models.config import NullContext
from ifvit.models.text_encoders import cast_parameters, default_settings, encode_captions
from ifvit.records import parse_value
from ifvit.sampling.load import number_classes
from ifvit.sampling.pipeline_files import CLASS_NAME, HUB_OPTIONS, PREDICTION_TYPES, load_components
from ifvit.shards.format import TextSettings

Generators = torch.Generator | list[torch.Generator]
OnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
_MODULE = """\
# DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True) finds the class here.
from ifvit.sampling.pipeline import FusionPipeline
"""


class FusionPipeline(DiffusionPipeline):
    """Captions or classes => images, with any diffusers scheduler for the backbone's prediction.

    For epsilon and v, it must use Stable Diffusion's noise schedule.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds")
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  diffusers adds lists

    # Set by register_modules.
    backbone: Backbone
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(  # noqa: PLR0913  the components and what decides their use
        self,
        backbone: Backbone,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        scheduler: Any,
        classes: Sequence[str] = (),
        null_context: NullContext = "empty_caption",
        prediction: Prediction = "epsilon",
        text_settings: Mapping[str, Any] | None = None,
        scaling_factor: float | Sequence[float] | None = None,
        shift_factor: float | Sequence[float] = 0.0,
    ) -> None:
        """`classes` are the class names of a class-conditional backbone without text encoder.

        `null_context` stood for the empty prompt in the training, `prediction` is what the backbone
        predicts, and `text_settings` are the fields of TextSettings; unset: those of the class of
        the text encoder. `scaling_factor` and `shift_factor` of the latents are those of the
        training, whatever the autoencoder's own config says. Raises ValueError for a scheduler that
        expects another prediction, and without a scaling_factor.
        """
        super().__init__()
        _check_prediction(scheduler, prediction)
        channels = backbone.config.latent_channels
        self._scaling = _parse_scaling(scaling_factor, shift_factor, channels)
        self.register_to_config(  # type: ignore[no-untyped-call]
            classes=list(classes),
            null_context=null_context,
            prediction=prediction,
            text_settings=dict(text_settings) if text_settings else None,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        self.register_modules(  # type: ignore[no-untyped-call]
            backbone=backbone,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor()
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        torch_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Any:
        """Load from a folder, an `s3://` prefix or a hub name.

        `torch_dtype` is the backbone's. The autoencoder stays in float32, because Stable
        Diffusion's overflows in float16, and the text encoder in the precision of the shards.
        `options` are components of your own,
        in place of those of the folder, and diffusers' options of the hub (revision, token,
        cache_dir and so on).
        Raises UserError for a hub name that cannot be fetched, and for a folder that is not a
        complete pipeline of ifvit.
        """
        of_hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        given = load_components(str(pretrained_model_name_or_path), torch_dtype, options, of_hub)
        return cls(**given | options)

    def to_json_file(self, json_file_path: Any) -> None:
        """Write the index, and beside it the module in which DiffusionPipeline finds this class."""
        index = json.loads(self.to_json_string()) | {"_class_name": CLASS_NAME}
        storage.write_json(str(json_file_path), index)
        storage.write_bytes(str(Path(json_file_path).with_name("pipeline.py")), _MODULE.encode())

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  the arguments every diffusers pipeline has
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 999.0),
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Condition | None = None,
        negative_prompt_embeds: Condition | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        method: AlignmentMethod | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images of each prompt, ordered by prompt.

        A prompt is a caption, or a class name or number. `prompt_embeds` (prompts, M, D) replaces
        the prompts; `prompt_attention_mask` (prompts, M) is 1 at tokens and 0 at the padding behind
        them. `negative_prompt` replaces the null context or class. `guidance_scale` is w in
        uncond + w (cond - uncond), at the timesteps of `guidance_interval`.
        `height` and `width` may only be those of the training. `latents` (B, C, S, S) replaces the
        noise. `output_type` is pil, np, pt or latent. The callback(pipeline, step, timestep,
        tensors) may return new `latents` or `prompt_embeds` (B, M, D). Raises ValueError for
        contradictory arguments.
        """
        self._check(height, width, method)
        conditions = self._embed("prompt", prompt, prompt_embeds, prompt_attention_mask)
        given = negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        negative = self._embed("negative_prompt", *given, "")
        conditions, negative = _repeat_each(conditions, negative, num_images_per_prompt)
        null = self.backbone.encode_condition(negative)
        guidance = Guidance(guidance_scale, *guidance_interval)
        schedule = NoiseSchedule(self._execution_device, self.config["prediction"])
        of_prompts = conditions, null, guidance, [method] if method else []
        predictor = GuidedPredictor(self.backbone, schedule, *of_prompts)
        self._set_timesteps(num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        noise = self._initial_noise(len(conditions), generator, latents)
        options = self._step_options(eta, generator)
        shown = callback_on_step_end_tensor_inputs
        latents = self._solve(predictor, noise, options, callback_on_step_end, shown)
        output = ImagePipelineOutput(images=self._decode(latents, output_type))
        return output if return_dict else output.to_tuple()

    def _solve(
        self,
        predictor: GuidedPredictor,
        noise: Tensor,
        options: dict[str, Any],
        on_step_end: OnStepEnd | None,
        shown: Sequence[str],
    ) -> Any:
        """Turn noise (B, C, S, S) into latents; a callback may set `_interrupt` to stop early."""
        noise = noise.to(self._execution_device, torch.float32)
        latents = initial_latents(self.scheduler, noise)
        self._interrupt = False
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            predicted = predictor(network_input(self.scheduler, latents, t), t.expand(len(latents)))
            latents = self.scheduler.step(predicted, t, latents, **options).prev_sample
            if on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": tokens_of(predictor.condition)}
                changed = on_step_end(self, step, t, {name: tensors[name] for name in shown})
                latents = changed.get("latents", latents)
                if "prompt_embeds" in changed:
                    if len(changed["prompt_embeds"]) != len(noise):
                        raise ValueError(f"prompt_embeds: expected {len(noise)} rows")
                    tokens = changed["prompt_embeds"]
                    predictor.set_condition(with_tokens(predictor.condition, tokens))
        return latents

    def _check(self, height: int | None, width: int | None, method: object) -> None:
        """Raise ValueError for arguments and a scheduler that do not fit the backbone."""
        _check_prediction(self.scheduler, self.config["prediction"])
        if isinstance(method, str):
            raise ValueError(
                f"method is {method!r}; give an object such as ifvit.sampling.alignment.Date, or "
                "use `ifvit generate --method`"
            )
        side = spatial_factor(self.vae) * self.backbone.config.latent_size
        if not {height, width} <= {None, side}:
            raise ValueError(f"height and width are {height} and {width}; leave them out or {side}")

    def _set_timesteps(self, num_steps: int, **lists: Any) -> None:
        """Set `num_steps` timesteps, or the given `timesteps` or `sigmas`."""
        given = {name: values for name, values in lists.items() if values is not None}
        if len(given) > 1:
            raise ValueError("give timesteps or sigmas, not both")
        takes = set(inspect.signature(self.scheduler.set_timesteps).parameters)
        if self.scheduler.config.get("use_flow_sigmas") and "sigmas" not in takes:
            takes.clear()  # diffusers computes these sigmas from a number of steps only
        for name, values in given.items():
            if name not in takes or not len(values):
                raise ValueError(f"{name}: {type(self.scheduler).__name__} takes no such list")
        if given:
            self.scheduler.set_timesteps(**given, device=self._execution_device)
        else:
            set_steps(self.scheduler, num_steps, self._execution_device)

    def _step_options(self, eta: float, generator: Generators | None) -> dict[str, Any]:
        """Options of the scheduler's step; only schedulers that add noise take a generator."""
        takes = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in takes:
            raise ValueError(f"eta is {eta}, which {type(self.scheduler).__name__} does not take")
        options = {"generator": generator} | ({"eta": eta} if eta else {})
        return {name: value for name, value in options.items() if name in takes}

    def _embed(
        self,
        name: str,
        prompt: str | list[str] | None,
        embeds: Condition | None,
        mask: Tensor | None,
        default: str | None = None,
    ) -> Condition:
        """Return the conditions of prompts, or `embeds` with the mask of their tokens."""
        if prompt is None and embeds is None:
            prompt = default
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds")
        if embeds is not None:
            return move(_with_mask(embeds, mask), self._execution_device)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not prompts:
            raise ValueError(f"{name} is empty; give at least one")
        if self.text_encoder is None:
            # The empty name is the null class.
            numbers = number_classes((*self.config["classes"], ""), prompts)
            return numbers.to(self._execution_device)
        settings, null_context = self._text_settings(), self.config["null_context"]
        cast_parameters(self.text_encoder, settings)  # plain diffusers chooses its own precision
        return encode_captions(self.text_encoder, self.tokenizer, prompts, settings, null_context)

    def _text_settings(self) -> TextSettings:
        """How the text encoder makes contexts of prompts."""
        stored = self.config["text_settings"]
        if stored is None:
            return default_settings(self.text_encoder)
        return parse_value(TextSettings, dict(stored), "text_settings")

    def _initial_noise(
        self, count: int, generator: Generators | None, latents: Tensor | None
    ) -> Tensor:
        """Return latents that fit the images, or sample standard normal noise (count, C, S, S)."""
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one for each")
        config = self.backbone.config
        size = (count, config.latent_channels, config.latent_size, config.latent_size)
        if latents is not None:
            if tuple(latents.shape) != size:
                raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {size}")
            return latents
        noise: Tensor = randn_tensor(size, generator=generator, device=self._execution_device)
        return noise

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Decode latents (B, C, S, S) to images of the requested type."""
        if output_type == "latent":
            return latents
        if self.vae.dtype == torch.float16:  # plain diffusers casts all components
            self.vae.to(torch.float32)
        unscaled = LatentScaler(self._scaling, latents.device).unscale(latents)
        decoded = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return self.image_processor.postprocess(decoded, output_type=output_type)


def _check_prediction(scheduler: Any, prediction: Prediction) -> None:
    """Raise UserError, a ValueError, unless the scheduler takes what the backbone predicts."""
    # `from_config` keeps keys that its class does not take; the classes made for flows take none.
    own = inspect.signature(type(scheduler)).parameters
    taken, has_flow = "flow_prediction", "prediction_type" not in own
    if not has_flow:
        taken = scheduler.config.prediction_type
        has_flow = "use_flow_sigmas" in own and scheduler.config.use_flow_sigmas
    if taken != PREDICTION_TYPES[prediction] or has_flow != (prediction == "flow"):
        raise UserError(
            f"scheduler: {type(scheduler).__name__} with prediction_type {taken} and "
            f"use_flow_sigmas {has_flow} does not fit a backbone that predicts {prediction}"
        )


def _parse_scaling(scaling_factor: Any, shift_factor: Any, channels: int) -> LatentScaling:
    """Scaling of the latents. Raises UserError, a ValueError, unless it fits the backbone."""
    if scaling_factor is None:
        raise UserError("scaling_factor: not stated; give that of the training, or export again")
    factors = {"scale": scaling_factor, "shift": shift_factor}
    scaling = parse_value(LatentScaling, factors, "scaling_factor and shift_factor")
    if scaling.num_channels not in (None, channels):
        raise UserError(
            f"scaling_factor: has {scaling.num_channels} numbers for {channels} channels of the "
            "backbone; give one for each"
        )
    return scaling


def _with_mask(embeds: Condition, mask: Tensor | None) -> Condition:
    """Contexts (B, M, D) with a mask (B, M) of their tokens. Raises ValueError for a mask in which
    padding is not behind the tokens.
    """
    if mask is None:
        return embeds
    lengths = mask.sum(dim=1)
    expected = is_visible(lengths.clamp(min=1), tokens_of(embeds).shape[1])
    if not torch.equal(mask.bool(), expected):
        raise ValueError("prompt_attention_mask: expected (B, M), 1 at first and 0 at the padding")
    return PaddedContext(tokens=tokens_of(embeds), lengths=lengths)


def _repeat_each(
    conditions: Condition, negative: Condition, count: int
) -> tuple[Condition, Condition]:
    """Repeat every condition `count` times; a single negative condition stays single."""
    if count * len(conditions) < 1:
        raise ValueError(f"{count} images for each of {len(conditions)} prompts; give at least 1")
    if len(negative) not in (1, len(conditions)):
        raise ValueError("give one negative prompt, or one for each prompt")
    repeat = partial(torch.repeat_interleave, repeats=count, dim=0)
    return map_tensors(repeat, conditions), (
        map_tensors(repeat, negative) if len(negative) > 1 else negative
    )
