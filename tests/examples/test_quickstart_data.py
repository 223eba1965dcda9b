"""The examples in the repository are what their generator writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_generator_writes_the_committed_files_to_the_byte(tmp_path: Path) -> None:
    script = ROOT / "examples" / "make_quickstart.py"
    subprocess.run([sys.executable, str(script), "--output", str(tmp_path)], check=True, capture_output=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 9
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / "examples" / path).read_bytes(), path
