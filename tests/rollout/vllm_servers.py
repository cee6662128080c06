"""Servers for tests of the vLLM engine: vLLM itself, where it is installed, and a stand-in that answers as it does.

The stand-in computes with the model in plain forward passes. What runs against both keeps the stand-in honest.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from lit_opd.functional import law_logps
from lit_opd.types import SamplingLaw

VLLM = os.environ.get("LIT_OPD_VLLM")  # the path of a `vllm` executable
STARTING_SECONDS = 240


class StandIn:
    """Answers the requests of the engine; attributes say how it misbehaves."""

    def __init__(self, model, dtype=torch.float32):
        self.model, self.dtype, self.waiting = model, dtype, None
        self.label, self.calls, self.raw, self.refuses = "default", [], False, None
        self.lock = threading.Lock()  # one after the other: threads that share two cores only hinder each other
        self.answers = {}  # path -> what to answer instead

    def answer(self, path, body):
        path = path.partition("?")[0]
        self.calls.append(path)
        if path in self.answers:
            return self.answers[path]
        if path == "/v1/completions":
            with self.lock:
                return self.complete(body)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.waiting = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
        elif path == "/reset_prefix_cache":  # what the cache holds is of the old weights: they are in force until now
            self.model.load_state_dict(self.waiting)
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        plain = {"/server_info": {"vllm_config": {"model_config": {"dtype": str(self.dtype)}}},
                 "/weight_info": {"weight_version": self.label}}  # fmt: skip
        return 200, plain.get(path, {"success": True})

    @torch.no_grad()
    def complete(self, body):
        biases = {int(token): bias for token, bias in body.get("logit_bias", {}).items()}
        size = self.model.config.vocab_size
        if wrong := [token for token in biases if token >= size]:
            return 400, {"error": {"message": f"out of vocabulary: {wrong}"}}
        if "temperature" not in body:
            return 200, {}
        law = SamplingLaw(body["temperature"], body["top_p"], body["top_k"], body["min_p"])
        stop, ids, logps = body["stop_token_ids"], [], []
        for uniform in np.random.default_rng(body["seed"]).random(body["max_tokens"]):
            logits = self.model(input_ids=torch.tensor([body["prompt"] + ids])).logits[:, -1]
            for token, bias in biases.items():
                logits[:, token] += bias
            forbidden = torch.tensor(stop) if len(ids) < body["min_tokens"] else None
            found = law_logps(logits, law, forbidden)
            token = int(torch.searchsorted(found[0].exp().double().cumsum(0), uniform, right=True).clamp(max=size - 1))
            ids.append(token)
            recorded = law_logps(logits, SamplingLaw()) if self.raw or law.temperature == 0 else found
            logps.append(float(recorded[0, token]))
            if token in stop:
                break
        reason = "stop" if ids[-1] in stop else "length"
        return 200, {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}]}

    @contextmanager
    def listening(self, port=0):
        """The address it listens on, while it does. An answer that is None breaks the connection off."""
        standin = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                status, answer = standin.answer(self.path, body)
                if answer is None:
                    self.close_connection = True
                    return self.connection.shutdown(socket.SHUT_RDWR)
                text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                return self.wfile.write(text)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 1000  # the rows of a rollout come all at once

        server = Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def vllm_serving(folder, log, *flags, port=None):
    """The address of `vllm serve FOLDER`, while it runs."""
    port = port or free_port()
    command = [VLLM, "serve", folder, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "64",
               "--enforce-eager", "--block-size", "32", *flags]  # fmt: skip
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    with open(log, "w") as output:
        # A group of its own: the server starts further processes, which end with it.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | settings,
                                   start_new_session=True)  # fmt: skip
        try:
            wait_for(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(process, url, log):
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, Path(log).read_text()[-3000:]
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(Path(log).read_text()[-3000:])
