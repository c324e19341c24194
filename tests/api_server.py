"""A small OpenAI-compatible server on loopback, which says what a test wants, and misbehaves as it wants."""

import base64
import io
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

from sources import served

MODEL, KEY = "teacher", "sk-secret-123"


def use_key(monkeypatch):
    """The key is KEY, and nobody waits long before a request is sent again."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    monkeypatch.setattr(served, "PAUSE_S", 0.02)


def completion(text, reason="stop", **message):
    """The body of an answer."""
    return {"object": "chat.completion", "model": MODEL,
            "choices": [{"index": 0, "finish_reason": reason,
                         "message": {"role": "assistant", "content": text} | message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}}


class Raw:
    """An answer as it stands: status, headers, bytes, whether the length that is told is a longer one, and
    seconds between the bytes."""

    def __init__(self, status, body=b"", headers=(), cut=False, every_s=0.0):
        self.status, self.headers, self.cut, self.every_s = status, dict(headers), cut, every_s
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refusal(status, message, headers=(), **more):
    return Raw(status, {"error": {"message": message, "type": "error"} | more}, headers)


@contextmanager
def api_server(say, models=(MODEL,)):
    """Serves while it is open; yields an object with `url`, and `requests`, the bodies that came, each with the
    key that came with it. say: (body) -> text, dict or Raw; it may sleep."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            if self.path != "/v1/models":
                return self.give(refusal(404, "Not Found"))
            self.give(Raw(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body | {"key": self.headers["Authorization"]})
            said = say(body)
            said = completion(said) if isinstance(said, str) else said
            try:
                self.give(said if isinstance(said, Raw) else Raw(200, said))
            except OSError:  # who asked is gone
                self.close_connection = True

        def give(self, raw):
            self.send_response(raw.status)
            for name, value in {"Content-Type": "application/json", **raw.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw.body) + 10 * raw.cut))
            self.end_headers()
            if raw.every_s:
                for byte in raw.body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(raw.every_s)
            else:
                self.wfile.write(raw.body)
            if raw.cut:
                self.close_connection = True

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.requests = True, []
    server.handle_error = lambda *args: None  # who asked is gone
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def images_of(body):
    """The images of a request as (3, H, W) tensors."""
    parts = [part for message in body["messages"] if isinstance(message["content"], list)
             for part in message["content"] if part["type"] == "image_url"]
    found = []
    for part in parts:
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        found.append(torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1))
    return found


def text_of(body):
    """All that a request says, without its images."""
    texts = []
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)
