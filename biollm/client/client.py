"""The client: options, one waterfall per configuration, and the way to a running gateway."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from biollm._runtime import apart, background, called, ledger, watch
from biollm.client.remote import Line, body_of, identity, reach
from biollm.config import Config, Limit, load_config
from biollm.config.paths import environment_tags, state_dir, wants_local_only
from biollm.errors import (
    BiollmError,
    CompletionError,
    ContentPolicyError,
    DeadlineError,
    InterruptedStreamError,
    RequestRejectedError,
    UsageError,
    nearest,
)
from biollm.routing import import_waterfall, load_balancing
from biollm.routing.candidates import Candidate, DeploymentPool, check_names, explain
from biollm.routing.deployments import Deployment, Requirements
from biollm.routing.normalize import ANSWER_SIZES, Reader, text, texts
from biollm.routing.request import Request
from biollm.routing.structured import Message, ResponseSchema
from biollm.types import DATA_POLICIES, Completion, DataPolicy, Piece

if TYPE_CHECKING:
    from pydantic import BaseModel

    from biollm.routing.waterfall import Waterfall
    from biollm.slurm.endpoints import Watch
    from biollm.slurm.submissions import Job

Prompt = str | Sequence[Message]
# Usual text has fewer than 5 characters and more than 3 bytes to a token; a chat template adds tokens of its own.
_CHARS_PER_TOKEN, _BYTES_PER_TOKEN, _PER_MESSAGE, _TEMPLATE = 5, 3, 16, 256
_STEP = 1.0  # seconds between two looks at a server that starts
_WATERFALLS = 8  # kept in a process
_SENT_ON = ("temperature", "max_tokens", "tools", "tool_choice")


class Defaults(TypedDict, total=False):
    """What `get_model_client` and every call take; a call's own wins.

    Attributes:
        system: The system message.
        temperature, tools, tool_choice: As in OpenAI's API.
        max_tokens: Of the longest answer. A model with room for less is asked for less, though for at least 2,048.
        extra: Further arguments of OpenAI's API (`seed`, `stop`, `top_p`, ...).
        timeout: Seconds per attempt; for a stream to its first content, and between chunks.
        deadline: Seconds for the whole call.
        fallback: False asks only the first deployment that may serve, and raises its own error.
        max_retries: Further passes over the waterfall when rungs failed for a passing reason; with
            `fallback=False`, repeats on the same deployment.
        local_only: True keeps the prompt on this machine and the cluster.
        data_policy: "no_training" leaves out providers that train on prompts, "local_only" is `local_only=True`; it
            tightens what the configuration says and never loosens it.
        response_model: A pydantic class, or a JSON Schema; the answer is in `Completion.parsed`.
        capability: Only models that list it, such as "reasoning".
        allow_degraded: Whether the small embedded model may answer; False unless set, and always False
            unless set in this call where `response_model` is given.
        tags: Stored with the usage record, such as {"agent": "ErrorDiagnosisAgent"}.
        on_interrupt: What a stream does that breaks after some text: "raise", or "restart" on the next rung.
        on_send: Called with a deployment's id just before a request goes to it.
        start_local: Whether to start a server on the cluster when nobody else can answer; the embedded model is
            then asked only if that fails.
        wait: Seconds to wait for that server; None is without end.
        on_state: Called with its job (`biollm.slurm.Job`) whenever that has changed.
        patience: Seconds to wait for an earlier deployment that frees so soon, before a later one is asked; None is
            the configuration's.
    """

    system: str | None
    temperature: float | None
    max_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    extra: Mapping[str, Any]
    timeout: float | None
    deadline: float | None
    fallback: bool
    max_retries: int
    local_only: bool
    data_policy: DataPolicy
    response_model: type[BaseModel] | Mapping[str, Any] | None
    capability: str | None
    allow_degraded: bool
    tags: Mapping[str, str]
    on_interrupt: Literal["raise", "restart"]
    on_send: Callable[[str], None] | None
    start_local: bool
    wait: float | None
    on_state: Callable[[Job], None] | None
    patience: float | None


class Options(Defaults, total=False):
    """What `complete`, `acomplete`, `stream`, `astream` and `complete_many` take beside the prompt.

    Attributes:
        provider, model: Only these deployments may answer; they replace the client's own.
    """

    provider: str | None
    model: str | None


class Client:
    """Asks the waterfall. Usable from threads, inside a running event loop, and after a fork.

    Where this user's gateway runs with the same configuration (`biollm serve`), it is asked instead; BIOLLM_GATEWAY
    says `off`, or the URL of another one.

    Args:
        provider, model: Only these deployments may answer, unless a call says otherwise.
        config_dir: The folder with models.yaml and providers.yaml; else the usual layers.
        defaults: Options of every call.

    Raises:
        ConfigError: A YAML file is wrong.
        UnknownNameError: The provider or the model is not configured.
    """

    def __init__(
        self,
        provider: str | None = None,
        model: str | None = None,
        *,
        config_dir: str | Path | None = None,
        **defaults: Unpack[Defaults],
    ) -> None:
        _check_options({**defaults})
        self._dir = Path(config_dir) if config_dir is not None else None
        self._defaults: Options = {"provider": provider, "model": model, **defaults}
        self.reload()

    def reload(self) -> None:
        """Read the configuration again; requests under way go on with the old one."""
        self._identity = identity()
        self.config: Config = load_config(self._dir)
        check_names(self.config, self._defaults.get("provider"), self._defaults.get("model"))
        self._told = repr(self.config)
        kept = background().kept
        for key in [key for key in list(kept) if key[:2] == ("waterfall", self._told)]:  # keys may have changed
            _let_go(kept.pop(key, None))

    def complete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Return an answer to `prompt`, a text or OpenAI-shaped messages.

        Raises:
            CompletionError: Nobody could answer; `attempts` says why. Its subclasses: AllLimitedError,
                KeysRefusedError, RequestRejectedError, DeadlineError.
            UsageError: An option does not exist, or does not fit.
        """
        return self._sync(self._request(prompt, options))

    async def acomplete(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """Like `complete`; cancelling it cancels the request."""
        return await self._async(self._request(prompt, options))

    def fill_in_middle(self, prefix: str, suffix: str | None, **options: Unpack[Options]) -> Completion:
        """Return the code that belongs between `prefix` and `suffix`, from a local model that has tokens for it.

        Without a suffix, what follows `prefix` as any local model's server continues it; it may hold such tokens.

        Raises:
            CompletionError: No server of such a model runs (capability "fill-in-middle", `fim` in models.yaml).
        """
        return self._sync(self._gap(prefix, suffix, options))

    async def afill_in_middle(self, prefix: str, suffix: str | None, **options: Unpack[Options]) -> Completion:
        """Like `fill_in_middle`."""
        return await self._async(self._gap(prefix, suffix, options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Piece]:
        """Yield the answer as it comes; `str()` of a piece is its text. The last piece holds the Completion.

        Raises:
            InterruptedStreamError: It broke after some text; `partial` holds that.
            CompletionError: Nobody could answer.
        """
        request = self._streamable(prompt, options)
        line = self._line(request)
        return line.stream() if line else background().iterate(self._stream(request))

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Like `stream`, for `async for`."""
        request = self._streamable(prompt, options)
        line = self._line(request)
        return line.astream() if line else background().aiterate(self._stream(request))

    def complete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]:
        """Return an answer to each prompt, in order; one that nobody could answer is its error, not raised.

        Args:
            prompts: Texts or lists of messages.
            concurrency: How many are under way at once.
            progress: Called with (done, all) after each.
            options: As in `complete`.
        """
        return background().run(self._many(list(prompts), concurrency, progress, options))

    async def acomplete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]:
        """Like `complete_many`."""
        return await background().arun(self._many(list(prompts), concurrency, progress, options))

    def explain(self, prompt: Prompt = "", **options: Unpack[Options]) -> Sequence[Candidate]:
        """Return who would answer now and why each other would not; sends nothing but a look at replicas' metrics.

        It looks with this process's configuration and keys, also where BIOLLM_GATEWAY names another gateway.
        """
        request = self._request(prompt, options)
        rungs = DeploymentPool(self.config, ledger(), state_dir(), self.policy(), watch(self.config.cluster).alive)
        found = explain(rungs, request.requirements)
        return background().run(load_balancing.of_process().weighed(found, rungs))

    def used(self, deployment: Deployment) -> list[tuple[Limit, float, float | None]]:
        """Return each limit of the deployment's account, how much of it is used, and when it resets (epoch seconds)."""
        return ledger().used(deployment.scope, deployment.limits)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        ledger().flush()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await apart(ledger().flush)

    def policy(self, *calls: Options) -> DataPolicy:
        """Return the data policy: the strictest of what configuration, environment, client and these calls say."""
        environment = wants_local_only()
        asked: list[DataPolicy] = [self.config.data_policy]
        for options in (self._defaults, *calls):
            asked.append(options.get("data_policy", "any"))
            environment = environment or options.get("local_only", False)
        if environment:
            return "local_only"
        return max(asked, key=DATA_POLICIES.index)

    def _request(self, prompt: Prompt, options: Options) -> Request:
        _check_options(options)
        chosen: Options = {**self._defaults, **options}
        # Naming only a provider drops the client's own model too.
        named = options if (options.get("provider"), options.get("model")) != (None, None) else self._defaults
        provider, model = named.get("provider"), named.get("model")
        check_names(self.config, provider, model)
        read = Reader()
        messages = read.messages(prompt, chosen.get("system"))
        params = read.params(chosen.get("extra", {}), "extra.")
        params |= read.params({key: value for key, value in chosen.items() if key in _SENT_ON})
        wanted = chosen.get("response_model")
        if isinstance(wanted, Mapping):
            wanted = read.value(wanted, "response_model")
        degraded = options.get("allow_degraded", False if wanted else chosen.get("allow_degraded", False))
        requirements = Requirements(
            provider=provider,
            model=model,
            policy=self.policy(options),
            tools="tools" in params,
            capability=chosen.get("capability"),
            prompt=read.letters // _CHARS_PER_TOKEN,
            prompt_most=read.size // _BYTES_PER_TOKEN + _PER_MESSAGE * len(messages) + _TEMPLATE,
            answer=min((params[name] for name in ANSWER_SIZES & params.keys()), default=None),
            media=frozenset(read.media),
            allow_degraded=degraded,
        )
        return Request(
            messages=messages,
            params=params,
            requirements=requirements,
            timeout=_positive("timeout", chosen.get("timeout")),
            deadline=_positive("deadline", chosen.get("deadline")),
            fallback=chosen.get("fallback", True),
            max_retries=_number("max_retries", chosen.get("max_retries")) or 0,
            schema=ResponseSchema(wanted) if wanted is not None else None,
            tags=texts({**environment_tags(), **chosen.get("tags", {})}),
            on_interrupt=chosen.get("on_interrupt", "raise"),
            on_send=chosen.get("on_send"),
            start=chosen.get("start_local", False),
            wait=_positive("wait", chosen.get("wait")),
            on_state=chosen.get("on_state"),
            patience=_patience(chosen.get("patience")),
        )

    def _line(self, request: Request) -> Line | None:
        """Return a connection to a gateway with this configuration; it saves the import of LiteLLM."""
        return reach(body_of(request), self._identity, self.config.cluster) if self._dir is None else None

    def _streamable(self, prompt: Prompt, options: Options) -> Request:
        request = self._request(prompt, options)
        if request.schema:
            raise UsageError("A stream has no response_model.", hint="Use complete() or acomplete().")
        if request.params.get("n", 1) != 1:
            raise UsageError("A stream has one choice; n must be 1.", hint="Use complete() or acomplete().")
        return request

    def _gap(self, prefix: str, suffix: str | None, options: Options) -> Request:
        request = self._request(prefix + (suffix or ""), options)
        if request.schema or request.requirements.tools:
            raise UsageError("Filling in code takes no response_model and no tools.")
        middle = (text(prefix), suffix and text(suffix))
        return replace(
            request,
            middle=middle,
            requirements=replace(request.requirements, fim=suffix is not None, raw=suffix is None),
        )

    def _sync(self, request: Request) -> Completion:
        line = self._line(request)
        return line.complete() if line else background().run(self._complete(request))

    async def _async(self, request: Request) -> Completion:
        line = self._line(request)
        return await (line.acomplete() if line else background().arun(self._complete(request)))

    async def _complete(self, request: Request) -> Completion:
        if request.schema:
            request.schema.check()
        if request.start:
            first = replace(request, requirements=replace(request.requirements, allow_degraded=False))
            try:
                return await (await self._waterfall(request)).complete(first)
            except CompletionError as error:
                missed = await self._start(request, error)
                try:
                    return await (await self._waterfall(request)).complete(request)
                except CompletionError as error:
                    raise missed or error from None
        return await (await self._waterfall(request)).complete(request)

    async def _stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        missed: BiollmError | None = None
        if request.start:
            first = replace(request, requirements=replace(request.requirements, allow_degraded=False))
            try:
                async for piece in (await self._waterfall(request)).stream(first):
                    yield piece
            except InterruptedStreamError:
                raise
            except CompletionError as error:
                missed = await self._start(request, error)
            else:
                return
        try:
            async for piece in (await self._waterfall(request)).stream(request):
                yield piece
        except InterruptedStreamError:
            raise
        except CompletionError as error:
            raise missed or error from None

    async def _start(self, request: Request, error: CompletionError) -> BiollmError | None:
        """Start a server on the cluster after `error`; return why not where the embedded model may still answer.

        The job stays when the deadline passes or the caller leaves. No thread waits: a step is short.
        """
        from biollm import slurm
        from biollm.routing import on_demand

        if isinstance(error, RequestRejectedError | ContentPolicyError | DeadlineError):
            raise error
        cluster = self.config.cluster
        try:
            async with request.in_time(lambda: error.attempts):
                model = await apart(on_demand.startable, self.config, request.requirements)
                steps = slurm.ensuring(model, cluster, timeout=request.wait, on_state=request.on_state)
                while not await apart(next, steps, True):  # noqa: ASYNC110 # other processes set no event
                    await asyncio.sleep(_STEP)
                await apart(watch(cluster).refresh)
        except DeadlineError:
            raise
        except BiollmError as missed:
            if not request.requirements.allow_degraded:
                raise
            return missed
        return None

    async def _many(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        progress: Callable[[int, int], None] | None,
        options: Options,
    ) -> list[Completion | CompletionError]:
        if concurrency < 1:
            raise UsageError(f"concurrency is {concurrency}; it must be at least 1.")
        requests = [self._request(prompt, options) for prompt in prompts]
        gate, done = asyncio.Semaphore(concurrency), 0

        async def one(request: Request) -> Completion | CompletionError:
            nonlocal done
            async with gate:
                try:
                    answer: Completion | CompletionError = await self._async(replace(request, asked=time.monotonic()))
                except CompletionError as error:
                    answer = error
            done += 1
            if progress:
                called(progress, done, len(requests))
            return answer

        tasks = [asyncio.ensure_future(one(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # an error of `progress` or `on_send`, or an interrupt, ends the others too
            for task in tasks:
                task.cancel()

    async def _waterfall(self, request: Request) -> Waterfall:
        """Return the process's waterfall for this configuration; made on first use, which imports LiteLLM."""
        async with request.in_time():
            return await self._made()

    async def _made(self) -> Waterfall:
        servers, kept, policy = watch(self.config.cluster), background().kept, self.policy()
        if not servers.awake:
            await apart(servers.alive)
        key = ("waterfall", self._told, policy, state_dir())
        making = kept.pop(key, None)
        if making is None or (making.done() and (making.cancelled() or making.exception())):
            making = asyncio.ensure_future(apart(self._make, policy, servers))
        kept[key] = making  # the one that was used last is the last
        for old in [each for each in list(kept) if each[0] == "waterfall"][:-_WATERFALLS]:
            _let_go(kept.pop(old))
        return await asyncio.shield(making)

    def _make(self, policy: DataPolicy, servers: Watch) -> Waterfall:
        made = import_waterfall()
        return made(DeploymentPool(self.config, ledger(), state_dir(), policy, servers.latest))


ModelRouter = Client


def get_model_client(
    provider: str | None = None,
    model: str | None = None,
    *,
    config_dir: str | Path | None = None,
    **defaults: Unpack[Defaults],
) -> Client:
    """Return a Client; see there."""
    return Client(provider, model, config_dir=config_dir, **defaults)


def _let_go(making: asyncio.Future[Waterfall] | None) -> None:
    """Take what a waterfall registered with LiteLLM back; requests under way go on."""
    if making and making.done() and not making.cancelled() and not making.exception():
        making.result().discard()


def _check_options(options: Options) -> None:
    known = Options.__optional_keys__
    for name in options:
        if name not in known:
            hint = nearest(name, known) or "Further arguments of the API go into extra={...}."
            raise UsageError(f"There is no option {name!r}.", hint=hint)
    if (policy := options.get("data_policy", "any")) not in DATA_POLICIES:
        raise UsageError(f"data_policy is {policy!r}; it must be one of {', '.join(DATA_POLICIES)}.")
    if (then := options.get("on_interrupt", "raise")) not in ("raise", "restart"):
        raise UsageError(f"on_interrupt is {then!r}; it must be raise or restart.")


def _number(name: str, given: Any) -> Any:
    """Return a number, numpy's as Python's."""
    number = Reader().value(given, name)
    if isinstance(number, str | list | dict | bool):
        raise UsageError(f"{name} is {given!r}; it must be a number.")
    return number


def _patience(given: float | None) -> float | None:
    seconds = _number("patience", given)
    if seconds is not None and not 0 <= seconds < math.inf:
        raise UsageError(f"patience is {seconds:g}; it must be 0 or more seconds.")
    return seconds


def _positive(name: str, given: float | None) -> float | None:
    seconds = _number(name, given)
    if seconds is not None and seconds <= 0:
        raise UsageError(f"{name} is {seconds:g}; it must be more than 0 seconds.")
    return seconds
