"""The models are what they say: Hugging Face's forms to 1e-4, the published sizes, and able to learn."""

import math

import msgspec
import pytest
import torch

from pipeline.config import load
from train.config import ModelConfig, OptimConfig
from train.model.gpt import Model
from train.optim.groups import Optimizers

VOCAB = 321
SIZES = {"n_layer": 3, "n_head": 4, "d_model": 64, "seq_len": 48}
FORMS = {
    "gpt2": ModelConfig(family="gpt2", **SIZES),
    "gpt2-book": ModelConfig(family="gpt2", tied=False, qkv_bias=False, **SIZES),
    "modern": ModelConfig(family="modern", **SIZES),
    "modern-tied": ModelConfig(family="modern", tied=True, **SIZES),
}


def randomised(config: ModelConfig) -> Model:
    """Weights far from their zeros and ones, so that none of them can be missed."""
    torch.manual_seed(0)
    model = Model(config, VOCAB).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("form", ["gpt2", "gpt2-book"])
def test_gpt2_is_hugging_faces(form: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = randomised(FORMS[form])
    tied = FORMS[form].is_tied
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=48, n_embd=64, n_layer=3, n_head=4, tie_word_embeddings=tied)
    ).eval()
    ours = model.state_dict()
    state = {"transformer.wte.weight": ours["embed.weight"][:VOCAB], "transformer.wpe.weight": ours["positions.weight"]}
    state["lm_head.weight"] = ours["embed.weight" if tied else "head.weight"][:VOCAB]
    names = {"attention_norm": "ln_1", "feed_forward_norm": "ln_2", "attention.o": "attn.c_proj"}
    names |= {"feed_forward.up": "mlp.c_fc", "feed_forward.down": "mlp.c_proj"}
    for i in range(3):
        for name, other in names.items():
            weight = ours[f"blocks.{i}.{name}.weight"]
            state[f"transformer.h.{i}.{other}.weight"] = weight.T if weight.dim() == 2 else weight
            state[f"transformer.h.{i}.{other}.bias"] = ours[f"blocks.{i}.{name}.bias"]
        qkv = [f"blocks.{i}.attention.{part}" for part in "qkv"]
        state[f"transformer.h.{i}.attn.c_attn.weight"] = torch.cat([ours[f"{name}.weight"] for name in qkv]).T
        zeros = torch.zeros(64)
        state[f"transformer.h.{i}.attn.c_attn.bias"] = torch.cat([ours.get(f"{name}.bias", zeros) for name in qkv])
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = ours[f"norm.{part}"]
    assert not theirs.load_state_dict(state, strict=False).missing_keys
    ids = torch.randint(0, VOCAB, (2, 48))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("form", ["modern", "modern-tied"])
def test_modern_is_qwen3(form: str) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = randomised(FORMS[form])
    tied = FORMS[form].is_tied
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=FORMS[form].ff_width,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=48,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            attention_bias=False,
            tie_word_embeddings=tied,
        )
    ).eval()
    ours = model.state_dict()
    state = {"model.embed_tokens.weight": ours["embed.weight"][:VOCAB], "model.norm.weight": ours["norm.weight"]}
    state["lm_head.weight"] = ours["embed.weight" if tied else "head.weight"][:VOCAB]
    names = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    names |= {f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"}
    names |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    names |= {f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for i in range(3):
        for name, other in names.items():
            state[f"model.layers.{i}.{other}.weight"] = ours[f"blocks.{i}.{name}.weight"]
    assert not theirs.load_state_dict(state, strict=False).missing_keys
    ids = torch.randint(0, VOCAB, (2, 48))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (ModelConfig(family="gpt2", n_head=12), 124_439_808),
        (ModelConfig(family="gpt2", n_head=12, tied=False, qkv_bias=False), 163_009_536),
        (ModelConfig(family="modern"), 162_151_680),
        (ModelConfig(family="modern", tied=True), 123_554_304),
    ],
)
def test_the_published_sizes(config: ModelConfig, parameters: int) -> None:
    with torch.device("meta"):
        assert Model(config, 50257).parameter_count() == parameters


