"""YAML as MegaRL reads and writes it: duplicate keys refused, 1e-6 a number, texts on one line."""

import re
import sys
from typing import Any

import yaml

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
    """Safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node; raises yaml.MarkedYAMLError at a duplicate or non-text key."""
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is not a text: write it in quotes", problem_mark=key_node.start_mark
                )
            if key_node.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is already given in line {lines[key_node.value]}: keep one of them",
                    problem_mark=key_node.start_mark,
                )
            lines[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Safe dumper whose texts stay on one line."""

    def ignore_aliases(self, data: Any) -> bool:
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
    """Parse one YAML document; raises yaml.YAMLError."""
    return yaml.load(text, Loader=Loader)


def problem_of(error: yaml.YAMLError) -> tuple[int | None, str]:
    """Line (1-based, None when unknown) and reason of a YAML error, the reason on one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else None
        return line, " ".join(f"{error.context or ''} {error.problem or ''}".split())
    return None, " ".join(str(error).split())


def dump(data: Any) -> str:
    """Block-style YAML, keys in the given order."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def dump_inline(value: Any) -> str:
    """One value as YAML on one line, to be written after ``key: ``."""
    text = yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize, default_flow_style=True)
    return text.removesuffix("...\n").strip()
