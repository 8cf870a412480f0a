"""Packages in torch: a saved model's native code, run by the same steps as a captured program. Without Dynamo."""

from moeca_compile.engine.packages.model import LoadedModel, load

__all__ = ["LoadedModel", "load"]
