"""How tests/benchmark.py measures: in turns, with the noise, FLOPs against a matmul's, memory."""
import functools
import statistics
import time
from pathlib import Path

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import train

for of, kernel in (  # torch's counter doesn't know the CPU's attention
        (flop_counter.sdpa_flop, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu),
        (flop_counter.sdpa_backward_flop,
         torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)):
    flop_counter.register_flop_formula(kernel, get_raw=True)(of)


# ------------------------------------------------------------------------------------------------
# Time, and how far it can be trusted

def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device: torch.device, clock=time.perf_counter) -> float:
    """Wall time of one call, or that of another clock."""
    synchronize(device)
    start = clock()
    function()
    synchronize(device)
    return clock() - start


def take_turns(calls: dict, rounds: int, device: torch.device,
               clock=time.perf_counter) -> dict[str, list[float]]:
    """Times of each call, {side: a time per round}; who begins changes, and all are warm."""
    times = {side: [] for side in calls}
    for i in range(rounds):
        for side in list(calls)[::1 if i % 2 == 0 else -1]:
            times[side].append(seconds(calls[side], device, clock))
    return times


def spread(times: list[float]) -> float | None:
    """Distance of the quartiles over the median; None for fewer than three times."""
    if len(times) < 3:
        return None
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / middle


def compare(times: dict[str, list[float]]) -> dict:
    """Median and spread of either side; the ratio, median of the rounds' own, or what forbids it.

    It is told only if it differs from 1 by more than the wider of the two spreads, the noise.
    """
    found = {f"{side}_s": statistics.median(values) for side, values in times.items()}
    found |= {f"{side}_spread": spread(values) for side, values in times.items()}
    spreads = found["ours_spread"], found["peer_spread"]
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["peer"]))
    if None in spreads:
        found["ratio"] = "too few rounds"
    else:
        found["ratio"] = ratio if abs(ratio - 1) > max(spreads) else "within noise"
    return found


@functools.lru_cache(maxsize=None)
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a big square matmul, the best of ten: what the machine can do."""
    side = 8192 if device.type == "cuda" else 1536
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side ** 3 / min(seconds(lambda: a @ a, device) for _ in range(10))


# ------------------------------------------------------------------------------------------------
# Memory

def gpu_peak(call, device: torch.device) -> float | None:
    """GB of GPU memory in use at most during a call; None on a CPU, where --memory asks for it."""
    if device.type != "cuda":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return train.peak_gb(device)


def process_peak() -> float:
    """Peak memory of this process in GB; unlike ru_maxrss it knows nothing of the parent's."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / 1e9


# ------------------------------------------------------------------------------------------------
# FLOPs, equality

class Flops(TorchDispatchMode):
    """Adds up torch's FLOP formulas, as FlopCounterMode does, which also follows the modules and
    fails where they are given learned tensors without gradients.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, inputs=(), named=None):
        result = function(*inputs, **(named or {}))
        formula = flop_counter.flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.total += formula(*inputs, **(named or {}), out_val=result)
        return result


def counted(call):
    """(result, GFLOPs) of a call in eager mode."""
    with Flops() as flops:
        result = call()
    return result, flops.total / 1e9


def difference(ours, peer) -> float:
    """|ours - peer| / |peer| in the Euclidean norm; the largest of several named tensors."""
    if isinstance(ours, dict):
        return max(difference(torch.as_tensor(ours[name]), torch.as_tensor(peer[name]))
                   for name in peer)
    return ((ours.float() - peer.float()).norm() / peer.float().norm()).item()


def measure(row: dict, calls: dict, dtype: torch.dtype, rounds: int, device: torch.device,
            gflops: dict | None = None) -> dict:
    """Complete a row from calls = {"ours": call, "peer": call}: first call, equality, FLOPs, times,
    share of the matmul's speed, memory.

    `gflops` of both sides are given where the calls are compiled, which can't be counted.
    """
    results = {}
    for side, call in calls.items():
        synchronize(device)
        start = time.perf_counter()
        if gflops is None:
            results[side], row[f"{side}_gflop"] = counted(call)
        else:
            results[side], row[f"{side}_gflop"] = call(), gflops[side]
        synchronize(device)
        row[f"{side}_first_s"] = time.perf_counter() - start
    row["error"] = difference(results.pop("ours"), results.pop("peer"))
    # Passes multiply rounding errors, a GPU's convolutions use TF32: gross mistakes only are found
    # here; tests/test_benchmark.py compares in float64.
    exact = 1e-2 if device.type == "cuda" else 1e-3
    assert row["error"] < (exact if dtype == torch.float32 else 0.3), row
    for call in calls.values():
        call()                                           # the second call may still be a slow one
    row.update(compare(take_turns(calls, rounds, device)))
    for side, call in calls.items():
        row[f"{side}_gb"] = gpu_peak(call, device)
        if row[f"{side}_gflop"] > 0:
            speed = row[f"{side}_gflop"] * 1e9 / row[f"{side}_s"]
            row[f"{side}_peak"] = speed / matmul_peak(device, dtype)
    return row
