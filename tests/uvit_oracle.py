"""A U-shaped ViT in float64 numpy, head by head and block by block, independent of ours."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The block names of one code base, in order of use, and the order of its positions."""

    conditioning: str
    positions: tuple[str, str, str]
    image_in: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    fused_in: list[str] = field(default_factory=list)
    fused_out: list[str] = field(default_factory=list)
    image_out: list[str] = field(default_factory=list)
    middle: str = "mid_block"
    head_norm: str = "norm"
    split_queries: bool = False
    is_modulated: bool = False


def uvit_layout(depth: int) -> Layout:
    """The block names of U-ViT."""
    half = depth // 2
    return Layout(
        conditioning="concat",
        positions=("time", "text", "image"),
        fused_in=[f"in_blocks.{i}" for i in range(half)],
        fused_out=[f"out_blocks.{i}" for i in range(half)],
    )


def our_layout(
    conditioning: str, depth: int, num_image: int, num_text: int, is_modulated: bool = False
) -> Layout:
    """Our block names, with `depth` blocks beside the middle one."""
    half = depth // 2
    names = [f"blocks.{i}" for i in range(depth + 1)]
    return Layout(
        conditioning=conditioning,
        is_modulated=is_modulated,
        positions=("time", "text", "image"),
        image_in=names[:num_image],
        fused_in=names[num_image:half],
        text=[f"text_blocks.{i}" for i in range(num_text)],
        middle=names[half],
        fused_out=names[half + 1 : depth + 1 - num_image],
        image_out=names[depth + 1 - num_image :],
        head_norm="head_norm",
    )


def class_layout(num_blocks: int, *, long_skip: bool) -> Layout:
    """Our block names, where one class token takes part in all blocks."""
    if long_skip:
        return our_layout("concat", num_blocks - 1, 0, 0)
    *first, last = (f"blocks.{i}" for i in range(num_blocks))
    return Layout(
        conditioning="concat",
        positions=("time", "text", "image"),
        fused_in=first,
        middle=last,
        head_norm="head_norm",
    )


def fork_layout(conditioning: str, depth: int, num_image: int, num_text: int) -> Layout:
    """The block names of the paper's authors."""
    num_joint = depth // 2 - num_image
    return Layout(
        conditioning=conditioning,
        positions=("image", "time", "text"),
        image_in=[f"image_blocks.{i}" for i in range(num_image)],
        fused_in=[f"joint_blocks.{i}" for i in range(num_joint)],
        text=[f"caption_blocks.{i}" for i in range(num_text)],
        fused_out=[f"joint_skip_blocks.{i}" for i in range(num_joint)],
        image_out=[f"image_skip_blocks.{i}" for i in range(num_image)],
        split_queries=conditioning == "cross_attention",
    )


