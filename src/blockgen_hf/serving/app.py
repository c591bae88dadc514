"""The application: OpenAI's endpoints, and those for whoever runs the server."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from .errors import ApiError, install_error_handlers
from .formats import ChatFormat, CompletionFormat
from .metrics import CountRequests
from .protocol import ChatBody, CompletionBody
from .service import ServerOptions, Service


_SCHEMA = "#/components/schemas/"


def create_app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: ServerOptions) -> FastAPI:
    """
    An application that answers as OpenAI's API does. The model works while the application runs (its lifespan), in a
    thread of its own.

    Args:
        model: a BlockGen model in evaluation mode, on its device. Nobody else may use it meanwhile.
        tokenizer: that of the model.
        options: names, limits and keys.
    """
    service = Service(model, tokenizer, options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.shutdown()

    app = _Application(title="blockgen-hf", version=__version__, lifespan=lifespan)
    app.state.service = service
    install_error_handlers(app)
    _add_openai_routes(app, service)
    _add_operator_routes(app, service)
    if options.allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.allow_origins), allow_methods=["*"], allow_headers=["*"]
        )
    paths = frozenset(app.openapi()["paths"])
    app.add_middleware(CountRequests, metrics=service.metrics, paths=paths)
    return app


class _Application(FastAPI):
    """Its description has the bodies of requests, which `Service` reads: it says in OpenAI's words what is wrong."""

    def openapi(self) -> dict[str, Any]:
        description: dict[str, Any] = super().openapi()
        _, schemas = models_json_schema(
            [(body, "validation") for body in (CompletionBody, ChatBody)], ref_template=_SCHEMA + "{model}"
        )
        description.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        return description


def _add_openai_routes(app: FastAPI, service: Service) -> None:
    options = service.options
    created = int(time.time())

    async def check_key(authorization: Annotated[str | None, Header()] = None) -> None:
        if options.api_key is None:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(key.strip().encode(), options.api_key.encode()):
            raise ApiError(
                401,
                "The API key is missing or wrong: send `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    def model_card() -> dict[str, Any]:
        card = Model(id=options.model_name, created=created, object="model", owned_by="blockgen-hf")
        return {**card.to_dict(), "max_model_len": service.facts.positions, "blockgen": service.facts.description()}

    @router.head("/models", include_in_schema=False)
    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @router.head("/models/{name:path}", include_in_schema=False)
    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_card()

    @router.post("/completions", openapi_extra=_body_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await service.answer(request, CompletionBody, CompletionFormat)

    @router.post("/chat/completions", openapi_extra=_body_schema(ChatBody))
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, ChatBody, ChatFormat)

    app.include_router(router)


def _body_schema(body: type[BaseModel]) -> dict[str, Any]:
    schema = {"$ref": _SCHEMA + body.__name__}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _add_operator_routes(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken, else 503."""
        if service.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


__all__ = ["create_app"]
