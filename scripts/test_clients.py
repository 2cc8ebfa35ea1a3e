#!/usr/bin/env python3
"""Real clients against `st-tool serve tiny`: outside CI.

    python3 -m venv /tmp/clients
    /tmp/clients/bin/pip install openai==3.57.0 anthropic==2.14.0 langchain-openai==1.7.4 litellm==1.110.2
    /tmp/clients/bin/python scripts/test_clients.py target/release/st-tool

The bundled model speaks simple English, so what matters is enforced by schemas and tools. Exit status 0: all holds.
"""

import asyncio
import json
import re
import subprocess
import sys
import traceback
from typing import Literal

FAILED = []


def test(function):
    try:
        function()
        print(f"ok    {function.__name__}")
    except Exception:  # noqa: BLE001 - whatever a client says is a failure of the server
        FAILED.append(function.__name__)
        print(f"FAILS {function.__name__}\n{traceback.format_exc()}")


server = subprocess.Popen([sys.argv[1], "serve", "tiny", "--port", "0", "--threads", "1", "--api-key", "sesame"],
                          stdout=subprocess.PIPE, text=True)
ADDRESS = server.stdout.readline().strip()
BASE = f"{ADDRESS}/v1"
ASK = [{"role": "user", "content": "Tell me about a cat."}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}}


def fits(arguments):
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(value) == {"city", "unit"} and value["unit"] in ("celsius", "fahrenheit"), value


# --- openai ---

import openai  # noqa: E402
from pydantic import BaseModel, Field  # noqa: E402

client = openai.OpenAI(base_url=BASE, api_key="sesame", max_retries=0)
MODEL = client.models.list().data[0].id


class Animal(BaseModel):
    name: str = Field(max_length=12)
    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)
    friends: list[str] = Field(max_length=2)


@test
def openai_chat():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20, seed=1, temperature=0)
    again = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=20, seed=1, temperature=0)
    assert answer.choices[0].message.content == again.choices[0].message.content != ""
    assert answer.usage.completion_tokens == 20 and answer.choices[0].finish_reason == "length"
    assert again.usage.prompt_tokens_details.cached_tokens > 0


@test
def openai_streaming_with_usage():
    whole = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=30, seed=2).choices[0].message.content
    stream = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=30, seed=2, stream=True,
                                            stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens == 30


@test
def openai_parse():
    for seed in range(4):
        answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Animal, seed=seed)
        animal = answer.choices[0].message.parsed
        assert animal.kind in ("cat", "dog") and 0 <= animal.age <= 30, animal


@test
def openai_json_object():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, response_format={"type": "json_object"},
                                            temperature=0, max_tokens=300)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@test
def openai_tools():
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice=choice, seed=3,
                                                parallel_tool_calls=False)
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls", answer
        fits(message.tool_calls[0].function.arguments)
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "It is warm."}
        onward = client.chat.completions.create(
            model=MODEL, messages=[*ASK, message.model_dump(exclude_none=True), result], tools=[TOOL], max_tokens=10)
        assert onward.usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens, onward.usage


@test
def openai_tools_streaming():
    stream = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", seed=4,
                                            stream=True)
    calls, reason = {}, None
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or []:
            calls.setdefault(call.index, {"name": call.function.name, "arguments": ""})
            calls[call.index]["arguments"] += call.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "tool_calls" and calls, (reason, calls)
    for call in calls.values():
        assert call["name"] == "weather"
        fits(call["arguments"])


@test
def openai_stream_helper():
    with client.chat.completions.stream(model=MODEL, messages=ASK, response_format=Animal, seed=5) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed.kind in ("cat", "dog")


@test
def openai_unsupported_schema():
    schema = {"type": "array", "uniqueItems": True}
    try:
        client.chat.completions.create(model=MODEL, messages=ASK, response_format={
            "type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    except openai.BadRequestError as error:
        assert "uniqueItems" in str(error), error
    else:
        raise AssertionError("it was taken")


@test
def openai_logprobs():
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)


@test
def openai_async_eight():
    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=BASE, api_key="sesame", max_retries=0) as many:
            ask = lambda seed: many.chat.completions.create(model=MODEL, messages=ASK, max_tokens=25, seed=seed)  # noqa: E731
            return await asyncio.gather(*(ask(seed) for seed in range(8)))

    together = [answer.choices[0].message.content for answer in asyncio.run(all_at_once())]
    alone = [client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=25, seed=seed) for seed in range(8)]
    assert together == [answer.choices[0].message.content for answer in alone]


@test
def openai_completions():
    answer = client.completions.create(model=MODEL, prompt=["Once upon", "A dog"], max_tokens=8, temperature=0)
    assert len(answer.choices) == 2 and all(choice.text for choice in answer.choices)


@test
def openai_responses():
    answer = client.responses.create(model=MODEL, input="Tell me about a cat.", instructions="Be kind.", max_output_tokens=20)
    assert answer.output_text and answer.status == "incomplete" and answer.usage.output_tokens == 20
    parsed = client.responses.parse(model=MODEL, input="A pet.", text_format=Animal, extra_body={"seed": 1})
    assert parsed.output_parsed.kind in ("cat", "dog")


