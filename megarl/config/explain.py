"""The schema and a resolved config, explained; ``python -m megarl.config.explain > docs/configuration.md`` writes the reference."""

import inspect
import sys
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from megarl.config import yaml_text
from megarl.config.fields import comment_of, meaning_of, source_name, type_in_words, unit_of, walk
from megarl.config.schema import Config, Section

INTRODUCTION = """# Configuration

One YAML file describes one run. This page is generated from `megarl/config/schema/` and, for scorers and environments,
`megarl/builtin/`, the only places where keys and their defaults exist, by
`python -m megarl.config.explain > docs/configuration.md`.

- `megarl config CONFIG` prints a file with every default filled in and explained, as YAML that can be used again.
- `--set section.key=value` overrides a key on the command line; it can be repeated and the last one wins. The value is YAML
  (`--set model.init=random`, `--set 'rollout.stop_token_ids=[1, 2]'`; a text with `{`, `:` or `#` needs double quotes of its own:
  `--set 'data.template="{prompt}"'`), and a number in the key is a list index (`--set rewards.scorers.0.weight=0.5`).
- Relative paths are relative to the current directory, not to the YAML file.
- An unknown or duplicate key is an error. Numbers may be written `1e-6`. `null` (or nothing) stands for "not given".
"""


def explain(config: Config) -> str:
    """Return the resolved config as loadable YAML; a comment has each key's unit, meaning and, where changed, default."""
    return "\n".join(_explained_section(config, "")) + "\n"


def _explained_section(section: Section, indent: str) -> Iterator[str]:
    """Yield the lines of one section."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"{indent}{name}:  # {comment_of(field)}"
            yield from _explained_section(value, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            yield f"{indent}{name}:  # {comment_of(field)}"
            for item in value:
                first, *rest = _explained_section(item, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            written = yaml_text.dump_inline(section.model_dump(mode="json", include={name})[name])
            changed = (
                not field.is_required()
                and source_name(type(section)) is None
                and value != field.get_default(call_default_factory=True)
            )
            yield f"{indent}{name}: {written}  # {comment_of(field)}{f' Default: {_default(field)}.' if changed else ''}"


def _default(field: FieldInfo) -> str:
    """Return the default of a key as YAML on one line; ``required`` or ``section`` where it has none of its own."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Section):
        return "section"
    return yaml_text.dump_inline(default if isinstance(default, int | float | list | dict | None) else str(default))


def reference_markdown() -> str:
    """Return docs/configuration.md: one table for each section, with key, type, default, unit and meaning."""
    paths: dict[type[Section], list[str]] = {}
    for path, section in walk():
        of_section = paths.setdefault(section, [])
        if path not in of_section:  # sections of a union have some in common
            of_section.append(path)
    return "\n".join([INTRODUCTION, *(_section_markdown(section, paths) for section, paths in paths.items())])


def _section_markdown(section: type[Section], paths: list[str]) -> str:
    """Return title, sentence and table of one section, which stands at all of ``paths``."""
    title = ", ".join(f"`{path}`" for path in paths) if paths != [""] else "Top level"
    source = source_name(section)
    sentence = inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0]
    lines = [f"## {title}{f' with `type: {source}`' if source else ''}", "", sentence, ""]
    lines += ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if source and name == "type" else _default(field)
        cells = [f"`{name}`", type_in_words(field), default if default in ("required", "section") else f"`{default}`"]
        cells += [unit_of(field), meaning_of(field)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(reference_markdown())
