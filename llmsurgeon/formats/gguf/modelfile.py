"""An Ollama Modelfile beside a GGUF file: the file, the chat template in Ollama's words, where an answer ends.

A checkpoint's chat template is a Jinja program, Ollama's a Go template. What the program writes around each message is
found by asking it, with marks for messages, and held against it on other talks; a program that does more than that is
left to Ollama, which knows some templates by their text, and the Modelfile says so.

Instructions and variables: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx and docs/template.mdx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, str]
SYSTEM, ASKED, SAID, AGAIN = "zSYSTEMz", "zASKEDz", "zSAIDz", "zAGAINz"
QUOTES = '"""'
# transformers' names of generation settings, and Ollama's.
SETTINGS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the messages of a talk that the user begins and asks the model to go on with.

    system: before and behind a system message; None where the template takes none. silent: in its place where there is
    none. user, assistant: before and behind those; what opens the answer stands behind the user's.
    """

    system: tuple[str, str] | None
    silent: str
    user: tuple[str, str]
    assistant: tuple[str, str]

    def __call__(self, talk: Sequence[Message]) -> str:
        """The text of a talk."""
        first = talk[0]
        if first["role"] == "system" and self.system:
            text, rest = first["content"].join(self.system), talk[1:]
        else:
            text, rest = self.silent, talk
        return text + "".join(message["content"].join(getattr(self, message["role"])) for message in rest)

    def template(self) -> str:
        """As a Go template over Ollama's .System and .Messages."""
        said = [
            f'{{{{ if eq .Role "user" }}}}{self.user[0]}{{{{ .Content }}}}{self.user[1]}',
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant[0]}{{{{ .Content }}}}{self.assistant[1]}',
        ]
        messages = "{{ range .Messages }}" + "".join(said) + "{{ end }}{{ end }}"
        if self.system is None:
            return self.silent + messages
        before, behind = self.system
        return (
            f"{{{{ if .System }}}}{before}{{{{ .System }}}}{behind}{{{{ else }}}}{self.silent}{{{{ end }}}}{messages}"
        )


def turns_of(tokenizer: Any) -> Turns | None:
    """What a tokenizer's chat template writes around messages; None where it has none, or one that does more."""
    if not tokenizer.chat_template or "strftime_now" in str(tokenizer.chat_template):
        return None

    def text(talk: Sequence[Message]) -> str:
        made = str(tokenizer.apply_chat_template(list(talk), tokenize=False, add_generation_prompt=True))
        begin = tokenizer.bos_token or ""
        # llama.cpp puts this token there by itself.
        return made.removeprefix(begin) if begin and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else made

    try:
        found = _taken_apart(text)
        talks = [_talk("a b", "c"), _talk("Hi", "Yes.\n\nNo", "x"), _talk("1", "2", "3", "4", "5")]
        talks += [[{"role": "system", "content": "Be brief."}, *talk] for talk in talks] if found.system else []
        return found if all(found(talk) == text(talk) for talk in talks if talk[-1]["role"] == "user") else None
    except Exception:  # whatever a stranger's program does with talks that it does not like
        return None


def _talk(*contents: str) -> list[Message]:
    """Messages of the user and the model in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def _taken_apart(text: Any) -> Turns:
    talk = _talk(ASKED, SAID, AGAIN)
    silent, between, back, end = _split(text(talk), ASKED, SAID, AGAIN)
    try:
        before, behind, *_ = _split(text([{"role": "system", "content": SYSTEM}, *talk]), SYSTEM, ASKED, SAID, AGAIN)
    except Exception:  # it takes no system message
        before, behind = "", ""
    ways_to_the_user = [silent, back, *([behind] if before or behind else [])]
    user = _common_end(ways_to_the_user)
    cut = [way[: len(way) - len(user)] for way in ways_to_the_user]
    if not between.startswith(end):
        raise ValueError("what opens an answer is not what stands before an earlier one")
    return Turns((before, cut[2]) if len(cut) > 2 else None, cut[0], (user, end), (between[len(end) :], cut[1]))


def _common_end(texts: Sequence[str]) -> str:
    """What all of some texts end with."""
    length = next(
        (i for i, letters in enumerate(zip(*(t[::-1] for t in texts), strict=False)) if len(set(letters)) > 1), -1
    )
    shortest = min(texts, key=len)
    return shortest if length < 0 else shortest[len(shortest) - length :]


def _split(text: str, *marks: str) -> list[str]:
    """The texts around marks that stand there once each, in this order."""
    made = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"{mark} does not stand there once")
        made.append(before)
    return [*made, text]


def modelfile(file: Path, tokenizer: Any, generation: Mapping[str, Any], license: str | None = None) -> str:
    """The text of a Modelfile for `file`, which lies beside it; `generation` is generation_config.json."""
    lines = [f"# ollama create NAME -f {file.with_suffix('.Modelfile').name}", f"FROM ./{file.name}"]
    turns = turns_of(tokenizer)
    template = turns.template() if turns else ""
    plain = all("{{" not in part for part in _parts(turns)) if turns else False
    if turns and plain and QUOTES not in template:
        lines.append(f"TEMPLATE {QUOTES}{template}{QUOTES}")
    elif tokenizer.chat_template:
        lines.append(
            "# The chat template does more than to put texts around messages; Ollama looks for it in the file."
        )
    for key, name in SETTINGS.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append(f"PARAMETER {name} {value}")
    lines += [f"PARAMETER stop {token}" for token in _ends(tokenizer, generation)]
    if license:
        lines.append(f"LICENSE {QUOTES}{license}{QUOTES}")
    return "\n".join(lines) + "\n"


def _parts(turns: Turns) -> list[str]:
    return [turns.silent, *(turns.system or ()), *turns.user, *turns.assistant]


def _ends(tokenizer: Any, generation: Mapping[str, Any]) -> list[str]:
    """The tokens that end an answer, quoted."""
    ids = generation.get("eos_token_id")
    ids = [*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id]
    known = dict.fromkeys(i for i in ids if isinstance(i, int) and 0 <= i < len(tokenizer))
    tokens = [str(tokenizer.convert_ids_to_tokens(i)) for i in known]
    return [f'"{token}"' for token in tokens if token.isprintable() and '"' not in token]
