#!/bin/bash
# Ask a server with curl: bash examples/curl.sh [http://127.0.0.1:8000]
set -eu
url=${1:-http://127.0.0.1:8000}
# Bodies are declared as JSON: a web page could send any other kind unasked.
ask() {
    curl --silent --show-error --fail-with-body --no-buffer "$url$1" \
        -H "Authorization: Bearer ${GLM_API_KEY:--}" -H "Content-Type: application/json" "${@:2}"
    echo
}

ask /health/ready
ask /v1/models
ask /v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is a pump?"}], "max_tokens": 32}'
ask /v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is a pump?"}], "max_tokens": 8, "stream": true}'
ask /v1/completions -d '{"prompt": "A water pump", "max_tokens": 8, "n": 2, "seed": 1}'
ask /v1/responses -d '{"input": "What is a pump?", "max_output_tokens": 16}'
ask /v1/embeddings -d '{"input": "pump", "encoding_format": "base64"}'
