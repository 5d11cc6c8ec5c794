"""README's table of the comparison, built from the benchmark's JSON alone. Knows neither servers nor measurements."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.contenders import OURS, TRANSFORMERS, VLLM

BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"
# From a figure of the JSON to its column's heading and number format.
COLUMNS = {
    "first_ms_p50": ("first token, ms", "{:,.0f}"),
    "token_ms_p50": ("each further, ms", "{:,.1f}"),
    "gap_ms_p99": ("gap, 99 %, ms", "{:,.1f}"),
    "tokens_per_s": ("tokens per second", "{:,.1f}"),
}
_SENSE = {"first_ms_p50": "≥ ", "token_ms_p50": "≥ ", "gap_ms_p99": "", "tokens_per_s": "≤ "}


def make_table(results: Mapping[str, Any]) -> str:
    """Build one row for each workload and contender; in brackets, ours over theirs."""
    heads = ["model, clients", "server", *(head for head, _ in COLUMNS.values())]
    rows = [heads, ["---", "---", *["---:"] * len(COLUMNS)]]
    for size, found in results["sizes"].items():
        for name, work in found["works"].items():
            label = f"`{size}`, {name}"
            for contender in (OURS, VLLM, TRANSFORMERS):
                if contender in work:
                    rows.append([label, contender, *_cells(work, contender)])
                    label = ""
            if "floor" in work:
                rows.append([label, "*floor*", *(_floor_cell(work["floor"], name) for name in COLUMNS)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(work: Mapping[str, Any], contender: str) -> list[str]:
    compared = work["ours_over"].get(contender, {})
    return [
        form.format(work[contender][name]) + (f" ({compared[name]['median']:.2f})" if name in compared else "")
        for name, (_, form) in COLUMNS.items()
    ]


def _floor_cell(limits: Mapping[str, float], name: str) -> str:
    return _SENSE[name] + COLUMNS[name][1].format(limits[name]) if name in limits else ""


def make_section(results: Mapping[str, Any]) -> str:
    """Build the table and the notes that explain it."""
    machine, versions = results["machine"], results["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if name != OURS)
    note = (
        f"{machine['cores']} cores of {machine['processor']}; {named}; medians of {results['rounds']} rounds in turns. "
        "In brackets: llava-serve's figure divided by that server's, the median of the rounds' ratios. An idle "
        "llava-serve, which unlike the others cannot be paused while they run, "
        f"took up to {_idle_share(results):.0%} of the cores."
    )
    notes = (note, *_parts_note(results), *_engine_note(results))
    return "\n\n".join([make_table(results), *(textwrap.fill(text, 120) for text in notes)])


def _parts_note(results: Mapping[str, Any]) -> list[str]:
    """Say where the processor time of a small model's answer goes."""
    sizes, prefix = results["sizes"], "cpu_ms_per_request_"
    work = sizes.get("tiny", {"works": {}})["works"].get("32 clients, new pictures", {}).get(OURS, {})
    spent = {name.removeprefix(prefix): value for name, value in work.items() if name.startswith(prefix)}
    if not spent:
        return []
    parts = sorted(spent.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {value:.0f}" for name, value in parts if value >= 0.5)
    total = sum(spent.values())
    return [f"Milliseconds of processor time per answer of `tiny` with 32 clients: {told}; in all {total:.0f}."]


def _idle_share(results: Mapping[str, Any]) -> float:
    """Return the largest share that idle servers took while another server was measured."""
    works = [work for found in results["sizes"].values() for work in found["works"].values()]
    return max(float(work[name]["cpu_idle_servers"]) for work in works for name in (VLLM, TRANSFORMERS) if name in work)


def _engine_note(results: Mapping[str, Any]) -> list[str]:
    found = results.get("engine in process", {}).get("mid")
    if found is None:
        return []
    eight = found["8 requests, new pictures"]
    return [
        "The engine alone in one process, `mid`, 8 requests at once, pictures already encoded: "
        f"{eight['engine']['tokens_per_s']:g} tokens per second; transformers' `generate` in one batch: "
        f"{eight['transformers generate']['tokens_per_s']:g}."
    ]


def rewrite(readme: Path, results: Mapping[str, Any]) -> None:
    """Put the section between the two marks; raises SystemExit where they are missing."""
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme} lacks {BEGIN} or, after it, {END}")
    readme.write_text(f"{before}{BEGIN}\n{make_section(results)}\n{END}{after}", encoding="utf-8")
