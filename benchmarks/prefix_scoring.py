"""Shared-prefix scoring against lm-eval's `hf` model and against three two-prompt HHH loops, in turn, in one run.

Every measurement is a process of its own, so that load time and peak memory are its own too. The peer gets the batch
size that serves it best, found first on a small part. The same run checks that both sides agree on every sample.

    python benchmarks/prefix_scoring.py --data-root ../shared/data/hub            (everything; lm-eval needs ~30 min)
    python benchmarks/prefix_scoring.py --data-root ../shared/data/hub --limit 20 --rounds 3
    python benchmarks/prefix_scoring.py --data-root ../shared/data/hub --tasks mmlu --engine vllm --limit 20 --rounds 2

    python benchmarks/prefix_scoring.py --model runs/models/smollm2-135m-instruct --dtype bfloat16 --limit 40
    python benchmarks/prefix_scoring.py --model runs/models/smollm2-135m-instruct --tasks mmlu-all --limit 3

`mmlu` is three subjects, `mmlu-all` all 57.
With `--engine vllm` both sides run on vLLM: our engine, and lm-eval's `vllm` model. In half precision lm-eval runs once
more in float32, and both sides are held against that: of how many samples is the prediction the same?
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SUBJECTS = ("anatomy", "college_physics", "high_school_us_history")
CONTEXT = 4096


def checkpoint(data_root: Path, *, small: bool = False) -> Path:
    """The seeded Llama (30 M parameters, or 2 M), float32, its tokenizer trained on the benchmarks' own text."""
    from almost_eval.nano.data import cached
    from almost_eval.nano.seeded import build_checkpoint

    shape: dict[str, Any] = (
        {"hidden_size": 192, "layers": 4, "heads": 3, "kv_heads": 3, "vocab_size": 1024}
        if small
        else {"hidden_size": 512, "layers": 7, "heads": 8, "kv_heads": 8, "vocab_size": 8192}
    )

    def build(folder: Path) -> Path:
        # Wider weights than usual (0.02) tell tokens apart; much wider ones (0.08) amplify rounding at this depth.
        return build_checkpoint(
            folder,
            max_position_embeddings=CONTEXT,
            tokenizer_text=_text(data_root),
            initializer_range=0.04,
            seed=0,
            **shape,
        )

    return cached(f"benchmark-{'2m' if small else '30m'}-0.04", build)


def _text(data_root: Path) -> Iterator[str]:
    from almost_eval.data.sources import DataSource

    data = DataSource("hub", data_root)
    for row in data.read("truthfulqa/truthful_qa", "multiple_choice", "validation"):
        yield " ".join([row["question"], *row["mc2_targets"]["choices"]])
    for subject in data.configs("cais/mmlu"):
        for row in data.read("cais/mmlu", subject, "test"):
            yield " ".join([row["question"], *row["choices"]])


def subjects(task: str, data_root: Path) -> Sequence[str]:
    """Those of `mmlu`, or all for `mmlu-all`."""
    from almost_eval.data.sources import DataSource

    return DataSource("hub", data_root).configs("cais/mmlu") if task == "mmlu-all" else SUBJECTS


# ---------------------------------------------------------------------------------------------- the measured processes


