"""MedRAX's `LlavaMedTool` with the model on a service: the same name, arguments and answers, no weights in the agent.

Replace MedRAX's own import by `from llava_med_tool import LlavaMedTool`. Requires `langchain-core`, which MedRAX
includes. The prompt format is the original tool's, `vicuna_v1` as LLaVA-Med renders it, decoded greedily. Unlike the
original, it also answers questions without a picture.
"""

from typing import Any

from langchain_core.tools import BaseTool
from pydantic import BaseModel, Field

from llava_core.client import AsyncClient, Client, Reply
from llava_core.errors import LlavaError

OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 500, "extra": {"template": "vicuna_v1_med"}}


class LlavaMedInput(BaseModel):
    """The arguments that the agent passes."""

    question: str = Field(description="The question about medicine, or about the picture")
    image_path: str | None = Field(None, description="The path of a JPG, PNG or DICOM picture, if there is one")


class LlavaMedTool(BaseTool):
    """Asks the model that `url` serves under the name `model`, or its only model. The service's configuration replaces
    the original's arguments for loading weights (`model_path`, `device`, `load_in_8bit`, ...)."""

    name: str = "llava_med_qa"
    description: str = (
        "Answers questions about medicine and about biomedical pictures. Give it a question and, if it is about a "
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
    """Returns the error as the answer instead of raising it, so that the agent can continue."""
    told = {"question": question, "image_path": image_path, "analysis_status": "failed"}
    return f"Error generating answer: {error}", told
