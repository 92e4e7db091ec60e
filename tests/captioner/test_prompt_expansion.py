"""Prompts become descriptions: by a model trained on pairs, and by any language model of
transformers; what cannot be is named.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from sora_lightning.captioner.bpe import BOS, CLS, EOS
from sora_lightning.captioner.expansion import ExpansionModel, LanguageModelExpansion, _Prefix
from sora_lightning.checkpoints import load_system
from sora_lightning.cli.expansion import Expansion, read_pairs, train_expansion
from sora_lightning.layers.transformer import TransformerSize
from sora_lightning.systems.expansion import ExpansionSystem
from tests.conditioning.text_folders import change_config, gpt2_folder

COLOURS, SHAPES, SIDES = ("red", "blue", "green"), ("circle", "square"), ("left", "right", "up")
ALL = list(itertools.product(COLOURS, SHAPES, SIDES))
HELD_OUT = ALL[::6]


def short(colour: str, shape: str, side: str) -> str:
    return f"a {colour} {shape} moves {side}"


def long(colour: str, shape: str, side: str) -> str:
    return f"On a gray background, a large {colour} {shape} slowly drifts to the {side}."


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"path": "x.mp4", "caption": short(*one), "caption_descriptive": [long(*one), long(*one)]}
        for one in ALL
        if one not in HELD_OUT
    ]
    rows.append({"path": "y.mp4", "caption": "no description"})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def checkpoint(pairs: Path) -> Path:
    path = pairs.with_name("expansion.ckpt")
    train_expansion(pairs, path, steps=80)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_folder(tmp_path_factory.mktemp("gpt2"))


def test_a_trained_model_describes_combinations_that_it_never_saw(checkpoint: Path) -> None:
    model = load_system(ExpansionSystem, checkpoint).model
    seen = [one for one in ALL if one not in HELD_OUT]
    for some in (seen, HELD_OUT):
        expanded = model.expand([short(*one) for one in some])
        assert expanded == [long(*one) for one in some]


def test_a_batch_of_prompts_gives_what_each_gives_alone(checkpoint: Path) -> None:
    model = load_system(ExpansionSystem, checkpoint).model
    prompts = ["a red circle moves left", "red", "a green square", "left left left", "blue"]
    alone = [model.expand([prompt])[0] for prompt in prompts]
    assert model.expand(prompts) == alone
    assert len(set(alone)) > 1


def test_a_step_with_past_keys_gives_the_logits_of_the_whole(checkpoint: Path) -> None:
    model = load_system(ExpansionSystem, checkpoint).model
    ids = torch.tensor([[BOS, 20, 30, CLS], [BOS, 25, 35, CLS]])
    prefix = _Prefix(model, ids)
    for token in (40, 50):
        logits, prefix = prefix.next_logits()
        torch.testing.assert_close(logits, model.next_logits(prefix.ids, [])[0][:, -1].float())
        prefix = prefix.append(torch.tensor([token, token + 1])).select(torch.tensor([1, 0]))


def test_the_loss_is_of_the_description_alone() -> None:
    model = ExpansionModel(TransformerSize(1, 16, 2), 300, 32)
    model.bpe.train_on(["ab", "cd"])
    pairs = [("a", "cd"), ("ababab", "c")]  # of different lengths: one is padded
    for (short, description), loss in zip(pairs, model.losses(pairs), strict=True):
        given, wanted = model.bpe.pieces([short, description])
        ids = torch.tensor([[BOS, *given, CLS, *wanted, EOS]])
        log_p = model.next_logits(ids[:, :-1], [])[0][0].log_softmax(-1)
        of_tokens = log_p.gather(1, ids[0, 1:, None])[-len(wanted) - 1 :]
        torch.testing.assert_close(loss, -of_tokens.mean())


def test_the_checkpoint_names_its_own_fingerprint(checkpoint: Path, pairs: Path) -> None:
    model = load_system(ExpansionSystem, checkpoint).model
    assert model.fingerprint() == load_system(ExpansionSystem, checkpoint).model.fingerprint()
    other = pairs.with_name("other.ckpt")
    train_expansion(pairs, other, steps=1)
    assert load_system(ExpansionSystem, other).model.fingerprint() != model.fingerprint()


def test_any_language_model_of_transformers_answers_in_one_line(gpt2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    expansion = LanguageModelExpansion(gpt2, "red {prompt} moves", max_new_tokens=5)
    network = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gpt2)
    ids = tokenizer("red a circle moves", return_tensors="pt")["input_ids"]
    for _ in range(5):  # greedy, by hand
        ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    answer = " ".join(tokenizer.decode(ids[0, 4:], skip_special_tokens=True).split())
    assert expansion.expand(["a circle", "a circle"]) == [answer or "a circle"] * 2
    again = LanguageModelExpansion(gpt2, "red {prompt} moves", max_new_tokens=5)
    assert again.fingerprint() == expansion.fingerprint()
    longer = LanguageModelExpansion(gpt2, "red {prompt} moves", max_new_tokens=6)
    assert longer.fingerprint() != expansion.fingerprint()


def test_a_model_with_a_chat_template_is_asked_by_it(gpt2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "chat")
    template = "{% for m in messages %}blue {{ m.content }} left{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    asked = LanguageModelExpansion(folder, "red {prompt}", max_new_tokens=4)
    plain = LanguageModelExpansion(gpt2, "blue red {prompt} left", max_new_tokens=4)
    assert asked.expand(["a circle"]) == plain.expand(["a circle"])


def test_beside_a_checkpoint_it_is_found_and_no_expand_leaves_it(
    checkpoint: Path, tmp_path: Path
) -> None:
    beside = shutil.copy(checkpoint, tmp_path / "expansion.ckpt")
    last = tmp_path / "last.ckpt"
    found = Expansion().load(last, "cpu")
    assert found is not None
    assert found.expand(["a red circle moves left"]) == [long("red", "circle", "left")]
    assert Expansion(no_expand=True).load(last, "cpu") is None
    assert Expansion().load(tmp_path / "elsewhere" / "last.ckpt", "cpu") is None
    named = Expansion(expand=Path(beside)).load(tmp_path / "elsewhere" / "last.ckpt", "cpu")
    assert named is not None
    with pytest.raises(ValueError, match="--no-expand are both given"):
        Expansion(expand=Path(beside), no_expand=True)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"caption": "a"}, {}, "no row has a column --descriptive caption_descriptive; there are"),
        ({"caption": "a"}, {"short": "brief"}, "no row has a column --short brief"),
        (
            {"caption": " ", "caption_descriptive": "b"},
            {},
            "pairs.jsonl:1: caption = ' ': .* not a",
        ),
        (
            {"caption": "a", "caption_descriptive": "b " * 200},
            {},
            "'a' and its description .* at mo",
        ),
    ],
)
def test_what_holds_no_pairs_is_named_before_anything_trains(
    row: dict, options: dict, message: str, tmp_path: Path
) -> None:
    manifest = write(tmp_path / "pairs.jsonl", [{"path": "x.mp4", **row}])
    with pytest.raises(ValueError, match=message):
        train_expansion(manifest, tmp_path / "out.ckpt", **options)
    assert not (tmp_path / "out.ckpt").exists()


def test_rows_pair_every_short_wording_with_every_description(tmp_path: Path) -> None:
    row = {"path": "x.mp4", "caption": ["a", "b"], "caption_descriptive": ["c", "d"]}
    manifest = write(tmp_path / "pairs.jsonl", [row])
    expected = [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert read_pairs(manifest, "caption", "caption_descriptive") == expected


def test_a_prompt_beyond_the_context_is_named(checkpoint: Path, gpt2: Path) -> None:
    model = load_system(ExpansionSystem, checkpoint).model
    with pytest.raises(ValueError, match=r"prompt 'circle circle.*: has .* tokens: the context of"):
        model.expand(["circle " * 200])
    with pytest.raises(ValueError, match=r"max_new_tokens = 128: the context of .* holds 32"):
        LanguageModelExpansion(gpt2).expand(["a red circle"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "holds no config.json of a language model"),
        ("model.safetensors", "holds no language model to read"),
        ("tokenizer.json", "has no tokenizer to read: Couldn't instantiate"),
    ],
)
def test_a_folder_that_is_no_language_model_is_named(
    file: str, message: str, gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "spoiled")
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"--expand {folder}: {message}"):
        Expansion(expand=folder).load(tmp_path / "x.ckpt", "cpu")


def test_weights_that_are_missing_and_templates_without_a_prompt_are_named(
    gpt2: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(gpt2, tmp_path / "deeper")
    change_config(folder, n_layer=3)
    with pytest.raises(ValueError, match="lacks weights of its language model, such as"):
        LanguageModelExpansion(folder)
    with pytest.raises(ValueError, match=r"template = 'Describe': must hold {prompt}"):
        LanguageModelExpansion(gpt2, "Describe")
