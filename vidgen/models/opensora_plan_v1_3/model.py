# SPDX-License-Identifier: Apache-2.0
"""OpenSoraT2V: a video transformer with adaLN-single, cross attention to the text and Skiparse attention.

Follows Open-Sora Plan v1.3 (PKU-YuanGroup/Open-Sora-Plan, commit f7fa604; report v1.3.0). Names of classes and
parameters are the original's. Shapes: B batch, C channels, T H W frames, height and width, N video tokens (frames, then
rows, then columns), S text tokens, D hidden width.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen import ops
from vidgen.checkpoints.hf import PretrainedModel
from vidgen.nn import (
    ALONE,
    DENSE,
    EmbeddingMLP,
    FeedForward,
    FramePatchEmbed,
    Place,
    TensorPlan,
    Tokens,
    WideLinear,
    alone,
    drop_axis_1,
    init_default,
    patch_mask,
    sinusoidal_embedding,
    unpatchify,
)

from . import checkpoint as keys
from .config import OpenSoraConfig, OpenSoraInpaintConfig
from .tensor_parallel import tensor_plan

TIMESTEP_FEATURES = 256
HEAD_NORM_EPS = 1e-6


class CaptionProjection(nn.Module):
    """``linear_2(gelu(linear_1(y)))`` with tanh-GELU: text tokens to the hidden width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(y), approximate="tanh"))


class AdaLayerNormSingle(nn.Module):
    """Timesteps ``(B)`` to the modulations of all blocks ``(B, 6, D)``, in float32, and their embedding ``(B, D)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.Module()
        self.emb.timestep_embedder = EmbeddingMLP(TIMESTEP_FEATURES, width)
        self.linear = WideLinear(width, 6 * width)

    def forward(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        embedder = cast(EmbeddingMLP, self.emb.timestep_embedder)
        features = sinusoidal_embedding(timestep, TIMESTEP_FEATURES)
        embedded = embedder(features.to(embedder.linear_1.weight.dtype))
        wide = embedded.to(torch.promote_types(embedded.dtype, torch.float32))
        return self.linear(F.silu(wide)).unflatten(1, (6, -1)), wide


class Attention(nn.Module):
    """Projections of multi-head attention."""

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.attention_bias
        self.head_dim = config.attention_head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Queries of x, keys and values of the context: ``(B, tokens, heads, head_dim)``."""
        layers = ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        return tuple(layer(t).unflatten(-1, (-1, self.head_dim)) for layer, t in layers)


class SelfAttention(Attention):
    """Video tokens attend to each other, within Skiparse groups where the layer is sparse."""

    def __init__(self, config: OpenSoraConfig, layer: int) -> None:
        super().__init__(config)
        self.sparse_n, self.pattern = config.layer_sparsity(layer)

    def forward(self, x: Tensor, rope: dict[str, Any], mask: Tensor | None, tokens: Tokens = ALONE) -> Tensor:
        x = tokens.gather(x)
        q, k, v = self.project(x, x)
        q, k = ops.rope_3d(q, **rope), ops.rope_3d(k, **rope)
        y = tokens.skiparse_attention(q, k, v, sparse_n=self.sparse_n, pattern=self.pattern, mask=mask)
        return tokens.scatter(self.to_out[0](cast(Tensor, y).flatten(2)))


class CrossAttention(Attention):
    """Video tokens attend to the text: each to all of it, so that groups would change nothing."""

    def forward(self, x: Tensor, y: Tensor, text_mask: Tensor | None, tokens: Tokens = ALONE) -> Tensor:
        attended = ops.attention(*self.project(tokens.gather(x), y), mask=text_mask)
        return tokens.scatter(self.to_out[0](cast(Tensor, attended).flatten(2)))


class TransformerBlock(nn.Module):
    """Self-attention, cross attention, feed-forward. The second is neither normed nor modulated."""

    def __init__(self, config: OpenSoraConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.eps = config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = SelfAttention(config, layer)
        self.attn2 = CrossAttention(config)
        self.ff = FeedForward(width, 4 * width)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        modulations: Tensor,
        rope: dict[str, Any],
        masks: dict[tuple[int, str], Tensor | None],
        text_mask: Tensor | None,
        tokens: Tokens = ALONE,
    ) -> Tensor:
        """Video ``(B, N, D)`` with text ``(B, S, D)`` under modulations ``(B, 6, D)``."""
        rows = (self.scale_shift_table.to(modulations.dtype) + modulations).to(x.dtype)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = rows.unbind(1)
        mask = masks[self.attn1.sparse_n, self.attn1.pattern]
        attended = self.attn1(ops.adaln_modulate(x, shift, scale, eps=self.eps), rope, mask, tokens)
        x = ops.gated_residual(x, gate, attended)
        x = x + self.attn2(x, y, text_mask, tokens)
        normed = tokens.gather(ops.adaln_modulate(x, ff_shift, ff_scale, eps=self.eps))
        return ops.gated_residual(x, ff_gate, tokens.scatter(self.ff(normed)))


