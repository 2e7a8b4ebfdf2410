# SPDX-License-Identifier: Apache-2.0
"""The encoder half of T5 (arXiv 1910.10683) and of mT5 (arXiv 2010.11934): one vector per token of the caption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .folder import import_transformers, load_model, load_tokenizer, read_config, tokenize

# By the model_type of a folder's config.json, the class of transformers that holds the encoder.
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}


class T5TextEncoder(nn.Module):
    """Captions to hidden states and mask. Open-Sora Plan v1.5 uses T5-v1.1-XL (2048 channels), 512 tokens.

    Open-Sora Plan v1.3 uses mT5-XXL (4096 channels), 512 tokens, for captions in any language; umT5 is taken too.
    CogVideoX and Open-Sora 2.0 use T5-v1.1-XXL (4096 channels) with ``mask_padding=False``, 226 and 512 tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int = 512, *, mask_padding: bool = True) -> None:
        super().__init__()
        if max_length < 1:
            raise ValueError(f"T5TextEncoder: max_length must be at least 1, got {max_length}")
        self.model, self.tokenizer, self.max_length = model.eval().requires_grad_(False), tokenizer, max_length
        self.mask_padding = mask_padding

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        max_length: int = 512,
        *,
        tokenizer_folder: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        mask_padding: bool = True,
    ) -> T5TextEncoder:
        """Load a local Hugging Face folder: ``config.json``, ``*.safetensors`` and the tokenizer's files.

        Args:
            folder: an encoder of T5, mT5 or umT5, or a whole one of which the encoder is taken.
            max_length: tokens that every caption is padded or cut to.
            tokenizer_folder: where the tokenizer lies, if not beside the model.
            dtype: of the weights; T5 overflows in float16, bfloat16 is safe.
            mask_padding: hide the padding from the encoder's attention, as its training did; False lets every token
                see it, as models that attend to the padding were trained.

        Raises:
            ImportError: transformers is not installed.
            FileNotFoundError: a part is missing; the message names it.
            ValueError: the weights do not fill the model, or it is of another kind.
        """
        transformers = import_transformers(cls.__name__)
        kind = read_config(Path(folder), cls.__name__).get("model_type")
        if kind not in ENCODERS:
            raise ValueError(f"{cls.__name__}: {folder} must hold one of {', '.join(ENCODERS)}, got {kind!r}")
        model = load_model(getattr(transformers, ENCODERS[kind]), Path(folder), cls.__name__)
        tokenizer = load_tokenizer(Path(tokenizer_folder or folder), cls.__name__)
        return cls(model.to(dtype), tokenizer, max_length, mask_padding=mask_padding)

    @property
    def channels(self) -> int:
        return int(self.model.config.d_model)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states ``(batch, max_length, channels)`` and mask ``(batch, max_length)`` bool, True = real token.

        The empty caption still has one real token, the end of the sequence.

        Raises:
            ValueError: ``captions`` is not a non-empty list of strings.
        """
        tokens = tokenize(self.tokenizer, captions, self.max_length, "T5TextEncoder")
        device = self.model.device
        mask = tokens["attention_mask"].to(device)
        seen = mask if self.mask_padding else torch.ones_like(mask)
        hidden = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=seen).last_hidden_state
        return hidden, mask.bool()
