"""Equal workers on several hosts, worker 0 the chief: data-parallel training.

    workers = bn_tf1.Workers.from_environment()   # TF_CONFIG; or Workers(hosts, index)
    workers.join()
    y = bn_tf1.batch_norm(x, True, sync=workers)
    train_op = bn_tf1.make_train_op(loss, optimizer, workers=workers, num_examples=n)
    share = workers.share(tf.global_variables())
    with workers.session() as session:
        session.run(tf.global_variables_initializer())
        session.run(share)
        ...

Contract: all workers build the same graph and make the same runs of what depends on a
collective. Each has its own variables, which stay equal bit for bit. Whatever happens to one
of them ends all, with a sentence that names it (`liveness`): start all of them again from
the newest checkpoint.

TensorFlow's server runs any graph that reaches its port, at the address that is given and,
on Linux, at no other: the network must keep strangers out. A secret only protects the
meeting of the workers.
"""

from __future__ import annotations

import json
import os
from typing import Any, Iterable, Sequence

import tensorflow.compat.v1 as tf

from bn_tf1 import version
from bn_tf1.workers import collectives, handshake, own_address
from bn_tf1.workers.collectives import Group
from bn_tf1.workers.handshake import Introduction, WorkersError
from bn_tf1.workers.joint_moments import joint_moments
from bn_tf1.workers.liveness import Watch
from bn_tf1.workers.sessions import WorkerSession

_JOB = "worker"
# The group of all workers; those of fewer come behind it, by size and place.
_ALL = 1


