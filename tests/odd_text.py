"""Lines of text that tokenizers trip over, the same in every run."""

# ruff: noqa: RUF001, SIM905  (characters that look alike belong here; lists of words read better as text)
from __future__ import annotations

import random
import unicodedata

WORDS = r"""
the of and quick brown Fox don't I'M you'LL naïve café résumé Straße ÆON İstanbul ǅungla ﬁne ﬀ ａｂｃ x² m³ 10½
foo.bar() snake_case camelCase HTTPServer
a->b::c #include <stdio.h> C++ e=mc^2 100% $5.00 €9,99 #tag @user a/b\c ~/.bashrc
http://a.b/c?d=e&f=g#h user@example.com 1,234.56 -42 +7 3.14159 1e-9 0xDEADBEEF 192.168.0.1 2024-01-31T12:59:59Z
""".split()
SCRIPTS = """中文字符 漢字かな交じり文 カタカナ ひらがな 한국어 조선말
हिन्दी தமிழ் বাংলা ไทย ລາວ ខ្មែរ
မြန်မာ עברית
العربية فارسی اُردو
ελληνικά русский українська
Հայերեն ქართული ᏣᎳᎩ አማርኛ ᐃᓄᒃᑎᑐᑦ བོད་སྐད ᠮᠣᠩᠭᠣᠯ 𐌰𐌱𐌲 𝒜𝓫𝔠 𒀀𒁀 ①②③ ⅣⅧ ٠١٢٣ ०१२३ 一二三 ㍿ ﷽""".split()
EMOJI = "😀 🤷🏽‍♀️ 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇯🇵 ❤️ ☃ ✔︎ ©® ™ 🧑🏿‍🚀 #️⃣ 🫠".split()
MARKS = [
    "e\u0301",
    "a\u0308\u0323",
    "Z\u0351\u036b\u0343a\u0335l\u0334g\u0321o\u0322",
    "\u0301",
    "n\u0303o",
    "\u05e9\u05b8",
    "क\u094d\u0937",
]
SPACES = [" ", "  ", "   ", "\t", " \t ", "\u00a0", "\u2003", "\u3000", "\u200b", "\u200d", "\ufeff", "\r"]
SPACES += ["\r\n", "\n", "\n\n", " \n ", "\x0b", "\x0c", "\u2028", "\u0085"]
CONTROLS = ["\x01", "\x07", "\x1b[0m", "\x7f", "\u0080", "\u202e", "\u2066", "\ufffd", "\uffff", "\ue000", "\U000e0041"]
SPECIALS = """
<s> </s> <|im_start|> <|im_end|> <|endoftext|> <|eot_id|> <|im_start <im_end|> <|im_start|>user [INST] <0x41> <unk>
▁ ▁▁ Ġ Ċ <|file_sep|> <|system|> <bos> <start_of_turn>
""".split()
SIGNS = r""". , ! ? ... !? ' " `` '' “ ” — – - ( ) [[ ]] { } <= => && || /* */ // \n ` ^ ~ | $ …
。 ， 、 ！ 「 」 ¿""".split()


def odd_lines(count: int = 500, composed: bool = False, seed: int = 0) -> list[str]:
    """`count` lines that mix words, digits, scripts, emoji, combining marks, spaces, controls and special tokens.

    `composed`: in NFC, for engines that do not compose characters themselves.
    """
    draw = random.Random(seed)
    kinds = [WORDS, WORDS, SCRIPTS, EMOJI, MARKS, SPACES, CONTROLS, SPECIALS, SIGNS]
    lines = []
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.choice([*kinds, None])
            digits = "".join(draw.choices("0123456789", k=draw.randint(1, 9)))
            parts.append(draw.choice(kind) if kind else digits)
            parts.append(draw.choice(["", " ", " ", "  ", draw.choice(SPACES)]))
        line = "".join(parts)
        lines.append(unicodedata.normalize("NFC", line) if composed else line)
    return lines
