"""Whatever a chat server does, each request ends in its reply or in why there is none."""

import itertools
import json
import logging
import time
from email.utils import formatdate

import pytest
from chat_server import Answer, running_chat_server
from pydantic import ValidationError

from gpt.base.errors import InputError
from gpt.base.events import Message
from pipeline.project.settings import EndpointParams
from pipeline.verdict import chat_endpoint
from pipeline.verdict.chat_endpoint import NoReplyError, Reply, ask_all

KEY = "sk-0123456789abcdefSECRET"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(chat_endpoint, "BACK_OFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with running_chat_server() as running:
        yield running


def ask(server, requests=1, log=lambda event: None, **params):
    """The outcomes of as many requests, in the order of their names, and how many were sent."""
    outcomes = {}
    params = {"url": server if isinstance(server, str) else server.url, "timeout": 5, **params}
    bodies = {str(i): {"model": "judge-1", "n": i} for i in range(requests)}
    sent = ask_all(EndpointParams(**params), bodies, outcomes.__setitem__, log)
    assert sorted(outcomes) == sorted(bodies)
    return [outcomes[name] for name in bodies], sent


def in_turn(*answers):
    """The server's answers one after the other, the last for ever."""
    return lambda body, number: answers[min(number, len(answers) - 1)]


def gaps(server):
    return [b.time - a.time for a, b in itertools.pairwise(server.asked)]


# --- replies --------------------------------------------------------------------------------------


def test_every_reply_is_handed_over_under_the_name_of_its_request(server):
    server.respond = lambda body, number: f"reply {body['n']}"
    outcomes, sent = ask(server, 20)
    assert outcomes == [Reply(f"reply {i}", cut=False) for i in range(20)]
    assert sent == len(server.asked) == 20


@pytest.mark.parametrize("end", ["", "/"])
def test_the_body_goes_as_json_to_the_chat_completions_below_the_base_address(server, end):
    ask(server.url + end)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.body == {"model": "judge-1", "n": 0}
    assert asked.headers["Content-Type"] == "application/json"


def test_a_reply_that_ran_out_of_tokens_is_marked(server):
    server.respond = in_turn(Answer("10", finish_reason="length"))
    assert ask(server)[0] == [Reply("10", cut=True)]


def test_a_reply_without_words_is_empty(server):
    server.respond = in_turn(Answer(None, finish_reason="length"))
    assert ask(server)[0] == [Reply("", cut=True)]


def test_no_request_needs_no_server_and_no_key():
    params = EndpointParams(url="http://127.0.0.1:9/v1", key_env="NO_SUCH_KEY")
    assert ask_all(params, {}, lambda name, reply: None) == 0


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_as_many_requests_are_under_way_at_once_as_was_said_and_no_more(server, concurrency):
    def respond(body, number):
        # the first ones wait for each other
        together = server.wait_until(lambda: len(server.asked) >= concurrency, 10)
        time.sleep(0.05)  # time for one too many to come
        return "1" if together else "0"

    server.respond = respond
    outcomes, _ = ask(server, 3 * concurrency, concurrency=concurrency)
    assert outcomes == [Reply("1", cut=False)] * (3 * concurrency)
    assert server.most_at_once == concurrency


# --- faults that pass -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [Answer(status=500), Answer(status=503), Answer(status=429), Answer(reset=True)],
    ids=["500", "503", "429", "reset"],
)
def test_a_fault_that_passes_costs_a_repetition_and_no_reply(server, fault):
    server.respond = in_turn(fault, fault, "7")
    told = []
    assert ask(server, log=told.append) == ([Reply("7", cut=False)], 3)
    assert len(server.asked) == 3
    assert [type(event) for event in told] == [Message, Message]
    assert "trying again" in told[0].text


@pytest.mark.parametrize("how", ["seconds", "date"])
def test_a_server_that_asks_to_be_left_alone_is_left_alone_for_so_long(server, how):
    def respond(body, number):
        # a date has whole seconds: two ahead are more than one away
        said = "1" if how == "seconds" else formatdate(time.time() + 2, usegmt=True)
        return Answer(status=429, headers={"Retry-After": said}) if number == 0 else "7"

    server.respond = respond
    assert ask(server)[0] == [Reply("7", cut=False)]
    assert gaps(server)[0] >= 0.95


