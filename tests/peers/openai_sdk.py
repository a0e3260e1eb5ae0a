"""The official `openai` package against `homeroom serve`. Needs: pip install openai.

Run: python openai_sdk.py --homeroom target/release/homeroom --model MODEL [--schema openapi.yaml]

Replies are held to the package's types, strictly and with no field beyond them; with `--schema`, which needs jsonschema and pyyaml, also
to OpenAI's published one (github.com/openai/openai-openapi).
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

import openai
import pydantic
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

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


# Fields that other programs know and OpenAI does not.
OWN = {"native_finish_reason", "reasoning_content", "x-homeroom-handler", "x-ignored-params"}


def beyond(value, path="") -> list[str]:
    """The fields of a reply that its type does not have."""
    if isinstance(value, list):
        return [name for item in value for name in beyond(item, path + "[]")]
    if not isinstance(value, pydantic.BaseModel):
        return []
    own = [f"{path}.{name}" for name in value.model_extra or {} if name not in OWN]
    return own + [name for field in type(value).model_fields for name in beyond(getattr(value, field), f"{path}.{field}")]


class Published:
    """OpenAI's published schema, if there is a file of it."""

    def __init__(self, path: str | None):
        self.document = None
        if path:
            import yaml

            self.document = yaml.load(Path(path).read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def problems(self, name: str, value) -> list[str]:
        if self.document is None:
            return []
        import jsonschema
        from referencing import Registry, Resource
        from referencing.jsonschema import DRAFT202012

        # It says `nullable`, which is no JSON Schema.
        registry = Registry().with_resource("api", Resource.from_contents(nullable(self.document), default_specification=DRAFT202012))
        schema = {"$ref": f"api#/components/schemas/{name}"}
        found = jsonschema.Draft202012Validator(schema, registry=registry).iter_errors(value)
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in found]


