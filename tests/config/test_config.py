"""Configuration: what people may write, what they are told when it is wrong, and what ships."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from biollm.config import Account, Architecture, Config, Limit, Model, Provider, describe, json_schema, load_config
from biollm.config.paths import data_dir
from biollm.config.starter import write_starter
from biollm.errors import ConfigError, UnknownNameError

KINDS = ("models", "providers", "cluster")
SHIPPED = data_dir("router_config")
EXAMPLES = Path(__file__).parents[2] / "examples"
SECRET = "sk-planted-0123456789abcdefghij"

SEED_MODELS = """\
models:
  qwen-coder-32b:
    name: "Qwen2.5-Coder-32B-Instruct"
    hf_id: "Qwen/Qwen2.5-Coder-32B-Instruct"
    type: local
    size_gb: 65
    gpus_required: 1
    context_length: 32768
    capabilities: [code, chat, fill-in-middle]
    vllm_args:
      tensor_parallel_size: 1
      max_model_len: 32768
      dtype: float16
    
  deepseek-coder-v2:
    name: "DeepSeek-Coder-V2-Instruct"
    hf_id: "deepseek-ai/DeepSeek-Coder-V2-Instruct"
    type: local
    size_gb: 120
    gpus_required: 2
    context_length: 128000
    capabilities: [code, chat, fill-in-middle, reasoning]
    vllm_args:
      tensor_parallel_size: 2
      max_model_len: 65536
      dtype: float16
      
  # ... more models
"""  # noqa: W293 - the blanks are the seed's
SEED_PROVIDERS = """\
providers:
  lightning:
    type: api
    priority: 1
    env_key: LIGHTNING_API_KEY
    base_url: "https://api.lightning.ai/v1"
    models: [llama-3.1-8b, mistral-7b]
    free_tier: true
    rate_limit: 100/min
    
  gemini:
    type: api
    priority: 2
    env_key: GOOGLE_API_KEY
    models: [gemini-2.0-flash, gemini-2.5-pro]
    free_tier: true
    rate_limit: 15/min
    
  vllm:
    type: local
    priority: 5
    base_url: "http://localhost:8000/v1"
    models: [qwen-coder-32b, deepseek-coder-v2, llama-3.3-70b]
    requires_gpu: true
"""  # noqa: W293
FURTHER_KEYS = """\
providers:
  lightning:
    name: "Lightning.ai"
    enabled: true
    monthly_limit: "20M tokens"
    description: >
      Primary provider for most requests.
  github_copilot:
    env_key: GITHUB_TOKEN
    models: [copilot]
    free_tier: false
    subscription: "Copilot Pro ($10/month)"
  vllm:
    startup_command: "scripts/start_vllm.sh"
    slurm_partition: "gpu"
routing:
  strategy: waterfall
  max_retries: 3
  timeout: 45
  local_timeout: 200
  failure_threshold: 5
  failure_reset_seconds: 300
costs:
  per_million_tokens: {lightning: 0.00, openai: 2.50}
