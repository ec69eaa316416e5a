"""How busy a job kept its GPUs: those that it sees, whatever their names, whatever becomes of it. No GPU is needed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasweep.util import usage
from lorasweep.util.usage import Gpu, combine, measure_usage, read_gpus, summarise

ROOT = Path(__file__).parents[3]

ROWS = """0, GPU-aaaa-1, 90, 1000, 81559
1, GPU-bbbb-2, 30, 40000, 81559
2, GPU-bbbb-3, [N/A], [N/A], [N/A]
"""

FAKE_NVML = """
class NVMLError(Exception): pass
class Rates: gpu = 70
class Memory:
    def __init__(self, used): self.used, self.total = used, 100
def nvmlInit(): pass
def nvmlDeviceGetCount(): return 3
def nvmlDeviceGetHandleByIndex(index):
    if index == 2:
        raise NVMLError("GPU is lost")
    return ("GPU-aaaa", "GPU-sliced")[index]
def nvmlDeviceGetHandleByUUID(name): return name
def nvmlDeviceGetUUID(handle): return handle.encode()
def nvmlDeviceGetMemoryInfo(handle):
    if handle == "GPU-sliced":
        raise NVMLError("Insufficient Permissions")
    return Memory(7 if handle.startswith("MIG") else 50)
def nvmlDeviceGetUtilizationRates(handle):
    if handle != "GPU-aaaa":
        raise NVMLError("Not Supported")
    return Rates
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that prints what `nvidia-smi` prints of three GPUs; counts its calls."""
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho >> {tmp_path}/calls\ncat <<'END'\n{ROWS}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(usage, "find_spec", lambda name: None)
    return program


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 1, ["0"]),
        (None, 8, ["0", "1", "2"]),
        ("1,0", 2, ["1", "0"]),
        ("1,0", 1, ["1"]),
        ("GPU-aaaa-1", 1, ["0"]),
        ("GPU-aa, GPU-bbbb-3", 2, ["0", "2"]),
        ("0,7,1", 3, ["0"]),  # CUDA ignores what follows a GPU that is not there
        ("MIG-1234", 1, []),
        ("", 1, []),
    ],
)
@pytest.mark.usefixtures("nvidia_smi")
def test_only_visible_gpus_are_sampled(visible: str | None, count: int, expected: list[str]) -> None:
    assert [gpu.index for gpu in read_gpus(visible, count)] == expected


@pytest.mark.usefixtures("nvidia_smi")
def test_what_the_driver_does_not_say_is_not_known() -> None:
    busy, unknown = read_gpus("1,2", 2)
    assert (busy.busy, busy.used_bytes, busy.total_bytes) == (0.3, 40000 * 2**20, 81559 * 2**20)
    assert (unknown.busy, unknown.used_bytes, unknown.total_bytes) == (None, None, None)


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NVML of a GPU, of one that is in slices, and of one that is lost."""
    (tmp_path / "pynvml.py").write_text(FAKE_NVML)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield
    sys.modules.pop("pynvml", None)


@pytest.mark.usefixtures("nvml")
def test_nvml_knows_the_memory_of_a_part_of_a_gpu() -> None:
    assert read_gpus(None, 1) == [Gpu("0", "GPU-aaaa", 0.7, 50, 100)]
    assert read_gpus("MIG-1234", 1) == [Gpu("MIG-1234", "MIG-1234", None, 7, 100)]


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(("visible", "count"), [(None, 3), ("0,1,2", 3), ("GPU-aa,GPU-sl", 2)])
def test_what_nvml_does_not_say_of_one_gpu_is_still_known_of_another(visible: str | None, count: int) -> None:
    whole, in_slices = read_gpus(visible, count)
    assert whole == Gpu("0", "GPU-aaaa", 0.7, 50, 100)
    assert in_slices == Gpu("1", "GPU-sliced", None, None, None)


@pytest.mark.parametrize("script", ["exit 9", "echo '<html>'", "echo '0, x'", "kill -9 $$"])
def test_a_broken_nvidia_smi_leaves_the_job_alone(nvidia_smi: Path, script: str, tmp_path: Path) -> None:
    nvidia_smi.write_text(f"#!/bin/sh\n{script}\n")
    with measure_usage([tmp_path / "a.json"], 1):
        pass
    assert set(json.loads((tmp_path / "a.json").read_text())) == {"seconds", "cores", "cpu_busy"}


