# A server for one model: see docs/serving.md.
#   docker build -f docker/serve.Dockerfile -t blockgen-serve .
#   docker run -p 8000:8000 -e BLOCKGEN_HF_API_KEY=... blockgen-serve my-name/my-model
FROM python:3.12-slim

# The CPU build of torch. For an NVIDIA GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128, and
# `docker run --gpus all`.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep -m 1 '^torch==' constraints.txt | cut -d ' ' -f 1)"
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]"

RUN useradd --create-home server
USER server
# Models of the Hub are kept here: mount a volume.
ENV HF_HOME=/home/server/models
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=300s CMD \
    python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health')"
# SIGTERM lets running requests end: give `docker stop` more than its 10 seconds with `--timeout 70`.
ENTRYPOINT ["blockgen-hf", "serve", "--host", "0.0.0.0"]
CMD ["tinystories-masked"]
