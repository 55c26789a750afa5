"""Run by test_loads_alone.py in a process that has no llmsurgeon: loads converted checkpoints and reports on each.

python -I loads_alone.py FOLDER ...      one JSON object on stdout: folder -> what was found
"""

import json
import sys
import tempfile
from pathlib import Path

sys.modules["llmsurgeon"] = None  # any import of it fails

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs)


def problems(info):
    return {key: [str(v) for v in info[key]] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def difference(a, b):
    return (a - b).abs().max().item()


def full(model, tokens, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **kwargs).logits


def examine(folder):
    found = {}
    model, info = load(folder, output_loading_info=True)
    found["class"] = type(model).__name__
    found["loading"] = problems(info)
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    whole = full(model, tokens)
    found["logits"] = whole[0, -1].tolist()

    # Prefill, then one token at a time, further than any window.
    with torch.no_grad():
        out = model(input_ids=tokens[:, :11], use_cache=True)
        # Renamed in transformers 5.24.
        name = "cache" if "cache" in out else "past_key_values"
        pieces, cache = [out.logits], out[name]
        for at in range(11, 24):
            pieces.append(model(input_ids=tokens[:, at : at + 1], use_cache=True, **{name: cache}).logits)
    found["cached"] = difference(torch.cat(pieces, 1), whole)
    found["slots"] = len(cache.layers)
    found["filled"] = [layer.get_seq_length() for layer in cache.layers]

    greedy = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    found["generate"] = []

    def generate(prompt, mask):
        made = [model.generate(prompt, attention_mask=mask, use_cache=use, **greedy) for use in (True, False)]
        found["generate"].append(torch.equal(*made))
        return made[0]

    generated = generate(tokens[:1, :10], torch.ones(1, 10).long())

    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :10]], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 10)], 1).long()
    batch = torch.cat([padded, tokens[1:, :14]])
    batched = generate(batch, torch.cat([mask, torch.ones(1, 14).long()]))
    found["left_padding"] = torch.equal(batched[0, 4:], generated[0])

    found["eager"] = difference(full(load(folder, attn_implementation="eager"), tokens), whole)
    # Some of transformers' classes, such as Gemma 2's with its softcap, have no sdpa.
    sdpa = load(folder, attn_implementation="sdpa") if model._supports_sdpa else model
    found["sdpa"] = difference(full(sdpa, tokens), whole)

    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    found["without_gradient"] = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(input_ids=tokens, labels=tokens).loss.backward()
    found["checkpointed"] = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]

    # Named by hand: without an Auto class, nobody asks for the code in the checkpoint.
    stock = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
    with tempfile.TemporaryDirectory() as again:
        model.eval().save_pretrained(again)
        found["saved"] = sorted(path.name for path in Path(again).glob("*.py"))
        found["saved_by_hand"] = refusal(stock, again)
        second = load(again)
        found["again"] = difference(full(second, tokens), whole)
        found["same_tensors"] = all(torch.equal(t, model.state_dict()[n]) for n, t in second.state_dict().items())

    found["bodies"] = {auto: other(auto, folder, second, tokens) for auto in model.config.auto_map if auto in OTHERS}
    found["refusals"] = [
        refusal(AutoModelForCausalLM, folder, **arguments) for arguments in ({}, {"trust_remote_code": False})
    ]
    found["by_hand"] = [refusal(stock, folder), refusal(stock.config_class, folder)]
    return found


OTHERS = ("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")


def other(auto, folder, model, tokens):
    """What a load by another Auto class lacks, and how far its body is from the language model's own."""
    loader = getattr(transformers, auto)
    loaded, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        body = model.base_model(input_ids=tokens).last_hidden_state
        mine = loaded.base_model(input_ids=tokens).last_hidden_state
        made = loaded(input_ids=tokens[:1])
    if auto != "AutoModel":
        head = loaded.score if hasattr(loaded, "score") else loaded.classifier
        scored = head(body[:1] if auto == "AutoModelForTokenClassification" else body[:1, -1])
        made = difference(made.logits, scored)
    else:
        made = difference(made.last_hidden_state, body[:1])
    with tempfile.TemporaryDirectory() as again:
        loaded.save_pretrained(again)
        second = loader.from_pretrained(again, trust_remote_code=True)
        same = all(torch.equal(t, loaded.state_dict()[n]) for n, t in second.state_dict().items())
    return {"class": type(loaded).__name__, "difference": [difference(mine, body), made], "again": same} | problems(
        info
    )


def refusal(loader, folder, **arguments):
    try:
        loader.from_pretrained(folder, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def native(folder):
    """A plain checkpoint: no remote code, nothing missing."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, output_loading_info=True)
    tokens = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    return {
        "class": type(model).__name__,
        "loading": problems(info),
        "logits": full(model.eval(), tokens)[0, -1].tolist(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    reports = {f: native(f) if Path(f).name.startswith("native") else examine(f) for f in sys.argv[1:]}
    print("\n" + json.dumps(reports))  # a line of its own: transformers leaves its question open on the one before
