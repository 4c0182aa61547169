"""Clients that nobody here wrote talk to the gateway as they talk to OpenAI."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from behaviours import OK, Behaviour
from provider import Loopback, Request, Server

from biollm.client import Client
from biollm.gateway import app

pytestmark = [pytest.mark.real, pytest.mark.timeout(600)]  # the first run installs 200 MB
HERE = "127.0.0.1"

OPENAI = """
import asyncio
from openai import AsyncOpenAI, APIError, NotFoundError, OpenAI
from pydantic import BaseModel

class Pair(BaseModel):
    a: int
    b: str

client, hi = OpenAI(), [{"role": "user", "content": "hi"}]
ask = client.chat.completions.create
whole = ask(model="biollm", messages=hi)
said["sync"] = whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens > 0
raw = client.chat.completions.with_raw_response.create(model="biollm", messages=hi)
said["headers"] = raw.headers["x-biollm-deployment"], raw.headers["x-biollm-attempts"]
chunks = list(ask(model="biollm", messages=hi, stream=True, stream_options={"include_usage": True}))
said["stream"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].choices
said["usage"] = chunks[-1].usage.total_tokens > 0
with client.chat.completions.stream(model="biollm", messages=hi) as stream:  # checks every event's order
    said["helper"] = stream.get_final_completion().choices[0].message.content
said["parsed"] = client.chat.completions.parse(
    model="biollm", messages=hi, response_format=Pair).choices[0].message.parsed.model_dump()
with client.chat.completions.stream(model="biollm", messages=hi, response_format=Pair) as stream:
    said["parsed stream"] = stream.get_final_completion().choices[0].message.parsed.model_dump()
