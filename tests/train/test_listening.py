"""Who can connect while it trains: nobody to one process; to several ranks only from this host.

The kernel's own tables are read, because torch opens its sockets where Python's audit does not see them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import alpaca_rows, write_recipe
from tests.train.forked import Nursery

# In the second step: what this process listens on, as (protocol, address in the kernel's hexadecimal).
LISTENING = """
import json, os, torch
from contextlib import suppress
from pathlib import Path

def listening():
    own = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            own.add(os.readlink(f"/proc/self/fd/{number}"))
    found = []
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/self/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in own and (fields[3] == "0A" or protocol.startswith("udp")):
                found.append((protocol, fields[1].partition(":")[0]))
    return found

original, steps = torch.optim.AdamW.step, []
def step(self, *arguments, **options):
    steps.append(self)
    if len(steps) == 2:
        Path(FILE).write_text(json.dumps(listening()))
    return original(self, *arguments, **options)
torch.optim.AdamW.step = step
"""
# 127.0.0.1 and ::1, and 127.0.0.1 written as IPv6, in the byte order of the tables.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.skipif(sys.platform != "linux" or sys.byteorder != "little", reason="the tables are those of Linux")
def test_nobody_outside_this_host_can_connect(nursery: Nursery, tiny_base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_base, alpaca_rows(8))
    hooks = {name: f"FILE = {str(tmp_path / name)!r}\n{LISTENING}" for name in ("alone", "first", "second")}
    assert nursery.train(recipe, hook=hooks["alone"]).code == 0
    ended = nursery.train_ranks(2, recipe, "--out", tmp_path / "two", hooks={0: hooks["first"], 1: hooks["second"]})
    assert [each.code for each in ended] == [0, 0], ended
    alone, first, second = (json.loads((tmp_path / name).read_text()) for name in hooks)
    assert alone == []
    assert first, "the ranks meet here"
    assert {address for _, address in first + second} <= LOOPBACK
