"""Asks the process at an abstract socket to run the Python program that stands behind it.

Then it ends; or, if it "stays", it ends as if it had failed when that program ends.
"""

import array
import json
import os
import socket
import sys

name, kind, *args = sys.argv[1:]
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    line.connect(f"\0{name}")
    order = {"args": args, "kind": kind, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
    content = json.dumps(order).encode()
    streams = array.array("i", [0, 1, 2])
    line.sendmsg([len(content).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    line.sendall(content)
    line.recv(1)
    if kind == "stays":
        line.recv(1)
        sys.exit(1)