@pytest.mark.parametrize("form", FORMS)
def test_the_first_loss_is_that_of_a_guess(form: str) -> None:
    torch.manual_seed(1)
    model = Model(FORMS[form], VOCAB)
    ids = torch.randint(0, VOCAB, (8, 49))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(VOCAB), abs=0.1)


@pytest.mark.parametrize("settings", [(), ("model.tied=true",)], ids=["", "tied"])
@pytest.mark.parametrize("preset", ["gpt2", "gpt2-book", "overnight"])
def test_the_first_loss_of_the_presets(preset: str, settings: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    model = Model(load(preset, settings)[1].model, 50257)
    ids = torch.randint(0, 50257, (1, 129))
    with torch.no_grad():
        loss = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(50257), abs=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_no_position_sees_what_comes_after_it(form: str) -> None:
    model = randomised(FORMS[form])
    ids = torch.randint(0, VOCAB, (1, 48))
    changed = ids.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(ids), model(changed)
    assert torch.allclose(a[0, :20], b[0, :20], atol=1e-5)
    assert not torch.allclose(a[0, 20:], b[0, 20:], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_one_batch_can_be_overfitted(form: str, name: str) -> None:
    torch.manual_seed(2)
    model = Model(FORMS[form], VOCAB)
    lr = {"muon": 0.02, "adamw": 3e-3}[name]
    optimizers = Optimizers(model, OptimConfig(name=name, lr=lr, embed_lr=0.02, weight_decay=0.0))
    ids = torch.randint(0, VOCAB, (4, 49))
    for step in range(80):
        optimizers.schedule(step + 30, 1000)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizers.step()
    assert loss.item() < 0.1


def test_the_padding_of_the_vocabulary_is_never_seen() -> None:
    model = randomised(FORMS["modern"])
    assert model.embed.weight.shape[0] == 384
    ids = torch.randint(0, VOCAB, (2, 49))
    assert model(ids[:, :-1]).shape == (2, 48, VOCAB)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    assert model.head is not None and model.head.weight.grad is not None and model.embed.weight.grad is not None
    assert not model.head.weight.grad[VOCAB:].any()
    assert not model.embed.weight.grad[VOCAB:].any()


def test_dropout_is_off_in_evaluation() -> None:
    config = ModelConfig(family="gpt2", dropout=0.5, **SIZES)
    torch.manual_seed(0)
    model = Model(config, VOCAB)
    ids = torch.randint(0, VOCAB, (1, 48))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_torchs_own_initial_weights(family: str) -> None:
    """As far as a distribution can be told: its kind, its bounds, its spread."""
    torch.manual_seed(0)
    model = Model(ModelConfig(family=family, n_layer=2, n_head=2, d_model=64, seq_len=32, init="torch"), 1000)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            assert module.weight.std().item() == pytest.approx(1, abs=0.05), name
        elif isinstance(module, torch.nn.Linear):
            ours = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            theirs = torch.cat([parameter.detach().flatten() for parameter in plain.parameters()])
            assert ours.abs().max() <= module.in_features**-0.5, name
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
    again = (
        Model(model.config, 1000, torch.Generator().manual_seed(5)),
        Model(model.config, 1000, torch.Generator().manual_seed(5)),
    )
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), again[1].parameters(), strict=True))


@pytest.mark.parametrize("residual", ["fp32", "bf16"])
@pytest.mark.parametrize("form", ["gpt2", "modern"])
def test_the_type_of_the_residual_stream(form: str, residual: str) -> None:
    """bf16 where autocast computes in it, and nowhere else; the logits are those of fp32 within that type."""
    model = randomised(msgspec.structs.replace(FORMS[form], residual=residual))
    seen: list[torch.dtype] = []
    model.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    ids = torch.randint(0, VOCAB, (2, 48))
    with torch.no_grad():
        plain = model(ids)
        with torch.autocast("cpu", torch.float16):
            model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(ids)
    assert seen == [torch.float32, torch.float32, torch.bfloat16 if residual == "bf16" else torch.float32]
    assert (ours - plain).norm() < 0.03 * plain.norm()
