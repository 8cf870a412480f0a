"""Train two dense DiTs on the digits, with and without long skips, all else equal; about 15 minutes each on one core.

    python -m examples.train_skip                     # both, one after the other, into examples/checkpoints
    python -m examples.train_skip --only plain        # one of them: skip, plain
    python -m examples.train_skip --steps 200         # a quick look
    python -m examples.train_skip --evaluate          # class accuracy of the committed models' samples

The loop, the data and the loss are those of `examples/train_digits.py`, which also says what must be installed.
"""

from __future__ import annotations

import getopt
import sys
import time
from collections.abc import Sequence

import torch

from examples import skip_dit
from examples.train_digits import evaluate, fit

FILES = {"skip": skip_dit.SKIP_FILE, "plain": skip_dit.PLAIN_FILE}


def train(name: str, steps: int, seed: int = 0) -> None:
    """Train "skip" or "plain" from a seeded start; both see the same batches, times and noise."""
    torch.manual_seed(seed)
    fit(skip_dit.build_digits(skips=name == "skip"), FILES[name], steps, seed)


def main(argv: Sequence[str] | None = None) -> None:
    """Options: --only skip|plain; --steps N (default 5000); --evaluate, only measure what is saved."""
    try:
        given = list(sys.argv[1:] if argv is None else argv)
        pairs, rest = getopt.getopt(given, "", ["only=", "steps=", "evaluate"])
        options = dict(pairs)
        steps = int(options.get("--steps", 5000))
    except (getopt.GetoptError, ValueError) as error:
        raise SystemExit(f"{error}\n{main.__doc__}") from None
    names = [options["--only"]] if "--only" in options else list(FILES)
    if rest or steps < 1 or not set(names) <= set(FILES):
        raise SystemExit(f"no positional arguments, at least one step, skip or plain\n{main.__doc__}")
    torch.set_num_threads(1)
    for name in names:
        if "--evaluate" not in options:
            started = time.perf_counter()
            train(name, steps)
            print(f"{name}: trained in {(time.perf_counter() - started) / 60:.1f} min -> {FILES[name]}")
        accuracy = evaluate(skip_dit.load_digits(skips=name == "skip"))
        print(f"{name}: class accuracy of 500 samples, 50 steps, guidance 2: {accuracy:.1%}")


if __name__ == "__main__":
    main()
