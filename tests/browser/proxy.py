"""A reverse proxy that serves a daemon below a path."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


class PrefixProxy:
    """Removes `prefix` from the path of each request. Everything else reaches the daemon as it is."""

    def __init__(self, upstream: str, prefix: str):
        host = urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if not self.path.startswith(prefix + "/"):
                    self.send_error(404, "outside of the prefix")
                    return
                connection = http.client.HTTPConnection(host, timeout=60)
                try:
                    connection.request(self.command, self.path.removeprefix(prefix), headers=dict(self.headers))
                    response = connection.getresponse()
                    self.send_response_only(response.status)
                    for name, value in response.getheaders():
                        if name.lower() not in HOP_BY_HOP:
                            self.send_header(name, value)
                    self.send_header("Connection", "close")
                    self.end_headers()
                    while part := response.read1(65536):
                        self.wfile.write(part)
                        self.wfile.flush()
                except (OSError, http.client.HTTPException):
                    # The browser left, or the daemon has been killed.
                    pass
                finally:
                    connection.close()

            do_POST = do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}{prefix}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
