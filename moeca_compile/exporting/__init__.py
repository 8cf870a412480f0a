"""Export: a model and a schedule -> a bundle, a directory that runs without torch and without the model's code."""

from moeca_compile.exporting.entry import export

__all__ = ["export"]
