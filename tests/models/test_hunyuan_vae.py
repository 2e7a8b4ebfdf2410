# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo's autoencoder beyond its golden cases: against diffusers' own, tiles, attention, foreign folders."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from vidgen.models.autoencoders.blending import blend_frames, blend_tiles
from vidgen.models.autoencoders.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig, kl_divergence, preset
from vidgen.models.autoencoders.hunyuan_vae_layers import FrameCausalAttention
from vidgen.models.autoencoders.streaming import Stream


def make_vae(seed: int = 0, **changes: Any) -> HunyuanVAE:
    """Tiny, with biases and norms that show."""
    torch.manual_seed(seed)
    vae = HunyuanVAE(preset("tiny", **changes))
    with torch.no_grad():
        for p in vae.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    return vae.eval()


def make_video(frames: int, height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1


# Size and configuration


def test_released_parameter_count() -> None:
    with torch.device("meta"):
        vae = HunyuanVAE(preset("released"))
    assert sum(p.numel() for p in vae.parameters()) == 246_478_803
    assert len(vae.state_dict()) == 248


def test_config_reads_the_originals() -> None:
    shipped = {"type": "hunyuan_vae", "from_pretrained": "hunyuan_vae.safetensors", "in_channels": 3, "out_channels": 3}
    shipped |= {"layers_per_block": 2, "latent_channels": 16, "use_spatial_tiling": True, "use_temporal_tiling": False}
    assert HunyuanVAEConfig.from_original(shipped) == preset("released")
    with pytest.raises(ValueError, match=r"act_fn must be 'silu'.*latent_chanels"):
        HunyuanVAEConfig.from_original({"act_fn": "gelu", "latent_chanels": 4})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_num_groups": 3}, "multiples of norm_num_groups=3"),
        ({"block_out_channels": (4, 8)}, "at least three"),
        ({"time_compression_ratio": 8}, "time_compression_ratio must be 4"),
        ({"spatial_compression_ratio": 6}, "power of two"),
        ({"scale_factor": 0.0}, "scale_factor must not be 0"),
        ({"use_temporal_tiling": True, "tile_overlap_factor": 0.3}, "make tiles that line up"),
        ({"use_spatial_tiling": True, "sample_size": 20}, "make tiles that line up"),
        ({"use_spatial_tiling": True, "tile_overlap_factor": 1.0}, r"must lie in \[0, 1\)"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset("tiny", **changes)


# Against diffusers


@pytest.fixture(scope="module")
def theirs() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    ).eval()
    with torch.no_grad():
        for p in vae.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae.double()  # the network amplifies the roundings of float32


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> HunyuanVAE:
    folder = tmp_path_factory.mktemp("diffusers")
    theirs.save_pretrained(folder)
    return HunyuanVAE.from_pretrained(folder)


@pytest.mark.parametrize("size", [(1, 16, 16), (1, 40, 24), (5, 16, 24), (9, 24, 16), (6, 20, 13), (17, 8, 8)])
@torch.no_grad()
def test_same_as_diffusers(theirs: Any, ours: HunyuanVAE, size: tuple[int, int, int]) -> None:
    video = make_video(*size, batch=2).double()
    moments = theirs.encode(video).latent_dist.parameters
    torch.testing.assert_close(ours.encode_moments(video), moments, rtol=1e-6, atol=1e-8)
    assert moments.shape[2:] == ours.latent_size(*size)
    z = moments.chunk(2, 1)[0]
    torch.testing.assert_close(ours.encode(video), 0.476986 * z, rtol=1e-6, atol=1e-8)
    wanted = theirs.decode(z).sample
    torch.testing.assert_close(ours.decode(0.476986 * z), wanted, rtol=1e-6, atol=1e-8)
    assert wanted.shape[2:] == tuple(f * s - r for f, s, r in zip((4, 8, 8), z.shape[2:], (3, 0, 0), strict=True))


@pytest.mark.parametrize("size", [(1, 48, 40), (5, 56, 32), (1, 40, 72)])
@torch.no_grad()
def test_tiles_in_space_are_those_of_diffusers(theirs: Any, ours: HunyuanVAE, size: tuple[int, int, int]) -> None:
    tiled = HunyuanVAE(
        HunyuanVAEConfig(
            latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
            use_spatial_tiling=True, sample_size=32,
        )
    ).double()  # fmt: skip
    tiled.load_state_dict(ours.state_dict())
    video = make_video(*size).double()
    theirs.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
    )
    try:
        moments = theirs.encode(video).latent_dist.parameters
        wanted = theirs.decode(moments.chunk(2, 1)[0]).sample
    finally:
        theirs.disable_tiling()
    torch.testing.assert_close(tiled.encode_moments(video), moments, rtol=1e-6, atol=1e-8)
    assert (tiled.encode_moments(video) - ours.encode_moments(video)).abs().max() > 1e-3
    decoded = tiled.decode(0.476986 * moments.chunk(2, 1)[0])
    torch.testing.assert_close(decoded, wanted, rtol=1e-6, atol=1e-8)


