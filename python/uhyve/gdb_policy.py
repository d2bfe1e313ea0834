"""What Python decides while a gdb client is attached.

The server for gdb, and with it the classes that live here (a policy to subclass, decisions, threads as the client sees
them), come with the next version. This version has no server: a VM is debugged from Python (``Vm.debug``) and from the
command line (``uhyve debug``).
"""

__all__: list[str] = []
