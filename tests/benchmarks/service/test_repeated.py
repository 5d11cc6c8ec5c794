"""Which requests count as new and which as repeated, without a service."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.peers.load import Answer
from benchmarks.service import repeated

NEW_S = 2.0


@pytest.mark.parametrize(("again_s", "is_kept"), [(0.4, True), (0.6, False)])
def test_a_picture_counts_as_repeated_after_its_first_question(
    monkeypatch: pytest.MonkeyPatch, again_s: float, *, is_kept: bool
) -> None:
    seen: set[str] = set()
    questions: set[str] = set()

    def run_load(port: int, bodies: list[dict[str, Any]], clients: int) -> Any:
        assert (port, clients) == (7, 1)
        answers = []
        for body in bodies:
            picture, question = body["messages"][0]["content"]
            url = picture["image_url"]["url"]
            first_s = again_s if url in seen else NEW_S
            seen.add(url)
            questions.add(question["text"])
            answers.append(Answer(1.0, (1.0 + first_s,), 1, 30, 4))
        return answers, 10.0

    monkeypatch.setattr(repeated, "run_load", run_load)
    monkeypatch.setattr(repeated, "serving", lambda _: contextlib.nullcontext(SimpleNamespace(port=7)))
    monkeypatch.setattr(repeated, "checkpoint", lambda *_: contextlib.nullcontext(Path()))
    (failed, ratio), figures = repeated.run(3, None)
    assert (failed.measured, failed.is_kept) == (0, True)
    assert ratio.measured == pytest.approx(again_s / NEW_S)
    assert ratio.is_kept is is_kept
    assert figures["new"] == {"requests": 3, "first_ms_p50": 2000, "first_ms_p99": 2000}
    assert figures["repeated"]["requests"] == 3
    # One more of each for warm-up; no question is repeated.
    assert (len(seen), len(questions)) == (4, 8)
