"""The ASGI application: the routes of the HTTP API and of the search page."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import resources
from io import BytesIO
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image

from jaxclip.catalog import pictures
from jaxclip.catalog.pictures import mime
from jaxclip.errors import UserError
from jaxclip.serving.gallery import Filters
from jaxclip.serving.searcher import BATCHES, MAX_RESULTS, Searcher
from jaxclip.serving.searcher import Query as SearchQuery
from jaxclip.web import schemas, uploads
from jaxclip.web.batching import Batcher, Overloaded
from jaxclip.web.guard import Guard
from jaxclip.web.metrics import CONTENT_TYPE, Metrics

MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
SCALE_ABOVE_BYTES = 40_000
"""A picture of more bytes than this is scaled down to the size that the request gives; smaller files never are."""
RETRY = {"Retry-After": "1"}


@dataclass(frozen=True)
class Limits:
    """Upper limits of what the server accepts.

    Attributes:
      query: characters in a sentence, id or filter.
      filters: filters in one search.
      body: bytes of an uploaded picture.
      uploads: pictures that are being received, are waiting to be decoded or are being decoded at the same time.
      requests: requests in progress at the same time.
      seconds: time for a picture to arrive, and time for a search to be answered.
    """

    query: int = 1000
    filters: int = 64
    body: int = 10_000_000
    uploads: int = 32
    requests: int = 512
    seconds: float = 10.0


LIMITS = Limits()
Text = Annotated[str, Query(max_length=LIMITS.query, description="a sentence")]
Number = Annotated[int, Query(ge=1, le=MAX_RESULTS, description="largest number of products to return")]
Start = Annotated[int, Query(ge=0, le=2**31, description="number of products to skip")]
Like = Annotated[str | None, Query(max_length=LIMITS.query, description="id of a product whose neighbours to find")]
Filter = Annotated[
    list[Annotated[str, Query(max_length=LIMITS.query)]],
    Query(
        max_length=LIMITS.filters,
        description="ATTRIBUTE:VALUE; a product must have one of the given values of each given attribute",
    ),
]
Rerank = Annotated[
    bool | None,
    Query(description="whether the second stage re-orders the results of a sentence; default: yes if there is one"),
]
Identity = Annotated[str, Path(max_length=LIMITS.query, description="id of a product")]
PictureNumber = Annotated[int, Query(ge=0, le=2**31, description="number of the picture; 0 is the main one")]
Size = Annotated[
    int | None,
    Query(
        ge=16,
        le=1024,
        description="largest length of the longer side, in pixels; files of at most 40,000 bytes are not scaled",
    ),
]


class Service:
    """The searcher of all requests; one thread runs batches of queries, and two threads decode and scale pictures."""

    def __init__(self, searcher: Searcher, limits: Limits, metrics: Metrics):
        self.searcher, self.gallery, self.limits = searcher, searcher.gallery, limits
        self.batcher = Batcher(
            searcher.find, size=BATCHES[-1], waiting=limits.requests, seconds=limits.seconds, observe=metrics.batch
        )
        self.uploading = 0
        self.decoders = ThreadPoolExecutor(2, thread_name_prefix="pictures")
        metrics.watch(len(self.gallery), lambda: self.batcher.waiting)

    async def search(self, query: SearchQuery) -> schemas.ResultsSchema:
        """Returns the results of a query; raises HTTPException (429 or 503) if the server is too busy."""
        allowed = self.gallery.allowed(query.filters)
        try:
            result = await self.batcher(query)
        except Overloaded:
            raise HTTPException(429, "too many searches are waiting: try again later", RETRY) from None
        except TimeoutError:
            raise HTTPException(503, "the search took too long: try again later", RETRY) from None
        matching = len(self.gallery) if allowed is None else int(allowed.sum())
        return schemas.search_results(self.gallery, self.searcher.second, result, matching)

    async def read_upload(self, request: Request) -> np.ndarray:
        """Returns the picture in a request, preprocessed for the image tower.

        Raises:
          HTTPException: see `uploads.read`; 429 if too many pictures are being uploaded.
          UserError: the picture cannot be decoded.
        """
        if self.uploading >= self.limits.uploads:
            raise HTTPException(429, "too many pictures are being uploaded: try again later", RETRY)
        self.uploading += 1
        try:
            body = await uploads.read(request, max_bytes=self.limits.body, seconds=self.limits.seconds)
            return await self.run_in_thread(self.searcher.read_picture, body)
        finally:
            self.uploading -= 1

    async def run_in_thread(self, work: Any, *arguments: Any) -> Any:
        """Returns work(*arguments), computed in a thread so that the event loop stays free for other requests."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, work, *arguments)

    def picture(self, product: int, number: int, size: int | None) -> bytes:
        """Returns a picture of the product at this index, encoded, scaled down if it is large and a size is given.

        Raises:
          HTTPException: 404 if the product has no picture of this number.
        """
        encoded_pictures = self.gallery.pictures(product)
        if number >= len(encoded_pictures):
            raise HTTPException(
                404, f"the product has no picture {number}: its last one is {len(encoded_pictures) - 1}"
            )
        encoded = encoded_pictures[number]
        if size is None or len(encoded) <= SCALE_ABOVE_BYTES:
            return encoded
        buffer = BytesIO()
        Image.fromarray(pictures.pixels(encoded, size)).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def number(self, id: str) -> int:
        """Returns the gallery index of the product with this id; raises HTTPException 404 if there is none."""
        number = self.gallery.number(id)
        if number is None:
            raise HTTPException(404, f"there is no product with the id {id!r}")
        return number


