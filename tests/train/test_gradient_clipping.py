# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from vidgen.train.gradient_clipping import AdaptiveGradientClipping, PerRankGradientClipping, gradient_norm


def parameters(norm: float) -> list[torch.Tensor]:
    """Two parameters whose gradients have this norm together."""
    params = [torch.zeros(3, 2, requires_grad=True), torch.zeros(4, requires_grad=True)]
    for p, share in zip(params, (0.6, 0.8), strict=True):
        p.grad = torch.full_like(p, norm * share / math.sqrt(p.numel()))
    return params


def feed(clipping, norms):
    return [clipping(parameters(norm)) for norm in norms]


def test_first_step_sets_the_average_and_clips_nothing():
    for norm, average in ((0.05, 0.15), (100.0, 1.0)):
        clipping = AdaptiveGradientClipping()
        (result,) = feed(clipping, [norm])
        assert result.norm_after == pytest.approx(norm) and not result.skip and result.threshold is None
        assert clipping.average == pytest.approx(average) and clipping.variance == 0


def test_normal_norm_moves_average_then_variance():
    clipping = AdaptiveGradientClipping(decay=0.9)
    feed(clipping, [0.5, 0.6])
    assert clipping.average == pytest.approx(0.96)
    assert clipping.variance == pytest.approx(0.1 * (0.96 - 0.6) ** 2)


def test_spike_is_scaled_to_the_threshold_and_not_learned():
    clipping = AdaptiveGradientClipping()
    feed(clipping, [0.5, 0.6])
    before = clipping.state_dict()
    params = parameters(3.0)
    result = clipping(params)
    assert result.threshold == pytest.approx(0.996 + 3 * 0.1 * (0.996 - 0.6))
    assert result.coefficient == pytest.approx(3.0 / result.threshold)
    assert gradient_norm([p.grad for p in params]) == pytest.approx(result.threshold, rel=1e-5)
    assert result.norm_after == pytest.approx(result.threshold, rel=1e-5)
    assert not result.skip and clipping.state_dict() == before


@pytest.mark.parametrize("norm", [8.0, math.inf, math.nan])
def test_extreme_step_is_skipped_and_leaves_no_trace(norm):
    clipping = AdaptiveGradientClipping()
    feed(clipping, [0.5, 0.6])
    average = clipping.average
    result = clipping(parameters(norm))
    assert result.skip and result.extreme and not result.stop and result.finite == math.isfinite(norm)
    assert clipping.average == average and clipping.extreme_seen
    assert not clipping(parameters(0.5)).skip


def test_original_applies_the_extreme_step_and_stops():
    clipping = AdaptiveGradientClipping(reproduce_original=True)
    results = feed(clipping, [0.5, 8.0, 0.5])
    assert [r.skip for r in results] == [False] * 3
    assert [r.stop for r in results] == [False, True, True]
    resumed = AdaptiveGradientClipping(reproduce_original=True)
    resumed.load_state_dict(clipping.state_dict())
    assert resumed(parameters(0.5)).stop


def test_first_step_not_finite():
    ours, original = AdaptiveGradientClipping(), AdaptiveGradientClipping(reproduce_original=True)
    assert feed(ours, [math.nan])[0].skip and ours.average is None
    assert not feed(original, [math.nan])[0].skip and math.isnan(original.average)


def test_saved_state_continues_the_same_way():
    norms = [0.5, 0.6, 0.4, 1.9, 0.5]
    straight, first, second = (AdaptiveGradientClipping() for _ in range(3))
    expected = feed(straight, norms)[2:]
    feed(first, norms[:2])
    second.load_state_dict(first.state_dict())
    assert feed(second, norms[2:]) == expected
    with pytest.raises(ValueError, match="wanted average"):
        second.load_state_dict({"ema": 1.0})


def test_half_precision_gradients_are_summed_in_float32():
    grad = torch.full((300, 300), 0.01, dtype=torch.bfloat16)
    assert gradient_norm([grad]) == pytest.approx(300 * float(grad[0, 0]), rel=1e-5)


def test_single_rank_drops_its_spike():
    clipping = PerRankGradientClipping()
    feed(clipping, [0.5, 0.6])
    average = clipping.average
    for norm in (2.0, math.nan):
        params = parameters(norm)
        result = clipping(params)
        assert result.norm_after == 0 and result.coefficient == 0 and result.skip
        assert all((p.grad == 0).all() for p in params)
        average = 0.99 * average
        assert clipping.average == pytest.approx(average)


def _two_ranks(rank: int, port: int, queue) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    clipping = PerRankGradientClipping(process_group=dist.group.WORLD)
    results = [clipping(parameters(norm)) for norm in ((0.5, 0.5), (0.8, 3.0))[rank]]
    queue.put((rank, results[1].norm_after, results[1].coefficient, results[1].skip, clipping.average))
    dist.destroy_process_group()


def test_two_ranks_share_the_burden():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_two_ranks, args=(rank, port, queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    # rank 1's spike is dropped, rank 0 counts twice; the average is fed 0.5 * (0.5 / 0.5)
    for rank, after, fraction, skip, average in sorted(queue.get() for _ in range(2)):
        assert (after, fraction, skip) == (pytest.approx(0.0 if rank else 1.0, rel=1e-4), 0.5, False)
        assert average == pytest.approx(0.99 + 0.01 * 0.5, rel=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="decay"):
        AdaptiveGradientClipping(decay=1.0)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        AdaptiveGradientClipping()([torch.zeros(2)])
