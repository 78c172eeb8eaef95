"""Ask a server with LangChain: a chat, a structured answer, embeddings.

pip install langchain-openai
python examples/langchain_client.py [http://127.0.0.1:8000/v1]
"""

import os
import sys

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
key = os.environ.get("GLM_API_KEY", "-")
# LangChain wants the name of the served model.
model = openai.OpenAI(base_url=url, api_key=key).models.list().data[0].id


class Thing(BaseModel):
    """A thing."""

    name: str = Field(max_length=20)
    useful: bool


chat = ChatOpenAI(base_url=url, api_key=key, model=model, max_tokens=512)
print("chat:", chat.invoke("What is a water pump?").content)
structured = chat.with_structured_output(Thing, method="json_schema")
print("structured:", structured.invoke("What is a water pump?"))

# check_embedding_ctx_length: else LangChain sends token ids of another model's vocabulary.
embeddings = OpenAIEmbeddings(
    base_url=url, api_key=key, model=model, check_embedding_ctx_length=False
)
print("embeddings:", len(embeddings.embed_query("pump")))
