"""What an endpoint is sent, and what is told of one that cannot be asked."""

import json
import time

import pytest
from served import listening

from recipes.utils.console import UserError
from recipes.utils.serving import Endpoint

HELLO = [{"role": "user", "content": "Hello"}]
JSON = "application/json"


def completion(**message) -> tuple[int, str, str]:
    choice = {"message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return 200, JSON, json.dumps({"choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})


def asked(answer, model="mine", timeout=300, messages=HELLO, tools=None):
    with listening(lambda path, body, headers: answer) as url:
        return Endpoint(url, model, timeout=timeout).ask(messages, tools, 8)


def test_calls_and_results_of_tools_are_sent_as_the_api_has_them():
    bodies = []

    def answer(path, body, headers):
        bodies.append(body)
        return completion(content=None, tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}])

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call, call], "weight": 0},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with listening(answer) as url:
        reply = Endpoint(url, "mine").ask(messages, tools, 8)
    assert reply.calls == [{"name": "f", "arguments": {"a": 1}}]
    assert (reply.text, reply.stopped, reply.prompt_tokens, reply.tokens) == ("", True, 3, 2)
    (body,) = bodies
    calls = body["messages"][1]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"a": 1}'] * 2
    assert [message["tool_call_id"] for message in body["messages"][2:]] == [call["id"] for call in calls]
    assert len({call["id"] for call in calls}) == 2
    assert [call["id"] for call in calls] == ["000000001", "000000002"], "as Mistral's template numbers them"
    assert "weight" not in body["messages"][1]
    assert body["tools"] == tools
    assert call["function"]["arguments"] == {"a": 1}, "the caller's rows are left as they are"


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(timeout):
    with pytest.raises(UserError, match="--timeout: is in seconds, above 0"):
        Endpoint("http://localhost:1/v1", "mine", timeout=timeout)


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://a/v1", "http:///v1", "http://a:port/v1", "http://a b/v1", ""]
)
def test_what_is_no_address_is_told(url):
    with pytest.raises(UserError, match="is no address such as http://localhost:8000/v1"):
        Endpoint(url, "mine")


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="put no password into the address") as error:
        Endpoint("http://me:s3cret@localhost:8000/v1", "mine")
    assert "s3cret" not in str(error.value)


def test_a_key_that_is_not_set_is_told():
    with pytest.raises(UserError, match="--api-key-env NOT_THERE: no such variable"):
        Endpoint("http://localhost:8000/v1", "mine", "NOT_THERE")


def test_a_server_that_does_not_run_is_told():
    with listening(None) as url:
        pass
    with pytest.raises(UserError, match="cannot be reached; is the server running"):
        Endpoint(url)


def test_a_server_that_hangs_is_told():
    hanging = listening(lambda *request: time.sleep(0.5) or completion(content="late"))
    with hanging as url, pytest.raises(UserError, match=r"no word from it for 0.1 s; raise --timeout"):
        Endpoint(url, "mine", timeout=0.1).ask(HELLO, None, 8)


WRONG = {
    "a page": ((200, "text/html", "<html>Welcome</html>"), "is no OpenAI-compatible endpoint: <html>Welcome"),
    "a list": ((200, JSON, "[]"), "no JSON object"),
    "no choices": ((200, JSON, '{"ok": true}'), 'is no chat completion: {"ok": true}'),
    "empty choices": ((200, JSON, '{"choices": []}'), "is no chat completion"),
    "no message": ((200, JSON, '{"choices": [{"text": "old API"}]}'), "is no chat completion"),
    "a call of no JSON": (completion(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "no chat completion"),
    "a stream": ((200, "text/event-stream", 'data: {"choices": []}\n\n'), "streams its answers"),
    "no key": ((401, JSON, '{"error": {"message": "invalid key"}}'), "answered 401: invalid key; it wants a key"),
    "forbidden": ((403, JSON, '{"detail": "no"}'), "answered 403: no; it wants a key"),
    "no such path": ((404, JSON, '{"detail": "Not Found"}'), "answered 404: Not Found; most addresses end in /v1"),
    "too long": ((400, JSON, '{"message": "context length"}'), "answered 400: context length"),
    "loading": ((503, JSON, '{"error": {"message": "Loading model"}}'), "503: Loading model; it may still"),
    "broken": ((500, "text/plain", "Internal\nServer Error"), "answered 500: Internal Server Error"),
    "silent": ((502, "text/plain", ""), r"answered 502: \(nothing\)"),
    "moved": ((302, "text/plain", ""), "answered 302"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_server_that_fails_or_is_none_is_told_in_one_line(what):
    answer, message = WRONG[what]
    with pytest.raises(UserError, match=message) as error:
        asked(answer)
    assert "\n" not in str(error.value)


def test_a_long_error_is_cut():
    with pytest.raises(UserError, match=r"xxx\.\.\.") as error:
        asked((500, "text/plain", "x" * 10_000))
    assert len(str(error.value)) < 300


def test_the_only_model_is_asked_and_of_several_one_must_be_named():
    def listed(*names):
        content = json.dumps({"data": [{"id": name} for name in names]})
        with listening(lambda path, body, headers: (200, JSON, content)) as url:
            return Endpoint(url).model

    assert listed("one") == "one"
    assert listed() is None
    with pytest.raises(UserError, match="serves several models; name one with --model: base, mine"):
        listed("base", "mine")


def test_the_address_of_the_chat_itself_is_taken_too():
    assert Endpoint("http://localhost:8000/v1/chat/completions/", "mine").url == "http://localhost:8000/v1"


def test_a_stream_that_breaks_off_is_told():
    events = 'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"error": {"message": "out of memory"}}\n\n'
    with listening(lambda *request: (200, "text/event-stream", events)) as url:
        pieces = Endpoint(url, "mine").stream(HELLO, 8, 0.0)
        assert next(pieces) == "a"
        with pytest.raises(UserError, match="broke off: out of memory"):
            next(pieces)
