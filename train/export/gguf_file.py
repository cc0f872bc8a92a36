"""A model as one GGUF file, which llama.cpp and what is built on it run: the format's own package writes it.

The tokenizer is written as GPT-2's kind, whatever its vocabulary: llama.cpp's converter knows only vocabularies that
somebody has registered there, and the runtime needs no more than the vocabulary, the merges and GPT-2's splitting.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.errors import CorruptError
from shards.tokenizer import EOT_TEXT, Tokenizer
from train.export.hugging_face import weights
from train.model.gpt import Model

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # of GPT-2, stored as (inputs, outputs)


def modelfile(file: str) -> str:
    """What Ollama reads beside the file: plain text in, plain text out, since the model follows no instructions."""
    return f'FROM ./{file}\nTEMPLATE """{{{{ .Prompt }}}}"""\nPARAMETER temperature 0.8\nPARAMETER top_k 50\n'


def write(model: Model, tokenizer: Tokenizer, kind: GgufType, name: str, path: Path) -> None:
    """Write the model and its tokenizer as the file `path`: matrices as `kind`, all else and positions in fp32."""
    import gguf

    config = model.config
    architecture = gguf.MODEL_ARCH.GPT2 if config.is_gpt2 else gguf.MODEL_ARCH.QWEN3
    writer: Any = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])  # its calls have no types
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ff_width)
    writer.add_head_count(config.n_head)
    if config.is_gpt2:
        writer.add_layer_norm_eps(1e-5)
    else:
        head_width = config.d_model // config.n_head
        writer.add_head_count_kv(config.n_head)
        writer.add_key_length(head_width)  # Qwen3 has 128 where nothing is said
        writer.add_value_length(head_width)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(config.rope_theta)
    _add_tokenizer(writer, tokenizer)
    for tensor, data, raw_type in _tensors(model, kind):
        writer.add_tensor(tensor, data, raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path: Path, model: Model, tokenizer: Tokenizer, kind: GgufType) -> int:
    """Read the file again, and return how many tensors it has. CorruptError unless each is to the bit what was written,
    and the vocabulary is the tokenizer's."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = {name: (data, raw_type) for name, data, raw_type in _tensors(model, kind)}
    wrong = [name for name in expected.keys() ^ found.keys()]
    wrong += [
        name
        for name, (data, raw_type) in expected.items()
        if name in found
        and (found[name].tensor_type != raw_type or found[name].data.tobytes() != np.ascontiguousarray(data).tobytes())
    ]
    field = reader.fields["tokenizer.ggml.tokens"]
    if [bytes(field.parts[i]).decode() for i in field.data] != _vocabulary(tokenizer):
        wrong.append("tokenizer.ggml.tokens")
    if wrong:
        raise CorruptError(
            f"{path}: {', '.join(sorted(wrong)[:5])} differ from the model",
            "it would be another model; nothing was published",
            "check the disk, and export again",
        )
    return len(found)


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def _tensors(model: Model, kind: GgufType) -> Iterator[tuple[str, NDArray[Any], Any]]:
    """Each tensor's name there, its data and its type."""
    import gguf

    architecture = gguf.MODEL_ARCH.GPT2 if model.config.is_gpt2 else gguf.MODEL_ARCH.QWEN3
    names: Any = gguf.get_tensor_name_map(architecture, model.config.n_layer)
    types = gguf.GGMLQuantizationType
    for name, tensor in weights(model):
        data = (tensor.T if name.endswith(_TRANSPOSED) else tensor).contiguous().float().cpu().numpy()
        wanted = types[kind.upper()]
        if data.ndim == 1 or name.endswith("wpe.weight"):
            wanted = types.F32
        elif wanted is types.Q8_0 and data.shape[-1] % gguf.GGML_QUANT_SIZES[types.Q8_0][0]:
            wanted = types.F16  # its rows cannot be cut into blocks
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), gguf.quants.quantize(data, wanted), wanted


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    import gguf

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(_vocabulary(tokenizer))
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    writer.add_token_types([normal] * len(tokenizer.tokens) + [control])
    writer.add_token_merges(json.loads(tokenizer.to_json())["model"]["merges"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(tokenizer.eot)
    writer.add_add_bos_token(True)  # the model has seen end-of-text before every document
    writer.add_sampling_temp(0.8)
    writer.add_sampling_top_k(50)


def _vocabulary(tokenizer: Tokenizer) -> list[str]:
    """The tokens in GPT-2's characters for bytes, and end-of-text."""
    return [*json.loads(tokenizer.to_json())["model"]["vocab"], EOT_TEXT]
