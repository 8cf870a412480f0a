"""Draw digits for web requests from a bundle, without torch: a label and a seed give a PNG.

    python -m examples.04_serve_bundle                          # writes digits.moeca; this needs torch
    python -m examples.06_serve_http
    curl -o three.png 'http://localhost:8000/digits/3?seed=7'

The same request always gives the same image.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import fastapi
import numpy as np
from fastapi import FastAPI, Query, Response
from PIL import Image

from examples.samplers import euler, guided, model_of
from moeca_compile.runtime import Session

CLASSES = 10
GUIDANCE = 2.0


def draw(session: Session, label: int, seed: int, steps: int) -> Any:
    """One digit as an array [H, W], with values from -1 to 1. The trajectory holds the cached state of this request."""
    channels, height, width = session.inputs[0].shape[1:]
    x = np.random.default_rng(seed).standard_normal((1, channels, height, width), dtype=np.float32)
    with session.trajectory(steps=steps) as trajectory:
        model = guided(model_of(trajectory), np.array([CLASSES]), GUIDANCE)
        return euler(model, x, np.array([label]), np.linspace(1, 0, steps + 1), time_scale=1000.0)[0, 0]


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

    @app.get("/digits/{label}")
    def digit(  # a plain function: FastAPI runs it in a thread of its own, so requests don't wait for each other
        label: Annotated[int, fastapi.Path(ge=0, lt=CLASSES)],
        seed: Annotated[int, Query(ge=0)] = 0,
        steps: Annotated[int, Query(ge=1, le=200)] = 50,
    ) -> Response:
        return Response(png(draw(session, label, seed, steps)), media_type="image/png")

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
