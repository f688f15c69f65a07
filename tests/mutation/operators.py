"""Mutations beyond those of mutmut: typical mistakes in code with tensors."""

from collections.abc import Iterator

import libcst as cst

_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
_PASS = cst.SimpleStatementLine([cst.Pass()])


def changes(node: cst.CSTNode, modules: set[str]) -> Iterator[cst.CSTNode]:
    """Return the replacements of a node: one less, a branch always taken, a step left out.

    Args:
        node: the node.
        modules: the names of imported modules: `torch.zeros(...)` is not a method call.
    """
    match node:
        case cst.Integer():
            if node.evaluated_value > 0:
                yield node.with_changes(value=str(node.evaluated_value - 1))
        case cst.Call(func=cst.Name(value=name)) if name in _SWAPPED:
            yield node.with_changes(func=cst.Name(_SWAPPED[name]))
        case cst.Call(func=cst.Attribute(value=receiver)) if not _is_module(receiver, modules):
            yield receiver  # x.float() -> x
        case cst.If() | cst.While():
            yield node.with_changes(test=cst.Name("False"))
            if isinstance(node, cst.If):
                yield node.with_changes(test=cst.Name("True"))
        case cst.SimpleStatementLine(body=[cst.Expr(value=cst.Call())]):
            yield _PASS
        case cst.SimpleStatementLine(body=[cst.AugAssign() | cst.Raise()]):
            yield _PASS
        case cst.Return(value=cst.BaseExpression()):
            yield node.with_changes(value=cst.Name("None"))


def _is_module(receiver: cst.BaseExpression, modules: set[str]) -> bool:
    while isinstance(receiver, cst.Attribute):
        receiver = receiver.value
    if isinstance(receiver, cst.Call):  # super()
        return isinstance(receiver.func, cst.Name) and receiver.func.value == "super"
    return isinstance(receiver, cst.Name) and receiver.value in modules
