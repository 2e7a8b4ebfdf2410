# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for the CANN libraries, so that torch_npu can be imported where there is neither CANN nor an Ascend device.

Every C function that torch_npu wants from CANN exists and returns 0 or a chosen value; nothing is computed. One device
appears whose memory is host memory: allocation, copies, streams and events work. A kernel launch raises, because a stub
that returned success would leave the output buffer as it was. Never put these on the library path of a process that is
meant to use CANN, and never ship them.

Needs gcc, nm and readelf. environment.py runs ``python cann_stubs.py OUT PACKAGES``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SOC = "Ascend910B3"

# Bodies of the functions whose result matters. The old way to launch a kernel (aclop...) fails; the entry points of the
# new one (aclnn...) are left out altogether, so that looking them up fails.
SPECIAL = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *c) { if (c) *c = 1; return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *d) { if (d) *d = 0; return 0; }",
    "aclrtGetSocName": f'const char *aclrtGetSocName(void) {{ return "{SOC}"; }}',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "CANN stub: there is no device"; }',
    "aclrtMalloc": "int aclrtMalloc(void **p, size_t n, int k)"
    " { *p = aligned_alloc(512, (n + 511) / 512 * 512); return *p ? 0 : 207001; }",
    "aclrtMallocAlign32": "int aclrtMallocAlign32(void **p, size_t n, int k) { return aclrtMalloc(p, n, k); }",
    "aclrtFree": "int aclrtFree(void *p) { free(p); return 0; }",
    "aclrtMallocHost": "int aclrtMallocHost(void **p, size_t n) { return aclrtMalloc(p, n, 0); }",
    "aclrtFreeHost": "int aclrtFreeHost(void *p) { free(p); return 0; }",
    "aclrtMemcpy": "int aclrtMemcpy(void *d, size_t m, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }",
    "aclrtMemcpyAsync": "int aclrtMemcpyAsync(void *d, size_t m, const void *s, size_t n, int k, void *q)"
    " { memcpy(d, s, n); return 0; }",
    "aclrtMemset": "int aclrtMemset(void *d, size_t m, int v, size_t n) { memset(d, v, n); return 0; }",
    "aclrtMemsetAsync": "int aclrtMemsetAsync(void *d, size_t m, int v, size_t n, void *q)"
    " { memset(d, v, n); return 0; }",
    "aclGetCompileoptSize": "size_t aclGetCompileoptSize(int o) { return 64; }",
    "aclGetCompileopt": "int aclGetCompileopt(int o, char *v, size_t n)"
    ' { if (v && n > 8) strcpy(v, "disable"); return 0; }',
    "aclrtGetCurrentContext": "int aclrtGetCurrentContext(void **h) { static char c[64]; *h = c; return 0; }",
    "aclrtQueryEventStatus": "int aclrtQueryEventStatus(void *e, int *s) { if (s) *s = 1; return 0; }",
    "aclrtQueryEventWaitStatus": "int aclrtQueryEventWaitStatus(void *e, int *s) { if (s) *s = 1; return 0; }",
    "aclrtGetVersion": "int aclrtGetVersion(int *a, int *b, int *c)"
    " { if (a) *a = 1; if (b) *b = 0; if (c) *c = 0; return 0; }",
    "aclrtGetMemInfo": "int aclrtGetMemInfo(int k, size_t *f, size_t *t)"
    " { if (f) *f = 1ul << 33; if (t) *t = 1ul << 33; return 0; }",
    "HcclGetErrorString": 'const char *HcclGetErrorString(int e) { return "HCCL stub"; }',
    **{
        name: f"int {name}(void) {{ return 500002; }}"
        for name in ("aclopCompileAndExecute", "aclopCompileAndExecuteV2", "aclopExecute", "aclopExecuteV2")
    },
    # handles only have to be other than null
    **{
        name: f"int {name}(void **h) {{ *h = calloc(1, 64); return 0; }}"
        for name in ("aclrtCreateStream", "aclrtCreateEvent", "aclrtCreateNotify")
    },
    **{
        name: f"int {name}(void **h, unsigned a, unsigned b) {{ *h = calloc(1, 64); return 0; }}"
        for name in (
            "aclrtCreateStreamWithConfig",
            "aclrtCreateEventWithFlag",
            "aclrtCreateEventExWithFlag",
            "aclrtCreateContext",
        )
    },
}
DATA_SYMBOLS = ("_ZTV", "_ZTI", "_ZTS", "_ZTT", "_ZGV")  # vtables, type information, guards
SYSTEM = ("libc.", "libm.", "libdl.", "librt.", "libpthread.", "libstdc++.", "libgcc_s.", "libgomp", "ld-linux")


