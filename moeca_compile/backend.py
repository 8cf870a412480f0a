"""Where torch finds the backend "moeca": the entry point `torch_dynamo_backends` names this file."""

from moeca_compile.frontend.backend import Backend, moeca
from moeca_compile.frontend.entry import ENTRIES

__all__ = ["ENTRIES", "Backend", "moeca"]