class Inputs(NamedTuple):
    """What a forward pass is given, checked, and what follows from it without any weight."""

    latent: Tensor
    timestep: Tensor
    text: Tensor
    masks: dict[Place, Tensor | None]
    text_mask: Tensor | None
    grid: tuple[int, ...]
    tokens: Tokens
    ropes: dict[Place, dict[str, Any]]


# Video, text, modulations and what the last ones are made of.
Stream = tuple[Tensor, Tensor, Tensor, Tensor]


class OpenSoraT2V_v1_3(PretrainedModel):
    """The velocity ``sqrt(a) noise - sqrt(1 - a) latent`` of a noisy latent, from its text.

    ``gradient_checkpointing = True`` recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class: ClassVar[type] = OpenSoraConfig
    config: OpenSoraConfig
    convert_state_dict = staticmethod(keys.convert_state_dict)

    def __init__(self, config: OpenSoraConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width = config.hidden_size
        self.sequence = alone  # of the counts of video and text tokens; set by vidgen.parallel
        self.places: list[Place] = [config.layer_sparsity(i) for i in range(config.num_layers)]
        self.pos_embed = FramePatchEmbed(config.patch_size, config.in_channels, width)
        self.caption_projection = CaptionProjection(config.caption_channels, width)
        self.adaln_single = AdaLayerNormSingle(width)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(config, i) for i in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, config.patch_size**2 * cast(int, config.out_channels))
        self.add_embeds()
        self.init_weights()

    def add_embeds(self) -> None:
        """A subclass adds what embeds its other inputs."""

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: noisy latent ``(B, C, T, H, W)``; H and W are multiples of the patch size. The inpainting
                model's C is ``2 * in_channels + vae_scale_factor_t``: noisy latent, latent of the video without the
                frames to generate, compressed mask.
            timestep: ``(B)``, 0 to 999, any real dtype.
            encoder_hidden_states: text tokens ``(B, S, caption_channels)`` or ``(B, 1, S, caption_channels)``.
            attention_mask: ``(B, T, H, W)``, nonzero where the latent is valid. None: everywhere, which is faster than
                a mask of ones.
            encoder_attention_mask: ``(B, S)`` or ``(B, 1, S)``, nonzero for valid text tokens. None: all are.

        Returns:
            ``(B, out_channels, T, H, W)`` in the dtype of the weights.

        Raises:
            ValueError: shapes do not fit each other or the configuration.
        """
        inputs = self.prepare(hidden_states, timestep, encoder_hidden_states, attention_mask, encoder_attention_mask)
        stream = self.embed(inputs)
        for index in range(len(self.blocks)):
            stream = self.run_block(index, stream, inputs)
        return self.head(stream, inputs)

    def prepare(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Inputs:
        text, text_mask = drop_axis_1(encoder_hidden_states, 4), drop_axis_1(encoder_attention_mask, 3)
        self.check_inputs(hidden_states, timestep, text, attention_mask, text_mask)
        grid = tuple(size // p for size, p in zip(hidden_states.shape[2:], self.patch, strict=True))
        tokens = self.sequence(grid[0] * grid[1] * grid[2], text.shape[1])
        rope = self.rope(grid, hidden_states.device)
        ropes = {
            place: {**rope, **{name: tokens.rows(rope[name], "video", place) for name in ("cos", "sin")}}
            for place in set(self.places)
        }
        mask = None if attention_mask is None else patch_mask(attention_mask, self.patch)
        masks = {place: visible_keys(mask, *place) for place in set(self.places)}
        text_mask = None if text_mask is None else visible_keys(text_mask != 0, 1, "single")
        return Inputs(hidden_states, timestep, text, masks, text_mask, grid, tokens, ropes)

    def embed(self, inputs: Inputs) -> Stream:
        x = self.embed_latent(inputs.latent)
        y = self.caption_projection(inputs.text.to(x.dtype))
        return inputs.tokens.split(x), y, *self.adaln_single(inputs.timestep)

    def embed_latent(self, hidden_states: Tensor) -> Tensor:
        return self.pos_embed(hidden_states)

    def run_block(self, index: int, stream: Stream, inputs: Inputs) -> Stream:
        x, y, modulations, embedded = stream
        place = self.places[index]
        x = inputs.tokens.move(x, self.places[index - 1] if index else DENSE, place)
        args = (x, y, modulations, inputs.ropes[place], inputs.masks, inputs.text_mask, inputs.tokens)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x = checkpoint(self.blocks[index], *args, use_reentrant=False)
        else:
            x = self.blocks[index](*args)
        return x, y, modulations, embedded

    def head(self, stream: Stream, inputs: Inputs) -> Tensor:
        x, _, _, embedded = stream
        x = inputs.tokens.move(x, self.places[-1], DENSE)
        rows = self.scale_shift_table.to(embedded.dtype) + embedded.unsqueeze(1)
        shift, scale = rows.to(x.dtype).unbind(1)
        x = self.proj_out(ops.adaln_modulate(x, shift, scale, eps=HEAD_NORM_EPS))
        return unpatchify(inputs.tokens.join(x), inputs.grid, self.patch)

    @property
    def patch(self) -> tuple[int, int, int]:
        return 1, self.config.patch_size, self.config.patch_size

    def tensor_plan(self) -> TensorPlan:
        """How its layers may be shared by ranks."""
        return tensor_plan(self.config)

    @property
    def blocks(self) -> list[Any]:
        """All blocks in the order of computation."""
        return list(self.transformer_blocks)

    def step_of(self, name: str) -> int:
        """The block that a parameter is needed in, by index; -1 for `embed`, the number of blocks for `head`."""
        part, *rest = name.split(".")
        if part == "transformer_blocks":
            return int(rest[0])
        return len(self.places) if part in ("scale_shift_table", "proj_out") else -1

    def rope(self, grid: tuple[int, ...], device: torch.device) -> dict[str, Any]:
        sections = self.config.rope_sections
        cos, sin = ops.rope_3d_table(grid, sections, scale=self.config.interpolation_scale, device=device)
        return {"cos": cos, "sin": sin, "style": "half_per_axis", "sections": sections}

    def check_inputs(self, latent: Tensor, timestep: Tensor, text: Tensor, *masks: Tensor | None) -> None:
        config, p, name = self.config, self.config.patch_size, type(self).__name__
        channels = config.input_channels
        unfit = latent.dim() != 5 or latent.shape[1] != channels or 0 in latent.shape[2:]
        if unfit or any(size % p for size in latent.shape[3:]):
            raise ValueError(
                f"{name}: hidden_states must be (batch, {channels}, frames, height, width) with height and width "
                f"multiples of {p}, got {tuple(latent.shape)}"
            )
        tokens = text.shape[-2] if text.dim() > 1 else 0
        wanted = {
            "timestep": (latent.shape[0],),
            "encoder_hidden_states": (latent.shape[0], tokens, config.caption_channels),
            "attention_mask": (latent.shape[0], *latent.shape[2:]),
            "encoder_attention_mask": (latent.shape[0], tokens),
        }
        for (argument, shape), tensor in zip(wanted.items(), (timestep, text, *masks), strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: {argument} must be {shape}, got {tuple(tensor.shape)}")

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as the original does: tables normal with standard deviation ``D ** -0.5``, the others as
        PyTorch does.
        """
        for module in self.modules():
            init_default(module, generator)
            if isinstance(module, OpenSoraT2V_v1_3 | TransformerBlock):
                nn.init.normal_(module.scale_shift_table, std=self.config.hidden_size**-0.5, generator=generator)


class OpenSoraInpaint_v1_3(OpenSoraT2V_v1_3):
    """As :class:`OpenSoraT2V_v1_3`, with the frames that are given: image to video, transition, continuation.

    ``load_state_dict(t2v.state_dict(), strict=False)`` starts it from a text-to-video model, as the original's
    training does: the given frames then have no effect yet.
    """

    config_class = OpenSoraInpaintConfig
    config: OpenSoraInpaintConfig

    def add_embeds(self) -> None:
        config, width = self.config, self.config.hidden_size
        for name, channels in zip(keys.INPAINT_MODULES, (config.in_channels, config.vae_scale_factor_t), strict=True):
            embed = FramePatchEmbed(config.patch_size, channels, width)
            self.add_module(name, nn.Sequential(embed, nn.Linear(width, width, bias=False)))

    def embed_latent(self, hidden_states: Tensor) -> Tensor:
        channels = self.config.in_channels
        latent, given, mask = hidden_states.split((channels, channels, self.config.vae_scale_factor_t), 1)
        embeds: list[Any] = [getattr(self, name) for name in keys.INPAINT_MODULES]
        return self.pos_embed(latent) + embeds[0](given) + embeds[1](mask)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """As the text-to-video model, and zeros between what is given and the rest."""
        super().init_weights(generator)
        for name in keys.INPAINT_MODULES:
            nn.init.zeros_(getattr(self, name)[1].weight)


def visible_keys(mask: Tensor | None, sparse_n: int, pattern: str) -> Tensor | None:
    """``mask`` ``(B, N)`` bool, except that a Skiparse group of hidden tokens only sees all of itself.

    The original adds -10000 to hidden keys, which decides nothing where all keys of a group are hidden. Padding of the
    group, at -9980, wins over them and gives 0, which is what our attention gives where nothing is visible.
    """
    if mask is None:
        return None
    tokens = mask.shape[1]
    group, _ = ops.skiparse_index(tokens, sparse_n, pattern, device=mask.device)
    groups = F.one_hot(group, sparse_n).to(torch.float32)  # (N, groups)
    seen = mask.to(torch.float32) @ groups > 0
    padded = groups.sum(0) < ops.skiparse_padded_length(tokens, sparse_n) // sparse_n
    return mask | ~(seen | padded)[:, group]