@pytest.mark.parametrize("said", ["3600", "no date", "-5", "Wed, 99 Nov 2026 10:00:00 GMT"])
def test_no_server_can_make_the_wait_endless_or_stop_it_with_nonsense(server, said, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "RETRY_AFTER_SECONDS", 0.1)
    server.respond = in_turn(Answer(status=429, headers={"Retry-After": said}), "7")
    started = time.monotonic()
    assert ask(server)[0] == [Reply("7", cut=False)]
    assert time.monotonic() - started < 3


def test_the_pauses_double(server, monkeypatch):
    monkeypatch.setattr(chat_endpoint, "BACK_OFF_SECONDS", 0.1)
    server.respond = in_turn(Answer(status=503))
    ask(server, retries=3)
    assert all(gap >= wanted for gap, wanted in zip(gaps(server), [0.1, 0.2, 0.4], strict=True))


def test_a_fault_that_does_not_pass_is_that_requests_alone(server):
    def respond(body, number):
        return Answer(status=500, body=b'{"error": "out of memory"}') if body["n"] == 1 else "7"

    server.respond = respond
    outcomes, sent = ask(server, 3, retries=2)
    assert [type(outcome) for outcome in outcomes] == [Reply, NoReplyError, Reply]
    assert str(outcomes[1]) == "HTTP 500: out of memory (3 times)"
    assert sent == len(server.asked) == 5


@pytest.mark.parametrize(
    "slow", [Answer(stall=True), Answer(trickle=0.05)], ids=["stalls", "trickles"]
)
def test_the_time_limit_is_for_the_whole_request_however_its_answer_comes(server, slow):
    server.respond = lambda body, number: slow if body["n"] == 0 else "7"
    started = time.monotonic()
    outcomes, sent = ask(server, 2, timeout=0.4, retries=1)
    assert time.monotonic() - started < 3
    assert str(outcomes[0]) == "no answer within 0.4 seconds (2 times)"
    assert outcomes[1] == Reply("7", cut=False)
    assert sent == 3


# --- answers that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(body=b"<html>sorry</html>"), "the server's answer is no JSON with a text"),
        (Answer(body=b"\xff\xfe{}"), "the server's answer is no JSON with a text"),
        (Answer(body=b"[" * 100_000), "the server's answer is no JSON with a text"),
        (Answer(body=b"{}"), "no JSON with a text at choices[0].message.content"),
        (Answer(body=b"[]"), "no JSON with a text at choices[0].message.content"),
        (Answer(body=b'{"choices": []}'), "no JSON with a text at choices[0].message.content"),
        (Answer(body=b'{"choices": ["85"]}'), "no JSON with a text at choices[0].message.content"),
        (
            Answer(body=b'{"choices": [{"message": null}]}'),
            "no JSON with a text at choices[0].message.content",
        ),
        (Answer(85), "no JSON with a text"),
        (Answer("8" * (1 << 20)), "longer than 1,048,576 bytes"),
        (Answer(status=400, body=b'{"error": {"message": "too\\nlong"}}'), "HTTP 400: too ↵ long"),
        (Answer(status=422, body=b"<html>"), "HTTP 422"),
    ],
)
def test_an_answer_that_is_none_is_told_and_not_asked_for_again(server, answer, why):
    server.respond = in_turn(answer)
    (outcome,), sent = ask(server)
    assert isinstance(outcome, NoReplyError)
    assert why in str(outcome)
    assert "\n" not in str(outcome)
    assert sent == len(server.asked) == 1


# --- what ends the run ----------------------------------------------------------------------------