def ours(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """Our engine on one task: what `almost-eval` runs, without the run folder."""
    from almost_eval.engines.hf import HFEngine

    engine = HFEngine(str(model), dtype=dtype)
    return _ours(task, engine, lambda: engine.model, data_root, limit) | {
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "embedding": engine.model.get_input_embeddings().weight.numel(),
    }


def ours_vllm(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """Our engine on vLLM."""
    from almost_eval.engines.vllm import VLLMEngine

    engine = VLLMEngine(str(model), dtype=dtype)
    return _ours(task, engine, lambda: engine.llm, data_root, limit)


def _ours(task: str, engine: Any, load: Callable[[], Any], data_root: Path, limit: int | None) -> dict[str, Any]:
    from almost_eval.data.sources import DataSource
    from almost_eval.run.runner import Run
    from almost_eval.tasks.base import Task, resolve_prompting
    from almost_eval.tasks.hhh import HHH
    from almost_eval.tasks.mmlu import MMLU
    from almost_eval.tasks.truthfulqa import TruthfulQA

    data = DataSource("hub", data_root)
    started = time.perf_counter()
    load()
    loaded = time.perf_counter()
    prompting = resolve_prompting(data, None, "auto", engine.tokenizer, own_prompts=task != "hhh")
    made: Task
    if task == "hhh":
        made = HHH("choice", data, prompting, limit=limit)
    elif task.startswith("mmlu"):
        made = MMLU(subjects(task, data_root), 5, data, prompting, limit=limit)
    else:
        made = TruthfulQA(["mc1", "mc2"], data, prompting, limit=limit)
    run = Run(made, engine)
    answers = {run.samples[i].id: (outputs, score) for i, outputs, score in run.answers(range(len(run.samples)))}
    done = time.perf_counter()
    scored = {}
    for sample in run.samples:
        row = answers[sample.id][0]["loglikelihoods"]
        if task == "truthfulqa":
            for metric in ("mc1", "mc2"):
                scored[f"{metric}/{sample.id}"] = [row[0][i] for i in sample.metadata[metric]]
        else:
            scored[sample.id] = row[0] if task != "hhh" else [v for pair in row for v in pair]
    return {
        "load": loaded - started,
        "score": done - loaded,
        "report": engine.report.to_dict(),
        "scored": scored,
    }


def lm_eval(task: str, model: Path, data_root: Path, limit: int | None, batch: int, dtype: str) -> dict[str, Any]:
    """lm-eval's `hf` model on the same task: request building and scoring, without its bootstrap."""

    def load() -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=str(model), dtype=dtype, device="cpu", batch_size=batch)

    return _lm_eval(load, task, data_root, limit)


def lm_eval_vllm(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """lm-eval's `vllm` model, with what our engine sets for a CPU too; it chooses its own batches."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    def load() -> Any:
        from importlib import metadata

        import vllm

        own = metadata.version

        def version(distribution_name: str) -> str:
            # The CPU build is a distribution of another name than the one lm-eval asks for.
            return vllm.__version__ if distribution_name == "vllm" else own(distribution_name)

        metadata.version = version
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(
            pretrained=str(model),
            dtype=dtype,
            max_model_len=CONTEXT,
            enforce_eager=True,
            block_size=32,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=1 << 30,
            enable_chunked_prefill=False,
            max_num_batched_tokens=CONTEXT,
        )

    return _lm_eval(load, task, data_root, limit)


def _lm_eval(load: Callable[[], Any], task: str, data_root: Path, limit: int | None) -> dict[str, Any]:
    import logging

    from lm_eval import evaluator

    from almost_eval.data.sources import DataSource
    from almost_eval.tasks.harness import load_lm_eval_tasks

    logging.disable(logging.WARNING)
    started = time.perf_counter()
    peer = load()
    loaded = time.perf_counter()
    named = {"truthfulqa": ["truthfulqa_mc1", "truthfulqa_mc2"]}
    names = named.get(task) or [f"mmlu_{subject}" for subject in subjects(task, data_root)]
    tasks = load_lm_eval_tasks(names, DataSource("hub", data_root))
    for one in tasks.values():
        one.set_config(key="num_fewshot", value=0 if task == "truthfulqa" else 5)
    out = evaluator.evaluate(lm=peer, task_dict=tasks, limit=limit, log_samples=True, bootstrap_iters=0)
    done = time.perf_counter()
    scored = {}
    for name, samples in out["samples"].items():
        prefix = f"{name.removeprefix('truthfulqa_')}/" if task == "truthfulqa" else f"{name.removeprefix('mmlu_')}/"
        for sample in samples:
            scored[f"{prefix}{sample['doc_id']}"] = [float(r[0][0]) for r in sample["resps"]]
    metrics = {name: {k: v for k, v in r.items() if k.startswith("acc")} for name, r in out["results"].items()}
    return {"load": loaded - started, "score": done - loaded, "scored": scored, "metrics": metrics}


def plain_hhh(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """The simplest correct loop: one prompt at a time, a bare forward pass, the labels read off its last position."""
    return _hhh(model, dtype, data_root, limit, lambda lm, inputs: lm(**inputs).logits[:, -1], together=False)


def lean_hhh(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """The same loop by someone who knows transformers: logits of the last position alone, no cache to fill."""

    def forward(lm: Any, inputs: Any) -> Any:
        return lm(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]

    return _hhh(model, dtype, data_root, limit, forward, together=False)


def official_hhh(task: str, model: Path, data_root: Path, limit: int | None, _: int, dtype: str) -> dict[str, Any]:
    """The official loop: for each pair, both prompts in a padded batch of two, one new token by `generate`."""
    settings = {"do_sample": False, "max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True}

    def forward(lm: Any, inputs: Any) -> Any:
        return lm.generate(**inputs, **settings, pad_token_id=0).scores[0]

    return _hhh(model, dtype, data_root, limit, forward, together=True)


def _hhh(
    model: Path, dtype: str, data_root: Path, limit: int | None, forward: Callable[[Any, Any], Any], *, together: bool
) -> dict[str, Any]:
    """Each pair in both orders, in one padded batch (`together`) or one by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    prompt = json.loads((data_root / "github/naver-ai/ALMoST/eval/eval_prompt.json").read_text())["static_HHH_prompt"]
    pairs = json.loads((data_root / "github/naver-ai/ALMoST/eval/data/hhh_eval.json").read_text())
    label = [tokenizer(prompt + letter)["input_ids"][-1] for letter in (" A", " B")]
    scored, seen = {}, dict.fromkeys(("helpful", "harmless", "honest", "other"), 0)
    for pair in pairs:
        number = seen[pair["type"]]
        seen[pair["type"]] += 1
        if limit is not None and number >= limit:
            continue
        query, a = pair["chosen"].rsplit("\n\nAssistant:", 1)
        _, b = pair["rejected"].rsplit("\n\nAssistant:", 1)
        query = query.replace("Human:", "Query:").replace("Assistant:", "Response:")
        a, b = a.strip(), b.strip()
        texts = [
            prompt.format(question=query, answer_a=a, answer_b=b),
            prompt.format(question=query, answer_a=b, answer_b=a),
        ]
        logprob = []
        with torch.inference_mode():
            for batch in [texts] if together else [[text] for text in texts]:
                inputs = tokenizer(batch, padding="longest", return_tensors="pt")
                logprob += forward(lm, inputs).float().log_softmax(-1)[:, label].flatten().tolist()
        scored[f"{pair['type']}/{number}"] = logprob
    return {"load": loaded - started, "score": time.perf_counter() - loaded, "scored": scored}


_HHH_BATCH = {"plain_hhh": 1, "lean_hhh": 1, "official_hhh": 2}
"""The two-prompt loops, and how many prompts each puts in a batch."""

SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours,
    "lm_eval": lm_eval,
    "ours_vllm": ours_vllm,
    "lm_eval_vllm": lm_eval_vllm,
    "plain_hhh": plain_hhh,
    "lean_hhh": lean_hhh,
    "official_hhh": official_hhh,
}


def worker(arguments: argparse.Namespace) -> None:
    """Run one side in this process and write what it found."""
    import torch

    torch.set_num_threads(arguments.threads)
    found = SIDES[arguments.side](
        arguments.task, arguments.model, arguments.data_root, arguments.limit, arguments.batch, arguments.dtype
    )
    found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    arguments.out.write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------------ the comparison


def measure(
    side: str,
    task: str,
    given: argparse.Namespace,
    model: Path,
    *,
    limit: int | None,
    batch: int,
    dtype: str | None = None,
) -> Any:
    """One process; its report with the wall time of the whole process added."""
    out = Path(given.scratch) / "out.json"
    command = [sys.executable, __file__, "--worker", "--side", side, "--task", task, "--model", str(model)]
    command += ["--data-root", str(given.data_root), "--out", str(out), "--batch", str(batch)]
    command += [
        "--dtype",
        dtype or given.dtype,
        "--threads",
        str(given.threads),
        *(["--limit", str(limit)] if limit else []),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads)}
    if given.engine == "hf":  # vLLM's own progress divides by the time that a bar which is off does not take
        environment["TQDM_DISABLE"] = "1"
    started = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text()) | {"wall": time.perf_counter() - started}


