"""Which endpoint of a bucket answers a request: the layer that fails over, retries and counts.

Endpoints are known by their numbers. A request goes to the nearest healthy one first
(:mod:`obsfs.store.replicas`). Requests for names and small objects are repeated while no endpoint can answer
(:mod:`obsfs.store.retry`). Ranges are not: the fetch engine repeats them, because it knows which readers wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from obsfs.errors import (
    BrokenOffError,
    BusyError,
    CorruptError,
    ExpiredError,
    ForbiddenError,
    MovedError,
    NoBucketError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    VersionChangedError,
)
from obsfs.store.base import EndpointHealth, StoreStats
from obsfs.store.replicas import Replicas
from obsfs.store.retry import Retries

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class EndpointLike(Protocol):
    """One way to reach the bucket."""

    @property
    def number(self) -> int:
        """Its place in the pool."""

    @property
    def url(self) -> str:
        """As shown in logs and in `obsfs status`."""


_E = TypeVar("_E", bound=EndpointLike)
_E_co = TypeVar("_E_co", bound=EndpointLike, covariant=True)


class Pool(Protocol[_E_co]):
    """The endpoints of one bucket, and how to mend them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> _E_co: ...

    def prepare(self, number: int) -> None:
        """Do what comes before the first answer of any endpoint. Raises UnavailableError."""

    def renew(self, number: int) -> None:
        """Replace an endpoint whose session token has expired by one with the credentials of now."""

    def follow(self, number: int, moved: MovedError) -> bool:
        """Replace an endpoint by the one it redirects to. Returns whether to ask again."""

    def explain(self, error: ObsfsError) -> ObsfsError:
        """Return a final error with what can be found out about its cause."""


class Failover(Generic[_E]):
    """Sends requests to the endpoints of a pool. Safe to use from many threads."""

    def __init__(self, pool: Pool[_E], retry_seconds: float, *, has_answered: bool = False) -> None:
        """Take the endpoints of a pool.

        Args:
            pool: At least one endpoint.
            retry_seconds: How long requests are repeated while no endpoint answers.
            has_answered: The bucket was reached before, so that it is worth waiting for.
        """
        self._pool = pool
        self._replicas = Replicas(len(pool))
        self._retries = Retries(retry_seconds, has_answered=has_answered)

    def failed(self, number: int) -> None:
        """Note that an endpoint failed after it had begun to answer."""
        self._replicas.failed(number)

    def stats(self) -> StoreStats:
        """Return what was counted."""
        endpoints: list[EndpointHealth] = [
            {
                "endpoint": self._pool[number].url,
                "latency": health.latency,
                "failures": health.failures,
                "lagging": health.lagging,
            }
            for number, health in enumerate(self._replicas.health)
        ]
        return StoreStats(self._retries.count, endpoints)

    def ask_once(self, work: Callable[[_E], _T], *, may_lag: bool = False) -> _T:
        """Return the answer of the first endpoint that can give one.

        Args:
            work: Asks one endpoint.
            may_lag: An endpoint that does not have the version may be a replica that lags: ask the others too.
        """
        error: ObsfsError | None = None
        late: list[int] = []
        for number in self._replicas.order():
            started = time.monotonic()
            try:
                answer = self._ask_one(number, work)
            except ForbiddenError as forbidden:
                raise self._pool.explain(forbidden) from None
            except UnavailableError as unavailable:
                self._replicas.failed(number)
                error = error or unavailable
                if len(self._pool) > 1:
                    log.warning("%s: %s", self._pool[number].url, unavailable)
            except (VersionChangedError, NotFoundError) as changed:
                if not may_lag:
                    raise
                late.append(number)
                error = changed
            else:
                self._retries.succeeded()
                self._replicas.answered(number, time.monotonic() - started if may_lag else None)
                for other in late:
                    self._replicas.lagged(other)
                    log.warning("%s lags behind %s", self._pool[other].url, self._pool[number].url)
                return answer
        assert error is not None
        raise error

    def _ask_one(self, number: int, work: Callable[[_E], _T]) -> _T:
        try:
            if not self._retries.has_answered:
                self._pool.prepare(number)
            return work(self._pool[number])
        except ExpiredError:
            self._pool.renew(number)
        except MovedError as moved:
            if not self._pool.follow(number, moved):
                raise
        return work(self._pool[number])

    def ask(self, work: Callable[[_E], _T], *, may_lag: bool = False) -> _T:
        """Return the answer as :meth:`ask_once` does, and repeat the request while no endpoint can answer."""
        began, attempt = time.monotonic(), 0
        while True:
            try:
                return self.ask_once(work, may_lag=may_lag)
            except (RefusedError, NoBucketError) as error:
                raise self._pool.explain(error) from None
            except UnavailableError as error:
                attempt += 1
                if isinstance(error, BrokenOffError | BusyError | CorruptError):
                    self._retries.answered()
                if (pause := self._retries.failed(attempt, began)) is None:
                    raise self._pool.explain(error) from None
                log.warning("trying again: %s", error)
            time.sleep(pause)
