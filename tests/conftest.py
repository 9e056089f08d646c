"""What several tests need."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden fixtures. Absent: the test is skipped, or fails where MUSEKIT_REQUIRE_GOLDEN is set."""
    folder = Path(os.environ.get("MUSEKIT_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        message = f"golden fixtures not found at {folder}; set MUSEKIT_GOLDEN to their folder"
        pytest.fail(message) if os.environ.get("MUSEKIT_REQUIRE_GOLDEN") else pytest.skip(message)
    return folder
