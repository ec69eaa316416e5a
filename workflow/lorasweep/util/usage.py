"""Measure how busy a job kept its GPUs and cores, from within the job. What is measured here never fails a job."""

import csv
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from lorasweep.util.files import write_record

SAMPLE_SECONDS = 5.0
"""Time between two samples of the GPUs."""

WRITE_SECONDS = 60.0
"""Time between two writes of the record: a job that is killed loses at most as much of it."""

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,utilization.gpu,memory.used,memory.total")
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Gpu:
    """A sample of a GPU, or of a part of one (MIG). `None` is what the driver does not say."""

    index: str
    uuid: str
    busy: float | None
    """Share of the time in which it computed, whatever part of it did; that of all processes on it."""
    used_bytes: int | None
    total_bytes: int | None


@contextmanager
def measure_usage(files: Sequence[Path], gpus: int) -> Iterator[None]:
    """Measure this process in this context, with the first `gpus` GPUs that it sees; write the record to each file.

    The record is a JSON object, of which absent keys are not known:

    - `seconds`, `cores`: the time, and the cores that the job may use
    - `cpu_busy`: processor time of this process and of its children that ended, over `seconds` · `cores`
    - `gpus`: the number of GPUs that were sampled
    - `gpu_busy`: mean over time and GPUs of the share of time in which a GPU computed
    - `peak_gpu_memory_bytes`, `gpu_memory_bytes`: most memory in use on one GPU, and the memory of that GPU
    - `points`: number of files, if several: the points of the job

    Files are written if their folder exists, which Snakemake makes for its own measurements.
    """
    meter = _Meter([file for file in files if file.parent.is_dir()], gpus)
    meter.start()
    try:
        yield
    finally:
        meter.stop()


class _Meter:
    def __init__(self, files: Sequence[Path], gpus: int) -> None:
        self._files, self._gpus = files, gpus
        # As the job was given them: it may hide some from itself later.
        self._visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self._began, self._worked = time.monotonic(), sum(os.times()[:4])
        self._shares: list[float] = []
        self._peak, self._memory, self._sampled = 0, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        for file in self._files:  # that of an earlier attempt
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                print(f"{file}: {error}", flush=True)
        if self._files:
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._files:
            self._thread.join(timeout=SAMPLE_SECONDS)
            self._write()

    def _run(self) -> None:
        try:
            self._measure()
        except Exception as error:  # a traceback in a job's log would be taken for the reason of its failure
            print(f"how busy this job is could not be measured: {error!r}", flush=True)

    def _measure(self) -> None:
        written = -WRITE_SECONDS
        while True:
            if self._gpus:
                self._add(read_gpus(self._visible, self._gpus))
            if time.monotonic() - written > WRITE_SECONDS:
                self._write()
                written = time.monotonic()
            if self._ended.wait(SAMPLE_SECONDS):
                return

    def _add(self, gpus: Sequence[Gpu]) -> None:
        self._sampled = max(self._sampled, len(gpus))
        shares = [gpu.busy for gpu in gpus if gpu.busy is not None]
        self._shares += [sum(shares) / len(shares)] if shares else []
        for gpu in gpus:
            if gpu.used_bytes is not None and gpu.used_bytes > self._peak:
                self._peak, self._memory = gpu.used_bytes, gpu.total_bytes or 0

    def _write(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-3)
        cores = _count_cores()
        record: dict[str, Any] = {
            "seconds": round(seconds, 3),
            "cores": cores,
            "cpu_busy": round((sum(os.times()[:4]) - self._worked) / (seconds * cores), 3),
        }
        if self._sampled:
            record["gpus"] = self._sampled
        if self._shares:
            record["gpu_busy"] = round(sum(self._shares) / len(self._shares), 3)
        if self._peak:
            record |= {"peak_gpu_memory_bytes": self._peak}
            record |= {"gpu_memory_bytes": self._memory} if self._memory else {}
        if len(self._files) > 1:
            record["points"] = len(self._files)
        try:
            for file in self._files:
                write_record(file, record)
        except OSError as error:  # a full disk: the job will say so itself, or has all that it needs
            print(f"how busy this job was could not be written: {error}", flush=True)