def make_app(searcher: Searcher, *, loopback: bool = True, token: str = "", limits: Limits = LIMITS) -> FastAPI:
    """Returns the ASGI application for a warmed-up searcher; see `guard.Guard` for loopback and token."""
    metrics = Metrics()
    service = Service(searcher, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving = asyncio.create_task(service.batcher.serve())
        yield
        serving.cancel()
        service.decoders.shutdown(wait=False, cancel_futures=True)

    problems = {code: {"model": schemas.Problem} for code in (401, 421, 422, 429, 503)}
    app = FastAPI(
        title="jaxclip search",
        version="1",
        description="Finds products of a gallery by a sentence, a picture, or both.",
        lifespan=lifespan,
        responses=problems,
        docs_url=None,  # FastAPI's documentation page would load scripts from other hosts
        redoc_url=None,
    )
    app.add_middleware(Guard, loopback=loopback, token=token, max_requests=limits.requests, metrics=metrics)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(UserError, _user_error)
    _add_search(app, service)
    _add_products(app, service)
    _add_operation(app, service, metrics)
    _add_page(app)
    return app


def _add_search(app: FastAPI, service: Service) -> None:
    def query(
        q: str, k: int, filter: Sequence[str], like: str | None, rerank: bool | None, **picture: Any
    ) -> SearchQuery:
        number = None if like is None else service.gallery.number(like)
        if like is not None and number is None:
            raise UserError(f"like: there is no product with the id {like!r}")
        if not q.strip() and number is None and not picture:
            raise UserError("the query is empty: give q, like or a picture")
        reranks = service.searcher.reranks(rerank)
        return SearchQuery(text=q, like=number, filters=_filters(filter), k=k, rerank=reranks, **picture)

    @app.get("/v1/search", summary="Find products by a sentence, a similar product, or both")
    async def search(
        q: Text = "", k: Number = 10, filter: Filter = (), like: Like = None, rerank: Rerank = None
    ) -> schemas.ResultsSchema:
        return await service.search(query(q, k, filter, like, rerank))

    @app.post(
        "/v1/search",
        summary="Find products by a picture, optionally with a sentence or a similar product",
        openapi_extra={"requestBody": uploads.REQUEST_BODY},
        responses={code: {"model": schemas.Problem} for code in (408, 413, 415)},
    )
    async def search_picture(
        request: Request,
        q: Text = "",
        k: Number = 10,
        filter: Filter = (),
        like: Like = None,
        rerank: Rerank = None,
    ) -> schemas.ResultsSchema:
        picture = await service.read_upload(request)
        return await service.search(query(q, k, filter, like, rerank, picture=picture))


def _add_products(app: FastAPI, service: Service) -> None:
    not_found = {404: {"model": schemas.Problem}}
    description = schemas.gallery(service.searcher)

    @app.get("/v1/gallery", summary="The gallery and its filters")
    async def gallery() -> schemas.GallerySchema:
        return description

    @app.get("/v1/products", summary="Products in the catalogue's order")
    async def products(k: Number = 10, start: Start = 0, filter: Filter = ()) -> schemas.ResultsSchema:
        allowed = service.gallery.allowed(_filters(filter))
        numbers = np.arange(len(service.gallery)) if allowed is None else np.flatnonzero(allowed)
        page = numbers[start : start + k].tolist()
        return schemas.results(service.gallery, page, [None] * len(page), len(numbers))

    @app.get("/v1/products/{id:path}", summary="The details of a product", responses=not_found)
    async def product(id: Identity) -> schemas.ProductSchema:
        return schemas.product(service.gallery.details(service.number(id)))

    @app.get(
        "/v1/images/{id:path}",
        summary="One of a product's pictures",
        response_class=Response,
        responses=not_found | {200: {"content": {"image/jpeg": {}, "image/png": {}}}},
    )
    async def image(id: Identity, size: Size = None, number: PictureNumber = 0) -> Response:
        encoded = await service.run_in_thread(service.picture, service.number(id), number, size)
        return Response(encoded, media_type=mime(encoded), headers={"Cache-Control": "private, max-age=3600"})


def _add_operation(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", summary="Whether searches are answered")
    async def readyz() -> dict[str, str]:
        await service.search(SearchQuery(text="ready", k=1))
        return {"status": "ok"}

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _add_page(app: FastAPI) -> None:
    folder = resources.files("jaxclip.web") / "page"

    async def send(content: bytes, kind: str) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    for file in folder.iterdir():
        path = "/" if file.name == "index.html" else f"/{file.name}"
        kind = MEDIA_TYPES[file.name[file.name.rindex(".") :]]
        app.add_api_route(path, partial(send, file.read_bytes(), kind), include_in_schema=False)


def _filters(texts: Sequence[str]) -> Filters:
    """Returns attribute -> values from texts of the form "ATTRIBUTE:VALUE"; raises UserError for any other text."""
    filters: dict[str, list[str]] = {}
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon:
            raise UserError(f"filter: {text!r} is not of the form ATTRIBUTE:VALUE")
        filters.setdefault(name, []).append(value)
    return filters


async def _validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)
