"""One TOML, strictly read: what is not understood is refused with what was probably meant."""

from pathlib import Path
from typing import get_type_hints

import pytest
from harness import complains

from pipeline import config
from pipeline.config import Recipe
from prepare.config import TokensConfig
from shards import ConfigError
from shards.fingerprint import identity
from train.config import TrainConfig


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_defaults_and_name(tmp_path: Path) -> None:
    assert config.load(write(tmp_path, "")) == ("mine", Recipe())


def test_a_typo(tmp_path: Path) -> None:
    path = write(tmp_path, "[optim]\nlearning_rate = 1e-3\nwarmup_step = 5\n")
    known = "name, lr, embed_lr, head_lr, norm_lr, weight_decay, decay, beta1, beta2, eps, momentum, momentum_warmup, "
    known += "clip, schedule, warmup_steps, decay_fraction, final_lr, schedule_rule"
    names = ", ".join(f"optim.{name}" for name in known.split(", "))
    with complains(ConfigError, f"{path}: unknown key optim.learning_rate; did you mean optim.lr?", f"known: {names}"):
        config.load(path)
    with complains(ConfigError, "optim.warmup_step", "optim.warmup_steps"):
        config.load(write(tmp_path, "[optim]\nwarmup_step = 5\n"))
    with pytest.raises(ConfigError, match=r"unknown key modle; did you mean model\?"):
        config.load(write(tmp_path, "[modle]\n"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[optim]\nlr = -1", "optim.lr is -1, expected a number of at least 0"),
        ("[optim]\nlr = nan", "optim.lr is NaN, expected a number"),
        ("[optim]\nlr = inf", "optim.lr is Infinity, expected a number of at most 100"),
        ("[optim]\nlr = '1e-3'", 'optim.lr is "1e-3", expected a number'),
        ("[optim]\neps = 0", "optim.eps is 0, expected a number above 0"),
        ("[train]\nsteps = true", "train.steps is true, expected a whole number"),
        ("[train]\nsteps = 1.5", "train.steps is 1.5, expected a whole number"),
        ("[train]\nseed = -1", "train.seed is -1, expected a whole number of at least 0"),
        ("[train]\nsteps = 99999999999999", "expected a whole number of at most 1,099,511,627,776"),
        (
            "[train]\nbatch_ramp = [0]",
            "train.batch_ramp is .*, expected a whole number of at least 1 for each item",
        ),
        ("[[train.earlier]]\nsteps = 1", "train.earlier is .*, expected until as well for each item"),
        ("[model]\nfamily = 'llama'", 'model.family is "llama", expected one of the known words'),
        ("[model]\ntied = 3", "model.tied is 3, expected true or false"),
        ("[corpus]\nname = '../up'", r'corpus.name is "../up", expected letters, digits'),
        ("[corpus]\nfiles = 3", "corpus.files is 3, expected a list"),
        (f"[corpus]\ntext_column = '{'a' * 201}'", "corpus.text_column is .*, expected at most 200 characters"),
        ("[tokens.mix]\na = 'x'", "tokens.mix is .*, expected a number for each item"),
        ("model = 3", "model is 3, expected a table"),
        ("[optim]\nlr = 1\nlr = 2", "not valid TOML"),
        (f"[train]\nsteps = {'9' * 5000}", "not valid TOML"),
    ],
)
def test_a_wrong_value(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(write(tmp_path, text))


def test_settings(tmp_path: Path) -> None:
    path = write(tmp_path, "[optim]\nlr = 1e-3\n")
    settings = (
        "optim.lr=3e-4",
        "corpus.files=texts/*.txt",
        "corpus.kind=files",
        "model.tied=true",
        'train.prompts=["a"]',
    )
    recipe = config.load(path, settings)[1]
    assert recipe.optim.lr == 3e-4
    assert recipe.corpus.files == ("texts/*.txt",)
    assert recipe.model.tied is True
    assert recipe.train.prompts == ("a",)
    with complains(ConfigError, "optim.l", "optim.lr"):
        config.load(path, ("optim.l=1",))
    for wrong in ("lr=1", "optim.lr", "=", "optim.=3"):
        with complains(ConfigError, "TABLE.FIELD=VALUE"):
            config.load(path, (wrong,))


def test_a_table_in_a_table_may_be_set_as_a_whole_or_by_its_names(tmp_path: Path) -> None:
    path = write(tmp_path, "[tokens.mix]\na = 1\n")
    assert config.load(path, ("tokens.mix.b-1.2=0.5",))[1].tokens.mix == {"a": 1.0, "b-1.2": 0.5}
    assert config.load(path, ("tokens.mix={b=2}",))[1].tokens.mix == {"b": 2.0}
    config.save(config.load(path)[1], tmp_path / "run.toml")
    assert config.load_run(tmp_path / "run.toml").tokens.mix == {"a": 1.0}
    with complains(ConfigError, "--set optim.lr.x=1", "optim.lr"):
        config.load(write(tmp_path, "[optim]\nlr = 1e-3\n"), ("optim.lr.x=1",))


def test_an_unknown_preset() -> None:
    with complains(
        ConfigError,
        "'overnigth' is neither a preset nor a .toml file",
        "presets: demo, gpt2, gpt2-book, gpt2-tuned, overnight; did you mean overnight?",
    ):
        config.load("overnigth")


def test_a_missing_file(tmp_path: Path) -> None:
    with complains(ConfigError, "none.toml"):
        config.load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_load_and_survive_being_written(name: str, tmp_path: Path) -> None:
    recipe = config.load(name)[1]
    config.save(recipe, tmp_path / "run.toml")
    assert config.load_run(tmp_path / "run.toml") == recipe


@pytest.mark.parametrize("name", sorted({*config.preset_names()} - {"demo"}))
def test_evaluation_takes_at_most_a_hundredth_of_a_run(name: str) -> None:
    """At the rates that were predicted for an RTX 3090: 58,000 tokens a second, and thrice that forward alone."""
    from train.dry_run import EVALUATION_SPEED, evaluation_tokens
    from train.schedule import Ramp

    recipe = config.load(name)[1]
    ramp = Ramp(recipe.model, recipe.train)
    training = ramp.tokens / 58_000
    evaluation = evaluation_tokens(recipe.train, ramp.steps, 10**9) / (EVALUATION_SPEED * 58_000)
    assert 0 < evaluation <= 0.01 * (training + evaluation)


def test_the_book_and_gpt2_have_their_published_sizes() -> None:
    import torch

    from train.model.gpt import Model

    sizes = {"gpt2": 124_439_808, "gpt2-book": 163_009_536, "overnight": 162_151_680}
    with torch.device("meta"):
        for name, parameters in sizes.items():
            assert Model(config.load(name)[1].model, 50257).parameter_count() == parameters


def test_what_cannot_change_the_result_is_no_identity() -> None:
    assert identity(TokensConfig()) == identity(TokensConfig(workers=7, max_tokens=5, engine="tiktoken"))
    assert identity(TokensConfig()) == identity(TokensConfig(mix={"a": 1.0}))  # a run pins it by itself
    assert identity(TokensConfig()) != identity(TokensConfig(val_fraction=0.01))
    quiet = TrainConfig(
        log_every=1, micro_batch=3, eval_every=9, eval_tokens=7, checkpoint_every=2, keep_checkpoints=9, prompts=()
    )
    assert identity(TrainConfig()) == identity(quiet)
    assert identity(TrainConfig()) == identity(TrainConfig(compile="off", checkpoint_activations=True))
    assert identity(TrainConfig()) == identity(TrainConfig(final_eval_tokens=7))
    assert identity(TrainConfig()) != identity(TrainConfig(seed=2))
    assert identity(TrainConfig()) != identity(TrainConfig(document_mask=True))


def test_what_was_laid_over_it_is_named_with_it(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    with complains(ConfigError, "--set train.steps=many", "train.steps", '"many"'):
        config.load(path, ("optim.lr=1", "train.steps=many"))
    for field, value, known in (
        ("train.precision", "fp8", "known: auto, bf16, fp16, fp32"),
        ("train.trackers", "mlflow", "known: tensorboard, wandb, trackio"),
    ):
        with complains(ConfigError, f"--set {field}={value}", field, value, known):
            config.load(path, (f"{field}={value}",))


@pytest.mark.parametrize("tokens", ["tokens.folder=a", "tokens.mix.a=1"])
@pytest.mark.parametrize("ignored", ["corpus.name=python-docs", "tokens.vocab_size=9000", 'tokens.forbid=["b"]'])
def test_a_setting_that_would_be_ignored_is_refused(tmp_path: Path, tokens: str, ignored: str) -> None:
    path = write(tmp_path, "[corpus]\nname = 'python-docs'\n")  # what the file itself has is a preset's to have
    assert config.load(path, (tokens,))[1].corpus.name == "python-docs"
    with complains(ConfigError, f"--set {ignored}", f"{tokens[:8]}"):
        config.load(path, (tokens, ignored))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lr", "optim.lr"),
        ("LR", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("optim.LR", "optim.lr"),
        ("optim.learning_rate", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("batch_size", "train.batch_tokens"),
        ("train.batch_size", "train.batch_tokens"),
        ("model.context_length", "model.seq_len"),
        ("model.n_layers", "model.n_layer"),
        ("train.warmup", "optim.warmup_steps"),
        ("optim.warmup_step", "optim.warmup_steps"),
        ("tokens.vocabsize", "tokens.vocab_size"),
        ("modle.n_head", "model.n_head"),
    ],
)
def test_a_field_by_another_name_is_blamed_on_set_and_guessed(key: str, meant: str) -> None:
    with complains(ConfigError, f"--set {key}=1", meant):
        config.load("demo", (f"{key}=1",))


def test_every_alias_is_of_a_field() -> None:

    fields = {
        f"{table}.{name}" for table, kind in get_type_hints(config.Recipe).items() for name in get_type_hints(kind)
    }
    assert set(config.ALIASES.values()) <= fields and not set(config.ALIASES) & {
        name.partition(".")[2] for name in fields
    }


def test_a_field_that_was_renamed(tmp_path: Path) -> None:
    """Refused with its new name; a run that was begun with the old one keeps working."""
    path = write(tmp_path, "[tokens]\nengine = 'ray'\n")
    with complains(ConfigError, "tokens.engine", "--set tokens.executor=ray"):
        config.load(path)
    tokens = config.load_run(Path(path)).tokens
    assert (tokens.engine, tokens.executor) == ("fastokens", "ray")