tools = [{"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"path": {"type": "string"}}}}}]
call = ask(model="biollm", messages=hi, tools=tools).choices[0].message
said["tool"] = call.tool_calls[0].function.name, call.tool_calls[0].function.arguments
after = [*hi, call, {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "found"}]
said["after the tool"] = ask(model="biollm", messages=after, tools=tools).choices[0].message.content
with client.chat.completions.stream(model="biollm", messages=hi, tools=tools) as stream:
    said["tool stream"] = stream.get_final_completion().choices[0].message.tool_calls[0].function.name
said["models"] = [model.id for model in client.models.list()], client.models.retrieve("small").id
try:
    ask(model="nobody", messages=hi)
except NotFoundError as error:
    said["unknown"] = error.code
async def main():
    async with AsyncOpenAI() as client:
        whole = await client.chat.completions.create(model="biollm", messages=hi)
        stream = await client.chat.completions.create(model="biollm", messages=hi, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream]
        said["async"] = whole.choices[0].message.content, "".join(pieces)

asyncio.run(main())
try:
    for _ in ask(model="biollm", messages=[{"role": "user", "content": "break"}], stream=True):
        pass
except APIError as error:
    said["broken"] = error.code
"""
INSTRUCTOR = """
import instructor
from openai import OpenAI
from pydantic import BaseModel

class Pair(BaseModel):
    a: int
    b: str

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(), mode=mode)
    pair = client.chat.completions.create(
        model="biollm", response_model=Pair, messages=[{"role": "user", "content": "hi"}])
    said[mode.name] = pair.model_dump()
"""
PYDANTIC_AI = """
import os
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel

class Pair(BaseModel):
    a: int
    b: str

model = OpenAIChatModel("biollm")
said["text"] = Agent(model).run_sync("hi").output
said["tool output"] = Agent(model, output_type=Pair).run_sync("hi").output.model_dump()
said["native output"] = Agent(model, output_type=NativeOutput(Pair)).run_sync("hi").output.model_dump()
agent = Agent(model)

@agent.tool_plain
def look(path: str) -> str:
    said["looked"] = path
    return "found"

said["after the tool"] = agent.run_sync("hi").output

async def stream():
    async with Agent(model).run_stream("hi") as result:
        return [text async for text in result.stream_text()][-1]

import asyncio
said["stream"] = asyncio.run(stream())
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

class Pair(BaseModel):
    a: int
    b: str

model = ChatOpenAI(model="biollm", max_tokens=50)
answer = model.invoke("hi")
said["text"] = answer.content, answer.usage_metadata["total_tokens"] > 0, answer.response_metadata["finish_reason"]
said["stream"] = "".join(chunk.content for chunk in model.stream("hi"))
for method in ("json_schema", "function_calling"):
    said[method] = model.with_structured_output(Pair, method=method).invoke("hi").model_dump()

def look(path: str) -> str:
    "Look at a path."
    return path

said["tool"] = [call["name"] for call in model.bind_tools([look]).invoke("hi").tool_calls]
"""
LLM = """
import os, pathlib, subprocess, sys
home = pathlib.Path(os.environ["LLM_USER_PATH"])
home.mkdir(parents=True)
base = os.environ["OPENAI_BASE_URL"]
text = f"- model_id: mine\\n  model_name: biollm\\n  api_base: {base}\\n  supports_tools: true\\n  supports_schema: true\\n"
(home / "extra-openai-models.yaml").write_text(text)

def llm(*words):
    command = [pathlib.Path(sys.executable).parent / "llm", *words, "-m", "mine", "hi"]
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.strip()

said["stream"], said["whole"] = llm("prompt"), llm("prompt", "--no-stream")
said["schema"] = __import__("json").loads(llm("prompt", "--schema", "a int, b"))
"""
NODE = """
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
const said = {}, model = "biollm", messages = [{ role: "user", content: "hi" }];
const client = new OpenAI(), chat = client.chat.completions;
said.whole = (await chat.create({ model, messages })).choices[0].message.content;
said.stream = "";
for await (const chunk of await chat.create({ model, messages, stream: true }))
  said.stream += chunk.choices[0].delta.content ?? "";
const response_format = zodResponseFormat(z.object({ a: z.literal(1), b: z.string() }), "pair");
said.parsed = (await chat.parse({ model, messages, response_format })).choices[0].message.parsed;
const parameters = { type: "object", properties: { path: { type: "string" } } };
const tools = [{ type: "function", function: { name: "look", parameters } }];
said.tool = (await chat.create({ model, messages, tools })).choices[0].message.tool_calls[0].function.name;
const runner = chat.stream({ model, messages, tools });
said.toolStream = (await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function.name;
said.models = (await client.models.list()).data.map((each) => each.id);
try { await chat.create({ model: "nobody", messages }); } catch (error) { said.unknown = [error.status, error.code]; }
console.log(JSON.stringify(said));
"""
WELL, PAIR = "All is well.", {"a": 1, "b": "text"}


def breaks(request: Request) -> Behaviour:
    """Cut the stream of who says "break"."""
    return Behaviour(cut=4) if request.body["messages"][-1]["content"] == "break" else OK


@pytest.fixture
def served(net: Loopback, waterfall: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A provider behind a gateway on loopback; the environment points OpenAI's clients at it."""
    provider = net.serve(text=WELL, then=breaks)
    waterfall(first=net.refusing(), second={"base_url": provider.url, "json_schema": True})
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        server = uvicorn.Server(uvicorn.Config(app.app(Client()), lifespan="off", log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        end = time.monotonic() + 60
        while not server.started and time.monotonic() < end:
            time.sleep(0.02)
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://{HERE}:{listener.getsockname()[1]}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
        yield provider
        server.should_exit = server.force_exit = True
        thread.join()


def run(command: list[str | Path], folder: Path, tmp_path: Path) -> Any:
    """Return the JSON that a program prints last."""
    env = {**os.environ, "HOME": str(tmp_path), "LLM_USER_PATH": str(tmp_path / "llm")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def script(python: Path, program: str, tmp_path: Path) -> Any:
    """Run a client's program; return what it noted in `said`."""
    (tmp_path / "program.py").write_text(f"said = {{}}\n{program}\nimport json\nprint(json.dumps(said))\n")
    return run([python, tmp_path / "program.py"], tmp_path, tmp_path)


def test_openai(served: Server, python_clients: Path, tmp_path: Path) -> None:
    assert script(python_clients, OPENAI, tmp_path) == {
        "sync": [WELL, "stop", True],
        "headers": ["second/small", "first/small=cooling, second/small=ok"],  # the first rung rests by then
        "stream": [WELL, []],
        "usage": True,
        "helper": WELL,
        "parsed": PAIR,
        "parsed stream": PAIR,
        "tool": ["look", '{"path": "text"}'],
        "after the tool": WELL,
        "tool stream": "look",
        "models": [["biollm", "biollm-local", "small"], "small"],
        "unknown": "model_not_found",
        "broken": "stream_interrupted",
        "async": [WELL, WELL],
    }


def test_instructor(served: Server, python_clients: Path, tmp_path: Path) -> None:
    assert script(python_clients, INSTRUCTOR, tmp_path) == {"TOOLS": PAIR, "JSON_SCHEMA": PAIR}


def test_pydantic_ai(served: Server, python_clients: Path, tmp_path: Path) -> None:
    assert script(python_clients, PYDANTIC_AI, tmp_path) == {
        "text": WELL,
        "tool output": PAIR,
        "native output": PAIR,
        "looked": "text",
        "after the tool": WELL,
        "stream": WELL,
    }


def test_langchain(served: Server, python_clients: Path, tmp_path: Path) -> None:
    assert script(python_clients, LANGCHAIN, tmp_path) == {
        "text": [WELL, True, "stop"],
        "stream": WELL,
        "json_schema": PAIR,
        "function_calling": PAIR,
        "tool": ["look"],
    }


def test_llm(served: Server, python_clients: Path, tmp_path: Path) -> None:
    assert script(python_clients, LLM, tmp_path) == {"stream": WELL, "whole": WELL, "schema": PAIR}


def test_openai_npm(served: Server, npm_clients: Path, tmp_path: Path) -> None:
    (npm_clients / "program.mjs").write_text(NODE)
    assert run(["node", "program.mjs"], npm_clients, tmp_path) == {
        "whole": WELL,
        "stream": WELL,
        "parsed": PAIR,
        "tool": "look",
        "toolStream": "look",
        "models": ["biollm", "biollm-local", "small"],
        "unknown": [404, "model_not_found"],
    }
