"""Generate every mutant of a source file: one small change each, by mutmut's operators and more.

mutmut's own driver skips decorated functions and code outside of functions, which are mutated
here. Code without behavior is skipped: annotations, decorators, `__all__`, and the text of error
messages.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

from tests.mutation.operators import changes

# mutmut never changes calls of these, which only read sizes and types.
_CALLS = ("isinstance", "len")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: the file, relative to the repository.
        index: its place among the mutants of the file.
        source: the whole file with the change.
        lines: the lines of the statement that is changed.
        function: the lines of the function around it; None outside of functions.
    """

    path: str
    index: int
    source: str
    lines: range
    function: range | None

    @property
    def name(self) -> str:
        """Return the mutant's name in reports."""
        return f"{self.path}:{self.lines.start}#{self.index}"

    def undone(self) -> "Mutant":
        """Return the mutant without its change, as a control."""
        return replace(self, source=Path(self.path).read_text())

    def diff(self) -> str:
        """Return what is changed, as a unified diff."""
        before = Path(self.path).read_text().splitlines(keepends=True)
        after = self.source.splitlines(keepends=True)
        return "".join(difflib.unified_diff(before, after, self.path, self.name, n=1))


class Mutants:
    """The mutants of one file, of which few are written out."""

    def __init__(self, path: str) -> None:
        self.path = path
        wrapper = MetadataWrapper(cst.parse_module(Path(path).read_text()))
        self._module = wrapper.module
        self._changes = _Changes()
        wrapper.visit(self._changes)

    def __len__(self) -> int:
        return len(self._changes.found)

    def __getitem__(self, index: int) -> Mutant:
        change = self._changes.found[index]
        changed = self._module.visit(_Replace(change.old, change.new))
        assert isinstance(changed, cst.Module)
        return Mutant(self.path, index, changed.code, change.lines, change.function)


@dataclass(frozen=True)
class _Change:
    old: cst.CSTNode
    new: cst.CSTNode
    lines: range
    function: range | None


class _Changes(cst.CSTVisitor):
    """A collector of all changes, in the order of the file."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[_Change] = []
        self._functions: list[range] = []
        self._statements: list[range] = []
        self._raising = 0
        self._modules: set[str] = set()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if self._has_no_behavior(node):
            return False
        if isinstance(node, cst.ImportAlias):
            self._modules.add(node.evaluated_alias or node.evaluated_name)
        if isinstance(node, cst.FunctionDef):
            self._functions.append(self._lines(node))
        if _is_statement(node):
            self._statements.append(self._lines(node))
        self._raising += isinstance(node, cst.Raise)
        if self._statements:
            function = self._functions[-1] if self._functions else None
            for new in self._mutated(node):
                self.found.append(_Change(node, new, self._statements[-1], function))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if self._has_no_behavior(original_node):
            return
        if isinstance(original_node, cst.FunctionDef):
            self._functions.pop()
        if _is_statement(original_node):
            self._statements.pop()
        self._raising -= isinstance(original_node, cst.Raise)

    def _mutated(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        if isinstance(node, cst.BaseString) and self._raising:
            return  # the text of a message
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                yield from operator(node)
        yield from changes(node, self._modules)

    def _has_no_behavior(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator):
            return True
        if isinstance(node, cst.Assign):
            target = node.targets[0].target
            return isinstance(target, cst.Name) and target.value == "__all__"
        if isinstance(node, cst.Call):
            return isinstance(node.func, cst.Name) and node.func.value in _CALLS
        return False

    def _lines(self, node: cst.CSTNode) -> range:
        position = self.get_metadata(PositionProvider, node)
        end = position.end.line
        body = getattr(node, "body", None)
        if isinstance(body, cst.IndentedBlock) and not isinstance(node, cst.FunctionDef):
            # For a compound statement, its first line.
            end = self.get_metadata(PositionProvider, body.body[0]).start.line - 1
        return range(position.start.line, end + 1)


def _is_statement(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement)


class _Replace(cst.CSTTransformer):
    """A transformer that replaces one node with another."""

    def __init__(self, old: cst.CSTNode, new: cst.CSTNode) -> None:
        super().__init__()
        self._old, self._new = old, new

    def on_leave(  # type: ignore[override]
        self, original_node: cst.CSTNode, updated_node: cst.CSTNode
    ) -> cst.CSTNode:
        return self._new if original_node is self._old else updated_node