def read_gpus(visible: str | None, count: int) -> list[Gpu]:
    """Return a sample of the first `count` GPUs that are visible to CUDA; [] if none can be read.

    `visible` is the value of `CUDA_VISIBLE_DEVICES`: numbers, UUIDs or their beginnings, or names of parts (MIG);
    `None` stands for all. NVML is asked where Python has it (`nvidia-ml-py`), else `nvidia-smi`, which lists no parts.
    """
    try:
        return _read_nvml(visible, count) if find_spec("pynvml") else _choose(_read_nvidia_smi(), visible, count)
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _choose(gpus: Sequence[Gpu], visible: str | None, count: int) -> list[Gpu]:
    if visible is None:
        return list(gpus[:count])
    chosen = []
    for name in map(str.strip, visible.split(",")):
        found = [gpu for gpu in gpus if name == gpu.index or (name and gpu.uuid.startswith(name))]
        if not found:
            break  # as CUDA does, which ignores what follows
        chosen.append(found[0])
    return chosen[:count]


def _read_nvidia_smi() -> list[Gpu]:
    done = subprocess.run(
        [*_QUERY, "--format=csv,noheader,nounits"], capture_output=True, encoding="utf-8", check=True, timeout=30
    )
    rows = [[cell.strip() for cell in row] for row in csv.reader(StringIO(done.stdout)) if row]
    # What is not known is [N/A] or [Not Supported].
    numbers = [[int(cell) if cell.isdigit() else None for cell in cells] for _, _, *cells in rows]
    return [
        Gpu(
            index,
            uuid,
            None if busy is None else busy / 100,
            None if used is None else used * _MEBIBYTE,
            None if total is None else total * _MEBIBYTE,
        )
        for (index, uuid, *_), (busy, used, total) in zip(rows, numbers, strict=True)
    ]


def _read_nvml(visible: str | None, count: int) -> list[Gpu]:
    pynvml: Any = import_module("pynvml")

    def ask(function: Any, of: Any) -> Any:
        try:
            return function(of)
        except pynvml.NVMLError:  # a slice does not know its share, nor a GPU in slices its memory
            return None

    try:
        pynvml.nvmlInit()
        indices = range(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError as error:
        raise OSError(f"NVML: {error}") from error
    found = {str(index): ask(pynvml.nvmlDeviceGetHandleByIndex, index) for index in indices}
    # Parts have no index of their own, and are found by their whole name.
    names = [name for name in map(str.strip, (visible or "").split(",")) if name.startswith("MIG-")]
    found |= {name: ask(pynvml.nvmlDeviceGetHandleByUUID, name) for name in names}
    handles = {index: handle for index, handle in found.items() if handle is not None}
    uuids = {index: ask(pynvml.nvmlDeviceGetUUID, handle) or "" for index, handle in handles.items()}
    known = [
        Gpu(index, uuid if isinstance(uuid, str) else uuid.decode(), None, None, None) for index, uuid in uuids.items()
    ]
    gpus = []
    for gpu in _choose(known, visible, count):
        rates = ask(pynvml.nvmlDeviceGetUtilizationRates, handles[gpu.index])
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handles[gpu.index])
        used, total = (int(memory.used), int(memory.total)) if memory else (None, None)
        gpus.append(replace(gpu, busy=rates.gpu / 100 if rates else None, used_bytes=used, total_bytes=total))
    return gpus


def _count_cores() -> int:
    # Snakemake gives a job its threads so; without it, the process has all cores that the system lets it have.
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdigit() and int(threads) else len(os.sched_getaffinity(0))


def combine(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one record for the jobs of one after the other, such as the parts of a training; {} if none is known."""
    known = [record for record in records if record]
    if len(known) < 2:
        return dict(known[0]) if known else {}
    largest = max(known, key=lambda record: record.get("peak_gpu_memory_bytes", 0))
    combined = {
        "seconds": round(sum(record["seconds"] for record in known), 3),
        "cores": max(record["cores"] for record in known),
        "gpus": max((record["gpus"] for record in known if "gpus" in record), default=None),
        **summarise(known),
        "gpu_memory_bytes": largest.get("gpu_memory_bytes"),
    }
    return {key: value for key, value in combined.items() if value is not None}


USAGE = ("gpu_busy", "peak_gpu_memory_bytes", "cpu_busy")
"""What `summarise` returns."""


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, float | int | None]:
    """Return the means of the records of jobs, weighted by time and devices, and the largest peak of memory.

    `None` stands for what no record has. The time of a job of several points is split between them.
    """
    known = list(records)

    def mean(key: str, devices: str) -> float | None:
        parts = [
            (record[key], record["seconds"] * record[devices] / record.get("points", 1))
            for record in known
            if record.get(key) is not None
        ]
        weight = sum(weight for _, weight in parts)
        return round(sum(share * weight for share, weight in parts) / weight, 3) if weight else None

    peaks = [record["peak_gpu_memory_bytes"] for record in known if record.get("peak_gpu_memory_bytes")]
    return dict(
        zip(USAGE, (mean("gpu_busy", "gpus"), max(peaks, default=None), mean("cpu_busy", "cores")), strict=True)
    )