def random_weights(
    layout: Layout,
    *,
    width: int,
    patch: int,
    num_patches: int,
    context: tuple[int, int],
    seed: int = 0,
) -> dict[str, Array]:
    """Weights by the names of `layout`, large enough for every term to matter."""
    rng = np.random.default_rng(seed)
    values = 4 * patch**2
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 1 + context[0] + num_patches, width),
        "patch_embed.proj.weight": (width, 4, patch, patch),
        "patch_embed.proj.bias": (width,),
        "context_embed.weight": (width, context[1]),
        "context_embed.bias": (width,),
        f"{layout.head_norm}.weight": (width,),
        f"{layout.head_norm}.bias": (width,),
        "decoder_pred.weight": (values, width),
        "decoder_pred.bias": (values,),
        "final_layer.weight": (4, 4, 3, 3),
        "final_layer.bias": (4,),
    }
    with_skip = [*layout.fused_out, *layout.image_out]
    plain = [*layout.image_in, *layout.text, *layout.fused_in, layout.middle]
    for block in [*plain, *with_skip]:
        queries = {"q": width, "kv": 2 * width} if layout.split_queries else {"qkv": 3 * width}
        linears = {"attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
        linears["mlp.fc2"] = (width, 4 * width)
        if block in with_skip:
            linears["skip_linear"] = (width, 2 * width)
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {f"{block}.attn.{name}.weight": (size, width) for name, size in queries.items()}
    if layout.is_modulated:
        modulated = [*{*plain, *with_skip} - set(layout.text)]
        linears = {f"{block}.modulation.linear": (6 * width, width) for block in modulated}
        linears |= {"head_modulation.linear": (2 * width, width), "pooled_embed": (width, width)}
        linears |= {"time_embed.0": (4 * width, width), "time_embed.2": (width, 4 * width)}
        for name, shape in sorted(linears.items()):
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        for norm in [
            layout.head_norm,
            *(f"{block}.norm{i}" for block in modulated for i in (1, 2)),
        ]:
            del shapes[f"{norm}.weight"], shapes[f"{norm}.bias"]
    weights = {}
    for name, shape in shapes.items():
        scale = 0.2 if len(shape) in (1, 3) else 1 / math.sqrt(math.prod(shape[1:]))
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = offset + scale * rng.standard_normal(shape)
    return weights


class Oracle:
    """Predicts the noise of one sample at a time."""

    def __init__(self, weights: Mapping[str, Array], layout: Layout, num_heads: int) -> None:
        self.weights = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        self.layout, self.num_heads = layout, num_heads

    def predict(self, latents: Array, timestep: float, context: Array) -> Array:
        """Latents (4, S, S), the timestep of the sinusoid, context (M, D) => noise (4, S, S).

        The context is that of a caption, or the embedding (1, D) of a class.
        """
        layout, positions = self.layout, self._positions(latents, context)
        image = self._patches(latents) + positions["image"]
        tokens = np.vstack([image, self._time(timestep) + positions["time"]])
        if "context_embed.weight" in self.weights:
            context = self._linear("context_embed", context)
        text = context + positions["text"]
        num_own = len(tokens)
        skips = []
        time = self._embed_time(timestep)
        for block in layout.image_in:
            tokens = self._block(block, tokens, vector=time)
            skips.append(tokens)
        for block in layout.text:
            text = self._block(block, text)
        both = self._add_pooled(time, text)
        seen = text if layout.conditioning == "cross_attention" else None
        if layout.conditioning == "concat":
            tokens = np.vstack([tokens, text])
        for block in layout.fused_in:
            tokens = self._block(block, tokens, text=seen, vector=both)
            skips.append(tokens)
        tokens = self._block(layout.middle, tokens, text=seen, vector=both)
        for block in layout.fused_out:
            tokens = self._block(block, tokens, text=seen, skip=skips.pop(), vector=both)
        tokens = tokens[:num_own]
        for block in layout.image_out:
            tokens = self._block(block, tokens, skip=skips.pop(), vector=time)
        last = time if layout.image_out else both
        return self._read(tokens[: len(image)], latents.shape[1], last)

    def _positions(self, latents: Array, context: Array) -> dict[str, Array]:
        patch = self.weights["patch_embed.proj.weight"].shape[-1]
        sizes = {"time": 1, "text": len(context), "image": (latents.shape[1] // patch) ** 2}
        cuts = np.cumsum([sizes[name] for name in self.layout.positions])[:-1]
        parts = np.split(self.weights["pos_embed"][0], cuts)
        return dict(zip(self.layout.positions, parts, strict=True))

    def _patches(self, latents: Array) -> Array:
        kernel, bias = (self.weights[f"patch_embed.proj.{name}"] for name in ("weight", "bias"))
        patch = kernel.shape[-1]
        starts = range(0, latents.shape[1], patch)
        return np.stack(
            [
                np.einsum("dcij,cij->d", kernel, latents[:, y : y + patch, x : x + patch]) + bias
                for y in starts
                for x in starts
            ]
        )

    def _time(self, timestep: float) -> Array:
        half = self.weights["pos_embed"].shape[-1] // 2
        angles = timestep * 10_000.0 ** (-np.arange(half) / half)
        return np.concatenate([np.cos(angles), np.sin(angles)])[None]

    def _embed_time(self, timestep: float) -> Array | None:
        """The conditioning vector (1, D) of image-only blocks; None without modulation."""
        if not self.layout.is_modulated:
            return None
        return self._linear(
            "time_embed.2", _silu(self._linear("time_embed.0", self._time(timestep)))
        )

    def _add_pooled(self, time: Array | None, text: Array) -> Array | None:
        if time is None:
            return None
        return time + self._linear("pooled_embed", text.mean(axis=0, keepdims=True))

    def _vectors(self, name: str, vector: Array, count: int) -> list[Array]:
        return np.split(self._linear(f"{name}modulation.linear", _silu(vector)), count, axis=1)

    def _linear(self, name: str, tokens: Array) -> Array:
        bias = self.weights.get(f"{name}.bias", 0.0)
        return tokens @ self.weights[f"{name}.weight"].T + bias

    def _norm(self, name: str, tokens: Array) -> Array:
        centred = tokens - tokens.mean(axis=1, keepdims=True)
        epsilon = 1e-5 if f"{name}.weight" in self.weights else 1e-6  # U-ViT's, DiT's
        unit = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
        scale, shift = self.weights.get(f"{name}.weight", 1.0), self.weights.get(f"{name}.bias", 0)
        return unit * scale + shift

    def _block(
        self,
        name: str,
        tokens: Array,
        *,
        text: Array | None = None,
        skip: Array | None = None,
        vector: Array | None = None,
    ) -> Array:
        if skip is not None:
            tokens = self._linear(f"{name}.skip_linear", np.hstack([tokens, skip]))
        zero = np.zeros(())
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            [zero, zero, 1 + zero] * 2 if vector is None else self._vectors(f"{name}.", vector, 6)
        )
        queried = self._norm(f"{name}.norm1", tokens) * (1 + scale1) + shift1
        keyed = queried
        if text is not None:
            keyed = np.vstack([queried, self._norm(f"{name}.norm1", text)])
        attended = self._attention(name, queried, keyed)
        tokens = tokens + gate1 * self._linear(f"{name}.attn.proj", attended)
        normed = self._norm(f"{name}.norm2", tokens) * (1 + scale2) + shift2
        hidden = self._linear(f"{name}.mlp.fc1", normed)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return tokens + gate2 * self._linear(f"{name}.mlp.fc2", hidden)

    def _attention(self, name: str, queried: Array, keyed: Array) -> Array:
        names = ("q", "kv") if self.layout.split_queries else ("qkv",)
        matrix = np.vstack([self.weights[f"{name}.attn.{part}.weight"] for part in names])
        to_query, to_key, to_value = np.split(matrix, 3)
        heads = []
        for rows in np.split(np.arange(len(to_query)), self.num_heads):
            query, key = queried @ to_query[rows].T, keyed @ to_key[rows].T
            odds = np.exp(query @ key.T / math.sqrt(len(rows)))
            heads.append(odds / odds.sum(axis=1, keepdims=True) @ (keyed @ to_value[rows].T))
        return np.hstack(heads)

    def _read(self, tokens: Array, size: int, vector: Array | None) -> Array:
        normed = self._norm(self.layout.head_norm, tokens)
        if vector is not None:
            shift, scale = self._vectors("head_", vector, 2)
            normed = normed * (1 + scale) + shift
        values = self._linear("decoder_pred", normed)
        kernel, bias = (self.weights[f"final_layer.{name}"] for name in ("weight", "bias"))
        patch = self.weights["patch_embed.proj.weight"].shape[-1]
        side = size // patch
        padded = np.zeros((4, size + 2, size + 2))
        for index, value in enumerate(values):
            y, x = 1 + patch * (index // side), 1 + patch * (index % side)
            padded[:, y : y + patch, x : x + patch] = value.reshape(patch, patch, 4).transpose(
                2, 0, 1
            )
        noise = np.zeros((4, size, size))
        for y in range(size):
            for x in range(size):
                window = padded[:, y : y + 3, x : x + 3]
                noise[:, y, x] = np.einsum("ocij,cij->o", kernel, window) + bias
        return noise


def _silu(values: Array) -> Array:
    return values / (1 + np.exp(-values))