def nullable(schema):
    if isinstance(schema, list):
        return [nullable(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    fields = {key: nullable(value) for key, value in schema.items()}
    return {"anyOf": [fields, {"type": "null"}]} if fields.pop("nullable", False) is True else fields


PUBLISHED = Published(None)


def valid(what: str, kind: type, name: str, raw: dict) -> None:
    try:
        value = kind.model_validate(raw, strict=True)
        problems = beyond(value)
    except pydantic.ValidationError as error:
        problems = [str(error)]
    without_own = json.loads(json.dumps(raw), object_hook=lambda fields: {key: value for key, value in fields.items() if key not in OWN})
    check(f"{what} is by OpenAI's schema", not (problems := problems + PUBLISHED.problems(name, without_own)), (problems, raw))


def reply(create, **fields) -> dict:
    return json.loads(create.with_raw_response.create(**fields).text)


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


TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "weather of a city", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"], "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "time"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["colour", "count"], "additionalProperties": False,
}


def tools(client: openai.OpenAI, model: str) -> None:
    create = client.chat.completions.create
    common = {"model": model, "messages": ASK, "max_tokens": 60, "temperature": 0, "tools": TOOLS}
    forced = common | {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    whole = create(**forced)
    [call] = whole.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    check("a tool that must be called is called", call.function.name == "weather" and arguments["city"] in ("Ulm", "Bonn"), call)
    check("  and nothing is said", whole.choices[0].message.content is None and whole.choices[0].finish_reason == "tool_calls", whole)
    valid("a call", ChatCompletion, "CreateChatCompletionResponse", reply(client.chat.completions, **forced))
    chunks = list(create(**forced, stream=True))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or []]
    streamed = "".join(piece.function.arguments or "" for piece in pieces)
    check("a stream calls the same", streamed == call.function.arguments and pieces[0].function.name == "weather" and pieces[0].id, pieces)
    check("  each piece with its number", all(piece.index == 0 for piece in pieces), pieces)
    check("  and the reason", chunks[-1].choices[0].finish_reason == "tool_calls", chunks[-1])
    for chunk in chunks:
        valid("  a piece", ChatCompletionChunk, "CreateChatCompletionStreamResponse", chunk.model_dump(exclude_unset=True))
    with client.chat.completions.stream(**forced) as stream:
        events = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message.tool_calls[0].function
    check("the package's own reader of streams agrees", final.arguments == streamed and "tool_calls.function.arguments.done" in events, (final, events))
    required = create(**common | {"tool_choice": "required"}).choices[0].message.tool_calls
    check("any tool is called where one is required", required[0].function.name in ("weather", "time"), required)
    back = ASK + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = create(**common | {"messages": back, "tool_choice": "none"})
    check("a result is read", bool(answer.choices[0].message.content) and not answer.choices[0].message.tool_calls, answer)
    free = create(**common | {"tool_choice": "auto", "parallel_tool_calls": False})
    check("who may call need not", free.choices[0].finish_reason in ("stop", "length", "tool_calls"), free)


def forms(client: openai.OpenAI, model: str) -> None:
    create = client.chat.completions.create
    common = {"model": model, "messages": ASK, "max_tokens": 60, "temperature": 1, "seed": 3}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    for stream in (False, True):
        got = create(**common, response_format=form, stream=stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in got) if stream else got.choices[0].message.content
        value = json.loads(text)
        check(f"an answer is by its schema (stream={stream})", value["colour"] in ("red", "green") and 1 <= value["count"] <= 9 and len(value) == 2, text)

    class Answer(pydantic.BaseModel):
        colour: Literal["red", "green"]
        is_warm: bool

    parsed = client.chat.completions.parse(**common | {"temperature": 0, "max_tokens": 200}, response_format=Answer, logit_bias={})
    message = parsed.choices[0].message
    check("the package parses it into its own type", isinstance(message.parsed, Answer), parsed)
    loose = create(**common | {"max_tokens": 5}, response_format={"type": "json_object"})
    check("json_object begins an object", loose.choices[0].message.content.lstrip().startswith("{"), loose)
    bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer", "minimum": 5, "maximum": 3}}}
    error = raises("a schema that nothing is by", openai.BadRequestError, lambda: create(**common, response_format=bad))
    check("  is blamed by name", error is not None and error.param == "response_format", error and error.body)


def numbers(client: openai.OpenAI, model: str) -> None:
    create = client.chat.completions.create
    common = {"model": model, "messages": ASK, "max_tokens": 8, "temperature": 0}
    whole = create(**common, logprobs=True, top_logprobs=3)
    tokens = whole.choices[0].logprobs.content
    check("each token has its log-probability", tokens and all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens), tokens)
    spelled = bytes(byte for token in tokens for byte in token.bytes or []).decode()
    check("  and together they are the text", spelled.startswith(whole.choices[0].message.content), (spelled, whole))
    valid("an answer with log-probabilities", ChatCompletion, "CreateChatCompletionResponse", reply(client.chat.completions, **common, logprobs=True, top_logprobs=3))
    chunks = list(create(**common, logprobs=True, stream=True))
    streamed = [token.logprob for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    check("a stream has the same", streamed == [token.logprob for token in tokens], streamed)
    several = create(**common | {"temperature": 1.2}, n=3, seed=1)
    check("n gives so many choices", [choice.index for choice in several.choices] == [0, 1, 2] and len({choice.message.content for choice in several.choices}) > 1, several)
    valid("several choices", ChatCompletion, "CreateChatCompletionResponse", reply(client.chat.completions, **common, n=2))
    ended = {chunk.choices[0].index for chunk in create(**common, n=3, stream=True) if chunk.choices[0].finish_reason}
    check("a stream ends each of them", ended == {0, 1, 2}, ended)
    id_of = tokens[0].bytes and create(**common | {"max_tokens": 3}, logit_bias={"40": 100}, logprobs=True)
    check("a bias decides", len({token.token for token in id_of.choices[0].logprobs.content}) == 1, id_of)
    check("weights have a fingerprint", whole.system_fingerprint and whole.system_fingerprint == chunks[0].system_fingerprint, whole.system_fingerprint)


def completions(client: openai.OpenAI, model: str) -> None:
    create = client.completions.create
    common = {"model": model, "prompt": "The colours are", "max_tokens": 8, "temperature": 0}
    whole = create(**common)
    text = whole.choices[0].text
    check("a text is gone on with", bool(text) and whole.choices[0].finish_reason in ("stop", "length") and whole.usage.total_tokens > 0, whole)
    valid("a completion", Completion, "CreateCompletionResponse", reply(client.completions, **common, logprobs=2))
    streamed = "".join(chunk.choices[0].text for chunk in create(**common, stream=True) if chunk.choices)
    check("a stream says the same", streamed == text, streamed)
    check("echo puts the prompt before it", create(**common, echo=True).choices[0].text == common["prompt"] + text)
    both = create(**common | {"prompt": ["The colours are", "A word"]})
    check("several prompts are answered in order", both.choices[0].text == text and [choice.index for choice in both.choices] == [0, 1], both)
    likely = create(**common, logprobs=2).choices[0].logprobs
    check("tokens come with log-probabilities", len(likely.tokens) == len(likely.token_logprobs) > 0 and len(likely.top_logprobs[0]) == 2, likely)
    error = raises("a suffix", openai.BadRequestError, lambda: create(**common, suffix="."))
    check("  is blamed by name", error is not None and error.param == "suffix", error and error.body)


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
        ("n", 9), ("temperature", 3), ("tool_choice", "required"), ("top_logprobs", 3), ("modalities", ["audio"]),
        ("presence_penalty", 3), ("logit_bias", {"99999999": 1}), ("max_tokens", 0), ("store", True),
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


def wide(model: str, folder: str) -> str:
    """A copy of a model with a context that tools fit into, if its own is smaller."""
    copy = Path(folder) / Path(model).name
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], 2048)
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--schema", help="OpenAI's published schema, openapi.yaml")
    arguments = parser.parse_args()
    print("openai", openai.__version__)
    global PUBLISHED
    PUBLISHED = Published(arguments.schema)
    with serve(arguments.homeroom, "--model-dir", arguments.model) as (base_url, [model]):
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        chat(client, model)
        models(client, model)
        numbers(client, model)
        completions(client, model)
        errors(client, model)
    with tempfile.TemporaryDirectory() as folder, serve(arguments.homeroom, "--model-dir", wide(arguments.model, folder)) as (base_url, [model]):
        client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
        tools(client, model)
        forms(client, model)
    cut(arguments.homeroom)
    verdict()


if __name__ == "__main__":
    main()
