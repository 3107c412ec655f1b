"""What the examples check before TensorFlow waits for other workers."""

import json
import os
import socket
import threading
from unittest import mock

import tensorflow as tf
from absl.testing import parameterized

from examples import cluster
from examples import launch_workers

# A guard: no test waits for so long, however busy the machine is.
PLENTY = 600.0


def tf_config(cluster_jobs=None, **task):
    """Returns a `TF_CONFIG` that is right except for what is given."""
    return json.dumps(
        {
            "cluster": cluster_jobs or {"worker": ["a:1", "b:2"]},
            "task": {"type": "worker", "index": 1} | task,
        }
    )


class TfConfigTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        tf_config(),
        tf_config(index="1"),
        tf_config({"chief": ["a:1"], "worker": ["b:2", "c:3"]}),
        tf_config({"worker": ["[::1]:1", "[::1]:2"]}),
    )
    def test_takes(self, text):
        cluster.check_tf_config(text)

    @parameterized.parameters(
        (None, "`TF_CONFIG` must be set.*launch_workers"),
        ("", "`TF_CONFIG` must be set"),
        ("{'cluster'", "must be JSON \\(.*line 1 column 2"),
        ("[]", "must have an object `cluster`"),
        ('{"cluster": {}}', "must have an object `task`"),
        ('{"cluster": {}, "task": {}}', "must have the jobs .*: \\[\\]"),
        (tf_config({"ps": ["a:1"]}), "no others. Received: \\['ps'\\]"),
        (tf_config({"worker": "a:1"}), "must be a list of addresses"),
        (tf_config({"worker": []}), "must be a list of addresses"),
        (tf_config({"worker": ["a"]}), "must be host:port.*'a'"),
        (tf_config({"worker": ["a:0"]}), "a port from 1 to 65535.*'a:0'"),
        (tf_config({"worker": ["a:65536"]}), "a port from 1 to 65535"),
        (tf_config({"worker": [7, 8]}), "must be host:port.*7"),
        (tf_config({"worker": ["a:1", "a:1"]}), "must differ"),
        (tf_config({"chief": ["a:1", "b:2"]}), "`chief` .* must be one"),
        (tf_config(type="ps"), "one of \\['worker'\\]. Received: 'ps'"),
        (tf_config(type=None), "must be a job of `cluster`.*None"),
        (tf_config(index=None), "must be an integer. Received: None"),
        (tf_config(index=True), "must be an integer. Received: True"),
        (tf_config(index=2), "from 0 to 1, .* 2 address.*Received: 2"),
        (tf_config(index=-1), "from 0 to 1, .*Received: -1"),
    )
    def test_names_what_is_wrong_with(self, text, message):
        with self.assertRaisesRegex(ValueError, message):
            cluster.check_tf_config(text)


class ResolveTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ({"worker": ["a:1", "b:2"]}, "worker", 0, 0),
        ({"worker": ["a:1", "b:2"]}, "worker", 1, 1),
        ({"chief": ["z:1"], "worker": ["a:1", "b:2"]}, "chief", 0, 0),
        ({"chief": ["z:1"], "worker": ["a:1", "b:2"]}, "worker", 0, 1),
    )
    def test_ranks_the_chief_first(self, jobs, job, index, rank):
        text = tf_config(jobs, type=job, index=index)
        with mock.patch.dict(os.environ, {"TF_CONFIG": text}):
            worker = cluster.worker_of(cluster.resolve("tf_config"))
        self.assertEqual(worker.rank, rank)
        self.assertEqual(worker.addresses[rank], jobs[job][index])
        self.assertEqual(worker.is_chief, rank == 0)

    def test_finds_slurm_workers(self):
        slurm = {
            "SLURM_PROCID": "2",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_NODELIST": "node[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        }
        with mock.patch.dict(os.environ, slurm):
            resolver = cluster.resolve("slurm")
        worker = cluster.worker_of(resolver)
        self.assertEqual(worker.rank, 2)
        self.assertEqual(
            worker.addresses,
            ("node1:8888", "node1:8889", "node2:8888", "node2:8889"),
        )
        gpus = tf.config.list_physical_devices("GPU")
        self.assertEqual(resolver.num_accelerators(), {"GPU": len(gpus)})

    def test_says_what_slurm_does_not(self):
        with self.assertRaisesRegex(ValueError, "SLURM_PROCID not found"):
            cluster.resolve("slurm")


class WaitTest(tf.test.TestCase):
    def workers(self, count):
        addresses = tuple(launch_workers.free_addresses(count))
        return [cluster.Worker(addresses, rank) for rank in range(count)]

    def test_does_not_wait_for_itself(self):
        cluster.wait_for_workers(*self.workers(1), timeout=0)

    def test_returns_when_all_listen(self):
        servers = []

        def join(worker):
            cluster.wait_for_workers(worker, PLENTY)
            # As TensorFlow's server does, to which others may still connect.
            _, port = cluster.host_and_port(worker.addresses[worker.rank])
            servers.append(socket.create_server(("", port)))

        threads = [
            threading.Thread(target=join, args=(worker,))
            for worker in self.workers(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertLen(servers, 3)
        for server in servers:
            server.close()

    def test_names_who_does_not_come(self):
        first, other = self.workers(2)
        with self.assertRaisesRegex(
            TimeoutError,
            "1 of 2 workers did not listen within 0.5 seconds: "
            f"{other.addresses[1]}. This one is {first.addresses[0]}",
        ):
            cluster.wait_for_workers(first, timeout=0.5)

    def test_names_a_port_in_use(self):
        (worker,) = self.workers(1)
        _, port = cluster.host_and_port(worker.addresses[0])
        with (
            socket.create_server(("", port)),
            self.assertRaisesRegex(
                OSError, f"its address 127.0.0.1:{port}: Address already in use"
            ),
        ):
            cluster.wait_for_workers(worker, PLENTY)


if __name__ == "__main__":
    tf.test.main()
