"""Before JAX connects the hosts: are all there, with the same configuration and packages?

JAX ends a process that waits too long for another without saying for which. So every host first
shows its card to host 0, at the address where JAX's coordinator will listen afterwards, and all get
the same answer: nothing, or one sentence that names who is missing or differs.
"""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from linvideo_jax.errors import UserError

Card = dict[str, Any]
PAUSE = 0.2  # seconds between two attempts
READING = 10.0  # seconds that a connection has to show its card
_LIMIT = "LIMIT"  # in a verdict, the time that all had to come


def meet(card: Card, address: str, process: int, num_processes: int, seconds: float) -> None:
    """Returns when all hosts have shown their cards; UserError, the same on all, if they differ.

    card: JSON, `host` with this host's name and groups of values to compare (`differences`);
    address: "name:port" of host 0. UserError also if not all have come after `seconds`.
    """
    deadline = time.monotonic() + seconds
    if process == 0:
        verdict = _receive_all(card, int(address.rsplit(":", 1)[1]), num_processes, deadline)
    else:
        verdict = _show(card, address, process, deadline)
    if verdict:
        raise UserError(verdict.replace(_LIMIT, f"{seconds:.0f} s"))


def differences(cards: Mapping[int, Card]) -> str:
    """One sentence about the first value in which a host differs from most; "" if none does."""
    for group in next(iter(cards.values())):
        if group == "host":
            continue
        names = dict.fromkeys(name for card in cards.values() for name in card[group])
        for name in names:
            values = {process: card[group].get(name) for process, card in cards.items()}
            texts = {process: json.dumps(value) for process, value in values.items()}
            (usual, count), *others = Counter(texts.values()).most_common()
            if not others:
                continue
            # Two hosts, or a draw: host 0 is taken to be right.
            if count == others[0][1]:
                usual = texts[0]
            odd = min(process for process, text in texts.items() if text != usual)
            right = min(process for process, text in texts.items() if text == usual)
            return (
                f"{_name(odd, cards)} has {group} {name} {texts[odd]}, {_name(right, cards)} "
                f"{usual}: give all hosts the same."
            )
    return ""


def _name(process: int, cards: Mapping[int, Card]) -> str:
    return f"host {process} ({cards[process]['host']})"


def _missing(there: Sequence[int], num_processes: int) -> str:
    missing = [process for process in range(num_processes) if process not in there]
    told = ", ".join(map(str, missing[:8])) + (" and others" if len(missing) > 8 else "")
    hosts, have = ("hosts", "have") if len(missing) > 1 else ("host", "has")
    return (
        f"{hosts} {told} of {num_processes} (counted from 0) {have} not come within {_LIMIT}: "
        "see whether the program was started there, and its log."
    )


def _receive_all(card: Card, port: int, num_processes: int, deadline: float) -> str:
    cards, connections = {0: card}, {}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.closing(_listen(port)))
        while len(cards) < num_processes and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(TimeoutError, ValueError, OSError):
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(READING)
                process, theirs = _read(connection)
                cards[process], connections[process] = theirs, connection
        if len(cards) < num_processes:
            verdict = _missing(list(cards), num_processes)
        else:
            verdict = differences(dict(sorted(cards.items())))
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps([verdict]).encode() + b"\n")
        for connection in connections.values():  # they close first: the port is free at once
            connection.settimeout(2.0)
            with contextlib.suppress(OSError):
                connection.recv(1)
    return verdict


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be opened on host 0 ({error.strerror}): choose another port for "
            "the coordinator."
        ) from None


def _show(card: Card, address: str, process: int, deadline: float) -> str:
    host, port = address.rsplit(":", 1)
    for left in _attempts(deadline):
        with contextlib.suppress(OSError, ValueError):
            connection = socket.create_connection((host.strip("[]"), int(port)), timeout=left)
            with contextlib.closing(connection):
                connection.sendall(json.dumps([process, card]).encode() + b"\n")
                # Host 0 answers at its own deadline, and may have started later.
                connection.settimeout(left + 60)
                return _read(connection)[0]
    return f"host 0, {address}, cannot be reached within {_LIMIT}: see whether it was started."


def _attempts(deadline: float) -> Iterator[float]:
    while (left := deadline - time.monotonic()) > 0:
        yield left
        time.sleep(PAUSE)


def _read(connection: socket.socket) -> list[Any]:
    with connection.makefile("rb") as file:
        return json.loads(file.readline())
