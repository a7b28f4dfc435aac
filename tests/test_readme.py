"""The README's file tree is that of the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_file_tree_in_the_readme_is_up_to_date() -> None:
    checked = subprocess.run([sys.executable, ROOT / "scripts" / "readme_tree.py", "--check"], check=False)
    assert checked.returncode == 0, "run scripts/readme_tree.py"
