"""A real local Kubernetes without Docker, for the demo, the end-to-end tests and development.

Everything runs in one network, mount and PID namespace per checkout, so that stopping it leaves nothing behind and
two checkouts cannot meet. Run from the repository's root as ``python3 -m cluster --help``.
"""
