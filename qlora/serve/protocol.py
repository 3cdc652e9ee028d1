"""The OpenAI chat-completions API as far as it is spoken here: what may be asked, and the shapes of what is said.

A parameter that would change the answer and is not supported is an error, not ignored; those that change nothing here
(`user`, `metadata`) are let pass.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora.live import Answer


class ApiError(Exception):
    """Something to say to the client in place of an answer.

    status  of HTTP
    kind    OpenAI's `type`
    param   which parameter is to blame
    code    for programs
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    # What a client sends back of an earlier answer has fields that are empty there.
    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


_Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(BaseModel):
    """The body of POST /v1/chat/completions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # None is 0: as `qlora generate` answers
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    # Only what is the case anyway
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: _Format | None = None
    # Nothing to an answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    def turns(self) -> list[dict[str, str]]:
        return [message.turn() for message in self.messages]

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def most_tokens(self, limit: int) -> int:
        """Tokens of the answer, at most. Raises ApiError where more are asked for than are given."""
        for param in ("max_completion_tokens", "max_tokens"):
            if (asked := getattr(self, param)) is not None:
                if asked > limit:
                    raise ApiError(400, f"{param} is {asked:,}; this server gives at most {limit:,}", param=param)
                return asked
        return limit


def read_request(body: bytes) -> ChatRequest:
    """Raises ApiError that names the parameter."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"`{place}` is not supported here", param=place, code="unsupported_parameter") from None
        where = f"`{place}`: " if place else ""
        raise ApiError(400, f"{where}{first['msg']}", param=place or None) from None


class Completion:
    """One answer in OpenAI's shapes."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "finish_reason": answer.ended, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _usage(answer)}

    def chunk(self, delta: dict[str, str], ended: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": ended, "logprobs": None}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "qlora"}
