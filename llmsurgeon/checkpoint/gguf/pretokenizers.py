"""How a byte-level BPE tokenizer cuts text into words before it merges: the names that GGUF files use, and the steps.

A GGUF file says `tokenizer.ggml.pre: qwen2` where tokenizer.json spells the steps out. Each row below was held against
llama.cpp, which has the steps compiled in (`tests/formats/gguf/test_tokenizer.py`).
"""

# ruff: noqa: RUF001  (patterns for every script have characters that look alike)
from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_SLASH = REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = r"[^\r\n\p{L}\p{N}]?"
# Letters with an upper and a lower form.
CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-"
    "\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎ"
    "ꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""

# One step: ("split", regex), ("digits", one by one?), ("punctuation", behaviour) or ("gpt2",), the regex of ByteLevel.
Step = tuple[str, ...]


@dataclass(frozen=True)
class PreTokenizer:
    """One value of `tokenizer.ggml.pre`.

    `aliases` are names of files in the wild under which llama.cpp does the same. `whole_words`: a word that is a token
    is taken as it is, whatever the merges say. `caveat` says where llama.cpp differs, "" where it does not.
    """

    name: str
    steps: tuple[Step, ...]
    aliases: tuple[str, ...] = ()
    whole_words: bool = False
    composes: bool = False
    caveat: str = ""


