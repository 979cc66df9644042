"""The small twins of the recipes, run by `make recipes`' own command: a sample here, all of them with --full-trials."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from cluster.recipes import recipes
from cluster.target import ROOT, Target

SEVERAL_PODS = "2"
"""Always in the sample: the one of which most has to meet."""


@pytest.mark.timeout(3600)
def test_the_recipes_succeed_and_their_losses_fall(cluster: Target, rng: random.Random, full_trials: bool) -> None:
    assert cluster.kubeconfig, "the recipes' twins work on the local cluster"
    keys = [recipe.key for recipe in recipes()]
    others = [key for key in keys if key != SEVERAL_PODS]
    chosen = keys if full_trials else sorted([SEVERAL_PODS, rng.choice(others)])
    command = [sys.executable, "-m", "cluster.recipes", "--only", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0
    assert done.stdout.count("Succeeded\n") >= len(chosen)
