"""What transformers' own calls ask of a model, beyond plain forward passes and generate()."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    CompileConfig,
    DataCollatorWithFlattening,
    StaticCache,
)

from chatglm import load_model, load_tokenizer
from chatglm.families import CHATGLM_FAMILIES
from chatglm.layers import visible_keys

GREEDY = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
TEXTS = ["你好", "hello world 今天天气"]


class Loaded:
    """A tiny model, its tokenizer, and rows of ids with their logits."""

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.model = self.fresh()
        self.rows = [torch.tensor([self.tokenizer(text)["input_ids"]]) for text in TEXTS]
        with torch.no_grad():
            self.logits = [self.model(row).logits for row in self.rows]

    @property
    def family(self):
        return self.tokenizer.family

    def fresh(self):
        return load_model(self.folder, dtype=torch.float32)

    def padded(self, side):
        """(ids, 2-D mask) of the rows in one batch."""
        longest = max(row.shape[1] for row in self.rows)
        ids = torch.full((len(self.rows), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(self.rows):
            count = row.shape[1]
            place = slice(longest - count, None) if side == "left" else slice(count)
            ids[i, place], mask[i, place] = row[0], 1
        return ids, mask

    def visible(self, row):
        """(1, 1, S, S) bool: what each token of a row alone may see."""
        visible = torch.ones(row.shape[1], row.shape[1], dtype=torch.bool).tril()
        if self.family == "glm":
            sop = (row[0] == self.model.config.bos_token_id).nonzero()[0, 0]
            visible[:, :sop] = True
        return visible[None, None]


@pytest.fixture(scope="module", params=CHATGLM_FAMILIES)
def loaded(request, tiny_folders):
    return Loaded(tiny_folders[request.param])


@torch.no_grad()
def test_backends_by_name_and_attentions(loaded):
    model, row = loaded.fresh(), loaded.rows[1]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    out = model(row, output_attentions=True)
    torch.testing.assert_close(out.logits, loaded.logits[1], **CLOSE)
    assert len(out.attentions) == model.config.num_layers
    heads, count = model.config.num_attention_heads, row.shape[1]
    seen = loaded.visible(row).expand(1, heads, count, count)
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, heads, count))
        assert (weights > 0).equal(seen)
    answer = model.generate(row, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    assert [len(step) for step in answer.attentions] == [model.config.num_layers] * 4
    if loaded.family == "glm":
        with pytest.raises(ValueError, match="does not support Flash Attention 2"):
            model.set_attn_implementation("flash_attention_2")


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention(loaded):
    """Uncompiled: torch compiles its CPU kernel for minutes, and for heads of 16 and more alone."""
    with torch.compiler.set_stance("force_eager"):
        check_flex_attention(loaded)


def check_flex_attention(loaded):
    model = loaded.fresh()
    model.set_attn_implementation("flex_attention")
    for row, logits in zip(loaded.rows, loaded.logits):
        torch.testing.assert_close(model(row).logits, logits, **CLOSE)
    ids, mask = loaded.padded("left")
    logits = model(ids, attention_mask=mask).logits
    for i, row in enumerate(loaded.rows):
        torch.testing.assert_close(logits[i, -row.shape[1] :], loaded.logits[i][0], **CLOSE)


@torch.no_grad()
def test_masks_of_four_dimensions_in_both_senses(loaded):
    model, row = loaded.model, loaded.rows[1]
    visible = loaded.visible(row)
    least = torch.finfo(torch.float32).min
    added = torch.zeros(visible.shape).masked_fill(~visible, least)
    for mask in (visible, visible.long(), ~visible, (~visible).long(), added):
        logits = model(row, attention_mask=mask).logits
        torch.testing.assert_close(logits, loaded.logits[1], **CLOSE)
    wanted = model.generate(row, **GREEDY)
    for mask in (visible, ~visible):
        assert torch.equal(model.generate(row, attention_mask=mask, **GREEDY), wanted)


@pytest.mark.parametrize("padding_rows_see", ["nothing", "themselves"])
@pytest.mark.parametrize("queries", [1, 5])
def test_the_sense_of_a_mask_is_told_by_its_content(queries, padding_rows_see):
    """Five keys, of which the first two of row 1 are padding."""
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    visible = torch.ones(5, 5).tril().bool() & real[:, None, None, :]
    visible &= real[:, None, :, None]
    if padding_rows_see == "themselves":
        visible |= torch.eye(5).bool()
    visible = visible[:, :, -queries:]
    assert torch.equal(visible_keys(visible), visible)
    assert torch.equal(visible_keys(~visible), visible)
    assert torch.equal(visible_keys(visible.long()), visible)


@torch.no_grad()
def test_flattened_batches(loaded):
    """DataCollatorWithFlattening puts rows end to end; positions begin anew."""
    features = [{"input_ids": row[0].tolist()} for row in loaded.rows]
    batch = DataCollatorWithFlattening()(features)
    assert batch["position_ids"].dim() == 2
    logits = loaded.model(**batch).logits
    wanted = torch.cat(loaded.logits, dim=1)
    torch.testing.assert_close(logits, wanted, **CLOSE)


@torch.no_grad()
def test_a_cache_of_fixed_size(loaded):
    model, row = loaded.model, loaded.rows[1]
    cache = StaticCache(config=model.config, max_cache_len=row.shape[1] + 9)
    head, last = row[:, :-1], row[:, -1:]
    if loaded.family == "glm":
        head = row  # its context is read as a whole
    model(head, past_key_values=cache, use_cache=True)
    if loaded.family != "glm":
        logits = model(last, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(logits[:, -1], loaded.logits[1][:, -1], **CLOSE)
    ids, mask = loaded.padded("left")
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    fixed = {"cache_implementation": "static"}
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **fixed), wanted)


@pytest.mark.slow
def test_compiled_steps_of_generate(loaded):
    """No graph break: with fullgraph, torch raises at one."""
    torch._dynamo.reset()
    model = loaded.fresh()
    ids, mask = loaded.padded("left")
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True  # generate() compiles on GPUs alone
    options = {"cache_implementation": "static", "compile_config": config}
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY, **options), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > compiled


@torch.no_grad()
def test_generate_from_embeddings(loaded):
    model, row = loaded.model, loaded.rows[1]
    embeds = model.get_input_embeddings()(row)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, loaded.logits[1], **CLOSE)
    answer = model.generate(row, **GREEDY)[:, row.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), answer)


def test_guidance(loaded):
    """Log-probabilities of the first step by their definition, arXiv 2306.17806, equation 7."""
    model, row = loaded.model, loaded.rows[1]
    options = {"guidance_scale": 1.5, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(row, **GREEDY, **options).scores[0]
    if loaded.family == "glm":  # no text: [gMASK] <sop> alone
        config = model.config
        without = torch.tensor([[config.gmask_token_id, config.bos_token_id]])
    else:  # transformers': the prompt's last token alone
        without = row[:, -1:]
    with torch.no_grad():
        free = model(without).logits[:, -1].log_softmax(-1)
    bound = loaded.logits[1][:, -1].log_softmax(-1)
    torch.testing.assert_close(found, free + 1.5 * (bound - free), atol=1e-4, rtol=1e-4)
    answers = model.generate(row, **GREEDY, guidance_scale=1.5, num_beams=2, num_return_sequences=2)
    assert len(answers) == 2


def test_an_early_exit_drafts_and_leaves_the_model_whole(loaded):
    model, row = loaded.fresh(), loaded.rows[1]
    depth, wanted = model.config.num_layers, model.generate(row, **GREEDY)
    assert torch.equal(model.generate(row, **GREEDY, assistant_early_exit=1), wanted)

    def fail(ids, scores):
        raise RuntimeError(f"with {model.config.num_layers} layers")

    with pytest.raises(RuntimeError, match="with 1 layers"):
        model.generate(row, **GREEDY, assistant_early_exit=1, logits_processor=[fail])
    assert model.config.num_layers == depth
    with torch.no_grad():
        torch.testing.assert_close(model(row).logits, loaded.logits[1])


@torch.no_grad()
def test_scores_of_sequences(loaded, tmp_path):
    torch.manual_seed(0)
    open_model = AutoModelForSequenceClassification.from_pretrained
    model = open_model(str(loaded.folder), num_labels=1, dtype=torch.float32).eval()
    states = [loaded.model.transformer(row).last_hidden_state[:, -1] for row in loaded.rows]
    wanted = model.score(torch.cat(states))
    alone = torch.cat([model(row).logits for row in loaded.rows])
    torch.testing.assert_close(alone, wanted, **CLOSE)
    for side in ("left", "right"):
        ids, mask = loaded.padded(side)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, **CLOSE)
    loss = model(ids, attention_mask=mask, labels=torch.zeros(2)).loss
    torch.testing.assert_close(loss, wanted.square().mean())
    model.save_pretrained(tmp_path)
    again = open_model(str(tmp_path)).eval()
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, wanted, **CLOSE)
