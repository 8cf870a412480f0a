"""Methods of a model that call its forward: which names a method loads from `self`."""

from __future__ import annotations

from typing import Any

import pytest

from moeca_compile.frontend.methods import called_on_self


class Model:
    def forwards(self, x: Any) -> Any:
        return self.forward(x)  # type: ignore[attr-defined]

    def calls(self, x: Any) -> Any:
        return self(x)  # type: ignore[operator]

    def holds_constants(self, x: Any) -> Any:
        names = () if x else ("other", "self")
        return names, self.config  # type: ignore[attr-defined]

    def loads_another(self, x: Any) -> Any:
        return x.forward(self)

    @staticmethod
    def takes_nothing() -> None: ...


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (Model.forwards, {"forward"}),
        (Model.calls, {"__call__"}),
        (Model.holds_constants, {"config"}),
        (Model.loads_another, set()),
        (Model.takes_nothing, set()),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_names_that_are_loaded_from_self(method: Any, names: set[str]) -> None:
    assert called_on_self(method) == names
