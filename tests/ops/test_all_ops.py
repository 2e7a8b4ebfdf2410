# SPDX-License-Identifier: Apache-2.0
"""The battery that every op passes, over its own samples. Truth is the reference in float64.

TEST_DEVICE=cuda runs it on that device, on the implementations that ops have there (`make test-device DEVICE=cuda`).
"""

import contextlib
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidgen import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
EXAMPLES = int(os.environ.get("EXAMPLES", 60 if DEVICE.type == "cpu" else 15))  # elsewhere each may be compiled first
MANY = 400  # elements of inputs
TRACED = 4  # samples
if DEVICE.type == "cuda":
    torch.backends.cudnn.allow_tf32 = False  # else convolutions of float32 have the accuracy of 16 bits
    torch.backends.cudnn.deterministic = True  # PyTorch's convolutions promise the same bits only where they are told
ALL = list(ops.OPS.values())
BACKENDS = ["default", "reference"]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def sampled(dtypes, which=lambda op: True):
    """One case per op, dtype and sample; the arguments are drawn when the test runs."""
    return [
        pytest.param(op, dtype, i, id=f"{op.name}-{short(dtype)}-{i}")
        for op in ALL
        if which(op)
        for dtype in dtypes
        for i in range(len(op.samples(CPU, torch.float32)))
    ]


def arguments(op, dtype, i):
    torch.manual_seed(i)
    return op.samples(DEVICE, dtype)[i]


def differentiable(op):
    return op.differentiable


def tensors(values):
    values = values if isinstance(values, (tuple, list)) else (values,)
    return [v for v in values if isinstance(v, torch.Tensor)]


def mapped(f, args):
    return tuple(f(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)


def widen(args):
    return mapped(lambda a: a.double(), args)


def on_backend(name):
    return contextlib.nullcontext() if name == "default" else ops.use_backend(name)


def on_neighbours(op, args):
    """For each result, at inputs off by a rounding of float32, in which kernels compute: eager's largest error, and how
    far the true result moves.

    Eager is lucky at times where errors of long sums cancel, and no float32 formula can be expected to do better than
    its inputs' roundings where a case is ill-conditioned (the norm of few, nearly equal numbers).
    """
    signs, eps = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps

    def off(a):
        return (a.double() * (1 + eps * (2 * torch.randint(2, a.shape, generator=signs).to(a.device) - 1))).to(a.dtype)

    def distances(xs, ys):
        gaps = [(x.double() - y).abs().nan_to_num(0) for x, y in zip(xs, ys, strict=True)]
        return torch.tensor([gap.amax() if gap.numel() else 0.0 for gap in gaps])

    truth, errors, moves = tensors(op.reference(*widen(args))), [], []
    for _ in range(3):
        near = mapped(off, args)
        there = tensors(op.reference(*widen(near)))
        errors.append(distances(tensors(op.reference(*near)), there))
        moves.append(distances(there, truth))
    return torch.stack(errors).amax(0).tolist(), torch.stack(moves).amax(0).tolist()


def assert_as_accurate_as_eager(op, args):
    """error(op) <= 2 * error(reference in its dtype) + one rounding of the largest true value; gradients 3 and 2."""
    factor, roundings = (3.0, 2.0) if op.name.endswith("_backward") else (2.0, 1.0)
    truth = tensors(op.reference(*widen(args)))
    eager, ours = tensors(op.reference(*args)), tensors(op(*args))
    assert len(truth) == len(eager) == len(ours)
    for i, (y, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert y.shape == t.shape and y.dtype == e.dtype
        if not y.is_floating_point():
            assert torch.equal(y, t)
        elif y.numel():
            finite = t.isfinite()
            assert torch.equal(y.isfinite(), e.isfinite()), "finite where eager is not, or the reverse"
            error = (y.double() - t)[finite].abs().amax().item() if finite.any() else 0.0
            allowed = (e.double() - t)[finite].abs().amax().item() if finite.any() else 0.0
            scale = t[finite].abs().amax().item() if finite.any() else 0.0
            slack = roundings * torch.finfo(e.dtype).eps * max(scale, 1.0)
            if error > factor * allowed + slack:
                errors, moves = on_neighbours(op, args)
                assert error <= factor * max(allowed, errors[i]) + slack + moves[i]


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_op_is_complete(op):
    assert op.reference and op.check and op.samples(CPU, torch.float32)
    assert op.composite or op.fake
    workloads = op.workloads(CPU, torch.float32)
    assert workloads or not op.differentiable, "an op that users call has a benchmark workload"
    assert op.cost(*op.samples(CPU, torch.float32)[0]).bytes >= 0
    if not op.name.endswith("_backward"):
        public = getattr(ops, op.name)
        assert op.name in ops.__all__ and public.__doc__ and "Raises" in public.__doc__


@pytest.mark.parametrize("op, dtype, i", sampled(DTYPES))
def test_error_is_at_most_twice_that_of_eager(op, dtype, i):
    assert_as_accurate_as_eager(op, arguments(op, dtype, i))


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32, torch.bfloat16]))
def test_inputs_are_left_alone_and_results_repeat(op, dtype, i):
    args = arguments(op, dtype, i)
    before = mapped(torch.clone, args)
    first, second = tensors(op(*args)), tensors(op(*args))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors(args), tensors(before), strict=True))


