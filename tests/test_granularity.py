"""What `granularity` may say, and what is said about anything else."""

from __future__ import annotations

import pytest

from moeca_compile.errors import OptionError
from moeca_compile.granularity import Granularity
from moeca_compile.options import Options


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("region", Granularity("region")),
        ("stack", Granularity("blocks")),
        ("blocks:2:-2", Granularity("blocks", 2, -2, relative=True)),
        ("blocks::3", Granularity("blocks", None, 3, relative=True)),
        ("blocks:1:", Granularity("blocks", 1, None, relative=True)),
        ("skip:4", Granularity("skip", kept=4)),
    ],
)
def test_texts(text: str, meant: Granularity) -> None:
    assert Granularity.parse(text) == meant


@pytest.mark.parametrize("text", ["", "blocks", "blocks:2", "blocks:a:b", "skip", "skip:0", "skip:-1", "Stack"])
def test_another_text_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(OptionError, match=r"not understood; use 'region', 'stack', 'blocks:START:STOP'"):
        Options(granularity=text)


def test_it_is_a_text() -> None:
    with pytest.raises(OptionError, match="granularity=3"):
        Options(granularity=3)  # type: ignore[arg-type]
