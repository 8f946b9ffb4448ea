"""A chat server on this machine that answers, stalls, fails and rambles as a test wants it to."""

import contextlib
import http.server
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What is sent back: a reply of a model, or another `body`, or none."""

    reply: Any = "50"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    body: bytes | None = None
    stall: bool = False
    """Nothing comes until the server is closed."""
    trickle: float = 0
    """Seconds between two bytes."""
    reset: bool = False

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.reply}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@dataclass
class Asked:
    """A request as it came."""

    body: dict[str, Any]
    path: str
    headers: dict[str, str]
    time: float


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "ChatServer"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.changed:
            number = len(server.asked)
            server.asked.append(Asked(body, self.path, dict(self.headers), time.monotonic()))
            server.active += 1
            server.most_at_once = max(server.most_at_once, server.active)
            server.changed.notify_all()
        try:
            answer = server.respond(body, number)
        finally:
            with server.changed:
                server.active -= 1
        self._send(answer if isinstance(answer, Answer) else Answer(answer))

    def _send(self, answer: Answer):
        if answer.stall:
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if answer.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        content = answer.content()
        lines = [f"HTTP/1.1 {answer.status} Said", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        sent = "\r\n".join([*lines, "", ""]).encode() + content
        if not answer.trickle:
            self.wfile.write(sent)
            return
        for i in range(len(sent)):
            if self.server.closing.wait(answer.trickle):
                break
            self.wfile.write(sent[i : i + 1])

    def log_message(self, *args):
        pass


class ChatServer(http.server.ThreadingHTTPServer):
    """`respond` makes each answer, from the request's body and its number; `asked` are all."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.respond: Callable[[dict[str, Any], int], Any] = lambda body, number: "50"
        self.asked: list[Asked] = []
        self.active, self.most_at_once = 0, 0
        self.changed, self.closing = threading.Condition(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def wait_until(self, true: Callable[[], bool], seconds: float) -> bool:
        """Whether it came true while requests came in."""
        with self.changed:
            return self.changed.wait_for(true, seconds)

    def stop_listening(self):
        """Refuse connections from now on."""
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass


@contextlib.contextmanager
def running_chat_server():
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
