"""A local server that speaks the OpenAI, Anthropic and Gemini wire protocols, for tests. Standard library only.

It checks each request field by field against the provider's published schema and answers errors in the provider's own
form; what it can do beyond that (honour n, continue an assistant turn, think) is set per server. Faults come by script
(`faults`, one a call) or by share (`share` of calls, kinds drawn from `kinds`). `log` holds what was asked and what was
answered: each entry's `texts` are those that went out whole in a 200 answer. Keys are checked, never logged.

    with WireServer() as server: cfg.teacher.base_url = server.url("openai")
    python tests/support/wire_server.py --port 8123 --log LOG.jsonl [--share 0.3] [--seed 1]
"""

import argparse
import contextlib
import http.server
import json
import random
import socket
import struct
import sys
import threading
import time

from wire_protocols import Anthropic, Gemini, OpenAI, Refusal

FAULTS = (
    "429",
    "429_after",
    "500",
    "503",
    "reset",
    "stall",
    "truncated",
    "cut",
    "empty",
    "language",
    "megabyte",
    "html",
    "html_502",
)
WORDS = (
    "the",
    "small",
    "red",
    "fox",
    "adds",
    "apples",
    "to",
    "nine",
    "pears",
    "and",
    "then",
    "divides",
    "all",
    "of",
    "them",
    "by",
)
NUMBERS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
)
LANGUAGE = "Это совсем другой язык, и он не имеет отношения к задаче."


def speak(context: str, max_tokens: int, seed, index: int) -> str:
    """What the server's model writes after `context`: goes on counting, or words that depend on the seed."""
    last = context.rstrip().split()[-1:] or [""]
    if last[0] in NUMBERS[:-1] and context.rstrip().endswith(" ".join(NUMBERS[: NUMBERS.index(last[0]) + 1])):
        return " " + " ".join(NUMBERS[NUMBERS.index(last[0]) + 1 :][:max_tokens])
    rng = random.Random(f"{seed}|{index}|{context}")
    return "".join(" " + rng.choice(WORDS) for _ in range(max_tokens))