def test_folders(theirs: Any, ours: HunyuanVAE, tmp_path: Any) -> None:
    video = make_video(5, 16, 16).double()
    ours.save_pretrained(tmp_path / "again")
    again = HunyuanVAE.from_pretrained(tmp_path / "again")
    assert again.config == ours.config and torch.equal(again.encode(video), ours.encode(video))
    file = tmp_path / "again" / "diffusion_pytorch_model.safetensors"
    alone = HunyuanVAE.from_pretrained(file, config=ours.config, dtype=torch.bfloat16)
    assert alone.encode(video.bfloat16()).dtype == torch.bfloat16
    assert {k: t.shape for k, t in ours.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}


# Attention


@torch.no_grad()
def test_attention_sees_its_own_and_earlier_frames() -> None:
    torch.manual_seed(0)
    layer = FrameCausalAttention(8, 2)
    x = torch.randn(2, 8, 4, 3, 2)
    tokens = layer.group_norm(x.flatten(2)).transpose(1, 2)
    q, k, v = layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens)
    frame = torch.arange(4).repeat_interleave(6)
    scores = (q @ k.transpose(1, 2) * 8**-0.5).masked_fill(frame[None, :] > frame[:, None], -torch.inf)
    wanted = x + layer.to_out[0](scores.softmax(-1) @ v).transpose(1, 2).view_as(x)
    torch.testing.assert_close(layer(x, Stream()), wanted)


# Tiles


def plain_tiles_of_time(code: Any, x: Tensor, size: int, out_size: int, overlap: float) -> Tensor:
    """All tiles first, then each is blended with the one before, as the reference page describes it."""
    stride, margin = int(size * (1 - overlap)), int(out_size * overlap)
    tiles = [code(x[:, :, i : i + size + 1]) for i in range(0, x.shape[2], stride)]
    tiles = [tile if index == 0 else tile[:, :, 1:] for index, tile in enumerate(tiles)]
    result = []
    for index, tile in enumerate(tiles):
        count = 0 if index == 0 else min(tiles[index - 1].shape[2], tile.shape[2], margin)
        for i in range(count):
            tile[:, :, i] = tiles[index - 1][:, :, i - count] * (1 - i / count) + tile[:, :, i] * (i / count)
        result.append(tile[:, :, : out_size - margin + (index == 0)])
    return torch.cat(result, 2)


@pytest.mark.parametrize("frames", [17, 18, 21, 25, 29, 30, 53])
@torch.no_grad()
def test_tiles_of_time(frames: int) -> None:
    vae = make_vae(use_temporal_tiling=True, sample_tsize=16)
    video = make_video(frames, 8, 16)
    moments = vae.encode_moments(video)
    wanted = plain_tiles_of_time(vae._encode_whole, video, 16, 4, 0.25)
    torch.testing.assert_close(moments, wanted, rtol=1e-5, atol=1e-6)
    latent = vae.encode(video)
    assert latent.shape[2] == (frames - 1) // 4 + 1
    decoded = vae.decode(latent)
    wanted = plain_tiles_of_time(vae._decode_whole, latent / 0.476986, 4, 16, 0.25) if latent.shape[2] > 4 else None
    assert wanted is not None and decoded.shape[2] == 4 * (latent.shape[2] - 1) + 1
    torch.testing.assert_close(decoded, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat(list(vae.decode_stream(latent)), 2), decoded)


