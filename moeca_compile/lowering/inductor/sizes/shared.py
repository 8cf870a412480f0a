"""Compiled programs that serve every size: the second size of a graph is compiled with symbols, further ones find it.
Where the graph of another size is known beforehand, already the first one is.

Each size is still captured and rewritten with its own numbers. A program serves it only if its graph is, number for
number, the symbolic graph at this size, and the conditions hold under which torch compiled that. So nothing that a pass
decided at one size is taken over to another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

from moeca_compile.graph import fx

if TYPE_CHECKING:
    from moeca_compile.lowering.inductor.sizes.expressions import Dim
    from moeca_compile.lowering.inductor.sizes.form import Form
    from moeca_compile.lowering.inductor.sizes.symbolic import Numbers, Rule

Run = Callable[..., Sequence[Any]]
Compile = Callable[[GraphModule, Sequence[Any], FakeTensorMode | None], Run]
Other = Callable[[], tuple[GraphModule, Sequence[Any]] | None]  # a graph at another size, with tensors for it
MOST = 4  # symbolic programs that are tried for one form: each because the ones before didn't serve a size


@dataclass(frozen=True)
class _Shared:
    """A symbolic program. `guards`: what torch assumed of its symbols, whose meanings are `symbols`."""

    rule: Rule
    guards: tuple[Any, ...]
    symbols: Mapping[Any, Dim]
    run: Run

    def serves(self, numbers: Numbers) -> bool:
        return self.rule.gives(numbers) and not self.broken(numbers)

    def broken(self, numbers: Numbers) -> list[str]:
        """The guards that don't hold at the sizes among these numbers."""
        sizes = self.rule.sizes(numbers)
        values = {symbol: sizes[dim] for symbol, dim in self.symbols.items()}
        return [str(guard) for guard in self.guards if guard.subs(values) != True]  # noqa: E712 (sympy's true)


@dataclass
class _Family:
    """Graphs of one form: their numbers so far, the programs that serve several of them, and how often one was
    compiled."""

    samples: list[Numbers] = field(default_factory=list)
    programs: list[_Shared] = field(default_factory=list)
    held: tuple[Any, ...] = ()
    attempts: int = 0


class SharedSizes:
    """The symbolic programs of one handle.

    Attributes:
        served: number of graphs that a program served which was compiled at another size.
        refused: by the name of a variant, why its last further size was compiled for itself.
    """

    def __init__(self) -> None:
        self.served = 0
        self.refused: dict[str, str] = {}
        self._families: dict[bytes, _Family] = {}

    def lower(
        self, name: str, gm: GraphModule, args: Sequence[Any], compiled: Compile, other: Other = lambda: None
    ) -> Run:
        """A program for a graph and tensors like `args`: one that serves this size, or a new one.

        Args:
            name: of the variant.
            gm: the graph.
            args: of the graph.
            compiled: compiles a graph for tensors like those given; in the mode of fake tensors if it is given, whose
                sizes are symbols.
            other: the graph at another size, asked for at the first one; None: that isn't known.
        """
        from moeca_compile.lowering.inductor.sizes.form import form_of  # with Dynamo, which a loaded package needs not

        if any(fx.has_unknown_size(node) for node in gm.graph.nodes):  # sizes that depend on data
            return compiled(gm, args, None)
        form = form_of(gm, args)
        family = self._families.setdefault(form.digest, _Family(held=form.held))
        for program in family.programs:
            if program.serves(form.numbers):
                self.served += 1
                return program.run
        if not family.samples:
            family.samples += self._numbers_at(other, name, form)
        earlier = [sample for sample in family.samples if sample != form.numbers]
        if form.numbers not in family.samples:
            family.samples.append(form.numbers)
        if earlier and family.attempts < MOST:
            try:
                program = self._shared(name, gm, args, [*earlier, form.numbers], family, compiled)
            except Exception as error:  # torch raises many types for symbols that it can't have
                self.refused[name] = str(error).strip().partition("\n")[0]
            else:
                family.programs.append(program)
                return program.run
        return compiled(gm, args, None)

    def _numbers_at(self, other: Other, name: str, form: Form) -> list[Numbers]:
        """The numbers of a graph at another size; empty: they aren't known."""
        from moeca_compile.lowering.inductor.sizes.form import form_of

        try:
            made = other()
            found = None if made is None else form_of(*made)
        except Exception as error:  # whatever a model raises at a size that nobody has asked for
            self.refused[name] = f"it can't be traced at a second size: {str(error).strip().partition(chr(10))[0]}"
            return []
        if found is not None and found.digest != form.digest:
            self.refused[name] = "at a second size the model runs other operators"
            return []
        return [] if found is None else [found.numbers]

    def _shared(
        self, name: str, gm: GraphModule, args: Sequence[Any], samples: Sequence[Numbers], family: _Family,
        compiled: Compile,
    ) -> _Shared:  # fmt: skip
        """A new symbolic program for the last of some samples, and the others if one rule gives them all."""
        from moeca_compile.lowering.inductor.sizes.symbolic import NotShared, fakes_of, rule_of, symbolic

        try:
            rule = rule_of(samples, args)
        except NotShared:
            rule = rule_of(samples[-2:], args)
        if not rule.gives(samples[-1]):
            raise NotShared("an axis of one element is broadcast")
        mode, fakes, symbols = fakes_of(rule, args)
        family.attempts += 1
        run = compiled(symbolic(gm, rule, args), fakes, mode)
        assert mode.shape_env is not None
        program = _Shared(rule, tuple([guard.expr for guard in mode.shape_env.guards]), symbols, run)
        others = [numbers for numbers in samples[:-1] if rule.gives(numbers)]
        if others and all(map(program.broken, others)):
            self.refused[name] = f"Inductor's code is for sizes with {' and '.join(program.broken(others[-1]))} alone"
        return program
