"""The command line: python3 -m cluster <verb>."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import build, images, joining, lifecycle, requirements, status
from cluster.errors import ClusterError
from cluster.paths import State, default_state
from cluster.progress import say

if TYPE_CHECKING:
    from collections.abc import Callable

DESCRIPTION = "A real local Kubernetes without Docker: etcd to kubelet as processes in namespaces of their own."
EPILOG = """\
The first 'up' builds everything, which takes minutes; later ones take seconds.
State lies in .cluster/ of the checkout, builds in ~/.cache/finetune-operator (or below $XDG_CACHE_HOME)."""

NODE_CHANGES = {"add": joining.add, "lose": joining.lose, "remove": joining.remove}


def main() -> int:
    """Run one verb; errors meant for people are one or two sentences."""
    arguments = _parser().parse_args()
    verb: Callable[[State, argparse.Namespace], int] = arguments.run
    try:
        return verb(State(arguments.state.resolve()), arguments)
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    except subprocess.CalledProcessError as error:
        detail = error.stderr or b""
        text = detail if isinstance(detail, str) else detail.decode(errors="replace")
        say(f"error: '{' '.join(map(str, error.cmd))}' failed: {text.strip()}")
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough; the interpreter must not write on closing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python3 -m cluster", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument("--state", type=Path, default=default_state().root, help="state folder (default: %(default)s)")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, run, text in (
        ("build", _build, "build or install everything that is missing; 'up' does so too"),
        ("up", _up, "start the cluster, or what of it has ended"),
        ("down", _down, "stop the cluster; images and builds stay"),
        ("status", _status, "tell whether all parts are well, and how to reach the cluster"),
        ("prune", _prune, "remove old images, the image build cache and builds of old versions"),
    ):
        verbs.add_parser(name, help=text, description=text).set_defaults(run=run)
    image = verbs.add_parser("image", help="build an image into the cluster's store; prints its reference")
    choices = (*images.TARGETS, images.STORE)
    image.add_argument("target", choices=choices, help="a target of the Dockerfile, or the demo's S3 server")
    image.set_defaults(run=_image)
    node = verbs.add_parser("node", help="add, lose or remove a further node: node add NAME")
    node.add_argument("change", choices=NODE_CHANGES, help="lose: its kubelet is killed, its containers go on")
    node.add_argument("name", help="name of the node")
    node.set_defaults(run=_node)
    execute = verbs.add_parser("exec", help="run a command inside the cluster's namespaces: exec -- CMD...")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD", help="the command and its arguments")
    execute.set_defaults(run=_exec)
    return parser


def _build(_state: State, _arguments: argparse.Namespace) -> int:
    build.build_all()
    return 0


def _up(state: State, _arguments: argparse.Namespace) -> int:
    lifecycle.up(state)
    return 0


def _down(state: State, _arguments: argparse.Namespace) -> int:
    requirements.require_root()
    lifecycle.down(state)
    return 0


def _status(state: State, _arguments: argparse.Namespace) -> int:
    requirements.require_root()
    return 0 if status.show(state) else 1


def _prune(state: State, _arguments: argparse.Namespace) -> int:
    requirements.require_root()
    for line in images.prune(state) + [f"build {name}" for name in build.prune()]:
        say(f"removed {line}")
    return 0


def _image(state: State, arguments: argparse.Namespace) -> int:
    requirements.require_root()
    store = arguments.target == images.STORE
    print(images.provide_store(state) if store else images.build_image(state, arguments.target))
    return 0


def _node(state: State, arguments: argparse.Namespace) -> int:
    requirements.require_root()
    NODE_CHANGES[arguments.change](state, arguments.name)
    return 0


def _exec(state: State, arguments: argparse.Namespace) -> int:
    requirements.require_root()
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise ClusterError("No command to run.", "For example: python3 -m cluster exec -- ctr images list")
    lifecycle.execute(state, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