def best_batch(task: str, given: argparse.Namespace, model: Path) -> int:
    """The batch size at which lm-eval scores a small part fastest."""
    times = {b: measure("lm_eval", task, given, model, limit=4, batch=b)["score"] for b in (1, 4, 8, 16)}
    print(f"lm-eval, {task}: seconds by batch size {', '.join(f'{b}: {t:.1f}' for b, t in times.items())}", flush=True)
    return min(times, key=lambda b: times[b])


def agreement(a: dict[str, list[float]], b: dict[str, list[float]]) -> tuple[int, float]:
    """(samples with another prediction, largest difference of a log-likelihood in nats) over the same samples."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())[:5]
    flips = sum(a[k].index(max(a[k])) != b[k].index(max(b[k])) for k in a)
    return flips, max(abs(x - y) for k in a for x, y in zip(a[k], b[k], strict=True))


def flips_by_metric(a: dict[str, list[float]], b: dict[str, list[float]]) -> str:
    """`mc1: 38 of 40 predictions the same`, and so on for each metric or subject."""
    groups: dict[str, list[str]] = {}
    for key in a:
        groups.setdefault(key.split("/")[0], []).append(key)
    same = {name: sum(a[k].index(max(a[k])) == b[k].index(max(b[k])) for k in keys) for name, keys in groups.items()}
    return ", ".join(f"{name}: {same[name]} of {len(keys)} predictions the same" for name, keys in groups.items())


def _means(metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of many subjects, the mean of each metric; a standard error that lm-eval did not take is "N/A", and left out."""
    numbers: dict[str, list[float]] = {}
    for of_one in metrics.values():
        for key, value in of_one.items():
            if isinstance(value, int | float):
                numbers.setdefault(key, []).append(value)
    return {key: statistics.fmean(values) for key, values in numbers.items()} | {"subjects": len(metrics)}


