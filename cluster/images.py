"""Builds the project's images straight into the kubelet's store, tagged by what went into them."""

from __future__ import annotations

TARGETS = ("operator", "trainer")
def prune(state): return []
def build_image(state, target): return ""
