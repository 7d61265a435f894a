"""The chat template of a tokenizer: reading its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megarl.config.tokenizer_files import TOKENIZER_CONFIG
from megarl.errors import DataError

CHAT_TEMPLATE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of named ones, e.g. tool_use.jinja


def read_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template of a tokenizer folder, templates by name where it has several, or None.

    Files of their own count more than what ``settings``, the folder's tokenizer_config.json, says, as in transformers.

    Raises:
        DataError: a template is no text or cannot be read.
    """
    files = {"default": folder / CHAT_TEMPLATE} if (folder / CHAT_TEMPLATE).is_file() else {}
    files |= {file.stem: file for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if files:
        return _one_or_several({name: read_template_file(file) for name, file in files.items()})
    template = settings.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{folder / TOKENIZER_CONFIG}: chat_template is neither a text nor a list of texts with names; correct it, or give the "
            f"folder a {CHAT_TEMPLATE}"
        )
    return _one_or_several(template) if isinstance(template, dict) else template


def read_template_file(file: Path) -> str:
    """Return the text of a template file; DataError where it cannot be read as UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"chat template {file} cannot be read ({error.strerror}); give another file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"chat template {file} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None


def _one_or_several(templates: dict[str, str]) -> str | dict[str, str]:
    return templates["default"] if list(templates) == ["default"] else templates
