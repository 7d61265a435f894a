"""YAML as MegaRL reads and writes it: 1e-6 a number, texts on one line, duplicate keys and what grows without end refused."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import yaml

LARGEST_TEXT = 512 * 1024  # characters of a document; PyYAML reads about 100,000 a second
MOST_VALUES = 20_000  # of a document, every use of an alias counted in full
DEEPEST = 64  # lists and mappings within one another
LONGEST_NUMBER = 40  # characters

_CORE = "tag:yaml.org,2002:"
_KINDS = {
    f"{_CORE}{name}": words
    for name, words in {
        "str": "a text",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "null": "null",
        "seq": "a list",
        "map": "a mapping",
    }.items()
}
_MERGE = f"{_CORE}merge"

# YAML 1.1 takes 1e-6 (no dot) for a text; people and Python write it for a number.
FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$|^[-+]\.(?:inf|Inf|INF)$""",
    re.VERBOSE,
)


class Loader(yaml.SafeLoader):
    """Safe loader that bounds depth and size, and refuses duplicate keys and tags of other types."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = 0
        self._depth = 0
        self._sizes: dict[str, int] = {}  # of each anchor, in values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Return the next node; raises yaml.MarkedYAMLError where it is nested too deep, or all are too many."""
        event = self.peek_event()
        before = self._num_values
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _problem(f"alias *{event.anchor} stands within what it is an alias of", event)
            self._num_values += self._sizes.get(str(event.anchor), 1)
        else:
            self._num_values += 1
        if self._num_values > MOST_VALUES:
            raise _problem(f"has more than {MOST_VALUES:,} values, each use of an alias counted in full: leave some out", event)
        self._depth += 1
        if self._depth > DEEPEST:
            raise _problem(f"is nested more than {DEEPEST} deep: use fewer brackets or indents", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self._sizes[event.anchor] = self._num_values - before
        return node

    def only_document(self) -> Any:
        """Return the value of the text's one document, None where there is none."""
        node = self.get_single_node()
        if node is None:
            return None
        self._check(node, "", set())
        return self.construct_document(node)

    def _check(self, node: yaml.Node, path: str, seen: set[int]) -> None:
        """Refuse tags of other types, values that are not what their tag says, and keys given twice."""
        if id(node) in seen:
            return
        seen.add(id(node))
        if node.tag not in _KINDS:
            name = node.tag.replace(_CORE, "!!")
            raise _problem(f"{path or 'the document'}: has the tag {name}: write the value itself, without a tag", node)
        if isinstance(node, yaml.ScalarNode):
            self._check_scalar(node, path)
        elif node.tag != f"{_CORE}{'seq' if isinstance(node, yaml.SequenceNode) else 'map'}":
            raise _problem(f"{path or 'the document'}: is not {_KINDS[node.tag]}: leave its tag out", node)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._check(item, f"{path}.{index}".lstrip("."), seen)
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node)
            for key, value in node.value:
                if key.tag != _MERGE:
                    self._check_scalar(key, path)
                self._check(value, f"{path}.{key.value}".lstrip("."), seen)

    def _check_scalar(self, node: yaml.ScalarNode, path: str) -> None:
        where, text = path or "the value", node.value
        if node.tag in (f"{_CORE}int", f"{_CORE}float") and len(text) > LONGEST_NUMBER:
            raise _problem(f"{where}: is a number of {len(text)} digits: give at most {LONGEST_NUMBER}", node)
        if node.tag == f"{_CORE}str" and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in text):
            raise _problem(f"{where}: has a NUL character or half of a surrogate pair in it: leave it out", node)
        try:
            self.construct_object(node)
        except (ValueError, KeyError, AttributeError):
            raise _problem(f"{where}: {text[:40]!r} is not {_KINDS.get(node.tag, 'a value')}: leave its tag out", node) from None


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == _MERGE:
            continue
        if key.tag != f"{_CORE}str":
            shown = repr(key.value[:40]) if isinstance(key, yaml.ScalarNode) else "that is a list or mapping"
            raise _problem(f"key {shown} is not a text: write it in quotes", key)
        if key.value in lines:
            raise _problem(f"key {key.value[:40]!r} is already given in line {lines[key.value]}: keep one of them", key)
        lines[key.value] = key.start_mark.line + 1


def _problem(text: str, where: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    mark: Any = where.start_mark
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


class Dumper(yaml.SafeDumper):
    """Safe dumper whose texts stay on one line."""

    def ignore_aliases(self, data: object) -> bool:
        """Write equal values out in full."""
        return True


def _represent_text(dumper: Dumper, text: str) -> yaml.ScalarNode:
    style = '"' if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
for _class in (Loader, Dumper):
    # Dates and YAML 1.1's own floats (which take 1:30.5 for a number) are left out: options are numbers, texts and flags.
    _class.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
        for first, rules in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def parse(text: str) -> Any:
    """Parse one YAML document; raises yaml.YAMLError, also where it is larger or deeper than a config can be."""
    if len(text) > LARGEST_TEXT:
        raise yaml.YAMLError(f"is too large: {len(text) / 1e6:.1f} MB, a config has at most {LARGEST_TEXT / 1e6:.1f} MB")
    loader = Loader(text)
    try:
        return loader.only_document()
    finally:
        loader.dispose()


def problem_of(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Return line (1-based, None when unknown) and reason of a YAML error, the reason on one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else None
        return line, " ".join(f"{error.context or ''} {error.problem or ''}".split())
    return None, " ".join(str(error).split())


def dump(data: object) -> str:
    """Return block-style YAML, keys in the given order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def dump_inline(value: object) -> str:
    """Return one value as YAML on one line, to be written after ``key: ``."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def merged(below: object, above: object) -> Any:
    """Put the values of ``above`` over those of ``below``, mapping by mapping."""
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return above
    return {**below, **{name: merged(below.get(name), value) for name, value in above.items()}}
