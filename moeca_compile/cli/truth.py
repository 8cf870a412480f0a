"""`--truth` of `moeca calibrate`: a word, or samples by seed from a file or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeca_compile.errors import OptionError
from moeca_compile.schedule.output import CONVERGED, UNCACHED

if TYPE_CHECKING:
    import numpy as np


def read_truth_option(text: str) -> str | Mapping[int, np.ndarray[Any, Any]]:
    """What `--truth` means.

    Args:
        text: `uncached`, `converged`, an .npz file with one array [N, ...] a seed, which is its name, or a folder of
            `<seed>.npy`, as `moeca_compile.distributed.sample` writes it.

    Returns:
        The word, or the samples by seed.

    Raises:
        OptionError: there is nothing of the kind, or an entry that isn't named after a seed.
    """
    if text in (UNCACHED, CONVERGED):
        return text
    import numpy as np  # here, so that --help and completion don't wait for it

    path = Path(text)
    if not (path.is_dir() or path.is_file()):
        raise OptionError(
            f"--truth {text}: expected uncached, converged, an .npz file with one array a seed, or a folder of SEED.npy"
        )
    try:
        if path.is_dir():
            arrays = {file.stem: np.load(file, allow_pickle=False) for file in sorted(path.glob("*.npy"))}
        else:
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored.items())
    except Exception as error:  # zip files and arrays can be damaged in many ways
        raise OptionError(f"--truth {text} can't be read: {error}") from error
    if not arrays or (strange := [name for name in arrays if not name.isdecimal()]):
        found = f"an array named {strange[0]!r}" if arrays else "no array"
        raise OptionError(
            f"--truth {text} has {found}; expected one array of samples a seed, named after it: 0, 1, ..., 1000, ..."
        )
    return {int(name): array for name, array in arrays.items()}
