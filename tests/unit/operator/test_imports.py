"""The operator is light: it imports neither torch nor anything that does."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "numpy", "datasets")
SCRIPT = f"""
import pkgutil, importlib, sys
import finetune_operator
for module in pkgutil.walk_packages(finetune_operator.__path__, "finetune_operator."):
    importlib.import_module(module.name)
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_importing_all_of_the_operator_imports_nothing_heavy() -> None:
    answer = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == "[]"
