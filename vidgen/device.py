# SPDX-License-Identifier: Apache-2.0
"""The one place that knows device names: which device to use, what it computes in, how its processes talk, its memory.

Beside it only the kernel library (``ops``) names devices, where backends join their ops.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = ("cpu", "cuda", "npu")
NAMES = ("auto", *KINDS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMMUNICATION = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}  # backend of torch.distributed on each kind

# Dense bfloat16 TFLOP/s of matrix units, by a part of the name that the driver gives; first match counts. Those of
# Ascend are missing: its makers publish figures of servers and cards, not of the names that the driver knows.
PEAKS: tuple[tuple[str, float, str], ...] = (
    ("B200", 2250.0, "NVIDIA DGX B200 datasheet, half of the figure with sparsity, one of eight"),
    ("H200", 989.5, "NVIDIA H200 datasheet, half of the figure with sparsity"),
    ("H100 PCIe", 756.5, "NVIDIA H100 datasheet, half of the figure with sparsity"),
    ("H100 NVL", 835.5, "NVIDIA H100 datasheet, half of the figure with sparsity"),
    ("H100", 989.5, "NVIDIA H100 datasheet (SXM), half of the figure with sparsity"),
    ("A100", 312.0, "NVIDIA A100 datasheet"),
    ("L40S", 362.0, "NVIDIA L40S datasheet"),
)


def resolve(name: str = "auto") -> torch.device:
    """The device called ``name``: "cpu", "cuda", "npu", one with an index ("cuda:1"), or "auto" for the best present.

    Raises:
        ValueError: an unknown name, or a device that this machine or this PyTorch does not have.
    """
    kind, _, index = name.partition(":")
    if kind not in NAMES or (index and not index.isdecimal()) or (kind == "auto" and index):
        raise ValueError(f"device: wanted one of {', '.join(NAMES)}, with an index such as cuda:1, got {name!r}")
    if kind == "auto":
        return next(torch.device(best) for best in ("cuda", "npu", "cpu") if why_not(best) is None)
    if (reason := why_not(kind)) is not None:
        raise ValueError(f"device: {name!r} cannot be used here: {reason}")
    if kind != "cpu" and int(index or 0) >= (count := _module(kind).device_count()):
        raise ValueError(f"device: {name!r} cannot be used here: there are {count}")
    return torch.device(name)


def why_not(kind: str) -> str | None:
    """Why there is no device of this kind, or None where there is one."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device is visible"
    try:
        importlib.import_module("torch_npu")
    except ImportError as error:
        return f"torch_npu cannot be imported ({error})"
    return None if _module("npu").is_available() else "no NPU is visible"


def communication_backend(device: torch.device) -> str:
    """What processes on such devices talk through: the name for ``torch.distributed.init_process_group``."""
    return COMMUNICATION[device.type]


def communication_backends(device: torch.device) -> str:
    """The same, with one for tensors on the host beside that of the device."""
    own = communication_backend(device)
    return own if device.type == "cpu" else f"cpu:{COMMUNICATION['cpu']},{device.type}:{own}"


def of_process(name: str, local_rank: int) -> torch.device:
    """The device of one of several processes on a machine, made the current one: that of its number, unless the name
    says which.

    Raises:
        ValueError: see `resolve`.
    """
    device = resolve(name)
    if device.type == "cpu":
        return device
    if device.index is None:
        device = resolve(f"{device.type}:{local_rank}")
    _module(device.type).set_device(device)
    return device


