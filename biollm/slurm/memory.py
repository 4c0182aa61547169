"""Computes whether a model fits N GPUs, and with how many tokens.

vLLM knows only once it holds the GPUs and has loaded the weights; no library estimates this well offline. Per GPU:
memory x utilization - runtime - weights / (TP x PP) = room for the KV cache. The runtime's share is an assumption
(`OVERHEAD_GIB`), not measured on a GPU. For layers with a sliding window the KV cache is an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from biollm.config import Architecture, Cluster, Model
from biollm.config.values import token_count
from biollm.errors import DoesNotFitError, UsageError, nearest

GIB = 1024**3
OVERHEAD_GIB = 3.0  # CUDA context, activations, CUDA graphs, NCCL: assumed, about what vLLM reports on an H100
# GiB that torch reports as total, which is what gpu_memory_utilization multiplies
GPUS = {
    "h100": 79.1, "h100-94gb": 93.1, "h200": 139.8, "gh200": 94.5, "b200": 178.3, "a100": 79.1, "a100-40gb": 39.4,
    "a40": 44.4, "a10": 22.0, "a6000": 47.5, "l40s": 44.4, "l40": 44.4, "l4": 22.0, "v100": 31.7, "v100-16gb": 15.8,
    "t4": 14.6, "rtx4090": 23.6, "rtx3090": 23.6,
}  # fmt: skip
_BITS = {"fp8": 8, "int8": 8, "awq": 4.16, "gptq": 4.16, "mxfp4": 4.25}  # per weight, with scales; named so or within


@dataclass(frozen=True)
class Setup:
    """How vLLM would be started; sizes in GiB. `max_model_len` None means the model's own context."""

    gpu_gib: float
    tp: int = 1
    pp: int = 1
    utilization: float = 0.9
    quantization: str | None = None
    float32: bool = False
    kv_bytes: float = 2.0
    max_model_len: int | None = None
    expert_parallel: bool = False
    stretched: bool = False
    offload_gib: float = 0.0
    adapters: int = 0  # that the GPUs hold at a time
    adapter_rank: int = 16


@dataclass(frozen=True)
class FitReport:
    """Whether it fits, and the numbers behind it."""

    gpu_gib: float
    gpus: int  # of one replica: TP x PP
    tp: int
    pp: int
    budget_gib: float  # that vLLM may use on each GPU
    overhead_gib: float
    weights_gib: float
    weights_per_gpu_gib: float
    kv_gib: float  # KV cache of all GPUs, replicas of it (MLA) counted once
    kv_bytes_per_token: float  # of the whole model
    max_model_len: int  # tokens of one full sequence; `sequences` of them fit
    tokens: int  # that fit in the KV cache
    sequences: float
    fits: bool
    reasons: tuple[str, ...]  # why it does not start
    suggestions: tuple[str, ...] = ()  # each would make it fit


def fit(
    model: Model, cluster: Cluster, *, gpus: int | None = None, gpu: str | None = None,
    gpu_memory_utilization: float | None = None, quantization: str | None = None,
) -> FitReport:  # fmt: skip
    """Return whether `model` starts on the GPUs of `cluster`; the keywords override the settings of both.

    Args:
        gpus: Tensor-parallel size.
        gpu: A name of `GPUS`, or GiB as a number.
        gpu_memory_utilization: Share of each GPU that vLLM may use, 0 to 1.
        quantization: "fp8", "int8", "awq", ...
    """
    arch = architecture(model)
    args: dict[str, Any] = model.vllm_args
    kv_dtype: str = args.get("kv_cache_dtype", "auto")
    setup = Setup(
        gpu_gib=gpu_gib(gpu) if gpu else cluster.gpu_memory_gib,
        tp=gpus or args.get("tensor_parallel_size") or model.gpus_required or 1,
        pp=1 if gpus else args.get("pipeline_parallel_size", 1),
        utilization=gpu_memory_utilization or args.get("gpu_memory_utilization", 0.9),
        quantization=quantization or args.get("quantization"),
        float32=args.get("dtype") in ("float32", "float"),
        kv_bytes=1.0 if "8" in kv_dtype else 0.5 if "4" in kv_dtype else 2.0,
        max_model_len=token_count(args.get("max_model_len")),
        expert_parallel=args.get("enable_expert_parallel", False),
        stretched="hf_overrides" in args,
        offload_gib=args.get("cpu_offload_gb", 0.0),
        adapters=int(args.get("max_loras", 1)) if args.get("enable_lora") else 0,
        adapter_rank=int(args.get("max_lora_rank", 16)),
    )
    if setup.tp < 1 or setup.pp < 1 or not 0 < setup.utilization <= 1:
        raise UsageError(f"{model.key}: GPUs must be at least 1, gpu_memory_utilization above 0 and at most 1.")
    if quantization and _bits(quantization) is None:
        raise UsageError(f"Unknown quantization {quantization!r}.", hint=f"Known: {', '.join(_BITS)}.")
    report = compute(arch, setup)
    return report if report.fits else replace(report, suggestions=tuple(_suggest(arch, setup, report)))


