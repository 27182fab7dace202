"""A trained backbone with its frozen encoders as a diffusers pipeline; `ifvit export` writes it.

Shapes: B images, M text tokens, D context width, C latent channels, S latent size, H, W image.
"""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ifvit import storage
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import AlignmentMethod, GuidedNoisePredictor
from ifvit.models.backbone import Backbone
from ifvit.models.clip import encode_captions
from ifvit.models.pretrained import download_pretrained
from ifvit.sampling.load import number_classes

Generators = torch.Generator | list[torch.Generator]
_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
OnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class FusionPipeline(DiffusionPipeline):
    """Captions or classes => images, with any diffusers scheduler for epsilon prediction.

    The scheduler must use Stable Diffusion's noise schedule. `vae.config.scaling_factor` is that of
    the training, not Stable Diffusion's.
    """

    _callback_tensor_inputs = ("latents", "prompt_embeds")
    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012  diffusers adds lists

    # Set by register_modules.
    backbone: Backbone
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any

    def __init__(
        self,
        backbone: Backbone,
        vae: AutoencoderKL,
        text_encoder: nn.Module | None,
        tokenizer: Any,
        scheduler: Any,
        classes: Sequence[str] = (),
    ) -> None:
        """`classes` are the class names of a class-conditional backbone without text encoder."""
        super().__init__()
        self.register_to_config(classes=list(classes))  # type: ignore[no-untyped-call]
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """Load from a folder, an `s3://` prefix or a hub name; `options` as in diffusers.

        Raises UserError for a hub name that cannot be fetched and an s3:// prefix without files.
        """
        url = str(pretrained_model_name_or_path)
        if storage.is_remote(url):
            with tempfile.TemporaryDirectory(prefix="ifvit-") as folder:
                _download(url, Path(folder))
                return super().from_pretrained(folder, **options)
        if not Path(url).is_dir():
            # diffusers' own download rejects components whose class is in an installed package.
            of_hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
            url = str(download_pretrained(url, **of_hub))
        return super().from_pretrained(url, **options)

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt`, which skips the remaining steps."""
        return self._interrupt

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  the arguments every diffusers pipeline has
        self,
        prompt: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 999.0),
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        method: AlignmentMethod | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate `num_images_per_prompt` images of each prompt, ordered by prompt.

        A prompt is a caption or, for a class-conditional backbone, a class name or number.
        `prompt_embeds` (prompts, M, D) replaces the prompts, `negative_prompt` the empty caption.
        `guidance_scale` is w in eps_uncond + w (eps_cond - eps_uncond); it applies at the timesteps
        of `guidance_interval` (0 ... 999). `generator` is one generator, or a list with one per
        image. `latents` (B, C, S, S) replaces the standard normal noise. `output_type` is pil, np,
        pt or latent. `callback_on_step_end(pipeline, step, timestep, tensors)` may return new
        `latents` or `prompt_embeds` (B, M, D). Raises ValueError for contradictory arguments.
        """
        context = self._embed(prompt, prompt_embeds, "prompt")
        context = context.repeat_interleave(num_images_per_prompt, dim=0)
        if negative_prompt is None and negative_prompt_embeds is None:
            negative_prompt = ""
        negative = self._embed(negative_prompt, negative_prompt_embeds, "negative_prompt")
        if len(negative) > 1:
            negative = negative.repeat_interleave(num_images_per_prompt, dim=0)
            if len(negative) != len(context):
                raise ValueError("give one negative prompt, or one for each prompt")
        predictor = GuidedNoisePredictor(
            self.backbone,
            context,
            self.backbone.encode_condition(negative),
            Guidance(guidance_scale, *guidance_interval),
            method,
        )

        device = self._execution_device
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        noise = self._sample_noise(len(context), generator) if latents is None else latents
        latents = noise.to(device, torch.float32) * self.scheduler.init_noise_sigma
        # Only schedulers that add noise take a generator.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if takes_generator else {}
        self._interrupt = False
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self.interrupt:
                break
            scaled = self.scheduler.scale_model_input(latents, t)
            predicted = predictor(scaled, t.expand(len(scaled)))
            latents = self.scheduler.step(predicted, t, latents, **options).prev_sample
            if callback_on_step_end is not None:
                tensors = {"latents": latents, "prompt_embeds": context}
                shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                changed = callback_on_step_end(self, step, t, shown)
                latents = changed.get("latents", latents)
                if "prompt_embeds" in changed:
                    context = changed["prompt_embeds"]
                    predictor.set_condition(context)

        images = self._decode(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _embed(self, prompt: str | list[str] | None, embeds: Tensor | None, name: str) -> Tensor:
        """Return the conditions of prompts: contexts (prompts, M, D) or classes (prompts,)."""
        if (prompt is None) == (embeds is None):
            raise ValueError(f"give either {name} or {name}_embeds")
        if embeds is not None:
            return embeds.to(self._execution_device)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        assert prompts is not None
        if self.text_encoder is None:
            # The empty name is the null class.
            numbers = number_classes((*self.config["classes"], ""), prompts)
            return numbers.to(self._execution_device)
        return encode_captions(self.text_encoder, self.tokenizer, prompts)

    def _sample_noise(self, count: int, generator: Generators | None) -> Tensor:
        """Sample standard normal noise (count, C, S, S)."""
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} images; give one for each")
        config = self.backbone.config
        size = (count, config.latent_channels, config.latent_size, config.latent_size)
        noise: Tensor = randn_tensor(size, generator=generator, device=self._execution_device)
        return noise

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Decode latents (B, C, S, S) to images of the requested type."""
        if output_type == "latent":
            return latents
        unscaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = self.vae.decode(unscaled).sample
        return self.image_processor.postprocess(decoded, output_type=output_type)


def _download(url: str, folder: Path) -> None:
    """Download the pipeline's index and the files of its components."""
    storage.download(storage.join(url, "model_index.json"), folder / "model_index.json")
    for component in storage.read_json(str(folder / "model_index.json")):
        for name in storage.list_names(storage.join(url, component)):
            storage.download(storage.join(url, component, name), folder / component / name)
