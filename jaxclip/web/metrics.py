"""What /metrics tells Prometheus."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Measures:
    """Requests by route and status, their seconds, sizes of batches, waiting queries and the gallery's products."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        where = {"registry": self._registry}
        self._requests = Counter("jaxclip_requests", "Requests answered.", ["route", "status"], **where)
        self._seconds = Histogram(
            "jaxclip_request_seconds", "Time to the end of the answer.", ["route"], buckets=SECONDS, **where
        )
        self._batch = Histogram("jaxclip_batch_queries", "Queries answered together.", buckets=BATCHES, **where)
        self._waiting = Gauge("jaxclip_waiting_queries", "Queries that wait for the devices.", **where)
        self._products = Gauge("jaxclip_gallery_products", "Products in the gallery.", **where)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, queries: int) -> None:
        self._batch.observe(queries)

    def watch(self, products: int, waiting: Callable[[], int]) -> None:
        """Sets what is read whenever Prometheus asks."""
        self._products.set(products)
        self._waiting.set_function(waiting)

    def text(self) -> bytes:
        """Returns the exposition format."""
        return generate_latest(self._registry)
