# SPDX-License-Identifier: Apache-2.0
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vidgen.models.text import (
    CLIPTextEncoder,
    PromptRefiner,
    T5TextEncoder,
    clean_caption,
    drop_caption,
    opensora_plan_v1_3_prompt,
    opensora_plan_v1_3_training_caption,
    opensora_plan_v1_5_prompt,
    save_tiny_text_encoders,
)

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a rabbit in a meadow", "a cat walks along a wall", "自行车 on a street", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_tiny_text_encoders(tmp_path_factory.mktemp("text"), t5_channels=32, clip_channels=24)


def test_t5_is_transformers_t5(folders):
    hidden, mask = T5TextEncoder.from_pretrained(folders[0], max_length=40).encode(CAPTIONS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0])
    model = transformers.T5EncoderModel.from_pretrained(folders[0]).eval()
    assert hidden.shape == (4, 40, 32) and mask.shape == (4, 40) and mask.dtype == torch.bool
    for row, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, return_tensors="pt").input_ids  # alone and unpadded: padding must not matter
        assert mask[row].tolist() == [True] * ids.shape[1] + [False] * (40 - ids.shape[1])
        with torch.no_grad():
            wanted = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(hidden[row, : ids.shape[1]], wanted, rtol=1e-4, atol=1e-5)


def test_empty_caption_has_one_token(folders):
    _, mask = T5TextEncoder.from_pretrained(folders[0], max_length=8).encode([""])
    assert mask.tolist() == [[True] + [False] * 7]


def test_clip_is_transformers_clip_without_a_mask(folders):
    encoder = CLIPTextEncoder.from_pretrained(folders[1])
    pooled = encoder.encode(CAPTIONS)
    assert pooled.shape == (4, 24) and encoder.channels == 24
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[1])
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folders[1]).eval()
    for row, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            wanted = model(input_ids=tokenizer(caption, return_tensors="pt").input_ids).text_embeds[0]
        torch.testing.assert_close(pooled[row], wanted, rtol=1e-4, atol=1e-5)

    class Recorder(torch.nn.Module):
        config, device = model.config, model.device

        def forward(self, **arguments):
            assert list(arguments) == ["input_ids"] and arguments["input_ids"].shape == (1, 77)
            return model(**arguments)

    CLIPTextEncoder(Recorder(), tokenizer).encode(["a"])


def test_different_captions_differ_clearly(folders):
    pooled = torch.nn.functional.normalize(CLIPTextEncoder.from_pretrained(folders[1]).encode(CAPTIONS), dim=-1)
    hidden, mask = T5TextEncoder.from_pretrained(folders[0], max_length=64).encode(CAPTIONS)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    for vectors in (pooled, torch.nn.functional.normalize(mean, dim=-1)):
        similarity = vectors @ vectors.T - 2 * torch.eye(len(CAPTIONS))
        assert similarity.max() < 0.9


def test_long_captions_are_cut(folders):
    hidden, mask = T5TextEncoder.from_pretrained(folders[0], max_length=16).encode(["x" * 100])
    assert hidden.shape[1] == 16 and mask.all()
    assert CLIPTextEncoder.from_pretrained(folders[1]).encode(["x" * 100]).isfinite().all()


def test_tiny_encoders_depend_on_the_seed_alone(folders, tmp_path):
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = save_tiny_text_encoders(tmp_path / "again", t5_channels=32, clip_channels=24)
    assert torch.equal(state, torch.get_rng_state())
    other = save_tiny_text_encoders(tmp_path / "other", t5_channels=32, clip_channels=24, seed=5)
    for first, same, different in zip(folders, again, other, strict=True):
        weights = [load_file(folder / "model.safetensors") for folder in (first, same, different)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_frozen_and_cast(folders):
    encoder = T5TextEncoder.from_pretrained(folders[0], max_length=8, dtype=torch.bfloat16)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.model.training
    assert encoder.encode(["a"])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("index", "encoder"), [(0, T5TextEncoder), (1, CLIPTextEncoder)])