"""
Write = Callable[..., Path]


@pytest.fixture
def layer(tmp_path: Path) -> Write:
    """Write one folder of configuration: `layer(providers="...", models="...")`; text or bytes."""

    def write(folder: str = "mine", **files: str | bytes) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / folder / f"{name}.yaml").write_bytes(data)
        return tmp_path / folder

    return write


def limits(config: Config, provider: str) -> list[str]:
    return [str(limit) for limit in config.provider(provider).accounts[0].limits]


def complaint(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(folder)
    assert caught.value.exit_code == 78
    return str(caught.value)


class TestWhatPeopleWrite:
    def test_the_seed_loads_unchanged(self, layer: Write) -> None:
        config = load_config(layer(models=SEED_MODELS, providers=SEED_PROVIDERS))
        assert [provider.name for provider in config.providers] == [
            "lightning", "gemini", "github_copilot", "openai", "vllm", "embedded"
        ]  # fmt: skip
        assert config.provider("lightning").models == ("llama-3.1-8b", "mistral-7b")
        assert limits(config, "lightning") == ["100/min", "120k tokens/min", "30M tokens/month"]
        assert config.provider("vllm").base_url == "http://localhost:8000/v1"
        assert config.models["deepseek-coder-v2"].vllm_args["max_model_len"] == 65536
        assert config.models["qwen-coder-32b"].capabilities == {"code", "chat", "fill-in-middle"}
        assert not config.warnings

    def test_keys_of_other_peoples_files_are_understood(self, layer: Write) -> None:
        config = load_config(
            layer(models="models: {codellama-34b: {priority: 1, enabled: yes, description: x}}", providers=FURTHER_KEYS)
        )
        assert limits(config, "lightning")[-1] == "20M tokens/month"
        assert config.provider("lightning").title == "Lightning.ai"
        copilot = config.provider("github_copilot")
        assert (copilot.free_tier, [account.env_key for account in copilot.accounts]) == (False, ["GITHUB_TOKEN"])
        assert config.costs.per_million_tokens == {"lightning": 0.0, "openai": 2.5}
        timeouts = config.provider("vllm").timeout, config.provider("openai").timeout, config.routing.timeout
        assert timeouts == (200, None, 45)
        assert config.models["codellama-34b"].priority == 1
        assert [warning.key for warning in config.warnings] == [
            "providers.vllm.startup_command", "providers.vllm.slurm_partition", "routing.strategy",
            "routing.max_retries", "routing.failure_threshold", "routing.failure_reset_seconds",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("rate_limit: 15/min", ["15/min"]),
            (
                "rate_limit: [2/s, 30 requests per minute, 100/hour, 1000/day]",
                ["2/s", "30/min", "100/hour", "1000/day"],
            ),
            ("token_limit: 120k/min", ["120k tokens/min"]),
            ("token_budget: [30M/month, 500_000 tokens/day]", ["30M tokens/month", "500k tokens/day"]),
            ("budget: 10 USD/month", ["10 USD/month"]),
            ("budget: $2.50 per day", ["2.5 USD/day"]),
            ("{rate_limit: 15/min, token_budget: 30M/month, share: 1/5}", ["3/min", "6M tokens/month"]),
            ("{rpm: 10, tpm: 5k, rpd: 200}", ["10/min", "200/day", "5k tokens/min"]),
            ('monthly_limit: "$5"', ["5 USD/month"]),
            ("daily_limit: 100 requests", ["100/day"]),
            ("{monthly_limit: 30M, token_budget: 1M/day}", ["30M tokens/month", "1M tokens/day"]),
        ],
    )
    def test_limits(self, layer: Write, written: str, meant: list[str]) -> None:
        entry = {"type": "api", "models": ["m"], **yaml.safe_load(written)}
        config = load_config(layer(providers=yaml.safe_dump({"providers": {"groq": entry}}, sort_keys=False)))
        assert limits(config, "groq") == meant

    def test_a_reset_belongs_to_periods_of_the_calendar_alone(self) -> None:
        account = Account.model_validate({"rate_limit": ["5/min", "9/day"], "resets": "00:00 America/Los_Angeles"})
        assert account.limits == (Limit("requests", 5, "min"), Limit("requests", 9, "day", "00:00 America/Los_Angeles"))
        assert [limit.rolling for limit in account.limits] == [True, False]

    def test_accounts_take_the_limits_of_their_provider_where_they_have_none(self, layer: Write) -> None:
        text = """
            providers:
              groq: {type: api, models: [m], rate_limit: 10/min, budget: 8 USD/month, accounts: [
                {name: lab, env_key: LAB}, {name: core, key_file: ~/core.key, rate_limit: 4/min, share: 1/2}]}"""
        lab, core = load_config(layer(providers=text)).provider("groq").accounts
        assert [str(limit) for limit in lab.limits] == ["10/min", "8 USD/month"]
        assert [str(limit) for limit in core.limits] == ["2/min", "4 USD/month"]
        assert (lab.env_key, core.key_file) == ("LAB", Path.home() / "core.key")

    def test_scalars_mean_what_their_field_says_not_what_yaml_1_1_says(self, layer: Write) -> None:
        models = """
            models:
              no: {hf_id: o/m, revision: 0123456, name: 1.10, enabled: on, size_gb: 1e2,
                   vllm_args: {max_model_len: 16384, gpu_memory_utilization: .9, enforce_eager: yes, seed: 010,
                               override: '{"a": 1}', dtype: float16}}"""
        cluster = """
            cluster: {walltime: 8:00:00, account: 0042, idle_timeout: 15 min, drain: 90, partition: no,
                      environment: {env: {OMP: 010, DEBUG: no, GONE: null, RATIO: 1.10}}}"""
        config = load_config(layer(models=models, cluster=cluster))
        model, site = config.models["no"], config.cluster
        assert (model.revision, model.name, model.size_gb) == ("0123456", "1.10", 100)
        assert model.vllm_args == {
            "max_model_len": 16384, "gpu_memory_utilization": ".9", "enforce_eager": True, "seed": "010",
            "override": {"a": 1}, "dtype": "float16",
        }  # fmt: skip
        assert (site.walltime, site.account, site.partition) == (8 * 3600, "0042", "no")
        assert (site.idle_timeout, site.drain) == (900, 90)
        assert site.environment.env == {"OMP": "010", "DEBUG": "no", "GONE": None, "RATIO": "1.10"}

    def test_a_flag_of_vllm_is_the_same_flag_however_it_is_written(self, layer: Write) -> None:
        text = "models: {qwen-coder-32b: {vllm_args: {max-model-len: 16k, --hf-overrides: {a-b: 1}}}}"
        args = load_config(layer(models=text)).models["qwen-coder-32b"].vllm_args
        assert (args["max_model_len"], args["hf_overrides"]) == ("16k", {"a-b": 1})
        assert not any("-" in flag for flag in args)

    @pytest.mark.parametrize(
        ("span", "seconds"), [("1-12:00:00", 129600), ("90 min", 5400), ("2h", 7200), ("1 day", 86400)]
    )
    def test_time_spans(self, layer: Write, span: str, seconds: int) -> None:
        assert load_config(layer(cluster=f"cluster: {{walltime: {span}}}")).cluster.walltime == seconds

    def test_paths_may_name_variables_and_those_of_the_node_stay(
        self, layer: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SCRATCH", "/scratch/me")
        monkeypatch.delenv("NODE_DISK", raising=False)
        text = "cluster: {models_dir: $SCRATCH/m, cache_dir: $NODE_DISK/c, environment: {container: ~/v.sif}}"
        site = load_config(layer(cluster=text)).cluster
        assert (str(site.models_dir), str(site.cache_dir)) == ("/scratch/me/m", "$NODE_DISK/c")
        assert site.environment.container == str(Path.home() / "v.sif")

    def test_anchors_and_merge_keys_work(self, layer: Write) -> None:
        text = "models:\n  a: &a {hf_id: o/a, gpus_required: 2}\n  b: {<<: *a, hf_id: o/b}\n"
        config = load_config(layer(models=text))
        assert (config.models["b"].gpus_required, config.models["b"].hf_id) == (2, "o/b")

    @pytest.mark.parametrize("key", ["os.environ/MY_KEY", "${MY_KEY}", "$MY_KEY"])
    def test_a_reference_to_a_variable_is_taken_as_env_key(self, layer: Write, key: str) -> None:
        config = load_config(layer(providers=f"providers: {{groq: {{type: api, models: [m], api_key: '{key}'}}}}"))
        assert config.provider("groq").accounts[0].env_key == "MY_KEY"

    def test_a_name_that_does_not_exist_lists_those_that_do(self) -> None:
        with pytest.raises(UnknownNameError, match="no provider named 'opnai'") as caught:
            load_config().provider("opnai")
        assert "'openai'" in (caught.value.hint or "")


GROQ = "providers:\n  groq:\n    type: api\n    models: [m]\n    "
BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", ":1: is empty."),
    "comments only": (b"# nothing\n", ":1: is empty."),
    "tab": (b"providers:\n\tgroq: {}\n", ":2: is not valid YAML: .* Tabs are not allowed"),
    "unclosed bracket": (b"providers: [\n", ":2: is not valid YAML"),
    "unclosed quote": (b"providers: 'x\n", ":2?1?: is not valid YAML"),
    "colon in a text": (b"providers:\n  a: b: c\n", ":2: is not valid YAML: .* needs quotes"),
    "latin-1": ("providers:\n  # caf\xe9\n".encode("latin-1"), ":2: is not UTF-8."),
    "utf-16": ("providers: {}".encode("utf-16"), ":1: is not UTF-8."),
    "control character": (b"providers:\n  a: \x07\n", ":2: contains a character"),
    "list at the top": (b"- a\n", ":1: must be a mapping"),
    "text at the top": (b"hello\n", ":1: must be a mapping"),
    "two documents": (b"providers: {}\n---\nmodels: {}\n", ":2: is not valid YAML: .* remove the `---`"),
    "python object": (b"providers: !!python/object/apply:os.system [ls]\n", ":1: uses the tag"),
    "unknown anchor": (b"providers: *x\n", ":1: is not valid YAML: found undefined alias. Define the anchor"),
    "itself within itself": (b"providers: &x {a: *x}\n", ":1: contains an alias of itself."),
    "list as key": (b"? [a]\n: b\n", ":1: has a list or a mapping as a key"),
    "ten thousand brackets": (b"[" * 10000, ":1: is nested too deeply."),
    "ten thousand dashes": (b"- " * 10000, ":1: is nested too deeply."),
}
WRONG_VALUES: list[tuple[str, int, str]] = [
    (GROQ + f"env_key: {SECRET}", 5, r"providers.groq.env_key: sk-p… \(31 characters\) looks like a key itself."),
    (GROQ + "env_key: AIzaSyA0123456789abcdefghijklmnopqrstuv", 5, "looks like a key itself"),
    (GROQ + "env_key: 01234567-89ab-cdef-0123-456789abcdef", 5, "looks like a key itself"),
    (GROQ + "env_key: MY KEY", 5, "is not the name of an environment variable"),
    (GROQ + f"api_key: {SECRET}", 5, "a key must not be in a file"),
    (GROQ + "priority: -1", 5, "providers.groq.priority: must be at least 0, not '-1'."),
    (GROQ + f"priority: {SECRET}", 5, "must be a whole number, not 'sk-p…'."),
    (GROQ + "priority: first", 5, "must be a whole number, not 'first'."),
    (GROQ + "rate_limit: fast", 5, "'fast' is not a valid limit; use e.g. 15/min."),
    (GROQ + "rate_limit: 30M tokens/month", 5, "is not a valid limit"),
    (GROQ + "rate_limit: 0/min", 5, "is not a valid limit"),
    (GROQ + "rate_limit: 5/fortnight", 5, "is not a valid limit"),
    (GROQ + "rate_limit:\n      - 5/min\n      - quick", 5, r"rate_limit.*'quick' is not a valid limit"),
    (GROQ + "budget: 10 EUR/month", 5, "is not a valid limit; use e.g. 10 USD/month."),
    (GROQ + "resets: midnight", 5, "is not a time and a zone"),
    (GROQ + "resets: 00:00 Mars/Olympus", 5, "is not a time and a zone"),
    (GROQ + "share: 3/2", 5, "must be at most 1"),
    (GROQ + "base_url: host:8000/v1", 5, "not a base URL. Write it like https://host/v1, scheme included."),
    (GROQ + "base_url: ftp://host/v1", 5, "is not a base URL"),
    (GROQ + "base_url: http://host:port/v1", 5, "is not a base URL"),
    (GROQ + "base_url: https://me:word@host/v1", 5, "contains a user name or a password"),
    (GROQ + "timeout: 0", 5, "must be more than 0"),
    (GROQ + "tools: perhaps", 5, "must be true or false, not 'perhaps'."),
    (GROQ + "enabled: perhaps", 5, "must be true or false"),
    (GROQ + "limits_per: user", 5, "must be 'account' or 'model', not 'user'."),
    (GROQ + "key_file: keys/groq", 5, "must be an absolute path"),
    ("models:\n  qwen-coder-32b:\n    scale: {target: 1}", 3, "scale.target: is not a known key. Did you mean target_waiting?"),
    (GROQ + "modles: [m]", 5, "providers.groq.modles: is not a known key. Did you mean models?"),
    (GROQ + "name: OpenAI", 5, "is the name of openai already"),
    (GROQ + "accounts:\n      - {name: a, env_kye: K}", 6, r"accounts\[0\].env_kye: is not a known key. Did you mean env_key"),
    (GROQ + "accounts:\n      - {name: a}\n      - {name: a}", 5, "two accounts with one name"),
    (GROQ + "accounts: [{name: a, env_key: K}, {name: b, env_key: K}]", 5, "two accounts with one key"),
    (GROQ + "env_key: K\n    accounts: [{name: a}]", 2, "accounts, and a key beside them"),
    (GROQ + "type: api", 5, "duplicate key .first defined on line 3"),
    ("providers:\n  groq: {type: api, models: [m]}\n  groq: {type: api, models: [m]}", 3, "providers.groq: duplicate key .first defined on line 2"),
    ("providers:\n  opena: {type: api, models: [m]}", 2, "LiteLLM .* no base_url. Did you mean openai"),
    ("providers:\n  groq: {models: [m]}", 2, "providers.groq.type: is missing."),
    ("providers:\n  groq: {models: [m]}", 2, "providers.groq.type: is missing. Write api, local or embedded."),
    ("providers:\n  opnai: {priority: 1}", 2, "is missing. Write api, local or embedded. Did you mean openai?"),
    ("models:\n  qwen-coder-32: {gpus_required: 2}", 2, "Did you mean qwen-coder-32b?"),
    ("providers:\n  groq: {type: cloud, models: [m]}", 2, "must be 'api', 'local' or 'embedded', not 'cloud'."),
    ("providers:\n  groq: {type: api, models: m}", 2, "must be a list."),
    ("providers:\n  groq: {type: api, models: [[m]]}", 2, r"models\[0\]: must be a string"),
    ("providers:\n  groq: {type: api, models: [m, m]}", 2, "lists m twice"),
    ("providers:\n  groq:", 2, "must be a mapping"),
    ("providers:\n  groq: [1]", 2, "must be a mapping"),
    ("providers: [groq]", 1, "must be a mapping"),
    ("inherit: false\nproviders: [groq]", 2, "providers: must be a mapping"),
    ("inherit: false\nproviders: {}\nmodels: qwen", 3, "models: must be a mapping"),
    ("costs:\n  monthly_budget: {openai: 50}", 2, "costs.monthly_budget: is not a known key. Give each provider its own"),
    ("providers:\n  a/b: {type: api, base_url: 'http://h', models: [m]}", 2, "cannot be 'a/b'"),
    ("providers:\n  vllm:\n    models:\n      - qwen-coder-32b\n      - qwen-coder-33b", 5,
     "qwen-coder-33b is not defined in models.yaml. Did you mean qwen-coder-32b?"),
    ("providers:\n  vllm: {models: [ours]}", 2,
     "ours is not defined in models.yaml. Add it there: `ours: {hf_id: ORG/NAME}`."),
    ("providers:\n  embedded: {models: [ours]}", 2,
     "Add it there: `ours: {type: embedded, gguf: ORG/REPO/FILE.gguf}`."),
    ("providers:\n  vllm: {models: [smollm2-135m]}", 2, "is of type embedded"),
    ("models:\n  mine: {type: local}", 2, "needs an hf_id or a path, being of type local."),
    ("models:\n  mine: {type: embedded}", 2, "needs a gguf, being of type embedded."),
    ("models:\n  mine: {hf_id: just-a-name}", 2, "cannot be 'just-a-name'"),
    ("models:\n  ../mine: {hf_id: a/b}", 2, "cannot be '../mine'"),
    ("models:\n  mine: {hf_id: a/b, architecture: {parameters: 1, layers: 2, heads: 1, hidden: 3, hiden: 3}}", 2, "architecture.hiden: .* Did you mean hidden"),
    ("models:\n  mine: {hf_id: a/b, architecture: {parameters: 1, layers: 0, heads: 1, hidden: 3}}", 2, "architecture.layers: must be at least 1"),
    ("models:\n  mine: {hf_id: a/b, architecture: {parameters: 1, layers: 2, heads: 0, hidden: 3}}", 2, "architecture.heads: must be at least 1"),
    ("models:\n  mine: {hf_id: a/b, architecture: {parameters: 1, layers: 2, heads: 1, hidden: 0}}", 2, "architecture.hidden: must be at least 1"),
    ("models:\n  mine: {hf_id: a/b, architecture: {parameters: 1, layers: 2, heads: 8, hidden: 4}}", 2,
     "architecture.hidden is 4, less than its 8 heads"),
    ("cluster:\n  walltime: 480", 2, "could be minutes or seconds. Write it like 8:00:00 or 480 min."),
    ("cluster:\n  walltime: soon", 2, "is not a valid time span"),
    ("cluster:\n  gpus_per_node: 0", 2, "must be at least 1, not '0'."),
    ("cluster:\n  environment: {venv: /a, container: b.sif}", 2, "more than one of venv, conda and container"),
    ("cluster:\n  environment: {env: {HF_TOKEN: hf_abcdefghijklmnop}}", 2, "looks like a key; everybody can read it in the launch"),
    ("cluster:\n  partition: \"a\\nb\"", 2, "cannot be"),
    ("routing:\n  timeuot: 3", 2, "Did you mean timeout?"),
    ("ledger:\n  url: localhost:6379", 2, "is not the address of a Redis server. Write it like redis://host:6379/0"),
    ("ledger:\n  url: http://host:6379/0", 2, "is not the address of a Redis server"),
    ("ledger:\n  url: redis://host:port/0", 2, "is not the address of a Redis server"),
    ("ledger:\n  url: unix://?db=0", 2, "is not the address of a Redis server"),
    ("ledger:\n  url: redis://host/0?socket_timeout=9", 2, "is not the address of a Redis server"),
    ("ledger:\n  url: rediss://:geheim@host/0", 2, "contains a password. Write it into a password_file, or name a password_env.$"),
    ("ledger:\n  url: redis://host/0?password=geheim", 2, "contains a password. Write it into a password_file"),
    ("ledger:\n  password: geheim", 2, "Did you mean password_env|Did you mean password_file"),
    ("data_policy: lax", 1, "must be 'any', 'no_training' or 'local_only', not 'lax'."),
    ("provider:\n  a: {}", 1, "provider: is not a known key. Did you mean providers?"),
]  # fmt: skip


class TestWhatPeopleAreTold:
    @pytest.mark.parametrize(("content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
    def test_a_broken_file_is_named_with_its_line(self, layer: Write, content: bytes, message: str) -> None:
        found = complaint(layer(providers=content))
        assert len(found.splitlines()) == 1
        assert re.search(r"/mine/providers\.yaml" + message, found), found

    @pytest.mark.parametrize(("text", "line", "message"), WRONG_VALUES)
    def test_a_wrong_value_is_named_with_its_line_and_key(
        self, layer: Write, text: str, line: int, message: str
    ) -> None:
        found = complaint(layer(providers=text))
        assert re.search(rf"/mine/providers\.yaml:{line}: .*{message}", found), found
        assert SECRET not in found
        assert "0123456789abcdef" not in found
        assert len(found.splitlines()) == 1

    def test_a_list_names_the_right_line_when_a_model_before_is_switched_off(self, layer: Write) -> None:
        listed = (
            "providers:\n  vllm:\n    models:\n      - codellama-34b\n      - qwen-coder-32b\n      - qwen-coder-33b\n"
        )
        off = "models: {codellama-34b: {enabled: false}}"
        assert "/mine/providers.yaml:6: " in complaint(layer(providers=listed, models=off))

    def test_everything_that_is_wrong_is_told_at_once_on_one_screen(self, layer: Write) -> None:
        many = "".join(f"  p{i}: {{type: api, base_url: nowhere, models: [m]}}\n" for i in range(40))
        folder = layer(providers="providers:\n  groq: {priority: -1, typ: api}\n" + many, models="models: {x: {}}")
        with pytest.raises(ConfigError) as caught:
            load_config(folder)
        assert len(caught.value.problems) == 44
        assert str(caught.value).splitlines()[-1] == "... and 24 more."

    def test_a_folder_that_was_named_must_hold_configuration(
        self, layer: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "does not exist, or has none of" in complaint(tmp_path / "nowhere")
        (layer("typo") / "models.yml").write_text("models: {}")
        monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(tmp_path / "typo"))
        with pytest.raises(ConfigError, match=r"Rename it to models\.yaml") as caught:
            load_config()
        assert len(caught.value.problems) == 2

    def test_a_file_that_cannot_be_read_is_named(self, layer: Write) -> None:
        (layer() / "models.yaml").mkdir()
        assert re.search(r"mine/models\.yaml: cannot be read: Is a directory", complaint(layer()))

    @pytest.mark.parametrize("how", ["flag", "file"])
    def test_lenient_turns_unknown_keys_into_warnings(self, layer: Write, how: str) -> None:
        text = GROQ + "colour: blue\n" + ("lenient: true\n" if how == "file" else "")
        config = load_config(layer(providers=text), lenient=how == "flag")
        assert config.provider("groq").models == ("m",)
        (warning,) = config.warnings
        assert (warning.line, warning.key) == (5, "providers.groq.colour")

    def test_lenient_holds_for_its_own_file_and_for_keys_alone(self, layer: Write) -> None:
        folder = layer(models="lenient: yes\nmodels: {}", providers=GROQ + "colour: blue\n    priority: -1")
        assert len(complaint(folder).splitlines()) == 2

    def test_disabling_an_entry_that_does_not_exist_is_a_warning(self, layer: Write) -> None:
        (warning,) = load_config(layer(providers="providers: {lightnin: {enabled: false}}")).warnings
        assert str(warning).endswith("disables an entry that does not exist. Did you mean lightning?")

    def test_a_file_with_nearly_a_right_name_is_named(self, layer: Write) -> None:
        folder = layer(models="models: {}")
        (folder / "provider.yaml").write_text("providers: {}")
        (folder / "notes.yaml").write_text("{}")
        (warning,) = load_config(folder).warnings
        assert str(warning).endswith("mine/provider.yaml: is not read. Did you mean providers.yaml?")
        (folder / "models.yaml").unlink()
        assert complaint(folder).endswith("provider.yaml: is not read. Did you mean providers.yaml?")

    def test_a_configuration_without_a_provider_has_a_warning(self, layer: Write) -> None:
        (warning,) = load_config(layer(providers="inherit: false\nproviders: {}")).warnings
        assert warning.message == "No provider is enabled: no request can be answered."

    def test_a_base_url_ends_before_the_route_of_a_request(self, layer: Write) -> None:
        lab = "providers:\n  lab: {type: api, base_url: 'https://lab.example/v1/chat/completions/', models: [m]}"
        config = load_config(layer(providers=lab))
        assert config.provider("lab").base_url == "https://lab.example/v1"
        assert str(config.warnings[0]).endswith("Write https://lab.example/v1.")

    def test_no_damage_to_a_file_is_more_than_an_error(self, layer: Write) -> None:
        rng = random.Random(20)
        whole = (SHIPPED / "providers.yaml").read_bytes()
        for _ in range(120):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(data))
                data[at : at + rng.randrange(0, 9)] = rng.choice(
                    [b"\t", b"\n", b":", b"[", b"}", b"- ", b"\xff", b"&a", b"'", b""]
                )
            with contextlib.suppress(ConfigError):
                load_config(layer(providers=bytes(data)))


class TestLayers:
    def test_a_later_layer_changes_an_entry_key_by_key(self, layer: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(
            "BIOLLM_SITE_CONFIG", str(layer("site", providers="providers: {lightning: {rate_limit: 20/min}}"))
        )
        models = "models: {qwen-coder-32b: {vllm_args: {max_model_len: 8192}}}"
        config = load_config(layer(models=models, providers="providers: {lightning: {priority: 7}}"))
        lightning, qwen = config.provider("lightning"), config.models["qwen-coder-32b"]
        assert (lightning.priority, limits(config, "lightning")[0]) == (7, "20/min")
        assert (qwen.vllm_args["max_model_len"], qwen.vllm_args["dtype"]) == (8192, "bfloat16")
        assert config.sources["providers.lightning.rate_limit"].endswith("/site/providers.yaml:1")
        assert config.sources["providers.lightning.env_key"].startswith(f"{SHIPPED}/providers.yaml:")

    def test_enabled_false_takes_an_entry_out_and_needs_no_other_key(self, layer: Write) -> None:
        off = {"models": "models: {codellama-34b: {enabled: false}}", "providers": "providers: {gemini: {enabled: no}}"}
        config = load_config(layer(**off))
        assert "gemini" not in [provider.name for provider in config.providers]
        assert "codellama-34b" not in config.models
        assert "codellama-34b" not in config.provider("vllm").models
        assert not config.warnings

    def test_equal_priorities_keep_the_order_of_the_files(self, layer: Write) -> None:
        text = "providers: {groq: {type: api, priority: 1, models: [m]}, openai: {priority: 1}}"
        names = [provider.name for provider in load_config(layer(providers=text)).providers]
        assert names[:3] == ["lightning", "openai", "groq"]

    def test_inherit_false_starts_a_section_anew(self, layer: Write) -> None:
        config = load_config(layer(providers="inherit: false\n" + GROQ))
        assert [provider.name for provider in config.providers] == ["groq"]
        assert "qwen-coder-32b" in config.models

    @pytest.mark.parametrize(
        ("mine", "accounts"),
        [
            ("github_copilot: {env_key: TOKEN}", [("default", "TOKEN")]),
            ("github_copilot: {accounts: [{name: one}]}", [("one", None)]),
            ("openai: {accounts: [{name: a, env_key: A}, {name: b, env_key: B}]}", [("a", "A"), ("b", "B")]),
        ],
    )
    def test_a_key_of_ones_own_takes_the_place_of_accounts_and_back(
        self, layer: Write, mine: str, accounts: list[tuple[str, str | None]]
    ) -> None:
        config = load_config(layer(providers=f"providers: {{{mine}}}"))
        found = config.provider(mine.split(":")[0]).accounts
        assert [(account.name, account.env_key) for account in found] == accounts

    def test_a_container_takes_the_place_of_the_shipped_environment(self, layer: Write) -> None:
        environment = load_config(layer(cluster="cluster: {environment: {container: /v.sif}}")).cluster.environment
        assert (environment.container, environment.venv) == ("/v.sif", None)

    @pytest.mark.parametrize(
        "mine",
        [
            "providers: {openai: {enabled: true}}",
            "inherit: false\nproviders: {openai: {type: api, models: [m], enabled: true}}",
            "cluster: {max_gpus: 64}",
        ],
    )
    def test_what_a_site_locks_nobody_changes_after(
        self, layer: Write, monkeypatch: pytest.MonkeyPatch, mine: str
    ) -> None:
        locks = "locked:\n  providers: {openai: {enabled: false}}\n  cluster: {max_gpus: 8}\n"
        monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(layer("site", providers=locks)))
        assert load_config().cluster.max_gpus == 8
        assert "openai" not in [provider.name for provider in load_config().providers]
        assert re.search(
            r"mine/providers.yaml:\d: .* is locked by .*/site/providers.yaml:[23]", complaint(layer(providers=mine))
        )

    def test_starting_anew_keeps_what_is_locked(self, layer: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        locks = "locked: {providers: {openai: {enabled: false}}, data_policy: no_training}"
        monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(layer("site", providers=locks)))
        config = load_config(
            layer(providers="inherit: false\ndata_policy: any\nproviders: {openai: {type: api, models: [m]}}")
        )
        assert (config.providers, config.data_policy) == ((), "no_training")

    def test_repeating_a_locked_value_is_no_change(self, layer: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(layer("site", cluster="locked: {cluster: {max_gpus: 8}}")))
        assert load_config(layer(cluster="cluster: {max_gpus: 8, max_jobs: 2}")).cluster.max_jobs == 2

    @pytest.mark.parametrize(
        ("site", "mine", "variable", "policy"),
        [
            ("any", "any", "", "any"),
            ("any", "no_training", "", "no_training"),
            ("no_training", "any", "", "no_training"),
            ("local_only", "no_training", "0", "local_only"),
            ("no_training", "local_only", "", "local_only"),
            ("any", "any", "1", "local_only"),
        ],
    )
    def test_no_later_layer_loosens_the_data_policy(
        self, layer: Write, monkeypatch: pytest.MonkeyPatch, site: str, mine: str, variable: str, policy: str
    ) -> None:
        monkeypatch.setenv("BIOLLM_SITE_CONFIG", str(layer("site", providers=f"data_policy: {site}")))
        monkeypatch.setenv("BIOLLM_LOCAL_ONLY", variable)
        assert load_config(layer(models=f"data_policy: {mine}\ninherit: false")).data_policy == policy

    def test_the_folder_of_the_environment_comes_last_and_the_working_directory_never(
        self, layer: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        home = tmp_path / "xdg-config" / "biollm"
        home.mkdir(parents=True)
        (home / "cluster.yaml").write_text("cluster: {account: from-home, qos: from-home}")
        monkeypatch.setenv("BIOLLM_CONFIG_DIR", str(layer("env", cluster="cluster: {account: from-env}")))
        monkeypatch.chdir(layer("cwd", cluster="cluster: {account: from-cwd}"))
        assert (load_config().cluster.account, load_config().cluster.qos) == ("from-env", "from-home")
        instead = load_config(layer(cluster="cluster: {account: mine}"))
        assert (instead.cluster.account, instead.cluster.qos) == ("mine", None)


class TestShipped:
    def test_the_waterfall_is_whole(self) -> None:
        config = load_config()
        assert [(provider.name, provider.priority) for provider in config.providers] == [
            ("lightning", 1), ("gemini", 2), ("github_copilot", 3), ("openai", 4), ("vllm", 5), ("embedded", 99)
        ]  # fmt: skip
        assert config.provider("vllm").models == (
            "qwen-coder-32b", "deepseek-coder-v2", "llama-3.3-70b", "minimax-m2", "codellama-34b"
        )  # fmt: skip
        assert [account.name for account in config.provider("github_copilot").accounts] == ["lab", "core"]
        assert limits(config, "lightning") == ["15/min", "120k tokens/min", "30M tokens/month"]
        assert "10 USD/month" in limits(config, "openai")
        gemini = config.provider("gemini")
        assert (gemini.limits_per, gemini.trains_on_prompts) == ("model", True)
        assert not config.warnings

    def test_every_local_model_knows_its_architecture(self) -> None:
        for model in load_config().models.values():
            assert (model.architecture is not None) == (model.type == "local")

    def test_cloud_models_are_as_litellms_map_has_them(self) -> None:
        spec = importlib.util.find_spec("litellm")  # without importing it
        assert spec is not None
        assert spec.origin is not None
        prices = json.loads((Path(spec.origin).parent / "model_prices_and_context_window_backup.json").read_text())
        config = load_config()
        for provider in config.providers[1:4]:
            for name in provider.models:
                known = prices[name if provider.name == "openai" else f"{provider.litellm_provider}/{name}"]
                assert known["mode"] == "chat"
                assert "deprecation_date" not in known or known["deprecation_date"] > "2027"
                assert config.models[name].context_length == known["max_input_tokens"]
                assert config.models[name].vision is known["supports_vision"]
        for model in config.models.values():
            named = [
                facts for name, facts in prices.items() if model.key in name or (model.hf_id and model.hf_id in name)
            ]
            assert model.vision is any(facts.get("supports_vision") for facts in named), model.key

    @pytest.mark.parametrize("kind", KINDS)
    def test_each_file_names_its_schema_first_and_the_schema_is_current(self, kind: str) -> None:
        assert (
            (SHIPPED / f"{kind}.yaml").read_text().startswith(f"# yaml-language-server: $schema=./{kind}.schema.json\n")
        )
        assert json.loads((SHIPPED / f"{kind}.schema.json").read_text()) == json_schema(kind)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            *((kind, (SHIPPED / f"{kind}.yaml").read_text()) for kind in KINDS),
            *(("cluster", path.read_text()) for path in sorted(EXAMPLES.glob("cluster-*.yaml"))),
            ("models", SEED_MODELS),
            ("providers", SEED_PROVIDERS),
            (
                "providers",
                "providers: {x: {name: X, enabled: true, monthly_limit: 30M tokens}}\ndata_policy: local_only",
            ),
        ],
    )
    def test_the_schema_accepts_what_loads(self, kind: str, text: str) -> None:
        jsonschema.validate(yaml.safe_load(text), json_schema(kind))  # type: ignore[arg-type]

    def test_the_schema_points_at_typing_errors(self) -> None:
        with pytest.raises(jsonschema.ValidationError, match="'modles' was unexpected"):
            jsonschema.validate({"providers": {"x": {"modles": []}}}, json_schema("providers"))

    @pytest.mark.parametrize("example", sorted(EXAMPLES.glob("cluster-*.yaml")), ids=lambda path: path.stem)
    def test_the_example_sites_load(self, layer: Write, example: Path) -> None:
        config = load_config(layer(cluster=example.read_text()))
        assert config.cluster.environment.container or config.cluster.environment.modules
        assert config.cluster.run_dir
        assert not config.warnings


class TestValues:
    def test_describe_says_where_each_value_came_from(self, layer: Write) -> None:
        text = f"providers: {{groq: {{type: api, models: [m], description: {SECRET}}}}}"
        folder = layer(providers=text)
        rows = {key: (value, source) for key, value, source in describe(load_config(folder))}
        assert rows["providers.groq.models"] == ('["m"]', f"{folder}/providers.yaml:1")
        line = 1 + (SHIPPED / "cluster.yaml").read_text().split("walltime:")[0].count("\n")
        assert rows["cluster.walltime"] == ("8:00:00", f"{SHIPPED}/cluster.yaml:{line}")
        assert rows["data_policy"] == ("any", "default")
        assert rows["providers.groq.description"][0] == "sk-p…"

    def test_values_are_frozen_and_made_by_name(self) -> None:
        provider = Provider(name="p", type="local", models=("m",))
        assert (provider.accounts, provider.litellm_provider) == ((Account(name="default"),), "hosted_vllm")
        with pytest.raises(ValueError, match="frozen"):
            provider.priority = 3  # type: ignore[misc]
        model = Model(key="m", context_length=100, architecture=Architecture(1, 2, 3, 4))
        assert (model.served_context, Model(key="m").served_context) == (100, None)
        assert model.model_copy(update={"vllm_args": {"max_model_len": 50}}).served_context == 50

    def test_litellm_is_not_imported(self) -> None:
        code = "import sys, biollm.config as c; c.load_config(); assert not {'litellm', 'httpx', 'rich'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_five_hundred_deployments_load_within_two_seconds(self, layer: Write) -> None:
        entry = {"hf_id": "o/m", "context_length": 32768, "vllm_args": {"dtype": "float16", "max_model_len": 32768}}
        models = {f"m{i}-{j}": entry for i in range(50) for j in range(10)}
        providers = {
            f"p{i}": {"type": "api", "base_url": "https://h/v1", "rate_limit": ["15/min"], "models": [f"m{i}-{j}" for j in range(10)]}
            for i in range(50)
        }  # fmt: skip
        folder = layer(models=yaml.safe_dump({"models": models}), providers=yaml.safe_dump({"providers": providers}))
        begin = time.process_time()
        assert len(load_config(folder).models) > 500
        assert time.process_time() - begin < 2


class TestStarter:
    def test_it_writes_files_that_load_and_change_nothing(self, tmp_path: Path) -> None:
        folder = tmp_path / "new" / "biollm"
        write_starter(folder)
        assert [path.name for path in sorted(folder.iterdir())] == ["cluster.yaml", "models.yaml", "providers.yaml"]
        assert load_config(folder).providers == load_config().providers
        assert not load_config(folder).warnings

    def test_what_is_commented_out_in_them_is_valid(self, tmp_path: Path) -> None:
        write_starter(tmp_path)
        for path in tmp_path.glob("*.yaml"):
            path.write_text(re.sub(r"^(  )# (?=.*[:{])|^# (?=data_policy)", r"\1", path.read_text(), flags=re.M))
        config = load_config(tmp_path)
        assert (config.cluster.gpu_type, config.data_policy) == ("a100", "no_training")
        assert limits(config, "groq") == ["30/min", "1000/day"]
        assert "deepseek-coder-v2" not in config.models

    def test_it_names_the_keys_it_found_and_never_overwrites(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        (tmp_path / "models.yaml").write_text("models: {a: {hf_id: o/a}}")
        lines = write_starter(tmp_path)
        assert f"kept {tmp_path}/models.yaml, which exists already" in lines
        assert "found OPENAI_API_KEY" in lines
        assert "GOOGLE_API_KEY is not set" in lines
        assert SECRET not in "".join(lines)
        assert (tmp_path / "models.yaml").read_text() == "models: {a: {hf_id: o/a}}"
