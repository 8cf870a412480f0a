"""What the doctor finds: as data, as tables for a terminal, and as Markdown for a report of a fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moeca_compile.inspect.doctor.extras import USES, missing_of_extras
from moeca_compile.inspect.doctor.machine import machine, packages
from moeca_compile.inspect.doctor.trials import Outcome, Result, run_trials

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Diagnosis:
    """The machine, what works on it, and what is missing.

    Attributes:
        version: of moeca-compile.
        machine: facts of the machine by name.
        packages: versions by name.
        results: of the trials.
        missing: for each extra, the packages of it that aren't installed.
    """

    version: str
    machine: Mapping[str, str]
    packages: Mapping[str, str]
    results: Sequence[Result]
    missing: Mapping[str, Sequence[str]]

    @property
    def healthy(self) -> bool:
        """Whether everything works that nothing can do without."""
        return all(result.outcome is Outcome.WORKS for result in self.results if result.needed)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "healthy": self.healthy}

    def to_markdown(self) -> str:
        """The block for a report of a fault."""
        lines = [f"moeca-compile {self.version}"]
        lines += [f"{name}: {value}" for name, value in self.machine.items()]
        lines += ["packages: " + ", ".join(f"{name} {version}" for name, version in self.packages.items())]
        lines += [f"{result.name}: {result.outcome}. {result.text}" for result in self.results]
        return "\n".join(["```text", *lines, "```"])

    def tables(self) -> list[Table]:
        """The tables for a terminal: the machine, the trials, what to install."""
        from rich.table import Table

        facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        facts.add_row("moeca-compile", self.version)
        for name, value in self.machine.items():
            facts.add_row(name, value)
        facts.add_row("packages", ", ".join(f"{name} {version}" for name, version in self.packages.items()))
        trials = Table("tried", "result", "what was found", box=None, padding=(0, 2, 0, 0))
        for result in self.results:
            trials.add_row(result.name, str(result.outcome), result.text)
        tables = [facts, trials]
        remedies = [result for result in self.results if result.remedy]
        extras = {extra: names for extra, names in self.missing.items() if names}
        if remedies or extras:
            install = Table("for", "do", box=None, padding=(0, 2, 0, 0))
            for result in remedies:
                install.add_row(result.name, result.remedy)
            for extra, names in extras.items():
                install.add_row(USES[extra], f"pip install 'moeca-compile[{extra}]' (lacks {', '.join(names)})")
            tables.append(install)
        return tables


def diagnose(version: str, with_inductor: bool = False) -> Diagnosis:
    """Look at this machine and try what the package needs.

    Args:
        version: of moeca-compile.
        with_inductor: also compile a small function.

    Returns:
        What was found.
    """
    return Diagnosis(version, machine(), packages(), run_trials(with_inductor), missing_of_extras())