def test_folders_that_lack_parts(folders, tmp_path, index, encoder):
    def copy(*but):
        target = tmp_path / "-".join(but)
        target.mkdir()
        for file in folders[index].iterdir():
            if file.name not in but:
                (target / file.name).write_bytes(file.read_bytes())
        return target

    name = encoder.__name__
    with pytest.raises(FileNotFoundError, match=f"{name}.*is not a folder"):
        encoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        encoder.from_pretrained(copy("config.json"))
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        encoder.from_pretrained(copy("tokenizer.json"))
    folder = copy("model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(FileNotFoundError, match="has pytorch_model.bin but no"):
        encoder.from_pretrained(folder)
    weights = load_file(folders[index] / "model.safetensors")
    lost = sorted(name for name in weights if "layer_norm" in name)[0]
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        encoder.from_pretrained(folder)
    # the tokenizer may lie elsewhere
    assert encoder.from_pretrained(tmp_path / "tokenizer.json", tokenizer_folder=folders[index]).encode(["a"])[0].any()


def test_bad_arguments_are_named(folders):
    encoder = T5TextEncoder.from_pretrained(folders[0], max_length=8)
    for captions in ([], "a string", [None]):
        with pytest.raises(ValueError, match="captions must be"):
            encoder.encode(captions)
    with pytest.raises(ValueError, match="max_length"):
        CLIPTextEncoder.from_pretrained(folders[1], max_length=78)
    with pytest.raises(ValueError, match="max_length"):
        T5TextEncoder.from_pretrained(folders[0], max_length=0)
    with pytest.raises(ValueError, match="t5_channels"):
        save_tiny_text_encoders(folders[0], t5_channels=30)


def test_tokenizer_class_is_the_common_one(folders):
    for folder in folders:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Cat\n walks\t\u00a0along ", "a cat walks along"),
        ("rock &amp;amp; roll &lt;3", "rock & roll <3"),
        ("<b>Bold</b> move<br/>", "bold move"),
        ("see https://example.com/a?b=c or www.example.com now", "see or now"),
        ("write to some.one@example.co.uk today", "write to today"),
        ("it\u2019s a \u201ctest\u201d \u2013 yes", 'it\'s a "test" - yes'),
        ("2 < 3 and 5 > 4", "2 < 3 and 5 > 4"),
        ("一只猫 Ünïcödé", "一只猫 ünïcödé"),
        ("&amp;lt;i&amp;gt;x", "x"),
        ("", ""),
    ],
)
def test_cleaning(caption, cleaned):
    assert clean_caption(caption) == cleaned


@given(st.text(alphabet=st.sampled_from("aZ<>/&;#3 @.w:hтİ\u200b\n") | st.characters(), max_size=30))
def test_cleaning_twice_is_cleaning_once(caption):
    once = clean_caption(caption)
    assert clean_caption(once) == once


def test_prompt_of_v1_5():
    assert opensora_plan_v1_5_prompt("A Rabbit.") == "high quality, a rabbit."


def test_caption_and_prompt_of_v1_3():
    assert opensora_plan_v1_3_prompt("A Rabbit.") == "high quality, high aesthetic, A Rabbit."
    assert opensora_plan_v1_3_training_caption("<b>Cat</b> by @some_one, 一只猫 me@x.org") == "cat by , 一只猫"
    once = opensora_plan_v1_3_training_caption("a @ @b@c  d")
    assert opensora_plan_v1_3_training_caption(once) == once


def test_dropped_captions():
    generator = torch.Generator().manual_seed(0)
    drawn = [drop_caption("a", inpaint=True, generator=generator) for _ in range(2000)]
    counts = {caption: drawn.count(caption) for caption in set(drawn)}
    assert len(counts) == 3 and 1730 < counts["a"] < 1870 and 60 < counts[""] < 150
    assert {drop_caption("a", probability=1.0, generator=generator) for _ in range(20)} == {""}
    assert drop_caption("a", probability=0.0) == "a"
    with pytest.raises(ValueError, match="probability"):
        drop_caption("a", probability=2.0)


