"""Embeddings by an encoder of their own: --embedding_model."""

import httpx
import numpy as np
import openai
import pytest
import torch

from serving.server.command import main
from tests.predictor.conftest import encoder  # noqa: F401  # a fixture
from tests.serving.server.test_server_faults import running


@pytest.fixture(scope="module")
def server(tiny_folders, encoder):  # noqa: F811
    with running(tiny_folders["glm2"], "--embedding_model", encoder) as found:
        found.encoder = encoder
        found.client = openai.OpenAI(base_url=f"{found.root}/v1", api_key="-", max_retries=0)
        yield found


def test_vectors_are_the_encoders(server):
    from transformers import AutoModel, AutoTokenizer

    texts = [f"list river {'lamp ' * n}" for n in range(20)]
    reply = server.client.embeddings.create(model=server.encoder.name, input=texts)
    tokenizer = AutoTokenizer.from_pretrained(server.encoder)
    model = AutoModel.from_pretrained(server.encoder, add_pooling_layer=False).eval()
    counted = 0
    for text, found in zip(texts, reply.data):
        ids = tokenizer(text, return_tensors="pt")
        counted += ids["input_ids"].numel()
        with torch.inference_mode():
            mean = model(**ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(found.embedding, (mean / mean.norm()).numpy(), atol=1e-5)
    assert reply.usage.prompt_tokens == counted and reply.model == server.encoder.name
    ids = tokenizer(texts[1])["input_ids"]
    by_ids = server.client.embeddings.create(model=server.encoder.name, input=ids)
    np.testing.assert_allclose(by_ids.data[0].embedding, reply.data[1].embedding, atol=1e-5)


def test_both_models_are_listed_and_neither_takes_the_others_requests(server):
    names = [model.id for model in server.client.models.list()]
    assert names[1:] == [server.encoder.name] and len(names) == 2
    assert server.client.models.retrieve(server.encoder.name).id == server.encoder.name
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        server.client.embeddings.create(model=names[0], input="x")
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        server.client.chat.completions.create(model=server.encoder.name, messages=messages)


def test_what_is_too_long_or_no_token(server):
    for body, message in (
        ({"input": "list " * 200}, "the encoder reads at most 128"),
        ({"input": [10**6]}, "token ids must be below"),
    ):
        reply = httpx.post(f"{server.root}/v1/embeddings", json=body)
        assert reply.status_code == 400 and message in reply.json()["error"]["message"]


def test_a_folder_without_an_encoder(tiny_folders, tmp_path, capsys):
    words = ["--model", tiny_folders["glm2"], "--policy", "fcfs", "--device", "cpu", "--port", "0"]
    assert main([*map(str, words), "--embedding_model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--embedding_model" in error and str(tmp_path) in error
