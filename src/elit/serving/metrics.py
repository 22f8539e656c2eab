"""What Prometheus reads at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Counters of a server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = of = CollectorRegistry()
        self.requests = Counter("elit_requests", "Requests for pictures", ["status"], registry=of)
        self.seconds = Histogram(
            "elit_request_seconds", "Seconds of requests that got pictures", buckets=_SECONDS,
            registry=of,
        )  # fmt: skip
        self.pictures = Counter("elit_pictures", "Pictures drawn", ["budget"], registry=of)
        self.gflops = Counter("elit_gflops", "GFLOPs of these", registry=of)
        self.shed = Counter("elit_shed_pictures", "Pictures refused with 429", registry=of)
        self.restarts = Counter("elit_worker_restarts", "Workers that died", registry=of)
        self.waiting = Gauge("elit_waiting_pictures", "Pictures that wait", registry=of)
        self.running = Gauge("elit_running_pictures", "Pictures being drawn", registry=of)
        self.batches = Histogram(
            "elit_batch_pictures", "Pictures of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=of,
        )  # fmt: skip

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self.registry)
