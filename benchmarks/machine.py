"""The conditions of a measurement besides the code: set them, and describe them."""

import datetime
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor
from torch._inductor import cpu_vec_isa

import fastvae

from .cases import Case
from .timing import Measurement

# What GCC may use in code that torch.compile generates for this instruction set.
_MARCH = {"AVX2": "x86-64-v3"}
_BITS = {"AVX2": 256, "AVX512": 512}


def configure(device: str, threads: int) -> torch.device:
    """Set the threads and the instruction set of all sides, and return the device."""
    torch.set_num_threads(threads)
    capability = torch.backends.cpu.get_cpu_capability()
    # torch.compile's vectors follow ATEN_CPU_CAPABILITY too, but its cache could return code that was compiled for
    # another instruction set. With its default, -march=native, GCC would use AVX-512 around AVX2 vectors.
    if capability in _BITS:
        inductor.cpp.simdlen = _BITS[capability]
    if capability in _MARCH and hasattr(inductor.cpp, "march"):
        inductor.cpp.march = _MARCH[capability]
    # Compile in this process, so that `LoadMonitor` counts the compilers as ours.
    inductor.compile_threads = 1
    if device == "auto":
        has_kernels = torch.cuda.is_available() and fastvae.backends.serve("auto", "cuda") is not None
        device = "cuda" if has_kernels else "cpu"
    return torch.device(device)


def describe(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else f"{_cpu()}, {os.cpu_count()} cores",
        "instruction_set": "cuda" if on_gpu else torch.backends.cpu.get_cpu_capability().lower(),
        "instruction_sets": {
            "fastvae": _fastvae_capability(),
            "torch": torch.backends.cpu.get_cpu_capability(),
            "torch.compile": str(cpu_vec_isa.pick_vec_isa()) or "scalar",
        },
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": {
            "fastvae": fastvae.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
    }


class LoadMonitor:
    """Measures how busy other processes keep the machine. Above a tenth of a core, the results are unreliable."""

    def __init__(self) -> None:
        self.start = self._clocks()

    def cores_used_by_others(self) -> float | None:
        """The number of cores that others kept busy since this object was created; None if the system does not tell."""
        if self.start is None or (end := self._clocks()) is None:
            return None
        wall, busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return round(max(0.0, busy - own) / wall, 2)

    @staticmethod
    def _clocks() -> tuple[float, float, float] | None:
        """Seconds of wall time, of work on all processors, and of work by this process and its finished children."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split(maxsplit=9)[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, sum(os.times()[:4])


def summarise(measurement: Measurement) -> dict[str, Any]:
    case = measurement.case
    return {
        "case": case.name,
        "median_ms": {side: _milliseconds(statistics.median(s)) for side, s in measurement.seconds.items()},
        "quartiles_ms": {
            side: [_milliseconds(q) for q in statistics.quantiles(s, n=4)[::2]]
            for side, s in measurement.seconds.items()
        },
        "fastest_ms": {side: _milliseconds(min(s)) for side, s in measurement.seconds.items()},
        "in_cache_median_ms": {
            side: _milliseconds(statistics.median(s)) for side, s in measurement.warm.items()
        },
        "rounds": len(measurement.seconds["fused"]),
        "input_sets": measurement.input_sets,
        "peak_bytes_above_inputs": measurement.peak_bytes,
        "bytes_to_move": case.moves,
        "floors": (floors := floors_of(case)) and dict(zip(("eager", "compile"), floors, strict=True)),
        "most": case.most and dict(zip(("case", "times"), case.most, strict=True)),
    }


def floors_of(case: Case) -> tuple[float, float] | None:
    """The floors of a case for this machine's instruction set."""
    is_avx2 = torch.backends.cpu.get_cpu_capability() != "AVX512"
    return case.avx2_floors if is_avx2 and case.avx2_floors else case.floors


def _milliseconds(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return model[1].strip() if model else platform.processor() or platform.machine()


def _fastvae_capability() -> str:
    try:
        from fastvae import _C
    except ImportError:
        return "reference"
    return str(_C.cpu_capability())
