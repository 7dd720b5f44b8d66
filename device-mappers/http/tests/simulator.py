"""A meter that answers HTTP: simulator.py PORT."""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

state = {"power": {"w": 230.5}, "limit": 10, "requests": 0}


class Meter(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers["authorization"] != "Basic dTpw" or self.headers["x-key"] != "k":
            self.answer(401, b"who are you?")
        elif self.path == "/api/state":
            state["requests"] += 1
            self.answer(200, json.dumps(state).encode())
        elif self.path == "/api/big":
            self.answer(200, b"x" * (10 << 20))
        else:
            self.answer(404, b"there is no such thing")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        state.update(json.loads(body))
        self.answer(204, b"")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Meter)
print("ready", flush=True)
server.serve_forever()
