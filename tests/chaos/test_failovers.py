"""Failovers behind Sentinel and in a Cluster, under eight processes."""

from __future__ import annotations

import contextlib

import pytest
from counting import Load
from redis_servers import Cluster, Watched, wait_until

pytestmark = pytest.mark.slow


def test_failovers_behind_sentinel(valkey_binary, tell):
    """One that is asked for and one after a kill: nothing counts twice, and service resumes."""
    with contextlib.closing(Watched(valkey_binary)) as group:
        group.start()
        load = Load(group.url)
        load.runs()
        old = group.primary
        group.fail_over()
        load.runs(30)
        wait_until(lambda: old.role() == b"slave", "the old primary follows the new one", 30)
        wait_until(old.is_in_sync, "it replicates", 30)
        load.runs()
        dead, heir = group.primary, group.replica
        dead.stop()
        wait_until(lambda: group.primary is heir, "the replica is promoted", 30)
        load.runs(30)
        tell(load.check(may_lose=True))


def test_failovers_in_a_cluster(valkey_binary, tell):
    """Every primary in turn hands over to its replica, then one is killed."""
    with contextlib.closing(Cluster(valkey_binary, replicas=3)) as cluster:
        cluster.start()
        load = Load(cluster.url)
        load.runs()
        for primary, replica in zip(cluster.primaries, cluster.replicas, strict=True):
            replica.ask("CLUSTER", "FAILOVER")
            wait_until(lambda r=replica: r.role() == b"master", "it takes over", 30)
            wait_until(lambda p=primary: p.role() == b"slave", "the other follows", 30)
            load.runs(30)
        dead = cluster.replicas[0]  # a primary by now
        dead.stop()
        wait_until(lambda: cluster.primaries[0].role() == b"master", "it takes over again", 30)
        load.runs(60)
        tell(load.check(may_lose=True))
