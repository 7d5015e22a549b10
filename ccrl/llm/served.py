"""Completions that a server writes: the completions protocol of OpenAI as vLLM speaks it, with tokens and
log-probabilities.

    client = CompletionsClient("http://127.0.0.1:8000/v1", "my-model")
    written = client.complete([[1, 5, 9]], n=8, max_tokens=64, temperature=1.0)     # 8 Written per prompt

Prompts are token ids, so that no second tokenizer comes between. How trained weights reach
the server is said by whoever trains (``ccrl.llm.generation``).
"""

from __future__ import annotations

import http.client
import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any, NamedTuple

from ccrl.settings import Count, Natural, Positive, Unit, checked

__all__ = ["CompletionsClient", "ServerError", "Written"]

TOKEN = "token_id:"
"""vLLM writes tokens so where it is asked for ids (``return_tokens_as_token_ids``)."""


class ServerError(RuntimeError):
    """The server cannot be reached, refuses the request, or answers something else than the protocol says."""


class Written(NamedTuple):
    """One completion."""

    tokens: list[int]
    """Its tokens, the end token included where the server writes it."""
    log_probs: list[float]
    """Of each token, in nats: of the whole distribution, at temperature 1 (vLLM's default ``raw_logprobs``)."""
    finished: bool
    """Whether it ended by itself; else the cap cut it."""


class CompletionsClient:
    """A client of one served model.

    Args:
        url: of the API, with its version, ``http://host:port/v1``.
        model: its name at the server.
        timeout: seconds that a request may take.
        key: sent as a bearer token; empty: none is.

    Raises:
        ValueError: no such URL.
    """

    @checked
    def __init__(self, url: str, model: str, timeout: Positive = 600.0, key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://host:port/v1, got {url!r}")
        self.url, self.model, self.timeout, self._key = url.rstrip("/"), model, timeout, key

    @checked
    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        n: Count = 1,
        max_tokens: Count = 64,
        temperature: Positive = 1.0,
        top_p: Unit = 1.0,
        top_k: Natural = 0,
        seed: Natural | None = None,
        stop_tokens: Sequence[int] = (),
    ) -> list[list[Written]]:
        """``n`` completions of each prompt (token ids); ``top_k`` 0 takes all tokens; ``stop_tokens`` end a completion
        beside the server's own.

        Raises:
            ServerError: see there.
        """
        body: dict[str, Any] = {
            "model": self.model, "prompt": [list(prompt) for prompt in prompts], "n": n, "max_tokens": max_tokens,
            "temperature": temperature, "top_p": top_p, "logprobs": 0, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        if top_k:
            body["top_k"] = top_k
        if seed is not None:
            body["seed"] = seed
        if stop_tokens:
            body["stop_token_ids"] = list(stop_tokens)
        choices = self._post("completions", body).get("choices")
        if not isinstance(choices, list) or len(choices) != n * len(prompts):
            got = len(choices) if isinstance(choices, list) else repr(choices)
            raise ServerError(
                f"{self.url}: expected {n * len(prompts)} choices ({n} of {len(prompts)} prompts), got {got}"
            )
        try:
            # in any order; numbered prompt by prompt
            ordered = sorted(choices, key=lambda choice: choice["index"])
            written = [_written(choice) for choice in ordered]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"{self.url}: expected choices with token ids and log-probabilities, as vLLM gives them "
                              f"for return_tokens_as_token_ids, got {choices[0]!r}") from error  # fmt: skip
        return [written[i * n : (i + 1) * n] for i in range(len(prompts))]

    def tell(self, route: str, body: dict[str, Any]) -> None:
        """A request to a route of the server's own, beside the protocol (``http://host:port/ROUTE``); what it answers
        is not read.

        Raises:
            ServerError: it refuses.
        """
        self._send(f"{_root(self.url)}/{route}", body)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._send(f"{self.url}/{path}", body)
        try:
            found = json.loads(answer)
        except ValueError as error:
            raise ServerError(f"{self.url}: expected an answer of a completions server, got {error}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{self.url}: expected a JSON object, got {found!r}")
        return found

    def _send(self, url: str, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                found: bytes = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ServerError(f"{url}: the server refuses the request ({error.code}): {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"{url}: expected an answer of a completions server, got {error}; is it running?"
            ) from error
        return found


def _root(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _written(choice: dict[str, Any]) -> Written:
    said = choice["logprobs"]
    tokens = [int(token.removeprefix(TOKEN)) for token in said["tokens"]]
    log_probs = [float(value) for value in said["token_logprobs"]]
    if len(tokens) != len(log_probs) or not all(map(math.isfinite, log_probs)):
        raise ValueError("one finite log-probability per token")
    return Written(tokens, log_probs, choice["finish_reason"] == "stop")
