"""An environment for llm-compressor: it asks for an older transformers than ours.

What it shares with ours (torch above all) is taken from there; the packages of llmcompressor.txt stand before them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("llmcompressor.txt")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator" / "benchmarks"


def python_with_llmcompressor() -> Path:
    """The interpreter of the environment, which is made where it is not there yet: half a minute, 180 MB."""
    ours = list(dict.fromkeys(str(each.locate_file("")) for each in importlib.metadata.distributions()))
    key = hashlib.sha256("\n".join([sys.version, *ours, REQUIREMENTS.read_text(encoding="utf-8")]).encode())
    folder = CACHE / f"llmcompressor-{key.hexdigest()[:12]}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)  # noqa: S603 - our own words
        theirs = subprocess.run(  # noqa: S603 - likewise
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(theirs) / "finetune-operator.pth").write_text("\n".join(ours), encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(REQUIREMENTS)]
        subprocess.run(pip, check=True)  # noqa: S603 - likewise
        done.touch()
    return python
