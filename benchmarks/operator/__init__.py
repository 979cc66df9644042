"""The operator at scale, beside the plainest possible kopf operator: `python -m benchmarks.operator --help`."""
