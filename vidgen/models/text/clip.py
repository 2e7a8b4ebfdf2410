# SPDX-License-Identifier: Apache-2.0
"""The text half of CLIP (arXiv 2103.00020): one vector per caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folder import import_transformers, load_model, load_tokenizer, tokenize


class CLIPTextEncoder(nn.Module):
    """Captions to pooled vectors. Open-Sora Plan v1.5 uses CLIP ViT-bigG/14 (1280 channels), 77 tokens.

    Open-Sora 2.0 uses the vectors of CLIP ViT-L/14 (768 channels) before their projection.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 77) -> None:
        super().__init__()
        longest = model.config.max_position_embeddings
        if not 1 <= max_length <= longest:
            raise ValueError(f"CLIPTextEncoder: max_length must lie in 1..{longest}, got {max_length}")
        self.model, self.tokenizer, self.max_length = model.eval().requires_grad_(False), tokenizer, max_length

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        max_length: int = 77,
        *,
        tokenizer_folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        projected: bool = True,
    ) -> CLIPTextEncoder:
        """Load a local Hugging Face folder: ``config.json``, ``*.safetensors`` and the tokenizer's files.

        Args:
            folder: a CLIP text model with projection, or a whole CLIP of which that part is taken.
            max_length: tokens that every caption is padded or cut to, at most the model's number of positions.
            tokenizer_folder: where the tokenizer lies, if not beside the model.
            dtype: of the weights.
            projected: multiply by the projection into the space of images; False takes a model without one.

        Raises:
            ImportError: transformers is not installed.
            FileNotFoundError: a part is missing; the message names it.
            ValueError: the weights do not fill the model, or it has fewer positions than ``max_length``.
        """
        transformers = import_transformers(cls.__name__)
        kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        model = load_model(kind, Path(folder), cls.__name__)
        return cls(model.to(dtype), load_tokenizer(Path(tokenizer_folder or folder), cls.__name__), max_length)

    @property
    def channels(self) -> int:
        config = self.model.config
        return int(config.projection_dim if hasattr(self.model, "text_projection") else config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """The vector at the end-of-text token, ``(batch, channels)``.

        No attention mask is passed, as the released model was trained; attention is causal, so the padding after the
        end of the text has no effect anyway.

        Raises:
            ValueError: ``captions`` is not a non-empty list of strings.
        """
        tokens = tokenize(self.tokenizer, captions, self.max_length, "CLIPTextEncoder")
        output = self.model(input_ids=tokens["input_ids"].to(self.model.device))
        return output.text_embeds if "text_embeds" in output else output.pooler_output