def refused(server, requests=20, **params):
    with pytest.raises(InputError) as refusal:
        ask(server, requests, **params)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_the_line_says_where_the_key_comes_from(
    server, status, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.respond = in_turn(Answer(status=status, body=json.dumps({"error": KEY}).encode()))
    line = refused(server, key_env="JUDGE_KEY", concurrency=2)
    assert f"HTTP {status}" in line
    assert "environment variable JUDGE_KEY" in line
    assert KEY not in line
    assert len(server.asked) <= 2


def test_a_server_that_wants_a_key_where_none_is_given_names_the_parameter(server):
    server.respond = in_turn(Answer(status=401))
    assert "key_env" in refused(server)


def test_an_unknown_model_ends_the_run_by_its_name(server):
    body = json.dumps({"error": {"message": "model 'judge-1' not found, try pulling it"}}).encode()
    server.respond = in_turn(Answer(status=404, body=body))
    line = refused(server, concurrency=2)
    assert "not found, try pulling it" in line
    assert "correct model (judge-1) or url" in line
    assert len(server.asked) <= 2


def test_where_no_server_is_the_run_ends_at_once(server):
    url = server.url
    server.stop_listening()
    line = refused(url, retries=1)
    assert url in line
    assert "start the server there, or correct url" in line


def test_a_server_that_goes_away_in_the_middle_leaves_the_replies_that_came(server):
    def respond(body, number):
        if number == 0:
            server.stop_listening()
        return Answer("7", headers={"Connection": "close"})

    server.respond = respond
    outcomes, _ = ask(server, 3, concurrency=1, retries=1)
    assert outcomes[0] == Reply("7", cut=False)
    assert all("no connection" in str(outcome) for outcome in outcomes[1:])


def test_nothing_but_the_address_given_is_contacted(server):
    with running_chat_server() as other:
        server.respond = in_turn(Answer(status=307, headers={"Location": other.url}))
        assert f"leads to {other.url}" in refused(server)
        assert other.asked == []


def test_the_environments_proxy_is_used(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/v1"))
    assert ask("http://judge.invalid/v1")[0] == [Reply("50", cut=False)]
    assert server.asked[0].path == "http://judge.invalid/v1/chat/completions"


# --- the key --------------------------------------------------------------------------------------


def test_the_key_is_sent_as_a_bearer_token(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    ask(server, key_env="JUDGE_KEY")
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"


def test_no_key_is_sent_where_none_is_named(server, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    ask(server)
    assert "Authorization" not in server.asked[0].headers


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_missing_key_is_told_before_any_request(server, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    assert "environment variable JUDGE_KEY is empty" in refused(server, key_env="JUDGE_KEY")
    assert server.asked == []


@pytest.mark.parametrize("value", ["my key", "clé", "a\nb"])
def test_what_can_be_no_key_is_told_without_showing_it(server, monkeypatch, value):
    monkeypatch.setenv("JUDGE_KEY", value)
    line = refused(server, key_env="JUDGE_KEY")
    assert value not in line
    assert server.asked == []


def test_a_server_that_repeats_the_key_puts_it_into_no_reply_error_or_log(
    server, monkeypatch, caplog
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    error = json.dumps({"error": {"message": f"bad: Bearer {KEY}"}}).encode()
    told = []
    for answer in (Answer(f"I know {KEY}"), Answer(status=500, body=error), Answer(status=400)):
        server.respond = in_turn(answer)
        outcomes, _ = ask(server, key_env="JUDGE_KEY", retries=1, log=told.append)
        told += outcomes
    server.respond = in_turn(Answer(status=404, body=error))
    told.append(refused(server, key_env="JUDGE_KEY"))
    headers = {"Location": f"http://x.invalid/?key={KEY}"}
    server.respond = in_turn(Answer(status=302, headers=headers))
    told.append(refused(server, key_env="JUDGE_KEY"))
    assert told[0] == Reply("I know [key]", cut=False)
    assert KEY not in "".join(map(str, told))
    assert "[key]" in told[-1]
    logged = [record.getMessage() for record in caplog.records]
    assert any("send_request_headers" in line for line in logged)
    # a server's own header, should httpcore be asked for that much detail
    assert KEY not in "".join(line for line in logged if "receive_response_headers" not in line)


# --- parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:11434/v1",
        "ftp://host/v1",
        "http://",
        "http://[::1/v1",
        "http://host:99999/v1",
        f"http://user:{KEY}@host/v1",
        f"http://host/v1?key={KEY}",
        f"http://host/v1#{KEY}",
    ],
)
def test_an_address_that_cannot_be_one_or_holds_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ValidationError) as refusal:
        EndpointParams(url=url)
    (error,) = refusal.value.errors()
    assert "url must" in error["msg"]
    assert KEY not in error["msg"]


@pytest.mark.parametrize("name", [KEY, "gsk_abc", "", "MY KEY"])
def test_a_key_in_the_place_of_its_variables_name_is_refused_without_showing_it(name):
    with pytest.raises(ValidationError) as refusal:
        EndpointParams(url="http://host/v1", key_env=name)
    (error,) = refusal.value.errors()
    assert "key_env must be the name of an environment variable" in error["msg"]
    assert not name or name not in error["msg"]


@pytest.mark.parametrize(
    "bad", [{"concurrency": 0}, {"timeout": 0}, {"retries": -1}, {"concurency": 2}]
)
def test_an_impossible_or_unknown_parameter_is_refused(bad):
    with pytest.raises(ValidationError):
        EndpointParams(url="http://host/v1", **bad)
