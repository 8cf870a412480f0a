"""More to draw than digits: 62 letters and digits in many typefaces, 32 x 32, and the DiT-MoE that draws them."""

from examples.glyphs.model import CLASSES, build_model, initial_noise, labels_of, load_model, sample

__all__ = ["CLASSES", "build_model", "initial_noise", "labels_of", "load_model", "sample"]
