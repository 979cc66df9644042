"""What a person asks first: is it up, is each part well, and how do I reach it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster import build, joining, namespace
from cluster.api import Api
from cluster.node import is_ready

if TYPE_CHECKING:
    from cluster.namespace import Namespace
    from cluster.paths import State


def show(state: State) -> bool:
    """Print the cluster's state; return whether all of it is well."""
    live = namespace.find(state)
    if live is None:
        print("cluster: down (start it with 'python3 -m cluster up')")
        return False
    well = _show_nodes(state) & _show_components(live)
    print("versions: " + ", ".join(f"{name} {version}" for name, version in build.versions().items()))
    print(f"commands: {state.bin}/kubectl, helm, ctr, buildctl; logs: {state.logs}")
    print(f"export KUBECONFIG={state.kubeconfig}")
    return well


def _show_nodes(state: State) -> bool:
    if not state.kubeconfig.exists():
        print("cluster: starting, or its last start failed ('python3 -m cluster up' goes on)")
        return False
    api = Api(state.kubeconfig)
    answering = api.ready()
    print(f"cluster: {'up' if answering else 'API server does not answer'} at {api.server}")
    ready = {name: is_ready(api, name) for name in (state.node_name, *joining.numbers(state))}
    for name, well in ready.items():
        print(f"node {name}: {'Ready' if well else 'not Ready'}")
    return answering and all(ready.values())


def _may_have_ended(state: State, component: str) -> bool:
    """Tell whether it is no loss: BuildKit runs only while an image is built, nodes may have been removed."""
    _, _, of_node = component.partition("@")
    return component == "buildkitd" or (of_node != "" and of_node not in joining.numbers(state))


def _show_components(live: Namespace) -> bool:
    well = True
    for name, child in live.ask("list", health=True).items():
        if child["ended"] and _may_have_ended(live.state, name):
            continue
        condition = child["ended"] or child.get("health", "")
        broken = bool(child["ended"]) or condition.startswith("unhealthy")
        hint = f"; see {child['log']}, start it again with 'python3 -m cluster up'" if broken else ""
        print(f"  {name:24} {condition}{hint}")
        well &= not broken
    return well
