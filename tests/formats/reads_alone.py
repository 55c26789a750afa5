"""Run in an environment of any transformers, without llmsurgeon: loads the checkpoints of forms.py and compares.

python -I reads_alone.py FOLDER      one JSON object on the last line of stdout: name -> what was found

    error         what the load or the forward pass raised, and nothing else
    difference    the largest one between the logits here and those of expected.json
    generation    whether text generated with a cache is the text without one; null for encoders
    missing       weights that the checkpoint has not got, or has and the model has not
"""

import json
import sys
import warnings
from pathlib import Path

sys.modules["llmsurgeon"] = None  # any import of it fails

import torch  # noqa: E402
import transformers  # noqa: E402

TOKENS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def read(folder, expected):
    auto = getattr(transformers, expected["auto"])
    kwargs = {"trust_remote_code": True} if expected["code"] else {}
    if expected["family"] == "gemma2":  # other kernels have no softcap, and before transformers 5 said nothing of it
        kwargs["attn_implementation"] = "eager"
    model, info = auto.from_pretrained(folder, output_loading_info=True, **kwargs)
    model.eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS).logits[:, -1]
    difference = (found - torch.tensor(expected["logits"])).abs().max().item()
    missing = sorted(
        {str(name) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]}
    )
    return {"difference": difference, "generation": generation(model, expected), "missing": missing}


def generation(model, expected):
    if expected["auto"] != "AutoModelForCausalLM":
        return None
    ids = TOKENS[:1, :10]
    how = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=14, min_new_tokens=14, do_sample=False, pad_token_id=0
    )
    return torch.equal(*(model.generate(ids, use_cache=cached, **how) for cached in (True, False)))


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    base, reports = Path(sys.argv[1]), {}
    for name, expected in json.loads((base / "expected.json").read_text()).items():
        try:
            reports[name] = read(base / name, expected)
        except Exception as error:
            reports[name] = {"error": one_line(error)}
    print("\n" + json.dumps({"transformers": transformers.__version__, "reports": reports}))