class Workers:
    """The workers of one run, as one of them sees them.

    Attributes:
        hosts: "host:port" of each.
        index: which of them this one is.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        index: int,
        *,
        secret: bytes = b"",
        join_secs: float = 60.0,
        silence_secs: float = 10.0,
        step_secs: float = 600.0,
    ):
        """Describes them; nothing is connected before `join`.

        Args:
            hosts: "host:port" of each worker, the chief's first, as the others reach it.
            index: which of them this process is.
            secret: what only the workers know; without one whoever reaches the chief's
                port may join.
            join_secs: how long workers wait for one another at the start.
            silence_secs: a worker that says nothing for so long is lost.
            step_secs: a run that takes longer, or a worker that needs longer from one
                to the next while others wait, ends the run.

        Raises:
            ValueError: an argument is outside of what is said above.
        """
        self.hosts = _checked_hosts(hosts)
        self._all = Group(len(self.hosts), _ALL)
        if isinstance(index, bool) or not 0 <= index < len(self.hosts):
            raise ValueError(
                f"`index` is {index!r}, but must lie in [0, {len(self.hosts)}), as "
                "`hosts` says"
            )
        for name, seconds in [
            ("join_secs", join_secs),
            ("silence_secs", silence_secs),
            ("step_secs", step_secs),
        ]:
            if not seconds > 0:
                raise ValueError(f"`{name}` is {seconds!r}, but must be > 0 seconds")
        self.index = index
        self._secret = secret
        self._join_secs = join_secs
        self._silence_secs = silence_secs
        self._step_secs = step_secs
        self._watch: Watch | None = None
        self._held: Any = None
        self._server: Any = None

    @classmethod
    def from_environment(cls, **options: Any) -> Workers | None:
        """As the environment variable TF_CONFIG says; None where there is none.

        It is {"cluster": {"worker": [hosts]}, "task": {"type": "worker", "index": i}}. A
        host under "chief" is worker 0.

        Args:
            options: as for `Workers`.

        Raises:
            ValueError: TF_CONFIG is something else.
        """
        text = os.environ.get("TF_CONFIG")
        if not text:
            return None
        try:
            described = json.loads(text)
            cluster = described.get("cluster", {})
            task = described.get("task", {})
            hosts = [*cluster.get("chief", []), *cluster.get(_JOB, [])]
            kind, index = task.get("type", _JOB), int(task.get("index", 0))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"TF_CONFIG is {text!r}: {error}") from error
        if set(cluster) - {"chief", _JOB} or kind not in ("chief", _JOB):
            raise ValueError(
                f"TF_CONFIG is {text!r}, but may have only workers and a chief: there "
                "are no parameter servers here, and an evaluator needs no cluster"
            )
        if not hosts:
            return None
        # The workers behind a chief count from 0, too.
        return cls(hosts, index + (kind == _JOB and "chief" in cluster), **options)

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self.hosts)

    @property
    def is_chief(self) -> bool:
        """Whether this is the one that writes checkpoints and summaries."""
        return self.index == 0

    def rows(self, batch_size: int) -> tuple[int, int]:
        """(first, end) of this worker's examples in a batch of all workers."""
        # Each example once, and no worker has two more than another.
        return (
            batch_size * self.index // self.size,
            batch_size * (self.index + 1) // self.size,
        )

    # ------------------------------------------------------------------------ the meeting

    def join(self, message: Any = None) -> Any:
        """Waits for all workers, and gives each of them the chief's `message`.

        Before this, nothing of TensorFlow's listens at this worker's port.

        Args:
            message: of the chief: what JSON can hold, such as its configuration.

        Raises:
            WorkersError: one of them does not come in time, or does not fit: another
                version, other hosts, an index that is taken, a wrong secret.
        """
        if self.size == 1:
            return message  # what is written for several runs as one process, too
        own = Introduction(
            self.index,
            self.hosts,
            {"bn_tf1": version.VERSION, "TensorFlow": tf.version.VERSION},
        )
        # The port is held from now on, so that one that is taken is told of at once, and
        # not after the others have built their graphs.
        self._held = handshake.listen(self.hosts[self.index])
        handshake.check_reach(self._held, self.hosts, self.index)
        if self.is_chief:
            channels = handshake.gather(
                self._held, own, message, secret=self._secret, seconds=self._join_secs
            )
        else:
            channel, message = handshake.join(
                own, secret=self._secret, seconds=self._join_secs
            )
            channels = {0: channel}
        self._watch = Watch(
            self.index,
            self.hosts,
            channels,
            silence_secs=self._silence_secs,
            step_secs=self._step_secs,
        )
        return message

    def session(
        self, graph: tf.Graph | None = None, config: tf.ConfigProto | None = None
    ) -> tf.Session:
        """A session in which `graph` (by default the current one) trains with the others.

        Waits until all workers are here, and starts TensorFlow's server. At its end the
        session waits for the others to come to theirs; after an error it tells them.

        Raises:
            WorkersError: `join` was not called, the graphs differ in their collectives,
                or the server cannot be started.
        """
        graph = graph or tf.get_default_graph()
        if self.size == 1:
            return tf.Session(graph=graph, config=config)
        if self._watch is None:
            raise WorkersError("call `join` before `session`")
        config = _with_cluster(config, self.index)
        self._held.close()  # TensorFlow's server takes the port now
        try:
            self._server = tf.train.Server(
                {_JOB: self.hosts}, _JOB, self.index, config=config, start=False
            )
        except tf.errors.OpError as error:
            raise WorkersError(
                f"TensorFlow's server cannot listen at {self.hosts[self.index]}: "
                f"{error.message}"
            ) from error
        # No worker connects before all agree: whoever has come until here is none.
        own_address.keep(*handshake.address_of(self.hosts[self.index]))
        self._watch.agree(collectives.listed(graph))
        self._server.start()
        return WorkerSession(self, self._watch, self._server.target, graph, config)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this worker ends with `error`; a session does by itself."""
        if self._watch is not None:
            # TensorFlow's errors go on with the whole way to the operation.
            what = str(error).split("\n")[0]
            name = type(error).__name__
            self._watch.fail(f"worker {self.index} failed: {name}: {what}")

    # ---------------------------------------------------------- what they compute together

    def group(self, size: int) -> SyncGroup:
        """This worker and its neighbours, `size` of them, for `batch_norm(sync=...)`.

        Raises:
            ValueError: `size` does not divide the number of workers.
        """
        if size < 1 or self.size % size:
            raise ValueError(
                f"`size` is {size!r}, but must divide the {self.size} workers"
            )
        if size == self.size:
            return SyncGroup(self._all)
        # One range of keys for each size, so that no two groups have the same.
        key = _ALL + size * self.size + self.index // size
        return SyncGroup(Group(size, key))

    def joint_moments(self, moments: Any) -> Any:
        """The moments of all workers' values (`bn_tf1.workers.joint_moments`)."""
        return self.group(self.size).joint_moments(moments)

    def total(self, tensor: tf.Tensor) -> tf.Tensor:
        """The sum of a vector over all workers, with the same bits on each."""
        return collectives.total(tensor, self._all)

    def mean_gradients(
        self, pairs: Sequence[tuple], penalties: Sequence[Any], num_examples: tf.Tensor
    ) -> list[tuple]:
        """As `collectives.mean_gradients`, over all workers."""
        return collectives.mean_gradients(pairs, penalties, num_examples, self._all)

    def share(self, variables: Iterable[Any]) -> tf.Operation:
        """An operation that gives all workers the chief's values of `variables`.

        Run it once, after the variables were initialised, or restored by the chief.
        """
        return collectives.share(variables, self.is_chief, self._all)


class SyncGroup:
    """Workers among which `batch_norm(sync=...)` has joint statistics."""

    def __init__(self, group: Group):
        self._group = group

    def joint_moments(self, moments: Any) -> Any:
        """The moments of their values together (`bn_tf1.workers.joint_moments`)."""
        return joint_moments(moments, self._group)


def _checked_hosts(hosts):
    if isinstance(hosts, str) or not hosts:
        raise ValueError(f"`hosts` is {hosts!r}, but must be a list of host:port")
    for host in hosts:
        name, _, port = str(host).rpartition(":")
        if not (name and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise ValueError(f"`hosts` has {host!r}, but must have host:port")
    if len(set(hosts)) < len(hosts):
        raise ValueError(f"`hosts` is {hosts!r}, but must not name an address twice")
    return list(hosts)


def _with_cluster(config, index):
    """`config` such that collectives find their leader, and operations this worker."""
    merged = tf.ConfigProto()
    if config is not None:
        merged.CopyFrom(config)
    # Without a leader the first collective hangs, on both versions.
    merged.experimental.collective_group_leader = f"/job:{_JOB}/replica:0/task:0"
    # Without a filter a session waits until the server of every other worker answers.
    merged.device_filters.append(f"/job:{_JOB}/task:{index}")
    return merged
