"""A completions server of a model's folder, for tests and for trying ``--generation`` without an accelerator.

    python -m ccrl.testing.completions_server served --name mine --port 8000

It speaks as much of OpenAI's completions protocol as ``ccrl.llm.served`` does, in vLLM's dialect: token ids in and
out, log-probabilities of the whole distribution at temperature 1, ``top_p``, ``top_k``, ``seed``, ``stop_token_ids``;
and the two routes of vLLM's developer mode that ``generation_weights reload`` uses. One request at a time, without a
cache of keys and values: it shows what goes over the wire, not how fast.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
import tyro

from ccrl.llm.decoding import truncate
from ccrl.llm.models import load_model
from ccrl.llm.vocabulary import folder_ends

__all__ = ["CompletionsServer"]


class CompletionsServer:
    """Serves ``folder`` as ``name`` from a thread of its own, inside a ``with``.

    Args:
        folder: of a Hugging Face model.
        name: what requests call it.
        port: 0 takes a free one; see ``url``.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, folder: str | Path, name: str, port: int = 0) -> None:
        self.folder, self.name = Path(folder), name
        self.told: list[str] = []
        """Routes of the developer mode that were called."""
        self.asked: list[dict[str, Any]] = []
        """Requests for completions."""
        self._turn = threading.Lock()
        self.reload()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """Of the API, with its version."""
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def reload(self) -> None:
        """Take the weights that are in the folder now."""
        self.model: Any = load_model(self.folder).eval()
        self.ends = folder_ends(self.folder)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What a request to ``path`` is answered with.

        Raises:
            ValueError: an unknown route, model or method.
        """
        with self._turn:
            if path == "/v1/completions":
                if body.get("model") != self.name:
                    raise ValueError(f"no model {body.get('model')!r}, expected {self.name!r}")
                self.asked.append(body)
                return {"choices": self._choices(body)}
            self.told.append(path.strip("/"))
            if path == "/collective_rpc" and body.get("method") == "reload_weights":
                self.reload()
            elif path != "/reset_prefix_cache":
                raise ValueError(f"unknown route {path} {body}")
            return {}

    @torch.no_grad()
    def _choices(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(int(body.get("seed", torch.seed() % 2**31)))
        ends = {*self.ends, *body.get("stop_token_ids", ())}
        found: list[dict[str, Any]] = []
        for prompt in body["prompt"]:
            for _ in range(body["n"]):
                tokens: list[int] = []
                said: list[float] = []
                while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in ends):
                    logits = self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
                    kept = truncate((logits / body["temperature"]).log_softmax(-1), body["top_p"], body.get("top_k", 0))
                    tokens.append(int(torch.multinomial(kept.exp(), 1, generator=generator)))
                    said.append(float(logits.log_softmax(-1)[tokens[-1]]))
                reason = "stop" if tokens[-1] in ends else "length"
                log_probs = {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": said}
                found.append({"index": len(found), "text": "", "logprobs": log_probs, "finish_reason": reason})
        return found


def _handler(server: CompletionsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, said = 200, server.answer(self.path, body)
            except ValueError as error:
                status, said = 400, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, *_: Any) -> None: ...

    return Handler


def main(folder: Path, /, name: str, port: int = 8000) -> None:
    """Serve a model's folder on this machine until Ctrl-C.

    Args:
        folder: The model is in this folder.
        name: Requests call the model so.
        port: The server listens on this port of 127.0.0.1.
    """
    with CompletionsServer(folder, name, port) as server:
        print(f"{server.url} serves {server.folder} as {server.name}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    tyro.cli(main)