def build(out: Path, packages: Path) -> None:
    """Build the stubs that torch_npu in the folder ``packages`` needs beside the running torch, into ``out``."""
    import torch

    for folder in ("opp", "runtime", "compiler"):  # torch_npu only looks whether they are there
        (out / folder).mkdir(parents=True, exist_ok=True)
    torch_libraries = list(elf_files(Path(torch.__file__).parent / "lib"))
    own = [*elf_files(packages / "torch_npu"), *elf_files(packages / "torch_npu.libs")]
    wanted = {name for path in own for name in symbols(path, "--undefined-only")}
    wanted |= {name for path in own if path.name == "libtorch_npu.so" for name in names_looked_up(path)}
    wanted |= set(SPECIAL)
    present = {name for path in [*own, *torch_libraries, *system_libraries()] for name in symbols(path)}
    missing = sorted(name for name in wanted - present if not name.startswith(("Py", "_Py")))
    core = out / "libcann_stub_core.so"
    compile_library(core, source(missing))
    known = {path.name for path in [*own, *torch_libraries]}
    for name in sorted({name for path in own for name in needed(path)} - known):
        if not name.startswith(SYSTEM):
            # an empty library of that name which pulls in the one that holds all symbols
            compile_library(
                out / name, "int cann_stub;", f"-Wl,--no-as-needed,-rpath,$ORIGIN,-L{out}", "-lcann_stub_core"
            )


def source(names: list[str]) -> str:
    """C code that defines each of the names."""
    lines = ["#include <stdlib.h>", "#include <string.h>"]
    for number, name in enumerate(names):
        if name in SPECIAL:
            continue
        if name.startswith(DATA_SYMBOLS):
            lines.append(f'char stub{number}[512] __asm__("{name}") __attribute__((aligned(16)));')
        else:
            lines.append(f'long stub{number}(void) __asm__("{name}"); long stub{number}(void) {{ return 0; }}')
    return "\n".join([*lines, *SPECIAL.values()]) + "\n"


def compile_library(path: Path, code: str, *link: str) -> None:
    command = ["gcc", "-shared", "-fPIC", "-O0", "-w", "-x", "c", "-", f"-Wl,-soname,{path.name}", *link]
    partial = path.with_suffix(f".{os.getpid()}")
    subprocess.run([*command, "-o", str(partial)], input=code, text=True, check=True)
    partial.replace(path)


def elf_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.so*")):
        with path.open("rb") as file:
            if file.read(4) == b"\x7fELF":
                yield path


def needed(path: Path) -> list[str]:
    lines = output("readelf", "-d", str(path)).splitlines()
    return [line.split("[")[1].split("]")[0] for line in lines if "(NEEDED)" in line]


def symbols(path: Path, which: str = "--defined-only") -> set[str]:
    """Names of dynamic symbols. Wanted ones that are weak, or that have a version (glibc, libstdc++), are left out."""
    found = set()
    for line in output("nm", "-D", which, str(path)).splitlines():
        *_, kind, name = line.split()
        if which == "--defined-only" or (kind not in ("w", "v") and "@" not in name):
            found.add(name.split("@")[0])
    return found


def names_looked_up(path: Path) -> set[str]:
    """What torch_npu looks up by name while it runs. The names are plain strings in the binary."""
    pattern = rb"\x00((?:acl(?:rt|mdl|prof|op|tdt|dump|gr|data|sys)?|Hccl|Hcom)[A-Z][A-Za-z0-9]{3,60})(?=\x00)"
    return {name.decode() for name in re.findall(pattern, path.read_bytes()) if not name.startswith(b"aclnn")}


def system_libraries() -> Iterator[Path]:
    yield Path(sys.executable).resolve()
    shared = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("LDLIBRARY") or "none")
    if shared.suffix == ".so" and shared.exists():
        yield shared
    for name in ("libstdc++.so.6", "libc.so.6", "libm.so.6", "libgcc_s.so.1"):
        path = Path(output("gcc", f"-print-file-name={name}").strip())
        if path.is_absolute():
            yield path


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    build(Path(sys.argv[1]), Path(sys.argv[2]))
