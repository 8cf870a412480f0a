"""The graphs of the passes, for the report: the passes dump them to a folder, and they are read from there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moeca_compile.engine.output_program import OutputProgram
from moeca_compile.engine.program import Program
from moeca_compile.inspect.html.graphs import read, written
from moeca_compile.inspect.report import Report
from moeca_compile.options import Options
from moeca_compile.pipeline import build_variant, dump_folder


class GraphRecorder:
    """Has the passes write their graphs to a folder, and reads them for the report.

    Attributes:
        is_on: whether graphs are wanted.
    """

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self._temporary: TemporaryDirectory[str] | None = None
        self._folder: Path | None = None
        self._before: set[Path] = set()

    def __enter__(self) -> GraphRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def options(self, options: Options) -> Options:
        """The options, with a folder for the graphs where they name none."""
        if not self.is_on:
            return options
        if self._folder is None:
            self._folder = dump_folder(options)
            if self._folder is None:
                self._temporary = TemporaryDirectory()
                self._folder = Path(self._temporary.name)
            self.forget()
        return replace(options, dump=self._folder)

    def add_to(self, report: Report) -> Report:
        """The report with the graphs that were written since `options` was first called."""
        if self._folder is None:
            return report
        new = [path for path in written(self._folder) if path not in self._before]
        return replace(report, pass_graphs=read(new, [name for name, *_ in report.passes]))

    def forget(self) -> None:
        """Leave out the graphs that were written so far, such as those of several programs under the same names."""
        if self._folder is not None:
            self._before = set(written(self._folder))

    def rewrite(self, program: Program) -> None:
        """Write the graphs of a program that was made without this recorder: those of its variants alone, for the
        captured graph is gone."""
        if self.is_on and not isinstance(program, OutputProgram):
            options = self.options(program.options)
            for row in program.schedule.distinct_rows():
                build_variant(program.analysis, program.schedule, row, options, program.variant(row).name)
