"""How much memory a process keeps of large buffers that its threads have freed."""

import subprocess
import sys

MIB = 2**20
NUM_THREADS, BODY_MIB = 6, 12
# Threads that repeatedly hold large bodies at the same time, like a gateway's; prints the bytes that remain.
BODIES = f"""
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from deployments.allocator import give_back_large_buffers

if sys.argv[1] == "given back":
    give_back_large_buffers()
together = threading.Barrier({NUM_THREADS})

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def hold(_):
    for _ in range(3):
        body = b"x" * ({BODY_MIB} * {MIB})
        together.wait()
        del body

with ThreadPoolExecutor({NUM_THREADS}) as threads:
    threads.submit(int).result()
    before = resident()
    list(threads.map(hold, range({NUM_THREADS})))
    print(resident() - before)
"""


def retained_mib(how: str) -> float:
    """Return the remaining MiB."""
    command = [sys.executable, "-c", BODIES, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / MIB


def test_threads_retain_no_memory_of_large_buffers() -> None:
    # By default, the C library keeps a buffer for each thread.
    assert retained_mib("by itself") > 0.5 * NUM_THREADS * BODY_MIB
    assert retained_mib("given back") < 4
