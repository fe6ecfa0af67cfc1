"""Run recipes where each attempt to reach another machine is told and fails.

`python tests/without_network.py RECIPE WORD ... [--then RECIPE WORD ...]`; ends with the last one's exit status.
"""

import itertools
import runpy
import socket
import sys

connect, look_up = socket.socket.connect, socket.getaddrinfo


def refuse(self, address):
    if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1"):
        return connect(self, address)
    print(f"NETWORK {address}", file=sys.stderr)
    raise OSError("no network here")


def refuse_name(host, *args, **kwargs):
    if host in ("127.0.0.1", "localhost", "::1", None):
        return look_up(host, *args, **kwargs)
    print(f"NETWORK {host}", file=sys.stderr)
    raise socket.gaierror("no network here")


socket.socket.connect, socket.getaddrinfo = refuse, refuse_name
status = None
for then, words in itertools.groupby(sys.argv[1:], lambda word: word == "--then"):
    if not then and not status:
        sys.argv = list(words)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
sys.exit(status)
