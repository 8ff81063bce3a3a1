"""channels.patch fits today's scott.py and, with the slow tests, works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent
FILES = ("scott.py", "probe.py", "test_scott.py", "README.md")

@pytest.fixture
def patched(tmp_path):
    """A folder with the patched files, in no repository."""
    if not shutil.which("git"):
        pytest.skip("git is not here")
    for name in FILES:
        shutil.copy(DOCS.parent / name, tmp_path)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    subprocess.run(["git", "apply", DOCS / "channels.patch"], cwd=tmp_path, env=alone, check=True)
    return tmp_path

def test_the_patch_fits(patched):
    for name in FILES[:3]:
        compile((patched / name).read_text(), name, "exec")
        assert (patched / name).read_text() != (DOCS.parent / name).read_text()

@pytest.mark.slow
def test_the_patched_files_pass_their_own_tests(patched):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "test_scott.py"]
    subprocess.run(command, cwd=patched, check=True)