@pytest.mark.parametrize("kind", ["MT5", "UMT5"])
def test_multilingual_t5(tmp_path, kind):
    folder, _ = save_tiny_text_encoders(tmp_path, t5_channels=32, multilingual=True)
    if kind == "UMT5":
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "umt5"}
        torch.manual_seed(0)
        whole = transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**config))
        whole.save_pretrained(folder)  # a whole one, of which the encoder is taken
    encoder = T5TextEncoder.from_pretrained(folder, max_length=60)
    assert type(encoder.model).__name__ == f"{kind}EncoderModel" and encoder.channels == 32
    hidden, mask = encoder.encode(CAPTIONS)
    model = getattr(transformers, f"{kind}EncoderModel").from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, caption in enumerate(CAPTIONS):
        ids = tokenizer(caption, return_tensors="pt").input_ids
        with torch.no_grad():
            wanted = model(input_ids=ids).last_hidden_state[0]
        assert int(mask[row].sum()) == ids.shape[1]
        torch.testing.assert_close(hidden[row, : ids.shape[1]], wanted, rtol=1e-4, atol=1e-5)


def test_other_kinds_are_not_t5(folders):
    with pytest.raises(ValueError, match="must hold one of t5, mt5, umt5, got 'clip_text_model'"):
        T5TextEncoder.from_pretrained(folders[1])


CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


@pytest.fixture(scope="module")
def refiner_folder(tmp_path_factory):
    """A tiny Llama that most likely answers "cat"."""
    from vidgen.models.text.tiny import _save_tokenizer

    folder = tmp_path_factory.mktemp("refiner")
    vocabulary = _save_tokenizer(folder, ["<pad>", "</s>"], "$A </s>", pad="<pad>", eos="</s>", max_length=512)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=vocabulary, **sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    )
    with torch.no_grad():  # attention adds nothing, so that a token decides the next one alone
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        words = tokenizer("]cat", add_special_tokens=False).input_ids + [1]
        model.lm_head.weight.zero_()
        states = torch.eye(32)
        model.model.embed_tokens.weight.zero_()
        for row, token in enumerate(dict.fromkeys(words)):
            model.model.embed_tokens.weight[token] = states[row]
        for token, following in itertools.pairwise(words):
            model.lm_head.weight[following] = 5 * model.model.embed_tokens.weight[token]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.save_pretrained(folder)
    return folder


def test_refiner_continues_the_conversation(refiner_folder):
    refiner = PromptRefiner.from_pretrained(refiner_folder)
    asked = []
    generate = refiner.model.generate
    refiner.model.generate = lambda **arguments: asked.append(arguments) or generate(**arguments)
    assert {refiner.refine("a {small} rabbit") for _ in range(3)} == {"cat"}  # drawn from its settings, it would differ
    text = refiner.tokenizer.decode(asked[0]["input_ids"][0])
    assert text.startswith("[system]You are a caption refiner.[user]") and text.endswith("[answer]")
    assert '"a {small} rabbit"' in text and asked[0]["max_new_tokens"] == 512
    assert refiner.refine("a", max_new_tokens=2) == "ca"
    assert not any(p.requires_grad for p in refiner.parameters())


def test_refiner_refuses(refiner_folder, tmp_path):
    from vidgen.models.text.refiner import refine_prompt

    refiner = PromptRefiner.from_pretrained(refiner_folder)
    with pytest.raises(ValueError, match="prompt must not be empty"):
        refiner.refine("  ")
    with pytest.raises(ValueError, match="instruction must have"):
        refine_prompt(refiner.model, refiner.tokenizer, "a", instruction="refine")
    with torch.no_grad():
        refiner.model.lm_head.weight.zero_()
        refiner.model.lm_head.weight[1] = 1.0 * refiner.model.model.embed_tokens.weight.sum(0)
    with pytest.raises(ValueError, match="answered nothing"):
        refiner.refine("a")
    refiner.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        PromptRefiner(refiner.model, refiner.tokenizer)
