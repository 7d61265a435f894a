from collections.abc import Iterator
from typing import Any

import pytest

LOG_END = 8000  # characters shown of each log


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """A test that fails shows how the logs of its engines end."""
    report = yield
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    if report.failed and folder is not None:
        for log in sorted(folder.rglob("engine*.log")):
            report.sections.append((str(log), log.read_text(errors="replace")[-LOG_END:]))
    return report
