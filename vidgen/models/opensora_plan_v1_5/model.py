# SPDX-License-Identifier: Apache-2.0
"""SparseUMMDiT ("SUV"): a U-shaped joint text and video transformer with Skiparse attention.

Follows Open-Sora Plan v1.5 (PKU-YuanGroup/Open-Sora-Plan, branch mindspeed_mmdit; report v1.5.0). Parameter names are
the original's. Shapes: B batch, C channels, T H W frames, height and width, N video tokens (frames, then rows, then
columns), S text tokens, D head dim, E conditioning width.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen import ops
from vidgen.checkpoints.hf import PretrainedModel
from vidgen.nn import (
    ALONE,
    DENSE,
    AdaNorm,
    FeedForward,
    FramePatchEmbed,
    Norm,
    Place,
    TensorPlan,
    TimestepTextEmbedding,
    Tokens,
    alone,
    drop_axis_1,
    init_default,
    init_normal,
    make_norm,
    modulate,
    patch_mask,
    residual_modulate,
    unpatchify,
)

from . import checkpoint as keys
from .config import SparseUMMDiTConfig
from .tensor_parallel import tensor_plan


class JointAttention(nn.Module):
    """Video and text attend to each other; video within Skiparse groups, text as a whole."""

    def __init__(self, config: SparseUMMDiTConfig, sparse_n: int, pattern: str, last: bool) -> None:
        super().__init__()
        width, head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim, self.eps, self.sparse_n, self.pattern = head_dim, config.norm_eps, sparse_n, pattern
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width, bias) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(head_dim, eps=config.norm_eps) for _ in range(4)
        )
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = None if last else nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        rope: dict[str, Any],
        mask: Tensor | None,
        text_mask: Tensor | None,
        tokens: Tokens = ALONE,
    ) -> tuple[Tensor, Tensor | None]:
        x, y = tokens.gather(x), tokens.gather(y, "text")
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.to_q, self.to_k, self.to_v))
        text_q, text_k, text_v = (
            proj(y).unflatten(-1, (-1, self.head_dim)) for proj in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        # written in that layout, they need not be copied to it
        grouped = tokens.grouped and self.pattern == "group" and self.sparse_n > 1
        q, k, v = ops.qk_norm_rope(
            q,
            k,
            v,
            q_weight=self.norm_q.weight,
            k_weight=self.norm_k.weight,
            eps=self.eps,
            sparse_n=self.sparse_n if grouped else 1,
            **rope,
        )
        text_q, text_k = ops.qk_norm_rope(
            text_q, text_k, q_weight=self.norm_added_q.weight, k_weight=self.norm_added_k.weight, eps=self.eps
        )
        attended = tokens.skiparse_attention(
            q,
            k,
            v,
            sparse_n=self.sparse_n,
            pattern=self.pattern,
            text_q=None if self.to_add_out is None else text_q,
            text_k=text_k,
            text_v=text_v,
            mask=mask,
            text_mask=text_mask,
            grouped=grouped,
            num_tokens=x.shape[1],
        )
        video, text = attended if isinstance(attended, tuple) else (attended, None)
        if text is not None and self.to_add_out is not None:
            text = tokens.scatter(self.to_add_out(text.flatten(2)), "text")
        return tokens.scatter(self.to_out[0](video.flatten(2))), text


class SparseMMDiTBlock(nn.Module):
    """Attention, then feed-forward, each modulated by the condition. The last block only reads the text."""

    def __init__(self, config: SparseUMMDiTConfig, sparse_n: int, pattern: str, last: bool) -> None:
        super().__init__()
        width, condition, norm = config.hidden_size, config.timestep_embed_dim, (config.norm_cls, config.norm_eps)
        text_ff = config.double_ff and not last
        self.last, self.shared_ff = last, not config.double_ff
        self.norm1 = AdaNorm(condition, width, 6, *norm, text=True)
        self.attn1 = JointAttention(config, sparse_n, pattern, last)
        self.norm2 = AdaNorm(condition, width, 6, *norm, text=text_ff)
        self.ff = FeedForward(width, 4 * width, bias=False)
        self.ff_enc = FeedForward(width, 4 * width, bias=False) if text_ff else None

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        c: Tensor,
        rope: dict[str, Any],
        mask: Tensor | None,
        text_mask: Tensor | None,
        tokens: Tokens = ALONE,
    ) -> tuple[Tensor, Tensor]:
        """Video ``(B, N, hidden)`` and text ``(B, S, hidden)`` under the condition ``c`` ``(B, E)``."""
        x, y = self.finite(x), self.finite(y)
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(c, x.dtype)
        attended, text_attended = self.attn1(
            modulate(self.norm1.norm, x, shift, scale),
            modulate(self.norm1.norm_enc, y, text_shift, text_scale),
            rope,
            mask,
            text_mask,
            tokens,
        )

        shift, scale, ff_gate, text_shift, text_scale, text_ff_gate = self.norm2(c, x.dtype)
        x, normed = self.add_and_modulate(self.norm2.norm, x, gate, attended, shift, scale)
        if self.ff_enc is not None:
            y, text_normed = self.add_and_modulate(
                self.norm2.norm_enc, y, text_gate, text_attended, text_shift, text_scale
            )
            processed = tokens.scatter(self.ff_enc(tokens.gather(text_normed, "text")), "text")
            y = ops.gated_residual(y, text_ff_gate, processed)
        elif self.shared_ff:  # text enters the network as it is, without norm and modulation
            y = y if self.last else self.finite(ops.gated_residual(y, text_gate, text_attended))
            y = ops.gated_residual(y, text_ff_gate, tokens.scatter(self.ff(tokens.gather(y, "text")), "text"))
        return ops.gated_residual(x, ff_gate, tokens.scatter(self.ff(tokens.gather(normed)))), y

    def add_and_modulate(
        self, norm: Norm, x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x + gate * y`` and its modulated norm, together."""
        if x.dtype != torch.float16:
            return residual_modulate(norm, x, gate, y, shift, scale)
        x = self.finite(ops.gated_residual(x, gate, y))
        return x, modulate(norm, x, shift, scale)

    def finite(self, x: Tensor) -> Tensor:
        """The streams of the released model leave float16's range: sampling in float16 saturates them instead."""
        return x if self.training or x.dtype != torch.float16 else x.nan_to_num()


