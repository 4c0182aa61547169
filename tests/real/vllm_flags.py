"""Prints slurm_templates/vllm-flags.json; run it by the Python of an environment that holds the vLLM to describe.

Value of a flag: "bool" (negated by --no-), "flag" (given or not), "int", "float", "tokens" (16k, 16K), "json",
"list", "str", or its choices.
"""

import json
from typing import get_args

import vllm
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.model_executor.layers.quantization import QuantizationMethods
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser


def kind(action):
    if type(action).__name__ == "BooleanOptionalAction":
        return "bool"
    if action.nargs == 0:
        return "flag"
    if action.choices:
        return [choice for choice in map(str, action.choices) if choice != "None"]
    if action.nargs == "+":
        return "list"
    name = getattr(action.type, "__name__", "str")
    while name in ("_optional_type", "_parse_type"):  # optional_type(int): the function it wraps
        action.type = action.type.__closure__[0].cell_contents
        name = getattr(action.type, "__name__", "str")
    return {"human_readable_int": "tokens", "human_readable_int_or_auto": "tokens", "loads": "json", "parse_dataclass": "json",
            "union_dict_and_str": "json", "int": "int", "float": "float"}.get(name, "str")  # fmt: skip


flags = {
    next(option for option in action.option_strings if option.startswith("--"))[2:].replace("-", "_"): kind(action)
    for action in make_arg_parser(FlexibleArgumentParser())._actions
    if action.option_strings and action.dest != "help"
}
flags["tool_call_parser"] = sorted(ToolParserManager.list_registered())
flags["reasoning_parser"] = sorted(ReasoningParserManager.list_registered())
flags["quantization"] = list(get_args(QuantizationMethods))
lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(flags.items()))
print(f'{{"vllm": "{vllm.__version__.split("+")[0]}", "flags": {{\n{lines}\n}}}}')
