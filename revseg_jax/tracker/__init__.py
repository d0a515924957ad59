"""SAM2 in a process of its own: the sidecar (the only place that needs torch) and the client that talks to it."""

from revseg_jax.tracker.client import Scores, TrackerClient
from revseg_jax.tracker.connection import SidecarAway, check
from revseg_jax.tracker.security import TLS

__all__ = ["TLS", "Scores", "SidecarAway", "TrackerClient", "check"]
