"""Starts the gateway, and asks it with OpenAI's own SDK: over its socket, and over a TCP port with a key.

    python examples/gateway.py "Why would STAR end with exit status 137?"

Needs `pip install '.[serve]' openai` in the checkout. A gateway that runs already must be stopped first.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import openai

BIOLLM = [sys.executable, "-c", "from biollm.cli import main; main()"]  # or just ["biollm"]


def biollm(*words: str) -> str:
    return subprocess.run([*BIOLLM, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def main(prompt: str) -> None:
    os.environ.setdefault("BIOLLM_GATEWAY_KEY", os.urandom(16).hex())
    biollm("serve", "--detach", "--port", "0")
    try:
        gateway = json.loads(biollm("serve", "status", "--json"))
        messages = [{"role": "user", "content": prompt}]

        # Only you can open the socket, so it needs no key; the SDK wants a word there.
        socket = httpx.Client(transport=httpx.HTTPTransport(uds=gateway["socket"]))
        client = openai.OpenAI(base_url="http://biollm/v1", api_key="none", http_client=socket)
        answer = client.chat.completions.with_raw_response.create(model="biollm", messages=messages)
        text = answer.parse().choices[0].message.content
        print(f"socket  {text}  (by {answer.headers['x-biollm-deployment']})")

        print("stream  ", end="")
        for chunk in client.chat.completions.create(model="biollm", messages=messages, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()

        # On the port everybody on this host could knock: every request needs the key.
        here = {"base_url": f"{gateway['url']}/v1", "http_client": httpx.Client(trust_env=False)}
        client = openai.OpenAI(api_key=os.environ["BIOLLM_GATEWAY_KEY"], **here)
        print("port   ", client.chat.completions.create(model="biollm", messages=messages).choices[0].message.content)
        try:
            openai.OpenAI(api_key="guessed", **here).models.list()
        except openai.AuthenticationError as error:
            print("no key  HTTP", error.status_code)
    except openai.APIStatusError as error:
        sys.exit(f"no answer: {error.body['message']}")
    finally:
        biollm("serve", "stop")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("nextflow_oom.log").read_text())
