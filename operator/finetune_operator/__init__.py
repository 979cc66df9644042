"""The Kubernetes operator that turns a FineTuneJob into stage Jobs and tells how they fare."""
