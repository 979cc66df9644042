"""What all unit tests share: random examples that take the time they take."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A machine under load is slow, and no example is there to test its speed (200 ms are the default's limit).
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
