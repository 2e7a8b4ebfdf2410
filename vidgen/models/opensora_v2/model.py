# SPDX-License-Identifier: Apache-2.0
"""MMDiT: Flux's joint text and image transformer, with a frame axis and a condition on given frames.

Follows Open-Sora 2.0 (hpcaitech/Open-Sora, commit 7ad6a96; arXiv 2503.09642). Parameter names are the original's.
Shapes: B batch, L video tokens (frames, then rows, then columns), S text tokens, C packed channels, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidgen import ops
from vidgen.checkpoints.hf import PretrainedModel
from vidgen.nn import ALONE, TensorPlan, Tokens, alone, init_default
from vidgen.nn.sequence import Kind

from . import checkpoint as keys
from .config import MMDiTConfig
from .embeddings import MLPEmbedder, Rope, rope_table, timestep_embedding
from .tensor_parallel import tensor_plan

TIMESTEP_CHANNELS = 256
NORM_EPS = 1e-6


class Ropes(NamedTuple):
    """Rotations of this process's tokens, as the two kinds of blocks hold them."""

    text: Rope
    video: Rope
    joint: Rope


class Modulation(nn.Module):
    """``silu(vec)`` to shifts, scales and gates, each ``(B, hidden)``."""

    def __init__(self, width: int, num_chunks: int) -> None:
        super().__init__()
        self.num_chunks = num_chunks
        self.lin = nn.Linear(width, num_chunks * width)

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        return self.lin(activated).chunk(self.num_chunks, -1)


