"""Stop the demo guest where a condition holds, and read what it is about to do."""

import uhyve

with uhyve.Vm.demo().debug() as dbg:  # stopped before the first instruction
    big = dbg.breakpoint("handle_request", condition="arg1 > 8000")  # compiled once, evaluated in Rust
    while (stop := dbg.cont(timeout=10)).reason == "breakpoint":
        registers = stop.frame.registers
        print(f"vCPU {stop.vcpu} at {stop.symbol}: request {registers.rdi} of {registers.rsi} bytes")
    print(f"{big.hits} of {big.reached} requests met the condition; the guest's exit code is {stop.code}")