@test
def openai_responses_streaming_and_tools():
    tool = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
    with client.responses.stream(model=MODEL, input=ASK, tools=[tool], tool_choice="required",
                                 parallel_tool_calls=False) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    call = final.output[0]
    assert "response.function_call_arguments.delta" in kinds and kinds[-1] == "response.completed", kinds
    fits(call.arguments)
    onward = client.responses.create(model=MODEL, max_output_tokens=10, tools=[tool], input=[
        *ASK, call.model_dump(exclude={"parsed_arguments"}), {"type": "function_call_output", "call_id": call.call_id, "output": "Warm."}])
    assert onward.usage.input_tokens_details.cached_tokens > final.usage.input_tokens
    text = client.responses.create(model=MODEL, input="Hello.", stream=True, max_output_tokens=12)
    pieces = [event.delta for event in text if event.type == "response.output_text.delta"]
    assert "".join(pieces)


@test
def openai_errors():
    for call, kind in [
        (lambda: openai.OpenAI(base_url=BASE, api_key="wrong").models.list(), openai.AuthenticationError),
        (lambda: client.chat.completions.create(model="other", messages=ASK), openai.NotFoundError),
        (lambda: client.chat.completions.create(model=MODEL, messages=[]), openai.BadRequestError),
    ]:
        try:
            call()
        except kind:
            continue
        raise AssertionError(kind)


# --- anthropic ---

import anthropic  # noqa: E402

claude = anthropic.Anthropic(base_url=ADDRESS, api_key="sesame", max_retries=0)
COLD = {"temperature": 0}
CLAUDE_TOOL = {"name": "weather", "description": "The weather.", "input_schema": WEATHER}


@test
def anthropic_messages():
    answer = claude.messages.create(model=MODEL, max_tokens=20, system="Be kind.", messages=ASK, extra_body=COLD)
    assert answer.content[0].text and answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 20
    counted = claude.messages.count_tokens(model=MODEL, system="Be kind.", messages=ASK)
    assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


@test
def anthropic_streaming():
    with claude.messages.stream(model=MODEL, max_tokens=25, messages=ASK, extra_body=COLD) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text and final.usage.output_tokens == 25


@test
def anthropic_tools():
    answer = claude.messages.create(model=MODEL, max_tokens=400, messages=ASK, tools=[CLAUDE_TOOL],
                                    tool_choice={"type": "tool", "name": "weather"})
    call = answer.content[0]
    assert answer.stop_reason == "tool_use" and call.type == "tool_use", answer
    fits(call.input)
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "Warm."}]}
    onward = claude.messages.create(model=MODEL, max_tokens=10, tools=[CLAUDE_TOOL], messages=[
        *ASK, {"role": "assistant", "content": [block.model_dump() for block in answer.content]}, result])
    assert onward.usage.cache_read_input_tokens > 0
    with claude.messages.stream(model=MODEL, max_tokens=400, messages=ASK, tools=[CLAUDE_TOOL],
                                tool_choice={"type": "any"}) as stream:
        final = stream.get_final_message()
    for block in final.content:
        fits(block.input)


# --- langchain ---

from langchain_openai import ChatOpenAI  # noqa: E402

chain = ChatOpenAI(base_url=BASE, api_key="sesame", model=MODEL, max_retries=0, seed=1)


@test
def langchain_chat_and_stream():
    assert chain.bind(max_tokens=10).invoke("Hello.").content
    assert "".join(chunk.content for chunk in chain.bind(max_tokens=10).stream("Hello."))


@test
def langchain_structured():
    assert chain.with_structured_output(Animal).invoke("A pet.").kind in ("cat", "dog")
    assert chain.with_structured_output(Animal, method="function_calling").invoke("A pet.").kind in ("cat", "dog")


@test
def langchain_tools():
    bound = chain.bind_tools([TOOL], tool_choice="required")
    call = bound.invoke("Weather?").tool_calls[0]
    assert call["name"] == "weather"
    fits(call["args"])


# --- litellm ---

import litellm  # noqa: E402

litellm.telemetry = False


@test
def litellm_chat():
    common = {"api_base": BASE, "api_key": "sesame", "model": f"openai/{MODEL}", "messages": ASK}
    assert litellm.completion(max_tokens=10, **common).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion(max_tokens=10, stream=True, **common)]
    assert "".join(pieces)
    call = litellm.completion(tools=[TOOL], tool_choice="required", **common).choices[0].message.tool_calls[0]
    fits(call.function.arguments)


@test
def litellm_anthropic():
    answer = litellm.completion(api_base=ADDRESS, api_key="sesame", model=f"anthropic/{MODEL}", messages=ASK, max_tokens=10)
    assert answer.choices[0].message.content


server.terminate()
assert server.wait(30) == 0, server.returncode
assert re.match(r"http://127\.0\.0\.1:\d+$", ADDRESS)
print(f"{len(FAILED)} failed" if FAILED else "all hold")
sys.exit(1 if FAILED else 0)