@pytest.mark.usefixtures("nvidia_smi")
def test_a_job_leaves_its_mean_and_its_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tmp_path / "calls"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(usage, "SAMPLE_SECONDS", 0.01)
    with measure_usage([tmp_path / "a.json", tmp_path / "b.json"], 2):
        wait_for(lambda: calls.exists() and len(calls.read_text()) > 2)
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["gpus"], record["gpu_busy"], record["points"], record["cores"]) == (2, 0.6, 2, 3)
    assert (record["peak_gpu_memory_bytes"], record["gpu_memory_bytes"]) == (40000 * 2**20, 81559 * 2**20)
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()


@pytest.mark.usefixtures("nvidia_smi")
def test_a_job_without_a_gpu_asks_for_none_and_has_the_load_of_its_cores(tmp_path: Path) -> None:
    with measure_usage([tmp_path / "a.json"], 0):
        worked = time.process_time()
        while time.process_time() < worked + 0.3:
            pass
    record = json.loads((tmp_path / "a.json").read_text())
    assert not (tmp_path / "calls").exists()
    assert record["cpu_busy"] * record["seconds"] * record["cores"] >= 0.2


@pytest.mark.usefixtures("nvidia_smi")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_killed_half_way_has_left_what_it_measured(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lorasweep.util.usage import measure_usage;"
        "from lorasweep.util.process import end_on_sigterm; end_on_sigterm()\n"
        f"with measure_usage([Path({str(tmp_path / 'a.json')!r})], 1): time.sleep(600)"
    )
    job = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")})
    try:
        wait_for(lambda: (tmp_path / "a.json").exists())
    finally:
        job.send_signal(number)
        job.wait(60)
    assert json.loads((tmp_path / "a.json").read_text())["gpu_busy"] == 0.9


def test_a_failed_job_and_a_full_disk_end_as_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path, record: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ZeroDivisionError), measure_usage([tmp_path / "a.json"], 0):
        raise ZeroDivisionError
    assert (tmp_path / "a.json").exists()
    monkeypatch.setattr(usage, "write_record", refuse)
    with measure_usage([tmp_path / "a.json"], 0):
        pass
    assert not (tmp_path / "a.json").exists()  # that of the attempt before


def test_without_snakemakes_folder_nothing_is_written(tmp_path: Path) -> None:
    with measure_usage([tmp_path / "none/a.json"], 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_means_are_weighted_by_time_and_devices() -> None:
    jobs = [
        {"seconds": 100, "gpus": 1, "gpu_busy": 1.0, "peak_gpu_memory_bytes": 5, "cores": 1, "cpu_busy": 0.5},
        {"seconds": 100, "gpus": 3, "gpu_busy": 0.2, "peak_gpu_memory_bytes": 9, "cores": 1, "cpu_busy": 0.5},
        {"seconds": 400, "points": 4, "gpus": 1, "gpu_busy": 0.4, "cores": 1, "cpu_busy": 0.5},
        {"seconds": 50, "cores": 1, "cpu_busy": 0.5},
    ]
    assert summarise(jobs) == {"gpu_busy": 0.4, "peak_gpu_memory_bytes": 9, "cpu_busy": 0.5}
    # A training that an earlier run had done takes no time.
    assert summarise([{"seconds": 0.0, "cores": 1, "cpu_busy": 0.5}])["cpu_busy"] is None
    assert summarise([]) == dict.fromkeys(("gpu_busy", "peak_gpu_memory_bytes", "cpu_busy"))


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_parts_of_a_training_are_one_record() -> None:
    """The last job of a training that was stopped before has no GPU, and ends at once."""
    part = {"seconds": 90.0, "cores": 4, "cpu_busy": 0.5, "gpus": 2, "gpu_busy": 0.25}
    part |= {"peak_gpu_memory_bytes": 7, "gpu_memory_bytes": 80}
    longer = part | {"seconds": 180.0, "gpu_busy": 0.55, "peak_gpu_memory_bytes": 5}
    ended = {"seconds": 10.0, "cores": 1, "cpu_busy": 1.0}
    combined = combine([ended, {}, part, longer])
    assert combined == {
        "seconds": 280.0,
        "cores": 4,
        "gpus": 2,
        "gpu_busy": 0.45,
        "peak_gpu_memory_bytes": 7,
        "cpu_busy": pytest.approx((10 + 0.5 * 4 * 270) / (10 + 4 * 270), abs=1e-3),
        "gpu_memory_bytes": 80,
    }
    assert combine([{}, part]) == part
    idle = part | {"gpu_busy": 0.0}
    assert combine([idle, idle])["gpu_busy"] == 0
    moment = {"seconds": 0.0, "cores": 4, "cpu_busy": 0.0}
    assert combine([moment, moment]) == {"seconds": 0, "cores": 4}
    assert combine([{}]) == {}
