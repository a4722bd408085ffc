"""Reads an uploaded picture from a request."""

import asyncio
from collections.abc import AsyncIterator

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

FIELD = "image"
FORM = "multipart/form-data"
RAW = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
REQUEST_BODY = {
    "required": True,
    "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in RAW}
    | {
        FORM: {
            "schema": {
                "type": "object",
                "properties": {FIELD: {"type": "string", "format": "binary"}},
                "required": [FIELD],
                "additionalProperties": False,
            }
        }
    },
}
"""OpenAPI description of the request body."""


async def read(request: Request, *, max_bytes: int, seconds: float) -> bytes:
    """Returns the encoded picture in a request: its body, or the only field of a form.

    Raises:
      HTTPException: 408 if the body takes longer than `seconds`; 413 if it exceeds `max_bytes`; 415 if it is neither a
        picture nor a form; 422 if the picture is missing or the form is invalid.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != FORM and kind != "application/octet-stream" and not kind.startswith("image/"):
        raise HTTPException(
            415, f"send the picture as image/* or in the field {FIELD!r} of a form, not as {kind[:80]!r}"
        )
    try:
        async with asyncio.timeout(seconds):
            body = await _body(request, max_bytes)
    except TimeoutError:
        raise HTTPException(408, f"the picture did not arrive within {seconds:g} seconds") from None
    if kind == FORM:
        body = await _field(request, body)
    if not body:
        raise HTTPException(422, "the picture is empty")
    return body


async def _body(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdigit() and len(declared) < 20 else 0
    if size <= max_bytes:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > max_bytes:
                break
            parts.append(part)
    if size > max_bytes:
        raise HTTPException(413, f"a picture may have at most {max_bytes:,} bytes", {"Connection": "close"})
    return b"".join(parts)


async def _field(request: Request, body: bytes) -> bytes:
    async def stream() -> AsyncIterator[bytes]:
        yield body
        yield b""

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=1).parse()
    except (MultiPartException, KeyError, UnicodeDecodeError, LookupError) as error:
        reason = getattr(error, "message", "it is malformed")
        raise HTTPException(422, f"the form cannot be read: {reason}") from None
    try:
        (name, field), *others = form.multi_items() or [("", "")]
        if name != FIELD or others or not isinstance(field, UploadFile):
            raise HTTPException(422, f"the form must have one file in the field {FIELD!r} and nothing else")
        return await field.read()
    finally:
        await form.close()
