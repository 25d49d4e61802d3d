"""Runs as one page: python -m omniopd_jax.report RUN [RUN ...] [--out=FILE] [--watch [--port=8686]]

A RUN is a run's folder (its `run_dir`), finished or not. The page is one HTML file that loads nothing; several runs are
laid over each other. With --watch it is served on 127.0.0.1 and follows a run that is going on.
"""

import contextlib
import http.server
import pathlib
import tempfile

from absl import flags

from omniopd_jax import config, similarity
from omniopd_jax.errors import UserError
from omniopd_jax.run import bucket, cli, page, terminal

_CHEAP = ("edit", "rouge1", "rougeL_fast")  # similarities that need no model and no TensorFlow


def phi_of(settings: dict):
    """The similarity of a run that kept no agreement by chance; None where computing it would load a model."""
    name = settings.get("audit.similarity")
    if name not in _CHEAP:
        return None
    c = config.default()
    c.audit.similarity = name
    return similarity.make(c)


def make(runs: list[str], *, watch: str = "") -> str:
    """The page of these folders; `watch`: the stamp that its server gives while nothing has changed.

    Raises:
      UserError: a folder that is missing or holds no run.
    """
    return page.build([page.Folder(run) for run in runs], phi_of, watch=watch)


def server(runs: list[str], port: int) -> http.server.ThreadingHTTPServer:
    """A server of the page on 127.0.0.1; the page is made anew when a run has written since.

    Raises:
      UserError: a folder that is missing or holds no run, a port that is in use.
    """

    def stamp() -> str:
        return str(sum(page.stamp(run) for run in runs))

    first = stamp()

    class Handler(http.server.BaseHTTPRequestHandler):
        made = first, make(runs, watch=first).encode()  # raises here, before anything is served

        def do_GET(self):
            now = stamp()
            if self.path.split("?")[0] == "/" and Handler.made[0] != now:
                Handler.made = now, make(runs, watch=now).encode()
            body = {"/": Handler.made[1], "/stamp": now.encode()}.get(self.path.split("?")[0])
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Type", "text/html; charset=utf-8" if self.path.startswith("/") else "text/plain")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            """Nothing at the terminal."""

    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UserError(f"--port={port}: {error.strerror}; --port=0 takes any that is free") from error


def main(argv) -> int:
    """Writes the page, or serves it; returns the exit code: 0 done, 2 a folder that holds no run."""
    runs, given = argv[1:], flags.FLAGS
    if not runs:
        raise UserError("name a run's folder: python -m omniopd_jax.report runs/tiny")
    buckets = [run for run in runs if config.is_bucket(run)]
    if buckets and (given["watch"].value or not given["out"].value):
        raise UserError(f"{buckets[0]} is in a bucket: name a file by --out, without --watch")
    if given["watch"].value and given["out"].value:
        raise UserError("--watch serves the page and writes none: leave out --out or --watch")
    if given["watch"].value:
        with server(runs, given["port"].value) as serving:
            print(f"serving on http://127.0.0.1:{serving.server_address[1]}/ (interrupt to end)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                serving.serve_forever()
        return 0
    with tempfile.TemporaryDirectory() as copies:
        html = make([str(bucket.copied(run, pathlib.Path(copies) / str(i))) for i, run in enumerate(runs)])
    out = config.expanded(given["out"].value or pathlib.Path(runs[0]) / "report.html")
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out} can't be written ({error.strerror}): name another file by --out") from error
    print(f"wrote {terminal.printable(str(out))} ({len(html) / 1e6:.2f} MB); open it in a browser", flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "the file to write; default: report.html in the first run's folder")
    flags.DEFINE_bool("watch", False, "serve the page on 127.0.0.1 and follow the runs")
    flags.DEFINE_integer("port", 8686, "of --watch; 0: any that is free")
    cli.run(main)
