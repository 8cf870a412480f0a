"""Which extras of the package are installed completely, and what the others lack."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable

USES = {
    "cli": "the commands",
    "models": "pipelines of diffusers",
    "onnx": "export, and bundles on onnxruntime",
    "openvino": "bundles on OpenVINO",
    "serve": "the example that serves over HTTP",
}


def missing_of_extras() -> dict[str, list[str]]:
    """For each extra of `USES` the packages that it would bring and that aren't here. Empty if the package itself
    isn't installed but imported from a folder."""
    try:
        required = importlib.metadata.requires("moeca-compile") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return missing_in(required)


def missing_in(required: Iterable[str]) -> dict[str, list[str]]:
    """The same for requirements as metadata writes them: `onnx; extra == "onnx"`."""
    missing: dict[str, list[str]] = {extra: [] for extra in USES}
    for requirement in required:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", requirement)
        if name and extra and extra[1] in missing and not _is_installed(name[0]):
            missing[extra[1]].append(name[0])
    return missing


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
