"""Times several implementations in turns, so that other load on the machine affects all of them alike."""

import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxclip.runtime.progress import bar

REPEATS = "timed runs of each implementation"


def rounds(repeats: int) -> Iterable[int]:
    """Returns the numbers of the rounds, 0 to repeats - 1, and shows a progress bar."""
    return bar(range(repeats), desc="measuring", unit="round")


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median seconds of each call, after one untimed call of each; calls must block until they are done."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in rounds(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def available_memory() -> int:
    """Returns the bytes of main memory that are available on this machine (Linux)."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024
