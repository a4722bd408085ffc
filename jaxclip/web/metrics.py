"""Prometheus metrics of the search server."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts and durations of requests, batch sizes, waiting queries and the size of the gallery."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = {"registry": self._registry}
        self._requests = Counter("jaxclip_requests", "Requests answered.", ["route", "status"], **registry)
        self._seconds = Histogram(
            "jaxclip_request_seconds",
            "Seconds until the response was complete.",
            ["route"],
            buckets=SECONDS,
            **registry,
        )
        self._batch = Histogram("jaxclip_batch_queries", "Queries per batch.", buckets=BATCHES, **registry)
        self._waiting = Gauge("jaxclip_waiting_queries", "Queries waiting for the devices.", **registry)
        self._products = Gauge("jaxclip_gallery_products", "Products in the gallery.", **registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request and its duration."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, queries: int) -> None:
        """Records the size of a batch."""
        self._batch.observe(queries)

    def watch(self, products: int, waiting: Callable[[], int]) -> None:
        """Sets the size of the gallery and the function that returns the number of waiting queries."""
        self._products.set(products)
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' exposition format."""
        return generate_latest(self._registry)
