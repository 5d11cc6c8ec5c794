"""MedRAX's tool against the real gateway: the shape of its answers, and the prompt that its model was asked by."""

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from deployments.messages import Rejected
from llava_core.errors import RequestError
from llava_core.types import GenerationRequest, ImagePart, TextPart
from tests.deployments.fakes import ScriptedEngine, answer
from tests.deployments.pictures import plain
from tests.sockets import serving_engine

pytest.importorskip("langchain_core")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    """The class."""
    spec = importlib.util.spec_from_file_location("llava_med_tool", ROOT / "examples/llava_med_tool.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LlavaMedTool


@pytest.mark.parametrize("with_picture", [True, False])
def test_the_answer_is_a_text_and_what_was_asked(*, with_picture: bool, tool: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(plain())
    path = str(tmp_path / "x.png") if with_picture else None
    engine = ScriptedEngine(answer(" No", " finding. "))
    asked = {"question": "What is seen?", "image_path": path}
    with serving_engine(engine) as url:
        made = tool(url=url)
        assert made.name == "llava_med_qa"
        expected = ("No finding.", {**asked, "analysis_status": "completed"})
        assert made.invoke(asked) == expected
        assert asyncio.run(made.ainvoke(asked)) == expected
    for request in engine.requests:
        assert isinstance(request, GenerationRequest)
        assert request.template == "vicuna_v1_med"
        assert (request.sampling.temperature, request.sampling.max_tokens) == (0.0, 500)
        pictures = (ImagePart(plain()),) if with_picture else ()
        assert request.messages[0].parts == (*pictures, TextPart("What is seen?"))


def test_no_error_gets_out(tool: Any, tmp_path: Path) -> None:
    with serving_engine(ScriptedEngine([Rejected(RequestError("no picture at all", param="messages"))])) as url:
        made = tool(url=url)
        for path, named in ((str(tmp_path / "none.png"), "none.png"), (None, "no picture at all")):
            for text, told in (
                made.invoke({"question": "What?", "image_path": path}),
                asyncio.run(made.ainvoke({"question": "What?", "image_path": path})),
            ):
                assert text.startswith("Error generating answer: ")
                assert named in text
                assert told == {"question": "What?", "image_path": path, "analysis_status": "failed"}
