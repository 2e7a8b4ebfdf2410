# SPDX-License-Identifier: Apache-2.0
"""What `vidgen env` says about machines that are not this one: versions, problems, variables."""

import os
import subprocess

import pytest

from vidgen import device, environment, ops

GOOD = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0.post1", "triton": None, "triton-ascend": "3.2.0"}
CANN = {"CANN": "8.5.0", "CUDA driver": None, "CUDA device": None, "CUDA of this PyTorch": None}
HOME = {"ASCEND_HOME_PATH": "/opt/cann"}


def test_nothing_is_wrong_with_a_good_machine():
    assert environment.problems(GOOD, CANN, HOME) == []
    plain = {"torch": "2.13.0", "torch_npu": None, "triton": "3.7.1", "triton-ascend": None}
    assert environment.problems(plain, {**CANN, "CANN": None}, {}) == []


@pytest.mark.parametrize(
    "versions, software, environ, words",
    [
        ({"torch": "2.12.1"}, {}, {}, "torch_npu 2.13.0.post1 is built for torch 2.13.0, not 2.12.1"),
        ({}, {"CANN": None}, {"ASCEND_HOME_PATH": None}, "ASCEND_HOME_PATH is not set: source the set_env.sh"),
        ({}, {"CANN": None}, {}, "ASCEND_HOME_PATH=/opt/cann is no folder"),
        ({}, {"CANN": "unknown version"}, {}, "/opt/cann has no version file"),
        ({"triton": "3.7.1"}, {}, {}, "triton and triton-ascend both own the module triton"),
        ({"triton": "3.7.1", "triton-ascend": None}, {}, {}, "Triton kernels need triton-ascend"),
        ({}, {}, {"ASCEND_LAUNCH_BLOCKING": "1", "TASK_QUEUE_ENABLE": "2"}, "ASCEND_LAUNCH_BLOCKING=1 switches"),
        (
            {},
            {},
            {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:32"},
            "expandable_segments:True cannot stand beside max_split_size_mb",
        ),
        ({}, {}, {"HCCL_CONNECT_TIMEOUT": "60"}, "HCCL_CONNECT_TIMEOUT must be seconds from 120 to 7200, got '60'"),
        ({}, {}, {"HCCL_EXEC_TIMEOUT": "long"}, "HCCL_EXEC_TIMEOUT must be seconds from 68 to 17340, got 'long'"),
        ({}, {}, {"VIDGEN_BACKEND": "reference"}, "VIDGEN_BACKEND=reference forces one backend"),
    ],
)
def test_each_bad_combination_is_told(versions, software, environ, words):
    variables = {name: value for name, value in {**HOME, **environ}.items() if value is not None}
    found = environment.problems({**GOOD, **versions}, {**CANN, **software}, variables)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("cuda, words", [(None, "built without CUDA"), ("13.0", "for CUDA 13.0")])
def test_a_driver_without_a_device(cuda, words):
    software = {**CANN, "CUDA driver": "470.1", "CUDA of this PyTorch": cuda}
    found = environment.problems(GOOD, software, HOME)
    assert found == [f"there is driver 470.1, but PyTorch, which is {words}, sees no device"]
    assert environment.problems(GOOD, {**software, "CUDA device": "NVIDIA H100"}, HOME) == []


FILES = {
    "x86_64-linux/ascend_toolkit_install.info": ("package_name=Ascend-cann-toolkit\nversion=8.1.RC1\n", "8.1.RC1"),
    "version.cfg": ("# version\ntoolkit_installed_version=[7.5.T1:CANN-8.0.0]\n", "CANN-8.0.0"),
    "compiler/version.info": ("Version=7.6.0.1.220\nversion_dir=8.2\n", "7.6.0.1.220"),
    "share/info/runtime/version.info": ("Version=8.5.0\n", "8.5.0"),
}


@pytest.mark.parametrize("name", FILES)
def test_version_of_cann(tmp_path, monkeypatch, name):
    text, version = FILES[name]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert device.software()["CANN"] == version


def test_a_folder_without_versions_is_no_cann(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert device.software()["CANN"] == "unknown version"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "gone"))
    assert device.software()["CANN"] is None
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert device.software()["CANN"] is None and device.software()["HCCL"] is None


