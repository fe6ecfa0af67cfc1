"""An OpenAI-compatible endpoint (vLLM, llama.cpp's server, Ollama, TGI, `transformers serve`), asked for answers."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx

from recipes.utils.console import UserError

CHAT = "/chat/completions"


class Reply(NamedTuple):
    """A served answer. `stopped` is True where the model ended it by itself; `calls` are the tool calls that the server
    found in it, {"name", "arguments"}; `prompt_tokens` and `tokens` (of the answer) are None where it counts none."""

    text: str
    stopped: bool
    calls: list[dict]
    prompt_tokens: int | None
    tokens: int | None


class Endpoint:
    """The endpoint at `url`, such as http://localhost:8000/v1, and the `model` to ask there: the only one that it lists
    where none is named. `key_name` is the environment variable that holds the key it wants, if it wants one; `timeout`
    is in seconds, for a whole answer (for a piece of it, where it is streamed). Raises `UserError` for an endpoint that
    cannot be asked; so do its methods."""

    def __init__(self, url: str, model: str | None = None, key_name: str | None = None, timeout: float = 300):
        if "@" in urlsplit(url).netloc:
            raise UserError("--url: put no password into the address; --api-key-env NAME reads a key")
        if not re.match(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d{1,5})?(/|$)", url):
            raise UserError(f"--url {url}: is no address such as http://localhost:8000/v1")
        if key_name and not os.environ.get(key_name):
            raise UserError(f"--api-key-env {key_name}: no such variable is set in the environment")
        if not timeout > 0:
            raise UserError("--timeout: is in seconds, above 0")
        self.url, self.timeout = url.rstrip("/").removesuffix(CHAT), timeout
        headers = {"Authorization": f"Bearer {os.environ[key_name]}"} if key_name else {}
        self.client = httpx.Client(timeout=timeout, headers=headers)
        self.model = model or self._only_model()

    def ask(self, messages: list[dict], tools: list[dict] | None, max_tokens: int, thinks: bool | None = None) -> Reply:
        """The greedy answer to `messages`, which are as templates take them; `thinks` switches the template's thinking
        on or off."""
        body = self._body(messages, tools, max_tokens, 0.0)
        if thinks is not None:  # by each of the names that templates have for it
            body["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
        response = self._send("POST", CHAT, json=body)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UserError(f"{self.url}: streams its answers, though it was asked not to; switch that off there")
        found = self._read(response)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            message, reason = choice["message"], choice.get("finish_reason")
            calls = [_call(call) for call in message.get("tool_calls") or ()]
            counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
            return Reply(message.get("content") or "", reason not in (None, "length"), calls, *counts)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{self.url}: its answer is no chat completion: {_short(json.dumps(found))}") from error

    def stream(self, messages: list[dict], max_tokens: int, temperature: float) -> Iterator[str]:
        """Yield the answer to `messages` piece by piece as it is generated."""
        body = self._body(messages, None, max_tokens, temperature) | {"stream": True}
        with _told(self.url, self.timeout), self.client.stream("POST", self.url + CHAT, json=body) as response:
            self._check(response)
            for line in response.iter_lines():
                text = line.removeprefix("data:").strip()
                if not line.startswith("data:") or text == "[DONE]":
                    continue
                try:
                    piece = json.loads(text)
                    if "error" in piece:
                        raise UserError(f"{self.url}: the server broke off: {_message(text)}")
                    for choice in piece["choices"]:  # none in the one that tells how many tokens it took
                        yield choice["delta"].get("content") or ""
                except (LookupError, TypeError, AttributeError, ValueError) as error:
                    raise UserError(f"{self.url}: what it streams is no chat completion: {_short(text)}") from error

    def _body(self, messages, tools, max_tokens: int, temperature: float) -> dict:
        body = {"messages": _as_openai(messages), "max_tokens": max_tokens, "temperature": temperature, "stream": False}
        return body | ({"model": self.model} if self.model else {}) | ({"tools": tools} if tools else {})

    def _only_model(self) -> str | None:
        """The one model that the endpoint lists; None where it lists none, since such servers have but one."""
        try:
            names = [model["id"] for model in self._read(self._send("GET", "/models"))["data"]]
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url}: its list of models is none; name one with --model") from error
        if len(names) > 1:
            raise UserError(f"{self.url}: serves several models; name one with --model: {', '.join(names)}")
        return names[0] if names else None

    def _send(self, method: str, path: str, **how) -> httpx.Response:
        with _told(self.url, self.timeout):
            response = self.client.request(method, self.url + path, **how)
            self._check(response)
            return response

    def _check(self, response: httpx.Response) -> None:
        if response.status_code == 200:
            return
        said, code = _message(response.read().decode(errors="replace")), response.status_code
        mends = {
            401: "it wants a key: put one into the environment, and name the variable with --api-key-env",
            404: "most addresses end in /v1; or it has no such model (--model)",
            503: "it may still be loading its model; wait, and run this again",
        }
        mend = mends.get(401 if code == 403 else code)
        raise UserError(f"{response.url}: answered {code}: {said}" + (f"; {mend}" if mend else ""))

    def _read(self, response: httpx.Response) -> dict:
        try:
            found = response.json()
        except ValueError as error:
            text = _short(response.text)
            raise UserError(f"{response.url}: answered no JSON, so is no OpenAI-compatible endpoint: {text}") from error
        if not isinstance(found, dict):
            raise UserError(f"{response.url}: answered no JSON object: {_short(response.text)}")
        return found


@contextlib.contextmanager
def _told(url: str, timeout: float) -> Iterator[None]:
    """Turn what a connection raises into a line for the user."""
    try:
        yield
    except httpx.ConnectError as error:
        raise UserError(f"{url}: cannot be reached; is the server running, at that address?") from error
    except httpx.TimeoutException as error:
        mend = "raise --timeout, or see what else the server is doing"
        raise UserError(f"{url}: no word from it for {timeout:g} s; {mend}") from error
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise UserError(f"{url}: the connection broke: {why}; see the server's own log") from error


def _as_openai(messages: list[dict]) -> list[dict]:
    """Messages as the API has them: arguments of tool calls as JSON text, an id on each call and its result. Calls
    without one are numbered as Mistral's template numbers them, so that it renders what it rendered in training."""
    sent, waiting, numbers = [], list[str](), itertools.count(1)
    for message in messages:
        message = {key: value for key, value in message.items() if key != "weight"}
        if message.get("tool_calls"):
            calls = []
            for call, number in zip(message["tool_calls"], numbers, strict=False):
                function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}
                calls.append({"id": f"{number:09}", **call, "function": function})
            message["tool_calls"], waiting = calls, [call["id"] for call in calls]
        if message["role"] == "tool" and waiting:
            message.setdefault("tool_call_id", waiting.pop(0))
        sent.append(message)
    return sent


def _call(call: dict) -> dict:
    arguments = call["function"].get("arguments") or {}
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"name": call["function"]["name"], "arguments": arguments}


def _message(text: str) -> str:
    """What a server says of an error, which each wraps in its own way."""
    try:
        found = json.loads(text)
    except ValueError:
        return _short(text)
    while isinstance(found, dict) and (key := next((k for k in ("error", "message", "detail") if k in found), None)):
        found = found[key]
    return _short(found if isinstance(found, str) else json.dumps(found))


def _short(text: str) -> str:
    text = " ".join(text.split()) or "(nothing)"
    return text if len(text) <= 200 else f"{text[:197]}..."
