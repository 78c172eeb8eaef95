# GLM Foundry's commands in an image, without a model: mount models at /models.
#   docker build -t glm-foundry:cpu .
#   docker build -t glm-foundry:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker build -t glm-foundry:ray --build-arg EXTRAS=serve,ray .     for docs/cluster.md
# docs/deploying.md says how to run it.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/glm-foundry
ENV PATH=/opt/glm-foundry/bin:$PATH
WORKDIR /src
# The large packages first: they stay when only the project changes.
COPY requirements.txt ./
RUN pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" --index-url "$TORCH_INDEX" \
    && pip install --no-cache-dir -r requirements.txt
COPY LICENSE README.md pyproject.toml train.py merge_lora.py predict.py glm_foundry.py ./
COPY chatglm chatglm
COPY finetune finetune
COPY predictor predictor
COPY serving serving
COPY ds_configs ds_configs
ARG EXTRAS=serve
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[$EXTRAS]"

FROM ${BASE}
LABEL org.opencontainers.image.title="GLM Foundry" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin foundry
COPY --from=build /opt/glm-foundry /opt/glm-foundry
# What writes caches writes them to /tmp, the one writable folder of a read-only container.
ENV PATH=/opt/glm-foundry/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /tmp
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# The slim base has no curl. A model may take minutes to load; until then the port does not answer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
# At 0.0.0.0 anyone who reaches the port may ask: run it with GLM_API_KEY, or with --allowed_hosts.
ENTRYPOINT ["glm-foundry"]
CMD ["serve", "--model", "/models/model", "--host", "0.0.0.0", "--policy", "fcfs"]
