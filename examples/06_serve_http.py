"""Draw digits for web requests from a bundle, without torch: a label and a seed give a PNG, or a page that shows how it
appears.

    python -m examples.04_serve_bundle                          # writes digits.moeca; this needs torch
    python -m examples.06_serve_http
    curl -o three.png 'http://localhost:8000/digits/3?seed=7'

The same request always gives the same image. http://localhost:8000/ shows an image step by step.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import fastapi
import numpy as np
from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.responses import FileResponse, StreamingResponse
from PIL import Image

from examples.samplers import euler, guided, model_of
from moeca_compile.runtime import Session

PAGE = Path(__file__).with_name("serve_page.html")
CLASSES = 10
MOST = 16  # images that are drawn at a time; each holds the state of its trajectory
GUIDANCE = 2.0


def drawn(session: Session, label: int, seed: int, steps: int) -> Iterator[Any]:
    """One digit after each step, as arrays [H, W] with values from -1 to 1. The trajectory holds the cached state of
    this request, until the iterator ends or is dropped."""
    channels, height, width = session.inputs[0].shape[1:]
    x = np.random.default_rng(seed).standard_normal((1, channels, height, width), dtype=np.float32)
    with session.trajectory(steps=steps) as trajectory:
        model = guided(model_of(trajectory), np.array([CLASSES]), GUIDANCE)
        for times in itertools.pairwise(np.linspace(1, 0, steps + 1)):
            x = euler(model, x, np.array([label]), times, time_scale=1000.0)
            yield x[0, 0]


def draw(session: Session, label: int, seed: int, steps: int) -> Any:
    """One digit as an array [H, W], with values from -1 to 1."""
    *_, image = drawn(session, label, seed, steps)
    return image


def png(image: Any) -> bytes:
    """Encode an array [H, W] with values from -1 to 1."""
    gray = np.uint8(np.rint((np.clip(image, -1, 1) + 1) * 127.5))
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, format="PNG")
    return buffer.getvalue()


def application(bundle: str | Path = "digits.moeca") -> FastAPI:
    """Make the web application. The session opens once, here; its trajectories may run in any threads."""
    session = Session.open(bundle, threads=1)
    app = FastAPI(title="digits")
    places = app.state.places = threading.BoundedSemaphore(MOST)

    def in_turn(label: int, seed: int, steps: int) -> Iterator[Any]:
        """What `drawn` gives, while it has a place."""
        if not places.acquire(blocking=False):
            raise HTTPException(503, f"{MOST} images are being drawn: try again", {"Retry-After": "1"})
        try:
            yield from drawn(session, label, seed, steps)
        finally:
            places.release()

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE)

    @app.get("/digits/{label}")
    def digit(  # a plain function: FastAPI runs it in a thread of its own, so requests don't wait for each other
        label: Annotated[int, fastapi.Path(ge=0, lt=CLASSES)],
        seed: Annotated[int, Query(ge=0)] = 0,
        steps: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Response:
        *_, image = in_turn(label, seed, steps)
        return Response(png(image), media_type="image/png")

    @app.get("/digits/{label}/steps")
    def digit_by_steps(
        label: Annotated[int, fastapi.Path(ge=0, lt=CLASSES)],
        seed: Annotated[int, Query(ge=0)] = 0,
        steps: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> StreamingResponse:
        """The image after each step, as server-sent events."""
        images = in_turn(label, seed, steps)
        first = next(images)  # before the answer begins: a refusal has a status of its own

        def events() -> Iterator[str]:
            for step, image in enumerate(itertools.chain((first,), images), 1):
                data = {"step": step, "steps": steps, "png": base64.b64encode(png(image)).decode()}
                yield f"data: {json.dumps(data)}\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def main(argv: Sequence[str] | None = None) -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description="Draw digits for web requests from a bundle.")
    parser.add_argument("--bundle", type=Path, default=Path("digits.moeca"), help="what examples.04_serve_bundle wrote")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="the port to listen at (default 8000)")
    args = parser.parse_args(argv)
    uvicorn.run(application(args.bundle), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