def test_version_of_hccl(tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert device.software()["HCCL"] is None
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libhccl.so").touch()
    assert device.software()["HCCL"] == "part of CANN"
    (tmp_path / "hccl").mkdir()
    (tmp_path / "hccl" / "version.info").write_text("Version=8.5.0\n")
    assert device.software()["HCCL"] == "8.5.0"


def test_version_of_the_cuda_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert device.software()["CUDA toolkit"] is None
    (tmp_path / "version.json").write_text('{\n "cuda" : {\n  "name" : "CUDA SDK",\n  "version" : "13.0.1"\n }\n}')
    assert device.software()["CUDA toolkit"] == "13.0.1"


# Variables


def test_variables_are_told_and_never_set(monkeypatch):
    before = dict(os.environ)
    environment.report()
    told = environment.variables({"TASK_QUEUE_ENABLE": "1", "HCCL_CONNECT_TIMEOUT": "1200"})
    assert os.environ == before
    assert "TASK_QUEUE_ENABLE = 1; suggested: 2" in told
    assert "HCCL_CONNECT_TIMEOUT = 1200\n" in told  # as suggested: no advice
    assert "HCCL_SOCKET_IFNAME not set\n" in told  # nothing fits every machine
    assert len({v.name for v in device.VARIABLES}) == len(device.VARIABLES)
    assert all(v.kind in device.KINDS and v.meaning and (v.why or v.suggested is None) for v in device.VARIABLES)


def test_exports_set_what_is_missing():
    lines = environment.exports("npu", {"TASK_QUEUE_ENABLE": "0"})
    script = "\n".join([*lines, 'echo "$HCCL_CONNECT_TIMEOUT $PYTORCH_NPU_ALLOC_CONF $TASK_QUEUE_ENABLE"'])
    run = subprocess.run(["sh", "-c", script], env={"TASK_QUEUE_ENABLE": "0"}, capture_output=True, text=True)
    assert run.stdout == "1200 expandable_segments:True 0\n" and run.stderr == ""
    with pytest.raises(ValueError, match="--exports: wanted one of cpu, cuda, npu, got 'tpu'"):
        environment.exports("tpu", {})


# The table of ops


def test_the_table_has_every_backend_and_says_why_not():
    facts = environment.report()
    for kind in device.KINDS:
        for op, names in ops.table(kind).items():
            row = facts["ops"][op]
            for name in names:
                column = ("any" if name in environment.PLAIN else kind, name)
                assert column in row
                if column[0] == kind and device.why_not(kind) is not None:
                    assert row[column] == f"there is a kernel, but {device.why_not(kind)}"


def test_a_backend_that_refuses_everything_is_a_no(monkeypatch):
    from vidgen.ops._registry import Backend

    op = ops.OPS["haar_2d"]
    monkeypatch.setitem(op.backends, "cpu", [Backend("lazy", op.reference, lambda *args: "the library is missing")])
    assert environment.report()["ops"]["haar_2d"]["cpu", "lazy"] == "the library is missing"
    monkeypatch.setitem(op.backends, "cpu", [Backend("lazy", op.reference)])
    facts = environment.report()
    assert facts["ops"]["haar_2d"]["cpu", "lazy"] is None
    assert facts["ops"]["haar_3d"]["cpu", "lazy"].startswith("no such implementation; ")
    assert "lazy" in environment.text(facts)


def test_a_device_that_fails_does_not_end_the_report(monkeypatch):
    def fail(device, dtype):
        raise RuntimeError("no kernel image\nCompile with ...")

    monkeypatch.setattr(ops.OPS["haar_2d"], "samples", fail)
    row = environment.report()["ops"]["haar_2d"]
    if ops.native_status is None:
        assert row["cpu", "cpu_cpp"] == "the device fails: no kernel image"
    assert row["any", "reference"] is None


def test_processes_on_cpus_talk_through_gloo():
    assert environment.why_not_communication("cpu") is None
    if device.why_not("npu") is not None:
        assert environment.why_not_communication("npu") == f"hccl: {device.why_not('npu')}"
