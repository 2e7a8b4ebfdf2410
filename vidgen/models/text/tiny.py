# SPDX-License-Identifier: Apache-2.0
"""Tiny random text encoders in the real format, for demos and tests: nothing is downloaded, nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .folder import import_transformers


def save_tiny_text_encoders(
    folder: str | Path,
    *,
    t5_channels: int = 64,
    clip_channels: int = 64,
    clip_projected: bool = True,
    multilingual: bool = False,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Write ``folder/t5`` and ``folder/clip``, Hugging Face folders that ``from_pretrained`` loads.

    Both have a byte-level tokenizer (one token per UTF-8 byte, so any caption in any script has tokens) and two layers
    of seeded random weights, scaled so that different captions get clearly different embeddings.

    Args:
        t5_channels: width of the hidden states, a multiple of 4.
        clip_channels: width of CLIP's vector, without projection a multiple of 4.
        clip_projected: CLIP with a projection (Open-Sora Plan 1.5) or without (Open-Sora 2.0).
        multilingual: mT5 in the place of T5 (Open-Sora Plan 1.3).
        seed: of the weights; the same seed gives the same files' contents, whatever the global generator's state.

    Returns:
        The two folders.

    Raises:
        ValueError: widths that do not fit.
        ImportError: transformers is not installed.
    """
    if t5_channels < 4 or t5_channels % 4 or clip_channels < 1 or (clip_channels % 4 and not clip_projected):
        raise ValueError(
            "save_tiny_text_encoders: t5_channels must be a multiple of 4 and clip_channels positive, "
            f"got {t5_channels} and {clip_channels}"
        )
    transformers = import_transformers("save_tiny_text_encoders")
    t5_folder, clip_folder = Path(folder) / "t5", Path(folder) / "clip"

    vocabulary = _save_tokenizer(t5_folder, ["<pad>", "</s>"], "$A </s>", pad="<pad>", eos="</s>", max_length=512)
    t5_kind = transformers.MT5Config if multilingual else transformers.T5Config
    t5_config = t5_kind(
        vocab_size=vocabulary, d_model=t5_channels, d_kv=t5_channels // 4, d_ff=2 * t5_channels, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5_model = transformers.MT5EncoderModel if multilingual else transformers.T5EncoderModel
    _save_model(t5_model, t5_config, t5_folder, seed)

    start, end = "<|startoftext|>", "<|endoftext|>"
    # CLIP pads with its end token and takes the vector at the first one
    vocabulary = _save_tokenizer(
        clip_folder, [start, end], f"{start} $A {end}", pad=end, eos=end, bos=start, max_length=77
    )
    clip_config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=64 if clip_projected else clip_channels, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, projection_dim=clip_channels, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    clip_model = transformers.CLIPTextModelWithProjection if clip_projected else transformers.CLIPTextModel
    _save_model(clip_model, clip_config, clip_folder, seed + 1)
    return t5_folder, clip_folder


def _save_tokenizer(
    folder: Path, special: list[str], template: str, *, pad: str, eos: str, max_length: int, bos: str | None = None
) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    used = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    names = {"pad_token": pad, "eos_token": eos} | ({"bos_token": bos} if bos else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names).save_pretrained(folder)
    # the class name that every version of transformers understands
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(settings, indent=2))
    return len(vocabulary)


def _save_model(model_class: Any, config: Any, folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global generator
        model = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(generator=generator)
    model.save_pretrained(folder)
