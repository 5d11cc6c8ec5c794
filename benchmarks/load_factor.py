"""How far a replica may be busier than the others before its key's requests go elsewhere: a simulation.

    python -m benchmarks.load_factor [--calls 6000] [--json FILE]

Each client asks about a picture as soon as its last question is answered. A replica divides its speed among its calls,
and caches the pictures it has seen last. A cached picture takes a third of the work of a new one. The simulation is
random but repeatable; nothing is measured, so results are the same on every machine. Replicas are chosen by our order,
or, like Serve, as the less busy of two.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.graph.affinity import by_preference
from llava_core.lru import LruCache

NUM_PICTURES = 200
# The size of all replicas' caches together, relative to the number of pictures.
ROOM = 1.125
WORK_OF_A_NEW_PICTURE = 3.0
FACTORS = (1.1, 1.25, 1.5, 2.0, 100.0)
# Replicas, clients, and the skew of the pictures' popularity: uniform, or Zipf-like as for words.
CASES = [(replicas, clients, skew) for replicas, clients in ((2, 4), (2, 16), (4, 32), (8, 64)) for skew in (0.0, 1.2)]

# From a picture and each replica's number of calls to the chosen replica.
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
    """Return the hit rate, and calls per unit of time; the unit is what a replica needs for a call about a cached
    picture."""
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
