"""The official `ollama` package against `homeroom serve`, with a key and without. Needs: pip install ollama.

Run: python ollama_sdk.py --homeroom target/release/homeroom --model MODEL [--embedder MODEL]
"""

import argparse
import os
import subprocess
import tempfile

import ollama

from serving import check, serve, verdict

ASK = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "Name three colours."}]
OPTIONS = {"temperature": 0, "num_predict": 16, "num_ctx": 2048, "seed": 7}


def raises(what: str, run, status: int) -> None:
    try:
        seen = run()
    except ollama.ResponseError as error:
        # The package takes `error` for a text.
        check(what, error.status_code == status and isinstance(error.error, str) and error.error, error)
        return
    check(what, False, seen)


def chat(client: ollama.Client, model: str) -> None:
    whole = client.chat(model, ASK, options=OPTIONS)
    text = whole.message.content
    check("an answer has text, a reason and a cost", text and whole.done and whole.done_reason in ("stop", "length"), whole)
    check("the cost is in tokens and nanoseconds", whole.eval_count >= 1 and whole.prompt_eval_count > 1 and whole.total_duration > 0, whole)
    parts = list(client.chat(model, ASK, options=OPTIONS, stream=True))
    check("a stream says the same", "".join(part.message.content for part in parts) == text, parts)
    check("its last piece alone is the end", [part.done for part in parts] == [False] * (len(parts) - 1) + [True], parts)
    check("and has the cost", parts[-1].eval_count == whole.eval_count and parts[-1].eval_duration > 0, parts[-1])
    named = client.chat(f"{model}:latest", ASK, options=OPTIONS)
    check("`:latest` is the same model", named.message.content == text and named.model == f"{model}:latest", named)
    stop = text[4:7]
    cut = client.chat(model, ASK, options=OPTIONS | {"stop": [stop]})
    check("a stop text ends the answer", cut.message.content == text.split(stop)[0] and cut.done_reason == "stop", cut)
    drawn = [client.chat(model, ASK, options=OPTIONS | {"temperature": 1.2, "seed": seed}).message.content for seed in (7, 7, 8)]
    check("a seed repeats an answer", drawn[0] == drawn[1] != drawn[2], drawn)
    loaded = client.chat(model)
    check("to ask nothing loads the model", loaded.done and loaded.done_reason == "load", loaded)


def generate(client: ollama.Client, model: str) -> None:
    whole = client.generate(model, "Name three colours.", system="Be brief.", options=OPTIONS)
    check("a prompt is answered", whole.response and whole.eval_count >= 1, whole)
    parts = list(client.generate(model, "Name three colours.", system="Be brief.", options=OPTIONS, stream=True))
    check("as a stream, too", "".join(part.response for part in parts) == whole.response, parts)
    said = client.chat(model, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}], options=OPTIONS)
    check("a prompt is a conversation of one question", said.message.content == whole.response, said)


def models(client: ollama.Client, model: str) -> None:
    listed = client.list().models
    check("models are listed", [one.model for one in listed] == [model] and listed[0].size > 0 and listed[0].digest, listed)
    shown = client.show(model)
    check("a model is shown", "completion" in shown.capabilities and shown.details.family, shown)
    check("those in memory are listed", [one.model for one in client.ps().models] == [model])


def errors(client: ollama.Client, model: str) -> None:
    raises("an unknown model", lambda: client.chat("other", ASK), 404)
    raises("an unknown model, as a stream", lambda: list(client.chat("other", ASK, stream=True)), 404)
    raises("an option that is not known", lambda: client.generate(model, "hi", options={"tempreature": 1}), 400)
    raises("an option out of range", lambda: client.generate(model, "hi", options={"temperature": 9}), 400)
    raises("a text to be put in the middle", lambda: client.generate(model, "hi", suffix="there"), 400)
    raises("a conversation that is too long", lambda: client.generate(model, "many words " * 20_000), 400)
    raises("vectors of a model that makes none", lambda: client.embed(model, "hi"), 400)
    for what, run in [
        ("pull", lambda: client.pull("x")), ("push", lambda: client.push("x")), ("delete", lambda: client.delete("x")),
        ("copy", lambda: client.copy("x", "y")), ("create", lambda: client.create("x", from_="y")),
    ]:
        raises(f"{what}: whoever runs the server chooses its models", run, 404)


def vectors(homeroom: str, embedder: str) -> None:
    with serve(homeroom, "--model-dir", embedder) as (url, [model]):
        client = ollama.Client(host=url.removesuffix("/v1"))
        made = client.embed(model, ["one text", "another"])
        check("texts become vectors", len(made.embeddings) == 2 and len(made.embeddings[0]) > 8 and made.prompt_eval_count, made)
        check("one text, by the older call", client.embeddings(model, "one text").embedding == made.embeddings[0])
        raises("an embedding model answers nothing", lambda: client.chat(model, ASK), 400)


def keys(homeroom: str, model_dir: str) -> None:
    """The package has no key of its own: it sends the headers that it is given, or OLLAMA_API_KEY."""
    with tempfile.TemporaryDirectory() as home:
        before = os.environ.get("HOMEROOM_HOME")
        os.environ["HOMEROOM_HOME"] = home
        try:
            key = subprocess.run([homeroom, "keys", "add", "class"], check=True, capture_output=True, text=True).stdout.strip()
            with serve(homeroom, "--model-dir", model_dir) as (url, [model]):
                host = url.removesuffix("/v1")
                raises("without a key", lambda: ollama.Client(host=host).list(), 401)
                client = ollama.Client(host=host, headers={"Authorization": f"Bearer {key}"})
                check("with one", client.generate(model, "hi", options=OPTIONS).done)
                os.environ["OLLAMA_API_KEY"] = key
                check("by its own variable", ollama.Client(host=host).generate(model, "hi", options=OPTIONS).done)
                os.environ.pop("OLLAMA_API_KEY")
                subprocess.run([homeroom, "keys", "rm", "class"], check=True, capture_output=True)
                raises("with one that was removed", lambda: client.list(), 401)
        finally:
            os.environ.pop("HOMEROOM_HOME") if before is None else os.environ.update(HOMEROOM_HOME=before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="model directory, adapter or .gguf file")
    parser.add_argument("--embedder", help="a model that embeds texts")
    arguments = parser.parse_args()
    with serve(arguments.homeroom, "--model-dir", arguments.model) as (url, [model]):
        client = ollama.Client(host=url.removesuffix("/v1"))
        chat(client, model)
        generate(client, model)
        models(client, model)
        errors(client, model)
    if arguments.embedder:
        vectors(arguments.homeroom, arguments.embedder)
    keys(arguments.homeroom, arguments.model)
    verdict()


if __name__ == "__main__":
    main()
