"""Completions drawn by vLLM, in this process or on a server that takes weights.

Weights go through vLLM's weight-transfer API before every step, and the prefix cache is emptied after: its keys and
values are those of the old weights. Each completion has a seed made of (seed, step, row), and all of a step are handed
in together in the same order, so a resumed run draws what an uninterrupted one does, as far as vLLM's kernels do.

A server: `VLLM_SERVER_DEV_MODE=1 almost-serve policy --model MODEL --weight-transfer-config '{"backend": "almost"}'`
(or `"nccl"`), at a temperature other than 1 with `--logprobs-mode processed_logprobs`. Its routes change weights: keep
it on 127.0.0.1.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from almost_eval.engines.seeding import request_seed
from almost_eval.engines.vllm_process import RECEIVER, VLLMOptions, load, register_receiver, release, run
from almost_eval.errors import InputError, RunError
from almost_eval.models.checkpoint import refuse_stray_weights
from almost_eval.models.endpoints import EndpointAddress, read_key, server_words
from almost_eval.models.loading import first_line
from almost_eval.types import JSONObject
from almost_train.common.processes import is_main, wait_for_all
from almost_train.common.seeding import own_random_state
from almost_train.rlsf.job import Job, RLSFSettings
from almost_train.rlsf.rollouts import Sampled, TokenIds, as_sampled, end_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIMEOUT = 600.0
"""Seconds that one answer of the server may take."""


def _seed(job: Job, step: int, row: int) -> int:
    return request_seed(job.settings.seed, f"step {step}", row)


def _as_sampled(job: Job, model: PreTrainedModel, ids: list[int], logprobs: Sequence[float]) -> Sampled:
    """What was drawn, up to its end, with the log-probabilities of the tokens that are left."""
    if not ids or len(ids) != len(logprobs):
        raise RunError(f"vLLM returned {len(ids)} tokens and {len(logprobs)} log-probabilities for a completion")
    sampled = as_sampled(job.tokenizer, ids, frozenset(end_ids(model, job.tokenizer)), job.settings.stop)
    return replace(sampled, logprobs=tuple(logprobs[: len(sampled.token_ids)]))


class VLLMSampler:
    """vLLM in this process, beside the model in training.

    Raises:
        ModelError: vLLM cannot run the policy.
    """

    def __init__(self, job: Job) -> None:
        settings = job.settings
        refuse_stray_weights(job.policy)
        register_receiver()
        longest = max(len(prompt.token_ids) for prompt in job.prompts) + settings.max_new_tokens
        options = VLLMOptions(gpu_memory=settings.sampler_memory)
        dtype = "bfloat16" if settings.bf16 else "float32"
        self._job = job
        self._sleeps = settings.sampler_sleep
        with own_random_state():
            self.llm = load(
                job.policy.path,
                {
                    **options.for_loading(dtype, longest + 1, trust_remote_code=False),
                    "logprobs_mode": logprobs_modes(settings.temperature)[0],
                    "weight_transfer_config": {"backend": RECEIVER},
                    "enable_sleep_mode": self._sleeps or None,
                },
            )
        self._sender: Any = None
        if self._sleeps:
            self.llm.sleep(level=2)

    def sync(self, model: PreTrainedModel) -> None:
        """Hand the weights over."""
        from almost_train.rlsf.weight_transfer import HandingInit, HandingSender, PolicyWeights, ToldClient

        try:
            if self._sleeps:
                self.llm.wake_up(tags=["weights"])  # level 2 keeps none: all are sent anew
            if self._sender is None:
                init, source = HandingInit(rank=0), PolicyWeights(model)
                client = ToldClient(lambda name, *body: getattr(self.llm, name)(*body))
                self._sender = HandingSender.trainer_init(init, client=client, source=source)
            self._sender.send_weights()
            if self._sleeps:
                self.llm.wake_up(tags=["kv_cache"])
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:  # of whichever layer takes the weights
            raise RunError(f"vLLM does not take the weights of the policy: {first_line(error)}") from error
        if not self.llm.reset_prefix_cache():
            raise RunError("vLLM still holds keys and values of the old weights")

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], step: int, rows: Sequence[int]
    ) -> list[Sampled]:
        """See `RolloutSampler`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings, ends = self._job.settings, end_ids(model, self._job.tokenizer)
        requests = {
            str(number): (
                np.array(ids),
                SamplingParams(
                    max_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    seed=_seed(self._job, step, row),
                    stop=list(settings.stop),
                    stop_token_ids=ends,
                    logprobs=0,  # the drawn token's alone
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
            )
            for number, (ids, row) in enumerate(zip(prompts, rows, strict=True))
        }
        drawn: dict[int, Sampled] = {}
        for name, output in run(self.llm, requests, self._job.policy.path):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            logprobs = [at[token].logprob for token, at in zip(ids, completion.logprobs, strict=True)]
            drawn[int(name)] = _as_sampled(self._job, model, ids, logprobs)
        if self._sleeps:
            self.llm.sleep(level=2)
        return [drawn[number] for number in range(len(prompts))]

    def close(self) -> None:
        """Give vLLM's memory back."""
        release(self.llm)


_NO_WEIGHTS = "takes no weights; start it with VLLM_SERVER_DEV_MODE=1 and the options in docs/train.md"


def logprobs_modes(temperature: float) -> tuple[str, ...]:
    """Modes of vLLM's in which it says log p of the distribution that it draws from, the fastest first.

    Raw ones are before the temperature, so at 1 they are the same. On a CPU, our sampler of vLLM's
    (`almost_eval.engines.vllm_sampling`) stays out where others are wanted.
    """
    return ("raw_logprobs", "processed_logprobs") if temperature == 1 else ("processed_logprobs",)


def server_problem(config: JSONObject | None, settings: RLSFSettings) -> str | None:
    """Why a server cannot be sampled from in training, or None; `config` is vLLM's own, as `/server_info` gives it."""
    if config is None:
        return _NO_WEIGHTS
    mode = config["model_config"]["logprobs_mode"]
    if mode not in (modes := logprobs_modes(settings.temperature)):
        return (
            f"gives {mode}, not fit for temperature {settings.temperature:g}; start it with --logprobs-mode {modes[0]}"
        )
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    needed = {"file": RECEIVER, "nccl": "nccl"}[settings.weight_transfer]
    if backend != needed:
        has = f"takes weights by {backend!r}" if backend else "takes no weights"
        option = f"""--weight-transfer-config '{{"backend": "{needed}"}}'"""
        return f"{has}; start it with {option}, or give another --weight-transfer"
    return None


class ServerSampler:
    """A vLLM server that takes weights.

    Raises:
        InputError: it is not there, or takes no weights.
    """

    def __init__(self, job: Job) -> None:
        assert job.settings.sampler_url is not None
        self._job = job
        self._address = EndpointAddress.parse(job.settings.sampler_url, "--sampler-url", "http://127.0.0.1:8000")
        self._key = read_key(self._address)
        self._sender: Any = None
        models = self._ask("GET", "/v1/models", refused=InputError)["data"]
        self._model = str(models[0]["id"])
        server = self._ask("GET", "/server_info", query={"config_format": "json"}, refused=InputError)
        if problem := server_problem(server.get("vllm_config"), job.settings):
            raise InputError(f"the vLLM server {self._address.shown} {problem}")

    def sync(self, model: PreTrainedModel) -> None:
        """Send the weights; every process waits until the server has them."""
        from almost_train.rlsf.weight_transfer import PolicyWeights

        if self._sender is None:
            self._sender = self._make_sender(PolicyWeights(model))
        self._sender.send_weights()
        if is_main() and self._post("/reset_prefix_cache").get("success") is not True:
            raise RunError(f"the server {self._address.shown} still holds keys and values of the old weights")
        wait_for_all()

    def _make_sender(self, source: Any) -> Any:
        from almost_train.rlsf.weight_transfer import FileInit, FileSender, ToldClient

        rank, client = (0 if is_main() else 1), ToldClient(lambda name, *body: self._post(f"/{name}", *body))
        if self._job.settings.weight_transfer == "file":
            return FileSender.trainer_init(
                FileInit(self._job.work / "transfer", rank=rank), client=client, source=source
            )
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        workers = int(self._ask("GET", "/get_world_size")["world_size"])
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        host = "127.0.0.1" if self._address.is_local else socket.gethostbyname(socket.gethostname())
        init = NCCLTrainerInitInfo(host, port, workers + 1, rank=rank)
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)

    def sample(
        self, model: PreTrainedModel, prompts: Sequence[TokenIds], step: int, rows: Sequence[int]
    ) -> list[Sampled]:
        """See `RolloutSampler`; one request for each completion, all on their way at once."""
        settings, ends = self._job.settings, end_ids(model, self._job.tokenizer)

        def draw(ids: TokenIds, row: int) -> Sampled:
            answer = self._post(
                "/v1/completions",
                {
                    "model": self._model,
                    "prompt": list(ids),
                    "max_tokens": settings.max_new_tokens,
                    "temperature": settings.temperature,
                    "top_p": 1.0,
                    "top_k": 0,
                    "min_p": 0.0,
                    "repetition_penalty": 1.0,
                    "seed": _seed(self._job, step, row),
                    "stop": list(settings.stop),
                    "stop_token_ids": ends,
                    "logprobs": 1,
                    "return_token_ids": True,
                    "add_special_tokens": False,
                },
            )
            choice = answer["choices"][0]
            return _as_sampled(self._job, model, choice["token_ids"], choice["logprobs"]["token_logprobs"])

        with ThreadPoolExecutor(min(len(prompts), 128)) as pool:
            return list(pool.map(draw, prompts, rows))

    def close(self) -> None:
        """The server goes on, with the policy as it is now."""

    def _post(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return self._ask("POST", path, body)

    def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        query: Mapping[str, str] | None = None,
        refused: type[InputError] | type[RunError] = RunError,
    ) -> dict[str, Any]:
        import httpx

        url, where = self._address.beside(path), self._address.shown
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            answer = httpx.request(method, url, params=query, json=body, headers=headers, timeout=_TIMEOUT)
        except httpx.HTTPError as error:
            raise refused(f"the vLLM server {where} does not answer ({type(error).__name__}); is it running?") from None
        if answer.status_code == 404:
            raise InputError(f"the vLLM server {where} has no {path}: it {_NO_WEIGHTS}")
        if answer.is_error:
            raise refused(f"the vLLM server {where}, {path}: {server_words(answer.text, self._key)}")
        result: dict[str, Any] = answer.json() if answer.content else {}
        return result
