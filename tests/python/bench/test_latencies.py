"""Latencies of a VM's exits, as ``VmStats`` tells them."""

import time

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


@pytest.mark.vm
def test_counters_of_a_running_vm_grow_and_stay_when_it_has_ended(backend):
    with uhyve.Vm(uhyve.Image.bench(), args=["port_out", "1000000000", "0"], backend=backend, sampling=1) as vm:
        assert vm.stats is None
        vm.start()
        first = vm.stats
        assert first is not None
        deadline = time.monotonic() + 30
        while not sum(vm.stats.exits.values()) > sum(first.exits.values()) + 1000:
            assert time.monotonic() < deadline
        assert sum(parts["total"]["count"] for parts in vm.stats.latencies[0].values()) > 1000

    assert sum(vm.stats.exits.values()) > sum(first.exits.values())


@pytest.mark.vm
def test_counters_of_a_vm_are_those_of_its_last_end_whatever_that_was(backend, guest):
    vm = uhyve.Vm(guest("crash"), backend=backend)
    with pytest.raises(uhyve.GuestCrashError):
        vm.run(60)
    assert sum(vm.stats.exits.values()) > 0

    vm = uhyve.Vm.demo(backend=backend)
    assert vm.run(60).stats == vm.stats
    with vm.debug() as dbg:
        dbg.breakpoint("handle_request")
        dbg.cont(60)
        assert vm.stats.hypercalls == dbg.stats.hypercalls
