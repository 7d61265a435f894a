"""The explained config is the config, and the reference page is the schema's."""

import subprocess
import sys
from pathlib import Path

from megarl.config.explain import explain, reference_markdown
from megarl.config.load import load_config
from megarl.config.schema import Config

ROOT = Path(__file__).parents[2]
TEXT = """
kind: rl
steps: 3
model: {path: "models/tiny # 2"}
optimizer: {learning_rate: 3e-4}
data:
  train: {type: jsonl, path: a.jsonl}
  exclude: [{type: reasoning_gym, task: chain_sum, options: {min_digits: 1}}, {type: datasets, path: b}]
  template: "Question: {prompt}\\nAnswer:"
rewards:
  scorers: [{type: exact}, {type: regex, pattern: "^\\\\d+ # $"}]
"""


def test_explained_config_loads_as_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TEXT)
    config = load_config(tmp_path / "a.yaml")
    text = explain(config)
    (tmp_path / "b.yaml").write_text(text)
    assert load_config(tmp_path / "b.yaml") == config
    assert "  learning_rate: 0.0003  # Peak learning rate. Default: 1.0e-06." in text.splitlines()
    assert "  warmup_steps: 0  # (optimizer steps) Linear warm-up from 0." in text.splitlines()
    assert all("  # " in line for line in text.splitlines())


def test_every_key_has_a_sentence() -> None:
    """Looks at pydantic's own JSON schema, not at the code that writes the page."""

    def keys(node: object) -> list[tuple[str, dict[str, object]]]:
        if isinstance(node, list):
            return [found for item in node for found in keys(item)]
        if not isinstance(node, dict):
            return []
        return [*node.get("properties", {}).items(), *(found for value in node.values() for found in keys(value))]

    documented = keys(Config.model_json_schema())
    assert len(documented) > 100
    page = (ROOT / "docs" / "configuration.md").read_text()
    for name, key in documented:
        assert key.get("description"), name
        assert key.get("unit"), name
        assert f"| `{name}` | " in page
        assert str(key["description"]).replace("|", "\\|") in page


def test_reference_page_is_up_to_date() -> None:
    expected = (ROOT / "docs" / "configuration.md").read_text()
    assert reference_markdown() == expected, "run: python -m megarl.config.explain > docs/configuration.md"
    printed = subprocess.run(
        [sys.executable, "-m", "megarl.config.explain"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert printed == expected


def test_config_is_imported_without_torch() -> None:
    code = (
        "import sys; import megarl.config.load, megarl.config.checks, megarl.config.explain; "
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed == "[]\n"