class Scale(nn.Module):
    """The weight of an RMSNorm over a head; ``ops.qk_norm_rope`` computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))


class QKNorm(nn.Module):
    """RMSNorm of queries and keys over each head, then rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = Scale(dim), Scale(dim)

    def forward(self, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        q, k = ops.qk_norm_rope(
            q,
            k,
            q_weight=self.query_norm.scale,
            k_weight=self.key_norm.scale,
            eps=NORM_EPS,
            cos=rope.cos,
            sin=rope.sin,
            style=rope.style,
        )
        return q, k


class StreamAttention(nn.Module):
    """The projections of one stream; attention itself joins both."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, self.head_dim, self.fused = config.hidden_size, config.head_dim, config.fused_qkv
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, config.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, config.qkv_bias) for _ in range(3))
        self.norm = QKNorm(self.head_dim)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``(B, tokens, hidden)``, each ``(B, tokens, heads, D)``."""
        qkv = self.qkv(x).chunk(3, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        return *self.norm(q, k, rope), v


class DoubleStreamBlock(nn.Module):
    """Text and video attend to each other, then pass through feed-forward networks of their own."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_hidden_size
        self.img_mod, self.txt_mod = Modulation(width, 6), Modulation(width, 6)
        self.img_attn, self.txt_attn = StreamAttention(config), StreamAttention(config)
        self.img_mlp, self.txt_mlp = (
            nn.Sequential(nn.Linear(width, inner), nn.GELU("tanh"), nn.Linear(inner, width)) for _ in range(2)
        )

    def forward(
        self, img: Tensor, txt: Tensor, activated: Tensor, ropes: Ropes, tokens: Tokens = ALONE
    ) -> tuple[Tensor, Tensor]:
        """Video ``(B, L, hidden)`` and text ``(B, S, hidden)`` under ``activated = silu(vec)`` ``(B, hidden)``."""
        img_shift, img_scale, img_gate, *img_ff = self.img_mod(activated)
        txt_shift, txt_scale, txt_gate, *txt_ff = self.txt_mod(activated)
        normed = tokens.gather(ops.adaln_modulate(img, img_shift, img_scale, eps=NORM_EPS))
        video = self.img_attn(normed, ropes.video)
        normed = tokens.gather(ops.adaln_modulate(txt, txt_shift, txt_scale, eps=NORM_EPS), "text")
        text = self.txt_attn(normed, ropes.text)
        attended = tokens.attention(*(torch.cat(pair, 1) for pair in zip(text, video, strict=True))).flatten(2)
        num_text = normed.shape[1]  # padding of the text is attended as well
        img_attended = tokens.scatter(self.img_attn.proj(attended[:, num_text:]))
        txt_attended = tokens.scatter(self.txt_attn.proj(attended[:, :num_text]), "text")

        img_shift, img_scale, img_ff_gate = img_ff
        img, normed = ops.gated_residual_adaln(img, img_gate, img_attended, img_shift, img_scale, eps=NORM_EPS)
        img = ops.gated_residual(img, img_ff_gate, tokens.scatter(self.img_mlp(tokens.gather(normed))))
        txt_shift, txt_scale, txt_ff_gate = txt_ff
        txt, normed = ops.gated_residual_adaln(txt, txt_gate, txt_attended, txt_shift, txt_scale, eps=NORM_EPS)
        processed = tokens.scatter(self.txt_mlp(tokens.gather(normed, "text")), "text")
        return img, ops.gated_residual(txt, txt_ff_gate, processed)


class SingleStreamBlock(nn.Module):
    """Attention and feed-forward side by side, from one norm, on text and video together."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.mlp_hidden_size
        self.head_dim, self.fused = config.head_dim, config.fused_qkv
        self.sections = (width, width, width, inner)  # q, k, v and the feed-forward network's, on this process
        if self.fused:
            self.linear1 = nn.Linear(width, 3 * width + inner)
        else:
            self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.v_mlp = nn.Linear(width, width + inner)
        self.linear2 = nn.Linear(width + inner, width)
        self.norm = QKNorm(self.head_dim)
        self.modulation = Modulation(width, 3)

    def forward(self, x: Tensor, activated: Tensor, rope: Rope, tokens: Tokens = ALONE) -> Tensor:
        """``(B, S + L, hidden)`` under ``activated = silu(vec)`` ``(B, hidden)``."""
        shift, scale, gate = self.modulation(activated)
        normed = tokens.gather(ops.adaln_modulate(x, shift, scale, eps=NORM_EPS), "joint")
        if self.fused:
            q, k, v, inner = self.linear1(normed).split(self.sections, -1)
        else:
            q, k = self.q_proj(normed), self.k_proj(normed)
            v, inner = self.v_mlp(normed).split(self.sections[2:], -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        q, k = self.norm(q, k, rope)
        attended = tokens.attention(q, k, v).flatten(2)
        processed = self.linear2(torch.cat((attended, F.gelu(inner, approximate="tanh")), -1))
        return ops.gated_residual(x, gate, tokens.scatter(processed, "joint"))


class FinalLayer(nn.Module):
    """Modulated norm and projection to packed channels."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.linear = nn.Linear(width, config.in_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, -1)
        return self.linear(ops.adaln_modulate(x, shift, scale, eps=NORM_EPS))


class Inputs(NamedTuple):
    """What a forward pass is given, checked, and what follows from it without any weight."""

    img: Tensor
    txt: Tensor
    timesteps: Tensor
    y_vec: Tensor
    cond: Tensor | None
    guidance: Tensor | None
    tokens: Tokens
    ropes: Ropes


# Video, text, the condition and its silu; from the single-stream blocks on, text and video are one.
Stream = tuple[Tensor, ...]


class MMDiT(PretrainedModel):
    """The velocity ``noise - latent`` of a noisy latent in packed form, from its text.

    ``gradient_checkpointing = True`` recomputes each block in the backward pass instead of keeping its activations;
    ``(nd, ns)`` does so for the first nd double and ns single blocks only.
    """

    config_class = MMDiTConfig
    config: MMDiTConfig

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing: bool | tuple[int, int] = False
        self.sequence = alone  # of the counts of video and text tokens; set by vidgen.parallel
        width = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, width)
        self.time_in = MLPEmbedder(TIMESTEP_CHANNELS, width)
        self.vector_in = MLPEmbedder(config.vec_in_dim, width)
        self.guidance_in = MLPEmbedder(TIMESTEP_CHANNELS, width) if config.guidance_embed else None
        self.cond_in = nn.Linear(config.cond_channels, width) if config.cond_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)
        self.init_weights()

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            img: noisy latent ``(B, L, in_channels)`` from ``vidgen.nn.pack_patches``.
            img_ids: frame, row and column of each token, ``(L, 3)`` or ``(B, L, 3)``: ``vidgen.nn.patch_positions``.
            txt: text tokens ``(B, S, context_in_dim)``.
            txt_ids: zeros ``(S, 3)`` or ``(B, S, 3)``, with as many dimensions as ``img_ids``.
            timesteps: ``(B)`` noise levels from 0 (data) to 1 (noise), in the dtype of the latent.
            y_vec: pooled text ``(B, vec_in_dim)``.
            cond: packed mask and masked latent ``(B, L, in_channels + patch_size ** 2)``; needed by a model with
                ``cond_embed`` (zeros for text to video) and by no other.
            guidance: ``(B)`` guidance scales; needed by a model with ``guidance_embed``, unused by others.

        Returns:
            ``(B, L, in_channels)`` in the dtype of the weights.

        Raises:
            ValueError: shapes do not fit each other or the configuration, or ``cond`` or ``guidance`` is missing.
        """
        inputs = self.prepare(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, guidance)
        stream = self.embed(inputs)
        for index in range(len(self.blocks)):
            stream = self.run_block(index, stream, inputs)
        return self.head(stream, inputs)

    def prepare(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Inputs:
        self.check_inputs(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, guidance)
        num_text = txt.shape[1]
        tokens = self.sequence(img.shape[1], num_text)
        table = rope_table(torch.cat((txt_ids, img_ids), -2), self.config)
        own: dict[Kind, Rope] = {"text": table.part(0, num_text), "video": table.part(num_text, None), "joint": table}
        for kind, (cos, sin, style) in own.items():
            own[kind] = Rope(tokens.rows(cos, kind), tokens.rows(sin, kind), style)
        ropes = Ropes(own["text"], own["video"], own["joint"])
        return Inputs(img, txt, timesteps, y_vec, cond, guidance, tokens, ropes)

    def embed(self, inputs: Inputs) -> Stream:
        dtype = self.img_in.weight.dtype
        x = self.img_in(inputs.img.to(dtype))
        if self.cond_in is not None and inputs.cond is not None:
            x = x + self.cond_in(inputs.cond.to(dtype))
        vec = self.time_in(timestep_embedding(inputs.timesteps, TIMESTEP_CHANNELS))
        if self.guidance_in is not None and inputs.guidance is not None:
            vec = vec + self.guidance_in(timestep_embedding(inputs.guidance, TIMESTEP_CHANNELS))
        vec = vec + self.vector_in(inputs.y_vec)
        y = self.txt_in(inputs.txt.to(dtype))
        return inputs.tokens.split(x), inputs.tokens.split_text(y), vec, F.silu(vec)

    def run_block(self, index: int, stream: Stream, inputs: Inputs) -> Stream:
        x, *y, vec, activated = stream
        block, num_double = self.blocks[index], self.config.depth
        doubles, singles = self.recomputed_blocks()
        if index < num_double:
            x, y[0] = recomputed(block, index < doubles, x, y[0], activated, inputs.ropes, inputs.tokens)
            return x, y[0], vec, activated
        joint = torch.cat((*y, x), 1)
        joint = recomputed(block, index - num_double < singles, joint, activated, inputs.ropes.joint, inputs.tokens)
        return joint, vec, activated

    def head(self, stream: Stream, inputs: Inputs) -> Tensor:
        x, *y, vec, _ = stream
        num_text = 0 if y else inputs.tokens.split_text(inputs.txt).shape[1]
        return inputs.tokens.join(self.final_layer(x[:, num_text:], vec))

    def tensor_plan(self) -> TensorPlan:
        """How its layers may be shared by ranks."""
        return tensor_plan(self.config)

    @property
    def blocks(self) -> list[Any]:
        """All blocks in the order of computation."""
        return [*self.double_blocks, *self.single_blocks]

    def step_of(self, name: str) -> int:
        """The block that a parameter is needed in, by index; -1 for `embed`, the number of blocks for `head`."""
        part, *rest = name.split(".")
        if part == "double_blocks":
            return int(rest[0])
        if part == "single_blocks":
            return self.config.depth + int(rest[0])
        return self.config.depth + self.config.depth_single_blocks if part == "final_layer" else -1

    def recomputed_blocks(self) -> tuple[int, int]:
        """How many double and single blocks are computed again in the backward pass."""
        if not torch.is_grad_enabled() or self.gradient_checkpointing is False:
            return 0, 0
        if self.gradient_checkpointing is True:
            return len(self.double_blocks), len(self.single_blocks)
        return self.gradient_checkpointing

    def check_inputs(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None,
        guidance: Tensor | None,
    ) -> None:
        config = self.config
        for name, t, channels in (("img", img, config.in_channels), ("txt", txt, config.context_in_dim)):
            if t.dim() != 3 or t.shape[2] != channels or t.shape[0] != img.shape[0]:
                wanted = f"({img.shape[0]}, tokens, {channels})"
                raise ValueError(f"MMDiT: {name} must be {wanted}, got {tuple(t.shape)}")
        batch, tokens = img.shape[:2]
        for name, ids, count in (("img_ids", img_ids, tokens), ("txt_ids", txt_ids, txt.shape[1])):
            if tuple(ids.shape) not in ((count, 3), (batch, count, 3)) or ids.dim() != img_ids.dim():
                wanted = f"({count}, 3) or ({batch}, {count}, 3), like the other ids"
                raise ValueError(f"MMDiT: {name} must be {wanted}, got {tuple(ids.shape)}")
        if (cond is None) == config.cond_embed:
            needed = "needs cond (zeros for text to video)" if config.cond_embed else "has no layer for cond"
            raise ValueError(f"MMDiT: with cond_embed={config.cond_embed} the model {needed}")
        if config.guidance_embed and guidance is None:
            raise ValueError("MMDiT: with guidance_embed=True the model needs guidance")
        wanted_shapes = {
            "timesteps": (timesteps, (batch,)),
            "y_vec": (y_vec, (batch, config.vec_in_dim)),
            "cond": (cond, (batch, tokens, config.cond_channels)),
            "guidance": (guidance, (batch,)),
        }
        for name, (tensor, shape) in wanted_shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"MMDiT: {name} must be {shape}, got {tuple(tensor.shape)}")

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as the original does: PyTorch's defaults, and zeros for the condition's projection."""
        for module in self.modules():
            init_default(module, generator)
            if isinstance(module, Scale):
                nn.init.ones_(module.scale)
        if self.cond_in is not None:
            nn.init.zeros_(self.cond_in.weight)
            nn.init.zeros_(self.cond_in.bias)

    convert_state_dict = staticmethod(keys.convert_state_dict)

    def ignored_keys(self) -> tuple[str, ...]:
        return ("*._extra_state",)


def recomputed(block: nn.Module, recompute: bool, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
