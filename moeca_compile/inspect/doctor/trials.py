"""What works here, by trying it: each in a process of its own, so that a crash or a hang is an answer too."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

from moeca_compile.inspect.doctor import programs

SECONDS = 300.0  # what a trial may take


class Outcome(StrEnum):
    """How a trial ended."""

    WORKS = "works"
    FAILS = "fails"
    MISSING = "missing"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Trial:
    """Something that either works on this machine or doesn't.

    Attributes:
        name: of what is tried.
        program: Python code. It prints what it found, in one line. It raises ModuleNotFoundError if a package isn't
            there, and anything else if it doesn't work.
        remedy: what helps if it is missing or fails.
        needed: nothing of the package works without it.
    """

    name: str
    program: str
    remedy: str
    needed: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a trial.

    Attributes:
        name: of what was tried.
        outcome: how it ended.
        text: what was found, or the reason.
        remedy: what helps; empty if it works.
        needed: nothing of the package works without it.
    """

    name: str
    outcome: Outcome
    text: str
    remedy: str
    needed: bool


TRIALS = (
    Trial("torch", programs.TORCH, "pip install torch (2.11 or newer)", needed=True),
    Trial("backend", programs.BACKEND, "pip install moeca-compile, or pip install -e . in a clone"),
    Trial(
        "C++ compiler", programs.COMPILER,
        "install g++ and Python's headers (Debian and Ubuntu: apt install g++ python3-dev); without them inner='eager'",
    ),
    Trial("onnxruntime", programs.ONNXRUNTIME, "pip install 'moeca-compile[onnx]'"),
    Trial("OpenVINO", programs.OPENVINO, "pip install 'moeca-compile[openvino]'"),
    Trial("TensorRT", programs.TENSORRT, "pip install 'moeca-compile[tensorrt]' or 'moeca-compile[tensorrt-rtx]'"),
    Trial("diffusers", programs.DIFFUSERS, "pip install 'moeca-compile[models]'"),
)  # fmt: skip
INDUCTOR = Trial("Inductor", programs.INDUCTOR, "see the C++ compiler; TORCH_LOGS=output_code shows what was compiled")


def run_trials(with_inductor: bool) -> list[Result]:
    """Run every trial, two at a time. Inductor's takes up to a minute, so it is run on request alone."""
    trials = (*TRIALS, INDUCTOR) if with_inductor else TRIALS
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_trial, trials))
    if not with_inductor:
        reason = "it compiles for up to a minute: moeca doctor --compile"
        results.append(Result(INDUCTOR.name, Outcome.NOT_TRIED, reason, "", False))
    return results


def run_trial(trial: Trial, seconds: float = SECONDS) -> Result:
    """Run one trial in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", trial.program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, errors="replace")
    except subprocess.TimeoutExpired:
        return Result(trial.name, Outcome.FAILS, f"no answer in {seconds:.0f} s", trial.remedy, trial.needed)
    if done.returncode == 0:
        return Result(trial.name, Outcome.WORKS, _last(done.stdout.splitlines()), "", trial.needed)
    outcome, text = _failure(done.returncode, done.stderr.splitlines())
    return Result(trial.name, outcome, text, trial.remedy, trial.needed)


def _failure(status: int, errors: Sequence[str]) -> tuple[Outcome, str]:
    text = _last(errors)
    if status < 0:
        return Outcome.FAILS, f"killed by {signal.Signals(-status).name}. {text}".strip()
    if text.startswith("ModuleNotFoundError"):
        return Outcome.MISSING, text.partition(": ")[2]
    return Outcome.FAILS, text


def _last(lines: Sequence[str]) -> str:
    """The last line that isn't empty, cut to what a table holds."""
    filled = [line.strip() for line in lines if line.strip()]
    return filled[-1][:300] if filled else ""