PRE_TOKENIZERS = (
    PreTokenizer(
        "gpt-2",
        (("gpt2",),),
        ("phi-2", "olmo", "mpt", "jais", "gigachat", "mellum", "exaone4", "trillion", "granite-docling", "a.x-4.0"),
    ),
    PreTokenizer(
        "smollm",
        (("digits", "each"), ("gpt2",)),
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    ),
    PreTokenizer(
        "llama-bpe",
        (("split", CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST),),
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "lfm2"),
        whole_words=True,
    ),
    PreTokenizer(
        "dbrx",
        (("split", CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST),),
        ("smaug-bpe", "glm4", "chatglm-bpe"),
    ),
    PreTokenizer(
        "qwen2",
        (("split", CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST),),
        ("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "kormo", "solar-open", "grok-2"),
        composes=True,
    ),
    PreTokenizer(
        "qwen35",
        (
            (
                "split",
                CONTRACTIONS
                + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
                + REST.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"),
            ),
        ),
        composes=True,
    ),
    PreTokenizer(
        "tekken",
        (("split", f"{CASED}{UPPER}*{LOWER}+|{CASED}{UPPER}+{LOWER}*" + r"|\p{N}|" + REST_SLASH),),
        whole_words=True,
        caveat="capitals beyond A-Z and combining marks",
    ),
    PreTokenizer(
        "gpt-4o",
        (
            (
                "split",
                f"{CASED}{UPPER}*{LOWER}+{CONTRACTIONS}?|{CASED}{UPPER}+{LOWER}*{CONTRACTIONS}?"
                + r"|\p{N}{1,3}|"
                + REST_SLASH,
            ),
        ),
        ("llama4", "kanana2"),
        caveat="capitals beyond A-Z and combining marks",
    ),
    PreTokenizer(
        "deepseek-llm",
        (
            ("split", "[\r\n]"),
            ("split", rf"\s?[{CASED_LETTERS}]+"),
            ("split", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            ("split", r"\s+$"),
            ("split", "[一-龥ࠀ-一가-퟿]+"),
            ("digits", "each"),
        ),
        caveat="spaces and digits beyond ASCII",
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            ("split", "[\r\n]"),
            ("split", r"\s?\p{L}+"),
            ("split", r"\s?\p{P}+"),
            ("split", "[一-龥ࠀ-一가-퟿]+"),
            ("digits", "each"),
        ),
        caveat="spaces and digits beyond ASCII",
    ),
    PreTokenizer(
        "deepseek-v3",
        (
            ("split", r"\p{N}{1,3}"),
            ("split", "[一-龥぀-ゟ゠-ヿ]+"),
            (
                "split",
                PUNCTUATED + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
        ),
        ("hunyuan-dense",),
    ),
    PreTokenizer(
        "falcon",
        (("punctuation", "contiguous"), ("gpt2",), ("digits", "runs"), ("split", "[0-9][0-9][0-9]")),
    ),
    # What llama.cpp does with files that name none, or "default".
    PreTokenizer(
        "default",
        (
            ("split", r"[\p{P}\$\+<=>\^~\|]+"),
            ("split", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"),
            ("split", r"\p{N}+"),
            ("split", "[0-9][0-9][0-9]"),
        ),
    ),
    PreTokenizer("bloom", (("split", r" ?[^(\s|[.,!?…。，、।۔،])]+"),), ("poro-chat", "gpt3-finnish")),
)
BY_NAME = {name: pre for pre in PRE_TOKENIZERS for name in (pre.name, *pre.aliases)}


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[Step, ...] | None:
    """The steps of tokenizer.json's `pre_tokenizer`, None where it does what no step here can say."""
    parts = [pre_tokenizer] if pre_tokenizer else []
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    steps: list[Step] = []
    byte_level = False
    for part in parts:
        step = _step(part)
        if step is None:
            return None
        byte_level = byte_level or part["type"] == "ByteLevel"
        if step:
            steps.append(step)
    return tuple(steps) if byte_level else None


def _step(part: Mapping[str, Any]) -> Step | None:
    """The step of one pre-tokenizer: () where it only maps bytes, None where it is of no known kind."""
    match part:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return ("gpt2",) if part.get("use_regex", True) else ()
        case {"type": "Digits"}:
            return ("digits", "each" if part["individual_digits"] else "runs")
        case {"type": "Punctuation"}:
            return ("punctuation", str(part.get("behavior", "Isolated")).lower())
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}:
            # "Removed, inverted" keeps what matches and drops the rest: the same where the pattern matches all text.
            if (behavior, invert) in (("Isolated", False), ("Removed", True)):
                return ("split", spelled(regex))
    return None


def spelled(regex: str) -> str:
    r"""One spelling: characters composed, line ends as \r and \n, and other ways to write the contractions."""
    made = unicodedata.normalize("NFC", regex).replace("\r", r"\r").replace("\n", r"\n").replace(r"\p{N}{1}", r"\p{N}")
    for other in ("'(?i:[sdmt]|ll|ve|re)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"):
        made = made.replace(other, CONTRACTIONS)
    return made


def _canonical(step: Step) -> Step:
    return (step[0], spelled(step[1])) if step[0] == "split" else step


def recognise(pre_tokenizer: Mapping[str, Any] | None, whole_words: bool) -> PreTokenizer | None:
    """The row whose steps tokenizer.json's `pre_tokenizer` takes, None where there is none.

    Of two rows with the same steps, the one that treats whole words as the model (`ignore_merges`) does.
    """
    steps = steps_of(pre_tokenizer)
    found = [pre for pre in PRE_TOKENIZERS if tuple(map(_canonical, pre.steps)) == steps]
    return min(found, key=lambda pre: pre.whole_words != whole_words, default=None)


def to_tokenizer_json(pre: PreTokenizer) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer` that takes the steps of `pre`."""
    parts: list[dict[str, Any]] = []
    for kind, *rest in pre.steps:
        if kind == "split":
            parts.append({"type": "Split", "pattern": {"Regex": rest[0]}, "behavior": "Isolated", "invert": False})
        elif kind == "digits":
            parts.append({"type": "Digits", "individual_digits": rest[0] == "each"})
        elif kind == "punctuation":
            parts.append({"type": "Punctuation", "behavior": rest[0].capitalize()})
    gpt2 = ("gpt2",) in pre.steps
    at = [step for step in pre.steps if step != ("gpt2",)]
    # ByteLevel stands where the regex of GPT-2 acts, else last.
    place = pre.steps.index(("gpt2",)) if gpt2 else len(at)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": gpt2}
    parts.insert(place, byte_level)
    return {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else byte_level
