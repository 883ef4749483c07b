"""Sessions on a cluster: runs that all workers make, and runs of one alone.

Contract: a `session.run` whose fetches depend on a collective is one that all workers must
make, and the others are told of it; what depends on none, such as saving or evaluation,
each worker may run by itself. Should one worker make a run that the others do not make, all
end with a sentence (`liveness`), and none hangs.
"""

from __future__ import annotations

import contextlib
from typing import Any, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1.workers import collectives
from bn_tf1.workers.liveness import Watch

# What TensorFlow raises where another worker is gone, on one version or the other.
_LOST_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.InternalError,
    tf.errors.UnavailableError,
    tf.errors.UnknownError,
)


class WorkerSession(tf.Session):
    """A session whose runs the watch over the workers knows of."""

    def __init__(
        self, workers: Any, watch: Watch, target: str, graph: tf.Graph, config: Any
    ):
        super().__init__(target, graph=graph, config=config)
        self._workers = workers
        self._watch = watch
        self._reached: dict[tuple, list[int]] = {}

    def run(self, fetches, feed_dict=None, options=None, run_metadata=None):
        with self._watched(fetches, feed_dict or ()):
            return super().run(fetches, feed_dict, options, run_metadata)

    # It does not call `run`.
    def make_callable(self, fetches, feed_list=None, accept_options=False):
        run = super().make_callable(fetches, feed_list, accept_options)

        def watched(*values, **options):
            with self._watched(fetches, feed_list or ()):
                return run(*values, **options)

        return watched

    def __exit__(self, kind, error, traceback):
        # Before `close`, which would wait for the others.
        if kind is not None:
            self._workers.fail(error)
        return super().__exit__(kind, error, traceback)

    def close(self):
        """Waits until all workers have made their last run."""
        self._watch.close()
        super().close()

    @contextlib.contextmanager
    def _watched(self, fetches, fed):
        held = self._held(fetches, fed)
        if not held:
            yield
            return
        try:
            with self._watch.run(held):
                yield
        except _LOST_ERRORS:
            # The cause may be a worker that is gone: then this ends the process.
            self._watch.await_end()
            raise

    def _held(self, fetches, fed):
        """The numbers of the collectives of a run."""
        elements = _elements(self.graph, fetches)
        fed = [self.graph.as_graph_element(key) for key in fed]
        key = (
            self.graph.version,
            tuple(element.name for element in elements),
            tuple(tensor.name for tensor in fed),
        )
        # The walk through the graph takes milliseconds, in each step.
        if key not in self._reached:
            self._reached[key] = collectives.reached(self.graph, elements, fed)
        return self._reached[key]


def _elements(graph, fetches: Any) -> Sequence[Any]:
    flat = tf.nest.flatten(fetches, expand_composites=True)
    return [graph.as_graph_element(fetch) for fetch in flat if fetch is not None]
