"""Checks `vllm_args` against a snapshot of vLLM's flags, and turns them into arguments of `vllm serve`.

vLLM's own parser cannot be imported on a login node (it wants a device), and it accepts an unknown quantization
or parser, and a GPU memory utilization of 1.7. tests/real/vllm_flags.py makes the snapshot from that parser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

from biollm.config.paths import data_dir
from biollm.config.values import as_list, token_count
from biollm.errors import UsageError, nearest

# Set for each start by the launch script or on the node
_OURS = {
    "model", "served_model_name", "revision", "host", "port", "uds", "root_path", "config", "middleware", "grpc",
    "shutdown_timeout", "api_server_count", "headless", "nnodes", "node_rank", "master_addr", "master_port",
    "device_ids", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs",
}  # fmt: skip
_SECRET = ("api_key", "hf_token")
_LEAST = {
    "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "max_num_seqs": 1,
    "block_size": 1, "cpu_offload_gb": 0, "seed": 0,
}  # fmt: skip
_PLUGINS = {"tool_call_parser": "tool_parser_plugin", "reasoning_parser": "reasoning_parser_plugin"}


@cache
def snapshot() -> dict[str, Any]:
    """Return the version ("vllm") and the flags of vLLM: "bool", "flag", "int", "tokens", "json", ..., or choices."""
    return json.loads((data_dir("slurm_templates") / "vllm-flags.json").read_text())


def requirement() -> str:
    """Return the versions that have the flags of the snapshot, as pip takes them: vllm==0.32.*"""
    return f"vllm=={minor(snapshot()['vllm'])}.*"


def minor(version: str) -> str:
    """Return the part of a version that changes with the flags: 0.32 of 0.32.1."""
    return ".".join(version.split(".")[:2])


def problems(args: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield (key, one sentence) for everything in `args` that vLLM would refuse, or accept and then fail."""
    known = snapshot()["flags"]
    for key, value in args.items():
        if key in _SECRET:
            yield key, "is a secret. Every start gets a key of its own; `biollm pull` reads HF_TOKEN."
        elif key in _OURS:
            yield key, "is set by biollm itself. Remove it."
        elif key not in known:
            yield key, f"is not a flag of vLLM {snapshot()['vllm']}. {nearest(key, known, repr)}".rstrip()
        elif message := _wrong(key, known[key], value, free=_PLUGINS.get(key) in args):
            yield key, message
    if args.get("enable_auto_tool_choice") and "tool_call_parser" not in args:
        yield "enable_auto_tool_choice", "needs tool_call_parser, too."


def adapters(args: Mapping[str, object]) -> list[tuple[str, str]]:
    """Return (name, folder) of each LoRA adapter in `lora_modules`."""
    pairs = (str(each).partition("=") for each in as_list(args.get("lora_modules") or []))
    return [(name, folder) for name, _, folder in pairs]


def _wrong(name: str, kind: Any, value: Any, *, free: bool) -> str | None:
    """Return what is wrong with one value, or None; `free` accepts any choice."""
    if value is None or value == "" or "\0" in str(value):
        return "has no value."
    if (kind in ("bool", "flag")) != isinstance(value, bool):
        return f"is {value!r}, not {'true or false' if kind in ('bool', 'flag') else 'a value for it'}."
    items = [str(item) for item in as_list(value)]
    if isinstance(kind, list):
        choices = [str(choice) for choice in as_list(cast("object", kind))]
        unknown = None if free else next((item for item in items if item not in choices), None)
        hint = f"{nearest(unknown or '', choices, repr)} Known: {', '.join(choices)}.".lstrip()
        return f"is {unknown!r}. {hint}" if unknown else None
    if kind == "json":
        try:
            json.loads("0" if isinstance(value, dict | list) else str(value))
        except ValueError:
            return f"is {value!r}, not JSON."
        return None
    if isinstance(value, dict) or (isinstance(value, list) and kind != "list"):
        return "takes one value."
    if kind == "list":
        return "cannot have values that begin with a dash." if any(item.startswith("-") for item in items) else None
    return _number(name, kind, value)


def _number(name: str, kind: str, value: Any) -> str | None:
    if kind == "tokens":
        try:
            token_count(value)
        except UsageError as error:
            return f"is not a number of tokens: {value!r}. {error.hint}"
    if kind not in ("int", "float"):
        return None
    if not isinstance(value, int | float) or (kind == "int" and value != int(value)):
        return f"is {value!r}, not a {'whole ' if kind == 'int' else ''}number."
    if name == "gpu_memory_utilization" and not 0 < value <= 1:
        return f"is {value}; it is a share of the GPU's memory, above 0 and at most 1."
    least = _LEAST.get(name)
    return f"is {value}; the minimum is {least}." if least is not None and value < least else None


def flags(args: Mapping[str, object]) -> Iterator[list[str]]:
    """Yield the words of each flag on the command line; `args` must have no `problems`."""
    value: Any
    for key, value in args.items():
        flag, kind = "--" + key.replace("_", "-"), snapshot()["flags"][key]
        if isinstance(value, bool):
            if value or kind == "bool":
                yield [flag if value else f"--no-{flag[2:]}"]
        elif isinstance(value, dict) or (isinstance(value, list) and kind == "json"):
            yield [flag, json.dumps(value, separators=(",", ":"))]
        elif isinstance(value, list):
            if value:
                yield [flag, *map(str, as_list(cast("object", value)))]
        else:
            text = str(value)
            yield [f"{flag}={text}"] if text.startswith("-") else [flag, text]
