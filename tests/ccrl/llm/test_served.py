"""The client of a completions server, against a small server that speaks the protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from ccrl.llm.served import CompletionsClient, ServerError, Written
from ccrl.settings import ConfigError


class Server(HTTPServer):
    """Answers every prompt with its last token, counted up from completion to completion; keeps what it was asked."""

    seen: list[tuple[str, dict[str, Any], str | None]]
    answer: Any = None
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers["Authorization"]))
        answer = self.server.answer or {"choices": list(reversed(choices(body)))}  # servers promise no order
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args: Any) -> None: ...


def choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for i, prompt in enumerate(body["prompt"]):
        for j in range(body["n"]):
            tokens = [prompt[-1] + j, 2]
            said = {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": [-0.5 * (j + 1), -0.25]}
            reason = "stop" if j == 0 else "length"
            found.append({"index": i * body["n"] + j, "text": "?", "logprobs": said, "finish_reason": reason})
    return found


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.seen = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(server: Server, **options: Any) -> CompletionsClient:
    return CompletionsClient(f"http://127.0.0.1:{server.server_port}/v1/", "mine", timeout=10.0, **options)


def test_completions_with_their_tokens(server: Server) -> None:
    found = client(server, key="secret").complete([[1, 5], [7]], n=2, max_tokens=8, temperature=0.7, top_k=3, seed=4)
    assert found == [
        [Written([5, 2], [-0.5, -0.25], True), Written([6, 2], [-1.0, -0.25], False)],
        [Written([7, 2], [-0.5, -0.25], True), Written([8, 2], [-1.0, -0.25], False)],
    ]
    ((path, body, key),) = server.seen
    assert path == "/v1/completions"
    assert key == "Bearer secret"
    assert body == {
        "model": "mine", "prompt": [[1, 5], [7]], "n": 2, "max_tokens": 8, "temperature": 0.7, "top_p": 1.0,
        "logprobs": 0, "return_tokens_as_token_ids": True, "top_k": 3, "seed": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": []}, "expected 1 choices"),
        ([1], "expected a JSON object"),
        ({"choices": [{"index": 0, "text": "a", "logprobs": None}]}, "with token ids and log-probabilities"),
        (
            {
                "choices": [
                    {"index": 0, "finish_reason": "stop", "logprobs": {"tokens": ["a"], "token_logprobs": [0.0]}}
                ]
            },
            "with token ids",
        ),
    ],
)
def test_answers_of_another_protocol(server: Server, answer: Any, message: str) -> None:
    server.answer = answer
    with pytest.raises(ServerError, match=message):
        client(server).complete([[1]])


def test_refusals_and_bad_input(server: Server) -> None:
    server.status, server.answer = 404, {"error": "no model 'mine'"}
    with pytest.raises(ServerError, match=r"refuses the request \(404\): .*no model 'mine'"):
        client(server).complete([[1]])
    with pytest.raises(ServerError, match="is it running"):
        CompletionsClient("http://127.0.0.1:9/v1", "mine", timeout=1.0).complete([[1]])
    with pytest.raises(ValueError, match="url: expected http"):
        CompletionsClient("localhost", "mine")
    with pytest.raises(ConfigError, match="temperature"):
        client(server).complete([[1]], temperature=0.0)
