"""Files that run inside engines, loaded here."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from megarl.engines.server_launch import PLUGIN_FOLDER


def load_plugin(name: str, folder: Path = PLUGIN_FOLDER) -> ModuleType:
    """A module of the plugin folder, with those beside it that it imports, or one of another folder that imports none."""
    if folder == PLUGIN_FOLDER and str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
