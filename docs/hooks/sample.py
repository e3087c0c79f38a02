"""The sample report: made by the command while the site is built, so that it is what the library says now.

MkDocs takes it as a hook; for Zensical, which has none, ``python docs/hooks/sample.py FILE`` writes it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

COMMAND = ("compare", "--quick", "--defenses", "none,madry,rse")
"""As it stands on the page."""


def on_files(files: Files, *, config: Any) -> Files:
    """MkDocs calls this with the files of the site."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "assets/sample-report.html", content=_report()))
    return files


@cache
def _report() -> str:
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "probdefense", *COMMAND, "--out", folder]
        made = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"}
        )
        if made.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{made.stdout}{made.stderr}")
        return Path(folder, "report.html").read_text(encoding="utf-8")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(_report(), encoding="utf-8")