def row(op, args, i):
    """The arguments of row ``i`` of the batch alone; parameters and tables belong to every row."""
    batch = args[0].shape[0]
    names = [a.name for a in op.overload._schema.arguments]

    def pick(name, a):
        if not isinstance(a, torch.Tensor) or a.dim() < 2:
            return a
        shared = name == "weight" or (name in ("cos", "sin") and a.dim() == 2)
        return a if shared or a.shape[0] != batch else a[i : i + 1]

    return tuple(pick(name, a) for name, a in zip(names, args, strict=True))


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32], differentiable))
def test_a_row_of_a_batch_equals_the_call_on_that_row(op, dtype, i):
    args = arguments(op, dtype, i)
    whole = tensors(op(*args))
    for b in range(args[0].shape[0]):
        for alone, y in zip(tensors(op(*row(op, args, b))), whole, strict=True):
            if op.composite or "reference: runs" in op.explain(*args):
                # library calls may block a batch otherwise than a row
                torch.testing.assert_close(alone, y[b : b + 1])
            else:
                assert torch.equal(alone, y[b : b + 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, dtype, i", sampled([torch.float64], differentiable))
def test_gradients(op, dtype, i, backend):
    args = mapped(lambda a: a.detach().requires_grad_(), arguments(op, dtype, i))
    large = sum(a.numel() for a in tensors(args)) > MANY  # then along a random direction, not for each element
    with on_backend(backend):
        assert torch.autograd.gradcheck(op, args, fast_mode=large, nondet_tol=0.0)


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32, torch.bfloat16], differentiable))
def test_gradients_are_as_accurate_as_eager(op, dtype, i):
    """The kernels' backward, which float64 does not reach, against autograd through the reference."""
    args = arguments(op, dtype, i)

    def gradients(f, args):
        args = mapped(lambda a: a.detach().clone().requires_grad_(), args)
        out = [y for y in tensors(f(*args)) if y.requires_grad]
        torch.manual_seed(0)
        seeds = [torch.randn(y.shape).to(y.device, y.dtype) for y in out]
        leaves = [a for a in tensors(args) if a.requires_grad]
        return torch.autograd.grad(out, leaves, [s.to(y.dtype) for s, y in zip(seeds, out, strict=True)],
                                   allow_unused=True)  # fmt: skip

    truth = gradients(op.reference, widen(args))
    eager, ours = gradients(op.reference, args), gradients(op, args)
    for y, e, t in zip(ours, eager, truth, strict=True):
        assert (y is None) == (t is None)
        if y is not None and y.numel():
            error, allowed = (y.double() - t).abs().amax().item(), (e.double() - t).abs().amax().item()
            bound = 3 * allowed + 2 * torch.finfo(y.dtype).eps * max(t.abs().amax().item(), 1.0)
            if op.composite and DEVICE.type != "cpu":  # PyTorch's own kernels, which PyTorch tests to this tolerance
                torch.testing.assert_close(y.double(), t, rtol=0, atol=max(bound, 1e-5))
            else:
                assert error <= bound


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32]))
def test_opcheck(op, dtype, i):
    args = arguments(op, dtype, i)
    if op.differentiable:
        args = mapped(lambda a: a.detach().requires_grad_(), args)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if i < TRACED:  # with gradients and sizes that vary; test_compiles_whole traces every sample
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op.overload, args, test_utils=tests)


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32]))
def test_compiles_whole(op, dtype, i):
    args = arguments(op, dtype, i)
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), op(*args), equal_nan=True)


