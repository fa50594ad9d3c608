"""Small JSON messages over a TCP connection, one a line, without ever blocking."""

from __future__ import annotations

import json
import select
import socket
import time
from contextlib import suppress
from typing import Any

MAX_BYTES = 2**22
"""Of one message: the hosts of many thousand ranks."""


class Wire:
    """One connection.

    Args:
        connection: a connected socket.
        max_bytes: of a message; who sends more is no rank of ours.
        lost_s: the kernel closes it once the other machine has not answered for about so long; None: its own two hours.
    """

    def __init__(self, connection: socket.socket, max_bytes: int = MAX_BYTES, lost_s: float | None = None) -> None:
        connection.setblocking(False)
        with suppress(OSError):  # no TCP
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if lost_s is not None:
                _bury(connection, lost_s)
        self._socket, self._max = connection, max_bytes
        self._in, self._out = b"", b""
        self._kept: list[dict[str, Any]] = []
        self.open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def read(self) -> list[dict[str, Any]]:
        """What has come; ``open`` is False once the other side has gone.

        Raises:
            ValueError: no message of ours.
        """
        try:
            while chunk := self._socket.recv(2**16):
                self._in += chunk
                if len(self._in) > self._max:
                    raise ValueError("too long")
            self.open = False
        except BlockingIOError:
            pass
        except OSError:  # reset, unreachable
            self.open = False
        *lines, self._in = self._in.split(b"\n")
        kept, self._kept = self._kept, []
        messages = kept + [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("no object")
        return messages

    def await_one(self, within_s: float) -> dict[str, Any] | None:
        """The next message, if one comes; :meth:`read` returns what came with it.

        Raises:
            ValueError: no message of ours.
        """
        until_s = time.monotonic() + within_s
        while (left_s := until_s - time.monotonic()) > 0 and self.open:
            waiting = select.poll()
            waiting.register(self._socket, select.POLLIN)
            waiting.poll(1000 * left_s)
            if messages := self.read():
                self.keep(messages[1:])
                return messages[0]
        return None

    def keep(self, messages: list[dict[str, Any]]) -> None:
        """Have the next :meth:`read` return them once more."""
        self._kept = messages

    def write(self, message: dict[str, Any]) -> None:
        """Send as much as the kernel takes now; :meth:`flush` sends the rest."""
        self.send(encoded(message))

    def send(self, message: bytes) -> None:
        """As :meth:`write`, for one that is encoded already."""
        self._out += message
        self.flush()

    def flush(self, within_s: float = 0.0) -> None:
        """Send what is left, and wait up to ``within_s`` for a kernel that does not take it."""
        until_s = time.monotonic() + within_s
        while self._out and self.open:
            try:
                self._out = self._out[self._socket.send(self._out) :]
            except BlockingIOError:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return
                waiting = select.poll()
                waiting.register(self._socket, select.POLLOUT)
                waiting.poll(1000 * left_s)
            except OSError:
                self._out = b""  # reading tells that the other side has gone

    def close(self) -> None:
        self.open = False
        self._socket.close()


def encoded(message: dict[str, Any]) -> bytes:
    """One line, as it goes over a wire."""
    return json.dumps(message).encode() + b"\n"


def _bury(connection: socket.socket, lost_s: float) -> None:
    """Have the kernel notice a machine that is gone: its own answers, so that the process there may be held up."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": lost_s / 3, "TCP_KEEPINTVL": lost_s / 3, "TCP_USER_TIMEOUT": 1000 * lost_s}
    for option, value in options.items():
        if hasattr(socket, option):  # Linux has all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, round(value)))
