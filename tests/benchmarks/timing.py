"""Times of two things, taken in turns, as a ratio with its spread."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def paired(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    seconds: float = 4.0,
    least: int = 3,
    most: int = 40,
) -> dict[str, Any]:
    """Runs both in turns, which of them goes first changing from turn to turn.

    Args:
      ours: runs once; what it returns is waited for.
      theirs: what the ratio is over.
      seconds: to go on for, if ``least`` turns take no longer.
      least: fewest turns.
      most: turns at most.

    Returns:
      Median milliseconds of both, the median and quartiles of their ratio in every
      turn by the clock, the same by time of all cores, and the number of turns.
    """
    turns = []
    begin = time.perf_counter()
    while len(turns) < most:
        if len(turns) >= least and time.perf_counter() - begin > seconds:
            break
        order = [(0, ours), (1, theirs)]
        taken = [(0.0, 0.0)] * 2
        for which, run in order if len(turns) % 2 else reversed(order):
            taken[which] = once(run)
        turns.append(taken)
    walls = [(a[0], b[0]) for a, b in turns]
    cores = [(a[1], b[1]) for a, b in turns]
    return {
        "ms": 1e3 * statistics.median(a for a, _ in walls),
        "over_ms": 1e3 * statistics.median(b for _, b in walls),
        "ratio": spread([a / b for a, b in walls]),
        "ratio_of_core_time": spread([a / b for a, b in cores if b]),
        "turns": len(turns),
    }


def alone(run: Callable[[], Any], *, seconds: float = 4.0, least: int = 3) -> float:
    """Median milliseconds of something that has nothing to be compared with."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < least or time.perf_counter() - begin < seconds:
        times.append(1e3 * once(run)[0])
    return statistics.median(times)


def once(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of all cores together."""
    core, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - core


def spread(values: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    if len(values) < 2:
        return [*values, *values, *values]
    return statistics.quantiles(values, n=4, method="inclusive")
