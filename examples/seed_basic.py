"""Basic usage: the best provider that is available answers, or the one you name."""

from biollm.client import get_model_client

# Auto-selects best available provider
client = get_model_client()
response = client.complete("Fix this Python error...")

# Force specific provider
client = get_model_client(provider="vllm", model="qwen-coder-32b")

print(response)
