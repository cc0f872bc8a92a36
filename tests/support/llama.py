"""llama.cpp in this process, asked over HTTP on loopback: the runtime that an exported GGUF file is for."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Llama:
    """A model that runs. One thread, fp32 in its cache, no flash attention: what can be compared with ours."""

    def __init__(self, address: str) -> None:
        self._address = address

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self._address}/{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self.ask("tokenize", content=text, add_special=special, parse_special=False)["tokens"]
        return ids

    def greedy(self, ids: list[int], count: int) -> list[int]:
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "cache_prompt": False}
        found: list[int] = self.ask("completion", **asked)["tokens"]
        return found

    def logprob(self, before: list[int], token: int, vocab_size: int) -> float:
        """The natural logarithm of the probability that `token` follows `before`."""
        found = self.ask("completion", prompt=before, n_predict=1, n_probs=vocab_size, temperature=0)
        return {each["id"]: float(each["logprob"]) for each in found["completion_probabilities"][0]["top_logprobs"]}[
            token
        ]


@contextmanager
def llama(path: Path, context: int) -> Iterator[Llama]:
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.port, asked.verbosity = str(path), 0, -1
    asked.n_ctx, asked.n_parallel, asked.cpuparams.n_threads, asked.warmup = context, 1, 1, False
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(asked)
    try:
        yield Llama(server.listening_address)
    finally:
        del server
