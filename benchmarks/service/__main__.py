"""The bars of the running service, each measured by a command that fails when one of them is not kept.

    python -m benchmarks.service mixed [--minutes 15]       # errors, memory, slots and hang-ups under a mixed load
    python -m benchmarks.service chaos [--minutes 20]       # every answer complete and unchanged, whatever is killed
    python -m benchmarks.service burst [--requests 500]     # excess requests are refused at once, others answered
    python -m benchmarks.service repeated [--pictures 8]    # time to first token for a picture seen before
    python -m benchmarks.service share [--rounds 4]         # the service compared with the engine alone, on `mid`

Each starts its own service, talks to 127.0.0.1 only and ends everything it started. `--mid DIR` is where the random
weights of `mid` are or will be written; without it they are created for this run. Needs the packages of the `serve` and
`dev` extras.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.service import burst, chaos, mixed, repeated, share
from benchmarks.service.bars import Bar, make_table


def main() -> None:
    options = _parse()
    # So that SIGTERM ends the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    bars, figures = _measure(options)
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int | float)}
    results = {
        "work": options.work,
        **settings,
        "machine": describe_machine(),
        "bars": {bar.what: bar.as_json() for bar in bars},
        **figures,
    }
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    print(make_table(bars))
    if not all(bar.is_kept for bar in bars):
        raise SystemExit(1)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    works = parser.add_subparsers(dest="work", required=True)
    mixed = works.add_parser("mixed")
    mixed.add_argument("--minutes", type=float, default=15)
    mixed.add_argument("--clients", type=int, default=8)
    mixed.add_argument("--pause-seconds", type=float, default=30, help="between two measurements of hang-ups")
    mixed.add_argument("--seed", type=int, default=0)
    killing = works.add_parser("chaos")
    killing.add_argument("--minutes", type=float, default=20)
    killing.add_argument("--clients", type=int, default=4)
    killing.add_argument("--every", type=float, default=20, help="seconds from one kill to the next")
    works.add_parser("burst").add_argument("--requests", type=int, default=500)
    works.add_parser("repeated").add_argument("--pictures", type=int, default=8)
    share = works.add_parser("share")
    share.add_argument("--rounds", type=int, default=4)
    share.add_argument("--requests", type=int, default=32, help="of each contender in each round")
    for name, work in works.choices.items():
        work.add_argument("--json", type=Path, help="also write the figures here")
        if name in ("repeated", "share"):
            work.add_argument("--mid", type=Path, help="the checkpoint's folder; created if missing")
    return parser.parse_args()


def _measure(options: argparse.Namespace) -> tuple[list[Bar], dict[str, Any]]:
    if options.work == "mixed":
        pause_s = options.pause_seconds
        return mixed.run(options.minutes, clients=options.clients, pause_s=pause_s, seed=options.seed)
    if options.work == "chaos":
        return chaos.run(options.minutes, clients=options.clients, every_s=options.every)
    if options.work == "burst":
        return burst.run(options.requests)
    if options.work == "repeated":
        return repeated.run(options.pictures, options.mid)
    return share.run(options.rounds, options.requests, options.mid)


if __name__ == "__main__":
    main()