@pytest.mark.parametrize("op, dtype, i", sampled(DTYPES))
def test_every_output_is_written_and_nothing_else(op, dtype, i, native):
    args = arguments(op, dtype, i)
    expected = tensors(op(*args))
    native.guard_outputs(True)
    try:
        got = [y.clone() for y in tensors(op(*args))]
        assert native.count_damaged_guards() == 0
    finally:
        native.guard_outputs(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


if DEVICE.type != "cpu":  # there the compiled kernels have the stricter test above

    @pytest.mark.parametrize("op, dtype, i", sampled(DTYPES))
    def test_every_output_is_written_on_this_device(op, dtype, i):
        """PyTorch fills what it allocates with NaN while it is told to be deterministic."""
        args = arguments(op, dtype, i)
        expected = tensors(op(*args))
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            got = tensors(op(*args))
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32]))
def test_reference_does_not_depend_on_uninitialised_memory(op, dtype, i, monkeypatch):
    args = arguments(op, dtype, i)
    with ops.use_backend("reference"):
        expected = tensors(op(*args))
        for name in ("empty", "empty_like", "empty_strided"):
            plain = getattr(torch, name)

            def poisoned(*a, _plain=plain, **k):
                t = _plain(*a, **k)
                return t.fill_(float("nan")) if t.is_floating_point() else t

            monkeypatch.setattr(torch, name, poisoned)
        got = tensors(op(*args))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op, dtype, i", sampled([torch.float32, torch.bfloat16], lambda op: op.out_shape))
def test_out_form_writes_the_same_result(op, dtype, i):
    args = arguments(op, dtype, i)
    expected = op(*args)
    margin = torch.full((expected.numel() + 128,), float("nan"), dtype=dtype, device=DEVICE)
    out = margin[64:-64].view(expected.shape)
    assert op.into(out, *args) is out
    assert torch.equal(out, expected)
    assert margin[:64].isnan().all() and margin[-64:].isnan().all()


@pytest.mark.parametrize("op", [op for op in ALL if op.out_shape], ids=lambda op: op.name)
def test_out_form_refuses_what_does_not_fit(op):
    cases = (arguments(op, torch.float32, i) for i in range(len(op.samples(CPU, torch.float32))))
    args = next(args for args in cases if op(*args).numel() > 1)
    result = op(*args)
    with pytest.raises(ValueError, match=f"{op.name}: out must be"):
        op.into(result[:0], *args)
    with pytest.raises(ValueError, match=f"{op.name}: out must be"):
        op.into(result.double(), *args)
    with pytest.raises(ValueError, match="does not support autograd"):
        op.into(result.requires_grad_(), *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape_and_stride(op, dtype, data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    args = op.random_args(lambda options: data.draw(st.sampled_from(options)), DEVICE, dtype)
    assert_as_accurate_as_eager(op, args)


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_a_forced_backend_that_does_not_exist_is_an_error(op):
    args = arguments(op, torch.float32, 0)
    with ops.use_backend("absent"), pytest.raises(ValueError, match=f"no backend 'absent' on {DEVICE.type}"):
        op(*args)


@pytest.mark.parametrize("op", ALL, ids=lambda op: op.name)
def test_explain_names_every_candidate_once(op):
    lines = ops.explain(op.name, *arguments(op, torch.float32, 0)).splitlines()
    assert [line.split(":")[0] for line in lines] == ops.table(DEVICE.type)[op.name]
    assert sum(line.endswith("runs") for line in lines) == 1


def test_explain_of_an_unknown_op_lists_the_known_ones():
    with pytest.raises(ValueError, match="adaln_modulate"):
        ops.explain("no_such_op")
