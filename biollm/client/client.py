"""The client: takes prompts and options, and asks this user's running gateway or the waterfall in this process.

Where a gateway runs, neither the configuration, LiteLLM nor pydantic is imported: a script starts in half the time.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack, overload

from biollm.client import attachments, remote
from biollm.client.options import RATINGS, Defaults, Options, Prompt, TypedOptions, cache_of, check, make_request
from biollm.config.paths import wants_local_only
from biollm.errors import CompletionError, UnknownNameError, UsageError
from biollm.routing.normalize import at_least, checked, text
from biollm.types import DATA_POLICIES, Completion, DataPolicy, Piece

if TYPE_CHECKING:
    from pydantic import BaseModel

    from biollm.client.ensemble import EnsembleCompletion, Method
    from biollm.client.local import Local, LocalCall
    from biollm.config import Config, Limit
    from biollm.ledger.ratings import Rating
    from biollm.routing.candidates import Candidate
    from biollm.routing.deployments import Deployment
    from biollm.routing.request import Request

Parsed = TypeVar("Parsed", bound="BaseModel")


class Client:
    """Sends prompts down the waterfall. Usable from threads, inside a running event loop, and after a fork.

    Where this user's gateway runs with the same configuration (`biollm serve`), it answers instead; BIOLLM_GATEWAY
    is `off`, or the URL of another one.

    Args:
        provider, model: Only these deployments may answer, unless a call names others. The model may be "provider/model".
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
        self._dir = Path(config_dir) if config_dir is not None else None
        self._defaults = check(
            {"provider": provider, "model": model, **defaults}, Options.__optional_keys__ - {"messages", "attachments"}
        )
        self._local: Local | None = None
        self.reload()

    def reload(self) -> None:
        """Read the configuration again; requests in flight go on with the old one."""
        identity, local = remote.identity(), None
        named = self._defaults.get("provider") or self._defaults.get("model")  # checked against the configuration
        if self._dir or named or remote.named() or not remote.nearby(identity):
            local = self._read()
        self._identity, self._local = identity, local  # at once: other threads send requests

    @property
    def config(self) -> Config:
        """The configuration. It is read when something must be done in this process, and a mistake raised then."""
        return self._load().config

    def _load(self) -> Local:
        if (local := self._local) is None:
            identity, local = remote.identity(), self._read()
            self._identity, self._local = identity, local
        return local

    def _read(self) -> Local:
        from biollm.client.local import Local

        local = Local(self._dir, self.policy)
        local.check_names(self._defaults.get("provider"), self._defaults.get("model"))
        return local

    @overload
    def complete(
        self, prompt: Prompt | None = None, *, response_model: type[Parsed], **options: Unpack[TypedOptions]
    ) -> Completion[Parsed]: ...
    @overload
    def complete(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion: ...
    def complete(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion:
        """Return an answer to `prompt`, a text or OpenAI-shaped messages; `messages=` is another name for the latter.

        Raises:
            CompletionError: No deployment could answer; `attempts` lists the reasons. Its subclasses: AllLimitedError,
                KeysRefusedError, RequestRejectedError, DeadlineError.
            UsageError: An option does not exist, or does not fit.
        """
        return self._route(partial(self._request, prompt, _loaded(options))).complete()

    @overload
    async def acomplete(
        self, prompt: Prompt | None = None, *, response_model: type[Parsed], **options: Unpack[TypedOptions]
    ) -> Completion[Parsed]: ...
    @overload
    async def acomplete(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion: ...
    async def acomplete(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Completion:
        """Like `complete`; cancelling it cancels the request."""
        options = await _aloaded(options)
        return await self._route(partial(self._request, prompt, options)).acomplete()

    def fill_in_middle(self, prefix: str, suffix: str | None, **options: Unpack[Options]) -> Completion:
        """Return the code that belongs between `prefix` and `suffix`, from a local model that has tokens for it.

        Without a suffix, what follows `prefix` as any local model's server continues it; it may hold such tokens.

        Raises:
            CompletionError: No server of such a model runs (capability "fill-in-middle", `fim` in models.yaml).
        """
        return self._route(partial(self._gap, prefix, suffix, options)).complete()

    async def afill_in_middle(self, prefix: str, suffix: str | None, **options: Unpack[Options]) -> Completion:
        """Like `fill_in_middle`."""
        return await self._route(partial(self._gap, prefix, suffix, options)).acomplete()

    def stream(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> Iterator[Piece]:
        """Yield the answer as it comes; `str()` of a piece is its text. The last piece holds the Completion.

        Raises:
            InterruptedStreamError: It broke after some text; `partial` holds that.
            CompletionError: No deployment could answer.
        """
        return self._route(partial(self._streamable, prompt, _loaded(options))).stream()

    def astream(self, prompt: Prompt | None = None, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Like `stream`, for `async for`."""
        if not options.get("attachments"):
            return self._route(partial(self._streamable, prompt, options)).astream()
        return self._astream(prompt, options)

    async def _astream(self, prompt: Prompt | None, options: Options) -> AsyncGenerator[Piece, None]:
        options = await _aloaded(options)
        async with aclosing(self._route(partial(self._streamable, prompt, options)).astream()) as pieces:
            async for piece in pieces:
                yield piece

    @overload
    def complete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        response_model: type[Parsed],
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[TypedOptions],
    ) -> list[Completion[Parsed] | CompletionError]: ...
    @overload
    def complete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]: ...
    def complete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]:
        """Return an answer to each prompt, in order, or its CompletionError, which is not raised.

        Args:
            prompts: Texts or lists of messages.
            concurrency: How many are in flight at once.
            progress: Called with (done, all) after each.
            options: As in `complete`.
        """
        self._load()
        from biollm._runtime import background

        return background().run(self._many(prompts, concurrency, progress, options))

    @overload
    async def acomplete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        response_model: type[Parsed],
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[TypedOptions],
    ) -> list[Completion[Parsed] | CompletionError]: ...
    @overload
    async def acomplete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]: ...
    async def acomplete_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 8,
        progress: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Completion | CompletionError]:
        """Like `complete_many`."""
        from biollm._runtime import background

        return await background().arun(self._many(prompts, concurrency, progress, options))

    def ensemble(
        self,
        prompt: Prompt | None = None,
        *,
        members: int | Sequence[str] = 3,
        method: Method | None = None,
        quorum: int | None = None,
        judge: str | None = None,
        **options: Unpack[Options],
    ) -> EnsembleCompletion:
        """Return one answer of several models that are asked at once.

        Args:
            prompt: As in `complete`.
            members: How many deployments that are ready now, one per account first; or models, "provider/model" too.
                The embedded model is never one.
            method: "vote" takes the value of the majority, in each field of a structured answer; "judge" has a model
                choose one. By default structured answers are voted on, and texts judged.
            quorum: How many members must answer; by default more than half.
            judge: The model that judges; by default the first that can answer.
            options: As in `complete`; `deadline` is for all together, members that are late are left out.

        Raises:
            CompletionError: Fewer members than the quorum answered.
            UsageError: An option does not exist, or does not fit.
        """
        from biollm._runtime import background

        self._load()
        return background().run(
            self.aensemble(prompt, members=members, method=method, quorum=quorum, judge=judge, **options)
        )

    async def aensemble(
        self,
        prompt: Prompt | None = None,
        *,
        members: int | Sequence[str] = 3,
        method: Method | None = None,
        quorum: int | None = None,
        judge: str | None = None,
        **options: Unpack[Options],
    ) -> EnsembleCompletion:
        """Like `ensemble`."""
        from biollm._runtime import apart
        from biollm.client import ensemble

        whole: Options = await _aloaded({**self._defaults, **check(options)})
        found = (
            await apart(partial(self.explain, prompt or (None if whole.get("messages") else ""), **whole))
            if isinstance(members, int)
            else ()
        )
        return await ensemble.ask(
            self, prompt, whole, found, members=members, method=method, quorum=quorum, judge=judge
        )

    def explain(self, prompt: Prompt = "", **options: Unpack[Options]) -> Sequence[Candidate]:
        """Return each deployment with its status and, if it would not be used, the reason.

        Sends nothing but a look at replicas' metrics. It takes this process's configuration and keys, also where
        BIOLLM_GATEWAY names another gateway.
        """
        local = self._load()
        return local.explain(self._request(prompt, options, may_be_empty=True))

    def used(self, deployment: Deployment) -> list[tuple[Limit, float, float | None]]:
        """Return each limit of the deployment's account, how much of it is used, and when it resets (epoch seconds)."""
        from biollm._runtime import ledger

        return ledger(self.config).used(deployment.scope, deployment.limits)

    def rate(self, answer: Completion | str, rating: Rating, *, correction: str | None = None) -> bool:
        """Mark an answer, for `usage --by rating` and for fine-tuning; return whether its prompt and text are kept.

        They are where `store_rated` is set in providers.yaml; only then is a correction kept, too.

        Args:
            answer: The answer, or its id: 6 letters or more, or "last".
            rating: "up" or "down".
            correction: What the answer should have been; without it, "down" keeps the earlier one, and "up" removes it.

        Raises:
            UsageError: This user's history has no such answer, or several.
        """
        from biollm._runtime import ledger, ratings

        checked({"rating": rating}, RATINGS)
        ledger(self.config).flush()
        return ratings().rate(answer if isinstance(answer, str) else answer.id, rating, correction)[1]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        from biollm._runtime import ledger

        ledger(self.config).flush()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        from biollm._runtime import apart

        await apart(self.__exit__)

    def policy(self, *calls: Options) -> DataPolicy:
        """Return the data policy: the strictest of the configuration's, the environment's, the client's and the calls'.

        Before the configuration is read, without its own: a gateway with the same one adds that.
        """
        every = (self._defaults, *calls)
        if wants_local_only() or any(options.get("local_only", False) for options in every):
            return "local_only"
        policies: list[DataPolicy] = [options.get("data_policy", "any") for options in every]
        if local := self._local:  # once: another thread may be in `reload`
            policies.append(local.config.data_policy)
        return max(policies, key=DATA_POLICIES.index)

    def caches(self, options: Options) -> bool:
        """Return whether a call with these options takes and keeps stored answers."""
        return bool(cache_of({**self._defaults, **options}))

    def uses_gateway(self) -> bool:
        """Return whether a gateway is asked, where the options of a call allow it."""
        return self._dir is None and (bool(remote.named()) or remote.nearby(self._identity) is not None)

    def _request(self, prompt: Prompt | None, options: Options, *, may_be_empty: bool = False) -> Request:
        if isinstance(prompt, str) and not (prompt.strip() or options.get("attachments") or may_be_empty):
            raise UsageError("The prompt is empty.")
        request = make_request(prompt, self._defaults, options, self.policy)
        if local := self._local:  # else the gateway checks them
            provider, model = local.check_names(request.requirements.provider, request.requirements.model)
            request = replace(request, requirements=replace(request.requirements, provider=provider, model=model))
        return request

    def _streamable(self, prompt: Prompt | None, options: Options) -> Request:
        request = self._request(prompt, options)
        if request.schema:
            raise UsageError("A stream has no response_model.", hint="Use complete() or acomplete().")
        if request.params.get("n", 1) != 1:
            raise UsageError("A stream has one choice; n must be 1.", hint="Use complete() or acomplete().")
        return request

    def _gap(self, prefix: str, suffix: str | None, options: Options) -> Request:
        given = {"prefix": prefix, "suffix": suffix or ""}
        checked(given, dict.fromkeys(given, ("a string", lambda text: isinstance(text, str))))
        request = self._request(prefix + (suffix or ""), options, may_be_empty=True)
        if request.schema or request.requirements.tools:
            raise UsageError("Filling in code takes no response_model and no tools.")
        requirements = replace(request.requirements, fim=suffix is not None, raw=suffix is None)
        return replace(request, middle=(text(prefix), suffix and text(suffix)), requirements=requirements)

    def _route(self, make: Callable[[], Request]) -> remote.Connection | LocalCall:
        """Return what answers a request: a connection to the gateway, or this process's waterfall."""
        local, request = self._local, make()
        if self._dir is None:
            cluster = local.config.cluster if local else None
            if connection := remote.reach(remote.body_of(request), self._identity, cluster):
                return connection
        if local is None:
            self._load()
            request = make()  # again: the configuration has names to check, and a data policy
        return self._load().call(request)

    def _numbered(self, at: int, prompt: Prompt, options: Options) -> Request:
        """Return the request of one of many prompts; a wrong one is named by its place."""
        try:
            return self._request(prompt, options)
        except UnknownNameError:
            raise
        except UsageError as error:
            raise UsageError(f"prompts[{at}]: {error}", hint=error.hint) from None

    async def _many(
        self,
        prompts: Iterable[Prompt],
        concurrency: int,
        progress: Callable[[int, int], None] | None,
        options: Options,
    ) -> list[Completion | CompletionError]:
        from biollm.client.local import gather

        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):  # pyright: ignore
            raise UsageError("prompts must be a list of prompts, not a single one.", hint="Use complete() for one.")
        checked({"concurrency": concurrency}, {"concurrency": at_least(1)})
        self._load()
        options = await _aloaded(check(options))
        requests = [self._numbered(at, prompt, options) for at, prompt in enumerate(prompts)]

        async def one(request: Request) -> Completion:
            request = replace(request, asked=time.monotonic())
            return await self._route(lambda: request).acomplete()

        return await gather([partial(one, request) for request in requests], concurrency, progress)


def _loaded(options: Options) -> Options:
    """Return the options with the attachments read, once for all that is made of them."""
    given = check(options).get("attachments")
    return {**options, "attachments": attachments.read(given)} if given else options


async def _aloaded(options: Options) -> Options:
    from biollm._runtime import apart

    return await apart(_loaded, options) if options.get("attachments") else options


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
