"""The official `openai` package against `homeroom serve`. Needs: pip install openai.

Run: python openai_sdk.py --homeroom target/release/homeroom --model MODEL
"""

import argparse
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import openai

from serving import check, serve, verdict

ASK = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Name three colours."}]


def raises(what: str, kind: type, run) -> openai.OpenAIError | None:
    try:
        seen = run()
    except openai.OpenAIError as error:
        check(what, type(error) is kind, error)
        return error
    check(what, False, seen)
    return None


def chat(client: openai.OpenAI, model: str) -> None:
    create = client.chat.completions.create
    common = {"model": model, "messages": ASK, "max_tokens": 24, "temperature": 0}
    whole = create(**common)
    text = whole.choices[0].message.content
    check("an answer has text, a reason and a cost", bool(text) and whole.choices[0].finish_reason in ("stop", "length"), whole)
    check("the cost adds up", whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens, whole.usage)
    check("it says which model, when and which answer", whole.model == model and abs(whole.created - time.time()) < 300 and whole.id, whole)

    chunks = list(create(**common, stream=True, stream_options={"include_usage": True}))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    check("a stream says the same", streamed == text, (streamed, text))
    check("its pieces belong together", len({chunk.id for chunk in chunks}) == 1, chunks)
    check("it ends with a reason and the cost", chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage, chunks[-2:])
    plain = list(create(**common, stream=True))
    check("without being asked it sends no cost", all(chunk.choices and chunk.usage is None for chunk in plain))

    stop = text[5:8]
    cut = create(**common, stop=[stop])
    check("a stop text ends the answer", cut.choices[0].message.content == text.split(stop)[0] and cut.choices[0].finish_reason == "stop", cut)
    drawn = [create(**common | {"temperature": 1.2}, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    check("a seed repeats an answer", drawn[0] == drawn[1] != drawn[2], drawn)
    fields = {"max_tokens": openai.omit, "max_completion_tokens": 3}
    short = create(**common | fields)
    check("max_completion_tokens is the same as max_tokens", short.usage.completion_tokens <= 3, short.usage)
    parts = create(**common | {"messages": [ASK[0], {"role": "user", "content": [{"type": "text", "text": ASK[1]["content"]}]}]})
    check("content in parts is read", parts.choices[0].message.content == text, parts)
    raw = client.chat.completions.with_raw_response.create(**common, user="me", service_tier="auto")
    check("what was passed over is named", set(raw.headers["x-ignored-params"].split(",")) == {"user", "service_tier"}, raw.headers)

    with create(**common | {"max_tokens": 500}, stream=True) as stream:
        for _ in zip(range(3), stream):
            pass
    started = time.monotonic()
    create(**common | {"max_tokens": 1})
    check("a client that leaves frees the model", time.monotonic() - started < 20)


def models(client: openai.OpenAI, model: str) -> None:
    check("models are listed", [card.id for card in client.models.list()] == [model])
    check("a model can be retrieved", client.models.retrieve(model).id == model)
    raises("an unknown one cannot", openai.NotFoundError, lambda: client.models.retrieve("org/other:7b"))


def errors(client: openai.OpenAI, model: str) -> None:
    create = client.chat.completions.create
    common = {"model": model, "messages": ASK, "max_tokens": 4}
    error = raises("an unknown model", openai.NotFoundError, lambda: create(**common | {"model": "other"}))
    check("  has its code", error.code == "model_not_found", error.body)
    for field, value in [
        ("n", 2), ("temperature", 3), ("tools", [{"type": "function", "function": {"name": "f"}}]), ("logprobs", True),
        ("response_format", {"type": "json_object"}), ("presence_penalty", 3), ("logit_bias", {"1": 1}), ("max_tokens", 0),
    ]:
        error = raises(f"{field}={value}", openai.BadRequestError, lambda: create(**common | {field: value}))
        check("  is blamed by name", error is not None and error.param == field, error and error.body)
    error = raises("an unknown field", openai.BadRequestError, lambda: create(**common, extra_body={"top_kk": 5}))
    check("  is blamed by name", error is not None and error.param == "top_kk" and "did you mean `top_k`" in str(error), error)
    extra = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}
    drawn = [create(**common | {"temperature": 2, "max_tokens": 12}, extra_body=extra, seed=seed) for seed in (1, 2)]
    check("top_k 1 leaves one token", len({answer.choices[0].message.content for answer in drawn}) == 1, drawn)
    long = [{"role": "user", "content": "many words " * 20_000}]
    error = raises("a conversation that is too long", openai.BadRequestError, lambda: create(**common | {"messages": long}))
    check("  has its code", error.code == "context_length_exceeded", error.body)
    huge = [{"role": "user", "content": "x" * (5 << 20)}]
    raises("a body that is too large", openai.APIStatusError, lambda: create(**common | {"messages": huge}))


class Cut(BaseHTTPRequestHandler):
    """A provider that breaks off after half an answer."""

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'data: {"id":"i","model":"m","choices":[{"delta":{"content":"half an"}}]}\n\n')

    def log_message(self, *_):
        pass


def cut(homeroom: str) -> None:
    provider = ThreadingHTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "handlers.toml"
        url = f"http://127.0.0.1:{provider.server_port}/v1"
        config.write_text(f'[handlers.far]\nkind = "openai"\nbase_url = "{url}"\nmodel = "m"\n[routes.cut]\nhandlers = ["far"]\n')
        with serve(homeroom, "--config", config) as (base_url, _):
            client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=2)
            seen = []
            stream = lambda: [seen.append(chunk) for chunk in client.chat.completions.create(model="cut", messages=ASK, stream=True)]
            raises("a stream that breaks off is an error", openai.APIError, stream)
            check("  after what was said", "".join(chunk.choices[0].delta.content for chunk in seen) == "half an", seen)
            whole = lambda: client.chat.completions.create(model="cut", messages=ASK)
            raises("so is an answer that does", openai.InternalServerError, whole)
    provider.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="model directory, adapter or .gguf file")
    arguments = parser.parse_args()
    print("openai", openai.__version__)
    with serve(arguments.homeroom, "--model-dir", arguments.model) as (base_url, [model]):
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        chat(client, model)
        models(client, model)
        errors(client, model)
    cut(arguments.homeroom)
    verdict()


if __name__ == "__main__":
    main()
