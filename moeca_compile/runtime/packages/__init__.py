"""Packages on disk: native code that `moeca_compile.save` made. No torch here; `engine/packages` runs them."""
