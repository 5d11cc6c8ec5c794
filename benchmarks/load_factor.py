"""How far a replica may be busier than the others before its key's requests go elsewhere: a simulation.

    python -m benchmarks.load_factor [--calls 6000] [--json FILE]

Clients ask about pictures, each as soon as it is answered. A replica divides its speed among its calls, and keeps what
it has seen last. A picture that it knows takes a third of the work of another. Random and repeatable; nothing is
measured, so it is the same on every machine. Our order decides, or the less busy of two replicas, as with Serve's.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.affinity import by_preference
from llava_core.lru import LruCache

NUM_PICTURES = 200
# All replicas together hold so many times what is asked about.
ROOM = 1.125
WORK_OF_A_NEW_PICTURE = 3.0
FACTORS = (1.1, 1.25, 1.5, 2.0, 100.0)
# Replicas, clients, and how much more often one picture is asked about than the next: not at all, or as words are used.
CASES = [(replicas, clients, skew) for replicas, clients in ((2, 4), (2, 16), (4, 32), (8, 64)) for skew in (0.0, 1.2)]

# A picture and the calls of each replica, to the replica that gets it.
Choose = Callable[[str, dict[str, int]], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    results = [
        {"replicas": replicas, "clients": clients, "skew": skew, **compare(replicas, clients, skew, options.calls)}
        for replicas, clients, skew in CASES
    ]
    for result in results:
        print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def compare(num_replicas: int, num_clients: int, skew: float, num_calls: int) -> dict[str, Any]:
    choices: dict[str, Choose] = {"less busy of two": less_busy_of_two(random.Random(0))}
    for factor in FACTORS:
        choices[str(factor)] = lambda key, loads, factor=factor: by_preference(key, loads, factor)[0]  # type: ignore[misc]
    return {name: simulate(each, num_replicas, num_clients, skew, num_calls) for name, each in choices.items()}


def less_busy_of_two(chance: random.Random) -> Choose:
    return lambda _, loads: min(chance.sample(sorted(loads), 2), key=loads.__getitem__)


def simulate(choose: Choose, num_replicas: int, num_clients: int, skew: float, num_calls: int) -> dict[str, float]:
    """Hit rate and calls per unit of time, which is a replica's for a call about a picture that it knows."""
    chance = random.Random(1)
    weights = [1 / (rank + 1) ** skew for rank in range(NUM_PICTURES)]
    left: dict[str, list[float]] = {f"r{index}": [] for index in range(num_replicas)}
    caches = {name: LruCache[bool](int(ROOM * NUM_PICTURES / num_replicas)) for name in left}

    def begin() -> None:
        picture = str(chance.choices(range(NUM_PICTURES), weights)[0])
        name = choose(picture, {each: len(calls) for each, calls in left.items()})
        is_known = caches[name].get(picture) is not None
        if not is_known:
            caches[name].put(picture, True, 1)
        left[name].append(chance.expovariate(1.0) * (1.0 if is_known else WORK_OF_A_NEW_PICTURE))

    for _ in range(num_clients):
        begin()
    now, num_done = 0.0, 0
    while num_done < num_calls:
        step = min(min(calls) * len(calls) for calls in left.values() if calls)
        now += step
        for name, calls in left.items():
            left[name] = [work for work in (work - step / len(calls) for work in calls) if work > 1e-9]
        ended = num_clients - sum(map(len, left.values()))
        num_done += ended
        for _ in range(ended):
            begin()
    hits, misses = (sum(getattr(cache, name) for cache in caches.values()) for name in ("num_hits", "num_misses"))
    return {"hits": round(hits / (hits + misses), 3), "speed": round(num_done / now, 2)}


if __name__ == "__main__":
    main()
