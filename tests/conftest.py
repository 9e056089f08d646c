"""What several tests need."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden fixtures; where it is absent, the test is skipped."""
    folder = Path(os.environ.get("MUSEKIT_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"golden fixtures not found at {folder}; set MUSEKIT_GOLDEN to their folder")
    return folder
