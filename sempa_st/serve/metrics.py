"""What ``/metrics`` says, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TEXTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sempa_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "sempa_request_seconds", "Seconds to the end of the answer", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.batch = Histogram(
            "sempa_embedding_batch_texts", "Texts of a batch of embeddings", buckets=_TEXTS, registry=self.registry
        )
        self.tokens = Counter("sempa_tokens", "Tokens read and written", ["kind"], registry=self.registry)

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Show the value of ``read`` at the time of asking."""
        Gauge(name, description, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self.registry)
