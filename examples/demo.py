"""What biollm does, without a key: `make demo` runs this.

    python examples/demo.py

The two providers of the third step are servers on this machine with fixed answers. Everything else is real.
"""

import os
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import dumps
from pathlib import Path

from biollm.client import condense

BIOLLM = Path(sys.executable).with_name("biollm")
LOG = Path(__file__).with_name("nextflow_oom.log")
QUESTION = "Why did this Nextflow run fail? Answer in one sentence."
ANSWER = "STAR was killed for its memory (exit status 137): raise max_memory above 24 GB."
PROVIDERS = """
inherit: false
providers:
  dead: {{type: api, priority: 1, env_key: DEMO_KEY, base_url: "http://127.0.0.1:{dead}/v1", models: [any-model]}}
  next: {{type: api, priority: 2, env_key: DEMO_KEY, base_url: "http://127.0.0.1:{alive}/v1", models: [any-model]}}
"""


class Provider(BaseHTTPRequestHandler):
    """An OpenAI-compatible provider with one answer."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}
        usage = {"prompt_tokens": 1700, "completion_tokens": 20, "total_tokens": 1720}
        body = dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def step(number: int, title: str) -> None:
    print(f"\n--- {number}. {title}\n", flush=True)


def biollm(*words: str, **environment: str) -> None:
    shown = [f'"{word}"' if " " in word else word for word in words]
    print("$ biollm", *shown, flush=True)
    subprocess.run([BIOLLM, *words], env={**os.environ, "BIOLLM_GATEWAY": "off", **environment}, check=False)


def main() -> None:
    log = os.path.relpath(LOG)
    step(1, "Which deployment would be used now, and why others are skipped")
    biollm("explain")

    step(2, f"A failed run ({LOG.name}), condensed to the lines that name the cause; no model is involved")
    print(condense(LOG, tokens=300))

    step(3, "A dead provider is replaced by the next; both are local servers, the answer is fixed")
    with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), Provider) as alive:
        with ThreadingHTTPServer(("127.0.0.1", 0), Provider) as closed:
            dead = closed.server_port
        threading.Thread(target=alive.serve_forever, daemon=True).start()
        Path(folder, "providers.yaml").write_text(PROVIDERS.format(dead=dead, alive=alive.server_port))
        own = {"BIOLLM_CONFIG_DIR": folder, "BIOLLM_STATE_DIR": f"{folder}/state", "DEMO_KEY": "not-a-secret"}
        biollm("complete", QUESTION, "-f", log, **own)
        alive.shutdown()

    step(4, "The last deployment, a small model on this machine, still answers; its text is no diagnosis")
    biollm("complete", QUESTION, "-f", log, "--provider", "embedded", "--max-tokens", "60")
    print("\nWith a key (export GOOGLE_API_KEY=...) the same command is answered by a real model.")


if __name__ == "__main__":
    main()