def why_not_dtype(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the device does not train and sample in this dtype, or None where it does.

    float64 is for tests of formulas: the matrix units of Ascend have no float64, those of consumer GPUs hardly any.
    """
    if dtype in (torch.float32, torch.float16) or (dtype == torch.float64 and device.type != "npu"):
        return None
    if dtype == torch.bfloat16:
        if device.type == "cpu" or _module(device.type).is_bf16_supported(including_emulation=False):
            return None
        return f"{_module(device.type).get_device_name(device)} does not compute in bf16"
    return f"{device.type} does not compute in {str(dtype).removeprefix('torch.')}"


def compute_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The dtype that weights and activations have under ``precision`` ("fp32" or "bf16").

    There is no autocast: a model is cast as a whole, and the optimizer keeps the float32 master copy.

    Raises:
        ValueError: unknown precision, or one that the device does not compute in.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision: wanted one of {', '.join(DTYPES)}, got {precision!r}")
    if (reason := why_not_dtype(device, DTYPES[precision])) is not None:
        raise ValueError(f"precision: {reason}; use fp32")
    return DTYPES[precision]


def peak_flops(device: torch.device) -> tuple[float, str] | None:
    """FLOP/s of the device's matrix units in dense bfloat16, and who says so; None where nobody is known to."""
    if device.type == "cpu":
        return None
    name = _module(device.type).get_device_name(device)
    found = (peak for peak in PEAKS if peak[0].lower() in name.lower())
    return next(((tflops * 1e12, source) for _, tflops, source in found), None)


def profiler(device: torch.device) -> tuple[Any, list[Any]]:
    """The module with ``profile`` and ``schedule`` for this device, and the activities that it is to record."""
    if device.type == "npu":
        library = importlib.import_module("torch_npu").profiler
        return library, [library.ProfilerActivity.CPU, library.ProfilerActivity.NPU]
    activity = torch.profiler.ProfilerActivity
    return torch.profiler, [activity.CPU] if device.type == "cpu" else [activity.CPU, activity.CUDA]


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on the device has run."""
    if device.type != "cpu":
        _module(device.type).synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: by the allocator of an accelerator, or by this process on a CPU (resident set)."""
    if device.type != "cpu":
        return int(_module(device.type).max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():  # of this program alone; getrusage begins with what the one that started it had
        lines = (line.split() for line in status.read_text().splitlines())
        if found := [int(words[1]) for words in lines if words[0] == "VmHWM:"]:
            return found[0] * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes everywhere but there


def describe(device: torch.device) -> str:
    """The device in words, as it stands in reports."""
    if device.type == "cpu":
        return f"cpu ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    return f"{device.type} ({_module(device.type).get_device_name(device)})"


def rng_state(device: torch.device) -> torch.Tensor | None:
    """State of the device's own random generator, None on a CPU (whose generator is torch's global one)."""
    return None if device.type == "cpu" else _module(device.type).get_rng_state(device)


def set_rng_state(device: torch.device, state: torch.Tensor) -> None:
    """Restore what `rng_state` returned."""
    _module(device.type).set_rng_state(state, device)


def _module(kind: str) -> Any:
    return getattr(torch, kind)


# What is installed below PyTorch


def software() -> dict[str, str | None]:
    """Versions of drivers and toolkits, None where there is none; read from files and variables, nothing is started."""
    home = cann_home()
    return {
        "CUDA of this PyTorch": torch.version.cuda,
        "CUDA driver": _match(Path("/proc/driver/nvidia/version"), r"Kernel Module(?: for \S+)?\s+(\S+)"),
        "CUDA toolkit": _cuda_toolkit(),
        "CANN": None if home is None else cann_version(home) or "unknown version",
        "HCCL": None if home is None else _component(home, "hccl"),
        "Ascend driver": _match(Path("/usr/local/Ascend/driver/version.info"), r"^Version\s*=\s*(\S+)"),
        "CUDA device": _first_name("cuda"),
        "SoC": _first_name("npu"),
    }


def _first_name(kind: str) -> str | None:
    return None if why_not(kind) is not None else str(_module(kind).get_device_name(0))


def cann_home() -> Path | None:
    """The folder of CANN, which its ``set_env.sh`` names, or None."""
    home = os.environ.get("ASCEND_HOME_PATH")
    return Path(home) if home and Path(home).is_dir() else None


def cann_version(home: Path) -> str | None:
    """What the version files of a CANN folder say, wherever its releases have kept them."""
    for pattern, expression in (
        ("*-linux/ascend_toolkit_install.info", r"^version\s*=\s*(\S+)"),
        ("version.cfg", r"toolkit_installed_version\s*=\s*\[?(?:[^:\]]*:)?([^:\]\s]+)"),
        ("compiler/version.info", r"^Version\s*=\s*(\S+)"),
        ("runtime/version.info", r"^Version\s*=\s*(\S+)"),
        ("share/info/*/version.info", r"^Version\s*=\s*(\S+)"),
    ):
        for file in sorted(home.glob(pattern)):
            if (found := _match(file, expression)) is not None:
                return found
    return None


def _component(home: Path, name: str) -> str | None:
    for pattern in (f"{name}/version.info", f"share/info/{name}/version.info"):
        if (found := _match(home / pattern, r"^Version\s*=\s*(\S+)")) is not None:
            return found
    return "part of CANN" if any((home / "lib64").glob(f"lib{name}.so*")) else None


def _cuda_toolkit() -> str | None:
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    return _match(home / "version.json", r'"cuda"\s*:\s*\{[^}]*"version"\s*:\s*"([^"]+)"')


def _match(file: Path, expression: str) -> str | None:
    try:
        found = re.search(expression, file.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found.group(1) if found else None


# Variables of the environment


@dataclass(frozen=True)
class Variable:
    """A variable that drivers, allocators and compilers read when a process starts.

    ``suggested`` is None where the right value depends on the machine. Nothing here sets any of them.
    """

    name: str
    kind: str
    meaning: str
    suggested: str | None = None
    why: str = ""


VARIABLES = (
    Variable(
        "OMP_NUM_THREADS",
        "cpu",
        "threads of each process",
        why="processes times threads should not exceed the cores",
    ),
    Variable(
        "MALLOC_MMAP_THRESHOLD_",
        "cpu",
        "results above this many bytes are mapped anew each time (C library, default at most 32 MiB)",
        "8589934592",
        "paging in every large result costs more than most ops; jemalloc or tcmalloc serve as well",
    ),
    Variable(
        "MALLOC_TRIM_THRESHOLD_",
        "cpu",
        "memory above this many free bytes goes back to the system",
        "17179869184",
        "keeps memory for the next step",
    ),
    Variable(
        "MALLOC_TOP_PAD_", "cpu", "bytes that the heap grows by beyond what is asked for", "268435456", "fewer calls"
    ),
    Variable("CUDA_VISIBLE_DEVICES", "cuda", "devices that the process sees, by number"),
    Variable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "cuda",
        "how PyTorch's allocator keeps memory",
        "expandable_segments:True",
        "clips of several sizes fragment memory otherwise",
    ),
    Variable(
        "CUDA_LAUNCH_BLOCKING", "cuda", "1: every kernel is waited for", why="only to find where an error comes from"
    ),
    Variable(
        "ASCEND_HOME_PATH",
        "npu",
        "folder of CANN, set by its set_env.sh",
        why="source set_env.sh, which sets the search paths too",
    ),
    Variable("ASCEND_OPP_PATH", "npu", "folder of CANN's operators, set by set_env.sh", why="see ASCEND_HOME_PATH"),
    Variable("ASCEND_RT_VISIBLE_DEVICES", "npu", "devices that the process sees, by number"),
    Variable(
        "PYTORCH_NPU_ALLOC_CONF",
        "npu",
        "how torch_npu's allocator keeps memory",
        "expandable_segments:True",
        "clips of several sizes fragment memory otherwise; not together with max_split_size_mb",
    ),
    Variable(
        "MULTI_STREAM_MEMORY_REUSE",
        "npu",
        "memory of one stream may serve another (0, 1, 2)",
        "1",
        "communication runs on its own stream and would hold memory",
    ),
    Variable(
        "TASK_QUEUE_ENABLE",
        "npu",
        "how far Python runs ahead of the device: 0 waits, 1 queues launches, 2 prepares them in the queue too",
        "2",
        "hides the time of launches; takes a little more memory; 0 to see where an error comes from",
    ),
    Variable(
        "CPU_AFFINITY_CONF",
        "npu",
        "binds the threads that launch to cores: 0 no, 1 a range for each device, 2 a core for each thread",
        "1",
        "launching threads lose time when they move between cores",
    ),
    Variable(
        "COMBINED_ENABLE",
        "npu",
        "1: copies of tensors that are not contiguous are joined where two follow each other",
        "1",
        "views of qkv and of groups are such tensors",
    ),
    Variable(
        "ACLNN_CACHE_LIMIT",
        "npu",
        "how many calls CANN keeps prepared (default 10000)",
        "100000",
        "clips of many sizes make many calls",
    ),
    Variable(
        "ACL_OP_INIT_MODE",
        "npu",
        "when CANN loads its older operator compiler: 0 at start, 1 when needed, 2 never by itself",
        why="1 shortens the start",
    ),
    Variable(
        "ASCEND_LAUNCH_BLOCKING",
        "npu",
        "1: every kernel is waited for, and the queue of TASK_QUEUE_ENABLE is off",
        "0",
        "1 only to find where an error comes from",
    ),
    Variable(
        "ASCEND_GLOBAL_LOG_LEVEL", "npu", "0 debug, 1 info, 2 warning, 3 error, 4 nothing", "3", "lower ones are slow"
    ),
    Variable(
        "ASCEND_SLOG_PRINT_TO_STDOUT", "npu", "1: CANN's log goes to the screen instead of files", "0", "see above"
    ),
    Variable(
        "INF_NAN_MODE_ENABLE",
        "npu",
        "1: overflow gives inf and nan as IEEE 754 says; 0: it saturates",
        "1",
        "steps that are not finite are found by their inf and nan",
    ),
    Variable("NPU_ASD_ENABLE", "npu", "1 to 3: gradients are watched for faults of the hardware", "0", "costs time"),
    Variable(
        "HCCL_CONNECT_TIMEOUT",
        "npu",
        "seconds that processes wait for each other when they connect (120 to 7200, default 120)",
        "1200",
        "loading weights takes longer on some processes than on others",
    ),
    Variable(
        "HCCL_EXEC_TIMEOUT",
        "npu",
        "seconds that a collective waits for the other processes (68 to 17340, default 1800)",
        why="longer than the longest checkpoint or evaluation",
    ),
    Variable(
        "HCCL_BUFFSIZE",
        "npu",
        "MiB of buffer for each communicator (default 200)",
        why="there are many communicators with context parallelism; they add up",
    ),
    Variable(
        "HCCL_DETERMINISTIC",
        "npu",
        "true: sums of collectives come in one order",
        why="true to repeat a run bit for bit; costs time",
    ),
    Variable("HCCL_WHITELIST_DISABLE", "npu", "1: any machine may connect", "1", "0 needs a file that lists them"),
    Variable("HCCL_SOCKET_IFNAME", "npu", "network interface over which processes find each other"),
    Variable("HCCL_IF_BASE_PORT", "npu", "first port that they use"),
    Variable(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "npu",
        "0: importing torch does not import torch_npu",
        why="vidgen imports it when the device is first asked for",
    ),
)
