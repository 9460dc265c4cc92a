"""The knowledge in a Python file, from its syntax tree: exact gold for long documents.

Entities: the file's module (its mention is in a first line "# module NAME", which is put before the source), imported
Modules, imported Names, Classes, Functions (methods too). Mentions: where they are defined or imported, and every use
that is certain: of a name that the whole file binds once, at module level; or `self.m` in a class whose body binds m
once, as a method, and which never assigns self.m. Relations: defines (module, class or function -> class or function in
it), imports (module -> module or name), inherits (class -> class or name), calls (the innermost function or class around
the call, else the module -> function, class or name). Recursion is no relation.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

_DEFINITION = re.compile(r"(?:async\s+)?(?:def|class)\s+(\w+)")
_FROM = re.compile(r"from\s+\.*\s*([\w.]+)")
Function = ast.FunctionDef | ast.AsyncFunctionDef


class _Unclear(Exception):
    """A name does not stand where it should (a continued line, a name that Unicode normalises): the file is left out."""


def annotate_source(data: bytes, module: str) -> dict[str, Any] | None:
    """{text, entities, clusters, relations} of a source file, None if it is no UTF-8, has a byte order mark or does not parse.

    Example:
        >>> record = annotate_source(b"import os\\nclass A: pass\\nclass B(A): pass\\n", "m")
        >>> [(r["head"], r["label"], r["tail"]) for r in record["relations"] if r["label"] != "defines"]
        [('B', 'inherits', 'A'), ('m', 'imports', 'import os')]
        >>> [(record["text"][m["start"]:m["end"]], m["start"]) for m in record["clusters"]["A"]]
        [('A', 27), ('A', 43)]
    """
    try:
        source = data.decode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (ValueError, SyntaxError, RecursionError):
        return None
    if source.startswith("\ufeff"):
        return None
    walk = _Walk(source, module)
    try:
        walk.everything(tree)
    except (_Unclear, RecursionError):
        return None
    return walk.record()


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names that one syntax node binds by itself, in whatever scope it stands."""
    match node:
        case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
            yield name
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import() | ast.ImportFrom():
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        case ast.arg(arg=name):
            yield name
        case ast.Global() | ast.Nonlocal():
            yield from node.names
        case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
            yield name
        case ast.MatchMapping(rest=str(name)):
            yield name
        case _ if type(node).__name__ in ("TypeVar", "ParamSpec", "TypeVarTuple"):
            yield node.name  # type: ignore[attr-defined]


def _methods(node: ast.ClassDef) -> set[str]:
    """Names that a class's body binds once, as a method, and that no self.name = ... hides."""
    bound: Counter[str] = Counter()
    stack: list[ast.AST] = list(node.body)
    while stack:
        part = stack.pop()
        bound.update(bound_names(part))
        if not isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            stack.extend(ast.iter_child_nodes(part))
    hidden = {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and not isinstance(n.ctx, ast.Load)
    }
    own = {n.name for n in node.body if isinstance(n, Function)}
    return {name for name in own if bound[name] == 1 and name not in hidden}


def _arguments(arguments: ast.arguments) -> set[str]:
    return {a.arg for a in ast.walk(arguments) if isinstance(a, ast.arg)}


