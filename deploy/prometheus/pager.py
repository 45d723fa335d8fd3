"""Prints the alerts that Alertmanager sends to a webhook, one line each. Usage: pager.py [PORT]"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pager(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for alert in body["alerts"]:
            labels, notes = alert["labels"], alert["annotations"]
            where = labels.get("target") or labels.get("job", "")
            print(alert["status"].upper(), labels["alertname"], where, "-", notes.get("summary", ""), notes.get("runbook_url", ""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


port = int(sys.argv[1]) if len(sys.argv) > 1 else 9094
server = ThreadingHTTPServer(("0.0.0.0", port), Pager)
print(f"waiting for pages on port {server.server_port}", flush=True)
server.serve_forever()
