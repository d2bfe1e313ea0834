"""The GDB server's tests, a client of the protocol for them (``rsp``), and drivers of the real debuggers (``gdb``)."""
