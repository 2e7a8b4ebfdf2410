# SPDX-License-Identifier: Apache-2.0
"""CogVideoX: one transformer over text and video with expert adaptive LayerNorm (arXiv 2408.06072).

Follows THUDM/CogVideo (``sat/dit_video_concat.py``, v1.0 and main) in the parameter names of diffusers. Shapes: B
batch, C channels, T H W frames, height and width of the latent, S text tokens, N video tokens (frames, then rows, then
columns), D hidden width, E conditioning width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen import ops
from vidgen.checkpoints.hf import PretrainedModel
from vidgen.nn import (
    ALONE,
    AdaNorm,
    EmbeddingMLP,
    FeedForward,
    TensorPlan,
    Tokens,
    alone,
    init_default,
    init_normal,
    modulate,
    residual_modulate,
    sinusoidal_embedding,
)

from . import checkpoint as keys
from .config import CogVideoXConfig
from .patches import Grid, cut_patches, join_patches, patch_grid
from .positions import rotary_table, sincos_table
from .tensor_parallel import tensor_plan

QK_EPS = 1e-6
RELEASED_OFS = 2.0


class PatchEmbed(nn.Module):
    """Text and patches of the latent as tokens of one width, with positions added where the model has them."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.config = config
        width, p = config.hidden_size, config.patch_size
        self.proj: nn.Conv2d | nn.Linear
        if config.patch_size_t is None:
            self.proj = nn.Conv2d(config.in_channels, width, p, p, bias=config.patch_bias)
        else:
            self.proj = nn.Linear(config.in_channels * config.patch_size_t * p * p, width)
        self.text_proj = nn.Linear(config.text_embed_dim, width)
        if config.use_learned_positional_embeddings:
            frames, rows, columns = config.table_grid
            table = torch.zeros(1, config.max_text_seq_length + frames * rows * columns, width)
            self.pos_embedding = nn.Parameter(table)

    def forward(self, latent: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Latent ``(B, C, T, H, W)`` and text ``(B, S, text_embed_dim)`` to ``(B, N, D)`` and ``(B, S, D)``."""
        weight = self.proj.weight
        y = self.text_proj(text.to(weight.dtype))
        # A convolution of patches that do not overlap is a linear layer of flattened patches: one path for 1.0 and 1.5.
        x = F.linear(cut_patches(latent.to(weight.dtype), self.config.patch), weight.flatten(1), self.proj.bias)
        if self.config.use_learned_positional_embeddings or not self.config.use_rotary_positional_embeddings:
            grid = patch_grid(latent, self.config.patch)
            text_positions, video_positions = self.positions(y.shape[1], grid, x.device)
            x = x + video_positions.to(x.dtype)
            y = y if text_positions is None else y + text_positions.to(y.dtype)
        return x, y

    def positions(self, text_tokens: int, grid: Grid, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """What is added to the text, if anything, and to the video."""
        config = self.config
        if text_tokens != config.max_text_seq_length:
            raise ValueError(
                f"CogVideoX: encoder_hidden_states must have max_text_seq_length={config.max_text_seq_length} tokens "
                f"where positions are added, got {text_tokens}"
            )
        if config.use_learned_positional_embeddings:
            trained = config.table_grid
            if grid[1:] != trained[1:]:
                raise ValueError(
                    f"CogVideoX: the learned positions are those of {trained[1]} x {trained[2]} patches, got "
                    f"{grid[1]} x {grid[2]}"
                )
            if grid[0] == trained[0] or config.learned_positions == "slice":
                if grid[0] > trained[0]:
                    raise ValueError(
                        f"CogVideoX: the learned positions are those of {trained[0]} latent frames, got {grid[0]}"
                    )
                table = self.pos_embedding[:, : text_tokens + grid[0] * grid[1] * grid[2]]
                return table[:, :text_tokens], table[:, text_tokens:]
        scales = {
            "spatial_scale": config.spatial_interpolation_scale,
            "temporal_scale": config.temporal_interpolation_scale,
        }
        return None, sincos_table(grid, config.hidden_size, **scales, device=device)


class JointAttention(nn.Module):
    """Every token of text and video attends to every other."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        width, head_dim = config.hidden_size, config.attention_head_dim
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, config.attention_bias) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(head_dim, eps=QK_EPS) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, rope: dict[str, Any], tokens: Tokens = ALONE) -> Tensor:
        x = tokens.gather(x, "joint")
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.to_q, self.to_k, self.to_v))
        q, k = ops.qk_norm_rope(
            q,
            k,
            q_weight=self.norm_q.weight,
            q_bias=self.norm_q.bias,
            k_weight=self.norm_k.weight,
            k_bias=self.norm_k.bias,
            norm="layer",
            eps=QK_EPS,
            **rope,
        )
        return tokens.scatter(self.to_out[0](tokens.attention(q, k, v).flatten(2)), "joint")


