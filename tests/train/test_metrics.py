# SPDX-License-Identifier: Apache-2.0
import pytest

from vidgen.train.metrics import MetricsLog, Progress, plot_loss, read_metrics, smoothed


def test_records_come_back_and_non_finite_numbers_are_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": float("nan"), "grad_norm": float("inf")})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None, "grad_norm": None},
    ]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]
    log = MetricsLog(file, last_step=1)
    log.write({"step": 2})
    log.close()
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_damaged_line_is_an_error_with_its_number(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(file)


class FullDisk:
    """A file of which writes fail, or stop half way, as long as ``full``."""

    name = "metrics.jsonl"

    def __init__(self):
        self.content, self.full = b"", None

    def tell(self):
        return len(self.content)

    def write(self, data):
        if self.full == "error":
            raise OSError(28, "No space left on device")
        taken = data[: len(data) // 2] if self.full == "half" else data
        self.content += taken
        return len(taken)

    def truncate(self, size):
        self.content = self.content[:size]


@pytest.mark.parametrize("way", ["error", "half"])
def test_a_full_disk_costs_no_line(tmp_path, way):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = disk = FullDisk()
    log.write({"step": 1})
    disk.full = way
    log.write({"step": 2})
    assert disk.content == b'{"step": 1}\n'
    disk.full = None
    log.write({"step": 3})
    assert disk.content == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_smoothed():
    assert smoothed([1.0, 2.0, 3.0, 6.0], 2) == [1.0, 1.5, 2.5, 4.5]
    assert smoothed([], 3) == []


def test_plot_of_anything(tmp_path):
    pytest.importorskip("matplotlib")
    skipped = {"step": 2, "loss": None, "grad_norm": None, "skipped": "not finite"}
    for records in ([], [skipped], [{"step": 1, "loss": 2.0, "grad_norm": 0.0}, skipped]):
        plot_loss(records, tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    progress = Progress(25, every=10)
    for step in range(1, 26):
        progress.update(step, loss=step / 2)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "loss 12.5" in lines[-1]
