"""Runs that are killed or interrupted at random moments leave what an uninterrupted run leaves, bit by bit."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "torture.py"


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="children are forks")
def test_ten_random_interruptions_leave_no_difference():
    done = subprocess.run([sys.executable, SCRIPT, "--kills", "10"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "   10 interruptions of" in done.stdout
    assert "; 0 differences" in done.stdout