class WireServer:
    """One server in a thread. Settings are plain attributes, to be changed at any time."""

    def __init__(self, port: int = 0, **settings):
        self.key = None  # a key that every request must carry; None: any, or none
        self.speak = speak
        self.extensions = {"completion", "continue_final_message"}
        # + "prefix", "prefill", "ignore_unknown", "prompt_logprobs", "echo", "skip_special_tokens"
        self.honours_n = True
        self.refuses = set()  # request fields that get a 400 by name
        self.refused = None  # body -> whether it gets a 400 for its thinking settings
        # True: spends max_tokens on hidden reasoning unless told not to; "always": cannot stop
        self.model_thinks = False
        self.scores = None  # ids -> log-prob of each, None for the first: what a white-box teacher gives
        self.misfit = None  # how these are wrong: "missing", "count", "ids", "nan", "zero", "nameless"
        self.name_of = lambda token: ""  # a token's text
        self.names_ids = False  # `return_tokens_as_token_ids` is honoured (vLLM); else only `return_token_ids`
        self.strips = False  # takes leading whitespace off what it writes
        self.models = ["m"]
        self.faults, self.share, self.kinds = [], 0.0, [f for f in FAULTS if f not in ("cut", "html_502")]
        self.rng = random.Random(0)
        self.listing_faults = []  # statuses of the next answers to a question about the models
        self.may_list = True  # whether the key's scopes let it ask about the models
        self.retry_after_s, self.stall_s, self.delay_s = 0.2, 30.0, 0.0
        self.headers = {}  # sent with every answer
        # the body of a 200 answer -> what goes out in its place: an object, bytes, (status, headers, bytes)
        self.mangle = None
        self.cache_least, self.cached = None, set()  # Anthropic: the least tokens that are cached; None: half of all is
        self.max_context = None  # characters; longer requests get the provider's own 400
        self.log, self.lock, self.log_file = [], threading.Lock(), None
        self.in_flight = self.most_in_flight = 0
        self.seedless = 0
        self.port = port
        for name, value in settings.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.stop()

    def start(self):
        """Listens (again, on the same port)."""
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self.server = _Server(("127.0.0.1", self.port), handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def stop(self):
        """Gone: nothing listens, and open connections are cut."""
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()
        self.server.cut_connections()
        self.thread.join()

    def url(self, provider: str) -> str:
        """The base_url that the provider's SDK wants."""
        return f"http://127.0.0.1:{self.port}" + ("/v1" if provider == "openai" else "")

    def calls(self) -> list[dict]:
        """Log entries of requests for text (not of model listings)."""
        with self.lock:
            return [entry for entry in self.log if entry["generates"]]

    def arrived(self) -> int:
        """Texts that went out whole."""
        return sum(len(entry["texts"]) for entry in self.calls())

    def draw_fault(self):
        """The fault of the next call, or None."""
        with self.lock:
            if self.faults:
                return self.faults.pop(0)
            return self.rng.choice(self.kinds) if self.rng.random() < self.share else None

    def write(self, entry):
        """Writes a finished entry to the log file, if there is one."""
        with self.lock:
            if self.log_file:
                self.log_file.write(json.dumps(entry) + "\n")
                self.log_file.flush()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    block_on_close = False

    def __init__(self, *args):
        self.open = set()
        super().__init__(*args)

    def handle_error(self, request, client_address):
        pass

    def cut_connections(self):
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: WireServer

    def setup(self):
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.open.add(self.connection)

    def finish(self):
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, *args):
        pass

    def parse_request(self):
        """As a proxy is asked: the whole address. It is answered here."""
        done = super().parse_request()
        self.proxied = done and self.path.startswith("http://")
        if self.proxied:
            self.path = "/" + self.path.removeprefix("http://").partition("/")[2]
        return done

    def do_GET(self):
        self.entry = {"generates": False, "path": self.path}
        with self.owner.lock:
            self.owner.log.append(self.entry)
        protocol = _protocol(self)
        if self.owner.listing_faults:
            return self._answer(self.owner.listing_faults.pop(0), b"<html>a bad moment</html>")
        try:
            _check_key(self.owner, protocol, self.headers)
            if not self.owner.may_list:
                raise Refusal(403, "Missing scopes: api.model.read", "")
            status, body = protocol.describe(self.owner, self.path)
        except Refusal as e:
            status, body = e.args[0], protocol.error(*e.args)
        return self._answer(status, body)

    def do_POST(self):
        owner = self.owner
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        protocol = _protocol(self)
        self.entry = {
            "generates": True,
            "time": time.time(),
            "port": self.client_address[1],
            "provider": protocol.name,
            "path": self.path,
            "proxied": self.proxied,
            "body": None,
            "fault": None,
            "status": None,
            "texts": [],
            "usage": None,
        }
        with owner.lock:
            owner.log.append(self.entry)
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
        try:
            self._generate(owner, protocol, raw)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with owner.lock:
                owner.in_flight -= 1
            owner.write(self.entry)

    def _generate(self, owner, protocol, raw):
        try:
            self.entry["body"] = body = json.loads(raw)
            _check_key(owner, protocol, self.headers)
            asked = protocol.parse(owner, body, self.path, self.headers)
        except json.JSONDecodeError:
            return self._answer(400, protocol.error(400, "the body is no JSON", ""))
        except Refusal as e:
            return self._answer(e.args[0], protocol.error(*e.args))
        if owner.max_context and len(asked["context"]) > owner.max_context:
            return self._answer(400, protocol.error(400, protocol.TOO_LONG, ""))
        fault = self.entry["fault"] = owner.draw_fault()
        if owner.delay_s:
            owner.stopping.wait(owner.delay_s)
        if fault in ("429", "429_after", "500", "503"):
            after = owner.retry_after_s  # seconds, or a date as text
            extra = {"Retry-After": after if isinstance(after, str) else f"{after:g}"} if fault == "429_after" else {}
            status = int(fault[:3])
            return self._answer(status, protocol.error(status, "injected by the test", ""), extra)
        if fault in ("html", "html_502"):
            page = b"<!doctype html><html><body><h1>Bad gateway</h1></body></html>"
            return self._answer(502 if fault == "html_502" else 200, page, {"Content-Type": "text/html"})
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        if fault == "stall":
            owner.stopping.wait(owner.stall_s)
            self.close_connection = True
            return None
        texts, usage = _write(owner, asked, fault)
        answer = protocol.answer(asked, texts, usage)
        if asked.get("score"):
            answer["choices"] = [protocol.scored(owner, asked)]
        answer = owner.mangle(answer) if owner.mangle else answer
        self.entry["usage"] = usage
        if isinstance(answer, tuple):
            return self._answer(answer[0], answer[2], answer[1])
        answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if fault == "truncated":
            return self._answer(200, answer[: len(answer) // 2])
        if fault == "cut":
            self.close_connection = True
            return self._answer(200, answer[: len(answer) // 2], length=len(answer))
        self.entry["texts"] = texts
        return self._answer(200, answer)

    def _answer(self, status, body, extra=None, length=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.entry["status"] = status
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(length or len(body))}
        for name, value in (headers | self.owner.headers | (extra or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _write(owner, asked, fault):
    """(texts, usage) of a request that is answered."""
    n = asked["n"] if owner.honours_n else 1
    seed = asked["seed"]
    if seed is None:
        with owner.lock:
            owner.seedless += 1
            seed = f"none{owner.seedless}"
    texts = [owner.speak(asked["context"], asked["max_tokens"], seed, i) for i in range(n)]
    hidden = 0
    if asked["thinks"]:
        texts, hidden = [""] * n, asked["max_tokens"] * n
    if owner.strips or asked["chat"]:
        texts = [text.lstrip() for text in texts]
    if fault == "empty":
        texts = [""] * n
    elif fault == "language":
        texts = [LANGUAGE] * n
    elif fault == "megabyte":
        texts = ["lorem ipsum " * 87382] * n
    tokens_out = hidden or sum(min(asked["max_tokens"], len(text.split())) for text in texts)
    usage = {"in": asked.get("tokens_in") or max(1, len(asked["context"]) // 4), "out": tokens_out, "hidden": hidden}
    return texts, usage


def _protocol(handler):
    path = handler.path.split("?")[0]
    if path.startswith("/v1beta/") or ":" in path or "x-goog-api-key" in handler.headers:
        return Gemini
    return Anthropic if path == "/v1/messages" or "anthropic-version" in handler.headers else OpenAI


def _check_key(owner, protocol, headers):
    sent = protocol.sent_key(headers)
    if owner.key is not None and sent != owner.key:
        raise Refusal(401, f"Incorrect API key provided: {sent}", "")  # some services echo the key: nobody may log that


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", default="")
    parser.add_argument("--share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    server = WireServer(args.port, share=args.share, rng=random.Random(args.seed))
    with contextlib.ExitStack() as stack:
        if args.log:
            server.log_file = stack.enter_context(open(args.log, "a", encoding="utf-8"))
        stack.enter_context(server)
        print(server.port, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