def architecture(model: Model) -> Architecture:
    """Return a model's numbers; raise DoesNotFitError with how to get them, where models.yaml has none."""
    if model.architecture is None:
        source = f"{model.hf_id or 'ORG/NAME'} --config {model.path or '.'}/config.json"
        raise DoesNotFitError(
            f"The size of {model.key} is unknown: it has no `architecture:` in models.yaml.",
            hint=f"`biollm models add {source} --name NEW` writes an entry with the numbers, to use or to copy.",
        )
    return model.architecture


def compute(arch: Architecture, setup: Setup) -> FitReport:
    """Return the report of one setup, without suggestions."""
    weights = weight_bytes(arch, setup) / GIB
    share = max(0.0, weights / (setup.tp * setup.pp) - setup.offload_gib)
    share += setup.adapters * 2 * adapter_parameters(arch, setup.adapter_rank) / setup.pp / GIB  # 16 bits
    budget = setup.gpu_gib * setup.utilization
    room = max(0.0, budget - OVERHEAD_GIB - share)
    if arch.kv_lora_rank:
        per_layer = shard = (arch.kv_lora_rank + arch.rope_dim) * setup.kv_bytes  # every rank holds it whole
    else:
        heads, width = arch.kv_heads or arch.heads, arch.head_dim or arch.hidden // arch.heads
        per_layer = 2 * heads * width * setup.kv_bytes
        shard = per_layer / min(setup.tp, heads)
    tokens = int(room * GIB / (shard * -(-arch.layers // setup.pp)))
    own = arch.context or tokens
    length = own if setup.max_model_len is None else setup.max_model_len or min(tokens, own)
    reasons = tuple(_reasons(arch, setup, share, budget, tokens, length))
    return FitReport(
        gpu_gib=setup.gpu_gib, gpus=setup.tp * setup.pp, tp=setup.tp, pp=setup.pp,
        budget_gib=budget, overhead_gib=OVERHEAD_GIB, weights_gib=weights, weights_per_gpu_gib=share,
        kv_gib=tokens * per_layer * arch.layers / GIB, kv_bytes_per_token=per_layer * arch.layers,
        max_model_len=length, tokens=tokens, sequences=tokens / length if length else 0.0,
        fits=not reasons, reasons=reasons,
    )  # fmt: skip


def weight_bytes(arch: Architecture, setup: Setup) -> float:
    """Return the bytes of all weights on the GPUs: as published, or quantized to `setup.quantization`."""
    bits = _bits(setup.quantization or "")
    published = arch.weight_bytes or arch.parameters * 2
    if bits and setup.quantization != arch.dtype:
        kept = 2 * arch.vocab * arch.hidden  # embeddings and head stay at 16 bits
        return min(published, (arch.parameters - kept) * bits / 8 + kept * 2)
    return arch.parameters * 4 if setup.float32 else published


def adapter_parameters(arch: Architecture, rank: int) -> int:
    """Return the parameters of a LoRA adapter of all linear layers; an upper bound, for experts share their own.

    vLLM reserves room for them when it starts. Tensor parallelism divides only half of each, which is not counted.
    """
    queries = arch.heads * (arch.head_dim or arch.hidden // arch.heads)
    keys = arch.kv_lora_rank or arch.kv_heads * (arch.head_dim or arch.hidden // arch.heads)
    feed_forward = 3 * (arch.hidden + arch.intermediate) * max(1, arch.experts)
    return rank * arch.layers * (2 * (arch.hidden + queries) + 2 * (arch.hidden + keys) + feed_forward)


def _reasons(arch: Architecture, setup: Setup, share: float, budget: float, tokens: int, length: int) -> Iterator[str]:
    tp, heads = setup.tp, arch.kv_heads
    if arch.heads % tp:
        yield f"tensor_parallel_size {tp} does not divide its {arch.heads} attention heads."
    elif heads and heads % tp and tp % heads:
        yield f"tensor_parallel_size {tp} and its {heads} KV heads do not divide one another."
    elif arch.quant_block and not setup.expert_parallel and arch.intermediate % (tp * arch.quant_block):
        width = f"{arch.intermediate} / {tp} = {arch.intermediate / tp:g}"
        yield f"its FP8 blocks of {arch.quant_block} cannot be divided: {width} is not a multiple."
    if setup.pp > arch.layers:
        yield f"pipeline_parallel_size {setup.pp} is more than its {arch.layers} layers."
    if arch.context and length > arch.context and not setup.stretched:
        yield f"max_model_len {length} is more than the {arch.context} tokens of its own context."
    if share + OVERHEAD_GIB > budget:
        need = f"{share:.1f} GiB of weights and {OVERHEAD_GIB:g} GiB for the runtime on each GPU"
        yield f"it needs {need}; vLLM may use {budget:.1f} GiB."
    elif tokens < length or not tokens:
        yield f"its KV cache holds {tokens} tokens; one sequence of max_model_len has {length}."


def _suggest(arch: Architecture, setup: Setup, report: FitReport) -> Iterator[str]:
    """Yield those single changes that would make it fit."""

    def works(**change: Any) -> bool:
        return compute(arch, replace(setup, **change)).fits

    length = min(report.tokens, arch.context or report.tokens) // 1024 * 1024
    if length and works(max_model_len=length):
        yield f"a shorter context (max_model_len: {length})"
    if more := next((n for n in (2, 4, 8, 16, 32, 64) if n > setup.tp and works(tp=n)), None):
        yield f"more GPUs (tensor_parallel_size: {more})"
    if arch.experts and not setup.expert_parallel and works(expert_parallel=True):
        yield "whole experts on each GPU (enable_expert_parallel: true)"
    if setup.kv_bytes > 1 and works(kv_bytes=1.0):
        yield "a KV cache of half the size (kv_cache_dtype: fp8)"
    if setup.utilization < 0.95 and works(utilization=0.95):
        yield "more of each GPU (gpu_memory_utilization: 0.95)"
    if works(quantization="fp8"):
        yield "FP8 weights (quantization: fp8), or an INT8 checkpoint"
    elif works(quantization="awq"):
        yield "a 4-bit AWQ checkpoint (another hf_id)"


def gpu_gib(name: str) -> float:
    """Return the GiB of a GPU given by a name of `GPUS`, or as a number."""
    plain = name.lower().removeprefix("nvidia").strip(" -_")
    if plain in GPUS:
        return GPUS[plain]
    if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:gib|gb|g)?", plain):
        return float(match[1])
    hint = f"{nearest(plain, GPUS, repr)} Known: {', '.join(GPUS)}, or its GiB as a number.".lstrip()
    raise UsageError(f"Unknown GPU {name!r}.", hint=hint)


def _bits(quantization: str) -> float | None:
    return next((bits for name, bits in _BITS.items() if name in quantization), None)