class CogVideoXBlock(nn.Module):
    """Attention, then feed-forward. Text and video share all but their modulations."""

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm1 = AdaNorm(config.time_embed_dim, width, 6, "layer_norm", config.norm_eps)
        self.attn1 = JointAttention(config)
        self.norm2 = AdaNorm(config.time_embed_dim, width, 6, "layer_norm", config.norm_eps)
        self.ff = FeedForward(width, 4 * width)

    def forward(
        self, x: Tensor, y: Tensor, c: Tensor, rope: dict[str, Any], tokens: Tokens = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Video ``(B, N, D)`` and text ``(B, S, D)`` under the condition ``c`` ``(B, E)``."""
        num_text = y.shape[1]
        shift, scale, gate, text_shift, text_scale, text_gate = self.norm1(c, x.dtype)
        text_normed = modulate(self.norm1.norm, y, text_shift, text_scale)
        normed = modulate(self.norm1.norm, x, shift, scale)
        attended = self.attn1(torch.cat([text_normed, normed], 1), rope, tokens)

        shift, scale, ff_gate, text_shift, text_scale, text_ff_gate = self.norm2(c, x.dtype)
        norm = self.norm2.norm
        x, normed = residual_modulate(norm, x, gate, attended[:, num_text:], shift, scale)
        y, text_normed = residual_modulate(norm, y, text_gate, attended[:, :num_text], text_shift, text_scale)
        joint = tokens.gather(torch.cat([text_normed, normed], 1), "joint")
        processed = tokens.scatter(self.ff(joint), "joint")
        x = ops.gated_residual(x, ff_gate, processed[:, num_text:])
        return x, ops.gated_residual(y, text_ff_gate, processed[:, :num_text])


class Inputs(NamedTuple):
    """What a forward pass is given, checked, and what follows from it without any weight."""

    latent: Tensor
    timestep: Tensor
    text: Tensor
    ofs: Tensor | float
    grid: Grid
    tokens: Tokens
    rope: dict[str, Any]


# Video, text and condition.
Stream = tuple[Tensor, Tensor, Tensor]


class CogVideoXTransformer3DModel(PretrainedModel):
    """The velocity ``sqrt(a) noise - sqrt(1 - a) latent`` of a noisy latent, from its text and, for some, an image.

    ``gradient_checkpointing = True`` recomputes each block in the backward pass instead of keeping its activations.
    """

    config_class = CogVideoXConfig
    config: CogVideoXConfig

    def __init__(self, config: CogVideoXConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.sequence = alone  # of the counts of video and text tokens; set by vidgen.parallel
        width, condition = config.hidden_size, config.time_embed_dim
        self.patch_embed = PatchEmbed(config)
        self.time_embedding = EmbeddingMLP(width, condition)
        self.ofs_embedding = None if config.ofs_embed_dim is None else EmbeddingMLP(config.ofs_embed_dim, condition)
        self.transformer_blocks = nn.ModuleList(CogVideoXBlock(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(width, eps=config.norm_eps)
        self.norm_out = AdaNorm(condition, width, 2, "layer_norm", config.last_norm_eps)
        frames, rows, columns = config.patch
        self.proj_out = nn.Linear(width, frames * rows * columns * config.out_channels)
        self.init_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        ofs: Tensor | float = RELEASED_OFS,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            hidden_states: noisy latent ``(B, in_channels, T, H, W)``, for image to video with the image's latent in
                the second half of the channels; T, H and W are multiples of the patch.
            timestep: ``(B)``, 0 to 999.
            encoder_hidden_states: text tokens ``(B, S, text_embed_dim)``, padding included: nothing is masked.
            ofs: ``(B)``, ``(1)`` or a number, for models with ``ofs_embed_dim``; every release was trained with 2.
            rotary: cosines and sines ``(N, head_dim / 2)`` of the video to use instead of the configuration's.

        Returns:
            ``(B, out_channels, T, H, W)`` in the dtype of the weights.

        Raises:
            ValueError: shapes do not fit each other or the configuration.
        """
        inputs = self.prepare(hidden_states, timestep, encoder_hidden_states, ofs, rotary)
        stream = self.embed(inputs)
        for index in range(len(self.blocks)):
            stream = self.run_block(index, stream, inputs)
        return self.head(stream, inputs)

    def prepare(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        ofs: Tensor | float = RELEASED_OFS,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Inputs:
        self.check_inputs(hidden_states, timestep, encoder_hidden_states)
        grid = patch_grid(hidden_states, self.config.patch)
        num_text = encoder_hidden_states.shape[1]
        tokens = self.sequence(grid[0] * grid[1] * grid[2], num_text)
        rope = self.rotation(grid, num_text, hidden_states, rotary)
        rope |= {name: tokens.rows(rope[name], "joint") for name in ("cos", "sin") if name in rope}
        return Inputs(hidden_states, timestep, encoder_hidden_states, ofs, grid, tokens, rope)

    def embed(self, inputs: Inputs) -> Stream:
        c = self.condition(inputs.timestep, inputs.ofs)
        c = F.silu(c.to(torch.promote_types(c.dtype, torch.float32)))
        x, y = self.patch_embed(inputs.latent, inputs.text)
        return inputs.tokens.split(x), inputs.tokens.split_text(y), c

    def run_block(self, index: int, stream: Stream, inputs: Inputs) -> Stream:
        x, y, c = stream
        block, args = self.blocks[index], (x, y, c, inputs.rope, inputs.tokens)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x, y = checkpoint(block, *args, use_reentrant=False)
        else:
            x, y = block(*args)
        return x, y, c

    def head(self, stream: Stream, inputs: Inputs) -> Tensor:
        x, _, c = stream
        shift, scale = self.norm_out(c, x.dtype)
        x = modulate(self.norm_out.norm, self.norm_final(x), shift, scale)
        return join_patches(inputs.tokens.join(self.proj_out(x)), inputs.grid, self.config.patch)

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
        return self.config.num_layers if part in ("norm_final", "norm_out", "proj_out") else -1

    def condition(self, timestep: Tensor, ofs: Tensor | float = RELEASED_OFS) -> Tensor:
        """The conditioning vector ``(B, E)``."""
        sinusoid = sinusoidal_embedding(timestep, self.config.hidden_size)
        c = self.time_embedding(sinusoid.to(self.time_embedding.linear_1.weight.dtype))
        if self.ofs_embedding is None or self.config.ofs_embed_dim is None:
            return c
        values = torch.as_tensor(ofs, dtype=torch.float32, device=timestep.device).reshape(-1)
        if len(values) not in (1, len(timestep)):
            raise ValueError(f"CogVideoX: ofs must be a number, (1) or ({len(timestep)}), got {tuple(values.shape)}")
        return c + self.ofs_embedding(sinusoidal_embedding(values, self.config.ofs_embed_dim).to(c.dtype))

    def rotation(self, grid: Grid, text_tokens: int, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
        """What ``ops.qk_norm_rope`` needs to turn the video tokens and leave the text."""
        config = self.config
        if not config.use_rotary_positional_embeddings:
            return {}
        if rotary is None:
            cos, sin = rotary_table(
                grid,
                config.table_grid[1:],
                config.rope_sections,
                config.rotary_positions,
                text_tokens=text_tokens,
                device=x.device,
            )
        else:
            unturned = torch.zeros(text_tokens, config.attention_head_dim // 2, device=x.device)
            cos, sin = (
                torch.cat([text, table.to(text)]) for text, table in zip((unturned + 1, unturned), rotary, strict=True)
            )
        return {"cos": cos, "sin": sin, "style": "interleaved"}

    def check_inputs(self, latent: Tensor, timestep: Tensor, text: Tensor) -> None:
        channels, patch = self.config.in_channels, self.config.patch
        unfit = latent.dim() != 5 or latent.shape[1] != channels or 0 in latent.shape
        if unfit or any(size % p for size, p in zip(latent.shape[2:], patch, strict=True)):
            raise ValueError(
                f"CogVideoX: hidden_states must be (batch, {channels}, frames, height, width) with the last three "
                f"multiples of {patch}, got {tuple(latent.shape)}"
            )
        batch, width = latent.shape[0], self.config.text_embed_dim
        if tuple(timestep.shape) != (batch,):
            raise ValueError(f"CogVideoX: timestep must be ({batch},), got {tuple(timestep.shape)}")
        if text.dim() != 3 or (text.shape[0], text.shape[2]) != (batch, width):
            raise ValueError(
                f"CogVideoX: encoder_hidden_states must be ({batch}, tokens, {width}), got {tuple(text.shape)}"
            )

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as SAT does: layers of the blocks normal with standard deviation 0.02, those that write to
        the streams divided by ``sqrt(2 num_layers)``; modulations of the blocks 0, so that these begin as identities;
        patch and last projection Xavier uniform; the others as PyTorch does. The learned table begins at 0.
        """
        for module in self.modules():
            init_default(module, generator)
        for block in self.transformer_blocks:
            assert isinstance(block, CogVideoXBlock)
            to_streams = (block.attn1.to_out[0], block.ff.net[2])
            layers = [m for part in (block.attn1, block.ff) for m in part.modules() if isinstance(m, nn.Linear)]
            for layer in layers:
                std = 0.02 / (2 * self.config.num_layers) ** 0.5 if layer in to_streams else 0.02
                init_normal(layer, std, generator)
            for norm in (block.norm1, block.norm2):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        with torch.no_grad():
            for projection in (self.patch_embed.proj, self.proj_out):
                nn.init.xavier_uniform_(projection.weight.flatten(1), generator=generator)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    convert_state_dict = staticmethod(keys.convert_state_dict)

    def fit_state_dict(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return keys.fit_state_dict(state, self.config)

    def ignored_keys(self) -> tuple[str, ...]:
        return keys.ignored_keys(self.config)
