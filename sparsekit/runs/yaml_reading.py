"""Strict reading of settings in YAML, with limits on the size, and errors of one sentence."""

from __future__ import annotations

from pathlib import Path

import yaml

from sparsekit.errors import SettingsError

#: Largest file in bytes; files written by hand are far smaller.
MOST_BYTES = 1 << 20

#: Largest number of values, keys and containers; an alias counts as everything that it stands for.
MOST_NODES = 20_000

#: Deepest nesting of containers.
MOST_LEVELS = 50

#: The exceptions of PyYAML's constructors for text that is not a value of its type.
_NOT_A_VALUE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class _Loader(yaml.SafeLoader):
    """The safe loader; duplicate keys and unbounded aliases are refused, and dates stay text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level, self._nodes = self._level + 1, self._nodes + 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._level > MOST_LEVELS:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {MOST_LEVELS} deep", problem_mark=mark)
        if self._nodes > MOST_NODES:
            raise _too_many(mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._check(node, {})
        return node

    def _check(self, node: yaml.Node, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """(nodes, levels) of a node with its aliases expanded; refuses a repeated key and a node inside itself."""
        if id(node) not in sizes:
            sizes[id(node)] = MOST_NODES + 1, 0  # until known: a node that contains itself exceeds the limit
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            found = [self._check(part, sizes) for part in parts]
            sizes[id(node)] = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0)
        size, depth = sizes[id(node)]
        if size > MOST_NODES:
            raise _too_many(node.start_mark)
        if depth > MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem=f"with its aliases it is nested more than {MOST_LEVELS} deep", problem_mark=node.start_mark
            )
        return size, depth

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            return super().construct_object(node, deep)
        except _NOT_A_VALUE:
            kind = node.tag.rpartition(":")[2]
            given = _short(node.value) if isinstance(node, yaml.ScalarNode) else "what is given"
            raise yaml.MarkedYAMLError(problem=f"{given} is no {kind}", problem_mark=node.start_mark) from None


def _too_many(mark: yaml.Mark | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"with its aliases it holds more than {MOST_NODES:,} values", problem_mark=mark)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {_short(key.value)} stands there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def parse(text: str) -> object:
    """The value of a YAML text.

    Raises:
        ValueError: it cannot be read; the message says why and where.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader with more refusals
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{what}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read(path: Path) -> object:
    """The value of a YAML file.

    Raises:
        SettingsError: it is missing, too large, not text or not YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise SettingsError(
                f"the configuration file '{path}' has more than {MOST_BYTES:,} bytes; that is more than any "
                "settings take: give another file"
            )
        text = content.decode()
    except UnicodeDecodeError:
        raise SettingsError(f"the configuration file '{path}' cannot be read: it is not UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"the configuration file '{path}' cannot be read: {reason}") from None
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"the configuration file '{path}' is not YAML that can be used: {error}") from None
