"""Health check: which providers are there, and how fast they say so; sends no billable tokens."""

from biollm.client import check_all_providers

status = check_all_providers()
# {
#   "lightning": {"available": True, "latency_ms": 120},
#   "gemini": {"available": True, "latency_ms": 85},
#   "vllm": {"available": False, "error": "Server not running"},
# }
print(status)
