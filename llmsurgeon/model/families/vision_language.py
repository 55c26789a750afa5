"""Vision-language models: where their text tower is. Operations work on the tower; the rest of the file goes along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SURGEON_PREFIX = "surgeon_"


@dataclass(frozen=True)
class VisionLanguage:
    """A model whose config holds that of a text model under `text_config`.

    names: how files spell the text model's tensors, one alternative after the other: (prefix in the file, prefix in the
        text model by itself).
    uneven: families that the tower's modeling file knows; of others only uniform towers can be written.
    text_type: (model_type of the text config, the family that it is for text by itself), where the two differ.
    """

    model_type: str
    model_class: str
    names: tuple[tuple[tuple[str, str], ...], ...]
    uneven: tuple[str, ...] = ("llama",)
    text_type: tuple[str, str] | None = None
    examples: tuple[str, ...] = ()


TEXT_MODEL = (("model.text_model.", "model."), ("lm_head.", "lm_head."))

# As LLaVA's files, and Gemma 3's, spell it; and as their classes of today do.
LANGUAGE_MODEL = (
    (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
)

LLAVA = VisionLanguage(
    model_type="llava",
    model_class="LlavaForConditionalGeneration",
    names=LANGUAGE_MODEL,
    examples=("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"),
)
IDEFICS3 = VisionLanguage(
    model_type="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    names=(TEXT_MODEL,),
    examples=("HuggingFaceM4/Idefics3-8B-Llama3", "HuggingFaceTB/SmolVLM-Instruct"),
)
SMOLVLM = VisionLanguage(
    model_type="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    names=(TEXT_MODEL,),
    examples=("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"),
)

GEMMA3 = VisionLanguage(
    model_type="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    names=LANGUAGE_MODEL,
    uneven=(),
    examples=("google/gemma-3-4b-it", "google/gemma-3-27b-it"),
)
# Where there is no image, the three positions that a token has are one: Qwen2's. Published files name the text model's
# tensors as Qwen2's own files do.
QWEN2_VL = VisionLanguage(
    model_type="qwen2_vl",
    model_class="Qwen2VLForConditionalGeneration",
    names=(LANGUAGE_MODEL[1], (("model.", "model."), ("lm_head.", "lm_head."))),
    uneven=(),
    text_type=("qwen2_vl_text", "qwen2"),
    examples=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
)
QWEN2_5_VL = replace(
    QWEN2_VL,
    model_type="qwen2_5_vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    text_type=("qwen2_5_vl_text", "qwen2"),
    examples=("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-72B-Instruct"),
)

VISION_LANGUAGE: dict[str, VisionLanguage] = {
    each.model_type: each for each in (LLAVA, IDEFICS3, SMOLVLM, GEMMA3, QWEN2_VL, QWEN2_5_VL)
}


def vision_language_of(config: Mapping[str, Any]) -> VisionLanguage | None:
    """The declaration that a config.json belongs to, converted checkpoints included; None for other models."""
    return VISION_LANGUAGE.get(str(config.get("model_type", "")).removeprefix(SURGEON_PREFIX))
