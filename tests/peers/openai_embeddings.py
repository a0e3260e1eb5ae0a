"""The official `openai` package, and LangChain's if it is there, ask `homeroom serve` for embeddings.

Needs: pip install openai; with --vectors FILE also what `--expect` wrote. Optional: pip install langchain-openai.

Run: python openai_embeddings.py --expect FILE --model DIR          (in a Python with sentence-transformers)
     python openai_embeddings.py --homeroom target/release/homeroom --model DIR [--vectors FILE]
"""

import argparse
import json
import math
import struct
from pathlib import Path

from serving import check, serve, verdict

TEXTS = [
    "What is a cell?",
    "The cell is the smallest unit of life.",
    "Paris is the capital of France.",
    "",
    "a long text of many words " * 100,
    "Zellen, 細胞 und 🦊",
]


def expect(model: str, file: str) -> None:
    from sentence_transformers import SentenceTransformer

    vectors = SentenceTransformer(model, device="cpu").encode(TEXTS)
    Path(file).write_text(json.dumps(vectors.tolist()))


def sdk(client, model: str, expected: list[list[float]] | None) -> None:
    import openai

    create = client.embeddings.create
    packed = create(model=model, input=TEXTS)  # base64, which the package asks for and reads by itself
    plain = create(model=model, input=TEXTS, encoding_format="float")
    vectors = [row.embedding for row in packed.data]
    check("one vector a text, in order", [row.index for row in packed.data] == list(range(len(TEXTS))), packed)
    single = lambda vector: struct.pack(f"{len(vector)}f", *vector)
    same = [single(a) == single(b.embedding) for a, b in zip(vectors, plain.data, strict=True)]
    check("numbers and base64 are the same to the last bit of f32", all(same), same)
    check("the cost is told", packed.usage.prompt_tokens == packed.usage.total_tokens > len(TEXTS), packed.usage)
    one = create(model=model, input=TEXTS[0]).data[0].embedding
    check("a text alone has the same vector", max(abs(a - b) for a, b in zip(one, vectors[0])) < 1e-6)
    alike = lambda a, b: sum(x * y for x, y in zip(vectors[a], vectors[b]))
    check("a question is near its answer", alike(0, 1) > alike(0, 2) + 0.1, (alike(0, 1), alike(0, 2)))
    raw = client.embeddings.with_raw_response.create(model=model, input=TEXTS, user="me")
    check("a long text is told", raw.headers["x-homeroom-truncated"] == "1", raw.headers)
    if expected:
        far = max(abs(a - b) for x, y in zip(vectors, expected, strict=True) for a, b in zip(x, y, strict=True))
        check(f"vectors are sentence-transformers', furthest {far:.1e}", far < 1e-4)
    for what, kind, fields in [
        ("another width", openai.BadRequestError, {"dimensions": 7}),
        ("no text", openai.BadRequestError, {"input": []}),
        ("tokens of OpenAI's tokenizer", openai.BadRequestError, {"input": [[3923, 374, 264, 2849, 30]]}),
        ("an unknown model", openai.NotFoundError, {"model": "nobody"}),
        ("a long text that may not be cut", openai.BadRequestError, {"extra_body": {"truncate": False}}),
    ]:
        try:
            check(f"{what} is refused", False, create(**{"model": model, "input": TEXTS} | fields))
        except openai.APIStatusError as error:
            check(f"{what} is refused", type(error) is kind, error)
    try:
        check("it answers no conversation", False, client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hi"}]))
    except openai.BadRequestError as error:
        check("it answers no conversation", error.param == "model" and "embedding model" in error.message, error)


def langchain(url: str, model: str) -> None:
    try:
        from langchain_openai import OpenAIEmbeddings
    except ImportError:
        print("skipped LangChain: pip install langchain-openai")
        return
    made = OpenAIEmbeddings(model=model, base_url=url, api_key="none", check_embedding_ctx_length=False)
    vectors = made.embed_documents(TEXTS[:3])
    check("LangChain gets a vector a text", len(vectors) == 3 and all(math.isclose(sum(x * x for x in v), 1, abs_tol=1e-4) for v in vectors))
    check("and of a question", len(made.embed_query(TEXTS[0])) == len(vectors[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--expect")
    parser.add_argument("--homeroom")
    parser.add_argument("--vectors")
    arguments = parser.parse_args()
    if arguments.expect:
        return expect(arguments.model, arguments.expect)

    import openai

    expected = json.loads(Path(arguments.vectors).read_text()) if arguments.vectors else None
    with serve(arguments.homeroom, "--model-dir", arguments.model) as (url, [model]):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        check("it is listed", [listed.id for listed in client.models.list()] == [model])
        sdk(client, model, expected)
        langchain(url, model)
    verdict()


if __name__ == "__main__":
    main()
