"""MedRAX's `LlavaMedTool` with the model on a service: the same name, arguments and answers, no weights in the agent.

In place of MedRAX's own: `from llava_med_tool import LlavaMedTool`. Needs `langchain-core`, which MedRAX has. The
prompt is the tool's own, in `vicuna_v1` as LLaVA-Med renders it, decoded greedily. A question without a picture, which
the original fails on, is answered.
"""

from typing import Any

from langchain_core.tools import BaseTool
from pydantic import BaseModel, Field

from llava_core.client import AsyncClient, Client, Reply
from llava_core.errors import LlavaError

OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 500, "extra": {"template": "vicuna_v1_med"}}


class LlavaMedInput(BaseModel):
    """What the agent gives."""

    question: str = Field(description="The question about medicine, or about the picture")
    image_path: str | None = Field(None, description="The path of a JPG, PNG or DICOM picture, where there is one")


class LlavaMedTool(BaseTool):
    """Asks the model that `url` serves under the name `model`, or the only one there is. The original's arguments for
    loading weights (`model_path`, `device`, `load_in_8bit`, ...) are the service's to decide."""

    name: str = "llava_med_qa"
    description: str = (
        "Answers questions about medicine and about biomedical pictures. Give it a question and, where it is about a "
        "picture, its path. It may not be reliable for the detailed analysis of chest X-rays."
    )
    args_schema: type[BaseModel] = LlavaMedInput
    url: str = "http://127.0.0.1:8000"
    api_key: str | None = Field(None, repr=False)
    model: str | None = None

    def _run(self, question: str, image_path: str | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
        try:
            with Client(self.url, api_key=self.api_key) as client:
                reply = client.ask(question, *_pictures(image_path), **self._options())
        except LlavaError as error:
            return _failed(error, question, image_path)
        return _answered(reply, question, image_path)

    async def _arun(self, question: str, image_path: str | None = None, **_: Any) -> tuple[str, dict[str, Any]]:
        try:
            async with AsyncClient(self.url, api_key=self.api_key) as client:
                reply = await client.ask(question, *_pictures(image_path), **self._options())
        except LlavaError as error:
            return _failed(error, question, image_path)
        return _answered(reply, question, image_path)

    def _options(self) -> dict[str, Any]:
        return OPTIONS if self.model is None else {**OPTIONS, "model": self.model}


def _pictures(image_path: str | None) -> list[str]:
    return [] if image_path is None else [image_path]


def _answered(reply: Reply, question: str, image_path: str | None) -> tuple[str, dict[str, Any]]:
    return reply.text.strip(), {"question": question, "image_path": image_path, "analysis_status": "completed"}


def _failed(error: LlavaError, question: str, image_path: str | None) -> tuple[str, dict[str, Any]]:
    """No error gets out, because the agent goes on with what it is told."""
    told = {"question": question, "image_path": image_path, "analysis_status": "failed"}
    return f"Error generating answer: {error}", told