@torch.no_grad()
def test_misaligned_tiles_are_an_option() -> None:
    vae = make_vae(use_temporal_tiling=True, sample_tsize=16, tile_overlap_factor=0.4, allow_misaligned_tiles=True)
    latent = torch.randn(1, 4, 9, 1, 1)
    wanted = plain_tiles_of_time(vae._decode_whole, latent / 0.476986, 4, 16, 0.4)
    torch.testing.assert_close(vae.decode(latent), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_short_videos_and_small_frames_are_not_tiled() -> None:
    vae, plain = (
        make_vae(use_temporal_tiling=True, use_spatial_tiling=True, sample_tsize=16, sample_size=32),
        make_vae(),
    )
    video = make_video(16, 32, 24)
    assert torch.equal(vae.encode(video), plain.encode(video))
    latent = torch.randn(1, 4, 4, 4, 3)
    assert torch.equal(vae.decode(latent), plain.decode(latent))


@torch.no_grad()
def test_constants_survive_blending() -> None:
    """Weights add up to one wherever tiles overlap, also in ragged last tiles."""
    for height, width in ((24, 24), (25, 48), (49, 40), (64, 26)):
        x = torch.ones(1, 1, 2, height, width)
        assert torch.equal(blend_tiles(torch.clone, x, 32, 32, 0.25), x)
    for frames in (5, 17, 24, 26, 41):
        x = torch.ones(1, 1, frames, 1, 1)
        assert torch.equal(torch.cat(list(blend_frames(torch.clone, x, 16, 16, 0.25)), 2), x)


def test_tiles_are_freed_while_others_are_computed() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def code(tile: Tensor) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        result = tile.repeat(1, 1, 1, 2, 2)
        alive.append(weakref.ref(result.untyped_storage()))
        return result

    blend_tiles(code, torch.rand(1, 1, 2, 160, 160), 32, 64, 0.25)
    assert len(alive) == 49 and most == 0
    alive.clear()
    most = 0
    for piece in blend_frames(code, torch.rand(1, 1, 100, 4, 4), 16, 16, 0.25):
        del piece
    assert len(alive) == 9 and most == 0


@torch.no_grad()
def test_stream_decodes_only_what_is_asked_for() -> None:
    vae = make_vae(use_temporal_tiling=True, sample_tsize=16)
    calls = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[2]))
    chunks = vae.decode_stream(torch.randn(1, 4, 20, 1, 1))
    assert next(chunks).shape[2] == 13 and calls == [17]
    assert next(chunks).shape[2] == 12 and calls == [17, 17]


# Latent


def test_latent_is_scaled_and_sampled() -> None:
    vae = make_vae(scale_factor=2.0, shift_factor=0.5).double()
    video = make_video(5, 16, 16).double()
    mean, logvar = vae.encode_moments(video).chunk(2, 1)
    torch.testing.assert_close(vae.encode(video), 2 * (mean - 0.5))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3), dtype=mean.dtype)
    wanted = 2 * (mean + (logvar / 2).exp() * noise - 0.5)
    torch.testing.assert_close(vae.encode(video, noise=noise), wanted)
    torch.testing.assert_close(vae.encode(video, generator=torch.Generator().manual_seed(3)), wanted)
    with pytest.raises(ValueError, match="noise or a generator"):
        vae.encode(video, noise=noise, generator=torch.Generator())
    torch.testing.assert_close(vae.decode(vae.encode(video)), vae.decoder(vae.post_quant_conv(mean)))


def test_kl_divergence() -> None:
    moments = torch.stack(
        [torch.zeros(8, 2, 1, 3), torch.cat([torch.full((4, 2, 1, 3), 2.0), torch.zeros(4, 2, 1, 3)])]
    )
    torch.testing.assert_close(kl_divergence(moments), torch.tensor([0.0, 0.5 * 4 * 24]))
    normal = torch.distributions.Normal(torch.tensor(0.3), torch.tensor(0.7))
    one = torch.tensor([0.3, 2 * torch.tensor(0.7).log()]).view(1, 2, 1, 1, 1)
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_divergence(one)[0], wanted)


def test_every_parameter_has_a_gradient() -> None:
    vae = make_vae()
    vae.decode(vae.encode(make_video(5, 16, 16))).square().mean().backward()
    assert not [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("method", ["encode", "encode_moments", "decode"])
def test_bad_inputs_are_named(method: str) -> None:
    call = getattr(make_vae(), method)
    channels = 4 if method == "decode" else 3
    for bad in (torch.zeros(1, 2, 1, 8, 8), torch.zeros(1, channels, 8, 8), torch.zeros(1, channels, 0, 8, 8)):
        with pytest.raises(ValueError, match=r"must be \(batch, \d, frames, height, width\)"):
            call(bad)
    with pytest.raises(ValueError, match="dtype of the weights"):
        call(torch.zeros(1, channels, 1, 8, 8, dtype=torch.float64))
