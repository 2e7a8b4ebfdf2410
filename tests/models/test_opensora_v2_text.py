# SPDX-License-Identifier: Apache-2.0
"""Text of Open-Sora 2.0: T5 that sees its padding, CLIP before its projection, the facts that prompts end with."""

import pytest
import torch

from vidgen.models.text import (
    CLIPTextEncoder,
    T5TextEncoder,
    opensora_v2_prompt,
    opensora_v2_training_caption,
    save_tiny_text_encoders,
)

CAPTIONS = ["a rabbit in a meadow", "a cat walks along a wall", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text")
    return save_tiny_text_encoders(folder, t5_channels=32, clip_channels=24, clip_projected=False)


@torch.no_grad()
def test_t5_sees_its_padding(folders):
    import transformers

    hidden, mask = T5TextEncoder.from_pretrained(folders[0], max_length=40, mask_padding=False).encode(CAPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    model = transformers.T5EncoderModel.from_pretrained(folders[0]).eval()
    ids = tokenizer(CAPTIONS, max_length=40, padding="max_length", return_tensors="pt").input_ids
    wanted = model(input_ids=ids, attention_mask=None).last_hidden_state
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5)
    masked, same = T5TextEncoder.from_pretrained(folders[0], max_length=40).encode(CAPTIONS)
    assert torch.equal(mask, same) and (masked - hidden).abs().max() > 1e-2


@torch.no_grad()
def test_clip_before_its_projection(folders):
    import transformers

    encoder = CLIPTextEncoder.from_pretrained(folders[1], projected=False)
    pooled = encoder.encode(CAPTIONS)
    assert pooled.shape == (3, 24) and encoder.channels == 24
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1])
    model = transformers.CLIPTextModel.from_pretrained(folders[1]).eval()
    ids = tokenizer(CAPTIONS, max_length=77, padding="max_length", return_tensors="pt").input_ids
    wanted = model(input_ids=ids, attention_mask=None).pooler_output
    torch.testing.assert_close(pooled, wanted, rtol=1e-4, atol=1e-5)


def test_clip_without_projection_takes_the_folder_of_a_whole_clip(tmp_path):
    """openai/clip-vit-large-patch14 is one."""
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    whole = transformers.CLIPModel(config).eval()
    tokenizer = save_tiny_text_encoders(tmp_path / "tokenizer")[1]
    whole.save_pretrained(tmp_path / "whole")
    encoder = CLIPTextEncoder.from_pretrained(tmp_path / "whole", tokenizer_folder=tokenizer, projected=False)
    ids = encoder.tokenizer(["a cat"], max_length=77, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = whole.text_model(input_ids=ids).pooler_output
    torch.testing.assert_close(encoder.encode(["a cat"]), wanted)


@pytest.mark.parametrize(
    ("caption", "options", "prompt"),
    [
        ("raining, sea", {}, "raining, sea. 24 FPS. 4 motion score."),
        ("A cat. ", {"fps": 16, "motion_score": "7"}, "A cat. 16 FPS. 7 motion score."),
        ("Dogs run. 12 FPS.", {}, "Dogs run. 12 FPS. 4 motion score."),
        ("at 12 FPS", {"motion_score": None}, "at 12 FPS."),
        ("12 FPS ahead", {"motion_score": None}, "12 FPS ahead. 24 FPS."),
        (" as it is ", {"fps": None, "motion_score": None}, " as it is "),
        ("", {}, ". 24 FPS. 4 motion score."),
    ],
)
def test_prompts(caption, options, prompt):
    assert opensora_v2_prompt(caption, **options) == prompt


def test_training_captions():
    assert opensora_v2_training_caption("a cat", fps=24, motion_score=3.6) == "a cat 24 FPS, 4 motion score."
    assert opensora_v2_training_caption("a cat.", fps=12) == "a cat. 12 FPS."
    assert opensora_v2_training_caption("a cat", motion_score=2.5) == "a cat 3 motion score."
    assert opensora_v2_training_caption("a cat") == "a cat"
