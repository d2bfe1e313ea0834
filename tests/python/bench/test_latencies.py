"""Latencies of a VM's exits, as ``VmStats`` tells them."""

import pytest

import uhyve


def test_latencies_in_the_table_for_people_stand_in_columns_whatever_their_names():
    part = {"vmm": dict.fromkeys(("p50", "p99", "max", "count"), 1000.0)}
    stats = uhyve.VmStats([], "soft", 1.0, [{"exit": part, "serial_write_buffer": part}])

    lines = str(stats).splitlines()[1:]

    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


@pytest.mark.vm
def test_latencies_of_all_exits_are_as_many_as_the_counters_say(backend):
    vm = uhyve.Vm(uhyve.Image.bench(), args=["wake", "20"], cpus=2, backend=backend, sampling=1, output="none")

    stats = vm.run(60).stats

    for vcpu, timed in zip(stats.vcpus, stats.latencies, strict=True):
        assert {reason: parts["total"]["count"] for reason, parts in timed.items()} == vcpu.exits | vcpu.hypercalls