class Inputs(NamedTuple):
    """What a forward pass is given, checked, and what follows from it without any weight."""

    latent: Tensor
    timestep: Tensor
    pooled: Tensor
    text: Tensor
    mask: Tensor | None
    text_mask: Tensor | None
    grid: tuple[int, ...]
    tokens: Tokens
    ropes: dict[Place, dict[str, Any]]


# Video, text and condition; then video and text of the stages whose mirror images are still to come.
Stream = tuple[Tensor, ...]


class SparseUMMDiT(PretrainedModel):
    """The velocity ``noise - latent`` of a noisy latent, from its text.

    ``gradient_checkpointing = True`` recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class = SparseUMMDiTConfig
    config: SparseUMMDiTConfig

    def __init__(self, config: SparseUMMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, num_stages = config.hidden_size, len(config.num_layers)
        self.patch_embed = FramePatchEmbed(config.patch_size, config.in_channels, width)
        self.time_text_embed = TimestepTextEmbedding(config.pooled_projection_dim, config.timestep_embed_dim)
        self.caption_projection = nn.Linear(config.caption_channels, width)

        self.sequence = alone  # of the counts of video and text tokens; set by vidgen.parallel
        self.places: list[Place] = []  # ratio and pattern of each block
        self.stages: list[int] = []  # stage of each block
        self.transformer_blocks = nn.ModuleList()
        for stage, (num_blocks, ratio) in enumerate(zip(config.num_layers, config.stage_ratios, strict=True)):
            blocks = nn.ModuleList()
            for i in range(num_blocks):
                last = stage == num_stages - 1 and i == num_blocks - 1
                pattern = "group" if i % 2 else "single"
                blocks.append(SparseMMDiTBlock(config, ratio, pattern, last))
                self.places.append((ratio, pattern))
                self.stages.append(stage)
            self.transformer_blocks.append(blocks)
        self.stage_starts = [self.stages.index(stage) for stage in range(num_stages)]

        num_skips = num_stages // 2 if config.skip_connection else 0
        self.skip_norm_linear = nn.ModuleList(skip_layer(config) for _ in range(num_skips))
        self.skip_norm_linear_enc = nn.ModuleList(skip_layer(config) for _ in range(num_skips))
        self.norm_final = make_norm(config.norm_cls, width, config.norm_eps)
        self.norm_out = AdaNorm(config.timestep_embed_dim, width, 2, config.norm_cls, config.norm_eps)
        self.proj_out = nn.Linear(width, config.patch_size_t * config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: noisy latent ``(B, C, T, H, W)``; H and W are multiples of the patch size.
            timestep: ``(B)``, 1000 times the noise level.
            pooled_projections: pooled text ``(B, P)`` or ``(B, 1, P)``.
            encoder_hidden_states: text tokens ``(B, S, caption_channels)`` or ``(B, 1, S, caption_channels)``.
            attention_mask: ``(B, T, H, W)``, nonzero where the latent is valid. None: everywhere, which is faster than
                a mask of ones.
            encoder_attention_mask: ``(B, S)`` or ``(B, 1, S)``, nonzero for valid text tokens. None: all are.

        Returns:
            ``(B, out_channels, T, H, W)`` in the dtype of the weights.

        Raises:
            ValueError: shapes do not fit each other or the configuration.
        """
        inputs = self.prepare(
            hidden_states, timestep, pooled_projections, encoder_hidden_states, attention_mask, encoder_attention_mask
        )
        stream = self.embed(inputs)
        for index in range(len(self.blocks)):
            stream = self.run_block(index, stream, inputs)
        return self.head(stream, inputs)

    def prepare(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Inputs:
        pooled, text = drop_axis_1(pooled_projections, 3), drop_axis_1(encoder_hidden_states, 4)
        mask, text_mask = attention_mask, drop_axis_1(encoder_attention_mask, 3)
        self.check_inputs(hidden_states, timestep, pooled, text, mask, text_mask)
        patch, sections = self.patch, self.config.rope_sections
        grid = tuple(size // p for size, p in zip(hidden_states.shape[2:], patch, strict=True))
        tokens = self.sequence(grid[0] * grid[1] * grid[2], text.shape[1])
        table = ops.rope_3d_table(grid, sections, device=hidden_states.device)
        ropes = {}
        for place in set(self.places):
            cos, sin = (tokens.rows(t, "video", place) for t in table)
            ropes[place] = {"cos": cos, "sin": sin, "style": "half_per_axis", "sections": sections}
        if mask is not None:  # a token is valid where any of its patch is
            mask = patch_mask(mask, patch)
        text_mask = None if text_mask is None else text_mask != 0
        return Inputs(hidden_states, timestep, pooled, text, mask, text_mask, grid, tokens, ropes)

    def embed(self, inputs: Inputs) -> Stream:
        c = self.time_text_embed(inputs.timestep, inputs.pooled)
        c = F.silu(c.to(torch.promote_types(c.dtype, torch.float32)))
        x = self.patch_embed(inputs.latent)
        y = self.caption_projection(inputs.text.to(x.dtype))
        return inputs.tokens.split(x), inputs.tokens.split_text(y), c

    def run_block(self, index: int, stream: Stream, inputs: Inputs) -> Stream:
        x, y, c, *skips = stream
        tokens, place = inputs.tokens, self.places[index]
        x = tokens.move(x, self.place_before(index), place)
        stage, middle = self.stages[index], len(self.transformer_blocks) // 2
        begins, ends = index in self.stage_starts, index + 1 in (*self.stage_starts, len(self.blocks))
        if self.config.skip_connection and stage > middle and begins:
            skip_x, skip_y = skips.pop(-2), skips.pop()
            mirror = len(self.transformer_blocks) - 1 - stage
            skip_x = tokens.move(skip_x, self.place_before(self.stage_starts[mirror + 1]), place)
            x = self.skip_norm_linear[stage - middle - 1](torch.cat([x, skip_x], dim=-1))
            y = self.skip_norm_linear_enc[stage - middle - 1](torch.cat([y, skip_y], dim=-1))
        block, args = self.blocks[index], (x, y, c, inputs.ropes[place], inputs.mask, inputs.text_mask, tokens)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x, y = checkpoint(block, *args, use_reentrant=False)
        else:
            x, y = block(*args)
        if self.config.skip_connection and stage < middle and ends:
            skips += [x, y]
        return x, y, c, *skips

    def head(self, stream: Stream, inputs: Inputs) -> Tensor:
        x, _, c = stream
        x = inputs.tokens.move(x, self.places[-1], DENSE)
        shift, scale = self.norm_out(c, x.dtype)
        x = modulate(self.norm_out.norm, self.norm_final(x), shift, scale)
        return unpatchify(inputs.tokens.join(self.proj_out(x)), inputs.grid, self.patch)

    @property
    def patch(self) -> tuple[int, int, int]:
        return self.config.patch_size_t, self.config.patch_size, self.config.patch_size

    def tensor_plan(self) -> TensorPlan:
        """How its layers may be shared by ranks."""
        return tensor_plan(self.config)

    @property
    def blocks(self) -> list[Any]:
        """All blocks in the order of computation."""
        return [block for stage in cast(Any, self.transformer_blocks) for block in stage]

    def place_before(self, index: int) -> Place:
        """Where the tokens lie that come to a block."""
        return self.places[index - 1] if index else DENSE

    def step_of(self, name: str) -> int:
        """The block that a parameter is needed in, by index; -1 for `embed`, the number of blocks for `head`."""
        part, *rest = name.split(".")
        if part == "transformer_blocks":
            return self.stage_starts[int(rest[0])] + int(rest[1])
        if part.startswith("skip_norm_linear"):
            return self.stage_starts[len(self.transformer_blocks) // 2 + 1 + int(rest[0])]
        return len(self.places) if part in ("norm_final", "norm_out", "proj_out") else -1

    def check_inputs(
        self, latent: Tensor, timestep: Tensor, pooled: Tensor, text: Tensor, *masks: Tensor | None
    ) -> None:
        config, p = self.config, self.config.patch_size
        unfit = latent.dim() != 5 or latent.shape[1] != config.in_channels or 0 in latent.shape[2:]
        if unfit or any(size % p for size in latent.shape[3:]):
            raise ValueError(
                f"SparseUMMDiT: hidden_states must be (batch, {config.in_channels}, frames, height, width) with height "
                f"and width multiples of {p}, got {tuple(latent.shape)}"
            )
        batch, tokens = latent.shape[0], text.shape[-2]
        wanted = {
            "timestep": (batch,),
            "pooled_projections": (batch, config.pooled_projection_dim),
            "encoder_hidden_states": (batch, tokens, config.caption_channels),
            "attention_mask": (batch, *latent.shape[2:]),
            "encoder_attention_mask": (batch, tokens),
        }
        for (name, shape), tensor in zip(wanted.items(), (timestep, pooled, text, *masks), strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"SparseUMMDiT: {name} must be {shape}, got {tuple(tensor.shape)}")

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as the original does: layers of the blocks and modulations normal with standard deviation
        0.02 and zero bias, skip linears ``[I | 0]``, the others as PyTorch does.
        """
        normal = {*self.transformer_blocks.modules(), *self.norm_out.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and module in normal:
                init_normal(module, 0.02, generator)
            else:
                init_default(module, generator)
        if self.config.skip_connection_zero_init:
            for layer in (*self.skip_norm_linear, *self.skip_norm_linear_enc):
                nn.init.eye_(layer[1].weight)
                nn.init.zeros_(layer[1].bias)

    convert_state_dict = staticmethod(keys.convert_state_dict)

    def ignored_keys(self) -> tuple[str, ...]:
        return keys.ignored_keys(self.config)


def skip_layer(config: SparseUMMDiTConfig) -> nn.Sequential:
    """Joins a stream with its mirror image: ``(B, tokens, 2 hidden)`` to ``(B, tokens, hidden)``."""
    width = config.hidden_size
    norm = nn.Identity() if config.skip_connection_zero_init else make_norm(config.norm_cls, 2 * width, config.norm_eps)
    return nn.Sequential(norm, nn.Linear(2 * width, width))
