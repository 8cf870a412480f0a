"""Save: a compiled model -> a package, a directory of native code that torch runs without Dynamo and a compiler."""

from moeca_compile.exporting.packages.entry import save

__all__ = ["save"]
