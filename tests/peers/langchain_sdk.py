"""LangChain and LiteLLM against `homeroom serve`. Needs: pip install langchain-openai litellm.

Run: python langchain_sdk.py --homeroom target/release/homeroom --model MODEL
"""

import argparse
import os
import tempfile
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # It would be downloaded.
import litellm
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from openai_sdk import wide
from serving import check, serve, verdict


@tool
def weather(city: Literal["Ulm", "Bonn"]) -> str:
    """Weather of a city."""
    return f"sunny in {city}"


class Answer(BaseModel):
    """An answer."""

    colour: Literal["red", "green"]
    count: int = Field(ge=1, le=9)


def langchain(base_url: str, model: str) -> None:
    chat = ChatOpenAI(base_url=base_url, api_key="none", model=model, temperature=0, max_tokens=80, max_retries=0, seed=1)
    said = chat.invoke("Name a colour.")
    check("an answer has text and usage", isinstance(said.content, str) and said.usage_metadata["total_tokens"] > 0, said)
    streamed = "".join(piece.content for piece in chat.stream("Name a colour."))
    check("a stream says the same", streamed == said.content, streamed)
    bound = chat.bind_tools([weather], tool_choice="weather")
    called = bound.invoke("How is the weather?")
    check("a bound tool is called", called.tool_calls[0]["name"] == "weather" and called.tool_calls[0]["args"]["city"] in ("Ulm", "Bonn"), called)
    whole = None
    for piece in bound.stream("How is the weather?"):
        whole = piece if whole is None else whole + piece
    check("  in a stream, too", whole.tool_calls[0]["args"] == called.tool_calls[0]["args"], whole)
    call = called.tool_calls[0]
    back = [HumanMessage("How is the weather?"), called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    check("  and its result is read", isinstance(chat.bind_tools([weather]).invoke(back).content, str))
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Answer, method=method).invoke("Which colour, how many?")
        check(f"an answer of its type by {method}", isinstance(answer, Answer), answer)
    strict = chat.with_structured_output(Answer, method="json_schema", strict=True, include_raw=True).invoke("Which?")
    check("  and strictly", isinstance(strict["parsed"], Answer) and strict["parsing_error"] is None, strict)


def by_litellm(base_url: str, model: str) -> None:
    common = {"model": f"openai/{model}", "api_base": base_url, "api_key": "none", "messages": [{"role": "user", "content": "Name a colour."}]}
    common |= {"max_tokens": 60, "temperature": 0, "num_retries": 0}
    whole = litellm.completion(**common)
    check("litellm has an answer", bool(whole.choices[0].message.content) and whole.usage.total_tokens > 0, whole)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in litellm.completion(**common, stream=True))
    check("  and the same as a stream", streamed == whole.choices[0].message.content, streamed)
    function = {"name": "time", "description": "time", "parameters": {"type": "object", "properties": {}}}
    called = litellm.completion(**common, tools=[{"type": "function", "function": function}], tool_choice="required")
    check("  and calls a tool", called.choices[0].message.tool_calls[0].function.name == "time", called)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--homeroom", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="model directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serve(arguments.homeroom, "--model-dir", wide(arguments.model, folder)) as (base_url, [model]):
        langchain(base_url, model)
        by_litellm(base_url, model)
    verdict()


if __name__ == "__main__":
    main()
