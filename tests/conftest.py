"""What every test shares: one thread, no network, no telemetry, and the rule about browsers.

Set CHROMIUM to the browser's path where it is not found by itself. With REQUIRE_BROWSER=1 a browser test that is
skipped counts as failed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from app.cli import keep_private
from engine.threads import limit_spinning

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy or torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"
keep_private()
limit_spinning(os.environ)

TESTS = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Light tests first, journeys last: what fails fast fails early."""

    def ring(item: pytest.Item) -> int:
        parts = item.path.relative_to(TESTS).parts if item.path.is_relative_to(TESTS) else ()
        return 0 if "light" in parts else 2 if "journeys" in parts else 1

    items.sort(key=ring)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a browser is required, a skipped browser test is a failed one."""
    report = yield
    if report.skipped and item.get_closest_marker("browser") and os.environ.get("REQUIRE_BROWSER") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"A browser test was skipped where REQUIRE_BROWSER=1 forbids it. {reason}"
    return report


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium to click through the page with."""
    named = os.environ.get("CHROMIUM", "")
    found = named if Path(named).is_file() else None
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge"):
        found = found or shutil.which(name)
    if not found:
        pytest.skip("No Chromium here; install one, or set CHROMIUM to its path.")
    return found


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in place of the repository's own, whose toybox has random weights (4 MB, made once: 5 s)."""
    from engine import tiny

    root = tmp_path_factory.mktemp("root")
    written = tiny.write_tiny(root / "assets" / "toybox", seed=0)
    shutil.copytree(written / "judges", root / "assets" / "judges" / "reward")
    return root


@pytest.fixture
def tiny_toybox(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Presets find their files in `tiny_root` for this test."""
    from engine import paths

    monkeypatch.setattr(paths, "ROOT", tiny_root)
    return tiny_root
