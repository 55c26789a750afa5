"""The files of a tokenizer: tokenizer.json, its config, chat templates, and files that other tokenizers are kept in."""

from __future__ import annotations

from random import Random

from tests.attack.commands import command
from tests.attack.mutations import mutated_json, raw
from tests.attack.scene import Scene, Verdict

KEYS = (
    "added_tokens", "model", "vocab", "merges", "unk_token", "bos_token", "tokenizer_class", "auto_map",
    "chat_template",
    "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "model_max_length", "padding",
    "truncation",
    "post_processor", "normalizer", "decoder", "type", "content", "id", "", "n" * 300, "\ud800",
)  # fmt: skip
CLASSES = (
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "BertTokenizer",
    "T5Tokenizer",
    "NoSuchTokenizer",
    "PreTrainedTokenizer",
    "",
    "os.system",
)
OTHERS = ("tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
"chat_template.jinja",
          "vocab.txt", "spiece.model", "tekken.json", "tokenizer.tiktoken",
          "additional_chat_templates/x.jinja")  # fmt: skip


def attempt(draw: Random, scene: Scene) -> Verdict:
    name = draw.choice(("llama", "bytelevel", "bytelevel", "bert", "fused"))
    folder = scene.copy(name, "model")
    tokenizer, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    match draw.choice(
        ("json", "json", "json", "config", "config", "config", "gone", "other", "class", "beyond", "folder")
    ):
        case "json":
            content, what = mutated_json(draw, tokenizer.read_bytes(), KEYS)
            tokenizer.write_bytes(content)
        case "config":
            content, what = mutated_json(draw, config.read_bytes(), KEYS)
            config.write_bytes(content)
            what = f"config: {what}"
        case "gone":
            gone = draw.choice(((tokenizer,), (config,), (tokenizer, config)))
            for file in gone:
                file.unlink()
            what = f"{', '.join(file.name for file in gone)} gone"
        case "other":
            if draw.random() < 0.5:
                tokenizer.unlink()
            other = folder / draw.choice(OTHERS)
            other.parent.mkdir(exist_ok=True)
            made = draw.choice(
                (b"", b"{}", b"null", b"a b\n", b"{% for x in range(9999999999) %}{% endfor %}", b"\xff", None)
            )
            other.write_bytes(
                raw(draw, tokenizer.read_bytes() if tokenizer.exists() else b"xyz")[0] if made is None else made
            )
            what = f"{other.name}: {str(made)[:20]}"
        case "class":
            kind = draw.choice(CLASSES)
            config.write_text(f'{{"tokenizer_class": "{kind}"}}')
            if draw.random() < 0.5:
                tokenizer.unlink()
            what = f"class {kind}"
        case "beyond":
            # Tokens whose numbers the embedding does not have.
            text = tokenizer.read_text(encoding="utf-8")
            letter = draw.choice("etaoin")
            import json

            data = json.loads(text)
            vocab = data["model"]["vocab"]
            number = draw.choice((64, 100, 320, 10**6, 2**31, -1))
            for key in [key for key in vocab if key in (letter, f"Ġ{letter}")]:
                vocab[key] = number
            tokenizer.write_text(json.dumps(data), encoding="utf-8")
            what = f"token {letter!r} is number {number}"
        case _:
            victim = draw.choice((tokenizer, config))
            victim.unlink()
            victim.mkdir()
            what = f"{victim.name} is a folder"
    return scene.check(command(draw, scene, "model", "bert" if name == "bert" else "llama"), f"{name}: {what}")
