"""Clients as LLaVA and MedRAX have them, written from the protocol with none of the service's code: the Gradio page's
server, `test_message`, and MedRAX's HTTP benchmark.

They ignore the status of a response to a question, send no key, and split frames at zero bytes.
"""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
from PIL import Image

USER_AGENT = {"User-Agent": "LLaVA Client"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CHEERFUL_ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"


def frames_of(response: requests.Response, chunk_size: int = 512) -> Iterator[dict[str, Any]]:
    for chunk in response.iter_lines(chunk_size=chunk_size, decode_unicode=False, delimiter=b"\0"):
        if chunk:
            yield json.loads(chunk)


def as_png(picture: bytes, size: tuple[int, int] | None = None) -> str:
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    buffer = io.BytesIO()
    (image if size is None else image.resize(size)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@dataclass
class GradioPage:
    """`options` are requests' own, such as `auth`, for a server whose environment has a .netrc file."""

    controller: str
    options: dict[str, Any] = field(default_factory=dict)

    def load(self) -> list[str]:
        """Return what the page's list of models shows."""
        response = requests.post(f"{self.controller}/refresh_all_workers", timeout=60, **self.options)
        assert response.status_code == 200
        return self.models()

    def models(self) -> list[str]:
        """Return the same without refreshing the workers, since an answer would count as a sign of life."""
        models = requests.post(f"{self.controller}/list_models", timeout=60, **self.options).json()["models"]
        priority = {"vicuna-13b": "aaaaaaa", "koala-13b": "aaaaaab"}
        return sorted(models, key=lambda name: priority.get(name, name))

    def address(self, model: str) -> str:
        body = {"model": model}
        response = requests.post(f"{self.controller}/get_worker_address", json=body, timeout=60, **self.options)
        return response.json()["address"]

    def ask(self, model: str, prompt: str, images: list[str], stop: str, **parameters: Any) -> Iterator[str]:
        """Yield what the chat window shows, each time it changes."""
        address = self.address(model)
        if not address:
            yield CHEERFUL_ERROR
            return
        body = {"model": model, "prompt": prompt, "temperature": 0.2, "top_p": 0.7, "max_new_tokens": 512, "stop": stop}
        body |= {"images": images} | parameters
        try:
            # The 10 s are for each next piece.
            response = requests.post(
                f"{address}/worker_generate_stream",
                headers=USER_AGENT,
                json=body,
                stream=True,
                timeout=10,
                **self.options,
            )
            for data in frames_of(response):
                if data["error_code"] == 0:
                    yield data["text"][len(prompt) :].strip() + "▌"
                else:
                    yield f"{data['text']} (error_code: {data['error_code']})"
                    return
        except requests.exceptions.RequestException:
            yield f"{CHEERFUL_ERROR} (error_code: 4)"


def send_test_message(
    controller: str, model: str, message: str, *, worker: str | None = None, max_new_tokens: int = 32
) -> str | None:
    """Return the text after the last separator, which is a space; None where there is no worker."""
    if worker is None:
        requests.post(f"{controller}/refresh_all_workers", timeout=60)
        requests.post(f"{controller}/list_models", timeout=60).json()["models"].sort()
        worker = requests.post(f"{controller}/get_worker_address", json={"model": model}, timeout=60).json()["address"]
    if worker == "":
        return None
    # Without an open slot for the assistant.
    prompt = f"{SYSTEM} USER: {message} "
    body = {"model": model, "prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": 0.7, "stop": " "}
    response = requests.post(f"{worker}/worker_generate_stream", headers=USER_AGENT, json=body, stream=True, timeout=60)
    last = prompt
    for data in frames_of(response, 8192):
        assert data["text"].startswith(prompt)
        last = data["text"]
    return last[len(prompt) :]


def medrax_benchmark(controller: str, model: str, question: str, picture: bytes) -> tuple[str, dict[str, Any]]:
    """Return the answer, and the last frame."""
    requests.post(f"{controller}/refresh_all_workers", timeout=30)
    assert model in requests.post(f"{controller}/list_models", timeout=30).json()["models"]
    worker = requests.post(f"{controller}/get_worker_address", json={"model": model}, timeout=30).json()["address"]
    prompt = f"[INST] <image>\n{question} [/INST]"
    body = {
        "model": model,
        "prompt": prompt,
        "max_new_tokens": 150,
        "temperature": 0.5,
        "stop": "</s>",
        "images": [as_png(picture, (400, 400))],
        "top_p": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
    }
    headers = {"User-Agent": "LLaVA-Med Client"}
    response = requests.post(f"{worker}/worker_generate_stream", headers=headers, json=body, stream=True, timeout=30)
    *_, last = frames_of(response, 8192)
    return last["text"].split("[/INST]")[-1], last
