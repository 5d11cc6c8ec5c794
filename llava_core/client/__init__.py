"""A client for the service, or for any server with OpenAI's chat completions API; the public names.

    client = Client("http://127.0.0.1:8000")
    print(client.ask("What is in the picture?", "scene.png").text)

Needs httpx, but none of the model code's dependencies.
"""

from llava_core.client.answers import Choice, Delta, Logprob, Reply
from llava_core.client.asynchronous import AsyncAnswerStream, AsyncClient
from llava_core.client.batches import Question, Result
from llava_core.client.conversation import AsyncConversation, Conversation
from llava_core.client.errors import (
    AnswerInterruptedError,
    AuthenticationError,
    BadRequestError,
    ConnectionFailedError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    ServiceError,
    TimeoutExceededError,
)
from llava_core.client.messages import Picture
from llava_core.client.requests import Options
from llava_core.client.retries import Retries
from llava_core.client.synchronous import AnswerStream, Client

__all__ = [
    "AnswerInterruptedError",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClient",
    "AsyncConversation",
    "AuthenticationError",
    "BadRequestError",
    "Choice",
    "Client",
    "ConnectionFailedError",
    "Conversation",
    "Delta",
    "InvalidResponseError",
    "Logprob",
    "NotFoundError",
    "Options",
    "PermissionDeniedError",
    "Picture",
    "Question",
    "RateLimitError",
    "Reply",
    "Result",
    "Retries",
    "ServerError",
    "ServiceError",
    "TimeoutExceededError",
]
