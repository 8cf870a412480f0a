"""Train the glyphs model, and the judge of its samples; stop and resume it as you like.

    python -m examples.glyphs.fonts                                   # once: the data
    python -m examples.train_glyphs --minutes 60 --bf16               # train, or go on training
    python -m examples.train_glyphs --device cuda --batch 256 --minutes 20
    python -m examples.train_glyphs --judge                           # train the classifier
    python -m examples.train_glyphs --evaluate 1000                   # accuracy and Frechet distance of samples

State and log are in build/glyphs; the averaged weights are exported as float16 at every save. Images per second of one
CPU core: about 20 in float32, about 30 with --bf16 where the processor has instructions for it.
"""

from __future__ import annotations

import getopt
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from examples import glyphs
from examples.frechet import features_of, frechet
from examples.glyphs import data, judge, model
from examples.glyphs.fonts import FOLDER
from examples.glyphs.training import Training
from examples.train_digits import save

LOG_EVERY = 50  # steps
OPTIONS = ["data=", "out=", "minutes=", "device=", "batch=", "seed=", "bf16", "judge", "evaluate=", "save-every="]


def train(training: Training, out: Path, minutes: float, save_every: float) -> None:
    """Take steps for so many minutes, or until SIGTERM or SIGINT; save every so many minutes and at the end."""
    stopped = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    started = saved = logged = time.monotonic()
    losses = []
    while not stopped and time.monotonic() - started < 60 * minutes:
        losses.append(training.advance())
        now = time.monotonic()
        if len(losses) == LOG_EVERY:
            rate = LOG_EVERY * training.batch / (now - logged)
            print(f"step {training.step} loss {sum(losses) / len(losses):.4f} images/s {rate:.1f}", flush=True)
            losses, logged = [], now
        if now - saved > 60 * save_every:
            write(training, out)
            saved = now
    write(training, out)


def write(training: Training, out: Path) -> None:
    """The state to resume from, and the averaged weights in float16."""
    training.save(out / "train.pt")
    save(training.average, out / model.MODEL_FILE.name)
    print(f"saved at step {training.step}", flush=True)


def evaluate(out: Path, folder: Path, n: int) -> str:
    """Sample n glyphs of the averaged weights (50 steps, guidance 2); how good they are, in words."""
    network = glyphs.load_model(out / model.MODEL_FILE.name)
    images = torch.cat([glyphs.sample(network, seed, n=62) for seed in range(-(-n // 62))])[:n]
    judge.picture(images[:620], out / "samples.png")
    classifier = judge.load(out / judge.CLASSIFIER_FILE.name)
    accuracy = judge.accuracy(classifier, images, glyphs.labels_of(n))
    real, _ = data.load("test", folder)
    trained, _ = data.load("train", folder)
    made, train, test = (features_of(classifier, some) for some in (images, trained, real))
    distance, floor = frechet(made, test), frechet(train, test)
    return (
        f"{n} samples: {accuracy:.1%} classified right, Frechet {distance:.2f} to test faces (train faces {floor:.2f})"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Options: --data DIR and --out DIR (build/glyphs), --minutes M (60), --save-every M (5), --device D (cpu),
    --batch N (32), --seed N (0), --bf16 (always on CUDA), --judge, --evaluate N.
    """
    try:
        pairs, rest = getopt.getopt(list(sys.argv[1:] if argv is None else argv), "", OPTIONS)
        options = {name.removeprefix("--"): value for name, value in pairs}
        batch, seed, count = (int(options.get(*pair)) for pair in (("batch", 32), ("seed", 0), ("evaluate", 1)))
        minutes, save_every = float(options.get("minutes", 60)), float(options.get("save-every", 5))
    except (getopt.GetoptError, ValueError) as error:
        raise SystemExit(f"{error}\n{main.__doc__}") from None
    if rest or min(batch, count) < 1 or seed < 0 or min(minutes, save_every) < 0:
        raise SystemExit(f"no positional arguments, no negative numbers\n{main.__doc__}")
    folder, out, device = (
        Path(options.get("data", FOLDER)),
        Path(options.get("out", FOLDER)),
        options.get("device", "cpu"),
    )
    out.mkdir(parents=True, exist_ok=True)
    if "judge" in options:
        accuracy = judge.train(out / judge.CLASSIFIER_FILE.name, folder, seed)
        print(f"classifier: {accuracy:.1%} of glyphs of unseen typefaces")
    elif "evaluate" in options:
        print(evaluate(out, folder, count))
    else:
        torch.manual_seed(seed)
        network = glyphs.build_model().to(device)
        bf16 = "bf16" in options or network.pos_embed.is_cuda
        training = Training(network, *data.load("train", folder), batch=batch, seed=seed, bf16=bf16)
        if (out / "train.pt").exists():
            training.resume(out / "train.pt")
        train(training, out, minutes, save_every)


if __name__ == "__main__":
    main()
