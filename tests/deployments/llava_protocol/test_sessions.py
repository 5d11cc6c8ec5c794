"""Whole sessions of the original clients, byte for byte: their requests, and the reference's responses."""

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from deployments.gateway import Gateway
from tests.deployments.fakes import ScriptedEngine, all_ready, answer

SESSIONS = sorted((Path(__file__).parent / "sessions").glob("*.json"))


@pytest.mark.parametrize("file", SESSIONS, ids=lambda path: path.stem)
def test_a_session_is_answered_byte_for_byte(file: Path) -> None:
    session = json.loads(file.read_text(encoding="utf-8"))
    engine = ScriptedEngine(answer(*session["pieces"]) if session["pieces"] else ())
    with TestClient(Gateway({session["model"]: engine}, all_ready).app) as client:
        for exchange in session["exchanges"]:
            body = exchange["body"]
            # Like requests: a JSON body, or none at all.
            response = client.post(exchange["path"], **({"json": body} if body else {}))
            assert response.status_code == 200
            assert response.content == exchange["answer"].encode(), exchange["path"]


def test_all_sessions_are_found() -> None:
    assert {file.stem for file in SESSIONS} == {"gradio_page", "medrax_benchmark", "test_message", "worker"}
