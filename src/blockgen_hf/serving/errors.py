"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import re
from collections.abc import Container
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException


_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
# What `generate` and the engine call it, and what a body does.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "num_logprobs": "logprobs",
    "sequence_bias": "logit_bias",
}
# Values of a body are quoted in messages up to this length.
_LONGEST_VALUE = 80


class ApiError(Exception):
    """
    An answer that is an error.

    Args:
        status: HTTP status.
        message: what was given, and what is accepted.
        param: the field of the body that it is about.
        code: a short name for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status > 500 else "invalid_request_error")
        # A lone surrogate, which JSON can spell, has no UTF-8.
        message = str(self).encode(errors="replace").decode()
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def bad_request(error: ValueError, prompt_field: str = "prompt") -> ApiError:
    """
    A 400 of what the engine refused; its field is the one that the message begins with, in backticks.

    Args:
        prompt_field: what the body calls the text before the answer.
    """
    message = " ".join(str(error).split())
    for ours, theirs in {**_NAMES, "inputs": prompt_field}.items():
        message = message.replace(f"`{ours}`", f"`{theirs}`")
    named = re.match(r"`(\w+)", message)
    return ApiError(400, message, named and named[1])


def invalid_body(error: ValidationError, fields: Container[str]) -> ApiError:
    """
    A 400 that names the first field that is not as it must be.

    Args:
        fields: the names of all fields, those of objects in the body too.
    """
    errors = error.errors(include_url=False, include_context=False)
    # A field of several types has an error for each of them. Not the wrong type is what is meant.
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}.")
    if first["type"] == "value_error":
        return bad_request(ValueError(f"{first['msg'].removeprefix('Value error, ')}."))
    # Without pydantic's names for the members of a union, and for keys.
    *outer, last = first["loc"] or ("",)
    known = [str(part) for part in outer if isinstance(part, int) or part in fields]
    if first["type"] == "extra_forbidden":
        place = ".".join([*known, str(last)])
        return ApiError(400, f"Unknown field `{place}`.", place, "unknown_parameter")
    place = ".".join([*known, str(last)] if isinstance(last, int) or last in fields else known)
    if not place:
        return ApiError(400, f"The body must be a JSON object: {first['msg']}.")
    if first["type"] == "missing":
        return ApiError(400, f"`{place}` is missing.", place)
    value = repr(first["input"])
    value = value if len(value) <= _LONGEST_VALUE else value[:_LONGEST_VALUE] + "..."
    return ApiError(400, f"`{place}`: {first['msg']}, but is {value}.", place)


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", headers={"Retry-After": "1"})


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> JSONResponse:
        # Raised again behind this answer, and logged with its traceback.
        return ApiError(500, "The server made a mistake. Its log says more.").response()


__all__ = ["ApiError", "bad_request", "install_error_handlers", "invalid_body", "shutting_down"]
