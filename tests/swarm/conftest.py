"""What tests of the swarm share: a Ray cluster in one machine, where Ray is installed."""

from __future__ import annotations

import shutil
import tempfile

import pytest

NODE = dict(num_cpus=1, include_dashboard=False, object_store_memory=80 << 20)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node of this machine, to which tests may add."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[swarm]'")
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: sockets lie below it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_raylet_start_wait_time_s", "100")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for name, value in dict(initial_delay_ms=0, period_ms=500, timeout_ms=10_000, failure_threshold=3).items():
            patch.setenv(f"RAY_health_check_{name}", str(value))  # a lost node is noticed in seconds
        patch.delenv("RAY_ADDRESS", raising=False)
        from ray.cluster_utils import Cluster

        running = Cluster(initialize_head=True, head_node_args=NODE)
        yield running
        from swarm.ray_mesh import membership

        membership.leave()
        running.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def add_node(cluster):
    """A function that adds a node, which is gone after the test."""
    added = []
    yield lambda: added.append(cluster.add_node(**NODE)) or added[-1]
    for node in added:
        if node in cluster.list_all_nodes():
            cluster.remove_node(node)
