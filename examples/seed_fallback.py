"""With fallback: providers are tried in priority order until one works."""

# fmt: off
from biollm.client import ModelRouter

router = ModelRouter()

# Will try providers in priority order until one works
response = router.complete(
    prompt="Analyze this error log...",
    fallback=True,
    max_retries=3
)
print(response)