def matmul_rate(threads: int) -> float:
    """Measured float32 rate of a 2048-cube product, FLOP/s; the best of ten."""
    import torch

    torch.set_num_threads(threads)
    x, y = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = min(_timed(lambda: x @ y) for _ in range(10))
    return 2 * 2048**3 / best


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    """Measure, check, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data-root", type=Path, default=Path(os.environ.get("ALMOST_DATA_ROOT", "../shared/data/hub"))
    )
    parser.add_argument("--tasks", default="truthfulqa,mmlu,hhh")
    parser.add_argument("--limit", type=int, help="samples of each task, subject or category; all by default")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default a seeded one of 30 M parameters")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=0, help="lm-eval's batch size; found by trial by default")
    parser.add_argument("--engine", default="hf", choices=("hf", "vllm"), help="vllm: truthfulqa and mmlu only")
    parser.add_argument(
        "--agreement", type=int, help="samples of each task for lm-eval's float32 run in half precision; as --limit"
    )
    parser.add_argument("--peers", default=",".join(_HHH_BATCH), help="the HHH loops to compare with; all by default")
    for hidden in ("--side", "--task"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.data_root = given.data_root.resolve()
    if given.worker:
        worker(given)
        return
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        given.scratch = scratch
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Each task: ours and its peers in turn, `rounds` times."""
    model = given.model.resolve() if given.model else checkpoint(given.data_root)
    rate = matmul_rate(given.threads)
    print(f"{model.name} in {given.dtype}", end="; ")
    print(f"{platform.processor() or platform.machine()}, {given.threads} threads, float32 {rate / 1e9:.0f} GFLOP/s")
    for task in given.tasks.split(","):
        batches = {name: _HHH_BATCH[name] for name in given.peers.split(",")} if task == "hhh" else {}
        side = "ours"
        if given.engine == "vllm":
            side, batches = "ours_vllm", {"lm_eval_vllm": 0}
        elif not batches:
            batches = {"lm_eval": given.batch or best_batch(task, given, model)}
        mine: list[Any] = []
        peers: dict[str, list[Any]] = {name: [] for name in batches}
        for _ in range(given.rounds):
            mine.append(measure(side, task, given, model, limit=given.limit, batch=0))
            for name, batch in batches.items():
                peers[name].append(measure(name, task, given, model, limit=given.limit, batch=batch))
        print(f"\n{task}: {len(mine[0]['scored'])} samples, {given.rounds} rounds of ours and each peer in turn")
        for name, theirs in peers.items():
            flips, worst = agreement(mine[0]["scored"], theirs[0]["scored"])
            print(f"  {name} at batch {batches[name]}: {flips} predictions differ, largest difference {worst:.2g} nats")
            for what, label in (("score", "scoring"), ("wall", "whole process"), ("peak_mib", "peak MiB")):
                ratios = [p[what] / m[what] for p, m in zip(theirs, mine, strict=True)]
                print(
                    f"    {label}: peer {statistics.median(p[what] for p in theirs):.1f}, "
                    f"ours {statistics.median(m[what] for m in mine):.1f}, "
                    f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                )
        for name, theirs in peers.items():
            if metrics := theirs[0].get("metrics"):
                print(f"  {name}'s own figures: {json.dumps(metrics if len(metrics) < 4 else _means(metrics))}")
        if given.dtype != "float32" and "lm_eval" in peers and given.agreement != 0:
            limit = given.agreement or given.limit
            truth = measure("lm_eval", task, given, model, limit=limit, batch=given.batch or 4, dtype="float32")
            for name, one in (("ours", mine[0]), ("lm_eval", peers["lm_eval"][0])):
                changed = flips_by_metric({key: one["scored"][key] for key in truth["scored"]}, truth["scored"])
                print(f"  {name} in {given.dtype} against lm-eval in float32: {changed}")
        if rounding := mine[0]["report"].get("rounding"):
            print(f"  rounding: {json.dumps(rounding)}")
        first = mine[0]
        report = first["report"]
        print(
            f"  tokens: plain {report['tokens_plain']:,}, in trie {report['tokens_in_trie']:,}, computed "
            f"{report['tokens_computed']:,} ({report['computed_over_trie']:.2f} x the trie, "
            f"{report['plain_over_computed']:.1f} x fewer than one by one)"
        )
        if given.engine == "hf":
            flops = 2 * (first["parameters"] - first["embedding"]) * report["tokens_computed"]
            fastest = min(m["score"] for m in mine)
            print(
                f"  arithmetic limit {flops / rate:.1f} s, measured {fastest:.1f} s: {flops / rate / fastest:.0%} of it"
            )
    if given.engine == "vllm" or given.model:
        return
    small = checkpoint(given.data_root, small=True)
    command = [
        str(Path(sys.executable).with_name("almost-eval")),
        "hhh",
        "--model",
        str(small),
        "--limit",
        "1",
        "--json",
    ]
    command += ["--data-root", str(given.data_root)]
    firsts = []
    for number in range(3):
        out = subprocess.run(
            [*command, "--output", f"{given.scratch}/{number}"], check=False, capture_output=True, text=True
        ).stdout
        firsts.append(json.loads(out)["timing"]["seconds_to_first_sample"])
    print(f"\n2 M parameters, process start to first scored sample: {', '.join(f'{s:.1f}' for s in firsts)} s")


if __name__ == "__main__":
    main()