class _Walk:
    def __init__(self, source: str, module: str) -> None:
        header = "# module "
        self.text = f"{header}{module}\n{source}"
        self.source, self.shift = source, len(header) + len(module) + 1
        self.lines = [0]
        self.lines += [match.end() for match in re.finditer(r"\r\n|\r|\n", source)]
        self.encoded = source.isascii()
        self.labels: dict[str, str] = {module: "Module"}
        self.mentions: dict[str, set[tuple[int, int]]] = {module: {(len(header), len(header) + len(module))}}
        self.relations: set[tuple[str, str, str]] = set()
        self.module = module
        self.certain: dict[str, str] = {}
        """Name -> entity, for names that the file binds once, at module level."""
        self.entity_of: dict[ast.AST, str] = {}
        self.method_of: dict[tuple[str, str], str] = {}
        """(class entity, method name) -> entity, for methods that self.name certainly means."""

    def at(self, line: int, column: int) -> int:
        """Character of a syntax tree's position, whose columns are bytes of UTF-8."""
        begin = self.lines[line - 1]
        if self.encoded:
            return begin + column
        return begin + len(self.source[begin : begin + column].encode()[:column].decode())

    def mention(self, entity: str, start: int, text: str) -> None:
        if self.source[start : start + len(text)] != text:
            raise _Unclear
        self.mentions[entity].add((start + self.shift, start + self.shift + len(text)))

    def entity(self, name: str, label: str) -> str:
        """A new entity's name; numbered where taken."""
        free, number = name, 2
        while free in self.labels:
            free, number = f"{name} #{number}", number + 1
        self.labels[free], self.mentions[free] = label, set()
        return free

    def everything(self, tree: ast.Module) -> None:
        bound: Counter[str] = Counter()
        in_class = {
            n
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef)
            for n in c.body
            if isinstance(n, Function)
        }
        for node in ast.walk(tree):
            if node not in in_class:  # a method's name is no variable
                bound.update(bound_names(node))
        self.define(tree, self.module, "", True)
        self.certain = {name: entity for name, entity in self.certain.items() if bound[name] == 1}
        self.use(tree.body, self.module, None, frozenset())

    def define(self, node: ast.AST, owner: str, path: str, at_module: bool) -> None:
        """Entities of definitions and imports below `node`, which stands in `owner`."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function | ast.ClassDef):
                match = _DEFINITION.match(self.source, start := self.at(child.lineno, child.col_offset))
                if match is None:
                    raise _Unclear
                label = "Class" if isinstance(child, ast.ClassDef) else "Function"
                entity = self.entity(path + child.name, label)
                self.mention(entity, start + match.start(1) - match.start(), child.name)
                self.relations.add((owner, entity, "defines"))
                self.entity_of[child] = entity
                if at_module:
                    self.certain[child.name] = entity
                self.define(child, entity, f"{path}{child.name}.", False)
                if isinstance(child, ast.ClassDef):
                    methods = _methods(child)
                    for part in child.body:
                        if isinstance(part, Function) and part.name in methods:
                            self.method_of[entity, part.name] = self.entity_of[part]
            elif isinstance(child, ast.Import | ast.ImportFrom):
                self.imported(child, at_module)
            else:
                self.define(child, owner, path, at_module and not isinstance(child, ast.Lambda))

    def imported(self, node: ast.Import | ast.ImportFrom, at_module: bool) -> None:
        origin = "." * node.level + (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if isinstance(node, ast.ImportFrom) and node.module:
            match = _FROM.match(self.source, self.at(node.lineno, node.col_offset))
            if match is None or match.group(1) != node.module:
                raise _Unclear
            self.import_entity(f"import {origin}", "Module", match.start(1), node.module)
        for alias in node.names:
            if alias.name == "*":
                continue
            start = self.at(alias.lineno, alias.col_offset)
            label, name = (
                ("Name", f"import {origin}:{alias.name}") if origin else ("Module", f"import {alias.name}")
            )
            entity = self.import_entity(name, label, start, alias.name)
            if at_module and (alias.asname or "." not in alias.name):
                self.certain[alias.asname or alias.name] = entity

    def import_entity(self, name: str, label: str, start: int, text: str) -> str:
        if name not in self.labels:
            self.entity(name, label)
        self.mention(name, start, text)
        self.relations.add((self.module, name, "imports"))
        return name

    def use(
        self, nodes: Iterable[ast.AST], owner: str, own: tuple[str, str] | None, hidden: frozenset[str]
    ) -> None:
        """Uses in `nodes` and below; `owner` is the definition around them, `own` = (first argument, class entity) of
        the method they are in, `hidden` the names of methods, which the class body right around them sees first."""
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self.class_uses(node, owner, own, hidden)
            elif isinstance(node, Function):
                # Decorators, defaults and annotations stand outside.
                outside = [*node.decorator_list, node.args, *([node.returns] if node.returns else [])]
                self.use(outside, owner, own, hidden)
                inner = None if own and own[0] in _arguments(node.args) else own
                self.use(node.body, self.entity_of[node], inner, frozenset())
            else:
                inner = own
                if isinstance(node, ast.Lambda) and own and own[0] in _arguments(node.args):
                    inner = None
                self.one_use(node, owner, inner, hidden)
                self.use(ast.iter_child_nodes(node), owner, inner, hidden)

    def class_uses(
        self, node: ast.ClassDef, owner: str, own: tuple[str, str] | None, hidden: frozenset[str]
    ) -> None:
        entity = self.entity_of[node]
        self.use([*node.decorator_list, *node.bases, *node.keywords], owner, own, hidden)
        for base in node.bases:
            found = self.meant(base, own, hidden)
            if found is not None and self.labels[found] in ("Class", "Name") and found != entity:
                self.relations.add((entity, found, "inherits"))
        inside = frozenset(n.name for n in node.body if isinstance(n, Function))
        for part in node.body:
            self.use([part], entity, None, inside)
            if not isinstance(part, Function):
                continue
            names = [a.arg for a in (*part.args.posonlyargs, *part.args.args)]
            static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in part.decorator_list)
            rebound = (n for s in part.body for n in ast.walk(s) if not isinstance(n, ast.arg))
            if names and not static and not any(names[0] in bound_names(n) for n in rebound):
                self.use(part.body, self.entity_of[part], (names[0], entity), frozenset())

    def one_use(self, node: ast.AST, owner: str, own: tuple[str, str] | None, hidden: frozenset[str]) -> None:
        if isinstance(node, ast.Call):
            found = self.meant(node.func, own, hidden)
            if found is not None and self.labels[found] != "Module" and found != owner:
                self.relations.add((owner, found, "calls"))
        elif (
            isinstance(node, ast.Name | ast.Attribute)
            and (found := self.meant(node, own, hidden)) is not None
        ):
            name = node.id if isinstance(node, ast.Name) else node.attr
            end = self.at(node.end_lineno or 0, node.end_col_offset or 0)
            self.mention(found, end - len(name), name)

    def meant(self, node: ast.AST, own: tuple[str, str] | None, hidden: frozenset[str]) -> str | None:
        match node:
            case ast.Name(id=name, ctx=ast.Load()) if name not in hidden:
                return self.certain.get(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attr, ctx=ast.Load()) if own and name == own[0]:
                return self.method_of.get((own[1], attr))
        return None

    def record(self) -> dict[str, Any]:
        spans = sorted({(s, e, self.labels[n]) for n, own in self.mentions.items() for s, e in own})
        return {
            "text": self.text,
            "entities": [
                {"start": s, "end": e, "label": label, "text": self.text[s:e]} for s, e, label in spans
            ],
            "clusters": {
                name: [{"start": s, "end": e, "label": self.labels[name]} for s, e in sorted(own)]
                for name, own in self.mentions.items()
            },
            "relations": [{"head": h, "tail": t, "label": label} for h, t, label in sorted(self.relations)],
        }
