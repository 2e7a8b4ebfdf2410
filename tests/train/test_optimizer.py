# SPDX-License-Identifier: Apache-2.0
import copy
import io

import pytest
import torch

from vidgen.train.optimizer import EMAAdamW

HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make(dtype=torch.float32, **hyper):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((3, 4), (5,))]
    return params, EMAAdamW(params, **{**HYPER, **hyper})


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(params, optimizer, steps):
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def test_weights_are_those_of_torch_adamw():
    params, optimizer = make()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    reference = torch.optim.AdamW(twins, **HYPER)
    run(params, optimizer, range(5))
    run(twins, reference, range(5))
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_average_follows_its_warmup():
    params, optimizer = make(ema_decay=0.3)
    expected = [p.detach().clone() for p in params]
    for step, decay in enumerate((2 / 11, 0.25, 0.3, 0.3)):  # (1+n)/(10+n) until it exceeds 0.3
        run(params, optimizer, [step])
        expected = [decay * s + (1 - decay) * p.detach() for s, p in zip(expected, params, strict=True)]
        for average, wanted in zip(optimizer.ema_parameters(), expected, strict=True):
            torch.testing.assert_close(average, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(dtype):
    params, optimizer = make(dtype)
    run(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    run(params, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second = make(dtype)
    with torch.no_grad():
        for p, value in zip(resumed, saved["params"], strict=True):
            p.copy_(value)
    second.load_state_dict(saved["optimizer"])
    run(resumed, second, range(3, 6))
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert value.dtype == second.state[b][name].dtype and torch.equal(value, second.state[b][name]), name


def test_resume_keeps_the_warmup_unless_told_not_to():
    params, optimizer = make()
    run(params, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for restart, n in ((False, 4), (True, 0)):
        _, resumed = make()
        resumed.load_state_dict(copy.deepcopy(saved), restart_ema_warmup=restart)
        assert resumed.param_groups[0]["num_steps"] == n


def test_bfloat16_accumulates_steps_smaller_than_its_spacing():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = EMAAdamW([p], lr=1e-3, weight_decay=0.0, ema_decay=0.0)
    for _ in range(8):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # one step of 1e-3 is lost below 1 in bfloat16 (spacing 2^-8 = 3.9e-3), eight are not
    assert p.dtype == torch.bfloat16 and p[0] < 0.995
    assert optimizer.state[p]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[p]["master"], torch.full((4,), 0.992), rtol=1e-4, atol=0)
    assert torch.equal(optimizer.ema_parameters()[0], optimizer.state[p]["master"])  # averaged before rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_use_ema_swaps_and_restores(dtype):
    params, optimizer = make(dtype)
    run(params, optimizer, range(3))
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyError), optimizer.use_ema():
        for p, average in zip(params, optimizer.ema_parameters(), strict=True):
            assert torch.equal(p, average.to(dtype))
        assert not torch.equal(params[0], before[0])
        raise KeyError("a failure inside must restore too")
    assert all(torch.equal(p, value) for p, value in zip(params, before, strict=True))


def test_step_inside_use_ema_is_refused():
    params, optimizer = make()
    run(params, optimizer, [0])
    with optimizer.use_ema(), pytest.raises(RuntimeError, match="use_ema"):
        optimizer.step()


def test_parameter_without_gradient_stays():
    params, optimizer = make()
    before = params[1].detach().clone()
    give_gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before) and torch.equal(optimizer.ema_parameters()[1], before)
    make()[1].load_state_dict(optimizer.state_dict())
    # the bias correction of a late starter begins at its own first step
    run(params, optimizer, [1])
    assert optimizer.state[params[1]]["step"] == 1 and optimizer.state[params[0]]["step"] == 2


def test_without_average():
    params, optimizer = make(ema_decay=None)
    run(params, optimizer, range(2))
    assert "ema" not in optimizer.state[params[0]]
    with pytest.raises(ValueError, match="ema_decay is None"):
        optimizer.ema_parameters()


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": float("nan")}, {"ema_decay": 1.0}]
)
def test_bad_hyperparameters_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)


def test_foreign_state_is_refused():
    params, optimizer = make()
    adam = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
    run(adam.param_groups[0]["params"], adam, [0])
    with pytest.raises(ValueError, match="lacks ema"):
        optimizer.load_state_dict(adam.state_dict())


def test_average_without_warmup():
    """Open-Sora 2.0: the same decay from the first step on."""
    params, optimizer = make(ema_decay=0.9, ema_warmup=False)
    expected = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, params, strict=True)]
    for average, wanted in zip(optimizer.ema_parameters(), expected, strict=True):
        torch.testing.assert_close(average, wanted)
