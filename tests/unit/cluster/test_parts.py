"""What the local cluster's parts are compiled from: a package that two of them need is compiled once."""

from __future__ import annotations

import re

from cluster import build

LARGE = (
    "github.com/Azure/",
    "github.com/aws/",
    "go.opentelemetry.io/",
    "golang.org/x/",
    "google.golang.org/",
)
"""What many parts need and what takes long to compile; Kubernetes' own are missing, as containerd needs newer ones."""


def test_every_part_has_a_version() -> None:
    assert "v0" not in build.versions().values()


def test_parts_share_one_version_of_large_modules() -> None:
    versions: dict[str, dict[str, str]] = {}
    for folder in {part.folder for part in build.PARTS}:
        required = re.findall(r"^\s+(\S+) (v\S+)", (folder / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
        for module, version in required:
            if module.startswith(LARGE):
                versions.setdefault(module, {})[folder.name] = version
    assert versions
    apart = {module: by_folder for module, by_folder in versions.items() if len(set(by_folder.values())) > 1}
    assert not apart, "bring these together: 'go get MODULE@HIGHEST' and 'go mod tidy' in each folder"
