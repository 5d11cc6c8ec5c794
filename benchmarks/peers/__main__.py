"""llava-serve, vLLM's CPU build and `transformers serve` over HTTP, in turns on this machine; then the engine alone.

    python -m benchmarks.peers --vllm-venv DIR [--rounds 3] [--sizes tiny mid] [--json FILE] [--readme]
    python -m benchmarks.peers --table FILE         # README's table again, from such a JSON

All serve the same random-weight checkpoints, which are created first, in bfloat16 and with their default settings, and
get the same requests: streamed answers of 64 tokens about one picture. vLLM is installed into DIR if it is missing.
Needs the packages of the `serve` and `dev` extras, talks to 127.0.0.1 only, and ends everything it started.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import describe_machine
from benchmarks.peers.checkpoints import SHAPES, write_checkpoint
from benchmarks.peers.compare import Amounts, compare
from benchmarks.peers.contenders import ROOT, Contender, make_contenders, own_threads, running
from benchmarks.peers.report import make_table, rewrite

README = ROOT / "README.md"
# Memory that all servers together may need: vLLM's cache alone takes 4 GiB.
_NEEDED_GIB = {"tiny": 7, "mid": 14}


def main() -> None:
    options = _parse()
    if options.table:
        rewrite(README, json.loads(options.table.read_text(encoding="utf-8")))
        return
    # So that SIGTERM ends the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    contenders = make_contenders(options.vllm_venv)
    results: dict[str, Any] = {
        "machine": {**describe_machine(), "memory_gib": round(psutil.virtual_memory().total / 2**30)},
        "versions": {contender.name: contender.version for contender in contenders},
        "commands": {contender.name: contender.command for contender in contenders},
        "rounds": options.rounds,
        "notes": NOTES,
        "sizes": {},
        "engine in process": {},
    }
    for size in options.sizes:
        results["sizes"][size] = measure_size(size, contenders, options)
        if options.engine_rounds:
            results["engine in process"][size] = measure_engine(size, options.engine_rounds)
        # Written now, so that these figures survive a failure of the rest.
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(make_table(results))
    if options.readme:
        rewrite(README, results)


NOTES = [
    "first: to the first chunk with text; gap: between arrivals of chunks, several of which may come at once; token: "
    "from the first chunk to the last over the tokens after the first. Milliseconds; p50 and p99 are of a round's "
    "requests, and of these the medians of the rounds are given.",
    "ours_over: llava-serve's figure over that server's in each round.",
    "cpu: shares of all cores while the load ran; idle servers other than llava-serve are stopped (SIGSTOP).",
    "cpu_ms_per_request_…: processor time of llava-serve's own processes; Ray's is that of all that are no stage.",
    "transformers serve answers one request after the other (continuous batching is not for models with pictures), so "
    "with several clients it gets fewer requests. Its rates are not changed by that; its first_ms is that of as many "
    "clients as it gets requests, where these are fewer.",
    "floor: arithmetic and bytes that cannot be left out over the best rates of the machine in the same run.",
]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-venv", type=Path, help="vLLM's own virtual environment, 3.5 GB; created if missing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    for size, counts, most in (("tiny", (16, 64, 128), 32), ("mid", (3, 16, 16), 8)):
        parser.add_argument(
            f"--{size}-requests", type=int, nargs=3, default=counts, metavar="N", help="of each workload in each round"
        )
        parser.add_argument(
            f"--{size}-unbatched",
            type=int,
            default=most,
            metavar="N",
            help="at most, with several clients, to a server that answers requests one by one",
        )
    parser.add_argument("--engine-rounds", type=int, default=3, help="of benchmarks.engine afterwards; 0 skips it")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only make README's table from this JSON")
    options = parser.parse_args()
    if not options.table and not options.vllm_venv:
        parser.error("--vllm-venv is needed")
    return options


def measure_size(size: str, contenders: list[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Start all servers with this checkpoint, compare them and stop them."""
    check_memory(size)
    given = vars(options)
    amounts = Amounts(options.rounds, tuple(given[f"{size}_requests"]), given[f"{size}_unbatched"])
    with tempfile.TemporaryDirectory(prefix="peers-") as work, ExitStack() as stack:
        folder = write_checkpoint(Path(work) / size, SHAPES[size])
        parameters = (folder / "model.safetensors").stat().st_size / 2
        servers = []
        for contender in contenders:
            server = stack.enter_context(running(contender, folder, Path(work)))
            print(f"{contender.name} ready after {server.start_s} s", file=sys.stderr)
            # The next one starts undisturbed.
            server.pause()
            servers.append(server)
        return {"parameters_m": round(parameters / 1e6, 1), **compare(size, servers, amounts)}


def check_memory(size: str) -> None:
    """Raises SystemExit where the servers would not fit in memory together: with swapping, the disk would be
    measured."""
    available = psutil.virtual_memory().available / 2**30
    if available < _NEEDED_GIB[size]:
        raise SystemExit(f"{size} needs {_NEEDED_GIB[size]} GiB of free memory, and there are {available:.1f}")


def measure_engine(size: str, rounds: int) -> dict[str, Any]:
    """Run `benchmarks.engine` on a decoder of the same shape, with no server running."""
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        figures = Path(work) / "engine.json"
        command = [sys.executable, "-m", "benchmarks.engine", "--size", size, "--rounds", str(rounds)]
        options = ["--dtype", "bfloat16", "--json", str(figures)]
        subprocess.run([*command, *options], cwd=ROOT, env=own_threads(), check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
