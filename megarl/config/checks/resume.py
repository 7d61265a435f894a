"""What must stay as it was when a run goes on from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from megarl.config.schema import Config

# What a checkpoint's weights, positions and counters mean. Layouts, lengths, rates, coefficients, data and logging may change.
FIXED = (
    "kind",
    "seed",
    "model.init",
    "model.rope_scaling",
    "algorithm.advantage",
    "algorithm.surrogate",
    "algorithm.ratio",
    "preference.loss",
)
SAME_FILES = ("config.json", "tokenizer.json", "tokenizer.model")


def check_resume(config: Config, saved: Config) -> Iterator[str]:
    """Refuse what would make another run of the one that is in the run folder.

    Args:
        config: of the command.
        saved: of the run folder.
    """
    for path in FIXED:
        now, then = _value(config, path), _value(saved, path)
        if now != then and _counts(path, config):
            yield (
                f"--resume: {path} is {_shown(now)}, and the run in {config.run_dir} has {_shown(then)}; give that, "
                "or start a new run in another --run-dir"
            )
    folders = {"model.path": (config.model.path, saved.model.path)}
    if config.model.tokenizer or saved.model.tokenizer:
        tokenizers = (config.model.tokenizer or config.model.path, saved.model.tokenizer or saved.model.path)
        folders["model.tokenizer"] = tokenizers
    for path, (now, then) in folders.items():
        if not _same_folder(now, then):
            yield (
                f"--resume: {path} is {now}, whose files differ from those of {then}, with which the run in "
                f"{config.run_dir} began; give that folder, or start a new run in another --run-dir"
            )


def _counts(path: str, config: Config) -> bool:
    """Return whether the kind uses the setting."""
    return path.split(".")[0] in {"kind", "seed", "model", *config.own_sections}


def _same_folder(now: Path, then: Path) -> bool:
    """Tell whether they hold the same model, as far as a look can tell; a folder that has gone elsewhere does not count."""
    if now == then or not then.is_dir() or now.resolve() == then.resolve():
        return True
    if any(_bytes(now / name) != _bytes(then / name) for name in SAME_FILES):
        return False
    return _sizes(now) == _sizes(then)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def _value(config: Config, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
