"""Images as data URIs, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeca_compile.errors import UserError

_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def pairs_of(uncached: Sequence[Any], cached: Sequence[Any]) -> list[tuple[str, str]]:
    """Pairs of images of the same prompt and seed, as data URIs.

    Args:
        uncached: images of PIL, or paths of image files.
        cached: as many, in the same order.

    Raises:
        UserError: not as many of one as of the other, or something else than an image.
    """
    if len(uncached) != len(cached):
        raise UserError(
            f"images: {len(uncached)} uncached and {len(cached)} cached; give as many of each, in the same order"
        )
    return [(data_uri(left), data_uri(right)) for left, right in zip(uncached, cached, strict=True)]


def data_uri(image: Any) -> str:
    """One image of PIL (written as PNG) or one image file, as a data URI.

    Raises:
        UserError: it is neither, or the file can't be read.
    """
    if isinstance(image, (str, Path)):
        try:
            content = Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"image {str(image)!r} can't be read: {error.strerror}") from error
    elif callable(getattr(image, "save", None)) and hasattr(image, "size"):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        content = buffer.getvalue()
    else:
        raise UserError(
            f"images: {type(image).__name__} is no image; give images of PIL, as a pipeline returns them, or paths of "
            "PNG, JPEG, GIF or WebP files"
        )
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    raise UserError(f"image {str(image)!r} is no PNG, JPEG, GIF or WebP file")
