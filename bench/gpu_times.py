"""How long a call takes the host, and how long the device."""

import statistics
import time

import torch

SLEEP = 40_000_000  # cycles, some 20 ms: what the host needs to queue a batch of calls


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def call_ms(call, device, calls=40):
    """Median milliseconds until a call returns; what it left the device to do is waited for in between, untimed."""
    times = []
    for _ in range(calls):
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e3)
        synchronise(device)
    return statistics.median(times[calls // 4 :])


def finished_ms(call, device, calls=40):
    """Median milliseconds until a call has returned and the device has done what it was left to do."""

    def finished():
        call()
        synchronise(device)

    return call_ms(finished, device, calls)


def device_ms(call, device, calls=4, batches=8):
    """Median milliseconds that a call takes the device, with nothing of its data in the cache; on a CPU as `call_ms`.

    The device sleeps until a batch of calls is queued, so that what the host takes to launch them does not count.
    """
    if device == "cpu":
        return call_ms(call, device)
    large = torch.ones(torch.cuda.get_device_properties(0).L2_cache_size, device=device)  # four times the cache
    times = []
    for _ in range(batches):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(SLEEP)
        for before, after in events:
            large.sum()  # reading evicts, and leaves nothing that would have to be written back meanwhile
            before.record()
            call()
            after.record()
        synchronise(device)
        times += [before.elapsed_time(after) for before, after in events]
    return statistics.median(times[calls:])


def both_us(call, device):
    return {"device_us": round(1e3 * device_ms(call, device), 2), "call_us": round(1e3 * call_ms(call, device), 2)}
